"""Chooses the next token of a sequence from the model's logits.

The choice is a pure function of the logits, the parameters, the prompt and the output so far, so a
sequence that goes on elsewhere chooses as it would have here. In this order:

1. repetition penalty, presence and frequency penalty, logit bias;
2. what the constraint allows; before `min_tokens`, nothing that ends the output;
3. greedy: the highest logit, among equals the lowest id; or
4. temperature, top_k, top_p, min_p, and the token at which the cumulated probability, in the order
   of ids, passes a random number.

The random number for a position is the SplitMix64 sequence of the seed at that position. It needs
no state, so it needs no recovery.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unbroken.generation import GenerationParams, TokenLogprobs
from worker.constraints import Matcher

_MASK = (1 << 64) - 1


class SamplingError(Exception):
    """No token can be chosen, because parameters and constraint leave none."""


def splitmix64(seed: int, index: int) -> int:
    """Output number `index`, from 0, of the generator SplitMix64 that begins with `seed`.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, index: int) -> float:
    """A number from 0 up to, not including, 1: the upper 53 bits of `splitmix64`."""
    return (splitmix64(seed, index) >> 11) * 2.0**-53


class Sampler:
    """The sampler of one sequence.

    Attributes:
        follows_output: Whether it has to be told the tokens of the output.
        matcher: Where the output stands in the language it is restricted to, if it is.
    """

    __slots__ = (
        "_bias",
        "_draws_by_position",
        "_end_ids",
        "_is_bare",
        "_is_seen",
        "_min_tokens",
        "_num_prompt",
        "_output",
        "_params",
        "_seen",
        "_vocab_size",
        "follows_output",
        "matcher",
    )

    def __init__(
        self,
        params: GenerationParams,
        prompt: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        matcher: Matcher | None = None,
        draws_by_position: bool = True,
        repetition_counts_prompt: bool = True,
    ) -> None:
        """Begin before the first token of the output.

        Args:
            params: As validated; with a seed unless greedy.
            prompt: Token ids.
            vocab_size: Length of the logits.
            eos_token_ids: Tokens with which the model ends a generation.
            matcher: Of the constraint, if there is one; owned by the sampler from here on.
            draws_by_position: The random number of a token is that of its position in prompt and
                output. Otherwise it is that of its position in the output alone, as of a generator
                seeded for each attempt.
            repetition_counts_prompt: The repetition penalty is for tokens of the prompt, too.
        """
        sampling = params.sampling
        self.matcher = matcher
        self._params = params
        self._vocab_size = vocab_size
        self._num_prompt = len(prompt)
        self._draws_by_position = draws_by_position
        self._min_tokens = params.stopping.min_tokens
        self._end_ids = _sorted(eos_token_ids, params.stopping.stop_token_ids)
        self._bias = _as_arrays(sampling.logit_bias) if sampling.logit_bias else None
        # Penalties are per distinct token, of which a sequence has few.
        self._output = _Counter() if _penalises_output(params) else None
        self._seen = _Counter() if sampling.repetition_penalty != 1.0 else None
        if self._seen is not None and repetition_counts_prompt:
            for token_id in prompt:
                self._seen.add(token_id)
        self.follows_output = not (self._output is None and self._seen is None and matcher is None)
        self._is_bare = (
            sampling.is_greedy
            and not self.follows_output
            and not sampling.logit_bias
            and params.num_top_logprobs is None
        )

    def is_argmax(self, num_output: int) -> bool:
        """The next token is the one with the highest logit, and nothing but its id is asked for."""
        return self._is_bare and num_output >= self._min_tokens

    def accept(self, token_id: int) -> None:
        """A token that it chose was added to the output. Only needed if `follows_output`."""
        self._count(token_id)
        if self.matcher is not None:
            self.matcher.consume(token_id)

    def replay(self, token_ids: Sequence[int]) -> bool:
        """Go on after an output produced elsewhere; False if the constraint does not allow it."""
        if self.follows_output:
            for token_id in token_ids:
                self._count(token_id)
        return self.matcher is None or self.matcher.replay(token_ids)

    @property
    def is_fulfilled(self) -> bool:
        """The constraint allows nothing more."""
        return self.matcher is not None and self.matcher.is_fulfilled

    def sample(
        self, logits: NDArray[np.float32], num_output: int
    ) -> tuple[int, TokenLogprobs | None]:
        """Choose a token for the output, which has `num_output` tokens.

        `logits` are (vocab_size,) and are not changed. Log probabilities are those of the logits
        as they came, if they are asked for.

        Raises:
            SamplingError: No token is left.
        """
        if self.is_argmax(num_output):
            return int(logits.argmax()), None
        raw = logits
        logits = self._modify(raw, num_output)
        sampling = self._params.sampling
        if sampling.is_greedy:
            token_id = int(logits.argmax())
        else:
            assert sampling.seed is not None, "admission refuses sampling without a seed"
            index = num_output + (self._num_prompt if self._draws_by_position else 0)
            token_id = self._draw(logits, uniform(sampling.seed, index))
        num_top = self._params.num_top_logprobs
        return token_id, None if num_top is None else token_logprobs(raw, token_id, num_top)

    def _count(self, token_id: int) -> None:
        if self._output is not None:
            self._output.add(token_id)
        if self._seen is not None:
            self._seen.add(token_id)

    def _modify(self, logits: NDArray[np.float32], num_output: int) -> NDArray[np.float32]:
        """A copy after penalties, bias and masks."""
        sampling = self._params.sampling
        logits = logits.astype(np.float32, copy=True)
        if self._seen is not None:
            ids = self._seen.ids
            penalty = np.float32(sampling.repetition_penalty)
            seen = logits[ids]
            logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._output is not None:
            logits[self._output.ids] -= np.float32(sampling.presence_penalty) + (
                np.float32(sampling.frequency_penalty) * self._output.counts
            )
        if self._bias is not None:
            ids, values = self._bias
            logits[ids] += values
        if self.matcher is not None:
            allowed = self.matcher.allowed()
            if self.matcher.error:  # Its mask would only say that the output may end.
                raise SamplingError(f"the constraint can't be followed: {self.matcher.error}")
            logits[~allowed] = -np.inf
        if num_output < self._min_tokens and self._end_ids.size:
            held_off = logits[self._end_ids].copy()
            logits[self._end_ids] = -np.inf
            if self.matcher is not None and logits.max() == -np.inf:
                # The language allows nothing but the end, and nobody can wait for more.
                logits[self._end_ids] = held_off
        highest = logits.max()
        if highest == -np.inf or np.isnan(highest):
            raise SamplingError("the parameters leave no token to choose from")
        return logits

    def _draw(self, logits: NDArray[np.float32], u: float) -> int:
        """The token at which the cumulated probability passes `u`."""
        sampling = self._params.sampling
        if 0 < sampling.top_k < self._vocab_size:
            ids = _highest(logits, sampling.top_k)
        else:
            ids = np.flatnonzero(logits > -np.inf)
        scaled = logits[ids].astype(np.float64) / sampling.temperature
        scaled -= scaled.max()
        if sampling.top_p < 1.0:
            kept = _nucleus(scaled, sampling.top_p)
            ids, scaled = ids[kept], scaled[kept]
        if sampling.min_p > 0.0:
            kept = scaled >= math.log(sampling.min_p)
            ids, scaled = ids[kept], scaled[kept]
        cumulated = np.exp(scaled).cumsum()
        index = int(cumulated.searchsorted(u * cumulated[-1], side="right"))
        return int(ids[min(index, len(ids) - 1)])


