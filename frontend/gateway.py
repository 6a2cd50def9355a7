"""What InferenceService does, whichever edge the call came through (`grpcio_edge`, `edge`).

`Generate` and `Resume` lead to a request, a new one or one that is here, and then read it
(`reading`). What `Resume` believes and what it checks is told in docs/decisions/resume.md.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from random import Random
from typing import Final, Protocol

from frontend import admission
from frontend.admission import ID_CHARS_MAX, Admitted, Decided, Envelope, Model
from frontend.admission_queue import Arrival
from frontend.dispatch import Dispatcher
from frontend.lineage import Key
from frontend.mesh_view import MeshView
from frontend.processes.claims import Elsewhere
from frontend.reading import Reader, Readers, Reading
from frontend.requests import Entrant, Request, Requests
from frontend.resume_token import (
    Keyring,
    check_bound,
    ids_digest,
    past,
    request_digest,
    unseal,
)
from frontend.stream import Limits, Mismatch, Past, first_epoch
from unbroken.deadlines import left_for_next_hop
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.outcome import ContinuationPolicy
from unbroken.v1 import inference_service_pb2 as pb

CANCELLED_TOLD_MAX: Final = 1000
"""Of so many requests the answer to a cancel tells the names."""
LONG_TEXT_BYTES: Final = 64 * 1024
"""Longer texts are tokenised in a thread: it takes about 1 ms per 10 KB."""


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What requests get that do not say."""

    stream: Limits
    policy: ContinuationPolicy = ContinuationPolicy.PREFER_EXACT
    deadline_margin_s: float = 0.02
    """So long before the client's deadline a stream ends, so that the client still hears why."""
    resume_token_lifetime_s: float = 3600.0


