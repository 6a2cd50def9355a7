"""Nonsense that every engine of ours refuses alike: a field, what was expected, what was seen."""

from collections.abc import Callable
from typing import TypeAlias

import pytest

from tests.worker.engines import Engine, starting
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.v1.attempt_pb2 import StartAttempt
from worker.simulated import simulated_runner

VOCAB = 4096
Spoil: TypeAlias = Callable[[StartAttempt], object]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(simulated_runner(context_length=64, kv_blocks=8))


def sampling(**fields: float) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        for name, value in fields.items():
            setattr(start.checkpoint.params.sampling, name, value)

    return spoil


def stopping(**fields: int) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        for name, value in fields.items():
            setattr(start.checkpoint.params.stopping, name, value)

    return spoil


def constraint(**fields: object) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        for name, value in fields.items():
            setattr(start.checkpoint.params.constraint, name, value)

    return spoil


def prompt(*token_ids: int) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        del start.checkpoint.prompt_token_ids[:]
        start.checkpoint.prompt_token_ids.extend(token_ids)

    return spoil


def output(*token_ids: int, first_offset: int | None = None) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        start.checkpoint.output_token_ids.extend(token_ids)
        start.checkpoint.first_offset = len(token_ids) if first_offset is None else first_offset

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(start: StartAttempt) -> None:
        for each in spoils:
            each(start)

    return spoil


NONSENSE: dict[str, tuple[Spoil, str]] = {
    "no prompt": (prompt(), "checkpoint.prompt_token_ids"),
    "prompt id out of range": (prompt(1, VOCAB), "checkpoint.prompt_token_ids[1]"),
    "huge prompt id": (prompt(2**32 - 1), "checkpoint.prompt_token_ids[0]"),
    "prompt fills the context": (prompt(*range(64)), "checkpoint.prompt_token_ids"),
    "prompt exceeds the context": (prompt(*range(100)), "checkpoint.prompt_token_ids"),
    "output id out of range": (output(5, 6, VOCAB), "checkpoint.output_token_ids[2]"),
    "output exceeds the context": (output(*range(62)), "checkpoint.output_token_ids"),
    "output exceeds max_tokens": (
        both(output(1, 2, 3), stopping(max_tokens=2)),
        "checkpoint.output_token_ids",
    ),
    "offset within the output": (output(1, 2, first_offset=1), "checkpoint.first_offset"),
    "max_tokens 0": (stopping(max_tokens=0), "params.stopping.max_tokens"),
    "min above max": (stopping(max_tokens=2, min_tokens=3), "params.stopping.min_tokens"),
    "temperature below 0": (sampling(temperature=-0.1), "params.sampling.temperature"),
    "temperature not a number": (
        sampling(temperature=float("nan")),
        "params.sampling.temperature",
    ),
    "temperature infinite": (sampling(temperature=float("inf")), "params.sampling.temperature"),
    "sampled without a seed": (sampling(temperature=1.0), "params.sampling.seed"),
    "top_p 0": (sampling(top_p=0.0), "params.sampling.top_p"),
    "top_p above 1": (sampling(top_p=1.01), "params.sampling.top_p"),
    "min_p above 1": (sampling(min_p=1.5), "params.sampling.min_p"),
    "presence penalty": (sampling(presence_penalty=2.1), "params.sampling.presence_penalty"),
    "frequency penalty": (sampling(frequency_penalty=-2.1), "params.sampling.frequency_penalty"),
    "repetition penalty 0": (
        sampling(repetition_penalty=0.0),
        "params.sampling.repetition_penalty",
    ),
    "bias of an unknown token": (
        lambda s: s.checkpoint.params.sampling.logit_bias.update({VOCAB: 1.0}),
        "params.sampling.logit_bias",
    ),
    "bias too high": (
        lambda s: s.checkpoint.params.sampling.logit_bias.update({1: 100.5}),
        "params.sampling.logit_bias[1]",
    ),
    "too many biases": (
        lambda s: s.checkpoint.params.sampling.logit_bias.update(dict.fromkeys(range(1025), 1.0)),
        "params.sampling.logit_bias",
    ),
    "stop token out of range": (
        lambda s: s.checkpoint.params.stopping.stop_token_ids.append(VOCAB),
        "params.stopping.stop_token_ids[0]",
    ),
    "too many stop tokens": (
        lambda s: s.checkpoint.params.stopping.stop_token_ids.extend(range(65)),
        "params.stopping.stop_token_ids",
    ),
    "empty stop string": (
        lambda s: s.checkpoint.params.stopping.stop.append(""),
        "params.stopping.stop[0]",
    ),
    "too many logprobs": (
        lambda s: setattr(s.checkpoint.params.logprobs, "num_top", 21),
        "params.logprobs.num_top",
    ),
    "schema that is no JSON": (constraint(json_schema="{"), "params.constraint.json_schema"),
    "schema of an unknown type": (
        constraint(json_schema='{"type": "what"}'),
        "params.constraint.json_schema",
    ),
    "json_object false": (constraint(json_object=False), "params.constraint.json_object"),
    "broken regex": (constraint(regex="(a"), "params.constraint.regex"),
    "regex with look-ahead": (constraint(regex="(?=a)b"), "params.constraint.regex"),
    "empty regex": (constraint(regex=""), "params.constraint.regex"),
    "broken grammar": (constraint(lark="start: x"), "params.constraint.lark"),
    "constraint too long": (constraint(regex="a" * 70_000), "params.constraint"),
    "empty option": (
        lambda s: s.checkpoint.params.constraint.choice.options.extend(["a", ""]),
        "params.constraint.choice.options",
    ),
    "no options": (
        lambda s: s.checkpoint.params.constraint.choice.SetInParent(),
        "params.constraint.choice.options",
    ),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_and_the_field_is_named(engine: Engine, kind: str) -> None:
    spoil, field = NONSENSE[kind]
    message = starting(max_tokens=5)
    spoil(message)
    with pytest.raises(InvalidField) as caught:
        engine.start(message)
    assert caught.value.field == field
    assert caught.value.detail.startswith(f"{field}: expected ")
    assert len(caught.value.detail) < 600


@pytest.mark.parametrize(
    "spoil", [constraint(regex="a{5}"), constraint(json_object=True)], ids=["regex", "json"]
)
def test_an_output_that_the_constraint_forbids_is_refused(engine: Engine, spoil: Spoil) -> None:
    message = starting(output=(ord("a"), ord("b")), max_tokens=9)
    spoil(message)
    with pytest.raises(UnbrokenError, match="an output that the constraint allows") as caught:
        engine.start(message)
    assert caught.value.reason is Reason.NOT_CONTINUABLE


def test_what_fits_is_taken(engine: Engine) -> None:
    assert len(engine.generate(starting(range(63))).token_ids) == 1
    assert len(engine.generate(starting(range(60), max_tokens=100)).token_ids) == 4
    assert engine.generate(starting(range(60), range(4))).token_ids == []


def test_nothing_refused_leaves_anything_behind(engine: Engine) -> None:
    assert engine.scheduler.is_empty
    engine.scheduler.check()
