"""A rolling restart of a whole mesh under streams that are longer than it: who notices?

Workers and frontends of a mesh of simulated engines are replaced one after the other, as
`unbroken rollout` does it, while clients read. Each stream has begun before, and is read on until
all has been replaced; then what it told is compared with an undisturbed run of the same request.
Then a worker that has nothing to do is drained. At last the idle engine of one of two workers is
made sick in several ways, and it is measured how long it takes until the frontend knows.

    python -m benchmarks.rollout [--workers 4] [--frontends 2] [--streams 200] [--step-ms 100]

Ends with one line of JSON.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from tests.integration.hospital import PERIOD_S, SERVING, STALLED, hospital
from unbroken.client import Client
from unbroken.discovery import connect
from unbroken.drain import drain_worker
from unbroken.errors import UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.history import History
from unbroken.mesh import LocalMesh
from unbroken.rollout import Replaced, roll_out

NUM_PROMPTS: Final = 40
"""So many different requests there are; more streams repeat them."""
TOKENS_MAX: Final = 20_000
"""Of a stream that nobody ends."""
TOKENS_BEFORE: Final = 10
TOKENS_AFTER: Final = 10
CALM_S: Final = 3.0
"""How long nothing happens first, to know the gaps that this machine makes by itself."""
GAP_MAX_S: Final = 0.3
IDLE_DRAIN_MAX_S: Final = 1.0


@dataclass(slots=True)
class Reading:
    """One stream and what came of it."""

    number: int
    stream: GenerationStream
    history: History = field(default_factory=History)
    error: UnbrokenError | None = None

    async def until(self, num_tokens: int) -> None:
        """Read on until so many tokens have come, or it has failed."""
        try:
            while self.error is None and self.history.num_tokens < num_tokens:
                piece = await anext(self.stream)
                self.history.add(piece, asyncio.get_running_loop().time())
        except UnbrokenError as error:
            self.error = error

    async def while_it_goes_on(self, is_over: asyncio.Event) -> None:
        """Read until it is over, and a little more."""
        while self.error is None and not is_over.is_set():
            await self.until(self.history.num_tokens + 1)
        await self.until(self.history.num_tokens + TOKENS_AFTER)
        await self.stream.cancel()

    def gaps_s(self, since: float, until: float) -> Sequence[float]:
        """Between one token and the next, of those that came in this time."""
        (choice,) = self.history.choices.values()
        times = choice.arrived_at
        return [
            later - before for before, later in itertools.pairwise(times) if since <= later <= until
        ]


@dataclass(slots=True)
class Result:
    """What was seen."""

    readings: Sequence[Reading]
    replaced: Sequence[Replaced]
    replaced_at: Sequence[float]
    statuses: Sequence[tuple[str, int]]
    began_at: float
    ended_at: float
    idle_drain_s: float
    noticed_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """How long each sickness of an idle engine took to be noticed."""
    lost: int = 0
    duplicated: int = 0
    changed: int = 0

    @property
    def errors(self) -> Sequence[UnbrokenError]:
        return [reading.error for reading in self.readings if reading.error is not None]

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds where the name says so, else in seconds."""
        during = _gaps_ms(self.readings, self.began_at, self.ended_at)
        before = _gaps_ms(self.readings, self.began_at - CALM_S, self.began_at)
        statuses = sorted({status for _, status in self.statuses})
        is_ok = (
            not (self.errors or self.lost or self.duplicated or self.changed)
            and max(during) <= GAP_MAX_S * 1e3
            and statuses == [0]
            and len(self.statuses) == len(self.replaced)
            and self.idle_drain_s < IDLE_DRAIN_MAX_S
            and all(noticed_s <= 2 * PERIOD_S for noticed_s in self.noticed_s.values())
        )
        return {
            "ok": is_ok,
            "streams": len(self.readings),
            "workers_replaced": sum(not one.is_frontend for one in self.replaced),
            "frontends_replaced": sum(one.is_frontend for one in self.replaced),
            "exit_statuses": statuses,
            "rollout_s": round(self.ended_at - self.began_at, 1),
            "streams_moved": sum(one.num_moved for one in self.replaced),
            "streams_cut": sum(one.num_cut for one in self.replaced),
            "tokens": sum(reading.history.num_tokens for reading in self.readings),
            "errors": len(self.errors),
            "lost": self.lost,
            "repeated": self.duplicated,
            "changed": self.changed,
            "gap_ms_p50": round(statistics.median(during), 1),
            "gap_ms_p99": round(_percentile(during, 0.99), 1),
            "gap_ms_max": round(max(during), 1),
            "gap_ms_max_while": self._worst_ms(),
            "undisturbed_gap_ms_p99": round(_percentile(before, 0.99), 1),
            "undisturbed_gap_ms_max": round(max(before), 1),
            "drain_s_max": round(max(one.drain_s for one in self.replaced), 2),
            "idle_drain_s": round(self.idle_drain_s, 2),
            "canary_period_s": PERIOD_S,
            "noticed_s": {name: round(value, 2) for name, value in self.noticed_s.items()},
        }

    def _worst_ms(self) -> Mapping[str, float]:
        """The longest gap while each of them was replaced."""
        begins = [self.began_at, *self.replaced_at]
        return {
            one.name: round(max(_gaps_ms(self.readings, since, until)), 1)
            for one, since, until in zip(self.replaced, begins, self.replaced_at, strict=False)
        }


