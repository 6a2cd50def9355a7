"""What is encoded by hand is what protobuf writes."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from frontend.edge.encoding import TokenBodies, generate_response, resume_response, varint
from frontend.edge.messages import PREFIX
from unbroken.generation import TokenLogprobs, logprobs_to_proto
from unbroken.v1 import inference_service_pb2 as pb

u32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 127, 128, 16383, 16384, 2**21, 2**28])
f32 = st.floats(width=32)
logprobs = st.builds(
    TokenLogprobs,
    logprob=f32,
    top_token_ids=st.lists(u32, max_size=3).map(tuple),
    top_logprobs=st.lists(f32, max_size=3).map(tuple),
)


@given(
    choice_index=u32,
    offset=u32,
    token_ids=st.lists(u32, max_size=200),
    text=st.text(max_size=300),
    logprobs=st.lists(logprobs, max_size=3),
    resume_token=st.binary(max_size=300),
)
def test_a_response_is_what_protobuf_writes(
    choice_index: int,
    offset: int,
    token_ids: list[int],
    text: str,
    logprobs: list[TokenLogprobs],
    resume_token: bytes,
) -> None:
    expected = pb.GenerateResponse(
        choice_index=choice_index,
        offset=offset,
        token_ids=token_ids,
        text=text,
        logprobs=map(logprobs_to_proto, logprobs),
        resume_token=resume_token,
    )
    ids = array("I", token_ids)
    written = generate_response(choice_index, offset, ids, text, logprobs, resume_token)
    assert written == expected.SerializeToString()
    resumed = pb.ResumeResponse(response=expected).SerializeToString()
    assert resume_response(written) == resumed


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
    bodies = TokenBodies(texts, answers_resume=answers_resume)
    response = pb.GenerateResponse(offset=offset, token_ids=[token_id], text=texts[token_id])
    expected = (
        pb.ResumeResponse(response=response) if answers_resume else response
    ).SerializeToString()
    for _ in range(2):  # The second time from what is kept.
        body = bodies.body(offset, token_id)
        assert PREFIX.unpack_from(body) == (0, len(expected))
        assert body[PREFIX.size :] == expected


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_varints(value: int) -> None:
    message = pb.GenerateResponse()
    message.started.seed = value
    assert message.started.SerializeToString() == b"\x38" + varint(value)
