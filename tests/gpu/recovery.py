"""`make recovery-gpu`: an engine is killed in mid-sequence; another goes on from its very KV.

    python -m tests.gpu.recovery [--trials 10] [--shapes 1b,7b]

Each trial kills an engine (`tests.gpu.engine`) somewhere in a step, and takes the time until the
next one has a token: from copies in the store, or in place in the dead engine's pool. All tokens
and a digest of all their logits are those of a run that nobody disturbed. Beside it, in the same
process: what it takes to prefill everything again. Needs a GPU, and PyTorch.

Ends with one line of JSON. Exits with 1 if a promise was broken, and with 2 without a GPU.
"""

import argparse
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tests.gpu.model import SHAPES
from tests.memory_service.processes import ServiceProcess, serving
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.gpu import GpuUnavailable

ANSWER_S_MAX: Final = 120.0
PROMPTS: Final = {"1b": 7936, "7b": 32_512, "tiny": 256}
STORE_MS_MAX: Final = {"1b": 12.0, "7b": 60.0, "tiny": 1000.0}
"""From the kill to the next token, at the median."""
IN_PLACE_MS_MAX: Final = 100.0
"""The same, in each of the trials."""
ENVIRONMENT: Final = {"CUDA_DEVICE_MAX_CONNECTIONS": "2"}
"""The driver proves an engine dead when it has stopped all its queues, one after the other, and has
eight by default. An engine with one stream needs one: its death takes two thirds of the time."""
COST_SHARE_MAX: Final = 0.03
"""Of a step, for storing every token while the next one is computed."""
AT_ONCE: Final = {"1b": 5, "7b": 2, "tiny": 3}
"""Engines that wait beside each other: each has a context, and a pool."""
ORPHAN_GRACE_S: Final = 2
CAPACITY_BYTES: Final = 44 << 30
REFERENCE_TOKENS: Final = 160
SAID_MAX: Final = 80
"""Tokens before the kill, if a step takes what it took before."""
FOLLOWED: Final = 48
"""Tokens after the first one that are compared."""


