"""Decides what a client does when a call of its stream ends: finish, go on elsewhere, or give up.

    call_ended ──▶ Finish      `finished` has come, and nothing worse was said after it
               ──▶ GoOn        after a pause: Resume, or Generate again if nothing had begun
               ──▶ GiveUp      the reason is final, or deadline, calls or budget are used up

A stream that has begun goes on with `Resume`; its frontend may be any. Before that, Generate is
asked again under the same request_id, which is an idempotency key. No I/O.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from unbroken.errors import Reason

RESUMABLE: Final = frozenset(
    {
        Reason.UNREACHABLE,
        Reason.DRAINING,
        Reason.NO_WORKER,  # Another frontend may reach some.
        Reason.OVERLOADED,
        Reason.MODEL_NOT_FOUND,  # By a frontend that has just started: the stream knows better.
        Reason.NOT_IMPLEMENTED,  # By an older frontend.
        Reason.INTERNAL,  # A bug that one frontend met.
        Reason.FENCED,  # If by an earlier call of ours; see `_is_resumable`.
        Reason.RESUME_TOKEN_EXPIRED,  # By a frontend whose clock is wrong; another's may be right.
    }
)
"""A stream that ends so may go on with another call."""

FINAL: Final = frozenset(
    {
        Reason.INVALID_FIELD,
        Reason.STREAM_NOT_FOUND,
        Reason.REQUEST_EXISTS,
        Reason.RESUME_TOKEN_INVALID,
        Reason.RESUME_MISMATCH,
        Reason.NOT_CONTINUABLE,
        Reason.WORKER_LOST,
        Reason.MIGRATIONS_EXHAUSTED,
        Reason.QUERY_OF_DEATH,
        Reason.VERSION_MISMATCH,
        Reason.CANCELLED,
        Reason.DEADLINE_EXCEEDED,
        Reason.REJECTED_BY_ENGINE,
        Reason.DIVERGED,
        Reason.PROTOCOL_VIOLATION,
        # Of the memory service, which clients do not meet:
        Reason.SEGMENT_NOT_FOUND,
        Reason.SEGMENT_BUSY,
        Reason.STALE_HANDLE,
        Reason.NOT_FENCED,
        Reason.QUARANTINED,
        Reason.CHECKSUM_MISMATCH,
        Reason.MEMORY_EXHAUSTED,
        Reason.NOT_PERMITTED,
        Reason.GPU_FAILED,
    }
)
"""A stream that ends so would end so everywhere, or must not go on."""

REPEATABLE: Final = frozenset({Reason.UNREACHABLE, Reason.DRAINING})
"""Of `RESUMABLE`, those after which Generate is asked again while nothing has begun."""


class Readiness(IntEnum):
    """What is known of the connection to a frontend; how much speaks against a call to it."""

    CONNECTED = 0
    UNKNOWN = 1
    """Idle, or about to connect."""
    FAILING = 3
    """The last attempt to connect failed, and the next is not due yet."""


_FAILED_CALL: Final = 2
"""What a failed call speaks against its frontend: less than a failed connection."""


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How hard a stream tries to go on. Times in seconds."""

    resumes_max: int = 32
    """Most interruptions that one stream survives; 0: none."""
    calls_max: int = 8
    """Most calls in a row that bring no output; then the stream ends with the last one's error."""
    pause_initial_s: float = 0.05
    """After the first call in vain; the call after an interruption follows at once."""
    pause_factor: float = 2.0
    pause_max_s: float = 2.0

    def __post_init__(self) -> None:
        if self.resumes_max < 0 or self.calls_max < 1:
            raise ValueError("expected resumes_max of at least 0 and calls_max of at least 1")
        if not 0 < self.pause_initial_s <= self.pause_max_s or self.pause_factor < 1:
            raise ValueError("expected pauses above 0 that do not shrink")


class ResumeBudget:
    """What all streams of a client may call in vain: a token bucket.

    A call that brings output costs nothing, so the streams of one dead frontend go on at once; when
    all frontends are dead, the calls of many streams become a trickle.
    """

    def __init__(self, burst: int = 1000, per_s: float = 50.0) -> None:
        """`burst` calls at once, then `per_s` a second."""
        if burst < 1 or per_s <= 0:
            raise ValueError("expected a burst of at least 1 and a rate above 0")
        self._burst = burst
        self._per_s = per_s
        self._level = float(burst)
        self._seen_at: float | None = None

    def take(self, now: float) -> float:
        """Seconds until a call may be made that is taken from the budget now."""
        if self._seen_at is not None:
            self._level = min(
                self._burst, self._level + max(0.0, now - self._seen_at) * self._per_s
            )
        self._seen_at = now
        self._level -= 1.0
        return max(0.0, -self._level / self._per_s)

    def give_back(self) -> None:
        """A call that was taken has brought output."""
        self._level = min(self._burst, self._level + 1.0)


class Random(Protocol):
    """Of `random.Random`, what is needed."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is over. `reason` is None if it ended without an error."""

    reason: Reason | None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The stream is complete."""


@dataclass(frozen=True, slots=True)
class GoOn:
    """Call again after a pause: Resume, or else Generate."""

    pause_s: float
    is_resume: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The stream ends with the error of the call."""

    detail: str
    """Why it is not tried again, for people; empty if the reason is final by itself."""


