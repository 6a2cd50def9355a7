"""`make bench-memory`: the host path of the memory service, beside what bounds it, in the same run.

    python -m benchmarks.memory [--rounds 15]

- put: copy, checksum and record of a block, beside a bare copy of the same bytes.
- get: 64 blocks pinned and mapped, nothing copied. Beside it, with no goal of their own: the same
  with a Python object and a view made of each, and with their checksums compared.
- call: one call of the session channel; beside it, what the machine itself takes just then: a
  packet to another process and back, and a little Python that calls nothing.
- attach: a pool of 4 GiB, beside one of 64 MiB with as many slabs.
- remote read: blocks over gRPC, beside a bare stream of messages of the same size.

Memory is touched once before anything is measured. What takes microseconds is measured a little in
each of many rounds, since a machine that somebody else uses is slow for some tenths of a second at
a time; the figure is the median of the rounds' medians. It may be slow for all of a run, too: then
bare Python takes up to 1.8 times as long, and microseconds are judged as if it did not (the share
`of_quiet`; never more than 1). Ends with one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import mmap
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from typing_extensions import override

from tests.memory_service.processes import serving
from unbroken.memory.client import MemoryClient, SegmentClass
from unbroken.transport import listen_locally, make_server, open_channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc

BLOCK_BYTES = 2 * 1024 * 1024
NUM_BLOCKS = 64
GIB = 1024**3
CALLS_A_ROUND = 50
QUIET_PYTHON_US = 17.0
"""What `bare_python` took on the machine of the targets while nobody else used it."""
ROUND_S = 0.05
"""Between two rounds: what disturbs one shall not disturb the next."""
GOALS = {
    "put_share_of_memcpy_min": 0.6,
    "get_64_us_max": 100.0,
    "call_us_max": 60.0,
    "attach_4gib_ms_max": 1.0,
    "attach_size_ratio_max": 1.5,
    "remote_share_of_stream_min": 0.6,
}


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory,
        serving(Path(directory), "--capacity-bytes", str(16 * GIB)) as service,
        service.client(client="bench") as writing,
        service.client(client="reader") as reading,
    ):
        figures = puts(writing, given.rounds)
        figures |= hot(reading, given.rounds)
        figures |= attaches(writing, reading, given.rounds)
        figures |= remote(service.control, Path(directory), given.rounds)
    missed: list[str] = []
    for goal, bound in GOALS.items():
        name, _, kind = goal.rpartition("_")
        value = figures[name] * (figures["of_quiet"] if name.endswith("_us") else 1)
        if value > bound if kind == "max" else value < bound:
            missed.append(goal)
    figures = {"ok": not missed, **figures, "missed": missed}
    print(json.dumps(figures))  # noqa: T201
    return 0 if figures["ok"] else 1


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def puts(client: MemoryClient, rounds: int) -> dict[str, Any]:
    """Rounds of both, taking turns; the share is that of each pair of rounds."""
    source = mmap.mmap(-1, BLOCK_BYTES * NUM_BLOCKS)
    for start in range(0, len(source), 4096):
        source[start : start + 8] = os.urandom(8)
    blocks = [
        memoryview(source)[start : start + BLOCK_BYTES]
        for start in range(0, len(source), BLOCK_BYTES)
    ]
    writer = client.open_writer(BLOCK_BYTES, NUM_BLOCKS)

    def put(turn: int) -> None:
        for index, block in enumerate(blocks):
            assert writer.put(key_of(turn * NUM_BLOCKS + index), block, 16)
        writer.flush()

    bare = mmap.mmap(-1, BLOCK_BYTES * NUM_BLOCKS)
    bare_view = memoryview(bare)

    def copy() -> None:
        for index, block in enumerate(blocks):
            bare_view[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = block

    put(0)
    copy()
    shares: list[float] = []
    put_s: list[float] = []
    for turn in range(1, rounds + 1):
        copied_s, took_s = timed(copy), timed(lambda turn=turn: put(turn))
        shares.append(copied_s / took_s)
        put_s.append(took_s)
    put(0)  # Under the keys that are got.
    size = BLOCK_BYTES * NUM_BLOCKS
    return {
        "put_share_of_memcpy": round(statistics.median(shares), 3),
        "put_gb_per_s": round(size / statistics.median(put_s) / 1e9, 2),
    }


def hot(client: MemoryClient, rounds: int) -> dict[str, Any]:
    """64 blocks at once, and a look for one key; each a little in each round."""
    keys = [key_of(index) for index in range(NUM_BLOCKS)]

    def get(*, checked: bool = False) -> None:
        with client.get(keys, checked=checked) as blocks:
            assert len(blocks) == NUM_BLOCKS

    def views() -> None:
        with client.get(keys, checked=False) as blocks:
            assert len([block.data for block in blocks]) == NUM_BLOCKS

    get(checked=True)
    with echoing() as echo:
        kinds: dict[str, Callable[[], object]] = {
            "get_64": get,
            "get_64_views": views,
            "call": lambda: client.find(keys[:1]),
            "bare_packet": echo,
            "bare_python": bare_python,
        }
        medians: dict[str, list[float]] = {name: [] for name in kinds}
        called: list[float] = []
        turns = list(kinds.items())
        for turn in range(rounds * 4):
            # The first after a pause finds a core that has slept.
            first = turn % len(turns)
            for name, work in turns[first:] + turns[:first]:
                seen = [timed(work) for _ in range(CALLS_A_ROUND)]
                medians[name].append(statistics.median(seen) * 1e6)
                called += seen if name == "call" else ()
            time.sleep(ROUND_S)
    checked = [timed(lambda: get(checked=True)) for _ in range(rounds)]
    figures = {f"{name}_us": round(statistics.median(of), 1) for name, of in medians.items()}
    figures["of_quiet"] = round(min(1.0, QUIET_PYTHON_US / figures["bare_python_us"]), 2)
    worst = {f"{name}_us_worst_round": round(max(of), 1) for name, of in medians.items()}
    return {
        **figures,
        **worst,
        "call_us_p99": round(sorted(called)[len(called) * 99 // 100] * 1e6, 1),
        "get_64_checked_ms": round(statistics.median(checked) * 1e3, 2),
    }


def bare_python() -> int:
    """The same few things for each of 64: where this takes longer, so does all that we do."""
    return sum(number % 7 for number in range(10 * NUM_BLOCKS))


@contextlib.contextmanager
def echoing() -> Generator[Callable[[], object]]:
    """A process that sends back what it is sent; what sends it a packet, and waits for that."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = multiprocessing.get_context("spawn").Process(
        target=send_back, args=(there,), daemon=True
    )
    process.start()
    there.close()
    here.settimeout(30)

    def echo() -> None:
        here.send(b"x" * 64)
        assert here.recv(1024)

    try:
        echo()
        yield echo
    finally:
        here.close()
        process.kill()
        process.join()


