"""Runs a command that dies with the process that started it, however that one dies.

    python -I -S tether.py <pid of the starter> <command> [<argument> ...]

The kernel sends SIGKILL to the command when its parent ends (`PR_SET_PDEATHSIG`, which survives
`exec`). Run as a file of its own because the request must come from the child, and code that runs
between fork and exec of a process with threads must not be Python's. Linux only.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(starter: int, command: list[str]) -> None:
    """Become `command`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != starter:
        sys.exit(1)  # The starter died before the kernel knew.
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