Decision = Finish | GoOn | GiveUp


class Resumption:
    """One stream's way from frontend to frontend. Frontends are indices; `now` is monotonic."""

    def __init__(
        self,
        num_frontends: int,
        *,
        policy: ResumePolicy,
        budget: ResumeBudget,
        random: Random,
        has_token: bool = False,
    ) -> None:
        """`has_token`: the stream goes on from one that somebody else began."""
        self.deadline_at: float | None = None
        self.has_started = has_token
        self.has_token = has_token
        self.is_finished = False
        self.num_calls = 0
        self.num_resumes = 0
        """Interruptions after which output came."""
        self._num_frontends = num_frontends
        self._policy = policy
        self._budget = budget
        self._random = random
        self._num_in_vain = 0
        """Calls in a row that ended without output."""
        self._num_expired = 0
        """Calls whose frontend took the token for too old, since output last came."""
        self._num_failed = [0] * num_frontends
        """Calls that ended since output last came, by frontend."""
        self._is_taken = False
        """The current call was taken from the budget and has brought nothing yet."""
        self._has_output = False
        """The current call has brought something."""
        self._is_in_doubt = False
        """A call of ours broke off; its frontend may be at work for it still."""

    def choose(self, readiness: Sequence[Readiness]) -> int:
        """The frontend for the next call; among equals, any."""
        against = [
            _FAILED_CALL * failed + ready
            for failed, ready in zip(self._num_failed, readiness, strict=True)
        ]
        best = [index for index, value in enumerate(against) if value == min(against)]
        return best[int(self._random.random() * len(best))]

    def call_began(self) -> None:
        """A call was made."""
        self.num_calls += 1

    def can_move(self) -> bool:
        """Whether a frontend that asks for it is left for another one before it ends the call."""
        return (
            self._num_frontends > 1
            and self.has_token
            and not self.is_finished
            and self.num_resumes < self._policy.resumes_max
        )

    def drains(self, frontend: int) -> None:
        """It does; others are chosen before it."""
        self._num_failed[frontend] += 1

    def moved(self) -> None:
        """The stream goes on by a call that was made while the one before was still good."""
        self.num_calls += 1
        self.num_resumes += 1
        self._has_output = self._is_taken = False

    def output_came(self) -> None:
        """The current call has brought output, or the stream's beginning or end."""
        if self._has_output:
            return
        self._has_output = True
        self._num_in_vain = self._num_expired = 0
        self._num_failed = [0] * self._num_frontends
        if self._is_taken:
            self._is_taken = False
            self._budget.give_back()
            self.num_resumes += self.has_started

    def call_ended(self, end: CallEnded, frontend: int, now: float) -> Decision:
        """What follows on the end of a call to `frontend`."""
        if self.is_finished and (end.reason is None or end.reason in REPEATABLE):
            return Finish()  # All was said; only the goodbye is missing.
        is_broken_off = end.reason in (None, Reason.UNREACHABLE)
        if not is_broken_off and not self._is_resumable(end.reason):
            return GiveUp("")
        self._is_in_doubt |= is_broken_off
        if self.has_started and not self.has_token:
            return GiveUp("")  # The frontend gave none, so it does not resume.
        self._num_in_vain += not self._has_output
        self._num_failed[frontend] += 1
        self._has_output = False
        if refusal := self._exhausted():
            return GiveUp(refusal)
        pause_s = max(self._backoff_s(), end.retry_after_s or 0.0, self._budget.take(now))
        self._is_taken = True
        if self.deadline_at is not None and now + pause_s >= self.deadline_at:
            return GiveUp(f"the deadline comes before the next call, due in {pause_s:.2f} s")
        return GoOn(pause_s, is_resume=self.has_started)

    def _is_resumable(self, reason: Reason | None) -> bool:
        if self.is_finished:
            return False  # An error that follows on the end belongs to it.
        if not self.has_started:
            # It may exist by an earlier call of ours.
            is_ours = reason is Reason.REQUEST_EXISTS and self._is_in_doubt
            return reason in REPEATABLE or is_ours
        if reason is Reason.FENCED:
            return self._is_in_doubt  # Else somebody else has the stream now.
        if reason is Reason.RESUME_TOKEN_EXPIRED:
            self._num_expired += 1
            return self._num_expired < self._num_frontends
        return reason in RESUMABLE

    def _exhausted(self) -> str:
        """Which limit forbids another call; empty if none does."""
        policy = self._policy
        if self.has_started and self.num_resumes >= policy.resumes_max:
            return f"the stream was resumed {self.num_resumes} times"
        calls_max = policy.calls_max
        if not self.has_started:  # Every frontend once, and the first again.
            calls_max = min(calls_max, self._num_frontends + 1)
        if self._num_in_vain >= calls_max:
            return f"{self._num_in_vain} calls in a row brought nothing"
        return ""

    def _backoff_s(self) -> float:
        policy = self._policy
        if self._num_in_vain == 0 or not self.has_started:
            return 0.0
        longest_s = policy.pause_initial_s * policy.pause_factor ** (self._num_in_vain - 1)
        return min(longest_s, policy.pause_max_s) * (0.5 + self._random.random() / 2)
