"""An engine's names for its KV blocks, turned into ours (docs/decisions/block-hash.md). No I/O.

Engines publish hashes of their own, with the tokens of each block and its parent. Ours are computed
from those, so that a frontend finds a prompt's prefix on engines of any make. What comes after a
gap has a parent that nobody knows, and is left out: these are hints where to look.
"""

from collections.abc import Sequence
from typing import Final

from sidecar.engines.adapter import BlocksCleared, BlocksRemoved, BlocksStored
from unbroken import blocks
from unbroken.v1 import worker_pb2

BLOCKS_MAX: Final = 1_000_000
"""Of one rank. More are not told; the oldest stay known."""


class KvBlocks:
    """The reusable blocks of all ranks of one engine."""

    def __init__(self, numerics_id: str, block_size: int) -> None:
        """Tenants share these engines' caches; hashes are those of requests without a tenant."""
        self._root = blocks.root(numerics_id, "")
        self._block_size = block_size
        self._ranks: dict[int, dict[int, int]] = {}  # By rank: our hash, by the engine's.

    def apply(self, event: BlocksStored | BlocksRemoved | BlocksCleared) -> worker_pb2.KvEvents:
        """What to tell of it."""
        known = self._ranks.setdefault(event.rank, {})
        match event:
            case BlocksCleared():
                known.clear()
                return worker_pb2.KvEvents(rank=event.rank, reset=True)
            case BlocksRemoved(hashes=hashes):
                removed = [known.pop(name) for name in hashes if name in known]
                return worker_pb2.KvEvents(rank=event.rank, removed=removed)
            case BlocksStored():
                return worker_pb2.KvEvents(rank=event.rank, stored=self._stored(event, known))

    def _stored(self, event: BlocksStored, known: dict[int, int]) -> Sequence[int]:
        parent = self._root if event.parent is None else known.get(event.parent)
        stored: list[int] = []
        for name, token_ids in event.blocks:
            if parent is None or len(token_ids) != self._block_size:
                break
            (ours,) = blocks.chain(token_ids, self._block_size, root=parent)
            if name not in known:
                if len(known) >= BLOCKS_MAX:
                    break
                known[name] = ours
                stored.append(ours)
            parent = ours
        return stored
