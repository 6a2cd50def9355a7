"""How engines of other makes fail, and what becomes of their streams: rows of what was measured."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import ADAPTERS, adapter_of
from sidecar.engines.lives import Launch
from sidecar.watchdog import WatchdogPolicy
from tests.engines.backend import Backend
from tests.engines.subjects import FAST, QUICK, SERVERS, Served, Talk, Tending, play, tending
from tests.engines.test_conformance import LENGTH, greedy
from unbroken.v1 import worker_pb2

SOON = WatchdogPolicy(decode_unmeasured_s=0.8, prefill_unmeasured_s=0.8, restart_after_s=0.2)
SLOW = "vllm"
"""For what takes a second and is the same for all."""


class Beside:
    """A server that can be killed, and who speaks to it."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.backend = Backend(step_s=0.002)
        self._server: AbstractAsyncContextManager[Served] | None = None
        self.served: Served
        self.port = 0

    async def serve(self) -> None:
        """Begin to serve, at the same port as before."""
        self.backend.is_dead = False
        self.backend.go_on()
        self._server = SERVERS[self.protocol](self.backend, self.port)
        self.served = await self._server.__aenter__()
        self.port = int(self.served.address.rpartition(":")[2])

    async def die(self) -> None:
        """All of it goes: connections are reset, calls refused."""
        server, self._server = self._server, None
        if server is not None:
            await server.__aexit__(None, None, None)


@asynccontextmanager
async def beside(
    protocol: str, watchdog: WatchdogPolicy | None = None
) -> AsyncGenerator[tuple[Beside, Talk], None]:
    it = Beside(protocol)
    await it.serve()
    cranking = asyncio.create_task(it.backend.run())
    launch = Launch(None, it.served.address, restart=FAST)
    engine = CallEngine(launch, adapter_of(protocol), pace=QUICK)
    try:
        async with tending(Tending(engine, it.backend, watchdog)) as conversation:
            yield it, conversation
    finally:
        await it.die()
        cranking.cancel()
        await asyncio.gather(cranking, return_exceptions=True)


@pytest.fixture(params=ADAPTERS)
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


async def streaming(it: Talk, number: int = 3) -> list[int]:
    """So many streams in mid-flight."""
    slots = [it.start(greedy(480)) for _ in range(number)]
    await it.until(lambda: all(len(it.tokens.get(slot, ())) > 3 for slot in slots))
    return slots


async def assert_all_ended(it: Talk, slots: list[int], failure: int) -> None:
    for slot in slots:
        ended = await it.ended(slot)
        assert ended.failure == failure, ended
        assert ended.end_offset == len(it.tokens[slot]), "at its exact offset"
        assert it.tokens[slot] == it.expected(greedy(480)).token_ids[: len(it.tokens[slot])]


def test_a_dead_core_is_the_death_of_the_engine_and_no_request_is_blamed(protocol: str) -> None:
    async def scenario() -> None:
        async with beside(protocol) as (engine, it):
            slots = await streaming(it)
            engine.backend.die()
            await assert_all_ended(it, slots, worker_pb2.FAILURE_KIND_CRASH)
            await it.state(worker_pb2.ENGINE_STATE_DEAD, 1)

    play(scenario())


def test_a_dead_core_is_noticed_without_any_stream(protocol: str) -> None:
    async def scenario() -> None:
        async with beside(protocol) as (engine, it):
            engine.backend.die()
            await it.state(worker_pb2.ENGINE_STATE_DEAD, 1)

    play(scenario())


def test_a_server_that_is_killed_comes_back_as_another_life(protocol: str) -> None:
    async def scenario() -> None:
        async with beside(protocol) as (engine, it):
            slots = await streaming(it)
            await engine.die()
            await assert_all_ended(it, slots, worker_pb2.FAILURE_KIND_CRASH)
            await it.state(worker_pb2.ENGINE_STATE_DEAD, 1)
            await engine.serve()
            await it.until(lambda: it.hub.up is not None and it.hub.up.incarnation > 1)
            slot = it.start(greedy())
            assert (await it.ended(slot)).finish_reason == LENGTH
            assert it.tokens[slot] == it.expected(greedy()).token_ids

    play(scenario())


def test_an_engine_that_is_told_to_stop_loses_its_streams_before_it_cuts_them() -> None:
    async def scenario() -> None:
        async with beside("vllm") as (engine, it):
            slots = await streaming(it)
            stopping = asyncio.gather(engine.served.stop(30.0))
            await assert_all_ended(it, slots, worker_pb2.FAILURE_KIND_DRAIN)
            await stopping

    play(scenario())


def test_a_core_that_hangs_is_noticed_by_its_silence_though_it_says_that_it_is_well() -> None:
    async def scenario() -> None:
        async with beside(SLOW, SOON) as (engine, it):
            slots = await streaming(it)
            engine.backend.hang()
            await it.state(worker_pb2.ENGINE_STATE_STALLED, 1)
            await assert_all_ended(it, slots, worker_pb2.FAILURE_KIND_STALL)
            # Nothing is begun on it while no token comes from it, whatever its server answers.
            await asyncio.sleep(0.2)
            assert it.hub.up is None
            engine.backend.go_on()
            await it.until(lambda: it.hub.up is not None)

    play(scenario())


def test_a_request_that_somebody_else_aborts_moves_and_is_not_blamed(protocol: str) -> None:
    async def scenario() -> None:
        async with beside(protocol) as (engine, it):
            (slot,) = await streaming(it, 1)
            (name,) = [one for one in engine.backend.asked if not one.startswith("probe")]
            assert engine.backend.abort(name)
            await assert_all_ended(it, [slot], worker_pb2.FAILURE_KIND_PARTITION)
            assert it.hub.up is not None

    play(scenario())


def test_request_ids_are_never_used_twice_not_even_by_the_next_sidecar(protocol: str) -> None:
    async def scenario() -> None:
        async with beside(protocol) as (engine, it):
            await it.ended(it.start(greedy(2)))
            launch = Launch(None, engine.served.address, restart=FAST)
            after = CallEngine(launch, adapter_of(protocol), pace=QUICK)
            async with tending(Tending(after, engine.backend)) as other:
                await other.ended(other.start(greedy(2)))
            asked = engine.backend.asked
            assert len([name for name in asked if name.startswith("r1.0.1.")]) == 2
            assert len(set(asked)) == len(asked)

    play(scenario())


def test_what_others_ask_of_an_engine_is_no_work_of_ours() -> None:
    async def scenario() -> None:
        async with beside(SLOW, SOON) as (engine, it):
            await it.ended(it.start(greedy(4)))
            async for _ in engine.backend.generate("of another", [5, 6], greedy(500)):
                pass  # For a second, in which nothing comes from it to us.
            assert it.hub.watchdog.num_stalls == 0

    play(scenario())
