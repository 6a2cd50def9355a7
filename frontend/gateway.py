"""InferenceService: what clients call.

A `Generate` call waits on one event, whatever number of choices it has. Each time it wakes it sends
all that is new in one message per choice, so a client that reads slowly gets fewer and larger
messages; what it has not been sent yet is bounded by the window of its worker.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final, NoReturn, cast

import grpc.aio
from typing_extensions import override

from frontend import admission, summaries
from frontend.admission import Admitted, Envelope, Model
from frontend.dispatch import Dispatcher
from frontend.mesh_view import MeshView
from frontend.requests import Request, Requests
from frontend.stream import Limits
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationPolicy, FailureKind
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as pb_grpc

REQUEST_ID_KEY: Final = "unbroken-request-id"
CLASS_KEY: Final = "unbroken-continuation-class"
"""Initial metadata of `Generate`."""

LONG_TEXT_BYTES: Final = 64 * 1024
"""Longer texts are tokenised in a thread: it takes about 1 ms per 10 KB."""

_RESUME_TOKEN_BYTES: Final = 32

_Context = grpc.aio.ServicerContext[Any, Any]
_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What requests get that do not say."""

    stream: Limits
    policy: ContinuationPolicy = ContinuationPolicy.PREFER_EXACT
    deadline_margin_s: float = 0.02
    """So long before the client's deadline a stream ends, so that the client still hears why."""


