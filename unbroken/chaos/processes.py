"""What can be done to a living process, each time with the proof that it was.

Signals are sent to whole sets of processes, such as an engine's process group, and a function
returns when the kernel says that all of them are dead, stopped or running: `/proc` is the witness.
"""

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

EFFECT_TIMEOUT_S: Final = 5.0
"""A signal that has no effect for so long has none."""

_POLL_S: Final = 0.0005
_DEAD: Final = frozenset("ZX")


class NoEffect(Exception):  # noqa: N818 - it names what happened.
    """A fault was injected and did not take effect, so nothing follows from what came after."""


def group(pgid: int) -> tuple[int, ...]:
    """The living processes of a process group."""
    if pgid <= 1:  # 0 would be our own.
        raise NoEffect(f"expected a process group, got {pgid}")
    return tuple(
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _stat(pid)[1:2] == (str(pgid),) and is_alive(pid)
    )


def is_alive(pid: int) -> bool:
    """Whether the process exists; zombies are dead."""
    state = _stat(pid)[:1]
    return bool(state) and state[0] not in _DEAD


def is_stopped(pid: int) -> bool:
    """Whether every thread of the process is stopped, so that nothing of it runs."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return False
    return all(_stat(pid, thread)[:1] == ("T",) for thread in threads)


async def kill(pids: Collection[int]) -> str:
    """SIGKILL, all at one moment."""
    _send(pids, signal.SIGKILL)
    await _until(lambda: not any(map(is_alive, pids)), f"{pids} to die")
    return f"{len(pids)} processes dead"


async def terminate(pids: Collection[int]) -> str:
    """SIGTERM: they may take their time, and it is seen that the signal was taken."""
    _send(pids, signal.SIGTERM)
    await _until(lambda: not any(map(_is_term_pending, pids)), f"{pids} to take SIGTERM")
    return f"{len(pids)} processes have taken SIGTERM"


async def stop(pids: Collection[int]) -> str:
    """SIGSTOP: they exist, their connections stay open, and nothing in them runs."""
    _send(pids, signal.SIGSTOP)
    await _until(lambda: all(map(is_stopped, pids)), f"{pids} to stop")
    return f"{len(pids)} processes stopped"


async def resume(pids: Collection[int]) -> str:
    """SIGCONT: the stopped go on, as zombies of whatever happened meanwhile."""
    pids = [pid for pid in pids if is_alive(pid)]
    if not pids:
        return "none is left"
    _send(pids, signal.SIGCONT)
    await _until(lambda: not any(map(is_stopped, pids)), f"{pids} to go on")
    return f"{len(pids)} processes go on"


class Slowdown:
    """Processes that run for a share of the time only: stopped and continued again and again.

    async with Slowdown(pids, running_s=0.005, stopped_s=0.020) as slow:
        ...
        slow.num_stops
    """

    def __init__(
        self, pids: Callable[[], Sequence[int]], *, running_s: float, stopped_s: float
    ) -> None:
        self._pids = pids
        self._running_s = running_s
        self._stopped_s = stopped_s
        self._task: asyncio.Task[None] | None = None
        self.num_stops = 0
        """How often all of them were seen stopped."""

    async def __aenter__(self) -> "Slowdown":
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._cycle(), name="slowdown")

    async def end(self) -> None:
        """Let them run. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await resume(self._pids())

    async def _cycle(self) -> None:
        while True:
            pids = self._pids()
            _send(pids, signal.SIGSTOP)
            await asyncio.sleep(self._stopped_s)
            self.num_stops += bool(pids) and all(map(is_stopped, pids))
            _send(pids, signal.SIGCONT)
            await asyncio.sleep(self._running_s)


class NoDescriptors:
    """A living process that can open no file and no socket more, until `end`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def begin(self) -> str:
        """Let every further descriptor fail with EMFILE."""
        # The limit is on numbers, not on how many are open: no number below it may be free.
        used = self._used()
        limit = next(n for n in range(len(used) + 1) if n not in used)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (limit, self._before[1]))
        if self._free():
            raise NoEffect(f"expected no free descriptor below {limit}, got {self._free()}")
        return f"process {self.pid} has {limit} descriptors of {limit} in use"

    def end(self) -> None:
        """As before."""
        with suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, self._before)

    def _used(self) -> set[int]:
        return set(map(int, os.listdir(f"/proc/{self.pid}/fd")))

    def _free(self) -> list[int]:
        limit, _ = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        return sorted(set(range(limit)) - self._used())


class FullDisk:
    """A living process that can make no file longer, until `end`: each write fails with EFBIG."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._before = resource.prlimit(pid, resource.RLIMIT_FSIZE)

    def begin(self) -> str:
        """No write to a file beyond its first byte; pipes, sockets and devices are no files."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (1, self._before[1]))
        return f"process {self.pid} may write 1 byte a file"

    def end(self) -> None:
        """As before."""
        with suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, self._before)


def _send(pids: Collection[int], number: signal.Signals) -> None:
    if not pids:
        raise NoEffect(f"expected processes for {number.name}, got none")
    for pid in pids:
        if pid <= 1:
            raise NoEffect(f"expected the id of a process of ours, got {pid}")
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _until(claim: Callable[[], bool], expected: str) -> None:
    """Wait for what the kernel does not announce."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + EFFECT_TIMEOUT_S
    while not claim():
        if loop.time() > give_up_at:
            raise NoEffect(f"expected {expected}, not so after {EFFECT_TIMEOUT_S:g} s")
        await asyncio.sleep(_POLL_S)


def _is_term_pending(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    pending = [line.split()[1] for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(mask, 16) & (1 << (signal.SIGTERM - 1)) for mask in pending)


def _stat(pid: int, thread: str = "") -> tuple[str, ...]:
    """State and process group of a process, state of a thread; empty if it is gone."""
    path = f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat"
    try:
        words = Path(path).read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return words[0], words[2]
