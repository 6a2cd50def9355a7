"""An output that goes on elsewhere equals one that was never interrupted (class C).

Every feature is cut at many points; the rest is computed by an engine that never saw the beginning.
"""

import json

import pytest
from google.protobuf import text_format

from tests.worker.engines import LENGTH, STOP, Attempt, Engine, starting
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import generation_pb2 as pb
from worker import simulated_tokenizer
from worker.simulated import simulated_runner

TOKENIZER = Tokenizer(simulated_tokenizer.asset())
PROMPT = TOKENIZER.encode(" bato remu kilo", add_special=False)

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{3,9}$"},
            "sizes": {"type": "array", "items": {"enum": [1, 22, 333]}, "maxItems": 4},
        },
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
)

SAMPLED = "sampling { temperature: 0.8 seed: 1234567 }"
GREEDY = "sampling { temperature: 0 }"
FEATURES = {
    "greedy": GREEDY,
    "greedy with end": f"{GREEDY} stopping {{ min_tokens: 3 }}",
    "ignored end": f"{GREEDY} stopping {{ ignore_eos: true }}",
    "seeded": SAMPLED,
    "seeded, large seed": "sampling { temperature: 1.5 seed: 18446744073709551615 }",
    "filters": "sampling { temperature: 1.2 seed: 3 top_k: 200 top_p: 0.9 min_p: 0.01 }",
    "presence": "sampling { temperature: 0.8 seed: 1234567 presence_penalty: 1.7 }",
    "frequency": "sampling { temperature: 0.8 seed: 1234567 frequency_penalty: 1.9 }",
    "repetition": "sampling { temperature: 0.8 seed: 1234567 repetition_penalty: 1.3 }",
    "greedy presence": (
        "sampling { temperature: 0 presence_penalty: 2 frequency_penalty: 2"
        " logit_bias { key: 300 value: 7.5 } logit_bias { key: 301 value: 7.25 } }"
    ),
    "logit bias": "sampling { temperature: 1 seed: 5 logit_bias { key: 300 value: 9 } }",
    "min_tokens": f"{SAMPLED} stopping {{ min_tokens: 30 }}",
    "stop tokens": "sampling { temperature: 0.1 seed: 8 top_k: 3 }",
    "json_schema": f"sampling {{ seed: 4 }} constraint {{ json_schema: {json.dumps(SCHEMA)} }}",
    "json_object": f"{SAMPLED} constraint {{ json_object: true }}",
    "greedy json": f"{GREEDY} constraint {{ json_schema: {json.dumps(SCHEMA)} }}",
    "regex": f'{SAMPLED} constraint {{ regex: "([a-f]{{2,6}}-){{2}}[0-9]{{1,4}}" }}',
    "lark": f'{SAMPLED} constraint {{ lark: "start: /[a-z]{{5,12}}/ \\"!\\" /[a-z]{{1,9}}/" }}',
    "choice": (
        f'{SAMPLED} constraint {{ choice {{ options: "a rather long first option"'
        ' options: "a rather long second one" options: "no" } }'
    ),
    "constraint with penalties": (
        "sampling { temperature: 0.9 seed: 2 frequency_penalty: 1 repetition_penalty: 1.1 }"
        ' constraint { regex: "[a-d ]{20,40}" }'
    ),
    "logprobs": f"{SAMPLED} logprobs {{ num_top: 3 }}",
    "greedy logprobs": f"{GREEDY} logprobs {{ }}",
}
MAX_TOKENS = 48


def parsed(feature: str) -> pb.GenerationParams:
    return text_format.Parse(FEATURES[feature], pb.GenerationParams())


def engine(feature: str) -> Engine:
    has_ends = feature in ("greedy with end", "ignored end", "min_tokens", "seeded, large seed")
    return Engine(
        simulated_runner(
            block_size=4,
            context_length=256,
            kv_blocks=64,
            prefill_tokens_max=8,
            eos_probability=0.08 if has_ends else 0.0,
        )
    )


def params(feature: str) -> pb.GenerationParams:
    message = parsed(feature)
    if feature == "stop tokens":
        # Tokens that this output comes to in its second half.
        late = engine(feature).generate(starting(PROMPT, params=message, max_tokens=MAX_TOKENS))
        message.stopping.stop_token_ids.append(late.token_ids[30])
    message.stopping.max_tokens = MAX_TOKENS
    return message


def as_uninterrupted(whole: Attempt, feature: str, cut: int) -> None:
    """What follows the cut elsewhere is what followed it in `whole`."""
    given = whole.token_ids[:cut]
    rest = engine(feature).generate(starting(PROMPT, given, params=params(feature)))
    assert whole.ended is not None
    assert rest.ended is not None
    assert given + rest.token_ids == whole.token_ids
    assert rest.offsets == list(range(cut, len(whole.token_ids)))
    assert rest.logprobs == whole.logprobs[cut:]
    assert rest.finish_reason == whole.finish_reason
    assert rest.ended.end_offset == whole.ended.end_offset
    assert rest.ended.HasField("stop_token_id") == whole.ended.HasField("stop_token_id")
    assert rest.ended.stop_token_id == whole.ended.stop_token_id


