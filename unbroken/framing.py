"""Protobuf messages over a byte stream: each is preceded by its size as a little-endian uint32.

    connection = await framing.connect_unix(path, EngineResponse)
    connection.send(request)
    while batch := await connection.receive():   # everything that has arrived, at least one
        ...

Both ends use the same `Connection`. It is cheap because it works in batches: one wake-up of the
reader takes all messages that have arrived, and `send` writes without a task switch.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from unbroken.errors import Reason, UnbrokenError

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
"""Largest message that a connection takes unless told otherwise."""

_HEADER = struct.Struct("<I")
# What may wait before the sender is slowed down. Enough for several steps of 1,024 streams; little
# against the memory of either process.
_BYTES_WAITING_MAX = 4 * 1024 * 1024

InboundT = TypeVar("InboundT", bound=Message)


class FramingError(UnbrokenError):
    """The peer does not speak this protocol, or the connection broke; it is over."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.PROTOCOL_VIOLATION, detail)


class MessageTooLarge(FramingError):  # noqa: N818 - it names what is wrong, as `InvalidField` does.
    """A message is larger than the connection allows."""


class MessageTruncated(FramingError):  # noqa: N818
    """The stream ended within a message."""


class MessageUndecodable(FramingError):  # noqa: N818
    """The bytes of a message are not one."""


class ConnectionBroken(FramingError):  # noqa: N818
    """The connection ended with an error of the operating system, not by the peer closing it."""


class Connection(asyncio.Protocol, Generic[InboundT]):
    """One end of a connection, as an `asyncio.Protocol` for any stream transport.

    One task may `receive`; any number may `send`, whose messages are written in the order of calls.
    What waits to be received is bounded by not reading on; what waits to be sent is bounded if
    senders await `drain`.
    """

    def __init__(
        self,
        inbound: type[InboundT],
        *,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        on_connected: "Callable[[Connection[InboundT]], None] | None" = None,
    ) -> None:
        self._parse: Callable[[bytes], InboundT] = inbound.FromString
        self._message_bytes_max = message_bytes_max
        self._on_connected = on_connected
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()  # Begins at a header; holds less than one message.
        self._waiting: deque[InboundT] = deque()
        self._bytes_waiting = 0
        self._is_reading = True
        self._has_ended = False  # Nothing more will arrive.
        self._error: FramingError | None = None  # Why, if not because the peer closed.
        self._receiver: asyncio.Future[None] | None = None
        self._drainers: list[asyncio.Future[None]] = []
        self._is_writable = True
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # For its users.

    async def receive(self) -> list[InboundT]:
        """All messages that have arrived, in order; waits for the first. Empty: the peer closed.

        Raises:
            FramingError: One of its kinds, after everything that came before it was received.
        """
        if not self._waiting and not self._has_ended:
            assert self._receiver is None, "one task receives"
            self._receiver = asyncio.get_running_loop().create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        batch = list(self._waiting)
        self._waiting.clear()
        self._bytes_waiting = 0
        if not self._is_reading and not self._has_ended and self._transport is not None:
            self._is_reading = True
            self._transport.resume_reading()
        if not batch and self._error is not None:
            raise self._error
        return batch

    def send(self, message: Message) -> None:
        """Write a message, or nothing if the connection has ended.

        Raises:
            MessageTooLarge: The peer would refuse it.
        """
        self.send_all((message,))

    def send_all(self, messages: Iterable[Message]) -> None:
        """As `send`, with one system call for all."""
        parts: list[bytes] = []
        for message in messages:
            data = message.SerializeToString()
            if len(data) > self._message_bytes_max:
                raise MessageTooLarge(_too_large(len(data), self._message_bytes_max))
            parts += (_HEADER.pack(len(data)), data)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    async def drain(self) -> None:
        """Wait until little enough is left unsent, or the connection has ended."""
        if self._is_writable or self._closed.done():
            return
        drained = asyncio.get_running_loop().create_future()
        self._drainers.append(drained)
        await drained

    @property
    def bytes_unsent(self) -> int:
        """Written here and not taken by the kernel yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def is_closed(self) -> bool:
        """The connection has ended, on both ways."""
        return self._closed.done()

    def close(self) -> None:
        """End the connection after everything sent has been written. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now, whatever is left unsent. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        await asyncio.shield(self._closed)

    # For the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports have the methods but not the base class.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_BYTES_WAITING_MAX)
        if self._on_connected is not None:
            self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        if self._has_ended:
            return
        buffer = self._buffer
        buffer += data
        position, available = 0, len(buffer)
        with memoryview(buffer) as view:
            while available - position >= 4:
                (size,) = _HEADER.unpack_from(view, position)
                if size > self._message_bytes_max:
                    self._end(MessageTooLarge(_too_large(size, self._message_bytes_max)))
                    break
                end = position + 4 + size
                if end > available:
                    break
                try:
                    message = self._parse(bytes(view[position + 4 : end]))
                except DecodeError:
                    self._end(MessageUndecodable(f"expected a message, got {size} other bytes"))
                    break
                self._waiting.append(message)
                position = end
        del buffer[:position]
        self._bytes_waiting += position
        if self._bytes_waiting > _BYTES_WAITING_MAX and self._is_reading and self._transport:
            self._is_reading = False
            self._transport.pause_reading()
        if self._waiting:
            self._wake_receiver()

    def eof_received(self) -> bool:
        self._end_of_stream()
        return False  # The transport closes itself.

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._wake_drainers()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._end(ConnectionBroken(f"the connection broke: {exc!r}"))
        else:
            self._end_of_stream()
        if not self._closed.done():
            self._closed.set_result(None)
        self._wake_drainers()

    def _end_of_stream(self) -> None:
        missing = len(self._buffer)
        self._end(
            MessageTruncated(f"the stream ended {missing} bytes into a message")
            if missing
            else None
        )

    def _end(self, error: FramingError | None) -> None:
        """Nothing more is received. The first reason counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._error = error
        self._wake_receiver()
        if error is not None and self._transport is not None:
            self._transport.close()

    def _wake_receiver(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def _wake_drainers(self) -> None:
        for drained in self._drainers:
            if not drained.done():
                drained.set_result(None)
        self._drainers.clear()


async def connect_unix(
    path: str, inbound: type[InboundT], *, message_bytes_max: int = MESSAGE_BYTES_MAX
) -> Connection[InboundT]:
    """Connect to a Unix stream socket. Raises OSError."""
    _, connection = await asyncio.get_running_loop().create_unix_connection(
        lambda: Connection(inbound, message_bytes_max=message_bytes_max), path
    )
    return connection


async def serve_unix(
    path: str,
    inbound: type[InboundT],
    on_connected: Callable[[Connection[InboundT]], None],
    *,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
) -> asyncio.Server:
    """Listen on a Unix stream socket; `on_connected` is called with each new connection.

    Raises OSError.
    """
    return await asyncio.get_running_loop().create_unix_server(
        lambda: Connection(inbound, message_bytes_max=message_bytes_max, on_connected=on_connected),
        path,
    )


def _too_large(size: int, size_max: int) -> str:
    return f"expected a message of at most {size_max} bytes, got {size}"
