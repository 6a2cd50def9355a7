"""The keys that sign resume tokens: a file that all frontends of a mesh share.

    # id   key: 64 or more hexadecimal digits
    2026-10 6f1c…
    2026-11 a90b…

All keys verify, the last one signs. The file is read again when it has changed, so keys are rotated
without a restart: put the new one above the last one, and once all frontends have it, at the end;
take an old one out when the last token that it signed has expired.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from frontend.resume_token import Keyring
from unbroken import log

FILE_NAME: Final = "resume.keys"
"""Of the file that a mesh in one directory makes for itself."""
LOOK_INTERVAL_S: Final = 1.0
"""How often to look whether the file has changed, at most."""
KEYS_MAX: Final = 64
KEY_BYTES_MIN: Final = 32
FILE_BYTES_MAX: Final = 64 * 1024

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})[ \t]+((?:[0-9A-Fa-f]{2}){32,128})")
_log = log.get_logger(__name__)


class ResumeKeys:
    """The keys in a file, as they are now."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError or ValueError if there are no keys to begin with."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._state = _state(path)
        self._keyring = read(path)

    @property
    def keyring(self) -> Keyring:
        """The keys; those from before as long as the file cannot be read."""
        now = self._clock()
        if now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._look()
        return self._keyring

    def _look(self) -> None:
        try:
            state = _state(self._path)
            if state == self._state:
                return
            self._keyring = read(self._path)
            self._state = state
        except (OSError, ValueError) as error:
            _log.warning("resume keys stay as they were", path=str(self._path), detail=str(error))
        else:
            _log.info("resume keys read again", key_ids=list(self._keyring.keys))


def read(path: Path) -> Keyring:
    """The keys of a file. Raises OSError, and ValueError that says where but never what."""
    with path.open("rb") as file:
        data = file.read(FILE_BYTES_MAX + 1)
        mode = os.fstat(file.fileno()).st_mode
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"expected at most {FILE_BYTES_MAX} bytes")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("others may read the resume keys", path=str(path), mode=oct(mode & 0o777))
    keys: dict[str, bytes] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"line {number}: expected a key id and 64 to 256 hexadecimal digits")
        if match[1] in keys:
            raise ValueError(f"line {number}: expected key ids that differ")
        keys[match[1]] = bytes.fromhex(match[2])
    if not 1 <= len(keys) <= KEYS_MAX:
        raise ValueError(f"expected 1 to {KEYS_MAX} keys, got {len(keys)}")
    return Keyring(keys)


def make_once(directory: Path) -> Path:
    """The key file of a mesh that has no other: made by whichever frontend comes first."""
    path = directory / FILE_NAME
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / f".{FILE_NAME}.{secrets.token_hex(8)}"
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"first {secrets.token_hex(KEY_BYTES_MIN)}\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # Another frontend was faster: its key counts.
            os.link(made, path)
    finally:
        made.unlink()
    return path


def _state(path: Path) -> tuple[int, int, int]:
    """What differs when the file has been changed or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
