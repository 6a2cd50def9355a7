"""What carries a Relay call, either way: the same of both, against a server of grpcio."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hpack import Encoder
from typing_extensions import override

from frontend import native_wire
from frontend.native_wire import NativeWire
from frontend.relay_wire import GrpcioWire, Talker, Wire
from tests.frontend.edge.peer import parse
from tests.frontend.worlds import run
from unbroken.calls import transport
from unbroken.errors import Reason, UnbrokenError
from unbroken.http2 import frames
from unbroken.http2.caller import CallerLimits
from unbroken.http2.messages import PREFIX
from unbroken.status import from_rpc_error
from unbroken.transport import listen, make_server
from unbroken.v1 import attempt_pb2
from unbroken.v1 import relay_service_pb2 as pb

Handler = Callable[[AsyncIterator[pb.RelayRequest], Any], AsyncIterator[bytes]]


class Talking(Talker):
    """Says what it is given, and keeps what it hears."""

    def __init__(self) -> None:
        self.requests: deque[pb.RelayRequest] = deque()
        self.num_asked = 0
        self.num_written = 0
        self.were_last: list[bool] = []
        self.heard: asyncio.Queue[pb.RelayResponse | None] = asyncio.Queue()
        self.over: asyncio.Future[grpc.aio.AioRpcError | None] = (
            asyncio.get_running_loop().create_future()
        )

    @override
    def next_request(self) -> pb.RelayRequest | None:
        self.num_asked += 1
        return self.requests.popleft() if self.requests else None

    @override
    def written(self, request: pb.RelayRequest) -> None:
        self.num_written += 1

    @override
    def receive(self, response: pb.RelayResponse | None, *, is_last: bool = False) -> None:
        self.heard.put_nowait(response)
        self.were_last.append(is_last)

    @override
    def closed(self, error: grpc.aio.AioRpcError | None) -> None:
        self.over.set_result(error)

    def say(self, wire: Wire, *sequences: int) -> None:
        """Have heartbeats of these numbers written."""
        for sequence in sequences:
            self.requests.append(request(sequence))
            wire.wake()


def request(sequence: int) -> pb.RelayRequest:
    return pb.RelayRequest(heartbeat=pb.Heartbeat(sequence=sequence))


def response(sequence: int, num_rows: int = 0) -> pb.RelayResponse:
    frame = attempt_pb2.StepFrame(sequence=sequence, slots=range(num_rows))
    return pb.RelayResponse(frame=frame)


def wire_of(kind: str, address: str, talker: Talker) -> Wire:
    if kind == "grpcio":
        return GrpcioWire(address, talker)
    clock = asyncio.get_running_loop().time
    return NativeWire(address, talker, limits=CallerLimits(), clock=clock)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncGenerator[str]:
    """A server of grpcio whose Relay is that."""
    server = make_server()
    make_handler: Any = grpc.stream_stream_rpc_method_handler
    method = make_handler(handler, request_deserializer=pb.RelayRequest.FromString)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("unbroken.v1.RelayService", {"Relay": method}),)
    )
    address = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@asynccontextmanager
async def conversing(kind: str, address: str) -> AsyncGenerator[tuple[Wire, Talking]]:
    """A wire that is used, and who talks over it."""
    talking = Talking()
    wire = wire_of(kind, address, talking)
    task = asyncio.create_task(wire.converse())
    try:
        async with asyncio.timeout(5):
            yield wire, talking
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_server(
    kind: str, handler: Handler, scenario: Callable[[Wire, Talking], Awaitable[None]]
) -> None:
    async def whole() -> None:
        async with serving(handler) as address, conversing(kind, address) as (wire, talking):
            await scenario(wire, talking)

    run(whole())


async def echo(requests: AsyncIterator[pb.RelayRequest], _: Any) -> AsyncIterator[bytes]:
    async for one in requests:
        yield response(one.heartbeat.sequence).SerializeToString()


both = pytest.mark.parametrize("kind", ["grpcio", "native"])


@both
def test_what_is_hurried_comes_in_its_order_and_natively_leaves_at_once(kind: str) -> None:
    async def scenario(wire: Wire, talking: Talking) -> None:
        talking.say(wire, 1)
        assert await talking.heard.get() == response(1)
        last = 1 + native_wire.FIRST_HURRY
        for sequence in range(2, last + 1):
            talking.say(wire, sequence)
            wire.hurry(len(talking.requests))
        if isinstance(wire, NativeWire):
            assert talking.num_written == last, "in this turn"
            assert not wire._caller.outbound  # pyright: ignore[reportPrivateUsage]
        else:
            assert talking.num_written == 1
        talking.say(wire, last + 1)
        wire.hurry(len(talking.requests))
        if isinstance(wire, NativeWire):
            assert talking.num_written == last, "one alone is in no hurry"
            wire.hurry_all()
            assert talking.num_written == last + 1, "unless it is the last"
        for sequence in range(2, last + 2):
            assert await talking.heard.get() == response(sequence)

    with_server(kind, echo, scenario)


@both
def test_what_is_said_arrives_in_order_and_so_does_what_is_answered(kind: str) -> None:
    async def scenario(wire: Wire, talking: Talking) -> None:
        talking.say(wire, *range(1, 200))  # Before there is a connection.
        for sequence in range(1, 200):
            heard = await talking.heard.get()
            assert heard == response(sequence)
        talking.say(wire, 200)
        assert await talking.heard.get() == response(200)
        assert talking.num_written == 200

    with_server(kind, echo, scenario)


@both
def test_messages_larger_than_any_window_pass(kind: str) -> None:
    async def large(requests: AsyncIterator[pb.RelayRequest], _: Any) -> AsyncIterator[bytes]:
        async for one in requests:
            yield response(len(one.cancel.request_id), 300_000).SerializeToString()

    async def scenario(wire: Wire, talking: Talking) -> None:
        name = "r" * 3_000_000
        talking.requests.append(pb.RelayRequest(cancel=pb.CancelAttempts(request_id=name)))
        wire.wake()
        assert await talking.heard.get() == response(3_000_000, 300_000)

    with_server(kind, large, scenario)


@both
def test_bytes_that_are_no_message_are_told_as_none(kind: str) -> None:
    async def garble(_: AsyncIterator[pb.RelayRequest], __: Any) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff\xff"
        await asyncio.Event().wait()

    async def scenario(_: Wire, talking: Talking) -> None:
        assert await talking.heard.get() is None

    with_server(kind, garble, scenario)


@both
def test_a_status_comes_with_its_reason(kind: str) -> None:
    async def fence(requests: AsyncIterator[pb.RelayRequest], _: Any) -> AsyncIterator[bytes]:
        await anext(requests)
        if requests:
            raise UnbrokenError(Reason.FENCED, "expected 1, this is 2 — „späteres“")
        yield b""

    async def scenario(wire: Wire, talking: Talking) -> None:
        talking.say(wire, 1)
        error = await talking.over
        assert error is not None
        meaning = from_rpc_error(error)
        assert (meaning.reason, meaning.detail) == (
            Reason.FENCED,
            "expected 1, this is 2 — „späteres“",
        )

    with_server(kind, fence, scenario)


@both
def test_a_good_end_is_no_error(kind: str) -> None:
    async def part(requests: AsyncIterator[pb.RelayRequest], _: Any) -> AsyncIterator[bytes]:
        await anext(requests)
        yield response(1).SerializeToString()

    async def scenario(wire: Wire, talking: Talking) -> None:
        talking.say(wire, 1)
        assert await talking.over is None
        assert talking.heard.get_nowait() == response(1), "what came before the end was told"

    with_server(kind, part, scenario)


@both
def test_a_sidecar_that_is_not_there_is_unreachable(kind: str) -> None:
    async def scenario() -> None:
        async with conversing(kind, "127.0.0.1:1") as (wire, talking):
            talking.say(wire, 1)
            error = await talking.over
            assert error is not None
            assert from_rpc_error(error).reason is Reason.UNREACHABLE

    run(scenario())


@both
def test_a_server_that_dies_is_unreachable(kind: str) -> None:
    async def scenario() -> None:
        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(24)
            writer.transport.abort()

        server = await asyncio.start_server(die, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, conversing(kind, f"{host}:{port}") as (_, talking):
            error = await talking.over
            assert error is not None
            assert from_rpc_error(error).reason is Reason.UNREACHABLE

    run(scenario())


@both
def test_who_hangs_up_is_missed_by_the_server_at_once(kind: str) -> None:
    async def scenario() -> None:
        is_gone, has_begun = asyncio.Event(), asyncio.Event()

        async def follow(requests: AsyncIterator[pb.RelayRequest], _: Any) -> AsyncIterator[bytes]:
            try:
                async for one in requests:
                    has_begun.set()
                    yield response(one.heartbeat.sequence).SerializeToString()
            finally:
                is_gone.set()

        async with serving(follow) as address:
            async with conversing(kind, address) as (wire, talking):
                talking.say(wire, 1)
                await has_begun.wait()
            async with asyncio.timeout(5):
                await is_gone.wait()

    run(scenario())


@both
def test_nothing_is_taken_from_the_talker_that_the_server_does_not_take(kind: str) -> None:
    async def ignore(_: AsyncIterator[pb.RelayRequest], __: Any) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def scenario(wire: Wire, talking: Talking) -> None:
        size = 64 * 1024
        cancel = pb.RelayRequest(cancel=pb.CancelAttempts(request_id="r" * size))
        talking.requests.extend([cancel] * 4000)
        wire.wake()
        async with asyncio.timeout(5):
            while talking.num_written < 1:  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.01)
        seen = -1
        while seen != talking.num_written:
            seen = talking.num_written
            await asyncio.sleep(0.1)
        assert len(talking.requests) > 3000  # Kernels and gRPC hold some megabytes.

    with_server(kind, ignore, scenario)


def test_what_is_said_in_one_turn_leaves_in_one_piece() -> None:
    async def scenario() -> None:
        pieces: asyncio.Queue[bytes] = asyncio.Queue()

        class Listening(asyncio.Protocol):
            @override
            def data_received(self, data: bytes) -> None:
                pieces.put_nowait(data)

        loop = asyncio.get_running_loop()
        server = await loop.create_server(Listening, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, conversing("native", f"{host}:{port}") as (wire, talking):
            await pieces.get()
            talking.say(wire, 1, 2, 3)
            assert len(parse(await pieces.get())) == 3

    run(scenario())


def greeted(talking: Talking, socket: "Clogged | None" = None) -> NativeWire:
    """A wire to a server that is the test, and has said its settings."""
    wire = wire_of("native", "127.0.0.1:1", talking)
    assert isinstance(wire, NativeWire)
    wire.connection_made(socket or Clogged())
    wire.data_received(frames.settings({}))
    return wire


def test_what_waits_for_a_window_leaves_when_that_opens() -> None:
    """The window is full to the last byte, so nothing is pending that would tell of it."""

    async def scenario() -> None:
        talking = Talking()
        wire = greeted(talking)
        size = frames.WINDOW_DEFAULT - PREFIX.size
        filling = pb.RelayRequest(cancel=pb.CancelAttempts(request_id="r" * size))
        while filling.ByteSize() > size:
            excess = filling.ByteSize() - size
            filling.cancel.request_id = filling.cancel.request_id[excess:]
        assert filling.ByteSize() == size
        talking.requests.append(filling)
        talking.requests.append(request(2))
        wire.wake()
        await asyncio.sleep(0)
        assert talking.num_written == 1
        wire.data_received(frames.window_update(1, 1000) + frames.window_update(0, 1000))
        assert talking.num_written == 2
        wire.hang_up()

    run(scenario())


def test_of_what_came_in_one_piece_only_the_last_is_told_as_such() -> None:
    async def scenario() -> None:
        talking = Talking()
        wire = greeted(talking)
        fields = [(b":status", b"200"), (b"content-type", b"application/grpc")]
        wire.data_received(frames.headers(1, Encoder().encode(fields), ends=False))
        said = response(1).SerializeToString()
        body = PREFIX.pack(0, len(said)) + said
        one = frames.frame(frames.FrameType.DATA, 0, 1, body)
        wire.data_received(one)
        wire.data_received(one * 3)
        wire.data_received(frames.frame(frames.FrameType.DATA, 0, 1, body * 2))
        assert talking.were_last == [True, False, False, True, False, True]
        wire.hang_up()

    run(scenario())


class Answering(Talking):
    """Has two things to say to each that it hears."""

    wire: Wire

    @override
    def receive(self, response: pb.RelayResponse | None, *, is_last: bool = False) -> None:
        self.say(self.wire, 1, 2)


def test_all_that_a_read_is_answered_leaves_in_one_write() -> None:
    """What the talker says, and what HTTP/2 does."""

    async def scenario() -> None:
        talking, socket = Answering(), Clogged()
        wire = talking.wire = greeted(talking, socket)
        fields = [(b":status", b"200"), (b"content-type", b"application/grpc")]
        wire.data_received(frames.headers(1, Encoder().encode(fields), ends=False))
        said = response(1).SerializeToString()
        one = frames.frame(frames.FrameType.DATA, 0, 1, PREFIX.pack(0, len(said)) + said)
        ping = frames.ping(b"12345678", is_ack=False)
        for came, num_answers in ((one, 2), (ping + one * 2, 1 + 4)):
            socket.written.clear()
            wire.data_received(came)
            await asyncio.sleep(0)
            (piece,) = socket.written
            assert len(parse(piece)) == num_answers
        wire.hang_up()

    run(scenario())


class Clogged(asyncio.Transport):
    """Of a connection whose other end reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.num_unread = 0
        self.is_aborted = False

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    @override
    def is_closing(self) -> bool:
        return self.is_aborted

    @override
    def abort(self) -> None:
        self.is_aborted = True

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))
        self.num_unread += len(data)

    @override
    def get_write_buffer_size(self) -> int:
        return self.num_unread


def test_a_sidecar_that_has_everything_answered_and_reads_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "UNSENT_BYTES_MAX", 10_000)

    async def scenario() -> None:
        talking = Talking()
        wire = NativeWire("there:1", talking, limits=CallerLimits(), clock=lambda: 0.0)
        clogged = Clogged()
        wire.connection_made(clogged)
        wire.pause_writing()
        wire.data_received(frames.settings({}))
        ping = frames.ping(b"12345678", is_ack=False)
        wire.data_received(ping * 100)
        assert not talking.over.done()
        wire.data_received(ping * 1000)
        error = await talking.over
        assert error is not None
        assert from_rpc_error(error).reason is Reason.UNREACHABLE
        assert clogged.is_aborted
        wire.connection_lost(None)

    run(scenario())
