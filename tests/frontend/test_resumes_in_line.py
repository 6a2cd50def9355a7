"""Streams that lost their worker stand in line, over real links."""

import asyncio
from typing import Any

from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, failure_of, read, read_some, run, world
from unbroken.errors import Reason
from unbroken.generation_stream import GenerationStream
from unbroken.v1 import inference_service_pb2 as pb

PROMPT_TOKENS = 100
NUM_STREAMS = 6
MAX_TOKENS = 40


def prompt(index: int) -> list[int]:
    """Each so much longer than the one before it that a late arrival matters less."""
    return [97 + index] * (PROMPT_TOKENS + 300 * index)


async def streams_on(it: World, num: int = NUM_STREAMS) -> list[GenerationStream]:
    """Streams that have begun on the first worker; the largest is the first."""
    streams = [
        it.client.generate(
            token_ids=prompt(index), request_id=f"s{index}", max_tokens=MAX_TOKENS, temperature=0.0
        )
        for index in reversed(range(num))
    ]
    victim = it.sidecars[0]
    for index, stream in enumerate(streams):
        reading = asyncio.create_task(read_some(stream, 1))
        await it.until(lambda index=index: len(victim.starts) > index)
        victim.step()
        await reading
    return streams


def with_budget(**settings: Any) -> dict[str, Any]:
    """A burst of two of the streams, and a pace that nobody waits for in a test."""
    return {"resume_burst_tokens": 3000, "prefill_tokens_per_s": 1e6, **settings}


def test_resumes_go_as_the_survivor_computes_them_the_cheapest_first() -> None:
    async def scenario() -> None:
        survivor = FakeSidecar("w2", step_s=None)
        async with world(FakeSidecar("w1", step_s=None), **with_budget()) as it:
            streams = await streams_on(it)
            await it.add(survivor)
            await it.until_ready(2)
            await it.sidecars[0].die()
            await it.until(lambda: len(survivor.starts) == 2)
            names = [start.stream.request_id for start in survivor.starts]
            assert names[0] == "s5", "nobody else had lost its worker yet"
            await it.until(lambda: len(it.frontend.requests.page(0, "")[0]) == NUM_STREAMS)
            waiting = [
                choice.detail
                for info in it.frontend.requests.page(0, "")[0]
                for choice in info.choices
                if choice.state == pb.STREAM_STATE_PLACING
            ]
            assert len(waiting) == NUM_STREAMS - 2
            assert all(detail.startswith("resume queue: ") for detail in waiting)
            while len(survivor.starts) < NUM_STREAMS:
                before = len(survivor.starts)
                survivor.step()
                await it.until(lambda before=before: len(survivor.starts) > before)
            names = [start.stream.request_id for start in survivor.starts]
            assert names[2:] == sorted(names[2:]), "least work first"
            while survivor.running:
                survivor.step()
            for stream, index in zip(streams, reversed(range(NUM_STREAMS)), strict=True):
                ids, _ = await read(stream)
                assert ids == reference(prompt(index), MAX_TOKENS)[-len(ids) :]

    run(scenario())


def test_who_has_no_token_yet_stands_in_line_though_workers_share_a_memory_service() -> None:
    async def scenario() -> None:
        victim, survivor = (
            FakeSidecar(name, step_s=None, memory_service="here") for name in ("w1", "w2")
        )
        async with world(victim, **with_budget()) as it:
            streams = [
                it.client.generate(
                    token_ids=[97 + index] * 1600, request_id=f"s{index}", max_tokens=MAX_TOKENS
                )
                for index in range(NUM_STREAMS)
            ]
            reading = [asyncio.create_task(failure_of(stream)) for stream in streams]
            await it.until(lambda: len(victim.starts) == NUM_STREAMS)
            await it.add(survivor)
            await it.until_ready(2)
            await victim.die()
            await it.until(
                lambda: (
                    sum(
                        choice.detail.startswith("resume queue: ")
                        for info in it.frontend.requests.page(0, "")[0]
                        for choice in info.choices
                    )
                    == NUM_STREAMS - 1
                )
            )
            await it.until(lambda: len(survivor.starts) == 1)  # 1,600 tokens each, of 3,000.
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    run(scenario())


def test_without_the_queue_all_go_at_once() -> None:
    async def scenario() -> None:
        survivor = FakeSidecar("w2", step_s=None)
        async with world(FakeSidecar("w1", step_s=None), **with_budget(resume_queue=False)) as it:
            await streams_on(it)
            await it.add(survivor)
            await it.until_ready(2)
            await it.sidecars[0].die()
            await it.until(lambda: len(survivor.starts) == NUM_STREAMS)

    run(scenario())


def test_a_stream_that_is_cancelled_in_line_leaves_it() -> None:
    async def scenario() -> None:
        survivor = FakeSidecar("w2", step_s=None)
        async with world(
            FakeSidecar("w1", step_s=None), **with_budget(resume_burst_tokens=1)
        ) as it:
            streams = await streams_on(it, 3)
            await it.add(survivor)
            await it.until_ready(2)
            await it.sidecars[0].die()
            await it.until(lambda: len(survivor.starts) == 1)
            await it.client.cancel("s0")
            assert (await failure_of(streams[2])).reason is Reason.CANCELLED
            survivor.step()
            await it.until(lambda: len(survivor.starts) == 2)
            assert [start.stream.request_id for start in survivor.starts] == ["s2", "s1"]

    run(scenario())


def test_in_a_fleet_loss_new_requests_are_refused_with_a_time() -> None:
    async def scenario() -> None:
        survivor = FakeSidecar("w9", step_s=None)
        victims = [FakeSidecar(f"w{index}", step_s=None) for index in range(3)]
        limits = with_budget(resume_burst_tokens=1)
        async with world(victims[0], **limits) as it:
            await streams_on(it, 3)
            for sidecar in (*victims[1:], survivor):
                await it.add(sidecar)
            await it.until_ready(4)
            for victim in (*victims[1:], victims[0]):
                await victim.die()
            await it.until(lambda: len(survivor.starts) == 1)
            error = await failure_of(it.client.generate(token_ids=[97], max_tokens=1))
            assert error.reason is Reason.OVERLOADED
            assert error.retry_after_s
            while len(survivor.starts) < 3:
                before = len(survivor.starts)
                survivor.step()
                await it.until(lambda before=before: len(survivor.starts) > before)
            survivor.step()
            late = it.client.generate(token_ids=[97], max_tokens=1, temperature=0.0)
            first = await survivor_answers(late, survivor, it)
            assert first == reference([97], 1)

    async def survivor_answers(
        stream: GenerationStream, survivor: FakeSidecar, it: World
    ) -> list[int]:
        reading = asyncio.create_task(read(stream))
        await it.until(lambda: len(survivor.starts) == 4)
        survivor.step()
        return (await reading)[0]

    run(scenario())
