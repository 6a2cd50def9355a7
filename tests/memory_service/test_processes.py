"""What a proof tells apart: a service that died, and one that is slow."""

from pathlib import Path

import pytest

from tests.memory_service.processes import Died, ServiceProcess, TooSlow, until


def test_a_service_that_died_is_not_taken_for_a_slow_one(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path, "--capacity-bytes", "1")
    with pytest.raises(Died, match="capacity"):
        service.start()
    service.close()


def test_a_slow_service_is_not_taken_for_one_that_died() -> None:
    with pytest.raises(TooSlow, match="it serves"):
        until(lambda: False, "it serves", 0.0)
