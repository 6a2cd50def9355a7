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
    report = _lived(seed, fleet)
    report.num_tokens = sum(job.offset for job in fleet.jobs)
    return report


def run_crowd_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of a crowd and report."""
    crowd = Crowd(seed, trace=trace)
    report = _lived(seed, crowd)
    report.num_tokens = sum(job.num_tokens for job in crowd.jobs if job.outcome == "served")
    return report


def run_pauses_seed(seed: int, *, trace: Callable[[str], None] | None = None) -> Report:
    """Live through one world of pauses and report."""
    pauses = Pauses(seed, trace=trace)
    report = _lived(seed, pauses)
    report.num_tokens = sum(len(job.stream.ledger) for job in pauses.jobs)
    return report


def _lived(seed: int, it: Fleet | Crowd | Pauses) -> Report:
    """What can be told of each of them; `num_tokens` cannot."""
    report = Report(seed, num_streams=len(it.jobs))
    try:
        it.live()
    except AssertionError as violation:
        report.violation = str(violation) or repr(violation)
        it.world.tell("VIOLATION %s", report.violation)
    report.faults = cast("Counter[Fault]", +it.seen)  # Trouble and events of its own kinds.
    report.num_events = it.world.num_events
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
