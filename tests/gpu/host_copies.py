"""Copies from the host's memory to a GPU: from what is pinned, and from what is sealed."""

import importlib
import mmap
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from unbroken.memory.cuda import CudaGpu, device_uuids
from unbroken.memory.cuda_kernels import asked

_READ_ONLY: Final = 8
"""CU_MEMHOSTREGISTER_READ_ONLY: the only way in which sealed memory can be registered."""


class HostCopies:
    """Seconds of the fastest of some copies."""

    def __init__(self, gpu: CudaGpu) -> None:
        cu: Any = importlib.import_module("cuda.bindings.driver")
        self._cu = cu
        self._gpu = gpu
        ordinal = device_uuids().index(gpu.uuid)
        (device,) = asked(cu, "give a device", cu.cuDeviceGet(ordinal))
        (context,) = asked(cu, "give a context", cu.cuDevicePrimaryCtxRetain(device))
        asked(cu, "use its context", cu.cuCtxSetCurrent(context))

    def pinned(self, target: int, size_bytes: int, rounds: int) -> float:
        """From memory that the driver allocates."""
        cu = self._cu
        (source,) = asked(cu, "allocate on the host", cu.cuMemHostAlloc(size_bytes, 0))
        try:
            return self._best(lambda: self._copy(target, int(source), size_bytes), rounds)
        finally:
            asked(cu, "free on the host", cu.cuMemFreeHost(source))

    def registered(self, source: mmap.mmap, target: int, size_bytes: int, rounds: int) -> float:
        """From a mapping that can only be read."""
        cu = self._cu
        view = np.frombuffer(source, dtype=np.uint8)
        address = view.ctypes.data
        asked(cu, "register", cu.cuMemHostRegister(address, size_bytes, _READ_ONLY))
        try:
            return self._best(lambda: self._copy(target, address, size_bytes), rounds)
        finally:
            asked(cu, "unregister", cu.cuMemHostUnregister(address))

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        cu = self._cu
        copied = cu.cuMemcpyHtoDAsync(cu.CUdeviceptr(target), source, size_bytes, cu.CUstream(0))
        asked(cu, "copy from the host", copied)
        self._gpu.synchronize()

    def _best(self, work: Callable[[], None], rounds: int) -> float:
        seconds: list[float] = []
        for _ in range(max(3, rounds)):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return min(seconds)
