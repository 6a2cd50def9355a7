"""New requests that wait while all workers are busy, over real gRPC."""

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
import pytest

from frontend.waiting_room import PASSING_MAX
from tests.frontend import test_shedding
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.refusals import refused
from tests.frontend.test_resumes_in_line import streams_on
from tests.frontend.test_shedding import count_of
from tests.frontend.worlds import World, failure_of, read, read_some, run, world
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import relay_service_pb2, worker_pb2
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

pytestmark = pytest.mark.usefixtures("each_edge")

PROMPT = list(b"once upon a time")
Reading = asyncio.Task[tuple[list[int], str]]


async def report(it: World, sidecar: FakeSidecar, used: int, queued: int = 0) -> None:
    """As there; a sidecar that has more than 40 prompt tokens takes no new work."""
    sidecar.full_with = queued if queued > 40 else None
    await test_shedding.report(it, sidecar, used, queued)


def begin(it: World, request_id: str, **more: object) -> Reading:
    """Ask for something, and read it."""
    stream = it.client.generate(
        token_ids=PROMPT,
        max_tokens=3,
        temperature=0,
        request_id=request_id,
        **more,  # type: ignore[arg-type]
    )
    return asyncio.create_task(read(stream))


async def line_up(it: World, request_ids: Sequence[str], **more: object) -> list[Reading]:
    """Have them wait, in this order."""
    readings: list[Reading] = []
    for request_id in request_ids:
        number = it.num_running()
        readings.append(begin(it, request_id, **more))
        await it.until(lambda n=number: it.num_running() == n + 1)
    return readings


async def to_the_end(
    call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]",
) -> None:
    """Read whatever comes."""
    while await call.read() is not grpc.aio.EOF:
        pass


def begun(sidecar: FakeSidecar) -> list[str]:
    """What was begun there, in order."""
    return [start.stream.request_id for start in sidecar.starts]


def test_who_comes_while_all_are_busy_waits_and_is_served_when_one_is_not() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1"), FakeSidecar("w2")
        async with world(*sidecars, busy_prefill_tokens=100) as it:
            for sidecar in sidecars:
                await report(it, sidecar, used=0, queued=101)
            (reading,) = await line_up(it, ["r"])
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            assert count_of(it, "queue_prefill_tokens") == len(PROMPT)
            infos, _ = it.frontend.requests.page(0, "")
            assert infos[0].choices[0].detail.startswith("all workers are busy")
            assert not sidecars[0].starts
            await report(it, sidecars[1], used=0, queued=30)
            assert (await reading)[0] == reference(PROMPT, 3)
            assert begun(sidecars[1]) == ["r"]
            assert count_of(it, "queue_requests") == 0
            assert count_of(it, "queue_wait_seconds_count") >= 1
            assert count_of(it, "requests_refused_total", reason="OVERLOADED") == 0

    run(scenario())


def test_a_worker_gets_no_more_of_the_line_than_it_may_have() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar, busy_prefill_tokens=40) as it:
            await report(it, sidecar, used=0, queued=41)
            readings = await line_up(it, [f"r{index}" for index in range(9)])
            await report(it, sidecar, used=0, queued=0)
            # Two ranks take 40 tokens each and not more: 6 prompts of 16 tokens are above.
            await sidecar.until(lambda: len(sidecar.starts) == 6)
            assert count_of(it, "queue_requests") == 3
            assert begun(sidecar) == [f"r{index}" for index in range(6)]
            await report(it, sidecar, used=1, queued=0)
            await sidecar.until(lambda: len(sidecar.starts) == 9)
            while sidecar.step():
                pass
            await asyncio.gather(*readings)

    run(scenario())


def test_the_line_is_served_by_priority_and_tenants_in_turns() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0, queued=101)
            readings = await line_up(it, ["a1", "a2", "a3"], tenant="a")
            readings += await line_up(it, ["b1"], tenant="b")
            readings += await line_up(it, ["urgent"], tenant="a", priority=1)
            await report(it, sidecar, used=0, queued=0)
            await asyncio.gather(*readings)
            order = begun(sidecar)
            assert order[0] == "urgent"
            assert order.index("b1") < order.index("a2")

    run(scenario())


