"""Accounts for the KV blocks of one rank: who holds them, which can be reused, which go next.

A sequence holds a `Lease`. When one of its blocks is full and computed it is *sealed* under its
chained hash, and another sequence with the same prefix may use it. Blocks that nobody holds but
that are sealed are *cached*: reusable, and evicted when room is needed, least recently used first.

Two memories have the same interface. `PagedKvCache` is for engines that address blocks, so that
sequences share them while they run. `SlotKvCache` is for engines in which every sequence owns a
slot of contiguous KV: only what an idle slot still holds can be reused, by the next owner.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from worker.engine import EngineSpec, KvTrim


@dataclass(eq=False, slots=True)
class Lease:
    """The KV memory of one sequence."""

    kv_slot: int
    """The slot it owns; -1 in a paged memory."""
    cached_tokens: int
    """Tokens at its beginning whose KV was there already."""
    capacity: int
    """Tokens that it has room for."""
    num_sealed: int
    """Blocks at its beginning that are sealed, or were found to be a copy of a sealed one."""
    blocks: list[int] = field(default_factory=list[int])
    """In a paged memory: its blocks, in the order of their tokens."""
    hashes: list[int] = field(default_factory=list[int])
    """In a memory of slots: the hashes of its sealed blocks."""


class KvCache(Protocol):
    """What the scheduler needs of a rank's memory."""

    num_blocks: int
    block_size: int

    @property
    def num_used(self) -> int:
        """Blocks that leases hold."""
        ...

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can be reused or evicted."""
        ...

    def num_held(self, leases: Sequence[Lease]) -> int:
        """Blocks that these leases hold, shared ones counted once."""
        ...

    def match(self, hashes: Sequence[int]) -> int:
        """How many blocks with these hashes, from the first on, a lease would find."""
        ...

    def acquire(self, hashes: Sequence[int], num_tokens: int) -> Lease | None:
        """Room for `num_tokens` and the one after, or None if there is not enough.

        `hashes` are those of the full blocks among the tokens. At least the last token is never
        found in the cache, since somebody has to compute logits.
        """
        ...

    def grow(self, lease: Lease) -> bool:
        """Room for one more block; False if there is none."""
        ...

    def seal(self, lease: Lease, hashes: Sequence[int]) -> None:
        """The first `len(hashes)` blocks of the lease are full and computed."""
        ...

    def release(self, lease: Lease) -> None:
        """End a lease. Its sealed blocks stay cached."""
        ...

    def take_trims(self) -> list[KvTrim]:
        """What the engine has to forget before its next step."""
        ...

    def take_events(self) -> tuple[list[int], list[int]]:
        """Hashes that became reusable, and that ceased to be, since the last call."""
        ...

    def reusable(self) -> list[int]:
        """All hashes that are reusable now."""
        ...

    def check(self, leases: Sequence[Lease]) -> None:
        """Assert that these are all leases and that every block is accounted for once."""
        ...


def for_spec(spec: EngineSpec) -> KvCache:
    """The memory of one rank of an engine."""
    if spec.kv_slots is None:
        return PagedKvCache(spec.kv_blocks, spec.block_size)
    return SlotKvCache(spec.kv_blocks, spec.block_size, spec.kv_slots)


class _Events:
    """Changes of the reusable hashes, without those that were undone meanwhile."""

    __slots__ = ("_removed", "_stored")

    def __init__(self) -> None:
        self._stored: dict[int, None] = {}  # Ordered, unlike a set.
        self._removed: dict[int, None] = {}

    def store(self, block_hash: int) -> None:
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def remove(self, block_hash: int) -> None:
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def take(self) -> tuple[list[int], list[int]]:
        taken = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return taken


class PagedKvCache:
    """Blocks that any number of leases can share."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # Taken from the end.
        self._num_holders = [0] * num_blocks
        self._hash_of: list[int | None] = [None] * num_blocks
        self._block_of: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # Blocks, least recently used first.
        self._events = _Events()

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def num_held(self, leases: Sequence[Lease]) -> int:
        return len({block for lease in leases for block in lease.blocks})

    def match(self, hashes: Sequence[int]) -> int:
        block_of = self._block_of
        for index, block_hash in enumerate(hashes):
            if block_hash not in block_of:
                return index
        return len(hashes)

    def acquire(self, hashes: Sequence[int], num_tokens: int) -> Lease | None:
        size = self.block_size
        num_found = self.match(hashes[: (num_tokens - 1) // size])
        found = [self._block_of[block_hash] for block_hash in hashes[:num_found]]
        num_needed = num_tokens // size + 1 - num_found
        num_idle = sum(not self._num_holders[block] for block in found)
        if num_needed > len(self._free) + len(self._cached) - num_idle:
            return None
        for block in found:
            if not self._num_holders[block]:
                del self._cached[block]
            self._num_holders[block] += 1
        taken = [self._take() for _ in range(num_needed)]
        return Lease(
            kv_slot=-1,
            cached_tokens=num_found * size,
            capacity=(num_found + num_needed) * size,
            num_sealed=num_found,
            blocks=found + taken,
        )

    def grow(self, lease: Lease) -> bool:
        if not self._free and not self._cached:
            return False
        lease.blocks.append(self._take())
        lease.capacity += self.block_size
        return True

    def seal(self, lease: Lease, hashes: Sequence[int]) -> None:
        for index in range(lease.num_sealed, len(hashes)):
            block, block_hash = lease.blocks[index], hashes[index]
            if block_hash not in self._block_of:  # Else somebody was faster; one copy is enough.
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
                self._events.store(block_hash)
        lease.num_sealed = max(lease.num_sealed, len(hashes))

    def release(self, lease: Lease) -> None:
        # From the end: of one prefix the tail goes first, since nothing can follow a gap.
        for block in reversed(lease.blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
        lease.blocks.clear()

    def take_trims(self) -> list[KvTrim]:
        return []

    def take_events(self) -> tuple[list[int], list[int]]:
        return self._events.take()

    def reusable(self) -> list[int]:
        return list(self._block_of)

    def check(self, leases: Sequence[Lease]) -> None:
        holders = Counter(block for lease in leases for block in lease.blocks)
        for lease in leases:
            assert len(set(lease.blocks)) == len(lease.blocks), "a block stands twice in a lease"
            assert lease.capacity == len(lease.blocks) * self.block_size
            assert lease.num_sealed <= len(lease.blocks)
        for block, num_holders in enumerate(self._num_holders):
            assert num_holders == holders[block], f"block {block}: holders are miscounted"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached
        assert not (free | cached) & set(holders)
        assert len(free) + len(cached) + len(holders) == self.num_blocks, "a block is lost"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash
        assert sum(h is not None for h in self._hash_of) == len(self._block_of)
        assert all(self._hash_of[block] is None for block in free)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            block_hash = self._hash_of[block]
            assert block_hash is not None, "what is cached has a hash"
            self._hash_of[block] = None
            del self._block_of[block_hash]
            self._events.remove(block_hash)
        self._num_holders[block] = 1
        return block


class SlotKvCache:
    """Slots of contiguous KV over one common pool of blocks."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Idle slots and the hashes of the blocks that they still hold, least recently used first.
        self._idle: OrderedDict[int, list[int]] = OrderedDict(
            (slot, []) for slot in range(num_slots)
        )
        self._num_slots = num_slots
        self._num_used = 0
        self._num_cached = 0
        self._copies: Counter[int] = Counter()  # Of each hash, in idle slots.
        self._trims: list[KvTrim] = []
        self._events = _Events()

    @property
    def num_used(self) -> int:
        return self._num_used

    @property
    def num_cached(self) -> int:
        return self._num_cached

    def num_held(self, leases: Sequence[Lease]) -> int:
        return sum(lease.capacity // self.block_size for lease in leases)

    def match(self, hashes: Sequence[int]) -> int:
        return max((_common(held, hashes) for held in self._idle.values()), default=0)

    def acquire(self, hashes: Sequence[int], num_tokens: int) -> Lease | None:
        size = self.block_size
        num_blocks = num_tokens // size + 1
        if not self._idle or num_blocks > self.num_blocks - self._num_used:
            return None
        usable = hashes[: (num_tokens - 1) // size]
        # The longest common prefix; then where the least is lost; then the least recently used.
        slot = min(self._idle, key=lambda s: (-_common(self._idle[s], usable), len(self._idle[s])))
        held = self._idle.pop(slot)
        num_found = _common(held, usable)
        self._forget(held)
        if len(held) > num_found:
            self._trims.append(KvTrim(slot, num_found * size))
        self._num_used += num_blocks
        self._evict()
        return Lease(
            kv_slot=slot,
            cached_tokens=num_found * size,
            capacity=num_blocks * size,
            num_sealed=num_found,
            hashes=list(usable[:num_found]),
        )

    def grow(self, lease: Lease) -> bool:
        if self._num_used == self.num_blocks:
            return False
        self._num_used += 1
        lease.capacity += self.block_size
        self._evict()
        return True

    def seal(self, lease: Lease, hashes: Sequence[int]) -> None:
        lease.hashes += hashes[lease.num_sealed :]
        lease.num_sealed = len(lease.hashes)

    def release(self, lease: Lease) -> None:
        self._num_used -= lease.capacity // self.block_size
        self._trims.append(KvTrim(lease.kv_slot, len(lease.hashes) * self.block_size))
        self._idle[lease.kv_slot] = lease.hashes
        self._num_cached += len(lease.hashes)
        for block_hash in lease.hashes:
            self._copies[block_hash] += 1
            if self._copies[block_hash] == 1:
                self._events.store(block_hash)

    def take_trims(self) -> list[KvTrim]:
        trims, self._trims = self._trims, []
        return trims

    def take_events(self) -> tuple[list[int], list[int]]:
        return self._events.take()

    def reusable(self) -> list[int]:
        return list(self._copies)

    def check(self, leases: Sequence[Lease]) -> None:
        slots = [lease.kv_slot for lease in leases] + list(self._idle)
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or owned twice"
        assert self._num_used == sum(lease.capacity // self.block_size for lease in leases)
        assert self._num_cached == sum(map(len, self._idle.values()))
        assert self._num_used + self._num_cached <= self.num_blocks
        assert self._copies == Counter(h for held in self._idle.values() for h in held)

    def _evict(self) -> None:
        """Empty idle slots until what is cached fits beside what is used."""
        if self._num_used + self._num_cached <= self.num_blocks:
            return
        for slot, held in self._idle.items():
            if held:
                self._idle[slot] = []
                self._forget(held)
                self._trims.append(KvTrim(slot, 0))
                if self._num_used + self._num_cached <= self.num_blocks:
                    return

    def _forget(self, hashes: Sequence[int]) -> None:
        self._num_cached -= len(hashes)
        for block_hash in hashes:
            self._copies[block_hash] -= 1
            if not self._copies[block_hash]:
                del self._copies[block_hash]
                self._events.remove(block_hash)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
