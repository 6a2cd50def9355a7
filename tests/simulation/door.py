"""What stands before the workers of a simulated frontend: its waiting room, limits and pauses.

All of them are real; only the glue is ours, as in `frontend.dispatch`. Without thresholds nobody
waits here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, cast

from prometheus_client import CollectorRegistry

from frontend.admission_queue import PROMISE_GRACE_S, Arrival, QueueLimits
from frontend.busy import QUEUE_LIMIT, Shedder
from frontend.metrics import FrontendMetrics
from frontend.pausing import Pausing
from frontend.placement import WorkerView
from frontend.preemption import PreemptionLimits
from frontend.resume_queue import Ticket
from frontend.waiting_room import Standing, WaitingRoom
from tests.simulation.witness import Violation
from tests.support.world import World
from unbroken.errors import UnbrokenError
from unbroken.thresholds import OFF, Thresholds, rank_states
from unbroken.v1 import attempt_pb2, worker_pb2

if TYPE_CHECKING:
    from tests.simulation.frontend import Choice, Frontend

MODEL = "m"
_NOT_KEPT = frozenset({"wait", "early"})
"""Limits for which nobody is sent away who came when he was told."""


class Event(StrEnum):
    """What happens before the workers; each must be seen in some world."""

    WAITED = auto()
    SENT_AWAY = auto()
    CAME_BACK = auto()
    """One that was sent away came when it was told."""
    REFUSED = auto()
    """A worker refused what a frontend had thought to fit."""
    LOST_UNHEARD = auto()
    """A worker died that had said nothing of new work, which waits again."""
    PAUSED = auto()
    PAUSED_AGAIN = auto()
    WENT_ON = auto()
    WAITED_ENOUGH = auto()
    """One went on because it had been paused for as long as anybody may."""
    CANCELLED_IN_LINE = auto()
    CANCELLED_PAUSED = auto()
    CANCELLED_AT_WORK = auto()
    TIME_UP = auto()
    """A deadline passed at work."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What frontends are configured with."""

    thresholds: Thresholds = OFF
    waiting: QueueLimits = field(default_factory=lambda: QueueLimits(requests_max=0))
    preemption: PreemptionLimits = field(default_factory=PreemptionLimits)


class _Timer:
    """A call that is planned in a world."""

    def __init__(self, world: World, wait_s: float, do: Callable[[], None]) -> None:
        self._do: Callable[[], None] | None = do
        world.after(wait_s, self._ring)

    def cancel(self) -> None:
        """Do nothing."""
        self._do = None

    def _ring(self) -> None:
        if self._do is not None:
            self._do()


@cache
def _metrics() -> FrontendMetrics:
    """Of all worlds; nobody reads them."""
    return FrontendMetrics(CollectorRegistry())


