"""Too little memory for KV blocks: what is reported, what is let in, and what streams give.

One engine with 64 blocks, its sidecar and a frontend; the truth is what its scheduler writes down
(`vllm_truth`). Twice as many streams as fit come at once, and then the rests of streams that were
begun elsewhere, by class C, straight to the sidecar's half of the work.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.engines.calls import CallEngine
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from tests.engines.backend import Backend
from tests.engines.real import vllm, vllm_truth
from tests.engines.real.units import Units
from tests.engines.real.utilisation import between, worst_second
from tests.engines.real.vllm_truth import Moment
from tests.engines.subjects import FAST, Talk, Tending, tending
from unbroken.generation import GenerationParams, SamplingParams, StopConditions

BUSY_SHARE: Final = 0.8
"""Of KV blocks: with more in use, nothing new is let in."""
NUM_STREAMS: Final = 16
NUM_CONTINUED: Final = 12
PROMPT_TOKENS: Final = 100
OUTPUT_TOKENS: Final = 260
CUT: Final = 100
APART_MAX: Final = 1.0
"""Between what is reported and what is so, in any second: blocks times seconds."""
LET_IN_MAX: Final = 1
"""New ones that wait for blocks in the engine: one may have crossed the threshold."""

STEP_S: Final = 0.02
"""By which the engine's steps are longer."""
FULL: Final = 0.98
NUM_AT_EASE: Final = 4
"""So many streams fit with room to spare."""

