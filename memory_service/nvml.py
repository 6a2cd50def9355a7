"""Listens to the driver's news of GPUs (NVML), in a thread of its own; `gpu_health` judges them."""

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from memory_service.gpu_health import Event, Gone, Poison, Recovery, Rows, Xid
from unbroken import log
from unbroken.memory.gpu import GpuUnavailable

WAIT_MS: Final = 200
"""So long a wait for news goes on when the service wants to end."""
LOOK_EVERY: Final = 25
"""So many waits without news, until what is no news is looked at."""

_EVENT_TYPES: Final = (
    "XidCriticalError",
    "NonFatalPoisonError",
    "FatalPoisonError",
    "DramRetirementEvent",
    "DramRetirementFailure",
    "GpuUnavailableError",
    "GpuRecoveryAction",
)

_log = log.get_logger(__name__)


class NvmlWatch:
    """Tells of some GPUs, by UUID, until it is closed."""

    def __init__(self, uuids: Sequence[str], tell: Callable[[str, Event], None]) -> None:
        """`tell` is called in the thread. Raises GpuUnavailable."""
        self._nvml = nvml = _bindings()
        self._tell = tell
        self._is_over = threading.Event()
        self._devices: dict[str, Any] = {}
        self._lost: set[str] = set()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise GpuUnavailable(f"expected NVML: {error}") from error
        self._set = nvml.nvmlEventSetCreate()
        try:
            for uuid in uuids:
                self._devices[uuid] = self._registered(uuid)
        except nvml.NVMLError as error:
            nvml.nvmlEventSetFree(self._set)
            nvml.nvmlShutdown()
            raise GpuUnavailable(f"expected NVML to tell of {', '.join(uuids)}: {error}") from error
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        """Begin with what is known already."""
        self._thread.start()

    def close(self) -> None:
        """End, within a wait. Idempotent."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._nvml.nvmlEventSetFree(self._set)
        self._nvml.nvmlShutdown()

    def used_bytes(self, uuid: str) -> int:
        """Of the whole GPU, by everybody."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._devices[uuid]).used)

    def is_kept_up(self, uuid: str) -> bool:
        """Whether the driver keeps the GPU up when no process has it open (persistence mode).

        Otherwise memory that lives by its descriptor alone is not known to survive.
        """
        nvml = self._nvml
        try:
            return bool(nvml.nvmlDeviceGetPersistenceMode(self._devices[uuid]))
        except nvml.NVMLError:
            return False

    def _registered(self, uuid: str) -> Any:
        nvml = self._nvml
        device = nvml.nvmlDeviceGetHandleByUUID(uuid)
        wanted = 0
        for name in _EVENT_TYPES:
            wanted |= self._type(name)
        known = nvml.nvmlDeviceGetSupportedEventTypes(device)
        nvml.nvmlDeviceRegisterEvents(device, wanted & known, self._set)
        return device

    def _type(self, name: str) -> int:
        """The bit of these events; 0 if the bindings are older than they."""
        return int(getattr(self._nvml, f"nvmlEventType{name}", 0))

    def _run(self) -> None:
        nvml, num_quiet = self._nvml, 0
        self._look()
        while not self._is_over.is_set():
            try:
                news = nvml.nvmlEventSetWait_v2(self._set, WAIT_MS)
            except nvml.NVMLError_Timeout:
                num_quiet += 1
                if num_quiet % LOOK_EVERY == 0:
                    self._look()
            except nvml.NVMLError as error:
                _log.error("no news of GPUs", detail=str(error))
                self._look()
                self._is_over.wait(WAIT_MS / 1000)
            else:
                self._heard(news)

    def _heard(self, news: Any) -> None:
        uuid = self._uuid_of(news.device)
        if uuid is None:
            return
        event: Event | None = None
        kind = int(news.eventType)
        match next((name for name in _EVENT_TYPES if self._type(name) == kind), ""):
            case "XidCriticalError":
                event = Xid(int(news.eventData))
            case "NonFatalPoisonError":
                event = Poison(is_contained=True)
            case "FatalPoisonError":
                event = Poison(is_contained=False)
            case "GpuUnavailableError":
                event = Gone()
            case _:
                pass
        if event is not None:
            self._tell(uuid, event)
        self._look()

    def _look(self) -> None:
        """At what has a state, whether there was news of it or not."""
        for uuid, device in self._devices.items():
            if uuid in self._lost:
                continue
            for event in self._seen(device):
                if isinstance(event, Gone):
                    self._lost.add(uuid)
                self._tell(uuid, event)

    def _seen(self, device: Any) -> Iterator[Event]:
        nvml = self._nvml
        try:
            _, _, is_pending, has_failed = nvml.nvmlDeviceGetRemappedRows(device)
            yield Rows(bool(is_pending), bool(has_failed))
        except nvml.NVMLError_GpuIsLost:
            yield Gone()
            return
        except nvml.NVMLError:
            pass  # It has no spare rows.
        field = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
        if field is None:
            return  # Older bindings.
        try:
            (value,) = nvml.nvmlDeviceGetFieldValues(device, [field])
            if value.nvmlReturn == nvml.NVML_SUCCESS:
                yield Recovery(int(value.value.uiVal))
        except nvml.NVMLError_GpuIsLost:
            yield Gone()
        except nvml.NVMLError:
            pass  # An older driver.

    def _uuid_of(self, device: Any) -> str | None:
        address = ctypes.cast(device, ctypes.c_void_p).value
        for uuid, one in self._devices.items():
            if ctypes.cast(one, ctypes.c_void_p).value == address:
                return uuid
        return None


def _bindings() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise GpuUnavailable("expected the package nvidia-ml-py (extra cuda)") from error
