"""MLH64: a checksum whose parts have no order, so that a GPU computes it as fast as it reads.

    word    64 bits, little endian; the last one is filled up with zeros
    mixed   of word w at place i: m = w * c(i), then m xor (m >> 32), then * c(i), modulo 2^64
    chunk   2 MiB of words, the last one what is left; its digest is the sum of its mixed words
    whole   the digests as words, and the length in bytes as one more; the sum of these, mixed

All c(i) are odd, so that `mixed` can be undone: whatever changes within one word shows. Words that
change places show too, as no two c(i) are equal. The shift stands between two multiplications
because of changes of two words: with one multiplication, two flipped top bits would cancel out;
with the shift before it, two negated pairs of floats would (bits 31 and 63).

This is the processor's side, some 6 GB/s on a core; the GPU's is mlh64.cu. It finds accidents:
whoever wants to can make bytes that have the checksum of others.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

WORD_BYTES: Final = 8
CHUNK_WORDS: Final = 1 << 18
CHUNK_BYTES: Final = CHUNK_WORDS * WORD_BYTES
SIZE_BYTES_MAX: Final = (CHUNK_WORDS - 1) * CHUNK_BYTES
_PART_WORDS: Final = 1 << 14
"""Fits into the cache of a core, with what is computed from it."""
_MASK: Final = (1 << 64) - 1

Words = NDArray[np.uint64]


def coefficients() -> Words:
    """All c(i): the outputs of splitmix64 from the seed 0, made odd.

    Source: Steele, Lea and Flood (2014), "Fast Splittable Pseudorandom Number Generators".
    """
    z = np.arange(1, CHUNK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


_COEFFICIENTS: Final = coefficients()


def compute(data: bytes | bytearray | memoryview) -> int:
    """Of these bytes. Raises ValueError if they are more than half a terabyte."""
    with memoryview(data).cast("B") as view:
        if len(view) > SIZE_BYTES_MAX:
            raise ValueError(f"expected at most {SIZE_BYTES_MAX} bytes, got {len(view)}")
        digests = [
            _sum(view[start : start + CHUNK_BYTES]) for start in range(0, len(view), CHUNK_BYTES)
        ]
        top = np.array([*digests, len(view)], dtype="<u8")
        return _sum(memoryview(top.tobytes()))


def _sum(chunk: memoryview) -> int:
    """Of the mixed words of one chunk."""
    num_words = len(chunk) // WORD_BYTES
    words = np.frombuffer(chunk, dtype="<u8", count=num_words)
    total = 0
    for start in range(0, num_words, _PART_WORDS):
        part = words[start : start + _PART_WORDS]
        factors = _COEFFICIENTS[start : start + len(part)]
        mixed = part * factors
        mixed ^= mixed >> np.uint64(32)
        mixed *= factors
        total += int(mixed.sum(dtype=np.uint64))
    if rest := bytes(chunk[num_words * WORD_BYTES :]):
        total += _mixed(int.from_bytes(rest, "little"), int(_COEFFICIENTS[num_words]))
    return total & _MASK


def _mixed(word: int, factor: int) -> int:
    product = word * factor & _MASK
    return (product ^ product >> 32) * factor & _MASK
