"""The gateway over real gRPC, with sidecars that behave or misbehave on cue."""

import asyncio
import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest

from frontend import requests
from frontend.dispatch import Choice
from frontend.requests import SOFT_CANCEL_S_MAX, Request
from frontend.resume_token import TOKEN_BYTES_MAX
from frontend.stream import GENERATION_BITS, Stream
from tests.frontend.fakes import IM_END, MODEL, FakeSidecar, reference
from tests.frontend.worlds import World, failure_of, read, read_some, run, world
from unbroken.errors import Reason
from unbroken.generation_stream import GenerationStream
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

pytestmark = pytest.mark.usefixtures("each_edge")

PROMPT = list(b"once upon a time")


def finished(stream: GenerationStream) -> pb.StreamFinished:
    """The last word, which every stream that was started must have."""
    assert stream.finished is not None
    return stream.finished


# What a stream is.


def test_a_stream_is_what_its_worker_said() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=50, temperature=0)
            ids, text = await read(stream)
            assert ids == reference(PROMPT, 50)
            assert text == bytes(ids).decode()
            end = finished(stream)
            assert end.choices[0].finish_reason == generation_pb2.FINISH_REASON_LENGTH
            assert end.choices[0].continued == pb.CONTINUED_NEVER
            assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(PROMPT), 50)
            assert [one.worker.worker_id for one in end.attempts] == ["w1"]

    run(scenario())


def test_the_first_message_says_what_was_decided_and_so_does_the_metadata() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            stub = InferenceServiceStub(await it.client.channel())
            call = stub.Generate(
                pb.GenerateRequest(
                    request_id="mine", token_ids=pb.TokenIds(ids=PROMPT), migrations_max=7
                )
            )
            metadata = dict(await call.initial_metadata())
            assert metadata["unbroken-request-id"] == "mine"
            assert metadata["unbroken-continuation-class"] == "NATIVE"
            first = await call.read()
            assert isinstance(first, pb.GenerateResponse)
            started = first.started
            assert started.request_id == "mine"
            assert started.model == MODEL
            assert started.continuation_class == pb.CONTINUATION_CLASS_NATIVE
            assert started.num_prompt_tokens == len(PROMPT)
            assert started.HasField("seed")
            assert started.migrations_max == 7
            assert started.frontend_id == "f0"
            assert 0 < len(started.resume_token) <= TOKEN_BYTES_MAX
            call.cancel()

    run(scenario())


def test_what_concerns_the_worker_is_passed_on() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            await read(
                it.client.generate(
                    prompt="hi",
                    max_tokens=1,
                    priority=3,
                    tenant="t",
                    orphan_grace_s=7.5,
                    seed=9,
                    timeout_s=10,
                )
            )
            start = it.sidecars[0].starts[0]
            assert abs((start.epoch >> GENERATION_BITS) / 1000 - time.time()) < 60
            assert (start.priority, start.stream.tenant) == (3, "t")
            assert start.orphan_grace.ToMilliseconds() == 7500
            assert 5000 < start.deadline.ToMilliseconds() < 11_000  # gRPC rounds up.
            assert start.checkpoint.params.sampling.seed == 9
            assert list(start.checkpoint.prompt_token_ids) == [256, *b"hi"]

    run(scenario())


def test_choices_are_independent_streams_with_derived_seeds() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=30, seed=5, num_choices=3)
            outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
            async for piece in stream:
                outputs[piece.choice_index].extend(piece.token_ids)
            assert outputs == {index: reference(PROMPT, 30, seed=5 + index) for index in range(3)}
            usage = finished(stream).usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 90)

    run(scenario())


def test_one_choice_that_fails_ends_the_others() -> None:
    async def scenario() -> None:
        refused = attempt_pb2.AttemptRefused(kind=worker_pb2.FAILURE_KIND_REJECTED, detail="no")
        async with world(FakeSidecar("w1", step_s=None, refuse=[refused])) as it:
            stream = it.client.generate(token_ids=PROMPT, num_choices=3)
            error = await failure_of(stream)
            assert error.reason is Reason.REJECTED_BY_ENGINE
            reasons = [choice.finish_reason for choice in finished(stream).choices]
            assert reasons == [
                generation_pb2.FINISH_REASON_ERROR,
                generation_pb2.FINISH_REASON_CANCELLED,
                generation_pb2.FINISH_REASON_CANCELLED,
            ]
            await it.sidecars[0].until(lambda: len(it.sidecars[0].aborts) == 2)

    run(scenario())


