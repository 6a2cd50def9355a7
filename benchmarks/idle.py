"""Do 24,000 idle streams over 10,000 connections disturb the active ones? `make bench-idle`

One frontend with --edge native, one engine of stamps. 256 streams over 16 connections at 20 ms a
step are read by the bare client, three times:

    before    nothing else is open
    beside    so many streams that got one token each and wait for their next are open
    after     those have gone

All idle ones must still be open when they are closed. Told are the memory of the frontend, the cost
a token, and the latency; the ratio is that of "beside" to the mean of "before" and "after". Files
are limited per process: the limit is raised as far as this user may, and the number of connections
lowered to what is left.

    python -m benchmarks.idle [--streams 24000] [--connections 10000] [--seconds 5]
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Final

import uvloop
from typing_extensions import override

from benchmarks.edge_paths import hop_of, stamping_mesh
from benchmarks.edge_rows import STEP_MS, Row, read
from benchmarks.raw_reader import Connection, GrpcStream, Seen
from benchmarks.stamping import IDLE_ID
from benchmarks.stamps import CpuClock
from unbroken.config import split_address
from unbroken.files_limit import raise_files_limit
from unbroken.mesh import LocalMesh
from unbroken.v1 import inference_service_pb2 as pb

STREAMS: Final = 24_000
CONNECTIONS: Final = 10_000
"""Idle ones."""
ACTIVE: Final = (256, 16)
FILES_SPARE: Final = 500
"""Files that a process needs for other things than clients."""
OPENING_AT_ONCE: Final = 100
"""Connections; what is measured here is not how fast they open."""
OPEN_S_MAX: Final = 180.0
SETTLE_S: Final = 3.0
"""Between the last stream and the measurement, so that all are pinged as in the long run."""
RATIO_MAX: Final = 1.5
"""Of p50 and p99, both with the slack added."""
SLACK_MS: Final = 1.0
"""A machine's own jitter: without it, the ratio of two small numbers says nothing."""


class IdleStream(GrpcStream):
    """Gets one token and waits for the next."""

    @staticmethod
    @override
    def request(index: int) -> bytes:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[IDLE_ID, 1, 2]))
        request.params.sampling.temperature = 0.0
        request.params.stopping.ignore_eos = True
        message = request.SerializeToString()
        return bytes((0, *len(message).to_bytes(4, "big"))) + message

    @override
    def feed(self, payload: bytes, seen: Seen) -> None:
        if self._offset == 0:
            before, seen.is_counting = seen.tokens, True
            super().feed(payload, seen)
            seen.num_warm += seen.tokens - before


