"""Whether the sidecar at the other end of a link lives: phi-accrual over what arrives, no I/O.

             silent, phi >= phi_suspect            silent, phi >= phi_dead
    ALIVE ─────────────────────────────▶ SUSPECT ─────────────────────────▶ DEAD
      ▲                                     │
      └───────────────── heard ─────────────┘

Phi is -log10 of the probability that a sidecar which lives has been silent for so long. It is taken
from a normal distribution over the intervals of its latest heartbeats, with a least deviation and
an allowance, as Akka does. Rare long gaps hardly move a deviation, so a link that was once silent
for a while and came back is never given up before twice that silence. The ceiling holds always.

Any message ends a silence; only heartbeats, which have a rhythm, are learnt from. A sidecar that is
heard may still be deaf: its heartbeats say what it heard of ours when they were sent. If they come
late, because much is to be read before them, what they say is as old as that.

Silence is what others do, so the time in which this process itself stood still is no silence. The
owner says when it will look again (`expects_to_look`); being late for that is its own standstill,
whatever is done first afterwards.

Source: Hayashibara et al., "The φ Accrual Failure Detector" (SRDS 2004); the allowance, the least
deviation and the approximation of the distribution are those of Akka's PhiAccrualFailureDetector.
"""

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from operator import mul
from typing import Final

from unbroken.outcome import FailureKind

INTERVALS_MAX: Final = 200
"""Heartbeat intervals that are remembered: 20 s at the default interval."""
PHI_MAX: Final = 100.0
"""More certainty than this is not told apart."""
INTERVAL_S_MAX: Final = 10.0
"""An announced interval counts as at most this."""
_LONGEST_FACTOR: Final = 2.0
_SUSPECT_SHARE: Final = 0.6
"""Suspicion comes at the latest at this share of the silence that is death."""
_UNSEEN_MAX: Final = 1024
_ARRIVALS_MAX: Final = 30
"""Heartbeats by which the lateness of the next is measured: what lasts is no delay in the end."""


class Liveness(IntEnum):
    """The opinion (admin_service.proto has the same values)."""

    UNSPECIFIED = 0
    ALIVE = 1
    SUSPECT = 2
    DEAD = 3


class Reach(Enum):
    """What became of a try to reach a suspect in another way than over its link."""

    UNKNOWN = auto()
    """Not tried, or there is no answer yet."""
    ANSWERS = auto()
    """Its host takes connections for it."""
    REFUSES = auto()
    """Its host says that nobody is there."""


@dataclass(frozen=True, slots=True)
class DetectorLimits:
    """What is enough to suspect and to give up."""

    heartbeat_interval_s: float = 0.1
    """Of this frontend, and of the sidecar until it has said its own."""
    silence_max_s: float = 2.0
    """The ceiling: silence for so long is death, whatever was learnt."""
    phi_suspect: float = 1.0
    phi_dead: float = 8.0
    allowance_s: float = 0.25
    """Added to the mean interval: pauses so short surprise nobody."""
    deviation_s_min: float = 0.1
    """A rhythm is never believed to be steadier than this."""


@dataclass(frozen=True, slots=True)
class Death:
    """The link is given up."""

    failure: FailureKind
    """HANG, PARTITION or CRASH."""
    detail: str
    silence_s: float
    """How long it took to be sure."""


class Rhythm:
    """The latest heartbeat intervals of one life of a worker; survives the loss of its link."""

    def __init__(self, interval_s: float) -> None:
        """`interval_s` stands for what has not been seen yet."""
        self._intervals: deque[float] = deque((interval_s,), maxlen=INTERVALS_MAX)
        self._derive()

    def learn(self, interval_s: float) -> None:
        """One more interval."""
        self._intervals.append(interval_s)
        self._derive()

    def _derive(self) -> None:
        intervals = self._intervals
        self.mean_s = sum(intervals) / len(intervals)
        mean_square = sum(map(mul, intervals, intervals)) / len(intervals)
        self.deviation_s = math.sqrt(max(0.0, mean_square - self.mean_s**2))
        self.longest_s = max(intervals)


