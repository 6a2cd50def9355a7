"""Claims of the client library, against a frontend that behaves, and one that does not."""

import asyncio
from typing import Any

import pytest
import uvloop
from google.protobuf import text_format

from tests.unbroken.fake_frontend import (
    FakeFrontend,
    Hang,
    Script,
    finished,
    serving_frontend,
    started,
    tokens,
)
from unbroken.client import Client
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.generation import TokenLogprobs
from unbroken.generation_stream import GenerationStream, Piece
from unbroken.v1 import generation_pb2
from unbroken.v1 import inference_service_pb2 as pb


def outcome_of(
    script: Script, **options: Any
) -> tuple[list[Piece], UnbrokenError | None, GenerationStream]:
    """What a client makes of a frontend's words: pieces, error, and the stream itself."""

    async def scenario() -> tuple[list[Piece], UnbrokenError | None, GenerationStream]:
        pieces: list[Piece] = []
        async with (
            serving_frontend(FakeFrontend(script)) as address,
            Client(address) as client,
        ):
            stream = client.generate(prompt="hello", **options)
            try:
                async with asyncio.timeout(5):
                    async for piece in stream:
                        pieces.append(piece)  # noqa: PERF401 - they count if an error follows.
            except UnbrokenError as error:
                return pieces, error, stream
            return pieces, None, stream

    return uvloop.run(scenario())


def test_a_stream_is_delivered_piece_by_piece() -> None:
    script = [
        started(num_prompt_tokens=2),
        tokens(0, 7, 8, text="ab"),
        tokens(2, 9),
        tokens(3, text="c"),
        finished(3),
    ]
    pieces, error, stream = outcome_of(script)
    assert error is None
    assert pieces == [Piece(0, 0, (7, 8), "ab"), Piece(0, 2, (9,), ""), Piece(0, 3, (), "c")]
    assert stream.started is not None
    assert stream.started.num_prompt_tokens == 2
    assert stream.request_id == stream.started.request_id
    assert stream.finished is not None
    assert stream.finished.usage.completion_tokens == 3


def test_one_message_may_be_first_and_last_and_carry_tokens() -> None:
    whole = started()
    whole.MergeFrom(tokens(0, 7, text="a"))
    whole.MergeFrom(finished(1))
    pieces, error, _ = outcome_of([whole])
    assert (pieces, error) == ([Piece(0, 0, (7,), "a")], None)


def test_choices_have_offsets_of_their_own() -> None:
    script = [
        started(),
        tokens(0, 1, choice_index=1),
        tokens(0, 2),
        tokens(1, 3, choice_index=1),
        finished(1, 2),
    ]
    pieces, error, _ = outcome_of(script, num_choices=2)
    assert error is None
    assert [(p.choice_index, p.token_ids) for p in pieces] == [(1, (1,)), (0, (2,)), (1, (3,))]


def test_log_probabilities_come_with_their_tokens() -> None:
    message = tokens(0, 7)
    message.logprobs.add(logprob=-0.5, top_token_ids=[7, 8], top_logprobs=[-0.5, -1.0])
    pieces, error, _ = outcome_of([started(), message, finished(1)], num_top_logprobs=2)
    assert error is None
    assert pieces[0].logprobs == (TokenLogprobs(-0.5, (7, 8), (-0.5, -1.0)),)


def test_the_text_of_a_stream_is_all_its_text() -> None:
    async def scenario() -> str:
        script = [started(), tokens(0, 1, text="un"), tokens(1, 2, text="broken"), finished(2)]
        async with (
            serving_frontend(FakeFrontend(script)) as address,
            Client(address) as client,
        ):
            return await client.generate(prompt="x").text()

    assert uvloop.run(scenario()) == "unbroken"


VIOLATIONS: dict[str, Script] = {
    "a gap": [started(), tokens(0, 1), tokens(2, 3), finished(2)],
    "an overlap": [started(), tokens(0, 1, 2), tokens(1, 3), finished(3)],
    "a beginning above zero": [started(), tokens(1, 2), finished(1)],
    "no started": [tokens(0, 1), finished(1)],
    "started twice": [started(), started(), finished(0)],
    "a choice nobody asked for": [started(), tokens(0, 1, choice_index=1), finished(0, 1)],
    "words after the end": [started(), finished(0), tokens(0, 1)],
    "a wrong length at the end": [started(), tokens(0, 1), finished(2)],
    "a missing choice at the end": [started(), tokens(0, 1), finished()],
    "log probabilities nobody asked for": [
        started(),
        text_format.Parse("token_ids: 1 logprobs {logprob: -1}", pb.GenerateResponse()),
        finished(1),
    ],
}


