"""Decides which KV blocks exist, who may overwrite them, and what is evicted.

    slab   OPEN (its owner adds blocks) ──closed, or owner quiet──▶ SEALED ──no block left──▶ freed
    slot   free ──commit──▶ block ──reclaim, by the owner──▶ free        (in an open slab only)

A block is where its owner wrote it: nothing is copied. A slab belongs to one tenant for its whole
life, and to one writer; when that writer is gone, nobody ever writes to it again. So memory goes
from one tenant to another only through the kernel, which clears it.

The index here is rebuilt from the records in the slabs (`unbroken.memory.records`). They are read
when their owner tells of them, when it binds again, and when it is proved dead: at any other time
it might be about to overwrite a block that it was allowed to. The index can forget a block, which
costs a miss; it must never name bytes that are not the block's.

Least recently used goes first. Of a sequence, the last block is taken as used least recently, since
without the first ones the others are of no use.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from memory_service.accounts import HOST, Device
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.checksums import Algorithm
from unbroken.memory.records import RECORD_BYTES, Record, RecordState
from unbroken.memory.rows import Row


class SlabState(IntEnum):
    """As in the contract."""

    OPEN = 1
    SEALED = 2


@dataclass(slots=True, eq=False)
class Block:
    """One committed block."""

    key: bytes
    slab: "StoreSlab"
    slot: int
    generation: int
    checksum: int
    num_tokens: int
    last_used: int
    algorithm: Algorithm = Algorithm.XXH3
    """Of the checksum."""
    num_pins: int = 0
    row: bytes = field(init=False)
    """What its readers are told."""

    def __post_init__(self) -> None:
        self.row = Row(
            self.slab.slab_id,
            self.checksum,
            self.slot,
            self.generation,
            self.num_tokens,
            self.algorithm,
        ).to_bytes()


@dataclass(slots=True, eq=False)
class StoreSlab:
    """Memory for blocks of one size."""

    slab_id: int
    tenant: str
    owner: int
    """Session id; 0: nobody, it is sealed."""
    epoch: int
    block_bytes: int
    num_slots: int
    state: SlabState = SlabState.OPEN
    device: Device = HOST
    """Where the blocks are; their records are always the host's."""
    blocks: dict[int, Block] = field(default_factory=dict[int, Block])
    """By slot."""
    dropped: dict[int, Block] = field(default_factory=dict[int, Block])
    """By slot, blocks whose bytes were wrong: their owner does not know that the slot is free."""

    @property
    def data_bytes(self) -> int:
        """Of the blocks."""
        return self.block_bytes * self.num_slots

    @property
    def allocated_bytes(self) -> int:
        """What they take of their memory."""
        return self.device.rounded(self.data_bytes)

    def bytes_of(self, device: Device) -> int:
        """What it takes of a memory, records included."""
        blocks = self.allocated_bytes if device == self.device else 0
        return blocks + (HOST.rounded(RECORD_BYTES * self.num_slots) if device == HOST else 0)

    @property
    def is_pinned(self) -> bool:
        return any(block.num_pins for block in self.blocks.values())

    @property
    def last_used(self) -> int:
        return max((block.last_used for block in self.blocks.values()), default=0)


@dataclass(frozen=True, slots=True)
class Pin:
    """Blocks that are read, so nobody evicts them."""

    pin_id: int
    session: int
    """0: a reader of another host."""
    blocks: tuple[Block, ...]
    expires_at: float


