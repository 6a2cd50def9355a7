"""What an engine of a given personality produces: a hash, sampled as real engines sample.

The next token depends on all tokens before it and on the parameters. What a personality lacks, it
lacks as real engines do: random numbers that begin anew with every attempt, penalties that know
only the attempt's own output, grammars that begin again. So a stream that goes on in a way which
is not exact for its engine gets wrong tokens.

All numbers are multiples of a power of two, so that no order of additions rounds.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from frontend.continuation import Abilities
from tests.support.vocabulary import EOS, PIECES, VOCAB_SIZE
from unbroken.checkpoint import Checkpoint
from unbroken.generation import Constraint, SamplingParams, TokenLogprobs
from unbroken.outcome import FinishReason

_MASK = (1 << 64) - 1
_GROWTH = 0x9E3779B97F4A7C15
_SPREAD = 0xD6E8FEB86659FD93


def _mix(value: int) -> int:
    value = (value ^ (value >> 32)) * _SPREAD & _MASK
    return value ^ (value >> 29)


_LOGIT_KEYS = [_mix(2 * i + 1) for i in range(VOCAB_SIZE)]
_NOISE_KEYS = [_mix(2 * i + 2) for i in range(VOCAB_SIZE)]
_NEVER = -1e9


@dataclass(frozen=True, slots=True)
class Personality:
    """What kind of engine it is."""

    model_salt: int = 0
    """Different weights, or kernels that round differently."""
    has_native_resume: bool = False
    has_positional_random: bool = False
    has_seeds: bool = True
    is_invariant: bool = True
    repetition_penalty_counts_prompt: bool = True
    has_logit_bias: bool = True
    adds_bias_first: bool = False
    """Before the penalties, as vLLM does, rather than after them, as our own engines do."""

    @property
    def numerics_id(self) -> str:
        """Equal for engines whose logits are equal; how they sample from them is another thing."""
        return f"{self.model_salt}"

    @property
    def abilities(self) -> Abilities:
        """What its worker says about it."""
        return Abilities(
            numerics_id=self.numerics_id,
            is_invariant=self.is_invariant,
            has_native_resume=self.has_native_resume,
            has_seeds=self.has_seeds,
            has_positional_random=self.has_positional_random,
            repetition_penalty_counts_prompt=self.repetition_penalty_counts_prompt,
            has_logit_bias=self.has_logit_bias,
        )

    def is_reproducible(self, original: Checkpoint) -> bool:
        """Whether two uninterrupted runs are equal."""
        is_greedy = original.params.sampling.is_greedy
        return self.is_invariant and (is_greedy or self.has_seeds)


@dataclass(frozen=True, slots=True)
class End:
    """How an engine ends an output."""

    finish_reason: FinishReason
    stop_token_id: int | None = None


class Generation:
    """One attempt inside an engine: produces one token after the other.

    `nonce` is different for every attempt; what is not reproducible depends on it.
    """

    def __init__(self, checkpoint: Checkpoint, personality: Personality, nonce: int = 0) -> None:
        params = checkpoint.params
        stopping = params.stopping
        assert stopping.max_tokens is not None
        self._personality = personality
        self._sampling = params.sampling
        self._constraint = params.constraint
        self._has_logprobs = params.num_top_logprobs is not None
        self._max_tokens = stopping.max_tokens
        self._min_tokens = stopping.min_tokens
        eos = frozenset[int]() if stopping.ignore_eos else frozenset({EOS})
        self._stop_token_ids = stopping.stop_token_ids | eos
        self._held_off = stopping.stop_token_ids | {EOS}
        self._seed = self._sampling.seed or 0
        if not personality.has_seeds:
            self._seed ^= _mix(nonce + 1)
        self._num_prompt = len(checkpoint.prompt_token_ids)
        self._state = _mix(personality.model_salt + 77)
        if not personality.is_invariant:
            self._state ^= _mix(nonce + 3)
        for token_id in checkpoint.prompt_token_ids:
            self._grow(token_id)
        self._output: list[int] = []
        self._counts = Counter[int]()
        self._seen = set[int]()
        if personality.repetition_penalty_counts_prompt:
            self._seen.update(checkpoint.prompt_token_ids)
        for token_id in checkpoint.output_token_ids:
            self._take(token_id)
        self.end = self._end_now()
        """Set once the output is complete."""

    def next(self) -> tuple[int, TokenLogprobs | None]:
        """The next token; the generation goes on after it."""
        assert self.end is None, "the output is complete"
        scores = self._logits()
        num_output = len(self._output)
        if num_output < self._min_tokens:
            for token_id in self._held_off:
                scores[token_id] += _NEVER
        if self._constraint is not None:
            # Where the language allows nothing but the end, it wins over min_tokens.
            for token_id, is_allowed in enumerate(self._allowed(self._constraint)):
                if not is_allowed:
                    scores[token_id] += 4 * _NEVER
        if not self._sampling.is_greedy:
            index = num_output
            if self._personality.has_positional_random:
                index += self._num_prompt
            noise = _mix(self._seed + index * _GROWTH & _MASK)
            divisor = self._sampling.temperature
            scores = [
                score / divisor + ((noise ^ key) * _SPREAD >> 41 & 511) / 64
                for score, key in zip(scores, _NOISE_KEYS, strict=True)
            ]
        token_id = scores.index(max(scores))
        logprobs = None
        if self._has_logprobs:
            logprobs = TokenLogprobs(-(self._state >> 20 & 63) / 8)
        self._take(token_id)
        self.end = self._end_now()
        return token_id, logprobs

    def _logits(self) -> list[float]:
        """Before masks."""
        state, sampling = self._state, self._sampling
        logits = [((state ^ key) * _SPREAD >> 41 & 511) / 32 - 8 for key in _LOGIT_KEYS]
        if self._personality.adds_bias_first:
            self._add_bias(logits, sampling)
        penalty = sampling.repetition_penalty
        if penalty != 1:
            for token_id in self._seen:
                logit = logits[token_id]
                logits[token_id] = logit / penalty if logit > 0 else logit * penalty
        if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
            for token_id, count in self._counts.items():
                logits[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
        if not self._personality.adds_bias_first:
            self._add_bias(logits, sampling)
        return logits

    def _add_bias(self, logits: list[float], sampling: SamplingParams) -> None:
        if self._personality.has_logit_bias:
            for token_id, value in sampling.logit_bias.items():
                logits[token_id] += value

    def _allowed(self, constraint: Constraint) -> list[bool]:
        if constraint.kind == "choice":
            said = _bytes(self._output)
            options = [option.encode() for option in constraint.options]
            allowed = [any(o.startswith(said + piece) for o in options) for piece in PIECES]
            return [*allowed, said in options]
        length, period = grammar(constraint)
        position = len(self._output)
        if position >= length:  # Only a client that claims too much brings an output there.
            return [*(False for _ in range(EOS)), True]
        return [*(i % period == position % period for i in range(EOS)), False]

    def _is_fulfilled(self, constraint: Constraint) -> bool:
        if self._output[-1:] == [EOS]:
            return True  # Although min_tokens held it off: the language left nothing else.
        if constraint.kind == "choice":
            said = _bytes(self._output)
            options = [option.encode() for option in constraint.options]
            return said in options and not any(
                option != said and option.startswith(said) for option in options
            )
        return len(self._output) == grammar(constraint)[0]

    def _end_now(self) -> End | None:
        output = self._output
        if output and output[-1] in self._stop_token_ids and len(output) > self._min_tokens:
            return End(FinishReason.STOP, output[-1])
        if self._constraint is not None and self._is_fulfilled(self._constraint):
            return End(FinishReason.STOP)
        if len(output) >= self._max_tokens:
            return End(FinishReason.LENGTH)
        return None

    def _take(self, token_id: int) -> None:
        self._grow(token_id)
        self._output.append(token_id)
        self._counts[token_id] += 1
        self._seen.add(token_id)

    def _grow(self, token_id: int) -> None:
        self._state = (self._state * _GROWTH + token_id + 1) & _MASK


@cache
def grammar(constraint: Constraint) -> tuple[int, int]:
    """Our stand-in for grammars, "length:period": so many tokens, of classes that take turns."""
    length, period = constraint.text.split(":")
    return int(length), int(period)


@dataclass(frozen=True, slots=True)
class Truth:
    """What an undisturbed run gives its client."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop: str | None = None
    stop_token_id: int | None = None
    logprobs: tuple[float, ...] = field(default=())


