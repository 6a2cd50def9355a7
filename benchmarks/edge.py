"""What a token costs at the client edge, ours against grpcio's and Envoy: `make bench-edge`.

The same engine (tokens that are stamps), sidecar and client for all; the client is bare
(benchmarks/raw_reader.py), so that it holds nobody up. In the same run:

    native    the frontend with --edge native
    grpcio    the frontend with --edge grpcio
    envoy     Envoy as one gRPC hop before the native frontend, on one thread

at 20 ms a step, and as fast as windows allow (flood). CPU is time on a CPU, of all threads of the
process, per token, after every stream flows: of a frontend it has the ingest from the sidecar in
it, of Envoy nothing but the hop. Latency is from the engine's step to the client; beyond 40 ms it
wraps, so that of a path which does not keep up, or floods, is not given.

    python -m benchmarks.edge [--seconds 3]
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.hops import envoy_before
from benchmarks.stamps import CpuClock
from unbroken.mesh import LocalMesh

STEP_MS: Final = 20.0
PACED: Final = ((256, 1), (256, 16), (256, 256), (1024, 1), (1024, 16))
FLOOD: Final = ((1, 1), (16, 1), (64, 16), (256, 16))
"""Streams and connections."""
PACED_OF: Final = {"native": PACED, "envoy": PACED, "grpcio": PACED[:3]}
FLOOD_OF: Final = {"native": FLOOD, "envoy": FLOOD[-1:], "grpcio": FLOOD[-1:]}
"""For each path those that it is tried with: grpcio is full at 256 streams."""
GRPCIO_SHARE_MAX: Final = 0.3
"""Of the cost per token with the grpcio edge, at 256 streams on one connection."""
ENVOY_SHARE_AIM: Final = 0.5
"""Of Envoy's cost there: the aim, which a whole frontend has not reached."""
FLOOD_TOKENS_PER_S_MIN: Final = 300_000.0
"""Through one core, at 256 streams over 16 connections."""


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
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    rss_mb: float

    @property
    def name(self) -> str:
        """What it is called in the figures."""
        pace = "flood" if self.is_flood else "paced"
        return f"{self.path} {pace} {self.streams}x{self.connections}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    rows = uvloop.run(_measure(arguments.seconds))
    print(_markdown(rows))  # noqa: T201
    figures = _figures(rows)
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


async def _measure(seconds: float) -> list[Row]:
    rows: list[Row | None] = []
    with tempfile.TemporaryDirectory() as name:
        for is_flood, loads_of in ((False, PACED_OF), (True, FLOOD_OF)):
            for edge in ("native", "grpcio"):
                directory = Path(name) / f"{edge}-{is_flood}"
                directory.mkdir()
                async with _mesh(directory, edge, 0.0 if is_flood else STEP_MS) as mesh:
                    address, pid = mesh.frontend_address, mesh.frontend_pid
                    rows += [
                        await _read(edge, address, pid, load, seconds, is_flood)
                        for load in loads_of[edge]
                    ]
                    if edge == "native":
                        async with envoy_before(address, directory) as (proxy, proxy_pid):
                            rows += [
                                await _read("envoy", proxy, proxy_pid, load, seconds, is_flood)
                                for load in loads_of["envoy"]
                            ]
    return [row for row in rows if row is not None]


def _mesh(directory: Path, edge: str, step_ms: float) -> LocalMesh:
    socket = directory / "engine.sock"
    engine = f"{sys.executable} -m benchmarks.stamping --socket {socket} --step-ms {step_ms}"
    return LocalMesh(
        directory / "mesh",
        num_workers=1,
        engine=None,
        sidecar_flags=("--engine-socket", str(socket), "--engine-command", engine),
        frontend_flags=("--edge", edge),
    )


async def _read(
    path: str, address: str, pid: int, load: tuple[int, int], seconds: float, is_flood: bool
) -> Row | None:
    """None if not even all streams begin to flow."""
    streams, connections = load
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.raw_reader", address),
        *("--streams", str(streams), "--connections", str(connections)),
        *("--seconds", str(seconds)),
        stdout=PIPE,
    )
    assert process.stdout is not None
    if await process.stdout.readline() != b"begin\n":
        await process.wait()
        return None
    clock = CpuClock(pid)
    seen = json.loads(await process.stdout.readline())
    cpu_s = clock.elapsed_s()
    rss_mb = _rss_mb(pid)
    await process.wait()
    if seen["gaps"] or seen["ended"] or not seen["tokens"]:
        raise RuntimeError(f"{path} {load}: expected unbroken streams, got {seen}")
    tokens_per_s = seen["tokens"] / seconds
    keeps_up = not is_flood and tokens_per_s > 0.9 * streams / STEP_MS * 1e3
    return Row(
        path=path,
        is_flood=is_flood,
        streams=streams,
        connections=connections,
        tokens_per_s=tokens_per_s,
        tokens_per_message=seen["tokens"] / seen["messages"],
        cpu_us=cpu_s / seen["tokens"] * 1e6,
        latency_ms_p50=seen["age_ms_p50"] if keeps_up else None,
        latency_ms_p99=seen["age_ms_p99"] if keeps_up else None,
        rss_mb=rss_mb,
    )


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    cost = {row.name: row.cpu_us for row in rows}
    share = cost["native paced 256x1"] / cost["envoy paced 256x1"]
    per_core = 1e6 / cost["native flood 256x16"]
    of_grpcio = cost["native paced 256x1"] / cost["grpcio paced 256x1"]
    return {
        "ok": of_grpcio <= GRPCIO_SHARE_MAX and per_core >= FLOOD_TOKENS_PER_S_MIN,
        "share_of_grpcio_256x1": round(of_grpcio, 2),
        "share_of_envoy_256x1": round(share, 2),
        "aim_share_of_envoy": ENVOY_SHARE_AIM,
        "tokens_per_s_and_core_flood_256x16": round(per_core),
        "cpu_us": {name: round(us, 2) for name, us in cost.items()},
        "latency_ms_p50": {row.name: row.latency_ms_p50 for row in rows if row.latency_ms_p50},
        "latency_ms_p99": {row.name: row.latency_ms_p99 for row in rows if row.latency_ms_p99},
        "tokens_per_s": {row.name: round(row.tokens_per_s) for row in rows},
        "rss_mb": {row.name: round(row.rss_mb) for row in rows},
    }


def _markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| path | load | streams x connections | tokens/s | tokens a message | CPU µs a token "
        "| latency ms p50 / p99 | RSS MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        latency = (
            "-"
            if row.latency_ms_p50 is None
            else f"{row.latency_ms_p50:.2f} / {row.latency_ms_p99:.2f}"
        )
        lines.append(
            f"| {row.path} | {'flood' if row.is_flood else '20 ms'} "
            f"| {row.streams} x {row.connections} | {row.tokens_per_s:,.0f} "
            f"| {row.tokens_per_message:.1f} | {row.cpu_us:.1f} | {latency} | {row.rss_mb:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