class BlockStore:
    """All slabs of blocks, and the index over them.

    Attributes:
        freed: Slabs that are gone since somebody cleared this.
    """

    def __init__(self, *, pins_max: int = 65_536) -> None:
        self._pins_max = pins_max
        self._slabs: dict[int, StoreSlab] = {}
        self._index: dict[str, dict[Device, dict[bytes, Block]]] = {}
        """By tenant, memory and key: a tenant has memories in the order of preference."""
        self._pins: dict[int, Pin] = {}
        self._next_pin_id = 1
        self._use = 0
        self.num_evicted = 0
        self.freed: list[StoreSlab] = []

    def __iter__(self) -> Iterator[StoreSlab]:
        for slab_id in sorted(self._slabs):
            yield self._slabs[slab_id]

    @property
    def num_blocks(self) -> int:
        return sum(len(index) for index in self._indexes())

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    @property
    def num_pinned(self) -> int:
        return sum(1 for block in self._all() if block.num_pins)

    def blocks(self) -> list[Block]:
        """All of them, least recently used first."""
        return sorted(self._all(), key=lambda block: block.last_used)

    def add(self, slab: StoreSlab) -> None:
        """A slab of a session, or one of an earlier life of the service."""
        assert slab.slab_id not in self._slabs, "ids are never used twice"
        self._slabs[slab.slab_id] = slab

    def get_slab(self, slab_id: int) -> StoreSlab | None:
        return self._slabs.get(slab_id)

    def owned(self, session: int, slab_id: int) -> StoreSlab:
        """The slab that this session may write to. Raises STALE_HANDLE if it may not."""
        slab = self._slabs.get(slab_id)
        if slab is None or slab.owner != session or slab.state is not SlabState.OPEN:
            raise UnbrokenError(
                Reason.STALE_HANDLE,
                f"expected an open slab of session {session}, got slab {slab_id}",
                metadata={"what": "slab"},
            )
        return slab

    def owned_by(self, session: int) -> list[StoreSlab]:
        """Slabs that a session writes to, dead or alive."""
        return [slab for slab in self if slab.owner == session]

    def commit(self, slab: StoreSlab, records: Iterable[tuple[int, Record | None]]) -> list[int]:
        """Take in what stands in the records of slots; returns the slots that hold no block now.

        A record that is not valid, or says that its slot is being written to, takes away what the
        slot held. One whose key is stored in the same memory already is not needed.
        """
        free: list[int] = []
        for slot, record in records:
            assert 0 <= slot < slab.num_slots, "checked by the caller"
            slab.dropped.pop(slot, None)
            old = slab.blocks.get(slot)
            if record is None or record.state is not RecordState.COMMITTED:
                if old is not None:
                    self._forget(old)
                free.append(slot)
                continue
            if old is not None:
                if (old.key, old.generation) == (record.key, record.generation):
                    continue  # Told twice.
                self._forget(old)
            index = self._index_of(slab)
            if record.key in index:
                free.append(slot)
                continue
            self._use += 1
            block = Block(
                record.key,
                slab,
                slot,
                record.generation,
                record.checksum,
                record.num_tokens,
                self._use,
                record.algorithm,
            )
            slab.blocks[slot] = block
            index[record.key] = block
        return free

    def find(self, tenant: str, keys: Sequence[bytes], device: Device | None = None) -> list[Block]:
        """The blocks of the first keys, up to the first that is not stored.

        In this memory, or else in any: the host's before a GPU's.
        """
        indexes = self._index.get(tenant, {})
        if device is not None:
            wanted = [indexes[device]] if device in indexes else []
        else:
            wanted = list(indexes.values())
        if not wanted:
            return []
        found: list[Block] = []
        lookup = wanted[0].get if len(wanted) == 1 else _first_of(wanted)
        for block in map(lookup, keys):
            if block is None:
                break
            found.append(block)
        self._touch(found)
        return found

    def pin(self, session: int, blocks: Sequence[Block], expires_at: float) -> Pin | None:
        """Keep blocks that `find` found from being evicted; None if there are none."""
        if not blocks:
            return None
        if len(self._pins) >= self._pins_max:
            raise UnbrokenError(
                Reason.MEMORY_EXHAUSTED,
                f"expected at most {self._pins_max} pins",
                retry_after_s=1.0,
            )
        pin = Pin(self._next_pin_id, session, tuple(blocks), expires_at)
        self._next_pin_id += 1
        self._pins[pin.pin_id] = pin
        for block in blocks:
            block.num_pins += 1
        return pin

    def unpin(self, session: int, pin_id: int) -> None:
        """End a pin of this session. Nothing happens if there is none."""
        pin = self._pins.get(pin_id)
        if pin is not None and pin.session == session:
            self._end(pin)

    def unpin_all(self, session: int) -> None:
        """End all that a session had pinned."""
        for pin in [pin for pin in self._pins.values() if pin.session == session]:
            self._end(pin)

    def has_pins(self, session: int) -> bool:
        return any(pin.session == session for pin in self._pins.values())

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        for pin in [pin for pin in self._pins.values() if pin.expires_at <= now]:
            self._end(pin)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do."""
        return min((pin.expires_at for pin in self._pins.values()), default=None)

    def reclaim(self, slab: StoreSlab, num_slots: int) -> list[int]:
        """Forget blocks of an open slab, never pinned ones: its owner may overwrite them."""
        assert slab.state is SlabState.OPEN, "checked by the caller"
        slots = [slot for slot, block in slab.dropped.items() if not block.num_pins][:num_slots]
        for slot in slots:
            del slab.dropped[slot]
        idle = [block for block in slab.blocks.values() if not block.num_pins]
        left = num_slots - len(slots)
        for block in heapq.nsmallest(left, idle, key=lambda block: block.last_used):
            self._forget(block)
            self.num_evicted += 1
            slots.append(block.slot)
        return slots

    def drop(self, slab_id: int, slot: int, generation: int) -> bool:
        """Forget a block whose bytes are wrong; whether it was there."""
        slab = self._slabs.get(slab_id)
        block = None if slab is None else slab.blocks.get(slot)
        if slab is None or block is None or block.generation != generation:
            return False
        self._forget(block)
        if slab.state is SlabState.OPEN:
            slab.dropped[slot] = block
        self._free_if_empty(slab)
        return True

    def seal(self, slab: StoreSlab) -> None:
        """Nobody writes to it any more. Without a block it is freed."""
        slab.state, slab.owner = SlabState.SEALED, 0
        self._free_if_empty(slab)

    def abandon(self, slab: StoreSlab) -> None:
        """Free it, whatever is in it, and whoever writes to it."""
        self._free(slab)

    def evictable(self, device: Device, tenant: str | None) -> int:
        """Bytes that `evict` could free of a memory."""
        return sum(slab.bytes_of(device) for slab in self._idle(device, tenant))

    def evict(
        self,
        num_bytes: int,
        *,
        device: Device = HOST,
        tenant: str | None = None,
        is_mapped: Callable[[int], bool] = lambda _: False,
    ) -> int:
        """Free sealed slabs of a memory that nobody reads, until so many bytes are free.

        First those that nobody has mapped: the others' memory is not back at once. Returns how many
        bytes are freed.
        """
        freed = 0
        for slab in sorted(
            self._idle(device, tenant),
            key=lambda slab: (is_mapped(slab.slab_id), slab.last_used, slab.slab_id),
        ):
            if freed >= num_bytes:
                break
            self.num_evicted += len(slab.blocks)
            freed += slab.bytes_of(device)
            self._free(slab)
        return freed

    def _idle(self, device: Device, tenant: str | None) -> list[StoreSlab]:
        return [
            slab
            for slab in self
            if slab.state is SlabState.SEALED
            and slab.device == device
            and not slab.is_pinned
            and (tenant is None or slab.tenant == tenant)
        ]

    def check(self) -> None:
        """What is always true."""
        pins: dict[Block, int] = {}
        for pin in self._pins.values():
            for block in pin.blocks:
                pins[block] = pins.get(block, 0) + 1
        num_blocks = 0
        for slab in self._slabs.values():
            assert (slab.state is SlabState.OPEN) == (slab.owner != 0), "who writes"
            assert slab.state is SlabState.OPEN or slab.blocks, "kept for its blocks"
            assert not slab.dropped.keys() & slab.blocks.keys(), "a slot has one block"
            for slot, block in slab.blocks.items():
                num_blocks += 1
                assert 0 <= slot < slab.num_slots
                assert (block.slot, block.slab) == (slot, slab)
                index = self._index[slab.tenant][slab.device]
                assert index[block.key] is block, "one block per key and memory"
                assert block.num_pins == pins.get(block, 0), "pins are counted"
        assert num_blocks == self.num_blocks, "the index has nothing else"
        assert all(self._indexes()), "nor a memory without a block"
        assert all(self._index.values()), "nor a tenant without one"

    def _all(self) -> list[Block]:
        return [block for index in self._indexes() for block in list(index.values())]

    def _indexes(self) -> list[dict[bytes, Block]]:
        return [index for of in list(self._index.values()) for index in list(of.values())]

    def _index_of(self, slab: StoreSlab) -> dict[bytes, Block]:
        """That of the slab's memory, which stands where the order of preference has it."""
        indexes = self._index.setdefault(slab.tenant, {})
        if slab.device not in indexes:
            indexes[slab.device] = {}
            for device in sorted(indexes, key=lambda one: (one.kind, one.uuid)):
                indexes[device] = indexes.pop(device)
        return indexes[slab.device]

    def _touch(self, blocks: Sequence[Block]) -> None:
        use = self._use
        for block in reversed(blocks):
            use += 1
            block.last_used = use
        self._use = use

    def _end(self, pin: Pin) -> None:
        del self._pins[pin.pin_id]
        for block in pin.blocks:
            block.num_pins -= 1

    def _forget(self, block: Block) -> None:
        indexes = self._index[block.slab.tenant]
        index = indexes[block.slab.device]
        del index[block.key]
        if not index:
            del indexes[block.slab.device]
        if not indexes:
            del self._index[block.slab.tenant]
        del block.slab.blocks[block.slot]

    def _free_if_empty(self, slab: StoreSlab) -> None:
        if slab.state is SlabState.SEALED and not slab.blocks:
            self._free(slab)

    def _free(self, slab: StoreSlab) -> None:
        for block in list(slab.blocks.values()):
            self._forget(block)
        del self._slabs[slab.slab_id]
        self.freed.append(slab)


def _first_of(indexes: Sequence[dict[bytes, Block]]) -> Callable[[bytes], Block | None]:
    """Look a key up in the first memory that has it."""
    return lambda key: next((index[key] for index in indexes if key in index), None)
