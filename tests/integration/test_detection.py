"""Failures that do not say so: a sidecar that stands still, a request that kills its engines."""

import asyncio
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import World, real_mesh
from unbroken.errors import Reason, UnbrokenError
from unbroken.history import History
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import worker_pb2

DEADLY_TOKEN = 7
"""A control character: prompts have it if they mean to, outputs never."""
NUM_STREAMS = 8
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 120}
GAP_S_MAX = 5.0
"""Machines that run tests are busy; benchmarks measure how long it takes."""


@pytest.fixture(scope="module")
def world(each_edge: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp(each_edge),
        num_workers=2,
        is_emptied=True,
        engine_options=f"--step-base-ms 10 --crash-on-token {DEADLY_TOKEN}",
    ) as world:
        yield world


async def until_all_serve(world: World) -> list[admin_pb.WorkerInfo]:
    while True:
        workers = list(await world.client.list_workers())
        if all(
            one.link == admin_pb.LINK_STATE_UP
            and one.liveness == admin_pb.LIVENESS_ALIVE
            and one.engine == worker_pb2.ENGINE_STATE_SERVING
            for one in workers
        ):
            return workers
        await asyncio.sleep(0.02)


def readers(world: World) -> list[Reader]:
    return [
        Reader(world, world.client.generate(token_ids=[500, 600 + index], timeout_s=25, **GREEDY))
        for index in range(NUM_STREAMS)
    ]


async def undisturbed(world: World) -> list[History]:
    return await asyncio.gather(*(it.to_the_end() for it in readers(world)))


def is_stopped(pid: int) -> bool:
    """Whether the kernel runs nothing of it."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


def test_streams_leave_a_sidecar_that_stands_still_and_it_comes_back(world: World) -> None:
    async def scenario() -> None:
        await until_all_serve(world)
        expected = await undisturbed(world)
        reading = readers(world)
        for it in reading:
            await it.until(20)
        pid = world.mesh.workers["w1"].sidecar_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            while not is_stopped(pid):  # noqa: ASYNC110 - A signal takes its time.
                await asyncio.sleep(0.002)
            seen = await asyncio.gather(*(it.to_the_end() for it in reading))
        finally:
            os.kill(pid, signal.SIGCONT)
        moved = 0
        gaps_s: list[float] = []
        for one, other in zip(seen, expected, strict=True):
            assert one.finished is not None
            losses = [attempt for attempt in one.finished.attempts if attempt.failure]
            assert_equal(one, other, num_migrations=len(losses))
            for loss in losses:
                moved += 1
                assert loss.failure == worker_pb2.FAILURE_KIND_HANG, loss
                assert "nothing received" in loss.detail
                gaps_s.append(one.choices[0].gap_s(loss.end_offset) or 0.0)
        assert moved >= NUM_STREAMS // 4, "the stop took effect"
        sys.stdout.write(f"\nstood still for {min(gaps_s):.2f} to {max(gaps_s):.2f} s")
        assert max(gaps_s) < GAP_S_MAX
        await until_all_serve(world)
        assert await undisturbed(world) is not None

    world.run(scenario())


def test_a_query_of_death_is_named_before_it_walks_through_the_fleet(world: World) -> None:
    async def scenario() -> None:
        await until_all_serve(world)
        expected = await undisturbed(world)
        before = {one.record.identity.worker_id: one for one in await until_all_serve(world)}
        reading = readers(world)
        for it in reading:
            await it.until(10)
        rest = [asyncio.create_task(it.to_the_end()) for it in reading]
        lost: list[str] = []
        for request_id in ("bad", "again"):
            stream = world.client.generate(
                token_ids=[500, DEADLY_TOKEN, 501], request_id=request_id, timeout_s=25, **GREEDY
            )
            with pytest.raises(UnbrokenError) as caught:
                await Reader(world, stream).to_the_end()
            assert caught.value.reason is Reason.QUERY_OF_DEATH, caught.value
            lost.append(caught.value.metadata["workers_lost"])
        assert lost == ["3", "3"]
        for task, other in zip(rest, expected, strict=True):
            one = await task
            assert one.difference(other).is_none, one.difference(other)
        after = await until_all_serve(world)
        assert len(after) == len(before)
        assert any(
            one.record.engine_pgid != before[one.record.identity.worker_id].record.engine_pgid
            for one in after
        ), "an engine died"

    world.run(scenario())
