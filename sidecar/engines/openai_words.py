"""What OpenAI's HTTP says, and what servers of different makes understand of it. No I/O."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, cast

from sidecar.engines.adapter import END_REASONS, Call, CallFailed, Delta, End
from unbroken.generation import Constraint, TokenLogprobs
from unbroken.outcome import FailureKind, FinishReason
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import worker_pb2

_OVERLOADED: Final = 429
_UNAVAILABLE: Final = 503


class Ids(Enum):
    """Where the ids of tokens stand in an answer."""

    OWN_FIELD = auto()
    IN_LOGPROBS = auto()
    NOWHERE = auto()


@dataclass(frozen=True, slots=True)
class Product:
    """A server, and what it understands beyond OpenAI's own parameters."""

    kind: str
    capabilities: worker_pb2.EngineCapabilities
    extras: frozenset[str] = frozenset()
    """Of: top_k, min_p, penalties, repetition_penalty, min_tokens, stop_token_ids, ignore_eos."""


VLLM: Final = Product(
    "vllm",
    worker_pb2.EngineCapabilities(
        random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL,
        repetition_penalty_counts_prompt=True,
        logit_bias=True,
        constraints=worker_pb2.ConstraintCapabilities(
            json_schema=True, json_object=True, regex=True, choice=True
        ),
        logprobs=True,
        seed_bits=31,
    ),
    frozenset(
        {
            *("top_k", "min_p", "penalties", "repetition_penalty"),
            *("min_tokens", "stop_token_ids", "ignore_eos"),
        }
    ),
)
LLAMA: Final = Product(
    "llama-server",  # Its penalties count the prompt, which is not what is asked for.
    worker_pb2.EngineCapabilities(
        random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL,
        logit_bias=True,
        constraints=worker_pb2.ConstraintCapabilities(json_schema=True),
        seed_bits=31,
    ),
    frozenset({"top_k", "min_p", "ignore_eos"}),
)
OTHER: Final = Product(
    "openai",
    worker_pb2.EngineCapabilities(
        random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL, logit_bias=True, seed_bits=31
    ),
    frozenset({"penalties"}),
)


def lacking(call: Call, product: Product) -> str | None:
    """What is asked that this server would leave out."""
    sampling, stopping = call.params.sampling, call.params.stopping
    asked = {
        "top_k": sampling.top_k != 0 and not sampling.is_greedy,
        "min_p": sampling.min_p != 0 and not sampling.is_greedy,
        "penalties": sampling.presence_penalty != 0 or sampling.frequency_penalty != 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_tokens": stopping.min_tokens > 0,
        # Of one token it makes no difference.
        "ignore_eos": stopping.ignore_eos and call.max_tokens > 1,
    }
    if product is LLAMA and stopping.ignore_eos and call.params.constraint is not None:
        # Its end is a token that may then never come, so behind a grammar's end it gives nonsense.
        return "ignore_eos beside a constraint"
    return next((x for x, is_it in asked.items() if is_it and x not in product.extras), None)


def body_of(
    call: Call, product: Product, ids: Ids, *, model: str, prompt: list[int] | str
) -> dict[str, object]:
    """A call in its words."""
    sampling, stopping = call.params.sampling, call.params.stopping
    extras = product.extras
    num_top = call.params.num_top_logprobs
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": call.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": 1,
    }
    if not sampling.is_greedy:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if ids is Ids.OWN_FIELD:
        body["return_token_ids"] = True
    elif ids is Ids.IN_LOGPROBS:
        body["logprobs"] = 1
    if num_top is not None:
        body["logprobs"] = num_top
        body["return_tokens_as_token_ids"] = True
    values: dict[str, object] = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "min_tokens": stopping.min_tokens,
        "stop_token_ids": sorted(stopping.stop_token_ids),
        "ignore_eos": stopping.ignore_eos,
    }
    body |= {name: value for name, value in values.items() if name in extras}
    if "penalties" in extras:
        body["presence_penalty"] = sampling.presence_penalty
        body["frequency_penalty"] = sampling.frequency_penalty
    if call.params.constraint is not None:
        body |= _constraint(product, call.params.constraint)
    return body


