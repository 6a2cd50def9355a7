"""A client of InferenceService.Generate that costs less than grpc.aio's, over our own frames.

What a benchmark measures of a server has its own client's work in it where both share two cores.
One connection, many calls; it trusts the server, and takes whatever is sent: its windows are as
large as they can be.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final, cast

from hpack import Decoder, Encoder
from typing_extensions import override

from unbroken.config import split_address
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import Piece
from unbroken.history import History
from unbroken.http2 import frames
from unbroken.http2.caller import Status
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.headers import Fields
from unbroken.http2.messages import PREFIX, MessageReader, Refused
from unbroken.http2.rules import next_frame
from unbroken.status import from_rpc_error, rpc_error
from unbroken.v1 import inference_service_pb2 as pb

MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
_FIELDS: Final = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/unbroken.v1.InferenceService/Generate"),
    (b":authority", b"bench"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)


@asynccontextmanager
async def raw_calls(address: str) -> AsyncGenerator["RawCalls"]:
    """A connection to a frontend. Raises OSError if there is none."""
    host, port = split_address(address)
    loop = asyncio.get_running_loop()
    transport, calls = await loop.create_connection(RawCalls, host, port)
    try:
        yield calls
    finally:
        transport.close()


class Recording:
    """What a call brought and when; it is looked at when the call is over."""

    def __init__(self) -> None:
        self._came: list[tuple[float, pb.GenerateResponse]] = []

    def add(self, response: pb.GenerateResponse) -> None:
        """The next message."""
        self._came.append((time.monotonic(), response))

    def history(self) -> History:
        """The same as others look at it."""
        history = History()
        for at, response in self._came:
            if response.HasField("started"):
                history.started = response.started
            if response.HasField("finished"):
                history.finished = response.finished
            if response.token_ids or response.text:
                history.add(Piece.from_proto(response), at)
        return history


class RawCalls(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._encoder = Encoder()
        self._buffer = b""
        self._calls: dict[int, _Call] = {}
        self._next_stream_id = 1
        self._transport: asyncio.Transport | None = None

    async def generate(
        self,
        request: pb.GenerateRequest,
        each: Callable[[pb.GenerateResponse], None],
        *,
        timeout_s: int | None = None,
    ) -> None:
        """Ask, and tell `each` message as it comes. Raises `UnbrokenError`."""
        transport = self._transport
        if transport is None:
            raise _lost("the frontend closed the connection")
        fields = _FIELDS if timeout_s is None else (*_FIELDS, (b"grpc-timeout", b"%dS" % timeout_s))
        stream_id, self._next_stream_id = self._next_stream_id, self._next_stream_id + 2
        call = self._calls[stream_id] = _Call(each)
        message = request.SerializeToString()
        # Of one frame: a prompt of a benchmark is short, and the server's windows are not.
        transport.write(
            frames.headers(stream_id, self._encoder.encode(fields), ends=False)
            + frames.frame(
                FrameType.DATA,
                frames.END_STREAM,
                stream_id,
                PREFIX.pack(0, len(message)) + message,
            )
        )
        try:
            await call.ended
        finally:
            if self._calls.pop(stream_id, None) is not None:  # Whoever waited does so no more.
                self._write(frames.reset(stream_id, ErrorCode.CANCEL))

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(
            frames.PREFACE
            + frames.settings({Setting.INITIAL_WINDOW_SIZE: frames.WINDOW_MAX})
            + frames.window_update(0, frames.WINDOW_MAX - frames.WINDOW_DEFAULT)
        )

    @override
    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while (frame := next_frame(buffer, at)) is not None:
            kind, flags, stream_id, payload = frame
            at += frames.HEADER_BYTES + len(payload)
            self._frame(kind, flags, stream_id, payload)
        self._buffer = buffer[at:]

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for call in self._calls.values():
            call.end_with(_lost(f"the connection was lost: {exc}"))
        self._calls.clear()

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        match kind:
            case FrameType.DATA:
                if (call := self._calls.get(stream_id)) is not None:
                    call.feed(payload)
            case FrameType.HEADERS:
                # Every block has to be decoded: it changes the table of those that follow.
                fields = self._decoder.decode(payload, raw=True)
                if flags & frames.END_STREAM:
                    # An answer that is all trailers has the status of HTTP among them.
                    trailers = [(bytes(k), bytes(v)) for k, v in fields if not k.startswith(b":")]
                    if (call := self._calls.pop(stream_id, None)) is not None:
                        call.end(trailers)
            case FrameType.RST_STREAM:
                if (call := self._calls.pop(stream_id, None)) is not None:
                    call.end_with(_lost("the stream was reset"))
            case FrameType.SETTINGS if not flags & frames.ACK:
                self._write(frames.frame(FrameType.SETTINGS, frames.ACK, 0))
            case FrameType.PING if not flags & frames.ACK:
                self._write(frames.ping(payload, is_ack=True))
            case _:
                pass

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


class _Call:
    """One of them."""

    def __init__(self, each: Callable[[pb.GenerateResponse], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._each = each
        self._body = MessageReader(None, MESSAGE_BYTES_MAX)

    def feed(self, payload: bytes) -> None:
        for message in self._body.feed(payload):
            self._each(pb.GenerateResponse.FromString(message))

    def end(self, fields: Fields) -> None:
        """With its trailers."""
        try:
            self._body.finish()
        except Refused as error:
            self.end_with(_lost(error.detail))
            return
        status = Status.by_server(fields)
        if status.code:
            self.end_with(from_rpc_error(rpc_error(status.code, status.detail, status.trailers)))
        elif not self.ended.done():
            self.ended.set_result(None)

    def end_with(self, error: UnbrokenError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


def _lost(detail: str) -> UnbrokenError:
    return UnbrokenError(Reason.UNREACHABLE, detail)
