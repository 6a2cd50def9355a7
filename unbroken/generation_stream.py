"""The output of one request as its client reads it: one sequence of pieces, over several frontends.

`Received` checks what arrives against the contract, `Resumption` decides where to go on, and
`Successor` is the call that takes over from a frontend that drains; here are the calls themselves.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import grpc
import grpc.aio

from unbroken import resumption, status
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import TokenLogprobs, logprobs_from_proto
from unbroken.outcome import FinishReason
from unbroken.received import Received
from unbroken.successor import Successor
from unbroken.v1 import inference_service_pb2 as pb

if TYPE_CHECKING:
    from unbroken.client import Client

    _Call: TypeAlias = (  # Generic classes in the stubs only.
        grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
        | grpc.aio.UnaryStreamCall[pb.ResumeRequest, pb.ResumeResponse]
    )

MOVE_PAUSE_S: Final = 0.25
"""Before a stream whose frontend drains tries again to go on elsewhere, longer each time."""
_MOVED: Final = frozenset({Reason.FENCED, Reason.DRAINING, Reason.UNREACHABLE})
"""How a call may end that another one of ours is about to take over."""
_BARE_CODE: Final = "grpc_code"  # In the metadata of an error that no process of ours made.


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one choice's output. Pieces of a choice follow each other without gaps."""

    choice_index: int
    offset: int
    """Position of the first token in the choice's output."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain with these tokens; it can lag behind them."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token, if asked for."""

    @classmethod
    def from_proto(cls, response: pb.GenerateResponse) -> Self:
        """What a message brings."""
        return cls(
            response.choice_index,
            response.offset,
            tuple(response.token_ids),
            response.text,
            tuple(map(logprobs_from_proto, response.logprobs)),
        )


@dataclass(frozen=True, slots=True)
class Resume:
    """A seam: where a stream left one frontend and went on at another."""

    from_address: str
    to_address: str
    """The same, if only the connection broke."""
    reason: Reason
    """Why it left."""
    offsets: tuple[int, ...]
    """Tokens it had then, by choice."""
    gap_s: float
    """From the last message before to the first output after."""


@dataclass(frozen=True, slots=True)
class _Left:
    """The near side of a seam."""

    address: str
    reason: Reason
    offsets: tuple[int, ...]
    heard_at: float


