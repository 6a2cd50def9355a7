"""Chained hashes of KV blocks: equal exactly if all tokens up to the block's end are equal.

    root ──▶ hash of block 0 ──▶ hash of block 1 ──▶ …       (only full blocks have one)

The root tells apart what must never be shared although the tokens are equal: other numerics, other
tenants. docs/decisions/block-hash.md has the definition in full, with a test vector.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

OUTPUT_TAG = 1 << 31
"""Added to the ids of output tokens by engines whose KV depends on the phase that computed it."""


@lru_cache(maxsize=1024)
def root(numerics_id: str, tenant: str) -> int:
    """The 64-bit parent of every first block of a tenant on engines of one numerics class."""
    name = numerics_id.encode()
    digest = blake2b(digest_size=8)
    digest.update(struct.pack("<I", len(name)))  # Else the two texts could trade characters.
    digest.update(name)
    digest.update(tenant.encode())
    return int.from_bytes(digest.digest(), "little")


def chain(token_ids: Sequence[int], block_size: int, *, root: int) -> list[int]:
    """The 64-bit hashes of the full blocks of `token_ids`, first block first."""
    chained = BlockChain(block_size, root=root)
    chained.extend(token_ids)
    return chained.hashes


class BlockChain:
    """The hashes of a sequence that grows.

    Attributes:
        hashes: Of its full blocks, first block first.
    """

    __slots__ = ("_pack", "_parent", "_tail", "block_size", "hashes")

    def __init__(self, block_size: int, *, root: int) -> None:
        self.block_size = block_size
        self.hashes: list[int] = []
        self._parent = root.to_bytes(8, "little")
        self._tail: list[int] = []  # Tokens of the block that is not full.
        self._pack = _format(block_size).pack

    @property
    def num_tokens(self) -> int:
        return len(self.hashes) * self.block_size + len(self._tail)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens, each 0 to 2^32 - 1."""
        size, tail = self.block_size, self._tail
        if len(tail) + len(token_ids) < size:
            tail += token_ids
            return
        tokens = [*tail, *token_ids]
        end = len(tokens) - len(tokens) % size
        parent, pack, hashes = self._parent, self._pack, self.hashes
        for start in range(0, end, size):
            parent = blake2b(parent + pack(*tokens[start : start + size]), digest_size=8).digest()
            hashes.append(int.from_bytes(parent, "little"))
        self._parent = parent
        self._tail = tokens[end:]


@lru_cache(maxsize=64)
def _format(block_size: int) -> struct.Struct:
    """Of the ids of one block."""
    return struct.Struct(f"<{block_size}I")