def test_calls_that_come_together_are_let_in_one_by_one() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            streams = [it.client.generate(token_ids=PROMPT, max_tokens=5) for _ in range(100)]
            reading = [asyncio.ensure_future(anext(stream)) for stream in streams]
            seen = [0]
            while seen[-1] < len(streams):
                await asyncio.sleep(0)
                seen.append(it.num_running())
            assert max(after - before for before, after in pairwise(seen)) <= 2
            for one in reading:
                one.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    run(scenario())


def test_log_probabilities_arrive_with_their_tokens() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=400, num_top_logprobs=0, request_id="r"
            )
            await read_some(stream, 10)
            await (await it.sidecar_of("r")).die()
            await read(stream)  # The client checks that there is one for each token.
            assert finished(stream).choices[0].cumulative_logprob == -400.0

    run(scenario())


def test_cached_prompt_tokens_that_came_with_the_end_are_counted() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", cached_tokens=16)) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3)
            await read(stream)
            assert finished(stream).usage.cached_prompt_tokens == 16

    run(scenario())


def test_a_stop_token_ends_the_output_and_is_not_text() -> None:
    async def scenario() -> None:
        expected = reference(PROMPT, 200)
        stop = expected[60]
        length = expected.index(stop) + 1
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=200, temperature=0, stop_token_ids=[stop]
            )
            ids, text = await read(stream)
            assert ids == expected[:length]
            assert text == bytes(expected[: length - 1]).decode()
            choice = finished(stream).choices[0]
            assert choice.finish_reason == generation_pb2.FINISH_REASON_STOP
            assert choice.stop_token_id == stop

    run(scenario())


# What a stream survives.


def test_a_stream_survives_several_deaths_exactly() -> None:
    async def scenario() -> None:
        async with world(*(FakeSidecar(f"w{n}") for n in range(4))) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=400, seed=7, request_id="r", migrations_max=5
            )
            ids: list[int] = []
            for _ in range(3):
                ids += [i for piece in await read_some(stream, 20) for i in piece.token_ids]
                await (await it.sidecar_of("r")).die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 400, seed=7)
            end = finished(stream)
            first = end.attempts[0].epoch
            assert [one.epoch for one in end.attempts] == [first, first + 1, first + 2, first + 3]
            assert all(one.failure == worker_pb2.FAILURE_KIND_CRASH for one in end.attempts[:3])
            assert all(one.HasField("gap") for one in end.attempts[1:])
            assert end.choices[0].continued == pb.CONTINUED_EXACT
            assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(PROMPT), 400)
            assert end.usage.recomputed_prefill_tokens > 3 * len(PROMPT)

    run(scenario())


@pytest.mark.parametrize(
    "capabilities",
    [
        worker_pb2.EngineCapabilities(
            seed_bits=64, random_source=worker_pb2.RANDOM_SOURCE_POSITIONAL
        ),
        worker_pb2.EngineCapabilities(
            seed_bits=64, random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL
        ),
    ],
    ids=["append", "regenerate"],
)
def test_engines_without_native_resume_go_on_exactly_too(
    capabilities: worker_pb2.EngineCapabilities,
) -> None:
    async def scenario() -> None:
        sidecars = [FakeSidecar(f"w{n}", capabilities=capabilities) for n in range(2)]
        async with world(*sidecars) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=400, seed=3, request_id="r")
            ids = [i for piece in await read_some(stream, 30) for i in piece.token_ids]
            await (await it.sidecar_of("r")).die()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 400, seed=3)
            assert finished(stream).usage.completion_tokens == 400

    run(scenario())


def test_forty_streams_survive_together() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
            streams = [
                it.client.generate(token_ids=[*PROMPT, n], max_tokens=100, seed=n)
                for n in range(40)
            ]
            heads = [await read_some(stream, 5) for stream in streams]
            await it.sidecars[0].die()
            rests = await asyncio.gather(*(read(stream) for stream in streams))
            for n, (head, rest) in enumerate(zip(heads, rests, strict=True)):
                ids = [i for piece in head for i in piece.token_ids] + rest[0]
                assert ids == reference([*PROMPT, n], 100, seed=n)

    run(scenario())


