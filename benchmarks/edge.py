"""What a token costs at the client edge, ours against grpcio's and Envoy: `make bench-edge`.

The same client for all; it is bare (benchmarks/raw_reader.py), so that it holds nobody up. In the
same run:

    direct    an engine of stamps that serves clients itself, over bare HTTP/2
    native    the frontend with --edge native, a sidecar and an engine of stamps
    grpcio    the frontend with --edge grpcio
    envoy     Envoy as one gRPC hop before the engine of "direct", on one thread
    writes    a process that does nothing but write(2), where each stream has its own connection

at 20 ms a step, and as fast as windows allow (flood). CPU is time on a CPU, of all threads of the
process, per token, after every stream flows: of a frontend it has the ingest from the sidecar in
it (the sidecar's own is beside it), of Envoy nothing but the hop. Latency is from the engine's step
to the client; what a path adds is its latency less the direct path's. It wraps at 38 ms, so that of
a path which does not keep up, or floods, is not given. Paced rows of ours, of Envoy and of the bare
writes are medians of several that were taken in turns, and ratios are those of each pair: on a
shared machine all of them vary by a third within minutes.

    python -m benchmarks.edge [--seconds 9.6] [--rounds 3] [--idle]

A stream that rides is looked at every 480 tokens, the first time after 240, and that has to be in
what is counted: at 20 ms a step 9.6 seconds have one look at each.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

import uvloop

from benchmarks import idle
from benchmarks.edge_paths import bare_engine, hop_of, stamping_mesh, stepping
from benchmarks.edge_rows import (
    STEP_MS,
    Hop,
    Load,
    NotServedError,
    Row,
    figures_of,
    markdown,
    medians,
    read,
)
from benchmarks.hops import envoy_before

PACED: Final = ((256, 1), (256, 16), (256, 256), (1024, 1), (1024, 16))
FLOOD: Final = ((1, 1), (16, 1), (64, 16), (256, 16))
"""Streams and connections."""
ONE_EACH: Final = (256, 256)
"""A connection for each stream, and so a write for each token."""
PACED_OF: Final = {
    "direct": PACED,
    "native": PACED,
    "envoy": PACED,
    "grpcio": PACED[:3],
    "writes": (ONE_EACH,),
}
FLOOD_OF: Final = {
    "direct": FLOOD,
    "native": FLOOD,
    "envoy": FLOOD[-1:],
    "grpcio": FLOOD[-1:],
    "writes": (),
}
"""For each path those that it is tried with: grpcio is full at 256 streams."""
GRPCIO_SHARE_MAX: Final = 0.3
"""Of the cost per token with the grpcio edge, at 256 streams on one connection."""
ENVOY_SHARE_MAX: Final = 0.5
"""Of Envoy's cost, with several streams on a connection."""
WRITES_RATIO_MAX: Final = 2.0
"""Times what the writes alone cost, where each stream has a connection: they are nearly half of
Envoy's cost there, so half of it is out of reach (docs/BENCHMARKS.md)."""
FLOOD_TOKENS_PER_S_MIN: Final = 300_000.0
"""Through one core, at 256 streams over 16 connections."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=9.6)
    parser.add_argument("--rounds", type=int, default=3, help="of what is compared in pairs")
    parser.add_argument("--idle", action="store_true", help="at last, benchmarks/idle.py")
    arguments = parser.parse_args()
    try:
        rows = uvloop.run(_measure(arguments.seconds, arguments.rounds))
    except NotServedError as error:
        print(json.dumps({"ok": False, "not_served": str(error)}))  # noqa: T201
        sys.exit(1)
    print(markdown(medians(rows)))  # noqa: T201
    figures = _figures(rows)
    if arguments.idle:
        figures["idle"] = beside = idle.measured()
        figures["ok"] = figures["ok"] and beside["ok"]
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


async def _measure(seconds: float, num_rounds: int) -> list[Row]:
    """All rows, those of several rounds one after the other."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for is_flood, loads_of in ((False, PACED_OF), (True, FLOOD_OF)):
            directory = Path(name) / ("flood" if is_flood else "paced")
            step_ms = 0.0 if is_flood else STEP_MS
            (directory / "grpcio").mkdir(parents=True)
            async with (
                bare_engine(step_ms) as (engine, pid),
                stamping_mesh(directory, "native", step_ms) as mesh,
                envoy_before(engine, directory) as (proxy, proxy_pid),
            ):
                direct = Hop("direct", engine, pid)
                native, envoy = hop_of(mesh, "native"), Hop("envoy", proxy, proxy_pid)
                rows += [
                    await _read(direct, load, seconds, is_flood) for load in loads_of["direct"]
                ]
                for load in loads_of["native"] * (1 if is_flood else num_rounds):
                    rows.append(await _read(native, load, seconds, is_flood))
                    if load in loads_of["envoy"]:
                        rows.append(await _read(envoy, load, seconds, is_flood))
                    if load in loads_of["writes"]:
                        async with stepping("benchmarks.bare_writes", step_ms) as writer:
                            rows.append(
                                await _read(Hop("writes", *writer), load, seconds, is_flood)
                            )
            async with stamping_mesh(directory / "grpcio", "grpcio", step_ms) as mesh:
                grpcio = hop_of(mesh, "grpcio")
                rows += [
                    await _read(grpcio, load, seconds, is_flood) for load in loads_of["grpcio"]
                ]
    return rows


