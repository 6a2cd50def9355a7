"""How long processes, and an event loop, waited for a core while something was measured.

Where more processes want to run than there are cores, what one of them answers late may have waited
for a core, here or there, and not for its work. Linux counts both (`/proc/PID/schedstat`).
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

INTERVAL_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class CoreTime:
    """Of the first threads of some processes together, since they began."""

    ran_s: float = 0.0
    waited_s: float = 0.0
    """Able to run, without a core."""
    num_slices: int = 0
    """Times that one got a core."""

    @staticmethod
    def of(pids: Iterable[int]) -> "CoreTime":
        """Now. Processes that are gone count as nothing."""
        ran, waited, slices = 0, 0, 0
        for pid in pids:
            try:
                words = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
            except OSError:
                continue
            ran, waited, slices = (
                ran + int(words[0]),
                waited + int(words[1]),
                slices + int(words[2]),
            )
        return CoreTime(ran / 1e9, waited / 1e9, slices)

    def since(self, before: "CoreTime") -> "CoreTime":
        """What was added."""
        return CoreTime(
            self.ran_s - before.ran_s,
            self.waited_s - before.waited_s,
            self.num_slices - before.num_slices,
        )

    @property
    def wait_ms_mean(self) -> float:
        """Until one that wanted a core got it."""
        return 1000 * self.waited_s / self.num_slices if self.num_slices else 0.0

    @property
    def waited_share(self) -> float:
        """Of the time in which one wanted to run, that without a core."""
        wanted_s = self.ran_s + self.waited_s
        return self.waited_s / wanted_s if wanted_s else 0.0


@dataclass(slots=True)
class Lateness:
    """How late this event loop did what was due: what it measures of others is late by as much."""

    late_s: list[float] = field(default_factory=list[float])

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            due = time.monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.late_s.append(max(0.0, time.monotonic() - due))
