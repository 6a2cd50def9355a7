"""Whoever comes while workers are full: who is paused, and goes on, in a thousand worlds."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import pytest
from typing_extensions import override

from frontend.busy import Busy
from frontend.preemption import Candidate, Preemption
from frontend.stream import Abort, Command, Paused, State, Stream
from tests.simulation.pauses import Pauses
from tests.simulation.pausing_worker import Event, Job
from tests.simulation.witness import Violation
from unbroken.outcome import FailureKind

NUM_SEEDS = 1000
SEEDS_MAX = 300
"""Within which each planted bug is found."""


def test_every_seed_keeps_every_promise_and_everything_happens() -> None:
    seen = Counter[Event]()
    for seed in range(NUM_SEEDS):
        world = Pauses(seed)
        try:
            world.live()
        except AssertionError as violation:
            pytest.fail(f"seed {seed}: {violation!r}")
        seen.update((+world.seen).keys())
    assert not [event for event in Event if not seen[event]]


class BelievesOldReports(Preemption[Job]):
    """Pauses more while those that it told to stop have not."""

    @override
    def _is_unsettled(self, model: str, now: float) -> bool:
        return False


class ForgetsPauses(Preemption[Job]):
    """Pauses anybody at any time."""

    @override
    def may_be_paused(self, key: Job, num_left_max: int, now: float) -> bool:
        return key not in self._halting

    @override
    def check(self) -> None:
        pass


class PausesPeers(Preemption[Job]):
    """Priorities need not be strictly lower."""

    @override
    def whom(
        self,
        model: str,
        priority: int,
        busy: Sequence[Busy],
        candidates: Iterable[Candidate[Job]],
        now: float,
    ) -> Sequence[Candidate[Job]]:
        same = [one for one in candidates if one.priority <= priority]
        return super().whom(model, priority + 1, busy, same, now)


class WaitsForRoom(Preemption[Job]):
    """Whoever is paused goes on when there is room, if that takes for ever."""

    @override
    def next(
        self, first_of: Callable[[str], int | None], has_room: Callable[[Job], bool], now: float
    ) -> Job | None:
        key = super().next(first_of, has_room, now)
        return key if key is not None and has_room(key) else None


class LetsNewWorkPass(Preemption[Job]):
    """New work does not wait for who is paused."""

    @override
    def highest_paused(self, model: str) -> int | None:
        return None


class StopsListening(Stream):
    """Takes it for granted that its worker has stopped."""

    @override
    def pause(self, detail: str, now: float) -> list[Command]:
        if not super().pause(detail, now):
            return []
        self._halted_at = None
        self._flow_no_more()
        self.attempts[-1].failure = FailureKind.PREEMPTED
        self.state = State.PAUSED
        return [Abort(self.epoch), Paused()]


class LosesTheLastToken(Stream):
    """Goes on one token before where it stood."""

    @override
    def proceed(self, now: float) -> list[Command]:
        if self.state is State.PAUSED and self.ledger:
            self.ledger.pop()
        return super().proceed(now)


@pytest.mark.parametrize(
    ("book", "stream"),
    [
        (BelievesOldReports, Stream),
        (ForgetsPauses, Stream),
        (PausesPeers, Stream),
        (WaitsForRoom, Stream),
        (LetsNewWorkPass, Stream),
        (Preemption, StopsListening),
        (Preemption, LosesTheLastToken),
    ],
)
def test_a_planted_bug_is_found(book: type[Preemption[Job]], stream: type[Stream]) -> None:
    for seed in range(SEEDS_MAX):
        try:
            Pauses(seed, book_type=book, stream_type=stream).live()
        except (AssertionError, Violation):
            return
    pytest.fail(f"not found in {SEEDS_MAX} seeds")
