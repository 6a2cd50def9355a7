"""The service's side of its vault: what the vault has to keep, and how it is started.

Nothing waits for the vault: a packet that the kernel took reaches the vault even if the service
dies right after, and descriptors in it stay open meanwhile.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from unbroken import log
from unbroken.memory import channel
from unbroken.memory.channel import ChannelClosed
from unbroken.v1 import memory_session_pb2 as wire

START_TIMEOUT_S = 10.0
_LIST_TIMEOUT_S = 10.0
_SEND_TIMEOUT_MS = 1000

_log = log.get_logger(__name__)


class VaultLink:
    """One connection to the vault that listens at `path`.

    Attributes:
        is_lost: It ended. Whoever sees that begins a new one and puts everything again.
    """

    def __init__(self, path: Path, idle_exit_s: float) -> None:
        """Connect, to a new vault if there is none. Blocks. Raises OSError."""
        self._known: set[int] = set()
        self.is_lost = False
        try:
            self._sock = channel.connect(path)
        except OSError:
            _spawn(path, idle_exit_s)
            self._sock = _connect(path)

    def fileno(self) -> int:
        """Readable once the vault is gone."""
        return self._sock.fileno()

    def close(self) -> None:
        self.is_lost = True
        self._sock.close()

    def list(self) -> list[tuple[wire.VaultEntry, list[int]]]:
        """All it has; the descriptors are the caller's. Raises ChannelClosed."""
        self._sock.settimeout(_LIST_TIMEOUT_S)
        channel.send(self._sock, wire.VaultRequest(list=True))
        found: list[tuple[wire.VaultEntry, list[int]]] = []
        while True:
            response, fds = channel.receive(self._sock, wire.VaultResponse)
            if not response.entry.entry_id:
                self._sock.setblocking(False)
                self._known = {entry.entry_id for entry, _ in found}
                return found
            found.append((response.entry, fds))

    def put(self, entry: wire.VaultEntry, fds: Sequence[int]) -> None:
        """Keep this; its descriptors are sent the first time only."""
        is_new = entry.entry_id not in self._known
        if self._send(wire.VaultRequest(put=entry), fds if is_new else ()):
            self._known.add(entry.entry_id)

    def drop(self, entry_id: int) -> None:
        """Forget this."""
        self._known.discard(entry_id)
        self._send(wire.VaultRequest(drop=entry_id), ())

    def _send(self, request: wire.VaultRequest, fds: Sequence[int]) -> bool:
        if self.is_lost:
            return False
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        poller.poll(_SEND_TIMEOUT_MS)
        try:
            channel.send(self._sock, request, fds)
        except ChannelClosed as error:
            _log.error("vault lost", detail=str(error))
            self.is_lost = True
            return False
        return True


def _spawn(path: Path, idle_exit_s: float) -> None:
    """Start a vault that lives on when this process does not."""
    with contextlib.suppress(OSError):
        path.unlink()
    with (path.parent / "vault.log").open("ab") as output:
        # The process in between ends at once: the vault has no parent that would have to reap it.
        subprocess.run(
            [
                *(sys.executable, "-m", "memory_service.vault", "--detach"),
                *("--socket", str(path), "--idle-exit-s", str(idle_exit_s)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=True,
            timeout=START_TIMEOUT_S,
            env=os.environ,
        )


def _connect(path: Path) -> socket.socket:
    """The vault listens before the process that started it ends, so once is enough; or nearly."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return channel.connect(path)
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.002)
