"""Streams of real processes are paused for one of a higher priority; their readers see nothing."""

import asyncio
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from tests.integration.worlds import World, real_mesh
from unbroken.chaos import processes
from unbroken.client import Client
from unbroken.discovery import connect
from unbroken.drain import drain_frontend
from unbroken.errors import Reason
from unbroken.history import History, record
from unbroken.outcome import FailureKind
from unbroken.v1 import inference_service_pb2 as pb

NUM_TOKENS = 120
PROMPT = 192
LIMIT = 40
"""KV blocks of 16 tokens: three streams have 36 when they begin, and grow."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=1,
        num_frontends=2,
        is_emptied=True,
        engine_options="--step-base-ms 5 --kv-blocks 200 --context-length 2048",
        frontend_flags=[
            *("--busy-kv-blocks-share", str(LIMIT / 200)),
            *("--preemption", "--preemption-run-s-min", "0", "--preemption-wait-s-max", "5"),
        ],
    ) as world:
        yield world


def options(number: int, num_choices: int) -> dict[str, Any]:
    """Of a stream of its own, which no cache helps."""
    return {
        "token_ids": [100 + number, 200 + number] * (PROMPT // 2),
        "max_tokens": NUM_TOKENS,
        "num_choices": num_choices,
        "temperature": 0.9,
        "seed": number,
        "ignore_eos": True,
    }


async def undisturbed(client: Client, streams: Sequence[dict[str, Any]]) -> list[History]:
    """What they give while nobody waits for room."""
    histories = await asyncio.gather(*(record(client.generate(**one)) for one in streams))
    assert not any(was_paused(one) for one in histories)
    return histories


async def paused_streams(client: Client) -> Sequence[str]:
    """Those of which a choice is paused."""
    return [
        stream.request_id
        async for stream in client.list_streams()
        if any(choice.state == pb.STREAM_STATE_PAUSED for choice in stream.choices)
    ]


async def until_full(client: Client) -> None:
    """Wait until the worker has more than it may, so that who comes has to wait."""
    while True:
        (worker,) = await client.list_workers()
        if any(rank.kv_blocks_used > LIMIT for rank in worker.load.ranks):
            return
        await asyncio.sleep(0.01)


def was_paused(history: History) -> bool:
    assert history.finished is not None
    return any(one.failure == FailureKind.PREEMPTED for one in history.finished.attempts)


@pytest.mark.parametrize(("num_streams", "num_choices"), [(3, 1), (2, 3)])
def test_who_is_paused_for_a_higher_priority_has_the_tokens_of_an_undisturbed_run(
    world: World, num_streams: int, num_choices: int
) -> None:
    async def scenario() -> None:
        async with Client(world.mesh.frontend_address) as client:
            streams = [options(number, num_choices) for number in range(num_streams)]
            expected = await undisturbed(client, streams)
            readings = [asyncio.create_task(record(client.generate(**one))) for one in streams]
            await until_full(client)
            urgent = client.generate(
                token_ids=[7] * 32, max_tokens=5, temperature=0, priority=10, ignore_eos=True
            )
            hearing = asyncio.create_task(record(urgent))
            while not await paused_streams(client):
                assert not hearing.done(), "somebody has to make room for it"
                await asyncio.sleep(0.005)
            heard = await hearing
            assert heard.finished is not None
            assert heard.finished.usage.completion_tokens == 5
            seen = [await reading for reading in readings]
        assert any(was_paused(one) for one in seen)
        assert not was_paused(heard)
        for one, truth in zip(seen, expected, strict=True):
            assert one.difference(truth).is_none
            assert one.finished is not None
            usage = one.finished.usage
            assert usage.completion_tokens == num_choices * NUM_TOKENS
            assert (usage.recomputed_prefill_tokens > 0) is was_paused(one)

    world.run(scenario())


def test_a_paused_stream_goes_on_at_another_frontend_when_its_own_drains(world: World) -> None:
    async def scenario() -> None:
        first, second = world.mesh.frontend_addresses
        async with Client(first, second) as client:
            streams = [options(number, 1) for number in range(3)]
            expected = await undisturbed(client, streams)
            calls = [client.generate(**one) for one in streams]
            readings = [asyncio.create_task(record(call)) for call in calls]
            await until_full(client)
            urgent = client.generate(
                token_ids=[7] * 32, max_tokens=200, temperature=0, priority=10, ignore_eos=True
            )
            hearing = asyncio.create_task(record(urgent))
            while not (paused := await paused_streams(client)):
                assert not hearing.done(), "somebody has to make room for it"
                await asyncio.sleep(0.005)
            drained = await drain_frontend(connect(world.mesh.directory), "f1")
            assert await world.mesh.until_one_ends() == ("f1", 0)
            seen = [await reading for reading in readings]
            heard = await hearing
        assert drained.num_cut == 0
        for call, one, truth in zip(calls, seen, expected, strict=True):
            assert one.difference(truth).is_none
            if call.request_id in paused:
                (seam,) = call.resumes
                assert (seam.from_address, seam.to_address) == (first, second)
                assert seam.reason is Reason.DRAINING
        assert heard.num_tokens == 200
        await world.mesh.restart("f1")
        await world.mesh.until_serving(["w1"], ["f1", "f2"])

    world.run(scenario())


def test_a_paused_stream_goes_on_at_another_frontend_when_its_own_is_killed(world: World) -> None:
    async def scenario() -> None:
        async with Client(*world.mesh.frontend_addresses) as client:
            streams = [options(number, 1) for number in range(3)]
            expected = await undisturbed(client, streams)
            readings = [asyncio.create_task(record(client.generate(**one))) for one in streams]
            async with Client(world.mesh.frontend_address) as first:
                await until_full(first)
                urgent = first.generate(
                    token_ids=[7] * 32, max_tokens=500, temperature=0, priority=10, ignore_eos=True
                )
                hearing = asyncio.create_task(record(urgent))
                while not await paused_streams(first):
                    assert not hearing.done(), "somebody has to make room for it"
                    await asyncio.sleep(0.005)
                await processes.kill([world.mesh.frontends["f1"].pid])
                seen = [await reading for reading in readings]
            await asyncio.wait([hearing])
            hearing.exception()
        for one, truth in zip(seen, expected, strict=True):
            assert one.difference(truth).is_none

    world.run(scenario())
