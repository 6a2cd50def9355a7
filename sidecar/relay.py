"""RelayService over grpc.aio: one reader and one writer for each call, the hub between them.

Only the handler's own task writes to a call (several writers break a grpc.aio stream); the reader
is a task beside it. Whatever a frontend sends, only its own call can suffer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from typing_extensions import override

from sidecar.hub import Hub
from sidecar.link import Link
from unbroken.discovery import INSTANCE_ID
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1 import worker_pb2
from unbroken.v1.relay_service_pb2_grpc import RelayServiceServicer

PROTOCOL_VERSION = 1
HELLO_TIMEOUT_S = 5.0

_Context = grpc.aio.ServicerContext[Any, Any]


class Relay(RelayServiceServicer):
    """The gRPC face of a `Hub`."""

    def __init__(
        self,
        hub: Hub,
        identity: worker_pb2.WorkerIdentity,
        *,
        heartbeat_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._identity = identity
        self._heartbeat_interval_s = heartbeat_interval_s
        self._clock = clock

    @override
    async def Relay(
        self, request_iterator: AsyncIterator[pb.RelayRequest], context: _Context
    ) -> None:
        requests = aiter(request_iterator)
        link = Link(await _hello(requests, self._identity), self._clock())
        verdict = self._hub.join(link)
        reader = asyncio.create_task(self._read(requests, link), name="relay reader")
        try:
            await context.write(
                pb.RelayResponse(
                    welcome=pb.RelayWelcome(
                        protocol_version=PROTOCOL_VERSION, identity=self._identity, verdict=verdict
                    )
                )
            )
            while True:
                await link.wait()
                for response in link.take(self._heartbeat_interval_s, self._hub.load):
                    await context.write(response)
                link.written_at = self._clock()
                if link.error is not None:
                    raise link.error
                if reader.done():
                    return
        finally:
            reader.cancel()
            self._hub.leave(link)

    @override
    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: _Context
    ) -> pb.GetTokenizerResponse:
        up = self._hub.up
        if up is None:
            raise UnbrokenError(Reason.NO_WORKER, "the engine starts", retry_after_s=1.0)
        return pb.GetTokenizerResponse(
            tokenizer=up.tokenizer, fingerprint=up.description.tokenizer_fingerprint
        )

    async def _read(self, requests: AsyncIterator[pb.RelayRequest], link: Link) -> None:
        """Hand everything that the frontend says to the hub, until it says no more."""
        hub = self._hub
        try:
            async for request in requests:
                link.heard_at = self._clock()
                match request.WhichOneof("request"):
                    case "start":
                        hub.start(link, request.start)
                    case "ack":
                        hub.ack(link, request.ack)
                    case "heartbeat":
                        link.heartbeat_seen = request.heartbeat.sequence
                    case "abort":
                        hub.abort(link, request.abort.slot)
                    case "adopt":
                        hub.adopt(link, request.adopt)
                    case "hello":
                        link.close(Reason.PROTOCOL_VIOLATION, "expected one hello, got a second")
                    case None:
                        pass  # From a later version of the contract.
                if link.error is not None:
                    return
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # The call is gone; gRPC cancels its handler.
        finally:
            link.flush()  # The writer looks whether the reader is done.


async def _hello(
    requests: AsyncIterator[pb.RelayRequest], identity: worker_pb2.WorkerIdentity
) -> pb.RelayHello:
    """The first message of a call, if it is what it must be."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            request = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise UnbrokenError(
            Reason.PROTOCOL_VIOLATION, f"expected hello within {HELLO_TIMEOUT_S:g} s, got nothing"
        ) from None
    if request.WhichOneof("request") != "hello":
        raise UnbrokenError(
            Reason.PROTOCOL_VIOLATION,
            f"expected hello as the first message, got {request.WhichOneof('request')}",
        )
    hello = request.hello
    if hello.protocol_version < PROTOCOL_VERSION:
        raise UnbrokenError(
            Reason.PROTOCOL_VIOLATION,
            f"expected protocol version {PROTOCOL_VERSION} or later, got {hello.protocol_version}",
        )
    if not INSTANCE_ID.fullmatch(hello.frontend_id):
        raise UnbrokenError(
            Reason.PROTOCOL_VIOLATION,
            f"frontend_id: expected 1 to 128 of [A-Za-z0-9._-], got {hello.frontend_id[:80]!r}",
        )
    if hello.expected_worker_incarnation not in (0, identity.incarnation):
        raise UnbrokenError(
            Reason.FENCED,
            f"expected worker incarnation {hello.expected_worker_incarnation}, this is "
            f"{identity.incarnation}",
        )
    return hello
