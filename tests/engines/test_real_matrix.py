"""When the matrix on real engines is complete, and what it leaves in the documents."""

from pathlib import Path

from tests.engines.real import matrix
from tests.engines.real.matrix import CUT_POINTS, KEYS, PROMPTS, Column


def complete() -> Column:
    """All of it cut often enough, and equal."""
    column = Column()
    for row in column.rows.values():
        row.ways.add("A")
        row.cut = row.equal = len(PROMPTS) * CUT_POINTS
        row.offsets = {prompt: set(range(1, 1 + CUT_POINTS)) for prompt in PROMPTS}
    column.whole = column.whole_equal = 5
    return column


def test_every_feature_has_to_be_cut_often_enough_with_every_prompt() -> None:
    assert complete().is_ok
    missing = complete()
    missing.rows[KEYS[0][0]].offsets[PROMPTS[1]].pop()
    assert missing.fewest_cut_points == CUT_POINTS - 1
    assert not missing.is_ok
    assert not Column().is_ok


def test_one_stream_that_is_not_equal_is_too_many() -> None:
    cut, whole, failed = complete(), complete(), complete()
    cut.rows[KEYS[0][0]].equal -= 1
    whole.whole_equal -= 1
    failed.wrong.append("it ended with an error")
    assert not any(one.is_ok for one in (cut, whole, failed))


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}old\n{matrix.END}after\n")
    matrix.write(page, {"from outside": complete()})
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| {KEYS[0][0]} | A 24/24 |" in text
    matrix.write(page, {"from outside": complete()})
    assert page.read_text() == text
