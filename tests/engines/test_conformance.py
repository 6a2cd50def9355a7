"""What every engine has to do, whatever it speaks: nothing here knows which one it is."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.subjects import SUBJECTS, Subject, Talk, play, talk
from tests.sidecar.fakes import Frontend
from unbroken.generation import Constraint, GenerationParams, SamplingParams, StopConditions
from unbroken.v1 import generation_pb2, worker_pb2

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH
CANCELLED = generation_pb2.FINISH_REASON_CANCELLED

Play = Callable[..., None]


def greedy(max_tokens: int = 12, **stopping: object) -> GenerationParams:
    return GenerationParams(
        SamplingParams(temperature=0.0),
        StopConditions(max_tokens=max_tokens, ignore_eos=True, **stopping),  # pyright: ignore[reportArgumentType]
    )


def sampled(max_tokens: int = 12, **sampling: object) -> GenerationParams:
    return GenerationParams(
        SamplingParams(temperature=0.8, seed=77, **sampling),  # pyright: ignore[reportArgumentType]
        StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


async def assert_as_expected(it: Talk, params: GenerationParams, *, window_tokens: int = 0) -> int:
    slot = it.start(params, window_tokens=window_tokens)
    expected = await it.alone(params)
    ended = await it.ended(slot)
    assert it.tokens[slot] == expected.token_ids
    assert ended.finish_reason == expected.finish_reason
    return slot


async def assert_refused(it: Talk, params: GenerationParams) -> None:
    refused = await it.refused(it.start(params))
    assert refused.kind == worker_pb2.FAILURE_KIND_REJECTED
    assert refused.detail


FEATURES = {
    "greedy": greedy(),
    "seeded": sampled(),
    "top_k, top_p and min_p": sampled(top_k=20, top_p=0.9, min_p=0.01),
    "presence penalty": sampled(presence_penalty=1.5),
    "frequency penalty": sampled(frequency_penalty=1.5),
    "repetition penalty": sampled(repetition_penalty=1.4),
    "logit bias": replace(
        greedy(), sampling=SamplingParams(temperature=0.0, logit_bias={300: 50.0})
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_asked_is_what_the_engine_computes(
    subject: Subject, feature: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            params = FEATURES[feature]
            assert it.hub.up is not None
            can_bias = it.hub.up.description.capabilities.logit_bias
            if it.lacks(feature) or (params.sampling.logit_bias and not can_bias):
                await assert_refused(it, params)
            else:
                await assert_as_expected(it, params)

    play(scenario())


def test_each_token_comes_once_and_the_last_one_is_not_doubled(
    subject: Subject, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            for num in (1, 2, 17):
                slot = it.start(greedy(num))
                ended = await it.ended(slot)
                assert ended.finish_reason == LENGTH
                assert len(it.tokens[slot]) == ended.end_offset == num

    play(scenario())


def test_offsets_go_on_where_the_stream_stands(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            slot = it.start(greedy(4), first_offset=30)
            assert (await it.ended(slot)).end_offset == 34

    play(scenario())


def test_a_stop_token_is_the_last_one_and_is_named(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            tokens = (await it.alone(greedy())).token_ids
            slot = it.start(greedy(stop_token_ids=frozenset({tokens[5]})))
            ended = await it.ended(slot)
            assert (ended.finish_reason, ended.stop_token_id) == (STOP, tokens[5])
            assert it.tokens[slot] == tokens[: tokens.index(tokens[5]) + 1]

    play(scenario())


def test_the_models_own_end_is_named_too(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path, eos_probability=0.1) as it:
            assert it.hub.up is not None
            end = min(it.hub.up.tokenizer.eos_token_ids)
            # The simulated engine comes to its end by itself.
            sampling = SamplingParams(0.0, logit_bias={end: 100.0} if it.real else {})
            for min_tokens in (0, 40):
                stopping = StopConditions(max_tokens=400, min_tokens=min_tokens)
                params = GenerationParams(sampling, stopping)
                if min_tokens and it.lacks("min_tokens"):
                    await assert_refused(it, params)
                    continue
                slot = await assert_as_expected(it, params)
                ended = it.frontend.ended[slot]
                assert (ended.finish_reason, ended.stop_token_id) == (STOP, end)
                assert it.tokens[slot].index(end) == len(it.tokens[slot]) - 1 >= min_tokens

    play(scenario())


def test_log_probabilities_come_with_their_tokens(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            assert it.hub.up is not None
            if not it.hub.up.description.capabilities.logprobs:
                await assert_refused(it, replace(sampled(6), num_top_logprobs=1))
                return
            for num_top in (0, 3):
                params = replace(sampled(6), num_top_logprobs=num_top)
                expected = await it.alone(params)
                slot = await assert_as_expected(it, params)
                heard = it.frontend.logprobs[slot]
                assert heard == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)

    play(scenario())


def test_a_window_is_kept_and_nothing_is_lost_by_it(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            params = greedy(20)
            other = it.start(greedy(40))  # As a clock: it shows that steps were made.
            slot = it.start(params, window_tokens=5)
            await it.ended(other)
            assert len(it.tokens[slot]) == 5
            for read in range(5, 20, 5):
                it.frontend.ack(slot, read)
                await it.until(lambda read=read: len(it.tokens[slot]) >= read + 5)
                assert len(it.tokens[slot]) == read + 5
            assert (await it.ended(slot)).finish_reason == LENGTH
            assert it.tokens[slot] == (await it.alone(params)).token_ids

    play(scenario())


def test_who_adopts_a_stream_that_waits_for_its_reader_reads_on(
    subject: Subject, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            params = greedy(20)
            other = it.start(greedy(40))  # As a clock: it shows that steps were made.
            slot = it.start(params, window_tokens=5)
            await it.ended(other)
            assert len(it.tokens[slot]) == 5
            adopter = Frontend(it.hub, time.monotonic(), "another")
            again = adopter.adopt(f"r{slot}", offset=5, window_tokens=5)

            def has_read_it() -> bool:
                adopter.read()
                adopter.ack(again, 5 + len(adopter.tokens.get(again, ())))
                return again in adopter.ended

            await it.until(has_read_it)
            assert it.tokens[slot] + adopter.tokens[again] == (await it.alone(params)).token_ids

    play(scenario())


def test_an_abort_ends_the_stream_and_frees_the_engine(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            slots = [it.start(greedy(500)), it.start(greedy(500), window_tokens=3)]
            await it.until(lambda: all(len(it.tokens.get(slot, ())) > 2 for slot in slots))
            for slot in slots:
                it.abort(slot)
                ended = await it.ended(slot)
                assert ended.finish_reason == CANCELLED
                assert ended.end_offset == len(it.tokens[slot])
            await it.until(lambda: is_free(it), "what was aborted still holds blocks")

    play(scenario())


def is_free(it: Talk) -> bool:
    load = it.hub.load
    return load is not None and not any(
        rank.kv_blocks_used or rank.requests_running or rank.requests_waiting for rank in load.ranks
    )


def test_a_deadline_ends_the_stream(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path, step_s=0.01) as it:
            slot = it.start(greedy(500), deadline_s=0.1)
            assert (await it.ended(slot)).finish_reason == CANCELLED
            await it.until(lambda: is_free(it))

    play(scenario())


def test_load_is_told_while_it_lasts(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path, step_s=0.005) as it:

            def is_told() -> bool:
                if it.hub.load is None:
                    return False
                (rank,) = it.hub.load.ranks
                assert rank.kv_blocks_total in (0, it.kv_blocks)
                return rank.requests_running == 3 and rank.kv_blocks_used >= 3

            # Some real engines tell their load only once a second, and are through with it sooner
            # or later, as the machine has time for them.
            ended = it.frontend.ended
            for _ in range(10 if it.real else 1):
                params, window_tokens = (greedy(600), 0) if it.real else (greedy(400), 60)
                slots = [it.start(params, window_tokens=window_tokens) for _ in range(3)]
                await it.until(lambda slots=slots: is_told() or ended.keys() & set(slots))
                if is_told():
                    return
                for slot in slots:
                    await it.ended(slot)
            raise AssertionError(f"told last: {it.hub.load}")

    play(scenario())


def test_many_at_once_are_each_as_if_alone(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            prompts = [(5, 6, 7 + index) for index in range(12)]
            slots = [it.start(sampled(10), prompt) for prompt in prompts]
            for slot, prompt in zip(slots, prompts, strict=True):
                await it.ended(slot)
                assert it.tokens[slot] == (await it.alone(sampled(10), prompt)).token_ids

    play(scenario())


def test_what_does_not_fit_at_once_is_as_if_alone_all_the_same(
    subject: Subject, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            assert it.hub.up is not None
            can_resume = it.hub.up.description.capabilities.native_resume
            lacks_penalty = it.lacks("presence penalty")
            params = sampled(220, **({} if lacks_penalty else {"presence_penalty": 0.7}))
            prompts = [(5, 6, 7 + index) for index in range(12)]
            wholes = [(await it.alone(params, prompt)).token_ids for prompt in prompts]
            room = it.kv_blocks * it.hub.up.description.block_size
            assert sum(map(len, wholes)) > room, "else none has to wait, or to come back"
            for cut in (0, 90) if can_resume else (0,):
                slots = [
                    it.start(params, prompt, output=whole[:cut], first_offset=cut)
                    for prompt, whole in zip(prompts, wholes, strict=True)
                ]
                for slot, whole in zip(slots, wholes, strict=True):
                    await it.ended(slot)
                    assert it.tokens[slot] == whole[cut:]

    play(scenario())


CONSTRAINTS = {
    "regex": Constraint("regex", "[0-9]{3}-[0-9]"),
    "choice": Constraint("choice", options=("yes", "no")),
    "json_schema": Constraint("json_schema", '{"enum": ["a", "b"]}'),
    "json_object": Constraint("json_object"),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_constraint_that_it_has_is_kept_and_another_is_refused(
    subject: Subject, kind: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            # To its end: not every engine can go on behind that of a grammar.
            params = GenerationParams(
                SamplingParams(temperature=0.0), StopConditions(30), CONSTRAINTS[kind]
            )
            assert it.hub.up is not None
            if getattr(it.hub.up.description.capabilities.constraints, kind):
                await assert_as_expected(it, params)
            else:
                await assert_refused(it, params)

    play(scenario())


BAD = {
    "no prompt": (greedy(), ()),
    "a prompt longer than the context": (greedy(), range(1100)),
    "an id that it does not know": (greedy(), (1, 1_000_000)),
    "a seed that is too large": (
        replace(sampled(), sampling=SamplingParams(seed=1 << 64 - 1)),
        (1, 2),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_can_never_be_is_refused_and_nothing_else_suffers(
    subject: Subject, what: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            params, prompt = BAD[what]
            assert it.hub.up is not None
            bits = it.hub.up.description.capabilities.seed_bits
            other = it.start(greedy(30))
            slot = it.start(params, prompt)
            if what.startswith("a seed") and (bits == 64 or not bits):
                await it.ended(slot)  # It is none too large for it, or none of its business.
            else:
                refused = await it.refused(slot)
                assert refused.kind == worker_pb2.FAILURE_KIND_REJECTED
                assert refused.detail
            assert (await it.ended(other)).finish_reason == LENGTH
            await assert_as_expected(it, greedy())

    play(scenario())


def test_what_goes_beyond_the_context_ends_there(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path, context_length=48) as it:
            slot = it.start(greedy(500), prompt=range(it.context_length - 8))
            assert (await it.ended(slot)).finish_reason == LENGTH
            assert len(it.tokens[slot]) == 8

    play(scenario())


def test_output_of_the_past_is_taken_only_by_who_can(subject: Subject, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            assert it.hub.up is not None
            if it.hub.up.description.capabilities.native_resume:
                await assert_going_on(it)
            else:
                slot = it.start(greedy(), output=(4, 5), first_offset=2)
                assert (await it.refused(slot)).kind == worker_pb2.FAILURE_KIND_REJECTED

    play(scenario())


async def assert_going_on(it: Talk) -> None:
    """Whatever a request uses, its rest is that of an undisturbed run, wherever it is cut."""
    assert it.hub.up is not None
    able = it.hub.up.description.capabilities.constraints
    features = {
        **FEATURES,
        "min_tokens": replace(sampled(), stopping=StopConditions(max_tokens=12, min_tokens=10)),
        **{kind: replace(greedy(30), constraint=one) for kind, one in CONSTRAINTS.items()},
        **{
            f"seeded {kind}": replace(sampled(30), constraint=CONSTRAINTS[kind])
            for kind in ("regex", "json_schema")
        },
    }
    for feature, params in features.items():
        if params.constraint is not None and not getattr(able, params.constraint.kind):
            continue
        expected = await it.alone(params)
        whole = expected.token_ids
        for cut in sorted({1, len(whole) // 2, len(whole) - 1} & set(range(1, len(whole)))):
            slot = it.start(params, output=whole[:cut], first_offset=cut)
            ended = await it.ended(slot)
            assert it.tokens[slot] == whole[cut:], (feature, cut)
            assert ended.finish_reason == expected.finish_reason, (feature, cut)
            assert ended.end_offset == len(whole), (feature, cut)


def test_an_engine_that_is_stopped_and_started_has_another_life(
    subject: Subject, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with talk(subject, tmp_path) as it:
            slot = it.start(greedy(400))
            await it.until(lambda: len(it.tokens.get(slot, ())) > 3)
            it.engine.fail("it is to begin anew")
            ended = await it.ended(slot)
            assert ended.failure == worker_pb2.FAILURE_KIND_PROTOCOL
            assert ended.end_offset == len(it.tokens[slot])
            await it.state(worker_pb2.ENGINE_STATE_SERVING, 2)
            await assert_as_expected(it, greedy())

    play(scenario())
