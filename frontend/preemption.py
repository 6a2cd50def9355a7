"""Who is paused for a request of a higher priority, and when he goes on: no I/O.

    a request waits, all its workers are busy ──▶ whom ──▶ halting ──its worker confirms──▶ PAUSED
                                                              │                               │
                                       ended, lost, complete ◀┘    room, or waited enough ──next──▶
                                                                                        goes on

*Who.* Streams of strictly lower priority at one of the workers that the newcomer could go to: the
lowest priority first, then those with the least to compute again for what they free. Nobody who is
nearly done, who went on not long ago, or who was paused often. *How many.* As many as bring one
worker under its thresholds, and none if all that may be paused do not suffice.

*What is free.* Nothing is counted as free because we say so: the newcomer gets in when a report
shows room. Until a report can show what was paused last, nobody else is paused for the model.

*Going on.* The highest priority first, then who has been paused for longest, one at a time, as soon
as a worker has room for all that he holds and nobody of a higher priority waits. Who has been
paused for long enough goes on whatever there is: he was admitted before, and has the budget of the
resume queue. New work of the same priority or a lower one waits for those who are paused.

docs/decisions/preemption.md says why.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, Generic, NamedTuple, TypeVar

from frontend.busy import Busy
from frontend.stream import Life
from unbroken.thresholds import Excess, Threshold

NEARLY_DONE_TOKENS: Final = 32
"""Who has no more output left, at most, is not paused."""
PAUSED_AT_ONCE_MAX: Final = 16
"""Streams paused for one request. If that is not enough, nobody is."""
REGENERATED_PRICE: Final = 16
"""A token that has to be generated again costs as much as so many of a prompt."""
LOOK_INTERVAL_S: Final = 0.02
"""Between two looks for whom to pause: each asks all streams of a lower priority."""
SETTLE_S: Final = 0.25
"""So long after a worker freed what was paused, its reports show it, if it does not count steps."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class PreemptionLimits:
    """Whether streams are paused, and what a stream may suffer."""

    is_on: bool = False
    run_s_min: float = 2.0
    """Between two pauses of a stream."""
    pauses_max: int = 3
    """Of one stream."""
    wait_s_max: float = 30.0
    """In one pause."""


@dataclass(frozen=True, slots=True)
class Candidate(Generic[K]):
    """A stream at a worker that can go on exactly, or as its caller allows."""

    key: K
    life: Life
    priority: int
    num_tokens: int
    """Prompt and output: what it holds, and what has to be computed before it goes on."""
    kv_blocks: int
    """Of those."""
    prefill_tokens: int
    """Of those that its worker has not computed yet."""
    num_left_max: int
    """Tokens that its output may still have."""
    num_regenerated: int = 0
    """Tokens of its output that would have to be generated again."""

    @property
    def price(self) -> int:
        """What is lost with it, in prompt tokens."""
        return self.num_tokens - self.prefill_tokens + REGENERATED_PRICE * self.num_regenerated


class Shortage(NamedTuple):
    """What has to go until a worker is not busy."""

    kv_blocks: int
    prefill_tokens: int

    def covered_by(self, candidate: Candidate[K]) -> float:
        """How much of it goes with a stream: 1 for all of one kind."""
        covered = 0.0
        if self.kv_blocks:
            covered += min(1.0, candidate.kv_blocks / self.kv_blocks)
        if self.prefill_tokens:
            covered += min(1.0, candidate.prefill_tokens / self.prefill_tokens)
        return covered


def shortage(excesses: Sequence[Excess]) -> Shortage:
    """Of the rank that is least beyond its thresholds."""
    kv_blocks = prefill_tokens = 0
    for excess in excesses:
        if excess.threshold is Threshold.KV_BLOCKS_SHARE:
            kv_blocks = max(kv_blocks, ceil(excess.amount))
        else:
            prefill_tokens = max(prefill_tokens, ceil(excess.amount))
    return Shortage(kv_blocks, prefill_tokens)


@dataclass(slots=True)
class _Story:
    """What a stream has suffered."""

    num_pauses: int = 0
    went_on_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class _Halting:
    model: str
    life: Life
    priority: int


@dataclass(frozen=True, slots=True)
class _Rest:
    """A pause."""

    model: str
    priority: int
    since: float


@dataclass(frozen=True, slots=True)
class _Settling:
    """A worker freed something that its reports may not show yet."""

    model: str
    steps_total: int
    until: float


