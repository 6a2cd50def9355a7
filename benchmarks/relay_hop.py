"""The relay hop over grpc.aio and over our own HTTP/2: `make bench-relay-hop`

A sidecar sends one columnar message (RelayResponse with a StepFrame) per engine step over one
stream, a frontend reads it. Two processes, the same protobuf at both ends, and in between

    grpc    a bidirectional stream of grpc.aio
    mixed   grpc.aio in the sidecar, unbroken/http2/caller.py in the frontend
    http2   unbroken/http2/connection.py in the sidecar, and that: as the mesh has it

at so many streams a step. What is left out is what both would need: acknowledgements, heartbeats,
ledgers. CPU is that of a process per step frame; latency is from the step to the parsed message.
docs/decisions/relay-hop.md says what follows.

    python -m benchmarks.relay_hop [--seconds 4] [--rows 16,256,1024] [--step-ms 20]
"""

import argparse
import asyncio
import json
import struct
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, cast

import uvloop
from typing_extensions import override

from benchmarks.stamps import CpuClock, age_s, stamp
from unbroken.calls.transport import CallerTransport
from unbroken.edge.answering import ANSWER_FIELDS
from unbroken.http2.caller import CallerLimits, Event, MessageReceived
from unbroken.http2.connection import Connection, DataReceived, RequestReceived
from unbroken.http2.limits import EdgeLimits
from unbroken.transport import listen, make_server, open_channel
from unbroken.v1 import attempt_pb2
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1.relay_service_pb2_grpc import (
    RelayServiceServicer,
    RelayServiceStub,
    add_RelayServiceServicer_to_server,
)

WAYS: Final = ("grpc", "mixed", "http2")
WARM_UP_S: Final = 0.5
READ_S_MAX: Final = 30.0
_PREFIX: Final = struct.Struct(">BI")


def step_message(sequence: int, rows: int) -> pb.RelayResponse:
    """What a step of so many streams becomes."""
    token_id = stamp()
    frame = attempt_pb2.StepFrame(
        sequence=sequence,
        slots=range(rows),
        offsets=[sequence] * rows,
        token_ids=[token_id] * rows,
    )
    return pb.RelayResponse(frame=frame)


class Sidecar(RelayServiceServicer):
    """Sends a message per step to whoever says hello."""

    def __init__(self, rows: int, step_s: float) -> None:
        self._rows = rows
        self._step_s = step_s

    @override
    async def Relay(
        self, request_iterator: AsyncIterator[pb.RelayRequest], context: Any
    ) -> AsyncIterator[pb.RelayResponse]:
        await anext(aiter(request_iterator))
        async for sequence in steps(self._step_s):
            yield step_message(sequence, self._rows)


async def steps(step_s: float) -> AsyncIterator[int]:
    """Numbers from 1, one each step."""
    loop = asyncio.get_running_loop()
    due, sequence = loop.time(), 0
    while True:
        sequence += 1
        yield sequence
        due = max(due + step_s, loop.time() - step_s)
        await asyncio.sleep(max(0.0, due - loop.time()))


class Http2Sidecar(asyncio.Protocol):
    """The same over the edge's connection."""

    def __init__(self, rows: int, step_s: float) -> None:
        self._rows = rows
        self._step_s = step_s
        self._connection = Connection(EdgeLimits(), time.monotonic())
        self._transport: asyncio.Transport | None = None
        self._stepping: asyncio.Task[None] | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._stepping is not None:
            self._stepping.cancel()

    @override
    def data_received(self, data: bytes) -> None:
        for event in self._connection.receive(data, time.monotonic()):
            if isinstance(event, RequestReceived):
                self._connection.send_headers(event.stream_id, ANSWER_FIELDS)
                self._stepping = asyncio.create_task(self._step(event.stream_id))
            elif isinstance(event, DataReceived):
                self._connection.consumed(event.stream_id, len(event.data))
        self._write()

    async def _step(self, stream_id: int) -> None:
        async for sequence in steps(self._step_s):
            message = step_message(sequence, self._rows).SerializeToString()
            body = _PREFIX.pack(0, len(message)) + message
            self._connection.send_data(stream_id, body, time.monotonic())
            self._write()

    def _write(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._connection.take_outbound())


class Seen:
    """What the frontend's end saw."""

    def __init__(self) -> None:
        self.is_counting = False
        self.num_frames = 0
        self.ages_s: list[float] = []

    def saw(self, response: pb.RelayResponse) -> None:
        """A message, and a look at each of its columns, as the ingest has."""
        frame = response.frame
        ids = frame.token_ids[:]
        assert len(frame.slots[:]) == len(frame.offsets[:]) == len(ids)
        if self.is_counting:
            self.num_frames += 1
            self.ages_s.append(age_s(ids[0]))


class Http2Frontend(CallerTransport):
    """Reads the stream over our HTTP/2, as frontends do."""

    def __init__(self, address: str, seen: Seen) -> None:
        super().__init__(address, CallerLimits(), time.monotonic)
        self._seen = seen
        call = self._call("/unbroken.v1.RelayService/Relay")
        self._caller.send(call, pb.RelayRequest().SerializeToString())

    @override
    def _tell(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, MessageReceived):  # Else the sidecar has ended.
                self._tell_message(*event)

    @override
    def _tell_message(self, call: int, message: bytes) -> None:
        self._seen.saw(pb.RelayResponse.FromString(message))


