"""Rows of pinned blocks: what they say, and what is none."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.memory.rows import Row, Rows, rows_of

LONGS, WORDS = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
ROWS = st.lists(st.builds(Row, LONGS, LONGS, WORDS, WORDS, WORDS, WORDS), max_size=70)


@given(ROWS, st.integers(0, 80))
def test_rows_say_what_they_were_made_of(expected: list[Row], number: int) -> None:
    rows = rows_of(expected)
    assert [rows[index] for index in range(len(rows))] == expected
    first = rows.first(number)
    assert [first[index] for index in range(len(first))] == expected[:number]
    columns = (
        first.slab_ids,
        first.checksums,
        first.slots,
        first.generations,
        first.num_tokens,
        first.algorithms,
    )
    assert list(zip(*columns, strict=True)) == expected[:number]


def test_a_row_is_32_bytes_as_the_contract_says() -> None:
    row = Row(1, 2, 3, 4, 5, 6)
    assert row.to_bytes() == struct.pack("<QQIIII", 1, 2, 3, 4, 5, 6)
    assert Rows(row.to_bytes())[0] == row


def test_half_a_row_is_none() -> None:
    with pytest.raises(ValueError, match="rows of 32 bytes, got 33"):
        Rows(bytes(33))


def test_numbers_that_do_not_fit_are_no_row() -> None:
    with pytest.raises(ValueError, match="numbers of rows"):
        rows_of([(1, 2, 3, 4, 5, 2**32)])


def test_there_is_no_row_beyond_the_last() -> None:
    rows = rows_of([Row(1, 2, 3, 4, 5, 6)])
    assert rows[-1] == rows[0]
    with pytest.raises(IndexError):
        rows[1]