def test_who_finds_the_line_full_is_told_when_to_come_back_and_is_then_let_in() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100, queue_requests_max=2) as it:
            await report(it, sidecar, used=0, queued=101)
            readings = await line_up(it, ["a", "b"])
            await it.until(lambda: count_of(it, "queue_requests") == 2)
            request = pb.GenerateRequest(request_id="c", token_ids=pb.TokenIds(ids=PROMPT))
            told = await refused(it, request)
            assert [one.quota_id for one in told.quota.violations] == ["prefill_tokens"]
            assert told.quota.violations[0].subject == f"model:{MODEL}"
            assert "2 requests with 32 prompt tokens wait" in told.message
            assert count_of(it, "queue_refused_total", limit="requests") == 1
            assert count_of(it, "requests_shed_total", threshold="prefill_tokens") == 1
            assert count_of(it, "queue_promises") == 1
            await report(it, sidecar, used=0, queued=0)
            await asyncio.gather(*readings)
            await read(it.client.generate(token_ids=PROMPT, max_tokens=1, request_id="c"))
            assert count_of(it, "queue_promises") == 0

    run(scenario())


def test_nobody_waits_for_longer_than_he_may() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100, queue_wait_s_max=0.1) as it:
            await report(it, sidecar, used=0, queued=101)
            stub = InferenceServiceStub(await it.client.channel())
            call = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await to_the_end(call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert count_of(it, "queue_refused_total", limit="expired") == 1
            assert it.num_running() == 0
            assert not sidecar.starts

    run(scenario())


def test_who_leaves_the_line_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0, queued=101)
            (by_call, by_name, by_deadline, stays) = (
                *await line_up(it, ["a", "b"]),
                *await line_up(it, ["c"], timeout_s=0.3),
                *await line_up(it, ["d"]),
            )
            by_call.cancel()
            await it.client.cancel("b")
            with pytest.raises(UnbrokenError) as cancelled:
                await by_name
            assert cancelled.value.reason is Reason.CANCELLED
            with pytest.raises(UnbrokenError) as late:
                await by_deadline
            assert late.value.reason is Reason.DEADLINE_EXCEEDED
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            await report(it, sidecar, used=0, queued=0)
            await stays
            assert begun(sidecar) == ["d"]
            await asyncio.gather(by_call, return_exceptions=True)

    run(scenario())


def test_who_is_let_in_and_refused_by_the_worker_waits_for_the_next_one() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", full_with=101)
        async with world(sidecar, busy_prefill_tokens=100) as it:
            (reading,) = await line_up(it, ["r"])
            await sidecar.until(lambda: sidecar.num_turned_away == 2)
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            await report(it, sidecar, used=0, queued=0)
            assert (await reading)[0] == reference(PROMPT, 3)
            assert [start.is_new_work for start in sidecar.starts] == [True]
            assert count_of(it, "requests_refused_total", reason="OVERLOADED") == 0

    run(scenario())


def test_the_choices_of_a_request_wait_for_the_first() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0, queued=101)
            (reading,) = await line_up(it, ["r"], num_choices=3)
            await report(it, sidecar, used=0, queued=101)
            await it.until(lambda: count_of(it, "queue_prefill_tokens") == 3 * len(PROMPT))
            assert not sidecar.starts
            await report(it, sidecar, used=0, queued=0)
            await reading
            assert sorted(start.stream.choice_index for start in sidecar.starts) == [0, 1, 2]

    run(scenario())


def test_the_choices_of_a_request_wait_for_the_first_behind_resumes_too() -> None:
    async def scenario() -> None:
        survivor = FakeSidecar("w2", step_s=None)
        limits = {"resume_burst_tokens": 1, "prefill_tokens_per_s": 1e6, "queue_wait_s_max": 0.3}
        async with world(FakeSidecar("w1", step_s=None), busy_kv_blocks_share=0.5, **limits) as it:
            await streams_on(it, 3)
            await it.add(survivor)
            await it.until_ready(2)
            await it.sidecars[0].die()
            await it.until(lambda: len(survivor.starts) == 1)
            stream = it.client.generate(
                token_ids=PROMPT, num_choices=3, max_tokens=3, request_id="r"
            )
            reading = asyncio.create_task(failure_of(stream))
            await it.until(lambda: it.num_running() == 4)
            infos, _ = it.frontend.requests.page(0, "")
            (info,) = (info for info in infos if info.request_id == "r")
            assert info.choices[0].detail.startswith("held back by resumes")
            await report(it, survivor, used=99)
            while len(survivor.starts) < 3:
                survivor.step()
                await asyncio.sleep(0.002)
            survivor.step()
            assert (await reading).reason is Reason.OVERLOADED
            assert "r" not in begun(survivor), "it is refused as a whole"

    run(scenario())