async def serve(way: str, rows: int, step_s: float) -> None:
    """The sidecar's process: prints its address, ends when killed."""
    if way != "http2":
        server = make_server()
        sidecar = Sidecar(rows, step_s)  # pyright: ignore[reportAbstractUsage] - Relay is enough.
        add_RelayServiceServicer_to_server(sidecar, server)
        bound = listen(server, "127.0.0.1:0")
        await server.start()
    else:
        plain = await asyncio.get_running_loop().create_server(
            lambda: Http2Sidecar(rows, step_s), "127.0.0.1", 0
        )
        bound = f"127.0.0.1:{plain.sockets[0].getsockname()[1]}"
    print(bound, flush=True)  # noqa: T201
    await asyncio.Event().wait()


async def read(way: str, address: str, pid: int, seconds: float) -> Mapping[str, float]:
    """The frontend's process: what a step cost itself and the sidecar `pid`."""
    seen = Seen()
    if way == "grpc":
        channel = open_channel(address)

        async def hello() -> AsyncIterator[pb.RelayRequest]:
            yield pb.RelayRequest()
            await asyncio.Event().wait()

        async def follow() -> None:
            async for response in RelayServiceStub(channel).Relay(hello()):
                seen.saw(response)

        reading = asyncio.create_task(follow())
    else:
        await Http2Frontend(address, seen).connect()
        reading = asyncio.create_task(asyncio.sleep(WARM_UP_S + seconds + 1))
    await asyncio.sleep(WARM_UP_S)
    seen.is_counting = True
    own, theirs = CpuClock(), CpuClock(pid)
    await asyncio.sleep(seconds)
    own_s, theirs_s = own.elapsed_s(), theirs.elapsed_s()
    reading.cancel()
    ages = sorted(seen.ages_s)
    return {
        "frames_per_s": round(seen.num_frames / seconds, 1),
        "frontend_us": round(own_s / seen.num_frames * 1e6, 1),
        "sidecar_us": round(theirs_s / seen.num_frames * 1e6, 1),
        "latency_ms_p50": round(ages[len(ages) // 2] * 1e3, 2),
        "latency_ms_p99": round(ages[int(len(ages) * 0.99)] * 1e3, 2),
    }


async def measure(rows: int, way: str, step_ms: float, seconds: float) -> Mapping[str, float]:
    """One way at one size, in two processes of their own. Raises TimeoutError."""
    common = ("-m", "benchmarks.relay_hop", "--way", way, "--rows", str(rows))
    paced = ("--step-ms", str(step_ms), "--seconds", str(seconds))
    sidecar = await asyncio.create_subprocess_exec(
        sys.executable, *common, *paced, "--serve", stdout=PIPE
    )
    frontend = None
    try:
        async with asyncio.timeout(seconds + READ_S_MAX):
            assert sidecar.stdout is not None
            address = (await sidecar.stdout.readline()).decode().strip()
            whom = ("--read", address, "--pid", str(sidecar.pid))
            frontend = await asyncio.create_subprocess_exec(
                sys.executable, *common, *paced, *whom, stdout=PIPE
            )
            output, _ = await frontend.communicate()
            return json.loads(output)
    finally:
        for process in (frontend, sidecar):
            if process is not None:
                if process.returncode is None:
                    process.kill()
                await process.wait()


def _both_us(seen: Mapping[str, float]) -> float:
    return seen["sidecar_us"] + seen["frontend_us"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default="16,256,1024", help="streams that move in a step")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--pid", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        uvloop.run(serve(given.way, int(given.rows), given.step_ms / 1e3))
        return
    if given.read:
        seen = uvloop.run(read(given.way, given.read, given.pid, given.seconds))
        print(json.dumps(seen))  # noqa: T201
        return
    results = {
        f"{way} {rows}": uvloop.run(measure(int(rows), way, given.step_ms, given.seconds))
        for rows in given.rows.split(",")
        for way in WAYS
    }
    print("| streams | way | µs a step: sidecar, frontend | latency ms p50 / p99 |")  # noqa: T201
    print("|---|---|---|---|")  # noqa: T201
    for name, seen in results.items():
        way, rows = name.split()
        print(  # noqa: T201
            f"| {rows} | {way} | {seen['sidecar_us']:.0f}, {seen['frontend_us']:.0f} "
            f"| {seen['latency_ms_p50']:.2f} / {seen['latency_ms_p99']:.2f} |"
        )
    # A share of a core that one link between a frontend and a sidecar saves in both.
    saved = {
        f"{way} {rows}": round(
            (_both_us(results[f"grpc {rows}"]) - _both_us(results[f"{way} {rows}"]))
            / (1e3 * given.step_ms),
            4,
        )
        for rows in given.rows.split(",")
        for way in WAYS[1:]
    }
    paced = 0.8 * 1e3 / given.step_ms
    is_ok = all(seen["frames_per_s"] >= paced for seen in results.values())
    figures = {"ok": is_ok, "step_ms": given.step_ms, "cores_saved_a_link": saved, **results}
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
