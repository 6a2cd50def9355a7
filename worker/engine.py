"""The interface behind which every engine of ours stands, and what it has in common.

    service ──StartAttempt──▶ admit ──Sequence──▶ Scheduler ──StepPlan──▶ ModelRunner
    service ◀──StepFrame─── Scheduler.commit ◀──────────────StepResult──────────┘

The scheduler decides what shares the next step and accounts for KV blocks; the runner computes
logits and asks each sequence's sampler for a token. So a new engine is one `ModelRunner`: it says
what it is (`EngineSpec`) and executes plans, one at a time.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unbroken import blocks
from unbroken.checkpoint import checkpoint_from_proto
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.generation import TokenLogprobs
from unbroken.memory.keys import KeyChain
from unbroken.tokenizer import TokenizerAsset
from unbroken.v1 import attempt_pb2, worker_pb2
from worker.constraints import ConstraintCompiler
from worker.sampler import Sampler, SamplingError

KV_HOLDERS_MAX = 4
"""Memory services of other hosts that are asked for the blocks of one sequence."""

Logits: TypeAlias = NDArray[np.float32]  # (vocab_size,)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is. Fixed from the moment the model is loaded.

    Raises `ValueError` if the numbers contradict each other.
    """

    kind: str
    version: str
    model: str
    tokenizer: TokenizerAsset

    context_length: int
    """Most tokens of prompt and output together."""
    batch_size_max: int
    """Sequences in one step, of each rank."""
    prefill_tokens_max: int
    """Prompt tokens that one step computes, for each rank."""
    prefill_alignment: int = 1
    """A chunk of a prompt begins at a multiple of this, and ends at one or with the prompt. For
    kernels whose rounding depends on the shape of the batch: equal prompts get equal shapes."""
    replay_tokens_max: int | None = None
    """Past output tokens that one step recomputes, of all sequences of a rank. None: as
    `prefill_tokens_max`."""

    num_ranks: int = 1
    """Data-parallel ranks, each with its own KV memory."""
    block_size: int
    """Tokens per KV block; a multiple of `prefill_alignment`."""
    kv_blocks: int
    """KV blocks of each rank."""
    kv_slots: int | None = None
    """None: blocks are paged, and any sequence can share any other's prefix. Otherwise every
    sequence owns one of so many slots, and finds reusable tokens only in an idle one."""

    numerics_id: str
    """Fingerprint of everything that the logits depend on."""
    batch_invariant: bool
    """Logits of a sequence do not depend on what shares its batch."""
    split_invariant: bool
    """Nor on which of its tokens were computed together. Otherwise KV computed as output is never
    reused as that of a prompt, nor the other way round."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """What went into `numerics_id`, for people."""

    kv_restore: bool = False
    """It keeps its KV blocks in a memory service, and takes them from there."""
    memory_service: str = ""
    """Names that memory service: workers of equal names find each other's blocks."""
    restore_tokens_max: int = 4096
    """Asked of it in one step, if by several sequences: who decodes waits meanwhile."""
    native_resume: bool = True
    random_source: Literal["positional", "sequential"] = "positional"
    repetition_penalty_counts_prompt: bool = True

    def __post_init__(self) -> None:
        if self.block_size % self.prefill_alignment:
            raise ValueError(
                f"block_size: expected a multiple of prefill_alignment "
                f"({self.prefill_alignment}), got {self.block_size}"
            )
        if self.prefill_tokens_max < self.prefill_alignment:
            raise ValueError(
                f"prefill_tokens_max: expected at least prefill_alignment "
                f"({self.prefill_alignment}), got {self.prefill_tokens_max}"
            )
        if self.replay_tokens_max is not None and self.replay_tokens_max < 1:
            raise ValueError(
                f"replay_tokens_max: expected at least 1, got {self.replay_tokens_max}"
            )
        # Otherwise a lone sequence could outgrow the memory, and nobody could make room for it.
        if self.kv_blocks * self.block_size < self.context_length:
            raise ValueError(
                f"kv_blocks: expected room for context_length ({self.context_length} tokens), "
                f"got {self.kv_blocks} blocks of {self.block_size}"
            )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def describe(spec: EngineSpec) -> worker_pb2.EngineDescription:
    """What the engine says about itself when it is ready."""
    is_positional = spec.random_source == "positional"
    return worker_pb2.EngineDescription(
        kind=spec.kind,
        version=spec.version,
        model=spec.model,
        context_length=spec.context_length,
        block_size=spec.block_size,
        batch_size_max=spec.batch_size_max * spec.num_ranks,
        prefill_tokens_max=spec.prefill_tokens_max * spec.num_ranks,
        numerics=worker_pb2.NumericsClass(
            id=spec.numerics_id,
            batch_invariant=spec.batch_invariant,
            split_invariant=spec.split_invariant,
            facts=spec.facts,
        ),
        capabilities=worker_pb2.EngineCapabilities(
            native_resume=spec.native_resume,
            random_source=(
                worker_pb2.RANDOM_SOURCE_POSITIONAL
                if is_positional
                else worker_pb2.RANDOM_SOURCE_SEQUENTIAL
            ),
            repetition_penalty_counts_prompt=spec.repetition_penalty_counts_prompt,
            logit_bias=True,
            constraints=worker_pb2.ConstraintCapabilities(
                json_schema=True, json_object=True, regex=True, lark=True, choice=True
            ),
            logprobs=True,
            kv_restore=spec.kv_restore,
            seed_bits=64,
        ),
        tokenizer_fingerprint=spec.tokenizer.fingerprint,
        num_ranks=spec.num_ranks,
        memory_service=spec.memory_service,
    )


