"""`python -m tests.memory_service.gpu_service`: a memory service whose GPUs are fakes.

On SIGUSR1 its first GPU reports Xid 95: a memory error that was not contained.
"""

import asyncio
import signal
import sys

import uvloop

from memory_service.config import MemoryConfig
from memory_service.gpus import Driver
from memory_service.service import serve
from tests.support.fake_gpu import MADE_OF, FakeGpu
from tests.support.fake_nvml import FakeDevice, nvml, nvml_of
from unbroken import log
from unbroken.config import load
from unbroken.memory.gpu import GpuUnavailable, Vmm

UUID = "GPU-fa4efa4e-0000-0000-0000-000000000001"
MISSING = "GPU-missing"


def opened(uuid: str) -> Vmm:
    if uuid == MISSING:
        raise GpuUnavailable("there is no such GPU")
    return FakeGpu(uuid)


async def served(config: MemoryConfig) -> int:
    uuids = [uuid for uuid in config.gpu_bytes() if uuid != MISSING]
    with nvml_of(*map(FakeDevice, uuids)) as fake:
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGUSR1, fake.tell, 0, nvml.nvmlEventTypeXidCriticalError, 95
        )
        return await serve(config, Driver(opened, MADE_OF, lambda: True))


def main() -> int:
    """As `python -m memory_service`."""
    config = load(MemoryConfig, sys.argv[1:], prog="memory_service")
    log.configure("memory_service", config.log_level, config.log_format)
    return uvloop.run(served(config))


if __name__ == "__main__":
    sys.exit(main())
