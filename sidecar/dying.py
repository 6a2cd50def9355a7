"""Lets everybody else run before an engine that was killed.

The kernel frees the memory of a dead process in that process's own time: 5 ms of a core for 50 MB,
at the priority that it had in life. Those are the milliseconds in which frontend, sidecars and the
other engines move its streams, and on a small machine they wait for it.
"""

import contextlib
import os
from typing import Final

_NICEST: Final = 19


def let_others_go_first(group: int) -> None:
    """Have the processes of a group wait for whoever wants a core: it leads its session, was
    killed, or is to be. Takes microseconds, for the news of its death have not left yet.
    """
    # An error: it has just gone, or may not be told.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getsid(group) != group:
            return  # The number is another's by now.
        os.setpriority(os.PRIO_PGRP, group, _NICEST)  # All threads: the last one frees the memory,
        os.sched_setscheduler(
            group, os.SCHED_IDLE, os.sched_param(0)
        )  # and mostly it is the first.
