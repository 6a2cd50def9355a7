"""`make slabs-gpu`: continuous batching with its cache in slabs is killed; another goes on there.

    python -m tests.gpu.slabs [--device cpu] [--size tiny] [--streams 4]

An engine (`tests.gpu.slab_engine`) is killed in the middle of all its streams. The next one adopts
its pool, finds the pages that were full, and is given prompts and tokens so far: it shares those
pages with them, where transformers would have computed them. Tokens are compared with those of a
run that nobody disturbed; and, to show that they depend on it, one page is spoilt before it is
adopted, which has to be noticed. Needs PyTorch and transformers 5.17; no GPU with --device cpu.

Ends with one line of JSON.
"""

import argparse
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tests.gpu.slab_engine import PAGE_TOKENS, shape_of
from tests.memory_service.processes import ServiceProcess, serving
from worker import simulated_tokenizer

ANSWER_S_MAX: Final = 90.0
PROMPT_TOKENS: Final = {"tiny": 100, "1b": 500}
MAX_TOKENS: Final = {"tiny": 120, "1b": 300}
KILLED_AFTER: Final = {"tiny": 60, "1b": 150}
CAPACITY_BYTES: Final = 16 << 30


class Engine:
    """One process, and what it has said of its streams."""

    def __init__(
        self, service: ServiceProcess, device: str, size: str, pool: str, how: str
    ) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.gpu.slab_engine"),
                *(str(service.socket), device, size, pool, how),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.tokens: dict[str, list[int]] = {}
        self.over: set[str] = set()
        self.num_shared = 0
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def hear(self) -> dict[str, Any]:
        """What it says next."""
        said = self._said.get(timeout=ANSWER_S_MAX)
        assert said is not None, f"the engine ended with {self.process.wait(10)}"
        if "name" in said:
            assert not said["error"], said
            self.tokens[said["name"]] = said["tokens"]
            self.num_shared = said["num_shared"]
            if said["is_over"]:
                self.over.add(said["name"])
        return said

    def say(self, **wanted: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, prompts: dict[str, list[int]], max_tokens: dict[str, int]) -> None:
        for name, prompt in prompts.items():
            self.say(name=name, prompt=prompt, max_tokens=max_tokens[name])

    def until_over(self, number: int) -> None:
        while len(self.over) < number:
            self.hear()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)


def main() -> int:
    """Prove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.slabs")
    parser.add_argument("--device", default="gpu", choices=["cpu", "gpu"])
    parser.add_argument("--size", default="", choices=["", *PAGE_TOKENS])
    parser.add_argument("--streams", type=int, default=4)
    given = parser.parse_args()
    size = given.size or ("tiny" if given.device == "cpu" else "1b")
    if find_spec("torch") is None or find_spec("transformers") is None:
        say(json.dumps({"ok": False, "skipped": "no PyTorch, or no transformers"}))
        return 2
    device, flags = given.device, ()
    if device == "gpu":
        from unbroken.memory.cuda import CudaGpu
        from unbroken.memory.gpu import GpuUnavailable

        try:
            gpu = CudaGpu()
        except GpuUnavailable as error:
            say(json.dumps({"ok": False, "skipped": "no GPU", "detail": str(error)}))
            return 2
        device = gpu.uuid
        gpu.close()
        flags = ("--gpus", f"{device}={CAPACITY_BYTES}")
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory,
        serving(Path(directory), "--scrub-bytes-per-s", "0", *flags) as service,
    ):
        figures = prove(service, device, size, given.streams)
    figures["seconds"] = round(time.monotonic() - begun, 1)
    say(json.dumps(figures))
    return 0 if figures["ok"] else 1


def prove(service: ServiceProcess, device: str, size: str, num_streams: int) -> dict[str, Any]:
    """The truth, the kill, and what comes after it."""
    rng = random.Random(5)
    page = PAGE_TOKENS[size]
    prompts = {
        f"s{number}": [
            rng.randrange(3, simulated_tokenizer.VOCAB_SIZE) for _ in range(PROMPT_TOKENS[size])
        ]
        for number in range(num_streams)
    }
    all_tokens = dict.fromkeys(prompts, MAX_TOKENS[size])
    engines: list[Engine] = []

    def engine(pool: str, how: str) -> Engine:
        engines.append(Engine(service, device, size, pool, how))
        return engines[-1]

    try:
        truth = engine("truth", "create")
        truth.hear()
        truth.ask(prompts, all_tokens)
        truth.until_over(num_streams)
        truth.close()
        victim = engine("kv", "create")
        nexts = engine("kv", "adopt")
        assert nexts.hear()["loaded"]
        victim.hear()
        victim.ask(prompts, all_tokens)
        while min(len(victim.tokens.get(name, ())) for name in prompts) < KILLED_AFTER[size]:
            victim.hear()
        so_far = {name: list(victim.tokens[name]) for name in prompts}
        spoilt = sorted(prompts)[0]
        victim.say(spoil=spoilt)
        while "spoilt" not in victim.hear():
            pass
        os.kill(victim.process.pid, signal.SIGKILL)
        victim.process.wait(30)
        killed = time.monotonic()
        nexts.say()
        ready = nexts.hear()
        nexts.ask(
            {name: prompts[name] + so_far[name] for name in prompts},
            {name: MAX_TOKENS[size] - len(so_far[name]) for name in prompts},
        )
        while len(nexts.tokens) < num_streams:
            nexts.hear()
        first_s = time.monotonic() - killed
        num_shared = nexts.num_shared
        nexts.until_over(num_streams)
        equal = [so_far[name] + nexts.tokens[name] == truth.tokens[name] for name in prompts]
    finally:
        for one in engines:
            one.close()
    # A page is told of a moment after its last token: one of each stream may be missing.
    # Of the stream whose first page was spoilt none can be taken.
    intact = prompts.keys() - {spoilt}
    num_known = sum((len(prompts[name]) + len(so_far[name]) - 1) // page for name in intact)
    least = (num_known - len(intact)) * page
    shape = shape_of(size)
    return {
        "ok": all(equal) and least <= num_shared <= num_known * page and ready["num_spoilt"] == 1,
        "device": device,
        "pool_mib": round(2 * shape.num_layers * shape.tensor_bytes / 2**20),
        "streams": num_streams,
        "equal": sum(equal),
        "tokens_before_the_kill": sum(map(len, so_far.values())),
        "pages_found": ready["num_found"],
        "tokens_taken_over": num_shared,
        "tokens_known": num_known * page,
        "pages_spoilt": ready["num_spoilt"],
        "pool_adopted_and_compared_ms": ready["pool_ms"],
        "exit_to_first_tokens_ms": round(first_s * 1000, 1),
    }


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
