"""Keeping Python's garbage collector out of the way of streams.

A full collection looks at every object of a process: 15 ms for those that are there after the
start, half a second with tens of thousands of streams. And bursts set it off: of all moments, it
comes when an engine has died and all its streams move. So what is there after the start is taken
out of its sight, and full collections wait until nothing runs. Young objects, among which most
cycles end, are collected as ever, in a fraction of a millisecond; but not in the milliseconds
before something urgent has been done, as when streams move. And nothing is collected in the moment
in which a process is being started.
"""

import asyncio
import functools
import gc
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

from unbroken.recurring import nap

IDLE_INTERVAL_S: Final = 10.0
"""Between two full collections while nothing runs."""
BUSY_INTERVAL_S: Final = 3600.0
"""Between two at most, whatever runs: what is in cycles and old is not to be kept for ever."""
_LOOK_INTERVAL_S: Final = 1.0
_NEVER: Final = 2**31 - 1


@functools.cache
def collect_nothing_in_forks() -> None:
    """From now on, have no collection begin between a fork and the program that follows it.

    uvloop starts processes so, and runs Python's own hooks in between. What is collected there may
    wait for a thread that only the parent has: the last object of grpc.aio does, without an end,
    and the parent waits for the program. Idempotent. Not for processes whose forks go on in Python
    (they would never collect), or that disable collections themselves.
    """
    os.register_at_fork(before=gc.disable, after_in_parent=gc.enable)


_is_ours = False
"""Whether this process is within `collected_in_quiet`."""


def wait() -> None:
    """Have no collection begin by itself until `wait_no_more`, some milliseconds later. Idempotent.

    Of no effect outside of `collected_in_quiet`, which sees to it that it comes to an end.
    """
    if _is_ours:
        gc.disable()


def wait_no_more() -> None:
    """The opposite of `wait`. Idempotent."""
    if _is_ours:
        gc.enable()


@asynccontextmanager
async def collected_in_quiet(
    is_idle: Callable[[], bool],
    *,
    look_interval_s: float = _LOOK_INTERVAL_S,
    idle_interval_s: float = IDLE_INTERVAL_S,
    busy_interval_s: float = BUSY_INTERVAL_S,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[None]:
    """Within, full collections come when `is_idle` says so; for a whole process, once started."""
    global _is_ours
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, middle, _NEVER)

    async def collect(collected_at: float) -> None:
        while True:
            await nap(look_interval_s)
            interval_s = idle_interval_s if is_idle() else busy_interval_s
            if clock() - collected_at >= interval_s:
                gc.collect()
                collected_at = clock()

    collecting = asyncio.create_task(collect(clock()), name="collect garbage")
    _is_ours = True
    try:
        yield
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        wait_no_more()
        _is_ours = False
        gc.set_threshold(young, middle, old)
        gc.unfreeze()
