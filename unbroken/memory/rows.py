"""Where a pinned block lies and what it is, as it is told to readers: 32 bytes each, in one string.

A get tells of many blocks at once. As one string they are joined by one call, and taken apart by
one for each column that somebody looks at, where columns of a message take one for each number.
"""

import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

ROW = struct.Struct("<QQIIII")
_LONGS, _WORDS = ROW.size // 8, ROW.size // 4
assert sys.byteorder == "little", "columns are read in the machine's order, which is the rows'"


class Row(NamedTuple):
    """What is told of one block."""

    slab_id: int
    checksum: int
    slot: int
    generation: int
    num_tokens: int
    algorithm: int
    """Of the checksum, by the contract's number."""

    def to_bytes(self) -> bytes:
        """Its 32 bytes."""
        return ROW.pack(*self)


class Rows:
    """Rows one after the other; no number of them is made before somebody looks at it."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes | memoryview = b"") -> None:
        """Raises ValueError if there is half a one."""
        self._data = memoryview(data)
        if len(self._data) % ROW.size:
            raise ValueError(f"expected rows of {ROW.size} bytes, got {len(self._data)}")

    def __len__(self) -> int:
        return len(self._data) // ROW.size

    def __getitem__(self, index: int) -> Row:
        """Raises IndexError."""
        number = range(len(self))[index]
        return Row(*ROW.unpack_from(self._data, number * ROW.size))

    def first(self, number: int) -> Self:
        """So many of them, or all."""
        return type(self)(self._data[: number * ROW.size])

    @property
    def slab_ids(self) -> list[int]:
        return self._data.cast("Q")[::_LONGS].tolist()

    @property
    def checksums(self) -> list[int]:
        return self._data.cast("Q")[1::_LONGS].tolist()

    @property
    def slots(self) -> list[int]:
        return self._data.cast("I")[4::_WORDS].tolist()

    @property
    def generations(self) -> list[int]:
        return self._data.cast("I")[5::_WORDS].tolist()

    @property
    def num_tokens(self) -> list[int]:
        return self._data.cast("I")[6::_WORDS].tolist()

    @property
    def algorithms(self) -> list[int]:
        return self._data.cast("I")[7::_WORDS].tolist()


def rows_of(rows: Iterable[Sequence[int]]) -> Rows:
    """The same of their numbers. Raises ValueError if one is none of a row."""
    try:
        return Rows(b"".join([ROW.pack(*row) for row in rows]))
    except struct.error as error:
        raise ValueError(f"expected the numbers of rows: {error}") from error