class Engine:
    """One process."""

    def __init__(self, service: ServiceProcess, uuid: str, shape: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.gpu.engine"),
                *(str(service.socket), uuid, shape, str(PROMPTS[shape])),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
        )

    def ask(self, verb: str, **wanted: object) -> None:
        """Without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, **wanted}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_S_MAX)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"expected an answer of engine {self.process.pid}, it is {self.process.poll()}"
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def call(self, verb: str, **wanted: object) -> dict[str, Any]:
        self.ask(verb, **wanted)
        return self.answer()

    def kill(self) -> int:
        """When it was killed, in nanoseconds."""
        at = time.monotonic_ns()
        os.kill(self.process.pid, signal.SIGKILL)
        return at

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for file in (self.process.stdin, self.process.stdout):
            if file is not None:
                file.close()


@dataclass(slots=True)
class Seen:
    """Of all trials of one kind."""

    to_hint: list[float] = field(default_factory=list[float])
    to_kv: list[float] = field(default_factory=list[float])
    to_token: list[float] = field(default_factory=list[float])
    prefill: list[float] = field(default_factory=list[float])
    num_equal: int = 0
    num_compared: int = 0
    num_prefill_equal: int = 0
    replayed: list[int] = field(default_factory=list[int])


class Recovery:
    """All trials with one model."""

    def __init__(self, service: ServiceProcess, uuid: str, shape: str, trials: int) -> None:
        self.service = service
        self.uuid = uuid
        self.shape = shape
        self.trials = trials
        self.seed = 0
        self.figures: dict[str, Any] = {}
        self.violations: list[str] = []
        self._engines: list[Engine] = []
        self._step_s = 0.0

    def run(self) -> None:
        """Everything."""
        builder = self._engine()
        builder.call("build")
        self.close(builder)
        for mode in ("store", "in_place"):
            seen = Seen()
            owner = self._ready(1, has_pool=True)[0]
            if mode == "store":
                self._same_twice(owner)
                self.cost(owner)
            standbys: list[Engine] = []
            for number in range(self.trials):
                if not standbys:
                    count = min(AT_ONCE[self.shape], self.trials - number)
                    standbys = self._ready(count, has_pool=mode == "store")
                standby = standbys.pop(0)
                self.trial(mode, owner, standby, seen)
                self.close(owner)
                owner = standby
            self.close(owner)
            self.judge(mode, seen)
            say(f"{self.shape} {mode}: {self.figures[mode]}")

    def _engine(self) -> Engine:
        engine = Engine(self.service, self.uuid, self.shape)
        self._engines.append(engine)
        return engine

    def _ready(self, count: int, *, has_pool: bool) -> list[Engine]:
        engines = [self._engine() for _ in range(count)]
        for engine in engines:
            engine.ask("ready", has_pool=has_pool)
        attached = [engine.answer()["attached_ms"] for engine in engines]
        self.figures.setdefault("weights_attached_and_compared_ms", []).extend(
            round(one, 2) for one in attached
        )
        return engines

    def close(self, engine: Engine) -> None:
        engine.close()
        self._engines.remove(engine)

    def close_all(self) -> None:
        for engine in list(self._engines):
            self.close(engine)

    def _same_twice(self, engine: Engine) -> None:
        """Without this, nothing else says anything."""
        one, other = (engine.call("reference", seed=4711, count=64) for _ in range(2))
        self.expect(one == other, "two runs that nobody disturbed differ")
        self.figures["distinct_tokens_of_65"] = len(set(one["tokens"]))

    def cost(self, engine: Engine) -> None:
        found = engine.call("cost", count=128, rounds=4)
        shares = {
            name: round(found[name]["mean_ms"] / found["none"]["mean_ms"] - 1, 4)
            for name in ("meanwhile", "before")
        }
        p50 = round(found["meanwhile"]["p50_ms"] / found["none"]["p50_ms"] - 1, 4)
        self.figures["step"] = found
        self._step_s = found["none"]["mean_ms"] / 1000
        self.figures["cost_share"] = {**shares, "meanwhile_p50": p50}
        self.expect(p50 <= COST_SHARE_MAX, f"storing costs {p50:.1%} of a step")
        say(f"{self.shape} cost: {found} {self.figures['cost_share']}")

    def trial(self, mode: str, owner: Engine, standby: Engine, seen: Seen) -> None:
        """One kill."""
        self.seed += 1
        is_stored = mode == "store"
        path = str(self.service.directory / f"said-{self.seed}.sock")
        expected = owner.call("reference", seed=self.seed, count=REFERENCE_TOKENS)
        standby.call("stand", seed=self.seed, path=path)
        told = owner.call("own", seed=self.seed, path=path, is_stored=is_stored)
        if is_stored:
            warm = standby.call("warm")["warm"]
            self.expect(warm == 1, "the first block is stored")
        else:
            standby.call("attach", name=told["pool"])
        standby.ask("succeed", is_stored=is_stored, count=FOLLOWED)
        owner.ask("go")
        time.sleep(random.Random(self.seed).uniform(20, SAID_MAX) * self._step_s)
        killed = owner.kill()
        found = standby.answer()
        seen.to_hint.append((found["hinted"] - killed) / 1e6)
        seen.to_kv.append((found["there"] - killed) / 1e6)
        seen.to_token.append((found["done"] - killed) / 1e6)
        seen.replayed.append(found["replayed"])
        count = len(found["tokens"])
        is_equal = found["is_replay_equal"] and all(
            found[what] == expected[what][:count] for what in ("tokens", "digests")
        )
        seen.num_equal += is_equal
        seen.num_compared += count
        self.expect(
            8 < found["num_said"] < REFERENCE_TOKENS - FOLLOWED,
            f"killed after {found['num_said']} tokens",
        )
        owner.process.wait(30)
        prefill = standby.call("again", num_said=found["num_said"])
        seen.prefill.append(prefill["ms"])
        at = found["num_said"]
        seen.num_prefill_equal += prefill["digest"] == expected["digests"][at]

    def judge(self, mode: str, seen: Seen) -> None:
        most = STORE_MS_MAX[self.shape] if mode == "store" else IN_PLACE_MS_MAX
        self.figures[mode] = {
            "trials": self.trials,
            "bit_equal": seen.num_equal,
            "tokens_compared": seen.num_compared,
            "kill_to_hint_ms": _ms(seen.to_hint),
            "kill_to_kv_ms": _ms(seen.to_kv),
            "kill_to_token_ms": _ms(seen.to_token),
            "steps_replayed_max": max(seen.replayed),
            "prefill_again_ms": _ms(seen.prefill),
            "prefill_bit_equal": seen.num_prefill_equal,
        }
        self.expect(seen.num_equal == self.trials, f"{mode}: {seen.num_equal} were bit-equal")
        took = statistics.median(seen.to_token) if mode == "store" else max(seen.to_token)
        self.expect(took <= most, f"{mode}: the next token took {took:.1f} ms")

    def expect(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.violations.append(f"{self.shape}: {what}")


def _ms(taken: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(taken), 2), "max": round(max(taken), 2)}


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    """Prove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.recovery")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--shapes", default="1b,7b")
    given = parser.parse_args()
    begun = time.monotonic()
    try:
        gpu = CudaGpu()
    except GpuUnavailable as error:
        say(json.dumps({"ok": False, "skipped": "no GPU", "detail": str(error)}))
        return 2
    if find_spec("torch") is None:
        say(json.dumps({"ok": False, "skipped": "no PyTorch"}))
        return 2
    name, uuid = gpu.name, gpu.uuid
    gpu.close()
    figures: dict[str, Any] = {}
    violations: list[str] = []
    for shape in given.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:  # noqa: SIM117
            with serving(
                Path(directory),
                *("--scrub-bytes-per-s", "0", "--orphan-grace-s", str(ORPHAN_GRACE_S)),
                *("--gpus", f"{uuid}={CAPACITY_BYTES}"),
            ) as service:
                recovery = Recovery(service, uuid, shape, given.trials)
                try:
                    recovery.run()
                except AssertionError as error:
                    recovery.violations.append(f"{shape}: {error}")
                finally:
                    recovery.close_all()
        figures[shape] = {
            "weights_gb": round(SHAPES[shape].weight_bytes / 1e9, 1),
            "prompt": PROMPTS[shape],
            "kv_mib": round(PROMPTS[shape] * SHAPES[shape].token_bytes / 2**20),
            **recovery.figures,
        }
        violations += recovery.violations
    for violation in violations:
        say(violation)
    told = {
        "ok": not violations,
        "gpu": name,
        **figures,
        "violations": len(violations),
        "seconds": round(time.monotonic() - begun, 1),
    }
    say(json.dumps(told))
    return 0 if told["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
