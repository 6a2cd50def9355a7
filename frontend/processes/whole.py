"""What clients are answered where a frontend has several processes: the same by each of them.

A request is in one process only (`claims`). Calls about it that come to another one are passed on
to that, `Generate` and `Resume` message by message; what is asked of all is asked of all.
"""

import asyncio
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
    Set,
)
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import grpc
import grpc.aio
from typing_extensions import override

from frontend import drain
from frontend.admin import Admin
from frontend.draining import budget_of
from frontend.gateway import Gateway, cancelled, check_name
from frontend.processes.claims import Elsewhere
from frontend.processes.siblings import CALL_TIMEOUT_S, Key, Siblings, has_been_cancelled
from frontend.reading import Output, Reading
from frontend.requests import PAGE_SIZE_DEFAULT, page_token_after
from unbroken import status
from unbroken.errors import Reason, UnbrokenError
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.admin_service_pb2_grpc import AdminServiceStub
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    _Call: TypeAlias = (
        grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
        | grpc.aio.UnaryStreamCall[pb.ResumeRequest, pb.ResumeResponse]
    )

_Context = grpc.aio.ServicerContext[Any, Any]

TRIES_MAX: Final = 5
"""How often a request is looked for that is let go by one process while another is asked."""
TRY_INTERVAL_S: Final = 0.05
DRAIN_LOOK_S: Final = 0.1
"""Between two looks at how far the drains of siblings are."""
AHEAD_MAX: Final = 16
"""Messages of a sibling that wait for a client."""


