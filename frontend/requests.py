"""The requests of this frontend: those that run, and for a while those that have ended."""

import asyncio
import base64
import binascii
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from frontend import stream as machine
from frontend import summaries
from frontend.admission import Admitted, Envelope
from frontend.dispatch import Choice, Dispatcher
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.v1 import generation_pb2
from unbroken.v1 import inference_service_pb2 as pb

ENDED_MAX: Final = 1000
"""Requests that are remembered after their end,"""
ENDED_S_MAX: Final = 60.0
"""for so long."""
PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000
SOFT_CANCEL_S_MAX: Final = 1.0
"""How long a soft cancel waits for the engine's step."""


class Request:
    """One request that runs: its choices, and what ends them together."""

    def __init__(
        self,
        admitted: Admitted,
        dispatcher: Dispatcher,
        limits: machine.Limits,
        *,
        deadline_at: float | None,
    ) -> None:
        """`deadline_at` is the client's, monotonic seconds."""
        envelope = admitted.envelope
        self.admitted = admitted
        self.wake = asyncio.Event()
        """Set when a choice has output or is done."""
        self.sequence = 0
        """Place in the order of admission; set by `Requests.add`."""
        self._admitted_at_ns = time.time_ns()
        self._is_cancelled_softly = False
        self._timers: list[asyncio.TimerHandle] = []
        self.choices = tuple(
            Choice(
                machine.Stream(
                    checkpoint, admitted.model.tokenizer, policy=envelope.policy, limits=limits
                ),
                index,
                dispatcher=dispatcher,
                envelope=envelope,
                model=admitted.model,
                wake=self.wake,
                deadline_at=deadline_at,
            )
            for index, checkpoint in enumerate(admitted.checkpoints)
        )
        if deadline_at is not None:
            error = UnbrokenError(Reason.DEADLINE_EXCEEDED, "the client's time is up")
            self._end_at(deadline_at - dispatcher.clock(), error)

    @property
    def request_id(self) -> str:
        return self.admitted.envelope.request_id

    @property
    def key(self) -> tuple[str, str]:
        """Tenant and request id: what makes it this request."""
        return self.admitted.envelope.tenant, self.admitted.envelope.request_id

    @property
    def parent_key(self) -> tuple[str, str]:
        """The key of the request with which it is cancelled."""
        return self.admitted.envelope.tenant, self.admitted.envelope.parent_request_id

    @property
    def is_done(self) -> bool:
        """Whether every choice is."""
        return all(choice.stream.state is machine.State.DONE for choice in self.choices)

    @property
    def error(self) -> UnbrokenError | None:
        """Why the request failed: the error of the choice that failed by itself, if one did."""
        errors = [
            outcome.error
            for choice in self.choices
            if (outcome := choice.stream.outcome) is not None and outcome.error is not None
        ]
        own = [error for error in errors if not isinstance(error, _OtherChoiceFailed)]
        return next(iter(own), None)

    def begin(self) -> None:
        """Let the choices look for workers."""
        for choice in self.choices:
            choice.begin()

    def cancel(self, error: UnbrokenError) -> None:
        """End all choices now. What is in the ledgers is still delivered."""
        for choice in self.choices:
            choice.obey(choice.stream.cancelled(error))

    def cancel_softly(self, error: UnbrokenError) -> None:
        """End each choice after its next output, and all soon."""
        if not self._is_cancelled_softly:
            self._is_cancelled_softly = True
            self._end_at(SOFT_CANCEL_S_MAX, error)
        for choice in self.choices:
            if choice.stream.state is not machine.State.RUNNING:
                choice.obey(choice.stream.cancelled(error))

    def has_sent(self, choice: Choice) -> None:
        """Output of the choice went to the client."""
        if self._is_cancelled_softly:
            error = UnbrokenError(Reason.CANCELLED, "cancelled by request")
            choice.obey(choice.stream.cancelled(error))

    def fail_together(self) -> None:
        """If one choice failed, the others end too."""
        error = self.error
        if error is not None and not self.is_done:
            failed = _OtherChoiceFailed(Reason.CANCELLED, f"another choice failed: {error.detail}")
            self.cancel(failed)

    def close(self) -> None:
        """Whatever still runs ends; nobody will read it."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self.cancel(UnbrokenError(Reason.CANCELLED, "the client left"))

    def info(self) -> pb.StreamInfo:
        """Where it stands."""
        info = pb.StreamInfo(
            request_id=self.request_id,
            model=self.admitted.model.name,
            continuation_class=summaries.way(self.admitted.continuation_class),
            num_prompt_tokens=self.admitted.num_prompt_tokens,
            choices=[
                summaries.choice(one.index, one.stream, one.waiting_detail) for one in self.choices
            ],
            attempts=self._attempts(),
        )
        info.admitted_at.FromNanoseconds(self._admitted_at_ns)
        return info

    def finished(self) -> pb.StreamFinished:
        """The last word to the client."""
        accounts = [choice.stream.accounts for choice in self.choices]
        return pb.StreamFinished(
            choices=[summaries.result(one.index, one.stream) for one in self.choices],
            usage=generation_pb2.Usage(
                prompt_tokens=self.admitted.num_prompt_tokens,
                completion_tokens=sum(len(choice.stream.ledger) for choice in self.choices),
                recomputed_prefill_tokens=sum(one.recomputed_prefill_tokens for one in accounts),
                recomputed_decode_tokens=sum(one.recomputed_decode_tokens for one in accounts),
                cached_prompt_tokens=accounts[0].cached_prompt_tokens,
            ),
            attempts=self._attempts(),
        )

    def _attempts(self) -> Sequence[pb.AttemptSummary]:
        return [
            summaries.attempt(choice.index, attempt)
            for choice in self.choices
            for attempt in choice.stream.attempts
        ]

    def _end_at(self, delay_s: float, error: UnbrokenError) -> None:
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(max(0.0, delay_s), self.cancel, error))


class _OtherChoiceFailed(UnbrokenError):  # noqa: N818 - it names what happened.
    """The request failed by another choice than this."""


class Requests:
    """All requests, by id."""

    def __init__(self, *, running_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._running_max = running_max
        self._clock = clock
        self._running: dict[tuple[str, str], Request] = {}
        """By tenant and request id."""
        self._ended: OrderedDict[int, tuple[float, pb.StreamInfo]] = OrderedDict()
        """By place in the order of admission, in the order of their ends."""
        self._sequences = itertools.count(1)
        self._empty = asyncio.Event()
        """Set while nothing runs."""
        self._empty.set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check_room(self, envelope: Envelope) -> None:
        """Raises REQUEST_EXISTS or OVERLOADED if such a request cannot be added now."""
        if (envelope.tenant, envelope.request_id) in self._running:
            raise UnbrokenError(
                Reason.REQUEST_EXISTS,
                f"request {envelope.request_id} is running",
                metadata={"request_id": envelope.request_id},
            )
        if len(self._running) >= self._running_max:
            raise UnbrokenError(
                Reason.OVERLOADED,
                f"{len(self._running)} requests run, which is the limit of this frontend",
                retry_after_s=1.0,
            )

    def add(self, request: Request) -> None:
        """A request was admitted; raises as `check_room`."""
        self.check_room(request.admitted.envelope)
        request.sequence = next(self._sequences)
        self._running[request.key] = request
        self._empty.clear()

    def remove(self, request: Request) -> None:
        """A request ended; it stays known for a while."""
        del self._running[request.key]
        self._ended[request.sequence] = (self._clock(), request.info())
        self._prune()
        if not self._running:
            self._empty.set()

    async def until_none(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False if something still does after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def cancel(self, request_id: str, *, soft: bool) -> bool:
        """Cancel the requests of that name and those below them; whether any was running."""
        doomed = [
            one
            for one in self._running.values()
            if request_id in (one.request_id, one.admitted.envelope.parent_request_id)
        ]
        parents = {one.key for one in doomed}
        while parents:
            children = [
                one
                for one in self._running.values()
                if one.parent_key in parents and one not in doomed
            ]
            doomed += children
            parents = {one.key for one in children}
        error = UnbrokenError(Reason.CANCELLED, "cancelled by request")
        for request in doomed:
            if soft:
                request.cancel_softly(error)
            else:
                request.cancel(error)
        return bool(doomed)

    def cancel_all(self, error: UnbrokenError) -> None:
        """End everything that runs."""
        for request in list(self._running.values()):
            request.cancel(error)

    def get(self, request_id: str) -> pb.StreamInfo:
        """The newest request of that name; raises STREAM_NOT_FOUND."""
        self._prune()
        for running in reversed(self._running.values()):
            if running.request_id == request_id:
                return running.info()
        for _, info in reversed(self._ended.values()):
            if info.request_id == request_id:
                return info
        raise UnbrokenError(
            Reason.STREAM_NOT_FOUND,
            f"no request {request_id!r} here, or it ended over {ENDED_S_MAX:g} s ago",
            metadata={"request_id": request_id[:128]},
        )

    def page(self, page_size: int, page_token: str) -> tuple[Sequence[pb.StreamInfo], str]:
        """Requests, oldest first, and the token of the next page; raises `InvalidField`."""
        if page_size > PAGE_SIZE_MAX:
            raise InvalidField("page_size", f"0 to {PAGE_SIZE_MAX}", page_size)
        page_size = page_size or PAGE_SIZE_DEFAULT
        after = _read_token(page_token) if page_token else 0
        self._prune()
        entries: Iterator[tuple[int, Request | pb.StreamInfo]] = itertools.chain(
            ((sequence, info) for sequence, (_, info) in self._ended.items()),
            ((request.sequence, request) for request in self._running.values()),
        )
        rest = (entry for entry in entries if entry[0] > after)
        found = heapq.nsmallest(page_size + 1, rest, key=lambda entry: entry[0])
        page = found[:page_size]
        streams = [one.info() if isinstance(one, Request) else one for _, one in page]
        return streams, _write_token(page[-1][0]) if len(found) > page_size else ""

    def _prune(self) -> None:
        horizon = self._clock() - ENDED_S_MAX
        while self._ended:
            sequence, (ended_at, _) = next(iter(self._ended.items()))
            if ended_at >= horizon and len(self._ended) <= ENDED_MAX:
                return
            del self._ended[sequence]


def _write_token(sequence: int) -> str:
    """Opaque to callers: the place after which the next page begins."""
    return base64.urlsafe_b64encode(f"v1:{sequence}".encode()).decode()


def _read_token(token: str) -> int:
    try:
        version, _, sequence = base64.b64decode(token, altchars=b"-_", validate=True).partition(
            b":"
        )
        if version != b"v1":
            raise ValueError(version)
        return int(sequence)
    except (binascii.Error, ValueError) as error:
        raise InvalidField("page_token", "a next_page_token of ListStreams", token) from error
