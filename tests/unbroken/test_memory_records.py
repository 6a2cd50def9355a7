"""Claims of `unbroken.memory.records`: whatever is not exactly a record is none."""

import dataclasses
import random

import pytest
from xxhash import xxh3_64_digest

from unbroken.memory import checksums
from unbroken.memory.checksums import Algorithm
from unbroken.memory.records import (
    CHECKED_BYTES,
    COPIED_BYTES,
    RECORD_BYTES,
    Record,
    RecordState,
    copy,
    parse,
    writing,
)

RECORD = Record(RecordState.COMMITTED, 16, 7, 3, bytes(range(32)), 0x1234_5678_9ABC_DEF0)


def test_a_record_is_read_as_it_was_written() -> None:
    data = RECORD.to_bytes(99)
    assert len(data) == RECORD_BYTES
    assert parse(data, slab_id=99, slot=3) == RECORD
    assert parse(writing(3, 8).to_bytes(99), slab_id=99, slot=3) == writing(3, 8)


def test_a_record_says_which_checksum_it_has() -> None:
    mine = dataclasses.replace(RECORD, algorithm=Algorithm.MLH64)
    assert parse(mine.to_bytes(99), slab_id=99, slot=3) == mine


def test_a_record_of_before_there_were_two_checksums_has_xxh3() -> None:
    checked = bytearray(RECORD.to_bytes(99)[:CHECKED_BYTES])
    checked[1] = 0
    old = bytes(checked) + xxh3_64_digest(bytes(checked), 99)[::-1]
    assert parse(old, slab_id=99, slot=3) == RECORD


def test_no_flipped_bit_is_missed() -> None:
    for bit in range(RECORD_BYTES * 8):
        data = bytearray(RECORD.to_bytes(99))
        data[bit // 8] ^= 1 << bit % 8
        assert parse(bytes(data), slab_id=99, slot=3) is None, bit


def test_a_torn_record_is_none() -> None:
    old, new = writing(3, 7).to_bytes(99), RECORD.to_bytes(99)
    for length in range(1, RECORD_BYTES):
        torn = new[:length] + old[length:]
        assert torn in (old, new) or parse(torn, slab_id=99, slot=3) is None, length


def test_a_record_that_strayed_is_none() -> None:
    data = RECORD.to_bytes(99)
    assert parse(data, slab_id=98, slot=3) is None
    assert parse(data, slab_id=99, slot=2) is None


@pytest.mark.parametrize("size", [0, 1, COPIED_BYTES, COPIED_BYTES + 1, 3 * COPIED_BYTES - 7])
def test_a_copy_has_the_bytes_and_the_checksum(size: int) -> None:
    source, target = random.Random(size).randbytes(size), bytearray(size)
    assert copy(memoryview(target), source) == checksums.compute(source)
    assert target == source


def test_fresh_memory_has_no_records() -> None:
    assert parse(bytes(RECORD_BYTES), slab_id=99, slot=0) is None
