"""A connection from its socket to its calls, to which anything happens in any order.

    bytes, full socket, end, loss ──▶ ClientConnection ──▶ calls of Generate, calls that pass on
                                            EdgeServer ◀── news of them, and time

Bytes come in any pieces. No exception leaves the edge, the client hears what it may
(`ClientView`), and when the connection is gone nothing of it is left.
"""

import asyncio
import random
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio
from typing_extensions import override

from frontend.edge.calls import GENERATE, InferenceCalls
from tests.frontend.edge.client_view import ClientView
from tests.frontend.edge.peer import GREETING, data
from unbroken.edge.server import ClientConnection, EdgeServer
from unbroken.errors import UnbrokenError
from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import relay_service_pb2

LIMITS: Final = EdgeLimits(
    streams_max=8,
    request_bytes_max=3000,
    held_bytes_max=6000,
    stream_window=4000,
    connection_window=100_000,
    request_timeout_s=2.0,
    stall_timeout_s=2.0,
    unsent_bytes_max=50_000,
)
STEPS_MAX: Final = 60
_PATHS: Final = (
    GENERATE,
    GENERATE,
    b"/unbroken.v1.InferenceService/Cancel",
    b"/unbroken.v1.RelayService/Relay",
    b"/nobody/Knows",
)
_SERVICES: Final = tuple(
    file.DESCRIPTOR.package + "." + service
    for file in (pb, relay_service_pb2)
    for service in file.DESCRIPTOR.services_by_name
)
_FIELDS: Final = (
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"zstd"),
    (b"grpc-timeout", b"1S"),
    (b"grpc-timeout", b"0n"),
    (b"grpc-timeout", b"soon"),
    (b"a-bin", b"AAE"),
    (b"a-bin", b"A"),
    (b"a-bin", b"\xff"),
    (b"content-length", b"105"),
)


class _Loop(asyncio.SelectorEventLoop):
    """Its time is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    @override
    def time(self) -> float:
        return self.now


class _Socket:
    """A transport that keeps what is written, and is as full as the test says; its socket, too."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.num_unsent = 0
        self.num_acknowledged = 0
        self.is_gone = False
        """Nothing more comes of it."""

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 0

    def get_write_buffer_size(self) -> int:
        return self.num_unsent

    def get_extra_info(self, name: str) -> "_Socket":
        assert name == "socket"
        return self

    def fileno(self) -> int:
        return -1 if self.is_gone else 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """As Linux tells what the other side has acknowledged."""
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return (bytes(120) + self.num_acknowledged.to_bytes(8, sys.byteorder))[:size]

    def write(self, written: bytes) -> None:
        self.written += written

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_gone

    def abort(self) -> None:
        self.is_gone = True


class _Observer:
    def edge_connected(self, num_more: int) -> None:
        assert abs(num_more) == 1

    def edge_limit_hit(self, limit: str) -> None:
        assert limit

    def edge_connection_failed(self, code: str) -> None:
        assert code != ErrorCode.INTERNAL_ERROR.name, "a bug was met, and logged"


class _Reader:
    """What a call of Generate reads; as a reader of a gateway that has no tokenizer."""

    initial_metadata = (("a", "b"),)
    tokenizer = None
    only = None
    look_interval_s = 1.0
    is_current = True

    def __init__(self, on_news: Callable[[], None]) -> None:
        self.on_news = on_news
        self.num_new = 0
        self.is_done = False
        self.error: UnbrokenError | None = None
        self.is_closed = False

    @property
    def is_over(self) -> bool:
        return self.is_done and not self.num_new

    def poll_one(self, now: float) -> None:
        assert now

    def is_plain(self, now: float) -> bool:
        return now < 0

    def acknowledge_early(self) -> None:
        pass

    def poll(self) -> Sequence[pb.GenerateResponse]:
        num_new, self.num_new = self.num_new, 0
        return [pb.GenerateResponse(text="x" * 500)] * num_new

    def sent(self) -> None:
        assert not self.is_closed

    def close(self) -> None:
        assert not self.is_closed, "a reader leaves once"
        self.is_closed = True


