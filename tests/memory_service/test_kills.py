"""Processes are killed at the steps of what they do with memory; nothing wrong is ever read.

`make memory-proof` has every single line of the library, three signals, and 20,000 random moments.
"""

from collections.abc import Generator

import pytest

from tests.memory_service.processes import serving
from tests.memory_service.trials import SIGNALS, Trials
from tests.memory_service.victim import SCENARIOS

NEEDS = {"attach": ("seal",), "adopt": ("adopt",)}
"""What has to be there."""
POINTS = 14
"""At which each scenario is killed, spread over all lines it runs."""


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Generator[Trials]:
    directory = tmp_path_factory.mktemp("memory")
    with serving(directory, "--scrub-bytes-per-s", "0") as service:
        trials = Trials(service)
        yield trials
        trials.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whoever_is_killed_leaves_nothing_wrong_and_nothing_lost(
    trials: Trials, scenario: str
) -> None:
    for before in NEEDS.get(scenario, ()):
        trials.trial(before)
    num_lines = trials.num_lines(scenario)
    before = trials.figures.killed
    for point in range(POINTS):
        line = 1 + (num_lines - 1) * point // (POINTS - 1)
        trials.trial(scenario, line=line, number=SIGNALS[point % len(SIGNALS)])
    assert trials.figures.violations == []
    assert trials.figures.killed - before == POINTS, "they really died"


def test_nothing_of_them_is_left_when_what_they_stored_is_evicted(trials: Trials) -> None:
    trials.judge_leaks()
    assert trials.figures.violations == []
