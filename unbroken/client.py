"""The client library: streams of tokens, checked against the contract as they arrive.

    async with Client("10.0.0.1:7400", "10.0.0.2:7400") as client:
        stream = client.generate(prompt="Once upon a time", max_tokens=64, temperature=0)
        async for piece in stream:
            print(piece.text, end="")
        print(stream.finished.usage.completion_tokens, stream.resumes)

A stream survives the death of its frontend: it goes on at another one, and its reader sees one
sequence of pieces. docs/CLIENT.md says what is promised. Every failure is an `UnbrokenError` with a
reason of docs/ERRORS.md.
"""

import asyncio
import random
import time
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

import grpc
import grpc.aio
from typing_extensions import Unpack

from unbroken import resumption, status
from unbroken.errors import Reason, UnbrokenError
from unbroken.frontends import Frontends
from unbroken.generation import TokenLogprobs, logprobs_from_proto
from unbroken.outcome import FinishReason
from unbroken.received import Received
from unbroken.request import GenerateOptions, request_to_proto
from unbroken.resumption import ResumeBudget, ResumePolicy, Resumption
from unbroken.successor import Successor
from unbroken.tls import ClientTls
from unbroken.transport import CLIENT_KEEPALIVE, Keepalive
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import admin_service_pb2_grpc as admin_grpc
from unbroken.v1 import holding_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:  # Generic classes in the stubs only.
    _Call: TypeAlias = (
        grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
        | grpc.aio.UnaryStreamCall[pb.ResumeRequest, pb.ResumeResponse]
    )

CALL_TIMEOUT_S: Final = 10.0
"""Deadline of calls other than `generate`."""

MOVE_PAUSE_S: Final = 0.25
"""Before a stream whose frontend drains tries again to go on elsewhere, longer each time."""
_MOVED: Final = frozenset({Reason.FENCED, Reason.DRAINING, Reason.UNREACHABLE})
"""How a call may end that another one of ours is about to take over."""
_STREAMS_PAGE_SIZE: Final = 1000
_CANCELS_AT_ONCE: Final = 32
"""Requests of one tree, at each frontend."""
_BARE_CODE: Final = "grpc_code"  # In the metadata of an error that no process of ours made.

_T = TypeVar("_T")


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
                return Piece(
                    response.choice_index,
                    response.offset,
                    tuple(response.token_ids),
                    response.text,
                    tuple(map(logprobs_from_proto, response.logprobs)),
                )
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


