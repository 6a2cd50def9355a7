"""Noticing that a process's event loop did not get its turn, and saying why.

Everything that a process promises in milliseconds hangs on its event loop. If that stands still,
its peers see silence and act on it; afterwards nobody can say what it was. So a thread looks at it
from outside: it tells where the loop is while it stands, and the loop, once it goes on, what its
thread had in the meantime. Much processor time: its own code. Much time in line for a core: others
have the machine. Page faults from disk: memory is short. Nothing of these: it was stopped, or
waited inside of a system call.
"""

import asyncio
import resource
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from unbroken import log

LATE_S: Final = 1.0
"""A loop that is later than this is told of."""
_TICK_S: Final = 0.25
_FRAMES_MAX: Final = 12
_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")
"""Of Linux: nanoseconds on a core, nanoseconds in line for one, turns."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the calling thread has had since it began."""

    cpu_s: float
    in_line_s: float
    """Ready to run, without a core; 0 where the kernel does not tell."""
    disk_faults: int

    @classmethod
    def now(cls) -> Self:
        had = resource.getrusage(resource.RUSAGE_THREAD)
        in_line_ns = 0
        with suppress(OSError, ValueError, IndexError):
            in_line_ns = int(_SCHEDSTAT.read_text().split()[1])
        return cls(had.ru_utime + had.ru_stime, in_line_ns / 1e9, had.ru_majflt)

    def since(self, begin: "Usage") -> dict[str, float]:
        return {
            "cpu_s": round(self.cpu_s - begin.cpu_s, 3),
            "in_line_s": round(self.in_line_s - begin.in_line_s, 3),
            "disk_faults": self.disk_faults - begin.disk_faults,
        }


@asynccontextmanager
async def watched_loop(*, late_s: float = LATE_S) -> AsyncGenerator[None]:
    """Within, a running loop that is more than `late_s` late is told of in the log."""
    watch = _Watch(late_s)
    thread = threading.Thread(target=watch.look, name="loop watch", daemon=True)
    thread.start()
    ticking = asyncio.create_task(watch.tick(), name="loop watch")
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        watch.stopped.set()
        thread.join()


class _Watch:
    """Of the thread that makes it."""

    def __init__(self, late_s: float) -> None:
        self.stopped = threading.Event()
        self._late_s = late_s
        self._thread_id = threading.get_ident()
        self._ticked_at = time.monotonic()

    async def tick(self) -> None:
        """In the loop: show that it runs."""
        while True:
            had = Usage.now()
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            late_s = now - self._ticked_at - _TICK_S
            self._ticked_at = now
            if late_s > self._late_s:
                had_meanwhile = Usage.now().since(had)
                _log.warning("event loop stood still", late_s=round(late_s, 3), **had_meanwhile)

    def look(self) -> None:
        """In a thread: tell where the loop stands, once each time."""
        told_of = 0.0
        while not self.stopped.wait(self._late_s / 2):
            ticked_at = self._ticked_at
            if ticked_at == told_of or time.monotonic() - ticked_at < _TICK_S + self._late_s:
                continue
            told_of = ticked_at
            _log.warning("event loop stands still", at=self._place())

    def _place(self) -> list[str]:
        """Where the loop's thread is, innermost last."""
        frame = sys._current_frames().get(self._thread_id)  # pyright: ignore[reportPrivateUsage]
        if frame is None:
            return []
        return [
            f"{one.filename}:{one.lineno} {one.name}"
            for one in traceback.extract_stack(frame, limit=_FRAMES_MAX)
        ]
