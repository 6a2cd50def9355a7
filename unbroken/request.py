"""Turns keywords of `Client.generate` into a request of the contract."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypedDict

from unbroken.errors import InvalidField
from unbroken.v1 import inference_service_pb2 as pb


class Params(TypedDict, total=False):
    """What shapes an output. Absent means the default; generation.proto has ranges and meanings."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    include_stop: bool
    json_schema: str
    json_object: bool
    regex: str
    lark: str
    choice: Sequence[str]
    num_top_logprobs: int


class Options(TypedDict, total=False):
    """What concerns a request apart from its prompt and output."""

    request_id: str
    model: str
    num_choices: int
    continuation: pb.ContinuationPolicy.ValueType
    migrations_max: int
    priority: int
    tenant: str
    parent_request_id: str
    orphan_grace_s: float
    """How long the generation goes on after its frontend was lost."""
    reader_grace_s: float
    """How long it goes on after its reader left."""


class GenerateOptions(Params, Options, total=False):
    """All keywords of `generate` apart from the prompt and the timeout."""


def request_to_proto(
    prompt: str | None,
    token_ids: Iterable[int] | None,
    messages: Iterable[Mapping[str, str]] | None,
    options: GenerateOptions,
) -> pb.GenerateRequest:
    """The request of the contract; raises `InvalidField` for what it cannot say."""
    prompts = {"prompt": prompt, "token_ids": token_ids, "messages": messages}
    given = [name for name, value in prompts.items() if value is not None]
    if len(given) != 1:
        raise InvalidField("prompt", "exactly one of prompt, token_ids, messages", given)
    languages = sorted(_LANGUAGES & options.keys())
    if len(languages) > 1:
        raise InvalidField("constraint", "at most one", languages)
    request = pb.GenerateRequest()
    for name, value in (prompts | options).items():
        if value is None:
            continue
        try:
            _set(request, name, value)
        except (TypeError, ValueError) as error:  # protobuf's; its text names types and ranges.
            raise InvalidField(name, f"what its field can hold ({error})", value) from error
    return request


_LANGUAGES: Final = frozenset({"json_schema", "json_object", "regex", "lark", "choice"})


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """Put one keyword where it belongs; raises TypeError or ValueError if it does not fit."""
    params = request.params
    match name:
        case "prompt":
            request.text = value
        case "token_ids":
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(value)
        case "messages":
            request.chat.SetInParent()
            for message in value:
                request.chat.messages.add(**message)
        case "num_top_logprobs":
            params.logprobs.SetInParent()
            params.logprobs.num_top = value
        case "choice":
            params.constraint.choice.SetInParent()
            params.constraint.choice.options.extend(value)
        case "orphan_grace_s" | "reader_grace_s":
            getattr(request, name.removesuffix("_s")).FromNanoseconds(round(value * 1e9))
        case "logit_bias":
            params.sampling.logit_bias.update(value)
        case "stop" | "stop_token_ids":
            if isinstance(value, str):
                raise TypeError("a list, not a text")
            getattr(params.stopping, name).extend(value)
        case _ if name in _LANGUAGES:
            setattr(params.constraint, name, value)
        case _ if name in Options.__annotations__:
            setattr(request, name, value)
        case _ if name in Params.__annotations__:
            is_sampling = name in params.sampling.DESCRIPTOR.fields_by_name
            setattr(params.sampling if is_sampling else params.stopping, name, value)
        case _:
            raise TypeError("`generate` has no such keyword")
