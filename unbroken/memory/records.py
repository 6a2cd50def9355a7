"""How a block in shared memory says what it is: a record of 64 bytes that proves itself.

A slab of blocks has a table with one record per slot. Its owner writes it, with no call to anybody:

    WRITING (generation + 1) ──▶ the block's bytes ──▶ COMMITTED (checksum, key)

A writer can die between any two of these instructions, or within one. What is left is then either a
record that is not valid, which is no block, or a valid one, which was written after its bytes. The
check of a record depends on its slab and its slot, so that one which strayed there is not valid.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64, xxh3_64_intdigest

from unbroken.memory import checksums
from unbroken.memory.checksums import Algorithm
from unbroken.memory.keys import KEY_BYTES

RECORD_BYTES = 64
CHECKED_BYTES = 56
TOKENS_MAX = 65_535
SLOTS_MAX = 65_536
"""Of a slab."""
COPIED_BYTES = 128 * 1024
"""Fits into the cache of a core beside its copy."""

_RECORD = struct.Struct("<BBHII4x32sQ")
_CHECK = struct.Struct("<Q")
assert _RECORD.size == CHECKED_BYTES, "the check follows"


class RecordState(IntEnum):
    """What a slot holds. Zero is what fresh memory says."""

    EMPTY = 0
    WRITING = 1
    COMMITTED = 2


@dataclass(frozen=True, slots=True)
class Record:
    """What one slot of a slab holds."""

    state: RecordState
    num_tokens: int
    generation: int
    """How often the slot was written to, modulo 2^32."""
    slot: int
    key: bytes
    checksum: int
    """Of the block's bytes."""
    algorithm: Algorithm = Algorithm.XXH3
    """Of the checksum."""

    def to_bytes(self, slab_id: int) -> bytes:
        """The 64 bytes for the table of this slab."""
        checked = _RECORD.pack(
            self.state,
            self.algorithm,
            self.num_tokens,
            self.generation,
            self.slot,
            self.key,
            self.checksum,
        )
        return checked + _CHECK.pack(_check(checked, slab_id))


def parse(data: bytes, *, slab_id: int, slot: int) -> Record | None:
    """The record in these 64 bytes of a slab's table; None if there is no valid one."""
    checked = data[:CHECKED_BYTES]
    if data[CHECKED_BYTES:] != _CHECK.pack(_check(checked, slab_id)):
        return None
    state, number, num_tokens, generation, its_slot, key, checksum = _RECORD.unpack(checked)
    if its_slot != slot or state not in (RecordState.WRITING, RecordState.COMMITTED):
        return None
    try:
        algorithm = checksums.of_contract(number)
    except ValueError:
        return None  # Of a writer that is newer: nobody here could compare it.
    return Record(RecordState(state), num_tokens, generation, its_slot, key, checksum, algorithm)


def writing(slot: int, generation: int) -> Record:
    """What has to stand in the table before the first byte of a block is written."""
    return Record(RecordState.WRITING, 0, generation, slot, bytes(KEY_BYTES), 0)


def copy(target: memoryview, source: bytes | bytearray | memoryview) -> int:
    """Copy a block and return its xxh3, a part at a time: it is hashed while in the cache."""
    digest = xxh3_64()
    with memoryview(source) as view:
        for start in range(0, len(view), COPIED_BYTES):
            part = view[start : start + COPIED_BYTES]
            target[start : start + COPIED_BYTES] = part
            digest.update(part)
    return digest.intdigest()


def _check(checked: bytes, slab_id: int) -> int:
    return xxh3_64_intdigest(checked, slab_id & 0xFFFF_FFFF_FFFF_FFFF)
