"""What every call needs that is answered: its deadline, its message, how it is refused and ends."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from unbroken import status
from unbroken.errors import UnbrokenError
from unbroken.http2.headers import Fields, Request
from unbroken.http2.messages import (
    Code,
    MessageReader,
    Refused,
    passing_fields_of,
    timeout_s,
    trailers,
)

if TYPE_CHECKING:
    from unbroken.edge.server import ClientConnection, EdgeServer

ANSWER_FIELDS: Final[Fields] = ((b":status", b"200"), (b"content-type", b"application/grpc"))


def refuse(client: "ClientConnection", stream_id: int, refused: Refused) -> None:
    """Answer that the protocol does not allow the request, before anything else was answered."""
    fields = trailers(refused.code, refused.detail, refused.fields)
    client.connection.send_headers(stream_id, [*ANSWER_FIELDS, *fields], ends=True)


def closing_fields(server: "EdgeServer", error: UnbrokenError | None) -> Fields:
    """How a call ends that went well, or failed of `error`."""
    if error is None:
        fields = trailers(Code.OK, "")
    else:
        code, detail, more = status.trailing(error)
        fields = trailers(code, detail, passing_fields_of(more))
    return [*fields, *passing_fields_of(server.trailers())]


class Deadline:
    """Until when the client of a call waits."""

    __slots__ = ("_at", "_clock")

    def __init__(self, request: Request, clock: Callable[[], float]) -> None:
        """Raises `Refused`."""
        wait_s = timeout_s(request)
        self._clock = clock
        self._at = None if wait_s is None else clock() + wait_s

    def remaining_s(self) -> float | None:
        """0 if it has passed; None if he did not say."""
        return None if self._at is None else max(0.0, self._at - self._clock())


def messages_of(body: MessageReader, data: bytes, server: "EdgeServer") -> Sequence[bytes]:
    """Those that this piece makes whole. What is too large is counted. Raises `Refused`."""
    try:
        return body.feed(data)
    except Refused as refused:
        if refused.code is Code.RESOURCE_EXHAUSTED:
            server.observer.edge_limit_hit("request_bytes")
        raise


class OneMessage:
    """The only message of a request, of which the server holds no more than it may."""

    __slots__ = ("_body", "_client", "_message", "_num_held", "_server", "_stream_id")

    def __init__(
        self, server: "EdgeServer", client: "ClientConnection", stream_id: int, request: Request
    ) -> None:
        """The client has to bring it to an end in time."""
        client.connection.expect_end(stream_id, server.clock())
        self._server = server
        self._client = client
        self._stream_id = stream_id
        self._body = MessageReader(request.get(b"grpc-encoding"), server.limits.request_bytes_max)
        self._message: bytes | None = None
        self._num_held = 0

    def feed(self, data: bytes, *, ends: bool) -> bytes | None:
        """The message, once it has come and nothing more can. Raises `Refused`."""
        for message in messages_of(self._body, data, self._server):
            if self._message is not None:
                raise Refused(Code.INTERNAL, "expected one message, got another")
            self._message = message
        num_held = self._body.num_held + len(self._message or b"")
        if not self._server.hold(num_held - self._num_held):
            raise Refused(Code.RESOURCE_EXHAUSTED, "too many requests are coming in at once")
        self._num_held = num_held
        self._client.connection.consumed(self._stream_id, len(data))
        if not ends:
            return None
        self._body.finish()
        if self._message is None:
            raise Refused(Code.INTERNAL, "expected one message, got none")
        self.let_go()
        message, self._message = self._message, None
        return message

    def let_go(self) -> None:
        """It is no longer held here. Idempotent."""
        self._server.hold(-self._num_held)
        self._num_held = 0
