"""Claims of `unbroken.memory.mlh64`."""

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbroken.memory import mlh64

MASK = 0xFFFF_FFFF_FFFF_FFFF
CHUNK_BYTES = 2 << 20


def splitmix64(index: int) -> int:
    state = (index + 1) * 0x9E37_79B9_7F4A_7C15 & MASK
    state = (state ^ state >> 30) * 0xBF58_476D_1CE4_E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D0_49BB_1331_11EB & MASK
    return state ^ state >> 31


def mixed(word: int, place: int) -> int:
    factor = splitmix64(place) | 1
    product = word * factor & MASK
    return (product ^ product >> 32) * factor & MASK


def summed(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8)
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    return sum(mixed(word, place) for place, word in enumerate(words) if word) & MASK


def by_definition(data: bytes) -> int:
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    top = [*map(summed, chunks), len(data)]
    return sum(mixed(word, place) for place, word in enumerate(top)) & MASK


def test_the_generator_is_splitmix64() -> None:
    assert [splitmix64(i) for i in range(3)] == [
        0xE220_A839_7B1D_CDAF,
        0x6E78_9E6A_A1B9_65F4,
        0x06C4_5D18_8009_454F,
    ], "outputs that its authors publish for seed 0"
    factors = mlh64.coefficients()
    assert [int(factors[i]) for i in (0, 5, 2**18 - 1)] == [
        splitmix64(i) | 1 for i in (0, 5, 2**18 - 1)
    ]
    assert len(set(factors.tolist())) == 2**18, "no two are equal"


@given(st.binary(max_size=200))
def test_it_is_what_is_defined(data: bytes) -> None:
    assert mlh64.compute(data) == by_definition(data)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 5 << 19),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=20),
)
def test_it_is_what_is_defined_over_several_chunks(
    size: int, spots: list[tuple[float, int]]
) -> None:
    data = bytearray(size)
    for share, value in spots:
        if size:
            data[int(share * size)] = value
    assert mlh64.compute(data) == by_definition(bytes(data))


def test_known_values_stay() -> None:
    assert mlh64.compute(b"") == 0
    assert mlh64.compute(bytes(range(64))) == by_definition(bytes(range(64)))
    assert mlh64.compute(bytes(range(64))) == 0x65FB_E475_1515_4257


def flip(*bits: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return change


def test_every_flipped_bit_shows() -> None:
    data = random.Random(1).randbytes(64)
    expected = mlh64.compute(data)
    for bit in range(len(data) * 8):
        assert mlh64.compute(flip(bit)(data)) != expected, bit


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "two top bits": flip(63, 64 * 5 + 63),
    "two negated pairs of floats": flip(31, 63, 64 * 5 + 31, 64 * 5 + 63),
    "all negated, 32 bits each": flip(*range(31, 64 * 64, 32)),
    "all negated, 16 bits each": flip(*range(15, 64 * 64, 16)),
    "words in each other's place": lambda data: data[8:16] + data[:8] + data[16:],
    "a half twice": lambda data: data[: len(data) // 2] * 2,
    "a byte less": lambda data: data[:-1],
    "zeros behind": lambda data: data + bytes(8),
    "zeros before": lambda data: bytes(8) + data,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_happens_to_several_words_shows(name: str) -> None:
    for seed in range(50):
        data = random.Random(seed).randbytes(64 * 8)
        assert mlh64.compute(CHANGES[name](data)) != mlh64.compute(data)


def test_chunks_in_each_others_place_show() -> None:
    one, other = bytes([1]) * CHUNK_BYTES, bytes([2]) * CHUNK_BYTES
    assert mlh64.compute(one + other) != mlh64.compute(other + one)


def test_it_takes_parts_of_what_is_mapped() -> None:
    data = random.Random(2).randbytes(4096)
    assert mlh64.compute(memoryview(data)[3:1000]) == by_definition(data[3:1000])
