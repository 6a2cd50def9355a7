"""A connection to a gRPC server over our own HTTP/2: its socket, its writes and its time."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, cast

import grpc.aio
from typing_extensions import override

from unbroken.config import split_address
from unbroken.http2.caller import Caller, CallerLimits, Event, Status
from unbroken.http2.headers import Fields
from unbroken.recurring import TIMER_S_MIN, naps
from unbroken.status import rpc_error

CONNECT_S_MAX: Final = 1.0
"""As for the channels of grpcio (`unbroken.transport`)."""
WRITE_BUFFER_HIGH: Final = 256 * 1024
"""Bytes that wait in the socket before it says that it takes no more."""
UNSENT_BYTES_MAX: Final = 32 * 1024 * 1024
"""A server that leaves so many unread is lost. One message is of 16 MiB at most."""
_UNIX: Final = "unix:"


def check_address(address: str) -> None:
    """Raises ValueError unless it is "host:port" or "unix:path"."""
    if not address.startswith(_UNIX):
        split_address(address)


def error_of(status: Status) -> grpc.aio.AioRpcError:
    """How a call ended, as grpc.aio would raise it."""
    return rpc_error(status.code, status.detail, status.trailers)


class CallerTransport(asyncio.Protocol, ABC):
    """One connection; its calls are those of the subclass. What is said in a turn of the loop
    leaves in one write."""

    def __init__(self, address: str, limits: CallerLimits, clock: Callable[[], float]) -> None:
        """`address` is "host:port" or "unix:path"; `clock` is monotonic, in seconds."""
        self._address = address
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._naps = naps()
        authority = "localhost" if address.startswith(_UNIX) else address
        self._caller = Caller(authority, limits, clock())
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_scheduled = False
        self._is_hearing = False
        """What came is being dealt with, and what is said to it is written when that is done."""
        self._is_paused = False
        """The socket takes nothing more for now."""
        self._is_blocked = False
        """A subclass has something to say that waits for windows: it `_flush`es when bytes came."""

    async def connect(self) -> None:
        """Open the socket. Raises OSError, which says what was expected."""
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                if self._address.startswith(_UNIX):
                    path = self._address.removeprefix(_UNIX)
                    await self._loop.create_unix_connection(lambda: self, path)
                else:
                    host, port = split_address(self._address)
                    await self._loop.create_connection(lambda: self, host, port)
        except BaseException as error:
            self._transport = None  # The loop has closed it; uvloop lets nobody touch it then.
            if isinstance(error, (OSError, ValueError)):  # A TimeoutError is an OSError.
                detail = f"expected to connect to {self._address}: {str(error) or 'timeout'}"
                raise ConnectionError(detail) from error
            raise

    def _call(self, path: str, fields: Fields = ()) -> int:
        """Begin a call, while the caller `takes_calls`."""
        call = self._caller.call(path, self._clock(), fields)
        if self._timer is None and self._transport is not None:
            self._keep_time()
        return call

    @abstractmethod
    def _tell(self, events: Sequence[Event]) -> None:
        """What came of bytes, or of time."""

    @abstractmethod
    def _tell_message(self, call: int, message: bytes) -> None:
        """One message, and nothing else, came of bytes."""

    # What the transport says.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH)
        self._flush()
        self._keep_time()

    @override
    def data_received(self, data: bytes) -> None:
        caller, now = self._caller, self._clock()
        self._is_hearing = True
        try:
            lone = caller.receive_lone(data, now)
            if lone is None:
                self._hear(caller.receive(data, now))
            else:
                self._tell_message(*lone)
        finally:
            self._is_hearing = False
        if self._is_scheduled or self._is_blocked or caller.outbound:
            self._flush()
        self._naps.end()

    @override
    def eof_received(self) -> None:
        self._lost("the server closed the connection")

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._lost(f"the connection was lost: {exc}")
        self._transport = None

    @override
    def pause_writing(self) -> None:
        self._is_paused = True

    @override
    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    # What is done with it.

    def wake(self) -> None:
        """Write before the next turn of the loop. Cheap, and harmless when repeated."""
        if not self._is_scheduled and self._transport is not None:
            self._is_scheduled = True
            if not self._is_hearing:
                self._loop.call_soon(self._flush)

    def hang_up(self) -> None:
        """Say what is to be said, and close; it is not waited for. Idempotent."""
        transport = self._transport
        if self._timer is not None:
            self._timer.cancel()
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size():
            transport.abort()  # It has not read for a while: it will not read this.
            return
        transport.write(self._caller.take_outbound())
        if transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()

    def _flush(self) -> None:
        """Write what there is to say, and see whether it is read."""
        self._is_scheduled = False
        self._write_out()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._lost(f"the server left {UNSENT_BYTES_MAX} bytes unread")

    def _write_out(self) -> None:
        """Write what there is to say, in one piece."""
        transport = self._transport
        if self._caller.outbound and transport is not None and not transport.is_closing():
            transport.write(self._caller.take_outbound())

    def _lost(self, detail: str) -> None:
        self._hear(self._caller.closed(detail))

    def _hear(self, events: Sequence[Event]) -> None:
        self._tell(events)
        if self._caller.is_over:
            self.hang_up()

    def _keep_time(self) -> None:
        """Look at the calls when they want it, or before."""
        due = self._caller.deadline()
        if due is None:
            self._timer = None
        else:
            self._timer = self._loop.call_later(max(TIMER_S_MIN, due - self._clock()), self._look)

    def _look(self) -> None:
        self._hear(self._caller.handle_timeout(self._clock()))
        self._flush()
        self._keep_time()
