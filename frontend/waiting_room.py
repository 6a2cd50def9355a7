"""The shell around `admission_queue`: who has to wait, who is told what, and when it is looked at.

A request comes by twice. Before it is tokenised, `reason_to_refuse` says whether there is any point
in it: a refusal must not take the capacity that it protects. When its first choice wants a worker,
`line_up` has it pass, stand in line, or go. What was let in and refused by a worker comes back in.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frontend.admission_queue import AdmissionQueue, Arrival, QueueLimits, Refusal
from frontend.alarm import Alarm, CallLater, on_this_loop
from frontend.busy import Shedder
from frontend.metrics import FrontendMetrics
from frontend.placement import WorkerView
from frontend.stream import Life
from unbroken.errors import UnbrokenError
from unbroken.v1 import relay_service_pb2 as pb

if TYPE_CHECKING:
    from random import Random

    from frontend.dispatch import Choice


PASSING_MAX = 4
"""Tenants of which one is tried between two news of busy workers."""
TRIED_MAX = 1000
"""Tenants that are remembered to have been tried before others."""


@dataclass(slots=True)
class Standing:
    """Where a request stands with the waiting room."""

    arrival: Arrival
    came_at: float
    num_choices: int = 1
    is_in: bool = False
    """It was let in once."""
    may_pass: bool = False
    """It is tried although all workers are busy: the sidecar decides."""
    has_lost: bool = False
    """It lost a worker that had said nothing of it: it waits again, first of its kind."""
    is_computing: bool = False
    """Its prompt is with a worker, and not computed yet."""


class WaitingRoom:
    """One frontend's."""

    def __init__(
        self,
        limits: QueueLimits,
        random: "Random",
        shedder: Shedder,
        metrics: FrontendMetrics,
        *,
        views_of: Callable[[str], Iterable[WorkerView]],
        highest_paused: Callable[[str], int | None],
        on_expiry: Callable[[], None],
        on_turn: Callable[[], None],
        clock: Callable[[], float],
        call_later: CallLater = on_this_loop,
    ) -> None:
        """`views_of` are the workers of a model that take work; `highest_paused` is the highest
        priority of its streams that are paused; `on_expiry` is called when `expire` has somebody,
        and `on_turn` when it is time to ask for the `next` again.
        """
        self.queue = AdmissionQueue["Choice"](limits, random)
        self._shedder = shedder
        self._metrics = metrics
        self._views_of = views_of
        self._highest_paused = highest_paused
        self._clock = clock
        self._alarm = Alarm(on_expiry, clock, call_later)
        self._deference = Alarm(on_turn, clock, call_later)
        self._computing = Counter[tuple[str, str]]()  # Requests by model and tenant.
        self._has_passed: dict[str, set[str]] = {}
        """By model: tenants, since the last news of workers."""
        self._tried: dict[str, set[str]] = {}
        """By model: tenants of which one was tried before others that have yet to be."""
        self._newly_aside: set[str] = set()
        """Models of which some stand aside since `looked`."""
        self._free: dict[str, set[Life]] = {}
        """By model of which some stand aside: workers that were free, and could take none."""

    # Questions.

    def is_for(self, model: str) -> bool:
        """Whether new work for a model may wait here."""
        return self.queue.is_on and not self._shedder.thresholds_of(model).is_off

    def has_room(self, model: str) -> bool:
        """Whether a worker takes new work now; also if there is none, which is not for here."""
        return not self._shedder.busy(model, self._views_of(model))

    def first_priority(self, model: str) -> int | None:
        """Of whoever has the next turn; None if nobody waits."""
        first = self.queue.first(model)
        standing = first[0].waits_as if first is not None else None
        return standing.arrival.priority if standing is not None else None

    def report(self, model: str) -> pb.QueueReport | None:
        """What other frontends are told of a line; None if there is none."""
        return self.queue.report(model, self._clock()) if model and self.is_for(model) else None

    def _is_below_paused(self, model: str, priority: int | None) -> bool:
        """Whether new work waits for who is paused: of this priority, or else the first in line."""
        paused = self._highest_paused(model)
        if paused is None:
            return False
        priority = self.first_priority(model) if priority is None else priority
        return priority is not None and priority <= paused

    def _has_to_wait(self, arrival: Arrival) -> bool:
        model = arrival.model
        return (
            self.queue.has_line(model)
            or self._is_below_paused(model, arrival.priority)
            or not self.has_room(model)
        )

    def reason_to_refuse(self, arrival: Arrival) -> UnbrokenError | None:
        """Why a request is refused before anything is done for it, if it is; counts it."""
        if not self._has_to_wait(arrival):
            return None
        now = self._clock()
        refusal = self.queue.check(arrival, now, rate_hint=self._rate_hint(arrival.model))
        return None if refusal is None else self._error(arrival.model, refusal)

    # Events.

    def heard(self, model: str, reports: Sequence[pb.QueueReport]) -> None:
        """Other frontends told what stands in their lines."""
        if self.is_for(model):
            self.queue.heard(model, reports, self._clock())

    def line_up(self, choice: "Choice", standing: Standing) -> tuple[UnbrokenError | None, bool]:
        """Whether it is refused, and else whether it may go to a worker at once."""
        arrival, queue, now = standing.arrival, self.queue, self._clock()
        has_to_wait = self._has_to_wait(arrival)
        if standing.is_in:
            if has_to_wait:
                self.come_back(choice, standing)
            return None, not has_to_wait
        if not has_to_wait:
            standing.is_in = True
            queue.let_in(arrival, now)
            return None, True
        rate_hint = self._rate_hint(arrival.model)
        refusal, displaced = queue.offer(choice, arrival, now, rate_hint=rate_hint)
        for other, reason in displaced:
            other.refuse(self._error(arrival.model, reason))
        if refusal is not None:
            return self._error(arrival.model, refusal), False
        self._alarm.set(self.queue.deadline())
        return None, False

    def come_back(self, choice: "Choice", standing: Standing) -> None:
        """It was let in, and no worker took it, or none that lives."""
        standing.may_pass = False
        if self.queue.is_called(choice):
            self.queue.passed_over(choice, self._clock())
            self._newly_aside.add(standing.arrival.model)
        else:
            self.queue.come_back(
                choice,
                standing.arrival,
                self._clock(),
                since=standing.came_at,
                is_first=standing.has_lost,
            )
        self._alarm.set(self.queue.deadline())

    def next(self, is_held: Callable[[str], bool]) -> "Choice | None":
        """Whose turn it is, of a model that has room, and whose new work nobody holds back."""
        for model in self.queue.models():
            if is_held(model):
                continue
            if self._is_below_paused(model, None):
                continue
            now = self._clock()
            if not self.has_room(model):
                self.queue.no_room(model)
                choice = self._next_to_pass(model, now)
            elif (
                may_go_at := self.queue.may_go_at(model, now)
            ) > now and not self._has_few_of_first(model):
                self._deference.set(may_go_at)  # Who has waited longer elsewhere goes before.
                continue
            else:
                self._tried.pop(model, None)
                choice = self.queue.next(model, now)
            if choice is not None:
                return choice
        return None

    def _next_to_pass(self, model: str, now: float) -> "Choice | None":
        """Who is tried although all workers are busy: the first of a tenant that has fewer prompts
        with them than there are, as far as is known here. Sidecars keep their last batch for such.
        With twice as many it was tried six times as often, mostly in vain, and who was told to wait
        waited for longer than he had been told.

        A tenant that has too many there keeps nobody: a flood often has the next turn, and no room.
        Nor does one that was tried in vain: all have been before it is again. But who can only have
        room that is there, and has the next turn, is not overtaken, or others would take it.
        """
        passed = self._has_passed.setdefault(model, set())
        tried = self._tried.setdefault(model, set())
        if len(passed) >= PASSING_MAX:
            return None
        views = list(self._views_of(model))
        batch = max((view.prefill_tokens_max for view in views), default=0)

        def needs_room(choice: "Choice") -> bool:
            standing = choice.waits_as
            if standing is None or standing.num_choices > 1:
                return True  # What a sidecar refuses in part is not to be refused.
            return 0 < batch <= standing.arrival.num_tokens  # It takes more than what is kept.

        def is_able(choice: "Choice", tenant: str) -> bool:
            has_few = self._computing[model, tenant] < len(views)
            return has_few and tenant not in passed and not needs_room(choice)

        first = self.queue.first(model)
        if first is None or needs_room(first[0]):
            return None
        choice = self.queue.next(
            model, now, lambda choice, tenant: tenant not in tried and is_able(choice, tenant)
        )
        if choice is None or len(tried) >= TRIED_MAX:
            tried.clear()
        if choice is None:
            choice = self.queue.next(model, now, is_able)
        standing = choice.waits_as if choice is not None else None
        if standing is not None:
            passed.add(standing.arrival.tenant)
            tried.add(standing.arrival.tenant)
            standing.may_pass = True
        return choice

    def _has_few_of_first(self, model: str) -> bool:
        """Whether whoever has the next turn is of a tenant that has fewer prompts with workers than
        there are, while others wait here too. A flood has waited for long wherever it waits: such a
        tenant defers to none.
        """
        if not self.queue.has_several_tenants(model):
            return False
        first = self.queue.first(model)
        num_workers = sum(1 for _ in self._views_of(model))
        return first is not None and self._computing[model, first[1]] < num_workers

    def changed(self) -> None:
        """There is news of workers."""
        self._has_passed.clear()
        self._newly_aside.clear()
        self._free.clear()
        self.queue.changed()

    def reported(self, view: WorkerView) -> None:
        """A worker told its load. Reports come often, and to try all who stand aside takes some 0.1
        ms for each: they have a turn again when a worker is free that was busy.
        """
        self._has_passed.pop(view.model, None)
        free = self._free.get(view.model)
        if free is not None and view.life not in free and not self._shedder.is_busy(view):
            self.changed()

    def looked(self) -> None:
        """Everybody has had the turns that there are for him."""
        for model in self._newly_aside:
            views = self._views_of(model)
            free = {view.life for view in views if not self._shedder.is_busy(view)}
            # Who stood aside before may not have been tried where there is room by now.
            self._free[model] = self._free.get(model, free) & free
        self._newly_aside.clear()

    def computed(self, standing: Standing | None) -> None:
        """The prompt of a request is computed, or nobody computes it any more."""
        if standing is not None and standing.is_computing:
            standing.is_computing = False
            name = standing.arrival.model, standing.arrival.tenant
            self._computing[name] -= 1
            if not self._computing[name]:
                del self._computing[name]

    def settled(self, choice: "Choice", standing: Standing | None) -> None:
        """It goes to a worker, perhaps having been called."""
        if standing is not None:
            standing.is_in, standing.may_pass = True, False
            standing.is_computing = True
            self._computing[standing.arrival.model, standing.arrival.tenant] += 1
        if self.queue.is_called(choice):
            self._metrics.queue_wait_s.observe(self.queue.settled(choice, self._clock()))

    def remove(self, choice: "Choice") -> None:
        """It wants in no more. Idempotent."""
        self.queue.remove(choice)

    def expire(self) -> None:
        """Send away who has waited for as long as anybody may."""
        for choice, model, refusal in self.queue.expired(self._clock(), self._rate_hint):
            choice.refuse(self._error(model, refusal))
        self._alarm.set(self.queue.deadline())

    def close(self) -> None:
        """Look no more."""
        self._alarm.stop()
        self._deference.stop()

    # Inside.

    def _rate_hint(self, model: str) -> float:
        return self._shedder.prefill_rate(self._views_of(model))

    def _error(self, model: str, refusal: Refusal) -> UnbrokenError:
        """As the client is told, with the thresholds that made it wait."""
        self._metrics.queue_refused.labels(refusal.limit.value).inc()
        busy = self._shedder.busy(model, self._views_of(model))
        error = self._shedder.overloaded(
            model,
            busy,
            refusal.retry_after_s,
            queue_limit=refusal.limit.value,
            detail=refusal.detail,
        )
        for threshold in error.metadata["thresholds"].split(","):
            self._metrics.requests_shed.labels(threshold).inc()
        return error
