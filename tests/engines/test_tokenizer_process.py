"""Reading a tokenizer in a process of its own: whose failure it is, and with which priority."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sidecar.engines import tokenizer_process
from sidecar.engines.adapter import NotReady
from sidecar.engines.tokenizer_files import BadTokenizer
from tests.engines.test_openai import large_tokenizer
from unbroken.realtime import is_before_others, run_before_others


def read(data: bytes) -> None:
    asyncio.run(tokenizer_process.read_asset({"tokenizer.json": data}))


def test_a_reader_that_has_too_little_time_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_process, "READ_TIMEOUT_S", 0.0)
    with pytest.raises(NotReady, match="timed out"):
        read(b"slow")


def test_a_disk_that_takes_nothing_is_no_fault_of_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(NotReady, match="cannot be read now"):
        read(b"homeless")


def test_files_that_are_no_tokenizer_are_a_bad_one() -> None:
    with pytest.raises(BadTokenizer):
        read(b"nonsense")


def test_it_is_read_without_the_priority_of_the_sidecar(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(large_tokenizer())
    command = (sys.executable, "-m", "sidecar.engines.tokenizer_process", str(tmp_path))
    try:
        run_before_others(10)
    except PermissionError as error:
        pytest.skip(str(error))
    try:
        was_before_others: list[bool] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            while child.poll() is None:
                was_before_others.append(is_before_others(child.pid))
                time.sleep(0.001)
        assert child.returncode == 0
        assert was_before_others[0], "it began with it, as this process has it"
        assert not was_before_others[-1]
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
