"""Where a pinned block lies and what it is, as it is told to readers: 32 bytes each, in one string.

A get tells of many blocks at once. As one string they are joined and taken apart by one call each,
where columns of a message take one for each number.
"""

import struct
from collections.abc import Iterable
from typing import TypeAlias

Row: TypeAlias = tuple[int, int, int, int, int, int]
"""Slab, checksum, slot, generation, number of tokens, and the contract's number of the checksum's
algorithm."""
ROW = struct.Struct("<QQIIII")


def rows_of(data: bytes) -> list[Row]:
    """All of them. Raises ValueError if there is half a one."""
    try:
        return list(ROW.iter_unpack(data))  # pyright: ignore[reportReturnType] - As ROW says.
    except struct.error as error:
        raise ValueError(f"expected rows of {ROW.size} bytes, got {len(data)}") from error


def columns_of(rows: Iterable[bytes]) -> tuple[tuple[int, ...], ...]:
    """The same by what they say, of one row at least."""
    return tuple(zip(*ROW.iter_unpack(b"".join(rows)), strict=True))
