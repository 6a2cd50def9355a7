"""Tries to reach a suspect in another way than over its link.

The kernel of a process that hangs still takes connections for it, and the kernel of a host whose
process has died refuses them. What cannot be reached at all is cut off. So one connection, opened
while a link is silent, tells what its silence is once it has lasted too long.
"""

import asyncio

from frontend.failure_detector import Reach
from unbroken.config import split_address


async def reach(address: str, timeout_s: float) -> Reach:
    """What becomes of one connection to "host:port"."""
    try:
        host, port = split_address(address)
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return Reach.REFUSES
    except (OSError, ValueError):  # A TimeoutError is an OSError.
        return Reach.UNKNOWN
    writer.close()
    return Reach.ANSWERS
