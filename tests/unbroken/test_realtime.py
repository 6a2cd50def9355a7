"""Claims of `unbroken.realtime`, in processes of their own, where the system allows it."""

import os
import subprocess
import sys

import pytest

from unbroken.realtime import is_allowed, is_before_others, run_before_others

TAKE = "from unbroken.realtime import is_before_others, run_before_others; run_before_others(10); "


allowed = pytest.mark.skipif(not is_allowed(10), reason="no real-time priority for this user")
START = ["-m", "frontend", "--frontend-id", "f", "--discovery", "/nowhere", "--realtime-priority"]


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
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0)); "
        "from frontend.__main__ import main; os.setuid(65534); main()"
    )
    command = [sys.executable, "-c", become, *START[2:], "4"]
    output = subprocess.run(command, capture_output=True)
    assert output.returncode == 2
    assert b"realtime_priority: expected at most 0, or CAP_SYS_NICE" in output.stderr
    assert b"got '4'" in output.stderr


@pytest.mark.parametrize("priority", [-1, 100])
def test_what_the_kernel_does_not_know_is_refused_at_the_start(priority: int) -> None:
    command = [sys.executable, *START, f"{priority}"]
    output = subprocess.run(command, capture_output=True)
    assert output.returncode == 2
    assert b"realtime_priority" in output.stderr
