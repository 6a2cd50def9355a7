"""Which way to go on is exact, and what the next worker is asked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.continuation import (
    LOGIT_BIAS_LIMIT,
    Abilities,
    Verdict,
    exact_way,
    next_checkpoint,
    way_to_resume,
)
from frontend.stream import announced_way
from tests.simulation.model import Generation, Personality, undisturbed
from tests.support.streams import APPENDING, NATIVE, PROMPT, REGENERATING, A, B, checkpoint, params
from tests.support.vocabulary import PIECES, token
from unbroken.checkpoint import Checkpoint
from unbroken.generation import LOGIT_BIAS_MAX, Constraint, GenerationParams
from unbroken.outcome import ContinuationClass

APPEND = ContinuationClass.APPEND
REGENERATE = ContinuationClass.REGENERATE
INEXACT = ContinuationClass.INEXACT
NONE = ContinuationClass.NONE
JSON = Constraint("json_object")


def way(
    original: Checkpoint,
    delivered: Sequence[int],
    abilities: Abilities,
    *,
    delivered_bytes: bytes = b"",
    began_with: Abilities | None = None,
    is_exact: bool = True,
    is_inexact_allowed: bool = False,
    regenerate_tokens_max: int = 100,
) -> ContinuationClass:
    """How a stream goes on that was begun by the same kind of engine."""
    return way_to_resume(
        original,
        delivered,
        delivered_bytes,
        abilities,
        began_with=began_with or abilities,
        is_exact=is_exact,
        is_inexact_allowed=is_inexact_allowed,
        regenerate_tokens_max=regenerate_tokens_max,
    ).way


def appended(
    delivered: Sequence[int], *, spelled: bytes = b"", **settings: Any
) -> GenerationParams:
    """The parameters with which class A goes on."""
    original = checkpoint(**settings)
    result = next_checkpoint(original, delivered, spelled, APPEND, APPENDING)
    assert result.prompt_token_ids == (*PROMPT, *delivered)
    assert result.output_token_ids == ()
    assert result.first_offset == len(delivered)
    return result.params


# Which way.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logit_bias": {A: 5.0}},
        {"stop_token_ids": frozenset({A}), "stop": ("x",), "min_tokens": 3},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"num_top_logprobs": 5},
        {"constraint": Constraint("choice", options=("a", "b"))},
    ],
)
def test_what_can_be_rewritten_is_appended(settings: dict[str, Any]) -> None:
    assert exact_way(params(**settings), REGENERATING) == Verdict(APPEND)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 1.0, "repetition_penalty": 2.0},
        {"constraint": JSON},
        {"constraint": Constraint("json_schema", "{}")},
        {"constraint": Constraint("regex", "a*")},
        {"constraint": Constraint("lark", "start: /a/")},
    ],
)
def test_what_depends_on_history_is_generated_again(settings: dict[str, Any]) -> None:
    verdict = exact_way(params(**settings), REGENERATING)
    assert verdict.way is REGENERATE
    assert verdict.detail


@pytest.mark.parametrize(
    ("settings", "lack"),
    [
        ({"frequency_penalty": 1.0}, {"has_logit_bias": False}),
        ({"repetition_penalty": 2.0}, {"repetition_penalty_counts_prompt": False}),
    ],
)
def test_what_an_engine_lacks_is_not_rewritten(
    settings: dict[str, Any], lack: dict[str, Any]
) -> None:
    assert exact_way(params(**settings), REGENERATING).way is APPEND
    assert exact_way(params(**settings), replace(REGENERATING, **lack)).way is REGENERATE
    assert exact_way(params(), replace(REGENERATING, **lack)).way is APPEND


def test_positional_random_numbers_go_on_by_themselves() -> None:
    assert exact_way(params(temperature=1.0), APPENDING).way is APPEND


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "constraint": JSON}])
def test_native_resume_is_taken_for_everything(settings: dict[str, Any]) -> None:
    assert exact_way(params(**settings), NATIVE) == Verdict(ContinuationClass.NATIVE)


@pytest.mark.parametrize("abilities", [NATIVE, APPENDING, REGENERATING])
def test_sampling_without_a_seed_has_no_exact_way(abilities: Abilities) -> None:
    seedless = replace(abilities, has_seeds=False)
    assert exact_way(params(temperature=1.0), seedless).way is NONE
    assert exact_way(params(), seedless).way is not NONE


@pytest.mark.parametrize("abilities", [NATIVE, APPENDING, REGENERATING])
def test_logits_that_depend_on_the_batch_have_no_exact_way(abilities: Abilities) -> None:
    verdict = exact_way(params(), replace(abilities, is_invariant=False))
    assert verdict.way is NONE
    assert verdict.detail


def test_the_class_announced_is_the_best_that_any_worker_gives() -> None:
    original = checkpoint(temperature=1.0)
    assert announced_way(original, [REGENERATING, NATIVE])[0] is ContinuationClass.NATIVE
    assert announced_way(original, [REGENERATING, APPENDING])[0] is APPEND
    announced, detail = announced_way(original, [replace(REGENERATING, is_invariant=False)])
    assert announced is NONE
    assert detail


# Which way now.


def test_while_nothing_was_delivered_beginning_again_is_exact_anywhere() -> None:
    hopeless = Abilities("other", is_invariant=False, has_seeds=False)
    assert way(checkpoint(temperature=1.0), [], hopeless, began_with=NATIVE) is REGENERATE


@pytest.mark.parametrize(
    "other",
    [
        replace(NATIVE, numerics_id="other"),
        replace(NATIVE, has_positional_random=True),
        replace(NATIVE, repetition_penalty_counts_prompt=False),
        replace(NATIVE, has_logit_bias=False),
    ],
)
def test_an_engine_that_computes_or_samples_otherwise_does_not_go_on(other: Abilities) -> None:
    assert way(checkpoint(), [A], other, began_with=NATIVE) is NONE
    assert way(checkpoint(), [A], other, began_with=NATIVE, is_inexact_allowed=True) is INEXACT


def test_generating_again_has_a_budget() -> None:
    original = checkpoint(temperature=1.0)
    assert way(original, [A] * 5, REGENERATING, regenerate_tokens_max=5) is REGENERATE
    assert way(original, [A] * 6, REGENERATING, regenerate_tokens_max=5) is NONE


def test_what_was_delivered_inexactly_cannot_be_generated_again() -> None:
    original = checkpoint(temperature=1.0)
    assert way(original, [A], REGENERATING, is_exact=False) is NONE
    assert way(original, [A], REGENERATING, is_exact=False, is_inexact_allowed=True) is INEXACT
    assert way(original, [A], APPENDING, is_exact=False) is APPEND


def test_an_inexact_way_is_never_taken_for_a_grammar_that_would_begin_again() -> None:
    original = checkpoint(constraint=JSON)
    other = replace(REGENERATING, numerics_id="other")
    assert way(original, [A], other, began_with=REGENERATING, is_inexact_allowed=True) is NONE
    native = replace(other, has_native_resume=True)
    assert way(original, [A], native, began_with=REGENERATING, is_inexact_allowed=True) is INEXACT


@pytest.mark.parametrize(("count", "expected"), [(50, APPEND), (51, REGENERATE)])
def test_a_penalty_beyond_what_a_bias_can_be_is_not_rewritten(
    count: int, expected: ContinuationClass
) -> None:
    original = checkpoint(frequency_penalty=2.0, max_tokens=100)
    assert way(original, [A] * count, REGENERATING) is expected


def test_a_bias_of_the_request_counts_towards_the_limit() -> None:
    original = checkpoint(frequency_penalty=2.0, logit_bias={A: -99.0})
    assert way(original, [A], REGENERATING) is REGENERATE
    assert way(original, [B], REGENERATING) is APPEND


def test_penalties_of_more_tokens_than_biases_may_be_are_not_rewritten() -> None:
    original = checkpoint(frequency_penalty=1.0, max_tokens=5000)
    delivered = range(LOGIT_BIAS_MAX)
    assert way(original, delivered, REGENERATING, regenerate_tokens_max=5000) is APPEND
    delivered = range(LOGIT_BIAS_MAX + 1)
    assert way(original, delivered, REGENERATING, regenerate_tokens_max=5000) is REGENERATE


@pytest.mark.parametrize(
    ("delivered_bytes", "expected"),
    [
        (b"y", APPEND),
        (b"yes", REGENERATE),  # It could end here, or go on.
        (b"\xc3", REGENERATE),  # Inside a character.
        (b"x", REGENERATE),  # No option begins so.
    ],
)
def test_options_go_on_only_where_a_rest_can_be_written(
    delivered_bytes: bytes, expected: ContinuationClass
) -> None:
    original = checkpoint(constraint=Constraint("choice", options=("yes", "yes no", "é2")))
    assert way(original, [A], REGENERATING, delivered_bytes=delivered_bytes) is expected


# What the next worker is asked.


def test_native_resume_hands_over_what_was_delivered_and_changes_nothing() -> None:
    original = checkpoint(temperature=1.0, presence_penalty=1.0, constraint=JSON)
    asked = next_checkpoint(original, [A, B], b"", ContinuationClass.NATIVE, NATIVE)
    assert asked == replace(original, output_token_ids=(A, B), first_offset=2)


def test_generating_again_asks_the_original_request() -> None:
    original = checkpoint(temperature=1.0)
    assert next_checkpoint(original, [A, B], b"", REGENERATE, REGENERATING) == original


def test_budgets_lose_what_was_delivered() -> None:
    stopping = appended([A, B], max_tokens=10, min_tokens=5).stopping
    assert (stopping.max_tokens, stopping.min_tokens) == (8, 3)
    assert appended([A, B], max_tokens=10, min_tokens=1).stopping.min_tokens == 0


def test_a_frequency_penalty_becomes_a_bias() -> None:
    sampling = appended([A, B, A], frequency_penalty=0.5, logit_bias={A: 3.0}).sampling
    assert dict(sampling.logit_bias) == {A: 2.0, B: -0.5}
    assert sampling.frequency_penalty == 0.5, "what comes is penalised as before"


def test_other_parameters_stay_as_they_are() -> None:
    settings: dict[str, Any] = {
        "temperature": 0.7,
        "seed": 3,
        "top_p": 0.9,
        "repetition_penalty": 2.0,
        "stop": ("x",),
        "stop_token_ids": frozenset({A}),
        "num_top_logprobs": 2,
    }
    before, after = params(**settings), appended([A], **settings)
    assert after.sampling == before.sampling
    assert after.num_top_logprobs == 2
    assert (after.stopping.stop, after.stopping.stop_token_ids) == (("x",), frozenset({A}))


def test_options_lose_what_was_delivered() -> None:
    constraint = Constraint("choice", options=("yes", "yeah", "no"))
    after = appended([token("y"), token("e")], spelled=b"ye", constraint=constraint)
    assert after.constraint == Constraint("choice", options=("s", "ah"))


def test_an_inexact_way_asks_only_what_engines_accept() -> None:
    original = checkpoint(
        frequency_penalty=2.0,
        max_tokens=9000,
        constraint=Constraint("choice", options=("no",)),
    )
    delivered = [A] * 80 + list(range(100, 100 + LOGIT_BIAS_MAX))
    asked = next_checkpoint(original, delivered, b"yes", INEXACT, REGENERATING).params
    assert len(asked.sampling.logit_bias) == LOGIT_BIAS_MAX
    assert asked.sampling.logit_bias[A] == -LOGIT_BIAS_LIMIT
    assert asked.constraint is None


def test_an_inexact_way_uses_native_resume_where_there_is_one() -> None:
    original = checkpoint(constraint=JSON)
    asked = next_checkpoint(original, [A], b"", INEXACT, NATIVE)
    assert asked == replace(original, output_token_ids=(A,), first_offset=1)


@pytest.mark.parametrize("way_", [NONE, ContinuationClass.UNSPECIFIED])
def test_there_is_no_checkpoint_without_a_way(way_: ContinuationClass) -> None:
    with pytest.raises(AssertionError):
        next_checkpoint(checkpoint(), [A], b"", way_, NATIVE)


# All rules at once, on an engine.


@given(
    personality=st.builds(
        Personality,
        has_native_resume=st.booleans(),
        has_positional_random=st.booleans(),
        repetition_penalty_counts_prompt=st.booleans(),
        has_logit_bias=st.booleans(),
        adds_bias_first=st.booleans(),
    ),
    temperature=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    min_tokens=st.integers(0, 12),
    stop_token_ids=st.frozensets(st.integers(0, len(PIECES) - 1), max_size=2),
    constraint=st.sampled_from(
        [
            None,
            Constraint("regex", "9:3"),
            Constraint("choice", options=("yes", "yes no", "éé12", "ab ab")),
        ]
    ),
    prompt=st.tuples(st.integers(0, len(PIECES) - 1)),
    cut=st.integers(1, 12),
)
def test_whatever_way_is_exact_gives_what_an_undisturbed_run_gives(
    personality: Personality,
    prompt: tuple[int, ...],
    cut: int,
    **settings: Any,
) -> None:
    original = Checkpoint(prompt, params(max_tokens=12, **settings))
    truth = undisturbed(original, personality)
    delivered = truth.token_ids[:cut]
    if len(delivered) == len(truth.token_ids):
        return
    spelled = b"".join(PIECES[token_id] for token_id in delivered)
    abilities = personality.abilities
    found = way(original, delivered, abilities, delivered_bytes=spelled)
    assert found is not NONE
    asked = next_checkpoint(original, delivered, spelled, found, abilities)
    generation = Generation(asked, personality)
    output = list(truth.token_ids[: asked.first_offset])
    while generation.end is None:
        output.append(generation.next()[0])
    assert tuple(output) == truth.token_ids
