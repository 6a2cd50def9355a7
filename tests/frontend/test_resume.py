"""How calls come to a request that another call had: joined, resumed, refused."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from frontend.lineage import Lineage
from frontend.reading import Reader
from frontend.requests import Request
from frontend.stream import Limits, Mismatch, Past
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, run, world
from tests.integration.plain import Caller, Recording
from unbroken.errors import Reason
from unbroken.status import from_rpc_error
from unbroken.v1 import inference_service_pb2 as pb

PROMPT = list(b"The tide")
SEED = 7


def request(request_id: str = "r", *, max_tokens: int = 40) -> pb.GenerateRequest:
    message = pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=PROMPT))
    message.params.sampling.seed = SEED
    message.params.stopping.max_tokens = max_tokens
    return message


def assert_whole(seen: Recording, max_tokens: int = 40) -> None:
    """Every token once, the text with them, and the usage of one request."""
    heard = seen.choices[0]
    assert heard.token_ids == reference(PROMPT, max_tokens, SEED)
    assert heard.text.encode() == bytes(heard.token_ids)
    assert seen.finished is not None
    assert seen.finished.usage.completion_tokens == max_tokens
    assert seen.finished.usage.prompt_tokens == len(PROMPT)


async def reason_of(call: grpc.aio.UnaryStreamCall[pb.ResumeRequest, pb.ResumeResponse]) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    return from_rpc_error(raised.value).reason


async def drain(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    """Read to the end, or to the error."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def left(it: World, seen: Recording, num_tokens: int) -> None:
    """Read so many tokens and leave."""
    async with Caller(it.frontend.address) as caller:
        assert not await caller.generate(seen, until=num_tokens)
    await it.until(lambda: it.num_running() == 0)


def test_a_stream_that_its_reader_left_is_resumed_from_what_that_one_holds() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
            seen = Recording(request())
            await left(it, seen, 10)
            async with Caller(it.frontend.address) as caller:
                assert await caller.resume(seen)
            assert_whole(seen)

    run(scenario())


def test_with_reader_grace_the_generation_goes_on_and_is_joined() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            message = request()
            message.reader_grace.CopyFrom(Duration(seconds=20))
            seen = Recording(message)
            async with Caller(it.frontend.address) as caller:
                await caller.generate(seen, until=5)
            await it.until(lambda: it.num_running() == 0)  # Complete, read by nobody.
            async with Caller(it.frontend.address) as caller:
                assert await caller.resume(seen)
            assert_whole(seen)
            assert len(it.sidecars[0].starts) == 1, "it was computed once"

    run(scenario())


def test_without_a_reader_for_longer_than_its_grace_a_request_ends() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None)) as it:
            message = request()
            message.reader_grace.FromMilliseconds(50)
            async with Caller(it.frontend.address) as caller:
                call = caller.stub.Generate(message)
                await call.read()
            await it.until(lambda: it.num_running() == 0)
            await it.sidecars[0].until(lambda: it.sidecars[0].aborts)

    run(scenario())


@pytest.mark.parametrize("by", ["Generate", "Resume"])
def test_a_later_call_takes_the_request_over(by: str) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            seen = Recording(request())
            async with Caller(it.frontend.address) as one, Caller(it.frontend.address) as other:
                first = one.stub.Generate(request())
                while seen.num_tokens < 5:
                    message = await first.read()
                    assert isinstance(message, pb.GenerateResponse)
                    seen.take(message)
                if by == "Generate":
                    seen = Recording(request())  # It is told everything.
                    reading = asyncio.create_task(other.generate(seen))
                else:
                    reading = asyncio.create_task(other.resume(seen))
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await drain(first)
                assert raised.value.code() is grpc.StatusCode.ABORTED
                assert await reading
            assert_whole(seen)
            assert len(it.sidecars[0].starts) == 1, "there is one stream"

    run(scenario())


def test_a_slow_stream_gets_another_token_before_its_last_one_expires() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=0.03)
        async with world(sidecar, edge="native", resume_token_lifetime_s=1) as it:
            seen = Recording(request(max_tokens=100))
            async with Caller(it.frontend.address) as caller:
                assert not await caller.generate(seen, until=55)
            assert seen.num_tokens_received > 1

    run(scenario())


