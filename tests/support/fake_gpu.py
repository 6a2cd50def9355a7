"""A GPU without a GPU: its memory is memfds, its addresses are this process's.

It refuses what CUDA's driver refuses, in the same words (`tests.memory_service.refusals`). Its
descriptors pass from process to process as CUDA's do: one that was opened anew by its path is of no
use, and nothing that was imported can be exported.
"""

import ctypes
import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from unbroken.memory import mlh64
from unbroken.memory.gpu import Access, GpuCode, GpuError

MADE_OF: Final = "/memfd:fake-gpu-"
"""What the kernel calls descriptors of its allocations."""
GRANULARITY_BYTES: Final = 2 << 20

_PROT: Final = {
    Access.NONE: 0,
    Access.READ: mmap.PROT_READ,
    Access.READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE,
}
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED_NOREPLACE: Final = 0x100000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(slots=True)
class _Allocation:
    """A handle."""

    fd: int
    size_bytes: int
    is_imported: bool


@dataclass(slots=True)
class _Mapping:
    """A whole allocation in a range of addresses."""

    size_bytes: int
    access: Access = Access.NONE


def num_descriptors() -> int:
    """Of allocations, in this process, whoever has them."""
    names = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return sum(name.startswith(MADE_OF) for name in names)


class FakeGpu:
    """See `unbroken.memory.gpu.Gpu`.

    Attributes:
        num_calls: Of each method that goes to the driver, those that succeeded included.
    """

    def __init__(
        self, uuid: str = "GPU-fa4efa4e-0000-0000-0000-000000000001", capacity_bytes: int = 1 << 40
    ) -> None:
        self.uuid = uuid
        self.granularity_bytes = GRANULARITY_BYTES
        self.num_calls: Counter[str] = Counter()
        self._capacity_bytes = capacity_bytes
        self._next_handle = 1
        self._handles: dict[int, _Allocation] = {}
        self._ranges: dict[int, int] = {}
        self._mappings: dict[int, _Mapping] = {}
        self._fails: dict[str, tuple[int, GpuCode]] = {}

    def fail(self, call: str, number: int, code: GpuCode) -> None:
        """Refuse the number-th call of this method from now on, once."""
        self._fails[call] = (self.num_calls[call] + number, code)

    def forgive(self) -> None:
        """Refuse nothing any more."""
        self._fails.clear()

    def check_empty(self) -> None:
        """Nothing is left of anything."""
        assert not self._handles, "all handles are released"
        assert not self._mappings, "nothing is mapped"
        assert not self._ranges, "all ranges are given back"

    def check_failed(self) -> None:
        """What was to be refused was."""
        for call, (number, _) in self._fails.items():
            assert self.num_calls[call] >= number, f"{call} was called {number} times"

    # Allocations.

    def create(self, size_bytes: int) -> int:
        self._called("create")
        if size_bytes <= 0 or size_bytes % GRANULARITY_BYTES:
            raise _refused("create", GpuCode.INVALID_VALUE)
        if size_bytes > self._capacity_bytes:
            raise _refused("create", GpuCode.OUT_OF_MEMORY)
        fd = os.memfd_create(f"{MADE_OF.removeprefix('/memfd:')}{self.uuid}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        # A mark of this open file, and of all its duplicates: who opens it anew has it not.
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
        return self._handle(_Allocation(fd, size_bytes, is_imported=False))

    def export(self, handle: int) -> int:
        self._called("export")
        allocation = self._allocation(handle)
        if allocation.is_imported:
            raise _refused("export", GpuCode.INVALID_VALUE)
        return os.dup(allocation.fd)

    def import_fd(self, fd: int) -> int:
        self._called("import_fd")
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            has_mark = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        except OSError:
            raise _refused("import", GpuCode.UNKNOWN) from None
        if not name.startswith(f"{MADE_OF}{self.uuid}") or not has_mark:
            raise _refused("import", GpuCode.UNKNOWN)
        size = os.fstat(fd).st_size
        return self._handle(_Allocation(os.dup(fd), size, is_imported=True))

    def release(self, handle: int) -> None:
        self._called("release")
        if handle not in self._handles:
            raise _refused("release", GpuCode.INVALID_VALUE)
        os.close(self._handles.pop(handle).fd)

    # Addresses.

    def reserve(self, size_bytes: int, address: int = 0) -> int:
        self._called("reserve")
        if size_bytes <= 0 or size_bytes % GRANULARITY_BYTES or address % GRANULARITY_BYTES:
            raise _refused("reserve", GpuCode.INVALID_VALUE)
        got = _MAP_FAILED
        if address:
            got = _map_nothing(address, size_bytes, _MAP_FIXED_NOREPLACE)
            if got not in (address, _MAP_FAILED):  # A kernel that does not know the flag.
                _libc.munmap(got, size_bytes)
                got = _MAP_FAILED
        if got == _MAP_FAILED:
            whole = _map_nothing(0, size_bytes + GRANULARITY_BYTES, 0)
            assert whole is not None
            assert whole != _MAP_FAILED, "there are addresses"
            got = -(-whole // GRANULARITY_BYTES) * GRANULARITY_BYTES
            if before := got - whole:
                _libc.munmap(whole, before)
            if after := GRANULARITY_BYTES - before:
                _libc.munmap(got + size_bytes, after)
        assert got is not None
        self._ranges[got] = size_bytes
        return got

    def unreserve(self, address: int, size_bytes: int) -> None:
        self._called("unreserve")
        if self._ranges.get(address) != size_bytes or self._within(address, size_bytes):
            raise _refused("unreserve", GpuCode.INVALID_VALUE)
        del self._ranges[address]
        _libc.munmap(address, size_bytes)

    def map(self, address: int, size_bytes: int, handle: int, offset: int = 0) -> None:
        self._called("map")
        allocation = self._allocation(handle)
        if offset or size_bytes != allocation.size_bytes:
            raise _refused("map", GpuCode.NOT_SUPPORTED)
        if not self._is_reserved(address, size_bytes) or address % GRANULARITY_BYTES:
            raise _refused("map", GpuCode.INVALID_VALUE)
        if self._num_mapped(address, size_bytes):
            raise _refused("map", GpuCode.INVALID_VALUE)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        got = _libc.mmap(address, size_bytes, 0, flags, allocation.fd, 0)
        assert got == address, "it was reserved"
        self._mappings[address] = _Mapping(size_bytes)

    def unmap(self, address: int, size_bytes: int) -> None:
        self._called("unmap")
        whole = self._within(address, size_bytes)
        num_whole = sum(self._mappings[start].size_bytes for start in whole)
        if not self._is_reserved(address, size_bytes) or (
            self._num_mapped(address, size_bytes) != num_whole
        ):
            raise _refused("unmap", GpuCode.INVALID_VALUE)
        assert _map_nothing(address, size_bytes, _MAP_FIXED) == address, "it was reserved"
        for start in whole:
            del self._mappings[start]

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        self._called("set_access")
        for start in self._whole("set_access", address, size_bytes):
            mapping = self._mappings[start]
            assert _libc.mprotect(start, mapping.size_bytes, _PROT[access]) == 0
            mapping.access = access

    # Bytes.

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self._called("write")
        self._check_usable("write", address, len(data), Access.READ_WRITE)
        ctypes.memmove(address, bytes(data), len(data))

    def read(self, address: int, size_bytes: int) -> bytes:
        self._called("read")
        self._check_usable("read", address, size_bytes, Access.READ)
        return ctypes.string_at(address, size_bytes)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self._called("copy")
        self._check_usable("copy", target, size_bytes, Access.READ_WRITE)
        self._check_usable("copy", source, size_bytes, Access.READ)
        ctypes.memmove(target, source, size_bytes)

    def checksums(self, addresses: Sequence[int], size_bytes: int) -> list[int]:
        self._called("checksums")
        for address in addresses:
            self._check_usable("checksums", address, size_bytes, Access.READ)
        return [
            mlh64.compute(memoryview((ctypes.c_char * size_bytes).from_address(address)))
            for address in addresses
        ]

    def copy_blocks(
        self, targets: Sequence[int], sources: Sequence[int], size_bytes: int
    ) -> list[int]:
        for target in targets:
            self._check_usable("copy_blocks", target, size_bytes, Access.READ_WRITE)
        sums = self.checksums(sources, size_bytes)
        for target, source in zip(targets, sources, strict=True):
            ctypes.memmove(target, source, size_bytes)
        return sums

    def synchronize(self) -> None:
        self._called("synchronize")

    # How it says no.

    def _called(self, call: str) -> None:
        self.num_calls[call] += 1
        number, code = self._fails.get(call, (0, GpuCode.UNKNOWN))
        if self.num_calls[call] == number:
            raise _refused(call, code)

    def _handle(self, allocation: _Allocation) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = allocation
        return handle

    def _allocation(self, handle: int) -> _Allocation:
        assert handle in self._handles, "it is not released: the driver would end the process"
        return self._handles[handle]

    def _is_reserved(self, address: int, size_bytes: int) -> bool:
        return any(
            start <= address and address + size_bytes <= start + size
            for start, size in self._ranges.items()
        )

    def _num_mapped(self, address: int, size_bytes: int) -> int:
        """Bytes of a range at which something is mapped."""
        end = address + size_bytes
        return sum(
            max(0, min(end, start + mapping.size_bytes) - max(address, start))
            for start, mapping in self._mappings.items()
        )

    def _within(self, address: int, size_bytes: int) -> list[int]:
        return [
            start for start in sorted(self._mappings) if address <= start < address + size_bytes
        ]

    def _whole(self, call: str, address: int, size_bytes: int) -> list[int]:
        """The mappings of exactly this range, of which none may be cut and nothing may be free."""
        whole, at = self._within(address, size_bytes), address
        for start in whole:
            if start != at:
                break
            at += self._mappings[start].size_bytes
        if not whole or at != address + size_bytes:
            raise _refused(call, GpuCode.INVALID_VALUE)
        return whole

    def _check_usable(self, call: str, address: int, size_bytes: int, access: Access) -> None:
        """That every byte is mapped, and may be used so."""
        at, end = address, address + size_bytes
        while at < end:
            for start, mapping in self._mappings.items():
                if start <= at < start + mapping.size_bytes and mapping.access >= access:
                    at = start + mapping.size_bytes
                    break
            else:
                raise _refused(call, GpuCode.INVALID_VALUE)


def _map_nothing(address: int, size_bytes: int, flags: int) -> int | None:
    """Addresses that nobody may use."""
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return _libc.mmap(address, size_bytes, 0, flags, -1, 0)


def _refused(call: str, code: GpuCode) -> GpuError:
    return GpuError(call, code, code.name)
