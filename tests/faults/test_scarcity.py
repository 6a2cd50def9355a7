"""Full disks, and no descriptors left: streams do not show it."""

import asyncio
import os
from collections.abc import Generator
from typing import Any, Final

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import World, real_mesh
from unbroken.chaos import processes
from unbroken.chaos.processes import FullDisk, NoDescriptors
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.v1 import worker_pb2

NUM_TOKENS: Final = 30
OPTIONS: Final[dict[str, Any]] = {
    "token_ids": list(range(300, 308)),
    "temperature": 0.9,
    "seed": 7,
    "max_tokens": NUM_TOKENS,
}
_INTO: Final = ("/bin/sh", "-c", 'target=$0; exec "$@" >"$target" 2>&1')
"""Then a file for the output, and a command."""


def reader(world: World) -> Reader:
    return Reader(world, world.client.generate(timeout_s=25, **OPTIONS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    full = [*_INTO, "/dev/full"]
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=2,
        engine_options="--step-base-ms 10",
        frontend_flags=("--log-level", "debug"),
        wrap_of={"f1": full, "w1": full},
    ) as world:
        yield world


def test_logs_on_a_full_disk_cost_no_stream(world: World) -> None:
    async def scenario() -> None:
        for pid in (world.mesh.frontend_pid, world.mesh.workers["w1"].sidecar_pid):
            assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/full"
        expected = await reader(world).to_the_end()
        it = reader(world)
        await it.until(NUM_TOKENS // 2)
        killed = await it.worker()
        world.mesh.kill(killed, "engine")  # Both sides have something to say about that.
        assert_equal(await it.to_the_end(), expected)
        await world.mesh.until_serving(["w1", "w2"])

    world.run(scenario())


def test_an_engine_comes_back_behind_a_sidecar_that_can_write_no_file(world: World) -> None:
    async def scenario() -> None:
        expected = await reader(world).to_the_end()
        record = world.mesh.workers["w2"]
        full = FullDisk(record.sidecar_pid)
        full.begin()
        world.mesh.kill("w2", "engine")
        while processes.group(record.engine_pgid):  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(0.005)
        while not await _is_serving(world, "w2"):  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(0.02)
        assert_equal(await reader(world).to_the_end(), expected, num_migrations=0)
        full.end()

    world.run(scenario())


async def _is_serving(world: World, worker_id: str) -> bool:
    return any(
        info.record.identity.worker_id == worker_id
        and info.engine == worker_pb2.ENGINE_STATE_SERVING
        for info in await world.client.list_workers()
    )


async def _comes_in(world: World) -> bool:
    """Whether a new client is accepted."""
    async with Client(world.mesh.frontend_address, call_timeout_s=0.5) as other:
        try:
            await other.list_workers()
        except UnbrokenError:
            return False
    return True


def test_without_descriptors_streams_go_on_and_afterwards_clients_come_in(world: World) -> None:
    async def scenario() -> None:
        expected = await reader(world).to_the_end()
        it = reader(world)
        await it.until(1)
        starved = NoDescriptors(world.mesh.frontend_pid)
        starved.begin()
        while await _comes_in(world):
            starved.begin()  # What the tests before this one had open has been closed meanwhile.
        assert_equal(await it.to_the_end(), expected, num_migrations=0)
        starved.end()
        async with Client(world.mesh.frontend_address) as other:
            assert await other.list_workers()

    world.run(scenario())
