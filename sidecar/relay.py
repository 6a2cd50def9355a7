"""RelayService over grpc.aio: one reader and one writer for each call, the hub between them.

Only the handler's own task writes to a call (several writers break a grpc.aio stream); the reader
is a task beside it. Whatever a frontend sends, only its own call can suffer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc.aio
from typing_extensions import override

from sidecar.hub import Hub
from sidecar.link import Link
from unbroken.discovery import INSTANCE_ID
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1 import worker_pb2
from unbroken.v1.relay_service_pb2_grpc import RelayServiceServicer

PROTOCOL_VERSION: Final = 1
HELLO_MAX_S: Final = 5.0
"""How long a call may be open without a hello."""

_Context = grpc.aio.ServicerContext[Any, Any]


class Relay(RelayServiceServicer):
    """The gRPC face of a `Hub`."""

    def __init__(
        self,
        hub: Hub,
        identity: worker_pb2.WorkerIdentity,
        *,
        heartbeat_interval_s: float,
        write_max_s: float,
        hello_max_s: float = HELLO_MAX_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A frontend that lets `write_max_s` pass without reading what waits for it is lost."""
        self._hub = hub
        self._identity = identity
        self._heartbeat_interval_s = heartbeat_interval_s
        self._write_max_s = write_max_s
        self._hello_max_s = hello_max_s
        self._clock = clock

    @override
    async def Relay(  # pyright: ignore[reportIncompatibleMethodOverride] - Writes by itself.
        self, request_iterator: AsyncIterator[pb.RelayRequest], context: _Context
    ) -> None:
        requests = aiter(request_iterator)
        link = Link(await self._hello(requests), self._clock())
        welcome = pb.RelayWelcome(
            protocol_version=PROTOCOL_VERSION,
            identity=self._identity,
            verdict=self._hub.join(link),
        )
        reader = asyncio.create_task(self._read(requests, link), name="relay reader")
        try:
            await self._write(pb.RelayResponse(welcome=welcome), context)
            while True:
                await link.wait()
                await self._write_waiting(link, context)
                if link.error is not None:
                    raise link.error
                if reader.done():
                    reader.result()
                    await self._write_waiting(link, context)  # Came while the rest was written.
                    return
        finally:
            self._hub.leave(link)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

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

    async def _write_waiting(self, link: Link, context: _Context) -> None:
        for response in link.take(self._heartbeat_interval_s, self._hub.load):
            await self._write(response, context)

    async def _write(self, response: pb.RelayResponse, context: _Context) -> None:
        try:
            async with asyncio.timeout(self._write_max_s):
                await context.write(response)
        except TimeoutError:
            raise UnbrokenError(
                Reason.OVERLOADED, f"nothing read for {self._write_max_s:g} s"
            ) from None

    async def _read(self, requests: AsyncIterator[pb.RelayRequest], link: Link) -> None:
        """Hand everything that the frontend says to the hub, until it says no more.

        Raises `UnbrokenError` for bytes that are no message.
        """
        hub = self._hub
        try:
            async for request in requests:
                if link.error is not None:
                    return
                link.heard_at = self._clock()
                match request.WhichOneof("request"):
                    case "start":
                        hub.start(link, request.start)
                    case "ack":
                        hub.ack(link, request.ack)
                    case "heartbeat":
                        link.heartbeat_seen = request.heartbeat.sequence
                        if request.heartbeat.HasField("queue"):
                            hub.learn_queue(link, request.heartbeat.queue)
                    case "abort":
                        hub.abort(link, request.abort.slot)
                    case "adopt":
                        hub.adopt(link, request.adopt)
                    case "commands":
                        for abort in request.commands.aborts:
                            hub.abort(link, abort.slot)
                        for start in request.commands.starts:
                            hub.start(link, start)
                        for adopt in request.commands.adopts:
                            hub.adopt(link, adopt)
                    case "release":
                        hub.release(link)
                    case "cancel":
                        hub.cancel(link, request.cancel)
                    case "thresholds":
                        hub.learn_thresholds(link, request.thresholds)
                    case "hello":
                        link.close(Reason.PROTOCOL_VIOLATION, "expected one hello, got a second")
                    case None:
                        pass  # From a later version of the contract.
        finally:
            link.wake()  # The writer looks whether the reader is done.

    async def _hello(self, requests: AsyncIterator[pb.RelayRequest]) -> pb.RelayHello:
        """The first message of a call, if it is what it must be. Raises `UnbrokenError`."""
        try:
            async with asyncio.timeout(self._hello_max_s):
                request = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            raise _violation(f"hello within {self._hello_max_s:g} s", "nothing") from None
        kind = request.WhichOneof("request")
        if kind != "hello":
            raise _violation("hello as the first message", kind)
        hello = request.hello
        if hello.protocol_version < PROTOCOL_VERSION:
            expected = f"protocol version {PROTOCOL_VERSION} or later"
            raise _violation(expected, hello.protocol_version)
        if not INSTANCE_ID.fullmatch(hello.frontend_id):
            expected = "a frontend_id of 1 to 128 of [A-Za-z0-9._-]"
            raise _violation(expected, repr(hello.frontend_id[:80]))
        if hello.expected_worker_incarnation not in (0, self._identity.incarnation):
            raise UnbrokenError(
                Reason.FENCED,
                f"expected worker incarnation {hello.expected_worker_incarnation}, this is "
                f"{self._identity.incarnation}",
            )
        return hello


def _violation(expected: str, seen: object) -> UnbrokenError:
    return UnbrokenError(Reason.PROTOCOL_VIOLATION, f"expected {expected}, got {seen}")
