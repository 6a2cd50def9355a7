"""The simulated worlds by name, in a module that processes beside the first can import."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from tests.simulation.faults import Fault
from tests.simulation.fleet import Fleet
from tests.simulation.rush import Rush
from tests.simulation.scenario import Report, quiet, report_of, run_seed


def run_fleet_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of a fleet and report."""
    fleet = Fleet(seed, trace=trace)
    report = Report(seed, num_streams=len(fleet.jobs))
    try:
        fleet.live()
    except AssertionError as violation:
        report.violation = str(violation) or repr(violation)
        fleet.world.tell("VIOLATION %s", report.violation)
    report.faults = cast("Counter[Fault]", +fleet.seen)  # Trouble of its own kinds.
    report.num_events = fleet.world.num_events
    report.num_tokens = sum(job.offset for job in fleet.jobs)
    return report


def run_rush_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of a rush and report."""
    return report_of(Rush(seed, trace=trace), seed)


WORLDS: dict[str, Callable[..., Report]] = {
    "streams": run_seed,
    "fleet": run_fleet_seed,
    "rush": run_rush_seed,
}


def run_chunk(world: str, seeds: Sequence[int]) -> list[Report]:
    """Live through these seeds, one after the other."""
    with quiet():
        return [WORLDS[world](seed) for seed in seeds]
