"""Decides when an engine that nobody uses is asked for a token, and what its answer means. No I/O.

    WELL ──no progress for `period_s`──▶ asked ──a token──▶ WELL
                                           │
                     no token for `timeout_s`, an end without one, another token than ever before
                                           ▼
                                        FAILING ──`failures_max` in a row──▶ unfit: to be given up
                                           └──progress, or a right answer──▶ WELL

The watchdog (`watchdog`) sees to engines that have work, by their own word: as long as one has, and
does not make a step, no time passes here. So a loaded engine never fails. What is left is the
engine without work, and the one that says so, or says that it makes steps, and lies.

Each data-parallel rank is watched by itself, if its engine tells them apart. While others make
progress and one does not, time passes more slowly for it: it may compute a step that takes long.
Time in which this process did not run counts little, as for the watchdog.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from unbroken.outcome import FailureKind

LATE_S_MAX: Final = 0.1
"""Of the time between two looks, what counts."""
PATIENCE: Final = 4
"""So many times slower it passes for a rank while others make progress."""
LEFT_MIN: Final = 4
"""So many probes may be left with a rank at least, unanswered and not waited for any more."""


@dataclass(frozen=True, slots=True)
class CanaryPolicy:
    """How often and how long. Times in seconds."""

    period_s: float = 10.0
    """A rank that makes no progress for so long is asked; 0: never."""
    timeout_s: float = 5.0
    """So long a token may take to come."""
    failures_max: int = 3
    """So many failures in a row, and the engine is given up; 0: it never is."""


# What is to be done.


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask for one token."""

    number: int
    """Of the probe, never used twice."""
    rank: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Wait for this answer no longer."""

    number: int


@dataclass(frozen=True, slots=True)
class Failing:
    """Send it no work, and let its streams go elsewhere."""

    failure: FailureKind
    detail: str


@dataclass(frozen=True, slots=True)
class Well:
    """It takes work again."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """Save what can be saved, and give the engine up."""

    detail: str


Command: TypeAlias = Probe | Abandon | Failing | Well | Unfit


@dataclass(slots=True)
class _Rank:
    idle_s: float = 0.0
    """Since its last progress."""
    probe: int | None = None
    """What it has been asked and has not answered."""
    waited_s: float = 0.0
    """For that."""
    num_failures: int = 0
    """In a row."""
    is_wrong: bool = False
    """Its last answer was, and nothing but a right one makes up for that."""


@dataclass(slots=True)
class Canary:
    """Watches the ranks of one engine through all its lives; `now` is monotonic seconds."""

    policy: CanaryPolicy = field(default_factory=CanaryPolicy)
    num_probes: int = 0
    """Ever made."""
    num_failures: int = 0
    """Ever seen."""
    _ranks: list[_Rank] = field(default_factory=list[_Rank])
    _is_repeatable: bool = False
    _answer: int | None = None
    """The token that it always gives, once it has given one."""
    _looked_at: float = 0.0
    _has_partly_moved: bool = False
    """Since it looked, some ranks made progress, and others perhaps did not."""
    _is_failing: bool = False
    _is_unfit: bool = False

    @property
    def is_failing(self) -> bool:
        return self._is_failing

    def up(self, now: float, *, num_ranks: int, is_repeatable: bool) -> Sequence[Command]:
        """A life begins; `is_repeatable`: equal questions always have equal answers."""
        self._ranks = [_Rank() for _ in range(max(1, num_ranks))]
        self._is_repeatable, self._answer = is_repeatable, None
        self._looked_at = now
        self._has_partly_moved = False
        return self._well()

    def down(self) -> Sequence[Command]:
        """The life is over, and what was asked with it."""
        self._ranks = []
        return self._well()

    def progressed(self, ranks: Collection[int] | None = None) -> Sequence[Command]:
        """It made what only an engine that works makes: tokens of any stream, a prefill.

        `ranks` are those which did; None: it does not tell, so all are believed to.
        """
        self._has_partly_moved = ranks is not None
        for number, rank in enumerate(self._ranks):
            if not rank.is_wrong and (ranks is None or number in ranks):
                rank.idle_s = rank.waited_s = 0.0
                rank.num_failures = 0
        return self._well()

    def answered(self, number: int, token_id: int) -> Sequence[Command]:
        """A probe brought its token."""
        rank = self._rank_of(number)
        if rank is None:
            return []
        if self._is_repeatable:
            before, self._answer = self._answer, token_id if self._answer is None else self._answer
            rank.is_wrong = before not in (None, token_id)
            if rank.is_wrong:
                return self._failed(
                    rank,
                    FailureKind.DIVERGED,
                    f"expected token {before}, as always, got {token_id}",
                )
        rank.probe = None
        rank.idle_s = 0.0
        rank.num_failures = 0
        return self._well()

    def ended(self, number: int, detail: str) -> Sequence[Command]:
        """A probe ended, or was refused, without a token."""
        rank = self._rank_of(number)
        if rank is None:
            return []
        return self._failed(rank, FailureKind.ENGINE_ERROR, f"expected a token, got {detail}")

    def deferred(self, number: int) -> Sequence[Command]:
        """The engine has no room for the probe, which says that it has other work."""
        rank = self._rank_of(number)
        if rank is not None:
            rank.probe, rank.idle_s = None, 0.0
        return []

    def look(self, now: float, *, is_guarded: bool, num_left: int = 0) -> Sequence[Command]:
        """Time passes. `is_guarded`: the watchdog waits for its next step. `num_left`: so many
        probes are with it that were given up; who has too many is not asked again.
        """
        passed_s = min(max(0.0, now - self._looked_at), LATE_S_MAX)
        self._looked_at = now
        pace = 1 / PATIENCE if self._has_partly_moved else 1.0
        self._has_partly_moved = False
        if is_guarded or not self.policy.period_s or self._is_unfit:
            return []
        has_room = num_left < len(self._ranks) * max(self.policy.failures_max, LEFT_MIN)
        passed_s *= pace  # Who made progress himself begins anew with it.
        commands: list[Command] = []
        for number, rank in enumerate(self._ranks):
            rank.idle_s += passed_s
            if rank.probe is None:
                if rank.idle_s >= self.policy.period_s and has_room:
                    self.num_probes += 1
                    rank.probe, rank.waited_s = self.num_probes, 0.0
                    commands.append(Probe(rank.probe, number))
                continue
            rank.waited_s += passed_s
            if rank.waited_s >= self.policy.timeout_s:
                probe = rank.probe
                where = f"rank {number}" if len(self._ranks) > 1 else "the engine"
                detail = f"{where} gave no token within {self.policy.timeout_s:g} s"
                commands += [Abandon(probe), *self._failed(rank, FailureKind.STALL, detail)]
        return commands

    def check(self) -> None:
        """Assert what is always true."""
        assert self._is_failing or all(rank.num_failures == 0 for rank in self._ranks)
        probes = [rank.probe for rank in self._ranks if rank.probe is not None]
        assert len(probes) == len(set(probes)), "each rank is asked by itself"

    def _rank_of(self, number: int) -> _Rank | None:
        return next((rank for rank in self._ranks if rank.probe == number), None)

    def _failed(self, rank: _Rank, failure: FailureKind, detail: str) -> Sequence[Command]:
        self.num_failures += 1
        rank.probe = None
        rank.num_failures += 1
        rank.idle_s = self.policy.period_s / 2  # It is asked again sooner: it may be well again.
        commands: list[Command] = []
        if not self._is_failing:
            self._is_failing = True
            commands.append(Failing(failure, detail))
        if rank.num_failures == self.policy.failures_max and not self._is_unfit:
            self._is_unfit = True
            commands.append(Unfit(f"{detail}, {rank.num_failures} times in a row"))
        return commands

    def _well(self) -> Sequence[Command]:
        if not self._is_failing or any(rank.num_failures for rank in self._ranks):
            return []
        self._is_failing = False
        return [Well()]
