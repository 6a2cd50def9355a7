"""Python environments with programs that nothing of ours imports: peers to compare with, engines.

Each is made once from a file of locked requirements. It may take gigabytes, which is why nothing
but the target that needs it installs it.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

INSTALL_S_MAX: Final = 1800.0


class NotInstalledError(Exception):
    """An environment cannot be had here; says why."""


def installed(requirements: Path, directory: Path) -> Path:
    """Where the programs of an environment are. Raises `NotInstalledError`."""
    binaries = directory / "bin"
    stamp = directory / f"installed-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]}"
    if stamp.exists():
        return binaries
    shutil.rmtree(directory, ignore_errors=True)
    install = ("-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "-r")
    try:
        for command in (
            (sys.executable, "-m", "venv", str(directory)),
            (str(binaries / "python"), *install, str(requirements)),
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_S_MAX)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise NotInstalledError((said or ["pip failed"])[-1]) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(str(error)) from None
    stamp.touch()
    return binaries
