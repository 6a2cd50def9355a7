"""Thresholds over real gRPC: who is placed where, who is refused, and what is told."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from frontend.dispatch import MOVE_TOLD_S
from tests.frontend.fakes import MODEL, FakeSidecar, busy, reference
from tests.frontend.refusals import refused
from tests.frontend.worlds import World, failure_of, read, read_some, run, world
from unbroken.client import Client
from unbroken.errors import Reason
from unbroken.resumption import ResumePolicy
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import relay_service_pb2, worker_pb2

pytestmark = pytest.mark.usefixtures("each_edge")

PROMPT = list(b"once upon a time")


def refusing(*sidecars: FakeSidecar, **settings: Any) -> AbstractAsyncContextManager[World]:
    """A world in which nobody waits while all workers are busy."""
    return world(*sidecars, queue_requests_max=0, **settings)


async def report(it: World, sidecar: FakeSidecar, used: int, queued: int = 0) -> None:
    """Both ranks of a worker have this much; returns when the frontend knows."""
    ranks = [
        worker_pb2.RankLoad(
            rank=rank, kv_blocks_total=100, kv_blocks_used=used, prefill_tokens_queued=queued
        )
        for rank in range(2)
    ]
    load = worker_pb2.LoadReport(ranks=ranks)
    heartbeat = relay_service_pb2.Heartbeat(sequence=1, load=load)
    sidecar.say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
    view = it.frontend.mesh.workers[sidecar.worker_id].view
    assert view is not None
    known = [(used, queued)] * 2
    await it.until(
        lambda: [(r.kv_blocks_used, r.prefill_tokens_queued) for r in view.ranks] == known
    )


def count_of(it: World, name: str, **labels: str) -> float:
    """A metric now."""
    return it.frontend.registry.get_sample_value(f"unbroken_frontend_{name}", labels) or 0.0


def test_a_busy_worker_gets_no_new_work_while_another_is_not() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1"), FakeSidecar("w2")
        async with refusing(*sidecars, busy_kv_blocks_share=0.5, busy_prefill_tokens=10_000) as it:
            await report(it, sidecars[0], used=51)
            await report(it, sidecars[1], used=40, queued=5000)
            for _ in range(5):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert (len(sidecars[0].starts), len(sidecars[1].starts)) == (0, 5)
            assert count_of(it, "workers_busy") == 1

    run(scenario())


def test_when_all_are_busy_a_request_is_refused_and_told_why_and_when_to_come_back() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with refusing(sidecar, busy_kv_blocks_share=0.5, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=60, queued=101)
            told = await refused(it, pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)))
            names = {one.quota_id: one for one in told.quota.violations}
            assert set(names) == {"kv_blocks_share", "prefill_tokens"}
            assert names["kv_blocks_share"].subject == f"model:{MODEL}"
            assert "0.6, above 0.5" in names["kv_blocks_share"].description
            assert not sidecar.starts
            assert count_of(it, "requests_refused_total", reason="OVERLOADED") == 1
            for threshold in names:
                assert count_of(it, "requests_shed_total", threshold=threshold) == 1

    run(scenario())


def test_what_is_not_tokenised_is_refused_nevertheless() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with refusing(sidecar, busy_prefill_share=0.0) as it:
            await report(it, sidecar, used=1, queued=1)
            # A text that is invalid only once it is tokenised: it is too long for the model.
            error = await failure_of(it.client.generate(prompt="x" * 5000, max_tokens=2))
            assert error.reason is Reason.OVERLOADED
            await report(it, sidecar, used=1, queued=0)
            error = await failure_of(it.client.generate(prompt="x" * 5000, max_tokens=2))
            assert error.reason is Reason.INVALID_FIELD

    run(scenario())


def test_a_burst_between_two_reports_stops_at_the_threshold() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with refusing(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0)
            # Two ranks take 100 each and not more: 13 prompts of 16 tokens are above.
            streams = [it.client.generate(token_ids=PROMPT, max_tokens=2) for _ in range(40)]
            readings = [asyncio.create_task(read(stream)) for stream in streams]
            refused = it.frontend.requests
            await it.until(lambda: sum(one.done() for one in readings) == 27)
            assert refused.num_running == 13
            await sidecar.until(lambda: len(sidecar.starts) == 13)
            errors = [one.exception() for one in readings if one.done()]
            assert {getattr(error, "reason", None) for error in errors} == {Reason.OVERLOADED}
            while sidecar.step():
                pass
            await asyncio.gather(*readings, return_exceptions=True)

    run(scenario())


def test_a_heartbeat_that_repeats_the_last_report_hides_nothing_of_a_burst() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with refusing(sidecar, busy_prefill_tokens=100) as it:
            await report(it, sidecar, used=0)
            worker = it.frontend.mesh.workers["w1"]
            readings: list[asyncio.Task[tuple[list[int], str]]] = []
            for number in range(1, 14):  # Both ranks take 100 tokens and not more: 13 prompts.
                stream = it.client.generate(token_ids=PROMPT, max_tokens=2)
                readings.append(asyncio.create_task(read(stream)))
                await sidecar.until(lambda n=number: len(sidecar.starts) == n)
                told_at = worker.load_at
                await report(it, sidecar, used=0)
                await it.until(lambda at=told_at: worker.load_at > at)
            error = await failure_of(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert error.reason is Reason.OVERLOADED
            while sidecar.step():
                pass
            await asyncio.gather(*readings, return_exceptions=True)

    run(scenario())


def test_what_was_admitted_goes_on_though_all_are_busy() -> None:
    async def scenario() -> None:
        sidecars = FakeSidecar("w1", step_s=0.005), FakeSidecar("w2", step_s=0.005)
        async with refusing(*sidecars, busy_kv_blocks_share=0.5) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=60, temperature=0, request_id="r"
            )
            ids = [i for piece in await read_some(stream, 3) for i in piece.token_ids]
            for sidecar in sidecars:
                await report(it, sidecar, used=99)
            await (await it.sidecar_of("r")).die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 60)
            error = await failure_of(it.client.generate(token_ids=PROMPT))
            assert error.reason is Reason.OVERLOADED

    run(scenario())


def test_a_request_that_waited_for_a_worker_is_refused_if_it_comes_back_busy() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        once = ResumePolicy(resumes_max=0)
        async with (
            refusing(sidecar, busy_kv_blocks_share=0.5) as it,
            Client(it.frontend.address, resume_policy=once) as client,
        ):
            sidecar.say_state(worker_pb2.ENGINE_STATE_STARTING)
            await it.until_ready(0)
            await report(it, sidecar, used=99)
            waiting = asyncio.create_task(failure_of(client.generate(token_ids=PROMPT)))
            await it.until(lambda: it.num_running() == 1)
            await asyncio.sleep(2 * MOVE_TOLD_S)  # Its reader is told once that it stands in line.
            sidecar.say_state(worker_pb2.ENGINE_STATE_SERVING)
            async with asyncio.timeout(5):
                error = await waiting
            assert error.reason is Reason.OVERLOADED
            assert not sidecar.starts

    run(scenario())


def test_a_request_is_refused_or_admitted_with_all_its_choices() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with refusing(sidecar, busy_prefill_tokens=10) as it:
            await report(it, sidecar, used=0)
            stream = it.client.generate(token_ids=PROMPT, max_tokens=2, num_choices=4)
            await read(stream)
            assert stream.finished is not None
            assert len(stream.finished.choices) == 4
            assert len(sidecar.starts) == 4
            await report(it, sidecar, used=0, queued=11)
            error = await failure_of(it.client.generate(token_ids=PROMPT, num_choices=4))
            assert error.reason is Reason.OVERLOADED
            assert len(sidecar.starts) == 4

    run(scenario())


def test_an_equal_request_joins_the_one_that_runs_though_all_are_busy() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with refusing(sidecar, busy_kv_blocks_share=0.5) as it:
            first = it.client.generate(
                token_ids=PROMPT, max_tokens=5, temperature=0, request_id="r"
            )
            reading = asyncio.create_task(read(first))
            await sidecar.until(lambda: sidecar.starts)
            await report(it, sidecar, used=99)
            other = it.another_client()
            again = other.generate(token_ids=PROMPT, max_tokens=5, temperature=0, request_id="r")
            joining = asyncio.create_task(read(again))
            await it.until(lambda: count_of(it, "requests_resumed_total", how="joined") == 1)
            while sidecar.step():
                pass
            assert (await joining)[0] == reference(PROMPT, 5)
            await asyncio.gather(reading, return_exceptions=True)

    run(scenario())


# Workers that refuse by thresholds.


def test_who_is_refused_by_a_busy_worker_goes_to_another_and_its_client_sees_nothing() -> None:
    async def scenario() -> None:
        sidecars = [FakeSidecar("w1", refuse=[busy(101)]), FakeSidecar("w2")]
        async with refusing(*sidecars, busy_prefill_tokens=100) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 5)
            assert [len(sidecar.starts) for sidecar in sidecars] == [1, 1]
            assert all(sidecar.starts[0].is_new_work for sidecar in sidecars)
            assert stream.finished is not None
            assert [one.worker.worker_id for one in stream.finished.attempts] == ["w2"]
            assert stream.finished.usage.recomputed_prefill_tokens == 0
            view = it.frontend.mesh.workers["w1"].view
            assert view is not None
            assert view.prefill_tokens_queued == 202, "the refusal told what there is"
            assert count_of(it, "placements_refused_total") == 1
            assert count_of(it, "requests_refused_total", reason="OVERLOADED") == 0
            assert count_of(it, "migrations_total", failure="OVERLOAD", way="UNSPECIFIED") == 0
            await report(it, sidecars[0], used=0)
            await report(it, sidecars[1], used=90)
            await read(it.client.generate(token_ids=PROMPT, max_tokens=1))
            assert len(sidecars[0].starts) == 2, "it is not avoided for what it said"

    run(scenario())


def test_a_busy_worker_is_no_failing_one() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", refuse=[busy(0) for _ in range(5)])
        async with refusing(sidecar, FakeSidecar("w2"), outlier_failures_max=1) as it:
            for _ in range(10):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=1))
            assert not sidecar.refuse
            assert count_of(it, "ejections_total") == 0

    run(scenario())


def test_when_all_workers_refuse_the_client_is_told_when_to_come_back() -> None:
    async def scenario() -> None:
        sidecars = [FakeSidecar(f"w{index}", refuse=[busy(101)]) for index in range(3)]
        async with refusing(*sidecars, busy_prefill_tokens=100) as it:
            error = await failure_of(it.client.generate(token_ids=PROMPT, max_tokens=5))
            assert error.reason is Reason.OVERLOADED
            assert error.retry_after_s is not None
            assert error.metadata["thresholds"] == "prefill_tokens"
            assert [len(sidecar.starts) for sidecar in sidecars] == [1, 1, 1]

    run(scenario())


def test_a_choice_whose_others_have_begun_is_refused_by_no_threshold() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", refuse=[busy(101)])
        async with refusing(sidecar, busy_prefill_tokens=100) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3, num_choices=3)
            await read(stream)
            assert [start.is_new_work for start in sidecar.starts] == [True, False, False, False]

    run(scenario())


def test_what_goes_on_is_refused_by_no_threshold() -> None:
    async def scenario() -> None:
        sidecars = [FakeSidecar("w1", step_s=0.005), FakeSidecar("w2", step_s=0.005)]
        async with refusing(*sidecars, busy_prefill_tokens=100) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=40, temperature=0, request_id="r"
            )
            ids = [i for piece in await read_some(stream, 3) for i in piece.token_ids]
            await (await it.sidecar_of("r")).die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 40)
            starts = sorted((s.starts[0] for s in sidecars), key=lambda start: start.epoch)
            assert [start.is_new_work for start in starts] == [True, False]

    run(scenario())


def test_sidecars_know_the_thresholds_before_anything_begins_there_and_again_when_they_change() -> (
    None
):
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with refusing(sidecar, busy_prefill_tokens=100) as it:
            await read(it.client.generate(token_ids=PROMPT, max_tokens=1))
            (push,) = sidecar.thresholds
            assert (push.thresholds.prefill_tokens, push.version) == (100, 0)
            await it.client.set_thresholds(worker_pb2.BusyThresholds(kv_blocks_share=0.5))
            await sidecar.until(lambda: len(sidecar.thresholds) == 2)
            push = sidecar.thresholds[1]
            assert (push.thresholds.kv_blocks_share, push.version) == (0.5, 1)
            await it.client.set_thresholds(None)
            await sidecar.until(lambda: len(sidecar.thresholds) == 3)
            assert sidecar.thresholds[2].thresholds.prefill_tokens == 100
            assert sidecar.thresholds[2].version == 2

    run(scenario())
