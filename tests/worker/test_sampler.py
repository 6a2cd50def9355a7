"""Claims of `worker.sampler`."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from worker.sampler import Sampler, SamplingError, splitmix64, token_logprobs, uniform

Logits = NDArray[np.float32]


def logits(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def sampler(
    *,
    sampling: SamplingParams | None = None,
    stopping: StopConditions | None = None,
    prompt: tuple[int, ...] = (),
    vocab_size: int = 4,
    eos: tuple[int, ...] = (),
    num_top_logprobs: int | None = None,
    draws_by_position: bool = True,
    repetition_counts_prompt: bool = True,
) -> Sampler:
    return Sampler(
        GenerationParams(
            sampling or SamplingParams(temperature=0.0),
            stopping or StopConditions(),
            num_top_logprobs=num_top_logprobs,
        ),
        prompt,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos),
        draws_by_position=draws_by_position,
        repetition_counts_prompt=repetition_counts_prompt,
    )


def drawn(sampling: SamplingParams, values: Logits, num: int = 400) -> list[int]:
    chooser = sampler(sampling=sampling, vocab_size=len(values))
    return [chooser.sample(values, index)[0] for index in range(num)]


# Random numbers.


def test_random_numbers_are_splitmix64() -> None:
    # Vectors of the generator's reference implementation for the seed 1234567.
    assert [splitmix64(1234567, index) for index in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_random_numbers_stay_below_one() -> None:
    assert uniform(0, 0) == 0.8833108082136426
    assert all(0.0 <= uniform(seed, 7) < 1.0 for seed in range(1000))
    assert uniform(2**64 - 1, 2**32) < 1.0


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    values = np.linspace(0, 1, 50, dtype=np.float32)
    one = drawn(SamplingParams(seed=5), values)
    chooser = sampler(sampling=SamplingParams(seed=5), vocab_size=50)
    assert [chooser.sample(values, i)[0] for i in reversed(range(400))] == one[::-1]
    assert drawn(SamplingParams(seed=6), values) != one


def test_a_position_counts_the_prompt_unless_the_engine_draws_in_sequence() -> None:
    values = np.zeros(1000, dtype=np.float32)
    chosen = {
        (len(prompt), by_position): sampler(
            sampling=SamplingParams(seed=5),
            prompt=prompt,
            vocab_size=1000,
            draws_by_position=by_position,
        ).sample(values, 10 - len(prompt))[0]
        for prompt in ((), (1, 2, 3))
        for by_position in (True, False)
    }
    assert chosen[0, True] == chosen[3, True]
    assert chosen[0, False] != chosen[3, False]


def test_draws_follow_the_probabilities() -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    counts = np.bincount(drawn(SamplingParams(seed=1), values, 4000)) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


# Choice.


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert sampler().sample(logits(1, 3, 3, 2), 0) == (1, None)


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    values = logits(0, 1, 0, 0)
    cold, hot = (drawn(SamplingParams(seed=1, temperature=t), values).count(1) for t in (0.1, 10.0))
    assert cold > 390
    assert hot < 150


def test_top_k_keeps_the_best_and_among_equals_the_lowest_ids() -> None:
    chosen = set(drawn(SamplingParams(seed=1, top_k=3), logits(1, 2, 1, 1, 1)))
    assert chosen == {0, 1, 2}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    values = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))
    assert set(drawn(SamplingParams(seed=1, top_p=0.5), values)) == {1}
    assert set(drawn(SamplingParams(seed=1, top_p=0.6), values)) == {1, 3}
    assert set(drawn(SamplingParams(seed=1, top_p=0.9), values)) == {1, 2, 3}


def test_min_p_is_a_share_of_the_most_probable() -> None:
    values = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))
    assert set(drawn(SamplingParams(seed=1, min_p=0.31), values)) == {1, 3}
    assert set(drawn(SamplingParams(seed=1, min_p=0.29), values)) == {1, 2, 3}


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    top_p=st.floats(0.01, 0.999),
    temperature=st.floats(0.05, 5.0),
)
def test_the_fast_nucleus_is_the_plain_one(seed: int, top_p: float, temperature: float) -> None:
    values = np.random.default_rng(seed).normal(0, 3, 500).astype(np.float32)
    weights = np.exp(values.astype(np.float64) / temperature)
    order = np.argsort(-weights, kind="stable")
    reached = weights[order].cumsum() / weights.sum()
    nucleus = set(map(int, order[: int(np.searchsorted(reached, top_p)) + 2]))  # One for rounding.
    sampling = SamplingParams(seed=seed, top_p=top_p, temperature=temperature)
    assert set(drawn(sampling, values, 20)) <= nucleus


# Penalties and bias.


def test_penalties_and_bias_are_as_the_contract_says() -> None:
    chooser = sampler(
        sampling=SamplingParams(
            temperature=0.0,
            repetition_penalty=2.0,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            logit_bias={1: 10.0, 3: -1.0},
        ),
        prompt=(3, 3),
        vocab_size=5,
    )
    assert chooser.replay((0, 1, 1))
    modified = chooser._modify(logits(4, -4, 6, 8, 1), 3)  # pyright: ignore[reportPrivateUsage]
    assert modified.tolist() == [4 / 2 - 0.75, -4 * 2 - 1.0 + 10, 6, 8 / 2 - 1, 1]


def test_a_repetition_penalty_may_ignore_the_prompt() -> None:
    chooser = sampler(
        sampling=SamplingParams(temperature=0.0, repetition_penalty=100.0),
        prompt=(1,),
        repetition_counts_prompt=False,
    )
    assert chooser.sample(logits(1, 2, 0, 0), 0)[0] == 1
    chooser.accept(1)
    assert chooser.sample(logits(1, 2, 0, 0), 1)[0] == 0


def test_counts_grow_with_the_output() -> None:
    chooser = sampler(
        sampling=SamplingParams(temperature=0.0, frequency_penalty=1.0), vocab_size=1000
    )
    values = np.zeros(1000, dtype=np.float32)
    for index in range(1000):
        token_id, _ = chooser.sample(values, index)
        assert token_id == index, "every token once before any twice"
        chooser.accept(token_id)


def test_nothing_ends_the_output_before_min_tokens() -> None:
    chooser = sampler(
        stopping=StopConditions(min_tokens=2, stop_token_ids=frozenset({1})), eos=(3,)
    )
    values = logits(0, 5, 1, 9)
    assert [chooser.sample(values, n)[0] for n in range(3)] == [2, 2, 3]


def test_logits_are_not_changed() -> None:
    values = logits(1, 2, 3, 4)
    sampler(
        sampling=SamplingParams(seed=1, logit_bias={1: 5.0}), stopping=StopConditions(min_tokens=3)
    ).sample(values, 0)
    assert values.tolist() == [1, 2, 3, 4]


def test_no_token_left_is_an_error() -> None:
    chooser = sampler(stopping=StopConditions(min_tokens=2), eos=(0, 1, 2, 3))
    with pytest.raises(SamplingError):
        chooser.sample(logits(1, 2, 3, 4), 0)


def test_a_broken_model_is_an_error() -> None:
    for sampling in (SamplingParams(seed=1), SamplingParams(temperature=0.0, logit_bias={1: 1.0})):
        with pytest.raises(SamplingError):
            sampler(sampling=sampling).sample(logits(1, math.nan, 3, 4), 0)


# Log probabilities.


def test_logprobs_are_those_of_the_model_whatever_is_asked() -> None:
    values = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32)) + 3
    chooser = sampler(
        sampling=SamplingParams(temperature=0.0, logit_bias={0: 100.0}), num_top_logprobs=2
    )
    token_id, logprobs = chooser.sample(values, 0)
    assert token_id == 0
    assert logprobs is not None
    assert logprobs.top_token_ids == (3, 2)
    shown = np.exp([logprobs.logprob, *logprobs.top_logprobs])
    assert np.abs(shown - [0.1, 0.4, 0.3]).max() < 1e-6


def test_equal_logprobs_are_listed_by_id() -> None:
    assert token_logprobs(logits(1, 2, 2, 2, 0), 4, 3).top_token_ids == (1, 2, 3)
    assert token_logprobs(logits(1, 2), 0, 20).top_token_ids == (1, 0)
    assert token_logprobs(logits(1, 2), 0, 0).top_token_ids == ()
