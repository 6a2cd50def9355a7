"""Memory of the service, as it is mapped into this process."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from unbroken.memory import channel
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.v1 import memory_pb2 as pb


@dataclass(slots=True, eq=False)
class Segment:
    """One version of a segment, mapped into this process.

    Attributes:
        epoch: The fencing token of its owner.
        slabs: Its memory. Of one that is attached, read-only.
        slab_ids: Of `slabs`.
        is_owned: Whether this process may write to it, rather than having attached it.
        is_lost: It is not this process's any more: never write to it again. Its bytes stay
            mapped until it is released.
    """

    name: str
    version: int
    epoch: int
    layout: bytes
    slabs: list[mmap.mmap]
    slab_ids: tuple[int, ...]
    is_owned: bool
    is_lost: bool = False

    def unmap(self) -> None:
        """Give the mappings back. Raises BufferError while somebody has a view of one."""
        while self.slabs:
            self.slabs[-1].close()
            self.slabs.pop()


@dataclass(slots=True, eq=False)
class ReaderSlab:
    """A slab of the block store that is mapped for reading."""

    mapping: mmap.mmap
    block_bytes: int


@dataclass(slots=True, eq=False)
class GpuReaderSlab:
    """The same of a slab in a GPU's memory."""

    mapping: DeviceSlabs
    block_bytes: int

    def address(self, slot: int) -> int:
        return self.mapping.address + slot * self.block_bytes


@dataclass(slots=True, eq=False)
class Leaving:
    """A slab that is given up, and that somebody in this process still has a view of."""

    mapping: mmap.mmap | DeviceSlabs
    is_written: bool
    """It was this process's to write to."""


def map_segment(segment: pb.Segment, fds: list[int], *, is_owned: bool) -> Segment:
    """Map a segment of the host's memory; its descriptors are closed. Raises OSError."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_owned else 0)
    slabs: list[mmap.mmap] = []
    try:
        for slab, fd in zip(segment.slabs, fds, strict=True):
            mapping = mmap.mmap(fd, slab.size_bytes, mmap.MAP_SHARED, protection)
            slabs.append(mapping)
            if is_owned:
                mapping.madvise(mmap.MADV_DONTFORK)
    except OSError:
        for mapping in slabs:
            mapping.close()
        raise
    finally:
        channel.close_all(fds)
    return Segment(
        segment.name,
        segment.version,
        segment.epoch,
        segment.layout,
        slabs,
        tuple(slab.slab_id for slab in segment.slabs),
        is_owned,
    )


def map_lifeline(fds: Sequence[int]) -> mmap.mmap:
    """Map what says that this process may write, in no child of it; the descriptor is closed."""
    try:
        (fd,) = fds
        mapping = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED)
        mapping.madvise(mmap.MADV_DONTFORK)
        return mapping
    finally:
        channel.close_all(fds)