class Inference(Protocol):
    """What edges serve: a `Gateway`, or several processes as one (`processes.whole`)."""

    async def generate(
        self, request: pb.GenerateRequest, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Reading: ...

    async def resume(
        self, request: pb.ResumeRequest, remaining_s: float | None, on_news: Callable[[], None]
    ) -> Reading: ...

    async def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse: ...

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse: ...

    async def list_streams(self, request: pb.ListStreamsRequest) -> pb.ListStreamsResponse: ...

    def list_models(self) -> pb.ListModelsResponse: ...


class Gateway:
    """The service."""

    def __init__(
        self,
        frontend_id: str,
        mesh: MeshView,
        dispatcher: Dispatcher,
        requests: Requests,
        limits: GatewayLimits,
        *,
        keys: Callable[[], Keyring],
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        """`keys` are those that resume tokens are signed with, whenever they are asked for."""
        self._mesh = mesh
        self._dispatcher = dispatcher
        self._metrics = dispatcher.metrics
        self._requests = requests
        self._limits = limits
        self._random = random
        self._clock = clock
        self._keys = keys
        self._time_of_day = time_of_day
        self.readers = Readers(
            frontend_id,
            requests,
            dispatcher.metrics,
            keys,
            token_lifetime_s=limits.resume_token_lifetime_s,
            clock=clock,
            time_of_day=time_of_day,
        )
        """Calls that read requests here."""
        self._changed = asyncio.Event()
        """Set, and replaced, whenever what models there are may have changed."""
        self._is_draining = False
        self._turnstile = asyncio.Lock()
        mesh.on_change.append(self._mesh_changed)

    async def close(self) -> None:
        """Keep no request for readers that may come back."""
        await self.readers.close()

    def drain(self) -> None:
        """Take no new requests, nor those that wait for a model to be served."""
        self._is_draining = True
        self._mesh_changed()

    async def generate(
        self,
        request: pb.GenerateRequest,
        remaining_s: float | None,
        on_news: Callable[[], None],
    ) -> Reader:
        """Admit a request. The client waits for so long; `on_news` says when to poll.

        Whoever has the reader MUST close it. Raises `UnbrokenError`, and `Elsewhere` if another
        process of this frontend has the request.
        """
        arrived_at, deadline_at = self._times(remaining_s)
        await self._turn()
        try:
            running = await self._admit(request, arrived_at, deadline_at)
        except Elsewhere:
            raise
        except UnbrokenError as error:
            self._metrics.request_refused(error.reason, self._clock())
            raise
        return self.readers.open(running, arrived_at=arrived_at, on_news=on_news)

    async def resume(
        self,
        request: pb.ResumeRequest,
        remaining_s: float | None,
        on_news: Callable[[], None],
    ) -> Reader:
        """As `generate`, for a stream that lost its frontend or its connection."""
        arrived_at, deadline_at = self._times(remaining_s)
        await self._turn()
        try:
            running = await self._resume(request, arrived_at, deadline_at)
        except Elsewhere:
            raise
        except UnbrokenError as error:
            self._metrics.request_refused(error.reason, self._clock())
            raise
        return self.readers.open(running, arrived_at=arrived_at, on_news=on_news)

    async def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        """Raises `InvalidField`."""
        check_name(request.request_id, request.tenant)
        found = self.cancel_here(request)
        self.cancel_orphans(request, found)
        return cancelled(found)

    def cancel_here(self, request: pb.CancelRequest) -> Sequence[Key]:
        """Cancel what is in this process; returns tenants and ids of those that ran."""
        return self._requests.cancel(request.request_id, tenant=request.tenant, soft=request.soft)

    def cancel_orphans(self, request: pb.CancelRequest, found: Iterable[Key]) -> None:
        """If the request was not among what was found, its frontend may have died: no worker is
        to go on with it.
        """
        if all(request_id != request.request_id for _, request_id in found):
            self._dispatcher.links.cancel(request.request_id, request.tenant)

    def cancel_below(self, parents: Set[Key], *, soft: bool) -> Sequence[Key]:
        """As `cancel_here`, for what is below requests of other processes."""
        return self._requests.cancel_below(parents, soft=soft)

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        """Raises `UnbrokenError`."""
        check_name(request.request_id, request.tenant)
        stream = self._requests.get(request.request_id, tenant=request.tenant)
        return pb.GetStreamResponse(stream=stream)

    async def list_streams(self, request: pb.ListStreamsRequest) -> pb.ListStreamsResponse:
        """Raises `UnbrokenError`."""
        streams, next_page_token = self._requests.page(request.page_size, request.page_token)
        return pb.ListStreamsResponse(streams=streams, next_page_token=next_page_token)

    def list_models(self) -> pb.ListModelsResponse:
        """What workers serve now, or served before."""
        return pb.ListModelsResponse(
            models=[self._model_info(name) for name in self._mesh.model_names()]
        )

    # Admission.

    async def _turn(self) -> None:
        """Let calls in one at a time, and whatever else is due in between.

        When a frontend dies, hundreds of streams arrive at another in one moment, and each takes
        about a millisecond. Heartbeats and tokens must not wait for all of them.
        """
        async with self._turnstile:
            await asyncio.sleep(0)

    async def _admit(
        self, request: pb.GenerateRequest, arrived_at: float, deadline_at: float | None
    ) -> Request:
        """A new request, or the equal one that is here already."""
        self._check_open()
        envelope = admission.open_envelope(
            request,
            new_request_id=lambda: uuid.uuid4().hex,
            migrations_max=self._limits.stream.migrations_max,
            policy=self._limits.policy,
        )
        digest = request_digest(request, envelope.request_id)
        positions = [pb.ResumePosition()] * envelope.num_choices
        if (joined := self._join(envelope, digest, positions, deadline_at)) is not None:
            return joined
        self._requests.check_room()
        with self._requests.entering(envelope, arrived_at) as entrant:
            model = await self._wait_for_model(envelope, entrant, deadline_at)
            # Before anything is tokenised: a refusal must not take the capacity that it protects.
            overload = self._dispatcher.reason_to_refuse(
                Arrival(
                    model=model.name,
                    tenant=envelope.tenant,
                    request_id=request.request_id,
                    priority=envelope.priority,
                    num_tokens=admission.num_prompt_tokens_about(request) * envelope.num_choices,
                    deadline=arrived_at + self._limits.stream.placement_timeout_s
                    if deadline_at is None
                    else deadline_at,
                )
            )
            if overload is not None:
                raise overload
            if admission.num_text_bytes(request) > LONG_TEXT_BYTES:
                admitted = await asyncio.to_thread(
                    admission.admit, request, envelope, model, self._random
                )
            else:
                admitted = admission.admit(request, envelope, model, self._random)
            late = self._dispatcher.reason_to_give_up(admitted, deadline_at)
            if late is not None:
                raise late
            # It may have waited for a model, or for a thread to tokenise.
            if (joined := self._join(envelope, digest, positions, deadline_at)) is not None:
                return joined
            return self._begin(admitted, entrant, deadline_at, digest=digest)

    async def _resume(
        self, message: pb.ResumeRequest, arrived_at: float, deadline_at: float | None
    ) -> Request:
        """A request that another frontend had, or one that is here and lost its reader."""
        self._check_open()
        request = message.request
        claims = unseal(message.resume_token, self._keys(), now=self._time_of_day())
        check_bound(claims, request)
        resolved = claims.resolved
        positions = _positions(message.positions, len(claims.choices))
        envelope = admission.open_envelope(
            request,
            new_request_id=lambda: resolved.request_id,
            migrations_max=resolved.migrations_max,
            policy=resolved.policy,
        )
        envelope = replace(envelope, model=resolved.model)
        decided = Decided(
            prompt_is_same=lambda ids: ids_digest(ids) == resolved.prompt_digest,
            tokenizer_fingerprint=resolved.tokenizer_fingerprint,
            seed=resolved.seed,
            max_tokens=resolved.max_tokens,
        )
        digest = resolved.request_digest
        if (joined := self._join(envelope, digest, positions, deadline_at)) is not None:
            return joined
        self._requests.check_room()
        with self._requests.entering(envelope, arrived_at, is_resumed=True) as entrant:
            model = await self._wait_for_model(envelope, entrant, deadline_at, is_known=True)
            _check_ids(positions, model.tokenizer.asset.vocab_size)
            if admission.num_text_bytes(request) > LONG_TEXT_BYTES:
                admitted = await asyncio.to_thread(
                    admission.admit_again, request, envelope, model, decided
                )
            else:
                admitted = admission.admit_again(request, envelope, model, decided)
            if (joined := self._join(envelope, digest, positions, deadline_at)) is not None:
                return joined
            pasts = [past(claim, at) for claim, at in zip(claims.choices, positions, strict=True)]
            running = self._begin(
                admitted, entrant, deadline_at, digest=digest, above=claims.epoch, pasts=pasts
            )
        self._metrics.requests_resumed.labels("taken").inc()
        return running

    def _join(
        self,
        envelope: Envelope,
        digest: bytes,
        positions: Sequence[pb.ResumePosition],
        deadline_at: float | None,
    ) -> Request | None:
        """The equal request that is here, about to tell what lies after these positions."""
        found = self._requests.find(envelope, digest)
        if found is None:
            return None
        if not found.can_rewind(positions):
            self.readers.drop(found)
            return None
        try:
            found.rewind(positions, deadline_at=deadline_at)
        except Mismatch as mismatch:
            raise _resume_mismatch(mismatch) from mismatch
        self._metrics.requests_resumed.labels("joined").inc()
        return found

    async def _wait_for_model(
        self,
        envelope: Envelope,
        entrant: Entrant,
        deadline_at: float | None,
        *,
        is_known: bool = False,
    ) -> Model:
        """The model asked for; waits for the first worker of one that is only announced.

        `is_known`: there is such a model, although nobody may have announced it here yet.
        """
        on_change = entrant.context.on_change
        on_change.append(self._mesh_changed)  # Whoever is cancelled looks up too.
        try:
            return await self._wait(envelope, entrant, deadline_at, is_known=is_known)
        finally:
            on_change.remove(self._mesh_changed)

    async def _wait(
        self, envelope: Envelope, entrant: Entrant, deadline_at: float | None, *, is_known: bool
    ) -> Model:
        arrived_at = entrant.arrived_at
        give_up_at = arrived_at + self._limits.stream.placement_timeout_s
        if deadline_at is not None:
            give_up_at = min(give_up_at, deadline_at)
        while True:
            self._check_open()
            entrant.check()
            changed = self._changed
            name: str | None = envelope.model
            if not is_known:
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

    def _begin(
        self,
        admitted: Admitted,
        entrant: Entrant,
        deadline_at: float | None,
        *,
        digest: bytes,
        above: int = 0,
        pasts: Sequence[Past] | None = None,
    ) -> Request:
        """The request is ours from now on, under epochs above that of the owner before."""
        self._check_open()
        entrant.check()
        self._requests.check_room()
        self._dispatcher.quarantine.refuse(admitted.envelope.tenant, admitted.checkpoints[0])
        limits = replace(self._limits.stream, migrations_max=admitted.envelope.migrations_max)
        taken_ms = int(self._time_of_day() * 1000)
        try:
            running = Request(
                admitted,
                self._dispatcher,
                limits,
                digest=digest,
                epoch=first_epoch(taken_ms, above=above),
                taken_ms=taken_ms,
                deadline_at=deadline_at,
                member=entrant.member,
                pasts=pasts,
            )
        except Mismatch as mismatch:
            raise _resume_mismatch(mismatch) from mismatch
        try:
            self._requests.add(running)
        except UnbrokenError:
            running.discard()
            raise
        entrant.is_admitted = True
        self._metrics.requests_started.inc()
        return running

    def _times(self, remaining_s: float | None) -> tuple[float, float | None]:
        """When a call came, and when its output has to end."""
        arrived_at = self._clock()
        if remaining_s is None:
            return arrived_at, None
        left_s = left_for_next_hop(remaining_s, self._limits.deadline_margin_s)
        return arrived_at, arrived_at + left_s

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


def _positions(given: Sequence[pb.ResumePosition], num_choices: int) -> Sequence[pb.ResumePosition]:
    """One per choice."""
    by_choice = {one.choice_index: one for one in given}
    if len(by_choice) < len(given) or any(index >= num_choices for index in by_choice):
        raise InvalidField(
            "positions",
            f"at most one per choice, of {num_choices}",
            [one.choice_index for one in given],
        )
    return [by_choice.get(index, pb.ResumePosition()) for index in range(num_choices)]


def _check_ids(positions: Sequence[pb.ResumePosition], vocab_size: int) -> None:
    for position in positions:
        if position.token_ids and max(position.token_ids) >= vocab_size:
            raise InvalidField(
                "positions.token_ids", f"ids below {vocab_size}", max(position.token_ids)
            )


def _resume_mismatch(mismatch: Mismatch) -> UnbrokenError:
    return UnbrokenError(Reason.RESUME_MISMATCH, f"{mismatch}")


def cancelled(keys: Sequence[Key]) -> pb.CancelResponse:
    """The answer to whoever cancelled these."""
    named = [
        pb.RequestKey(tenant=tenant, request_id=request_id)
        for tenant, request_id in keys[:CANCELLED_TOLD_MAX]
    ]
    return pb.CancelResponse(was_running=bool(keys), cancelled=named)


def check_name(request_id: str, tenant: str) -> None:
    """Raises `InvalidField` for what no request is called; names are remembered."""
    if not 0 < len(request_id) <= ID_CHARS_MAX:
        raise InvalidField("request_id", "the id of a request", request_id[:ID_CHARS_MAX])
    if len(tenant) > ID_CHARS_MAX:
        raise InvalidField("tenant", "the name of a tenant", tenant[:ID_CHARS_MAX])