def test_a_stream_does_not_go_back_to_an_engine_that_died_before_the_verdict_says_so() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=6, temperature=0)
            reading = asyncio.create_task(read(stream))
            await sidecar.until(lambda: sidecar.starts)
            sidecar.step()
            (slot,) = sidecar.running
            del sidecar.running[slot]
            crash = worker_pb2.FAILURE_KIND_CRASH
            ended = attempt_pb2.AttemptEnded(slot=slot, end_offset=1, failure=crash)
            sidecar.say_frame(attempt_pb2.StepFrame(ended=[ended]))
            await it.until(lambda: not it.frontend.mesh.num_ready(MODEL))
            assert len(sidecar.starts) == 1
            sidecar.engine_incarnation += 1
            sidecar.say_state(worker_pb2.ENGINE_STATE_SERVING)
            await sidecar.until(lambda: sidecar.running)
            while sidecar.step() is not None:
                pass
            ids, _ = await reading
            assert ids == reference(PROMPT, 6)
            assert len(finished(stream).attempts) == len(sidecar.starts) == 2

    run(scenario())


def test_late_tokens_of_a_lost_worker_are_dropped() -> None:
    async def scenario() -> None:
        zombie, other = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with world(zombie, other) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=10, temperature=0)
            reading = asyncio.create_task(read(stream))
            await zombie.until(lambda: zombie.starts)
            for _ in range(4):
                zombie.step()
            slot = zombie.starts[0].slot
            stalled = attempt_pb2.AttemptEnded(
                slot=slot, end_offset=4, failure=worker_pb2.FAILURE_KIND_STALL
            )
            zombie.say_frame(attempt_pb2.StepFrame(ended=[stalled]))
            await other.until(lambda: other.starts)
            zombie.say_frame(attempt_pb2.StepFrame(slots=[slot], offsets=[4], token_ids=[65]))
            for _ in range(6):
                other.step()
                zombie.step()
            ids, _ = await reading
            assert ids == reference(PROMPT, 10)
            assert [one.end_offset for one in finished(stream).attempts] == [4, 10]

    run(scenario())


def test_a_stop_string_across_a_migration_ends_the_text_where_it_should() -> None:
    async def scenario() -> None:
        text = bytes(reference(PROMPT, 100)).decode()
        stop = text[18:23]
        first, other = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with world(first, other) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=100, temperature=0, stop=[stop], include_stop=False
            )
            reading = asyncio.create_task(read(stream))
            await first.until(lambda: first.starts)
            for _ in range(20):
                first.step()
            await it.until(lambda: it.num_tokens() == 20)
            await first.die()
            await other.until(lambda: other.starts)
            for _ in range(6):
                other.step()
            ids, seen = await reading
            assert ids == reference(PROMPT, 23)
            assert seen == text[:18]
            choice = finished(stream).choices[0]
            assert (choice.finish_reason, choice.stop) == (generation_pb2.FINISH_REASON_STOP, stop)
            await other.until(lambda: other.aborts)

    run(scenario())


def wrong_token(frame: attempt_pb2.StepFrame) -> None:
    """An id beyond the vocabulary."""
    frame.token_ids[0] = 260


def gap(frame: attempt_pb2.StepFrame) -> None:
    """A token is missing."""
    frame.offsets[0] += 1


def overlap(frame: attempt_pb2.StepFrame) -> None:
    """A token is said again."""
    frame.offsets[0] -= 1


def lost_frame(frame: attempt_pb2.StepFrame) -> None:
    """A frame is missing."""
    frame.sequence = 1_000


def short_column(frame: attempt_pb2.StepFrame) -> None:
    """A row without offset."""
    del frame.offsets[:]


def false_counts(frame: attempt_pb2.StepFrame) -> None:
    """Rows that claim more ids than there are."""
    frame.token_counts.append(2)


def empty_row(frame: attempt_pb2.StepFrame) -> None:
    """A row of no tokens."""
    frame.token_counts.append(0)
    del frame.token_ids[:]


