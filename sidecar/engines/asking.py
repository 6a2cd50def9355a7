"""Whether an engine can do what an attempt asks, and what it says of itself. No I/O.

Refused here is what an engine would leave out in silence: an adapter that cannot say a thing in its
engine's words must not be asked to.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Final

from sidecar.engines.adapter import Call, Discovered, Unusable
from unbroken.checkpoint import checkpoint_from_proto
from unbroken.errors import InvalidField
from unbroken.v1 import attempt_pb2, worker_pb2

BLOCK_SIZE: Final = 16
"""Of engines that do not tell: what they hold is counted in blocks all the same."""


@dataclass(frozen=True, slots=True)
class Vouched:
    """What the operator says of an engine, since no engine tells it."""

    is_invariant: bool = False
    """Its logits depend neither on what shares a batch nor on how tokens were split into steps."""
    numerics: str = ""
    """What else its logits depend on: the accelerator, a patch. Equal texts are equal logits."""
    model: str = ""
    """Under which name requests ask for it; empty: the engine's own."""
    context_length: int = 0
    """Most tokens of prompt and output, for engines that do not tell; 0: they have to."""


def completed(found: Discovered, vouched: Vouched) -> Discovered:
    """With what the engine left out. Raises `Unusable`."""
    context_length = found.context_length or vouched.context_length
    if not context_length:
        raise Unusable(
            "it does not tell how long its context is; say so with --engine-context-length"
        )
    return replace(found, context_length=context_length)


def describe(found: Discovered, vouched: Vouched) -> worker_pb2.EngineDescription:
    """The engine as the contract has it."""
    facts = {
        "engine": found.kind,
        "version": found.version,
        "model": found.model,
        **found.facts,
        **({"vouched": vouched.numerics} if vouched.numerics else {}),
    }
    is_invariant = vouched.is_invariant and found.has_own_ids
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=8).hexdigest()
    return worker_pb2.EngineDescription(
        kind=found.kind,
        version=found.version,
        model=vouched.model or found.model,
        context_length=found.context_length,
        block_size=found.block_size or BLOCK_SIZE,
        batch_size_max=found.batch_size_max,
        prefill_tokens_max=found.prefill_tokens_max,
        numerics=worker_pb2.NumericsClass(
            id=f"{found.kind}-{digest}",
            batch_invariant=is_invariant,
            split_invariant=is_invariant,
            facts=facts,
        ),
        capabilities=found.capabilities,
        tokenizer_fingerprint=found.tokenizer.fingerprint,
        num_ranks=found.num_ranks,
    )


def call_of(start: attempt_pb2.StartAttempt, found: Discovered, request_id: str) -> Call:
    """What the engine is asked. Raises `InvalidField` for what it cannot do."""
    able = found.capabilities
    checkpoint = checkpoint_from_proto(start.checkpoint, vocab_size=found.tokenizer.vocab_size)
    prompt, params = checkpoint.prompt_token_ids, checkpoint.params
    sampling, stopping = params.sampling, params.stopping
    output = checkpoint.output_token_ids
    room = found.context_length - len(prompt)
    if not prompt:
        raise InvalidField("checkpoint.prompt_token_ids", "at least 1 token", 0)
    if room <= len(output):
        raise InvalidField(
            "checkpoint.prompt_token_ids",
            f"fewer tokens, with the output's, than the context holds ({found.context_length})",
            len(prompt) + len(output),
        )
    if output and not able.native_resume:
        raise InvalidField(
            "checkpoint.output_token_ids", "none, for lack of native_resume", len(output)
        )
    if sampling.logit_bias and not able.logit_bias:
        raise InvalidField("params.sampling.logit_bias", f"none by {found.kind}", "some")
    seed = None if sampling.is_greedy else sampling.seed
    if seed is not None and able.seed_bits and seed.bit_length() > able.seed_bits:
        raise InvalidField("params.sampling.seed", f"at most {able.seed_bits} bits", seed)
    if params.num_top_logprobs is not None and not able.logprobs:
        raise InvalidField("params.logprobs", f"none by {found.kind}", params.num_top_logprobs)
    constraint = params.constraint
    if constraint is not None and not getattr(able.constraints, constraint.kind):
        raise InvalidField("params.constraint", f"a kind that {found.kind} has", constraint.kind)
    rank = start.rank if start.HasField("rank") else None
    if rank is not None and rank >= found.num_ranks:
        raise InvalidField("rank", f"one of {found.num_ranks}", rank)
    max_tokens = room if stopping.max_tokens is None else min(stopping.max_tokens, room)
    if stopping.min_tokens > max_tokens:
        raise InvalidField(
            "params.stopping.min_tokens", f"at most {max_tokens}", stopping.min_tokens
        )
    if len(output) >= max_tokens:
        raise InvalidField(
            "checkpoint.output_token_ids", f"fewer than max_tokens ({max_tokens})", len(output)
        )
    return Call(request_id, prompt, params, max_tokens, start.priority, rank, output)