class _Gateway:
    def __init__(self, source: random.Random) -> None:
        self._source = source
        self.readers: list[_Reader] = []

    async def generate(
        self, request: pb.GenerateRequest, remaining_s: float | None, on_news: Callable[[], None]
    ) -> _Reader:
        assert request is not None
        assert remaining_s is None or remaining_s >= 0
        for _ in range(self._source.randrange(3)):
            await asyncio.sleep(0)
        reader = _Reader(on_news)
        self.readers.append(reader)
        return reader


class _CallBehind:
    """A call of the server behind: it answers some, and takes all."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._num_left = source.randrange(4)
        self._is_cancelled = False

    async def _wait(self) -> None:
        for _ in range(self._source.randrange(3)):
            await asyncio.sleep(0)
        if self._is_cancelled:
            raise asyncio.CancelledError

    async def read(self) -> object:
        await self._wait()
        self._num_left -= 1
        return grpc.aio.EOF if self._num_left < 0 else b"x" * self._source.randrange(20_000)

    async def write(self, message: bytes) -> None:
        assert len(message) <= LIMITS.request_bytes_max
        await self._wait()

    async def done_writing(self) -> None:
        await self._wait()

    async def initial_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return (("a", "b"), ("b-bin", b"\0"))

    trailing_metadata = initial_metadata

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def details(self) -> str:
        return "details: \xe9"

    def cancel(self) -> bool:
        self._is_cancelled = True
        return True


class _Behind:
    """The channel to it."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def unary_stream(self, path: str) -> Callable[..., _CallBehind]:
        assert path
        return lambda *_message, **_options: _CallBehind(self._source)

    stream_stream = unary_stream


