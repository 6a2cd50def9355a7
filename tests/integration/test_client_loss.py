"""Clients that vanish are noticed and what they held is freed; slow ones are waited for."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import pytest

from tests.integration.one_reader import BLOCKED_S
from tests.integration.worlds import World, real_mesh, rss_bytes
from unbroken.chaos import processes
from unbroken.chaos.proxy import Direction, Proxy, ResetPeer, Timeout
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import inference_service_pb2 as pb

FOREVER = 30_000
NOTICED_S = 2.5
"""How soon a client that gives no sign of life is noticed."""
WINDOW_TOKENS = 1024
MARGIN_S = 1.0
"""The machine may be busy."""


@pytest.fixture(scope="module", params=["grpcio", "native"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=1,
        is_emptied=True,
        engine_options="--step-base-ms 2",
        frontend_flags=["--edge", request.param],
    ) as world:
        yield world


@asynccontextmanager
async def reader(
    address: str, request_id: str, what: str, max_tokens: int = FOREVER
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A client process that has read its first piece."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.one_reader"),
        *(address, request_id, str(max_tokens), what),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"first\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def is_running(world: World, request_id: str) -> bool:
    """Whether the frontend has the request running."""
    try:
        stream = await world.client.get_stream(request_id)
    except UnbrokenError as error:
        if error.reason is not Reason.STREAM_NOT_FOUND:
            raise
        return False
    return any(choice.state != pb.STREAM_STATE_DONE for choice in stream.choices)


async def held_blocks(world: World) -> int:
    """KV blocks that the worker's requests hold, by the engine's own count."""
    (worker,) = await world.client.list_workers()
    return sum(rank.kv_blocks_used for rank in worker.load.ranks)


async def until_held(world: World) -> None:
    """Wait until the worker has told of the blocks that the only stream holds."""
    while not await held_blocks(world):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def until_gone(world: World, request_id: str) -> float:
    """Seconds until the request does not run and holds nothing."""
    began_at = time.monotonic()
    while await is_running(world, request_id) or await held_blocks(world):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return time.monotonic() - began_at


def test_a_killed_client_is_noticed_at_once(world: World) -> None:
    async def scenario() -> None:
        async with reader(world.mesh.frontend_address, "killed", "read") as process:
            assert await is_running(world, "killed")
            await until_held(world)
            await processes.kill([process.pid])
            assert await until_gone(world, "killed") < 0.2 + MARGIN_S

    world.run(scenario())


@pytest.mark.parametrize("what", ["read", "stall"])
def test_a_stopped_client_is_noticed(world: World, what: str) -> None:
    async def scenario() -> None:
        request_id = f"stopped-{what}"
        async with reader(world.mesh.frontend_address, request_id, what) as process:
            await until_held(world)
            await processes.stop([process.pid])
            assert await is_running(world, request_id)
            assert await until_gone(world, request_id) < NOTICED_S + MARGIN_S
            assert processes.is_stopped(process.pid), "its death would have been noticed instead"

    world.run(scenario())


def test_a_client_behind_a_blackhole_is_noticed(world: World) -> None:
    async def scenario() -> None:
        async with (
            Proxy(world.mesh.frontend_address) as proxy,
            reader(proxy.address, "blackholed", "read"),
        ):
            proxy.add(Timeout())
            held = proxy.traffic[Direction.DOWNSTREAM].bytes_held
            assert await is_running(world, "blackholed")
            assert await until_gone(world, "blackholed") < NOTICED_S + MARGIN_S
            assert proxy.traffic[Direction.DOWNSTREAM].bytes_held > held, "it was cut off"

    world.run(scenario())


def test_a_reset_client_is_noticed_at_once(world: World) -> None:
    async def scenario() -> None:
        async with (
            Proxy(world.mesh.frontend_address) as proxy,
            reader(proxy.address, "reset", "read") as process,
        ):
            await processes.stop([process.pid])  # It must not resume.
            proxy.add(ResetPeer())
            while not proxy.num_reset:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert await until_gone(world, "reset") < 0.2 + MARGIN_S

    world.run(scenario())


def test_a_client_that_is_busy_with_other_things_is_not_cut(world: World) -> None:
    async def scenario() -> None:
        begun_at = time.monotonic()
        async with reader(world.mesh.frontend_address, "busy", "block", max_tokens=500) as process:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"500\n"
            assert await process.wait() == 0
        assert time.monotonic() - begun_at > BLOCKED_S

    world.run(scenario())


def test_a_client_that_does_not_read_costs_little_and_stops_its_engine(world: World) -> None:
    async def look() -> tuple[int, int]:
        """Tokens that were made, and those that were sent, of all choices."""
        stream = await world.client.get_stream("stalled")
        assert all(c.state == pb.STREAM_STATE_RUNNING for c in stream.choices), "it was cut"
        ahead = [choice.num_tokens - choice.num_tokens_sent for choice in stream.choices]
        assert max(ahead) <= WINDOW_TOKENS
        num_tokens = sum(choice.num_tokens for choice in stream.choices)
        return num_tokens, num_tokens - sum(ahead)

    async def scenario() -> None:
        pid = world.mesh.frontend_pid
        async with reader(world.mesh.frontend_address, "stalled", "stall"):
            seen = (0, 0)
            while (now := await look()) != seen or now[0] == now[1]:  # Until nothing moves.
                seen = now
                await asyncio.sleep(1)
            before = rss_bytes(pid)
            await asyncio.sleep(NOTICED_S + MARGIN_S)
            assert await look() == seen
            assert rss_bytes(pid) - before < 2 * 2**20
            # It holds up nobody else.
            assert await world.client.generate(prompt="x", max_tokens=20, timeout_s=5).text()
        assert await until_gone(world, "stalled") < 0.2 + MARGIN_S

    world.run(scenario(), limit_s=60)
