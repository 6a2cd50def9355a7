"""How many prompt tokens each tenant had computed here lately. No I/O.

What began a while ago counts less: who comes in bursts, and asks for
little in all, is told from who always asks for more than there is.
"""

from math import exp
from typing import Final

MEMORY_S: Final = 2.0
"""What began so long ago counts a third."""
TENANTS_MAX: Final = 256
"""The others, who had least, count as if they had had nothing."""


class RecentUse:
    """Of one worker. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        """Tokens, and when they were so many."""

    def of(self, tenant: str, now: float) -> float:
        """Tokens of a tenant."""
        tokens, at = self._known.get(tenant, (0.0, now))
        return tokens * exp(min(0.0, at - now) / MEMORY_S)

    def most_of_others(self, tenant: str, now: float) -> float:
        """Of the other tenant that had most."""
        return max((self.of(name, now) for name in self._known if name != tenant), default=0.0)

    def began(self, tenant: str, num_tokens: int, now: float) -> None:
        """So many more are computed for it."""
        self._known[tenant] = self.of(tenant, now) + num_tokens, now
        if len(self._known) > TENANTS_MAX:
            del self._known[min(self._known, key=lambda name: (self.of(name, now), name))]
