"""Claims of the client library about frontends that die, hang, refuse or lie in mid-stream."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import uvloop
from typing_extensions import override

from tests.unbroken.fake_frontend import (
    FakeFrontend,
    Hang,
    Script,
    finished,
    serving_frontend,
    started,
    tokens,
)
from tests.unbroken.frontend_process import frontend_process, is_stopped
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream, Piece
from unbroken.resumption import ResumePolicy
from unbroken.v1 import inference_service_pb2 as pb

T = TypeVar("T")

BROKEN = UnbrokenError(Reason.UNREACHABLE, "the connection broke")
FIRST: Script = [started(resume_token=b"t1"), tokens(0, 1, 2, text="aé"), BROKEN]
REST: Script = [tokens(2, 3, text="c"), finished(3)]


def run(scenario: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(10):
            return await scenario

    return uvloop.run(limited())


@asynccontextmanager
async def a_client(
    *frontends: FakeFrontend, policy: ResumePolicy | None = None
) -> AsyncGenerator[Client]:
    """A client of these frontends."""
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving_frontend(f)) for f in frontends]
        yield await stack.enter_async_context(Client(*addresses, resume_policy=policy))


@dataclass
class Outcome:
    """What a client made of its frontends."""

    pieces: list[Piece]
    error: UnbrokenError | None
    stream: GenerationStream
    addresses: Sequence[str]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def outcome_of(
    *frontends: FakeFrontend, policy: ResumePolicy | None = None, **options: Any
) -> Outcome:
    """Read one stream."""

    async def scenario() -> Outcome:
        async with a_client(*frontends, policy=policy) as client:
            stream = client.generate(prompt="hello", **options)
            outcome = Outcome([], None, stream, client.frontends.addresses)
            try:
                async for piece in stream:
                    outcome.pieces.append(piece)
            except UnbrokenError as error:
                outcome.error = error
            return outcome

    return run(scenario())


def test_a_stream_goes_on_at_another_frontend() -> None:
    first, second = FakeFrontend(FIRST), FakeFrontend((), REST)
    outcome = outcome_of(first, second, temperature=0.5, timeout_s=5)
    assert outcome.error is None
    assert (outcome.token_ids, outcome.text) == ([1, 2, 3], "aéc")
    (asked,) = second.resumes
    assert asked.request == first.requests[0]
    assert asked.resume_token == b"t1"
    assert asked.positions == [
        pb.ResumePosition(choice_index=0, token_ids=[1, 2], num_text_bytes=3)
    ]
    (resume,) = outcome.stream.resumes
    assert (resume.from_address, resume.to_address) == tuple(outcome.addresses)
    assert (resume.reason, resume.offsets) == (Reason.UNREACHABLE, (2,))
    assert 0 < resume.gap_s < 1
    assert outcome.stream.finished is not None
    assert outcome.stream.frontend_address == outcome.addresses[1]


def test_the_deadline_is_what_is_left_of_it() -> None:
    first = FakeFrontend([*FIRST[:-1], UnbrokenError(Reason.OVERLOADED, "", retry_after_s=0.3)])
    second = FakeFrontend((), REST)
    assert outcome_of(first, second, timeout_s=5).error is None
    (before,), (after,) = first.time_remaining_s, second.time_remaining_s
    assert before is not None
    assert after is not None
    assert after <= before - 0.25


def test_without_a_timeout_there_is_no_deadline() -> None:
    first, second = FakeFrontend(FIRST), FakeFrontend((), REST)
    assert outcome_of(first, second).error is None
    assert (first.time_remaining_s, second.time_remaining_s) == ([None], [None])


def test_every_choice_goes_on_where_it_was() -> None:
    first = FakeFrontend(
        [
            started(resume_token=b"t1"),
            tokens(0, 1, text="a", choice_index=1),
            tokens(0, 2, 3, text="b", choice_index=2),
            BROKEN,
        ]
    )
    rest = [tokens(1, 9, choice_index=1), tokens(0, 8), finished(1, 2, 2)]
    second = FakeFrontend((), rest)
    outcome = outcome_of(first, second, num_choices=3)
    assert outcome.error is None
    positions = [(p.choice_index, list(p.token_ids)) for p in second.resumes[0].positions]
    assert positions == [(1, [1]), (2, [2, 3])]
    assert outcome.stream.resumes[0].offsets == (0, 1, 2)


def test_the_sum_of_the_log_probabilities_is_told() -> None:
    def piece(offset: int, *logprobs: float) -> pb.GenerateResponse:
        message = tokens(offset, *range(len(logprobs)))
        for logprob in logprobs:
            message.logprobs.add(logprob=logprob)
        return message

    first = FakeFrontend(
        [started(resume_token=b"t1"), piece(0, -0.5, -1.0), piece(2, -0.25), BROKEN]
    )
    second = FakeFrontend((), [piece(3, -2.0), finished(4)])
    assert outcome_of(first, second, num_top_logprobs=0).error is None
    (position,) = second.resumes[0].positions
    assert position.cumulative_logprob == -1.75


def test_the_newest_token_counts() -> None:
    newer = pb.GenerateResponse(resume_token=b"t2")
    newest = tokens(2, 3)
    newest.resume_token = b"t3"
    first = FakeFrontend([*FIRST[:-1], newer, BROKEN])
    second = FakeFrontend((), [newest, BROKEN], [tokens(3, 4), finished(4)])
    outcome = outcome_of(first, second)
    assert outcome.error is None
    assert [resume.resume_token for resume in second.resumes] == [b"t2", b"t3"]
    assert len(outcome.stream.resumes) == 2


def test_another_frontend_may_repeat_how_the_stream_began() -> None:
    again = started(resume_token=b"t2", frontend_id="f2")
    second = FakeFrontend((), [again, tokens(2, 3), BROKEN], [finished(3)])
    outcome = outcome_of(FakeFrontend([started(resume_token=b"t1", seed=7), *FIRST[1:]]), second)
    assert outcome.error is None
    assert outcome.stream.started is not None
    assert outcome.stream.started.seed == 7
    assert second.resumes[1].resume_token == b"t2"


LIES: dict[str, Script] = {
    "a token that was delivered": [tokens(1, 2), finished(2)],
    "a token too far": [tokens(3, 4), finished(4)],
    "another length": [finished(3)],
    "another request": [
        pb.GenerateResponse(started=pb.StreamStarted(request_id="other")),
        *REST,
    ],
    "a late beginning": [tokens(2, 3), started(), finished(3)],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_the_contract_holds_over_the_seam(lie: Script) -> None:
    outcome = outcome_of(FakeFrontend(FIRST), FakeFrontend((), lie, REST))
    assert outcome.error is not None
    assert outcome.error.reason is Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize("reason", [Reason.NOT_CONTINUABLE, Reason.DIVERGED, Reason.CANCELLED])
def test_a_refusal_ends_the_stream(reason: Reason) -> None:
    second = FakeFrontend((), [UnbrokenError(reason, "no")])
    outcome = outcome_of(FakeFrontend(FIRST), second)
    assert outcome.error is not None
    assert (outcome.error.reason, outcome.error.detail) == (reason, "no")
    assert outcome.token_ids == [1, 2]
    assert len(second.resumes) == 1
    assert not outcome.stream.resumes


def test_a_frontend_that_cannot_resume_is_left_for_one_that_can() -> None:
    outcome = outcome_of(FakeFrontend(FIRST), FakeFrontend(), FakeFrontend((), REST))
    assert outcome.error is None
    assert outcome.token_ids == [1, 2, 3]


def test_a_call_that_ends_without_a_word_goes_on() -> None:
    outcome = outcome_of(FakeFrontend(FIRST[:-1]), FakeFrontend((), REST))
    assert outcome.error is None
    assert outcome.stream.resumes[0].reason is Reason.WORKER_LOST


def test_with_a_single_frontend_the_stream_goes_on_there() -> None:
    outcome = outcome_of(FakeFrontend(FIRST, REST))
    assert outcome.error is None
    assert outcome.token_ids == [1, 2, 3]


def test_a_broken_call_after_the_end_is_no_failure() -> None:
    frontend = FakeFrontend([started(resume_token=b"t"), tokens(0, 1), finished(1), BROKEN])
    outcome = outcome_of(frontend)
    assert outcome.error is None
    assert not frontend.resumes


def test_a_broken_call_after_a_failed_end_is_one() -> None:
    end = finished(1)
    end.finished.choices[0].finish_reason = 4  # ERROR  # pyright: ignore[reportAttributeAccessIssue]
    outcome = outcome_of(FakeFrontend([started(resume_token=b"t"), tokens(0, 1), end, BROKEN]))
    assert outcome.error is not None
    assert outcome.error.reason is Reason.UNREACHABLE


@pytest.mark.parametrize("reason", [Reason.UNREACHABLE, Reason.DRAINING])
def test_what_has_not_begun_is_asked_of_another_frontend_under_the_same_id(reason: Reason) -> None:
    first = FakeFrontend([UnbrokenError(reason, "not here")])
    second = FakeFrontend([started(), tokens(0, 1), finished(1)])
    outcome = outcome_of(first, second)
    assert outcome.error is None
    assert first.requests[0].request_id
    assert first.requests == second.requests
    assert not outcome.stream.resumes


def test_an_overloaded_frontend_is_believed() -> None:
    first = FakeFrontend([UnbrokenError(Reason.OVERLOADED, "full", retry_after_s=1.0)])
    second = FakeFrontend([started(), finished(0)])
    outcome = outcome_of(first, second)
    assert outcome.error is not None
    assert (outcome.error.reason, outcome.error.retry_after_s) == (Reason.OVERLOADED, 1.0)
    assert not second.requests


IMPATIENT = ResumePolicy(calls_max=3, pause_initial_s=0.01)
PATIENT = ResumePolicy(pause_initial_s=30.0, pause_max_s=30.0)


def test_when_nobody_goes_on_the_last_error_is_raised_and_says_so() -> None:
    second = FakeFrontend((), [BROKEN])
    outcome = outcome_of(FakeFrontend(FIRST, [BROKEN]), second, policy=IMPATIENT)
    assert outcome.error is not None
    assert outcome.error.reason is Reason.UNREACHABLE
    assert "3 calls in a row brought nothing" in outcome.error.detail
    assert outcome.token_ids == [1, 2]


def test_a_deadline_that_a_pause_would_miss_ends_the_stream_at_once() -> None:
    began_at = time.monotonic()
    outcome = outcome_of(
        FakeFrontend(FIRST, [BROKEN]), FakeFrontend((), [BROKEN]), policy=PATIENT, timeout_s=8
    )
    assert outcome.error is not None
    assert "deadline" in outcome.error.detail
    assert time.monotonic() - began_at < 4


async def read_until_a_pause(
    stream: GenerationStream, *frontends: FakeFrontend
) -> "asyncio.Task[Piece]":
    """The read that waits before the stream's next call."""
    assert (await anext(stream)).token_ids == (1, 2)
    reading = asyncio.create_task(anext_of(stream))
    while not any(frontend.resumes for frontend in frontends):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)  # For the refusal to arrive. Any moment before is as good.
    assert not reading.done()
    return reading


