"""A real-time priority for all but engines, where clients and engines share the cores.

Clients that wait for a core measure their own wait, and in production neither they nor engines that
compute on processors stand beside frontends.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from unbroken.realtime import is_allowed

REALTIME_PRIORITY: Final = 20


def allowed_priority() -> int:
    """The priority where this user may have it, else 0: none."""
    return REALTIME_PRIORITY if is_allowed(REALTIME_PRIORITY) else 0


@contextmanager
def before_others(priority: int) -> Generator[None]:
    """This process has it meanwhile, and what it starts; engines are given back theirs."""
    if not priority:
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    _give(os.SCHED_RR, os.sched_param(priority))
    try:
        yield
    finally:
        _give(*before)


def _give(policy: int, parameters: os.sched_param) -> None:
    """To this thread first, whose children are like it, and to all that there are."""
    os.sched_setscheduler(0, policy, parameters)
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread.name), policy, parameters)
