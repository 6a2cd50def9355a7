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
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from frontend.resume_token import Keyring
from frontend.secret_file import SecretFile, lines_of

FILE_NAME: Final = "resume.keys"
"""Of the file that a mesh in one directory makes for itself."""
KEYS_MAX: Final = 64
KEY_BYTES_MIN: Final = 32

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})[ \t]+((?:[0-9A-Fa-f]{2}){32,128})")


class ResumeKeys:
    """The keys in a file, as they are now."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError or ValueError if there are no keys to begin with."""
        self._file = SecretFile(path, read, name="resume keys", clock=clock)

    @property
    def keyring(self) -> Keyring:
        """The keys; those from before as long as the file cannot be read."""
        return self._file.content


def read(path: Path) -> Keyring:
    """The keys of a file. Raises OSError, and ValueError that says where but never what."""
    keys: dict[str, bytes] = {}
    for number, text in lines_of(path, name="resume keys"):
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
