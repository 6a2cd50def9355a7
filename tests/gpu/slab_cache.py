"""The paged KV cache of transformers' continuous batching, in a pool of the memory service.

    with pool_of(client, "kv", shape) as pool, in_slabs(pool): manager = model.init_continuous…

    slabs of the pool    keys and values of each layer, as the cache has them
    table beside it      a record for each page: which tokens' KV it holds, and its checksum

A page has WRITING in its record before it is given to a sequence, and COMMITTED when its KV has
been computed whole. So who adopts the pool of an engine that was killed knows which pages are good,
compares them, and gives them to sequences that begin with the same tokens: by transformers' own
sharing of prefixes, and copying nothing. Of the host's memory or of a GPU's.

Written for transformers 5.17, whose classes for this are not documented. Needs PyTorch.
"""

# What is derived from is imported when there is a PyTorch, so nobody knows its types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import importlib
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from unbroken.memory import checksums, records
from unbroken.memory.client import MemoryClient, Segment, SegmentClass
from unbroken.memory.device_slabs import DeviceSlab
from unbroken.memory.gpu_client import GpuMemoryClient
from unbroken.memory.keys import KeyChain, KeySpace
from unbroken.memory.records import RECORD_BYTES, Record, RecordState

ROUND_BYTES: Final = 2 << 20
EXTRA_PAGES: Final = 2
"""That transformers has for padding, after all others."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a pool has to have room for."""

    num_layers: int
    num_pages: int
    page_tokens: int
    token_bytes: int
    """Of the keys of one layer, which are as large as the values."""

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    @property
    def tensor_bytes(self) -> int:
        return (self.num_pages + EXTRA_PAGES) * self.page_bytes


@dataclass(slots=True)
class Pool:
    """Memory of one engine's cache, and what stands in its table."""

    shape: CacheShape
    client: MemoryClient
    segment: Segment
    table: Segment
    is_adopted: bool
    found: dict[bytes, int] = field(default_factory=dict[bytes, int])
    """By key, pages of the one before that are good and that nobody has asked for yet."""
    num_spoilt: int = 0
    """Pages that did not match their checksums."""
    generations: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def is_on_gpu(self) -> bool:
        return not self.segment.slabs

    def tensors(self) -> list[Any]:
        """Bytes: keys and values of each layer, one after the other."""
        torch: Any = importlib.import_module("torch")
        size = self.shape.tensor_bytes
        if isinstance(self.client, GpuMemoryClient) and self.is_on_gpu:
            on_gpu: Any = self.segment
            return [
                torch.as_tensor(DeviceSlab(slab.address, size), device="cuda")
                for slab in on_gpu.on_gpu.slabs
            ]
        return [
            torch.frombuffer(memoryview(slab)[:size], dtype=torch.uint8)
            for slab in self.segment.slabs
        ]

    def write(self, record: Record) -> None:
        start = record.slot * RECORD_BYTES
        self.table.slabs[0][start : start + RECORD_BYTES] = record.to_bytes(self.table.slab_ids[0])

    def begin(self, pages: Sequence[int]) -> None:
        """These are given to a sequence, which may write there at once."""
        for page in pages:
            generation = self.generations[page] = self.generations.get(page, 0) + 1
            self.write(records.writing(page, generation))

    def commit(self, page: int, key: bytes) -> None:
        """Its KV is there."""
        self.write(
            Record(
                RecordState.COMMITTED,
                self.shape.page_tokens,
                self.generations[page],
                page,
                key,
                self.checksum(page),
            )
        )

    def checksum(self, page: int) -> int:
        """Of a page in all layers."""
        size = self.shape.page_bytes
        start = page * size
        if isinstance(self.client, GpuMemoryClient) and self.is_on_gpu:
            on_gpu: Any = self.segment
            addresses = [slab.address + start for slab in on_gpu.on_gpu.slabs]
            sums = self.client.gpu.checksums(addresses, size)
        else:
            sums = [
                checksums.compute(memoryview(slab)[start : start + size])
                for slab in self.segment.slabs
            ]
        return xxh3_64_intdigest(struct.pack(f"<{len(sums)}Q", *sums))

    def look(self) -> None:
        """Find what is good of what the one before has left."""
        for page in range(self.shape.num_pages):
            start = page * RECORD_BYTES
            data = self.table.slabs[0][start : start + RECORD_BYTES]
            record = records.parse(data, slab_id=self.table.slab_ids[0], slot=page)
            if record is None:
                continue
            self.generations[page] = record.generation
            if record.state is not RecordState.COMMITTED:
                continue
            if record.checksum == self.checksum(page):
                self.found[record.key] = page
            else:
                self.num_spoilt += 1


