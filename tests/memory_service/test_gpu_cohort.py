"""A model that is split over two GPUs: its ranks' pools are adopted together or not at all.

Two fake GPUs between real processes; `tests.gpu.cohort` does the same with real ones.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from tests.gpu.cohort import Rank, life
from tests.memory_service.processes import ServiceProcess, serving
from unbroken.errors import Reason

UUIDS = tuple(f"GPU-fa4efa4e-0000-0000-0000-00000000000{number}" for number in (1, 2))
TOO_EARLY_S = 0.3


def services(directory: Path) -> AbstractContextManager[ServiceProcess]:
    gpus = [flag for uuid in UUIDS for flag in ("--gpus", f"{uuid}={64 << 20}")]
    return serving(directory, *gpus, module="tests.memory_service.gpu_service")


def adopters(service: ServiceProcess) -> list[Rank]:
    return life(service.socket, UUIDS, "second", is_fake=True)


def test_pools_of_all_ranks_are_adopted_when_all_ranks_are_dead(tmp_path: Path) -> None:
    with services(tmp_path) as service:
        owners = life(service.socket, UUIDS, "first", is_fake=True)
        written = [rank.ask("write") for rank in owners]
        assert written[0] != written[1], "each has its own"
        nexts = adopters(service)
        owners[0].kill()
        for rank in nexts:  # Rank 1 lives, and may write to what belongs to the KV of rank 0.
            assert rank.ask("adopt", TOO_EARLY_S) == Reason.NOT_FENCED.value
        owners[1].kill()
        assert [rank.ask("adopt", 20.0) for rank in nexts] == written
        for rank in nexts:
            rank.kill()
