"""Memory of the host: one memfd a slab, which the kernel hands out cleared and seals on demand.

Everybody but the owner of a slab gets a descriptor that was opened for reading. That keeps
accidents away, and it keeps their mappings from counting as writable, for which the kernel would
refuse the seal. A slab cannot shrink, so that no reader is ever killed by a hole under its mapping.
"""

import errno
import fcntl
import mmap
import os
from typing import Final

from memory_service.backend import Allocation, NeverSealed

MFD_NOEXEC_SEAL: Final = 0x8
_FIRST_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def allocate(size_bytes: int, name: str) -> int:
    """A descriptor of so many zeros. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)  # Before Linux 6.3.
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIRST_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> bool:
    """Whether nobody can write any more; False while somebody has it mapped for that.

    Raises NeverSealed.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.EPERM:
            raise
        # Whoever may write to it may also have forbidden all further seals.
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            raise NeverSealed(f"expected to seal descriptor {fd}, its owner forbade it") from error
    return True


class MemfdBackend:
    """See `memory_service.backend.Backend`."""

    is_readable = True
    is_slow = False

    def __init__(self) -> None:
        self._mappings: dict[int, mmap.mmap] = {}  # By descriptor.

    def allocate(self, size_bytes: int, name: str) -> Allocation:
        return Allocation(allocate(size_bytes, name), size_bytes)

    def adopt(self, fd: int, size_bytes: int) -> Allocation:
        if os.fstat(fd).st_size < size_bytes:
            raise OSError(f"expected {size_bytes} bytes, got {os.fstat(fd).st_size}")
        return Allocation(fd, size_bytes)

    def read_only(self, allocation: Allocation) -> int:
        return os.open(f"/proc/self/fd/{allocation.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def seal(self, allocation: Allocation) -> bool:
        return seal(allocation.fd)

    def view(self, allocation: Allocation) -> memoryview:
        mapping = self._mappings.get(allocation.fd)
        if mapping is None:
            fd = self.read_only(allocation)
            try:
                mapping = mmap.mmap(fd, allocation.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                os.close(fd)
            self._mappings[allocation.fd] = mapping
        return memoryview(mapping)

    def free(self, allocation: Allocation) -> None:
        self._mappings.pop(allocation.fd, None)  # Unmapped when the last view is gone.
        os.close(allocation.fd)
