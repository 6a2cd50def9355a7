"""An engine without a model: exact, fast, and as slow as it is told to be.

Its *model* is a hash. The context (prompt and output) has a 64-bit state that grows by one token at
a time, and the state gives the most probable token and, where somebody needs them, logits with that
token on top. So everything that is true of a real engine's outputs is true of these: they depend on
all tokens so far and on nothing else.

Its *cost model* is stated: a step takes `step_base_s`, plus `step_per_sequence_s` for each sequence
that decodes, plus its prompt tokens over `prefill_tokens_per_s`.

Its *personality* can be that of a lesser engine: one that can't go on after past output, whose
random numbers depend on history, or whose repetition penalty ignores the prompt.

With a memory service, the *KV* of a block is the state after its tokens, and a sequence that is
restored goes on from the state that it was given: were that of other tokens, so would its own be.

Its *faults* are those of engines that cannot bear some input: a token that kills the process, or
lets it stand still for ever, as soon as a step has to compute it.
"""

import asyncio
import os
import signal
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unbroken.tokenizer import TokenizerAsset
from unbroken.v1 import worker_pb2
from worker import simulated_tokenizer as vocabulary
from worker.engine import EngineSpec, KvHolder, KvRestore, KvSave, StepPlan, StepResult
from worker.engine import Sequence as Stream
from worker.kv_store import Blocks, KvStore, StoreSettings

VERSION = "1"
RESTORE_TOKENS_MAX = 65_536
"""Its blocks are small, and nothing is computed of them: this takes some 30 ms."""

_MASK = (1 << 64) - 1
_GROWTH = 0x9E3779B97F4A7C15  # Odd, so that no power of it vanishes modulo 2^64.
_SPREAD = 0xD6E8FEB86659FD93  # Multiplier of Degski's 64-bit mixer.
_END_SPREAD = 0xBF58476D1CE4E5B9

# Logits: noise from 0 to 8, higher for a few tokens that come again and again, as in any text (else
# no penalty would ever matter), and the most probable token above all of it.
_NOISE = 8.0
_COMMON = 5.0
_PEAK = 14.0
_END_DUE = 17.0
_NUM_COMMON = 48
_UNREADABLE = -6.0
# KV of a block in a memory service: the state, again and again.
_BLOCK_WORDS = 8
_BLOCK = struct.Struct(f"<{_BLOCK_WORDS}Q")

