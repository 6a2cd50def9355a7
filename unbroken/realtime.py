"""Running before other processes of the machine, for those who carry news of a failure.

When an engine dies, its sidecar, a frontend and another sidecar have a millisecond of work each,
and each waits for whatever else has the cores: another engine, the clients, the kernel that frees
the memory of the dead one. With a real-time priority they do not wait. Corosync, which carries
news of the same kind, takes one by default.

The kernel leaves 5 % of the time to others whatever such a process does
(/proc/sys/kernel/sched_rt_runtime_us).
"""

import os
import resource
from threading import Thread
from typing import Annotated, Final

from pydantic import AfterValidator, Field

_POLICIES: Final = (os.SCHED_FIFO, os.SCHED_RR)


def run_before_others(priority: int) -> None:
    """Take the priority (0: none), for this thread and what it starts; before there are others.

    Raises PermissionError.
    """
    if priority:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


def is_before_others(pid: int = 0) -> bool:
    """Whether a process (0: this thread) has a real-time priority."""
    return os.sched_getscheduler(pid) in _POLICIES


def is_allowed(priority: int) -> bool:
    """Whether this process may take it."""
    seen: list[bool] = []

    def attempt() -> None:  # In a thread of its own, which it dies with.
        try:
            run_before_others(priority)
        except PermissionError:
            return
        seen.append(True)

    thread = Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(seen)


def _allowed(priority: int) -> int:
    if not is_allowed(priority):
        _, limit = resource.getrlimit(resource.RLIMIT_RTPRIO)
        raise ValueError(f"at most {limit}, or CAP_SYS_NICE (see ulimit -r)")
    return priority


RealtimePriority = Annotated[int, Field(ge=0, le=99), AfterValidator(_allowed)]
"""Of SCHED_RR, and allowed to this process; 0: as any other process."""
