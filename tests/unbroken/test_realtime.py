"""Claims of `unbroken.realtime`, in processes of their own, where the system allows it."""

import os
import subprocess
import sys

import pytest

from unbroken.realtime import is_before_others, run_before_others

TAKE = "from unbroken.realtime import is_before_others, run_before_others; run_before_others(10); "


def is_allowed() -> bool:
    """Whether this user may have one."""
    return subprocess.run([sys.executable, "-c", TAKE], capture_output=True).returncode == 0


allowed = pytest.mark.skipif(not is_allowed(), reason="no real-time priority for this user")


def test_without_one_nothing_is_changed() -> None:
    run_before_others(0)
    assert not is_before_others()


@allowed
def test_threads_that_are_started_later_have_it_too() -> None:
    seen = (
        "import threading; seen = []; "
        "thread = threading.Thread(target=lambda: seen.append(is_before_others())); "
        "thread.start(); thread.join(); print(is_before_others(), *seen)"
    )
    output = subprocess.run([sys.executable, "-c", TAKE + seen], capture_output=True, check=True)
    assert output.stdout.split() == [b"True", b"True"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_who_may_not_have_it_is_told_what_he_may() -> None:
    become = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0)); "
        "from unbroken.realtime import run_before_others; os.setuid(65534); "
    )
    command = [sys.executable, "-c", f"{become} run_before_others(4)"]
    output = subprocess.run(command, capture_output=True)
    assert output.returncode != 0
    assert b"realtime_priority: expected at most 0" in output.stderr
    assert b"got 4" in output.stderr


@pytest.mark.parametrize("priority", [-1, 100])
def test_what_the_kernel_does_not_know_is_refused_at_the_start(priority: int) -> None:
    command = [sys.executable, "-m", "frontend", "--frontend-id", "f", "--discovery", "nowhere"]
    output = subprocess.run([*command, "--realtime-priority", f"{priority}"], capture_output=True)
    assert output.returncode != 0
    assert b"realtime_priority" in output.stderr or b"realtime-priority" in output.stderr