async def anext_of(stream: GenerationStream) -> Piece:
    """`anext`, as a coroutine. A task cannot end with StopAsyncIteration."""
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise EOFError from None


async def leave(
    how: str, client: Client, stream: GenerationStream, reading: "asyncio.Task[Piece]"
) -> None:
    """Leave a stream that is being read, and see how the read ends."""
    match how:
        case "cancel":
            await stream.cancel()
            with pytest.raises(EOFError):
                await reading
        case "close":
            await client.close()
            with pytest.raises(UnbrokenError) as raised:
                await reading
            assert raised.value.reason is Reason.CANCELLED
        case _:
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("how", ["cancel", "close", "task"])
def test_a_pause_can_be_left(how: str) -> None:
    async def scenario() -> None:
        frontends = FakeFrontend(FIRST, [BROKEN]), FakeFrontend((), [BROKEN])
        async with a_client(*frontends, policy=PATIENT) as client:
            stream = client.generate(prompt="x")
            reading = await read_until_a_pause(stream, *frontends)
            await leave(how, client, stream, reading)
        assert sum(len(frontend.resumes) for frontend in frontends) == 1

    run(scenario())


@pytest.mark.parametrize("how", ["cancel", "close", "task"])
def test_a_resumed_call_can_be_left(how: str) -> None:
    async def scenario() -> None:
        second = FakeFrontend((), [tokens(2, 3), Hang()])
        async with a_client(FakeFrontend(FIRST), second) as client:
            stream = client.generate(prompt="x")
            for _ in range(2):
                await anext(stream)
            reading = asyncio.create_task(anext_of(stream))
            await asyncio.sleep(0)
            await leave(how, client, stream, reading)
            await second.left.wait()

    run(scenario())


