"""Noticing that a process's event loop did not get its turn, and saying why.

Everything that a process promises in milliseconds hangs on its event loop. If that stands still,
its peers see silence and act on it; afterwards nobody can say what it was. So a thread looks at it
from outside: it tells where the loop is while it stands, and the loop, once it goes on, what its
thread had in the meantime. Much processor time: its own code. Much time in line for a core: others
have the machine. Page faults from disk: memory is short. Nothing of these: it was stopped, or
waited inside of a system call.
"""

import asyncio
import os
import resource
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from unbroken import log
from unbroken.recurring import LATE, nap

LATE_S: Final = 1.0
"""A loop that is later than this is told of."""
_TICK_S: Final = 0.25
_TICK_S_MAX: Final = (1 + LATE) * _TICK_S
_LOOKS: Final = 2
"""In the time by which a loop has to be late."""
_FRAMES_MAX: Final = 12
_SCHEDSTAT: Final = "/proc/thread-self/schedstat"
"""Of Linux: nanoseconds on a core, nanoseconds in line for one, turns."""

_log = log.get_logger(__name__)


@asynccontextmanager
async def watched_loop(*, late_s: float = LATE_S) -> AsyncGenerator[None]:
    """Within, a running loop that is more than `late_s` late is told of in the log."""
    accounts = _Accounts()
    watch = _Watch(late_s, accounts)
    thread = threading.Thread(target=watch.look, name="loop watch", daemon=True)
    thread.start()
    ticking = asyncio.create_task(watch.tick(), name="loop watch")
    try:
        yield
    finally:
        watch.stopped.set()
        ticking.cancel()
        thread.join()
        accounts.close()


@dataclass(frozen=True, slots=True)
class _Usage:
    """What a thread has had since it began."""

    cpu_s: float
    disk_faults: int
    in_line_s: float | None
    """Ready to run, without a core; None where the kernel does not tell."""


class _Accounts:
    """The kernel's, of the thread that opens them."""

    def __init__(self) -> None:
        self._schedstat: int | None = None
        with suppress(OSError):
            self._schedstat = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)

    def now(self) -> _Usage:
        """To be called in that thread."""
        had = resource.getrusage(resource.RUSAGE_THREAD)
        in_line_s = None
        if self._schedstat is not None:
            with suppress(OSError):
                in_line_s = int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9
        return _Usage(had.ru_utime + had.ru_stime, had.ru_majflt, in_line_s)

    def close(self) -> None:
        if self._schedstat is not None:
            os.close(self._schedstat)
            self._schedstat = None


class _Watch:
    """Of the thread that makes it."""

    def __init__(self, late_s: float, accounts: _Accounts) -> None:
        self.stopped = threading.Event()
        self._accounts = accounts
        self._late_s = late_s
        self._thread_id = threading.get_ident()
        self._ticked_at = time.monotonic()

    async def tick(self) -> None:
        """In the loop: show that it runs."""
        while not self.stopped.is_set():
            before = self._accounts.now()
            await nap(_TICK_S)
            now = time.monotonic()
            late_s = now - self._ticked_at - _TICK_S_MAX
            self._ticked_at = now
            if late_s > self._late_s:
                had = _difference(before, self._accounts.now())
                _log.warning("event loop stood still", late_s=round(late_s, 3), **had)

    def look(self) -> None:
        """In a thread: tell where the loop stands, once each time."""
        told_of = 0.0
        while not self.stopped.wait(self._late_s / _LOOKS):
            ticked_at = self._ticked_at
            if ticked_at == told_of or time.monotonic() - ticked_at < _TICK_S_MAX + self._late_s:
                continue
            told_of = ticked_at
            _log.warning("event loop stands still", at=self._place())

    def _place(self) -> list[str]:
        """Where the loop's thread is, innermost first. Reads no file: memory may be short."""
        frame = sys._current_frames().get(self._thread_id)  # pyright: ignore[reportPrivateUsage]
        places: list[str] = []
        while frame is not None and len(places) < _FRAMES_MAX:
            code = frame.f_code
            places.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        return places


def _difference(before: _Usage, after: _Usage) -> dict[str, float]:
    had: dict[str, float] = {
        "cpu_s": round(after.cpu_s - before.cpu_s, 3),
        "disk_faults": after.disk_faults - before.disk_faults,
    }
    if before.in_line_s is not None and after.in_line_s is not None:
        had["in_line_s"] = round(after.in_line_s - before.in_line_s, 3)
    return had