def test_a_request_repeated_after_its_end_is_told_again() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            for _ in range(2):
                seen = Recording(request())
                async with Caller(it.frontend.address) as caller:
                    assert await caller.generate(seen)
                assert_whole(seen)
            assert len(it.sidecars[0].starts) == 1

    run(scenario())


def test_another_request_under_a_running_id_is_refused_and_after_its_end_is_not() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            async with Caller(it.frontend.address) as caller:
                first = caller.stub.Generate(request())
                await first.read()
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await caller.generate(Recording(request(max_tokens=41)))
                assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
                await drain(first)
                seen = Recording(request(max_tokens=41))
                assert await caller.generate(seen)
            assert_whole(seen, 41)

    run(scenario())


def test_an_output_that_is_complete_in_the_clients_hands_gets_its_end() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            seen = Recording(request())
            async with Caller(it.frontend.address) as caller:
                assert await caller.generate(seen)
            seen.finished = None
            num_starts = len(it.sidecars[0].starts)
            it.frontend.requests.forget_complete()
            async with Caller(it.frontend.address) as caller:
                assert await caller.resume(seen)
            assert_whole(seen)
            assert len(it.sidecars[0].starts) == num_starts

    run(scenario())


def claim_a_token_too_much(message: pb.ResumeRequest) -> None:
    message.positions[0].token_ids.extend([ord("z")] * 41)


def claim_text_that_was_never_sent(message: pb.ResumeRequest) -> None:
    message.positions[0].num_text_bytes += 1000


def claim_an_unknown_choice(message: pb.ResumeRequest) -> None:
    message.positions[0].choice_index = 1


def claim_a_choice_twice(message: pb.ResumeRequest) -> None:
    message.positions.append(message.positions[0])


def claim_an_id_beyond_the_vocabulary(message: pb.ResumeRequest) -> None:
    message.positions[0].token_ids[0] = 1_000_000


def change_the_request(message: pb.ResumeRequest) -> None:
    message.request.priority = 5


def take_the_token_of_another(message: pb.ResumeRequest) -> None:
    message.request.tenant = "somebody"


def flip_a_bit(message: pb.ResumeRequest) -> None:
    data = bytearray(message.resume_token)
    data[len(data) // 2] ^= 1
    message.resume_token = bytes(data)


def bring_no_token(message: pb.ResumeRequest) -> None:
    message.resume_token = b""


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (claim_a_token_too_much, Reason.RESUME_MISMATCH),
        (claim_text_that_was_never_sent, Reason.RESUME_MISMATCH),
        (claim_an_unknown_choice, Reason.INVALID_FIELD),
        (claim_a_choice_twice, Reason.INVALID_FIELD),
        (claim_an_id_beyond_the_vocabulary, Reason.INVALID_FIELD),
        (change_the_request, Reason.RESUME_TOKEN_INVALID),
        (take_the_token_of_another, Reason.RESUME_TOKEN_INVALID),
        (flip_a_bit, Reason.RESUME_TOKEN_INVALID),
        (bring_no_token, Reason.RESUME_TOKEN_INVALID),
    ],
)
def test_a_false_claim_is_refused_and_starts_nothing(
    attack: Callable[[pb.ResumeRequest], None], reason: Reason
) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            seen = Recording(request())
            await left(it, seen, 10)
            num_starts = len(it.sidecars[0].starts)
            message = seen.resume_request()
            attack(message)
            async with Caller(it.frontend.address) as caller:
                assert await reason_of(caller.stub.Resume(message)) is reason
                assert len(it.sidecars[0].starts) == num_starts
                assert await caller.resume(seen)  # The honest one goes on.
            assert_whole(seen)

    run(scenario())


def test_a_request_that_came_to_nothing_hears_of_no_cancel() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it, Caller(it.frontend.address) as caller:
            call = caller.stub.Generate(request(max_tokens=4000))
            await call.read()
            (running,) = it.frontend.requests.running
            member = Lineage().enter(("t", "r"), "", 0.0)
            with pytest.raises(Mismatch):
                Request(
                    running.admitted,
                    running._dispatcher,  # pyright: ignore[reportPrivateUsage]
                    Limits(),
                    digest=b"",
                    epoch=1,
                    taken_ms=1,
                    deadline_at=None,
                    member=member,
                    pasts=[Past(token_ids=[1])],
                )
            assert not member.context.on_change

    run(scenario())


