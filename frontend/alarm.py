"""Wakes somebody at the earliest of the times that were named."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeAlias


class Handle(Protocol):
    """Something that is going to be called."""

    def cancel(self) -> None:
        """It is not."""
        ...


CallLater: TypeAlias = Callable[[float, Callable[[], None]], Handle]
"""Has something called after so many seconds."""


def on_this_loop(wait_s: float, do: Callable[[], None]) -> Handle:
    """By the event loop that runs."""
    return asyncio.get_running_loop().call_later(wait_s, do)


class Alarm:
    """One that rings once; who was woken too early sees that nothing is due, and sets it again."""

    def __init__(
        self,
        ring: Callable[[], None],
        clock: Callable[[], float],
        call_later: CallLater = on_this_loop,
    ) -> None:
        """Times are those of `clock`, monotonic seconds."""
        self._ring = ring
        self._clock = clock
        self._call_later = call_later
        self._timer: Handle | None = None
        self._due = 0.0

    def set(self, due: float | None) -> None:
        """Ring at this time at the latest; None: whenever it was set to."""
        if due is None or (self._timer is not None and self._due <= due):
            return
        self.stop()
        self._due = due
        self._timer = self._call_later(max(0.0, due - self._clock()), self._time)

    def stop(self) -> None:
        """Do not ring. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time(self) -> None:
        self._timer = None
        self._ring()