class GenerationStream:
    """The output of one request: an async iterator of pieces.

    Used as a context manager, it cancels the request if it is left before the end. Iterating raises
    `UnbrokenError`: the frontend's, `WORKER_LOST` if the call ends without a word about its end,
    `UNREACHABLE` if no frontend is left to go on at, `PROTOCOL_VIOLATION` if a frontend breaks the
    contract. What was yielded is correct even then.
    """

    def __init__(
        self,
        client: "Client",
        request: pb.GenerateRequest,
        timeout_s: float | None,
        resume: pb.ResumeRequest | None = None,
    ) -> None:
        """`resume`: go on from what its holder has."""
        self._client = client
        self._frontends = client.frontends
        self._request = request
        self._timeout_s = timeout_s
        self._received = Received.restored(resume) if resume else Received(request)
        self._resumption = client.new_resumption(has_token=resume is not None)
        self._call: _Call | None = None
        self._frontend = 0
        self._pause_s = 0.0
        """Before the next call."""
        self._is_over = False
        self._interrupted = asyncio.Event()
        """Set when the stream is over or its client closed: a pause ends at once."""
        self._resumes: list[Resume] = []
        self._left: _Left | None = None
        """A seam after which nothing has come yet."""
        self._heard_at = 0.0
        self._error: UnbrokenError | None = None
        self._successor: Successor | None = None
        self._reading: asyncio.Task[object] | None = None
        """Waits for the next message while a successor is waited for, too."""
        self._ahead: deque[pb.GenerateResponse] = deque()
        """Messages that came before they were wanted."""
        self._num_moves_failed = 0
        """At this frontend, which drains,"""
        self._move_at: float | None = None
        """and when to try the next."""

    @property
    def started(self) -> pb.StreamStarted | None:
        """How the frontend opened the stream: ids, continuation class, seed. None until then."""
        return self._received.started

    @property
    def finished(self) -> pb.StreamFinished | None:
        """How the stream ended: finish reasons, usage, attempts. None until then."""
        return self._received.finished

    @property
    def request_id(self) -> str:
        """Identity of the request."""
        return self._request.request_id

    @property
    def frontend_address(self) -> str:
        """The frontend that serves the stream, or served it last."""
        return self._frontends.addresses[self._frontend]

    @property
    def resumes(self) -> Sequence[Resume]:
        """Where it left one frontend and went on at another, so far."""
        return tuple(self._resumes)

    def checkpoint(self) -> pb.ResumeRequest:
        """What `Client.resume` needs to go on from here, in another process too. Secret."""
        return self._received.resume_request()

    async def text(self) -> str:
        """Read to the end; the text of the first choice."""
        return "".join([piece.text async for piece in self if piece.choice_index == 0])

    async def cancel(self) -> None:
        """Stop reading, and let the frontend know. Idempotent; also while it is being read."""
        was_over, self._is_over = self._is_over, True
        self._interrupted.set()
        self._abandon()
        if not was_over and self.started is not None and self._request.HasField("reader_grace"):
            # A reader that merely leaves is waited for; only this ends the generation.
            with suppress(UnbrokenError):
                await self._client.cancel(self.request_id, tenant=self._request.tenant)

    async def stop(self) -> None:
        """Have the generation end soon: after the output of the current engine step, a second later
        at most. Read on to its end, which is `CANCELLED`, with usage in `finished`. Idempotent.
        """
        await self._client.cancel(self.request_id, is_soft=True, tenant=self._request.tenant)

    def interrupt(self) -> None:
        """End a pause: the client was closed."""
        self._interrupted.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._is_over:
            try:
                response = await self._read()
            except UnbrokenError as error:
                raise await self._frontends.explained(error, self._frontend) from error.__cause__
            if response is not None and (response.token_ids or response.text):
                return Piece.from_proto(response)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.cancel()

    async def _read(self) -> pb.GenerateResponse | None:
        """The next message, checked; None if the call ended and the stream may not have."""
        try:
            if self._call is None:
                await self._pause()
                if self._is_over:
                    return None
                self._call = await self._begin_call()
            message = await self._next(self._call)
            if message is grpc.aio.EOF:
                self._call_ended(None)
                return None
            response: pb.GenerateResponse = (
                message.response if isinstance(message, pb.ResumeResponse) else message  # pyright: ignore[reportAssignmentType]
            )
            if self._received.has_overlap:
                response = self._received.without_overlap(response)
            self._take(response)
        except grpc.RpcError as error:
            self._call_ended(status.from_rpc_error(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._abandon()
                raise
            # The call was cancelled under its reader: by `cancel`, or with its client.
            self._call_ended(UnbrokenError(Reason.CANCELLED, "the call was cancelled here"))
        except BaseException:
            self._abandon()
            raise
        else:
            return response
        return None

    async def _begin_call(self) -> "_Call":
        """Ask the best frontend for the stream, or for the rest of it."""
        way = self._resumption
        if way.num_calls == 0:
            self._heard_at = time.monotonic()
            if self._timeout_s is not None:
                way.deadline_at = time.monotonic() + self._timeout_s
            self._frontend = await self._frontends.first()
        else:
            self._frontend = way.choose(self._frontends.readiness())
        way.call_began()
        self._received.begin_call()
        stub = self._frontends.stub(self._frontend)
        left_s = None if way.deadline_at is None else way.deadline_at - time.monotonic()
        if way.has_started:
            return stub.Resume(self._received.resume_request(), timeout=left_s)
        return stub.Generate(self._request, timeout=left_s)

    def _take(self, response: pb.GenerateResponse) -> None:
        """Take in a message; raises `PROTOCOL_VIOLATION`."""
        received, way = self._received, self._resumption
        received.add(response)
        now = time.monotonic()
        is_end = response.HasField("finished")
        if not way.has_started or response.token_ids or response.text or is_end:
            way.output_came()
            if self._left is not None:
                left, self._left = self._left, None
                gap_s = now - left.heard_at
                self._resumes.append(
                    Resume(left.address, self.frontend_address, left.reason, left.offsets, gap_s)
                )
        self._heard_at = now
        way.has_started = True
        way.has_token = bool(received.resume_token)
        way.is_finished = is_end
        if is_end:
            self._close_successor()
        elif response.HasField("drain_notice"):
            way.drains(self._frontend)
            self._move()

    async def _next(self, call: "_Call") -> object:
        """The next message, or `EOF`; of the successor's call once that has output."""
        if self._ahead:
            return self._ahead.popleft()
        if self._move_at is not None and time.monotonic() >= self._move_at:
            self._move()
        if self._successor is None and self._reading is None:
            return await call.read()
        if self._reading is None:
            self._reading = asyncio.ensure_future(call.read())
            self._reading.add_done_callback(_seen)
        if self._successor is not None:
            waits: set[asyncio.Task[Any]] = {self._reading, self._successor.began}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._has_moved(self._successor):
                return self._ahead.popleft()
        reading, self._reading = self._reading, None
        try:
            return await reading
        except grpc.RpcError as error:
            successor = self._successor
            if successor is None or status.from_rpc_error(error).reason not in _MOVED:
                raise
            # It has been taken over there, or will be.
            await asyncio.wait({successor.began})
            if not self._has_moved(successor):
                raise
            return self._ahead.popleft()

    def _move(self) -> None:
        """Ask another frontend for the stream, and read on at this one meanwhile."""
        self._move_at = None
        way = self._resumption
        if self._successor is not None or not way.can_move():
            return
        frontend = way.choose(self._frontends.readiness())
        if frontend == self._frontend:
            return
        left_s = None if way.deadline_at is None else way.deadline_at - time.monotonic()
        asked = self._received.resume_request()
        call = self._frontends.stub(frontend).Resume(asked, timeout=left_s)
        self._successor = Successor(call, frontend, asked)

    def _has_moved(self, successor: Successor) -> bool:
        """Whether the successor has output, so that the stream goes on by its call from here."""
        if not successor.began.done():
            return False
        self._successor = None
        try:
            messages = successor.messages()
        except UnbrokenError:
            successor.close()
            self._num_moves_failed += 1
            self._resumption.drains(successor.frontend)
            self._move_at = time.monotonic() + MOVE_PAUSE_S * 2**self._num_moves_failed
            return False
        self._note_seam(Reason.DRAINING)
        if self._call is not None:
            self._call.cancel()
        self._call, self._frontend = successor.call, successor.frontend
        self._reading = self._move_at = None
        self._num_moves_failed = 0
        self._received.begin_overlapping_call(successor.asked)
        self._resumption.moved()
        self._ahead.extend(messages)
        return True

    def _note_seam(self, reason: Reason) -> None:
        """The stream leaves its frontend here."""
        if self._left is None:
            num_choices = max(1, self._request.num_choices)
            offsets = tuple(map(self._received.num_tokens, range(num_choices)))
            self._left = _Left(self.frontend_address, reason, offsets, self._heard_at)

    def _call_ended(self, error: UnbrokenError | None) -> None:
        """Go on elsewhere, after a pause; or raise, or let the stream be over."""
        self._close_successor()
        self._call = None
        if self._is_over:
            return
        if self._client.is_closed:
            self._is_over = True
            raise UnbrokenError(Reason.CANCELLED, "the client was closed")
        if error is None and self.finished is None:
            error = UnbrokenError(
                Reason.WORKER_LOST, "expected `finished` before the end of the stream, got none"
            )
            end = resumption.CallEnded(None)
        elif (
            error is not None and error.reason is Reason.CANCELLED and _BARE_CODE in error.metadata
        ):
            # Nobody of ours said so: a proxy between, or a server that stopped.
            end = resumption.CallEnded(Reason.UNREACHABLE)
        else:
            end = resumption.CallEnded(
                error.reason if error else None, error.retry_after_s if error else None
            )
        now = time.monotonic()
        match self._resumption.call_ended(end, self._frontend, now):
            case resumption.Finish():
                self._is_over = True
                if error is not None and self._has_failed_choice():
                    raise error
            case resumption.GiveUp(detail):
                self._is_over = True
                assert error is not None, "an end without an error is the stream's"
                raise _explained(error, detail) from self._error
            case resumption.GoOn(pause_s):
                assert error is not None, "an end without an error is the stream's"
                self._error = error
                if self._resumption.has_started:
                    self._note_seam(end.reason or error.reason)
                self._pause_s = pause_s

    async def _pause(self) -> None:
        """Wait before the next call, unless there will be none."""
        pause_s, self._pause_s = self._pause_s, 0.0
        if pause_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._interrupted.wait()
        if self._client.is_closed and not self._is_over:
            raise UnbrokenError(Reason.CANCELLED, "the client was closed")

    def _has_failed_choice(self) -> bool:
        assert self.finished is not None, "it is over"
        return any(
            choice.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED)
            for choice in self.finished.choices
        )

    def _abandon(self) -> None:
        self._is_over = True
        self._close_successor()
        if self._call is not None:
            self._call.cancel()

    def _close_successor(self) -> None:
        successor, self._successor = self._successor, None
        if successor is not None:
            successor.close()
        self._reading = self._move_at = None
        self._num_moves_failed = 0


def _seen(reading: "asyncio.Task[Any]") -> None:
    """Whatever it says after its stream has gone on elsewhere."""
    if not reading.cancelled():
        reading.exception()


def _explained(error: UnbrokenError, detail: str) -> UnbrokenError:
    """`error`, and why nothing more is tried."""
    return UnbrokenError(
        error.reason,
        f"{error.detail} ({detail})" if detail else error.detail,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
    )
