"""Drain, as an operator calls it, in this process with an engine that does what it is told."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar import drain
from sidecar.drain import Phase
from sidecar.service import Sidecar
from tests.sidecar.fakes import Frontend, engine_up
from tests.sidecar.processes import until
from tests.sidecar.worlds import run, scripted
from unbroken.errors import Reason
from unbroken.status import from_rpc_error
from unbroken.transport import open_channel
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import sidecar_service_pb2 as pb
from unbroken.v1.sidecar_service_pb2_grpc import SidecarServiceStub

FINISHING, STOPPING = pb.DRAIN_PHASE_FINISHING, pb.DRAIN_PHASE_STOPPING


@dataclass(frozen=True, slots=True)
class World:
    sidecar: Sidecar
    stub: SidecarServiceStub
    frontend: Frontend

    async def failure_of(self, **request: Any) -> Reason:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.Drain(pb.DrainRequest(**request)).read()
        return from_rpc_error(caught.value).reason

    def finish(self, slot: int) -> None:
        """The engine comes to the end of an attempt."""
        ended = attempt_pb2.AttemptEnded(
            slot=slot, finish_reason=generation_pb2.FINISH_REASON_LENGTH
        )
        self.sidecar.hub.on_frame(attempt_pb2.StepFrame(ended=[ended]))

    def step(self, tokens: Mapping[int, int]) -> None:
        """The engine brings the next token of each of these attempts."""
        running = self.sidecar.hub.ledger.running
        frame = attempt_pb2.StepFrame(
            slots=list(tokens),
            offsets=[running[slot].end_offset for slot in tokens],
            token_ids=list(tokens.values()),
        )
        self.sidecar.hub.on_frame(frame)


@asynccontextmanager
async def streaming(directory: Path) -> AsyncGenerator[World, None]:
    """A sidecar with two streams."""
    async with (
        scripted(directory) as (sidecar, _, engine),
        open_channel(sidecar.address) as channel,
    ):
        engine.on_up(engine_up())
        frontend = Frontend(sidecar.hub, sidecar.hub.now())
        for index in range(2):
            frontend.start(f"r{index}")
        yield World(sidecar, SidecarServiceStub(channel), frontend)
        frontend.read()
        sidecar.hub.leave(frontend.link)  # Nobody writes what waits there.


async def heard(call: Any) -> pb.DrainResponse:
    async with asyncio.timeout(5):
        response = await call.read()
    assert isinstance(response, pb.DrainResponse), "the call goes on"
    return response


def test_who_asks_hears_how_streams_finish(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            call = world.stub.Drain(pb.DrainRequest(policy=pb.DRAIN_POLICY_FINISH))
            assert await heard(call) == pb.DrainResponse(phase=FINISHING, num_attempts=2)
            world.finish(1)
            expected = pb.DrainResponse(phase=FINISHING, num_attempts=1, num_finished=1)
            assert await heard(call) == expected
            assert not world.sidecar.stop_wanted.is_set()
            world.finish(2)
            while (last := await heard(call)).phase == FINISHING:
                assert last.num_attempts == 0
            assert last == pb.DrainResponse(phase=STOPPING, num_finished=2)
            assert await call.read() is grpc.aio.EOF
            assert world.sidecar.stop_wanted.is_set()

    run(scenario)


def test_a_budget_is_told_and_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            request = pb.DrainRequest(policy=pb.DRAIN_POLICY_BUDGET)
            request.budget.FromMilliseconds(200)
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            call = world.stub.Drain(request)
            first = await heard(call)
            assert 0 < first.budget_left.ToMilliseconds() <= 200
            while (last := await heard(call)).phase == FINISHING:
                assert last.num_attempts == 2
            assert last == pb.DrainResponse(phase=STOPPING, num_handed_over=2)
            assert loop.time() - began_at >= 0.2

    run(scenario)


def test_streams_are_handed_over_at_the_end_of_the_step_that_the_engine_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "STEP_S_MAX", 60.0)

    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            world.step({1: 5, 2: 6})
            call = world.stub.Drain(pb.DrainRequest(policy=pb.DRAIN_POLICY_HAND_OVER))
            first = await heard(call)
            assert (first.phase, first.num_attempts) == (FINISHING, 2)
            world.frontend.read()
            assert world.frontend.ended == {}
            world.step({1: 7, 2: 8})
            assert await heard(call) == pb.DrainResponse(phase=STOPPING, num_handed_over=2)
            world.frontend.read()
            assert world.frontend.tokens == {1: [5, 7], 2: [6, 8]}
            assert {e.failure for e in world.frontend.ended.values()} == {
                worker_pb2.FAILURE_KIND_DRAIN
            }

    run(scenario)


def test_a_second_call_makes_it_urgent_and_both_hear_of_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            first = world.stub.Drain(pb.DrainRequest(policy=pb.DRAIN_POLICY_FINISH))
            await heard(first)
            second = world.stub.Drain(pb.DrainRequest(policy=pb.DRAIN_POLICY_HAND_OVER))
            for call in (second, first):
                while (last := await heard(call)).phase == FINISHING:  # The engine is at a step.
                    assert last.num_attempts == 2
                assert last == pb.DrainResponse(phase=STOPPING, num_handed_over=2)

    run(scenario)


def test_a_drain_goes_on_without_who_asked_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            call = world.stub.Drain(pb.DrainRequest(policy=pb.DRAIN_POLICY_FINISH))
            await heard(call)
            call.cancel()
            world.finish(1)
            world.finish(2)
            await until(world.sidecar.stop_wanted.is_set)

    run(scenario)


def test_no_drain_begins_by_a_request_that_is_wrong(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with streaming(tmp_path) as world:
            assert await world.failure_of(expected_worker_incarnation=1) is Reason.FENCED
            assert await world.failure_of(policy=99) is Reason.INVALID_FIELD
            for policy, seconds in ((3, -1), (3, 86_401), (3, 2**62), (0, 1), (1, 1)):
                failure = await world.failure_of(policy=policy, budget={"seconds": seconds})
                assert failure is Reason.INVALID_FIELD, (policy, seconds)
            assert world.sidecar.drain.phase is Phase.SERVING
            assert not world.sidecar.hub.is_draining

    run(scenario)
