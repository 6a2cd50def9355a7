"""The llama.cpp engine: exact whatever the batch, exact after a resume, and clear when it can't."""

import asyncio
import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from unbroken.generation import (
    Constraint,
    GenerationParams,
    SamplingParams,
    StopConditions,
    TokenLogprobs,
    params_to_proto,
)
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from worker import llama
from worker.config import WorkerConfig
from worker.constraints import ConstraintCompiler
from worker.engine import KvTrim, PrefillChunk, StepPlan, admit, describe
from worker.engine import Sequence as Stream
from worker.llama import LlamaRunner, default_model_path
from worker.sampler import Sampler
from worker.scheduler import Scheduler

pytestmark = pytest.mark.llama

CONTEXT = 768
SEED = 20_251


def model_path() -> Path:
    if importlib.util.find_spec("cyllama") is None:
        pytest.skip("cyllama is not installed")
    try:
        return default_model_path()
    except ImportError as error:
        pytest.skip(str(error))


def load(
    *, batch_size_max: int = 16, threads: int = 1, context_length: int = CONTEXT
) -> LlamaRunner:
    return LlamaRunner.load(
        WorkerConfig.model_validate(
            {
                "socket": "unused",
                "model": str(model_path()),
                "batch_size_max": batch_size_max,
                "threads": threads,
                "context_length": context_length,
            }
        )
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[LlamaRunner]:
    runner = load()
    yield runner
    asyncio.run(runner.close())


@pytest.fixture(scope="module")
def solo() -> Iterator[LlamaRunner]:
    """Another instance, with room for a single sequence: nobody can disturb it."""
    solo = load(batch_size_max=1)
    yield solo
    asyncio.run(solo.close())


@pytest.fixture(scope="module")
def tokenizer(solo: LlamaRunner) -> Tokenizer:
    return Tokenizer(solo.spec.tokenizer)


# What it says about itself.


def test_it_advertises_exactness_and_resume(runner: LlamaRunner, solo: LlamaRunner) -> None:
    description = describe(runner.spec)
    assert description.kind == "llama"
    assert description.model == "SmolLM2-135M-Instruct"
    assert description.numerics.batch_invariant
    assert description.capabilities.native_resume
    assert description.capabilities.random_source == worker_pb2.RANDOM_SOURCE_POSITIONAL
    assert description.capabilities.seed_bits == 64
    # Neither slots nor the length of the context change what is computed.
    assert description.numerics.id == solo.spec.numerics_id
    assert description.numerics.facts["kv_type"] == "f16"


def test_with_more_threads_it_advertises_neither_exactness_nor_the_same_numerics(
    solo: LlamaRunner,
) -> None:
    other = load(batch_size_max=1, threads=2)
    asyncio.run(other.close())
    assert not describe(other.spec).numerics.batch_invariant
    assert other.spec.numerics_id != solo.spec.numerics_id


# Logits do not depend on the batch.


class Recorder(Sampler):
    """Chooses nothing and remembers the logits that it is shown."""

    def __init__(self) -> None:
        super().__init__(GenerationParams(), (), vocab_size=1, eos_token_ids=frozenset())
        self.digest = b""

    def sample(
        self, logits: NDArray[np.float32], num_output: int
    ) -> tuple[int, TokenLogprobs | None]:
        del num_output
        self.digest = hashlib.blake2b(logits.tobytes(), digest_size=16).digest()
        return 0, None


@dataclass(frozen=True)
class Feed:
    """Tokens `start` to `end` of a text, for one slot."""

    kv_slot: int
    text: tuple[int, ...]
    start: int
    end: int


async def feed(
    runner: LlamaRunner, feeds: Sequence[Feed], trims: Sequence[KvTrim] = ()
) -> list[bytes]:
    """Compute them in one step; digests of the logits after each."""
    plan = StepPlan(trims=list(trims))
    recorders: list[Recorder] = []
    for item in feeds:
        recorders.append(Recorder())
        sequence = Stream(
            slot=len(recorders),
            prompt=item.text,
            output=[],
            num_given=0,
            first_offset=0,
            output_max=1,
            stop_token_ids=frozenset(),
            min_tokens=0,
            window_tokens=1,
            sampler=recorders[-1],
            kv_root=0,
            kv_slot=item.kv_slot,
        )
        plan.prefills.append(
            PrefillChunk(
                sequence=sequence,
                start=item.start,
                token_ids=item.text[item.start : item.end],
                is_output=False,
                samples=True,
            )
        )
        plan.sampled.append(sequence)
    result = await runner.execute(plan)
    assert not result.failures
    return [recorder.digest for recorder in recorders]


def test_logits_are_bit_equal_whatever_shares_the_batch(
    runner: LlamaRunner, solo: LlamaRunner
) -> None:
    rng = random.Random(SEED)
    texts = [tuple(rng.randrange(17, runner.spec.vocab_size) for _ in range(n)) for n in (670, 90)]
    num_slots = runner.spec.batch_size_max

    async def one_by_one(text: tuple[int, ...]) -> list[bytes]:
        return [(await feed(solo, [Feed(0, text, i, i + 1)]))[0] for i in range(len(text))]

    async def scenario() -> None:
        expected: dict[tuple[int, ...], list[bytes]] = {}
        for text in texts:
            expected[text] = await one_by_one(text)
        # One slot begins far on, and stays there; the others come and go.
        where = {slot: (texts[slot % 2], 0) for slot in range(num_slots)}
        assert await feed(runner, [Feed(0, texts[0], 0, 600)]) == [expected[texts[0]][599]]
        where[0] = (texts[0], 600)
        num_compared, batch_sizes, lengths = 0, set[int](), set[int]()
        trims = [KvTrim(slot, 0) for slot in range(1, num_slots)]
        while num_compared < 200 or num_slots not in batch_sizes:
            feeds: list[Feed] = []
            num_slots_now = rng.choice((1, 2, 5, num_slots))
            is_all_decode = rng.random() < 0.5
            room = 100
            for slot in rng.sample(sorted(where), num_slots_now):
                text, start = where[slot]
                num = 1 if is_all_decode else rng.choice((1, 1, 1, 2, 5, 17, 32, 40, 64, 65))
                end = min(start + num, len(text), start + room)
                room -= end - start
                if end > start:
                    feeds.append(Feed(slot, text, start, end))
                    where[slot] = (text, end)
            digests = await feed(runner, feeds, trims)
            for item, digest in zip(feeds, digests, strict=True):
                assert digest == expected[item.text][item.end - 1], (SEED, item, feeds)
                lengths.add(item.end)
            num_compared += len(feeds)
            batch_sizes.add(len(feeds))
            trims.clear()
            for slot, (text, start) in where.items():
                if slot == 0 and start > 650:
                    where[slot] = (text, rng.randrange(590, 630))  # Rolled back.
                elif start == len(text) or (slot > 0 and rng.random() < 0.04):
                    where[slot] = (rng.choice(texts), 0)  # Somebody else's now.
                else:
                    continue
                trims.append(KvTrim(slot, where[slot][1]))
        assert max(lengths) > 600

    asyncio.run(scenario())


# Outputs go on exactly.

PROSE = "The lighthouse keeper wrote in her diary that the storm"
LIST = "My five favourite fruits are apples, pears,"
JSON = "Describe a person as JSON with name and age.\n"
SCHEMA = json.dumps(
    {
        "x-guidance": {"whitespace_flexible": False},
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["old", "young", "tall"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=2**64 - 3)
BUDGET = StopConditions(max_tokens=40, ignore_eos=True)
FEATURES: Mapping[str, tuple[str, GenerationParams]] = {
    "greedy": (PROSE, GenerationParams(GREEDY, BUDGET)),
    "seeded": (PROSE, GenerationParams(SEEDED, BUDGET)),
    "top_k, min_p": (
        PROSE,
        GenerationParams(replace(SEEDED, top_p=1.0, top_k=40, min_p=0.02), BUDGET),
    ),
    "presence and frequency penalty": (
        LIST,
        GenerationParams(replace(SEEDED, presence_penalty=0.8, frequency_penalty=0.5), BUDGET),
    ),
    "repetition penalty": (
        LIST,
        GenerationParams(replace(GREEDY, repetition_penalty=1.3), BUDGET),
    ),
    "logit bias": (
        PROSE,
        GenerationParams(replace(SEEDED, logit_bias={28: 5.0, 30: -50.0}), BUDGET),
    ),
    "min_tokens": (
        LIST,  # Ends with the first comma or full stop after 25 tokens.
        GenerationParams(
            GREEDY, StopConditions(max_tokens=40, min_tokens=25, stop_token_ids=frozenset({28, 30}))
        ),
    ),
    "logprobs": (PROSE, GenerationParams(SEEDED, BUDGET, num_top_logprobs=5)),
    "json_schema": (
        JSON,
        GenerationParams(
            SEEDED, StopConditions(max_tokens=60), constraint=Constraint("json_schema", SCHEMA)
        ),
    ),
    "regex": (
        PROSE,
        GenerationParams(
            GREEDY,
            StopConditions(max_tokens=40),
            constraint=Constraint("regex", r"( [a-z]{2,9}){12} [0-9]{4}\."),
        ),
    ),
}


@dataclass
class Output:
    """What became of one attempt."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    ended: attempt_pb2.AttemptEnded | None = None


class Engine:
    """A runner with a scheduler of its own, as the service has it."""

    def __init__(self, runner: LlamaRunner) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.spec)
        self.compiler = ConstraintCompiler(runner.spec.tokenizer)
        self.outputs: dict[int, Output] = {}

    def submit(
        self, prompt: Sequence[int], params: GenerationParams, output: Sequence[int] = ()
    ) -> int:
        slot = len(self.outputs)
        checkpoint = attempt_pb2.Checkpoint(
            prompt_token_ids=prompt,
            output_token_ids=output,
            params=params_to_proto(params),
            first_offset=len(output),
        )
        start = attempt_pb2.StartAttempt(slot=slot, checkpoint=checkpoint, window_tokens=10_000)
        sequence = admit(start, self.runner.spec, self.compiler, now=0.0)
        self.outputs[slot] = Output()
        assert self.scheduler.submit(sequence)
        return slot

    async def step(self, abort: int | None = None) -> StepPlan | None:
        """One step, during which an attempt may be aborted."""
        plan = self.scheduler.plan(now=0.0)
        if plan is not None:
            step = asyncio.create_task(self.runner.execute(plan))
            await asyncio.sleep(0)
            if abort is not None:
                assert self.scheduler.abort(abort)
            self.scheduler.commit(plan, await step)
        self.scheduler.check()
        outcome = self.scheduler.take_outcome()
        for slot, token_id in zip(outcome.slots, outcome.token_ids, strict=True):
            self.outputs[slot].token_ids.append(token_id)
        for slot, logprobs in outcome.logprobs:
            self.outputs[slot].logprobs.append(logprobs)
        for ended in outcome.ended:
            self.outputs[ended.slot].ended = ended
        return plan

    async def run(self) -> None:
        while not self.scheduler.is_empty:
            await self.step()

    async def complete(
        self, prompt: Sequence[int], params: GenerationParams, output: Sequence[int] = ()
    ) -> Output:
        slot = self.submit(prompt, params, output)
        await self.run()
        return self.outputs[slot]


@pytest.fixture(scope="module")
def undisturbed(solo: LlamaRunner, tokenizer: Tokenizer) -> Mapping[str, Output]:
    """Every feature's output when nothing happens, one after the other."""

    async def scenario() -> dict[str, Output]:
        outputs: dict[str, Output] = {}
        for feature, (text, params) in FEATURES.items():
            outputs[feature] = await Engine(solo).complete(encode(tokenizer, text), params)
        return outputs

    return asyncio.run(scenario())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return b"".join(tokenizer.pieces[token_id] for token_id in token_ids).decode()


def test_the_undisturbed_outputs_show_their_features(
    solo: LlamaRunner, undisturbed: Mapping[str, Output], tokenizer: Tokenizer
) -> None:
    """Else the comparisons below would prove nothing."""
    token_ids = {feature: tuple(output.token_ids) for feature, output in undisturbed.items()}
    assert token_ids.pop("logprobs") == token_ids["seeded"]
    assert len(set(token_ids.values())) == len(token_ids)
    assert [len(p.top_token_ids) for p in undisturbed["logprobs"].logprobs] == [5] * 40
    text, params = FEATURES["min_tokens"]
    params = replace(params, stopping=replace(params.stopping, min_tokens=0))
    hasty = asyncio.run(Engine(solo).complete(encode(tokenizer, text), params))
    assert len(hasty.token_ids) < 25 < len(token_ids["min_tokens"]) < 40
    assert re.fullmatch(r"( [a-z]{2,9}){12} [0-9]{4}\.", decode(tokenizer, token_ids["regex"]))
    assert set(json.loads(decode(tokenizer, token_ids["json_schema"]))) == {"name", "age", "tags"}


def test_a_resumed_output_equals_the_undisturbed_one(
    runner: LlamaRunner, tokenizer: Tokenizer, undisturbed: Mapping[str, Output]
) -> None:
    engine = Engine(runner)
    cases: dict[int, tuple[str, int]] = {}
    for cut in (1, 8, 21, 1_000):
        for feature, (text, params) in FEATURES.items():
            whole = undisturbed[feature].token_ids
            given = whole[: min(cut, len(whole) - 1)]
            slot = engine.submit(encode(tokenizer, text), params, given)
            cases[slot] = (feature, len(given))
    asyncio.run(engine.run())
    for slot, (feature, cut) in cases.items():
        whole, resumed = undisturbed[feature], engine.outputs[slot]
        assert resumed.token_ids == whole.token_ids[cut:], (feature, cut)
        assert resumed.logprobs == whole.logprobs[cut:], (feature, cut)
        assert resumed.ended is not None
        assert whole.ended is not None
        assert resumed.ended.finish_reason == whole.ended.finish_reason, (feature, cut)
        assert resumed.ended.end_offset == whole.ended.end_offset, (feature, cut)


def test_a_reused_prefix_changes_no_token(
    runner: LlamaRunner, tokenizer: Tokenizer, undisturbed: Mapping[str, Output]
) -> None:
    async def scenario() -> None:
        engine = Engine(runner)
        prompt = encode(tokenizer, PROSE)
        first = await engine.complete(prompt, FEATURES["seeded"][1])
        # The whole conversation so far comes again, as given output.
        again = await engine.complete(prompt, FEATURES["seeded"][1], first.token_ids[:-1])
        assert first.token_ids == undisturbed["seeded"].token_ids
        assert again.token_ids == first.token_ids[-1:]
        assert again.ended is not None
        assert again.ended.cached_tokens >= 32
        assert again.ended.prefill_tokens < 32

    asyncio.run(scenario())


def test_a_preempted_output_goes_on_exactly(
    runner: LlamaRunner, tokenizer: Tokenizer, undisturbed: Mapping[str, Output]
) -> None:
    async def scenario() -> None:
        engine = Engine(runner)
        slot = engine.submit(encode(tokenizer, PROSE), FEATURES["seeded"][1])
        for _ in range(12):
            await engine.step()
        engine.scheduler.drop_all()  # Its slot is given back; nothing of it is told.
        resumed = await Engine(runner).complete(
            encode(tokenizer, PROSE), FEATURES["seeded"][1], engine.outputs[slot].token_ids
        )
        whole = undisturbed["seeded"].token_ids
        assert engine.outputs[slot].token_ids + resumed.token_ids == whole

    asyncio.run(scenario())


# Ends, refusals, failures.


def test_an_aborted_sequence_is_in_no_later_step_and_disturbs_nobody(
    runner: LlamaRunner, tokenizer: Tokenizer, undisturbed: Mapping[str, Output]
) -> None:
    async def scenario() -> None:
        engine = Engine(runner)
        prompt = encode(tokenizer, PROSE)
        stays = engine.submit(prompt, FEATURES["seeded"][1])
        leaves = engine.submit(encode(tokenizer, LIST), FEATURES["repetition penalty"][1])
        for _ in range(5):
            await engine.step()
        num_before = len(engine.outputs[leaves].token_ids)
        await engine.step(abort=leaves)
        assert len(engine.outputs[leaves].token_ids) == num_before
        ended = engine.outputs[leaves].ended
        assert ended is not None
        assert ended.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
        heirs = [engine.submit(prompt, FEATURES["greedy"][1]) for _ in range(3)]
        plan = await engine.step()
        assert plan is not None
        assert leaves not in [sequence.slot for sequence in plan.decodes]
        await engine.run()
        assert engine.outputs[stays].token_ids == undisturbed["seeded"].token_ids
        for heir in heirs:
            assert engine.outputs[heir].token_ids == undisturbed["greedy"].token_ids
        assert engine.scheduler.load().ranks[0].kv_blocks_used == 0

    asyncio.run(scenario())


def test_a_sequence_that_llama_cpp_refuses_fails_alone(
    runner: LlamaRunner, tokenizer: Tokenizer, undisturbed: Mapping[str, Output]
) -> None:
    async def scenario() -> None:
        engine = Engine(runner)
        prompt = encode(tokenizer, PROSE)
        good = engine.submit(prompt, FEATURES["greedy"][1])
        bad = engine.submit(prompt, FEATURES["greedy"][1])
        plan = engine.scheduler.plan(now=0.0)
        assert plan is not None
        # No such token exists; admission would have said so.
        plan.prefills[1] = replace(plan.prefills[1], token_ids=[*prompt[:-1], 2**31 - 1])
        engine.scheduler.commit(plan, await runner.execute(plan))
        await engine.run()
        ended = engine.outputs[bad].ended
        assert ended is not None
        assert ended.failure == worker_pb2.FAILURE_KIND_ENGINE_ERROR
        assert "invalid token" in ended.detail
        assert engine.outputs[good].token_ids == undisturbed["greedy"].token_ids
        # Nobody is misled by what the failed one left behind.
        again = await engine.complete(prompt, FEATURES["greedy"][1])
        assert again.token_ids == undisturbed["greedy"].token_ids

    asyncio.run(scenario())


def test_a_chunk_that_failed_is_computed_with_the_next_one(
    runner: LlamaRunner, solo: LlamaRunner
) -> None:
    text = tuple(range(100, 160))

    async def scenario() -> None:
        [expected] = await feed(solo, [Feed(0, text, 0, 60)], [KvTrim(0, 0)])
        broken = (*text[:30], 2**31 - 1)
        sequence = Stream(
            slot=0,
            prompt=broken,
            output=[],
            num_given=0,
            first_offset=0,
            output_max=1,
            stop_token_ids=frozenset(),
            min_tokens=0,
            window_tokens=1,
            sampler=Recorder(),
            kv_root=0,
            kv_slot=3,
        )
        chunk = PrefillChunk(
            sequence=sequence, start=0, token_ids=broken, is_output=False, samples=False
        )
        result = await runner.execute(StepPlan(trims=[KvTrim(3, 0)], prefills=[chunk]))
        assert not result.failures
        # The scheduler believes that 31 tokens are there.
        assert await feed(runner, [Feed(3, text, 31, 60)]) == [expected]

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", ["unreadable", "moved"])
def test_logits_are_right_when_the_buffer_is_lost(
    lost: str,
    solo: LlamaRunner,
    tokenizer: Tokenizer,
    undisturbed: Mapping[str, Output],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = solo._context._reader  # pyright: ignore[reportPrivateUsage]
    field_before = reader._field  # pyright: ignore[reportPrivateUsage]
    assert field_before is not None, "the fast path is in use here"
    monkeypatch.setattr(reader, "_field", 8 if lost == "unreadable" else field_before - 8)
    params = FEATURES["logprobs"][1]
    output = asyncio.run(Engine(solo).complete(encode(tokenizer, PROSE), params))
    assert reader._field is None  # pyright: ignore[reportPrivateUsage]
    assert output.token_ids == undisturbed["logprobs"].token_ids
    assert output.logprobs == undisturbed["logprobs"].logprobs


def test_a_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "MODEL_PACKAGE", "no-such-package")
    with pytest.raises(ImportError, match="no-such-package"):
        default_model_path()


def test_a_context_longer_than_the_model_was_trained_for_is_refused() -> None:
    with pytest.raises(ValueError, match="trained for"):
        load(batch_size_max=1, context_length=9_000)


def test_more_slots_than_llama_cpp_has_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 256"):
        load(batch_size_max=257)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"not a model", "GGUF"),
        (8_000_000, "not within the file bounds"),
    ],
)
def test_a_model_that_can_not_be_loaded_ends_the_process_with_a_reason(
    content: bytes | int | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    if isinstance(content, int):  # So much of a good one.
        with model_path().open("rb") as file:
            path.write_bytes(file.read(content))
    elif content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "worker", "--engine", "llama"]
    command += ["--model", str(path), "--socket", str(tmp_path / "socket")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == 1, process.stderr
    assert message in process.stderr + process.stdout
    assert "Traceback" not in process.stderr
