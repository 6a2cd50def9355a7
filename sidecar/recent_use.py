"""How many prompt tokens each tenant had computed here lately. No I/O.

What began a while ago counts less: who comes in bursts, and asks for
little in all, is told from who always asks for more than there is.
"""

from math import exp, inf, log
from typing import Final

MEMORY_S: Final = 2.0
"""What began so long ago counts a third."""
TENANTS_MAX: Final = 256
"""The others, who had least, count as if they had had nothing."""


class RecentUse:
    """Of one worker. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        """The logarithm of what each has, plus the time of that in memories: that does not change
        as time goes by, so whoever has most is found without looking at the time."""

    def of(self, tenant: str, now: float) -> float:
        """Tokens of a tenant."""
        return exp(self._known.get(tenant, -inf) - now / MEMORY_S)

    def most_of_others(self, tenant: str, now: float) -> float:
        """Of the other tenant that had most."""
        others = (one for name, one in self._known.items() if name != tenant)
        return exp(max(others, default=-inf) - now / MEMORY_S)

    def began(self, tenant: str, num_tokens: int, now: float) -> None:
        """So many more are computed for it."""
        num_tokens_now = self.of(tenant, now) + num_tokens
        if num_tokens_now <= 0:
            return
        self._known[tenant] = log(num_tokens_now) + now / MEMORY_S
        if len(self._known) > TENANTS_MAX:
            del self._known[min(self._known, key=lambda name: (self._known[name], name))]
