"""A world in virtual time: a heap of things that will happen, and one source of randomness.

Nothing in it knows the wall clock, and whatever happens follows from the seed alone.
"""

import heapq
from collections.abc import Callable
from random import Random
from typing import Any


class World:
    """Time, chance, and what is going to happen.

    Attributes:
        now: Virtual seconds since the beginning.
        random: The one source of randomness.
        num_events: How many things have happened.
    """

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        """`trace` gets a line for everything worth telling."""
        self.random = Random(seed)
        self.now = 0.0
        self.num_events = 0
        self._trace = trace
        self._future: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_planned = 0

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        """Call `do(*args)` at a time; what is due together happens in the order it was planned."""
        self._num_planned += 1
        heapq.heappush(self._future, (max(when, self.now), self._num_planned, do, args))

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        """Call `do(*args)` after a while."""
        self.at(self.now + delay_s, do, *args)

    def step(self) -> bool:
        """Let the next thing happen; False if nothing is left."""
        if not self._future:
            return False
        self.now, _, do, args = heapq.heappop(self._future)
        self.num_events += 1
        do(*args)
        return True

    def chance(self, probability: float) -> bool:
        """True with this probability. Without a draw if there is no doubt."""
        return probability > 0 and self.random.random() < probability

    def tell(self, format_: str, *args: object) -> None:
        """Add a line to the trace, if there is one."""
        if self._trace is not None:
            self._trace(f"{self.now:10.4f}  {format_ % args}")
