"""Secrets in a file, one in a line, which is read again when it has changed."""

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

from unbroken import log

LOOK_INTERVAL_S: Final = 1.0
"""How often to look whether the file has changed, at most."""
FILE_BYTES_MAX: Final = 64 * 1024

T = TypeVar("T")
_log = log.get_logger(__name__)


class SecretFile(Generic[T]):
    """What a file holds, as it is now."""

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], T],
        *,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` raises OSError or ValueError if there is nothing proper, and so does this; `name`
        is what the log calls it.
        """
        self._path = path
        self._read = read
        self._name = name
        self._clock = clock
        self._looked_at = clock()
        self._state = _state(path)
        self._content = read(path)

    @property
    def content(self) -> T:
        """That; what was there before as long as the file cannot be read."""
        now = self._clock()
        if now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._look()
        return self._content

    def _look(self) -> None:
        try:
            state = _state(self._path)
            if state == self._state:
                return
            self._content = self._read(self._path)
            self._state = state
        except (OSError, ValueError) as error:
            _log.warning(f"{self._name} stay as they were", path=str(self._path), detail=str(error))
        else:
            _log.info(f"{self._name} read again", path=str(self._path))


def lines_of(path: Path, *, name: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers; "#" begins those that do not.

    Raises OSError, and ValueError if it is too large.
    """
    with path.open("rb") as file:
        data = file.read(FILE_BYTES_MAX + 1)
        mode = os.fstat(file.fileno()).st_mode
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"expected at most {FILE_BYTES_MAX} bytes")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning(f"others may read the {name}", path=str(path), mode=oct(mode & 0o777))
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _state(path: Path) -> tuple[int, int, int]:
    """What differs when the file has been changed or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
