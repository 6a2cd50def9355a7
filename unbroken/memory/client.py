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
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums
from unbroken.memory.channel import ChannelClosed
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import GpuError
from unbroken.memory.mapped import (
    GpuReaderSlab,
    Leaving,
    ReaderSlab,
    Segment,
    map_lifeline,
    map_segment,
)
from unbroken.memory.pinned import Pinned, located
from unbroken.memory.rows import Rows, rows_of
from unbroken.memory.waiting import Waiting
from unbroken.memory.writer import BlockWriter, SlabWriter
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

PROTOCOL_VERSION = 1
KEYS_A_CALL = 1000
OWED_MAX = 64
"""Pins that are released before their answers are received."""
CALL_TIMEOUT_S = 30.0
"""A service that takes longer is taken for dead; sealing, which reads everything, has no limit."""
AWAKE_S = 100e-6
"""So long an answer is waited for without sleep at most: most come by then."""
ATTEMPTS_MAX = 5
"""A call that so many connections ended over is not made again: it may be what ends them."""
MAPPED_MAX = 2000
"""Slabs of others that stay mapped when this process binds again."""
MAP_TRIES = 3
"""How often a slab is asked for that could not be mapped: then its blocks are misses."""
_HIGH_FD = 512
_RETRY_S = 0.002
_HOST_KINDS = (pb.MEMORY_KIND_UNSPECIFIED, pb.MEMORY_KIND_HOST)


class SegmentClass(IntEnum):
    """What the bytes are, and what becomes of them when their owner dies."""

    WEIGHTS = 1
    KV_POOL = 2
    SCRATCH = 4


