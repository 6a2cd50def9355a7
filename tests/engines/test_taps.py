"""What vLLM and SGLang push: load, and which KV blocks are reusable. Through real gRPC."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc
from smg_grpc_proto.generated import common_pb2  # pyright: ignore[reportMissingTypeStubs]

from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from tests.engines.backend import Backend
from tests.engines.subjects import FAST, QUICK, SERVERS, Talk, Tending, play, tending
from tests.engines.vllm_server import VllmServer
from unbroken import blocks


@asynccontextmanager
async def tapped() -> AsyncGenerator[tuple[Talk, VllmServer], None]:
    """A conversation whose engine is listened to."""
    backend = Backend()
    cranking = asyncio.create_task(backend.run())
    try:
        async with SERVERS["vllm"](backend, 0) as served:
            servicer = served.servicer
            assert isinstance(servicer, VllmServer)
            launch = Launch(None, served.address, restart=FAST)
            engine = CallEngine(launch, adapter_of("vllm"), pace=QUICK)
            async with tending(Tending(engine, backend)) as it:
                await it.until(lambda: servicer.subscribers, "it never subscribed")
                yield it, servicer
    finally:
        cranking.cancel()
        await asyncio.gather(cranking, return_exceptions=True)


def stored(sequence: int, *hashes: int, parent: int | None = None) -> common_pb2.KvEventBatch:
    """Blocks of 16 tokens, each made of its hash."""
    event = common_pb2.KvBlocksStored(
        blocks=[
            common_pb2.KvBlock(block_hash=one, token_ids=[one] * 16, block_size=16)
            for one in hashes
        ],
        parent_block_hash=parent,
    )
    return common_pb2.KvEventBatch(
        sequence_number=sequence, events=[common_pb2.KvCacheEvent(stored=event)]
    )


def names(it: Talk, *hashes: int) -> list[int]:
    assert it.hub.up is not None
    token_ids = [one for name in hashes for one in [name] * 16]
    root = blocks.root(it.hub.up.description.numerics.id, "")
    return blocks.chain(token_ids, 16, root=root)


def known(it: Talk) -> set[int]:
    """What a frontend makes of all that it was told."""
    found: set[int] = set()
    for events in it.frontend.kv_events:
        if events.reset:
            found.clear()
        found.difference_update(events.removed)
        found.update(events.stored)
    return found


def test_blocks_that_an_engine_can_reuse_are_known_to_frontends() -> None:
    async def scenario() -> None:
        async with tapped() as (it, server):
            (queue,) = server.subscribers
            queue.put_nowait(stored(1, 5, 6))
            queue.put_nowait(stored(2, 7, parent=6))
            await it.until(lambda: known(it) == set(names(it, 5, 6, 7)))
            removed = common_pb2.KvCacheEvent(removed=common_pb2.KvBlocksRemoved(block_hashes=[7]))
            queue.put_nowait(common_pb2.KvEventBatch(sequence_number=3, events=[removed]))
            await it.until(lambda: known(it) == set(names(it, 5, 6)))

    play(scenario())


def test_after_a_gap_all_is_asked_for_again() -> None:
    async def scenario() -> None:
        async with tapped() as (it, server):
            (queue,) = server.subscribers
            queue.put_nowait(stored(1, 5, 6))
            await it.until(lambda: known(it) == set(names(it, 5, 6)))
            queue.put_nowait(stored(3, 9))
            await it.until(lambda: server.subscribers and queue not in server.subscribers)
            server.subscribers[0].put_nowait(stored(8, 5))
            await it.until(lambda: known(it) == set(names(it, 5)))

    play(scenario())


def test_load_that_is_pushed_counts_before_load_that_is_polled() -> None:
    async def scenario() -> None:
        async with tapped() as (it, server):
            load = common_pb2.EngineLoad(
                running_requests=9, waiting_requests=2, token_usage=0.25, load_only=True
            )
            server.subscribers[0].put_nowait(common_pb2.KvEventBatch(load=load))
            await it.until(
                lambda: (
                    it.hub.load is not None
                    and it.hub.load.ranks[0].requests_running == 9
                    and it.hub.load.ranks[0].kv_blocks_used == 16
                )
            )

    play(scenario())


def test_an_engine_without_anybody_who_publishes_is_said_to_have_no_blocks_but_once() -> None:
    async def scenario() -> None:
        async with tapped() as (it, server):
            server.taps_refused = grpc.StatusCode.UNAVAILABLE
            await it.until(lambda: it.frontend.kv_events)
            it.engine.fail("again")
            await it.until(lambda: server.num_taps_refused >= 5, "it is not asked again")
            in_two_lives = [events.reset for events in it.frontend.kv_events]
            assert in_two_lives == [True, True]

    play(scenario())


def test_an_engine_that_pushes_nothing_is_polled() -> None:
    async def scenario() -> None:
        async with tapped() as (it, server):
            server.taps_refused = grpc.StatusCode.UNIMPLEMENTED
            it.engine.fail("again")
            await it.until(lambda: it.hub.up is not None and it.hub.up.incarnation == 2)
            await it.until(
                lambda: it.hub.load is not None and it.hub.load.ranks[0].kv_blocks_total == 64
            )

    play(scenario())
