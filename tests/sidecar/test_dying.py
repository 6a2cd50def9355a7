"""What an engine that was killed may still take from others."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sidecar.dying import let_others_go_first

DEADLINE_S = 10.0
NICE = os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture(params=[True], ids=["leads its session"])
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """One that waits for its end."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=request.param
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_killed_engine_gives_way_to_others(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # Its number stays its own.
    let_others_go_first(process.pid)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == max(10, NICE)


@pytest.mark.parametrize("process", [False], ids=["one of our session"], indirect=True)
def test_whoever_has_got_its_number_keeps_its_priority(process: subprocess.Popen[bytes]) -> None:
    let_others_go_first(process.pid)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICE


def test_an_engine_that_is_gone_is_nobody(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(DEADLINE_S)
    let_others_go_first(process.pid)


def test_an_engine_whose_number_is_not_known_yet_takes_nothing_from_us() -> None:
    told: list[tuple[int, int, int]] = []

    def session_of(pid: int) -> int:
        """As in a container that was entered from outside: its leader is out of sight."""
        return 0 if pid == 0 else pid

    def note(which: int, who: int, priority: int) -> None:
        told.append((which, who, priority))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getsid", session_of)
        patch.setattr(os, "setpriority", note)
        let_others_go_first(0)
    assert not told
