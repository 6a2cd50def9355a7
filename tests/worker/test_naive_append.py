"""What becomes of an output whose beginning was appended to the prompt (class A without rewriting).

The simulated engine can play one that knows nothing of continuation. Then it differs from the
uninterrupted output exactly where a real one was seen to (reference: vLLM on a CPU).
"""

import pytest
from google.protobuf import text_format

from tests.worker.engines import Engine, starting
from unbroken.errors import InvalidField
from unbroken.v1 import generation_pb2 as pb
from worker.simulated import simulated_runner

PROMPT = range(300, 330)
NUM = 40

GREEDY = "sampling { temperature: 0 }"
SEEDED = "sampling { temperature: 1 seed: 9 }"
PRESENCE = "sampling { temperature: 0 presence_penalty: 2 }"
FREQUENCY = "sampling { temperature: 0 frequency_penalty: 2 }"
REPETITION = "sampling { temperature: 0 repetition_penalty: 1.5 }"
BIAS = "sampling { temperature: 0 logit_bias { key: 400 value: 9 } }"
LOGPROBS = f"{GREEDY} logprobs {{ num_top: 2 }}"
REGEX = f'{GREEDY} constraint {{ regex: "[a-d]{{30}}x" }}'
MIN_TOKENS = f"{GREEDY} stopping {{ min_tokens: 20 }}"


def lesser(**personality: object) -> Engine:
    """An engine without native resume; otherwise as vLLM unless `personality` says so."""
    options = {"native_resume": False, "random_source": "sequential", **personality}
    return Engine(
        simulated_runner(context_length=128, kv_blocks=64, **options)  # pyright: ignore[reportArgumentType]
    )


def num_exact(feature: str, **personality: object) -> tuple[int, int]:
    """Of how many cuts the appended output equals the uninterrupted one."""
    params = text_format.Parse(feature, pb.GenerationParams())
    whole = lesser(**personality).generate(starting(PROMPT, params=params, max_tokens=NUM))
    num = len(whole.token_ids)
    cuts = range(1, num, 3)
    equal = 0
    for cut in cuts:
        rest = lesser(**personality).generate(
            starting(
                [*PROMPT, *whole.token_ids[:cut]],
                params=params,
                max_tokens=NUM - cut,
                first_offset=cut,
            )
        )
        assert rest.offsets == list(range(cut, cut + len(rest.token_ids)))
        equal += whole.token_ids == whole.token_ids[:cut] + rest.token_ids
    return equal, len(cuts)


@pytest.mark.parametrize("feature", [GREEDY, BIAS, LOGPROBS, REPETITION])
def test_appending_is_exact_for(feature: str) -> None:
    equal, cuts = num_exact(feature)
    assert equal == cuts


@pytest.mark.parametrize("feature", [SEEDED, REGEX])
def test_appending_is_never_exact_for(feature: str) -> None:
    assert num_exact(feature)[0] == 0


@pytest.mark.parametrize("feature", [PRESENCE, FREQUENCY])
def test_appending_is_seldom_exact_for(feature: str) -> None:
    equal, cuts = num_exact(feature)
    assert equal < cuts / 2


def test_appending_is_exact_for_seeds_where_random_numbers_go_by_position() -> None:
    equal, cuts = num_exact(SEEDED, random_source="positional")
    assert equal == cuts


def test_appending_breaks_a_repetition_penalty_that_ignores_the_prompt() -> None:
    equal, cuts = num_exact(REPETITION, repetition_penalty_counts_prompt=False)
    assert equal < cuts / 2


def test_min_tokens_count_from_the_cut() -> None:
    params = text_format.Parse(MIN_TOKENS, pb.GenerationParams())
    whole = Engine(simulated_runner()).generate(starting(PROMPT, params=params, max_tokens=NUM))
    params.stopping.stop_token_ids.append(whole.token_ids[30])
    whole = lesser().generate(starting(PROMPT, params=params, max_tokens=NUM))
    assert len(whole.token_ids) == 31
    rest = lesser().generate(
        starting([*PROMPT, *whole.token_ids[:15]], params=params, max_tokens=25, first_offset=15)
    )
    assert whole.token_ids[:15] + rest.token_ids != whole.token_ids


def test_an_engine_without_native_resume_refuses_past_output() -> None:
    with pytest.raises(InvalidField, match="output_token_ids: expected none"):
        lesser().start(starting(PROMPT, [1]))


def test_regenerating_from_the_prompt_is_exact_whatever_the_random_source() -> None:
    for feature in (SEEDED, PRESENCE, REGEX):
        params = text_format.Parse(feature, pb.GenerationParams())
        runs = [
            lesser().generate(starting(PROMPT, params=params, max_tokens=NUM)) for _ in range(2)
        ]
        assert runs[0].token_ids == runs[1].token_ids
