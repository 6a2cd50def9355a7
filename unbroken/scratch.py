"""A directory for this process alone, which somebody removes even if the process is killed.

Whoever makes a new one removes those whose owners are gone: a lock on a file in it, which the
kernel gives up with its owner, says that there is one.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

OWNER: Final = "owner.lock"
BEGUN_S: Final = 60.0
"""A directory without a lock file is left alone for so long: its owner may be about to make one."""


class Scratch:
    """One such directory, from now to `close`. Nobody else may enter it."""

    def __init__(self, prefix: str) -> None:
        """Raises OSError."""
        _remove_abandoned(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        # systemd-tmpfiles leaves alone what is in a directory with such a lock. Else it removes
        # files that nobody has written to for 10 days, and ours are never written to.
        self._open = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._open, fcntl.LOCK_SH)
        # Locked before it has its name: who finds a lock that nobody holds removes everything.
        begun = self.path / f".{OWNER}"
        self._lock = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun.rename(self.path / OWNER)

    def close(self) -> None:
        """Remove it. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            os.close(self._open)
            self._lock = -1


def _remove_abandoned(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # Gone meanwhile, or somebody else's.
            if path.stat().st_uid == os.getuid() and _is_abandoned(path):
                shutil.rmtree(path)


def _is_abandoned(directory: Path) -> bool:
    """Raises OSError."""
    try:
        lock = os.open(directory / OWNER, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - directory.stat().st_mtime > BEGUN_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
