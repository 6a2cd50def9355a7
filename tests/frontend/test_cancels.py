"""Cancels and deadlines over real gRPC, with sidecars that step when they are told to."""

import asyncio

import pytest

from frontend.requests import SOFT_CANCEL_S_MAX
from tests.frontend.fakes import FakeSidecar
from tests.frontend.worlds import failure_of, read, read_some, run, world
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

pytestmark = pytest.mark.usefixtures("each_edge")

PROMPT = list(b"once upon a time")


def finished(stream: GenerationStream) -> pb.StreamFinished:
    """The last word, which every stream that was started must have."""
    assert stream.finished is not None
    return stream.finished


def test_a_soft_cancel_waits_for_the_next_step_although_something_is_to_be_sent() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(
                token_ids=PROMPT, request_id="r", temperature=0, num_choices=2
            )
            reading = asyncio.create_task(failure_of(stream))
            await sidecar.until(lambda: len(sidecar.starts) == 2)
            sidecar.step()
            request = next(iter(it.frontend.requests.running))
            await it.until(lambda: all(c.stream.num_sent == 1 for c in request.choices))
            tell, request.news.tell = request.news.tell, lambda: None  # What comes is not sent.
            sidecar.step()
            await it.until(lambda: all(len(c.stream.ledger) == 2 for c in request.choices))
            await it.client.cancel("r", is_soft=True)
            request.news.tell = tell
            tell()
            await it.until(lambda: all(c.stream.num_sent == 2 for c in request.choices))
            assert not request.is_done
            sidecar.step()
            assert (await reading).reason is Reason.CANCELLED
            assert [choice.num_tokens for choice in finished(stream).choices] == [3, 3]

    run(scenario())


def test_a_soft_cancel_lets_a_stream_that_goes_as_usual_have_one_more_step() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(token_ids=PROMPT, request_id="r", temperature=0)
            reading = asyncio.create_task(failure_of(stream))
            await sidecar.until(lambda: sidecar.starts)
            (request,) = it.frontend.requests.running
            for num_tokens in range(1, 11):
                sidecar.step()
                await it.until(lambda n=num_tokens: request.choices[0].stream.num_sent == n)
            await it.client.cancel("r", is_soft=True)
            sidecar.step()
            async with asyncio.timeout(SOFT_CANCEL_S_MAX / 2):
                assert (await reading).reason is Reason.CANCELLED
            assert finished(stream).choices[0].num_tokens == 11

    run(scenario())


def test_stop_lets_the_stream_be_read_to_its_end_with_usage() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000)
            num_read = sum(len(piece.token_ids) for piece in await read_some(stream, 5))
            await stream.stop()
            error: UnbrokenError | None = None
            try:
                async for piece in stream:
                    num_read += len(piece.token_ids)
            except UnbrokenError as caught:
                error = caught
            assert error is not None
            assert error.reason is Reason.CANCELLED
            assert finished(stream).usage.completion_tokens == num_read
            await stream.stop()

    run(scenario())


def test_nothing_that_comes_after_the_answer_to_a_cancel_is_part_of_the_output() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(token_ids=PROMPT, request_id="r", num_choices=3)
            reading = asyncio.create_task(failure_of(stream))
            await sidecar.until(lambda: len(sidecar.starts) == 3)
            for _ in range(4):
                sidecar.step()
            await it.until(lambda: it.num_tokens() == 12)
            assert await it.client.cancel("r")
            sidecar.step()  # As if it had been on its way.
            await reading
            end = finished(stream)
            assert [choice.num_tokens for choice in end.choices] == [4, 4, 4]
            assert end.usage.completion_tokens == 12
            await sidecar.until(lambda: len(sidecar.aborts) == 3)

    run(scenario())


def test_a_client_that_leaves_takes_what_is_below_its_request_with_it() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000, request_id="a")
            below = it.client.generate(
                token_ids=PROMPT, max_tokens=3000, request_id="b", parent_request_id="a"
            )
            await read_some(stream, 5)
            await read_some(below, 5)
            await stream.cancel()
            error = await failure_of(below)
            assert error.reason is Reason.CANCELLED
            assert "its parent ended early" in error.detail

    run(scenario())


def test_a_cancel_of_what_is_not_here_is_told_to_all_workers_and_of_what_is_here_to_none() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1", step_s=0.002), FakeSidecar("w2", step_s=0.002)
        async with world(*sidecars) as it:
            assert not await it.client.cancel("elsewhere", tenant="t")
            for sidecar in sidecars:
                await sidecar.until(lambda s=sidecar: s.cancels == [("t", "elsewhere")])
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000, request_id="here")
            await read_some(stream, 2)
            assert await it.client.cancel("here")
            assert (await failure_of(stream)).reason is Reason.CANCELLED
            assert not await it.client.cancel("last")
            for sidecar in sidecars:
                await sidecar.until(lambda s=sidecar: len(s.cancels) == 2)
                assert sidecar.cancels[-1] == ("", "last")

    run(scenario())


