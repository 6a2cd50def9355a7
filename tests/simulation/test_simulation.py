"""The promises hold in thousands of hostile worlds."""

from collections import Counter

import pytest

from tests.simulation.faults import Fault
from tests.simulation.scenario import quiet, run_seed

NUM_SEEDS = 5000
NUM_PARTS = 5
SEEDS_PER_PART = NUM_SEEDS // NUM_PARTS
OF_STREAMS = [fault for fault in Fault if fault is not Fault.FRONTEND_DRAIN]


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_seed_keeps_every_promise_and_every_kind_of_fault_takes_effect(part: int) -> None:
    seeds_with = Counter[Fault]()
    with quiet():
        for seed in range(part * SEEDS_PER_PART, (part + 1) * SEEDS_PER_PART):
            report = run_seed(seed)
            assert report.violation is None, (
                f"{report.violation}\nreplay: python -m tests.simulation --seed {seed} --trace"
            )
            seeds_with.update(report.faults.keys())
    missing = [fault.value for fault in OF_STREAMS if not seeds_with[fault]]
    assert not missing, f"faults that no seed from {part * SEEDS_PER_PART} on had: {missing}"


def test_a_seed_replays_to_the_same_story() -> None:
    stories: list[list[str]] = []
    for _ in range(2):
        story: list[str] = []
        with quiet():
            run_seed(7, trace=story.append)
        stories.append(story)
    assert stories[0] == stories[1]
    assert len(stories[0]) > 20
