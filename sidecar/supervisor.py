"""Starts an engine's process, and ends it with everything that it started.

    process = EngineProcess.start(command)
    exit = await process.exited     # milliseconds after its death
    await process.stop(grace_s=5)   # or kill(); then wait_gone()

Between us and the engine stands `reaper.py`. It ends the engine and all of its descendants when
they are to end, and also when this process dies, even by SIGKILL.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Final, Self

from unbroken import log

from . import reaper
from .dying import let_others_go_first

_REAP_TIMEOUT_S: Final = 10.0
"""How long dead processes may take to go: the kernel frees GPU memory meanwhile."""
_OUTPUT_TIMEOUT_S: Final = 0.5
_LINE_BYTES_MAX: Final = 4000
"""With its prefix it stays below PIPE_BUF, so lines of several writers do not mix."""
_PREFIX: Final = b"[engine] "
COMPANION: Final = "/bin/sleep"
"""What the reaper leaves in the engine's group. Not looked for: an engine's PATH is anybody's."""
_STDERR: Final = 2

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended."""

    status: int | None
    """Its exit status; -N: signal N ended it; None: nobody knows."""

    def __str__(self) -> str:
        if self.status is None:
            return "ended, with its reaper"
        if self.status >= 0:
            return f"exited with status {self.status}"
        try:
            return f"was killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"was killed by signal {-self.status}"


class EngineProcess:
    """One engine process with its descendants, from `start` until nothing of them is left."""

    def __init__(self, command: Sequence[str]) -> None:
        """Use `start`."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._exited: asyncio.Future[Exit] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._pid = 0
        self._is_terminated = False
        self._report = b""  # Of a line, what has come so far.
        self._group_killed: asyncio.Future[None] = loop.create_future()
        self._report_fd, report = os.pipe()
        os.set_blocking(self._report_fd, False)
        self._lifeline_fd, lifeline = os.pipe()
        try:
            self._reaper = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", reaper.__file__),
                    *(str(os.getpid()), str(report), str(lifeline), COMPANION),
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(report, lifeline),
                start_new_session=True,  # Signals of our terminal are not for it.
            )
        except OSError:
            os.close(self._report_fd)
            os.close(self._lifeline_fd)
            raise
        finally:
            os.close(report)
            os.close(lifeline)
        assert self._reaper.stdout is not None
        # A thread, because it may block on our stderr, and the engine's logs then wait, not we.
        self._copier = threading.Thread(
            target=_copy_lines, args=(self._reaper.stdout,), name="engine output", daemon=True
        )
        self._copier.start()
        loop.add_reader(self._report_fd, self._read_report)
        loop.add_reader(self._lifeline_fd, self._lifeline_ended)

    @classmethod
    def start(cls, command: Sequence[str]) -> Self:
        """Run `command`. To be called in the main thread: it dies with the calling thread.

        A command that can't be run exits with status 127. Raises OSError if the system can't take
        one more process.
        """
        return cls(command)

    @property
    def pid(self) -> int:
        """Process id and process group of the engine; 0 in its first milliseconds."""
        return self._pid

    @property
    def exited(self) -> "asyncio.Future[Exit]":
        """Done when the engine itself has ended. Not to be cancelled."""
        return self._exited

    @property
    def group_killed(self) -> "asyncio.Future[None]":
        """Done when the engine's whole group was killed, while it may still be freeing memory."""
        return self._group_killed

    def terminate(self) -> None:
        """Ask the engine to end (SIGTERM to it alone; it knows in which order its parts end)."""
        if not self._is_terminated:
            self._is_terminated = True  # To some engines a second one means: at once.
            self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End the engine and everything it started now (SIGKILL). Idempotent."""
        self._signal(signal.SIGTERM)

    async def stop(self, grace_s: float) -> None:
        """`terminate`, after `grace_s` `kill`, and wait until nothing is left. Idempotent."""
        self.terminate()
        await asyncio.wait((self._gone,), timeout=grace_s)
        self.kill()
        await self.wait_gone()

    async def wait_gone(self) -> None:
        """Wait, after the engine ended or was killed, until nothing of it is left."""
        await asyncio.wait((self._gone,), timeout=_REAP_TIMEOUT_S)
        if not self._gone.done():
            _log.error("engine does not go away", engine_pid=self._pid, waited_s=_REAP_TIMEOUT_S)
            self._reaper.kill()
            await self._gone
        await asyncio.to_thread(self._copier.join, _OUTPUT_TIMEOUT_S)  # Its last words.

    def _signal(self, number: signal.Signals) -> None:
        if not self._gone.done():
            self._reaper.send_signal(number)
            self._reaper.send_signal(
                signal.SIGCONT
            )  # Whoever stopped the engine may have got both.

    def _read_report(self) -> None:
        try:
            data = os.read(self._report_fd, 1024)
        except BlockingIOError:
            return
        if not data:
            self._reaper_ended()
            return
        *lines, self._report = (self._report + data).split(b"\n")
        for line in lines:
            if not self._pid:
                self._pid = int(line)
            elif not self._exited.done():
                self._exited.set_result(Exit(int(line)))

    def _lifeline_ended(self) -> None:
        self._loop.remove_reader(self._lifeline_fd)
        os.close(self._lifeline_fd)
        let_others_go_first(self._pid)
        self._group_killed.set_result(None)

    def _reaper_ended(self) -> None:
        self._loop.remove_reader(self._report_fd)
        os.close(self._report_fd)
        self._reaper.wait()  # It is beyond closing its files: this takes microseconds.
        if not self._exited.done():
            # It was killed, and by that the engine; what else there is has lost its keeper.
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            self._exited.set_result(Exit(None))
        self._gone.set_result(None)


def _copy_lines(output: IO[bytes]) -> None:
    """Write every line to our stderr, with a prefix; long ones in pieces."""
    with output:
        while line := output.readline(_LINE_BYTES_MAX):
            # If nobody takes it, we read on all the same: the engine must not wait for ever.
            with contextlib.suppress(OSError):
                os.write(_STDERR, _PREFIX + line.removesuffix(b"\n") + b"\n")
