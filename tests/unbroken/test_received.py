"""What a client makes of two calls that tell parts of a stream twice."""

import pytest

from tests.unbroken.fake_frontend import finished, started, tokens
from unbroken.errors import Reason, UnbrokenError
from unbroken.received import Received
from unbroken.v1 import inference_service_pb2 as pb


def overlapping(before: list[pb.GenerateResponse], after: list[pb.GenerateResponse]) -> Received:
    """Has `before`, was asked for what follows on it, has `after`, and hears the new call."""
    received = Received(pb.GenerateRequest(num_choices=2))
    for response in [started(resume_token=b"t"), *before]:
        received.add(response)
    asked = received.resume_request()
    for response in after:
        received.add(response)
    received.begin_overlapping_call(asked)
    return received


def told(received: Received, *responses: pb.GenerateResponse) -> list[pb.GenerateResponse]:
    """What is new of these messages."""
    new = [received.without_overlap(response) for response in responses]
    for response in new:
        received.add(response)
    return new


def test_what_came_before_the_call_told_it_is_dropped_and_what_is_new_is_kept() -> None:
    received = overlapping([tokens(0, 1, text="é")], [tokens(1, 2, 3, text="ab")])
    assert received.has_overlap
    first, second, third = told(
        received, tokens(1, 2), tokens(2, 3, 4, text="abc"), tokens(4, 5, text="d")
    )
    assert (list(first.token_ids), first.text) == ([], "")
    assert (second.offset, list(second.token_ids), second.text) == (3, [4], "c")
    assert (third.offset, list(third.token_ids), third.text) == (4, [5], "d")
    assert not received.has_overlap
    told(received, finished(5, 0))


def test_text_may_lag_behind_its_tokens_in_either_call() -> None:
    received = overlapping([tokens(0, 1, text="a")], [tokens(1, 2, text="")])
    (new,) = told(received, tokens(1, 2, text="b"))
    assert (list(new.token_ids), new.text) == ([], "b")
    received = overlapping([tokens(0, 1)], [tokens(1, 2, text="éa")])
    first, second = told(received, tokens(1, 2, 3, text="é"), tokens(3, 4, text="ab"))
    assert (list(first.token_ids), first.text) == ([3], "")
    assert (list(second.token_ids), second.text) == ([4], "b")


def test_choices_overlap_each_for_itself() -> None:
    received = overlapping([tokens(0, 1)], [tokens(0, 7, 8, choice_index=1)])
    zero, one = told(received, tokens(1, 2), tokens(0, 7, 8, 9, choice_index=1))
    assert list(zero.token_ids) == [2]
    assert (one.offset, list(one.token_ids)) == (2, [9])


def test_log_probabilities_go_with_their_tokens() -> None:
    request = pb.GenerateRequest()
    request.params.logprobs.SetInParent()
    received = Received(request)
    received.add(started(resume_token=b"t"))
    asked = received.resume_request()

    def piece(*logprobs: float) -> pb.GenerateResponse:
        response = tokens(0, *range(len(logprobs)))
        for logprob in logprobs:
            response.logprobs.add(logprob=logprob)
        return response

    received.add(piece(-1.0))
    received.begin_overlapping_call(asked)
    (new,) = told(received, piece(-1.0, -2.0))
    assert [one.logprob for one in new.logprobs] == [-2.0]
    assert received.resume_request().positions[0].cumulative_logprob == -3.0


@pytest.mark.parametrize(
    "response",
    [tokens(1, 9, text="b"), tokens(2, 3), tokens(0, 1, 2), tokens(1, 2, text="x" + "é")],
    ids=["another token", "a gap", "too early", "half a character"],
)
def test_a_call_that_tells_it_otherwise_breaks_the_contract(response: pb.GenerateResponse) -> None:
    received = overlapping([tokens(0, 1)], [tokens(1, 2, text="ab")])
    with pytest.raises(UnbrokenError) as error:
        received.without_overlap(response)
    assert error.value.reason is Reason.PROTOCOL_VIOLATION


def test_an_ordinary_call_afterwards_overlaps_no_more() -> None:
    received = overlapping([tokens(0, 1)], [tokens(1, 2)])
    received.begin_call()
    assert not received.has_overlap
