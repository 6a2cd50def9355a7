"""What vLLM's plug-in tells of its scheduler's load, as it changes (`worker.vllm_plugin.load_tap`).

Engine and sidecar find each other by a path in the environment of both. Where nobody listens there
or nobody speaks, load is asked for, as of engines without the plug-in.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from typing import Final

from sidecar.engines.adapter import LoadOfRank

VARIABLE: Final = "UNBROKEN_LOAD_TAP"
MESSAGE_BYTES_MAX: Final = 4096


def choose(directory: Path) -> None:
    """Choose where an engine that this process is about to start listens, unless it is chosen."""
    os.environ.setdefault(VARIABLE, str(directory / "load.sock"))


def get() -> str:
    """Empty if there is none."""
    return os.environ.get(VARIABLE, "")


async def listen(path: str) -> AsyncGenerator[LoadOfRank]:
    """The load at each moment at which it changes, until nobody speaks there any more."""
    loop = asyncio.get_running_loop()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as connection:
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, path)
            while message := await loop.sock_recv(connection, MESSAGE_BYTES_MAX):
                yield read(message)
        except (OSError, ValueError):  # No socket, or nonsense in it: all the same, it tells none.
            return


def read(message: bytes) -> LoadOfRank:
    """One message. Raises ValueError."""
    try:
        said = json.loads(message)
        blocks, total, running, waiting, tokens = (
            int(said[name])
            for name in ("blocks", "blocks_total", "running", "waiting", "waiting_tokens")
        )
        share = blocks / total if total else 0.0
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a load, got {message[:100]!r}") from error
    return LoadOfRank(0, running, waiting, share, tokens)
