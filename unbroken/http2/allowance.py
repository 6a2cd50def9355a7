"""A token bucket: what a peer may do often, but not without end."""


class Allowance:
    """Up to `burst` at once, and `per_s` more each second."""

    __slots__ = ("_at", "_burst", "_left", "_per_s")

    def __init__(self, burst: float, per_s: float, now: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = burst
        self._at = now

    def spend(self, now: float, amount: float = 1.0) -> bool:
        """Take so much; False if there is not as much."""
        if self._left < amount:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
            self._at = now
            if self._left < amount:
                return False
        self._left -= amount
        return True

    def earn(self, amount: float) -> None:
        """Put some back, up to the burst."""
        left = self._left + amount
        self._left = left if left < self._burst else self._burst
