"""Decides whether an engine that lives makes the progress that it should. No I/O.

                overdue in two looks               --engine-stall-restart-s
    WELL ──────────────────────────────▶ STALLED ───────────────────────────▶ to be restarted
      ▲                                     │
      └─── a step; a sign of life when ─────┘
           there is nothing to do, or when
           its lack was the verdict

Two silences are watched. Each has a bound that is learnt from this engine:

- *Silence*: no frame at all. An engine that promised one every so often (`EngineReady`) is hung
  (HANG) when it says nothing, whether it has work or not, however long a prefill takes.
- *Standing still*: no step, though there is work (STALL). In decode, the bound follows the gaps
  between this engine's steps. While there are tokens to prefill, a step may take as long as its
  largest chunk takes at the rate that was measured, with a factor; before anything was measured,
  very long.

Time in which this process itself did not run is no silence of the engine: looks that come late
count for little, and after a standstill everything begins anew.
"""

from dataclasses import dataclass
from math import ceil, log
from typing import Final, TypeAlias

from unbroken.outcome import FailureKind

LOOK_INTERVAL_S: Final = 0.05
"""Between two looks, if this process gets its turn."""
_LATENESS_MAX_S: Final = 0.35
"""Of a look. Later ones say that we stood still; then what came meanwhile is not read yet."""

_GAP_MIN_S: Final = 0.001
_GAP_RATIO: Final = 1.2
_GAP_SCALE: Final = 1 / log(_GAP_RATIO)
_NUM_BUCKETS: Final = 80  # The last one begins at half an hour.


@dataclass(frozen=True, slots=True)
class WatchdogPolicy:
    """When an engine is called stalled. Times in seconds."""

    silence_min_s: float = 0.65
    """No engine is called hung for less silence, however regular it was."""
    decode_factor: float = 2.5
    """A gap is overdue at so many times the longest but one in a thousand,"""
    peak_factor: float = 1.5
    """and not before so many times the longest of late."""
    step_min_factor: float = 1.5
    """An engine that gives signs of life gets so many times `silence_min_s` for a step."""
    decode_unmeasured_s: float = 10.0
    """For a step of decode, before `gaps_min` were measured."""
    gaps_min: int = 20
    prefill_min_s: float = 3.0
    """For a step while tokens are to be prefilled, plus what those tokens take."""
    prefill_factor: float = 4.0
    """What the tokens may take, in times of what the measured rate says."""
    prefill_unmeasured_s: float = 60.0
    """For a step while tokens are to be prefilled, before `prefills_min` were measured."""
    prefills_min: int = 3
    restart_after_s: float = 5.0
    """An engine that is stalled for so long is restarted."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine has to do, as far as is known."""

    has_steps: bool
    """There are attempts that could have tokens, and their windows have room."""
    prefill_tokens: int
    """Tokens that may have to be prefilled before anything comes; at least as many as there are."""


# What becomes of it.


@dataclass(frozen=True, slots=True)
class Stalled:
    """It makes no progress: say so."""

    failure: FailureKind
    """HANG or STALL."""
    detail: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """It goes on."""

    stalled_s: float


@dataclass(frozen=True, slots=True)
class Restart:
    """It has been stalled for too long: end this life."""

    failure: FailureKind
    detail: str
    stalled_s: float


Opinion: TypeAlias = Stalled | Recovered | Restart