@pytest.mark.parametrize("script", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_broken_contract_is_an_error(script: Script) -> None:
    _, error, _ = outcome_of(script)
    assert error is not None
    assert error.reason is Reason.PROTOCOL_VIOLATION


def test_missing_log_probabilities_are_an_error() -> None:
    pieces, error, _ = outcome_of([started(), tokens(0, 1), finished(1)], num_top_logprobs=0)
    assert not pieces
    assert error is not None
    assert error.reason is Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize("script", [[], [started()], [started(), tokens(0, 1)]])
def test_an_end_without_finished_is_an_error(script: Script) -> None:
    pieces, error, _ = outcome_of(script)
    assert len(pieces) == max(0, len(script) - 1)
    assert error is not None
    assert error.reason is Reason.WORKER_LOST


def test_an_error_in_the_middle_keeps_its_reason_and_what_came_before() -> None:
    overloaded = UnbrokenError(Reason.OVERLOADED, "full", retry_after_s=2.5)
    pieces, error, _ = outcome_of([started(), tokens(0, 1), overloaded])
    assert len(pieces) == 1
    assert error is not None
    assert (error.reason, error.detail, error.retry_after_s) == (Reason.OVERLOADED, "full", 2.5)


def test_an_error_after_finished_is_raised_and_finished_is_kept() -> None:
    lost = UnbrokenError(Reason.MIGRATIONS_EXHAUSTED, "three workers lost")
    _, error, stream = outcome_of([started(), tokens(0, 1), finished(1), lost])
    assert error is not None
    assert error.reason is Reason.MIGRATIONS_EXHAUSTED
    assert stream.finished is not None


def test_nobody_at_the_address_is_unreachable() -> None:
    async def scenario() -> None:
        for addresses in (["127.0.0.1:1"], ["127.0.0.1:1", "127.0.0.1:2"]):
            async with Client(*addresses) as client:
                for call in (client.generate(prompt="x").text(), client.list_models()):
                    with pytest.raises(UnbrokenError) as raised:
                        await call
                    assert raised.value.reason is Reason.UNREACHABLE

    uvloop.run(scenario())


def test_of_several_frontends_the_first_that_can_be_reached_serves() -> None:
    async def scenario() -> None:
        frontend = FakeFrontend([started(), finished(0)])
        async with (
            serving_frontend(frontend) as address,
            serving_frontend(FakeFrontend()) as unused,
            Client("127.0.0.1:1", address, unused) as client,
        ):
            await client.generate(prompt="x").text()
            await client.generate(prompt="x").text()
        assert len(frontend.requests) == 2

    uvloop.run(scenario())


SILENT: Script = [started(), tokens(0, 1), Hang()]


def test_the_timeout_bounds_the_generation() -> None:
    async def scenario() -> None:
        async with serving_frontend(FakeFrontend(SILENT)) as address, Client(address) as client:
            with pytest.raises(UnbrokenError) as raised:
                await client.generate(prompt="x", timeout_s=0.1).text()
            assert raised.value.reason is Reason.DEADLINE_EXCEEDED

    uvloop.run(scenario())


@pytest.mark.parametrize("how", ["leave the block", "cancel the stream", "cancel the task"])
def test_leaving_a_stream_tells_the_frontend(how: str) -> None:
    async def read(client: Client, has_read: asyncio.Event) -> None:
        async with client.generate(prompt="x") as stream:
            async for _ in stream:
                has_read.set()
                if how == "leave the block":
                    break
                if how == "cancel the stream":
                    await stream.cancel()

    async def scenario() -> None:
        frontend = FakeFrontend(SILENT)
        async with (
            serving_frontend(frontend) as address,
            Client(address) as client,
            asyncio.timeout(5),
        ):
            has_read = asyncio.Event()
            task = asyncio.create_task(read(client, has_read))
            await has_read.wait()
            if how == "cancel the task":
                task.cancel()
            await frontend.left.wait()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() == (how == "cancel the task")

    uvloop.run(scenario())


def test_the_other_calls_answer() -> None:
    async def scenario() -> None:
        async with serving_frontend(FakeFrontend()) as address, Client(address) as client:
            assert [model.model for model in await client.list_models()] == ["smol"]
            assert [w.record.identity.worker_id for w in await client.list_workers()] == ["w1"]
            assert [s.request_id async for s in client.list_streams()] == ["r0", "r1", "r2"]
            assert (await client.get_stream("r2")).request_id == "r2"
            assert await client.cancel("r0")
            assert not await client.cancel("r0", is_soft=True)
            with pytest.raises(UnbrokenError) as raised:
                await client.get_stream("r9")
            assert raised.value.reason is Reason.STREAM_NOT_FOUND

    uvloop.run(scenario())


def request_of(**keywords: Any) -> pb.GenerateRequest:
    """What the frontend receives."""

    async def scenario() -> pb.GenerateRequest:
        frontend = FakeFrontend([started(), finished(0)])
        async with serving_frontend(frontend) as address, Client(address) as client:
            await client.generate(**keywords).text()
        return frontend.requests[0]

    return uvloop.run(scenario())


def test_every_keyword_reaches_its_field() -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "logit_bias": {7: 1.5},
    }
    stopping: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "include_stop": True,
    }
    options: dict[str, Any] = {
        "request_id": "mine",
        "model": "m",
        "continuation": pb.CONTINUATION_POLICY_NEVER,
        "migrations_max": 0,
        "priority": -5,
        "tenant": "t",
        "parent_request_id": "p",
    }
    got = request_of(
        token_ids=[1, 2],
        num_top_logprobs=0,
        regex="a+",
        orphan_grace_s=1.5,
        reader_grace_s=2.5,
        **sampling,
        **stopping,
        **options,
    )
    expected = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2]),
        params=generation_pb2.GenerationParams(
            sampling=generation_pb2.SamplingParams(**sampling),
            stopping=generation_pb2.StopConditions(**stopping),
            constraint=generation_pb2.Constraint(regex="a+"),
            logprobs=generation_pb2.LogprobParams(),
        ),
        **options,
    )
    expected.orphan_grace.FromMilliseconds(1500)
    expected.reader_grace.FromMilliseconds(2500)
    assert got == expected
    assert got.params.HasField("logprobs")
    assert got.HasField("migrations_max")