class FailureDetector:
    """Judges one Relay call from its opening to its end. Times are monotonic seconds."""

    def __init__(self, limits: DetectorLimits, rhythm: Rhythm, now: float) -> None:
        self.liveness = Liveness.UNSPECIFIED
        """UNSPECIFIED until anything came."""
        self._limits = limits
        self._rhythm = rhythm
        self._y_suspect = _deviations(limits.phi_suspect)
        self._y_dead = _deviations(limits.phi_dead)
        self._interval_s = limits.heartbeat_interval_s  # The sidecar's.
        self._heard_at = now
        self._heartbeat_at: float | None = None
        self._unseen: deque[tuple[int, float]] = deque(maxlen=_UNSEEN_MAX)
        """Our heartbeats that the sidecar has not confirmed, and when they were sent."""
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS_MAX)
        self._late_s = 0.0  # The latest heartbeat, by those before it.
        self._looks_at = math.inf
        self._judges_from = now
        self._was_late = False  # At the look before, or since.
        self._is_late = False  # Since the last look.
        self._reach = Reach.UNKNOWN

    # Questions.

    @property
    def dead_after_s(self) -> float:
        """Silence for so long is death."""
        ceiling_s = self._limits.silence_max_s
        if self.liveness is Liveness.UNSPECIFIED:
            return ceiling_s
        return min(ceiling_s, self._dead_after_s())

    def silence_s(self, now: float) -> float:
        """For how long nothing has come, this process's own standstills left out."""
        return max(0.0, now - self._heard_at)

    @property
    def deaf_s(self) -> float:
        """For how long, when it sent its last heartbeat, the sidecar had not heard what was sent
        to it: no longer than what is known to have waited here.
        """
        unconfirmed_s = self._unconfirmed_s
        if unconfirmed_s >= self._limits.silence_max_s:
            return unconfirmed_s  # The ceiling holds always.
        return max(0.0, unconfirmed_s - self._late_s)

    def phi(self, now: float) -> float:
        """How surprising its silence is: -log10 of the probability that it lives."""
        if self.liveness is Liveness.UNSPECIFIED:
            return 0.0
        rhythm, limits = self._rhythm, self._limits
        deviation_s = max(rhythm.deviation_s, limits.deviation_s_min)
        surprising_s = max(self.silence_s(now), self.deaf_s)
        return _phi((surprising_s - rhythm.mean_s - limits.allowance_s) / deviation_s)

    def deadline(self) -> float:
        """When `judge` is due if nothing comes before."""
        after_s = self.dead_after_s
        if self.liveness is Liveness.ALIVE:
            after_s = min(after_s, self._suspect_after_s())
        return max(self._heard_at + after_s, self._judges_from)

    @property
    def _unconfirmed_s(self) -> float:
        """As `deaf_s`, if that heartbeat came as it was sent."""
        if self._heartbeat_at is None or not self._unseen:
            return 0.0
        # It could not have said so before a heartbeat of its own was due.
        return max(0.0, self._heartbeat_at - self._unseen[0][1] - self._interval_s)

    # Events.

    def heard(self, now: float) -> bool:
        """Anything came. Whether the opinion changed."""
        if now > self._looks_at:  # Else there is nothing to account for, and most often it is so.
            self._account(now)
        self._heard_at = now
        if self.liveness is Liveness.ALIVE or self.liveness is Liveness.DEAD:
            return False
        before, self.liveness = self.liveness, Liveness.ALIVE
        if self._is_suspicious(now):
            self.liveness = Liveness.SUSPECT  # It is heard, but it is deaf.
        elif before is Liveness.SUSPECT:
            self._reach = Reach.UNKNOWN
        return self.liveness is not before

    def heartbeat(self, sequence_seen: int, interval_s: float, now: float) -> None:
        """What came, and was told to `heard`, is a heartbeat. `interval_s` is 0 if it says none."""
        if interval_s > 0:
            self._interval_s = min(interval_s, INTERVAL_S_MAX)
        if self._heartbeat_at is None:
            self._rhythm.learn(self._interval_s)
        else:
            self._rhythm.learn(max(0.0, now - self._heartbeat_at))
        self._heartbeat_at = now
        self._arrivals.append(now)
        interval_s = max(self._interval_s, self._rhythm.mean_s)
        self._late_s = max(
            [now - at - num * interval_s for num, at in enumerate(reversed(self._arrivals))]
        )
        while self._unseen and self._unseen[0][0] <= sequence_seen:
            self._unseen.popleft()

    def sent(self, sequence: int, now: float) -> None:
        """A heartbeat of ours was written."""
        self._account(now)
        self._unseen.append((sequence, now))

    def reached(self, reach: Reach) -> None:
        """What became of a try to reach the suspect in another way."""
        self._reach = reach

    def expects_to_look(self, at: float) -> None:
        """The owner will call `judge` then. If that is late, so was all else in this process."""
        self._looks_at = at

    def judge(self, now: float) -> Death | None:
        """Form an opinion: `liveness`, and what it died of when it is DEAD now."""
        self._account(now)
        self._looks_at = math.inf
        self._was_late, self._is_late = self._is_late, False
        if self.liveness is Liveness.DEAD or now < self._judges_from:
            return None
        silence_s, deaf_s, dead_after_s = self.silence_s(now), self.deaf_s, self.dead_after_s
        if silence_s >= dead_after_s:
            self.liveness = Liveness.DEAD
            return self._of_silence(silence_s)
        if deaf_s >= dead_after_s:
            self.liveness = Liveness.DEAD
            detail = f"heard, but it has heard nothing for {deaf_s:.2f} s"
            return Death(FailureKind.PARTITION, detail, deaf_s)
        if self.liveness is not Liveness.UNSPECIFIED:
            is_suspicious = self._is_suspicious(now)
            self.liveness = Liveness.SUSPECT if is_suspicious else Liveness.ALIVE
        return None

    # What happens inside.

    def _of_silence(self, silence_s: float) -> Death:
        failure, hint = {
            Reach.ANSWERS: (FailureKind.HANG, "its host takes connections"),
            Reach.REFUSES: (FailureKind.CRASH, "its host refuses connections"),
            Reach.UNKNOWN: (FailureKind.PARTITION, "its host does not answer"),
        }[self._reach]
        return Death(failure, f"nothing received for {silence_s:.2f} s; {hint}", silence_s)

    def _dead_after_s(self) -> float:
        return max(self._quantile_s(self._y_dead), _LONGEST_FACTOR * self._rhythm.longest_s)

    def _suspect_after_s(self) -> float:
        return min(self._quantile_s(self._y_suspect), _SUSPECT_SHARE * self.dead_after_s)

    def _quantile_s(self, deviations: float) -> float:
        rhythm, limits = self._rhythm, self._limits
        deviation_s = max(rhythm.deviation_s, limits.deviation_s_min)
        return rhythm.mean_s + limits.allowance_s + deviations * deviation_s

    def _is_suspicious(self, now: float) -> bool:
        return max(self.silence_s(now), self.deaf_s) >= self._suspect_after_s()

    def _account(self, now: float) -> None:
        """Leave out a standstill of this process, and give it time to read what came meanwhile."""
        lag_s = now - self._looks_at
        if lag_s <= self._limits.heartbeat_interval_s / 2:
            return
        self._looks_at = now
        if not (self._was_late or self._is_late):
            # Once: a process that is always late has to judge all the same.
            self._judges_from = now + self._limits.heartbeat_interval_s
        self._is_late = True
        self._heard_at = min(now, self._heard_at + lag_s)
        if self._heartbeat_at is not None:
            self._heartbeat_at = min(now, self._heartbeat_at + lag_s)
        shifted = [(sequence, min(now, at + lag_s)) for sequence, at in self._unseen]
        self._unseen = deque(shifted, maxlen=_UNSEEN_MAX)


def _phi(deviations: float) -> float:
    """Of a value so many deviations above the mean, by Akka's logistic approximation."""
    slope = deviations * (1.5976 + 0.070566 * deviations * deviations)
    if slope > math.log(10) * PHI_MAX:
        return PHI_MAX
    # -log10(e^-slope / (1 + e^-slope)), without overflow on either side.
    log1p = math.log1p(math.exp(-abs(slope))) + max(0.0, slope)
    return max(0.0, log1p / math.log(10))


def _deviations(phi: float) -> float:
    """The inverse of `_phi`, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _phi(middle) < phi else (low, middle)
    return high
