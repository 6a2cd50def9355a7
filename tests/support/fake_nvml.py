"""NVML without a GPU: what the real bindings (`pynvml`) call instead of the driver's library."""

import contextlib
import ctypes
import importlib
import queue
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

nvml: Final[Any] = importlib.import_module("pynvml")


@dataclass(slots=True)
class FakeDevice:
    """One GPU, as it is now."""

    uuid: str
    is_pending: bool = False
    has_failed: bool = False
    action: int = 0
    is_lost: bool = False
    used_bytes: int = 615 << 20
    is_persistent: bool = True
    types: int = 0xFF9F
    """Of events that it supports, as an H200 does."""
    registered: int = 0


class FakeNvml:
    """Its attributes are the library's functions, as far as they are used; others are not found."""

    def __init__(self, *devices: FakeDevice) -> None:
        self.devices = devices
        self.num_open = 0
        self._news: queue.Queue[tuple[int, int, int]] = queue.Queue()

    def tell(self, number: int, kind: int, data: int = 0) -> None:
        """Something happened to this device, if anybody wants to know."""
        if self.devices[number].registered & kind:
            self._news.put((number, kind, data))

    def _device(self, handle: Any) -> FakeDevice:
        return self.devices[_number(handle)]

    def nvmlInitWithFlags(self, _flags: int) -> int:  # noqa: N802
        self.num_open += 1
        return int(nvml.NVML_SUCCESS)

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.num_open -= 1
        return int(nvml.NVML_SUCCESS)

    def nvmlEventSetCreate(self, found: Any) -> int:  # noqa: N802
        self.num_open += 1
        del found
        return int(nvml.NVML_SUCCESS)

    def nvmlEventSetFree(self, _set: Any) -> int:  # noqa: N802
        self.num_open -= 1
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, found: Any) -> int:  # noqa: N802
        for number, device in enumerate(self.devices):
            if device.uuid.encode() == uuid.value:
                address = ctypes.cast(found, ctypes.POINTER(ctypes.c_void_p))
                address[0] = ctypes.c_void_p((number + 1) << 12)
                return int(nvml.NVML_SUCCESS)
        return int(nvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetSupportedEventTypes(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = self._device(handle).types
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceRegisterEvents(self, handle: Any, types: Any, _set: Any) -> int:  # noqa: N802
        device = self._device(handle)
        if types.value & ~device.types:
            return int(nvml.NVML_ERROR_NOT_SUPPORTED)
        device.registered = types.value
        return int(nvml.NVML_SUCCESS)

    def nvmlEventSetWait_v2(self, _set: Any, found: Any, timeout_ms: Any) -> int:  # noqa: N802
        try:
            number, kind, data = self._news.get(timeout=timeout_ms.value / 1000)
        except queue.Empty:
            return int(nvml.NVML_ERROR_TIMEOUT)
        news = found._obj
        address = ctypes.cast(ctypes.byref(news), ctypes.POINTER(ctypes.c_void_p))
        address[0] = ctypes.c_void_p((number + 1) << 12)  # Its first member is the device.
        news.eventType, news.eventData = kind, data
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceGetRemappedRows(  # noqa: N802
        self, handle: Any, _corrected: Any, _uncorrected: Any, pending: Any, failed: Any
    ) -> int:
        device = self._device(handle)
        if device.is_lost:
            return int(nvml.NVML_ERROR_GPU_IS_LOST)
        pending._obj.value, failed._obj.value = device.is_pending, device.has_failed
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceGetFieldValues(self, handle: Any, count: Any, found: Any) -> int:  # noqa: N802
        assert count.value == 1
        value = found._obj[0]
        if value.fieldId != nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION:
            value.nvmlReturn = nvml.NVML_ERROR_NOT_SUPPORTED
        else:
            value.nvmlReturn = nvml.NVML_SUCCESS
            value.value.uiVal = self._device(handle).action
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.used = self._device(handle).used_bytes
        return int(nvml.NVML_SUCCESS)

    def nvmlDeviceGetPersistenceMode(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = self._device(handle).is_persistent
        return int(nvml.NVML_SUCCESS)


@contextlib.contextmanager
def nvml_of(*devices: FakeDevice) -> Generator[FakeNvml]:
    """The bindings speak to this one meanwhile; at the end nothing of it is open."""
    fake = FakeNvml(*devices)
    before = nvml.nvmlLib
    nvml.nvmlLib = fake
    nvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield fake
        assert fake.num_open == 0, "everything is closed"
    finally:
        nvml.nvmlLib = before
        nvml._nvmlGetFunctionPointer_cache.clear()


def _number(handle: Any) -> int:
    address = ctypes.cast(handle, ctypes.c_void_p).value
    assert address is not None
    return (address >> 12) - 1
