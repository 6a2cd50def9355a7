"""How many events there are a second, lately. No I/O."""

import math
from typing import Final

SPAN_S: Final = 10.0
"""An event of so long ago counts for 1/e of one that has just happened."""


class Rate:
    """Counts events; older ones count less and less, so that nothing has to be kept of each."""

    def __init__(self, span_s: float = SPAN_S) -> None:
        self._span_s = span_s
        self._weight = 0.0
        self._at = 0.0

    def count(self, now: float) -> None:
        """An event happened."""
        self._weight = self._weight_at(now) + 1.0
        self._at = max(self._at, now)

    def per_second(self, now: float) -> float:
        """Of steady events their rate, once they have been steady for a few spans."""
        return self._weight_at(now) / self._span_s

    def _weight_at(self, now: float) -> float:
        return self._weight * math.exp(-max(0.0, now - self._at) / self._span_s)
