"""How a call reads a request: one reader at a time, and what happens when it leaves.

    reader = readers.open(request, ..., on_news)
    on_news ──▶ reader.poll(): all that is new ──▶ the client ──▶ reader.sent()

Each time that it polls, a call gets all that is new in one piece per choice, so a client that reads
slowly gets fewer and larger messages; what it has not been sent yet is bounded by the window of its
worker.

A later call for the same request takes it over, and the one before ends with FENCED. Without a
reader a request ends, unless its client asked to be waited for (`reader_grace`).
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple, Protocol

from frontend import summaries
from frontend.dispatch import Choice, nobody
from frontend.metrics import FrontendMetrics
from frontend.requests import Request, Requests
from frontend.resume_token import Keyring, Minting
from frontend.stream import Command, Piece, Stream
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.metrics import PlainCounter
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import inference_service_pb2 as pb

REQUEST_ID_KEY: Final = "unbroken-request-id"
CLASS_KEY: Final = "unbroken-continuation-class"
"""Initial metadata of `Generate` and `Resume`."""
LOOK_INTERVAL_S_MAX: Final = 10.0
"""How long tokens of a stream are told singly until it is seen whether its resume token is old."""
_LOOK_INTERVAL_SHARE: Final = 1 / 8
"""The same as a share of how long a resume token can be used, if that is less."""

_log = log.get_logger(__name__)

_NEVER: Final = Minting(float("-inf"), 0.0)


class Output(NamedTuple):
    """What is new of one choice; to be sent in messages of bounded size (`summaries.parts`)."""

    choice_index: int
    piece: Piece
    resume_token: bytes
    """Goes with the first of its messages."""


class Reading(Protocol):
    """What an edge needs of whatever it reads a request from; `Reader` says what each means."""

    @property
    def initial_metadata(self) -> Sequence[tuple[str, str]]: ...

    @property
    def is_over(self) -> bool: ...

    @property
    def error(self) -> UnbrokenError | None: ...

    @property
    def is_current(self) -> bool: ...

    @property
    def is_done(self) -> bool: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def poll_one(self, now: float, /) -> tuple[int, int] | None: ...

    @property
    def only(self) -> Stream | None: ...

    @property
    def look_interval_s(self) -> float: ...

    def is_plain(self, now: float, /) -> bool: ...

    def acknowledge_early(self) -> None: ...

    def poll(self) -> Sequence[Output | pb.GenerateResponse]: ...

    def sent(self) -> None: ...

    def close(self) -> None: ...


class Readers:
    """All calls that read requests of this frontend, and what keeps requests without one."""

    def __init__(
        self,
        frontend_id: str,
        requests: Requests,
        metrics: FrontendMetrics,
        keys: Callable[[], Keyring],
        *,
        token_lifetime_s: float,
        clock: Callable[[], float],
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._frontend_id = frontend_id
        self._requests = requests
        self._metrics = metrics
        self._keys = keys
        self._token_lifetime_s = token_lifetime_s
        self.look_interval_s = min(LOOK_INTERVAL_S_MAX, _LOOK_INTERVAL_SHARE * token_lifetime_s)
        """Seconds after which it is asked whether time alone gave anybody something to tell."""
        self._clock = clock
        self._time_of_day = time_of_day
        self._keepers: dict[asyncio.Task[None], tuple[Request, float]] = {}
        """For which request, and since when."""
        self.open_now: set[Reader] = set()
        """Those that have not been closed."""

    @property
    def keepers(self) -> Collection[tuple[Request, float]]:
        """Requests that wait for a reader, and since when."""
        return self._keepers.values()

    def open(self, request: Request, *, arrived_at: float, on_news: Callable[[], None]) -> "Reader":
        """Take the request over. `on_news` says that there is something to poll; it may be called
        at any moment, and has to return at once.
        """
        reader = Reader(self, request, arrived_at=arrived_at, on_news=on_news)
        self.open_now.add(reader)
        return reader

    def drop(self, request: Request) -> None:
        """End a request, whoever reads it."""
        request.take_over(nobody)
        request.discard()
        self._settle(request)

    async def close(self) -> None:
        """Keep nothing any more."""
        keepers = list(self._keepers)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def mint(self, request: Request) -> tuple[bytes, Minting]:
        """A resume token, and when it was made."""
        minting = Minting(self._clock(), self._time_of_day())
        token = request.resume_token(
            self._keys(), now=minting.time_of_day, lifetime_s=self._token_lifetime_s
        )
        return token, minting

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock()

    def is_due(self, minting: Minting) -> bool:
        """Whether the token that was made then should be replaced."""
        return minting.is_due(self._clock(), self._time_of_day(), self._token_lifetime_s)

    def first_output(self, arrived_at: float) -> None:
        """A request that arrived then has its first output."""
        self._metrics.ttft_s.observe(self._clock() - arrived_at)

    @property
    def delivered(self) -> PlainCounter:
        """Tokens that went to clients."""
        return self._metrics.tokens_delivered

    def left(self, request: Request) -> None:
        """Its reader has gone."""
        grace_s = request.admitted.envelope.reader_grace_s
        if request.is_settled:
            return
        if request.is_done or not grace_s:
            self._settle(request)
            return
        keeper = asyncio.create_task(
            self._keep(request, grace_s), name=f"keep {request.request_id}"
        )
        self._keepers[keeper] = request, self._clock()
        keeper.add_done_callback(self._keepers.pop)

    async def _keep(self, request: Request, grace_s: float) -> None:
        """Stand in for a reader that may come back. The window bounds what is generated."""
        number = request.reader
        has_news = asyncio.Event()
        request.news.tell = has_news.set
        try:
            async with asyncio.timeout(grace_s):
                while request.reader == number and not request.is_done:
                    request.news.clear()
                    has_news.clear()
                    request.fail_together()
                    await has_news.wait()
        except TimeoutError:
            pass
        finally:
            if request.reader == number:
                self._settle(request)

    def _settle(self, request: Request) -> None:
        if request.is_settled:
            return
        request.close()
        request.is_settled = True
        self._requests.remove(request)
        self._account(request)

    def started(self, request: Request, token: bytes) -> pb.GenerateResponse:
        admitted = request.admitted
        return pb.GenerateResponse(
            started=pb.StreamStarted(
                request_id=request.request_id,
                model=admitted.model.name,
                continuation_class=summaries.way(admitted.continuation_class),
                continuation_detail=admitted.continuation_detail,
                resume_token=token,
                num_prompt_tokens=admitted.num_prompt_tokens,
                seed=admitted.seed,
                migrations_max=admitted.envelope.migrations_max,
                frontend_id=self._frontend_id,
            )
        )

    def _account(self, request: Request) -> None:
        error = request.error
        reason = None if error is None else error.reason
        self._metrics.request_finished(reason, self._clock())
        for choice in request.choices:
            stream = choice.stream
            self._metrics.recomputed("prefill", stream.accounts.recomputed_prefill_tokens)
            self._metrics.recomputed("decode", stream.accounts.recomputed_decode_tokens)
            was_paused = False
            for attempt in stream.attempts:
                if attempt.is_adopted:
                    self._metrics.adopted(is_refused=attempt.is_refused)
                if attempt.gap_s is not None and not was_paused:  # That was no failure.
                    self._metrics.gap_s.observe(attempt.gap_s)
                was_paused = attempt.failure is FailureKind.PREEMPTED
        losses = [
            attempt.failure
            for choice in request.choices
            for attempt in choice.stream.attempts
            if attempt.failure not in (FailureKind.UNSPECIFIED, FailureKind.PREEMPTED)
        ]
        if losses or error is not None:
            _log.info(
                "request ended after failures",
                request_id=request.request_id,
                reason=reason,
                failures=[failure.name for failure in losses],
            )


class Reader:
    """One call that reads a request."""

    __slots__ = (
        "_delivered",
        "_is_first",
        "_is_noticed",
        "_is_started",
        "_leaving",
        "_looks_at",
        "_news",
        "_num_moves",
        "_number",
        "_on_news",
        "_only",
        "_readers",
        "_tokens",
        "arrived_at",
        "error",
        "is_over",
        "request",
    )

    def __init__(
        self,
        readers: Readers,
        request: Request,
        *,
        arrived_at: float,
        on_news: Callable[[], None],
    ) -> None:
        self.request = request
        self.is_over = False
        """What the last `poll` returned is all there is."""
        self.error: UnbrokenError | None = None
        """What the call fails of, once it is over."""
        self.arrived_at = arrived_at
        """Monotonic seconds."""
        self._readers = readers
        self._number = request.take_over(on_news)
        self._is_first = self._number == 1
        self._is_started = False
        self._is_noticed = False
        """It has told of the drain."""
        self._on_news = on_news
        self._news = request.news
        self._only: Stream | None = None
        """The stream of the only choice, once its first output was polled."""
        self._num_moves = 0
        self._looks_at = 0.0
        """When it is to be seen again whether there is more to tell than a token."""
        self._delivered = readers.delivered
        self._tokens = ResumeTokens(readers, request)
        request.news.prepare = self._tokens.prepare
        self._leaving: list[tuple[Choice, int, Sequence[Command]]] = []
        # Where a worker is ready, the first token already says which one it is.
        request.begin()

    @property
    def initial_metadata(self) -> Sequence[tuple[str, str]]:
        """What clients are told before the first message."""
        request = self.request
        return (
            (REQUEST_ID_KEY, request.request_id),
            (CLASS_KEY, request.admitted.continuation_class.name),
        )

    @property
    def is_current(self) -> bool:
        """Whether no later call reads the request."""
        return self.request.reader == self._number

    @property
    def is_done(self) -> bool:
        """Whether the request has ended."""
        return self.request.is_done

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the tokens that `poll_one` tells; None if it tells none."""
        return self.request.admitted.model.tokenizer

    def poll_one(self, now: float, /) -> tuple[int, int] | None:
        """What is new after most steps: the offset and the id of one token whose text is its own.

        It counts as sent. None if anything else is to be told, or nothing: then `poll` tells. What
        `poll` returned before MUST have been `sent`. `now` is in monotonic seconds.
        """
        stream = self._only
        if stream is None or not self._is_plain(stream, now):
            return None
        one = stream.take_one()
        if one is not None:
            self._news.is_set = False
            self._delivered.value += 1
        return one

    @property
    def only(self) -> Stream | None:
        """That of which `poll_one` tells, once it may."""
        return self._only

    @property
    def look_interval_s(self) -> float:
        """Seconds after which `is_plain` is to be asked again: resume tokens grow old."""
        return self._readers.look_interval_s

    def is_plain(self, now: float, /) -> bool:
        """Whether there is nothing to tell, and nothing but tokens for `poll_one` will come next.

        Then those may also be told without asking, until something else happens to the stream or
        the call. It is to be asked again every now and then.
        """
        stream = self._only
        return stream is not None and not self._news.is_set and self._is_plain(stream, now)

    def acknowledge_early(self) -> None:
        """Windows move if that is due soon, after tokens were told without asking."""
        if self._only is not None and self.is_current:
            (choice,) = self.request.choices
            choice.acknowledge_early()

    def _is_plain(self, stream: Stream, now: float) -> bool:
        news = self._news
        if (
            stream.outcome is not None
            or stream.num_moves != self._num_moves
            or news.tell is not self._on_news  # Somebody else reads now.
            or news.is_to_be_polled
        ):
            return False
        if now >= self._looks_at:
            if self._tokens.has_newer:
                return False
            self._looks_at = now + self.look_interval_s
        return True

    def poll(self) -> list[Output | pb.GenerateResponse]:
        """All that is new, in its order. What it returned before MUST have been `sent`."""
        request = self.request
        request.news.is_set = False
        if request.reader != self._number:
            self._end(UnbrokenError(Reason.FENCED, "a later call reads this request"))
            return []
        found: list[Output | pb.GenerateResponse] = []
        if not self._is_started:
            self._is_started = True
            found.append(self._readers.started(request, self._tokens.newest()))
        if request.cut_at is not None and not self._is_noticed:
            self._is_noticed = True
            found.append(_drain_notice(request.cut_at - self._readers.now()))
        is_done = False  # Whether what follows is all there is.
        if request.has_done_choice:
            request.fail_together()
            is_done = request.is_done
        # Nobody holds tokens of a worker that no resume token of his names.
        token = self._tokens.newer()
        for choice in request.choices:
            stream = choice.stream
            if not stream.has_output:
                continue
            if self._is_first:
                self._is_first = False
                self._readers.first_output(self.arrived_at)
            if len(request.choices) == 1:
                self._only, self._num_moves = stream, stream.num_moves
                self._looks_at = self._readers.now() + self.look_interval_s
            piece, commands = stream.take()
            found.append(Output(choice.index, piece, token))
            token = b""
            self._leaving.append((choice, len(piece.token_ids), commands))
        if is_done:
            error = request.error
            # What another owner has taken is not over, and he has the last word.
            is_elsewhere = error is not None and error.reason is Reason.FENCED
            if not (request.is_handed_over or is_elsewhere):
                found.append(pb.GenerateResponse(finished=request.finished()))
            self._end(error)
        elif token:
            found.append(pb.GenerateResponse(resume_token=token))
        return found

    def sent(self) -> None:
        """What `poll` returned has left: windows move, and the engine may go on."""
        if not self._leaving:
            return
        leaving, self._leaving = self._leaving, []
        request = self.request
        if request.reader != self._number:
            return
        for choice, num_tokens, commands in leaving:
            self._delivered.value += num_tokens
            if commands:
                choice.obey(commands)
            request.has_sent(choice)

    def close(self) -> None:
        """The call has ended, one way or another. Idempotent."""
        self._readers.open_now.discard(self)
        if self.is_current:
            self.request.news.tell = self.request.news.prepare = nobody
            self._readers.left(self.request)

    def _end(self, error: UnbrokenError | None) -> None:
        self.is_over = True
        self.error = None if error is None else _raisable(error)