def early_end(frame: attempt_pb2.StepFrame) -> None:
    """The end is not where the ledger ends."""
    frame.ended.add(
        slot=frame.slots[0], end_offset=3, finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )


@pytest.mark.parametrize(
    "breach",
    [wrong_token, gap, overlap, lost_frame, short_column, false_counts, empty_row, early_end],
    ids=lambda breach: breach.__name__,
)
def test_a_stream_leaves_a_worker_that_breaks_the_contract(
    breach: Callable[[attempt_pb2.StepFrame], None],
) -> None:
    async def scenario() -> None:
        bad, good = FakeSidecar("w1", step_s=None), FakeSidecar("w2", step_s=None)
        async with world(bad, good) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=30, temperature=0)
            reading = asyncio.create_task(read(stream))
            await bad.until(lambda: bad.starts)
            for _ in range(5):
                bad.step()
            bad.on_step = breach
            bad.step()
            await good.until(lambda: good.starts)
            for _ in range(30):
                good.step()
            ids, _ = await reading
            assert ids == reference(PROMPT, 30)
            first = finished(stream).attempts[0]
            assert first.failure == worker_pb2.FAILURE_KIND_PROTOCOL
            assert "internal" not in first.detail

    run(scenario())


def test_news_of_unknown_slots_is_ignored() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3, temperature=0)
            reading = asyncio.create_task(read(stream))
            await sidecar.until(lambda: sidecar.starts)
            sidecar.say_frame(
                attempt_pb2.StepFrame(
                    slots=[77],
                    offsets=[5],
                    token_ids=[1],
                    ended=[attempt_pb2.AttemptEnded(slot=78)],
                    refused=[attempt_pb2.AttemptRefused(slot=79)],
                )
            )
            for _ in range(3):
                sidecar.step()
            assert (await reading)[0] == reference(PROMPT, 3)
            assert len(finished(stream).attempts) == 1

    run(scenario())


def test_a_worker_without_room_is_passed_over() -> None:
    async def scenario() -> None:
        full = [attempt_pb2.AttemptRefused(kind=worker_pb2.FAILURE_KIND_OVERLOAD)]
        async with world(FakeSidecar("w1", refuse=full), FakeSidecar("w2")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 5)
            assert [one.worker.worker_id for one in finished(stream).attempts] == ["w1", "w2"]

    run(scenario())


def test_the_only_worker_is_asked_again_after_a_pause() -> None:
    async def scenario() -> None:
        full = [attempt_pb2.AttemptRefused(kind=worker_pb2.FAILURE_KIND_OVERLOAD) for _ in range(3)]
        async with world(FakeSidecar("w1", refuse=full)) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 5)
            assert len(finished(stream).attempts) == 4

    run(scenario())


# How a stream ends.


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (worker_pb2.FAILURE_KIND_REJECTED, Reason.REJECTED_BY_ENGINE),
        (worker_pb2.FAILURE_KIND_FENCED, Reason.REQUEST_EXISTS),
    ],
)
def test_a_refusal_that_holds_everywhere_ends_the_stream_with_its_reason(
    kind: worker_pb2.FailureKind.ValueType, reason: Reason
) -> None:
    async def scenario() -> None:
        refused = attempt_pb2.AttemptRefused(kind=kind, detail="no", epoch_known=2**64 - 1)
        async with world(FakeSidecar("w1", refuse=[refused]), FakeSidecar("w2")) as it:
            stream = it.client.generate(token_ids=PROMPT)
            error = await failure_of(stream)
            assert error.reason is reason
            assert finished(stream).choices[0].finish_reason == generation_pb2.FINISH_REASON_ERROR

    run(scenario())


def test_a_stream_that_nobody_can_go_on_with_says_so_and_what_it_cost() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), placement_timeout_s=0.2) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=2000)
            await read_some(stream, 5)
            await it.sidecars[0].die()
            error = await failure_of(stream)
            assert error.reason is Reason.WORKER_LOST
            end = finished(stream)
            assert end.choices[0].finish_reason == generation_pb2.FINISH_REASON_ERROR
            assert end.usage.completion_tokens == end.choices[0].num_tokens >= 5

    run(scenario())


