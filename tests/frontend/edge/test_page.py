"""docs/EDGE.md names tests that are collected, for every point, and tells what clients do."""

import itertools
import os
import re
import sys
from functools import cache
from pathlib import Path
from subprocess import run

import pytest

from tests.frontend.edge.test_interoperability import CLIENTS, FEATURES

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PAGE = ROOT / "docs" / "EDGE.md"
NAMED = re.compile(r"`(?:tests/[\w/]+/)?(test_\w+(?:\.py)?)`")


def table(header: str) -> list[list[str]]:
    """The cells of the table that begins so, row by row."""
    lines = PAGE.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows: list[list[str]] = []
    for line in [lines[begin], *lines[begin + 2 :]]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


@cache
def collected() -> frozenset[tuple[str, str, str]]:
    """File, function and parameters of each test of edges that `make test` runs."""
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow")
    where = (str(HERE), "tests/integration/test_grpcurl.py")
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    found = run(
        [*command, "-p", "no:cacheprovider", *where],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    parts = re.findall(r"^tests/\S+/(\w+\.py)::(\w+)(.*)$", found, re.MULTILINE)
    return frozenset((path, function, parameters) for path, function, parameters in parts)


def test_every_test_that_the_page_names_is_collected() -> None:
    named = set(NAMED.findall(PAGE.read_text()))
    assert len(named) > 40
    assert named - {name for path, function, _ in collected() for name in (path, function)} == set()


@pytest.mark.parametrize("row", table("what")[1:], ids=lambda row: str(row[0]))
def test_every_point_of_the_specification_has_a_test(row: list[str]) -> None:
    _, how, tests = row
    assert how
    assert NAMED.findall(tests)


def test_the_page_tells_which_client_is_tested_in_what() -> None:
    (_, *features), *rows = table("client")
    assert features == list(FEATURES)
    assert [client for client, *_ in rows] == list(CLIENTS)
    told = {
        (client, feature)
        for client, *cells in rows
        for feature, cell in zip(features, cells, strict=True)
        if cell.startswith("yes")
    }
    every_way = set(itertools.product(["grpcio", "native"], ["plain", "TLS"]))
    shown = {
        (client, feature)
        for client in CLIENTS
        for feature, test in FEATURES.items()
        if {
            (edge, security)
            for edge, security in every_way
            for _, function, parameters in collected()
            if function == test
            and parameters.startswith(f"[{edge}-")
            and parameters.endswith(f"{client}-{security}]")
        }
        == every_way
    }
    assert told == shown