_NEVER = -1e4  # Finite: a constraint may leave nothing else.


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """How long a step takes."""

    step_base_s: float = 0.01
    step_per_sequence_s: float = 0.0
    prefill_tokens_per_s: float = 20_000.0

    def step_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        return (
            self.step_base_s
            + self.step_per_sequence_s * num_decodes
            + num_prefill_tokens / self.prefill_tokens_per_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Tokens that the engine cannot compute; none by default."""

    crash_on_token: int | None = None
    """The process kills itself."""
    stall_on_token: int | None = None
    """The engine makes no further step, and the process lives on."""

    @property
    def is_none(self) -> bool:
        return self.crash_on_token is None and self.stall_on_token is None

    async def strike(self, plan: StepPlan) -> None:
        """Do not return if the plan has such a token."""
        computed = {token_id for chunk in plan.prefills for token_id in chunk.token_ids}
        computed.update(stream.output[-1] for stream in plan.decodes)
        if self.crash_on_token in computed:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stall_on_token in computed:
            await asyncio.Event().wait()


class SimulatedModel:
    """A function from tokens to the next token's logits."""

    def __init__(self, name: str, *, eos_probability: float = 0.0) -> None:
        """Models of different names are different models.

        `eos_probability` is that of each token to be the end of the generation.
        """
        digest = blake2b(name.encode(), digest_size=8).digest()
        self.root = int.from_bytes(digest, "little")
        self.end_below = int(eos_probability * 2.0**64)
        tokens = vocabulary.pieces()
        words = [i for i, token in enumerate(tokens) if token[:1] == b" " and len(token) > 3]
        marks = [tokens.index(mark) for mark in (b",", b".", b"!", b"?", b"\n", b"\xc3\xa9")]
        self.emoji_head = tokens.index(vocabulary.EMOJI_HEAD)
        common = words[:: len(words) // _NUM_COMMON]
        # What is most probable: all words, the common ones as often as all others together, and now
        # and then a mark or a face.
        few = len(words) // 60
        self.readable = words + common * 60 + marks * few + [self.emoji_head] * few
        self._growths = np.ones(1, dtype=np.uint64)

        self._keys = _mixed(np.arange(vocabulary.VOCAB_SIZE, dtype=np.uint64) + np.uint64(1))
        self._base = np.zeros(vocabulary.VOCAB_SIZE, dtype=np.float32)
        for token_id, token in enumerate(tokens):
            if not token.decode(errors="replace").isprintable():
                self._base[token_id] = _UNREADABLE
        self._base[common] = _COMMON
        self._base[len(tokens) :] = _NEVER

    def state(self, token_ids: Sequence[int], *, after: int | None = None) -> int:
        """The state of a context: a polynomial in its tokens, modulo 2^64.

        `after` is the state before these tokens; None: they are all.
        """
        num = len(token_ids)
        if len(self._growths) <= num:
            factors = np.full(2 * num + 1, _GROWTH, dtype=np.uint64)
            factors[0] = 1
            self._growths = np.multiply.accumulate(factors)
        values = np.array(token_ids, dtype=np.uint64) + np.uint64(1)
        tail = (values * self._growths[num - 1 :: -1] if num else values).sum(dtype=np.uint64)
        begun = self.root if after is None else after
        return (begun * int(self._growths[num]) + int(tail)) & _MASK

    def grown(self, state: int, token_id: int) -> int:
        """The state of a context with one token more."""
        return (state * _GROWTH + token_id + 1) & _MASK

    def best(self, state: int, last_token_id: int) -> int:
        """The most probable next token after a context of this state and last token."""
        if self.end_below and self._is_end_due(state):
            return vocabulary.END_ID
        return self._peak(state, last_token_id)

    def logits(self, state: int, last_token_id: int) -> NDArray[np.float32]:
        """(VOCAB_SIZE,): the logits, of which `best` is the highest."""
        noise = (_mixed(self._keys ^ np.uint64(state)) >> np.uint64(40)).astype(np.float32)
        noise *= np.float32(_NOISE / 2**24)
        logits = noise + self._base
        logits[self._peak(state, last_token_id)] = _PEAK
        if self.end_below and self._is_end_due(state):
            logits[vocabulary.END_ID] = _END_DUE
        return logits

    def _peak(self, state: int, last_token_id: int) -> int:
        spread = ((state ^ (state >> 32)) * _SPREAD & _MASK) >> 32
        if last_token_id == self.emoji_head:
            return 0x80 + spread % 0x40  # The last byte of the face.
        return self.readable[spread % len(self.readable)]

    def _is_end_due(self, state: int) -> bool:
        return (state ^ (state >> 29)) * _END_SPREAD & _MASK < self.end_below


class SimulatedRunner:
    """Executes plans in the time that the cost model says."""

    def __init__(
        self,
        spec: EngineSpec,
        model: SimulatedModel,
        cost: CostModel,
        faults: Faults | None = None,
        store: Blocks | None = None,
    ) -> None:
        """`store` is where its blocks are kept, if its spec says that it does that."""
        self._spec = spec
        self._store = store
        self._faults = faults or Faults()
        self._model = model
        self._cost = cost
        self._step_end = 0.0  # When the last step was due to end, on the loop's clock.

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    async def execute(self, plan: StepPlan) -> StepResult:
        if not self._faults.is_none:
            await self._faults.strike(plan)
        loop = asyncio.get_running_loop()
        num_prefill = sum(len(chunk.token_ids) for chunk in plan.prefills)
        step_s = self._cost.step_s(len(plan.decodes), num_prefill)
        begun = loop.time()
        # A step begins where the last one was due to end, so that lateness does not add up, unless
        # there was nothing to do or it can't be caught up with.
        if begun - self._step_end < step_s:
            begun = self._step_end
        self._step_end = begun + step_s
        if plan.saves or plan.restores:
            result = await asyncio.to_thread(self.compute, plan)
        else:
            result = self.compute(plan)
        await asyncio.sleep(max(0.0, self._step_end - loop.time()))
        return result

    @property
    def kv_store_use(self) -> worker_pb2.KvStoreUse | None:
        return None if self._store is None else self._store.use

    def kv_holder(self) -> KvHolder | None:
        return None if self._store is None else self._store.holder()

    def compute(self, plan: StepPlan) -> StepResult:
        """What the step produces, in no time but that of the memory service."""
        model = self._model
        for save in plan.saves:
            self._save(save)
        result = StepResult(restored=[self._restore(restore) for restore in plan.restores])
        for chunk in plan.prefills:
            if not chunk.samples:
                continue
            stream = chunk.sequence
            stream.runner_state = self._state(stream)
            last_token_id = chunk.token_ids[-1]
            if stream.sampler.is_argmax(len(stream.output)):
                result.append(model.best(stream.runner_state, last_token_id))
            else:
                result.sample(stream, model.logits(stream.runner_state, last_token_id))
        for stream in plan.decodes:
            output = stream.output
            token_id = output[-1]
            stream.runner_state = state = (stream.runner_state * _GROWTH + token_id + 1) & _MASK
            if stream.sampler.is_argmax(len(output)):
                result.token_ids.append(model.best(state, token_id))
            else:
                result.sample(stream, model.logits(state, token_id))
        return result

    async def close(self) -> None:
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    def _state(self, stream: Stream) -> int:
        """After all its tokens; of those that were restored, as its blocks had it."""
        token_ids = [*stream.prompt, *stream.output]
        restored = stream.runner_state
        if isinstance(restored, _Restored):
            return self._model.state(token_ids[restored.num_tokens :], after=restored.state)
        return self._model.state(token_ids)

    def _save(self, save: KvSave) -> None:
        assert self._store is not None, "its spec says that it stores"
        size = self._spec.block_size
        token_ids = [*save.sequence.prompt, *save.sequence.output]
        state = self._model.state(token_ids[: save.first_block * size])
        for index in range(save.first_block, save.end_block):
            state = self._model.state(token_ids[index * size : (index + 1) * size], after=state)
            self._store.put(save.sequence, index, _BLOCK.pack(*(state,) * _BLOCK_WORDS))

    def _restore(self, restore: KvRestore) -> int:
        assert self._store is not None, "its spec says that it stores"
        size, stream = self._spec.block_size, restore.sequence
        num_blocks, state = self._store.fetch(
            stream,
            restore.start // size,
            restore.end // size,
            lambda blocks: _BLOCK.unpack(blocks[-1])[0],
        )
        num_tokens = restore.start + num_blocks * size
        if num_blocks:
            stream.runner_state = _Restored(num_tokens, state)
        return num_tokens


@dataclass(frozen=True, slots=True)
class _Restored:
    """What a sequence's blocks had, until it goes on from there."""

    num_tokens: int
    state: int


def simulated_runner(
    *,
    model: str = "simulated",
    context_length: int = 32_768,
    batch_size_max: int = 1024,
    prefill_tokens_max: int = 2048,
    block_size: int = 16,
    kv_blocks: int = 65_536,
    num_ranks: int = 1,
    eos_probability: float = 0.0,
    cost: CostModel | None = None,
    faults: Faults | None = None,
    native_resume: bool = True,
    random_source: Literal["positional", "sequential"] = "positional",
    repetition_penalty_counts_prompt: bool = True,
    memory: StoreSettings | None = None,
) -> SimulatedRunner:
    """A simulated engine. Raises ValueError if the numbers contradict each other."""
    tokenizer: TokenizerAsset = vocabulary.asset()
    facts = {
        "engine": "simulated",
        "version": VERSION,
        "model": model,
        "eos_probability": f"{eos_probability:g}",
    }
    digest = blake2b(repr(sorted(facts.items())).encode(), digest_size=8).hexdigest()
    spec = EngineSpec(
        kind="simulated",
        version=VERSION,
        model=model,
        tokenizer=tokenizer,
        context_length=context_length,
        batch_size_max=batch_size_max,
        prefill_tokens_max=prefill_tokens_max,
        num_ranks=num_ranks,
        block_size=block_size,
        kv_blocks=kv_blocks,
        numerics_id=f"simulated-{digest}",
        batch_invariant=True,
        split_invariant=True,
        facts=facts,
        kv_restore=memory is not None,
        memory_service="" if memory is None else memory.name,
        restore_tokens_max=RESTORE_TOKENS_MAX,
        native_resume=native_resume,
        random_source=random_source,
        repetition_penalty_counts_prompt=repetition_penalty_counts_prompt,
    )
    model_ = SimulatedModel(model, eos_probability=eos_probability)
    store = None
    if memory is not None:
        store = KvStore(memory, spec, block_bytes=_BLOCK.size, layout="state")
    return SimulatedRunner(spec, model_, cost or CostModel(), faults, store)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each value spread over all 64 bits."""
    values = values * np.uint64(_SPREAD)
    values ^= values >> np.uint64(32)
    values *= np.uint64(_SPREAD)
    values ^= values >> np.uint64(32)
    return values
