"""Generate and Resume on one stream: a request in, and then what is new after each engine step.

A call that has news is pumped once, however many tokens came. It takes what is new from the
ledger only when all that it took before has left: what a slow client has not been sent stays there,
becomes one larger message, and is bounded by the window of the worker.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.message import DecodeError

from frontend import summaries
from frontend.convoy import Ride
from frontend.edge import encoding
from frontend.reading import Output, Reading
from unbroken import log, status
from unbroken.errors import UnbrokenError
from unbroken.http2.connection import HttpStream
from unbroken.http2.frames import ErrorCode
from unbroken.http2.headers import Fields, Request
from unbroken.http2.messages import (
    Code,
    MessageReader,
    Refused,
    fields_of,
    passing_fields_of,
    timeout_s,
    trailers,
)
from unbroken.v1 import inference_service_pb2 as pb

if TYPE_CHECKING:
    from frontend.edge.server import ClientConnection, EdgeServer

ANSWER_FIELDS: Final[Fields] = ((b":status", b"200"), (b"content-type", b"application/grpc"))

Open: TypeAlias = Callable[[bytes, float | None, Callable[[], None]], Awaitable[Reading]]
"""Leads from a request, the time its client waits, and whom to tell of news to a reader."""

_log = log.get_logger(__name__)


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
        for message in self._body.feed(data):
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


class StreamingCall:
    """One call of Generate or, if its answers are wrapped, of Resume."""

    __slots__ = (
        "_answers_resume",
        "_bodies",
        "_body",
        "_deadline",
        "_http_stream",
        "_is_leaving",
        "_open",
        "_path",
        "_reader",
        "_ride",
        "_server",
        "_task",
        "client",
        "stream_id",
    )

    def __init__(
        self,
        server: "EdgeServer",
        client: "ClientConnection",
        stream_id: int,
        request: Request,
        open_reader: Open,
        *,
        answers_resume: bool,
    ) -> None:
        """Raises `Refused`."""
        self.client = client
        self.stream_id = stream_id
        self._server = server
        self._open = open_reader
        self._answers_resume = answers_resume
        self._path = request.path.decode()
        self._deadline = Deadline(request, server.clock)
        self._body = OneMessage(server, client, stream_id, request)
        self._task: asyncio.Task[None] | None = None
        self._reader: Reading | None = None
        self._bodies: encoding.TokenBodies | None = None
        self._http_stream: HttpStream | None = None
        self._ride: Ride | None = None
        """By which tokens are sent that need no turn of `pump`."""
        self._is_leaving = False
        """What was polled last waits for the client's window."""

    # The request.

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request. Raises `Refused`."""
        if self._task is not None:
            return  # Only an empty end can come after the end, and the connection sees to that.
        message = self._body.feed(data, ends=ends)
        if message is not None:
            self._task = asyncio.create_task(self._begin(message))

    async def _begin(self, message: bytes) -> None:
        connection, stream_id = self.client.connection, self.stream_id
        try:
            reader = await self._open(message, self._deadline.remaining_s(), self._wake)
        except DecodeError as error:
            self._end(status.undecodable(message, error))
        except Exception as error:
            self._end(status.translated(error, self._path))
        else:
            self._reader = reader
            self._http_stream = connection.stream(stream_id)
            if reader.tokenizer is not None:
                self._bodies = self._server.bodies(
                    reader.tokenizer, answers_resume=self._answers_resume
                )
            fields = [*ANSWER_FIELDS, *fields_of(tuple(reader.initial_metadata))]
            connection.send_headers(stream_id, fields)
            self._wake()
        self._server.touch(self.client)

    # The answer.

    def _wake(self) -> None:
        """There is news: have `pump` called. It is for every token, so the server is not called."""
        server = self._server
        server.awake[self] = None
        if not server.is_scheduled:
            server.schedule()

    def writable(self) -> None:
        """What was sent has left, and there is room for more."""
        if self._is_leaving and self._reader is not None:
            self._is_leaving = False
            self._reader.sent()
        self._wake()

    def pump(self, now: float) -> None:
        """Send what is new, as far as it can leave."""
        reader = self._reader
        if reader is None or self._is_leaving:
            return
        if self._ride is not None:
            self._ride.step_out()
        client, stream, bodies = self.client, self._http_stream, self._bodies
        connection = client.connection
        if (
            bodies is not None
            and stream is not None
            and not client.is_paused
            and (one := reader.poll_one(now)) is not None
        ):
            if not connection.send_on(stream, bodies.body(*one), now):
                self._is_leaving = True
            elif self._ride is None and reader.only is not None:
                # What comes next will be like this, and need not ask for a turn.
                self._ride = Ride(reader.only, client, stream, bodies, self._is_plain)
            return
        stream_id = self.stream_id
        is_held_up = client.is_paused or not connection.has_room(stream_id)
        # An end is sent at once: it frees all but what the client has not read.
        if is_held_up and not reader.is_done and reader.is_current:
            if client.is_paused:
                client.waiting[self] = None
            else:
                connection.want_room(stream_id, now)
            return
        outputs = reader.poll()
        if outputs:
            if connection.send_data(stream_id, self._encoded(outputs), now) or reader.is_over:
                reader.sent()
            else:
                self._is_leaving = True
        if reader.is_over:
            self._end(reader.error)

    def _is_plain(self, now: float) -> bool:
        """Whether nothing but tokens for `poll_one` is to be sent."""
        reader = self._reader
        return reader is not None and not self._is_leaving and reader.is_plain(now)

    def _encoded(self, outputs: Sequence[Output | pb.GenerateResponse]) -> bytes:
        """Messages as they lie in the body."""
        body: list[bytes] = []
        for output in outputs:
            if isinstance(output, pb.GenerateResponse):
                messages = [output]
            else:
                index, piece, resume_token = output
                messages = summaries.messages(index, piece, resume_token=resume_token)
            body += [
                encoding.body(message.SerializeToString(), answers_resume=self._answers_resume)
                for message in messages
            ]
        return b"".join(body)

    # The end.

    def refuse(self, refused: Refused) -> None:
        """The protocol does not allow the request."""
        self._body.let_go()
        fields = [*ANSWER_FIELDS, *trailers(refused.code, refused.detail, refused.fields)]
        self.client.connection.send_headers(self.stream_id, fields, ends=True)
        self._forget()

    def _end(self, error: UnbrokenError | None) -> None:
        """The last word."""
        connection, stream_id = self.client.connection, self.stream_id
        if error is None:
            fields = trailers(Code.OK, "")
        else:
            code, detail, more = status.trailing(error)
            fields = trailers(code, detail, passing_fields_of(more))
        fields += passing_fields_of(self._server.trailers())
        if self._reader is None:
            connection.send_headers(stream_id, [*ANSWER_FIELDS, *fields], ends=True)
        else:
            connection.end(stream_id, fields)
        self._forget()

    def lost(self) -> None:
        """The stream is gone: nobody reads any more."""
        if self._task is not None:
            self._task.cancel()
        self._body.let_go()
        self._forget()

    def crashed(self, error: Exception) -> None:
        """A bug of this call was met. Raises nothing."""
        try:
            self._end(status.translated(error, self._path))
        except Exception:
            _log.exception("bug in a call that had one")
            self.client.connection.reset(self.stream_id, ErrorCode.INTERNAL_ERROR)

    def _forget(self) -> None:
        self.client.calls.pop(self.stream_id, None)
        self.client.waiting.pop(self, None)
        ride, self._ride = self._ride, None
        if ride is not None:
            ride.close()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