def token_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of the chosen token and of the `num_top` most probable ones."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = math.log(float(np.exp(shifted).sum()))
    top = _highest(logits, num_top) if num_top else np.empty(0, dtype=np.intp)
    top = top[np.argsort(-logits[top], kind="stable")]
    return TokenLogprobs(
        logprob=float(np.float32(shifted[token_id] - total)),
        top_token_ids=tuple(map(int, top)),
        top_logprobs=tuple(float(np.float32(shifted[i] - total)) for i in top),
    )


def _highest(logits: NDArray[np.float32], num: int) -> NDArray[np.intp]:
    """The ids of the `num` highest logits, ascending; among equals the lowest ids."""
    num = min(num, len(logits))
    threshold = np.partition(logits, len(logits) - num)[len(logits) - num]
    above = np.flatnonzero(logits > threshold)
    if threshold == -np.inf:
        return above
    equal = np.flatnonzero(logits == threshold)[: num - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(scaled: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indexes, ascending, of the most probable tokens that together reach `top_p`."""
    weights = np.exp(scaled)
    total = float(weights.sum())
    # All tokens below this together have less than 1 - top_p, so none of them is ever needed;
    # sorting the few others is what makes this fast for a large vocabulary.
    floor = total * (1.0 - top_p) / len(weights)
    few = np.flatnonzero(weights >= floor)
    order = few[np.argsort(-weights[few], kind="stable")]
    reached = int(weights[order].cumsum().searchsorted(top_p * total, side="left"))
    return np.sort(order[: reached + 1])


def _as_arrays(bias: Mapping[int, float]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Ids in order, and their values."""
    ids = sorted(bias)
    return np.array(ids, dtype=np.intp), np.array([bias[i] for i in ids], dtype=np.float32)


@lru_cache(maxsize=256)
def _sorted(some: frozenset[int], others: frozenset[int]) -> NDArray[np.intp]:
    """The ids in order. Most sequences have the same, and many begin at once; nobody writes."""
    ids = np.array(sorted(some | others), dtype=np.intp)
    ids.flags.writeable = False
    return ids


def _penalises_output(params: GenerationParams) -> bool:
    sampling = params.sampling
    return sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class _Counter:
    """Distinct tokens and how often each came, as arrays that grow."""

    __slots__ = ("_counts", "_ids", "_index_of")

    def __init__(self) -> None:
        self._index_of: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.intp)
        self._counts = np.empty(64, dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.intp]:
        return self._ids[: len(self._index_of)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._index_of)]

    def add(self, token_id: int) -> None:
        index = self._index_of.get(token_id)
        if index is not None:
            self._counts[index] += 1.0
            return
        index = self._index_of[token_id] = len(self._index_of)
        if index == len(self._ids):
            self._ids = np.resize(self._ids, 2 * index)
            self._counts = np.resize(self._counts, 2 * index)
        self._ids[index] = token_id
        self._counts[index] = 1.0
