"""Streams that are paused for requests of a higher priority, over real gRPC."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.frontend import test_shedding
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.test_shedding import count_of
from tests.frontend.worlds import World, run, world
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, holding_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

pytestmark = pytest.mark.usefixtures("each_edge")

PROMPT = list(b"once upon a time")
ROOM, FULL = 20, 51
"""KV blocks of 100 that each of two ranks holds while a worker takes work, and while it is busy."""
LONG = 60


def pausing(*sidecars: FakeSidecar, **settings: Any) -> AbstractAsyncContextManager[World]:
    settings.setdefault("preemption_run_s_min", 0.0)
    return world(*sidecars, busy_kv_blocks_share=0.5, preemption=True, **settings)


async def report(it: World, sidecar: FakeSidecar, used: int) -> None:
    """As there; a worker that is busy refuses new work."""
    sidecar.is_full = used >= FULL
    await test_shedding.report(it, sidecar, used)


async def looked(it: World, sidecar: FakeSidecar) -> None:
    """There was news of a worker that is busy: who waits was tried, and refused."""
    num_before = sidecar.num_turned_away
    await report(it, sidecar, used=FULL)
    await sidecar.until(lambda: sidecar.num_turned_away > num_before)
    await it.until(lambda: count_of(it, "queue_requests") == 1)


class Call:
    """A request, and a client that reads all of it."""

    def __init__(self, it: World, request_id: str, *, priority: int = 0, **more: Any) -> None:
        self.request_id = request_id
        more.setdefault("max_tokens", LONG)
        self.stream: GenerationStream = it.client.generate(
            token_ids=PROMPT, temperature=0, request_id=request_id, priority=priority, **more
        )
        self.ids: dict[int, list[int]] = {}
        self.task = asyncio.create_task(self._read())
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self) -> None:
        async for piece in self.stream:
            self.ids.setdefault(piece.choice_index, []).extend(piece.token_ids)

    async def error(self) -> UnbrokenError:
        with pytest.raises(UnbrokenError) as caught:
            await self.task
        return caught.value

    @property
    def finished(self) -> pb.StreamFinished:
        assert self.stream.finished is not None
        return self.stream.finished


async def running(it: World, sidecar: FakeSidecar, request_id: str, **more: Any) -> Call:
    """A call that has some output."""
    num_before = len(sidecar.starts)
    call = Call(it, request_id, **more)
    num_choices = more.get("num_choices", 1)
    await sidecar.until(lambda: len(sidecar.starts) == num_before + num_choices)
    for _ in range(5):
        sidecar.step()
    await it.until(lambda: len(call.ids.get(0, [])) >= 5)
    return call


def choices_of(it: World, call: Call) -> list[pb.ChoiceInfo]:
    return list(it.frontend.requests.get(call.request_id, tenant="").choices)


def is_paused(it: World, call: Call) -> bool:
    return all(choice.state == pb.STREAM_STATE_PAUSED for choice in choices_of(it, call))


async def paused(it: World, sidecar: FakeSidecar, **more: Any) -> tuple[Call, Call]:
    """A call that is paused, and the one that it is paused for, which waits."""
    low = await running(it, sidecar, "low", **more)
    await report(it, sidecar, used=FULL)
    high = Call(it, "high", priority=1, max_tokens=3)
    await it.until(lambda: is_paused(it, low))
    return low, high


async def finished(sidecar: FakeSidecar, *calls: Call) -> None:
    """Step until these have all they wanted."""
    async with asyncio.timeout(5):
        while not all(call.task.done() for call in calls):
            sidecar.step()
            await asyncio.sleep(0.002)
    for call in calls:
        call.task.result()


async def holdings(it: World) -> set[tuple[str, int]]:
    """Whose they are, and of which kind."""
    (process,) = await it.client.ledger()
    return {(one.stream.request_id, one.kind) for one in process.holdings}


def begun(sidecar: FakeSidecar) -> list[str]:
    return [start.stream.request_id for start in sidecar.starts]


def test_a_stream_is_paused_for_a_higher_priority_and_goes_on_with_the_same_tokens() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(sidecar) as it:
            low, high = await paused(it, sidecar)
            assert not sidecar.running, "it holds nothing at its worker"
            (choice,) = choices_of(it, low)
            assert choice.num_tokens == 5
            assert choice.detail.startswith("paused for a request of priority 1")
            (listed,) = [s async for s in it.client.list_streams() if s.request_id == "low"]
            assert listed.choices[0].state == pb.STREAM_STATE_PAUSED
            assert count_of(it, "choices_paused") == 1
            assert begun(sidecar) == ["low"], "no report has shown that there is room"
            await report(it, sidecar, used=ROOM)
            await sidecar.until(lambda: begun(sidecar) == ["low", "high", "low"])
            await finished(sidecar, low, high)
            assert low.ids[0] == reference(PROMPT, LONG)
            assert high.ids[0] == reference(PROMPT, 3)
            usage, first = low.finished.usage, low.finished.attempts[0]
            assert usage.completion_tokens == LONG
            assert usage.recomputed_prefill_tokens == len(PROMPT) + 5
            assert first.failure == FailureKind.PREEMPTED
            assert low.finished.choices[0].continued == pb.CONTINUED_EXACT
            assert count_of(it, "pauses_total") == 1
            assert count_of(it, "pause_seconds_count") == 1
            assert count_of(it, "choices_paused") == 0
            assert count_of(it, "migration_gap_seconds_count") == 0
            migrated = count_of(it, "migrations_total", failure="PREEMPTED", way="NATIVE")
            assert migrated == 1

    run(scenario())


def test_nobody_goes_in_before_the_worker_has_said_that_it_stopped() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        sidecar.is_reluctant = True
        async with pausing(sidecar) as it:
            low = await running(it, sidecar, "low")
            await report(it, sidecar, used=FULL)
            high = Call(it, "high", priority=1, max_tokens=3)
            await sidecar.until(lambda: sidecar.aborts)
            assert not is_paused(it, low)
            await looked(it, sidecar)
            assert len(sidecar.aborts) == 1
            assert begun(sidecar) == ["low"]
            # One that never says so is left: no stream hangs for it.
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, low, high)
            assert low.ids[0] == reference(PROMPT, LONG)

    run(scenario())


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"preemption": False}, {}),
        ({}, {"priority": 1}),
        ({}, {"continuation": pb.CONTINUATION_POLICY_NEVER}),
        ({}, {"max_tokens": 30}),  # Nearly done.
    ],
)
def test_who_must_not_be_paused_runs_on(settings: dict[str, Any], more: dict[str, Any]) -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        settings.setdefault("preemption", True)
        async with world(sidecar, busy_kv_blocks_share=0.5, **settings) as it:
            low = await running(it, sidecar, "low", **more)
            await report(it, sidecar, used=FULL)
            high = Call(it, "high", priority=1, max_tokens=3)
            await it.until(lambda: count_of(it, "queue_requests") == 1)
            await looked(it, sidecar)
            await looked(it, sidecar)
            assert not sidecar.aborts
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, low, high)
            assert begun(sidecar) == ["low", "high"]

    run(scenario())


def test_new_work_of_the_same_priority_waits_for_who_is_paused() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(sidecar) as it:
            low, high = await paused(it, sidecar)
            peer = Call(it, "peer", max_tokens=3)
            await it.until(lambda: count_of(it, "queue_requests") == 2)
            await report(it, sidecar, used=ROOM)
            await sidecar.until(lambda: len(sidecar.starts) == 4)
            assert begun(sidecar) == ["low", "high", "low", "peer"]
            await finished(sidecar, low, high, peer)

    run(scenario())


def test_who_was_paused_for_long_enough_goes_on_however_busy_workers_are() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(
            sidecar, preemption_wait_s_max=0.3, preemption_pauses_max=1, queue_wait_s_max=60.0
        ) as it:
            low, high = await paused(it, sidecar)
            await sidecar.until(lambda: begun(sidecar) == ["low", "low"])
            await finished(sidecar, low)
            assert low.ids[0] == reference(PROMPT, LONG)
            assert not high.task.done()
            assert len(sidecar.aborts) == 1, "it was paused as often as it may be"
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, high)

    run(scenario())


def test_a_paused_stream_is_cancelled_at_once_and_leaves_nothing() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(sidecar) as it:
            low, high = await paused(it, sidecar)
            assert ("low", holding_pb2.HOLDING_KIND_QUEUE_ENTRY) in await holdings(it)
            await it.client.cancel("low")
            assert (await low.error()).reason is Reason.CANCELLED
            assert low.ids[0] == reference(PROMPT, 5)
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, high)
            assert begun(sidecar) == ["low", "high"]
            await it.until(lambda: it.num_running() == 0)
            assert not await holdings(it)

    run(scenario())


def test_a_paused_stream_keeps_its_deadline() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(sidecar) as it:
            low, high = await paused(it, sidecar, timeout_s=1.0)
            assert (await low.error()).reason is Reason.DEADLINE_EXCEEDED
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, high)

    run(scenario())


def test_a_paused_stream_outlives_the_worker_that_it_was_at() -> None:
    async def scenario() -> None:
        first, second = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with pausing(first) as it:
            low, high = await paused(it, first)
            await it.add(second)
            await it.until_ready(2)
            await first.die()
            await it.until(lambda: it.frontend.mesh.num_ready("letters") == 1)
            await second.until(lambda: begun(second) == ["high", "low"])
            await finished(second, low, high)
            assert low.ids[0] == reference(PROMPT, LONG)

    run(scenario())


def test_a_paused_stream_is_nothing_that_the_drain_of_its_worker_waits_for_and_goes_on() -> None:
    async def scenario() -> None:
        first, second = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with pausing(first) as it:
            low, high = await paused(it, first)
            first.is_draining = True
            first.say_state(worker_pb2.ENGINE_STATE_SERVING)
            await it.until_ready(0)
            assert not first.running, "nothing is to be handed over"
            assert is_paused(it, low)
            await it.add(second)
            await first.die()
            await second.until(lambda: begun(second) == ["high", "low"])
            await finished(second, low, high)
            assert low.ids[0] == reference(PROMPT, LONG)
            assert [one.failure for one in low.finished.attempts if one.failure] == [
                FailureKind.PREEMPTED
            ]

    run(scenario())


def test_who_was_to_be_paused_when_its_worker_hands_it_over_is_not_and_goes_on() -> None:
    async def scenario() -> None:
        first, second = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        first.is_reluctant = True
        async with pausing(first) as it:
            low = await running(it, first, "low")
            await report(it, first, used=FULL)
            high = Call(it, "high", priority=1, max_tokens=3)
            await first.until(lambda: first.aborts)
            first.is_draining = True
            first.say_state(worker_pb2.ENGINE_STATE_SERVING)
            ended = attempt_pb2.AttemptEnded(
                slot=first.aborts[0],
                end_offset=len(low.ids[0]),
                failure=worker_pb2.FAILURE_KIND_DRAIN,
                detail="handed over",
            )
            first.say_frame(attempt_pb2.StepFrame(ended=[ended]))
            await it.until_ready(0)
            assert not is_paused(it, low), "it looks for a worker by itself"
            await it.add(second)
            await second.until(lambda: sorted(begun(second)) == ["high", "low"])
            await finished(second, low, high)
            assert low.ids[0] == reference(PROMPT, LONG)
            assert [one.failure for one in low.finished.attempts if one.failure] == [
                FailureKind.DRAIN
            ]
            assert count_of(it, "choices_paused") == 0

    run(scenario())


def test_choices_are_paused_each_for_itself() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with pausing(sidecar) as it:
            low = await running(it, sidecar, "low", num_choices=3)
            # 2 blocks each; 3 have to go.
            await report(it, sidecar, used=53)
            high = Call(it, "high", priority=1, max_tokens=3)
            await it.until(lambda: count_of(it, "choices_paused") == 2)
            await report(it, sidecar, used=ROOM)
            await finished(sidecar, low, high)
            assert len(low.ids) == 3
            assert all(len(ids) == LONG for ids in low.ids.values())
            assert low.ids[0] == reference(PROMPT, LONG)
            assert low.finished.usage.recomputed_prefill_tokens == 2 * (len(PROMPT) + 5)

    run(scenario())


def test_a_worker_that_is_ejected_has_no_room_as_long_as_there_is_another() -> None:
    async def scenario() -> None:
        first, second = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with pausing(first, second) as it:
            view = it.frontend.mesh.workers["w2"].view
            assert view is not None
            view.is_ejected = True
            low, high = await paused(it, first)
            await it.client.cancel("high")
            await high.error()
            await report(it, first, used=FULL)
            await report(it, second, used=0)
            await it.client.list_workers()  # By now who goes on has gone.
            assert is_paused(it, low), "it would be placed at the other one, which is busy"
            view.is_ejected = False
            await report(it, second, used=1)
            await second.until(lambda: begun(second) == ["low"])
            await finished(second, low)
            assert low.ids[0] == reference(PROMPT, LONG)

    run(scenario())
