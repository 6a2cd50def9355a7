"""Decides how sure it is that a process writes no more, and what may be done with its memory.

    NONE ──connection lost──▶ HINT ──lifeline sealed──▶ QUIET ──exited──▶ GONE
      ▲                        │
      └──────── bound ─────────┘    no proof in time: killed, if allowed, then given up until GONE

The end of a connection is no proof: GPUs were seen to write for 24 ms after their process was
killed, and longer than that after its sockets were closed. Two things are one. The kernel accepts a
write seal on the lifeline, which the process had mapped, only when its address space is gone, and
with CUDA that is after the channels of the GPU were stopped. A readable pidfd says that it has
exited. What is committed or sealed needs no proof: nobody writes there, dead or alive.

A cohort (the ranks of one model) is adopted as a whole or not at all: KV of one rank is of no use
without that of the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias


class Fence(IntEnum):
    """As `FenceLevel` of the contract."""

    NONE = 0
    HINT = 1
    QUIET = 2
    GONE = 3


@dataclass(frozen=True, slots=True)
class Connected:
    """The process has bound (again)."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection ended."""


@dataclass(frozen=True, slots=True)
class LifelineSealed:
    """The kernel accepted a write seal on the lifeline."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The pidfd is readable."""


Event: TypeAlias = Connected | ConnectionLost | LifelineSealed | Exited


@dataclass(frozen=True, slots=True)
class Rose:
    """It is surer now."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Kill:
    """It has neither come back nor exited: end it, through its pidfd."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No proof can be had: what is its may be touched by nobody until it has exited."""


Command: TypeAlias = Rose | Kill | GiveUp


@dataclass(frozen=True, slots=True)
class FencePolicy:
    """How long a process may be neither connected nor proved dead."""

    rebind_grace_s: float = 5.0
    """It may bind again for so long, such as after the service was restarted."""
    kills: bool = False
    """Whether it is killed then, if it still runs."""
    kill_grace_s: float = 5.0
    """How long it may take to die after it was killed."""
    seal_is_proof: bool = True
    """Whether a sealed lifeline is one. Not under MPS, where another process has the channels."""


class SessionFence:
    """The fence of one session."""

    def __init__(self, policy: FencePolicy) -> None:
        self._policy = policy
        self.fence = Fence.NONE
        self._due_at: float | None = None
        self._was_killed = False
        self.is_given_up = False

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply one event, seen at `now` (monotonic seconds)."""
        match event:
            case Connected():
                assert self.fence <= Fence.HINT, "the dead do not bind"
                self.fence, self._due_at, self._was_killed = Fence.NONE, None, False
                return []
            case ConnectionLost():
                if self.fence is Fence.NONE:
                    self._due_at = now + self._policy.rebind_grace_s
                return self._rise(Fence.HINT)
            case LifelineSealed():
                if not self._policy.seal_is_proof:
                    return []
                return self._rise(Fence.QUIET)
            case Exited():
                return self._rise(Fence.GONE)

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing happens before."""
        return self._due_at

    def handle_timeout(self, now: float) -> list[Command]:
        """Time has passed."""
        if self._due_at is None or now < self._due_at:
            return []
        if self._policy.kills and not self._was_killed:
            self._was_killed = True
            self._due_at = now + self._policy.kill_grace_s
            return [Kill()]
        self._due_at = None
        self.is_given_up = True
        return [GiveUp()]

    def _rise(self, fence: Fence) -> list[Command]:
        if fence <= self.fence:
            return []
        self.fence = fence
        if fence >= Fence.QUIET:
            self._due_at = None
        return [Rose(fence)]


class Verdict(IntEnum):
    """What may become of the pools of a cohort that lost a rank."""

    WAIT = 0
    ADOPT = 1
    REFUSE = 2


def judge_cohort(ranks: Iterable[tuple[Fence, bool]], *, num_ranks: int) -> Verdict:
    """Whether pools may be adopted, given the fence of each rank and whether it was given up.

    Ranks that are not known (they never had memory, or it is freed) cannot agree.
    """
    known = list(ranks)
    if len(known) < num_ranks or any(given_up for _, given_up in known):
        return Verdict.REFUSE
    if all(fence >= Fence.QUIET for fence, _ in known):
        return Verdict.ADOPT
    return Verdict.WAIT
