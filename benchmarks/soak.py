"""Healthy workers under hard conditions: nobody may be taken for dead, slow or hung.

    python -m benchmarks.soak [--minutes 30]

Two workers; prompts that take up to 20 s, on one of them in a single step in which nothing else
comes from the engine; now and then bursts of requests; and half of the time burners that keep all
cores busy. What counts is what the mesh did to healthy workers: ejections, links given up, engines
restarted, streams moved. All have to be 0. Suspicions are counted too: they cost nothing.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from unbroken.chaos.arena import Arena
from unbroken.chaos.checker import Verdict
from unbroken.chaos.load import Load
from unbroken.errors import UnbrokenError
from unbroken.request import request_to_proto
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

PREFILL_TOKENS_PER_S: Final = 1_000
PROMPT_TOKENS_MAX: Final = 20_000
"""20 s of prefill."""
NUM_STREAMS: Final = 10
BURST_STREAMS: Final = 60
BURST_EVERY_S: Final = 20.0
BURST_LASTS_S: Final = 3.0
BURN_LASTS_S: Final = 15.0
BURN_EVERY_S: Final = 30.0
LOOK_EVERY_S: Final = 1.0

_OPTIONS: Final = f"--step-base-ms 20 --prefill-tokens-per-s {PREFILL_TOKENS_PER_S}"
_SPLIT: Final = f"{_OPTIONS} --prefill-tokens-max 512"
_WHOLE: Final = f"{_OPTIONS} --prefill-tokens-max 32768"
_COUNTERS: Final = {
    "ejections": "unbroken_frontend_ejections",
    "suspicions": "unbroken_frontend_suspects",
    "links_lost": "unbroken_frontend_links_lost",
    "migrations": "unbroken_frontend_migrations",
    "engines_lost": "unbroken_sidecar_engine_failures",
}
"""Families of metrics, each summed over its labels and processes."""
_MUST_BE_ZERO: Final = ("ejections", "links_lost", "migrations", "engines_lost", "stalls")
_LOADS: Final = (
    *[(8, 40), (30, 80), (200, 60)] * 3,
    *[(2_000, 20)] * 3,
    *[(5_000, 10)] * 2,
    (12_000, 5),
    (PROMPT_TOKENS_MAX, 5),
)
"""Prompt and output tokens."""


@dataclass(slots=True)
class Figures:
    """What the mesh did."""

    counts: Counter[str] = field(default_factory=Counter[str])
    stalls_seen: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    burning_s: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    held: str = ""


async def measure(directory: Path, seconds: float, seed: int) -> Figures:
    """Keep it up for so long."""
    rng = random.Random(seed)
    figures = Figures()
    requests = [_request(rng, *load) for load in rng.sample(_LOADS, len(_LOADS))]
    async with Arena(
        directory,
        num_workers=2,
        num_frontends=2,
        engine_options=_SPLIT,
        sidecar_flags=("--metrics-listen", "127.0.0.1:0"),
        frontend_flags=("--metrics-listen", "127.0.0.1:0"),
        flags_of={"w2": ("--engine-options", _WHOLE)},
        seed=seed,
    ) as arena:
        before = await asyncio.to_thread(_counts, arena)
        async with Load(arena, requests, num_streams=NUM_STREAMS, timeout_s=600) as load:
            background = [
                asyncio.create_task(_bursts(load, rng)),
                asyncio.create_task(_burns(figures)),
                asyncio.create_task(_look(arena, figures)),
            ]
            await asyncio.wait(background, timeout=seconds)
            for task in background:
                task.cancel()
            for result in await asyncio.gather(*background, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
            await load.end(limit_s=300)
        figures.verdict = load.verdict
        after = await asyncio.to_thread(_counts, arena)
        figures.counts = after - before
        figures.held = await arena.until_idle()
    return figures


async def _bursts(load: Load, rng: random.Random) -> None:
    while True:
        await asyncio.sleep(BURST_EVERY_S * rng.uniform(0.5, 1.5))
        load.num_streams = BURST_STREAMS
        await asyncio.sleep(BURST_LASTS_S)
        load.num_streams = NUM_STREAMS


async def _burns(figures: Figures) -> None:
    while True:
        async with _burners():
            began = time.monotonic()
            await asyncio.sleep(BURN_LASTS_S)
            figures.burning_s += time.monotonic() - began
        await asyncio.sleep(BURN_EVERY_S - BURN_LASTS_S)


@asynccontextmanager
async def _burners() -> AsyncGenerator[None]:
    """All cores busy, for as long as it lasts."""
    burners = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
        await asyncio.gather(*(burner.wait() for burner in burners))


async def _look(arena: Arena, figures: Figures) -> None:
    """Engines that are called stalled; no metric counts them."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        for frontend_id in arena.watchers:
            try:
                infos = await arena.workers(frontend_id)
            except UnbrokenError:
                continue  # Both cores are busy.
            for name, info in infos.items():
                if info.engine == worker_pb2.ENGINE_STATE_STALLED:
                    figures.stalls_seen.add((name, info.record.engine_pgid))


def _counts(arena: Arena) -> Counter[str]:
    """The counters of all processes."""
    records = [*arena.mesh.frontends.values(), *arena.mesh.workers.values()]
    counts: Counter[str] = Counter()
    for record in records:
        url = f"http://{record.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for name, wanted in _COUNTERS.items():
                if family.name == wanted:
                    counts[name] += sum(
                        int(sample.value)
                        for sample in family.samples
                        if sample.name.endswith("_total")
                    )
    return counts


def _request(rng: random.Random, num_prompt: int, num_tokens: int) -> pb.GenerateRequest:
    return request_to_proto(
        None,
        [rng.randrange(300, 1300) for _ in range(num_prompt)],
        None,
        {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True},
    )


def _line(figures: Figures, minutes: float) -> Mapping[str, object]:
    counts = {name: figures.counts[name] for name in _COUNTERS}
    counts["stalls"] = len(figures.stalls_seen)
    verdict = figures.verdict
    is_ok = (
        verdict.is_ok
        and verdict.complete > 0
        and not figures.held
        and not any(counts[name] for name in _MUST_BE_ZERO)
    )
    return {
        "ok": is_ok,
        "minutes": minutes,
        "streams": verdict.streams,
        "complete": verdict.complete,
        "violations": len(verdict.violations),
        "cores_busy_s": round(figures.burning_s),
        "prefill_s_max": PROMPT_TOKENS_MAX / PREFILL_TOKENS_PER_S,
        **counts,
        "held_at_the_end": figures.held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unbroken-soak-") as directory:
        seconds = arguments.minutes * 60
        figures = uvloop.run(measure(Path(directory), seconds, arguments.seed))
    if (example := figures.verdict.counter_example) is not None:
        print(example, file=sys.stderr)  # noqa: T201 - What was promised and is not so.
    line = _line(figures, arguments.minutes)
    print(json.dumps(line))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not line["ok"])


if __name__ == "__main__":
    main()