def test_a_false_claim_does_not_take_a_running_request_over() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            seen = Recording(request())
            async with Caller(it.frontend.address) as caller:
                reading = asyncio.create_task(caller.generate(seen))
                await it.until(lambda: seen.num_tokens >= 5)
                message = seen.resume_request()
                message.positions[0].token_ids[2] += 1
                assert await reason_of(caller.stub.Resume(message)) is Reason.RESUME_MISMATCH
                assert await reading
            assert_whole(seen)

    run(scenario())


def test_a_false_claim_about_one_choice_tells_the_reader_of_the_others_nothing_twice() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            message = request()
            message.num_choices = 2
            seen = Recording(message)
            async with Caller(it.frontend.address) as caller:
                reading = asyncio.create_task(caller.generate(seen))
                await it.until(
                    lambda: (
                        len(seen.choices) == 2
                        and all(len(one.token_ids) >= 5 for one in seen.choices.values())
                    )
                )
                claim = seen.resume_request()
                by_choice = {one.choice_index: one for one in claim.positions}
                del by_choice[0].token_ids[2:]
                by_choice[0].num_text_bytes = 2
                by_choice[1].token_ids[2] += 1
                assert await reason_of(caller.stub.Resume(claim)) is Reason.RESUME_MISMATCH
                assert await reading  # `Recording` sees to the offsets.
            assert [len(seen.choices[index].token_ids) for index in (0, 1)] == [40, 40]

    run(scenario())


@pytest.mark.parametrize("by", ["Generate", "Resume"])
def test_a_reader_that_leaves_before_what_it_took_is_sent_stops_no_engine(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Reader.sent

    def send_unless_first(reader: Reader) -> None:
        if reader.request.reader > 1:
            send(reader)

    monkeypatch.setattr(Reader, "sent", send_unless_first)

    async def scenario() -> None:
        async with world(FakeSidecar("w1"), window_tokens=16) as it:
            message = request()
            message.reader_grace.CopyFrom(Duration(seconds=20))
            seen = Recording(message)
            async with Caller(it.frontend.address) as caller:
                assert not await caller.generate(seen, until=16)
            async with Caller(it.frontend.address) as caller:
                if by == "Resume":
                    assert await caller.resume(seen)
                else:
                    seen = Recording(message)  # It is told everything.
                    assert await caller.generate(seen)
            assert_whole(seen)
            assert len(it.sidecars[0].starts) == 1, "it was joined"

    run(scenario())


def test_a_claim_that_nobody_can_check_changes_only_the_claimants_own_stream() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            seen = Recording(request())
            await left(it, seen, 10)
            seen.choices[0].token_ids[3] = ord("!")
            async with Caller(it.frontend.address) as caller:
                assert await caller.resume(seen)
                other = Recording(request("other"))
                assert await caller.generate(other)
            assert len(seen.choices[0].token_ids) == 40
            assert_whole(other)

    run(scenario())


def test_cancel_and_get_stream_name_the_tenant() -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1", step_s=0.01)) as it,
            Caller(it.frontend.address) as caller,
        ):
            calls: list[grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]] = []
            for tenant in ("a", "b"):
                message = request(max_tokens=1000)
                message.tenant = tenant
                calls.append(caller.stub.Generate(message))
                await calls[-1].read()
            stub = caller.stub
            answer = await stub.Cancel(pb.CancelRequest(request_id="r", tenant="c"))
            assert not answer.was_running
            answer = await stub.Cancel(pb.CancelRequest(request_id="r", tenant="a"))
            assert answer.was_running
            with pytest.raises(grpc.aio.AioRpcError):
                await drain(calls[0])
            info = await stub.GetStream(pb.GetStreamRequest(request_id="r", tenant="b"))
            assert info.stream.choices[0].state == pb.STREAM_STATE_RUNNING
            info = await stub.GetStream(pb.GetStreamRequest(request_id="r", tenant="a"))
            assert info.stream.choices[0].state == pb.STREAM_STATE_DONE
            calls[1].cancel()

    run(scenario())
