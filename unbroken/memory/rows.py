"""Where a pinned block lies and what it is, as it is told to readers: 32 bytes each, in one string.

A get tells of many blocks at once. As one string they are joined by one call, and taken apart by
one for each column that somebody looks at, where columns of a message take one for each number.
"""

import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

_ROW = struct.Struct("<QQIIII")
_LONGS, _WORDS = _ROW.size // 8, _ROW.size // 4
"""A row is 4 numbers of 8 bytes, of which slab and checksum are the first two; or 8 of 4 bytes, of
which the others are the last four."""
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
        return _ROW.pack(*self)


class Rows:
    """Rows one after the other. Each column is made when it is asked for, and each time."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes | memoryview = b"") -> None:
        """Raises ValueError if there is half a one."""
        self._data = memoryview(data)
        if len(self._data) % _ROW.size:
            raise ValueError(f"expected rows of {_ROW.size} bytes, got {len(self._data)}")

    def __len__(self) -> int:
        return len(self._data) // _ROW.size

    def __getitem__(self, index: int) -> Row:
        """Raises IndexError."""
        number = range(len(self))[index]
        return Row(*_ROW.unpack_from(self._data, number * _ROW.size))

    def first(self, number: int) -> Self:
        """So many of them, or all."""
        return type(self)(self._data[: number * _ROW.size])

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
    """Rows made of their numbers. Raises ValueError if one does not fit."""
    try:
        return Rows(b"".join([_ROW.pack(*row) for row in rows]))
    except struct.error as error:
        raise ValueError(f"expected the numbers of rows: {error}") from error
