"""Memory of a GPU that outlives this process: `unbroken.memory.client`, with one GPU more.

    gpu = CudaGpu()
    with GpuMemoryClient(path, gpu, tenant="acme") as memory:
        weights = memory.attach_on_gpu("llama/weights")    # mapped, and compared with its checksums
        tensor = torch.as_tensor(weights.on_gpu.slabs[0], device="cuda")

A standby attaches the pool of the engine that it is to succeed, and captures its graphs there. When
that one dies, `take_over` maps nothing: the driver is slow (20 to 60 ms a call) while a process
dies.

Nothing keeps others from writing to what is attached, if they mean to. So whoever attaches
compares: at 4 TB/s, 4 ms for 16 GiB.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.memory import channel
from unbroken.memory.client import MemoryClient, SegmentClass
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import Access, Gpu, GpuError
from unbroken.memory.gpu_writer import GpuBlockWriter, mapped
from unbroken.memory.mapped import GpuReaderSlab, ReaderSlab, Segment
from unbroken.memory.pinned import NOTHING, Pinned
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

TAKEN_OVER_MAX = 8
"""Owners of a pool, one after the other, that a standby hears of only when it takes it over."""
_RETRY_S = 0.002
ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class GpuSegment(Segment):
    """One version of a segment in a GPU's memory; it has no `slabs` of the host.

    Attributes:
        on_gpu: Where it is mapped.
        checksums: Of its slabs, if it is sealed.
        is_comparable: Whether they are of the kind that a GPU computes.
    """

    on_gpu: DeviceSlabs = field(kw_only=True)
    checksums: tuple[int, ...] = field(kw_only=True)
    is_comparable: bool = field(kw_only=True)

    @override
    def unmap(self) -> None:
        """Wait for the GPU, and give the mappings and their addresses back."""
        self.on_gpu.close()


class GpuMemoryClient(MemoryClient):
    """A session with the memory service of this host, of a process that computes on a GPU."""

    def __init__(self, path: Path, gpu: Gpu, **settings: Any) -> None:
        """As `MemoryClient`. The GPU stays the caller's, to be closed after this."""
        self.gpu = gpu
        super().__init__(path, **settings)

    def create_on_gpu(
        self, name: str, kind: SegmentClass, slab_bytes: Sequence[int], *, address: int = 0
    ) -> GpuSegment:
        """As `create`, at these addresses if any are given.

        Slabs are multiples of the GPU's granularity; few large ones are best.
        """
        create = wire.CreateSegment(
            name=name,
            slab_bytes=slab_bytes,
            segment_class=pb.SegmentClass.ValueType(int(kind)),
            memory_kind=pb.MEMORY_KIND_CUDA,
            device=self.gpu.uuid,
        )
        request = wire.SessionRequest(create=create)
        return self._granted_on_gpu(request, Access.READ_WRITE, address, is_owned=True)

    def attach_on_gpu(
        self,
        name: str,
        version: int = 0,
        *,
        address: int = 0,
        is_standby: bool = False,
        is_checked: bool = True,
    ) -> GpuSegment:
        """As `attach`, and compares what is sealed. Raises CHECKSUM_MISMATCH.

        A standby maps a pool as it needs it after `take_over`, and MUST NOT write there before.
        """
        attach = wire.AttachSegment(name=name, version=version)
        access = Access.READ_WRITE if is_standby else Access.READ
        segment = self._granted_on_gpu(
            wire.SessionRequest(attach=attach), access, address, is_owned=False
        )
        if is_checked:
            try:
                self.verify(segment)
            except (UnbrokenError, GpuError):
                self.release(segment)
                raise
        return segment

    def adopt_on_gpu(
        self, name: str, expected_epoch: int = 0, *, timeout_s: float = 5.0, address: int = 0
    ) -> GpuSegment:
        """As `adopt`, at these addresses if any are given.

        If it cannot be mapped, it is this process's all the same: adopt it again.
        """
        adopt = wire.AdoptPool(name=name, expected_epoch=expected_epoch)
        request = wire.SessionRequest(adopt=adopt)
        return _fenced(
            lambda: self._granted_on_gpu(request, Access.READ_WRITE, address, is_owned=True),
            timeout_s,
        )

    def take_over(self, segment: GpuSegment, *, timeout_s: float = 5.0) -> None:
        """Adopt the pool that this process has attached as a standby, where it is mapped.

        Another standby may have been faster, and have died since: it is the same pool, with another
        epoch. Raises FENCED, or SEGMENT_NOT_FOUND, if it is not the same any more.
        """
        give_up_at = time.monotonic() + timeout_s
        with self.lock:
            for turn in range(TAKEN_OVER_MAX):
                adopt = wire.AdoptPool(name=segment.name, expected_epoch=segment.epoch)
                request = wire.SessionRequest(adopt=adopt)
                left_s = give_up_at - time.monotonic()
                try:
                    told = _fenced(lambda one=request: self.call(one), left_s).granted.segment
                except UnbrokenError as error:
                    if error.reason is not Reason.FENCED or turn + 1 == TAKEN_OVER_MAX:
                        raise
                    segment.epoch = self._epoch_of(segment)
                else:
                    assert told.version == segment.version, "an epoch is of one version"
                    segment.epoch, segment.is_owned = told.epoch, True
                    return

    def _epoch_of(self, segment: GpuSegment) -> int:
        """Of the version that is attached, as it is now. Raises SEGMENT_NOT_FOUND if it is gone."""
        attach = wire.AttachSegment(name=segment.name, version=segment.version)
        return self.call(wire.SessionRequest(attach=attach)).granted.segment.epoch

    def verify(self, segment: GpuSegment) -> None:
        """Compare what is sealed with its checksums, on the GPU. Raises CHECKSUM_MISMATCH.

        Raises NOT_IMPLEMENTED if it has checksums that a GPU does not compute.
        """
        if not segment.checksums:
            return
        if not segment.is_comparable:
            raise UnbrokenError(
                Reason.NOT_IMPLEMENTED,
                f"expected MLH64 of all slabs of {segment.name}: they cannot be compared",
            )
        for number, seen in enumerate(self._sums(segment)):
            if seen != segment.checksums[number]:
                raise UnbrokenError(
                    Reason.CHECKSUM_MISMATCH,
                    f"expected {segment.checksums[number]:016x} in slab {number} of "
                    f"{segment.name}, got {seen:016x}",
                )

    # Blocks.

    def open_writer_on_gpu(self, block_bytes: int, num_slots: int) -> GpuBlockWriter:
        """As `open_writer`. Blocks whose size is a multiple of 16 are copied fastest."""
        open_slab = wire.OpenSlab(
            block_bytes=block_bytes,
            num_slots=num_slots,
            memory_kind=pb.MEMORY_KIND_CUDA,
            device=self.gpu.uuid,
        )
        with self.lock:
            response, fds = self._call(wire.SessionRequest(open_slab=open_slab))
            (slab,) = response.granted.segment.slabs
            try:
                writer = GpuBlockWriter(self, slab, fds, self.gpu)
            except (GpuError, OSError):
                close = wire.SessionRequest(close_slab=wire.CloseSlab(slab_id=slab.slab_id))
                self.call(close)
                raise
            self._writers[slab.slab_id] = writer
            return writer

    def restore(
        self, keys: Sequence[bytes], addresses: Sequence[int], *, ttl_s: float = 10.0
    ) -> int:
        """Copy the blocks of the first keys (1,000 at most) to these addresses; how many are there.

        Up to the first that is not stored on this GPU, or does not match its checksum, which is
        computed in the same pass. What is at the addresses of the others is undefined.
        """
        get = wire.GetBlocks(
            keys=b"".join(keys), memory_kind=pb.MEMORY_KIND_CUDA, device=self.gpu.uuid
        )
        get.ttl.FromMilliseconds(round(ttl_s * 1000))
        with self.lock:
            begun = time.monotonic()
            response, fds = self._call(wire.SessionRequest(get=get))
            life, found = self.num_lives, response.pinned
            self._map_new(found.new_slabs, fds)
            sources, size = self._sources(found)
            pin = Pinned(self, found.pin_id, life, NOTHING, begun + ttl_s)
            with pin:
                sums = self.gpu.copy_blocks(addresses[: len(sources)], sources, size)
                is_valid = pin.is_valid
            if found.freed_slab_ids:
                self._let_go(found.freed_slab_ids)
            if not is_valid:
                return 0
            for number, seen in enumerate(sums):
                if seen != found.checksums[number]:
                    self._report(
                        found.slab_ids[number], found.slots[number], found.generations[number]
                    )
                    return number
            return len(sums)

    def _sources(self, found: wire.Pinned) -> tuple[list[int], int]:
        """Where the first blocks are that lie on this GPU and are of one size; and that."""
        sources: list[int] = []
        size = 0
        algorithms = found.checksum_algorithms
        for number, (slab_id, slot) in enumerate(zip(found.slab_ids, found.slots, strict=True)):
            slab = self._reading.get(slab_id)
            if slab is None and slab_id in self._writers:
                slab = self._writers[slab_id].as_reader()
            if not isinstance(slab, GpuReaderSlab) or slab.block_bytes != (
                size or slab.block_bytes
            ):
                break
            if not algorithms or algorithms[number] != pb.CHECKSUM_ALGORITHM_MLH64:
                break
            size = slab.block_bytes
            sources.append(slab.address(slot))
        return sources, size

    @override
    def _mapped_slab(self, slab: pb.Slab, fd: int) -> ReaderSlab | GpuReaderSlab | None:
        if (slab.memory_kind, slab.device) == (pb.MEMORY_KIND_CUDA, self.gpu.uuid):
            there = mapped(self.gpu, slab, fd, Access.READ)
            return GpuReaderSlab(there, slab.block_bytes)
        return super()._mapped_slab(slab, fd)

    @override
    def seal(self, segment: Segment, layout: bytes = b"") -> None:
        """Publish weights, with the checksums that the GPU computes. The segment is unmapped."""
        if not isinstance(segment, GpuSegment):
            super().seal(segment, layout)
            return
        self.gpu.synchronize()
        sums = self._sums(segment)
        segment.unmap()
        seal = wire.SealSegment(
            name=segment.name,
            epoch=segment.epoch,
            checksums=sums,
            layout=layout,
            checksum_algorithm=pb.CHECKSUM_ALGORITHM_MLH64,
        )
        self.call(wire.SessionRequest(seal=seal))
        self._forget(segment)

    def _sums(self, segment: GpuSegment) -> list[int]:
        """Slabs of one size at once."""
        slabs = segment.on_gpu.slabs
        sums: dict[int, int] = {}
        for size in {slab.size_bytes for slab in slabs}:
            addresses = [slab.address for slab in slabs if slab.size_bytes == size]
            sums |= zip(addresses, self.gpu.checksums(addresses, size), strict=True)
        return [sums[slab.address] for slab in slabs]

    def _granted_on_gpu(
        self, request: wire.SessionRequest, access: Access, address: int, *, is_owned: bool
    ) -> GpuSegment:
        """What the service grants, mapped; or else declined.

        Raises GpuError, AddressTaken, and INVALID_FIELD for what is elsewhere.
        """
        with self.lock:
            response, fds = self._call(request)
            told = response.granted.segment
            try:
                segment = self._mapped(told, fds, access, address, is_owned=is_owned)
            except BaseException:
                self._decline(request, told)
                raise
            finally:
                channel.close_all(fds)
            self._segments.append(segment)
            return segment

    def _mapped(
        self,
        told: pb.Segment,
        fds: Sequence[int],
        access: Access,
        address: int,
        *,
        is_owned: bool,
    ) -> GpuSegment:
        for slab in told.slabs:
            if (slab.memory_kind, slab.device) != (pb.MEMORY_KIND_CUDA, self.gpu.uuid):
                raise InvalidField("name", f"a segment on {self.gpu.uuid}", slab.device or "host")
        sizes = [slab.allocated_bytes or slab.size_bytes for slab in told.slabs]
        on_gpu = DeviceSlabs(self.gpu, sizes, address=address)
        try:
            on_gpu.map(fds, access)
        except GpuError:
            on_gpu.close()
            raise
        sums = tuple(slab.checksum for slab in told.slabs if slab.HasField("checksum"))
        is_comparable = len(sums) == len(told.slabs) and all(
            slab.checksum_algorithm == pb.CHECKSUM_ALGORITHM_MLH64 for slab in told.slabs
        )
        return GpuSegment(
            told.name,
            told.version,
            told.epoch,
            told.layout,
            [],
            tuple(slab.slab_id for slab in told.slabs),
            is_owned,
            on_gpu=on_gpu,
            checksums=sums,
            is_comparable=is_comparable,
        )


def _fenced(adopt: Callable[[], ResultT], timeout_s: float) -> ResultT:
    """What this gives once the owner is proved dead."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            return adopt()
        except UnbrokenError as error:
            if error.reason is not Reason.NOT_FENCED or time.monotonic() > give_up_at:
                raise
            time.sleep(error.retry_after_s or _RETRY_S)
