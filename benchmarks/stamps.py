"""Tokens that say when they were made, and processes that say what they cost.

Token id = time in units of 10 µs, modulo 4,000: unambiguous up to 40 ms.
"""

import os
import time

UNIT_S = 1e-5
NUM_IDS = 4_000


def stamp() -> int:
    """The token id of this moment."""
    return int(time.monotonic() / UNIT_S) % NUM_IDS


def age_s(token_id: int) -> float:
    """How long ago this token was made; wrong if that is more than 40 ms."""
    return (stamp() - token_id) % NUM_IDS * UNIT_S


class CpuClock:
    """CPU time of a process, threads that have ended included, from now on."""

    def __init__(self, pid: int | None = None) -> None:
        pid = os.getpid() if pid is None else pid
        self._clock = (~pid << 3) | 2  # As clock_getcpuclockid(3) makes it.
        self._began = time.clock_gettime(self._clock)

    def elapsed_s(self) -> float:
        """Seconds on a CPU since the clock was made."""
        return time.clock_gettime(self._clock) - self._began