class Gateway(pb_grpc.InferenceServiceServicer):
    """The service."""

    def __init__(
        self,
        frontend_id: str,
        mesh: MeshView,
        dispatcher: Dispatcher,
        requests: Requests,
        limits: GatewayLimits,
        *,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frontend_id = frontend_id
        self._mesh = mesh
        self._dispatcher = dispatcher
        self._metrics = dispatcher.metrics
        self._requests = requests
        self._limits = limits
        self._random = random
        self._clock = clock
        self._changed = asyncio.Event()
        """Set, and replaced, whenever what models there are may have changed."""
        self._is_draining = False
        mesh.on_change.append(self._mesh_changed)

    def drain(self) -> None:
        """Take no new requests, nor those that wait for a model to be served."""
        self._is_draining = True
        self._mesh_changed()

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        arrived_at = self._clock()
        remaining_s = cast("float | None", context.time_remaining())  # The stubs forget None.
        deadline_at = (
            None
            if remaining_s is None
            else arrived_at + remaining_s - min(self._limits.deadline_margin_s, remaining_s / 2)
        )
        try:
            admitted = await self._admit(request, arrived_at, deadline_at)
            running = self._begin(admitted, deadline_at)
        except UnbrokenError as error:
            self._metrics.requests_refused.labels(error.reason.value).inc()
            raise
        is_first = True
        try:
            await context.send_initial_metadata(
                (
                    (REQUEST_ID_KEY, running.request_id),
                    (CLASS_KEY, admitted.continuation_class.name),
                )
            )
            yield self._started(admitted)
            running.begin()
            while True:
                running.wake.clear()
                running.fail_together()
                is_done = running.is_done  # Whether what follows is all there is.
                for choice in running.choices:
                    if not choice.stream.has_output:
                        continue
                    if is_first:
                        is_first = False
                        self._metrics.ttft_s.observe(self._clock() - arrived_at)
                    piece, commands = choice.stream.take()
                    for message in summaries.messages(choice.index, piece):
                        yield message
                    self._metrics.tokens_delivered.inc(len(piece.token_ids))
                    choice.obey(commands)  # Windows move when tokens have left.
                    running.has_sent(choice)
                if is_done:
                    break
                await running.wake.wait()
            yield pb.GenerateResponse(finished=running.finished())
        finally:
            running.close()
            self._requests.remove(running)
            self._account(running)
        if running.error is not None:
            raise _raisable(running.error)

    @override
    async def Resume(
        self, request: pb.ResumeRequest, context: _Context
    ) -> AsyncIterator[pb.ResumeResponse]:
        raise UnbrokenError(
            Reason.NOT_IMPLEMENTED, "this version does not resume streams on another frontend"
        )
        yield pb.ResumeResponse()  # Makes it a generator, as the contract has it.

    @override
    async def Cancel(self, request: pb.CancelRequest, context: _Context) -> pb.CancelResponse:
        if not request.request_id:
            _refuse_empty_id(request.request_id)
        was_running = self._requests.cancel(request.request_id, soft=request.soft)
        return pb.CancelResponse(was_running=was_running)

    @override
    async def GetStream(
        self, request: pb.GetStreamRequest, context: _Context
    ) -> pb.GetStreamResponse:
        if not request.request_id:
            _refuse_empty_id(request.request_id)
        return pb.GetStreamResponse(stream=self._requests.get(request.request_id))

    @override
    async def ListStreams(
        self, request: pb.ListStreamsRequest, context: _Context
    ) -> pb.ListStreamsResponse:
        streams, next_page_token = self._requests.page(request.page_size, request.page_token)
        return pb.ListStreamsResponse(streams=streams, next_page_token=next_page_token)

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: _Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[self._model_info(name) for name in self._mesh.model_names()]
        )

    # Admission.

    async def _admit(
        self, request: pb.GenerateRequest, arrived_at: float, deadline_at: float | None
    ) -> Admitted:
        self._check_open()
        envelope = admission.open_envelope(
            request,
            new_request_id=lambda: uuid.uuid4().hex,
            migrations_max=self._limits.stream.migrations_max,
            policy=self._limits.policy,
        )
        self._requests.check_room(envelope)
        model = await self._wait_for_model(envelope, arrived_at, deadline_at)
        if admission.num_text_bytes(request) > LONG_TEXT_BYTES:
            return await asyncio.to_thread(admission.admit, request, envelope, model, self._random)
        return admission.admit(request, envelope, model, self._random)

    async def _wait_for_model(
        self, envelope: Envelope, arrived_at: float, deadline_at: float | None
    ) -> Model:
        """The model asked for; waits for the first worker of one that is only announced."""
        give_up_at = arrived_at + self._limits.stream.placement_timeout_s
        if deadline_at is not None:
            give_up_at = min(give_up_at, deadline_at)
        while True:
            self._check_open()
            changed = self._changed
            name = admission.choose_model(envelope.model, self._mesh.model_names())
            if name is not None and (model := self._mesh.model(name)) is not None:
                return model
            try:
                async with asyncio.timeout(max(0.0, give_up_at - self._clock())):
                    await changed.wait()
            except TimeoutError:
                raise UnbrokenError(
                    Reason.NO_WORKER,
                    f"no worker has served {name or 'any model'} yet, "
                    f"for {self._clock() - arrived_at:.1f} s",
                    retry_after_s=1.0,
                ) from None

    def _check_open(self) -> None:
        if self._is_draining:
            raise UnbrokenError(Reason.DRAINING, "this frontend takes no new requests")

    def _mesh_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _begin(self, admitted: Admitted, deadline_at: float | None) -> Request:
        stream_limits = self._limits.stream
        limits = Limits(
            migrations_max=admitted.envelope.migrations_max,
            window_tokens=stream_limits.window_tokens,
            placement_timeout_s=stream_limits.placement_timeout_s,
            regenerate_tokens_max=stream_limits.regenerate_tokens_max,
        )
        self._check_open()  # It may have waited for a model, or for a thread to tokenise.
        self._requests.check_room(admitted.envelope)
        running = Request(admitted, self._dispatcher, limits, deadline_at=deadline_at)
        self._requests.add(running)
        self._metrics.requests_started.inc()
        return running

    # Output.

    def _started(self, admitted: Admitted) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            started=pb.StreamStarted(
                request_id=admitted.envelope.request_id,
                model=admitted.model.name,
                continuation_class=summaries.way(admitted.continuation_class),
                continuation_detail=admitted.continuation_detail,
                # Opaque and unguessable, as `Resume` will want it; until that is served, nothing
                # is kept of it. Never logged.
                resume_token=secrets.token_bytes(_RESUME_TOKEN_BYTES),
                num_prompt_tokens=admitted.num_prompt_tokens,
                seed=admitted.seed,
                migrations_max=admitted.envelope.migrations_max,
                frontend_id=self._frontend_id,
            )
        )

    def _account(self, running: Request) -> None:
        error = running.error
        reason = "OK" if error is None else error.reason.value
        self._metrics.requests_finished.labels(reason).inc()
        for choice in running.choices:
            stream = choice.stream
            self._metrics.recomputed("prefill", stream.accounts.recomputed_prefill_tokens)
            self._metrics.recomputed("decode", stream.accounts.recomputed_decode_tokens)
            for attempt in stream.attempts:
                if attempt.gap_s is not None:
                    self._metrics.gap_s.observe(attempt.gap_s)
        losses = [
            attempt.failure
            for choice in running.choices
            for attempt in choice.stream.attempts
            if attempt.failure is not FailureKind.UNSPECIFIED
        ]
        if losses or error is not None:
            _log.info(
                "request ended after failures",
                request_id=running.request_id,
                reason=reason,
                failures=[failure.name for failure in losses],
            )

    # Models.

    def _model_info(self, name: str) -> pb.ModelInfo:
        info = pb.ModelInfo(
            model=name,
            num_workers_ready=self._mesh.num_ready(name),
            num_workers=self._mesh.num_workers(name),
        )
        model = self._mesh.model(name)
        if model is not None:
            info.context_length = model.context_length
            info.tokenizer_fingerprint = model.tokenizer_fingerprint
            info.has_chat_template = bool(model.tokenizer.asset.chat_template)
        return info


def _raisable(error: UnbrokenError) -> UnbrokenError:
    """A copy: one error can end several choices and requests, and each call raises its own."""
    return UnbrokenError(
        error.reason, error.detail, metadata=error.metadata, retry_after_s=error.retry_after_s
    )


def _refuse_empty_id(request_id: str) -> NoReturn:
    raise admission.InvalidField("request_id", "the id of a request", request_id)
