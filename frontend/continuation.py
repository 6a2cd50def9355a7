"""How a stream goes on elsewhere: which way is exact, and what the next worker is asked.

    A append      prompt + delivered tokens as a longer prompt, budgets and penalties rewritten
    B regenerate  the original request once more; delivered tokens are verified and suppressed
    C native      the engine takes the delivered tokens as its own past output
    D inexact     C or A although that is not exact; only if the caller allowed it

Which way is exact depends on what the request uses and on what the engine can do. The rules were
measured on vLLM (docs/CONTINUATION.md has the table); each of them is a test on the simulated
engine, which can play engines that lack an ability.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from unbroken.checkpoint import Checkpoint
from unbroken.generation import LOGIT_BIAS_MAX, Constraint, GenerationParams
from unbroken.outcome import ContinuationClass

LOGIT_BIAS_LIMIT = 100.0
"""Engines clamp a bias beyond this, so a penalty rewritten as a larger bias would be wrong."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine can do for a continuation; from `EngineDescription`."""

    numerics_id: str
    is_invariant: bool = True
    """Logits depend neither on what shares a batch nor on how tokens were split into batches."""
    has_native_resume: bool = False
    has_seeds: bool = True
    has_positional_random: bool = False
    """Random numbers depend on seed and absolute position, not on the draws before."""
    repetition_penalty_counts_prompt: bool = True
    has_logit_bias: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best exact way, or NONE and why."""

    way: ContinuationClass
    detail: str = ""


def exact_way(params: GenerationParams, abilities: Abilities) -> Verdict:
    """The cheapest exact way for a request, as far as admission can know it."""
    if not abilities.is_invariant:
        return Verdict(
            ContinuationClass.NONE,
            "the engine's logits depend on the shape of its batches",
        )
    if not params.sampling.is_greedy and not abilities.has_seeds:
        return Verdict(ContinuationClass.NONE, "sampling on an engine that takes no seed")
    if abilities.has_native_resume:
        return Verdict(ContinuationClass.NATIVE)
    obstacle = _obstacle_to_appending(params, abilities)
    if obstacle is None:
        return Verdict(ContinuationClass.APPEND)
    return Verdict(ContinuationClass.REGENERATE, obstacle)


def way_to_resume(
    original: Checkpoint,
    delivered: Sequence[int],
    delivered_bytes: bytes,
    abilities: Abilities,
    *,
    began_with: Abilities | None,
    is_exact: bool,
    is_inexact_allowed: bool,
    regenerate_tokens_max: int,
) -> Verdict:
    """How this stream, at this offset, would go on at this worker.

    `began_with` are the abilities of the engine that delivered the first token; None while nothing
    was delivered, when any worker will do. `is_exact` tells whether what was delivered is what an
    undisturbed run gives; otherwise it cannot be generated again.
    """
    if not delivered:
        verdict = exact_way(original.params, abilities)
        if verdict.way is ContinuationClass.NONE:
            # Nothing was delivered, so beginning again is exact on any worker.
            return Verdict(ContinuationClass.REGENERATE)
        return verdict
    assert began_with is not None, "who delivered is known"
    verdict = _exact_way_now(
        original, delivered, delivered_bytes, abilities, began_with, regenerate_tokens_max
    )
    if verdict.way is ContinuationClass.REGENERATE and not is_exact:
        verdict = Verdict(ContinuationClass.NONE, "what was delivered inexactly cannot come again")
    if verdict.way is not ContinuationClass.NONE or not is_inexact_allowed:
        return verdict
    if _is_grammar(original.params.constraint) and not abilities.has_native_resume:
        # Begun again in the middle, a grammar yields garbage rather than something inexact.
        return verdict
    return Verdict(ContinuationClass.INEXACT, verdict.detail)


def next_checkpoint(
    original: Checkpoint,
    delivered: Sequence[int],
    delivered_bytes: bytes,
    way: ContinuationClass,
    abilities: Abilities,
) -> Checkpoint:
    """What the next worker is asked, so that it goes on after `delivered` in the given way.

    `delivered_bytes` are the bytes that the delivered tokens spell.
    """
    if way is ContinuationClass.INEXACT and abilities.has_native_resume:
        way = ContinuationClass.NATIVE
    match way:
        case ContinuationClass.REGENERATE:
            return original
        case ContinuationClass.NATIVE | ContinuationClass.RESTORE:
            return Checkpoint(
                original.prompt_token_ids, original.params, tuple(delivered), len(delivered)
            )
        case ContinuationClass.APPEND | ContinuationClass.INEXACT:
            return replace(
                original,
                prompt_token_ids=(*original.prompt_token_ids, *delivered),
                params=_appended_params(original.params, delivered, delivered_bytes),
                first_offset=len(delivered),
            )
        case ContinuationClass.UNSPECIFIED | ContinuationClass.NONE:
            raise AssertionError(f"{way.name} is no way to go on")


def _exact_way_now(
    original: Checkpoint,
    delivered: Sequence[int],
    delivered_bytes: bytes,
    abilities: Abilities,
    began_with: Abilities,
    regenerate_tokens_max: int,
) -> Verdict:
    if abilities.numerics_id != began_with.numerics_id:
        return Verdict(
            ContinuationClass.NONE, "the worker's numerics class is not that of the stream"
        )
    if not _samples_alike(abilities, began_with):
        return Verdict(
            ContinuationClass.NONE, "the worker's engine does not sample as that of the stream"
        )
    verdict = exact_way(original.params, abilities)
    if verdict.way is ContinuationClass.APPEND and not _append_fits(
        original.params, delivered, delivered_bytes
    ):
        verdict = Verdict(
            ContinuationClass.REGENERATE, "what was delivered cannot be rewritten as parameters"
        )
    if verdict.way is ContinuationClass.REGENERATE and len(delivered) > regenerate_tokens_max:
        return Verdict(
            ContinuationClass.NONE,
            f"{verdict.detail}; {len(delivered)} delivered tokens are more than the "
            f"{regenerate_tokens_max} that may be generated again",
        )
    return verdict


def _samples_alike(one: Abilities, other: Abilities) -> bool:
    """Whether equal logits give equal tokens, whatever was asked for."""
    return (
        one.has_positional_random == other.has_positional_random
        and one.repetition_penalty_counts_prompt == other.repetition_penalty_counts_prompt
        and one.has_logit_bias == other.has_logit_bias
    )


def _obstacle_to_appending(params: GenerationParams, abilities: Abilities) -> str | None:
    """Why appending delivered tokens to the prompt would change the output, if it would."""
    sampling = params.sampling
    if not sampling.is_greedy and not abilities.has_positional_random:
        return "sampling on an engine whose random numbers depend on its history"
    if sampling.presence_penalty != 0:
        return "a presence penalty on an engine that counts only its own output"
    if sampling.frequency_penalty != 0 and not abilities.has_logit_bias:
        return "a frequency penalty on an engine without logit bias"
    if sampling.frequency_penalty != 0 and sampling.repetition_penalty != 1:
        # As a bias it would be scaled by engines that add the bias first, as vLLM does.
        return "a frequency penalty beside a repetition penalty"
    if sampling.repetition_penalty != 1 and not abilities.repetition_penalty_counts_prompt:
        return "a repetition penalty on an engine that counts only its own output"
    if _is_grammar(params.constraint):
        return "a constraint on an engine that would begin it again"
    return None


def _is_grammar(constraint: Constraint | None) -> bool:
    """Whether it is a constraint of which no remainder can be written down; a choice is not."""
    return constraint is not None and constraint.kind != "choice"


def _append_fits(
    params: GenerationParams, delivered: Sequence[int], delivered_bytes: bytes
) -> bool:
    constraint = params.constraint
    if constraint is not None and _remaining_options(constraint, delivered_bytes) is None:
        return False
    if params.sampling.frequency_penalty == 0:
        return True
    bias = _bias_of_delivered(params, delivered)
    return bias == _permitted(bias)


def _appended_params(
    params: GenerationParams, delivered: Sequence[int], delivered_bytes: bytes
) -> GenerationParams:
    stopping = params.stopping
    assert stopping.max_tokens is not None, "admission resolves max_tokens"
    assert len(delivered) < stopping.max_tokens, "a complete output is not continued"
    constraint = params.constraint
    if constraint is not None:
        # Inexactly, an output that fits no option any more goes on without them.
        options = _remaining_options(constraint, delivered_bytes)
        constraint = None if options is None else replace(constraint, options=options)
    return replace(
        params,
        sampling=replace(
            params.sampling,
            logit_bias=MappingProxyType(_permitted(_bias_of_delivered(params, delivered))),
        ),
        stopping=replace(
            stopping,
            max_tokens=stopping.max_tokens - len(delivered),
            min_tokens=max(0, stopping.min_tokens - len(delivered)),
        ),
        constraint=constraint,
    )


def _bias_of_delivered(params: GenerationParams, delivered: Sequence[int]) -> dict[int, float]:
    """The request's bias, with what the frequency penalty owes to delivered tokens."""
    bias = dict(params.sampling.logit_bias)
    penalty = params.sampling.frequency_penalty
    if penalty != 0:
        for token_id, count in Counter(delivered).items():
            bias[token_id] = bias.get(token_id, 0.0) - penalty * count
    return bias


def _permitted(bias: dict[int, float]) -> dict[int, float]:
    """As much of it as engines accept: the largest entries, clamped."""
    largest = sorted(bias, key=lambda token_id: (-abs(bias[token_id]), token_id))
    return {
        token_id: max(-LOGIT_BIAS_LIMIT, min(LOGIT_BIAS_LIMIT, bias[token_id]))
        for token_id in largest[:LOGIT_BIAS_MAX]
    }


def _remaining_options(constraint: Constraint, delivered: bytes) -> tuple[str, ...] | None:
    """What is left of the options that begin with the delivered bytes; None if that is no choice.

    Nothing is left if the output could end here, or if it ends within a character.
    """
    rest = [
        option.encode()[len(delivered) :]
        for option in constraint.options
        if option.encode().startswith(delivered)
    ]
    if not rest or b"" in rest:
        return None
    try:
        return tuple(option.decode() for option in rest)
    except UnicodeDecodeError:
        return None
