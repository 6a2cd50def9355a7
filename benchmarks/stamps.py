"""Tokens that say when they were made, and processes that say what they cost.

Token id = 280 + time in units of 10 µs, modulo 3,800: unambiguous up to 38 ms. What is before are
bytes in the vocabulary that these ids are of: whole runs would say half characters only.
"""

import os
import time

UNIT_S = 1e-5
NUM_UNITS = 3_800
FIRST_ID = 280
NUM_IDS = FIRST_ID + NUM_UNITS


def stamp() -> int:
    """The token id of this moment."""
    return FIRST_ID + int(time.monotonic() / UNIT_S) % NUM_UNITS


def age_s(token_id: int) -> float:
    """How long ago this token was made; wrong if that is more than 38 ms."""
    return (stamp() - token_id) % NUM_UNITS * UNIT_S


class CpuClock:
    """CPU time of a process, threads that have ended included, from now on."""

    def __init__(self, pid: int | None = None) -> None:
        pid = os.getpid() if pid is None else pid
        self._clock = (~pid << 3) | 2  # As clock_getcpuclockid(3) makes it.
        self._began = time.clock_gettime(self._clock)

    def elapsed_s(self) -> float:
        """Seconds on a CPU since the clock was made."""
        return time.clock_gettime(self._clock) - self._began
