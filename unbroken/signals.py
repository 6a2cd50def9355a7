"""What asks a process to stop."""

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
"""Supervisors send the one, terminals the other."""


def heed(receive: Callable[[signal.Signals], object]) -> None:
    """Have the running loop call `receive` for each that comes from now on; in the main thread.

    Not by the loop's own handlers: whenever those are taken away, as they are when it is closed, a
    signal ends the process, and its exit status says nothing any more.
    """
    loop = asyncio.get_running_loop()

    def came(number: int, _: FrameType | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(receive, signal.Signals(number))

    for number in STOPPING:
        signal.signal(number, came)


def heed_no_more() -> None:
    """Let no further one end the process, which has stopped and is about to say how.

    Else one that comes while the interpreter clears up would take the place of the exit status.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