class Whole:
    """InferenceService of all processes together."""

    def __init__(self, gateway: Gateway, siblings: Siblings) -> None:
        """`gateway` is that of this process."""
        self._gateway = gateway
        self._siblings = siblings
        self._passed_on: set[PassedOn] = set()
        self.on_less: list[Callable[[], None]] = []
        """Called when a call is passed on no more."""

    @property
    def num_passed_on(self) -> int:
        """Calls of clients of this process for requests of siblings."""
        return len(self._passed_on)

    def close(self) -> None:
        """End what is passed on."""
        for one in list(self._passed_on):
            one.close()

    async def generate(
        self, request: pb.GenerateRequest, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Reading:
        """As `Gateway.generate`."""
        return await self._find(
            lambda left_s: self._gateway.generate(request, left_s, on_news),
            lambda stub, left_s: stub.Generate(request, timeout=left_s),
            remaining_s,
            on_news,
        )

    async def resume(
        self, request: pb.ResumeRequest, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Reading:
        """As `Gateway.resume`."""
        return await self._find(
            lambda left_s: self._gateway.resume(request, left_s, on_news),
            lambda stub, left_s: stub.Resume(request, timeout=left_s),
            remaining_s,
            on_news,
        )

    async def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        """As `Gateway.cancel`, wherever the request and those below it are."""
        check_name(request.request_id, request.tenant)
        found = dict.fromkeys(self._gateway.cancel_here(request))
        new: Set[Key] = set(found)
        is_first = True
        while is_first or new:
            told = await self._siblings.cancel(request, new, is_first=is_first)
            here = self._gateway.cancel_below(told - found.keys(), soft=request.soft)
            new = (told | set(here)) - found.keys()
            found |= dict.fromkeys(sorted(new))
            is_first = False
        self._gateway.cancel_orphans(request, found)
        return cancelled(list(found))

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        """As `Gateway.get_stream`; if several processes know it, of the one that has it."""
        check_name(request.request_id, request.tenant)
        missing: UnbrokenError | None = None
        found: list[pb.GetStreamResponse] = []
        try:
            found.append(await self._gateway.get_stream(request))
        except UnbrokenError as error:
            missing = error
        if not found or not _is_running(found[0].stream):
            found += await self._siblings.ask_all(lambda channel: _ask_for(channel, request))
        known = [answer for answer in found if answer.HasField("stream")]
        if not known:
            assert missing is not None, "it is not here either"
            raise missing
        return max(
            known,
            key=lambda answer: (
                _is_running(answer.stream),
                answer.stream.admitted_at.ToNanoseconds(),
            ),
        )

    async def list_streams(self, request: pb.ListStreamsRequest) -> pb.ListStreamsResponse:
        """As `Gateway.list_streams`: the oldest of all. Tokens of pages are good everywhere."""
        own = await self._gateway.list_streams(request)
        pages = [
            own,
            *await self._siblings.ask_all(
                lambda channel: InferenceServiceStub(channel).ListStreams(
                    request, timeout=CALL_TIMEOUT_S
                )
            ),
        ]
        streams = sorted(
            (stream for page in pages for stream in page.streams),
            key=lambda stream: stream.admitted_at.ToNanoseconds(),
        )
        size = request.page_size or PAGE_SIZE_DEFAULT
        has_more = len(streams) > size or any(page.next_page_token for page in pages)
        streams = streams[:size]
        token = ""
        if has_more and streams:
            token = page_token_after(streams[-1].admitted_at.ToNanoseconds())
        return pb.ListStreamsResponse(streams=streams, next_page_token=token)

    def list_models(self) -> pb.ListModelsResponse:
        """As `Gateway.list_models`: all processes see the same workers."""
        return self._gateway.list_models()

    async def _find(
        self,
        ask_here: Callable[[float | None], Awaitable[Reading]],
        ask_there: "Callable[[InferenceServiceStub, float | None], _Call]",
        remaining_s: float | None,
        on_news: Callable[[], None],
    ) -> Reading:
        deadline_at = None if remaining_s is None else time.monotonic() + remaining_s
        for number in range(TRIES_MAX):
            left_s = None if deadline_at is None else max(0.0, deadline_at - time.monotonic())
            try:
                return await ask_here(left_s)
            except Elsewhere as elsewhere:
                pid = elsewhere.pid
            stub = InferenceServiceStub(self._siblings.channel(pid))
            call = ask_there(stub, left_s)
            passed_on = PassedOn(call, on_news, self._forget)
            self._passed_on.add(passed_on)
            try:
                await passed_on.begin()
            except UnbrokenError as error:
                passed_on.close()
                # It is gone or has let the request go: whoever has it now, has it here or there.
                if error.reason is not Reason.UNREACHABLE or number == TRIES_MAX - 1:
                    raise
                await asyncio.sleep(TRY_INTERVAL_S)
            except BaseException:
                passed_on.close()
                raise
            else:
                return passed_on
        raise AssertionError("the last try raises")

    def _forget(self, one: "PassedOn") -> None:
        self._passed_on.discard(one)
        for callback in self.on_less:
            callback()


class PassedOn:
    """Reads, for a client of this process, a request of a sibling. As `Reader`."""

    def __init__(
        self, call: "_Call", on_news: Callable[[], None], on_end: "Callable[[PassedOn], None]"
    ) -> None:
        self.initial_metadata: Sequence[tuple[str, str]] = ()
        self.is_over = False
        self.error: UnbrokenError | None = None
        self.is_current = True
        """The sibling knows better, and says so by an error."""
        self._call = call
        self._on_news = on_news
        self._on_end = on_end
        self._messages: deque[pb.GenerateResponse] = deque()
        self._has_room = asyncio.Event()
        self._failure: UnbrokenError | None = None
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Wait until the sibling has the request; raises what it refuses it with."""
        try:
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    given = await self._call.initial_metadata()
            except TimeoutError:
                raise UnbrokenError(
                    Reason.UNREACHABLE, "the process that has the request does not answer"
                ) from None
            if (message := await self._read()) is None:
                raise UnbrokenError(Reason.WORKER_LOST, "expected `started`, got an end")
        except asyncio.CancelledError:
            if has_been_cancelled():
                raise
            # Somebody else here has seen that it is gone, and closed the channel.
            raise UnbrokenError(
                Reason.UNREACHABLE, "the process that had the request is gone"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error
        self.initial_metadata = tuple(
            (key, value) for key, value in tuple(given) if isinstance(value, str)
        )
        self._messages.append(message)
        self._task = asyncio.create_task(self._run())

    @property
    def is_done(self) -> bool:
        """Whether no more will come."""
        return self._task is not None and self._task.done()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: whole messages come."""
        return None

    @property
    def only(self) -> None:
        """It tells no token singly."""

    @property
    def look_interval_s(self) -> float:
        """Of no meaning: it is never plain."""
        return 0.0

    def is_plain(self, _now: float, /) -> bool:
        """So it never is."""
        return False

    def acknowledge_early(self) -> None:
        """Nothing: who polls it does that."""

    def poll_one(self, _now: float, /) -> tuple[int, int] | None:
        """None: see `tokenizer`."""
        return None

    def poll(self) -> Sequence[Output | pb.GenerateResponse]:
        """All that has come."""
        messages = list(self._messages)
        self._messages.clear()
        self._has_room.set()
        if self.is_done:
            self.is_over = True
            self.error = self._failure
        return messages

    def sent(self) -> None:
        """It has left; the sibling counts it when we take it."""

    def close(self) -> None:
        """The client reads no more. Idempotent."""
        self._call.cancel()
        if self._task is not None:
            self._task.cancel()
        self._on_end(self)

    async def _run(self) -> None:
        try:
            while (message := await self._read()) is not None:
                self._messages.append(message)
                self._on_news()
                while len(self._messages) >= AHEAD_MAX:
                    self._has_room.clear()
                    await self._has_room.wait()
        except grpc.aio.AioRpcError as error:
            self._failure = status.from_rpc_error(error)
        except asyncio.CancelledError:
            self._failure = UnbrokenError(Reason.UNREACHABLE, "the call to a sibling was ended")
            raise
        finally:
            # It is done when this has returned, and not before.
            asyncio.get_running_loop().call_soon(self._on_news)

    async def _read(self) -> pb.GenerateResponse | None:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            return None
        if isinstance(message, pb.ResumeResponse):
            return message.response
        return cast("pb.GenerateResponse", message)


class WholeAdmin(Admin):
    """AdminService of all processes together."""

    def __init__(
        self, own: Admin, siblings: Siblings, *, tell_parent: Callable[[float | None], None]
    ) -> None:
        """`own` is that of this process; `tell_parent` says that all drain."""
        self.num_watching = 0
        """Calls that tell how far the drains of siblings are."""
        self._own = own
        self._siblings = siblings
        self._tell_parent = tell_parent

    @override
    async def GetThresholds(
        self, request: admin_pb.GetThresholdsRequest, context: _Context
    ) -> admin_pb.GetThresholdsResponse:
        """As any process tells them: all follow one record."""
        return await self._own.GetThresholds(request, context)

    @override
    async def SetThresholds(
        self, request: admin_pb.SetThresholdsRequest, context: _Context
    ) -> admin_pb.SetThresholdsResponse:
        return await self._own.SetThresholds(request, context)

    @override
    async def GetLedger(
        self, request: admin_pb.GetLedgerRequest, context: _Context
    ) -> admin_pb.GetLedgerResponse:
        """One entry for each process."""
        whole = await self._own.GetLedger(request, context)
        for answer in await self._siblings.ask_all(
            lambda channel: AdminServiceStub(channel).GetLedger(request, timeout=CALL_TIMEOUT_S)
        ):
            whole.processes.extend(answer.processes)
        return whole

    @override
    async def ListWorkers(
        self, request: admin_pb.ListWorkersRequest, context: _Context
    ) -> admin_pb.ListWorkersResponse:
        """Each worker as the process sees it that fares worst with it, with the attempts of all."""
        own = await self._own.ListWorkers(request, context)
        answers = [
            own,
            *await self._siblings.ask_all(
                lambda channel: AdminServiceStub(channel).ListWorkers(
                    request, timeout=CALL_TIMEOUT_S
                )
            ),
        ]
        views: dict[str, list[admin_pb.WorkerInfo]] = {}
        for answer in answers:
            for worker in answer.workers:
                views.setdefault(worker.record.identity.worker_id, []).append(worker)
        whole = admin_pb.ListWorkersResponse()
        for _, seen in sorted(views.items()):
            worker = whole.workers.add()
            worker.CopyFrom(min(seen, key=_fares_well))
            worker.num_attempts = sum(view.num_attempts for view in seen)
        return whole

    @override
    async def DrainFrontend(
        self, request: admin_pb.DrainFrontendRequest, context: _Context
    ) -> AsyncIterator[admin_pb.DrainFrontendResponse]:
        """All drain, and this one stays until the others have nothing left."""
        draining = self._own.draining
        budget_s = budget_of(request, draining.frontend_id)
        self._tell_parent(budget_s)  # First, so that it starts none of them again.
        others: dict[int, admin_pb.DrainFrontendResponse] = {}
        num_told: int | None = None
        self.num_watching += 1
        ends: asyncio.Task[Mapping[int, admin_pb.DrainFrontendResponse]] | None = None
        try:
            draining.tell(drain.Asked(budget_s))
            others.update(await self._siblings.drain(budget_s))
            ends = asyncio.create_task(self._siblings.drain(budget_s, to_the_end=True))
            while not ends.done() and draining.drain.phase is not drain.Phase.STOPPING:
                response = _together(draining.response(), others.values())
                if response.num_requests != num_told:
                    num_told = response.num_requests
                    yield response
                await asyncio.wait({ends}, timeout=DRAIN_LOOK_S)
                if not ends.done():
                    others.update(await self._siblings.drain(budget_s))
            for other in others.values():
                other.num_requests = 0
            if ends.done():
                others.update(ends.result())
        finally:
            if ends is not None:
                ends.cancel()
            self.num_watching -= 1
            draining.look()
        async for own in draining.progress(context):
            yield _together(own, others.values())


def _together(
    own: admin_pb.DrainFrontendResponse, others: Iterable[admin_pb.DrainFrontendResponse]
) -> admin_pb.DrainFrontendResponse:
    whole = admin_pb.DrainFrontendResponse()
    whole.CopyFrom(own)
    for other in others:
        whole.num_requests += other.num_requests
        whole.num_finished += other.num_finished
        whole.num_moved += other.num_moved
        whole.num_left += other.num_left
        whole.num_cut += other.num_cut
    return whole


def _fares_well(worker: admin_pb.WorkerInfo) -> tuple[bool, bool]:
    return worker.link == admin_pb.LINK_STATE_UP, not worker.detail


def _is_running(stream: pb.StreamInfo) -> bool:
    return any(choice.state != pb.STREAM_STATE_DONE for choice in stream.choices)


async def _ask_for(channel: grpc.aio.Channel, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
    """Empty if the process does not know the request."""
    try:
        return await InferenceServiceStub(channel).GetStream(request, timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if status.from_rpc_error(error).reason is Reason.STREAM_NOT_FOUND:
            return pb.GetStreamResponse()
        raise