async def _read(hop: Hop, load: Load, seconds: float, is_flood: bool) -> Row:
    try:
        return await read(hop, load, seconds, is_flood=is_flood)
    except NotServedError as error:
        raise NotServedError(f"{hop.name}, {load[0]}x{load[1]}: {error}") from None


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    middle = medians(rows)
    cost = {row.name: row.cpu_us for row in middle}
    shares = {_named(load): _ratios(rows, load, "envoy") for load in PACED}
    of_writes = median(_ratios(rows, ONE_EACH, "writes"))
    writes, envoy = (cost[f"{path} paced {_named(ONE_EACH)}"] for path in ("writes", "envoy"))
    per_core = 1e6 / cost["native flood 256x16"]
    of_grpcio = cost["native paced 256x1"] / cost["grpcio paced 256x1"]
    of_envoy = max(median(shares[_named(load)]) for load in PACED if load != ONE_EACH)
    latency = {row.name: row.latency_ms_p99 or math.inf for row in middle}
    is_later = [
        load for load in shares if latency[f"native paced {load}"] > latency[f"envoy paced {load}"]
    ]
    return {
        "ok": (
            of_grpcio <= GRPCIO_SHARE_MAX
            and of_envoy <= ENVOY_SHARE_MAX
            and of_writes <= WRITES_RATIO_MAX
            and not is_later
            and per_core >= FLOOD_TOKENS_PER_S_MIN
        ),
        "p99_beyond_envoys": is_later,
        "share_of_grpcio_256x1": round(of_grpcio, 2),
        "share_of_envoy": {load: round(median(those), 2) for load, those in shares.items()},
        "share_of_envoy_range": {
            load: [round(min(those), 2), round(max(those), 2)] for load, those in shares.items()
        },
        f"ratio_to_writes_{_named(ONE_EACH)}": round(of_writes, 2),
        f"writes_share_of_envoy_{_named(ONE_EACH)}": round(writes / envoy, 2),
        "tokens_per_s_and_core_flood_256x16": round(per_core),
        **figures_of(middle),
    }


def _named(load: Load) -> str:
    return f"{load[0]}x{load[1]}"


def _ratios(rows: Sequence[Row], load: Load, peer: str) -> Sequence[float]:
    """What native costs at 20 ms a step by what the peer does, in each round."""
    ours, theirs = (
        [row.cpu_us for row in rows if row.name == f"{path} paced {_named(load)}"]
        for path in ("native", peer)
    )
    return [one / other for one, other in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
