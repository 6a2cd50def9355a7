"""Claims of `unbroken.rate`, on a clock of its own."""

import pytest

from unbroken.rate import SPAN_S, Rate


def test_steady_events_have_their_rate() -> None:
    rate = Rate()
    now = 0.0
    for _ in range(2000):
        now += 0.05
        rate.count(now)
    assert rate.per_second(now) == pytest.approx(20, rel=0.01)


def test_a_rate_falls_when_nothing_happens_and_never_by_a_clock_that_goes_back() -> None:
    rate = Rate()
    for _ in range(100):
        rate.count(50.0)
    assert rate.per_second(50.0) == pytest.approx(100 / SPAN_S)
    assert rate.per_second(50.0 + SPAN_S) == pytest.approx(100 / SPAN_S / 2.718, rel=0.01)
    assert rate.per_second(50.0 + 100 * SPAN_S) < 1e-30
    assert rate.per_second(40.0) == pytest.approx(100 / SPAN_S)


def test_nothing_has_no_rate() -> None:
    assert Rate().per_second(123.0) == 0