def test_a_stream_that_lost_too_many_workers_says_so() -> None:
    async def scenario() -> None:
        async with world(*(FakeSidecar(f"w{n}") for n in range(3))) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=2000, request_id="r", migrations_max=1
            )
            for _ in range(2):
                await read_some(stream, 5)
                await (await it.sidecar_of("r")).die()
            error = await failure_of(stream)
            assert error.reason is Reason.MIGRATIONS_EXHAUSTED
            assert len(finished(stream).attempts) == 2

    run(scenario())


def test_cancel_from_another_connection_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000, request_id="r")
            await read_some(stream, 5)
            assert await it.another_client().cancel("r")
            error = await failure_of(stream)
            assert error.reason is Reason.CANCELLED
            end = finished(stream).choices[0]
            assert end.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
            await it.sidecars[0].until(lambda: it.sidecars[0].aborts)
            assert not await it.client.cancel("r")

    run(scenario())


def test_a_soft_cancel_lets_the_step_finish() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(token_ids=PROMPT, request_id="r", temperature=0)
            reading = asyncio.create_task(failure_of(stream))
            await sidecar.until(lambda: sidecar.starts)
            assert await it.client.cancel("r", is_soft=True)
            sidecar.step()
            async with asyncio.timeout(SOFT_CANCEL_S_MAX / 2):  # It waits no longer than needed.
                assert (await reading).reason is Reason.CANCELLED
            assert finished(stream).choices[0].num_tokens == 1

    run(scenario())


def test_cancelling_a_request_cancels_those_below_it() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            parents = {"a": "", "b": "a", "c": "b", "d": ""}
            streams = {
                name: it.client.generate(
                    token_ids=PROMPT, request_id=name, parent_request_id=parent
                )
                for name, parent in parents.items()
            }
            reading = {name: asyncio.create_task(failure_of(one)) for name, one in streams.items()}
            await it.sidecars[0].until(lambda: len(it.sidecars[0].starts) == 4)
            assert await it.client.cancel("a")
            for name in "abc":
                assert (await reading[name]).reason is Reason.CANCELLED
            assert not reading["d"].done()
            assert await it.client.cancel("d")
            await reading["d"]

    run(scenario())


def test_a_client_that_leaves_frees_its_engine() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000, request_id="r")
            await read_some(stream, 5)
            await stream.cancel()
            await it.sidecars[0].until(lambda: it.sidecars[0].aborts)
            await it.until(lambda: it.num_running() == 0)
            info = await it.client.get_stream("r")
            assert info.choices[0].state == pb.STREAM_STATE_DONE

    run(scenario())


def test_the_end_of_the_deadline_is_told_and_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.01), deadline_margin_s=0.2) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3000, timeout_s=0.6)
            error = await failure_of(stream)
            assert error.reason is Reason.DEADLINE_EXCEEDED
            end = finished(stream)  # The margin is for this.
            assert end.choices[0].finish_reason == generation_pb2.FINISH_REASON_ERROR
            assert 0 < end.usage.completion_tokens < 3000
            await it.sidecars[0].until(lambda: it.sidecars[0].aborts)

    run(scenario())


def test_an_engine_that_goes_on_after_the_end_is_stopped() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with world(sidecar) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3, temperature=0)
            reading = asyncio.create_task(read(stream))
            await sidecar.until(lambda: sidecar.starts)
            sidecar.running[sidecar.starts[0].slot].end = 100
            for _ in range(5):
                sidecar.step()
            assert (await reading)[0] == reference(PROMPT, 3)
            await sidecar.until(lambda: sidecar.aborts)

    run(scenario())


