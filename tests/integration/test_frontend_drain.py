"""Frontends are drained under streams, by call and by signal: their clients lose nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.readers import Reader
from tests.integration.worlds import World, real_mesh
from tests.sidecar.processes import until
from unbroken.client import Client
from unbroken.discovery import FRONTENDS, connect
from unbroken.drain import drain_frontend
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.resumption import ResumePolicy
from unbroken.status import from_rpc_error
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1.admin_service_pb2_grpc import AdminServiceStub

NUM_STREAMS = 8
GAP_MAX_S = 0.3
EDGES = {  # The edge of grpcio: `make test-grpcio`.
    "one process": [],
    "two processes": ["--edge", "native", "--processes", "2"],
}


@pytest.fixture(params=EDGES, scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[World]:
    flags = [*EDGES[request.param], "--shutdown-grace-s", "20"]
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=2,
        num_frontends=2,
        engine_options="--step-base-ms 10",
        frontend_flags=flags,
    ) as it:
        yield it


@asynccontextmanager
async def client_of_both(world: World) -> AsyncGenerator[Client]:
    """A client that prefers f1; f1 serves again when it is closed."""
    await world.mesh.until_serving(["w1", "w2"], ["f1", "f2"])
    async with Client(*world.mesh.frontend_addresses) as client:
        await client.list_models()
        yield client
    await world.mesh.restart("f1")


def options_of(index: int, **more: Any) -> dict[str, Any]:
    return {
        "token_ids": [300 + index, 301],
        "temperature": 0.8,
        "seed": index,
        "ignore_eos": True,
        "max_tokens": 400,
        "timeout_s": 30,
        **more,
    }


async def is_gone(world: World, frontend_id: str) -> int:
    """Wait for its end; its status."""
    async with asyncio.timeout(15):
        while True:
            name, status = await world.mesh.until_one_ends()
            if name == frontend_id:
                return status


async def expected(world: World, index: int) -> Any:
    async with Client(world.mesh.frontend_addresses[1]) as client:
        return await Reader(world, client.generate(**options_of(index))).to_the_end()


def test_streams_go_on_at_the_other_frontend_before_theirs_stops(world: World) -> None:
    async def scenario() -> None:
        undisturbed = await asyncio.gather(*(expected(world, i) for i in range(NUM_STREAMS)))
        async with client_of_both(world) as client:
            streams = [client.generate(**options_of(index)) for index in range(NUM_STREAMS)]
            readers = [Reader(world, stream) for stream in streams]
            await asyncio.gather(*(reader.until(20) for reader in readers))
            reading = [asyncio.create_task(reader.to_the_end()) for reader in readers]
            drained = await drain_frontend(connect(world.mesh.directory), "f1")
            assert await is_gone(world, "f1") == 0
            histories = await asyncio.gather(*reading)
        # A client that reads on elsewhere leaves, and may be heard before the worker's word.
        assert drained.num_moved + drained.num_left == NUM_STREAMS
        assert (drained.num_finished, drained.num_cut) == (0, 0)
        assert drained.took_s < 10, "nobody was waited for to the end of its stream"
        first, second = world.mesh.frontend_addresses
        for stream, seen, wanted in zip(streams, histories, undisturbed, strict=True):
            assert seen.difference(wanted).is_none
            (seam,) = stream.resumes
            assert (seam.from_address, seam.to_address) == (first, second)
            assert seam.reason is Reason.DRAINING
            assert seam.gap_s < GAP_MAX_S
            assert seen.finished is not None
            usage = seen.finished.usage
            assert usage.recomputed_prefill_tokens == usage.recomputed_decode_tokens == 0

    world.run(scenario(), limit_s=60)


def test_clients_that_cannot_move_finish_or_are_cut_with_what_it_takes_to_resume(
    world: World,
) -> None:
    async def scenario() -> None:
        where = connect(world.mesh.directory)
        wanted = await expected(world, 1)
        async with (
            client_of_both(world),
            Client(
                world.mesh.frontend_addresses[0], resume_policy=ResumePolicy(resumes_max=0)
            ) as plain,
        ):
            short = Reader(world, plain.generate(**options_of(2, max_tokens=60)))
            long = Reader(world, plain.generate(**options_of(1, orphan_grace_s=20)))
            await asyncio.gather(short.until(5), long.until(5))
            told: list[admin_pb.DrainFrontendResponse] = []
            draining = asyncio.create_task(
                drain_frontend(where, "f1", budget_s=2.0, tell=told.append)
            )
            await until(lambda: bool(told))
            assert told[0].phase == admin_pb.FRONTEND_DRAIN_PHASE_LEAVING
            assert told[0].num_requests == 2
            assert 1 < told[0].budget_left.ToMilliseconds() / 1000 <= 2
            ended = await short.to_the_end()
            assert ended.num_tokens == 60
            with pytest.raises(UnbrokenError) as cut:
                await long.to_the_end()
            assert cut.value.reason is Reason.DRAINING
            drained = await draining
            assert (drained.num_finished, drained.num_moved, drained.num_cut) == (1, 0, 1)
            assert await is_gone(world, "f1") == 0
            async with Client(world.mesh.frontend_addresses[1]) as other:
                rest = Reader(world, other.resume(long.stream.checkpoint()), long.history)
                seen = await rest.to_the_end()
        assert seen.difference(wanted).is_none

    world.run(scenario(), limit_s=60)


def test_a_signal_drains_as_well_and_a_second_one_means_at_once(world: World) -> None:
    async def scenario() -> None:
        async with (
            client_of_both(world),
            Client(
                world.mesh.frontend_addresses[0], resume_policy=ResumePolicy(resumes_max=0)
            ) as plain,
        ):
            long = Reader(world, plain.generate(**options_of(1, max_tokens=4000)))
            await long.until(5)
            pid = world.mesh.frontends["f1"].pid
            os.kill(pid, signal.SIGTERM)
            await until(lambda: "f1" not in world.mesh.frontends)  # It has taken the first.
            await long.until(long.history.num_tokens + 10)
            os.kill(pid, signal.SIGTERM)
            began_at = time.monotonic()
            with pytest.raises(UnbrokenError) as cut:
                await long.to_the_end()
            assert cut.value.reason is Reason.DRAINING
            assert await is_gone(world, "f1") == 4
            assert time.monotonic() - began_at < 5

    world.run(scenario(), limit_s=60)


def test_another_frontend_than_the_one_that_is_meant_does_not_drain(world: World) -> None:
    async def scenario() -> None:
        channel = await world.client.channel()
        request = admin_pb.DrainFrontendRequest(frontend_id="f2")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in AdminServiceStub(channel).DrainFrontend(request):
                pass
        assert from_rpc_error(error.value).reason is Reason.INVALID_FIELD
        stream: GenerationStream = world.client.generate(**options_of(1, max_tokens=3))
        assert await stream.text()

    world.run(scenario())


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal, by what the kernel says."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    flags = ["--frontend-id", "f1", "--discovery", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "frontend", *flags], stderr=subprocess.DEVNULL
    ) as process:
        try:
            give_up_at = time.monotonic() + 20
            # SIGINT has one from the beginning, of Python; SIGTERM once it begins to start.
            while not catches(process.pid, signal.SIGTERM):
                assert time.monotonic() < give_up_at
                time.sleep(0.001)
            process.send_signal(number)
            assert process.wait(10) == 0
        finally:
            process.kill()
    assert asyncio.run(connect(tmp_path).snapshot(FRONTENDS)) == {}
