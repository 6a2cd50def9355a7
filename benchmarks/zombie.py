"""Workers that come back from the dead: stopped until their streams have moved, then continued.

    python -m benchmarks.zombie [--cycles 50]

Two workers, streams all the time; in turns each worker's sidecar, or sidecar and engine, is stopped
until all its streams have gone on at the other one, and continued. What it then still says must
reach no client, what it held must be freed, and it must take work again within a second.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from unbroken.chaos.arena import Arena
from unbroken.chaos.load import Load
from unbroken.chaos.vocabulary import Component, Harm
from unbroken.request import request_to_proto
from unbroken.v1 import inference_service_pb2 as pb

NUM_STREAMS: Final = 12
MAX_TOKENS: Final = 300
BACK_WITHIN_S: Final = 1.0
MOVE_WITHIN_S: Final = 10.0
STOPPED: Final = (Component.SIDECAR, Component.HOST)
OPTIONS: Final = "--step-base-ms 10 --prefill-tokens-per-s 1000000 --prefill-tokens-max 8192"


@dataclass(slots=True)
class Figures:
    """What the cycles showed."""

    cycles: int = 0
    moved: int = 0
    """Streams that were at a worker when it was stopped."""
    not_moved: int = 0
    back_s: dict[Component, list[float]] = field(
        default_factory=lambda: {component: [] for component in STOPPED}
    )
    """From SIGCONT until all frontends send work there again and it holds nothing of before."""


async def measure(directory: Path, num_cycles: int) -> tuple[Figures, Load, str]:
    """All cycles; the figures, the load with its verdict, and what is held at the end."""
    figures = Figures()
    requests = [_request(index) for index in range(NUM_STREAMS)]
    async with (
        Arena(directory, num_workers=2, num_frontends=2, engine_options=OPTIONS) as arena,
        Load(arena, requests, num_streams=NUM_STREAMS) as load,
    ):
        for cycle in range(num_cycles):
            component = STOPPED[cycle // 2 % 2]
            await _cycle(arena, load, component, f"w{cycle % 2 + 1}", figures)
        await load.end()
        held = await arena.until_idle()
    return figures, load, held


async def _cycle(
    arena: Arena, load: Load, component: Component, victim: str, figures: Figures
) -> None:
    load.num_streams = NUM_STREAMS
    async with asyncio.timeout(30):
        while not await _streams_at(arena, victim):  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(0.02)
    fault = await arena.inject(component, Harm.STOP, victim)
    there = await _streams_at(arena, victim)
    load.num_streams = 0  # So that what is at the victim later is of before.
    give_up_at = time.monotonic() + MOVE_WITHIN_S
    left = there
    while left and time.monotonic() < give_up_at:
        await asyncio.sleep(0.02)
        left = there & await _streams_at(arena, victim)
    figures.moved += len(there - left)
    figures.not_moved += len(left)
    began = time.monotonic()
    await fault.end()
    while not await _is_back(arena, victim):
        if time.monotonic() > began + MOVE_WITHIN_S:
            break
        await asyncio.sleep(0.005)
    figures.back_s[component].append(time.monotonic() - began)
    figures.cycles += 1


async def _streams_at(arena: Arena, worker_id: str) -> set[str]:
    return {
        name
        for name, info in (await arena.streams()).items()
        if any(
            choice.state == pb.STREAM_STATE_RUNNING and choice.worker.worker_id == worker_id
            for choice in info.choices
        )
    }


async def _is_back(arena: Arena, worker_id: str) -> bool:
    """All frontends send work there, and it holds nothing."""
    return all([await arena.is_ready(worker_id, name) for name in arena.watchers])


def _request(index: int) -> pb.GenerateRequest:
    request = request_to_proto(
        f"zombie {index}",
        None,
        None,
        {"max_tokens": MAX_TOKENS, "temperature": 0.8, "seed": index, "migrations_max": 1000},
    )
    request.params.stopping.ignore_eos = True
    return request


def _ms(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[round(share * (len(ordered) - 1))] * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unbroken-zombie-") as directory:
        figures, load, held = uvloop.run(measure(Path(directory), arguments.cycles))
    verdict = load.verdict
    back_s = [wait_s for waits in figures.back_s.values() for wait_s in waits]
    if (example := verdict.counter_example) is not None:
        print(example, file=sys.stderr)  # noqa: T201 - What was promised and is not so.
    is_ok = (
        verdict.is_ok
        and not held
        and figures.moved > 0
        and not figures.not_moved
        and max(back_s) <= BACK_WITHIN_S
    )
    line = {
        "ok": is_ok,
        "cycles": figures.cycles,
        "streams": verdict.streams,
        "complete": verdict.complete,
        "moved": figures.moved,
        "not_moved": figures.not_moved,
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "changed": verdict.changed,
        "violations": len(verdict.violations),
        "held_at_the_end": held,
        "back_ms_p50": _ms(back_s, 0.5),
        "back_ms_max": {c.value: _ms(waits, 1.0) for c, waits in figures.back_s.items() if waits},
        "back_ms_max_allowed": BACK_WITHIN_S * 1e3,
    }
    print(json.dumps(line))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