def test_a_reader_that_would_be_waited_for_says_when_it_cancels() -> None:
    async def scenario() -> None:
        frontend = FakeFrontend([*FIRST[:-1], Hang()])
        async with a_client(frontend) as client:
            async with client.generate(prompt="x") as stream:
                await anext(stream)
            async with client.generate(prompt="x", reader_grace_s=5.0, tenant="t") as stream:
                await anext(stream)
            (cancel,) = frontend.cancels
            assert (cancel.tenant, cancel.request_id) == ("t", stream.request_id)

    run(scenario())


def test_a_stream_goes_on_from_its_checkpoint_in_another_client() -> None:
    async def scenario() -> None:
        first, second = FakeFrontend([*FIRST[:-1], Hang()]), FakeFrontend((), REST)
        async with a_client(first) as client, a_client(second) as other:
            stream = client.generate(prompt="x")
            await anext(stream)
            saved = stream.checkpoint().SerializeToString()
            resumed = other.resume(pb.ResumeRequest.FromString(saved), timeout_s=5)
            assert [piece async for piece in resumed] == [Piece(0, 2, (3,), "c")]
            assert resumed.request_id == stream.request_id
            assert second.resumes[0].resume_token == b"t1"
            await stream.cancel()

    run(scenario())


def test_a_checkpoint_that_cannot_be_is_refused() -> None:
    async def scenario() -> None:
        async with Client("127.0.0.1:1") as client:
            wrong = pb.ResumeRequest(resume_token=b"t", positions=[{"choice_index": 1}])  # pyright: ignore[reportArgumentType]
            with pytest.raises(UnbrokenError) as raised:
                client.resume(wrong)
            assert raised.value.reason is Reason.PROTOCOL_VIOLATION

    run(scenario())