# What runs.


@dataclass(frozen=True, slots=True)
class KvHolder:
    """A memory service of another host, and what lets us read there."""

    address: str
    ticket: bytes = field(repr=False)

    def write(self, message: worker_pb2.KvHolder) -> None:
        """As the contract has it."""
        message.address, message.ticket = self.address, self.ticket


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One attempt inside the engine: its tokens, and how it chooses the next one.

    Runners read `prompt`, `output`, `kv_slot` and `sampler`, and own `runner_state`. Everything
    else belongs to the scheduler, which alone appends to `output`.
    """

    slot: int
    """Handle of the attempt on the connection."""
    prompt: tuple[int, ...]
    output: list[int]
    """The tokens given at the start, then those produced."""
    num_given: int
    """How many of `output` were given."""
    first_offset: int
    """Position in the stream of the first token produced."""
    output_max: int
    """The output ends with LENGTH when it has so many tokens."""
    stop_token_ids: frozenset[int]
    """The output ends with STOP after one of these."""
    min_tokens: int
    window_tokens: int
    """So many tokens may be produced beyond those acknowledged; 0: any number."""
    sampler: Sampler
    kv_root: int
    """Root of the chained hashes of its blocks."""
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    """When it has to stop, on the clock that the scheduler is given."""
    is_probe: bool = False
    rank: int | None = None
    """Which one has to compute it; None: any."""

    kv_slot: int = -1
    """Where its KV lives, in an engine with slots; -1 before it is in the batch."""
    kv_holders: tuple[KvHolder, ...] = ()
    """Memory services of other hosts that may have its blocks, best first."""
    kv_keys: KeyChain | None = None
    """Names of its blocks in the memory service; whoever stores them keeps it."""
    runner_state: Any = None
    """Whatever the runner keeps; it vanishes with the sequence."""
    standing: Any = None
    """What the scheduler keeps."""
    next_check: int = 0
    """The scheduler looks at the sequence closely when its output has so many tokens; until then
    nothing but a stop token can happen to it."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens_to_chain(self, start: int, end: int, *, marks_output: bool) -> Row[int]:
        """Its tokens from `start` to `end`, as hashes of blocks are computed from them."""
        num_prompt = len(self.prompt)
        prompt = self.prompt[start:end]
        if end <= num_prompt:
            return prompt
        output = self.output[max(0, start - num_prompt) : end - num_prompt]
        if marks_output:
            output = [token_id | blocks.OUTPUT_TAG for token_id in output]
        return [*prompt, *output]

    @property
    def next_offset(self) -> int:
        """Position in the stream of the next token."""
        return self.first_offset + len(self.output) - self.num_given