class _World:
    """One connection, and all that it touches."""

    def __init__(self, source: random.Random, loop: _Loop) -> None:
        self._source = source
        self._loop = loop
        self._gateway = _Gateway(source)
        self._server = EdgeServer(
            InferenceCalls(cast("Any", self._gateway)).answers,
            cast("Any", _Behind(source)),
            LIMITS,
            _Observer(),
            services=_SERVICES,
            clock=loop.time,
        )
        self._socket = _Socket()
        self._client = ClientConnection(self._server)
        self._view = ClientView(LIMITS, knows_given=False)
        self._num_heard = 0
        self._next_id = 1
        self._has_ended = False
        """The client has said all."""
        self._client.connection_made(cast("Any", self._socket))

    async def play(self) -> int:
        """Let anything happen; how much did."""
        source = self._source
        self._says(GREETING + frames.frame(FrameType.SETTINGS, frames.ACK, 0))
        num_steps = source.randrange(STEPS_MAX)
        for _ in range(num_steps):
            if self._socket.is_gone and source.random() < 0.3:
                break  # Soon, but not at once.
            self._step(source.randrange(22))
            for _ in range(source.randrange(3)):
                await asyncio.sleep(0)
            self._hears()
        self._client.connection_lost(None)
        self._socket.is_gone = True
        for _ in range(10):
            await asyncio.sleep(0)
        self._check_end()
        return num_steps

    def _step(self, what: int) -> None:
        source, client = self._source, self._client
        readers = self._gateway.readers
        match what:
            case 0 | 1 | 2 | 3 | 4:
                self._says(self._request())
            case 5 | 6 | 7 | 8 | 9:
                self._says(self._body())
            case 10:
                increment = source.choice((1, 1000, 100_000))
                self._says(frames.window_update(self._stream_id() * source.randrange(2), increment))
            case 11:
                self._says(frames.reset(self._stream_id(), ErrorCode.CANCEL))
            case 12 if source.random() < 0.3:
                window = source.choice((0, 100, 100_000))
                payload = b"\0\4" + window.to_bytes(4, "big")
                self._says(frames.frame(FrameType.SETTINGS, 0, 0, payload))
            case 13 if source.random() < 0.1:
                self._says(source.randbytes(30))
            case 14:
                self._socket.num_unsent = source.choice((20_000, 40_000, 60_000))
                if not client.is_paused and not self._socket.is_gone:
                    client.pause_writing()
            case 15 | 16:
                self._socket.num_unsent = 0
                self._socket.num_acknowledged += 1
                if client.is_paused and not self._socket.is_gone:
                    client.resume_writing()
            case 17 | 18 if readers:
                reader = source.choice(readers)
                if not reader.is_closed:
                    reader.num_new += source.randrange(20)
                    reader.is_done = reader.is_done or source.random() < 0.3
                    reader.on_news()
            case 19:
                self._loop.now += source.choice((0.01, 0.5, 1.0))
            case 20 if source.random() < 0.1:
                self._server.drain()
            case 21 if source.random() < 0.2 and not self._socket.is_gone:
                self._end(source.randrange(3))
            case _:
                pass

    def _end(self, how: int) -> None:
        if how == 0 and not self._has_ended:
            self._has_ended = True
            self._client.eof_received()
            self._socket.is_gone = True  # As asyncio has it.
        elif how == 1:
            self._client.close()
        else:
            self._client.abort()

    def _stream_id(self) -> int:
        return max(1, self._next_id - 2 - 2 * self._source.randrange(4))

    def _request(self) -> bytes:
        source = self._source
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", source.choice(_PATHS)),
            (b"content-type", b"application/grpc" if source.random() < 0.95 else b"text/html"),
        ]
        if source.random() < 0.3:
            fields.append(source.choice(_FIELDS))
        stream_id, self._next_id = self._next_id, self._next_id + 2
        flags = frames.END_HEADERS | (source.random() < 0.1)
        # Without a table, so that what is lost of a header block harms no other.
        block = b"".join(_literal(name, value) for name, value in fields)
        said = frames.frame(FrameType.HEADERS, flags, stream_id, block)
        if source.random() < 0.5:
            message = b"x" if source.random() < 0.1 else b""
            said += data(stream_id, PREFIX.pack(0, len(message)) + message, ends=True)
        return said

    def _body(self) -> bytes:
        source = self._source
        message = bytes(source.choice((0, 100, 1000, 2999, 3001)))
        body = PREFIX.pack(source.random() < 0.1, len(message)) + message
        body = body[source.random() < 0.05 : source.choice((5, 1000, len(body), len(body)))]
        return data(self._stream_id(), body, ends=source.random() < 0.5)

    def _says(self, said: bytes) -> None:
        """In any pieces."""
        while said:
            size = len(said) if self._source.random() < 0.5 else self._source.randrange(1, 200)
            if self._has_ended or self._socket.is_gone:
                return
            self._hears()
            if not self._client.connection.is_over:
                self._view.says(said[:size])
            self._client.data_received(said[:size])
            said = said[size:]

    def _hears(self) -> None:
        """What was written, and what will be: the server has said it already."""
        written = self._socket.written
        if self._socket.is_gone or self._client.connection.is_over:
            return
        said = written + self._client.connection.outbound
        self._view.hears(bytes(said[self._num_heard :]))
        self._num_heard = len(said)

    def _check_end(self) -> None:
        server, client = self._server, self._client
        assert not client.calls, "no call is left"
        assert not client.waiting, "nor one that waits for the socket"
        assert not server.num_held, "no byte of a request is held"
        assert not server.clients, "the client is forgotten"
        assert not server.leaving, "also one that was told no more"
        assert not server.awake, "no news waits"
        assert client.closed.done(), "whoever waits for the end learns of it"
        assert all(reader.is_closed for reader in self._gateway.readers), "nobody reads any more"
        assert len(asyncio.all_tasks()) == 1, "no task is left"


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def play(seeds: Sequence[int]) -> int:
    """A connection of each seed; how many steps they took. Raises AssertionError."""
    escaped: list[dict[str, Any]] = []
    loop = _Loop()
    loop.set_exception_handler(lambda _, context: escaped.append(context))

    async def run() -> int:
        num_steps = 0
        for seed in seeds:
            try:
                num_steps += await _World(random.Random(seed), loop).play()
                assert not escaped, f"an exception escaped: {escaped}"
            except Exception as error:
                raise AssertionError(f"socket seed {seed}: {error}") from error
        return num_steps

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()