@pytest.mark.parametrize(("method", "tokens_per_step", "at"), [("token", 1, 1), ("tokens", 3, 3)])
def test_a_bug_in_one_stream_ends_that_stream_and_no_other(
    monkeypatch: pytest.MonkeyPatch, method: str, tokens_per_step: int, at: int
) -> None:
    good: Any = getattr(Stream, method)
    bad_prompt = (1, 2, 3)

    def planted(self: Stream, *given: Any) -> Any:
        if self.num_settled == at and self.original.prompt_token_ids == bad_prompt:
            raise RuntimeError("planted")
        return good(self, *given)

    async def scenario() -> None:
        async with world(FakeSidecar("w1", tokens_per_step=tokens_per_step)) as it:
            other = it.client.generate(token_ids=PROMPT, max_tokens=60, temperature=0)
            ids = [i for piece in await read_some(other, 1) for i in piece.token_ids]
            bad = it.client.generate(token_ids=bad_prompt, max_tokens=60)
            error = await failure_of(bad)
            assert error.reason is Reason.INTERNAL
            assert "planted" not in error.detail
            assert finished(bad).usage.completion_tokens == at
            await it.sidecars[0].until(lambda: it.sidecars[0].aborts)
            ids += (await read(other))[0]
            assert ids == reference(PROMPT, 60)
            assert len(finished(other).attempts) == 1

    monkeypatch.setattr(Stream, method, planted)
    run(scenario())


# Slow clients.


def test_a_slow_client_gets_fewer_messages_and_stops_its_worker() -> None:
    async def scenario() -> None:
        num_tokens, window = 60_000, 512
        sidecar = FakeSidecar("w1", tokens_per_step=64, context_length=100_000)
        # A connection that takes in 64 KiB and no more while nobody reads.
        options = [("grpc.http2.bdp_probe", 0)]
        async with (
            world(sidecar, window_tokens=window) as it,
            grpc.aio.insecure_channel(it.frontend.address, options=options) as channel,
        ):
            params = generation_pb2.GenerationParams(
                sampling=generation_pb2.SamplingParams(temperature=0),
                stopping=generation_pb2.StopConditions(max_tokens=num_tokens),
            )
            call = InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=PROMPT), params=params)
            )
            await it.until(sidecar.is_blocked)
            running = next(iter(sidecar.running.values()))
            assert running.offset <= running.acked + window < num_tokens
            messages = [message async for message in call]
            ids = [i for message in messages for i in message.token_ids]
            assert ids == reference(PROMPT, num_tokens)
            sizes = [len(message.token_ids) for message in messages]
            assert sidecar.tokens_per_step < max(sizes) <= 256  # What had gathered, but bounded.

    run(scenario())


# Workers that are not there yet, or no more.


def test_an_unknown_model_is_not_found() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            error = await failure_of(it.client.generate(prompt="a", model="numbers"))
            assert error.reason is Reason.MODEL_NOT_FOUND
            assert error.metadata == {"model": "numbers"}

    run(scenario())


def test_a_request_waits_for_a_worker_that_still_starts() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", state=worker_pb2.ENGINE_STATE_STARTING)
        async with world() as it:
            await it.add(sidecar)
            reading = asyncio.create_task(
                read(it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0))
            )
            await sidecar.until(lambda: sidecar.hellos)
            assert not reading.done()
            sidecar.say_state(worker_pb2.ENGINE_STATE_SERVING)
            assert (await reading)[0] == reference(PROMPT, 5)

    run(scenario())


def test_a_request_waits_for_a_worker_that_comes_back() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            sidecar = it.sidecars[0]
            await sidecar.die()
            await it.until_ready(0)
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=5, temperature=0, request_id="r"
            )
            reading = asyncio.create_task(read(stream))
            await it.until(lambda: stream.started is not None)
            info = await it.client.get_stream("r")
            assert info.choices[0].state == pb.STREAM_STATE_PLACING
            sidecar.incarnation += 1
            await sidecar.begin()
            it.announce()
            assert (await reading)[0] == reference(PROMPT, 5)

    run(scenario())


def test_all_that_wait_are_served_when_a_worker_comes() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            sidecar = it.sidecars[0]
            await sidecar.die()
            await it.until_ready(0)
            streams = [
                it.client.generate(token_ids=[n], max_tokens=3, temperature=0) for n in range(150)
            ]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            await it.until(lambda: it.num_running() == 150)
            sidecar.incarnation += 1
            await sidecar.begin()
            it.announce()
            for n, done in enumerate(reading):
                assert (await done)[0] == reference([n], 3)

    run(scenario())


def test_a_request_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), placement_timeout_s=0.1) as it:
            await it.sidecars[0].die()
            await it.until_ready(0)
            stream = it.client.generate(token_ids=PROMPT)
            error = await failure_of(stream)
            assert error.reason is Reason.NO_WORKER
            assert error.retry_after_s is not None
            assert finished(stream).choices[0].num_tokens == 0

    run(scenario())


