"""When a worker that is to stop tells its frontends, hands its streams over, and stops.

    SERVING ──asked, or a signal──▶ FINISHING ──the budget ends──▶ LAST_STEP ──▶ STOPPING
       │                               │                               ▲            ▲
       ├──── asked to hand over ───────┼───────────────────────────────┘            │
       │                               └── nothing left, an engine that is lost ────┤
       └── a second signal, a sidecar that cannot go on ────────────────────────────┘

LAST_STEP ends with the step, or after STEP_S_MAX, or when no step will end.

A drain never becomes less urgent: who asks again can only have streams handed over earlier. The
first signal asks as the configuration says, the second one means: at once.

Streams are handed over at the end of a step of the engine. One that is cut in the middle stands
still for the rest of a step that is thrown away, for the rest of the one that its next worker is
at, and for its own; one that is cut at the end, for the last two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum, auto
from typing import Final, TypeAlias, assert_never

STEP_S_MAX: Final = 0.25
"""How long the engine's step may take to its end before streams are handed over all the same."""


class Policy(StrEnum):
    """What becomes of streams that run."""

    FINISH = "finish"
    """They go on to their end, however long that takes."""
    HAND_OVER = "hand_over"
    """They go on at other workers, from the end of the step that the engine is at."""
    BUDGET = "budget"
    """They go on here until the budget is over, then elsewhere."""


class Phase(Enum):
    """Where a worker stands."""

    SERVING = auto()
    FINISHING = auto()
    """It takes nothing new, and what runs goes on."""
    LAST_STEP = auto()
    """What runs is handed over when the engine's step ends."""
    STOPPING = auto()
    """Nothing runs here any more; the engine is stopped."""


class ExitStatus(IntEnum):
    """How the process ends; 2 is wrong usage."""

    DRAINED = 0
    """It was asked to stop, and did all that it had promised."""
    FAILED = 1
    """It could not start or go on, or its engine was lost, before the drain or in it."""
    CUT_SHORT = 4
    """A second signal came before it had stopped."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to drain."""

    policy: Policy
    budget_s: float
    """Counts for BUDGET only."""

    def hand_over_at(self, now: float) -> float:
        """When what still runs is handed over, if the plan begins now."""
        match self.policy:
            case Policy.FINISH:
                return math.inf
            case Policy.HAND_OVER:
                return now
            case Policy.BUDGET:
                return now + self.budget_s
            case _:
                assert_never(self.policy)


# Events.


@dataclass(frozen=True, slots=True)
class Asked:
    """An operator asked for a drain."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM or SIGINT came."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What runs at present; the shell looks when it was asked and whenever an attempt is over."""

    num_left: int
    """Attempts that somebody waits for."""
    is_engine_up: bool
    is_stalled: bool = False
    """The engine makes no progress: nobody knows when its step ends."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """The engine brought tokens: as a rule, all those of a step."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The sidecar cannot go on: its engine is given up, or another process took its id."""


Event: TypeAlias = Asked | Signalled | Seen | Stepped | Failed


# Commands.


@dataclass(frozen=True, slots=True)
class Announce:
    """Take nothing new, and tell the frontends so."""

    budget_s: float | None
    """Until what runs is handed over; None: it may finish."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """Take nothing new, and end every attempt at its exact offset."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Have everything read, stop the engine, leave the mesh, exit."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """Wait for nobody: kill the engine."""


Command: TypeAlias = Announce | HandOver | Stop | Hurry


class Drain:
    """One worker on its way out. Times are monotonic seconds."""

    def __init__(self, plan: Plan) -> None:
        """`plan` is what a signal means."""
        self.phase = Phase.SERVING
        self.exit_status = ExitStatus.DRAINED
        self._plan = plan
        self._due_at = math.inf
        self._num_signals = 0
        self._had_engine = False  # Since the drain began.

    def handle(self, event: Event, now: float) -> Sequence[Command]:
        """Apply one event, seen at `now`."""
        match event:
            case Asked(plan=plan):
                return self._ask(plan, now)
            case Signalled():
                self._num_signals += 1
                if self._num_signals == 1:
                    return self._ask(self._plan, now)
                return self._hurry() if self._num_signals == 2 else []
            case Seen():
                return self._look(event)
            case Stepped():
                return self._stop() if self.phase is Phase.LAST_STEP else []
            case Failed():
                return self._stop(ExitStatus.FAILED)
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing happens before."""
        is_limited = self.phase in (Phase.FINISHING, Phase.LAST_STEP)
        return self._due_at if is_limited and math.isfinite(self._due_at) else None

    def handle_timeout(self, now: float) -> Sequence[Command]:
        """The budget may be over, or the step too long."""
        deadline = self.deadline()
        if deadline is None or now < deadline:
            return []
        if self.phase is Phase.LAST_STEP:
            return self._stop()
        self.phase, self._due_at = Phase.LAST_STEP, now + STEP_S_MAX
        return []  # That the time is over has been announced.

    def _ask(self, plan: Plan, now: float) -> Sequence[Command]:
        if self.phase in (Phase.LAST_STEP, Phase.STOPPING):
            return []
        hand_over_at = plan.hand_over_at(now)
        if hand_over_at <= now:
            self.phase, self._due_at = Phase.LAST_STEP, min(self._due_at, now + STEP_S_MAX)
            return [Announce(self._due_at - now)]
        if self.phase is Phase.FINISHING and hand_over_at >= self._due_at:
            return []
        self.phase, self._due_at = Phase.FINISHING, hand_over_at
        return [Announce(None if math.isinf(hand_over_at) else hand_over_at - now)]

    def _look(self, seen: Seen) -> Sequence[Command]:
        if self.phase not in (Phase.FINISHING, Phase.LAST_STEP):
            return []
        is_lost = self._had_engine and not seen.is_engine_up
        self._had_engine = seen.is_engine_up
        if self.phase is Phase.LAST_STEP:  # Of an engine that is to stop, only its step is wanted.
            has_step = seen.is_engine_up and not seen.is_stalled and seen.num_left
            return [] if has_step else self._stop()
        if is_lost:  # Another life of it would get no work.
            return self._stop(ExitStatus.FAILED)
        return [] if seen.num_left else self._stop()

    def _stop(self, status: ExitStatus = ExitStatus.DRAINED) -> Sequence[Command]:
        if self.phase is Phase.STOPPING:
            return []
        self.phase, self.exit_status = Phase.STOPPING, status
        return [HandOver(), Stop()]

    def _hurry(self) -> Sequence[Command]:
        commands = self._stop()
        if self.exit_status is ExitStatus.DRAINED:
            self.exit_status = ExitStatus.CUT_SHORT
        return [*commands, Hurry()]