# What one step is.


@dataclass(frozen=True, slots=True)
class KvTrim:
    """Forget all KV of a slot beyond its first `keep_tokens` tokens."""

    kv_slot: int
    keep_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens whose KV is to be computed at positions `start`, `start + 1`, …

    A chunk is either of the prompt or, when a sequence goes on after output that it was given or
    after a preemption, of past output; never of both.
    """

    sequence: Sequence
    start: int
    token_ids: Row[int]
    is_output: bool
    samples: bool
    """The chunk is the last one: a token is to be chosen from the logits after it."""


@dataclass(frozen=True, slots=True)
class KvSave:
    """Blocks of a sequence that are full and computed: the memory service is to have them.

    The sequence may be over; its KV is still there until the plan's trims.
    """

    sequence: Sequence
    kv_slot: int
    """Where its KV is, which `sequence.kv_slot` need not be any more."""
    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class KvRestore:
    """A sequence's KV is to be taken from the memory service, as far as it is there.

    Of its first `start` tokens it has it; of those from `end` on nothing is wanted. Both are whole
    blocks. It computes nothing in the same step.
    """

    sequence: Sequence
    start: int
    end: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes. Within a plan every sequence has at most one row that is sampled."""

    saves: list[KvSave] = field(default_factory=list[KvSave])
    """To be done before anything else; only of an engine with `kv_restore`, as restores."""
    trims: list[KvTrim] = field(default_factory=list[KvTrim])
    """To be done before anything of what follows."""
    restores: list[KvRestore] = field(default_factory=list[KvRestore])
    prefills: list[PrefillChunk] = field(default_factory=list[PrefillChunk])
    decodes: list[Sequence] = field(default_factory=list[Sequence])
    """Each computes `output[-1]` at position `num_tokens - 1`, and is sampled."""
    sampled: list[Sequence] = field(default_factory=list[Sequence])
    """The rows of the result: prefills that sample, in their order, then the decodes."""


@dataclass(slots=True)
class StepResult:
    """The token of every row of `StepPlan.sampled`, in order.

    A runner calls `sample` (or `append`, where it knows the token) once for each row.
    """

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict[int, TokenLogprobs])
    """By row, of those that asked for them."""
    restored: list[int] = field(default_factory=list[int])
    """For each of `StepPlan.restores`: tokens of which the sequence has KV now."""
    failures: dict[int, str] = field(default_factory=dict[int, str])
    """By row: why it has no token, though the engine lives on. Its token id means nothing."""

    def sample(self, sequence: Sequence, logits: Logits) -> None:
        """Add the next row: the token that the sequence's sampler chooses from `logits`."""
        try:
            token_id, logprobs = sequence.sampler.sample(logits, len(sequence.output))
        except SamplingError as error:
            self.fail(str(error))
            return
        if logprobs is not None:
            self.logprobs[len(self.token_ids)] = logprobs
        self.token_ids.append(token_id)

    def append(self, token_id: int) -> None:
        """Add the next row: a token that needs no sampler."""
        self.token_ids.append(token_id)

    def fail(self, detail: str) -> None:
        """Add the next row: this sequence alone can't go on."""
        self.failures[len(self.token_ids)] = detail
        self.token_ids.append(-1)


class ModelRunner(Protocol):
    """What computes tokens. Called by one task, one plan at a time."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def kv_store_use(self) -> worker_pb2.KvStoreUse | None:
        """What it has exchanged with a memory service; None: it has none."""
        ...

    def kv_holder(self) -> KvHolder | None:
        """Where other hosts read what it stores; None: nowhere, or that is not known yet."""
        ...

    async def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step; blocking work goes to a thread.

        The tokens of a sequence MUST NOT depend on what else is in the plan. Other tasks may end
        sequences of the plan meanwhile, and their results are dropped. An exception is the end of
        the engine's process.
        """
        ...

    async def close(self) -> None:
        """Free the model. No step is running."""
        ...


