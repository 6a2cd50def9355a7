"""CUDA as `unbroken.memory.gpu` wants it, through cuda-bindings (extra `cuda`).

`CudaVmm` has no context: a process that only makes allocations takes 3 MiB of the GPU, and no fault
of another one reaches it. `CudaGpu` uses the primary context, which PyTorch uses as well.
"""

import ctypes
import importlib
import threading
import uuid as uuids
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from unbroken.memory.cuda_kernels import Checksums, asked
from unbroken.memory.gpu import Access, GpuUnavailable


def device_uuids() -> list[str]:
    """Of all GPUs of this host, in CUDA's order. Raises GpuUnavailable."""
    cu = _driver()
    (count,) = asked(cu, "count devices", cu.cuDeviceGetCount())
    return [_uuid_of(cu, _device(cu, ordinal)) for ordinal in range(count)]


class CudaVmm:
    """See `unbroken.memory.gpu.Vmm`."""

    def __init__(self, uuid: str = "") -> None:
        """The GPU of this name, or else the first. Raises GpuUnavailable."""
        cu = self._cu = _driver()
        known = device_uuids()
        if not known or (uuid and uuid not in known):
            raise GpuUnavailable(f"expected {uuid or 'a GPU'}, got {', '.join(known) or 'none'}")
        self._ordinal = known.index(uuid) if uuid else 0
        self._uuid = known[self._ordinal]
        self._device = _device(cu, self._ordinal)
        attributes = cu.CUdevice_attribute
        for what, attribute in (
            (
                "virtual memory management",
                attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            ),
            (
                "memory as file descriptors",
                attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            ),
        ):
            (has_it,) = asked(cu, "describe it", cu.cuDeviceGetAttribute(attribute, self._device))
            if not has_it:
                raise GpuUnavailable(f"expected {what} of {self._uuid}, which has none")
        self._kind = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        properties = self._properties = cu.CUmemAllocationProp()
        properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._ordinal
        properties.requestedHandleTypes = self._kind
        minimum = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        (self._granularity,) = asked(
            cu, "tell its granularity", cu.cuMemGetAllocationGranularity(properties, minimum)
        )

    @property
    def uuid(self) -> str:
        return self._uuid

    @property
    def name(self) -> str:
        """What its maker calls it."""
        (found,) = asked(self._cu, "name it", self._cu.cuDeviceGetName(128, self._device))
        return bytes(found).split(b"\0")[0].decode()

    @property
    def granularity_bytes(self) -> int:
        return self._granularity

    def create(self, size_bytes: int) -> int:
        cu = self._cu
        created = cu.cuMemCreate(size_bytes, self._properties, 0)
        (handle,) = asked(cu, f"allocate {size_bytes} bytes", created)
        return int(handle)

    def export(self, handle: int) -> int:
        cu = self._cu
        exported = cu.cuMemExportToShareableHandle(_handle(cu, handle), self._kind, 0)
        (fd,) = asked(cu, "export an allocation", exported)
        return int(fd)

    def release(self, handle: int) -> None:
        cu = self._cu
        asked(cu, "release an allocation", cu.cuMemRelease(_handle(cu, handle)))


