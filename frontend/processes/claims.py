"""Which process of a frontend has a request: locks in files that all of its processes share.

A process that admits a request locks one byte of a file for it, at a place that is a hash of tenant
and request id. So two processes never have the same request at once, whoever asks finds who has it
(the kernel names the owner of a lock), and the locks of a process are gone the moment it is,
however it ended. Nothing is ever written. Should two requests share a byte, then the process that
has the one is asked to serve the other as well, and does.
"""

import errno
import fcntl
import os
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Final

from unbroken.errors import Reason, UnbrokenError

NUM_FILES: Final = 16
"""The kernel keeps the locks of a file in a list."""

# struct flock of Linux: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("hhqqi4x")


class Elsewhere(UnbrokenError):  # noqa: N818 - it says where something is.
    """Another process of this frontend has the request."""

    def __init__(self, pid: int) -> None:
        super().__init__(Reason.UNREACHABLE, "another process of this frontend has the request")
        self.pid = pid


class Claims:
    """The claims of this process, and its view of the others'. One per process and directory.

    Locks like these belong to a process: whoever else here opens and closes one of the files loses
    them all.
    """

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self.held: set[tuple[str, str]] = set()
        """What this process has, by tenant and id."""
        self._files = [
            os.open(directory / f"claims.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for number in range(NUM_FILES)
        ]

    def close(self) -> None:
        """Give up all claims. Idempotent."""
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def check(self, key: tuple[str, str]) -> None:
        """Raises `Elsewhere` if another process has the request of this tenant and id."""
        file, at = self._place(key)
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, question))
        if kind != fcntl.F_UNLCK:
            raise Elsewhere(pid)

    def take(self, key: tuple[str, str]) -> None:
        """Have the request from here on; raises `Elsewhere` if another process has it."""
        while not self._lock(key, fcntl.F_WRLCK):
            self.check(key)  # Else its owner has just let it go.
        self.held.add(key)

    def release(self, key: tuple[str, str]) -> None:
        """Have it no more. Idempotent."""
        self.held.discard(key)
        if self._files:
            self._lock(key, fcntl.F_UNLCK)

    def _lock(self, key: tuple[str, str], kind: int) -> bool:
        file, at = self._place(key)
        try:
            fcntl.fcntl(file, fcntl.F_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _place(self, key: tuple[str, str]) -> tuple[int, int]:
        tenant, request_id = key
        digest = blake2b(f"{len(tenant)} {tenant}{request_id}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest)
        return self._files[number % NUM_FILES], number >> 2
