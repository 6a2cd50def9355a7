"""Which workers live and yet do not serve: failing ones and slow ones are kept out for a while.

               looks bad, and others are left
    ADMITTED ────────────────────────────────▶ EJECTED ◀──┐
       ▲                                          │       │ probe failed: for twice as long
       └──────── probe went well ──── PROBING ◀───┘───────┘
                                          time is up

A worker looks bad that fails attempts by its own fault, several in a row or half of the latest; or
whose inter-token latency or time to first token is far above those of its peers, by a factor of
their median and by their own spread (MAD) as well. What takes many streams at once counts once.
With too few peers nobody is slow: there is nothing to compare with.

An ejected worker gets no new work and keeps what runs there: slow output is still output, and
moving it costs a prefill elsewhere. (One that is so slow as to stand still is stalled, says its
sidecar, and loses its streams by that.) When its time is up, one real request decides.

At most a share of a model's ready workers is ejected, and never the last. When more than that share
looks bad, it is not the workers: then ejections are ignored until fewer do (panic).

Sources: Envoy's outlier detection (ejection time, ceiling, panic threshold) and circuit breakers
(half-open probe); medians rather than means, since one worker in four is a quarter of a mean.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import median
from typing import Final, Protocol, TypeAlias

from unbroken.outcome import FailureKind

WORKER_FAULTS: Final = frozenset(
    {
        FailureKind.CRASH,
        FailureKind.STALL,
        FailureKind.PROTOCOL,
        FailureKind.DIVERGED,
        FailureKind.ENGINE_ERROR,
    }
)
"""How a worker fails by its own fault. Links have a detector of their own."""
TAKES_ALL: Final = frozenset({FailureKind.CRASH, FailureKind.STALL})
_INCIDENT_S: Final = 1.0
"""Losses of a kind that takes all streams at once, so close together, are one."""
_OUTCOMES_MAX: Final = 20
_SAMPLES_MAX: Final = 24
_MAD_TO_DEVIATION: Final = 1.4826
_DEVIATIONS: Final = 5.0
PREFILL_TOKENS_MIN: Final = 256
"""Shorter prefills take as long as this, mostly in things that are not prefill."""


class Chance(Protocol):
    """A source of randomness, as `random.Random`."""

    def random(self) -> float:
        """A number at least 0 and below 1."""
        ...


@dataclass(frozen=True, slots=True)
class OutlierLimits:
    """What is bad, and what follows."""

    failures_max: int = 3
    """So many failures in a row are too many."""
    slow_factor: float = 3.0
    """So many times the median of its peers is slow."""
    peers_min: int = 3
    """Fewer peers with samples are nothing to compare with."""
    samples_min: int = 6
    sample_age_s_max: float = 10.0
    itl_excess_s_min: float = 0.005
    """Less above the median is not worth an ejection."""
    ttft_excess_s_min: float = 0.25
    """The same, for a prefill of `PREFILL_TOKENS_MIN`."""
    ejection_s: float = 5.0
    """For how long, the first time; then twice as long each time."""
    ejection_s_max: float = 300.0
    ejected_share_max: float = 0.5
    probe_timeout_s: float = 5.0
    forgiven_after_s: float = 600.0
    """So long after its readmission a worker begins anew."""


# Commands.


@dataclass(frozen=True, slots=True)
class Eject:
    """Place nothing there."""

    worker_id: str
    detail: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Probe:
    """Send the worker one real request, and say `probed`."""

    worker_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Readmit:
    """Place work there again."""

    worker_id: str


Command: TypeAlias = Eject | Probe | Readmit


class State(Enum):
    """Where a worker stands."""

    ADMITTED = auto()
    EJECTED = auto()
    PROBING = auto()


@dataclass(frozen=True, slots=True)
class Ejection:
    """Why and for how long."""

    detail: str
    until: float | None
    """None while the probe runs."""
    num_in_a_row: int


@dataclass(slots=True)
class _Record:
    """What is known of one worker."""

    state: State = State.ADMITTED
    detail: str = ""
    until: float = 0.0
    """When the ejection, or the wait for its probe, is over."""
    num_in_a_row: int = 0
    probe_number: int = 0
    readmitted_at: float | None = None
    num_failures: int = 0
    """In a row."""
    incident_at: float | None = None
    outcomes: deque[bool] = field(default_factory=lambda: deque[bool](maxlen=_OUTCOMES_MAX))
    """Whether the latest attempts failed."""
    itl_s: deque[tuple[float, float]] = field(
        default_factory=lambda: deque[tuple[float, float]](maxlen=_SAMPLES_MAX)
    )
    """When seen, and the sample."""
    ttft_s: deque[tuple[float, float]] = field(
        default_factory=lambda: deque[tuple[float, float]](maxlen=_SAMPLES_MAX)
    )
    complaint: str = ""
    """Why it looks bad now, ejected or not; empty if it does not."""

    def forget(self) -> None:
        """Judge it by what comes from now on."""
        self.num_failures = 0
        self.outcomes.clear()
        self.itl_s.clear()
        self.ttft_s.clear()
        self.complaint = ""


class Outliers:
    """All workers of one frontend. Times are monotonic seconds."""

    def __init__(self, limits: OutlierLimits, random: Chance) -> None:
        self._limits = limits
        self._random = random
        self._records: dict[str, _Record] = {}
        self._models: Mapping[str, str] = {}
        """Of the workers that are ready."""
        self._panicking: frozenset[str] = frozenset()
        """Models in whose fleet too many look bad."""

    # Questions.

    def is_ejected(self, worker_id: str) -> bool:
        """Whether it gets no work now; never during a panic."""
        record = self._records.get(worker_id)
        if record is None or record.state is State.ADMITTED:
            return False
        return self._models.get(worker_id) not in self._panicking

    def ejection(self, worker_id: str) -> Ejection | None:
        """Why it is kept out, panic or not; None if it is not."""
        record = self._records.get(worker_id)
        if record is None or record.state is State.ADMITTED:
            return None
        until = record.until if record.state is State.EJECTED else None
        return Ejection(record.detail, until, record.num_in_a_row)

    def fails_others(self, worker_id: str) -> bool:
        """Whether it failed more than one attempt in a row: then it is not the attempts."""
        record = self._records.get(worker_id)
        return record is not None and record.num_failures > 1

    @property
    def ejected(self) -> frozenset[str]:
        """Workers that get no work now."""
        return frozenset(filter(self.is_ejected, self._records))

    @property
    def num_ejected(self) -> int:
        """Workers kept out."""
        records = list(self._records.values())
        return sum(record.state is not State.ADMITTED for record in records)

    @property
    def num_panicking(self) -> int:
        """Models in whose fleet too many look bad."""
        return len(self._panicking)

    # Events.

    def members(self, models: Mapping[str, str], known: Sequence[str]) -> None:
        """The models of the workers that are ready, by worker; and all workers there are."""
        self._models = models
        for worker_id in self._records.keys() - set(known):
            del self._records[worker_id]
        self._look_for_panic()

    def went_well(self, worker_id: str) -> None:
        """An attempt produced what it should."""
        record = self._record(worker_id)
        record.num_failures = 0
        record.outcomes.append(False)
        if record.complaint and not self._is_failing(record):
            record.complaint = ""
            self._look_for_panic()

    def failed(self, worker_id: str, failure: FailureKind, now: float) -> list[Command]:
        """An attempt ended before its output."""
        if failure not in WORKER_FAULTS:
            return []
        record = self._record(worker_id)
        if failure in TAKES_ALL:
            last, record.incident_at = record.incident_at, now
            if last is not None and now - last < _INCIDENT_S:
                return []
        record.num_failures += 1
        record.outcomes.append(True)
        if not self._is_failing(record):
            return []
        detail = f"{sum(record.outcomes)} of its latest {len(record.outcomes)} attempts failed"
        return self._complain(worker_id, record, f"{detail}; the last: {failure.name}", now)

    def inter_token(self, worker_id: str, latency_s: float, now: float) -> None:
        """A sample of a stream's mean time between two tokens."""
        self._record(worker_id).itl_s.append((now, latency_s))

    def first_token(
        self, worker_id: str, latency_s: float, num_prefill_tokens: int, now: float
    ) -> None:
        """A stream had its first token, after so many had to be computed."""
        scale = PREFILL_TOKENS_MIN / max(PREFILL_TOKENS_MIN, num_prefill_tokens)
        self._record(worker_id).ttft_s.append((now, latency_s * scale))

    def probed(
        self, worker_id: str, number: int, *, is_good: bool, detail: str, now: float
    ) -> list[Command]:
        """How a probe ended."""
        record = self._records.get(worker_id)
        if record is None or record.state is not State.PROBING or number != record.probe_number:
            return []  # Late news.
        if not is_good:
            return [self._eject(worker_id, record, f"probe failed: {detail}", now)]
        record.state = State.ADMITTED
        record.readmitted_at = now
        record.forget()
        self._look_for_panic()
        return [Readmit(worker_id)]

    def handle_timeout(self, now: float) -> list[Command]:
        """Time passed: compare workers, probe those whose time is up. To be called every second."""
        commands: list[Command] = []
        for worker_id, record in sorted(self._records.items()):
            if record.state is State.ADMITTED:
                self._forgive(record, now)
            elif now >= record.until:
                if record.state is State.PROBING:
                    detail = f"probe failed: no answer for {self._limits.probe_timeout_s:g} s"
                    commands.append(self._eject(worker_id, record, detail, now))
                elif worker_id in self._models:
                    record.state = State.PROBING
                    record.probe_number += 1
                    record.until = now + self._limits.probe_timeout_s
                    commands.append(Probe(worker_id, record.probe_number))
        for model in sorted(set(self._models.values())):
            commands += self._compare(model, now)
        self._look_for_panic()
        return commands

    def check(self) -> None:
        """Assert what is always true."""
        for record in self._records.values():
            assert (record.state is State.ADMITTED) or record.num_in_a_row > 0
            assert len(record.outcomes) <= _OUTCOMES_MAX, "what is remembered is bounded"

    # What happens inside.

    def _record(self, worker_id: str) -> _Record:
        record = self._records.get(worker_id)
        if record is None:
            record = self._records[worker_id] = _Record()
        return record

    def _is_failing(self, record: _Record) -> bool:
        outcomes = record.outcomes
        is_half = len(outcomes) == _OUTCOMES_MAX and 2 * sum(outcomes) >= _OUTCOMES_MAX
        return record.num_failures >= self._limits.failures_max or is_half

    def _compare(self, model: str, now: float) -> list[Command]:
        """Complain of workers that are far slower than their peers, the slowest first."""
        limits = self._limits
        commands: list[Command] = []
        names = sorted(name for name, served in self._models.items() if served == model)
        slow: list[tuple[float, str, str]] = []
        for name, excess_s_min, samples in (
            ("inter-token latency", limits.itl_excess_s_min, self._medians(names, "itl_s", now)),
            ("time to first token", limits.ttft_excess_s_min, self._medians(names, "ttft_s", now)),
        ):
            for worker_id, value in samples.items():
                peers = [other for peer, other in samples.items() if peer != worker_id]
                if len(peers) < limits.peers_min:
                    continue
                middle = median(peers)
                spread = _MAD_TO_DEVIATION * median([abs(peer - middle) for peer in peers])
                bound = max(
                    limits.slow_factor * middle,
                    middle + _DEVIATIONS * spread,
                    middle + excess_s_min,
                )
                if value > bound:
                    factor = value / max(middle, 1e-9)
                    detail = f"{name} of {value * 1e3:.1f} ms, {middle * 1e3:.1f} ms at its peers"
                    slow.append((factor, worker_id, detail))
        for _, worker_id, detail in sorted(slow, reverse=True):
            record = self._records[worker_id]
            if record.state is State.ADMITTED:
                commands += self._complain(worker_id, record, detail, now)
        names_slow = {worker_id for _, worker_id, _ in slow}
        for worker_id in names:
            record = self._records.get(worker_id)
            if record is None or worker_id in names_slow or self._is_failing(record):
                continue
            record.complaint = ""
        return commands

    def _medians(self, worker_ids: Sequence[str], what: str, now: float) -> dict[str, float]:
        """Of the recent samples of each worker that has enough; ejected ones are no measure."""
        limits = self._limits
        medians: dict[str, float] = {}
        for worker_id in worker_ids:
            record = self._records.get(worker_id)
            if record is None or record.state is not State.ADMITTED:
                continue
            samples: deque[tuple[float, float]] = getattr(record, what)
            recent = [value for at, value in samples if now - at <= limits.sample_age_s_max]
            if len(recent) >= limits.samples_min:
                medians[worker_id] = median(recent)
        return medians

    def _complain(self, worker_id: str, record: _Record, detail: str, now: float) -> list[Command]:
        """It looks bad: eject it, unless that would be too many."""
        record.complaint = detail
        commands: list[Command] = []
        if record.state is State.ADMITTED and self._may_eject(worker_id):
            commands.append(self._eject(worker_id, record, detail, now))
        self._look_for_panic()
        return commands

    def _may_eject(self, worker_id: str) -> bool:
        """Whether the ceiling leaves room, and somebody else is left."""
        model = self._models.get(worker_id)
        if model is None:
            return True  # It takes no work anyhow.
        ready = [name for name, served in self._models.items() if served == model]
        num_out = sum(self._is_out(name) for name in ready)
        share_max = self._limits.ejected_share_max
        return num_out + 1 <= share_max * len(ready) and num_out + 1 < len(ready)

    def _is_out(self, worker_id: str) -> bool:
        record = self._records.get(worker_id)
        return record is not None and record.state is not State.ADMITTED

    def _eject(self, worker_id: str, record: _Record, detail: str, now: float) -> Eject:
        limits = self._limits
        doubled_s = limits.ejection_s * 2.0 ** min(record.num_in_a_row, 32)
        # A fifth more or less, so that workers ejected together are not probed together.
        jitter = 0.8 + 0.4 * self._random.random()
        duration_s = min(doubled_s, limits.ejection_s_max) * jitter
        record.state = State.EJECTED
        record.detail = detail
        record.num_in_a_row += 1
        record.until = now + duration_s
        record.readmitted_at = None
        record.forget()
        return Eject(worker_id, detail, duration_s)

    def _forgive(self, record: _Record, now: float) -> None:
        since = record.readmitted_at
        if since is not None and now - since >= self._limits.forgiven_after_s:
            record.num_in_a_row = 0
            record.readmitted_at = None

    def _look_for_panic(self) -> None:
        share_max = self._limits.ejected_share_max
        panicking: set[str] = set()
        for model in set(self._models.values()):
            ready = [name for name, served in self._models.items() if served == model]
            num_out = sum(self._is_out(name) for name in ready)
            num_bad = num_out + sum(
                not self._is_out(name) and bool(self._records[name].complaint)
                for name in ready
                if name in self._records
            )
            if num_out and (num_out == len(ready) or num_bad > share_max * len(ready)):
                panicking.add(model)
        self._panicking = frozenset(panicking)
