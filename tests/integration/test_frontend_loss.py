"""Frontends are killed and stopped under streams of the client library, which do not show it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from tests.integration.worlds import World, real_mesh, until_nothing_is_held
from unbroken.chaos import processes
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.history import History, record
from unbroken.holdings import num_held
from unbroken.mesh_ledger import mesh_ledger
from unbroken.resumption import ResumePolicy

NUM_TOKENS = 60
OPTIONS: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": NUM_TOKENS, "prompt": "Sea"}
HUNG_S = 2.5
"""How soon a frontend that gives no sign of life is left."""
MARGIN_S = 1.0


@pytest.fixture(scope="module")
def world(each_edge: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp(each_edge),
        num_workers=2,
        num_frontends=2,
        is_emptied=True,
        engine_options="--step-base-ms 10",
    ) as world:
        yield world


@asynccontextmanager
async def both_frontends(world: World) -> AsyncGenerator[Client]:
    """A client of both, which live before and after."""
    try:
        async with Client(*world.mesh.frontend_addresses) as client:
            await client.list_models()
            yield client
    finally:
        for name in ("f1", "f2"):
            known = world.mesh.frontends.get(name)
            if known is None or not processes.is_alive(known.pid):
                await world.mesh.restart(name)


async def until(history: History, num_tokens: int) -> None:
    """Wait until a stream that is being recorded has so many tokens."""
    while history.num_tokens < num_tokens:  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def test_a_killed_frontend_is_not_seen_and_nothing_is_computed_twice(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world) as client:
            options: dict[str, Any] = {**OPTIONS, "num_choices": 3, "num_top_logprobs": 2}
            expected = await record(client.generate(**options))
            history = History()
            stream = client.generate(timeout_s=20, **options)
            reading = asyncio.create_task(record(stream, history))
            await until(history, 3 * NUM_TOKENS // 2)
            await processes.kill([world.mesh.frontends["f1"].pid])
            seen = await reading
        assert seen.difference(expected).is_none
        (resume,) = stream.resumes
        assert (resume.from_address, resume.to_address) == tuple(world.mesh.frontend_addresses)
        assert resume.reason is Reason.UNREACHABLE
        assert sum(resume.offsets) >= 3 * NUM_TOKENS // 2
        assert seen.finished is not None
        usage = seen.finished.usage
        assert usage.recomputed_prefill_tokens == usage.recomputed_decode_tokens == 0

    world.run(scenario())


def test_a_cancel_finds_what_a_killed_frontend_left_at_workers(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world):
            first, second = world.mesh.frontend_addresses
            options: dict[str, Any] = {**OPTIONS, "max_tokens": 3000, "orphan_grace_s": 600}
            async with Client(first, resume_policy=ResumePolicy(resumes_max=0)) as client:
                stream = client.generate(request_id="left", num_choices=2, **options)
                await anext(stream)
                await processes.kill([world.mesh.frontends["f1"].pid])
                with pytest.raises(UnbrokenError):
                    async for _ in stream:
                        pass
            async with Client(second) as client:
                held = await mesh_ledger(client, FileDiscovery(world.mesh.directory))
                assert num_held(held), "it runs on"
                assert not await client.cancel("left")
        await until_nothing_is_held(world.mesh)

    world.run(scenario())


def test_a_frontend_that_is_shut_down_hands_its_streams_over_as_they_run(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world) as client:
            options: dict[str, Any] = {**OPTIONS, "max_tokens": 4 * NUM_TOKENS}
            expected = await record(client.generate(**options))
            history = History()
            stream = client.generate(timeout_s=20, **options)
            reading = asyncio.create_task(record(stream, history))
            await until(history, NUM_TOKENS // 2)
            pid = world.mesh.frontends["f1"].pid
            while processes.is_alive(pid):  # Asked more than once, it waits for no stream.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                await asyncio.sleep(0.02)
            seen = await reading
        assert seen.difference(expected).is_none
        (resume,) = stream.resumes
        assert resume.reason is Reason.DRAINING
        assert seen.finished is not None
        usage = seen.finished.usage
        assert usage.recomputed_prefill_tokens == usage.recomputed_decode_tokens == 0

    world.run(scenario())


def test_a_frontend_that_hangs_is_left_and_its_return_is_not_seen(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world) as client:
            options: dict[str, Any] = {**OPTIONS, "max_tokens": 8 * NUM_TOKENS}
            expected = await record(client.generate(**options))
            history = History()
            stream = client.generate(timeout_s=20, **options)
            reading = asyncio.create_task(record(stream, history))
            await until(history, NUM_TOKENS)
            pid = world.mesh.frontends["f1"].pid
            await processes.stop([pid])
            num_tokens = history.num_tokens
            try:
                await until(history, num_tokens + NUM_TOKENS)
                assert processes.is_stopped(pid)
                (resume,) = stream.resumes
                assert resume.gap_s < HUNG_S + MARGIN_S
            finally:
                await processes.resume([pid])
            seen = await reading
        assert seen.difference(expected).is_none
        assert len(stream.resumes) == 1

    world.run(scenario())


def test_frontend_and_worker_may_die_together(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world) as client:
            expected = await record(client.generate(**OPTIONS))
            history = History()
            stream = client.generate(timeout_s=20, **OPTIONS)
            reading = asyncio.create_task(record(stream, history))
            await until(history, NUM_TOKENS // 2)
            info = await client.get_stream(stream.request_id)
            worker_id = info.choices[0].worker.worker_id
            worker = world.mesh.workers[worker_id]
            pids = [world.mesh.frontends["f1"].pid, worker.sidecar_pid]
            await processes.kill([*pids, *processes.group(worker.engine_pgid)])
            seen = await reading
            await world.mesh.restart(worker_id)
        assert seen.difference(expected).is_none
        assert len(stream.resumes) == 1

    world.run(scenario())


def test_the_command_line_survives_its_frontend(world: World) -> None:
    async def scenario() -> None:
        async with both_frontends(world) as client:
            options: dict[str, Any] = {**OPTIONS, "max_tokens": 2 * NUM_TOKENS}
            expected = await record(client.generate(**options))
            arguments = "generate --raw Sea --temperature 0.9 --seed 7 --max-tokens 120 -o json"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "unbroken.cli", *arguments.split()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "UNBROKEN_DISCOVERY": str(world.mesh.directory)},
            )
            events: list[dict[str, Any]] = []
            try:
                assert process.stdout is not None
                async for line in process.stdout:
                    events.append(json.loads(line))
                    if len(events) == 20:
                        served_by = events[0]["frontend_id"]
                        await processes.kill([world.mesh.frontends[served_by].pid])
                assert await process.wait() == 0, events[-1]
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        token_ids = [i for e in events if e["event"] == "piece" for i in e["token_ids"]]
        assert token_ids == expected.choices[0].token_ids
        assert [e["event"] for e in events].count("resumed") == 1

    world.run(scenario())