class Reading:
    """What the events of one stream say."""

    def __init__(self, call: Call, ids: Ids, product: Product, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._ids = ids
        self._tokenizer = tokenizer
        self._num_tokens = 0
        self._end: End | None = None
        self._cached_tokens = 0
        stopping = call.params.stopping
        sees_stops = "stop_token_ids" not in product.extras
        self._stops = stopping.stop_token_ids if sees_stops else frozenset[int]()

    def heard(self, event: Mapping[str, object]) -> Delta | None:
        """One event. Raises `CallFailed`."""
        if (error := event.get("error")) is not None:
            told = mapping(error)
            kind = kind_of(number(told.get("code")) or 500)
            raise CallFailed(kind, f"{told.get('message', error)}")
        details = mapping(mapping(event.get("usage")).get("prompt_tokens_details"))
        self._cached_tokens = number(details.get("cached_tokens")) or self._cached_tokens
        choices = listed(event.get("choices"))
        if not choices:
            return None
        choice = mapping(choices[0])
        reason = choice.get("finish_reason")
        if reason:
            stop = choice.get("stop_reason")
            self._end = End(
                END_REASONS.get(str(reason), FinishReason.CANCELLED),
                stop if isinstance(stop, int) else None,
                f"the engine ended the request as {reason!r}",
            )
        token_ids = self._token_ids(choice)
        for index, token_id in enumerate(token_ids):
            if token_id in self._stops:
                end = End(FinishReason.STOP, token_id)
                return Delta(token_ids[: index + 1], (), self._cached_tokens, end)
        if not token_ids:
            return None
        self._num_tokens += len(token_ids)
        num_top = self._call.params.num_top_logprobs
        logprobs = () if num_top is None else _logprobs(choice, num_top)
        return Delta(token_ids, logprobs, self._cached_tokens)

    def ended(self) -> Delta | None:
        """The last word, once the stream is over and told how much it used; None: there is none."""
        return None if self._end is None else Delta((), (), self._cached_tokens, self._end)

    def _token_ids(self, choice: Mapping[str, object]) -> list[int]:
        match self._ids:
            case Ids.OWN_FIELD:
                return list(map(_token_id, listed(choice.get("token_ids"))))
            case Ids.IN_LOGPROBS:
                content = listed(mapping(choice.get("logprobs")).get("content"))
                return [_token_id(mapping(one).get("id")) for one in content]
            case Ids.NOWHERE:
                text = choice.get("text")
                assert self._tokenizer is not None, "discovered before"
                if not isinstance(text, str) or not text:
                    return []
                return self._tokenizer.encode(text, add_special=False)


def _logprobs(choice: Mapping[str, object], num_top: int) -> list[TokenLogprobs]:
    """As vLLM gives them when tokens are to be named by their ids: {"token_id:5": -0.1}."""
    told = mapping(choice.get("logprobs"))
    tops = listed(told.get("top_logprobs"))
    result: list[TokenLogprobs] = []
    for index, logprob in enumerate(cast(list[Any], listed(told.get("token_logprobs")))):
        named = mapping(tops[index] if index < len(tops) else None)
        pairs = sorted(
            (-float(cast(float, value)), int(name.rpartition(":")[2]))
            for name, value in named.items()
            if name.startswith("token_id:")
        )[:num_top]
        ids, values = tuple(one[1] for one in pairs), tuple(-one[0] for one in pairs)
        result.append(TokenLogprobs(float(logprob), ids, values))
    return result


def _constraint(product: Product, constraint: Constraint) -> Mapping[str, object]:
    if product is LLAMA:
        return {"json_schema": parsed(constraint.text)}
    match constraint.kind:
        case "json_schema":
            return {"structured_outputs": {"json": parsed(constraint.text)}}
        case "json_object":
            return {"structured_outputs": {"json_object": True}}
        case "regex":
            return {"structured_outputs": {"regex": constraint.text}}
        case "choice":
            return {"structured_outputs": {"choice": list(constraint.options)}}
        case "lark":
            raise AssertionError("not among its capabilities")


def kind_of(status: int) -> FailureKind:
    """What an HTTP status means."""
    if status == _OVERLOADED:
        return FailureKind.OVERLOAD
    if status == _UNAVAILABLE:
        return FailureKind.CRASH
    return FailureKind.REJECTED if 400 <= status < 500 else FailureKind.ENGINE_ERROR


def parsed(data: str | bytes) -> Mapping[str, object]:
    """A JSON object. Raises `CallFailed`."""
    try:
        return mapping(json.loads(data))
    except ValueError as error:
        raise CallFailed(FailureKind.PROTOCOL, f"expected JSON: {error}") from error


def _token_id(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise CallFailed(FailureKind.PROTOCOL, f"expected a token id, got {value!r}")
    return value


def mapping(value: object) -> Mapping[str, object]:
    """The object that is expected; an empty one if it is something else."""
    return cast(Mapping[str, object], value) if isinstance(value, dict) else {}


def listed(value: object) -> list[object]:
    """The list that is expected, as above."""
    return cast(list[object], value) if isinstance(value, list) else []


def number(value: object) -> int:
    """The number that is expected; 0 if it is something else."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < math.inf else 0
