"""In which order tests run, and what that ends with: a line of JSON, as every proof of ours."""

import json
import time
from pathlib import Path

import pytest

from unbroken.garbage import collect_nothing_in_forks

_KINDS = ("passed", "failed", "error", "skipped")
_began = time.monotonic()

collect_nothing_in_forks()


_COMPUTES = Path(__file__).parent / "simulation"
"""Tests that only compute, for minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what only computes: most others wait for processes, and leave cores to it."""
    items.sort(key=lambda item: _COMPUTES not in item.path.parents)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the line after pytest's own summary; workers of xdist have no terminal."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    counts = {kind: len(reporter.stats.get(kind, ())) for kind in _KINDS}
    is_ok = not counts["failed"] and not counts["error"] and counts["passed"] > 0
    seconds = round(time.monotonic() - _began, 1)
    reporter.write_line(json.dumps({"ok": is_ok, **counts, "seconds": seconds}))
