"""What asks a process to stop."""

import asyncio
import signal
from typing import Final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
"""Supervisors send the one, terminals the other."""


def heed_no_more() -> None:
    """Let no further one end the process, which has stopped and is about to say how.

    Else one that comes while the interpreter clears up would take the place of the exit status.
    """
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
