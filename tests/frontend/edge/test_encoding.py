"""What is encoded by hand is what protobuf writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.edge.encoding import TokenBodies, TokenFields, body, varint
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb

u32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 127, 128, 16383, 16384, 2**21, 2**28])


@given(text=st.text(max_size=300), offset=u32)
def test_a_body_is_what_protobuf_writes_after_its_length(text: str, offset: int) -> None:
    response = pb.GenerateResponse(offset=offset, text=text)
    for expected in (response, pb.ResumeResponse(response=response)):
        answers_resume = expected is not response
        written = body(response.SerializeToString(), answers_resume=answers_resume)
        assert PREFIX.unpack_from(written) == (0, expected.ByteSize())
        assert written[PREFIX.size :] == expected.SerializeToString()


@given(
    offset=u32 | st.sampled_from([4095, 4096]),
    texts=st.lists(st.text(max_size=300), min_size=1, max_size=4),
    token_id=st.integers(0, 3),
    answers_resume=st.booleans(),
)
def test_what_is_kept_for_a_token_is_what_protobuf_writes(
    offset: int, texts: list[str], token_id: int, *, answers_resume: bool
) -> None:
    token_id %= len(texts)
    bodies = TokenBodies(TokenFields(texts), answers_resume=answers_resume)
    response = pb.GenerateResponse(offset=offset, token_ids=[token_id], text=texts[token_id])
    expected = (
        pb.ResumeResponse(response=response) if answers_resume else response
    ).SerializeToString()
    for _ in range(2):  # The second time from what is kept.
        written = bodies.body(offset, token_id)
        assert PREFIX.unpack_from(written) == (0, len(expected))
        assert written[PREFIX.size :] == expected


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_varints(value: int) -> None:
    message = pb.GenerateResponse()
    message.started.seed = value
    assert message.started.SerializeToString() == b"\x38" + varint(value)


@given(
    offset=st.one_of(
        st.integers(0, 300),
        *(st.integers(2**bits - 150, 2**bits + 20) for bits in (14, 21, 28)),
    ),
    texts=st.lists(st.text(max_size=300), min_size=1, max_size=4),
    num_tokens=st.integers(1, 130),
    answers_resume=st.booleans(),
)
def test_the_size_of_many_is_that_of_each(
    offset: int, texts: list[str], num_tokens: int, *, answers_resume: bool
) -> None:
    bodies = TokenBodies(TokenFields(texts), answers_resume=answers_resume)
    token_ids = [number % len(texts) for number in range(num_tokens)]
    size = sum(len(bodies.body(at, one)) for at, one in enumerate(token_ids, offset))
    assert bodies.size(offset, token_ids) == size


@pytest.mark.parametrize("answers_resume", [False, True])
@pytest.mark.parametrize("length", range(112, 128))
def test_the_size_is_right_where_its_own_field_grows(length: int, *, answers_resume: bool) -> None:
    bodies = TokenBodies(TokenFields(["a" * length]), answers_resume=answers_resume)
    size = len(bodies.body(5, 0)) + len(bodies.body(6, 0))
    assert bodies.size(5, [0, 0]) == size
