"""When a frontend that is to stop tells its clients, and when it waits for them no longer.

    SERVING ──asked, or a signal──▶ LEAVING ──nothing left──────────────▶ STOPPING
                                       │                                     ▲
                                       └──budget over, second signal──▶ CUTTING (all read, or not)

In LEAVING every client is told, a few at a time, so that those which can go on elsewhere do not all
arrive there in one moment. A drain never becomes less urgent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Final, TypeAlias, assert_never

TELL_S: Final = 1.0
"""Within so long all clients are told, unless that were more than"""
TELL_PER_S: Final = 100.0
"""so many a second: to take over a stream costs another frontend a millisecond or two."""
TELL_INTERVAL_S: Final = 0.02
TELL_MIN: Final = 2
"""So many are told at once, at least."""
LINGER_S: Final = 1.0
"""So long who calls is still answered, that this frontend drains; then connections are told."""
CUT_S: Final = 1.0
"""How long clients may take to read the end of a stream that was cut."""


class Phase(Enum):
    """Where a frontend stands."""

    SERVING = auto()
    LEAVING = auto()
    """It takes nothing new, and what runs goes on until its client has it elsewhere."""
    CUTTING = auto()
    """What ran has been cut; clients read that."""
    STOPPING = auto()
    """Nobody is waited for any more."""


class ExitStatus(IntEnum):
    """How the process ends; 2 is wrong usage, 3 that all its processes crash in a loop."""

    DRAINED = 0
    """It was asked to stop, and did all that it had promised."""
    FAILED = 1
    """It could not start, or one of its processes did not stop in order."""
    CUT_SHORT = 4
    """A second signal came before it had stopped."""


# Events.


@dataclass(frozen=True, slots=True)
class Asked:
    """An operator asked for a drain; `budget_s` of None is as configured."""

    budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM or SIGINT came."""

    is_again: bool
    """It means: at once."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What runs at present; the shell looks after each command and whenever a request is over."""

    num_left: int
    """Requests that are read here, of siblings too."""
    num_untold: int
    """Of those, such as have not been told."""


Event: TypeAlias = Asked | Signalled | Seen


# Commands.


@dataclass(frozen=True, slots=True)
class Announce:
    """Take nothing new; leave readiness and discovery."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Ask so many more clients to go on elsewhere."""

    num_requests: int


@dataclass(frozen=True, slots=True)
class GoAway:
    """Let no connection carry anything new, nor any new one come."""


@dataclass(frozen=True, slots=True)
class Cut:
    """End what runs; whoever resumes it finds it at its workers."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Close everything, and exit."""


Command: TypeAlias = Announce | Tell | GoAway | Cut | Stop


class Drain:
    """One frontend on its way out. Times are monotonic seconds."""

    def __init__(self, budget_s: float) -> None:
        """`budget_s` is what a signal means."""
        self.phase = Phase.SERVING
        self.exit_status = ExitStatus.DRAINED
        self.cut_at = math.inf
        """When what still runs is cut."""
        self._budget_s = budget_s
        self._tell_until = math.inf
        self._tell_at = math.inf
        self._go_away_at = math.inf
        self._stop_at = math.inf
        self._num_untold = 0

    @property
    def is_draining(self) -> bool:
        return self.phase is not Phase.SERVING

    def handle(self, event: Event, now: float) -> Sequence[Command]:
        """Apply one event, seen at `now`."""
        match event:
            case Asked(budget_s=budget_s):
                return self._ask(self._budget_s if budget_s is None else budget_s, now)
            case Signalled(is_again=False):
                return self._ask(self._budget_s, now)
            case Signalled():
                if self.phase is not Phase.STOPPING:
                    self.exit_status = ExitStatus.CUT_SHORT
                return self._ask(0.0, now)
            case Seen(num_left=num_left, num_untold=num_untold):
                self._num_untold = num_untold
                if self.phase is Phase.LEAVING and math.isinf(self._tell_until):
                    self._plan(num_untold, now)
                if self.phase in (Phase.LEAVING, Phase.CUTTING) and not num_left:
                    self.phase = Phase.STOPPING
                    return [Stop()]
                return []
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing happens before."""
        match self.phase:
            case Phase.LEAVING:
                tell_at = self._tell_at if self._num_untold else math.inf
                return min(tell_at, self._go_away_at, self.cut_at)
            case Phase.CUTTING:
                return self._stop_at
            case _:
                return None

    def handle_timeout(self, now: float) -> Sequence[Command]:
        """Time passed; see `deadline`."""
        commands: list[Command] = []
        if self.phase is Phase.LEAVING and now >= self.cut_at:
            commands.append(self._cut(now))
        if self.phase is Phase.CUTTING and now >= self._stop_at:
            self.phase = Phase.STOPPING
            commands.append(Stop())
        if self.phase is not Phase.LEAVING:
            return commands
        if self._num_untold and now >= self._tell_at:
            commands.append(self._tell(now))
        if now >= self._go_away_at:
            self._go_away_at = math.inf
            commands.append(GoAway())
        return commands

    def _ask(self, budget_s: float, now: float) -> Sequence[Command]:
        commands: list[Command] = []
        if self.phase is Phase.SERVING:
            self.phase = Phase.LEAVING
            self._tell_at = now
            self._go_away_at = now + LINGER_S
            commands.append(Announce())
        if self.phase is Phase.LEAVING:
            self.cut_at = min(self.cut_at, now + budget_s)
            if now >= self.cut_at:
                commands.append(self._cut(now))
        return commands

    def _plan(self, num_requests: int, now: float) -> None:
        """All are told in the first half of the budget, and not in a rush if that can be helped."""
        left_s = (self.cut_at - now) / 2
        self._tell_until = now + min(left_s, max(TELL_S, num_requests / TELL_PER_S))
        self._go_away_at = max(self._go_away_at, self._tell_until)

    def _cut(self, now: float) -> Command:
        self.phase, self._stop_at = Phase.CUTTING, now + CUT_S
        return Cut()

    def _tell(self, now: float) -> Command:
        """As many as it takes for the last ones to be told in time."""
        num_turns = max(1.0, (self._tell_until - now) / TELL_INTERVAL_S)
        num_requests = max(TELL_MIN, math.ceil(self._num_untold / num_turns))
        self._tell_at = now + TELL_INTERVAL_S
        return Tell(min(num_requests, self._num_untold))