class Idle:
    """The idle streams."""

    def __init__(self, address: str, num_streams: int, num_connections: int) -> None:
        self.seen = Seen()
        self._where = split_address(address)
        shares = [
            (number + 1) * num_streams // num_connections - number * num_streams // num_connections
            for number in range(num_connections)
        ]
        self._shares = shares
        self._transports: list[asyncio.BaseTransport] = []

    async def open(self) -> None:
        """Open all of them, each with its first token. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        opened = 0
        async with asyncio.timeout(OPEN_S_MAX):
            for at in range(0, len(self._shares), OPENING_AT_ONCE):
                group = self._shares[at : at + OPENING_AT_ONCE]
                made = await asyncio.gather(*(
                    loop.create_connection(
                        lambda share=share: Connection(self.seen, range(share), IdleStream),
                        *self._where,
                    )
                    for share in group
                ))  # fmt: skip
                self._transports += [transport for transport, _ in made]
                opened += sum(group)
                while (  # noqa: ASYNC110 - Counted in the hot path.
                    self.seen.num_warm < opened and not self.seen.ended
                ):
                    await asyncio.sleep(0.005)
        if self.seen.ended or self.seen.refused:
            raise RuntimeError(f"{self.seen.ended} streams ended {self.seen.refused}")

    def close(self) -> None:
        """Leave."""
        for transport in self._transports:
            transport.close()

    @property
    def num_lost(self) -> int:
        """Connections that the frontend closed."""
        return sum(transport.is_closing() for transport in self._transports)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    figures = measured(arguments.streams, arguments.connections, arguments.seconds)
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


def measured(
    num_streams: int = STREAMS, num_connections: int = CONNECTIONS, seconds: float = 5.0
) -> dict[str, object]:
    """What `measure` shows, of as many connections as this user may open files for."""
    files = raise_files_limit()
    connections = min(num_connections, files - FILES_SPARE)
    figures = uvloop.run(measure(num_streams, connections, seconds))
    figures["files_limit"] = files
    if connections < num_connections:
        figures["ok"] = False
        figures["limited"] = f"expected {num_connections} files, this user may open {files}"
    return figures


async def measure(num_streams: int, num_connections: int, seconds: float) -> dict[str, object]:
    """Read the active streams before, beside and after the idle ones."""
    with tempfile.TemporaryDirectory() as name:
        flags = (
            *("--requests-running-max", str(2 * num_streams + 1000)),
            *("--client-ping-timeout-s", "10"),  # One process answers for all; it may be late.
        )
        # What is measured is the edge: an engine that gets no CPU for a second is no hung one.
        patient = ("--engine-stall-min-s", "30")
        async with stamping_mesh(Path(name), "native", STEP_MS, flags, patient) as mesh:
            hop = hop_of(mesh, "native")
            before = await read(hop, ACTIVE, seconds, is_flood=False)
            idle = Idle(mesh.frontend_address, num_streams, num_connections)
            loop = asyncio.get_running_loop()
            began = loop.time()
            await idle.open()
            open_s = loop.time() - began
            await asyncio.sleep(SETTLE_S)
            idle_cpu = await _idle_cpu(mesh, seconds)
            beside = await read(hop, ACTIVE, seconds, is_flood=False)
            lost, ended = idle.num_lost, idle.seen.ended
            idle.close()
            await asyncio.sleep(SETTLE_S)
            after = await read(hop, ACTIVE, seconds, is_flood=False)
    ratios = _ratios(before, beside, after)
    figures: dict[str, object] = {
        "ok": not lost and not ended and all(ratio <= RATIO_MAX for ratio in ratios.values()),
        "idle_streams": num_streams,
        "connections": num_connections,
        "idle_lost": lost,
        "idle_ended": ended,
        "open_s": round(open_s, 1),
        "idle_frontend_cores": round(idle_cpu, 3),
        "frontend_kb_per_idle_stream": round(
            (beside.rss_mb - before.rss_mb) * 1024 / max(1, num_streams), 2
        ),
        **{f"ratio_{name}": round(ratio, 2) for name, ratio in ratios.items()},
    }
    for name, row in (("before", before), ("beside", beside), ("after", after)):
        figures[name] = {
            "latency_ms_p50": row.latency_ms_p50,
            "latency_ms_p99": row.latency_ms_p99,
            "cpu_us": round(row.cpu_us, 2),
            "tokens_per_s": round(row.tokens_per_s),
            "rss_mb": round(row.rss_mb, 1),
        }
    return figures


async def _idle_cpu(mesh: LocalMesh, seconds: float) -> float:
    """Cores that the frontend needs when nothing but the idle streams is open."""
    clock = CpuClock(mesh.frontend_pid)
    await asyncio.sleep(seconds)
    return clock.elapsed_s() / seconds


def _ratios(before: Row, beside: Row, after: Row) -> Mapping[str, float]:
    """Latency beside the idle streams to that without them; infinite if streams did not keep up."""
    ratios: dict[str, float] = {}
    for name in ("latency_ms_p50", "latency_ms_p99"):
        first, there, last = (getattr(row, name) for row in (before, beside, after))
        without = [ms for ms in (first, last) if ms is not None]
        mean = sum(without) / len(without) if without else 0.0
        ratios[name] = (there + SLACK_MS) / (mean + SLACK_MS) if there and mean else inf
    return ratios


if __name__ == "__main__":
    main()
