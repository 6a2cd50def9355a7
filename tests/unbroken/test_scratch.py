"""Directories that are removed even if their owner is killed."""

import fcntl
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unbroken.scratch import BEGUN_S, Scratch
from unbroken.scratch import OWNER as OWNER_FILE

OWNER = """
import sys
from unbroken.scratch import Scratch
scratch = Scratch("unbroken-test-")
(scratch.path / "something").touch()
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_owner_left_is_removed_by_the_next_and_what_lives_is_not(
    directory: Path,
) -> None:
    command = [sys.executable, "-c", OWNER]
    environment = {**os.environ, "TMPDIR": str(directory)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        first = Scratch("unbroken-test-")
        assert (left / "something").exists(), "its owner lives"
        owner.kill()
        owner.wait()
    second = Scratch("unbroken-test-")
    assert not left.exists()
    assert first.path.exists()
    first.close()
    second.close()
    second.close()
    assert list(directory.iterdir()) == []


def test_cleaners_of_old_files_leave_it_alone() -> None:
    """As tmpfiles.d(5) has it: they skip a directory that is locked."""
    scratch = Scratch("unbroken-test-")
    cleaner = os.open(scratch.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    scratch.close()
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def test_one_that_has_just_been_made_is_left_alone_though_it_has_no_lock_yet(
    directory: Path,
) -> None:
    begun, old = directory / "unbroken-test-begun", directory / "unbroken-test-old"
    for path in (begun, old):
        path.mkdir()
    long_ago = old.stat().st_mtime - 2 * BEGUN_S
    os.utime(old, (long_ago, long_ago))
    Scratch("unbroken-test-").close()
    assert begun.exists()
    assert not old.exists()


def test_of_many_that_begin_at_once_none_takes_anothers_away() -> None:
    def begin(_: int) -> bool:
        scratch = Scratch("unbroken-test-")
        is_there = (scratch.path / OWNER_FILE).exists()
        scratch.close()
        return is_there

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(begin, range(800)))
