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
from typing import Annotated, Final

from pydantic import Field

from unbroken.errors import InvalidField

RealtimePriority = Annotated[int, Field(ge=0, le=99)]
"""Of SCHED_RR; 0: as any other process."""

_POLICIES: Final = (os.SCHED_FIFO, os.SCHED_RR)


def run_before_others(priority: int) -> None:
    """Take the priority, for this thread and what it starts; to be called before there are others.

    Raises InvalidField if the system does not allow it.
    """
    if not priority:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))
    except PermissionError:
        _, allowed = resource.getrlimit(resource.RLIMIT_RTPRIO)
        raise InvalidField(
            "realtime_priority",
            expected=f"at most {allowed}, as this process has no CAP_SYS_NICE (see ulimit -r)",
            seen=priority,
        ) from None


def is_before_others(pid: int = 0) -> bool:
    """Whether a process (0: this thread) has a real-time priority."""
    return os.sched_getscheduler(pid) in _POLICIES