# What comes in.


def admit(
    start: attempt_pb2.StartAttempt,
    spec: EngineSpec,
    compiler: ConstraintCompiler,
    *,
    now: float,
) -> Sequence:
    """The sequence that `start` asks for; `now` is the time on the scheduler's clock.

    Raises:
        InvalidField: The engine can't ever do what is asked.
        UnbrokenError: NOT_CONTINUABLE, if the output to go on after is not one that these
            parameters allow.
    """
    checkpoint = checkpoint_from_proto(start.checkpoint, vocab_size=spec.vocab_size)
    params, stopping = checkpoint.params, checkpoint.params.stopping
    prompt, output = checkpoint.prompt_token_ids, checkpoint.output_token_ids
    if not prompt:
        raise InvalidField("checkpoint.prompt_token_ids", "at least 1 token", len(prompt))
    if len(prompt) >= spec.context_length:
        raise InvalidField(
            "checkpoint.prompt_token_ids",
            f"fewer tokens than the context holds ({spec.context_length})",
            len(prompt),
        )
    if output and not spec.native_resume:
        raise InvalidField(
            "checkpoint.output_token_ids", "none, for lack of native_resume", len(output)
        )
    if len(prompt) + len(output) > spec.context_length:
        raise InvalidField(
            "checkpoint.output_token_ids",
            f"with the prompt, at most as many as the context holds ({spec.context_length})",
            len(prompt) + len(output),
        )
    if checkpoint.first_offset < len(output):
        raise InvalidField(
            "checkpoint.first_offset",
            f"at least the number of output_token_ids ({len(output)})",
            checkpoint.first_offset,
        )
    if params.sampling.seed is None and not params.sampling.is_greedy:
        raise InvalidField("params.sampling.seed", "a seed, because tokens are sampled", None)
    room = spec.context_length - len(prompt)
    output_max = room if stopping.max_tokens is None else min(stopping.max_tokens, room)
    if len(output) > output_max:
        raise InvalidField(
            "checkpoint.output_token_ids", f"at most max_tokens ({output_max})", len(output)
        )

    eos = spec.tokenizer.eos_token_ids
    sampler = Sampler(
        params,
        prompt,
        vocab_size=spec.vocab_size,
        eos_token_ids=eos,
        matcher=None if params.constraint is None else compiler.start(params.constraint),
        draws_by_position=spec.random_source == "positional",
        repetition_counts_prompt=spec.repetition_penalty_counts_prompt,
    )
    if not sampler.replay(output):
        raise UnbrokenError(
            Reason.NOT_CONTINUABLE,
            "checkpoint.output_token_ids: expected an output that the constraint allows",
        )
    return Sequence(
        slot=start.slot,
        prompt=prompt,
        output=list(output),
        num_given=len(output),
        first_offset=checkpoint.first_offset,
        output_max=output_max,
        stop_token_ids=(
            stopping.stop_token_ids if stopping.ignore_eos else stopping.stop_token_ids | eos
        ),
        min_tokens=stopping.min_tokens,
        window_tokens=start.window_tokens,
        sampler=sampler,
        kv_root=blocks.root(spec.numerics_id, start.stream.tenant),
        kv_holders=_holders(start.checkpoint.kv) if start.checkpoint.HasField("kv") else (),
        priority=start.priority,
        tenant=start.stream.tenant,
        deadline=(
            now + start.deadline.seconds + start.deadline.nanos * 1e-9
            if start.HasField("deadline")
            else None
        ),
        is_probe=start.is_probe,
        rank=start.rank if start.HasField("rank") else None,
    )


def _holders(hint: attempt_pb2.KvHint) -> tuple[KvHolder, ...]:
    """The first of them; it is a hint, so what makes no sense is left out."""
    pairs = zip(hint.holders[:KV_HOLDERS_MAX], hint.tickets, strict=False)
    return tuple(KvHolder(address, ticket) for address, ticket in pairs)
