"""Memory that outlives this process: weights, pools and KV blocks, with the memory service.

    with MemoryClient(path, tenant="acme") as memory:
        writer = memory.open_writer(block_bytes=2 << 20, num_slots=512)
        writer.put(key, kv_of_block, num_tokens=16)        # no call: one for every 64 blocks
        with memory.get(keys) as blocks:                   # pinned, compared with their checksums
            for block in blocks: ...

Calls block, for some 20 µs as a rule; any thread may make them, one at a time. When the service is
gone they wait for the next one, bind again, and go on: whatever this process owns, it still owns.
Memory stays mapped all the while, so that nothing that computes has to stop.

A process that dies leaves its blocks to whoever asks for their keys, and its pools to a successor
(`adopt`). `close` gives everything back.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums, records
from unbroken.memory.channel import ChannelClosed
from unbroken.memory.checksums import Algorithm
from unbroken.memory.records import RECORD_BYTES, Record, RecordState
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

PROTOCOL_VERSION = 1
FLUSH_BLOCKS = 64
"""Blocks that are told of in one call."""
RECLAIM_BLOCKS = 64
"""Blocks that make room for new ones at once."""
KEYS_A_CALL = 1000
OWED_MAX = 64
"""Pins that are released before their answers are received."""
CALL_TIMEOUT_S = 30.0
"""A service that takes longer is taken for dead; sealing, which reads everything, has no limit."""
_HIGH_FD = 512
_RETRY_S = 0.002


class SegmentClass(IntEnum):
    """What the bytes are, and what becomes of them when their owner dies."""

    WEIGHTS = 1
    KV_POOL = 2
    SCRATCH = 4


@dataclass(slots=True, eq=False)
class Segment:
    """One version of a segment, mapped into this process.

    Attributes:
        slabs: Its memory. Of one that is attached, read-only.
        epoch: The fencing token of its owner.
    """

    name: str
    version: int
    epoch: int
    layout: bytes
    slabs: list[mmap.mmap]

    def unmap(self) -> None:
        """Give the mappings back. Raises BufferError while somebody has a view of one."""
        while self.slabs:
            self.slabs[-1].close()
            self.slabs.pop()


class StoredBlock(NamedTuple):
    """A block where it lies, for as long as its pin lasts."""

    data: memoryview
    num_tokens: int
    checksum: int
    algorithm: Algorithm
    """Of the checksum."""


@dataclass(slots=True, eq=False)
class _ReaderSlab:
    """A slab of the block store that is mapped for reading."""

    mapping: mmap.mmap
    block_bytes: int


class Pinned:
    """Blocks that nobody overwrites. Use it as a context; its views must not outlive that."""

    def __init__(
        self, client: "MemoryClient", pin_id: int, blocks: list[StoredBlock], expires_at: float
    ) -> None:
        self._client = client
        self._pin_id = pin_id
        self._life = client.num_lives
        self._blocks = blocks
        self._expires_at = expires_at

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[StoredBlock]:
        return iter(self._blocks)

    def __getitem__(self, index: int) -> StoredBlock:
        return self._blocks[index]

    @property
    def is_valid(self) -> bool:
        """Whether the bytes cannot have been overwritten. Look after you used them."""
        return self._client.num_lives == self._life and time.monotonic() < self._expires_at

    def release(self) -> None:
        """Let others overwrite them. Idempotent."""
        self._blocks = []
        if self._pin_id:
            self._client.release_pin(self._pin_id, self._life)
            self._pin_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class MemoryClient:
    """One session with the memory service of this host.

    Attributes:
        num_lives: How often it was bound; whoever sees it change has lost its pins.
    """

    def __init__(
        self,
        path: Path,
        *,
        tenant: str = "",
        client: str = "",
        cohort: str = "",
        rank: int = 0,
        num_ranks: int = 1,
        rebind_timeout_s: float = 10.0,
    ) -> None:
        """Bind at the service's session.sock. Raises UnbrokenError, UNREACHABLE if it is not there.

        `cohort` names one life of a model: its ranks are adopted together.
        """
        self._path = path
        self._rebind_timeout_s = rebind_timeout_s
        self._identity = wire.Bind(
            protocol_version=PROTOCOL_VERSION,
            client=client,
            tenant=tenant,
            cohort=cohort,
            rank=rank,
            num_ranks=num_ranks,
        )
        self._lock = threading.RLock()
        self._sock: socket.socket | None = None
        self._boot_token = 0
        self._lifeline: mmap.mmap | None = None
        self._reading: dict[int, _ReaderSlab] = {}
        self._writers: dict[int, BlockWriter] = {}
        self._owned: list[Segment] = []
        self._num_owed = 0
        """Answers that have yet to be received, before that of the next call."""
        self.num_lives = 0
        self._bind(self._rebind_timeout_s)

    @property
    def session_id(self) -> int:
        return self._identity.session_id

    def close(self) -> None:
        """Give everything back, in order: blocks to whoever wants them, and pools to nobody.

        Idempotent.
        """
        with self._lock:
            for writer in list(self._writers.values()):
                with contextlib.suppress(UnbrokenError):
                    writer.close()
            for segment in list(self._owned):
                with contextlib.suppress(UnbrokenError, BufferError):
                    self.release(segment)
            if self._sock is not None:
                self._sock.close()
                self._sock = None
            self._reading.clear()
            if self._lifeline is not None:
                self._lifeline.close()
                self._lifeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Segments.

    def create(self, name: str, kind: SegmentClass, slab_bytes: Sequence[int]) -> Segment:
        """Memory for a new version, which nobody else sees yet. It is all zeros."""
        create = wire.CreateSegment(
            name=name,
            slab_bytes=slab_bytes,
            segment_class=pb.SegmentClass.ValueType(int(kind)),
        )
        response, fds = self._call(wire.SessionRequest(create=create))
        segment = _mapped(response.granted.segment, fds, is_writable=True)
        self._owned.append(segment)
        return segment

    def seal(self, segment: Segment, layout: bytes = b"") -> None:
        """Publish weights: from now on `attach` gives them. The segment is unmapped."""
        with self._lock:
            sums = [checksums.compute(memoryview(slab)) for slab in segment.slabs]
            segment.unmap()
            seal = wire.SealSegment(
                name=segment.name, epoch=segment.epoch, checksums=sums, layout=layout
            )
            self._call(wire.SessionRequest(seal=seal), timeout_s=0)
            self._disown(segment)

    def freeze(self, segment: Segment, layout: bytes = b"") -> None:
        """Let a pool be adopted if this process dies."""
        freeze = wire.FreezePool(name=segment.name, epoch=segment.epoch, layout=layout)
        self._call(wire.SessionRequest(freeze=freeze))

    def attach(self, name: str, version: int = 0) -> Segment:
        """Map what another published, or, as a standby, the pool of one that lives."""
        attach = wire.AttachSegment(name=name, version=version)
        response, fds = self._call(wire.SessionRequest(attach=attach))
        return _mapped(response.granted.segment, fds, is_writable=False)

    def adopt(self, name: str, expected_epoch: int = 0, *, timeout_s: float = 5.0) -> Segment:
        """Take a dead process's pool over; waits until that is proved dead. Check its records."""
        adopt = wire.AdoptPool(name=name, expected_epoch=expected_epoch)
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                response, fds = self._call(wire.SessionRequest(adopt=adopt))
            except UnbrokenError as error:
                if error.reason is not Reason.NOT_FENCED or time.monotonic() > give_up_at:
                    raise
                time.sleep(error.retry_after_s or _RETRY_S)
            else:
                segment = _mapped(response.granted.segment, fds, is_writable=True)
                self._owned.append(segment)
                return segment

    def release(self, segment: Segment) -> None:
        """Give up what was created, adopted or attached. It is unmapped."""
        segment.unmap()
        self._disown(segment)
        release = wire.ReleaseSegment(name=segment.name, version=segment.version)
        self._call(wire.SessionRequest(release=release))

    def _disown(self, segment: Segment) -> None:
        self._owned = [one for one in self._owned if one is not segment]

    # Blocks.

    def open_writer(self, block_bytes: int, num_slots: int) -> "BlockWriter":
        """Memory for blocks of one size, of which the oldest make room for new ones."""
        open_slab = wire.OpenSlab(block_bytes=block_bytes, num_slots=num_slots)
        with self._lock:
            response, fds = self._call(wire.SessionRequest(open_slab=open_slab))
            (slab,) = response.granted.segment.slabs
            writer = BlockWriter(self, slab, fds)
            self._writers[slab.slab_id] = writer
            return writer

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are stored: a hint."""
        found = 0
        for start in range(0, len(keys), KEYS_A_CALL):
            part = keys[start : start + KEYS_A_CALL]
            find = wire.FindBlocks(keys=b"".join(part))
            response, _ = self._call(wire.SessionRequest(find=find))
            found += response.found.num_blocks
            if response.found.num_blocks < len(part):
                break
        return found

    def get(self, keys: Sequence[bytes], *, ttl_s: float = 10.0, checked: bool = True) -> Pinned:
        """The blocks of the first keys (1,000 at most) that are stored and intact.

        They lie where they were written: nothing is copied. Without `checked` the caller compares
        each with its checksum, such as on a GPU.
        """
        get = wire.GetBlocks(keys=b"".join(keys))
        get.ttl.FromMilliseconds(round(ttl_s * 1000))
        with self._lock:
            begun = time.monotonic()
            response, fds = self._call(wire.SessionRequest(get=get))
            pinned = response.pinned
            self._map_new(pinned.new_slabs, fds)
            for slab_id in pinned.freed_slab_ids:
                self._reading.pop(slab_id, None)  # Unmapped when the last view of it is gone.
            # Columns as lists, and no loop of our own where none is needed: this is a hot path.
            slab_ids, slots = list(pinned.slab_ids), list(pinned.slots)
            views: dict[int, tuple[memoryview, int]] = {}
            for slab_id in set(slab_ids):
                slab = self._readable(slab_id)
                views[slab_id] = (memoryview(slab.mapping).toreadonly(), slab.block_bytes)
            if len(views) == 1:
                ((view, size),) = views.values()
                datas = [view[slot * size : (slot + 1) * size] for slot in slots]
            else:
                datas = [
                    view[slot * size : (slot + 1) * size]
                    for slot, (view, size) in zip(
                        slots, map(views.__getitem__, slab_ids), strict=True
                    )
                ]
            algorithms = list(map(checksums.of_contract, pinned.checksum_algorithms))
            columns = zip(
                datas,
                pinned.num_tokens,
                pinned.checksums,
                algorithms or [Algorithm.XXH3] * len(datas),
                strict=True,
            )
            blocks = list(map(StoredBlock._make, columns))
            if checked:
                blocks = blocks[: self._num_intact(pinned, blocks)]
            return Pinned(self, pinned.pin_id, blocks, begun + ttl_s)

    def release_pin(self, pin_id: int, life: int) -> None:
        """End a pin of this life; one of an earlier life has ended with it."""
        with self._lock:
            if life != self.num_lives or self._sock is None:
                return
            release = wire.ReleasePin(pin_id=pin_id)
            request = wire.SessionRequest(boot_token=self._boot_token, release_pin=release)
            try:
                channel.send(self._sock, request)
                self._num_owed += 1
                if self._num_owed >= OWED_MAX:
                    self._take_owed()
            except (ChannelClosed, BlockingIOError):
                pass  # Then it ends with its connection; the next call notices.

    def _take_owed(self) -> None:
        """Receive answers that nobody waited for: to releases of pins, which cannot fail."""
        assert self._sock is not None, "it is open"
        while self._num_owed:
            _, fds = channel.receive(self._sock, wire.SessionResponse)
            channel.close_all(fds)
            self._num_owed -= 1

    # The session.

    def call(self, request: wire.SessionRequest) -> wire.SessionResponse:
        """For writers: a call without descriptors."""
        response, fds = self._call(request)
        channel.close_all(fds)
        return response

    def forget_writer(self, slab_id: int) -> None:
        """For writers: it is closed."""
        self._writers.pop(slab_id, None)

    def _call(
        self, request: wire.SessionRequest, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[wire.SessionResponse, list[int]]:
        """One call, made again if the service died over it. Raises what the service answers."""
        with self._lock:
            if self._sock is None:
                raise UnbrokenError(Reason.CANCELLED, "expected an open client, it was closed")
            while True:
                request.boot_token = self._boot_token
                try:
                    if timeout_s != CALL_TIMEOUT_S:
                        channel.set_timeout(self._sock, timeout_s)
                    channel.send(self._sock, request)
                    self._take_owed()
                    response, fds = channel.receive(self._sock, wire.SessionResponse)
                    if timeout_s != CALL_TIMEOUT_S:
                        channel.set_timeout(self._sock, CALL_TIMEOUT_S)
                except (ChannelClosed, BlockingIOError):  # The latter: it took too long.
                    self._bind(self._rebind_timeout_s)
                    continue
                if response.WhichOneof("kind") == "error":
                    channel.close_all(fds)
                    raise _raised(response.error)
                return response, fds

    def _bind(self, timeout_s: float) -> None:
        """Begin, or go on, with the service that is there, or comes in time."""
        self.num_lives += 1
        self._num_owed = 0
        give_up_at = time.monotonic() + timeout_s
        while True:
            if self._sock is not None:
                self._sock.close()
            try:
                self._sock = sock = _high(channel.connect(self._path))
                channel.set_timeout(sock, CALL_TIMEOUT_S)
                channel.send(sock, wire.SessionRequest(bind=self._identity))
                response, fds = channel.receive(sock, wire.SessionResponse)
            except (OSError, ChannelClosed) as error:  # Or it took too long.
                if time.monotonic() > give_up_at:
                    if self._sock is not None:
                        self._sock.close()
                    raise UnbrokenError(
                        Reason.UNREACHABLE, f"expected a memory service at {self._path}: {error}"
                    ) from error
                time.sleep(_RETRY_S)
                continue
            if response.WhichOneof("kind") == "error":
                channel.close_all(fds)
                sock.close()
                raise _raised(response.error)
            break
        bound = response.bound
        self._boot_token = bound.boot_token
        if self._identity.session_id and not bound.is_resumed:
            self._lose_writers()
        self._identity.session_id, self._identity.secret = bound.session_id, bound.secret
        self._map_lifeline(fds)
        known = {slab.slab_id for slab in bound.slabs}
        for writer in list(self._writers.values()):
            if writer.slab_id not in known:
                writer.lose()
        for slab_id in known - self._writers.keys():
            # It was opened, and we never heard of it.
            close = wire.SessionRequest(close_slab=wire.CloseSlab(slab_id=slab_id))
            close.boot_token = self._boot_token
            channel.send(sock, close)
            channel.receive(sock, wire.SessionResponse)

    def _lose_writers(self) -> None:
        for writer in list(self._writers.values()):
            writer.lose()

    def _map_lifeline(self, fds: list[int]) -> None:
        """Mapped before anything else is asked for, and by no child of ours."""
        (fd,) = fds
        try:
            mapping = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED)
            mapping.madvise(mmap.MADV_DONTFORK)
        finally:
            os.close(fd)
        old, self._lifeline = self._lifeline, mapping
        if old is not None:
            old.close()

    def _map_new(self, slabs: Sequence[pb.Slab], fds: list[int]) -> None:
        try:
            for slab, fd in zip(slabs, fds, strict=True):
                if slab.slab_id not in self._reading:
                    mapping = mmap.mmap(fd, slab.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
                    self._reading[slab.slab_id] = _ReaderSlab(mapping, slab.block_bytes)
        finally:
            channel.close_all(fds)

    def _readable(self, slab_id: int) -> _ReaderSlab:
        if slab_id in self._reading:
            return self._reading[slab_id]
        return self._writers[slab_id].as_reader()

    def _num_intact(self, pinned: wire.Pinned, blocks: Sequence[StoredBlock]) -> int:
        """How many of the first blocks are intact; the service is told of the one that is not."""
        for i, block in enumerate(blocks):
            if checksums.compute(block.data, block.algorithm) != block.checksum:
                self._report(pinned.slab_ids[i], pinned.slots[i], pinned.generations[i])
                return i
        return len(blocks)

    def _report(self, slab_id: int, slot: int, generation: int) -> None:
        report = wire.ReportCorrupt(slab_id=slab_id, slot=slot, generation=generation)
        self._call(wire.SessionRequest(report_corrupt=report))


class BlockWriter:
    """One slab for blocks, written by this process alone. `MemoryClient.open_writer` makes it."""

    def __init__(self, client: MemoryClient, slab: pb.Slab, fds: list[int]) -> None:
        self._client = client
        self.slab_id = slab.slab_id
        self.block_bytes = slab.block_bytes
        self.num_slots = slab.num_slots
        try:
            data, table = fds
            self._data = mmap.mmap(data, slab.size_bytes, mmap.MAP_SHARED)
            self._table = mmap.mmap(table, RECORD_BYTES * slab.num_slots, mmap.MAP_SHARED)
        finally:
            channel.close_all(fds)
        # A child would keep the slab from being sealed when this process dies.
        self._data.madvise(mmap.MADV_DONTFORK)
        self._table.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._data)
        self._generations = [0] * slab.num_slots
        self._free = list(range(slab.num_slots - 1, -1, -1))
        self._untold: list[int] = []
        self.is_lost = False
        """The service has forgotten this process: what was committed, others may still have."""

    def put(self, key: bytes, data: bytes | bytearray | memoryview, num_tokens: int) -> bool:
        """Store a block; whether there was room. Others find it after `flush`, or if we die.

        No call is made but for every 64th block, and when the slab is full.
        """
        if len(data) != self.block_bytes:
            raise ValueError(f"expected {self.block_bytes} bytes, got {len(data)}")
        if not self._free and not self._make_room():
            return False
        slot = self._free.pop()
        self._mark(slot)
        start = slot * self.block_bytes
        checksum = records.copy(self._view[start : start + self.block_bytes], data)
        self._write(
            Record(
                RecordState.COMMITTED,
                num_tokens,
                self._generations[slot],
                slot,
                key,
                checksum,
            )
        )
        self._untold.append(slot)
        if len(self._untold) >= FLUSH_BLOCKS:
            self.flush()
        return True

    def flush(self) -> None:
        """Tell of the blocks that nobody was told of."""
        if self.is_lost or not self._untold:
            return
        commit = wire.CommitBlocks(slab_id=self.slab_id, slots=self._untold)
        free = self._client.call(wire.SessionRequest(commit=commit)).committed.free_slots
        self._untold.clear()
        self._take(free)

    def close(self) -> None:
        """Leave the blocks to others, and write no more."""
        if not self.is_lost:
            self.flush()
        self.lose()
        close = wire.CloseSlab(slab_id=self.slab_id)
        try:
            self._client.call(wire.SessionRequest(close_slab=close))
        except UnbrokenError as error:
            if error.reason is not Reason.STALE_HANDLE:  # Closed already, when we bound again.
                raise

    def lose(self) -> None:
        """It is not ours any more: never write again."""
        self.is_lost = True
        self._free.clear()
        self._untold.clear()
        self._client.forget_writer(self.slab_id)
        self._view.release()
        with contextlib.suppress(BufferError):  # Somebody reads one of our blocks.
            self._data.close()
        self._table.close()

    def as_reader(self) -> _ReaderSlab:
        """For `MemoryClient.get`: our own blocks are read where we wrote them."""
        return _ReaderSlab(self._data, self.block_bytes)

    def _make_room(self) -> bool:
        self.flush()
        if self._free or self.is_lost:
            return bool(self._free)
        reclaim = wire.ReclaimSlots(slab_id=self.slab_id, num_slots=RECLAIM_BLOCKS)
        self._take(self._client.call(wire.SessionRequest(reclaim=reclaim)).reclaimed.slots)
        return bool(self._free)

    def _take(self, slots: Sequence[int]) -> None:
        """Slots that are ours to overwrite: their records say so before anything else happens."""
        for slot in slots:
            self._mark(slot)
        self._free += slots

    def _mark(self, slot: int) -> None:
        generation = self._generations[slot] = (self._generations[slot] + 1) & 0xFFFF_FFFF
        self._write(records.writing(slot, generation))

    def _write(self, record: Record) -> None:
        start = record.slot * RECORD_BYTES
        self._table[start : start + RECORD_BYTES] = record.to_bytes(self.slab_id)


def _mapped(segment: pb.Segment, fds: list[int], *, is_writable: bool) -> Segment:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    slabs: list[mmap.mmap] = []
    try:
        for slab, fd in zip(segment.slabs, fds, strict=True):
            mapping = mmap.mmap(fd, slab.size_bytes, mmap.MAP_SHARED, protection)
            if is_writable:
                mapping.madvise(mmap.MADV_DONTFORK)
            slabs.append(mapping)
    finally:
        channel.close_all(fds)
    return Segment(segment.name, segment.version, segment.epoch, segment.layout, slabs)


def _high(sock: socket.socket) -> socket.socket:
    """The same connection under a high number: files with low ones are closed late when a process
    dies, and that of a GPU's driver takes its time."""
    try:
        fd = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:
        return sock
    sock.close()
    return socket.socket(fileno=fd)


def _raised(told: wire.SessionError) -> UnbrokenError:
    try:
        reason = Reason(told.reason)
    except ValueError:
        reason = Reason.INTERNAL
    retry_after_s = None
    if told.HasField("retry_after"):
        retry_after_s = told.retry_after.ToMilliseconds() / 1000
    return UnbrokenError(
        reason, told.detail, metadata=dict(told.metadata), retry_after_s=retry_after_s
    )
