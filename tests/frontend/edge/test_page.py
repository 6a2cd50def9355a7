"""docs/EDGE.md names tests that are there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "EDGE.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert len(named) > 20
    assert named <= set(re.findall(r"def (test_\w+)", sources))