class Door:
    """One frontend's."""

    def __init__(self, frontend: "Frontend", rules: Rules, note: Callable[[Event], None]) -> None:
        """`note` is told what happens."""
        world = frontend.world
        self.rules = rules
        self.is_on = not rules.thresholds.is_off
        self.note = note
        self.on_sent_away: Callable[[Choice, UnbrokenError], None] = lambda _, __: None
        """Called for each that is told to come back,"""
        self.on_halt: Callable[[Choice], None] = lambda _: None
        """and for each that is to be paused."""
        self._frontend = frontend
        self._world = world
        self._loads: dict[str, worker_pb2.LoadReport] = {}

        def clock() -> float:
            return world.now

        def call_later(wait_s: float, do: Callable[[], None]) -> _Timer:
            return _Timer(world, wait_s, lambda: None if frontend.is_dead else do())

        self.shedder = Shedder(rules.thresholds, Random(1), prefill_tokens_per_s=1000.0)
        self.room = WaitingRoom(
            rules.waiting,
            Random(1),
            self.shedder,
            _metrics(),
            views_of=lambda _: frontend.views(),
            highest_paused=self._highest_paused,
            on_expiry=self._expire,
            on_turn=frontend.give_turns,
            clock=clock,
            call_later=call_later,
        )
        self.pausing = Pausing(
            rules.preemption,
            self.room,
            self.shedder,
            _metrics(),
            views_of=lambda _: frontend.views(),
            is_held=frontend.queue.holds_new_work,
            on_due=frontend.give_turns,
            clock=clock,
            call_later=call_later,
        )

    # Workers.

    def workers(self, views: Iterable[WorkerView]) -> None:
        """All that are known."""
        views = list(views)
        self.shedder.workers(views)
        self.pausing.workers(view.life for view in views)
        self.room.queue.models_known([MODEL])
        self.room.changed()

    def reported(self, view: WorkerView, load: worker_pb2.LoadReport) -> None:
        """A worker told its load."""
        if not self.is_on:
            return
        worker_id = view.life.worker_id
        if view.ranks and load == self._loads.get(worker_id):
            view.repeated()
        else:
            view.reported(rank_states(load))
        self._loads[worker_id] = load
        self.shedder.reported(view.life, load, self._world.now)
        self.pausing.reported(view.life, load)
        self.room.reported(view)

    def refused(self, view: WorkerView, busy: attempt_pb2.BusyVerdict) -> None:
        """A worker refused new work, and says what it has."""
        self.note(Event.REFUSED)
        self._loads[view.life.worker_id] = busy.load
        view.reported(rank_states(busy.load))
        view.crowded()

    # New work.

    def reason_to_refuse(self, choice: "Choice", deadline: float) -> UnbrokenError | None:
        """Why a request is refused before anything is done for it."""
        return self.room.reason_to_refuse(self._arrival(choice, deadline)) if self.is_on else None

    def standing(self, choice: "Choice", ticket: Ticket) -> Standing | None:
        """Its place in the waiting room; None if it need not wait there."""
        standing = choice.waits_as
        if not (self.is_on and self.room.is_for(MODEL)):
            return None
        if standing is not None and choice.is_unheard:
            self.note(Event.LOST_UNHEARD)
            standing.has_lost, standing.came_at = True, self._world.now
            return standing
        if not choice.is_to_be_refused:
            return None
        if standing is None:
            standing = Standing(self._arrival(choice, ticket.give_up_at), self._world.now)
        return standing

    def line_up(self, choice: "Choice", standing: Standing) -> tuple[UnbrokenError | None, bool]:
        """Whether it is refused, and else whether it may go to a worker at once."""
        error, may_go = self.room.line_up(cast("Any", choice), standing)
        if not may_go:
            if error is None:
                self.note(Event.WAITED)
            self._world.after(0.0, self._frontend.give_turns)
        return error, may_go

    def call_next(self) -> bool:
        """Whether somebody came out of the waiting room."""
        choice = cast("Any", self.room.next(self._frontend.queue.holds_new_work))
        if choice is None:
            return False
        self._check_let_in(choice)
        choice.called()
        return True

    def is_refused_at(self, choice: "Choice", view: WorkerView) -> bool:
        """Whether it is not placed where was chosen, because all are busy that could take it."""
        standing = choice.waits_as
        return (
            self.is_on
            and (choice.is_to_be_refused or choice.is_unheard)
            and not (standing is not None and standing.may_pass)
            and self.shedder.is_busy(view)
            and bool(self.shedder.busy(MODEL, filter(choice.is_able, self._frontend.views())))
        )

    def looked(self) -> None:
        """Everybody has had the turns that there are for him."""
        if self.is_on:
            self.room.looked()
            self.pausing.look()

    def _arrival(self, choice: "Choice", deadline: float) -> Arrival:
        return Arrival(
            MODEL, choice.tenant, choice.request_id, choice.priority, choice.num_tokens, deadline
        )

    def _highest_paused(self, model: str) -> int | None:
        return self.pausing.highest_paused(model)

    def _expire(self) -> None:
        self.room.expire()
        self._frontend.give_turns()

    # What is promised.

    def _check_let_in(self, choice: "Choice") -> None:
        """New work does not pass who is paused."""
        for other, _ in self.pausing.paused():
            if other.priority >= choice.priority and not other.stream.outcome:
                raise Violation(f"{choice.name} was let in before {other.name}, which is paused")

    def sent_away(self, choice: "Choice", error: UnbrokenError) -> None:
        """It is told to come back."""
        self.note(Event.SENT_AWAY)
        standing = choice.waits_as
        if standing is not None and standing.has_lost:
            raise Violation(f"{choice.name} lost its worker, and was sent away: {error.detail}")
        if not error.retry_after_s:
            raise Violation(f"{choice.name} was sent away for ever: {error.detail}")
        if choice.is_back and error.metadata.get(QUEUE_LIMIT) in _NOT_KEPT:
            raise Violation(f"{choice.name} came when it was told, and was refused: {error.detail}")
        self.on_sent_away(choice, error)

    def check_waits(self) -> None:
        """Nobody waits for longer than he may."""
        now = self._world.now
        self.room.queue.check_all()
        for choice, _, since in self.room.queue.waiting():
            standing = choice.waits_as
            has_lost = standing is not None and standing.has_lost
            is_called = self.room.queue.is_called(choice)  # It may be held back for resumes.
            if not (has_lost or is_called) and now - since > self.rules.waiting.wait_s_max + 0.01:
                raise Violation(f"somebody waits at {self._frontend.name} for {now - since:.2f} s")
        for choice, since in self.pausing.paused():
            if now - since > self.rules.preemption.wait_s_max + 0.01:
                raise Violation(f"{choice.names()} is paused for {now - since:.2f} s")

    def finish(self) -> None:
        """Everything is over: nobody is left."""
        if self.room.queue.num_waiting or list(self.room.queue.waiting()):
            raise Violation(f"somebody is left in line at {self._frontend.name}")
        if self.pausing.num_paused:
            raise Violation(f"somebody is left paused at {self._frontend.name}")


def is_back(told_at: float | None, now: float) -> bool:
    """Whether somebody who was told to come at that time did."""
    return told_at is not None and told_at <= now <= told_at + PROMISE_GRACE_S
