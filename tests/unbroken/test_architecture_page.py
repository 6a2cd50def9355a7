"""docs/ARCHITECTURE.md names every module, on the side on which the import linter holds it."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = (ROOT / "unbroken" / "v1", ROOT / "unbroken" / "third_party")
UNNAMED = frozenset({"__init__", "__main__", "config", "metrics"})


def _rows() -> dict[str, tuple[set[str], set[str]]]:
    """By folder, its decisions and its shells, as the table of the house has them."""
    rows: dict[str, tuple[set[str], set[str]]] = {}
    for line in (ROOT / "docs" / "ARCHITECTURE.md").read_text().splitlines():
        if (row := re.fullmatch(r"\| `([a-z0-9_/]+)/` \|.*\|(.*)\|(.*)\|", line)) is not None:
            decisions, shells = (set(re.findall(r"`(\w+)`", row[i])) for i in (2, 3))
            rows[row[1]] = (decisions, shells)
    return rows


ROWS = _rows()


def test_every_folder_of_code_has_a_row() -> None:
    services = ("unbroken", "frontend", "sidecar", "worker", "memory_service")
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for service in services
        for path in (ROOT / service).rglob("*.py")
        if path.parent not in GENERATED
    }
    assert folders <= ROWS.keys()


@pytest.mark.parametrize("folder", ROWS)
def test_every_module_is_named_once(folder: str) -> None:
    decisions, shells = ROWS[folder]
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - UNNAMED
    assert not decisions & shells
    assert decisions | shells == modules


@pytest.mark.parametrize("folder", ROWS)
def test_decisions_are_those_that_the_import_linter_holds(folder: str) -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    held = next(one for one in linter["contracts"] if one["name"] == "Decisions do no I/O")
    package = folder.replace("/", ".")
    mine = {
        name.rpartition(".")[2]
        for name in held["source_modules"]
        if name.rpartition(".")[0] == package
    }
    assert ROWS[folder][0] == mine
