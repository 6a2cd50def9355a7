"""Clients that come back when they were told come back about once, however many frontends."""

import pytest

from tests.simulation.many_frontends import Silent, Teller, lived

LOADS = (1.0, 6.0), (2.0, 4.0), (10.0, 2.0)
"""Times the capacity, and for how many seconds."""
RATIO_MAX = 1.2
GOODPUT_MIN = 27.5
"""Requests a second, of the 30 that two workers serve if every step is full."""


def ratio_and_goodput(
    num_frontends: int, frontend_type: type[Teller] = Teller
) -> tuple[float, float]:
    """Refusals for each request that was refused, of all loads; and of the slowest load what was
    served in a second."""
    num_refused = num_refusals = 0
    goodputs: list[float] = []
    for jobs in lived(1, num_frontends, LOADS, frontend_type):
        num_refused += sum(bool(job.refusals) for job in jobs)
        num_refusals += sum(job.refusals.total() for job in jobs)
        done = sorted(job.served_at for job in jobs if job.served_at is not None)
        assert len(done) == len(jobs), "everybody is served"
        begin, end = len(done) // 10, len(done) * 9 // 10
        goodputs.append((end - begin) / (done[end] - done[begin]))
    return num_refusals / num_refused, min(goodputs)


@pytest.mark.parametrize("num_frontends", [1, 2, 3, 5, 8])
def test_those_who_are_sent_away_come_back_about_once(num_frontends: int) -> None:
    ratio, goodput = ratio_and_goodput(num_frontends)
    assert ratio <= RATIO_MAX
    assert goodput >= GOODPUT_MIN


def test_frontends_that_tell_nobody_of_their_lines_promise_too_much() -> None:
    assert ratio_and_goodput(3, Silent)[0] > RATIO_MAX
