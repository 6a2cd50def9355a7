"""A Relay call over our own HTTP/2: what a step brings is read, told and answered in one turn.

It is gRPC, so whatever serves RelayService can be at the other end; docs/decisions/relay-hop.md
says what it saves. Requests that are made in one turn of the loop leave in one write, or, if they
are many, in a few (docs/decisions/moves.md).
"""

from collections.abc import Callable, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from typing_extensions import override

from frontend.relay_wire import Talker, Wire
from unbroken.calls.transport import WRITE_BUFFER_HIGH, CallerTransport, error_of
from unbroken.http2.caller import CallerLimits, Ended, Event, MessageReceived, Status
from unbroken.http2.messages import Code
from unbroken.v1 import relay_service_pb2 as pb

PATH: Final = "/unbroken.v1.RelayService/Relay"
FIRST_HURRY: Final = 5
"""Requests that leave before the turn ends; then twice as many, and so on, so that writes are few
however many streams move at once."""


class NativeWire(CallerTransport, Wire):
    """One connection with one call."""

    def __init__(
        self,
        address: str,
        talker: Talker,
        *,
        limits: CallerLimits,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(address, limits, clock)
        self._talker = talker
        self._relay = self._call(PATH)
        self._next_hurry = FIRST_HURRY

    @override
    async def converse(self) -> None:
        try:
            await self.connect()
            await self._loop.create_future()
        except OSError as error:
            self._talker.closed(error_of(Status(Code.UNAVAILABLE, str(error))))
        finally:
            self._caller.cancel(self._relay)
            self.hang_up()

    @override
    def hurry(self, num_waiting: int) -> None:
        if num_waiting >= self._next_hurry:
            self._next_hurry *= 2
            self.hurry_all()

    @override
    def hurry_all(self) -> None:
        self._write_out()  # No more than that: who says so is in the middle of something.

    @override
    def _flush(self) -> None:
        self._next_hurry = FIRST_HURRY
        super()._flush()

    @override
    def _write_out(self) -> None:
        caller, talker = self._caller, self._talker
        if self._transport is None or self._transport.is_closing():
            return
        while (
            not self._is_paused
            and caller.has_room(self._relay)
            and len(caller.outbound) < WRITE_BUFFER_HIGH
            and (request := talker.next_request()) is not None
        ):
            caller.send(self._relay, request.SerializeToString())
            talker.written(request)
        self._is_blocked = not caller.has_room(self._relay)
        is_more_to_say = len(caller.outbound) >= WRITE_BUFFER_HIGH
        super()._write_out()
        if is_more_to_say and not self._is_paused:
            self.wake()

    @override
    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case MessageReceived(call=call, message=message):
                    self._tell_message(call, message, is_last=event is events[-1])
                case Ended(status=status):
                    self._talker.closed(error_of(status) if status.code else None)

    @override
    def _tell_message(self, call: int, message: bytes, *, is_last: bool = True) -> None:
        try:
            response = pb.RelayResponse.FromString(message)
        except DecodeError:
            response = None
        self._talker.receive(response, is_last=is_last)
