"""Generate and Resume on one stream: a request in, and then what is new after each engine step.

A call that has news is pumped once, however many tokens came. It takes what is new from the
ledger only when all that it took before has left: what a slow client has not been sent stays there,
becomes one larger message, and is bounded by the window of the worker.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError

from frontend import summaries
from frontend.convoy import Ride
from frontend.edge import encoding
from frontend.edge.encoding import TokenBodies, TokenFields
from frontend.gateway import Inference
from frontend.reading import Output, Reading
from unbroken import log, status
from unbroken.edge.answering import ANSWER_FIELDS, Deadline, OneMessage, closing_fields, refuse
from unbroken.edge.server import Answer, ClientConnection, EdgeServer
from unbroken.errors import UnbrokenError
from unbroken.http2.connection import HttpStream
from unbroken.http2.headers import Request
from unbroken.http2.messages import Refused, fields_of
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import inference_service_pb2 as pb

GENERATE: Final = b"/unbroken.v1.InferenceService/Generate"
RESUME: Final = b"/unbroken.v1.InferenceService/Resume"

Open: TypeAlias = Callable[[bytes, float | None, Callable[[], None]], Awaitable[Reading]]
"""Leads from a request, the time its client waits, and whom to tell of news to a reader."""

_log = log.get_logger(__name__)


class InferenceCalls:
    """Generate and Resume, with a gateway behind them."""

    def __init__(self, gateway: Inference) -> None:
        self._gateway = gateway
        self._bodies: WeakKeyDictionary[Tokenizer, Mapping[bool, TokenBodies]] = WeakKeyDictionary()

    @property
    def answers(self) -> Mapping[bytes, Answer]:
        """What answers each, by its path."""
        return {
            GENERATE: self._answering(self._generate, answers_resume=False),
            RESUME: self._answering(self._resume, answers_resume=True),
        }

    def _answering(self, open_reader: Open, *, answers_resume: bool) -> Answer:
        def answer(
            server: EdgeServer, client: ClientConnection, stream_id: int, request: Request
        ) -> StreamingCall:
            return StreamingCall(
                server,
                client,
                stream_id,
                request,
                open_reader,
                self._bodies_of,
                answers_resume=answers_resume,
            )

        return answer

    def _generate(
        self, message: bytes, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Awaitable[Reading]:
        request = pb.GenerateRequest.FromString(message)
        return self._gateway.generate(request, remaining_s, on_news)

    def _resume(
        self, message: bytes, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Awaitable[Reading]:
        request = pb.ResumeRequest.FromString(message)
        return self._gateway.resume(request, remaining_s, on_news)

    def _bodies_of(self, tokenizer: Tokenizer, answers_resume: bool) -> TokenBodies:
        """What all calls share that read tokens of this vocabulary."""
        made = self._bodies.get(tokenizer)
        if made is None:
            fields = TokenFields(tokenizer.texts)
            made = {kind: TokenBodies(fields, answers_resume=kind) for kind in (False, True)}
            self._bodies[tokenizer] = made
        return made[answers_resume]


class StreamingCall:
    """One call of Generate or, if its answers are wrapped, of Resume."""

    __slots__ = (
        "_answers_resume",
        "_bodies",
        "_bodies_of",
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
        server: EdgeServer,
        client: ClientConnection,
        stream_id: int,
        request: Request,
        open_reader: Open,
        bodies_of: Callable[[Tokenizer, bool], TokenBodies],
        *,
        answers_resume: bool,
    ) -> None:
        """Raises `Refused`."""
        self.client = client
        self.stream_id = stream_id
        self._server = server
        self._open = open_reader
        self._bodies_of = bodies_of
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
                self._bodies = self._bodies_of(reader.tokenizer, self._answers_resume)
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
                self._ride = Ride(reader.only, client, stream, bodies, self)
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

    # For its ride.

    @property
    def look_interval_s(self) -> float:
        """Seconds after which `is_plain` is to be asked again."""
        return math.inf if self._reader is None else self._reader.look_interval_s

    def is_plain(self, now: float) -> bool:
        """Whether nothing but tokens for `poll_one` is to be sent."""
        reader = self._reader
        return reader is not None and not self._is_leaving and reader.is_plain(now)

    def acknowledge_early(self) -> None:
        """Have the worker told what the client was sent, if that is due soon."""
        if self._reader is not None:
            self._reader.acknowledge_early()

    # What is told.

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
        refuse(self.client, self.stream_id, refused)
        self._forget()

    def _end(self, error: UnbrokenError | None) -> None:
        """The last word."""
        connection, stream_id = self.client.connection, self.stream_id
        fields = closing_fields(self._server, error)
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
        """A bug of this call was met."""
        self._end(status.translated(error, self._path))
        self._server.touch(self.client)  # It need not have been met in a `pump`.

    def _forget(self) -> None:
        self.client.calls.pop(self.stream_id, None)
        self.client.waiting.pop(self, None)
        ride, self._ride = self._ride, None
        if ride is not None:
            ride.close()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
