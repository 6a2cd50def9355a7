"""Lets others run before an engine that was killed.

The kernel frees the memory of a dead process in that process's own time: 5 ms of a core for 50 MB,
at the priority that it had in life. Those are the milliseconds in which frontend, sidecars and the
other engines move its streams, and on a small machine they wait for it.

It is put back no further than that it ends soon even where all cores are busy: the next life of the
engine waits for its memory, and not everybody may take a priority back.
"""

import contextlib
import os
from typing import Final

_NICE: Final = 10
"""A ninth of the share of others."""


def let_others_go_first(group: int) -> None:
    """Have the processes of a group give way to others: it leads its session, was killed, or is to
    be. Takes microseconds, for the news of its death have not left yet.

    0 is an engine whose number is not known yet. To the kernel it is whoever asks, and in a
    container also the session of one whose leader is out of sight.
    """
    if not group:
        return
    # An error: it has just gone, or may not be told.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getsid(group) != group:
            return  # The number is another's by now.
        if os.getpriority(os.PRIO_PGRP, group) < _NICE:
            # All its threads: the last one frees the memory.
            os.setpriority(os.PRIO_PGRP, group, _NICE)
