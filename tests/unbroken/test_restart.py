"""Claims of `unbroken.restart`."""

import pytest

from unbroken.restart import RestartPolicy, Restarts

POLICY = RestartPolicy(
    backoff_initial_s=0.1,
    backoff_factor=2,
    backoff_max_s=1,
    healthy_after_s=10,
    crash_loop_limit=5,
    crash_loop_window_s=60,
)


def delays(restarts: Restarts, count: int, *, first: float, every: float) -> list[float | None]:
    """Lives that never come to serving."""
    return [
        restarts.life_ended(served_since=None, now=first + every * index) for index in range(count)
    ]


def test_after_a_healthy_life_the_next_begins_at_once() -> None:
    assert Restarts(POLICY).life_ended(served_since=5, now=15) == 0


def test_after_a_short_life_the_next_begins_a_little_later() -> None:
    assert Restarts(POLICY).life_ended(served_since=5, now=14.9) == 0.1


def test_waits_grow_up_to_their_limit() -> None:
    waits = delays(Restarts(POLICY), 6, first=0, every=61)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_so_many_short_lives_within_the_window_are_a_crash_loop() -> None:
    waits = delays(Restarts(POLICY), 5, first=100, every=15)
    assert None not in waits[:4]
    assert waits[4] is None


def test_short_lives_that_take_longer_than_the_window_are_none() -> None:
    assert None not in delays(Restarts(POLICY), 50, first=100, every=15.1)


def test_a_healthy_life_forgives_the_short_ones_before() -> None:
    restarts = Restarts(POLICY)
    delays(restarts, 4, first=0, every=1)
    restarts.life_ended(served_since=4, now=14)
    assert restarts.life_ended(served_since=None, now=15) == 0.1


def test_loading_is_not_serving() -> None:
    assert Restarts(POLICY).life_ended(served_since=None, now=1e6) == 0.1


def test_waits_stay_finite_however_many_lives_there_were() -> None:
    assert delays(Restarts(POLICY), 5000, first=0, every=61)[-1] == 1
