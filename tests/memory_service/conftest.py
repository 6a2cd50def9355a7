"""What tests of a GPU's memory share. A module that has a `service` of its own means that one."""

from collections.abc import Generator

import pytest

from tests.memory_service.gpu_service import MISSING, UUID
from tests.memory_service.processes import ServiceProcess, serving
from tests.support.fake_gpu import FakeGpu


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServiceProcess]:
    """With one GPU, and another that is not there."""
    with serving(
        tmp_path_factory.mktemp("memory"),
        *("--scrub-bytes-per-s", "0", "--gpus", f"{UUID}={64 << 20}", "--gpus", f"{MISSING}=1"),
        module="tests.memory_service.gpu_service",
    ) as service:
        yield service


@pytest.fixture
def gpu() -> Generator[FakeGpu]:
    """A process's, on which nothing is left in the end."""
    gpu = FakeGpu(UUID)
    yield gpu
    gpu.check_empty()
    gpu.check_failed()