@pytest.mark.parametrize("feature", FEATURES)
def test_a_resumed_output_equals_an_uninterrupted_one(feature: str) -> None:
    whole = engine(feature).generate(starting(PROMPT, params=params(feature)))
    num = len(whole.token_ids)
    assert num > 1
    # Every cut up to 12 and then every fifth; the last is after the last token.
    for cut in sorted({*range(min(num, 12)), *range(0, num, 5), num - 1, num}):
        as_uninterrupted(whole, feature, cut)


@pytest.mark.parametrize("feature", ["seeded", "frequency", "json_schema", "regex"])
def test_an_output_resumed_again_and_again_equals_an_uninterrupted_one(feature: str) -> None:
    whole = engine(feature).generate(starting(PROMPT, params=params(feature)))
    output: list[int] = []
    while len(output) < len(whole.token_ids):
        slot_engine = engine(feature)
        slot = slot_engine.start(starting(PROMPT, output, params=params(feature)))
        while not slot_engine.attempts[slot].token_ids:
            slot_engine.step()
        for _ in range(2):
            slot_engine.step()
        output += slot_engine.attempts[slot].token_ids
    assert output == whole.token_ids


@pytest.mark.parametrize("feature", ["greedy", "seeded", "frequency", "regex", "logprobs"])
def test_a_resume_finds_what_the_first_attempt_left_in_the_cache(feature: str) -> None:
    same = engine(feature)
    whole = same.generate(starting(PROMPT, params=params(feature)))
    rest = same.generate(starting(PROMPT, whole.token_ids[:11], params=params(feature)))
    assert whole.token_ids[11:] == rest.token_ids
    assert rest.ended is not None
    assert rest.ended.cached_tokens == (len(PROMPT) + 11 - 1) // 4 * 4
    assert rest.ended.prefill_tokens == len(PROMPT) + 11 - rest.ended.cached_tokens


@pytest.mark.parametrize("feature", FEATURES)
def test_a_preempted_output_equals_an_undisturbed_one(feature: str) -> None:
    whole = engine(feature).generate(starting(PROMPT, params=params(feature)))
    crowded = engine(feature)
    low = crowded.start(starting(PROMPT, params=params(feature)))
    while crowded.attempts[low].ended is None:
        known = len(crowded.attempts[low].token_ids)
        while crowded.attempts[low].ended is None and (
            len(crowded.attempts[low].token_ids) < known + 7
        ):
            crowded.step()
        # One that needs nearly all memory and goes first.
        crowded.generate_meanwhile(starting([7] * 240, max_tokens=2, priority=1))
    assert crowded.attempts[low].token_ids == whole.token_ids
    assert crowded.attempts[low].logprobs == whole.logprobs
    if len(whole.token_ids) > 8:
        assert crowded.scheduler.load().ranks[0].preemptions_total > 0


def test_the_features_reach_their_ends() -> None:
    """Else the matrix above would not cut across them."""
    ends: dict[str, int] = {}
    for feature in FEATURES:
        ends[feature] = (
            engine(feature).generate(starting(PROMPT, params=params(feature))).finish_reason
        )
    stopped = {feature for feature, reason in ends.items() if reason == STOP}
    assert {"greedy with end", "stop tokens", "json_schema", "regex", "lark", "choice"} <= stopped
    assert ends["greedy"] == ends["ignored end"] == LENGTH


def test_the_features_make_a_difference() -> None:
    """Else the matrix above would prove nothing for them."""

    def output(feature: str) -> list[int]:
        return engine(feature).generate(starting(PROMPT, params=params(feature))).token_ids

    sampled = ["seeded", "presence", "frequency", "repetition", "filters", "logit bias"]
    assert len({tuple(output(feature)) for feature in sampled}) == len(sampled)
    assert output("greedy") != output("greedy presence")
    assert output("greedy") != output("greedy with end") != output("ignored end")


def test_a_complete_output_ends_at_once() -> None:
    for feature in ("greedy", "stop tokens", "choice"):
        whole = engine(feature).generate(starting(PROMPT, params=params(feature)))
        again = engine(feature)
        slot = again.start(starting(PROMPT, whole.token_ids, params=params(feature)))
        assert again.plan() is None
        again.collect()
        ended = again.attempts[slot].ended
        assert ended is not None
        assert ended.finish_reason == whole.finish_reason
        assert ended.end_offset == len(whole.token_ids)
        assert (ended.prefill_tokens, ended.cached_tokens) == (0, 0)
