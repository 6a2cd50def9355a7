"""Claims of the logs, as another process would write them."""

import fcntl
import json
import os
import subprocess
import sys

CODE = """
import logging
from unbroken import log

before = log.get_logger("made.before")
log.configure("sidecar", "info", {format!r})
before.info("engine started", engine_pid=7, path=print)
before.debug("not severe enough")
logging.getLogger("grpc").warning("from a %s", "library")
try:
    1 / 0
except ZeroDivisionError:
    secret = "a local variable"
    before.exception("it failed")
"""


def stderr_of(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert run.stdout == ""
    return run.stderr


def test_lines_are_json_unless_a_terminal_reads_them() -> None:
    for format_ in ("auto", "json"):
        lines = [json.loads(line) for line in stderr_of(CODE.format(format=format_)).splitlines()]
        assert [line["event"] for line in lines] == [
            "engine started",
            "from a library",
            "it failed",
        ]
        assert {line["process"] for line in lines} == {"sidecar"}
        assert [line["logger"] for line in lines] == ["made.before", "grpc", "made.before"]
        assert [line["level"] for line in lines] == ["info", "warning", "error"]
        assert all(line["time"].endswith("Z") for line in lines)
        assert lines[0]["engine_pid"] == 7
        assert lines[0]["path"] == "<built-in function print>"
        assert "ZeroDivisionError" in lines[2]["exception"]


def test_people_get_text_without_local_variables() -> None:
    text = stderr_of(CODE.format(format="console"))
    assert "engine started" in text
    assert "engine_pid=7" in text
    assert "ZeroDivisionError" in text
    assert "a local variable" not in text.replace('secret = "a local variable"', "")


def test_a_library_user_keeps_their_own_logging() -> None:
    code = "import structlog, logging, unbroken.client\n"
    code += "assert not structlog.is_configured()\nassert not logging.getLogger().handlers"
    assert stderr_of(code) == ""


FLOOD = """
import sys
from unbroken import log

log.configure("sidecar")
flood = log.get_logger("flood")
for number in range(1000):
    flood.info("a line", number=number)
print("through", flush=True)
sys.stdin.readline()
flood.info("read again", long="x" * 10_000)
"""


def test_a_log_that_nobody_reads_costs_lines_and_no_time() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writing,
        text=True,
    )
    os.close(writing)
    with process, os.fdopen(reading, "rb", closefd=True) as log:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "through\n"
        before = os.read(log.fileno(), 65_536).decode().splitlines()
        process.stdin.write("\n")
        process.stdin.flush()
        lines = [json.loads(line) for line in before]
        rest = [json.loads(line) for line in log.read().decode().splitlines() if line]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    assert rest[0]["event"] == "log lines lost"
    assert len(lines) + rest[0]["num"] == 1000


def test_a_log_on_a_full_disk_costs_lines() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", FLOOD],
            input="\n",
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=20,
            check=True,
        )
    assert done.stdout == "through\n"