def test_a_model_that_no_worker_ever_served_is_waited_for_no_longer_than_a_placement() -> None:
    async def scenario() -> None:
        async with world(placement_timeout_s=0.1) as it:
            await it.add(FakeSidecar("w1", state=worker_pb2.ENGINE_STATE_STARTING))
            for model in ("", MODEL):
                error = await failure_of(it.client.generate(token_ids=PROMPT, model=model))
                assert error.reason is Reason.NO_WORKER

    run(scenario())


# The other calls.


def test_a_request_id_can_run_only_once_at_a_time() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.01)) as it:
            first = it.client.generate(token_ids=PROMPT, max_tokens=20, request_id="r")
            await read_some(first, 1)
            error = await failure_of(it.client.generate(token_ids=PROMPT, request_id="r"))
            assert error.reason is Reason.REQUEST_EXISTS
            await read(first)
            await read(it.client.generate(token_ids=PROMPT, max_tokens=2, request_id="r"))

    run(scenario())


def test_request_ids_are_unique_within_a_tenant_only() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.01)) as it:
            streams = [
                it.client.generate(token_ids=PROMPT, max_tokens=20, request_id="r", tenant=tenant)
                for tenant in ("a", "b")
            ]
            for stream in streams:
                await read_some(stream, 1)
            tenants = {start.stream.tenant for start in it.sidecars[0].starts}
            assert tenants == {"a", "b"}
            for stream in streams:
                await read(stream)

    run(scenario())


def test_the_frontends_own_policy_counts_for_requests_that_name_none() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", is_invariant=False)
        async with world(sidecar, continuation="require_exact") as it:
            error = await failure_of(it.client.generate(token_ids=PROMPT))
            assert error.reason is Reason.NOT_CONTINUABLE
            await read(
                it.client.generate(
                    token_ids=PROMPT,
                    max_tokens=2,
                    continuation=pb.CONTINUATION_POLICY_PREFER_EXACT,
                )
            )

    run(scenario())


def test_more_requests_than_allowed_are_refused_with_a_time_to_come_back() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.01), requests_running_max=1) as it:
            first = it.client.generate(token_ids=PROMPT, max_tokens=20)
            await read_some(first, 1)
            error = await failure_of(it.client.generate(token_ids=PROMPT))
            assert error.reason is Reason.OVERLOADED
            assert error.retry_after_s is not None
            await read(first)

    run(scenario())


def test_streams_are_listed_oldest_first_page_by_page() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            names = [f"r{n}" for n in range(5)]
            for name in names[:4]:
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2, request_id=name))
            running = it.client.generate(token_ids=PROMPT, max_tokens=3000, request_id=names[4])
            await read_some(running, 1)
            stub = InferenceServiceStub(await it.client.channel())
            seen: list[str] = []
            token = ""
            for size in (2, 2, 1):
                page = await stub.ListStreams(pb.ListStreamsRequest(page_size=2, page_token=token))
                assert len(page.streams) == size
                seen += [info.request_id for info in page.streams]
                token = page.next_page_token
            assert token == ""
            assert seen == names
            info = await it.client.get_stream(names[4])
            assert info.choices[0].state == pb.STREAM_STATE_RUNNING
            assert info.choices[0].worker.worker_id == "w1"
            await running.cancel()

    run(scenario())


@pytest.mark.parametrize(
    ("page_size", "page_token", "field"),
    [(1001, "", "page_size"), (1, "!", "page_token"), (1, "djI6MQ==", "page_token")],
)
def test_a_bad_page_is_refused(page_size: int, page_token: str, field: str) -> None:
    async def scenario() -> None:
        async with world() as it:
            stub = InferenceServiceStub(await it.client.channel())
            with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: expected") as refusal:
                await stub.ListStreams(
                    pb.ListStreamsRequest(page_size=page_size, page_token=page_token)
                )
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(scenario())


def test_what_is_not_known_is_said_so() -> None:
    async def scenario() -> None:
        async with world() as it:
            stub = InferenceServiceStub(await it.client.channel())
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.GetStream(pb.GetStreamRequest(request_id="r"))
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
            for call, empty in (
                (stub.GetStream, pb.GetStreamRequest()),
                (stub.Cancel, pb.CancelRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="request_id: expected") as refusal:
                    await call(empty)  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportCallIssue, reportGeneralTypeIssues]
                assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Resume(pb.ResumeRequest()).read()
            assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED

    run(scenario())


