"""RelayService: what a frontend says goes to the hub, what its link gathers goes to it.

Relay is answered over the HTTP/2 of `unbroken/edge/`: a message leaves after every step of the
engine, and what that costs is most of what a token costs here. Whatever a frontend sends, only its
own call can suffer.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, NoReturn

import grpc.aio
from google.protobuf.message import DecodeError
from typing_extensions import override

from sidecar.hub import Hub
from sidecar.link import Link
from unbroken import status
from unbroken.discovery import INSTANCE_ID
from unbroken.edge.answering import ANSWER_FIELDS, Deadline, closing_fields, refuse
from unbroken.edge.server import WRITE_BUFFER_HIGH, Answer, ClientConnection, EdgeServer
from unbroken.errors import Reason, UnbrokenError
from unbroken.http2.headers import Request
from unbroken.http2.messages import PREFIX, Code, MessageReader, Refused, trailers
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1 import worker_pb2
from unbroken.v1.relay_service_pb2_grpc import RelayServiceServicer

PROTOCOL_VERSION: Final = 1
RELAY_SERVICE: Final = "unbroken.v1.RelayService"
PATH: Final = f"/{RELAY_SERVICE}/Relay"
HELLO_MAX_S: Final = 5.0
"""How long a call may be open without a hello."""

_Context = grpc.aio.ServicerContext[Any, Any]


class Relay(RelayServiceServicer):
    """The gRPC face of a `Hub`: an answer for calls of Relay, and a servicer for the rest."""

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
        self.hub = hub
        self.identity = identity
        self.heartbeat_interval_s = heartbeat_interval_s
        self.write_max_s = write_max_s
        self.hello_max_s = hello_max_s
        self.clock = clock

    @property
    def answers(self) -> Mapping[bytes, Answer]:
        """What answers Relay, by its path."""
        return {PATH.encode(): self._answer}

    def _answer(
        self, server: EdgeServer, client: ClientConnection, stream_id: int, request: Request
    ) -> "RelayCall":
        return RelayCall(self, server, client, stream_id, request)

    @override
    def Relay(
        self, request_iterator: AsyncIterator[pb.RelayRequest], context: _Context
    ) -> NoReturn:
        raise AssertionError("calls of Relay are answered before this server: see `answers`")

    @override
    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: _Context
    ) -> pb.GetTokenizerResponse:
        up = self.hub.up
        if up is None:
            raise UnbrokenError(Reason.NO_WORKER, "the engine starts", retry_after_s=1.0)
        return pb.GetTokenizerResponse(
            tokenizer=up.tokenizer, fingerprint=up.description.tokenizer_fingerprint
        )


class RelayCall:
    """One call, from its first byte to its end."""

    def __init__(
        self,
        relay: Relay,
        server: EdgeServer,
        client: ClientConnection,
        stream_id: int,
        request: Request,
    ) -> None:
        """Raises `Refused`."""
        self.client = client
        self.stream_id = stream_id
        self._relay = relay
        self._server = server
        self._body = MessageReader(request.get(b"grpc-encoding"), server.limits.request_bytes_max)
        self._link: Link | None = None
        """Once the hello has come."""
        self._unsent: deque[pb.RelayResponse] = deque()
        """Taken from the link, for the windows of the frontend to open."""
        self._stuck_since: float | None = None
        """Since when there has been no room; None: there was when it was last looked for."""
        self._has_said_all = False
        self._is_over = False
        loop = asyncio.get_running_loop()
        wait_s = Deadline(request, server.clock).remaining_s()
        self._hello_due = loop.call_later(relay.hello_max_s, self._no_hello)
        self._due = None if wait_s is None else loop.call_later(wait_s, self._too_late)

    # What the frontend says.

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of what it says. Raises `Refused`."""
        messages = self._body.feed(data)
        self.client.connection.consumed(self.stream_id, len(data))
        for message in messages:
            if self._is_over:
                return
            try:
                self._hear(pb.RelayRequest.FromString(message))
            except DecodeError as error:
                self._end(status.undecodable(message, error))
            except Exception as error:
                self._end(status.translated(error, PATH))
        if ends and not self._is_over:
            self._body.finish()
            self._has_said_all = True
            if self._link is None:
                self._no_hello()
            else:
                self._wake()  # What waits is written before the end.

    def _hear(self, request: pb.RelayRequest) -> None:
        """Raises `UnbrokenError`."""
        link, now = self._link, self._relay.clock()
        if link is None:
            self._welcome(self._hello(request), now)
        elif link.error is None:
            link.heard_at = now
            _obey(self._relay.hub, link, request)

    def _hello(self, request: pb.RelayRequest) -> pb.RelayHello:
        """The first message, if it is what it must be. Raises `UnbrokenError`."""
        kind = request.WhichOneof("request")
        if kind != "hello":
            raise _violation("hello as the first message", kind)
        hello, identity = request.hello, self._relay.identity
        if hello.protocol_version < PROTOCOL_VERSION:
            expected = f"protocol version {PROTOCOL_VERSION} or later"
            raise _violation(expected, hello.protocol_version)
        if not INSTANCE_ID.fullmatch(hello.frontend_id):
            expected = "a frontend_id of 1 to 128 of [A-Za-z0-9._-]"
            raise _violation(expected, repr(hello.frontend_id[:80]))
        if hello.expected_worker_incarnation not in (0, identity.incarnation):
            raise UnbrokenError(
                Reason.FENCED,
                f"expected worker incarnation {hello.expected_worker_incarnation}, this is "
                f"{identity.incarnation}",
            )
        return hello

    def _welcome(self, hello: pb.RelayHello, now: float) -> None:
        """Raises `UnbrokenError`."""
        relay, connection = self._relay, self.client.connection
        link = Link(hello, now, on_news=self._wake)
        verdict = relay.hub.join(link)
        self._link = link
        self._hello_due.cancel()
        connection.send_headers(self.stream_id, ANSWER_FIELDS)
        welcome = pb.RelayWelcome(
            protocol_version=PROTOCOL_VERSION, identity=relay.identity, verdict=verdict
        )
        self._unsent.append(pb.RelayResponse(welcome=welcome))
        self._wake()

    def _no_hello(self) -> None:
        self._end(_violation(f"hello within {self._relay.hello_max_s:g} s", "nothing"))

    # What it is told.

    def _wake(self) -> None:
        """There is news: have `pump` called."""
        self._server.wake(self)

    def writable(self) -> None:
        """There is room for more."""
        self._wake()

    def pump(self, now: float) -> None:
        """Send what waits, as far as it can leave."""
        link, client = self._link, self.client
        if link is None or self._is_over:
            return
        connection, stream_id, unsent = client.connection, self.stream_id, self._unsent
        while connection.has_room(stream_id) and not client.is_paused:
            self._stuck_since = None
            if len(connection.outbound) >= WRITE_BUFFER_HIGH:
                self._wake()  # When that has been written.
                return
            if not unsent:
                if link.has_news:
                    unsent += link.take(self._relay.heartbeat_interval_s, self._relay.hub.load)
                if not unsent:
                    link.written()
                    break
            message = unsent.popleft().SerializeToString()
            connection.send_data(stream_id, PREFIX.pack(0, len(message)) + message, now)
        if link.error is not None:
            self._end(link.error)
        elif not link.is_idle:
            self._wait_for_room(now)
        elif self._has_said_all:
            self._end(None)

    def _wait_for_room(self, now: float) -> None:
        """A heartbeat that is due asks for room again, so a frontend that reads nothing is seen."""
        self._stuck_since = now if self._stuck_since is None else self._stuck_since
        write_max_s = self._relay.write_max_s
        if now - self._stuck_since > write_max_s:
            self._end(UnbrokenError(Reason.OVERLOADED, f"nothing read for {write_max_s:g} s"))
        elif self.client.is_paused:
            self.client.waiting[self] = None
        else:
            self.client.connection.want_room(self.stream_id, now)

    # The end.

    def refuse(self, refused: Refused) -> None:
        """The protocol does not allow what it says."""
        if self._link is None:
            refuse(self.client, self.stream_id, refused)
        else:
            fields = trailers(refused.code, refused.detail, refused.fields)
            self.client.connection.end(self.stream_id, fields)
        self.lost()
        self._server.touch(self.client)

    def _too_late(self) -> None:
        self.refuse(Refused(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _end(self, error: UnbrokenError | None) -> None:
        """The last word, after what was begun."""
        connection, stream_id = self.client.connection, self.stream_id
        try:
            fields = closing_fields(self._server, error)
            if self._link is None:
                connection.send_headers(stream_id, [*ANSWER_FIELDS, *fields], ends=True)
            else:
                connection.end(stream_id, fields)
        finally:
            self.lost()
        self._server.touch(self.client)

    def lost(self) -> None:
        """The stream is gone. Idempotent."""
        self._is_over = True
        self._hello_due.cancel()
        if self._due is not None:
            self._due.cancel()
        self.client.calls.pop(self.stream_id, None)
        self.client.waiting.pop(self, None)
        if self._link is not None:
            self._relay.hub.leave(self._link)

    def crashed(self, error: Exception) -> None:
        """A bug of this call was met."""
        self._end(status.translated(error, PATH))


def _obey(hub: Hub, link: Link, request: pb.RelayRequest) -> None:
    """Hand what a frontend says to the hub."""
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


def _violation(expected: str, seen: object) -> UnbrokenError:
    return UnbrokenError(Reason.PROTOCOL_VIOLATION, f"expected {expected}, got {seen}")
