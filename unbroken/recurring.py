"""What is done again and again, and rather beside other work than alone.

A process that wakes every few milliseconds finds its caches cold, and what is small takes many
times as long as in a busy loop (docs/decisions/relay-hop.md). So whoever was woken by something
else lets what is nearly due `join` in, or, when its own work is done, ends `naps`.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

EARLY: Final = 0.1
"""Of an interval: so much earlier something may join."""
LATE: Final = 0.2
"""Of an interval: so much later it is done alone, if it joined the last time. Something soon wakes
the process anyway."""


TIMER_S_MIN: Final = 0.001
"""A loop's timer may be early by a fraction of this. Whoever finds that it is too early waits for
so much more, or it would be woken again at once, and again."""


class Recurring:
    """Something that is done when it begins to `run`, and then whenever it said that it is due."""

    def __init__(
        self, work: Callable[[], float], interval_s: float, clock: Callable[[], float]
    ) -> None:
        """`work` returns when it is due again, by `clock`, in seconds; inf: never.

        That is some `interval_s` later, most often.
        """
        self._work = work
        self._early_s = EARLY * interval_s
        self._late_s = LATE * interval_s
        self._clock = clock
        self.is_joining = False
        """While `work` is done: something else is in the middle of what it does."""
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._failed: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Do it until cancelled. Raises what `work` raises."""
        self._failed = asyncio.get_running_loop().create_future()
        try:
            self._do()
            await self._failed
        finally:
            self._failed = None
            self._due = math.inf
            if self._timer is not None:
                self._timer.cancel()

    def join(self) -> None:
        """Something else is being done: do it now, if it is nearly due. Raises nothing."""
        if self._clock() >= self._due - self._early_s:
            self.is_joining = True
            self._do(self._late_s)
            self.is_joining = False

    def _do(self, late_s: float = 0.0) -> None:
        failed = self._failed
        if failed is None or failed.done():
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = math.inf  # Whatever it does, it is not to join itself.
        try:
            self._due = self._work()
        except Exception as error:
            failed.set_exception(error)
            return
        if self._due < math.inf:
            wait_s = max(0.0, self._due - self._clock()) + late_s
            self._timer = failed.get_loop().call_later(wait_s, self._do)


@dataclass(slots=True)
class _Nap:
    """One that has not ended."""

    seconds: float
    is_over: Callable[[], bool] | None
    """Asked when its time has come; if it is not, the nap begins anew."""
    early_at: float
    """When it may end beside other work."""
    timer: asyncio.TimerHandle


class Naps:
    """Sleeps of one event loop that end beside other work, if there is some around their time."""

    def __init__(self) -> None:
        self._naps: dict[asyncio.Future[None], _Nap] = {}
        self._next_at = math.inf
        """When the first of them may end, or before."""
        self._ended_at = -math.inf

    async def sleep(self, seconds: float) -> None:
        """As `asyncio.sleep`, if nobody `end`s naps; else up to `EARLY` of it shorter, or `LATE`
        longer."""
        await self._sleep(seconds, None)

    async def until(self, is_over: Callable[[], bool], interval_s: float) -> None:
        """Sleep until `is_over`, which is asked now, and after each such interval.

        Cheaper than to sleep in a loop: no task is woken to ask. It is asked in the middle of other
        work, so it MUST be quick, and begin no nap. Raises what it raises.
        """
        if not is_over():
            await self._sleep(interval_s, is_over)

    async def _sleep(self, seconds: float, is_over: Callable[[], bool] | None) -> None:
        future = asyncio.get_running_loop().create_future()
        one = self._naps[future] = _Nap(seconds, is_over, *self._timed(seconds, future))
        try:
            await future
        finally:
            one.timer.cancel()
            del self._naps[future]

    def _timed(
        self, seconds: float, future: asyncio.Future[None]
    ) -> tuple[float, asyncio.TimerHandle]:
        """When a nap from now on may end, and what ends it in time."""
        now = time.monotonic()
        is_busy = now - self._ended_at < seconds
        wait_s = seconds * (1 + LATE) if is_busy else seconds
        early_at = now + seconds * (1 - EARLY)
        self._next_at = min(self._next_at, early_at)
        return early_at, future.get_loop().call_later(wait_s, self._end_one, future)

    def end(self) -> None:
        """Something else has been done: end those whose time has nearly come, or ask. Cheap."""
        now = self._ended_at = time.monotonic()
        if now < self._next_at:
            return
        for future in [future for future, one in self._naps.items() if now >= one.early_at]:
            self._end_one(future)
        asleep = (one.early_at for future, one in self._naps.items() if not future.done())
        self._next_at = min(asleep, default=math.inf)

    def _end_one(self, future: asyncio.Future[None]) -> None:
        """Its time has come."""
        if future.done():
            return
        one = self._naps[future]
        try:
            is_over = one.is_over is None or one.is_over()
        except Exception as error:
            future.set_exception(error)
            return
        if is_over:
            future.set_result(None)
        else:
            one.timer.cancel()
            one.early_at, one.timer = self._timed(one.seconds, future)


_naps: WeakKeyDictionary[asyncio.AbstractEventLoop, Naps] = WeakKeyDictionary()


def naps() -> Naps:
    """Those of the running event loop."""
    loop = asyncio.get_running_loop()
    found = _naps.get(loop)
    if found is None:
        found = _naps[loop] = Naps()
    return found


async def nap(seconds: float) -> None:
    """Sleep, and rather wake beside other work; see `Naps.sleep`."""
    await naps().sleep(seconds)