class ResumeTokens:
    """The resume tokens of one call."""

    def __init__(self, readers: Readers, request: Request) -> None:
        self._readers = readers
        self._request = request
        self._num_moves = 0
        """Of the request, in the last one."""
        self._minting = _NEVER
        self._untold = b""
        """The last one, until it is told."""

    def prepare(self) -> None:
        """Have one ready if the request has moved: when an engine dies, all its streams need one
        with their next token, and until that comes there is time.
        """
        if self._request.num_moves != self._num_moves:
            self._mint()

    def newest(self) -> bytes:
        """One that says where the request is now."""
        self.prepare()
        if not self._untold:
            self._mint()
        token, self._untold = self._untold, b""
        return token

    def newer(self) -> bytes:
        """One if the request has moved since the last one, or that one grows old or the clock was
        set; else nothing.
        """
        return self.newest() if self.has_newer else b""

    @property
    def has_newer(self) -> bool:
        """Whether `newer` would be one."""
        return (
            bool(self._untold)
            or self._request.num_moves != self._num_moves
            or self._readers.is_due(self._minting)
        )

    def _mint(self) -> None:
        self._num_moves = self._request.num_moves
        self._untold, self._minting = self._readers.mint(self._request)


def _drain_notice(budget_left_s: float) -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    response.drain_notice.budget_left.FromNanoseconds(max(0, round(budget_left_s * 1e9)))
    return response


def _raisable(error: UnbrokenError) -> UnbrokenError:
    """A copy: one error can end several choices and requests, and each call raises its own."""
    return UnbrokenError(
        error.reason, error.detail, metadata=error.metadata, retry_after_s=error.retry_after_s
    )
