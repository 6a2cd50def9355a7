"""Claims of `unbroken.deadlines`."""

import pytest

from unbroken.deadlines import left_for_next_hop


@pytest.mark.parametrize(
    ("left_s", "expected_s"), [(10.0, 9.98), (0.04, 0.02), (0.01, 0.005), (0.0, 0.0), (-1.0, 0.0)]
)
def test_each_hop_takes_its_margin_and_never_more_than_half(
    left_s: float, expected_s: float
) -> None:
    assert left_for_next_hop(left_s, 0.02) == pytest.approx(expected_s)
