"""What a caller may ask of a generation: the validated, immutable form of `generation.proto`.

Frontends validate what clients send, workers what sidecars send, with the same code, so both refuse
the same nonsense.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, TypeAlias

from unbroken.errors import InvalidField
from unbroken.v1 import generation_pb2 as pb

STOP_STRINGS_MAX = 16
STOP_STRING_BYTES_MAX = 256
STOP_TOKENS_MAX = 64
LOGIT_BIAS_MAX = 1024
CONSTRAINT_BYTES_MAX = 64 * 1024
CHOICE_OPTIONS_MAX = 1024
TOP_LOGPROBS_MAX = 20
PARAMS_REMEMBERED = 256
"""Different ones that are not validated again,"""
PARAMS_REMEMBERED_BYTES_MAX = 1024
"""unless they are larger."""

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `seed` is None only before admission, or when greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When an output ends. `max_tokens` is None only before admission."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_stop: bool = False


ConstraintKind: TypeAlias = Literal["json_schema", "json_object", "regex", "lark", "choice"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The language an output must belong to: `text` in the notation of `kind`, or `options`."""

    kind: ConstraintKind
    text: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Everything that shapes an output apart from its prompt."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StopConditions = field(default_factory=StopConditions)
    constraint: Constraint | None = None
    num_top_logprobs: int | None = None
    """None: no log probabilities; otherwise how many alternatives beside the chosen token."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the distribution before temperature and filters."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def params_from_proto(message: pb.GenerationParams, *, vocab_size: int) -> GenerationParams:
    """Validate and convert.

    Raises `InvalidField` for the first field outside its range.
    """
    if message.ByteSize() > PARAMS_REMEMBERED_BYTES_MAX:
        return _params_from_proto(message, vocab_size)
    return _params_from_bytes(message.SerializeToString(), vocab_size)


@lru_cache(maxsize=PARAMS_REMEMBERED)
def _params_from_bytes(message: bytes, vocab_size: int) -> GenerationParams:
    """Most requests of an application, and all streams of a dead worker, have the same few."""
    return _params_from_proto(pb.GenerationParams.FromString(message), vocab_size)


def _params_from_proto(message: pb.GenerationParams, vocab_size: int) -> GenerationParams:
    return GenerationParams(
        sampling=_sampling_from_proto(message.sampling, vocab_size),
        stopping=_stopping_from_proto(message.stopping, vocab_size),
        constraint=_constraint_from_proto(message.constraint),
        num_top_logprobs=(
            int(_within("params.logprobs.num_top", message.logprobs.num_top, 0, TOP_LOGPROBS_MAX))
            if message.HasField("logprobs")
            else None
        ),
    )


def params_to_proto(params: GenerationParams) -> pb.GenerationParams:
    """The inverse of `params_from_proto`, every default written out."""
    s, stop = params.sampling, params.stopping
    message = pb.GenerationParams(
        sampling=pb.SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            logit_bias=s.logit_bias,
        ),
        stopping=pb.StopConditions(
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens,
            stop=stop.stop,
            stop_token_ids=sorted(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
            include_stop=stop.include_stop,
        ),
    )
    if params.constraint is not None:
        message.constraint.CopyFrom(_constraint_to_proto(params.constraint))
    if params.num_top_logprobs is not None:
        message.logprobs.num_top = params.num_top_logprobs
        message.logprobs.SetInParent()
    return message


def logprobs_from_proto(message: pb.TokenLogprobs) -> TokenLogprobs:
    """Convert one position's log probabilities."""
    return TokenLogprobs(message.logprob, tuple(message.top_token_ids), tuple(message.top_logprobs))


