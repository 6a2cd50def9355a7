"""Bytes for a GPU's memory that no checksum takes for others."""

import random

from unbroken.memory.gpu import Gpu

SLAB_BYTES = 1 << 30
_SENT_BYTES = 32 << 20


def fill(gpu: Gpu, address: int, size_bytes: int, *, seed: int) -> None:
    """Random bytes, some of which are there many times: only those are sent."""
    sent = min(size_bytes, _SENT_BYTES)
    gpu.write(address, random.Random(seed).randbytes(sent))
    there = sent
    while there < size_bytes:
        more = min(there, size_bytes - there)
        gpu.copy(address + there, address, more)
        there += more