def created(client: MemoryClient, name: str, shape: CacheShape, *, on_gpu: bool) -> Pool:
    """A new pool, which can be adopted from now on."""
    sizes = [-(-shape.tensor_bytes // ROUND_BYTES) * ROUND_BYTES] * (2 * shape.num_layers)
    if on_gpu:
        assert isinstance(client, GpuMemoryClient), "it has a GPU"
        segment: Segment = client.create_on_gpu(name, SegmentClass.KV_POOL, sizes)
    else:
        segment = client.create(name, SegmentClass.KV_POOL, sizes)
    table_bytes = -(-shape.num_pages * RECORD_BYTES // 4096) * 4096
    table = client.create(f"{name}/table", SegmentClass.KV_POOL, [table_bytes])
    for one in (segment, table):
        client.freeze(one)
    return Pool(shape, client, segment, table, is_adopted=False)


def adopted(client: MemoryClient, name: str, shape: CacheShape, *, on_gpu: bool) -> Pool:
    """That of an engine that is dead: waits until this is proved."""
    if on_gpu:
        assert isinstance(client, GpuMemoryClient), "it has a GPU"
        segment: Segment = client.adopt_on_gpu(name)
    else:
        segment = client.adopt(name)
    pool = Pool(shape, client, segment, client.adopt(f"{name}/table"), is_adopted=True)
    pool.look()
    return pool


def chain_of(model: str, page_tokens: int) -> KeyChain:
    """What pages are called."""
    return KeyChain(KeySpace(model, "transformers", "pages by layer", "", page_tokens, ""))


@contextlib.contextmanager
def in_slabs(pool: Pool, model: str) -> Generator[list[Any]]:
    """Caches that are made meanwhile, at most one, lie in the pool; it is in the list."""
    api: Any = importlib.import_module("transformers.generation.continuous_batching.continuous_api")
    managers: Any = importlib.import_module(
        "transformers.generation.continuous_batching.cache_manager"
    )
    made: list[Any] = []
    plain = api.PagedAttentionCache

    class PoolBlockManager(managers.BlockManager):  # pyright: ignore[reportUntypedBaseClass]
        """Says in the table what it does."""

        def __init__(self, of: Any) -> None:
            super().__init__(of.num_blocks, of.block_size, of.tp_on)
            kept = set(pool.found.values())
            self._uninit_block_ids.extend(
                page
                for page in [self._uninit_block_ids.popleft() for _ in range(of.num_blocks)]
                if page not in kept
            )
            self._committed: set[int] = set()

        def offer(self, token_ids: Sequence[int]) -> None:
            """Those of the pages found that hold a prefix of this."""
            chain = chain_of(model, self.block_size)
            chain.extend(token_ids)
            parent_hash = parent_id = None
            for index, key in enumerate(chain.keys):
                tokens = list(token_ids[index * self.block_size : (index + 1) * self.block_size])
                parent_hash = self.compute_hash(parent_hash, tokens, group_id=0)
                known = self._hash_to_id.get(parent_hash)
                if known is None:
                    page = pool.found.pop(key, None)
                    if page is None:
                        return
                    block = managers.Block(page, parent_id, 0)
                    block.hash, block.ref_count = parent_hash, 0
                    self._id_to_block[page] = block
                    self._hash_to_id[parent_hash] = page
                    self._init_block_ids[page] = None
                    self._committed.add(page)
                    known = page
                parent_id = known

        def has_enough_free_blocks(self, n_blocks: int) -> bool:
            if len(self._uninit_block_ids) + len(self._init_block_ids) < n_blocks:
                self._uninit_block_ids.extend(pool.found.values())  # Nobody has asked for them.
                pool.found.clear()
            return super().has_enough_free_blocks(n_blocks)

        @property
        def num_free_blocks(self) -> int:
            return super().num_free_blocks + len(pool.found)

        def get_free_blocks(self, n_blocks: int, *args: Any, **kwargs: Any) -> Any:
            pages = super().get_free_blocks(n_blocks, *args, **kwargs)
            if pages is not None:
                self._committed.difference_update(pages)
                pool.begin(pages)
            return pages

        def mark_shareable_blocks_as_complete(
            self, num_complete_blocks: int, allocated_blocks: list[int], prompt_ids: list[int]
        ) -> None:
            super().mark_shareable_blocks_as_complete(
                num_complete_blocks, allocated_blocks, prompt_ids
            )
            new = [
                (index, page)
                for index, page in enumerate(allocated_blocks)
                if page not in self._committed and self._id_to_block[page].is_complete
            ]
            if not new:
                return
            chain = chain_of(model, self.block_size)
            chain.extend(prompt_ids[: (new[-1][0] + 1) * self.block_size])
            for index, page in new:
                pool.commit(page, chain.keys[index])
                self._committed.add(page)

    class PoolCache(plain):  # pyright: ignore[reportUntypedBaseClass]
        """As transformers', in memory that it is given."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert self.use_prefix_sharing, "full attention in all layers, and sharing allowed"
            assert self.num_blocks == pool.shape.num_pages, "as the pool has"
            keys_and_values = list(zip(self.key_cache, self.value_cache, strict=True))
            flat = pool.tensors()
            self.key_cache, self.value_cache = [], []
            torch: Any = importlib.import_module("torch")
            for layer, (keys, values) in enumerate(keys_and_values):
                for number, (old, to) in enumerate(
                    ((keys, self.key_cache), (values, self.value_cache))
                ):
                    new = flat[2 * layer + number].view(old.dtype).view(old.shape)
                    end = pool.shape.num_pages * pool.shape.page_tokens
                    new[end : end + pool.shape.page_tokens].zero_()  # Padding is read there.
                    torch._dynamo.mark_static_address(new)
                    to.append(new)
            self._block_manager = PoolBlockManager(self._block_manager)
            made.append(self)

        def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
            self._block_manager.offer(prompt_ids)
            return super().search_prefix_match(request_id, prompt_ids)

    api.PagedAttentionCache = PoolCache
    try:
        yield made
    finally:
        api.PagedAttentionCache = plain
