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
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

import grpc
import grpc.aio
from typing_extensions import Unpack

from unbroken import status
from unbroken.errors import Reason, UnbrokenError
from unbroken.frontends import Frontends
from unbroken.generation_stream import GenerationStream
from unbroken.request import GenerateOptions, request_to_proto
from unbroken.resumption import ResumeBudget, ResumePolicy, Resumption
from unbroken.tls import ClientTls
from unbroken.transport import CLIENT_KEEPALIVE, Keepalive, admin_metadata
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import admin_service_pb2_grpc as admin_grpc
from unbroken.v1 import holding_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

CALL_TIMEOUT_S: Final = 10.0
"""Deadline of calls other than `generate`."""

_STREAMS_PAGE_SIZE: Final = 1000
_CANCELS_AT_ONCE: Final = 32
"""Requests of one tree, at each frontend."""

_T = TypeVar("_T")


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
        admin_token: str | None = None,
    ) -> None:
        """`addresses` are "host:port", at least one. Connections are made when needed.

        `admin_token` is brought to calls for operators: workers, thresholds and ledgers.
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
        self._as_operator = admin_metadata(admin_token)
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
            admin_pb.ListWorkersRequest(),
            timeout=self._call_timeout_s,
            metadata=self._as_operator,
        )
        return (await self._answer(index, call)).workers

    async def get_thresholds(self, model: str = "") -> admin_pb.GetThresholdsResponse:
        """When workers are busy: of one model, or of all; raises `MODEL_NOT_FOUND`."""
        index = await self.frontends.first()
        call = admin_grpc.AdminServiceStub(self.frontends.channel(index)).GetThresholds(
            admin_pb.GetThresholdsRequest(model=model),
            timeout=self._call_timeout_s,
            metadata=self._as_operator,
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
            metadata=self._as_operator,
        )
        return await self._answer(index, call)

    async def ledger(self, *, holdings_max: int = 0) -> Sequence[holding_pb2.ProcessHoldings]:
        """What the frontends that can be reached hold for requests, by process."""
        request = admin_pb.GetLedgerRequest(holdings_max=holdings_max)
        answers = await self._ask_all_of(
            lambda index: admin_grpc.AdminServiceStub(self.frontends.channel(index)).GetLedger(
                request, timeout=self._call_timeout_s, metadata=self._as_operator
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


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, UnbrokenError) and error.reason is Reason.UNREACHABLE
