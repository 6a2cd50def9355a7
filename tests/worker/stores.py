"""A memory service that is a dictionary, for engines without processes."""

from typing import Any

from unbroken.memory.keys import KeyChain, KeySpace
from unbroken.v1 import worker_pb2
from worker.engine import EngineSpec, KvHolder
from worker.engine import Sequence as Stream
from worker.kv_store import Take


class Shelf:
    """Blocks by key, for any number of engines."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}


class ShelfStore:
    """One engine's way to a shelf."""

    def __init__(self, shelf: Shelf, spec: EngineSpec) -> None:
        self.shelf = shelf
        self.use = worker_pb2.KvStoreUse()
        self.kept_by: KvHolder | None = None
        self.is_hung = False
        self._spec = spec

    def put(self, stream: Stream, index: int, data: bytes) -> None:
        self.shelf.blocks[self._key(stream, index)] = data
        self.use.blocks_put_total += 1

    def fetch(
        self, stream: Stream, first_block: int, end_block: int, take: Take
    ) -> tuple[int, Any]:
        assert first_block < end_block, "nobody asks for nothing"
        found: list[memoryview] = []
        for index in range(first_block, end_block):
            data = self.shelf.blocks.get(self._key(stream, index))
            if data is None:
                break
            found.append(memoryview(data))
        self.use.blocks_restored_total += len(found)
        return len(found), take(found) if found else None

    def holder(self) -> KvHolder | None:
        return self.kept_by

    def turn_off(self) -> None:
        self.use.is_off = True

    def close(self) -> bool:
        return not self.is_hung

    def _key(self, stream: Stream, index: int) -> bytes:
        size = self._spec.block_size
        space = KeySpace(self._spec.model, self._spec.numerics_id, "", "", size, stream.tenant)
        chain = KeyChain(space)
        chain.extend(
            [
                *stream.tokens_to_chain(
                    0, (index + 1) * size, marks_output=not self._spec.split_invariant
                )
            ]
        )
        return chain.keys[index]
