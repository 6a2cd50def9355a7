"""A mesh is restarted as a whole, one process after the other, under streams that go on."""

import asyncio
from pathlib import Path

import pytest
import uvloop

from benchmarks.rollout import play
from tests.integration.worlds import real_mesh
from unbroken.discovery import connect
from unbroken.errors import Reason, UnbrokenError
from unbroken.rollout import roll_out, whole_frontends
from unbroken.v1 import worker_pb2


def test_nobody_loses_anything_by_the_restart_of_a_whole_mesh(tmp_path: Path) -> None:
    result = uvloop.run(
        asyncio.wait_for(
            play(tmp_path, num_workers=2, num_frontends=2, num_streams=12, step_ms=50), 90
        )
    )
    assert result.errors == []
    assert (result.lost, result.duplicated, result.changed) == (0, 0, 0)
    assert [one.name for one in result.replaced] == ["w1", "w2", "f1", "f2"]
    assert [one.num_cut for one in result.replaced] == [0] * 4
    assert sorted(result.statuses) == [("f1", 0), ("f2", 0), ("w1", 0), ("w2", 0)]


def test_a_mesh_that_starts_nothing_again_loses_one_process_and_no_more(tmp_path: Path) -> None:
    with real_mesh(tmp_path, num_workers=2, num_frontends=1) as world:

        async def scenario() -> None:
            with pytest.raises(UnbrokenError) as error:
                await roll_out(connect(world.mesh.directory), ready_timeout_s=1.0)
            assert error.value.reason is Reason.DEADLINE_EXCEEDED
            assert set(world.mesh.workers) == {"w2"}
            assert await world.client.generate(token_ids=[1], max_tokens=3).text()

        world.run(scenario())


def test_the_processes_of_a_frontend_are_replaced_by_it() -> None:
    def at(address: str) -> worker_pb2.FrontendRecord:
        return worker_pb2.FrontendRecord(address=address)

    members = {"f1": at("a:1"), "f1.1": at("a:1"), "f1.2": at("a:1"), "g.1": at("b:1")}
    assert whole_frontends(members) == ["f1", "g.1"]
    assert whole_frontends({**members, "g": at("c:1")}) == ["f1", "g.1", "g"]
