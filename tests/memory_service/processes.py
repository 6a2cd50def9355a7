"""Memory services, vaults and clients as processes, to be killed."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from unbroken.memory.client import MemoryClient

START_S_MAX = 180.0
"""A machine that is full starts slowly, which is nobody's fault: only one that never comes is."""
ANSWER_S_MAX = 120.0
"""The same of a victim, whose own limit is shorter."""


class Died(AssertionError):  # noqa: N818 - It names what happened.
    """A service ended by itself."""


class TooSlow(AssertionError):  # noqa: N818 - It names what happened.
    """Something did not happen in time, though nothing died: it says nothing about promises."""


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait for something that nothing announces."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up_at:
            raise TooSlow(f"not in {seconds:g} s: {what}")
        time.sleep(0.002)


class ServiceProcess:
    """One memory service after the other, in one directory."""

    def __init__(self, directory: Path, *flags: str, module: str = "memory_service") -> None:
        self.directory = directory
        self.module = module
        self.flags = flags
        self.process: subprocess.Popen[bytes] | None = None
        self.num_spawned = 0

    @property
    def socket(self) -> Path:
        return self.directory / "session.sock"

    @property
    def control(self) -> str:
        return f"unix:{self.directory / 'control.sock'}"

    @property
    def vault_pid(self) -> int:
        return int((self.directory / "vault.pid").read_text())

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def spawn(self) -> None:
        """Begin, without waiting."""
        self.num_spawned += 1
        with (self.directory / "service.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", self.module),
                    *("--directory", str(self.directory), *self.flags),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def start(self) -> None:
        self.spawn()
        until(self.serves, "the service serves", START_S_MAX)

    def serves(self) -> bool:
        assert self.process is not None
        if (status := self.process.poll()) is not None:
            text = (self.directory / "service.log").read_text()[-2000:]
            raise Died(f"expected a service that runs, it ended with {status}: {text}")
        log = (self.directory / "service.log").read_bytes()
        return log.count(b"memory service serves") >= self.num_spawned

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(10)

    def kill_vault(self) -> None:
        os.kill(self.vault_pid, signal.SIGKILL)

    def client(self, **settings: Any) -> MemoryClient:
        return MemoryClient(self.socket, **settings)

    def num_fds(self) -> int:
        """Descriptors that the service has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def num_vault_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.vault_pid}/fd"))

    def close(self) -> None:
        """The service and its vault."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = self.vault_pid
            if b"memory_service.vault" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(
    directory: Path, *flags: str, module: str = "memory_service"
) -> Generator[ServiceProcess]:
    service = ServiceProcess(directory, *flags, module=module)
    try:
        service.start()
        yield service
    finally:
        service.close()


class Victims:
    """Processes that use memory, and die at a given line of the client library or after a time."""

    def __init__(self, service: ServiceProcess) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.memory_service.victim", str(service.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        scenario: str,
        *,
        seed: int,
        line: int = 0,
        after_s: float = 0.0,
        number: int = signal.SIGKILL,
    ) -> dict[str, Any]:
        """What one of them said before it died, or was done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wanted = {
            "scenario": scenario,
            "seed": seed,
            "line": line,
            "after_s": after_s,
            "signal": int(number),
        }
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S_MAX)
        if not ready:
            raise TooSlow(f"no answer about {wanted}")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