def undisturbed(original: Checkpoint, personality: Personality) -> Truth:
    """The whole output of one engine, read by a simple client."""
    generation = Generation(original, personality)
    stops = original.params.stopping.stop
    token_ids: list[int] = []
    logprobs: list[float] = []
    while generation.end is None:
        token_id, entry = generation.next()
        token_ids.append(token_id)
        if entry is not None:
            logprobs.append(entry.logprob)
        if stops and not (generation.end is not None and generation.end.stop_token_id is not None):
            text, stop = cut(_certain(token_ids), original)
            if stop is not None:
                return Truth(
                    tuple(token_ids), text, FinishReason.STOP, stop, logprobs=tuple(logprobs)
                )
    end = generation.end
    if end.stop_token_id is None and len(token_ids) == original.params.stopping.max_tokens:
        # A frontend sees the budget before it hears that a grammar has come to its end.
        end = End(FinishReason.LENGTH)
    shown = token_ids if end.stop_token_id is None else token_ids[:-1]
    text, stop = cut(_bytes(shown).decode(errors="replace"), original)
    if stop is not None:
        # What is left of a character at the end can be one, too.
        end = End(FinishReason.STOP)
    return Truth(
        tuple(token_ids), text, end.finish_reason, stop, end.stop_token_id, tuple(logprobs)
    )


def cut(text: str, original: Checkpoint) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, and which one that is."""
    stopping = original.params.stopping
    if not any(stop in text for stop in stopping.stop):
        return text, None
    for end in range(1, len(text) + 1):
        found = [stop for stop in stopping.stop if text.endswith(stop, 0, end)]
        if found:
            stop = max(found, key=len)
            return text[: end if stopping.include_stop else end - len(stop)], stop
    return text, None


def _certain(token_ids: list[int]) -> str:
    """The text of ids without an incomplete character at the end."""
    data = _bytes(token_ids)
    return data.removesuffix(b"\xc3").decode(errors="replace")


def _bytes(token_ids: list[int]) -> bytes:
    return b"".join([PIECES[token_id] for token_id in token_ids if token_id != EOS])
