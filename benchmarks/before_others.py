"""A real-time priority for all but engines, where clients and engines share the cores.

Clients that wait for a core measure their own wait, and in production neither they nor engines that
compute on processors stand beside frontends.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from unbroken.realtime import is_allowed, run_before_others

REALTIME_PRIORITY: Final = 20


def allowed_priority() -> int:
    """The priority where this user may have it, else 0: none."""
    return REALTIME_PRIORITY if is_allowed(REALTIME_PRIORITY) else 0


@contextmanager
def before_others(priority: int) -> Generator[None]:
    """This process has it meanwhile, and what it starts; engines are given back theirs."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    run_before_others(priority)
    try:
        yield
    finally:
        for thread in Path("/proc/self/task").iterdir():  # Those that were begun meanwhile too.
            with suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread.name), policy, parameters)
