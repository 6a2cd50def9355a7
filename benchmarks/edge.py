"""What a token costs at the client edge, ours against grpcio's and Envoy: `make bench-edge`.

The same client for all; it is bare (benchmarks/raw_reader.py), so that it holds nobody up. In the
same run:

    direct    an engine of stamps that serves clients itself, over bare HTTP/2
    native    the frontend with --edge native, a sidecar and an engine of stamps
    grpcio    the frontend with --edge grpcio
    envoy     Envoy as one gRPC hop before the native frontend, on one thread

at 20 ms a step, and as fast as windows allow (flood). CPU is time on a CPU, of all threads of the
process, per token, after every stream flows: of a frontend it has the ingest from the sidecar in
it (the sidecar's own is beside it), of Envoy nothing but the hop. Latency is from the engine's step
to the client; what a path adds is its latency less the direct path's. Beyond 40 ms it wraps, so
that of a path which does not keep up, or floods, is not given.

    python -m benchmarks.edge [--seconds 8]

A stream that rides is looked at every 128 to 256 tokens, which has to be in what is counted.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.edge_rows import (
    STEP_MS,
    Hop,
    Load,
    NotServedError,
    Row,
    figures_of,
    markdown,
    read,
)
from benchmarks.hops import envoy_before
from unbroken.mesh import LocalMesh

_START_S_MAX: Final = 30.0
PACED: Final = ((256, 1), (256, 16), (256, 256), (1024, 1), (1024, 16))
FLOOD: Final = ((1, 1), (16, 1), (64, 16), (256, 16))
"""Streams and connections."""
PACED_OF: Final = {"direct": PACED, "native": PACED, "envoy": PACED, "grpcio": PACED[:3]}
FLOOD_OF: Final = {"direct": FLOOD, "native": FLOOD, "envoy": FLOOD[-1:], "grpcio": FLOOD[-1:]}
"""For each path those that it is tried with: grpcio is full at 256 streams."""
GRPCIO_SHARE_MAX: Final = 0.3
"""Of the cost per token with the grpcio edge, at 256 streams on one connection."""
ENVOY_SHARE_AIM: Final = 0.5
"""Of Envoy's cost there: the aim, which a whole frontend has not reached."""
FLOOD_TOKENS_PER_S_MIN: Final = 300_000.0
"""Through one core, at 256 streams over 16 connections."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    rows = uvloop.run(_measure(arguments.seconds))
    print(markdown(rows))  # noqa: T201
    figures = _figures(rows)
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


async def _measure(seconds: float) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for is_flood, loads_of in ((False, PACED_OF), (True, FLOOD_OF)):
            step_ms = 0.0 if is_flood else STEP_MS
            async with bare_engine(step_ms) as (address, pid):
                rows += await _read(Hop("direct", address, pid), loads_of, seconds, is_flood)
            for edge in ("native", "grpcio"):
                directory = Path(name) / f"{edge}-{is_flood}"
                directory.mkdir()
                async with stamping_mesh(directory, edge, step_ms) as mesh:
                    (worker,) = mesh.workers.values()
                    address, pid = mesh.frontend_address, mesh.frontend_pid
                    hop = Hop(edge, address, pid, worker.sidecar_pid)
                    rows += await _read(hop, loads_of, seconds, is_flood)
                    if edge == "native":
                        async with envoy_before(address, directory) as (proxy, proxy_pid):
                            hop = Hop("envoy", proxy, proxy_pid)
                            rows += await _read(hop, loads_of, seconds, is_flood)
    return rows


def stamping_mesh(
    directory: Path,
    edge: str,
    step_ms: float,
    frontend_flags: Sequence[str] = (),
    sidecar_flags: Sequence[str] = (),
) -> LocalMesh:
    """One frontend, one sidecar, an engine of stamps."""
    socket = directory / "engine.sock"
    engine = f"{sys.executable} -m benchmarks.stamping --socket {socket} --step-ms {step_ms}"
    stamping = (
        *("--engine-socket", str(socket), "--engine-command", engine),
        *("--canary-period-s", "0"),  # No two of its answers are the same.
    )
    return LocalMesh(
        directory / "mesh",
        num_workers=1,
        engine=None,
        sidecar_flags=(*stamping, *sidecar_flags),
        frontend_flags=("--edge", edge, *frontend_flags),
    )


@asynccontextmanager
async def bare_engine(step_ms: float, model: Path | None = None) -> AsyncGenerator[tuple[str, int]]:
    """The direct path: address and process id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.bare_engine", "--step-ms", str(step_ms)),
        *("--model-path", "" if model is None else str(model)),
        stdout=PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S_MAX):
            address = (await process.stdout.readline()).decode().strip()
        yield address, process.pid
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _read(
    hop: Hop, loads_of: Mapping[str, Sequence[Load]], seconds: float, is_flood: bool
) -> Sequence[Row]:
    """Under each of its loads, less those of which not even all streams begin to flow."""
    rows: list[Row] = []
    for load in loads_of[hop.name]:
        with suppress(NotServedError):
            rows.append(await read(hop, load, seconds, is_flood=is_flood))
    return rows


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
        **figures_of(rows),
    }


if __name__ == "__main__":
    main()
