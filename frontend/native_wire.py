"""A Relay call over our own HTTP/2: what a step brings is read, told and answered in one turn.

It is gRPC, so whatever serves RelayService can be at the other end; docs/decisions/relay-hop.md
says what it saves. Requests that are made in one turn of the loop leave in one write, or, if they
are many, in a few (docs/decisions/moves.md).
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, cast

import grpc.aio
from google.protobuf.message import DecodeError
from typing_extensions import override

from frontend.relay_wire import Talker, Wire
from unbroken.config import split_address
from unbroken.http2.call import Call, CallLimits, Ended, Event, MessageReceived
from unbroken.http2.messages import Code
from unbroken.status import rpc_error
from unbroken.v1 import relay_service_pb2 as pb

PATH: Final = "/unbroken.v1.RelayService/Relay"
CONNECT_S_MAX: Final = 1.0
"""As for the channels of grpcio (`unbroken.transport`)."""
FIRST_HURRY: Final = 5
"""Requests that leave before the turn ends; then twice as many, and so on, so that writes are few
however many streams move at once."""
WRITE_BUFFER_HIGH: Final = 256 * 1024
"""Bytes that wait in the socket before the talker is asked for nothing more."""
UNSENT_BYTES_MAX: Final = 32 * 1024 * 1024
"""A sidecar that leaves so many unread is lost. One message is of 16 MiB at most."""


class NativeWire(asyncio.Protocol, Wire):
    """One connection with one call."""

    def __init__(
        self,
        address: str,
        talker: Talker,
        *,
        limits: CallLimits,
        clock: Callable[[], float],
    ) -> None:
        self._address = address
        self._talker = talker
        self._limits = limits
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._call: Call | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_scheduled = False
        self._is_paused = False
        """The socket takes nothing more for now."""
        self._next_hurry = FIRST_HURRY

    @override
    async def converse(self) -> None:
        try:
            host, port = split_address(self._address)
            async with asyncio.timeout(CONNECT_S_MAX):
                await self._loop.create_connection(lambda: self, host, port)
            await self._loop.create_future()
        except (OSError, ValueError) as error:  # A TimeoutError is an OSError.
            detail = f"expected to connect to {self._address}: {str(error) or 'timeout'}"
            self._talker.closed(_error_of(Ended(Code.UNAVAILABLE, detail)))
        finally:
            self._hang_up()

    @override
    def wake(self) -> None:
        if not self._is_scheduled and self._transport is not None:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    @override
    def hurry(self, num_waiting: int) -> None:
        if num_waiting >= self._next_hurry:
            self._next_hurry *= 2
            self._write_out()  # No more than that: who says so is in the middle of something.

    # What the transport says.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH)
        self._call = Call(PATH, self._address, self._limits, self._clock())
        self._flush()
        self._keep_time()

    @override
    def data_received(self, data: bytes) -> None:
        call = self._call
        assert call is not None, "connected before"
        had_room = call.has_room
        self._tell(call.receive(data, self._clock()))
        if call.outbound or not had_room:
            self._flush()

    @override
    def eof_received(self) -> None:
        self._lost("the sidecar closed the connection")

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

    def _flush(self) -> None:
        """Write what there is to say, and see whether it is read."""
        self._is_scheduled = False
        self._next_hurry = FIRST_HURRY
        self._write_out()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._lost(f"the sidecar left {UNSENT_BYTES_MAX} bytes unread")

    def _write_out(self) -> None:
        """Write what there is to say, in one piece."""
        transport, call, talker = self._transport, self._call, self._talker
        if transport is None or call is None or transport.is_closing():
            return
        while (
            not self._is_paused
            and call.has_room
            and len(call.outbound) < WRITE_BUFFER_HIGH
            and (request := talker.next_request()) is not None
        ):
            call.send(request.SerializeToString())
            talker.written(request)
        if call.outbound:
            is_more_to_say = len(call.outbound) >= WRITE_BUFFER_HIGH
            transport.write(call.take_outbound())
            if is_more_to_say and not self._is_paused:
                self.wake()

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case MessageReceived(message=message):
                    try:
                        response = pb.RelayResponse.FromString(message)
                    except DecodeError:
                        response = None
                    self._talker.receive(response)
                case Ended():
                    self._talker.closed(_error_of(event) if event.code else None)

    def _lost(self, detail: str) -> None:
        if self._call is not None:
            self._tell(self._call.closed(detail))

    def _keep_time(self) -> None:
        """Look at the call when it wants it, or before."""
        due = None if self._call is None else self._call.deadline()
        if due is not None:
            self._timer = self._loop.call_later(max(0.0, due - self._clock()), self._look)

    def _look(self) -> None:
        if self._call is not None:
            self._tell(self._call.handle_timeout(self._clock()))
            self._flush()
            self._keep_time()

    def _hang_up(self) -> None:
        """Let the sidecar know that nobody reads any more; it is not waited for."""
        transport, call = self._transport, self._call
        if self._timer is not None:
            self._timer.cancel()
        if transport is None or call is None:
            return
        call.cancel()
        if transport.get_write_buffer_size():
            transport.abort()  # It has not read for a while: it will not read this.
            return
        transport.write(call.take_outbound())
        if transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()


def _error_of(ended: Ended) -> grpc.aio.AioRpcError:
    return rpc_error(ended.code, ended.detail, ended.trailers)
