"""Whatever comes at once: who gets in, who waits, who is sent away, in thousands of worlds."""

from collections import Counter

import pytest
from typing_extensions import override

from frontend.admission_queue import AdmissionQueue, Arrival
from sidecar.admission import Admission
from tests.simulation.crowd import Crowd, Event, Job
from tests.simulation.witness import Violation

NUM_SEEDS = 5000
NUM_PARTS = 5
SEEDS_PER_PART = NUM_SEEDS // NUM_PARTS
SEEDS_MAX = 300
"""Within which each planted bug is found."""


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_seed_keeps_every_promise_and_everything_happens(part: int) -> None:
    seen = Counter[Event]()
    for seed in range(part * SEEDS_PER_PART, (part + 1) * SEEDS_PER_PART):
        crowd = Crowd(seed)
        try:
            crowd.live()
        except AssertionError as violation:
            pytest.fail(f"seed {seed}: {violation!r}")
        seen.update((+crowd.seen).keys())
    assert not [event for event in Event if not seen[event]]


class ForgetsWhatItGave(Admission[str]):
    """Knows only what the engine reports."""

    @override
    def began(self, slot: int, num_tokens: int, tenant: str, now: float) -> None:
        pass


class ForgetsWhoCameBack(AdmissionQueue[Job]):
    """Whom a worker refused is nowhere."""

    @override
    def come_back(
        self, key: Job, arrival: Arrival, now: float, *, since: float, is_first: bool = False
    ) -> None:
        pass


class KeepsWhoLeft(AdmissionQueue[Job]):
    """Does not let go of who was cancelled."""

    @override
    def remove(self, key: Job) -> None:
        pass


class BreaksPromises(AdmissionQueue[Job]):
    """Knows nobody again."""

    @override
    def check_all(self) -> None:
        for line in self._lines.values():
            for name in list(line.promises):
                line.keep_promise(name)


@pytest.mark.parametrize(
    ("admission", "queue"),
    [
        (ForgetsWhatItGave, AdmissionQueue),
        (Admission, ForgetsWhoCameBack),
        (Admission, KeepsWhoLeft),
        (Admission, BreaksPromises),
    ],
)
def test_a_planted_bug_is_found(
    admission: "type[Admission[str]]", queue: "type[AdmissionQueue[Job]]"
) -> None:
    for seed in range(SEEDS_MAX):
        try:
            Crowd(seed, admission_type=admission, queue_type=queue).live()
        except (AssertionError, Violation):
            return
    pytest.fail(f"not found in {SEEDS_MAX} seeds")