def test_a_name_that_no_request_can_have_is_refused() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            for request_id, tenant in (("x" * 129, ""), ("x", "x" * 129)):
                with pytest.raises(UnbrokenError) as refused:
                    await it.client.cancel(request_id, tenant=tenant)
                assert refused.value.reason is Reason.INVALID_FIELD

    run(scenario())


def test_what_is_below_a_complete_request_goes_on() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, request_id="a")
            below = it.client.generate(
                token_ids=PROMPT, max_tokens=200, request_id="b", parent_request_id="a"
            )
            await read_some(below, 1)
            await read(stream)
            await read(below)
            assert finished(below).usage.completion_tokens == 200

    run(scenario())


def test_a_request_that_comes_after_the_cancel_of_its_parent_is_refused() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            assert not await it.client.cancel("a")
            late = it.client.generate(token_ids=PROMPT, max_tokens=5, parent_request_id="a")
            error = await failure_of(late)
            assert error.reason is Reason.CANCELLED
            assert late.started is None
            assert not it.sidecars[0].starts

    run(scenario())


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_stream_that_is_cancelled_while_nobody_has_it_is_not_resumed(is_cancelled: bool) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=200, request_id="r")
            await read_some(stream, 5)
            checkpoint = stream.checkpoint()
            await stream.cancel()
            await it.until(lambda: it.num_running() == 0)
            if is_cancelled:
                assert not await it.another_client().cancel("r")
            resumed = it.client.resume(checkpoint)
            if is_cancelled:
                assert (await failure_of(resumed)).reason is Reason.CANCELLED
                assert it.num_running() == 0
            else:
                await read(resumed)
                assert finished(resumed).usage.completion_tokens == 200

    run(scenario())


def test_a_request_that_waits_for_its_model_can_be_cancelled() -> None:
    async def scenario() -> None:
        async with world() as it:
            it.sidecars.append(FakeSidecar("w1", state=worker_pb2.ENGINE_STATE_STARTING))
            await it.sidecars[0].begin()
            it.announce()
            stream = it.client.generate(token_ids=PROMPT, request_id="r")
            reading = asyncio.create_task(failure_of(stream))
            await it.until(lambda: it.frontend.requests.entrants)
            assert await it.client.cancel("r")
            assert (await reading).reason is Reason.CANCELLED
            assert not it.frontend.requests.entrants

    run(scenario())


def test_a_tree_is_cancelled_across_frontends() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as one, world(FakeSidecar("w2")) as other:
            both = Client(one.frontend.address, other.frontend.address)
            one.clients.append(both)
            homes = {"a": one, "b": other, "c": one}
            streams = {
                name: home.client.generate(
                    token_ids=PROMPT, max_tokens=3000, request_id=name, parent_request_id=parent
                )
                for (name, home), parent in zip(homes.items(), ("", "a", "b"), strict=True)
            }
            for stream in streams.values():
                await read_some(stream, 1)
            assert await both.cancel("a")
            for stream in streams.values():
                assert (await failure_of(stream)).reason is Reason.CANCELLED

    run(scenario())


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_others_are_not() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            load = worker_pb2.LoadReport()
            for num_tokens in (0, 0, 1000):  # A step takes 10 ms, and 1,000 tokens take 1 s.
                load.steps_us_total += 10_000 + 1_000 * num_tokens
                load.engine_steps_total += 1
                load.prefill_tokens_total += num_tokens
                sidecar.say_frame(attempt_pb2.StepFrame(load=load))
            worker = it.frontend.mesh.workers["w1"]
            await it.until(lambda: worker.load and worker.load.prefill_tokens_total == 1000)
            hopeless = it.client.generate(token_ids=[65] * 2000, timeout_s=0.9)
            began_at = asyncio.get_running_loop().time()
            error = await failure_of(hopeless)
            assert error.reason is Reason.DEADLINE_EXCEEDED
            assert asyncio.get_running_loop().time() - began_at < 0.5
            assert float(error.metadata["first_token_s"]) == pytest.approx(2.01, rel=0.05)
            assert hopeless.started is None
            assert not sidecar.starts
            hopeful = it.client.generate(token_ids=[65] * 2000, timeout_s=1.5)
            reading = asyncio.create_task(failure_of(hopeful))
            await sidecar.until(lambda: sidecar.starts)
            assert (await reading).reason is Reason.DEADLINE_EXCEEDED

    run(scenario())
