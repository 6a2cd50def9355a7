"""The real engine does what every engine has to do: the suite's claims, in one life of it."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.engines.lives import Launch
from sidecar.engines.native import NativeEngine
from tests.engines.backend import Backend
from tests.engines.subjects import FAST, Talk, Tending, play, tending
from tests.engines.test_conformance import CANCELLED, LENGTH, STOP, greedy, is_free, sampled
from tests.worker.test_llama import load
from unbroken.generation import GenerationParams
from unbroken.v1 import worker_pb2
from worker.service import EngineService

pytestmark = pytest.mark.llama


async def conforms(it: Talk) -> None:
    for num in (1, 5):
        slot = it.start(greedy(num))
        ended = await it.ended(slot)
        assert ended.finish_reason == LENGTH
        assert len(it.tokens[slot]) == ended.end_offset == num

    alone = it.start(sampled(8), (5, 6, 7))
    await it.ended(alone)
    company = [it.start(sampled(8), (5, 6, 7)), it.start(greedy(20)), it.start(sampled(20), (9,))]
    await it.ended(company[0])
    assert it.tokens[company[0]] == it.tokens[alone]

    said = it.tokens[alone]
    slot = it.start(sampled_until(said[4]), (5, 6, 7))
    ended = await it.ended(slot)
    assert (ended.finish_reason, ended.stop_token_id) == (STOP, said[4])
    assert it.tokens[slot] == said[: said.index(said[4]) + 1]

    slot = it.start(greedy(200), window_tokens=3)
    await it.until(lambda: len(it.tokens.get(slot, ())) == 3)
    it.frontend.ack(slot, 2)
    await it.until(lambda: len(it.tokens[slot]) == 5)
    it.abort(slot)
    assert (await it.ended(slot)).finish_reason == CANCELLED

    slot = it.start(greedy(200), deadline_s=0.05)
    assert (await it.ended(slot)).finish_reason == CANCELLED
    refused = await it.refused(it.start(greedy(), ()))
    assert refused.kind == worker_pb2.FAILURE_KIND_REJECTED
    for one in company[1:]:
        await it.ended(one)
    await it.until(lambda: is_free(it), "something still holds blocks")


def sampled_until(token_id: int) -> GenerationParams:
    params = sampled(8)
    stopping = replace(params.stopping, stop_token_ids=frozenset({token_id}))
    return replace(params, stopping=stopping)


def test_llama_does_what_every_engine_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "engine.sock"
        service = EngineService(load(batch_size_max=4))
        listening = asyncio.Event()
        serving = asyncio.create_task(service.serve(path, on_listening=listening.set))
        try:
            await listening.wait()
            engine = NativeEngine(Launch(None, str(path), restart=FAST))
            async with tending(Tending(engine, Backend())) as it:
                await conforms(it)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    play(scenario())
