"""Decides what a GPU's trouble means for the memory that is there.

    HEALTHY ──▶ DRAINING ──▶ TAINTED ──▶ LOST       it never gets better while the vault lives

    draining   what is there is good, but the GPU has to be reset soon: nothing new goes there
    tainted    what is there may be wrong: nobody new gets any of it
    lost       nothing can be read any more: it is freed

What the driver reports as numbers (Xid) is sorted so; a number that is not here says nothing:

    engine     13 31 43 45 109      a process computed nonsense: its own end, and a hint of it
    verify     94                   contained memory error: its process ends, others compare
    draining   63                   a row of memory is replaced at the next reset
    tainted    48 64 95 140         memory errors that were not contained, or cannot be repaired
    lost       79 119 120           it fell off the bus, or its processor does not answer

Xid 74, an error of a link, is one when it comes three times within ten minutes. An Xid does not say
whose process it was; whose session ends next is the guess. It comes before the process itself gets
to know: 1 ms with Xid 31, 0.9 s with Xid 43.

Source: NVIDIA's Xid catalog; timings were measured on an H200.
"""

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias


class Health(IntEnum):
    """As `MemoryHealth` of the contract."""

    HEALTHY = 1
    DRAINING = 2
    TAINTED = 3
    LOST = 4


@dataclass(frozen=True, slots=True)
class Xid:
    """The driver reported an error of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Poison:
    """Memory was read that is known to be wrong."""

    is_contained: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """How it stands with rows of memory that are replaced by spare ones."""

    is_pending: bool
    """One is to be replaced at the next reset."""
    has_failed: bool
    """One should be, and there is no spare one."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What the driver says has to be done."""

    action: int
    """As NVML numbers it; 0: nothing."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The driver does not know it any more."""


Event: TypeAlias = Xid | Poison | Rows | Recovery | Gone


@dataclass(frozen=True, slots=True)
class Worsened:
    """It is worse from now on."""

    health: Health
    cause: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Whoever has something there should compare it with its checksums."""

    cause: str


@dataclass(frozen=True, slots=True)
class EngineFault:
    """A process that computes there is about to die of its own error."""

    xid: int


Command: TypeAlias = Worsened | Verify | EngineFault

ENGINE: Final = frozenset({13, 31, 43, 45, 109})
VERIFY: Final = frozenset({94})
WORSE: Final = {
    63: Health.DRAINING,
    **dict.fromkeys((48, 64, 95, 140), Health.TAINTED),
    **dict.fromkeys((79, 119, 120), Health.LOST),
}
LINK: Final = 74
LINK_ERRORS: Final = 3
LINK_ERRORS_S: Final = 600.0
RECOVERY: Final = {
    1: Health.LOST,  # Reset.
    2: Health.LOST,  # Reboot of the node.
    3: Health.DRAINING,  # Drain what goes over links.
    4: Health.DRAINING,  # Drain, then reset.
    6: Health.LOST,  # Reset of the bus.
    7: Health.LOST,  # Reboot of the system.
}
"""Of actions of NVML; the others have nothing to do with memory."""


class GpuHealth:
    """The health of one GPU."""

    def __init__(self) -> None:
        self.health = Health.HEALTHY
        self._link_errors: deque[float] = deque(maxlen=LINK_ERRORS)

    def restore(self, health: Health) -> None:
        """What an earlier life of the service knew."""
        self.health = max(self.health, health)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply one event, seen at `now` (monotonic seconds)."""
        match event:
            case Xid(number=number):
                return self._xid(number, now)
            case Poison(is_contained=True):
                return [Verify("poison was contained")]
            case Poison():
                return self._worsen(Health.TAINTED, "poison was not contained")
            case Rows(has_failed=True):
                return self._worsen(Health.TAINTED, "a row of memory has no replacement")
            case Rows(is_pending=True):
                return self._worsen(Health.DRAINING, "a row of memory waits to be replaced")
            case Rows():
                return []
            case Recovery(action=action):
                health = RECOVERY.get(action, Health.HEALTHY)
                return self._worsen(health, f"recovery action {action}")
            case Gone():
                return self._worsen(Health.LOST, "the driver has lost it")

    def _xid(self, number: int, now: float) -> list[Command]:
        if number in ENGINE:
            return [EngineFault(number)]
        if number in VERIFY:
            return [Verify(f"Xid {number}")]
        if number == LINK:
            self._link_errors.append(now)
            is_often = len(self._link_errors) == LINK_ERRORS
            if is_often and now - self._link_errors[0] <= LINK_ERRORS_S:
                return self._worsen(Health.LOST, f"Xid {number}, {LINK_ERRORS} times")
            return []
        return self._worsen(WORSE.get(number, Health.HEALTHY), f"Xid {number}")

    def _worsen(self, health: Health, cause: str) -> list[Command]:
        if health <= self.health:
            return []
        self.health = health
        return [Worsened(health, cause)]
