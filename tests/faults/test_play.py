"""`unbroken chaos` plays a file of faults, and its verdict is the last line."""

import json
import os
import subprocess
import sys
from pathlib import Path

from unbroken.chaos.schedule import Planned, to_lines
from unbroken.chaos.vocabulary import Component, Harm

FAULTS = (
    Planned(0.5, Component.HOST, Harm.KILL, "w1", 0.2),
    Planned(1.0, Component.LINK_BOTH, Harm.RESET, "w2", 0.0),
    Planned(1.5, Component.SIDECAR, Harm.SLOW, "w2", 0.5),
)


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unbroken.cli", "chaos", *words],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_a_file_of_faults_is_played_and_no_stream_shows_it(tmp_path: Path) -> None:
    path, copy = tmp_path / "faults", tmp_path / "copy"
    path.write_text(to_lines(FAULTS))
    words = ("--workers", "2", "--streams", "4", "--seconds", "3")
    done = run_command(*words, "--schedule", str(path), "--save", str(copy))
    assert done.returncode == 0, done.stdout + done.stderr
    assert copy.read_text() == path.read_text()
    for fault in FAULTS:
        name = f"{fault.harm.value} {fault.component.value} {fault.victim}"
        assert f"{name}: healed" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ok"]
    assert figures["faults"] == len(FAULTS)
    assert figures["migrated"] > 0
    assert figures["complete"] == figures["streams"] > 0


def test_a_file_that_is_no_schedule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "faults"
    path.write_text(to_lines([Planned(0.5, Component.HOST, Harm.KILL, "w9", 0.2)]))
    done = run_command("--schedule", str(path))
    assert done.returncode == 2
    assert "w9" in done.stderr