async def play(
    directory: Path, *, num_workers: int, num_frontends: int, num_streams: int, step_ms: float
) -> Result:
    """A mesh, streams, and a rollout."""
    engine = "--prefill-tokens-per-s 1000000 --prefill-tokens-max 8192"
    mesh = LocalMesh(
        directory / "mesh",
        num_workers=num_workers,
        num_frontends=num_frontends,
        engine_options=f"--step-base-ms {step_ms:g} {engine}",
    )
    async with mesh, AsyncExitStack() as stack:
        addresses = mesh.frontend_addresses
        clients = [
            await stack.enter_async_context(Client(*addresses[first:], *addresses[:first]))
            for first in range(num_frontends)
        ]
        for client in clients:
            await client.list_models()  # It is connected when the streams begin.
        readings = [
            Reading(number, _begin(clients[number % num_frontends], number))
            for number in range(num_streams)
        ]
        statuses: list[tuple[str, int]] = []
        background = [
            asyncio.create_task(mesh.supervise(lambda _: None)),
            asyncio.create_task(_collect(mesh, statuses)),
        ]
        is_over = asyncio.Event()
        try:
            await asyncio.gather(*(reading.until(TOKENS_BEFORE) for reading in readings))
            reads = [asyncio.create_task(reading.while_it_goes_on(is_over)) for reading in readings]
            loop = asyncio.get_running_loop()
            await asyncio.sleep(CALM_S)
            began_at = loop.time()
            where = connect(mesh.directory)
            replaced_at: list[float] = []

            def tell(one: Replaced) -> None:
                replaced_at.append(loop.time())
                _tell(one)

            replaced = await roll_out(where, tell=tell)
            ended_at = loop.time()
            is_over.set()
            await asyncio.gather(*reads)
            idle = await drain_worker(where, "w1")
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
    result = Result(
        readings,
        replaced,
        replaced_at,
        statuses[: len(replaced)],
        began_at,
        ended_at,
        idle.took_s,
    )
    await _compare(directory, engine, result)
    return result


async def _compare(directory: Path, engine: str, result: Result) -> None:
    """Hold what was read against undisturbed runs, which may be faster."""
    lengths: dict[int, int] = {}
    for reading in result.readings:
        key = reading.number % NUM_PROMPTS
        lengths[key] = max(lengths.get(key, 0), reading.history.num_tokens)
    mesh = LocalMesh(
        directory / "undisturbed", num_workers=1, engine_options=f"--step-base-ms 1 {engine}"
    )
    async with mesh, Client(mesh.frontend_address) as client:
        expected = {key: Reading(key, _begin(client, key)) for key in lengths}
        for key, reading in expected.items():
            await reading.until(lengths[key])
            await reading.stream.cancel()
    for reading in result.readings:
        (seen,) = reading.history.choices.values()
        (wanted,) = expected[reading.number % NUM_PROMPTS].history.choices.values()
        by_offset = dict(zip(seen.offsets, seen.token_ids, strict=True))
        num_tokens = max(by_offset) + 1
        result.lost += num_tokens - len(by_offset)
        result.duplicated += len(seen.offsets) - len(by_offset)
        result.changed += sum(
            wanted.token_ids[offset] != token_id for offset, token_id in by_offset.items()
        )


def measure_canary(directory: Path) -> Mapping[str, float]:
    """How long it takes until a frontend knows what is wrong with an idle engine, by sickness."""
    noticed_s: dict[str, float] = {}
    directory.mkdir()
    with hospital(directory, "--canary-failures-max=0") as it:

        async def scenario() -> None:
            for sickness in ("hung", "lying", "garbage"):
                await it.until(SERVING, 30)
                await it.until_probed(2)
                it.sickness.write_text(sickness)
                noticed_s[sickness] = await it.until(STALLED, 30)
                it.sickness.write_text("")

        it.world.run(scenario(), limit_s=120)
    return noticed_s


async def _collect(mesh: LocalMesh, statuses: list[tuple[str, int]]) -> None:
    while True:
        statuses.append(await mesh.until_one_ends())


def _begin(client: Client, number: int) -> GenerationStream:
    key = number % NUM_PROMPTS
    return client.generate(
        prompt=f"stream {key}",
        temperature=0.8,
        seed=key,
        max_tokens=TOKENS_MAX,
        ignore_eos=True,
    )


def _tell(one: Replaced) -> None:
    kind = "frontend" if one.is_frontend else "worker"
    print(  # noqa: T201 - Says how far it is.
        f"{kind} {one.name}: {one.num_moved} streams moved, drained in {one.drain_s:.2f} s, "
        f"replaced {one.away_s:.2f} s later",
        file=sys.stderr,
    )


def _gaps_ms(readings: Sequence[Reading], since: float, until: float) -> Sequence[float]:
    gaps = [gap_s * 1e3 for reading in readings for gap_s in reading.gaps_s(since, until)]
    return sorted(gaps) or [float("inf")]


def _percentile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=100.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = uvloop.run(
            play(
                Path(directory),
                num_workers=arguments.workers,
                num_frontends=arguments.frontends,
                num_streams=arguments.streams,
                step_ms=arguments.step_ms,
            )
        )
        result.noticed_s = measure_canary(Path(directory) / "canary")
    for error in result.errors:
        print(f"{error.reason.value}: {error}", file=sys.stderr)  # noqa: T201
    figures = result.to_json()
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


if __name__ == "__main__":
    main()
