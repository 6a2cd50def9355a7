"""Real processes are killed under streams, and the streams equal undisturbed runs.

The moment of a kill is a number of tokens that the client has read, not a time. benchmarks/ kills
far more, under load.
"""

import asyncio
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import World, real_mesh
from unbroken.chaos.processes import is_alive
from unbroken.errors import Reason, UnbrokenError
from unbroken.history import History
from unbroken.mesh import Target
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

WORKER_IDS = ["w1", "w2", "w3"]
NUM_TOKENS = 24
PROMPT = list(range(300, 1100))
"""Long enough to be killed in its prefill: 50 steps, 0.7 s, where none of it is cached."""
ENGINE_OPTIONS = "--step-base-ms 10 --prefill-tokens-per-s 4000 --prefill-tokens-max 16"

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": NUM_TOKENS}


@pytest.fixture(scope="module")
def world(each_edge: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp(each_edge),
        num_workers=len(WORKER_IDS),
        is_emptied=True,
        engine_options=ENGINE_OPTIONS,
        # Engines that are killed one after the other under a stream look like its doing.
        frontend_flags=["--query-deaths-max", "1000"],
    ) as world:
        yield world


@pytest.fixture(autouse=True)
def all_workers(world: World) -> None:
    """Every test begins with workers that all take requests."""
    world.run(revive(world))


async def revive(world: World) -> None:
    """Start again whoever is gone, and wait for engines that restart by themselves."""
    while any(map(is_alive, _killed)):  # noqa: ASYNC110 - A signal takes its time.
        await asyncio.sleep(0.002)
    _killed.clear()
    while True:
        known = world.mesh.workers
        gone = [w for w in WORKER_IDS if w not in known or not is_alive(known[w].sidecar_pid)]
        await asyncio.gather(*map(world.mesh.restart, gone))
        known = world.mesh.workers
        serving = [
            worker.record.identity.worker_id
            for worker in await world.client.list_workers()
            if worker.link == admin_pb.LINK_STATE_UP
            and worker.engine == worker_pb2.ENGINE_STATE_SERVING
            and is_alive(worker.record.engine_pgid)
        ]
        if serving == WORKER_IDS and all(is_alive(known[w].engine_pgid) for w in WORKER_IDS):
            return
        await asyncio.sleep(0.02)


_killed: list[int] = []
"""Process ids; while they live, the mesh looks better than it is."""


def kill(world: World, worker_id: str, what: Target) -> None:
    """SIGKILL `what` of a worker."""
    record = world.mesh.workers[worker_id]
    world.mesh.kill(worker_id, what)
    _killed.extend([record.engine_pgid] if what == "engine" else [record.sidecar_pid])


def reader(world: World, **options: Any) -> Reader:
    options = {"token_ids": PROMPT[:8], **options}
    return Reader(world, world.client.generate(timeout_s=25, **options))


async def undisturbed(world: World, **options: Any) -> History:
    return await reader(world, **options).to_the_end()


TARGETS: Sequence[Target] = ("engine", "sidecar", "host")


