"""What carries a Relay call, over grpc.aio; `native_wire` does it over our own HTTP/2.

A wire brings bytes to a sidecar and back, and knows nothing of what they say. It asks its talker
what to write when there is room for it, so what waits can still change, and gathers.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

import grpc.aio
from typing_extensions import override

from unbroken.transport import open_channel
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1.relay_service_pb2_grpc import RelayServiceStub

_Call: TypeAlias = grpc.aio.StreamStreamCall[pb.RelayRequest, pb.RelayResponse]


class Talker(Protocol):
    """Whose conversation it is. Nothing of it raises."""

    def next_request(self) -> pb.RelayRequest | None:
        """What to write next, if anything. It may be changed when the next one is asked for."""
        ...

    def written(self, request: pb.RelayRequest) -> None:
        """It has left, or is about to."""
        ...

    def receive(self, response: pb.RelayResponse | None, *, is_last: bool = False) -> None:
        """A message came, or bytes that are none; if it `is_last`, nothing else came after it."""
        ...

    def closed(self, error: grpc.aio.AioRpcError | None) -> None:
        """The sidecar ended the call, well or with that; or it cannot be reached."""
        ...


class Wire(Protocol):
    """One call."""

    async def converse(self) -> None:
        """Connect, write and read until the talker is told that it is over, or for ever."""
        ...

    def wake(self) -> None:
        """There is something to write. Cheap, and harmless when repeated."""
        ...

    def hurry(self, num_waiting: int) -> None:
        """So many requests wait: perhaps others could begin with some before the turn ends.

        Nobody is told of anything before the call returns. After `wake`.
        """
        ...

    def hurry_all(self) -> None:
        """As `hurry`, whatever waits: no more is about to come."""
        ...


Connect: TypeAlias = Callable[[Talker], Wire]


class GrpcioWire(Wire):
    """A bidirectional stream of grpc.aio: one task reads, one writes."""

    def __init__(self, address: str, talker: Talker) -> None:
        self._address = address
        self._talker = talker
        self._has_work = asyncio.Event()

    @override
    def wake(self) -> None:
        self._has_work.set()

    @override
    def hurry(self, num_waiting: int) -> None:
        """Nothing more: its task writes when this turn is over."""

    @override
    def hurry_all(self) -> None:
        """Nothing more, as above."""

    @override
    async def converse(self) -> None:
        async with open_channel(self._address) as channel:
            call: _Call = RelayServiceStub(channel).Relay()
            writing = asyncio.create_task(self._write(call))
            try:
                await self._read(call)
            finally:
                call.cancel()
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _read(self, call: _Call) -> None:
        talker = self._talker
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                talker.receive(cast("pb.RelayResponse | None", response))
            talker.closed(None)
        except grpc.aio.AioRpcError as error:
            talker.closed(error)

    async def _write(self, call: _Call) -> None:
        talker = self._talker
        self._has_work.set()
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                while (request := talker.next_request()) is not None:
                    await call.write(request)
                    talker.written(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The call is over; whoever reads it learns why.
