"""What asks a process to stop."""

import asyncio
import signal
from collections.abc import Callable
from typing import Final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
"""Supervisors send the one, terminals the other."""


def heed(receive: Callable[[signal.Signals], object]) -> None:
    """Have the running loop, uvloop's, call `receive` for each that comes from now on."""
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, receive, number)


def heed_no_more() -> None:
    """Let no further one end the process, which has stopped and is about to say how.

    Else one that comes while the interpreter clears up would take the place of the exit status. The
    loop is not asked to forget its handlers: that is to say that the next one ends the process.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