_LOOK_S: Final = 0.002
_LIMIT_S: Final = 300.0
_SETTLE_S: Final = 1.5
_SEED: Final = 5
_PARAMS: Final = GenerationParams(
    SamplingParams(temperature=0.8, seed=_SEED, presence_penalty=0.7, frequency_penalty=0.3),
    StopConditions(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
)

Prompt = tuple[int, ...]


@dataclass(slots=True)
class Seen:
    """What came of it."""

    equal: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """By phase: of how many streams, so many."""
    phases: dict[str, dict[str, object]] = field(default_factory=dict[str, dict[str, object]])
    is_under_pressure: bool = True
    cached_tokens: int = 0
    """Of what went on, found in the prefix cache. vLLM does not tell it of what was preempted."""
    apart: float = 0.0
    """Block-seconds a second."""
    apart_worst: float = 0.0
    """In the worst second."""
    let_in_max: int = 0
    """Beyond what fits, by the frontend."""

    @property
    def is_ok(self) -> bool:
        return (
            all(num == equal > 0 for num, equal in self.equal.values())
            and self.is_under_pressure
            and self.cached_tokens > 0
            and self.let_in_max <= LET_IN_MAX
            and max(self.apart, self.apart_worst) <= APART_MAX
        )

    def figures(self) -> dict[str, object]:
        return {
            **{
                name: {"streams": num, "equal": equal, **self.phases.get(name, {})}
                for name, (num, equal) in self.equal.items()
            },
            "reported_apart_block_seconds_a_second": round(self.apart, 2),
            "reported_apart_in_worst_second": round(self.apart_worst, 2),
            "let_in_beyond_what_fits": self.let_in_max,
            "continued_cached_tokens": self.cached_tokens,
        }


def prompts() -> Sequence[Prompt]:
    """Ones that share no prefix."""
    rng = random.Random(3)
    return [tuple(rng.randrange(5, 500) for _ in range(PROMPT_TOKENS)) for _ in range(NUM_STREAMS)]


async def measure(units: Units, log: Path, address: str) -> Seen:
    """`units` has one engine, at `address`, which writes the truth to `log`."""
    seen = Seen()
    await units.until_serving(vllm.START_S_MAX)
    few = asyncio.Semaphore(NUM_AT_EASE)
    rows = await asyncio.gather(*(_stream(units, prompt, few) for prompt in prompts()))
    expected = dict(zip(prompts(), rows, strict=True))
    await _crowd(units, log, expected, seen)
    engine = CallEngine(Launch(None, address, restart=FAST), adapter_of("vllm"))
    async with tending(Tending(engine, Backend())) as it:
        assert it.hub.up is not None
        if not it.hub.up.description.capabilities.native_resume:
            raise RuntimeError("the engine has no native resume: the plug-in does nothing")
        some = list(expected.items())
        await _continue(it, log, dict(some[:NUM_CONTINUED]), seen)
        await _continue_cached(it, log, dict(some[:NUM_AT_EASE]), seen)
    return seen


async def _stream(units: Units, prompt: Prompt, gate: asyncio.Semaphore) -> Sequence[int]:
    sampling = _PARAMS.sampling
    async with gate:
        stream = units.client.generate(
            token_ids=prompt,
            max_tokens=OUTPUT_TOKENS,
            ignore_eos=True,
            temperature=sampling.temperature,
            seed=_SEED,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            timeout_s=_LIMIT_S,
        )
        return [token for piece in [one async for one in stream] for token in piece.token_ids]


async def _crowd(
    units: Units, log: Path, expected: Mapping[Prompt, Sequence[int]], seen: Seen
) -> None:
    """All at once, through the frontend."""
    began = time.monotonic()
    everybody = asyncio.Semaphore(NUM_STREAMS)
    rows = await asyncio.gather(*(_stream(units, prompt, everybody) for prompt in expected))
    equal = sum(a == b for a, b in zip(rows, expected.values(), strict=True))
    seen.equal["crowd"] = (len(rows), equal)
    within = _note("crowd", log, began, seen)
    seen.let_in_max = max(one.waiting_new for one in within)


async def _continue(
    it: Talk, log: Path, expected: Mapping[Prompt, Sequence[int]], seen: Seen
) -> None:
    """As if another engine had said the first tokens of each; and what is reported meanwhile."""
    reported: list[tuple[float, float]] = []

    def sample() -> None:
        load = it.hub.load
        if load is not None and load.ranks[0].kv_blocks_total:
            rank = load.ranks[0]
            reported.append((time.monotonic(), rank.kv_blocks_used / rank.kv_blocks_total))

    await asyncio.sleep(_SETTLE_S)
    began = time.monotonic()
    sample()
    equal = await _go_on(it, expected, CUT, sample)
    ended = time.monotonic()
    while time.monotonic() < ended + _SETTLE_S:  # It comes down, too.
        it.frontend.read()
        sample()
        await asyncio.sleep(_LOOK_S)
    seen.equal["continued"] = (len(expected), equal)
    within = _note("continued", log, began, seen)
    truth = [(one.at, float(one.blocks_used)) for one in within]
    blocks = [(when, share * within[-1].blocks_total) for when, share in reported]
    log.with_name("reported.json").write_text(json.dumps(blocks))  # For who wants to look closer.
    seen.apart = between(blocks, truth, began, ended) / (ended - began)
    seen.apart_worst = worst_second(blocks, truth, began, ended + _SETTLE_S)


async def _continue_cached(
    it: Talk, log: Path, expected: Mapping[Prompt, Sequence[int]], seen: Seen
) -> None:
    """Again and later, so that the prefix cache has what was said before the cut."""
    equal = await _go_on(it, expected, CUT, lambda: None)
    before = vllm_truth.read(log)[-1].computed
    equal += await _go_on(it, expected, 2 * CUT, lambda: None)
    computed = vllm_truth.read(log)[-1].computed - before
    num_given = PROMPT_TOKENS + OUTPUT_TOKENS
    seen.cached_tokens = len(expected) * num_given - computed
    seen.equal["continued, cached"] = (2 * len(expected), equal)


async def _go_on(
    it: Talk, expected: Mapping[Prompt, Sequence[int]], cut: int, meanwhile: Callable[[], None]
) -> int:
    """How many are equal."""
    slots = {
        it.start(_PARAMS, prompt, output=whole[:cut], first_offset=cut): whole
        for prompt, whole in expected.items()
    }
    async with asyncio.timeout(_LIMIT_S):
        while not slots.keys() <= it.frontend.ended.keys():
            it.frontend.read()
            meanwhile()
            await asyncio.sleep(_LOOK_S)
    return sum(it.tokens[slot] == list(whole[cut:]) for slot, whole in slots.items())


def _note(phase: str, log: Path, began: float, seen: Seen) -> Sequence[Moment]:
    """What was so since then."""
    within = [one for one in vllm_truth.read(log) if one.at >= began]
    share = max(one.blocks_used / one.blocks_total for one in within)
    preemptions = within[-1].preemptions - within[0].preemptions
    seen.is_under_pressure &= share >= FULL and preemptions > 0
    seen.phases[phase] = {
        "kv_share_max": round(share, 3),
        "preemptions": preemptions,
        "running_max": max(one.running for one in within),
        "seconds": round(within[-1].at - began, 1),
    }
    print(phase, seen.phases[phase], file=sys.stderr, flush=True)  # noqa: T201 - Progress.
    return within
