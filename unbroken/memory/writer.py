"""Writes blocks into one slab of the block store; `MemoryClient.open_writer` makes one."""

import mmap
import threading
from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, records
from unbroken.memory.checksums import Algorithm
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.keys import KEY_BYTES
from unbroken.memory.mapped import GpuReaderSlab, ReaderSlab
from unbroken.memory.records import RECORD_BYTES, TOKENS_MAX, Record, RecordState
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

FLUSH_BLOCKS = 64
"""Blocks that are told of in one call."""
RECLAIM_BLOCKS = 64
"""Blocks that make room for new ones at once."""


class Session(Protocol):
    """What a writer needs of the client that it belongs to."""

    lock: threading.RLock
    """Held over a call, and over binding again."""

    def call(self, request: wire.SessionRequest) -> wire.SessionResponse:
        """A call without descriptors."""
        ...

    def writer_ended(self, slab_id: int, mapping: mmap.mmap | DeviceSlabs) -> None:
        """It writes no more; the mapping is the client's to unmap."""
        ...


class SlabWriter:
    """One slab for blocks, written by one thread of this process, wherever its memory is.

    Attributes:
        is_lost: It is closed, or the service has forgotten this process. What was committed, others
            may still have.
    """

    def __init__(self, session: Session, slab: pb.Slab, fds: list[int]) -> None:
        """The descriptors, of the slab and of its table, are closed. Raises what mapping raises."""
        self._session = session
        self.slab_id = slab.slab_id
        self.block_bytes = slab.block_bytes
        self.num_slots = slab.num_slots
        try:
            data, table = fds
            self._table = mmap.mmap(table, RECORD_BYTES * slab.num_slots, mmap.MAP_SHARED)
            # A child would keep the slab from being sealed when this process dies.
            self._table.madvise(mmap.MADV_DONTFORK)
            try:
                self._map(data, slab)
            except BaseException:
                self._table.close()  # Else the slab could not be given back.
                raise
        finally:
            channel.close_all(fds)
        self._generations = [0] * slab.num_slots
        self._free = list(range(slab.num_slots - 1, -1, -1))
        self._untold: list[int] = []
        self.is_lost = False

    def _map(self, fd: int, slab: pb.Slab) -> None:
        """Map the bytes of the blocks."""
        raise NotImplementedError

    def _unmap(self) -> None:
        """Hand their mapping to `Session.writer_ended`."""
        raise NotImplementedError

    def as_reader(self) -> ReaderSlab | GpuReaderSlab:
        """Our own blocks are read where we wrote them."""
        raise NotImplementedError

    def flush(self) -> None:
        """Tell of the blocks that nobody was told of."""
        if self.is_lost or not self._untold:
            return
        commit = wire.CommitBlocks(slab_id=self.slab_id, slots=self._untold)
        with self._session.lock:
            response = self._session.call(wire.SessionRequest(commit=commit))
            self._untold.clear()
            self._take(response.committed.free_slots)

    def close(self) -> None:
        """Leave the blocks to others, and write no more."""
        if not self.is_lost:
            self.flush()
        self.lose()
        close = wire.CloseSlab(slab_id=self.slab_id)
        try:
            self._session.call(wire.SessionRequest(close_slab=close))
        except UnbrokenError as error:
            if error.reason is not Reason.STALE_HANDLE:  # Closed already, when we bound again.
                raise

    def lose(self) -> None:
        """It is not ours any more: never write again. Idempotent."""
        if self.is_lost:
            return
        self.is_lost = True
        self._free.clear()
        self._untold.clear()
        self._table.close()
        self._unmap()

    def _make_room(self) -> bool:
        self.flush()
        if self._free or self.is_lost:
            return bool(self._free)
        reclaim = wire.ReclaimSlots(
            slab_id=self.slab_id, num_slots=min(RECLAIM_BLOCKS, -(-self.num_slots // 4))
        )
        with self._session.lock:
            response = self._session.call(wire.SessionRequest(reclaim=reclaim))
            self._take(response.reclaimed.slots)
        return bool(self._free)

    def _take(self, slots: Sequence[int]) -> None:
        """Slots that are ours to overwrite: their records say so before anything else happens.

        With the session's lock: were another thread to bind again in between, the service would
        read records of blocks that it has let us overwrite.
        """
        if self.is_lost:
            return
        for slot in slots:
            self._mark(slot)
        self._free += slots

    def _commit(
        self, slot: int, key: bytes, num_tokens: int, checksum: int, algorithm: Algorithm
    ) -> None:
        """Say in its record what the slot has."""
        generation = self._generations[slot]
        self._write(
            Record(RecordState.COMMITTED, num_tokens, generation, slot, key, checksum, algorithm)
        )
        self._untold.append(slot)

    def _mark(self, slot: int) -> None:
        generation = self._generations[slot] = (self._generations[slot] + 1) & 0xFFFF_FFFF
        self._write(records.writing(slot, generation))

    def _write(self, record: Record) -> None:
        start = record.slot * RECORD_BYTES
        self._table[start : start + RECORD_BYTES] = record.to_bytes(self.slab_id)


class BlockWriter(SlabWriter):
    """One in the host's memory. `MemoryClient.open_writer` makes it."""

    @override
    def _map(self, fd: int, slab: pb.Slab) -> None:
        self._data = mmap.mmap(fd, slab.size_bytes, mmap.MAP_SHARED)
        self._data.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._data)

    @override
    def _unmap(self) -> None:
        self._view.release()
        self._session.writer_ended(self.slab_id, self._data)

    @override
    def as_reader(self) -> ReaderSlab:
        return ReaderSlab(self._data, self.block_bytes)

    def put(self, key: bytes, data: bytes | bytearray | memoryview, num_tokens: int) -> bool:
        """Store a block; whether there was room. Others find it after `flush`, or if we die.

        No call is made but for every 64th block, and when the slab is full. Raises ValueError if it
        is no block of this slab.
        """
        check_block(key, num_tokens)
        with memoryview(data) as view:
            if view.nbytes != self.block_bytes:
                raise ValueError(f"expected {self.block_bytes} bytes, got {view.nbytes}")
            if not self._free and not self._make_room():
                return False
            slot = self._free.pop()
            self._mark(slot)
            start = slot * self.block_bytes
            target = self._view[start : start + self.block_bytes]
            checksum = records.copy(target, view.cast("B"))
        self._commit(slot, key, num_tokens, checksum, Algorithm.XXH3)
        if len(self._untold) >= FLUSH_BLOCKS:
            self.flush()
        return True


def check_block(key: bytes, num_tokens: int) -> None:
    """Raise ValueError if they fit into no record."""
    if len(key) != KEY_BYTES:  # Cut or filled up, it would be the key of other bytes.
        raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
    if not 0 <= num_tokens <= TOKENS_MAX:
        raise ValueError(f"expected 0 to {TOKENS_MAX} tokens, got {num_tokens}")
