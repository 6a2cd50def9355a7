"""Runs a command and sees to it that nothing of it is left, whoever dies first and however.

    python -I -S reaper.py <pid of the starter> <report> <lifeline> <sleep> <command> [<argument>…]

    starter ──SIGUSR1──▶ reaper ──SIGTERM──▶ command          (please end)
    starter ──SIGTERM──▶ reaper ──SIGKILL──▶ all that is left (end now)
    starter dies: the kernel sends that SIGTERM (PR_SET_PDEATHSIG)
    reaper dies:  the kernel sends SIGKILL to the command

The command leads a session and process group of its own. The reaper is outside of it, so what
stops or kills the group leaves the reaper to clean up, and it adopts every orphan of the command
(PR_SET_CHILD_SUBREAPER), so not even a descendant with another session escapes it.

Report and lifeline are descriptors of pipes to the starter. The report is text: a line with the
command's pid, a line with its status (as `Popen.returncode`) as soon as it ended, and the end of
file when nothing is left. The lifeline carries nothing and ends when the command's group is killed.

A process closes its files only after the kernel has freed its memory, and that takes an engine
milliseconds for each 20 MB. So the command's group has a companion that is small and does nothing
but hold the lifeline: SIGKILL to the group ends it within a millisecond, and the starter knows. It
is the given `sleep`, whose end takes 0.25 ms, without what the engine's environment has its loader
do; or, where there is none, a fork of this process, whose end takes 0.6.

A file of its own that imports little, because it has to be up in milliseconds. Linux only.
"""

import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_COMPANION_S = str(2**31 - 1)
"""Longer than any engine lives."""
_DESCRIPTORS_MAX = 256
"""More than this small process can have inherited."""

_SIGNALS = {signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM}


def main(starter: int, report: int, lifeline: int, sleep: str, command: list[str]) -> None:
    """Run `command` to its end, and everything it started to theirs."""
    os.set_inheritable(report, False)
    os.set_inheritable(lifeline, False)
    # Signals wait until they are asked for, so none comes between two steps.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:
        return  # The starter died before the kernel knew.
    reaper = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(command, reaper, lifeline, sleep)
    os.close(lifeline)
    _report(report, pid)
    status = _wait(pid)
    if status is not None:
        _report(report, status)
    _end_all(pid)
    if status is None:
        _report(report, -signal.SIGKILL)


def _become(command: list[str], reaper: int, lifeline: int, sleep: str) -> None:
    """In the child: be `command`. This process has one thread, so Python may run after the fork."""
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != reaper:
            os._exit(1)
        _leave_companion(reaper, lifeline, sleep)
        run_as_others()
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)  # What a shell says of a command that can't be run.


def run_as_others() -> None:
    """Give up a real-time priority that was the starter's."""
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _leave_companion(reaper: int, lifeline: int, sleep: str) -> None:
    """Put a process beside us into the group; the reaper adopts it, so no child is left to us."""
    child = os.fork()
    if child != 0:
        os.waitpid(child, 0)
        return
    parent = os.getpid()
    if os.fork() != 0:
        os._exit(0)
    # Nobody may wait for the end of a file because of us, and only SIGKILL ends us.
    os.closerange(0, lifeline)
    os.closerange(lifeline + 1, _DESCRIPTORS_MAX)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while os.getppid() == parent:
        time.sleep(0.001)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == reaper:
        os.set_inheritable(lifeline, True)
        try:  # noqa: SIM105 - contextlib takes milliseconds to import.
            os.execve(sleep, ["sleep", _COMPANION_S], _without_loader())
        except OSError:
            pass  # Then it is us.
    while os.getppid() == reaper:
        signal.sigwait({signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
    os._exit(0)


def _without_loader() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LD_")}


def _wait(pid: int) -> int | None:
    """Status of the command, which stays a zombie so that its group's number stays its own.

    None: it is to be ended now.
    """
    while True:
        match signal.sigwait(_SIGNALS):
            case signal.SIGTERM:
                return None
            case signal.SIGUSR1:
                os.kill(pid, signal.SIGTERM)
            case _:
                # Several deaths can be one SIGCHLD.
                while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    if ended.si_pid == pid:
                        is_exit = ended.si_code == os.CLD_EXITED
                        return ended.si_status if is_exit else -ended.si_status
                    os.waitpid(ended.si_pid, 0)  # An orphan that ended by itself.


def _end_all(group: int) -> None:
    """Kill the group, then every orphan that comes to us by that, until there is none."""
    _kill(-group)
    while True:
        for child in _children():
            _kill(child)
        try:
            os.waitpid(-1, 0)  # A child that ends hands its own to us first.
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []  # Not every kernel tells; the group is all that is killed then.


def _kill(pid: int) -> None:
    """SIGKILL a process, or the group -pid."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # It is gone, or another user's.


def _report(report: int, number: int) -> None:
    try:
        os.write(report, f"{number}\n".encode())
    except BrokenPipeError:
        return  # The starter is dead.


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
