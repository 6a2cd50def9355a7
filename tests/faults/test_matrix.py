"""A part of the fault matrix in every test run: all phases, of three things hurt.

`make chaos` has the rest, and each cell several times.
"""

from pathlib import Path

import uvloop

from tests.faults.matrix import FAST_CELLS, PAGE, Matrix, summary, table, write_table
from tests.sidecar.processes import no_process_left

NUM_CELLS_MIN = 12
"""Of 18: a stream is in its last phase for some milliseconds only, and may be elsewhere then."""


def test_streams_survive_what_is_done_to_their_workers(tmp_path: Path) -> None:
    matrix = Matrix(FAST_CELLS, num_trials=1, seed=0, tries_max=1)
    with no_process_left():
        uvloop.run(matrix.run(tmp_path))
    figures = matrix.figures()
    tried = figures["cells"] - len(figures["tried_too_seldom"])
    assert tried >= NUM_CELLS_MIN
    for wrong in ("lost", "duplicated", "changed", "violations", "hung", "leaks", "refused"):
        assert figures[wrong] == 0, matrix.report()
    assert not figures["broken"]
    assert figures["complete"] == figures["streams"]
    assert figures["migrated"]


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter\n")
    for _ in range(2):
        write_table(page, "new")
        assert page.read_text() == "before\n<!-- matrix -->\nnew\n<!-- /matrix -->\nafter\n"


def test_the_summary_tells_what_was_counted_of_the_run() -> None:
    text = summary(Matrix([], 1, 0).figures() | {"streams": 4200, "complete": 4070, "lost": 1})
    assert "4,200 streams,\n4,070 complete; 1 lost, 0 duplicated" in text


def test_the_page_has_a_row_for_every_cell() -> None:
    rows = [line.split(" | ")[:2] for line in table(Matrix([], 1, 0)).splitlines()[2:]]
    text = PAGE.read_text()
    assert all(" | ".join(row) in text for row in rows)
