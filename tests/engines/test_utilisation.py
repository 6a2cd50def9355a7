"""Claims of `tests.engines.real.utilisation`, by which `make engines` judges reports of load."""

import pytest

from tests.engines.real.utilisation import between, worst_second

TRUTH = [(0.0, 10.0), (2.0, 30.0), (2.5, 0.0)]


def test_a_report_that_comes_late_is_apart_for_as_long() -> None:
    late = [(when + 0.1, value) for when, value in TRUTH]
    assert between(late, TRUTH, 0.0, 4.0) == pytest.approx(0.1 * 20 + 0.1 * 30)
    assert worst_second(late, TRUTH, 0.0, 4.0) == pytest.approx(5.0)
    assert between(TRUTH, TRUTH, 0.0, 4.0) == 0


def test_only_what_lies_within_counts() -> None:
    wrong = [(0.0, 12.0)]
    assert between(wrong, TRUTH, 0.5, 1.5) == pytest.approx(2.0)
    assert worst_second(wrong, TRUTH, 0.0, 2.0) == pytest.approx(2.0)
