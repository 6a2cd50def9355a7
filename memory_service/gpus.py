"""The GPUs whose memory a service gives out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from memory_service import cuda
from memory_service.accounts import Device, Limits, MemoryKind
from memory_service.backend import Backend
from memory_service.config import MemoryConfig
from memory_service.gpu_health import Event
from memory_service.nvml import NvmlWatch
from unbroken import log
from unbroken.memory.gpu import GpuError, GpuUnavailable, Vmm

_log = log.get_logger(__name__)


def _cuda(uuid: str) -> Vmm:
    from unbroken.memory.cuda import CudaVmm  # With numpy; and a host without GPUs needs neither.

    return CudaVmm(uuid)


@dataclass(frozen=True, slots=True)
class Driver:
    """What speaks to them."""

    open: Callable[[str], Vmm]
    """By UUID. Raises GpuUnavailable."""
    made_of: str
    """See `CudaBackend`."""
    seal_is_proof: Callable[[], bool]
    """See `memory_service.cuda`."""


CUDA: Final = Driver(_cuda, cuda.MADE_OF, cuda.seal_is_proof)


class Gpus:
    """Those that are configured and there: one that is not costs the host's memory nothing.

    Attributes:
        backends: Of each.
        limits: Of each.
        absent: Those that are not there.
        seal_is_proof: Whether a sealed lifeline proves that work of a GPU is over, if there is one.
    """

    def __init__(self, config: MemoryConfig, driver: Driver = CUDA) -> None:
        self.backends: dict[Device, Backend] = {}
        self.limits: dict[Device, Limits] = {}
        self.absent: set[str] = set()
        for uuid, num_bytes in config.gpu_bytes().items():
            try:
                vmm = driver.open(uuid)
            except (GpuUnavailable, GpuError) as error:
                _log.error("GPU is not there; going on without it", gpu=uuid, detail=str(error))
                self.absent.add(uuid)
                continue
            device = Device(MemoryKind.CUDA, uuid, vmm.granularity_bytes)
            self.backends[device] = cuda.CudaBackend(vmm, made_of=driver.made_of)
            self.limits[device] = Limits(
                num_bytes,
                config.gpu_quota_bytes,
                config.tenant_gpu_quotas(),
                config.high_share,
                config.low_share,
            )
            _log.info("GPU is there", gpu=uuid, capacity_bytes=num_bytes)
        self.seal_is_proof = not self.backends or driver.seal_is_proof()
        if not self.seal_is_proof:
            _log.warning("a sealed lifeline proves nothing here; only the end of a process does")
        self._watch: NvmlWatch | None = None

    def watch(self, tell: Callable[[str, Event], None]) -> None:
        """Have the driver's news of them told, by UUID, in a thread of their own."""
        if not self.backends:
            return
        uuids = [device.uuid for device in self.backends]
        try:
            self._watch = NvmlWatch(uuids, tell)
        except GpuUnavailable as error:
            _log.error("nobody tells how GPUs are", detail=str(error))
            return
        for uuid in uuids:
            if not self._watch.is_kept_up(uuid):
                _log.warning(
                    "expected persistence mode, to keep memory without a process", gpu=uuid
                )
        self._watch.start()

    def close(self) -> None:
        """Listen no more. Idempotent."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