class Gaps:
    """Which gaps between two events are usual: what is longer than `bound` is not.

    The longest but one in a thousand of the last ten or twenty thousand gaps, from a histogram with
    buckets of growing width, times a factor; and a peak that decays. Heavy tails are the rule here,
    so the distribution is taken as it is.

    Source: Satzger et al. (2007), "A new adaptive accrual failure detector for dependable
    distributed systems", which does so with heartbeats, after Hayashibara et al. (2004), who assume
    a normal distribution.
    """

    _TAIL: Final = 0.001
    _FORGET_AT: Final = 20_000
    _PEAK_HALF_LIFE_S: Final = 120.0

    def __init__(self) -> None:
        self.num = 0
        self._counts = [0] * _NUM_BUCKETS
        self._total = 0
        self._peak_s = 0.0
        self._peak_at = 0.0

    def add(self, gap_s: float, now: float) -> None:
        """Learn a gap that ended at `now`."""
        self.num += 1
        self._counts[_bucket(gap_s)] += 1
        self._total += 1
        if self._total >= self._FORGET_AT:
            self._counts = [count // 2 for count in self._counts]
            self._total = sum(self._counts)
        if gap_s >= self._peak(now):
            self._peak_s, self._peak_at = gap_s, now

    def bound(self, now: float, *, factor: float, peak_factor: float) -> float:
        """Seconds that no gap should last."""
        return max(factor * self._quantile(), peak_factor * self._peak(now))

    def _quantile(self) -> float:
        num_longer = max(1.0, self._total * self._TAIL)  # One alone is for the peak.
        for index in range(_NUM_BUCKETS - 1, -1, -1):
            num_longer -= self._counts[index]
            if num_longer < 0:
                return _GAP_MIN_S * _GAP_RATIO ** (index + 1)
        return 0.0

    def _peak(self, now: float) -> float:
        return self._peak_s * 0.5 ** ((now - self._peak_at) / self._PEAK_HALF_LIFE_S)


class Watchdog:
    """Watches one engine through all its lives; `now` is monotonic seconds.

    `look` every `LOOK_INTERVAL_S`; if it says so, `judge`. What is learnt outlives a life of the
    engine, because the next one runs on the same machine.
    """

    def __init__(self, policy: WatchdogPolicy | None = None) -> None:
        self.policy = policy or WatchdogPolicy()
        self.num_stalls = 0
        self._is_up = False
        self._frame_interval_s: float | None = None
        self._chunk_tokens = 0  # Of one step, at most; 0: unknown.
        self._frames = Gaps()
        self._steps = Gaps()
        self._prefills = Gaps()
        self._prefill_pace = _Pace()
        # When something happened last, for gaps to be learnt.
        self._frame_at = 0.0
        self._step_at = 0.0
        self._prefill_tokens = 0  # Known at that step.
        # How long nothing happened in which we looked.
        self._looked_at = 0.0
        self._silent_s = 0.0
        self._still_s = 0.0
        self._is_overdue = False  # At the last look.
        self._verdict: Stalled | None = None
        self._stalled_s = 0.0
        self._is_restart_due = False

    # What happens.

    def up(self, now: float, *, frame_interval_s: float | None, prefill_tokens_max: int) -> None:
        """A life begins that promised a frame every so often; 0 tokens: it did not say."""
        self._is_up = True
        self._frame_interval_s = frame_interval_s
        self._chunk_tokens = prefill_tokens_max
        self._frame_at = self._step_at = self._looked_at = now
        self._prefill_tokens = 0
        self._well()

    def down(self) -> None:
        """The life is over."""
        self._is_up = False
        self._well()

    def heard(
        self, now: float, *, is_step: bool, has_work: bool, prefill_tokens: int
    ) -> Recovered | None:
        """A frame came. `has_work` is whether there was, as far as the frame says or is known.

        `prefill_tokens` are those to be prefilled before what this frame says.
        """
        # What came while we stood still is not what the gap says.
        is_measured = now - self._looked_at <= LOOK_INTERVAL_S + _LATENESS_MAX_S
        if is_measured and not self.is_stalled:
            self._frames.add(now - self._frame_at, now)
        self._frame_at = now
        if self._frame_interval_s is not None:
            # While it hung it could make no step: that is not counted twice.
            self._still_s -= max(0.0, self._silent_s - self._frame_interval_s)
        self._silent_s = 0.0
        if is_step:
            if is_measured and (not self.is_stalled or self._was_wrong):
                is_prefill = max(self._prefill_tokens, prefill_tokens) > 0
                gaps = self._prefills if is_prefill else self._steps
                gaps.add(now - self._step_at, now)
        elif has_work and not self._is_called_hung:
            return None
        # It made a step, or there was none to make, or all that was wrong was its silence: then
        # whether it makes steps is seen from now on.
        self._step_at = now
        self._prefill_tokens = prefill_tokens
        self._still_s = 0.0
        self._is_overdue = False
        if self._verdict is None:
            return None
        recovered = Recovered(self._stalled_s)
        self._well()
        return recovered

    def work_began(self, now: float) -> None:
        """There is work again, after there was none."""
        self._step_at = now
        self._still_s = 0.0

    def prefilled(self, num_tokens: int, took_s: float) -> None:
        """So many tokens were computed within a time that may have waiting in it."""
        self._prefill_pace.add(num_tokens, took_s)

    # What to make of it.

    def look(self, now: float) -> bool:
        """Time passes; whether there is anything to `judge`."""
        passed_s = now - self._looked_at
        self._looked_at = now
        if not self._is_up:
            return False
        if passed_s > LOOK_INTERVAL_S + _LATENESS_MAX_S:
            self._silent_s = self._still_s = 0.0
            self._frame_at = self._step_at = now
            self._is_overdue = False
            return False
        passed_s = min(passed_s, 2 * LOOK_INTERVAL_S)  # A late look is our lateness.
        self._silent_s += passed_s
        self._still_s += passed_s
        if self._verdict is not None:
            self._stalled_s += passed_s
            return True
        is_suspect = max(self._silent_s, self._still_s) >= self.policy.silence_min_s
        self._is_overdue = self._is_overdue and is_suspect
        return is_suspect

    def judge(self, now: float, work: Work) -> Opinion | None:
        """After a `look` that said so."""
        if self._verdict is not None:
            return self._overstay(self._verdict)
        verdict = self._overdue(now, work)
        was_overdue, self._is_overdue = self._is_overdue, verdict is not None
        # Between two looks everything is read that has come.
        if verdict is None or not was_overdue:
            return None
        self._verdict = verdict
        self.num_stalls += 1
        return verdict

    # What is known.

    @property
    def is_stalled(self) -> bool:
        """Whether it was called so, and has not gone on."""
        return self._verdict is not None

    @property
    def silent_s(self) -> float:
        """How long nothing has come from it."""
        return self._silent_s if self._is_up else 0.0

    def bound_s(self, now: float, work: Work) -> float:
        """How long it may take for the next step, given what there is to do."""
        policy = self.policy
        if work.prefill_tokens > 0:
            learnt_s = self._prefills.bound(
                now, factor=policy.decode_factor, peak_factor=policy.peak_factor
            )
            return max(self._prefill_bound_s(work.prefill_tokens), learnt_s)
        if self._steps.num < policy.gaps_min:
            return policy.decode_unmeasured_s
        learnt_s = self._steps.bound(
            now, factor=policy.decode_factor, peak_factor=policy.peak_factor
        )
        return max(policy.silence_min_s * policy.step_min_factor, learnt_s)

    def silence_bound_s(self, now: float) -> float | None:
        """How long it may say nothing; None: it promised nothing."""
        interval_s, policy = self._frame_interval_s, self.policy
        if interval_s is None:
            return None
        learnt_s = self._frames.bound(
            now, factor=policy.decode_factor, peak_factor=policy.peak_factor
        )
        return max(policy.silence_min_s, 3 * interval_s, learnt_s)

    @property
    def _is_called_hung(self) -> bool:
        return self._verdict is not None and self._verdict.failure is FailureKind.HANG

    @property
    def _was_wrong(self) -> bool:
        """Whether the verdict, now that a step came, only says how long its steps can take.

        Who said all the time that it lives was not stopped and continued.
        """
        verdict = self._verdict
        is_stall = verdict is not None and verdict.failure is FailureKind.STALL
        return is_stall and self._frame_interval_s is not None

    def _prefill_bound_s(self, num_tokens: int) -> float:
        policy = self.policy
        if self._prefill_pace.num < policy.prefills_min:
            return policy.prefill_unmeasured_s
        if self._chunk_tokens:
            num_tokens = min(num_tokens, self._chunk_tokens)
        return (
            policy.prefill_min_s
            + policy.prefill_factor * num_tokens * self._prefill_pace.s_per_token()
        )

    def _overdue(self, now: float, work: Work) -> Stalled | None:
        silence_bound_s = self.silence_bound_s(now)
        if silence_bound_s is not None and self._silent_s >= silence_bound_s:
            return Stalled(
                FailureKind.HANG,
                f"the engine says nothing for {self._silent_s:.2f} s; expected a sign of life "
                f"within {silence_bound_s:.2f} s",
            )
        if not work.has_steps:
            return None
        bound_s = self.bound_s(now, work)
        if self._still_s < bound_s:
            return None
        phase = f"{work.prefill_tokens} tokens to prefill" if work.prefill_tokens else "decode"
        return Stalled(
            FailureKind.STALL,
            f"the engine has work ({phase}) and makes no step for {self._still_s:.2f} s; expected "
            f"one within {bound_s:.2f} s",
        )

    def _overstay(self, verdict: Stalled) -> Restart | None:
        if self._stalled_s < self.policy.restart_after_s or self._is_restart_due:
            return None
        self._is_restart_due = True
        detail = f"{verdict.detail}; it did not go on within {self._stalled_s:.1f} s more"
        return Restart(verdict.failure, detail, self._stalled_s)

    def _well(self) -> None:
        self._silent_s = self._still_s = self._stalled_s = 0.0
        self._is_overdue = self._is_restart_due = False
        self._verdict = None


class _Pace:
    """How long an engine takes for a token of a prompt: the median of what was measured of late.

    What is measured has waiting in it, so it is never too short.
    """

    _TOKENS_MIN: Final = 32
    """With fewer, a step's base cost is all that is measured."""
    _SAMPLES_MAX: Final = 31

    def __init__(self) -> None:
        self.num = 0
        self._samples: list[float] = []  # The latest, in order.

    def add(self, num_tokens: int, took_s: float) -> None:
        if num_tokens < self._TOKENS_MIN:
            return
        self.num += 1
        self._samples.append(took_s / num_tokens)
        del self._samples[: -self._SAMPLES_MAX]

    def s_per_token(self) -> float:
        return sorted(self._samples)[len(self._samples) // 2]


def _bucket(gap_s: float) -> int:
    """Index of the bucket that a gap belongs to; bucket i ends at MIN * RATIO ** (i + 1)."""
    if gap_s <= _GAP_MIN_S:
        return 0
    return min(ceil(log(gap_s / _GAP_MIN_S) * _GAP_SCALE) - 1, _NUM_BUCKETS - 1)
