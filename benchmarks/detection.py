"""How long streams stand still when something under them fails, until they go on.

    python -m benchmarks.detection [--trials 20] [--fault engine/kill ...]

Two simulated workers with steps of 10 ms, 40 streams, the default configuration. The wait is the
longest that a stream of the victim had between two tokens, from its last token before the *fault*
on, by the clock of its client, which is a process of its own. Every fault is seen to have taken
effect.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from unbroken.chaos.arena import Arena
from unbroken.chaos.checker import Came, Verdict, check, longest_wait_s
from unbroken.chaos.processes import NoEffect
from unbroken.chaos.vocabulary import Component, Harm
from unbroken.request import request_to_proto
from unbroken.v1 import inference_service_pb2 as pb

STEP_S: Final = 0.010
NUM_STREAMS: Final = 40
MAX_TOKENS: Final = 150
FAULT_AFTER_TOKENS: Final = (40, 60)
"""The fault comes when the first stream has so many tokens, at a random moment of a step."""
HUNG_S: Final = 8.0
"""Streams that are not over so long after a fault are hung."""

ENGINE_OPTIONS: Final = (
    f"--step-base-ms {STEP_S * 1e3:g} --prefill-tokens-per-s 1000000 --prefill-tokens-max 8192"
)

KILLED_S: Final = 0.060
SILENT_S: Final = 1.200
FRONTEND_KILLED_S: Final = 0.150
P99_MAX_S: Final[Mapping[tuple[Component, Harm], float]] = {
    (Component.ENGINE, Harm.KILL): KILLED_S,
    (Component.SIDECAR, Harm.KILL): KILLED_S,
    (Component.SIDECAR, Harm.STOP): SILENT_S,
    (Component.LINK_BOTH, Harm.BLACKHOLE): SILENT_S,
    (Component.LINK_UP, Harm.BLACKHOLE): SILENT_S,
    (Component.LINK_DOWN, Harm.BLACKHOLE): SILENT_S,
    (Component.ENGINE, Harm.STOP): SILENT_S,
    (Component.FRONTEND, Harm.KILL): FRONTEND_KILLED_S,
}


@dataclass(slots=True)
class Figures:
    """All trials of one fault."""

    trials: int = 0
    streams_hit: int = 0
    hung: int = 0
    waits_s: list[float] = field(default_factory=list[float])
    others_s: list[float] = field(default_factory=list[float])
    """Longest wait of each stream that was not hit: the noise of the machine."""
    verdict: Verdict = field(default_factory=Verdict)

    def to_json(self, p99_max_s: float) -> Mapping[str, object]:
        waits = sorted(self.waits_s)
        p99 = _percentile_ms(waits, 0.99)
        is_fast = p99 is not None and p99 <= p99_max_s * 1e3
        return {
            "ok": is_fast and self.verdict.is_ok and not self.hung,
            "trials": self.trials,
            "streams_hit": self.streams_hit,
            "hung": self.hung,
            "p50": _percentile_ms(waits, 0.5),
            "p90": _percentile_ms(waits, 0.9),
            "p99": p99,
            "max": _percentile_ms(waits, 1.0),
            "p99_max": p99_max_s * 1e3,
            "unaffected_p99": _percentile_ms(sorted(self.others_s), 0.99),
        }


async def measure(
    directory: Path, faults: Sequence[tuple[Component, Harm]], num_trials: int, seed: int
) -> Mapping[tuple[Component, Harm], Figures]:
    """All trials, the faults in turns."""
    rng = random.Random(seed)
    figures = {fault: Figures() for fault in faults}
    async with Arena(
        directory, num_workers=2, num_frontends=2, engine_options=ENGINE_OPTIONS, seed=seed
    ) as arena:
        for number in range(num_trials):
            for component, harm in faults:
                name = f"d{number}-{component.value.replace(' ', '-')}-{harm.value}"
                await _trial(arena, component, harm, name, rng, figures[component, harm])
                arena.client.forget()
            # All of it takes a quarter of an hour.
            print(f"trial {number + 1} of {num_trials} of each fault", file=sys.stderr)  # noqa: T201
    return figures


async def _trial(
    arena: Arena, component: Component, harm: Harm, name: str, rng: random.Random, into: Figures
) -> None:
    requests = {
        f"{name}-{index}": _request(f"{name}-{index}", index) for index in range(NUM_STREAMS)
    }
    truths = await arena.truths(requests)
    client = arena.client
    for stream, request in requests.items():
        client.ask(stream, request)
    first, at_tokens = next(iter(requests)), rng.randint(*FAULT_AFTER_TOKENS)
    async with asyncio.timeout(30):
        await client.until(lambda: client.num_tokens(first) >= at_tokens)
    infos = await arena.streams()
    await asyncio.sleep(rng.uniform(0, STEP_S))
    places = {stream: infos[stream].choices[0].worker.worker_id for stream in requests}
    is_frontend = component is Component.FRONTEND
    victim = "f1" if is_frontend else f"w{rng.randint(1, 2)}"
    fault = await arena.inject(component, harm, victim)
    try:
        async with asyncio.timeout(HUNG_S):
            await client.until(lambda: not client.open_streams & requests.keys())
    except TimeoutError:
        into.hung += len(client.open_streams & requests.keys())
    await arena.heal(fault)
    async with asyncio.timeout(60):
        await client.until(lambda: not client.open_streams & requests.keys())
    if held := await arena.until_idle():
        raise NoEffect(f"expected engines to be idle before the next trial: {held}")
    history = arena.history_of(requests.keys())
    into.trials += 1
    into.verdict.add(check(history, truths))
    read_at: defaultdict[str, list[float]] = defaultdict(list)
    for event in history:
        if isinstance(event, Came) and event.token_ids:
            read_at[event.stream].append(event.at)
    for stream, times in read_at.items():
        wait_s = longest_wait_s(times, fault.at)
        if is_frontend or places[stream] == victim:
            into.streams_hit += 1
            if wait_s is not None:
                into.waits_s.append(wait_s)
        elif wait_s is not None:
            into.others_s.append(wait_s)


def _request(name: str, index: int) -> pb.GenerateRequest:
    request = request_to_proto(
        f"stream {index}", None, None, {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    )
    request.request_id = name
    return request


def _percentile_ms(values: Sequence[float], share: float) -> float | None:
    return round(values[round(share * (len(values) - 1))] * 1e3, 1) if values else None


def _fault(text: str) -> tuple[Component, Harm]:
    component, _, harm = text.replace("_", " ").partition("/")
    fault = Component(component), Harm(harm)
    if fault not in P99_MAX_S:
        raise argparse.ArgumentTypeError("no such fault is measured")
    return fault


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--fault", type=_fault, action="append", help="link_up/blackhole and so on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = arguments.fault or list(P99_MAX_S)
    with tempfile.TemporaryDirectory(prefix="unbroken-detection-") as directory:
        found = uvloop.run(measure(Path(directory), faults, arguments.trials, arguments.seed))
    by_name = {
        f"{component.value}/{harm.value}": figures.to_json(P99_MAX_S[component, harm])
        for (component, harm), figures in found.items()
    }
    total = Verdict()
    for figures in found.values():
        total.add(figures.verdict)
    if (example := total.counter_example) is not None:
        print(example, file=sys.stderr)  # noqa: T201 - What was promised and is not so.
    is_ok = all(figures["ok"] for figures in by_name.values())
    line = {
        "ok": is_ok,
        "streams": total.streams,
        "complete": total.complete,
        "lost": total.lost,
        "duplicated": total.duplicated,
        "changed": total.changed,
        "violations": len(total.violations),
        "wait_ms": by_name,
    }
    print(json.dumps(line))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
