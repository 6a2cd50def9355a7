"""Sees all processes that a test started, whatever became of their parents."""

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = "UNBROKEN_TEST_PROCESSES"


@contextmanager
def no_process_left() -> Generator[Callable[[], list[str]], None, None]:
    """Everything started inside is dead at the end, else that fails (and it is killed).

    with no_process_left() as alive:
        ...
        assert alive() == ["sleep 1000"]    # Command lines, sorted; zombies are dead.
    """
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    try:
        yield lambda: sorted(_marked(mark).values())
        left = _marked(mark)
        assert not left
    finally:
        del os.environ[_MARK]
        while left := _marked(mark):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def until(claim: Callable[[], bool]) -> None:
    """Wait for `claim`, which no event announces."""
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _marked(mark: str) -> dict[int, str]:
    wanted = f"{_MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # Gone meanwhile, or somebody else's.
                environ = Path(entry.path, "environ").read_bytes()  # Empty for zombies.
                if wanted in environ.split(b"\0"):
                    words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode().strip()
    return found
