"""Streams for decision tests, at the moment a test is about."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from frontend.continuation import Abilities
from frontend.stream import Life, Limits, Start, Stream
from tests.support.vocabulary import token, tokenizer
from unbroken.checkpoint import Checkpoint
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import ContinuationPolicy

W1, W2, W3 = Life("w1", 1), Life("w2", 1), Life("w3", 1)
APPENDING = Abilities("n", has_positional_random=True)
REGENERATING = Abilities("n")
NATIVE = Abilities("n", has_native_resume=True)
PROMPT = (1, 2, 3)
A, B, C = token("a"), token("b"), token("c")
_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)
_STOPPING = frozenset(StopConditions.__dataclass_fields__)


def params(**settings: Any) -> GenerationParams:
    """Parameters by name, whatever part they belong to; greedy, and resolved as by admission."""
    settings = {"temperature": 0.0, "max_tokens": 20, **settings}
    if settings["temperature"] and "seed" not in settings:
        settings["seed"] = 7
    if "logit_bias" in settings:
        settings["logit_bias"] = MappingProxyType(dict(settings["logit_bias"]))
    sampling = {name: settings.pop(name) for name in _SAMPLING & settings.keys()}
    stopping = {name: settings.pop(name) for name in _STOPPING & settings.keys()}
    return GenerationParams(SamplingParams(**sampling), StopConditions(**stopping), **settings)


def checkpoint(**settings: Any) -> Checkpoint:
    """A request with these parameters."""
    return Checkpoint(PROMPT, params(**settings))


def admitted(
    *,
    policy: ContinuationPolicy = ContinuationPolicy.PREFER_EXACT,
    limits: Limits | None = None,
    **settings: Any,
) -> Stream:
    """A stream that looks for its first worker, since time 0."""
    stream = Stream(checkpoint(**settings), tokenizer(), policy=policy, limits=limits)
    stream.start(0.0)
    return stream


def streaming(
    token_ids: Sequence[int] = (),
    *,
    life: Life = W1,
    abilities: Abilities = NATIVE,
    **settings: Any,
) -> Stream:
    """A stream in its first epoch, which has delivered `token_ids` at time 1."""
    stream = admitted(**settings)
    stream.placed(1, life, abilities)
    if token_ids:
        assert not stream.tokens(1, 0, token_ids, 1.0), "the output is not complete yet"
    return stream


def place(stream: Stream, life: Life, abilities: Abilities = NATIVE) -> Start:
    """Place the stream; returns what the worker is asked."""
    start = stream.placed(stream.epoch, life, abilities)[0]
    assert isinstance(start, Start)
    return start
