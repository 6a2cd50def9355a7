"""`python -m memory_service.vault`: keeps descriptors, so that the memory service may die.

It is as small as can be, because it must not fail: no gRPC, no threads, no memory of its own, two
verbs and a list. It maps nothing, reads nothing of what it keeps, and exits by itself when no
service has been there for a while.
"""

import argparse
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from unbroken.memory import channel
from unbroken.memory.channel import ChannelClosed
from unbroken.v1 import memory_session_pb2 as wire

ACCEPT_RETRY_S = 0.05


@dataclass(slots=True)
class Kept:
    """One entry."""

    entry: wire.VaultEntry
    fds: list[int]


class Vault:
    """What is kept, and the service that it is kept for: the one that connected last."""

    def __init__(self, path: Path, idle_exit_s: float) -> None:
        """Listen. Raises OSError if another vault does."""
        self._idle_exit_s = idle_exit_s
        self._kept: dict[int, Kept] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(4)
        self._service: socket.socket | None = None

    def run(self) -> None:
        """Until no service was there for long enough."""
        alone_since = time.monotonic()
        while True:
            left_ms = None
            if self._service is None:
                left_ms = (alone_since + self._idle_exit_s - time.monotonic()) * 1000
                if left_ms <= 0:
                    return
            ready = self._ready(left_ms)
            if self._service is not None and self._service.fileno() in ready:
                if not self._serve(self._service):
                    alone_since = time.monotonic()
            elif ready:
                self._accept()

    def close(self) -> None:
        """Give everything back."""
        self._listener.close()
        for entry_id in list(self._kept):
            self._drop(entry_id)

    def _ready(self, wait_ms: float | None) -> set[int]:
        """Which descriptors have something to read; `select` knows none above 1023."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        if self._service is not None:
            poller.register(self._service, select.POLLIN)
        return {fd for fd, _ in poller.poll(wait_ms)}

    def _accept(self) -> None:
        """A new service; what the old one sent has been read, since that goes first."""
        try:
            new, _ = self._listener.accept()
        except OSError:  # Such as for want of a descriptor. To exit would lose everything.
            time.sleep(ACCEPT_RETRY_S)
            return
        if self._service is not None:
            self._service.close()
        self._service = new
        new.settimeout(10.0)

    def _serve(self, service: socket.socket) -> bool:
        """One packet; whether the service is still there."""
        try:
            request, fds = channel.receive(service, wire.VaultRequest)
            match request.WhichOneof("kind"):
                case "put":
                    self._put(request.put, fds)
                case "drop":
                    channel.close_all(fds)
                    self._drop(request.drop)
                case "list":
                    channel.close_all(fds)
                    self._list(service)
                case None:
                    channel.close_all(fds)
                    raise ChannelClosed("expected put, drop or list")
        except (ChannelClosed, BlockingIOError):
            service.close()
            self._service = None
            return False
        return True

    def _put(self, entry: wire.VaultEntry, fds: list[int]) -> None:
        kept = self._kept.get(entry.entry_id)
        if kept is None:
            self._kept[entry.entry_id] = Kept(entry, fds)
            return
        kept.entry = entry
        channel.close_all(fds)

    def _drop(self, entry_id: int) -> None:
        kept = self._kept.pop(entry_id, None)
        if kept is not None:
            channel.close_all(kept.fds)

    def _list(self, service: socket.socket) -> None:
        for entry_id in sorted(self._kept):
            kept = self._kept[entry_id]
            channel.send(service, wire.VaultResponse(entry=kept.entry), kept.fds)
        channel.send(service, wire.VaultResponse(entry=wire.VaultEntry()))


def main() -> int:
    """Run a vault; with --detach, in a process of its own that is nobody's child."""
    parser = argparse.ArgumentParser(prog="python -m memory_service.vault")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--idle-exit-s", type=float, required=True)
    parser.add_argument("--detach", action="store_true")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    vault = Vault(given.socket, given.idle_exit_s)
    if given.detach:
        os.setsid()
        if (pid := os.fork()) != 0:
            print(pid, flush=True)  # noqa: T201 - Into the vault's log.
            os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pid_file = given.socket.parent / "vault.pid"
    new = pid_file.with_suffix(".new")
    new.write_text(f"{os.getpid()}\n")
    new.replace(pid_file)
    vault.run()
    vault.close()
    given.socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
