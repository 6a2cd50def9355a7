"""A schedule is its seed's, survives its file, and leaves somebody to carry on."""

from dataclasses import replace

import pytest

from unbroken.chaos.schedule import (
    RECOVERS_S,
    Planned,
    ScheduleError,
    from_lines,
    plan,
    to_lines,
)
from unbroken.chaos.vocabulary import NO_SENSE, Component, Harm

WORKERS, FRONTENDS = ["w1", "w2", "w3"], ["f1", "f2"]
NAMES = [*WORKERS, *FRONTENDS]


def test_a_seed_gives_the_same_faults_again() -> None:
    assert plan(7, 60, WORKERS, FRONTENDS) == plan(7, 60, WORKERS, FRONTENDS)
    assert plan(7, 60, WORKERS, FRONTENDS) != plan(8, 60, WORKERS, FRONTENDS)


def test_a_schedule_survives_its_file() -> None:
    faults = plan(3, 300, WORKERS, FRONTENDS)
    assert from_lines(to_lines(faults), NAMES) == faults


def test_everything_that_makes_sense_is_planned_some_time() -> None:
    seen = {(f.component, f.harm) for f in plan(1, 5_000, WORKERS, FRONTENDS)}
    assert seen == {(c, h) for c in Component for h in Harm} - NO_SENSE.keys()


@pytest.mark.parametrize("seed", range(20))
def test_somebody_is_always_left(seed: int) -> None:
    faults = plan(seed, 300, WORKERS, FRONTENDS)
    assert faults
    for group in (WORKERS, FRONTENDS):
        for fault in faults:
            hurt = {
                other.victim
                for other in faults
                if other.victim in group
                and other.at_s <= fault.at_s < other.at_s + other.lasts_s + RECOVERS_S
            }
            assert len(hurt) < len(group)


GOOD = Planned(1.0, Component.ENGINE, Harm.KILL, "w1", 1.0)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "{}",
        to_lines([replace(GOOD, victim="w9")]),
        to_lines([replace(GOOD, harm=Harm.BLACKHOLE)]),
        to_lines([replace(GOOD, at_s=-1.0)]),
        to_lines([GOOD]).replace("kill", "annoy"),
        to_lines([GOOD]).replace("1.0", "NaN"),
    ],
)
def test_a_line_that_is_no_fault_is_refused(line: str) -> None:
    with pytest.raises(ScheduleError):
        from_lines(line, NAMES)
