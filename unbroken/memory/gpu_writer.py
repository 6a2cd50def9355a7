"""Writes blocks into a slab of a GPU's memory; `GpuMemoryClient.open_writer_on_gpu` makes one."""

from collections.abc import Sequence

from typing_extensions import override

from unbroken.memory.checksums import Algorithm
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import Access, Gpu, GpuError
from unbroken.memory.mapped import GpuReaderSlab
from unbroken.memory.writer import FLUSH_BLOCKS, Session, SlabWriter, check_block
from unbroken.v1 import memory_pb2 as pb


class GpuBlockWriter(SlabWriter):
    """Its records are in the host's memory, as those of others are."""

    def __init__(self, session: Session, slab: pb.Slab, fds: list[int], gpu: Gpu) -> None:
        """The descriptors are closed. Raises GpuError, OSError."""
        self._gpu = gpu
        super().__init__(session, slab, fds)

    @override
    def _map(self, fd: int, slab: pb.Slab) -> None:
        self._slabs = mapped(self._gpu, slab, fd, Access.READ_WRITE)

    @override
    def _unmap(self) -> None:
        self._session.writer_ended(self.slab_id, self._slabs)

    @override
    def as_reader(self) -> GpuReaderSlab:
        return GpuReaderSlab(self._slabs, self.block_bytes)

    def put(self, keys: Sequence[bytes], addresses: Sequence[int], num_tokens: int) -> int:
        """Store blocks that are on the GPU; how many of the first there was room for.

        The GPU MUST have computed them: it is not waited for. Addresses are multiples of 8. All
        blocks are copied at once, with their checksums in the same pass. Others find them as those
        of `BlockWriter`.
        """
        for key in keys:
            check_block(key, num_tokens)
        stored = 0
        while stored < len(keys) and (self._free or self._make_room()):
            count = min(len(keys) - stored, len(self._free))
            slots = [self._free.pop() for _ in range(count)]
            for slot in slots:
                self._mark(slot)
            reader, part = self.as_reader(), slice(stored, stored + count)
            try:
                sums = self._gpu.copy_blocks(
                    [reader.address(slot) for slot in slots], addresses[part], self.block_bytes
                )
            except BaseException:
                self._free += reversed(slots)  # Their records say that they are being written to.
                raise
            for slot, key, checksum in zip(slots, keys[part], sums, strict=True):
                self._commit(slot, key, num_tokens, checksum, Algorithm.MLH64)
            stored += count
            if len(self._untold) >= FLUSH_BLOCKS:
                self.flush()
        return stored


def mapped(gpu: Gpu, slab: pb.Slab, fd: int, access: Access) -> DeviceSlabs:
    """A slab of blocks, in addresses of its own. Raises GpuError."""
    slabs = DeviceSlabs(gpu, [slab.allocated_bytes])
    try:
        slabs.map([fd], access)
    except GpuError:
        slabs.close()
        raise
    return slabs