def send_back(sock: socket.socket) -> None:
    """Until the other side is gone."""
    while data := sock.recv(1024):
        sock.send(data)


def attaches(owner: MemoryClient, reader: MemoryClient, rounds: int) -> dict[str, Any]:
    """As many slabs, of different sizes, taking turns."""
    seen: dict[str, list[float]] = {"large": [], "small": []}
    for name, size in (("large", GIB), ("small", GIB // 64)):
        owner.freeze(owner.create(name, SegmentClass.KV_POOL, [size] * 4))
    for _ in range(rounds * 4):
        for name, times in seen.items():
            begun = time.perf_counter()
            segment = reader.attach(name)
            times.append(time.perf_counter() - begun)
            reader.release(segment)
    large, small = (statistics.median(seen[name]) for name in ("large", "small"))
    return {
        "attach_4gib_ms": round(large * 1e3, 3),
        "attach_64mib_ms": round(small * 1e3, 3),
        "attach_size_ratio": round(large / small, 3),
    }


class BareStream(memory_pb2_grpc.MemoryServiceServicer):
    """The same messages, with nothing behind them."""

    @override
    async def ReadBlocks(
        self, request: pb.ReadBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ReadBlocksResponse]:
        data = os.urandom(BLOCK_BYTES)
        for index in range(len(request.keys) // 32):
            yield pb.ReadBlocksResponse(index=index, data=data, size_bytes=len(data))


def serve_bare(path: str, ready: Connection) -> None:
    """In a process of its own, as the memory service is."""

    async def serve() -> None:
        server = make_server()
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(
            BareStream(),  # pyright: ignore[reportAbstractUsage] - One call is enough.
            server,
        )
        listen_locally(server, Path(path))
        await server.start()
        ready.send(True)
        await server.wait_for_termination()

    uvloop.run(serve())


def remote(control: str, directory: Path, rounds: int) -> dict[str, Any]:
    """64 blocks over each, taking turns."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    path = directory / "bare.sock"
    process = multiprocessing.get_context("spawn").Process(
        target=serve_bare, args=(str(path), there), daemon=True
    )
    process.start()
    try:
        assert here.poll(30)
        return uvloop.run(_remote(control, f"unix:{path}", rounds))
    finally:
        process.kill()
        process.join()


async def _remote(control: str, bare: str, rounds: int) -> dict[str, Any]:
    keys = b"".join(key_of(index) for index in range(NUM_BLOCKS))

    async def read(channel: grpc.aio.Channel) -> float:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        begun = time.perf_counter()
        size = 0
        async for part in stub.ReadBlocks(pb.ReadBlocksRequest(keys=keys)):
            size += len(part.data)
        assert size == BLOCK_BYTES * NUM_BLOCKS
        return time.perf_counter() - begun

    async with open_channel(control) as ours, open_channel(bare) as theirs, asyncio.timeout(300):
        shares: list[float] = []
        ours_s: list[float] = []
        for turn in range(rounds + 1):
            bare_s, took_s = await read(theirs), await read(ours)
            if turn:
                shares.append(bare_s / took_s)
                ours_s.append(took_s)
    size = BLOCK_BYTES * NUM_BLOCKS
    return {
        "remote_share_of_stream": round(statistics.median(shares), 3),
        "remote_gb_per_s": round(size / statistics.median(ours_s) / 1e9, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
