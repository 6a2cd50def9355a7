"""The shell around `preemption`: which streams run where, who is told to stop, who goes on.

It is asked to `look` whenever turns were given: then whoever still waits found no room.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from frontend.alarm import Alarm, CallLater, on_this_loop
from frontend.busy import Shedder, has_room_for, judge_known
from frontend.metrics import FrontendMetrics
from frontend.placement import WorkerView, standing
from frontend.preemption import Candidate, Looks, Preemption, PreemptionLimits
from frontend.stream import Life
from frontend.waiting_room import WaitingRoom
from unbroken import log
from unbroken.outcome import ContinuationClass
from unbroken.v1 import worker_pb2

if TYPE_CHECKING:
    from frontend.dispatch import Choice

_log = log.get_logger(__name__)


class Pausing:
    """One frontend's pauses."""

    def __init__(
        self,
        limits: PreemptionLimits,
        room: WaitingRoom,
        shedder: Shedder,
        metrics: FrontendMetrics,
        *,
        views_of: Callable[[str], Iterable[WorkerView]],
        is_held: Callable[[str], bool],
        on_due: Callable[[], None],
        clock: Callable[[], float],
        call_later: CallLater = on_this_loop,
    ) -> None:
        """`views_of` are the workers of a model that take work; `is_held` tells whether resumes
        hold its new work back; `on_due` has turns given, and `look` called after them.
        """
        self._book = Preemption["Choice"](limits)
        self._limits = limits
        self._room = room
        self._shedder = shedder
        self._metrics = metrics
        self._views_of = views_of
        self._is_held = is_held
        self._clock = clock
        self._alarm = Alarm(on_due, clock, call_later)
        self._running: dict[int, dict[Choice, WorkerView]] = {}
        """Who has an attempt, and where, by priority."""
        self._looks = Looks()
        self._is_looking = False

    # Questions.

    @property
    def num_paused(self) -> int:
        """Choices that are paused. Safe in any thread."""
        return self._book.num_paused

    @property
    def is_idle(self) -> bool:
        """Whether nobody is paused or about to be."""
        return self._book.is_idle

    def paused(self) -> "Iterator[tuple[Choice, float]]":
        """Who is, and since when."""
        return self._book.paused()

    def highest_paused(self, model: str) -> int | None:
        """The highest priority of who is paused; new work of no higher one waits for him."""
        return self._book.highest_paused(model)

    def detail(self, choice: "Choice") -> str:
        """What it waits for, for people; empty unless it is paused."""
        if not self._book.is_paused(choice):
            return ""
        return (
            f"paused {choice.stream.attempts[-1].detail}, for {self._limits.wait_s_max:g} s at most"
        )

    # Events.

    def started(self, choice: "Choice", view: WorkerView) -> None:
        """It has an attempt there."""
        if self._book.is_on:
            self._running.setdefault(choice.priority, {})[choice] = view
            self._book.placed(choice, self._clock())

    def left(self, choice: "Choice") -> None:
        """It has none any more. Idempotent."""
        peers = self._running.get(choice.priority)
        if peers is not None and peers.pop(choice, None) is not None:
            self._book.left(choice, self._clock())
            if not peers:
                del self._running[choice.priority]

    def stopped(self, choice: "Choice") -> None:
        """Its worker has ended the attempt: it is paused, and `left` follows."""
        now = self._clock()
        self._book.stopped(choice, now)
        self._metrics.pauses.inc()
        stream = choice.stream
        _log.info(
            "stream paused",
            worker_id=stream.attempts[-1].life.worker_id,
            offset=len(stream.ledger),
            detail=stream.attempts[-1].detail,
            **choice.names(),
        )
        self._alarm.set(self._book.deadline())

    def forget(self, choice: "Choice") -> None:
        """It has ended. Idempotent."""
        self._book.forget(choice)

    def reported(self, life: Life, load: worker_pb2.LoadReport) -> None:
        """A worker told its load."""
        if self._book.is_on:
            self._book.reported(life, load.engine_steps_total, self._clock())

    def workers(self, lives: Iterable[Life]) -> None:
        """All that are known."""
        if self._book.is_on:
            self._book.workers(lives)

    def look(self) -> None:
        """See who goes on, and who has to stop."""
        if not self._book.is_on or self._is_looking:
            return
        self._is_looking = True
        try:
            self._go_on()
            for model in self._room.queue.models():
                if not self._is_held(model):
                    self._make_room(model)
        finally:
            self._is_looking = False
        self._alarm.set(self._book.deadline())

    def close(self) -> None:
        """Look no more."""
        self._alarm.stop()

    # Inside.

    def _go_on(self) -> None:
        while True:
            now = self._clock()
            choice = self._book.next(self._room.first_priority, self._has_room, now)
            if choice is None:
                return
            paused_s = self._book.went_on(choice, now)
            self._metrics.pause_s.observe(paused_s)
            _log.info("paused stream goes on", paused_s=round(paused_s, 3), **choice.names())
            choice.obey(choice.stream.proceed(now))

    def _has_room(self, choice: "Choice") -> bool:
        """Whether a worker has room for it."""
        thresholds = self._shedder.thresholds_of(choice.model)
        views = [view for view in self._views_of(choice.model) if choice.could_take(view)]
        best = min((standing(view, ()) for view in views), default=None)
        return any(  # Of those only, among which it will be placed.
            has_room_for(view, thresholds, choice.num_tokens)
            for view in views
            if standing(view, ()) == best
        )

    def _make_room(self, model: str) -> None:
        """Pause somebody for who has the next turn, if that helps."""
        first = self._room.queue.first(model)
        priority = self._room.first_priority(model)
        now = self._clock()
        if first is None or priority is None or min(self._running, default=priority) >= priority:
            return
        due = self._looks.due(model)
        if now < due:
            self._alarm.set(due)
            return
        newcomer = first[0]
        views = [view for view in self._views_of(model) if newcomer.could_take(view)]
        thresholds = self._shedder.thresholds_of(model)
        # Who only seems to be busy, because others seem to place there too, tells more soon.
        busy = [
            (view, judge_known(view, thresholds)) for view, _ in self._shedder.busy(model, views)
        ]
        chosen = self._book.whom(model, priority, busy, self._candidates(model, priority), now)
        self._looks.looked(model, self._clock())
        for one in chosen:
            commands = one.key.stream.pause(f"for a request of priority {priority}", now)
            if commands:
                self._book.halting(one, model)
                one.key.obey(commands)

    def _candidates(self, model: str, priority: int) -> "Iterator[Candidate[Choice]]":
        now = self._clock()
        for level in sorted(level for level in self._running if level < priority):
            for choice, view in self._running[level].items():
                stream = choice.stream
                if view.model != model:
                    continue
                if not self._book.may_be_paused(choice, stream.num_left_max, now):
                    continue  # Before the dear question.
                try:
                    way = stream.way_back
                except Exception:
                    _log.exception("bug: a stream's way back", **choice.names())
                    continue
                if way is ContinuationClass.NONE:
                    continue
                num_tokens = choice.num_tokens
                is_regenerated = way is ContinuationClass.REGENERATE
                yield Candidate(
                    choice,
                    view.life,
                    level,
                    num_tokens,
                    -(-num_tokens // view.block_size),
                    0 if stream.is_prefilled else num_tokens,
                    stream.num_left_max,
                    len(stream.ledger) if is_regenerated else 0,
                )
