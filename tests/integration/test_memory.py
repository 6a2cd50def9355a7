"""Memory and gauges return to where they were.

1,500 streams show a leak of 8 KiB a stream and everything that still runs or is held; 10,000 (slow,
or `python -m tests.integration.memory`) show one of 1 KiB.
"""

from pathlib import Path

import pytest

from tests.integration import memory
from tests.integration.worlds import real_mesh


def test_1500_streams_leave_nothing_behind(tmp_path: Path) -> None:
    with real_mesh(tmp_path, **memory.SETTINGS) as world:
        figures = world.run(memory.measure(world, num_streams=1500, num_warm_up=500), limit_s=60)
    assert figures.is_ok, figures.to_json()
    assert figures.after.gauges["frontend_links_up"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_10000_streams_leave_nothing_behind(tmp_path: Path) -> None:
    with real_mesh(tmp_path, **memory.SETTINGS) as world:
        figures = world.run(
            memory.measure(world, num_streams=10_000, num_warm_up=2_000), limit_s=500
        )
    assert figures.is_ok, figures.to_json()