@pytest.mark.parametrize(
    ("what", "num_read"),
    [*((what, NUM_TOKENS // 2) for what in TARGETS), ("host", 1)],
)
def test_a_kill_in_the_output_is_not_seen(world: World, what: Target, num_read: int) -> None:
    async def scenario() -> None:
        expected = await undisturbed(world, **SAMPLED)
        it = reader(world, **SAMPLED)
        await it.until(num_read)
        kill(world, await it.worker(), what)
        assert_equal(await it.to_the_end(), expected)

    world.run(scenario())


@pytest.mark.parametrize("what", ["engine", "host"])
def test_a_kill_in_the_prefill_is_not_seen(world: World, what: Target) -> None:
    async def scenario() -> None:
        options = {**SAMPLED, "token_ids": [TARGETS.index(what), *PROMPT]}  # Cached nowhere.
        it = reader(world, request_id=f"prefill-{what}", **options)
        reading = asyncio.create_task(it.to_the_end())
        while it.stream.started is None or not (worker_id := await it.worker()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        kill(world, worker_id, what)
        assert it.history.num_tokens == 0, "the prefill was not over"
        seen = await reading
        assert_equal(seen, await undisturbed(world, **options))

    world.run(scenario())


@pytest.mark.parametrize("what", ["engine", "host"])
def test_a_kill_at_the_last_token_is_not_seen(world: World, what: Target) -> None:
    async def scenario() -> None:
        expected = await undisturbed(world, **GREEDY)
        it = reader(world, **GREEDY)
        await it.until(1)
        worker_id = await it.worker()
        await it.until(NUM_TOKENS - 1)
        kill(world, worker_id, what)
        seen = await it.to_the_end()
        assert seen.difference(expected).is_none  # Whether it had to go on elsewhere or not.

    world.run(scenario())


def test_a_kill_after_the_last_token_is_not_seen(world: World) -> None:
    async def scenario() -> None:
        expected = await undisturbed(world, **GREEDY)
        it = reader(world, **GREEDY)
        await it.until(1)
        worker_id = await it.worker()
        await it.until(NUM_TOKENS)
        kill(world, worker_id, "host")
        assert_equal(await it.to_the_end(), expected, num_migrations=0)

    world.run(scenario())


def test_two_deaths_one_after_the_other_are_not_seen(world: World) -> None:
    async def scenario() -> None:
        options = {**SAMPLED, "max_tokens": 4 * NUM_TOKENS}
        expected = await undisturbed(world, **options)
        it = reader(world, **options)
        await it.until(NUM_TOKENS)
        first = await it.worker()
        kill(world, first, "host")
        second = await it.until_elsewhere(first)
        await it.until(2 * NUM_TOKENS)
        kill(world, second, "engine")
        assert_equal(await it.to_the_end(), expected, num_migrations=2)

    world.run(scenario())


def test_all_choices_of_a_request_survive(world: World) -> None:
    async def scenario() -> None:
        expected = await undisturbed(world, num_choices=3, **SAMPLED)
        assert len({tuple(choice.token_ids) for choice in expected.choices.values()}) == 3
        it = reader(world, num_choices=3, **SAMPLED)
        await it.until(3 * NUM_TOKENS // 2)
        info = await world.client.get_stream(it.stream.request_id)
        # A choice that has ended has no worker any more.
        names = [c.worker.worker_id for c in info.choices if c.worker.worker_id]
        kill(world, names[0], "engine")
        hit = names.count(names[0])
        assert_equal(await it.to_the_end(), expected, num_migrations=hit)

    world.run(scenario())


def test_a_stop_string_across_the_cut_stops(world: World) -> None:
    async def scenario() -> None:
        whole = await undisturbed(world, **GREEDY)
        assert whole.finished is not None
        text = whole.choices[0].text
        middle = len(text) // 2
        stop = [text[middle - 4 : middle + 4]]  # Some tokens long, in the middle of the output.
        expected = await undisturbed(world, stop=stop, **GREEDY)
        assert expected.finished is not None
        assert expected.finished.choices[0].stop == stop[0]
        end = expected.finished.choices[0].num_tokens
        it = reader(world, stop=stop, **GREEDY)
        await it.until(1)
        worker_id = await it.worker()
        await it.until(end - 1)  # A part of the stop string is held back now.
        kill(world, worker_id, "engine")
        assert (await it.to_the_end()).difference(expected).is_none

    world.run(scenario())


def test_a_cancel_during_a_migration_ends_the_stream(world: World) -> None:
    async def scenario() -> None:
        expected = await undisturbed(world, **GREEDY)
        it = reader(world, **{**GREEDY, "max_tokens": 1000, "migrations_max": 100})
        await it.until(NUM_TOKENS)
        for worker_id in WORKER_IDS:  # With nowhere to go on, it waits for a worker.
            kill(world, worker_id, "engine")
        while await it.worker():  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(0.002)
        assert await world.client.cancel(it.stream.request_id)
        with pytest.raises(UnbrokenError) as raised:
            await it.to_the_end()
        assert raised.value.reason is Reason.CANCELLED
        seen = it.history.choices[0]
        assert seen.token_ids[:NUM_TOKENS] == expected.choices[0].token_ids
        assert seen.offsets == list(range(len(seen.token_ids)))
        info = await world.client.get_stream(it.stream.request_id)
        assert [choice.state for choice in info.choices] == [pb.STREAM_STATE_DONE]

    world.run(scenario())
