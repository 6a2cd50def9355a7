"""Bytes for a GPU's memory that no checksum takes for others."""

import hashlib
import random

from unbroken.memory.gpu import Gpu

SLAB_BYTES = 1 << 30
BLOCK_BYTES = 2 << 20
_SENT_BYTES = 32 << 20


def keys_of(seed: str, number: int) -> list[bytes]:
    return [hashlib.blake2b(f"{seed} {i}".encode(), digest_size=32).digest() for i in range(number)]


def fill(gpu: Gpu, address: int, size_bytes: int, *, seed: int) -> None:
    """Random bytes, some of which are there many times: only those are sent."""
    sent = min(size_bytes, _SENT_BYTES)
    gpu.write(address, random.Random(seed).randbytes(sent))
    there = sent
    while there < size_bytes:
        more = min(there, size_bytes - there)
        gpu.copy(address + there, address, more)
        there += more
