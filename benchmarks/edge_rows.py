"""One path under one load, read by the bare client: what `bench-edge` and `bench-peers` print."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias

from benchmarks.stamps import NUM_UNITS, UNIT_S, CpuClock

STEP_MS: Final = 20.0
LATENCY_MS_MAX: Final = 0.8 * NUM_UNITS * UNIT_S * 1e3
"""A p99 beyond it is not given: stamps begin anew soon after, and some have."""
READ_S_MAX: Final = 30.0
"""What a client process may take beyond the seconds that it counts."""

Load: TypeAlias = tuple[int, int]
"""Streams and connections."""


class NotServedError(Exception):
    """Not even all streams began to flow; says why."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Who is read, and whose cost counts."""

    name: str
    address: str
    pid: int
    """The hop that is measured; of the direct path, the engine."""
    sidecar_pid: int | None = None
    """What our hop needs beside it."""
    asks: str = "unbroken"
    has_stamps: bool = True
    """Else its tokens say nothing of when they were made."""


@dataclass(frozen=True, slots=True)
class Row:
    """One path under one load."""

    path: str
    is_flood: bool
    streams: int
    connections: int
    tokens_per_s: float
    tokens_per_message: float
    cpu_us: float
    sidecar_cpu_us: float | None
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    rss_mb: float

    @property
    def load(self) -> str:
        """What the path has to do."""
        pace = "flood" if self.is_flood else "paced"
        return f"{pace} {self.streams}x{self.connections}"

    @property
    def name(self) -> str:
        """What it is called in the figures."""
        return f"{self.path} {self.load}"


async def read(path: Hop, load: Load, seconds: float, *, is_flood: bool) -> Row:
    """Have a client process read so many streams. Raises `NotServedError`."""
    streams, connections = load
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.raw_reader", path.address, "--asks", path.asks),
        *("--streams", str(streams), "--connections", str(connections)),
        *("--seconds", str(seconds)),
        stdout=PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds + READ_S_MAX):
            line = await process.stdout.readline()
            if line != b"begin\n":
                raise NotServedError(line.decode().strip() or "its client failed")
            clock = CpuClock(path.pid)
            sidecar = None if path.sidecar_pid is None else CpuClock(path.sidecar_pid)
            await process.stdout.readline()  # What its client does from now on does not count.
            cpu_s = clock.elapsed_s()
            sidecar_s = None if sidecar is None else sidecar.elapsed_s()
            rss_mb = _rss_mb(path.pid)
            seen = json.loads(await process.stdout.readline())
    except TimeoutError:
        raise NotServedError("its client did not end") from None
    finally:
        if process.returncode is None and process.stdout.at_eof():
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
    if seen["gaps"] or seen["ended"] or not seen["tokens"]:
        raise NotServedError(f"expected unbroken streams, got {seen}")
    tokens = seen["tokens"]
    tokens_per_s = tokens / seconds
    has_latency = (
        path.has_stamps
        and not is_flood
        and tokens_per_s > 0.9 * streams / STEP_MS * 1e3
        and seen["age_ms_p99"] < LATENCY_MS_MAX
    )
    return Row(
        path=path.name,
        is_flood=is_flood,
        streams=streams,
        connections=connections,
        tokens_per_s=tokens_per_s,
        tokens_per_message=tokens / seen["messages"],
        cpu_us=cpu_s / tokens * 1e6,
        sidecar_cpu_us=None if sidecar_s is None else sidecar_s / tokens * 1e6,
        latency_ms_p50=seen["age_ms_p50"] if has_latency else None,
        latency_ms_p99=seen["age_ms_p99"] if has_latency else None,
        rss_mb=rss_mb,
    )


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def medians(rows: Sequence[Row]) -> Sequence[Row]:
    """One row for each path and load, in their order, of the medians of those that there are."""
    those_of: dict[str, list[Row]] = {}
    for row in rows:
        those_of.setdefault(row.name, []).append(row)
    return [
        replace(
            those[0],
            tokens_per_s=median(row.tokens_per_s for row in those),
            tokens_per_message=median(row.tokens_per_message for row in those),
            cpu_us=median(row.cpu_us for row in those),
            sidecar_cpu_us=_median(row.sidecar_cpu_us for row in those),
            latency_ms_p50=_median(row.latency_ms_p50 for row in those),
            latency_ms_p99=_median(row.latency_ms_p99 for row in those),
            rss_mb=median(row.rss_mb for row in those),
        )
        for those in those_of.values()
    ]


def _median(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return median(given) if given else None


def added_ms(row: Row, direct: Mapping[str, Row]) -> tuple[float, float] | None:
    """What a path adds to the direct one under the same load: at p50, at p99."""
    base = direct.get(row.load)
    if base is None or None in (
        row.latency_ms_p50, row.latency_ms_p99, base.latency_ms_p50, base.latency_ms_p99
    ):  # fmt: skip
        return None
    assert row.latency_ms_p50 is not None and row.latency_ms_p99 is not None  # noqa: PT018
    assert base.latency_ms_p50 is not None and base.latency_ms_p99 is not None  # noqa: PT018
    return row.latency_ms_p50 - base.latency_ms_p50, row.latency_ms_p99 - base.latency_ms_p99


def direct_of(rows: Sequence[Row]) -> Mapping[str, Row]:
    """The rows of the direct path by their load."""
    return {row.load: row for row in rows if row.path == "direct"}


def figures_of(rows: Sequence[Row]) -> dict[str, object]:
    """All that was measured, by the names of the rows."""
    direct = direct_of(rows)
    added = {row.name: added_ms(row, direct) for row in rows if row.path != "direct"}
    return {
        "cpu_us": {row.name: round(row.cpu_us, 2) for row in rows},
        "sidecar_cpu_us": {
            row.name: round(row.sidecar_cpu_us, 2) for row in rows if row.sidecar_cpu_us is not None
        },
        "latency_ms_p50": {row.name: row.latency_ms_p50 for row in rows if row.latency_ms_p50},
        "latency_ms_p99": {row.name: row.latency_ms_p99 for row in rows if row.latency_ms_p99},
        "added_ms_p50": {name: round(ms[0], 2) for name, ms in added.items() if ms},
        "added_ms_p99": {name: round(ms[1], 2) for name, ms in added.items() if ms},
        "tokens_per_s": {row.name: round(row.tokens_per_s) for row in rows},
        "rss_mb": {row.name: round(row.rss_mb) for row in rows},
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table."""
    direct = direct_of(rows)
    lines = [
        "| path | load | streams x connections | tokens/s | tokens a message | CPU µs a token "
        "(sidecar) | latency ms p50 / p99 | added ms p50 / p99 | RSS MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        latency = added = "-"
        if row.latency_ms_p50 is not None:
            latency = f"{row.latency_ms_p50:.2f} / {row.latency_ms_p99:.2f}"
        if row.path != "direct" and (more := added_ms(row, direct)):
            added = f"{more[0]:.2f} / {more[1]:.2f}"
        sidecar = "" if row.sidecar_cpu_us is None else f" ({row.sidecar_cpu_us:.1f})"
        lines.append(
            f"| {row.path} | {'flood' if row.is_flood else '20 ms'} "
            f"| {row.streams} x {row.connections} | {row.tokens_per_s:,.0f} "
            f"| {row.tokens_per_message:.1f} | {row.cpu_us:.1f}{sidecar} | {latency} | {added} "
            f"| {row.rss_mb:.0f} |"
        )
    return "\n".join(lines)
