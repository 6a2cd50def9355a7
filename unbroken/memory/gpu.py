"""What a GPU's driver does for us, and how it says no. CUDA's is `unbroken.memory.cuda`.

Memory of a GPU has three parts that come and go apart: an allocation (a handle, or descriptors that
stand for it), a range of addresses, and a mapping of a whole allocation at some place in a range.
The allocation is there as long as any handle, descriptor or mapping of it is, in any process.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol


class GpuCode(IntEnum):
    """Answers of the driver that we tell apart, as CUDA numbers them."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    OPERATING_SYSTEM = 304
    INVALID_HANDLE = 400
    NOT_FOUND = 500
    ILLEGAL_ADDRESS = 700
    NOT_SUPPORTED = 801
    UNKNOWN = 999


class GpuError(Exception):
    """The driver refused a call; nothing changed, unless `code` says that all is lost.

    Attributes:
        call: What was wanted, in the words of `Gpu`.
        code: CUDA's number; a GpuCode if it is one that we tell apart.
    """

    def __init__(self, call: str, code: int, name: str = "") -> None:
        super().__init__(f"expected the GPU's driver to {call}, it answers {name or code}")
        self.call = call
        self.code = code


class GpuUnavailable(Exception):  # noqa: N818 - It names what is wrong.
    """There is no such GPU here, or no driver, or no package that speaks to it."""


class AddressTaken(Exception):  # noqa: N818 - It names what is wrong.
    """The range of addresses that was wanted is in use in this process."""


class Access(IntEnum):
    """What a process may do with what it has mapped, as CUDA numbers it."""

    NONE = 0
    READ = 1
    READ_WRITE = 3


class Vmm(Protocol):
    """Allocations of one GPU: what needs no context on it.

    All methods raise GpuError.
    """

    @property
    def uuid(self) -> str:
        """As CUDA and NVML both name it: GPU-…"""
        ...

    @property
    def granularity_bytes(self) -> int:
        """Sizes and addresses are multiples of this."""
        ...

    def create(self, size_bytes: int) -> int:
        """A handle of new memory, which reads as zeros."""
        ...

    def export(self, handle: int) -> int:
        """A new descriptor of it, which the caller closes. Not of one that was imported."""
        ...

    def release(self, handle: int) -> None:
        """Give a handle up. Mappings and descriptors of it stay good."""
        ...


class Gpu(Vmm, Protocol):
    """One GPU, with a context on it: for processes that use its memory. From any thread."""

    def import_fd(self, fd: int) -> int:
        """A handle of the allocation that this descriptor is of. The descriptor stays open."""
        ...

    def reserve(self, size_bytes: int, address: int = 0) -> int:
        """A range of addresses: at this one if it is free, else anywhere."""
        ...

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Give a range back, in which nothing is mapped."""
        ...

    def map(self, address: int, size_bytes: int, handle: int, offset: int = 0) -> None:
        """Put a whole allocation at a place in a range. Nobody may use it there yet."""
        ...

    def unmap(self, address: int, size_bytes: int) -> None:
        """Take it away; wait for the GPU first (`synchronize`)."""
        ...

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        """Say what may be done with what is mapped there: whole mappings."""
        ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes to the GPU, and wait."""
        ...

    def read(self, address: int, size_bytes: int) -> bytes:
        """Copy bytes from the GPU, and wait."""
        ...

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy on the GPU, and wait."""
        ...

    def checksums(self, addresses: Sequence[int], size_bytes: int) -> list[int]:
        """`mlh64` of the bytes at each address, a multiple of 8. Waits."""
        ...

    def copy_blocks(
        self, targets: Sequence[int], sources: Sequence[int], size_bytes: int
    ) -> list[int]:
        """Copy blocks of one size, which do not overlap; their `checksums`, as they are read.

        Addresses are multiples of 8. Unlike with `copy`, one that may not be written to ends the
        process. Waits.
        """
        ...

    def synchronize(self) -> None:
        """Wait for all that this process gave the GPU to do."""
        ...
