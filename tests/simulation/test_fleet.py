"""Who is believed to be dead, slow or deadly, is so, in hundreds of hostile worlds."""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from typing_extensions import override

import frontend.query_of_death
from frontend.failure_detector import Death, FailureDetector
from frontend.outliers import Outliers
from frontend.query_of_death import Fingerprint, Queries
from frontend.stream import Life
from tests.simulation import fleet
from tests.simulation.fleet import Fleet
from tests.simulation.witness import Violation

NUM_SEEDS = 400
NUM_PARTS = 2
SEEDS_PER_PART = NUM_SEEDS // NUM_PARTS
SEEDS_MAX = 1000
"""Within which each planted bug is found."""


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_seed_keeps_every_promise_and_everything_happens(part: int) -> None:
    seen = Counter[str]()
    for seed in range(part * SEEDS_PER_PART, (part + 1) * SEEDS_PER_PART):
        it = Fleet(seed)
        try:
            it.live()
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}")
        seen.update(it.seen.keys())
    everything = [
        *fleet.Trouble,
        fleet.SUSPICION,
        fleet.DEATH,
        fleet.EJECTION,
        fleet.READMISSION,
        fleet.TRIAL,
        fleet.STOPPED,
    ]
    assert not [one for one in everything if not seen[one]]


class ForgetsStandstills(FailureDetector):
    """Takes its own standing still for the silence of others."""

    @override
    def expects_to_look(self, at: float) -> None:
        pass


class IsHasty(FailureDetector):
    """Gives up after three missed heartbeats."""

    @property
    @override
    def dead_after_s(self) -> float:
        return 0.3


class IsPatient(FailureDetector):
    """Has no ceiling."""

    @property
    @override
    def dead_after_s(self) -> float:
        return 20.0


class TrustsWhoIsHeard(FailureDetector):
    """Does not notice that a sidecar hears nothing."""

    @property
    @override
    def deaf_s(self) -> float:
        return 0.0


class NeverSaysSo(FailureDetector):
    """Gives up without being sure."""

    @override
    def judge(self, now: float) -> Death | None:
        before = self.liveness
        death = super().judge(now)
        if death is not None:
            self.liveness = before
        return death


class HasNoCeiling(Outliers):
    """Ejects whoever looks bad."""

    @override
    def _may_eject(self, worker_id: str) -> bool:
        return True

    @override
    def _look_for_panic(self) -> None:
        pass


class TriesManyAtOnce(Queries):
    """Suspects run together."""

    @override
    def may_start(self, query: Fingerprint, life: Life, now: float) -> bool:
        return True


class NeverTries(Queries):
    """Nobody is suspect enough."""

    @override
    def is_suspect(self, query: Fingerprint) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(
            (one.__name__, partial(Fleet, detector_type=one))
            for one in (ForgetsStandstills, IsHasty, IsPatient, TrustsWhoIsHeard, NeverSaysSo)
        ),
        (HasNoCeiling.__name__, partial(Fleet, outliers_type=HasNoCeiling)),
        *(
            (one.__name__, partial(Fleet, queries_type=one))
            for one in (TriesManyAtOnce, NeverTries)
        ),
    ],
)
def test_a_planted_bug_is_found(
    name: str, make: Callable[[int], Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    _find(name, make, capsys)


def test_a_suspect_that_is_tried_where_an_engine_has_just_died_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is told of a death comes bit by bit, and a trial in between ends with that same death.
    monkeypatch.setattr(frontend.query_of_death, "SETTLE_S", 0.0)
    _find("SETTLE_S", Fleet, capsys)


def _find(name: str, make: Callable[[int], Fleet], capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(SEEDS_MAX):
        try:
            make(seed).live()
        except AssertionError as violation:
            with capsys.disabled():
                sys.stdout.write(f"\n{name}: seed {seed}: {str(violation)[:150]}")
            return
    pytest.fail(f"{name} survived {SEEDS_MAX} seeds")
