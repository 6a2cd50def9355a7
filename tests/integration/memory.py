"""Whether memory and gauges of all processes return to where they were after many streams.

    python -m tests.integration.memory [--streams 10000] [--warm-up 2000]

Frontend, sidecar and engine are real processes; outputs are short and steps take no time, so that
most of the work is beginning and ending streams. The last line is one JSON object with "ok".
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.integration.worlds import World, real_mesh, rss_bytes, scrape
from unbroken import discovery
from unbroken.discovery import FRONTENDS
from unbroken.history import record

CONCURRENCY: Final = 200
TOKENS: Final = 6
TOLERANCE_BYTES: Final = 8 * 1024 * 1024
TOLERANCE_SHARE: Final = 0.05

SETTINGS: Final[Mapping[str, Any]] = {
    "num_workers": 1,
    # A small prefix cache, and ledgers that forget soon, are full after the warm-up.
    "engine_options": (
        "--step-base-ms 1 --prefill-tokens-per-s 10000000 --context-length 512 --kv-blocks 512"
    ),
    "sidecar_flags": ["--retention-s", "1", "--metrics-listen", "127.0.0.1:0"],
    "frontend_flags": ["--metrics-listen", "127.0.0.1:0"],
}

_GAUGES: Final = {
    "frontend": ("requests_running", "choices_waiting", "links_up"),
    "sidecar": ("attempts_running", "links", "kv_blocks_accounted"),
}


@dataclass(frozen=True, slots=True)
class State:
    """The mesh at rest."""

    rss_bytes: Mapping[str, int]
    """By process."""
    gauges: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """What many streams leave behind."""

    before: State
    after: State
    num_streams: int
    seconds: float

    @property
    def is_ok(self) -> bool:
        """Nothing runs that did not run before, and no process has grown."""
        return self.after.gauges == self.before.gauges and all(
            self.after.rss_bytes[name] <= rss * (1 + TOLERANCE_SHARE) + TOLERANCE_BYTES
            for name, rss in self.before.rss_bytes.items()
        )

    def to_json(self) -> dict[str, object]:
        """Sizes in MiB."""
        return {
            "ok": self.is_ok,
            "streams": self.num_streams,
            "streams_per_s": round(self.num_streams / self.seconds),
            **{
                f"{name}_rss_mib": [_mib(rss), _mib(self.after.rss_bytes[name])]
                for name, rss in self.before.rss_bytes.items()
            },
            "gauges": dict(self.after.gauges),
            "gauges_before": dict(self.before.gauges),
        }


async def measure(world: World, *, num_streams: int, num_warm_up: int) -> Figures:
    """Run streams, look, run more streams, look again."""
    loop = asyncio.get_running_loop()
    await _run_streams(world, num_warm_up)
    before = await _at_rest(world)
    began = loop.time()
    await _run_streams(world, num_streams)
    seconds = loop.time() - began
    return Figures(before, await _at_rest(world), num_streams, seconds)


async def _run_streams(world: World, count: int) -> None:
    numbers = iter(range(count))

    async def reader() -> None:
        for number in numbers:
            prompt = [300 + number % 3000, 7, 11, 13]
            stream = world.client.generate(
                token_ids=prompt, max_tokens=TOKENS, temperature=0.0, timeout_s=60
            )
            seen = await record(stream)
            assert seen.num_tokens == TOKENS

    async with asyncio.TaskGroup() as readers:
        for _ in range(CONCURRENCY):
            readers.create_task(reader())


async def _at_rest(world: World) -> State:
    """Once nothing runs, and the ledgers have forgotten what has ended."""
    async with asyncio.timeout(20):
        while True:
            gauges = await _gauges(world)
            if gauges["frontend_requests_running"] == gauges["sidecar_attempts_running"] == 0:
                break
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.2)  # `--retention-s`, and a heartbeat on which it is looked at.
    return State(_sizes(world), await _gauges(world))


async def _gauges(world: World) -> Mapping[str, float]:
    found = await discovery.connect(world.mesh.directory).snapshot(FRONTENDS)
    addresses = {
        "frontend": next(iter(found.values())).metrics_address,
        "sidecar": world.mesh.workers["w1"].metrics_address,
    }
    gauges: dict[str, float] = {}
    for process, address in addresses.items():
        metrics = await asyncio.to_thread(scrape, address)
        for name in _GAUGES[process]:
            gauges[f"{process}_{name}"] = metrics[f"unbroken_{process}_{name}"]
    return gauges


def _sizes(world: World) -> Mapping[str, int]:
    worker = world.mesh.workers["w1"]
    return {
        "frontend": rss_bytes(world.mesh.frontend_pid),
        "sidecar": rss_bytes(worker.sidecar_pid),
        "engine": sum(map(rss_bytes, _group(worker.engine_pgid))),
    }


def _group(pgid: int) -> list[int]:
    """The processes of a process group."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # Gone meanwhile.
            if int(path.read_text().rpartition(")")[2].split()[2]) == pgid:
                found.append(int(path.parent.name))
    return found


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=2_000)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        real_mesh(Path(directory), **SETTINGS) as world,
    ):
        figures = world.run(
            measure(world, num_streams=arguments.streams, num_warm_up=arguments.warm_up),
            limit_s=600,
        )
    print(json.dumps(figures.to_json()))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures.is_ok)


if __name__ == "__main__":
    main()
