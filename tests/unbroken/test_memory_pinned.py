"""Claims of `unbroken.memory.pinned`: which of the rows that it is told of a process can read."""

import mmap

from unbroken.memory.checksums import Algorithm
from unbroken.memory.mapped import ReaderSlab
from unbroken.memory.pinned import Located, located
from unbroken.memory.rows import Row, rows_of

SMALL, LARGE = 16, 32
SLABS = {
    1: ReaderSlab(mmap.mmap(-1, 4 * SMALL), SMALL),
    2: ReaderSlab(mmap.mmap(-1, 2 * LARGE), LARGE),
}
XXH3 = int(Algorithm.XXH3)


def row(slab_id: int, slot: int) -> Row:
    return Row(slab_id, 7, slot, 1, 16, XXH3)


def readable(*rows: Row) -> Located:
    return located(rows_of(rows), SLABS.get)


def test_a_block_alone_is_the_one_that_it_is_among_all() -> None:
    for slab in SLABS.values():
        for start in range(len(slab.mapping)):
            slab.mapping[start] = start
    found = readable(row(1, 3), row(2, 1), row(1, 0), row(2, 0))
    blocks = list(found.blocks())
    assert [found.block(found.rows[index]) for index in range(len(found.rows))] == blocks
    assert [bytes(block.data) for block in blocks] == [
        bytes(range(3 * SMALL, 4 * SMALL)),
        bytes(range(LARGE, 2 * LARGE)),
        bytes(range(SMALL)),
        bytes(range(LARGE)),
    ]


def test_what_lies_beyond_its_slab_is_a_miss_as_are_all_after_it() -> None:
    assert len(readable(row(1, 3), row(2, 1)).rows) == 2, "the last ones of both"
    assert len(readable(row(1, 3), row(2, 2), row(1, 0)).rows) == 1
    assert len(readable(row(1, 2**32 - 1)).rows) == 0
    assert len(readable(row(1, 4), row(3, 0)).rows) == 0


def test_what_is_not_mapped_here_is_a_miss_whatever_its_slot() -> None:
    assert len(readable(row(1, 3), row(3, 2**32 - 1), row(1, 0)).rows) == 1
    assert len(readable(row(3, 0)).rows) == 0
    assert len(readable().rows) == 0
