"""Claims of the client library about frontends that drain: it leaves before they stop."""

import asyncio
from typing import Any

import pytest

from tests.unbroken.fake_frontend import FakeFrontend, Hang, Script, finished, started, tokens
from tests.unbroken.test_client_resume import a_client, outcome_of, run
from unbroken.errors import Reason, UnbrokenError
from unbroken.resumption import ResumePolicy
from unbroken.v1 import inference_service_pb2 as pb

CUT = UnbrokenError(Reason.DRAINING, "the frontend stops")
TAKEN = UnbrokenError(Reason.FENCED, "the stream was adopted")


def notice() -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    response.drain_notice.budget_left.FromSeconds(30)
    return response


BEGIN: Script = [started(resume_token=b"t1"), tokens(0, 1, 2, text="ab"), notice()]
REST: Script = [started(resume_token=b"t2"), tokens(2, 3, 4, text="cd"), finished(4)]


def test_a_stream_goes_on_at_another_frontend_while_the_one_before_is_silent() -> None:
    old, new = FakeFrontend([*BEGIN, Hang()]), FakeFrontend([], REST)
    outcome = outcome_of(old, new)
    assert outcome.error is None
    assert (outcome.token_ids, outcome.text) == ([1, 2, 3, 4], "abcd")
    (asked,) = new.resumes
    assert asked.resume_token == b"t1"
    assert list(asked.positions[0].token_ids) == [1, 2]
    (seam,) = outcome.stream.resumes
    assert (seam.from_address, seam.to_address) == tuple(outcome.addresses)
    assert (seam.reason, seam.offsets) == (Reason.DRAINING, (2,))


def test_the_call_before_is_left_once_the_other_has_output() -> None:
    async def scenario() -> None:
        old, new = FakeFrontend([*BEGIN, Hang()]), FakeFrontend([], REST)
        async with a_client(old, new) as client:
            assert await client.generate(prompt="x").text() == "abcd"
            await old.left.wait()

    run(scenario())


def test_whoever_waits_for_another_frontend_reads_on_meanwhile() -> None:
    async def scenario() -> None:
        old, new = (
            FakeFrontend([*BEGIN, tokens(2, 3, text="c"), Hang()]),
            FakeFrontend([], [Hang()]),
        )
        async with a_client(old, new) as client:
            stream = client.generate(prompt="x")
            pieces = [await anext(stream), await anext(stream)]
            assert [list(piece.token_ids) for piece in pieces] == [[1, 2], [3]]
            await stream.cancel()
            await old.left.wait()

    run(scenario())


def test_a_call_that_ends_because_the_stream_was_adopted_elsewhere_is_no_failure() -> None:
    outcome = outcome_of(FakeFrontend([*BEGIN, TAKEN]), FakeFrontend([], REST))
    assert outcome.error is None
    assert outcome.token_ids == [1, 2, 3, 4]
    assert len(outcome.stream.resumes) == 1


def test_a_frontend_that_cannot_take_it_leaves_it_where_it_is_until_it_is_cut() -> None:
    full: Script = [UnbrokenError(Reason.OVERLOADED, "full")]
    rest: Script = [tokens(3, 4, text="d"), finished(4)]
    old = FakeFrontend([*BEGIN, tokens(2, 3, text="c"), CUT])
    outcome = outcome_of(old, FakeFrontend([], full, rest))
    assert outcome.error is None
    assert (outcome.token_ids, outcome.text) == ([1, 2, 3, 4], "abcd")
    assert [seam.offsets for seam in outcome.stream.resumes] == [(3,)]


def test_a_stream_that_ends_where_it_is_needs_no_other() -> None:
    new = FakeFrontend([], [Hang()])
    outcome = outcome_of(FakeFrontend([*BEGIN, tokens(2, 3, text="c"), finished(3)]), new)
    assert outcome.error is None
    assert outcome.token_ids == [1, 2, 3]
    assert outcome.stream.resumes == ()


@pytest.mark.parametrize("options", [{}, {"policy": ResumePolicy(resumes_max=0)}])
def test_who_has_no_other_or_may_not_resume_reads_on(options: dict[str, Any]) -> None:
    old = FakeFrontend([*BEGIN, tokens(2, 3, text="c"), finished(3)])
    others = [FakeFrontend([], REST)] if options else []
    outcome = outcome_of(old, *others, **options)
    assert outcome.error is None
    assert outcome.token_ids == [1, 2, 3]
    assert not any(other.resumes for other in others)


def test_leaving_a_stream_that_moves_leaves_both_calls() -> None:
    async def scenario() -> None:
        old, new = FakeFrontend([*BEGIN, Hang()]), FakeFrontend([], [Hang()])
        async with a_client(old, new) as client:
            stream = client.generate(prompt="x")
            await anext(stream)
            reading = asyncio.create_task(anext(stream))
            while not new.resumes:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.001)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            assert reading.cancelled()
            await asyncio.gather(old.left.wait(), new.left.wait())

    run(scenario())
