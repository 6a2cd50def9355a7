"""However often a process is asked to stop, its exit status says how it did."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT_S = 60.0
COMMANDS = {
    "frontend": ("frontend", "--frontend-id", "f1"),
    # The edge of grpcio (`make test-grpcio`) serves with one process.
    "frontend of two processes": (
        "frontend",
        *("--frontend-id", "f1"),
        *("--edge", "native"),
        *("--processes", "2"),
    ),
    "sidecar": ("sidecar", "--worker-id", "w1", "--engine", "simulated"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_signals_that_come_to_the_very_end_leave_the_exit_status_alone(
    name: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", *COMMANDS[name], "--discovery", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up_at = time.monotonic() + LIMIT_S
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if '"frontend serves"' in line or '"sidecar serves"' in line:
                break
        while process.poll() is None:
            assert time.monotonic() < give_up_at
            process.send_signal(signal.SIGTERM)
            time.sleep(0.0005)
        assert process.returncode in (0, 4), "drained, or cut short"
    finally:
        process.kill()
        process.communicate()