class MemoryClient:
    """One session with the memory service of this host.

    Attributes:
        num_lives: How often it was bound; whoever sees it change has lost its pins.
        lock: Held over every call, and over binding again.
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
        self.lock = threading.RLock()
        self._sock: socket.socket | None = None
        self._boot_token = 0
        self._lifelines: list[mmap.mmap] = []
        """Of this session, the last one, and of earlier ones of which something is mapped."""
        self._reading: dict[int, ReaderSlab | GpuReaderSlab] = {}
        self._writers: dict[int, SlabWriter] = {}
        self._unmappable: dict[int, int] = {}
        """By slab, how often it could not be mapped."""
        self._leaving: dict[int, Leaving] = {}
        self._segments: list[Segment] = []
        """All that are mapped, owned or attached."""
        self._releases_silently = False
        """The service need not answer to releases of pins."""
        self._waiting = defaultdict[str | None, Waiting](lambda: Waiting(AWAKE_S))
        """By kind of call: how its answer is waited for."""
        self._num_owed = 0
        """Answers that have yet to be received, before that of the next call."""
        self.num_lives = 0
        self._bind(self._rebind_timeout_s)

    @property
    def session_id(self) -> int:
        return self._identity.session_id

    def is_bound(self, life: int) -> bool:
        """Whether the connection of this life is open still: whether the service may know its pins.

        Asks the kernel and not the service, so that it takes no lock and 2 µs.
        """
        sock = self._sock
        is_open = sock is not None and channel.is_open(sock)
        # In this order: a life ends before its connection is closed, and its number used again.
        return is_open and self.num_lives == life

    def close(self) -> None:
        """Give everything back, in order: blocks to whoever wants them, and pools to nobody.

        What somebody in this process has a view of stays mapped, and charged, until the view is
        gone or the process exits. Idempotent.
        """
        with self.lock:
            if self._sock is None:
                return
            try:
                self._give_back()
            except UnbrokenError as error:  # Then nobody is there to take it.
                if error.reason is not Reason.UNREACHABLE:
                    raise
            finally:
                self.num_lives += 1
                self._sock.close()
                self._sock = None
                self._writers.clear()
                self._reading.clear()  # Unmapped when the last view of it is gone.

    def _give_back(self) -> None:
        def tried(give: Callable[[], None]) -> None:
            try:
                give()
            except BufferError:
                pass  # Somebody has a view of it.
            except UnbrokenError as error:
                if error.reason is Reason.UNREACHABLE:
                    raise

        for writer in list(self._writers.values()):
            tried(writer.close)
        for segment in list(self._segments):
            tried(lambda segment=segment: self.release(segment))
        self._let_go(list(self._reading))
        if self._segments or self._leaving:
            return  # What may still be written through needs its lifeline.
        for lifeline in self._lifelines:
            lifeline.close()
        self._lifelines.clear()
        unbind = wire.SessionRequest(boot_token=self._boot_token, unbind=wire.Unbind())
        with contextlib.suppress(ChannelClosed, BlockingIOError):  # It is over, one way or another.
            self._ask(unbind)

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
        return self._granted(wire.SessionRequest(create=create), is_owned=True)

    def seal(self, segment: Segment, layout: bytes = b"") -> None:
        """Publish weights: from now on `attach` gives them. The segment is unmapped."""
        with self.lock:
            sums = [checksums.compute(memoryview(slab)) for slab in segment.slabs]
            segment.unmap()
            seal = wire.SealSegment(
                name=segment.name, epoch=segment.epoch, checksums=sums, layout=layout
            )
            self._call(wire.SessionRequest(seal=seal), timeout_s=0)
            self._forget(segment)

    def freeze(self, segment: Segment, layout: bytes = b"") -> None:
        """Let a pool be adopted if this process dies."""
        freeze = wire.FreezePool(name=segment.name, epoch=segment.epoch, layout=layout)
        self._tell(wire.SessionRequest(freeze=freeze))

    def attach(self, name: str, version: int = 0) -> Segment:
        """Map what another published, or, as a standby, the pool of one that lives.

        It is to be released: until then its memory is not given to anybody else.
        """
        attach = wire.AttachSegment(name=name, version=version)
        return self._granted(wire.SessionRequest(attach=attach), is_owned=False)

    def adopt(self, name: str, expected_epoch: int = 0, *, timeout_s: float = 5.0) -> Segment:
        """Take a dead process's pool over; waits until that is proved dead. Check its records.

        If it cannot be mapped, it is this process's all the same: adopt it again.
        """
        adopt = wire.AdoptPool(name=name, expected_epoch=expected_epoch)
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                return self._granted(wire.SessionRequest(adopt=adopt), is_owned=True)
            except UnbrokenError as error:
                if error.reason is not Reason.NOT_FENCED or time.monotonic() > give_up_at:
                    raise
                time.sleep(error.retry_after_s or _RETRY_S)

    def release(self, segment: Segment) -> None:
        """Give up what was created, adopted or attached. It is unmapped.

        Raises BufferError while somebody has a view of it.
        """
        with self.lock:
            segment.unmap()
            self._forget(segment)
            if segment.is_lost:
                self._say_unmapped(segment.slab_ids)
                return
            release = wire.ReleaseSegment(name=segment.name, version=segment.version)
            self._tell(wire.SessionRequest(release=release))

    def _granted(self, request: wire.SessionRequest, *, is_owned: bool) -> Segment:
        with self.lock:
            response, fds = self._call(request)
            told = response.granted.segment
            try:
                segment = map_segment(told, fds, is_owned=is_owned)
            except OSError:
                self._decline(request, told)
                raise
            self._segments.append(segment)
            return segment

    def _decline(self, request: wire.SessionRequest, told: pb.Segment) -> None:
        """Give back what cannot be mapped, unless its bytes would be lost with it."""
        if request.WhichOneof("kind") == "adopt":
            return  # Whoever adopts it again is given it again.
        release = wire.ReleaseSegment(name=told.name, version=told.version)
        self._tell(wire.SessionRequest(release=release))

    def _forget(self, segment: Segment) -> None:
        self._segments = [one for one in self._segments if one is not segment]

    # Blocks.

    def open_writer(self, block_bytes: int, num_slots: int) -> BlockWriter:
        """Memory for blocks of one size, of which the oldest make room for new ones."""
        open_slab = wire.OpenSlab(block_bytes=block_bytes, num_slots=num_slots)
        with self.lock:
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
            response = self.call(wire.SessionRequest(find=find))
            found += response.found.num_blocks
            if response.found.num_blocks < len(part):
                break
        return found

    def get(self, keys: Sequence[bytes], *, ttl_s: float = 10.0, checked: bool = True) -> Pinned:
        """The blocks of the first keys (1,000 at most) that are stored and intact.

        They lie where they were written: nothing is copied. Without `checked` the caller compares
        each with its checksum, such as on a GPU. Blocks beyond those in 250 slabs that this process
        has not mapped yet are left out; ask again for them.
        """
        request = wire.SessionRequest()
        get = request.get  # Filled in place: a message that is passed on is copied.
        get.keys, get.in_rows = b"".join(keys), True
        get.ttl.FromMilliseconds(round(ttl_s * 1000))
        with self.lock:
            if self._leaving:
                self._sweep()
            begun = time.monotonic()
            response, fds = self._call(request)
            life = self.num_lives  # Before another call: that may begin the next one.
            pinned = response.pinned
            self._map_new(pinned.new_slabs, fds)
            found = located(_rows(pinned), self._readable)
            if pinned.freed_slab_ids:
                self._let_go(pinned.freed_slab_ids)
            if checked and (num_intact := found.num_intact()) < len(found.rows):
                row = found.rows[num_intact]
                self._report(row.slab_id, row.slot, row.generation)
                found = found.first(num_intact)
            return Pinned(self, pinned.pin_id, life, found, begun + ttl_s)

    def grant_reads(self, ttl_s: float) -> bytes:
        """A ticket with which another host may read this tenant's blocks for so long.

        It goes to who may, over connections that nobody else can read: see `ReadBlocksRequest`.
        """
        grant = wire.GrantReads()
        grant.ttl.FromMilliseconds(round(ttl_s * 1000))
        return self.call(wire.SessionRequest(grant_reads=grant)).read_ticket.ticket

    def release_pin(self, pin_id: int, life: int) -> None:
        """End a pin of this life; one of an earlier life has ended with it."""
        with self.lock:
            if life != self.num_lives or self._sock is None:
                return
            release = wire.ReleasePin(pin_id=pin_id, is_silent=self._releases_silently)
            request = wire.SessionRequest(boot_token=self._boot_token, release_pin=release)
            try:
                channel.send(self._sock, request)
                self._num_owed += not self._releases_silently
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

    # What is mapped.

    def _map_new(self, slabs: Sequence[pb.Slab], fds: list[int]) -> None:
        """Map slabs of others. One that cannot be is a miss, and asked for again next time."""
        again: list[int] = []
        try:
            for slab, fd in zip(slabs, fds, strict=True):
                if slab.slab_id in self._reading:
                    continue
                try:
                    mapped = self._mapped_slab(slab, fd)
                except (OSError, GpuError):
                    tries = self._unmappable[slab.slab_id] = (
                        self._unmappable.get(slab.slab_id, 0) + 1
                    )
                    if tries < MAP_TRIES:
                        again.append(slab.slab_id)
                else:
                    self._unmappable.pop(slab.slab_id, None)
                    if mapped is not None:
                        self._reading[slab.slab_id] = mapped
        finally:
            channel.close_all(fds)
        if again:
            self._say_unmapped(again)  # Else its descriptor would not come a second time.

    def _mapped_slab(self, slab: pb.Slab, fd: int) -> ReaderSlab | GpuReaderSlab | None:
        """One for reading, if it is of a memory that is read here. Raises OSError, GpuError."""
        if slab.memory_kind not in _HOST_KINDS:
            return None
        mapping = mmap.mmap(fd, slab.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return ReaderSlab(mapping, slab.block_bytes)

    def _readable(self, slab_id: int) -> ReaderSlab | None:
        slab = self._reading.get(slab_id)
        if slab is None and slab_id in self._writers:
            slab = self._writers[slab_id].as_reader()
        return slab if isinstance(slab, ReaderSlab) else None

    def _let_go(self, slab_ids: Sequence[int]) -> None:
        """Unmap slabs that were read, and say so; later, of those somebody still looks at."""
        # Such as of a GPU, in a process that has none.
        mapped = (self._reading, self._leaving, self._writers)
        never = [one for one in slab_ids if not any(one in some for some in mapped)]
        for slab_id in slab_ids:
            self._unmappable.pop(slab_id, None)
            if (slab := self._reading.pop(slab_id, None)) is not None:
                self._leaving[slab_id] = Leaving(slab.mapping, is_written=False)
        self._sweep()
        if never:
            self._say_unmapped(never)

    def _sweep(self) -> None:
        """Unmap what nobody looks at any more, and say so."""
        read: list[int] = []
        for slab_id, slab in list(self._leaving.items()):
            try:
                slab.mapping.close()
            except BufferError:
                continue
            del self._leaving[slab_id]
            if slab.is_written:
                close = wire.SessionRequest(close_slab=wire.CloseSlab(slab_id=slab_id))
                with contextlib.suppress(UnbrokenError):  # It may be closed already.
                    self._tell(close)
            else:
                read.append(slab_id)
        if read:
            self._say_unmapped(read)

    def _say_unmapped(self, slab_ids: Sequence[int]) -> None:
        self._tell(wire.SessionRequest(unmapped=wire.Unmapped(slab_ids=slab_ids)))

    def writer_ended(self, slab_id: int, mapping: mmap.mmap | DeviceSlabs) -> None:
        """For writers: it writes no more."""
        self._writers.pop(slab_id, None)
        try:
            mapping.close()
        except BufferError:  # Somebody reads one of our blocks.
            self._leaving[slab_id] = Leaving(mapping, is_written=True)

    # The session.

    def call(self, request: wire.SessionRequest) -> wire.SessionResponse:
        """A call without descriptors. Raises what the service answers."""
        response, fds = self._call(request)
        channel.close_all(fds)
        return response

    def _tell(self, request: wire.SessionRequest) -> None:
        self.call(request)

    def _call(
        self, request: wire.SessionRequest, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[wire.SessionResponse, list[int]]:
        """One call, made again if the service died over it. Raises what the service answers."""
        with self.lock:
            if self._sock is None:
                raise UnbrokenError(Reason.CANCELLED, "expected an open client, it was closed")
            for attempt in range(1, ATTEMPTS_MAX + 1):
                request.boot_token = self._boot_token
                try:
                    response, fds = self._ask(request, timeout_s)
                except (ChannelClosed, BlockingIOError) as error:  # The latter: it took too long.
                    if attempt == ATTEMPTS_MAX:
                        raise UnbrokenError(
                            Reason.UNREACHABLE,
                            f"expected an answer, {attempt} connections ended over it: {error}",
                        ) from error
                    self._bind(self._rebind_timeout_s)
                    continue
                if response.WhichOneof("kind") == "error":
                    channel.close_all(fds)
                    raise _raised(response.error)
                return response, fds
            raise AssertionError("the last attempt returns or raises")

    def _ask(
        self, request: wire.SessionRequest, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[wire.SessionResponse, list[int]]:
        """On this connection alone. Raises ChannelClosed, BlockingIOError."""
        assert self._sock is not None, "it is open"
        if timeout_s != CALL_TIMEOUT_S:
            channel.set_timeout(self._sock, timeout_s)
        waiting = self._waiting[request.WhichOneof("kind")]
        awake_s = waiting.begin()
        begun = time.perf_counter()
        channel.send(self._sock, request)
        self._take_owed()
        channel.look_out(self._sock, awake_s)
        answer = channel.receive(self._sock, wire.SessionResponse)
        waiting.ended(time.perf_counter() - begun)
        if timeout_s != CALL_TIMEOUT_S:
            channel.set_timeout(self._sock, CALL_TIMEOUT_S)
        return answer

    def _bind(self, timeout_s: float) -> None:
        """Begin, or go on, with the service that is there, or comes in time."""
        self.num_lives += 1
        give_up_at = time.monotonic() + timeout_s
        while True:
            if self._sock is not None:
                self._sock.close()
            self._num_owed = 0
            try:
                self._sock = _high(channel.connect(self._path))
                channel.set_timeout(self._sock, CALL_TIMEOUT_S)
                self._bind_here()
            except (OSError, ChannelClosed) as error:  # Or it took too long.
                if time.monotonic() > give_up_at:
                    if self._sock is not None:
                        self._sock.close()
                    raise UnbrokenError(
                        Reason.UNREACHABLE, f"expected a memory service at {self._path}: {error}"
                    ) from error
                time.sleep(_RETRY_S)
            else:
                return

    def _bind_here(self) -> None:
        """On a new connection. Raises what the service answers, OSError and ChannelClosed."""
        assert self._sock is not None, "it is open"
        identity = self._identity
        del identity.attached_versions[:], identity.mapped_slab_ids[:]
        if identity.session_id:
            attached = [one.version for one in self._segments if not one.is_owned]
            identity.attached_versions.extend(attached[-KEYS_A_CALL:])
            identity.mapped_slab_ids.extend(list(self._reading)[-MAPPED_MAX:])
        response, fds = self._ask(wire.SessionRequest(bind=identity))
        if response.WhichOneof("kind") == "error":
            channel.close_all(fds)
            self._sock.close()
            raise _raised(response.error)
        bound = response.bound
        is_resumed = bool(identity.session_id) and bound.is_resumed
        self._boot_token = bound.boot_token
        self._releases_silently = bound.releases_silently
        identity.session_id, identity.secret = bound.session_id, bound.secret
        self._have_lifeline(map_lifeline(fds), is_resumed=is_resumed)
        self._lose_what_is_lost(bound)
        told = [wire.SessionRequest(close_slab=one) for one in self._unheard_slabs(bound)]
        told += [wire.SessionRequest(release=one) for one in self._unheard_segments(bound)]
        for request in told:
            request.boot_token = self._boot_token
            self._ask(request)
        for slab_id in (*bound.freed_slab_ids, *list(self._reading)[:-MAPPED_MAX]):
            if (slab := self._reading.pop(slab_id, None)) is not None:
                self._leaving[slab_id] = Leaving(slab.mapping, is_written=False)

    def _have_lifeline(self, mapping: mmap.mmap, *, is_resumed: bool) -> None:
        """Mapped before anything else is asked for."""
        if is_resumed and self._lifelines:
            self._lifelines.pop().close()  # The same, mapped twice.
        elif not (self._writers or self._leaving or any(one.is_owned for one in self._segments)):
            for lifeline in self._lifelines:
                lifeline.close()
            self._lifelines.clear()
        self._lifelines.append(mapping)

    def _lose_what_is_lost(self, bound: wire.Bound) -> None:
        known = {slab.slab_id for slab in bound.slabs} if bound.is_resumed else set[int]()
        for writer in list(self._writers.values()):
            if writer.slab_id not in known:
                writer.lose()
        owned = set(zip(bound.owned_versions, bound.owned_epochs, strict=True))
        attached = set(bound.attached_versions)
        for segment in self._segments:
            is_known = (
                (segment.version, segment.epoch) in owned
                if segment.is_owned
                else segment.version in attached
            )
            segment.is_lost |= not is_known

    def _unheard_slabs(self, bound: wire.Bound) -> list[wire.CloseSlab]:
        """They were opened, and we never heard of it."""
        return [
            wire.CloseSlab(slab_id=slab.slab_id)
            for slab in bound.slabs
            if slab.slab_id not in self._writers
        ]

    def _unheard_segments(self, bound: wire.Bound) -> list[wire.ReleaseSegment]:
        """As `_unheard_slabs`: the same call may be made again."""
        known = {segment.version for segment in self._segments if segment.is_owned}
        return [
            wire.ReleaseSegment(version=version)
            for version in bound.owned_versions
            if version not in known
        ]

    def _report(self, slab_id: int, slot: int, generation: int) -> None:
        report = wire.ReportCorrupt(slab_id=slab_id, slot=slot, generation=generation)
        self._tell(wire.SessionRequest(report_corrupt=report))


def _high(sock: socket.socket) -> socket.socket:
    """The same connection under a high number: files with low ones are closed late when a process
    dies, and that of a GPU's driver takes its time."""
    try:
        fd = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:
        return sock
    sock.close()
    return socket.socket(fileno=fd)


def _rows(pinned: wire.Pinned) -> Rows:
    """Of each block; of an older service, which knows only columns, made of these."""
    try:
        if pinned.rows:
            return Rows(pinned.rows)
        slab_ids = pinned.slab_ids[:]
        # Whatever number it is, nobody here knows it.
        algorithms = [one & 0xFFFF_FFFF for one in pinned.checksum_algorithms] or [0] * len(
            slab_ids
        )
        sums, generations = pinned.checksums[:], pinned.generations[:]
        columns = (slab_ids, sums, pinned.slots[:], generations, pinned.num_tokens[:], algorithms)
        return rows_of(zip(*columns, strict=True))
    except ValueError as error:
        raise UnbrokenError(Reason.PROTOCOL_VIOLATION, f"{error}") from error


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
