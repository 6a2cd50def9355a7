"""What benchmarks say of processes that wait for a core."""

import os

from benchmarks.core_time import CoreTime


def test_the_time_that_this_process_runs_is_seen() -> None:
    before = seen = CoreTime.of([os.getpid()])
    for _ in range(10_000):
        sum(range(10_000))
        seen = CoreTime.of([os.getpid()]).since(before)
        if seen.ran_s > 0.02:
            break
    assert seen.ran_s > 0.02
    assert 0.0 <= seen.waited_share < 1.0


def test_processes_that_are_gone_count_as_nothing() -> None:
    assert CoreTime.of([2**30]) == CoreTime()
    assert CoreTime().wait_ms_mean == 0.0


def test_waits_are_a_mean_of_slices_and_a_share_of_what_was_wanted() -> None:
    time = CoreTime(ran_s=1.0, waited_s=3.0, num_slices=1000)
    assert (time.wait_ms_mean, time.waited_share) == (3.0, 0.75)