class CudaGpu(CudaVmm):
    """See `unbroken.memory.gpu.Gpu`."""

    def __init__(self, uuid: str = "") -> None:
        """Takes the primary context, and keeps it until `close`. Raises GpuUnavailable."""
        super().__init__(uuid)
        cu = self._cu
        retained = cu.cuDevicePrimaryCtxRetain(self._device)
        (self._context,) = asked(cu, "give a context", retained)
        self._lock = threading.Lock()
        self._checksums: Checksums | None = None

    def close(self) -> None:
        """Give the context up. What is mapped goes with the last one that has it."""
        with self._lock:
            if self._checksums is not None:
                with self._current():
                    self._checksums.close()
                self._checksums = None
            self._cu.cuDevicePrimaryCtxRelease(self._device)

    def import_fd(self, fd: int) -> int:
        cu = self._cu
        with self._current():
            imported = cu.cuMemImportFromShareableHandle(fd, self._kind)
        (handle,) = asked(cu, "import an allocation", imported)
        return int(handle)

    def reserve(self, size_bytes: int, address: int = 0) -> int:
        cu = self._cu
        with self._current():
            wanted = cu.CUdeviceptr(address)
            reserved = cu.cuMemAddressReserve(size_bytes, 0, wanted, 0)
        (got,) = asked(cu, f"reserve {size_bytes} bytes of addresses", reserved)
        return int(got)

    def unreserve(self, address: int, size_bytes: int) -> None:
        cu = self._cu
        with self._current():
            freed = cu.cuMemAddressFree(cu.CUdeviceptr(address), size_bytes)
        asked(cu, "free a range of addresses", freed)

    def map(self, address: int, size_bytes: int, handle: int, offset: int = 0) -> None:
        cu = self._cu
        with self._current():
            mapped = cu.cuMemMap(
                cu.CUdeviceptr(address), size_bytes, offset, _handle(cu, handle), 0
            )
        asked(cu, f"map {size_bytes} bytes", mapped)

    def unmap(self, address: int, size_bytes: int) -> None:
        cu = self._cu
        with self._current():
            unmapped = cu.cuMemUnmap(cu.CUdeviceptr(address), size_bytes)
        asked(cu, f"unmap {size_bytes} bytes", unmapped)

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        cu = self._cu
        wanted = cu.CUmemAccessDesc()
        wanted.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = self._ordinal
        wanted.flags = cu.CUmemAccess_flags(int(access))
        with self._current():
            done = cu.cuMemSetAccess(cu.CUdeviceptr(address), size_bytes, [wanted], 1)
        asked(cu, f"allow {access.name} of {size_bytes} bytes", done)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        cu = self._cu
        with self._current(), memoryview(data) as view:
            source = bytes(view) if view.readonly else view
            if isinstance(source, bytes):
                pointer: Any = ctypes.cast(ctypes.c_char_p(source), ctypes.c_void_p).value
            else:
                pointer = ctypes.addressof(ctypes.c_char.from_buffer(source))
            written = cu.cuMemcpyHtoD(cu.CUdeviceptr(address), pointer, view.nbytes)
        asked(cu, f"write {len(data)} bytes", written)

    def read(self, address: int, size_bytes: int) -> bytes:
        cu = self._cu
        data = ctypes.create_string_buffer(size_bytes)
        with self._current():
            done = cu.cuMemcpyDtoH(ctypes.addressof(data), cu.CUdeviceptr(address), size_bytes)
        asked(cu, f"read {size_bytes} bytes", done)
        return data.raw

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        cu = self._cu
        with self._current():
            copied = cu.cuMemcpyDtoD(cu.CUdeviceptr(target), cu.CUdeviceptr(source), size_bytes)
            asked(cu, f"copy {size_bytes} bytes", copied)
            asked(cu, "copy", cu.cuStreamSynchronize(cu.CUstream(0)))

    def checksums(self, addresses: Sequence[int], size_bytes: int) -> list[int]:
        return self._of(addresses, size_bytes, None)

    def copy_blocks(
        self, targets: Sequence[int], sources: Sequence[int], size_bytes: int
    ) -> list[int]:
        assert len(targets) == len(sources), "one for each"
        return self._of(sources, size_bytes, targets)

    def _of(
        self, addresses: Sequence[int], size_bytes: int, targets: Sequence[int] | None
    ) -> list[int]:
        with self._lock, self._current():
            if self._checksums is None:
                self._checksums = Checksums(self._cu, self._device)
            return self._checksums.of(addresses, size_bytes, targets)

    def synchronize(self) -> None:
        cu = self._cu
        with self._current():
            asked(cu, "finish what it does", cu.cuCtxSynchronize())

    @contextmanager
    def _current(self) -> Generator[None]:
        """Our context for this thread; then whatever it had."""
        cu = self._cu
        asked(cu, "use its context", cu.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            cu.cuCtxPopCurrent()


def _driver() -> Any:
    """The bindings, initialised. Raises GpuUnavailable."""
    try:
        cu: Any = importlib.import_module("cuda.bindings.driver")
        answer = cu.cuInit(0)
    except ImportError as error:
        raise GpuUnavailable("expected the package cuda-bindings (extra cuda)") from error
    except RuntimeError as error:  # It finds no libcuda.
        raise GpuUnavailable(f"expected a driver of CUDA: {error}") from error
    if int(answer[0]):
        raise GpuUnavailable(f"expected a GPU, CUDA answers {answer[0].name}")
    return cu


def _device(cu: Any, ordinal: int) -> Any:
    (device,) = asked(cu, "give a device", cu.cuDeviceGet(ordinal))
    return device


def _uuid_of(cu: Any, device: Any) -> str:
    (found,) = asked(cu, "name a device", cu.cuDeviceGetUuid(device))
    return f"GPU-{uuids.UUID(bytes=bytes(found.bytes)[:16])}"


def _handle(cu: Any, handle: int) -> Any:
    return cu.CUmemGenericAllocationHandle(handle)