def logprobs_to_proto(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """Convert one position's log probabilities."""
    return pb.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def check_token_ids(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise `InvalidField` unless every id is below `vocab_size`."""
    if token_ids and max(token_ids) >= vocab_size:
        index = next(i for i, t in enumerate(token_ids) if t >= vocab_size)
        raise InvalidField(f"{name}[{index}]", f"a token id below {vocab_size}", token_ids[index])


def _sampling_from_proto(message: pb.SamplingParams, vocab_size: int) -> SamplingParams:
    default = SamplingParams()
    name = "params.sampling"

    def number(attribute: str, low: float, high: float, *, above: bool = False) -> float:
        if not message.HasField(attribute):  # pyright: ignore[reportArgumentType]
            return float(getattr(default, attribute))
        return _within(f"{name}.{attribute}", getattr(message, attribute), low, high, above=above)

    bias = dict(message.logit_bias)
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidField(f"{name}.logit_bias", f"at most {LOGIT_BIAS_MAX} entries", len(bias))
    for token_id, value in sorted(bias.items()):
        if token_id >= vocab_size:
            raise InvalidField(f"{name}.logit_bias", f"token ids below {vocab_size}", token_id)
        _within(f"{name}.logit_bias[{token_id}]", value, -100.0, 100.0)
    return SamplingParams(
        temperature=number("temperature", 0.0, 100.0),
        top_p=number("top_p", 0.0, 1.0, above=True),
        top_k=int(number("top_k", 0, 2**32 - 1)),
        min_p=number("min_p", 0.0, 1.0),
        seed=message.seed if message.HasField("seed") else None,
        presence_penalty=number("presence_penalty", -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", -2.0, 2.0),
        repetition_penalty=number("repetition_penalty", 0.0, 100.0, above=True),
        logit_bias=MappingProxyType(bias),
    )


def _stopping_from_proto(message: pb.StopConditions, vocab_size: int) -> StopConditions:
    name = "params.stopping"
    max_tokens = message.max_tokens if message.HasField("max_tokens") else None
    if max_tokens == 0:
        raise InvalidField(f"{name}.max_tokens", "at least 1", max_tokens)
    if max_tokens is not None and message.min_tokens > max_tokens:
        raise InvalidField(
            f"{name}.min_tokens", f"at most max_tokens ({max_tokens})", message.min_tokens
        )
    if len(message.stop) > STOP_STRINGS_MAX:
        raise InvalidField(f"{name}.stop", f"at most {STOP_STRINGS_MAX} strings", len(message.stop))
    for index, stop in enumerate(message.stop):
        if not 1 <= len(stop.encode()) <= STOP_STRING_BYTES_MAX:
            raise InvalidField(
                f"{name}.stop[{index}]", f"1 to {STOP_STRING_BYTES_MAX} bytes of UTF-8", stop
            )
    if len(message.stop_token_ids) > STOP_TOKENS_MAX:
        raise InvalidField(
            f"{name}.stop_token_ids", f"at most {STOP_TOKENS_MAX} ids", len(message.stop_token_ids)
        )
    check_token_ids(f"{name}.stop_token_ids", tuple(message.stop_token_ids), vocab_size)
    return StopConditions(
        max_tokens=max_tokens,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
    )


def _constraint_from_proto(message: pb.Constraint) -> Constraint | None:
    name = "params.constraint"
    kind = message.WhichOneof("language")
    if message.ByteSize() > CONSTRAINT_BYTES_MAX:
        raise InvalidField(name, f"at most {CONSTRAINT_BYTES_MAX} bytes", message.ByteSize())
    match kind:
        case None:
            return None
        case "json_object":
            if not message.json_object:
                raise InvalidField(f"{name}.json_object", "true, or no constraint", False)
            return Constraint(kind)
        case "choice":
            options = tuple(message.choice.options)
            if not 1 <= len(options) <= CHOICE_OPTIONS_MAX or not all(options):
                raise InvalidField(
                    f"{name}.choice.options",
                    f"1 to {CHOICE_OPTIONS_MAX} strings, none empty",
                    options,
                )
            return Constraint(kind, options=options)
        case "json_schema" | "regex" | "lark":
            text = str(getattr(message, kind))
            if not text:
                raise InvalidField(f"{name}.{kind}", "a text that is not empty", text)
            return Constraint(kind, text=text)


def _constraint_to_proto(constraint: Constraint) -> pb.Constraint:
    match constraint.kind:
        case "json_schema":
            return pb.Constraint(json_schema=constraint.text)
        case "json_object":
            return pb.Constraint(json_object=True)
        case "regex":
            return pb.Constraint(regex=constraint.text)
        case "lark":
            return pb.Constraint(lark=constraint.text)
        case "choice":
            return pb.Constraint(choice=pb.Choice(options=constraint.options))


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> float:
    """`value`, if it is a number from `low` (exclusive if `above`) to `high`."""
    if math.isnan(value) or not low <= value <= high or (above and value == low):
        bound = f"above {low:g}, up to {high:g}" if above else f"{low:g} to {high:g}"
        raise InvalidField(name, bound, value)
    return value
