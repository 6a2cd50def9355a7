"""The simulated worlds by name, in a module that processes beside the first can import."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from tests.simulation.crowd import Crowd
from tests.simulation.faults import Fault
from tests.simulation.fleet import Fleet
from tests.simulation.pauses import Pauses
from tests.simulation.scenario import Report, quiet, run_seed


def run_fleet_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of a fleet and report."""
    fleet = Fleet(seed, trace=trace)
    report = Report(seed, num_streams=len(fleet.jobs))
    try:
        fleet.live()
    except AssertionError as violation:
        report.violation = str(violation) or repr(violation)
        fleet.world.tell("VIOLATION %s", report.violation)
    report.faults = cast("Counter[Fault]", fleet.seen)  # Trouble of its own kinds.
    report.num_events = fleet.world.num_events
    report.num_tokens = sum(job.offset for job in fleet.jobs)
    return report


def run_crowd_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of a crowd and report."""
    crowd = Crowd(seed, trace=trace)
    report = Report(seed, num_streams=len(crowd.jobs))
    try:
        crowd.live()
    except AssertionError as violation:
        report.violation = str(violation) or repr(violation)
        crowd.world.tell("VIOLATION %s", report.violation)
    report.faults = cast("Counter[Fault]", +crowd.seen)  # Events of its own kinds.
    report.num_events = crowd.world.num_events
    report.num_tokens = sum(job.num_tokens for job in crowd.jobs if job.outcome == "served")
    return report


def run_pauses_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of pauses and report."""
    pauses = Pauses(seed, trace=trace)
    report = Report(seed, num_streams=len(pauses.jobs))
    try:
        pauses.live()
    except AssertionError as violation:
        report.violation = str(violation) or repr(violation)
        pauses.world.tell("VIOLATION %s", report.violation)
    report.faults = cast("Counter[Fault]", +pauses.seen)  # Events of its own kinds.
    report.num_events = pauses.world.num_events
    report.num_tokens = sum(len(job.stream.ledger) for job in pauses.jobs)
    return report


WORLDS: dict[str, Callable[..., Report]] = {
    "streams": run_seed,
    "fleet": run_fleet_seed,
    "crowd": run_crowd_seed,
    "pauses": run_pauses_seed,
}


def run_chunk(world: str, seeds: Sequence[int]) -> list[Report]:
    """Live through these seeds, one after the other."""
    with quiet():
        return [WORLDS[world](seed) for seed in seeds]