class Looks:
    """When it is looked whom to pause: for each model in its own time, however many wait in vain
    for others.
    """

    def __init__(self) -> None:
        self._looked_at: dict[str, float] = {}

    def due(self, model: str) -> float:
        """Not before then."""
        return self._looked_at.get(model, float("-inf")) + LOOK_INTERVAL_S

    def looked(self, model: str, now: float) -> None:
        """That look is over: the pause is between two looks, however long they take."""
        self._looked_at[model] = now


class Preemption(Generic[K]):
    """All pauses of one frontend. Times are monotonic seconds.

    Whoever obeys tells what came of it: `halting`, then `stopped` or `left`; `went_on`, then
    `placed`; `forget` at the end of a stream.
    """

    def __init__(self, limits: PreemptionLimits) -> None:
        self._limits = limits
        self._stories: dict[K, _Story] = {}
        self._halting: dict[K, _Halting] = {}
        self._paused: dict[K, _Rest] = {}
        self._going_on: dict[K, _Rest] = {}
        self._steps: dict[Life, int] = {}
        self._settling: dict[Life, _Settling] = {}

    # Questions.

    @property
    def is_on(self) -> bool:
        """Whether anybody is paused at all."""
        return self._limits.is_on

    @property
    def num_paused(self) -> int:
        """Streams that hold nothing, and go on later. Safe in any thread."""
        return len(self._paused)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be looked after."""
        return not (self._paused or self._halting or self._settling)

    def paused(self) -> Iterator[tuple[K, float]]:
        """Who is, and since when."""
        for key, rest in self._paused.items():
            yield key, rest.since

    def is_paused(self, key: K) -> bool:
        """Whether it is."""
        return key in self._paused

    def highest_paused(self, model: str) -> int | None:
        """The highest priority of who is paused; new work of no higher one waits for him."""
        levels = [rest.priority for rest in self._paused.values() if rest.model == model]
        return max(levels, default=None)

    def deadline(self) -> float | None:
        """When something is due though nothing happened."""
        dues = [rest.since + self._limits.wait_s_max for rest in self._paused.values()]
        dues += [one.until for one in self._settling.values()]
        return min(dues, default=None)

    def may_be_paused(self, key: K, num_left_max: int, now: float) -> bool:
        """Whether a stream has suffered little enough, and has enough to do."""
        story = self._stories.get(key)
        return (
            num_left_max > NEARLY_DONE_TOKENS
            and key not in self._halting
            and (
                story is None
                or (
                    story.num_pauses < self._limits.pauses_max
                    and now >= story.went_on_at + self._limits.run_s_min
                )
            )
        )

    def whom(
        self,
        model: str,
        priority: int,
        busy: Sequence[Busy],
        candidates: Iterable[Candidate[K]],
        now: float,
    ) -> Sequence[Candidate[K]]:
        """Who is paused for a request of this priority that could go to these workers, which have
        so much for all that is known: nobody if one of them only seems to be busy.
        """
        if not self._limits.is_on or not busy or self._is_unsettled(model, now):
            return ()
        if not all(verdict.is_busy for _, verdict in busy):
            return ()
        by_life: dict[Life, list[Candidate[K]]] = {}
        for one in candidates:
            if one.priority < priority and self.may_be_paused(one.key, one.num_left_max, now):
                by_life.setdefault(one.life, []).append(one)
        found: list[tuple[int, int, Life, Sequence[Candidate[K]]]] = []
        for view, verdict in busy:
            chosen = _least(shortage(verdict.nearest), by_life.get(view.life, ()))
            if chosen:
                highest = max(one.priority for one in chosen)
                price = sum(one.price for one in chosen)
                found.append((highest, price, view.life, chosen))
        return min(found, key=lambda one: one[:3])[3] if found else ()

    def next(
        self,
        first_of: Callable[[str], int | None],
        has_room: Callable[[K], bool],
        now: float,
    ) -> K | None:
        """Who goes on now, if anybody; `first_of` is the highest priority that waits for a model,
        `has_room` tells whether a worker has room for a stream.
        """
        self._settle(now)
        held = {rest.model for rest in self._going_on.values()}  # Nobody knows yet what they take.
        order = sorted(self._paused.items(), key=lambda item: (-item[1].priority, item[1].since))
        for key, rest in order:
            if now >= rest.since + self._limits.wait_s_max:
                return key
            if rest.model in held:
                continue
            first = first_of(rest.model)
            if (first is None or first <= rest.priority) and has_room(key):
                return key
            held.add(rest.model)  # Nobody overtakes: a large one would wait for ever.
        return None

    # Events.

    def halting(self, candidate: Candidate[K], model: str) -> None:
        """Its worker was told to end it."""
        assert candidate.key not in self._paused, "who is paused is at no worker"
        self._halting[candidate.key] = _Halting(model, candidate.life, candidate.priority)

    def stopped(self, key: K, now: float) -> None:
        """Its worker has ended it: it is paused."""
        halting = self._halting.pop(key)
        self._stories.setdefault(key, _Story()).num_pauses += 1
        self._paused[key] = _Rest(halting.model, halting.priority, now)
        steps = self._steps.get(halting.life, 0)
        self._settling[halting.life] = _Settling(halting.model, steps, now + SETTLE_S)

    def left(self, key: K, now: float) -> None:
        """It is at its worker no more, whatever the reason. Idempotent.

        If its worker had not ended it yet, it was disturbed as by a pause: else it could be told to
        stop for ever by a worker that is too slow to do so.
        """
        if self._halting.pop(key, None) is not None:
            story = self._stories.setdefault(key, _Story())
            story.num_pauses += 1
            story.went_on_at = now

    def went_on(self, key: K, now: float) -> float:
        """It looks for a worker; returns how long it was paused."""
        rest = self._going_on[key] = self._paused.pop(key)
        return now - rest.since

    def placed(self, key: K, now: float) -> None:
        """It is at a worker. Idempotent."""
        if self._going_on.pop(key, None) is not None:
            self._stories[key].went_on_at = now

    def forget(self, key: K) -> None:
        """It has ended. Idempotent."""
        for known in (self._stories, self._halting, self._paused, self._going_on):
            known.pop(key, None)

    def reported(self, life: Life, steps_total: int, now: float) -> None:
        """A worker told its load, after so many steps of its engine."""
        self._steps[life] = steps_total
        settling = self._settling.get(life)
        if settling is not None and (steps_total > settling.steps_total or now >= settling.until):
            del self._settling[life]

    def workers(self, lives: Iterable[Life]) -> None:
        """All that are known."""
        known = set(lives)
        for life in self._steps.keys() - known:
            del self._steps[life]
        for life in self._settling.keys() - known:
            del self._settling[life]

    def check(self) -> None:
        """Assert what is always true."""
        halting, paused, going_on = set(self._halting), set(self._paused), set(self._going_on)
        num_in_all = len(halting) + len(paused) + len(going_on)
        assert len(halting | paused | going_on) == num_in_all, "it is in one state at a time"
        assert paused | going_on <= self._stories.keys(), "what a stream suffers is written down"
        for story in self._stories.values():
            assert 1 <= story.num_pauses <= self._limits.pauses_max, "pauses are bounded"

    # Inside.

    def _is_unsettled(self, model: str, now: float) -> bool:
        """Whether what was paused last may not be seen yet."""
        self._settle(now)
        return any(
            one.model == model for one in (*self._settling.values(), *self._halting.values())
        )

    def _settle(self, now: float) -> None:
        for life in [life for life, one in self._settling.items() if now >= one.until]:
            del self._settling[life]


def _least(needed: Shortage, candidates: Sequence[Candidate[K]]) -> Sequence[Candidate[K]]:
    """The fewest and cheapest that suffice, the lowest priorities first; nobody if none do."""

    def price(one: Candidate[K]) -> tuple[int, float]:
        return one.priority, one.price / needed.covered_by(one)

    useful = sorted((one for one in candidates if needed.covered_by(one)), key=price)
    kv_blocks, prefill_tokens = needed
    chosen: list[Candidate[K]] = []
    for one in useful:
        if kv_blocks <= 0 and prefill_tokens <= 0:
            break
        chosen.append(one)
        kv_blocks -= one.kv_blocks
        prefill_tokens -= one.prefill_tokens
    if kv_blocks > 0 or prefill_tokens > 0:
        return ()
    kept: list[Candidate[K]] = []
    for one in reversed(chosen):  # The dearest first.
        if kv_blocks + one.kv_blocks <= 0 and prefill_tokens + one.prefill_tokens <= 0:
            kv_blocks += one.kv_blocks
            prefill_tokens += one.prefill_tokens
        else:
            kept.append(one)
    return kept[::-1] if len(kept) <= PAUSED_AT_ONCE_MAX else ()