class Client:
    """Talks to frontends. Safe for many concurrent calls of one event loop.

    Of several addresses the first that can be reached begins a stream, and any goes on with it when
    its frontend dies, hangs, drains or cannot be reached any more.
    """

    def __init__(
        self,
        *addresses: str,
        call_timeout_s: float = CALL_TIMEOUT_S,
        resume_policy: ResumePolicy | None = None,
        resume_budget: ResumeBudget | None = None,
        keepalive: Keepalive = CLIENT_KEEPALIVE,
        tls: ClientTls | None = None,
    ) -> None:
        """`addresses` are "host:port", at least one. Connections are made when needed.

        `resume_budget` can be shared by several clients. Without `tls`, everything is in the clear;
        raises ValueError if its files are wrong.
        """
        if not addresses:
            raise ValueError("expected the address of a frontend, got none")
        self.frontends = Frontends(addresses, keepalive, tls)
        self.is_closed = False
        self._call_timeout_s = call_timeout_s
        self._policy = resume_policy or ResumePolicy()
        self._budget = resume_budget or ResumeBudget()
        self._random = random.Random()
        self._streams: weakref.WeakSet[GenerationStream] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; calls that still run, or are about to, are cancelled."""
        self.is_closed = True
        for stream in list(self._streams):
            stream.interrupt()
        await self.frontends.close()

    def generate(
        self,
        *,
        prompt: str | None = None,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Mapping[str, str]] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """The output for exactly one of `prompt` (text), `token_ids` and `messages`.

        Messages have a `role` and a `content`. `timeout_s` bounds the whole generation. The call
        begins with the first read. Raises `InvalidField` for what no frontend would take.
        """
        request = request_to_proto(prompt, token_ids, messages, options)
        return self.start(request, timeout_s=timeout_s)

    def start(
        self, request: pb.GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """As `generate`, from a request of the contract; it gets an id if it has none."""
        if not request.request_id:
            named = pb.GenerateRequest()
            named.CopyFrom(request)
            named.request_id = uuid.uuid4().hex
            request = named
        stream = GenerationStream(self, request, timeout_s)
        self._streams.add(stream)
        return stream

    def resume(
        self, checkpoint: pb.ResumeRequest, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """The rest of a stream, from a `GenerationStream.checkpoint` of any process.

        Whoever reads the stream now is cut off: `FENCED`.
        """
        stream = GenerationStream(self, checkpoint.request, timeout_s, checkpoint)
        self._streams.add(stream)
        return stream

    def new_resumption(self, *, has_token: bool) -> Resumption:
        """How a stream of this client goes on."""
        return Resumption(
            len(self.frontends),
            policy=self._policy,
            budget=self._budget,
            random=self._random,
            has_token=has_token,
        )

    async def cancel(self, request_id: str, *, is_soft: bool = False, tenant: str = "") -> bool:
        """End a request and those below it, from any connection and wherever they are.

        False: no frontend knows one, or all had ended. Soft: the current engine step is finished
        and its tokens are delivered.
        """
        asked = {request_id}
        due = [(tenant, request_id)]
        was_running = False
        while due:  # Once, unless there are requests below that may be elsewhere.
            wave, due = due[:_CANCELS_AT_ONCE], due[_CANCELS_AT_ONCE:]
            answers = await asyncio.gather(*(self._cancel(*name, soft=is_soft) for name in wave))
            for answer in (one for of_all in answers for one in of_all):
                was_running |= answer.was_running
                for key in answer.cancelled if len(self.frontends) > 1 else ():
                    if key.request_id not in asked:
                        asked.add(key.request_id)
                        due.append((key.tenant, key.request_id))
        return was_running

    async def _cancel(
        self, tenant: str, request_id: str, *, soft: bool
    ) -> Sequence[pb.CancelResponse]:
        request = pb.CancelRequest(request_id=request_id, soft=soft, tenant=tenant)
        return await self._ask_all(lambda stub: stub.Cancel(request, timeout=self._call_timeout_s))

    async def list_models(self) -> Sequence[pb.ModelInfo]:
        """The models that workers serve now or served before, by name."""
        index = await self.frontends.first()
        call = self.frontends.stub(index).ListModels(
            pb.ListModelsRequest(), timeout=self._call_timeout_s
        )
        return (await self._answer(index, call)).models

    async def get_stream(self, request_id: str, *, tenant: str = "") -> pb.StreamInfo:
        """One request, of whichever frontend knows it; raises `STREAM_NOT_FOUND`.

        If several do, because it was resumed, then that of the frontend which still runs it.
        """
        request = pb.GetStreamRequest(request_id=request_id, tenant=tenant)
        answers = await self._ask_all(
            lambda stub: stub.GetStream(request, timeout=self._call_timeout_s)
        )
        return min(
            (answer.stream for answer in answers),
            key=lambda stream: all(c.state == pb.STREAM_STATE_DONE for c in stream.choices),
        )

    async def list_streams(self) -> AsyncIterator[pb.StreamInfo]:
        """The requests of all frontends that can be reached, oldest first at each."""
        error: UnbrokenError | None = None
        num_answers = 0
        for index in range(len(self.frontends)):
            stub = self.frontends.stub(index)
            request = pb.ListStreamsRequest(page_size=_STREAMS_PAGE_SIZE)
            while True:
                try:
                    call = stub.ListStreams(request, timeout=self._call_timeout_s)
                    page = await self._answer(index, call)
                except UnbrokenError as failure:
                    if failure.reason is not Reason.UNREACHABLE:
                        raise
                    error = failure
                    break
                num_answers += 1
                for stream in page.streams:
                    yield stream
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
        if error is not None and not num_answers:
            raise error

    async def list_workers(self) -> Sequence[admin_pb.WorkerInfo]:
        """The workers as a frontend sees them, by name."""
        index = await self.frontends.first()
        call = admin_grpc.AdminServiceStub(self.frontends.channel(index)).ListWorkers(
            admin_pb.ListWorkersRequest(), timeout=self._call_timeout_s
        )
        return (await self._answer(index, call)).workers

    async def get_thresholds(self, model: str = "") -> admin_pb.GetThresholdsResponse:
        """When workers are busy: of one model, or of all; raises `MODEL_NOT_FOUND`."""
        index = await self.frontends.first()
        call = admin_grpc.AdminServiceStub(self.frontends.channel(index)).GetThresholds(
            admin_pb.GetThresholdsRequest(model=model), timeout=self._call_timeout_s
        )
        return await self._answer(index, call)

    async def set_thresholds(
        self,
        thresholds: worker_pb2.BusyThresholds | None,
        *,
        model: str = "",
        version: int | None = None,
    ) -> admin_pb.SetThresholdsResponse:
        """Give a model these, or (None) the defaults again; an empty name is the only model's.

        Raises `VERSION_MISMATCH` if there is another version than the one given.
        """
        index = await self.frontends.first()
        call = admin_grpc.AdminServiceStub(self.frontends.channel(index)).SetThresholds(
            admin_pb.SetThresholdsRequest(model=model, thresholds=thresholds, version=version),
            timeout=self._call_timeout_s,
        )
        return await self._answer(index, call)

    async def ledger(self, *, holdings_max: int = 0) -> Sequence[holding_pb2.ProcessHoldings]:
        """What the frontends that can be reached hold for requests, by process."""
        request = admin_pb.GetLedgerRequest(holdings_max=holdings_max)
        answers = await self._ask_all_of(
            lambda index: admin_grpc.AdminServiceStub(self.frontends.channel(index)).GetLedger(
                request, timeout=self._call_timeout_s
            )
        )
        return [process for answer in answers for process in answer.processes]

    async def channel(self) -> grpc.aio.Channel:
        """The channel for the next call; for services that this class does not know.

        With several addresses, the first that can be reached; raises `UNREACHABLE` if none can.
        """
        return self.frontends.channel(await self.frontends.first())

    async def _ask_all(self, ask: Callable[[InferenceServiceStub], Awaitable[_T]]) -> Sequence[_T]:
        """As `_ask_all_of`, of InferenceService."""
        return await self._ask_all_of(lambda index: ask(self.frontends.stub(index)))

    async def _ask_all_of(self, ask: Callable[[int], Awaitable[_T]]) -> Sequence[_T]:
        """The answers of all frontends that have one; raises what one said if none has."""
        asked = [self._answer(index, ask(index)) for index in range(len(self.frontends))]
        results = await asyncio.gather(*asked, return_exceptions=True)
        answers = [result for result in results if not isinstance(result, BaseException)]
        if not answers:
            errors = [result for result in results if isinstance(result, BaseException)]
            raise min(errors, key=_is_unreachable)
        return answers

    async def _answer(self, index: int, call: Awaitable[_T]) -> _T:
        """What a frontend answers; raises `UnbrokenError`."""
        try:
            return await call
        except grpc.RpcError as error:
            failure = status.from_rpc_error(error)
            raise await self.frontends.explained(failure, index) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.is_closed or (task is not None and task.cancelling()):
                raise
            raise UnbrokenError(Reason.CANCELLED, "the client was closed") from None


def _seen(reading: "asyncio.Task[Any]") -> None:
    """Whatever it says after its stream has gone on elsewhere."""
    if not reading.cancelled():
        reading.exception()


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, UnbrokenError) and error.reason is Reason.UNREACHABLE


def _explained(error: UnbrokenError, detail: str) -> UnbrokenError:
    """`error`, and why nothing more is tried."""
    return UnbrokenError(
        error.reason,
        f"{error.detail} ({detail})" if detail else error.detail,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
    )
