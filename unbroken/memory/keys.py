"""The names of KV blocks in memory that processes share: 32 bytes, chained.

    root ──▶ key of block 0 ──▶ key of block 1 ──▶ …       (only full blocks have one)

As `unbroken.blocks`, whose 64 bits are for routing, with two differences: the keys are long enough
to stand for the content, also against somebody who looks for collisions, and the root tells apart
everything that makes bytes differ, layout and parallelism included. docs/decisions/block-hash.md
has the definition, with a test vector.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeySpace:
    """What blocks must have in common, their tokens aside, to be of use to each other."""

    model: str
    """Name and revision."""
    numerics_id: str
    """`NumericsClass.id`: weights, dtype, kernels."""
    layout: str
    """How a block's bytes are arranged: dtype, heads, layers, order."""
    parallelism: str
    """Which part of the model's heads and layers this rank has, as "tp 1/4"."""
    block_size: int
    """Tokens of a block."""
    tenant: str

    def root(self) -> bytes:
        """The parent of every first block."""
        digest = blake2b(digest_size=KEY_BYTES, person=b"unbroken kv 1")
        for part in (self.model, self.numerics_id, self.layout, self.parallelism, self.tenant):
            encoded = part.encode()
            digest.update(struct.pack("<I", len(encoded)))  # Else texts could trade characters.
            digest.update(encoded)
        digest.update(struct.pack("<I", self.block_size))
        return digest.digest()


class KeyChain:
    """The keys of a sequence that grows.

    Attributes:
        keys: Of its full blocks, first block first.
    """

    __slots__ = ("_pack", "_parent", "_tail", "block_size", "keys")

    def __init__(self, space: KeySpace) -> None:
        self.block_size = space.block_size
        self.keys: list[bytes] = []
        self._parent = space.root()
        self._tail: list[int] = []  # Tokens of the block that is not full.
        self._pack = struct.Struct(f"<{space.block_size}I").pack

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self.block_size + len(self._tail)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens, each 0 to 2^32 - 1, output marked as `unbroken.blocks.OUTPUT_TAG` says."""
        tokens = [*self._tail, *token_ids]
        size = self.block_size
        end = len(tokens) - len(tokens) % size
        for start in range(0, end, size):
            packed = self._pack(*tokens[start : start + size])
            self._parent = blake2b(self._parent + packed, digest_size=KEY_BYTES).digest()
            self.keys.append(self._parent)
        self._tail = tokens[end:]


def split(keys: bytes) -> list[bytes]:
    """Keys that came one after the other. Raises ValueError if they are not whole."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"expected keys of {KEY_BYTES} bytes, got {len(keys)} bytes")
    return list(struct.unpack(f"{KEY_BYTES}s" * (len(keys) // KEY_BYTES), keys))
