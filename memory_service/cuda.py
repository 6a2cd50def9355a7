"""Memory of a GPU: one allocation a slab, which is exported once and then lives by its descriptors.

The service maps none of it and has no context on the GPU, so no fault there reaches it, and it
needs 3 MiB of the GPU's memory. It keeps no handle either: the descriptor alone keeps the memory,
also when the service and all who mapped it are gone, and what was imported cannot be exported
again. So a service that gets its descriptors back from the vault is where it was.

Nothing can be sealed here. Whoever was given a descriptor may map it for writing. So what was
sealed is compared with its checksum by those who read it, on the GPU, and what a dead process had
is given to others only when it is proved that it is gone.
"""

import errno
import os
from pathlib import Path
from typing import Final

from memory_service.backend import Allocation
from unbroken.memory.gpu import GpuCode, GpuError, Vmm

MADE_OF: Final = "/dev/nvidiactl"
"""What the descriptors of CUDA's allocations are of."""
_HOLDS_ON: Final = Path("/sys/module/nvidia_uvm/parameters/uvm_enable_va_space_mm")


def seal_is_proof() -> bool:
    """Whether a sealed lifeline proves, on this host, that a process's GPU work is over.

    The driver stops a dead process's channels before it lets go of its address space if it
    holds on to that at all, which is a setting of its, and if they are that process's own: under
    MPS they are the MPS server's.
    """
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    try:
        holds_on = _HOLDS_ON.read_text().strip() == "1"
    except OSError:
        holds_on = False
    return holds_on and not (pipes / "control").exists()


class CudaBackend:
    """See `memory_service.backend.Backend`."""

    is_readable = False
    is_slow = True
    """A call takes 20 to 60 ms while some process that uses the GPU dies."""

    def __init__(self, vmm: Vmm, *, made_of: str = MADE_OF) -> None:
        """`made_of` begins the name that the kernel has for descriptors of allocations."""
        self._vmm = vmm
        self._made_of = made_of

    def allocate(self, size_bytes: int, name: str) -> Allocation:
        """The driver hands memory out cleared, whoever had it before. `name` is not kept."""
        del name
        unit = self._vmm.granularity_bytes
        try:
            handle = self._vmm.create(-(-size_bytes // unit) * unit)
            try:
                fd = self._vmm.export(handle)
            finally:
                self._vmm.release(handle)
        except GpuError as error:
            is_full = error.code == GpuCode.OUT_OF_MEMORY
            raise OSError(errno.ENOMEM if is_full else errno.EIO, str(error)) from error
        os.set_inheritable(fd, False)
        return Allocation(fd, size_bytes)

    def adopt(self, fd: int, size_bytes: int) -> Allocation:
        """Its size is what the vault says: the kernel does not know it."""
        seen = os.readlink(f"/proc/self/fd/{fd}")
        if not seen.startswith(self._made_of):
            raise OSError(errno.EBADF, f"expected a descriptor of {self._made_of}, got {seen}")
        return Allocation(fd, size_bytes)

    def read_only(self, allocation: Allocation) -> int:
        """The same for all: the driver knows no other, and one that is opened anew is of no use."""
        return os.dup(allocation.fd)

    def seal(self, allocation: Allocation) -> bool:
        """Always: the fence of the owner is the proof, and readers compare."""
        del allocation
        return True

    def view(self, allocation: Allocation) -> memoryview:
        """Never: who wants to look at the bytes needs a context."""
        raise AssertionError(f"expected a memory that is readable, got descriptor {allocation.fd}")

    def free(self, allocation: Allocation) -> None:
        os.close(allocation.fd)
