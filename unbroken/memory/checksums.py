"""The 64 bits that bytes are compared by, and how they are computed.

A processor computes xxh3 fastest, a GPU what has no order (`unbroken.memory.mlh64`). Whoever
compares has to know which one it was: it stands beside every checksum.
"""

from enum import IntEnum
from typing import assert_never

from xxhash import xxh3_64_intdigest


class Algorithm(IntEnum):
    """As `ChecksumAlgorithm` of the contract."""

    XXH3 = 1
    MLH64 = 2


def compute(data: bytes | bytearray | memoryview, algorithm: Algorithm = Algorithm.XXH3) -> int:
    """The checksum of these bytes."""
    match algorithm:
        case Algorithm.XXH3:
            return xxh3_64_intdigest(data)
        case Algorithm.MLH64:
            from unbroken.memory import mlh64  # With numpy, which takes 0.1 s to import.

            return mlh64.compute(data)
        case _:
            assert_never(algorithm)


def of_contract(number: int) -> Algorithm:
    """What the contract's number means; 0 is xxh3. Raises ValueError if it is unknown."""
    return Algorithm(number or Algorithm.XXH3)
