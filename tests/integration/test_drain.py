"""Workers are drained under streams, by call and by signal, and nothing is lost or repeated."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from tests.integration.readers import Reader
from tests.integration.worlds import World, real_mesh
from unbroken.discovery import connect
from unbroken.drain import drain_worker
from unbroken.v1 import sidecar_service_pb2 as pb
from unbroken.v1 import worker_pb2

NUM_STREAMS = 8
DRAIN = worker_pb2.FAILURE_KIND_DRAIN


def reader(world: World, index: int, **options: Any) -> Reader:
    given: dict[str, Any] = {
        "token_ids": [300 + index, 301],
        "temperature": 0.8,
        "seed": index,
        "ignore_eos": True,
        "max_tokens": 20_000,
        **options,
    }
    return Reader(world, world.client.generate(timeout_s=60, **given))


async def workers_of(world: World) -> set[str]:
    """Where the streams are."""
    streams = [stream async for stream in world.client.list_streams()]
    return {choice.worker.worker_id for stream in streams for choice in stream.choices}


async def until_draining(world: World) -> None:
    """Until the frontend knows it of a worker."""
    while not any(  # noqa: ASYNC110 - Nothing announces it.
        worker.is_draining for worker in await world.client.list_workers()
    ):
        await asyncio.sleep(0.005)


def test_a_rolling_drain_loses_nothing_repeats_nothing_and_fails_nothing(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        where = connect(world.mesh.directory)
        readers = [reader(world, index) for index in range(NUM_STREAMS)]
        await asyncio.gather(*(it.until(5) for it in readers))
        is_over = asyncio.Event()

        async def read(it: Reader) -> None:
            while not is_over.is_set():
                await it.until(it.history.num_tokens + 1)
            await it.until(it.history.num_tokens + 5)

        reading = [asyncio.create_task(read(it)) for it in readers]
        handed_over = 0
        for worker_id, others in (("w1", {"w2", "w3"}), ("w2", {"w3"})):
            drained = await drain_worker(where, worker_id, policy=pb.DRAIN_POLICY_HAND_OVER)
            assert drained.num_handed_over
            assert drained.num_finished == 0
            handed_over += drained.num_handed_over
            assert await world.mesh.until_one_ends() == (worker_id, 0)
            while not await workers_of(world) <= others:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.01)
        is_over.set()
        await asyncio.gather(*reading)
        failures: list[int] = []
        for it in readers:
            info = await world.client.get_stream(it.stream.request_id)
            failures += [attempt.failure for attempt in info.attempts if attempt.failure]
            await it.stream.cancel()
        assert failures == [DRAIN] * handed_over
        lengths = [it.history.num_tokens for it in readers]
        undisturbed = [
            reader(world, index, max_tokens=length) for index, length in enumerate(lengths)
        ]
        expected = await asyncio.gather(*(it.to_the_end() for it in undisturbed))
        for it, history in zip(readers, expected, strict=True):
            seen, wanted = it.history.choices[0], history.choices[0]
            assert seen.offsets == list(range(len(seen.offsets)))
            assert seen.token_ids == wanted.token_ids

    with real_mesh(tmp_path, num_workers=3, engine_options="--step-base-ms 10") as world:
        world.run(scenario(world), limit_s=60)


def test_streams_may_finish_where_they_are_while_new_ones_go_elsewhere(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        where = connect(world.mesh.directory)
        readers = [reader(world, index, max_tokens=200) for index in range(4)]
        await asyncio.gather(*(it.until(5) for it in readers))
        before = {it.stream.request_id: await it.worker() for it in readers}
        worker_id = before[readers[0].stream.request_id]
        told: list[pb.DrainResponse] = []
        finish = pb.DRAIN_POLICY_FINISH
        draining = asyncio.create_task(
            drain_worker(where, worker_id, policy=finish, tell=told.append)
        )
        await until_draining(world)
        late = [reader(world, 10 + index, max_tokens=5) for index in range(4)]
        for history in await asyncio.gather(*(it.to_the_end() for it in late)):
            assert history.finished is not None
            (attempt,) = history.finished.attempts
            assert attempt.worker.worker_id != worker_id
        for history in await asyncio.gather(*(it.to_the_end() for it in readers)):
            assert history.finished is not None
            assert history.started is not None
            (attempt,) = history.finished.attempts
            assert attempt.worker.worker_id == before[history.started.request_id]
            assert not attempt.failure
        drained = await draining
        there = [name for name in before.values() if name == worker_id]
        assert (drained.num_finished, drained.num_handed_over) == (len(there), 0)
        assert told[0].phase == pb.DRAIN_PHASE_FINISHING
        assert told[0].num_attempts == len(there)
        assert told[-1].phase == pb.DRAIN_PHASE_STOPPING
        assert told[-1].num_attempts == 0
        assert await world.mesh.until_one_ends() == (worker_id, 0)

    with real_mesh(tmp_path, num_workers=2, engine_options="--step-base-ms 10") as world:
        world.run(scenario(world))


def test_a_signal_in_a_drain_that_was_asked_for_makes_it_urgent(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        where = connect(world.mesh.directory)
        it = reader(world, 1)
        await it.until(5)
        worker_id = await it.worker()
        pid = world.mesh.workers[worker_id].sidecar_pid
        told = asyncio.Event()
        draining = asyncio.create_task(
            drain_worker(where, worker_id, policy=pb.DRAIN_POLICY_FINISH, tell=lambda _: told.set())
        )
        await told.wait()
        await it.until(20)
        assert await it.worker() == worker_id, "it may finish there"
        os.kill(pid, signal.SIGTERM)
        drained = await draining
        assert (drained.num_finished, drained.num_handed_over) == (0, 1)
        assert await world.mesh.until_one_ends() == (worker_id, 0)
        await it.until(it.history.num_tokens + 20)
        assert await it.worker() != worker_id
        await it.stream.cancel()

    with real_mesh(tmp_path, num_workers=2, engine_options="--step-base-ms 10") as world:
        world.run(scenario(world))
