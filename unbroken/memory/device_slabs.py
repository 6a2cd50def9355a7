"""Slabs of a GPU in the addresses of this process, one after the other: all of them, or none.

The range of addresses can be kept while nothing is mapped there (`unmap`), and be filled again
(`map`): what computes there, such as a captured graph of kernels, finds its memory where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbroken.memory.gpu import Access, AddressTaken, Gpu, GpuError


@dataclass(frozen=True, slots=True)
class DeviceSlab:
    """One slab, where this process has it: as long as the `DeviceSlabs` that it is of says so."""

    address: int
    size_bytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For PyTorch and CuPy, an array of bytes: `torch.as_tensor(slab, device="cuda")`.

        It says that it may be written to, since PyTorch knows no other arrays; where it may not, a
        kernel that does ends its process.
        """
        return {
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


class DeviceSlabs:
    """A range of addresses for slabs of these sizes: multiples of the GPU's granularity."""

    def __init__(self, gpu: Gpu, sizes: Sequence[int], *, address: int = 0) -> None:
        """Reserve the range, at this address if one is given. Raises GpuError, AddressTaken."""
        self._gpu = gpu
        self._sizes = tuple(sizes)
        self._mapped: list[DeviceSlab] = []
        self.size_bytes = sum(sizes)
        self.address = gpu.reserve(self.size_bytes, address)
        if address and self.address != address:
            gpu.unreserve(self.address, self.size_bytes)
            raise AddressTaken(f"expected address {address:#x}, got {self.address:#x}")

    @property
    def slabs(self) -> Sequence[DeviceSlab]:
        """What is mapped now."""
        return tuple(self._mapped)

    def map(self, fds: Sequence[int], access: Access) -> None:
        """Map what these descriptors are of, which stay the caller's. All or, on GpuError, none."""
        assert not self._mapped, "mapped once"
        gpu, address = self._gpu, self.address
        try:
            for fd, size in zip(fds, self._sizes, strict=True):
                handle = gpu.import_fd(fd)
                try:
                    gpu.map(address, size, handle)
                finally:
                    gpu.release(handle)  # The mapping keeps it.
                self._mapped.append(DeviceSlab(address, size))
                address += size
            gpu.set_access(self.address, self.size_bytes, access)
        except GpuError:
            self._unmap()
            raise

    def unmap(self) -> None:
        """Take the memory away, when the GPU has done what it was given; the range stays ours."""
        self._gpu.synchronize()
        self._unmap()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._mapped:
            self.unmap()
        if self.address:
            self._gpu.unreserve(self.address, self.size_bytes)
            self.address = 0

    def _unmap(self) -> None:
        while self._mapped:
            slab = self._mapped[-1]
            self._gpu.unmap(slab.address, slab.size_bytes)
            self._mapped.pop()