def test_requests_are_found_at_whichever_frontend_has_them() -> None:
    async def scenario() -> None:
        first, second = FakeFrontend(), FakeFrontend()
        first.streams = [pb.StreamInfo(request_id="a"), pb.StreamInfo(request_id="both")]
        first.streams[1].choices.add(state=pb.STREAM_STATE_DONE)
        second.streams = [pb.StreamInfo(request_id="both"), pb.StreamInfo(request_id="r0")]
        second.streams[0].choices.add(state=pb.STREAM_STATE_RUNNING)
        async with a_client(first, second) as client:
            found = [stream.request_id async for stream in client.list_streams()]
            assert found == ["a", "both", "both", "r0"]
            assert (await client.get_stream("r0")).request_id == "r0"
            assert (await client.get_stream("both")).choices[0].state == pb.STREAM_STATE_RUNNING
            with pytest.raises(UnbrokenError) as raised:
                await client.get_stream("nowhere")
            assert raised.value.reason is Reason.STREAM_NOT_FOUND
            assert await client.cancel("r0")
            assert first.cancels == second.cancels

    run(scenario())


class Mute(FakeFrontend):
    """A frontend that answers no call about a request."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()

    @override
    async def GetStream(self, request: pb.GetStreamRequest, context: Any) -> pb.GetStreamResponse:
        self.is_asked.set()
        await asyncio.Event().wait()
        return pb.GetStreamResponse()


def test_calls_under_way_when_their_client_is_closed_say_so() -> None:
    async def scenario() -> None:
        mute = Mute()
        async with a_client(mute) as client:
            asking = asyncio.create_task(client.get_stream("r0"))
            await mute.is_asked.wait()
            await client.close()
            with pytest.raises(UnbrokenError) as raised:
                await asking
            assert raised.value.reason is Reason.CANCELLED

    run(scenario())


def test_a_frontend_that_is_down_hides_no_request_of_the_others() -> None:
    async def scenario() -> None:
        async with (
            serving_frontend(FakeFrontend()) as address,
            Client("127.0.0.1:1", address) as client,
        ):
            assert len([stream async for stream in client.list_streams()]) == 3
            assert (await client.get_stream("r1")).request_id == "r1"
            assert await client.cancel("r0")
        async with Client("127.0.0.1:1", "127.0.0.1:2") as client:
            for call in (client.get_stream("r1"), client.cancel("r1")):
                with pytest.raises(UnbrokenError) as raised:
                    await call
                assert raised.value.reason is Reason.UNREACHABLE
            with pytest.raises(UnbrokenError):
                _ = [stream async for stream in client.list_streams()]

    run(scenario())


REST_OF_SILENT: Script = [tokens(1, 2, text="b"), finished(2)]


@pytest.mark.parametrize("kind", ["silent", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_frontend_that_dies_or_hangs_is_noticed(number: signal.Signals, kind: str) -> None:
    async def scenario() -> None:
        second = FakeFrontend(
            [started(), tokens(0, 1, text="a"), tokens(1, 2, text="b"), finished(2)], REST_OF_SILENT
        )
        async with (
            frontend_process(kind) as (process, address),
            serving_frontend(second) as other,
            Client(address, other) as client,
        ):
            stream = client.generate(prompt="x", timeout_s=9)
            text = asyncio.ensure_future(stream.text())
            if kind == "silent":
                while stream.started is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert not text.done()
            os.kill(process.pid, number)
            if number is signal.SIGSTOP:
                while not is_stopped(process.pid):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert await text == "ab"
            if number is signal.SIGSTOP:
                assert is_stopped(process.pid), "it would have been cut by the end of the process"
            assert len(stream.resumes) == (kind == "silent")
            # A second stream goes where somebody answers.
            assert await client.generate(prompt="x", timeout_s=5).text() == "ab"

    run(scenario())
