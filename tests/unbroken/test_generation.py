"""Parameters that were validated are not validated again, and nothing else about them changes."""

import pytest

from unbroken.errors import InvalidField
from unbroken.generation import (
    PARAMS_REMEMBERED_BYTES_MAX,
    STOP_STRING_BYTES_MAX,
    params_from_proto,
    params_to_proto,
)
from unbroken.v1 import generation_pb2 as pb


def greedy(**stopping: object) -> pb.GenerationParams:
    return pb.GenerationParams(
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StopConditions(**stopping),  # pyright: ignore[reportArgumentType]
    )


def test_equal_parameters_are_validated_once() -> None:
    first = params_from_proto(greedy(max_tokens=5), vocab_size=100)
    assert params_from_proto(greedy(max_tokens=5), vocab_size=100) is first
    assert params_from_proto(greedy(max_tokens=6), vocab_size=100).stopping.max_tokens == 6
    assert params_from_proto(params_to_proto(first), vocab_size=100) == first


def test_what_one_vocabulary_allows_another_may_not() -> None:
    assert params_from_proto(greedy(stop_token_ids=[99]), vocab_size=100)
    with pytest.raises(InvalidField):
        params_from_proto(greedy(stop_token_ids=[99]), vocab_size=99)


def test_what_is_refused_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(InvalidField):
            params_from_proto(greedy(max_tokens=0), vocab_size=100)


def test_large_parameters_are_not_kept() -> None:
    num_strings = PARAMS_REMEMBERED_BYTES_MAX // STOP_STRING_BYTES_MAX + 1
    large = greedy(stop=[str(i) * STOP_STRING_BYTES_MAX for i in range(num_strings)])
    first = params_from_proto(large, vocab_size=100)
    second = params_from_proto(large, vocab_size=100)
    assert first == second
    assert first is not second
