"""How far what is reported of KV blocks lies from what is so. No I/O."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

Curve: TypeAlias = Sequence[tuple[float, float]]
"""When (seconds, rising) it became how much."""


def at(curve: Curve, when: float) -> float:
    """Its value; the first one before it begins."""
    return curve[max(0, bisect_right(curve, when, key=lambda point: point[0]) - 1)][1]


def between(one: Curve, other: Curve, begin: float, end: float) -> float:
    """The area between two curves, in blocks times seconds."""
    moments = {begin, end, *(when for curve in (one, other) for when, _ in curve)}
    moments = sorted(when for when in moments if begin <= when <= end)
    return sum(
        abs(at(one, left) - at(other, left)) * (right - left) for left, right in pairwise(moments)
    )


def worst_second(one: Curve, other: Curve, begin: float, end: float) -> float:
    """The largest such area within a second; seconds that begin at every tenth."""
    num = max(1, int((end - begin - 1.0) / 0.1) + 1)
    return max(
        between(one, other, left, min(end, left + 1.0))
        for left in (begin + index * 0.1 for index in range(num))
    )