def test_models_are_listed_with_what_they_can_hold() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2", model="other")) as it:
            await it.until(lambda: it.frontend.mesh.num_ready("other") == 1)
            await it.sidecars[1].die()
            await it.until(lambda: it.frontend.mesh.num_ready("other") == 0)
            models = {info.model: info for info in await it.client.list_models()}
            assert list(models) == [MODEL, "other"]
            assert models[MODEL].num_workers_ready == 1
            assert models["other"].num_workers_ready == 0
            assert models["other"].num_workers == 1
            assert models["other"].context_length == 4096
            assert models["other"].has_chat_template

    run(scenario())


# Input at the edge of what gRPC takes.


def test_a_long_text_is_tokenised_and_counted() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", context_length=200_001)) as it:
            stream = it.client.generate(prompt="a" * 150_000, max_tokens=2)
            await read(stream)
            assert finished(stream).usage.prompt_tokens == 150_001

    run(scenario())


def test_bad_input_is_refused_over_the_wire_and_the_process_lives() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stub = InferenceServiceStub(await it.client.channel())
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Generate(pb.GenerateRequest(text="a" * 17 * 1024 * 1024)).read()
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            garbage = (await it.client.channel()).unary_stream(
                "/unbroken.v1.InferenceService/Generate",
                request_serializer=bytes,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await garbage(b"\xff\xff\xff").read()
            error = await failure_of(it.client.generate(token_ids=[1], top_p=2.0))
            assert error.reason is Reason.INVALID_FIELD
            assert error.metadata == {"field": "params.sampling.top_p"}
            stream = it.client.generate(token_ids=PROMPT, max_tokens=2, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 2)

    run(scenario())


# What is left behind.


def test_streams_that_ended_leave_nothing_behind_not_even_for_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "TOLD_AGAIN_MAX", 0)  # Complete ones are kept for a while.

    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2"), FakeSidecar("w3")) as it:
            await leave_traces(it)  # Whatever is made once is made now.
            gc.collect()
            gc.disable()
            try:
                await leave_traces(it)
                await it.until(lambda: it.num_running() == 0)
                left = [
                    one for one in gc.get_objects() if isinstance(one, Stream | Request | Choice)
                ]
                assert left == []
            finally:
                gc.enable()

    async def leave_traces(it: World) -> None:
        """Streams that end in every way."""
        for n in range(3):
            await read(it.client.generate(token_ids=PROMPT, max_tokens=5, num_choices=2))
            await failure_of(it.client.generate(token_ids=PROMPT, top_p=3.0))
            left = it.client.generate(token_ids=PROMPT, max_tokens=3000)
            await read_some(left, 2)
            await left.cancel()
            moved = it.client.generate(
                token_ids=[*PROMPT, n], max_tokens=3000, request_id=f"r{n}", timeout_s=5
            )
            await read_some(moved, 2)
            sidecar = await it.sidecar_of(f"r{n}")
            await sidecar.die()
            await read_some(moved, 2)
            await it.client.cancel(f"r{n}")
            await failure_of(moved)
            sidecar.incarnation += 1
            await sidecar.begin()
            it.announce()
            await it.until_ready(3)

    run(scenario())


def test_eos_ends_the_output_unless_ignored() -> None:
    async def scenario() -> None:
        def say_eos(frame: attempt_pb2.StepFrame) -> None:
            if frame.offsets[0] == 2:
                frame.token_ids[0] = IM_END

        async with world(FakeSidecar("w1", on_step=say_eos)) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=6, temperature=0)
            ids, text = await read(stream)
            assert ids == [*reference(PROMPT, 2), IM_END]
            assert text == bytes(ids[:2]).decode()
            assert finished(stream).choices[0].stop_token_id == IM_END
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=6, temperature=0, ignore_eos=True
            )
            ids, _ = await read(stream)
            assert len(ids) == 6
            assert finished(stream).choices[0].finish_reason == generation_pb2.FINISH_REASON_LENGTH

    run(scenario())