def test_streams_that_lost_their_worker_go_before_those_in_line() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1", step_s=0.005), FakeSidecar("w2", step_s=0.005)
        async with world(*sidecars, busy_prefill_tokens=100) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=60, temperature=0, request_id="old"
            )
            ids = [i for piece in await read_some(stream, 3) for i in piece.token_ids]
            for sidecar in sidecars:
                await report(it, sidecar, used=0, queued=101)
            (waiting,) = await line_up(it, ["new"])
            lost = await it.sidecar_of("old")
            (left,) = (one for one in sidecars if one is not lost)
            await lost.die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 60)
            await report(it, left, used=0, queued=0)
            await waiting
            assert begun(left)[-2:] == ["old", "new"]

    run(scenario())


def test_who_lost_a_worker_that_had_said_nothing_waits_again_and_goes_first() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        limits = {"busy_prefill_tokens": 100, "queue_wait_s_max": 0.3}
        async with world(*sidecars, **limits) as it:
            (reading,) = await line_up(it, ["lost"])
            lost = await it.sidecar_of("lost")
            (left,) = (one for one in sidecars if one is not lost)
            for sidecar in sidecars:
                await report(it, sidecar, used=0, queued=101)
            (other,) = await line_up(it, ["other"])
            # It was tried and refused; had it died with the worker, it would go first too.
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            await lost.die()
            await it.until(lambda: count_of(it, "queue_requests") == 2)
            assert not begun(left), "its thresholds hold for a request that it would begin"
            infos, _ = it.frontend.requests.page(0, "")
            details = [info.choices[0].detail for info in infos]
            assert all(detail.startswith("all workers are busy") for detail in details)
            with pytest.raises(UnbrokenError) as expired:
                await other
            assert expired.value.reason is Reason.OVERLOADED
            (other,) = await line_up(it, ["another"])
            await report(it, left, used=0, queued=0)
            await left.until(lambda: len(left.starts) == 2)
            assert begun(left) == ["lost", "another"]
            assert [start.is_new_work for start in left.starts] == [True, True]
            while left.step():
                pass
            assert (await reading)[0] == reference(PROMPT, 3)
            await other

    run(scenario())


def test_who_lost_a_worker_is_not_sent_away_by_the_next_that_is_busy() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with world(*sidecars, busy_prefill_tokens=100) as it:
            (reading,) = await line_up(it, ["r"])
            lost = await it.sidecar_of("r")
            (left,) = (one for one in sidecars if one is not lost)
            left.full_with = 101
            await lost.die()
            await left.until(lambda: left.num_turned_away)
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            await report(it, left, used=0, queued=0)
            await left.until(lambda: left.starts)
            while left.step():
                pass
            assert (await reading)[0] == reference(PROMPT, 3)
            assert [start.is_new_work for start in left.starts] == [True]

    run(scenario())


def test_a_request_that_no_free_worker_can_take_holds_nobody_back() -> None:
    async def scenario() -> None:
        short = FakeSidecar("w1", context_length=64)
        long = FakeSidecar("w2")
        async with world(short, long, busy_prefill_tokens=100) as it:
            for sidecar in (short, long):
                await report(it, sidecar, used=0, queued=101)
            readings = await line_up(it, ["long"], priority=1)
            stream = it.client.generate(
                token_ids=list(b"x" * 100), max_tokens=3, temperature=0, request_id="longer"
            )
            number = it.num_running()
            longer = asyncio.create_task(read(stream))
            await it.until(lambda: it.num_running() == number + 1)
            readings += await line_up(it, ["short"])
            await report(it, short, used=0, queued=0)
            await asyncio.gather(*readings)
            assert begun(short) == ["long", "short"]
            assert not longer.done()
            await report(it, long, used=0, queued=0)
            await longer
            assert begun(long) == ["longer"]

    run(scenario())


def test_other_thresholds_let_in_whom_no_free_worker_could_take() -> None:
    async def scenario() -> None:
        short = FakeSidecar("w1", context_length=64)
        long = FakeSidecar("w2")
        async with world(short, long, busy_prefill_tokens=100, queue_wait_s_max=15.0) as it:
            for sidecar in (short, long):
                await report(it, sidecar, used=0, queued=101)
            stream = it.client.generate(token_ids=list(b"x" * 100), max_tokens=3, temperature=0)
            reading = asyncio.create_task(read(stream))
            await it.until(lambda: it.num_running() == 1)
            await report(it, short, used=0, queued=0)
            await begin(it, "short")
            assert (begun(short), begun(long)) == (["short"], []), "it stands aside"
            long.full_with = None
            await it.client.set_thresholds(worker_pb2.BusyThresholds(prefill_tokens=1000))
            await reading

    run(scenario())


