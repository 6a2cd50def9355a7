"""The connections of a client to its frontends: which are up, and which to call first."""

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
import grpc.aio

from unbroken.errors import Reason, UnbrokenError
from unbroken.resumption import Readiness
from unbroken.tls import ClientTls
from unbroken.transport import Keepalive, open_channel
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

CONNECT_TIMEOUT_S: Final = 2.0
"""How long the frontends may take to accept a connection."""

_PATIENCE_S: Final = 0.25
"""How long a frontend may keep one waiting that comes after it and is connected."""

_READINESS: Final = {
    grpc.ChannelConnectivity.READY: Readiness.CONNECTED,
    grpc.ChannelConnectivity.IDLE: Readiness.UNKNOWN,
    grpc.ChannelConnectivity.CONNECTING: Readiness.UNKNOWN,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE: Readiness.FAILING,
    grpc.ChannelConnectivity.SHUTDOWN: Readiness.FAILING,
}


class Frontends:
    """Some frontends, in order of preference. Connections are made when needed."""

    def __init__(
        self, addresses: Sequence[str], keepalive: Keepalive, tls: ClientTls | None = None
    ) -> None:
        """In the clear, unless `tls` says how. Raises ValueError if its files are wrong."""
        self.addresses = tuple(addresses)
        self._keepalive = keepalive
        self._tls = tls
        self._credentials = None if tls is None else tls.credentials()
        self._channels: list[grpc.aio.Channel | None] = [None] * len(addresses)
        self._stubs: list[InferenceServiceStub | None] = [None] * len(addresses)

    def __len__(self) -> int:
        return len(self.addresses)

    async def close(self) -> None:
        """Close all connections; calls that still run are cancelled."""
        channels = [channel for channel in self._channels if channel is not None]
        self._channels = [None] * len(self.addresses)
        self._stubs = [None] * len(self.addresses)
        await asyncio.gather(*(channel.close() for channel in channels))

    def channel(self, index: int) -> grpc.aio.Channel:
        """The channel to one of them."""
        channel = self._channels[index]
        if channel is None:
            channel = open_channel(
                self.addresses[index],
                keepalive=self._keepalive,
                credentials=self._credentials,
                server_name=None if self._tls is None else self._tls.server_name,
            )
            self._channels[index] = channel
        return channel

    def stub(self, index: int) -> InferenceServiceStub:
        """InferenceService of one of them."""
        stub = self._stubs[index]
        if stub is None:
            stub = InferenceServiceStub(self.channel(index))
            self._stubs[index] = stub
        return stub

    def readiness(self) -> Sequence[Readiness]:
        """What is known of each; lets those connect that are not, so that one can take over."""
        return [
            _READINESS[self.channel(index).get_state(try_to_connect=True)]
            for index in range(len(self.addresses))
        ]

    async def explained(self, error: UnbrokenError, index: int) -> UnbrokenError:
        """`error` of a call to one of them; if TLS is why it is UNREACHABLE, it says so."""
        if error.reason is not Reason.UNREACHABLE or self._tls is None:
            return error
        address = self.addresses[index]
        if not (why := await self._tls.explain(address)):
            return error
        return UnbrokenError(
            error.reason, f"no TLS with {address}: {why}", metadata={**error.metadata, "tls": why}
        )

    async def first(self) -> int:
        """The first that can be reached; raises `UNREACHABLE` if none can."""
        if len(self.addresses) == 1:
            return 0  # The call itself finds out.
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                while Readiness.CONNECTED not in (ready := self.readiness()):
                    if all(state is Readiness.FAILING for state in ready):
                        raise await self.explained(self._unreachable(), 0)
                    await self._connect_one()
        except TimeoutError:
            raise await self.explained(self._unreachable(), 0) from None
        return ready.index(Readiness.CONNECTED)

    async def _connect_one(self) -> None:
        """Wait until a frontend is connected; each has a while to be so before those after it."""
        for index in range(len(self.addresses)):
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    if await _is_connected(self.channel(index)):
                        return
            except TimeoutError:
                continue

    def _unreachable(self) -> UnbrokenError:
        return UnbrokenError(
            Reason.UNREACHABLE, f"expected a frontend at one of {', '.join(self.addresses)}"
        )


async def _is_connected(channel: grpc.aio.Channel) -> bool:
    """Whether the attempt to connect that is under way succeeds."""
    state = channel.get_state(try_to_connect=True)
    while _READINESS[state] is Readiness.UNKNOWN:
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return state is grpc.ChannelConnectivity.READY