def test_prompts_come_in_three_forms() -> None:
    assert request_of(prompt="").WhichOneof("prompt") == "text"
    assert request_of(token_ids=[]).WhichOneof("prompt") == "token_ids"
    chat = request_of(messages=[{"role": "user", "content": "hi"}]).chat
    assert [(m.role, m.content) for m in chat.messages] == [("user", "hi")]


def test_an_absent_keyword_is_an_absent_field() -> None:
    got = request_of(prompt="x")
    assert got.request_id, "the client names its requests, so that they can be asked again"
    assert got == pb.GenerateRequest(text="x", request_id=got.request_id)


NONSENSE: dict[str, dict[str, Any]] = {
    "prompt": {},
    "temperature": {"prompt": "x", "temperature": "hot"},
    "top_k": {"prompt": "x", "top_k": -1},
    "seed": {"prompt": "x", "seed": 2**64},
    "max_tokens": {"prompt": "x", "max_tokens": 1.5},
    "stop": {"prompt": "x", "stop": "a single text"},
    "logit_bias": {"prompt": "x", "logit_bias": {-1: 1.0}},
    "token_ids": {"token_ids": [1, -1]},
    "messages": {"messages": [{"role": "user", "text": "hi"}]},
    "constraint": {"prompt": "x", "regex": "a", "json_object": True},
    "prompt_text": {"prompt": "x", "prompt_text": "y"},
    "text": {"prompt": "x", "text": "y"},
    "params": {"prompt": "x", "params": 1},
    "continuation": {"prompt": "x", "continuation": "ALWAYS"},
    "orphan_grace_s": {"prompt": "x", "orphan_grace_s": "long"},
}


@pytest.mark.parametrize("field", NONSENSE)
def test_nonsense_is_refused_before_it_is_sent(field: str) -> None:
    with pytest.raises(InvalidField) as raised:
        Client("127.0.0.1:1").generate(**NONSENSE[field])
    assert raised.value.field == field


def test_two_prompts_are_refused() -> None:
    with pytest.raises(InvalidField):
        Client("127.0.0.1:1").generate(prompt="x", token_ids=[1])