def test_a_model_without_workers_is_unavailable_and_an_unknown_one_not_found() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, busy_prefill_tokens=100, placement_timeout_s=0.2) as it:
            await read(it.client.generate(token_ids=PROMPT, max_tokens=1))
            sidecar.say_state(worker_pb2.ENGINE_STATE_STARTING)
            await it.until_ready(0)
            stub = InferenceServiceStub(await it.client.channel())
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
            with pytest.raises(grpc.aio.AioRpcError) as gone:
                await to_the_end(stub.Generate(request))
            assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
            assert int(dict(gone.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
            error = await failure_of(it.client.generate(token_ids=PROMPT, model="unheard of"))
            assert error.reason is Reason.MODEL_NOT_FOUND

    run(scenario())


def test_a_tenant_with_nothing_at_any_worker_is_tried_once_for_each_news_of_them() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0, queued=0)
            many = await line_up(it, [f"m{index}" for index in range(14)], tenant="many")
            await sidecar.until(lambda: len(sidecar.starts) == 13)
            assert count_of(it, "queue_requests") == 1, "who has some before engines waits"
            sidecar.full_with = 101
            (one,) = await line_up(it, ["one"], tenant="one")
            await sidecar.until(lambda: sidecar.num_turned_away == 1)
            await asyncio.sleep(0.05)
            assert sidecar.num_turned_away == 1
            sidecar.full_with = None
            await test_shedding.report(it, sidecar, used=0, queued=101)
            await sidecar.until(lambda: "one" in begun(sidecar))
            assert len(sidecar.starts) == 14, "and nobody of the others"
            while sidecar.step():
                pass
            await it.until(one.done)
            await report(it, sidecar, used=0, queued=0)
            await sidecar.until(lambda: len(sidecar.starts) == 15)
            while sidecar.step():
                pass
            await asyncio.gather(one, *many)

    run(scenario())


def test_a_tenant_is_tried_though_another_that_cannot_be_has_the_next_turn() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar, busy_prefill_tokens=100) as it:
            sidecar.full_with = 101
            await test_shedding.report(it, sidecar, used=0, queued=101)
            flood = await line_up(it, ["f0", "f1"], tenant="flood")
            await sidecar.until(lambda: sidecar.num_turned_away >= 1)
            others: list[Reading] = []
            for number in range(2, PASSING_MAX + 1):
                others += await line_up(it, [f"t{number}"], tenant=f"t{number}")
                await sidecar.until(lambda number=number: sidecar.num_turned_away >= number)
            others += await line_up(it, ["last"], tenant="last")
            await asyncio.sleep(0.05)
            assert sidecar.num_turned_away == PASSING_MAX, "so many until there is news"
            sidecar.full_with = None
            await test_shedding.report(it, sidecar, used=0, queued=101)
            await sidecar.until(lambda: "last" in begun(sidecar))
            await report(it, sidecar, used=0, queued=0)
            await sidecar.until(lambda: len(sidecar.starts) == PASSING_MAX + 2)
            while sidecar.step():
                pass
            await asyncio.gather(*others, *flood)

    run(scenario())


def test_who_needs_room_for_several_choices_is_not_overtaken() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar, busy_prefill_tokens=100) as it:
            await test_shedding.report(it, sidecar, used=0, queued=101)
            several = await line_up(it, ["several"], tenant="several", num_choices=2)
            other = await line_up(it, ["other"], tenant="other")
            await asyncio.sleep(0.05)
            assert not sidecar.starts, "its room would be taken"
            await report(it, sidecar, used=0, queued=0)
            await sidecar.until(lambda: len(sidecar.starts) == 3)
            while sidecar.step():
                pass
            await asyncio.gather(*several, *other)

    run(scenario())


def test_what_waits_here_is_told_and_what_waits_elsewhere_counts() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(
            sidecar, busy_prefill_tokens=100, queue_wait_s_max=5.0, heartbeat_interval_s=0.02
        ) as it:
            await report(it, sidecar, used=0, queued=101)
            readings = await line_up(it, ["r1", "r2"])
            await sidecar.until(
                lambda: (
                    sidecar.heartbeats != []
                    and sidecar.heartbeats[-1].queue.tokens_waiting == 2 * len(PROMPT)
                )
            )
            elsewhere = relay_service_pb2.QueueReport(
                frontend_id="other", incarnation=1, sequence=1, tokens_promised=10**9
            )
            heartbeat = relay_service_pb2.Heartbeat(sequence=1, queues=[elsewhere])
            sidecar.say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
            await it.until(lambda: count_of(it, "queue_elsewhere_tokens") == 10**9)
            error = await failure_of(it.client.generate(token_ids=PROMPT, max_tokens=1))
            assert error.metadata["queue_limit"] == "wait"
            assert error.retry_after_s is not None
            assert error.retry_after_s > 100
            await report(it, sidecar, used=0, queued=0)
            await asyncio.gather(*readings)

    run(scenario())
