"""Claims of requests, between real processes."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from frontend.processes.claims import Claims, Elsewhere

KEY = ("tenant", "request")

OTHER = """
import sys
from pathlib import Path
from frontend.processes.claims import Claims, Elsewhere
claims = Claims(Path(sys.argv[1]))
for line in sys.stdin:
    what, tenant, name = line.rstrip("\\n").split("|")
    try:
        print(getattr(claims, what)((tenant, name)), flush=True)
    except Elsewhere as elsewhere:
        print(elsewhere.pid, flush=True)
"""


class Other:
    """Another process that claims."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.pid = process.pid

    def does(self, what: str, key: tuple[str, str]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}|{key[0]}|{key[1]}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def another(directory: Path) -> Generator[Other]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Other(process)
        finally:
            process.kill()


@pytest.fixture
def claims(tmp_path: Path) -> Generator[Claims]:
    claims = Claims(tmp_path)
    yield claims
    claims.close()


def test_what_one_has_no_other_gets_and_each_learns_who_has_it(
    claims: Claims, tmp_path: Path
) -> None:
    with another(tmp_path) as other:
        assert other.does("take", KEY) == "None"
        for what in (claims.check, claims.take):
            with pytest.raises(Elsewhere) as caught:
                what(KEY)
            assert caught.value.pid == other.pid
        claims.take(("tenant", "another"))
        claims.take(("", "request"))
        assert other.does("check", ("tenant", "another")) != "None"


def test_claims_of_a_process_are_gone_when_it_is(claims: Claims, tmp_path: Path) -> None:
    with another(tmp_path) as other:
        assert other.does("take", KEY) == "None"
        other.process.kill()
        other.process.wait()
        claims.take(KEY)


def test_what_is_released_others_can_have(claims: Claims, tmp_path: Path) -> None:
    claims.take(KEY)
    claims.take(KEY)
    with another(tmp_path) as other:
        assert other.does("check", KEY) != "None"
        claims.release(KEY)
        claims.release(KEY)
        assert other.does("take", KEY) == "None"


def test_ten_thousand_claims_are_found_each(claims: Claims, tmp_path: Path) -> None:
    keys = [("", f"request-{number}") for number in range(10_000)]
    for key in keys:
        claims.take(key)
    with another(tmp_path) as other:
        assert all(other.does("check", key) != "None" for key in keys[::500])
        assert other.does("check", ("", "request-10000")) == "None"
