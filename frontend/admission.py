"""Turns what a client asks into a resolved request, or refuses it: pure, given random numbers.

What must not be decided twice is decided here: token ids, seeds, the budget, the class of
continuation. Each choice of the result is a checkpoint that any worker of the model understands.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, get_args

from google.protobuf.duration_pb2 import Duration

from frontend.continuation import Abilities
from frontend.stream import announced_way
from unbroken.checkpoint import Checkpoint
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.generation import (
    ConstraintKind,
    GenerationParams,
    check_token_ids,
    params_from_proto,
)
from unbroken.outcome import ContinuationClass, ContinuationPolicy
from unbroken.tokenizer import ChatTemplateError, Tokenizer
from unbroken.v1 import inference_service_pb2 as pb

if TYPE_CHECKING:  # Randomness comes in; there is none of our own.
    from random import Random

ID_CHARS_MAX: Final = 128
TEXT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of a prompt as text or chat; far above any context window."""
CHAT_MESSAGES_MAX: Final = 4096
CHOICES_MAX: Final = 16
PRIORITY_MAX: Final = 100
MIGRATIONS_MAX: Final = 1000
GRACE_S_MAX: Final = 600.0
ORPHAN_GRACE_S_DEFAULT: Final = 5.0
ROLES: Final = ("system", "user", "assistant", "tool")

_PRINTABLE = frozenset(string.printable) - frozenset(string.whitespace) | {" "}
_SEED_MODULUS = 1 << 64
_TEXT_BYTES_PER_TOKEN = 4
"""About, of English text and most vocabularies."""


@dataclass(frozen=True, slots=True)
class Model:
    """What requests for one model are checked against: the union of what its workers can do."""

    name: str
    tokenizer: Tokenizer
    tokenizer_fingerprint: str
    context_length: int
    abilities: tuple[Abilities, ...]
    """Of the workers that are known, without repetitions; at least one."""
    has_logit_bias: bool = True
    constraints: frozenset[str] = frozenset(get_args(ConstraintKind))
    has_logprobs: bool = True
    seed_bits: int = 64
    """Bits of seed that every worker which takes seeds accepts."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What is known of a request before its model is: who asks, and under which terms."""

    request_id: str
    model: str
    """Empty: the only one there is."""
    num_choices: int
    policy: ContinuationPolicy
    migrations_max: int
    priority: int
    tenant: str
    parent_request_id: str
    orphan_grace_s: float
    reader_grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """A resolved request."""

    envelope: Envelope
    model: Model
    checkpoints: tuple[Checkpoint, ...]
    """One per choice."""
    continuation_class: ContinuationClass
    continuation_detail: str
    """Why it is not exact; empty if it is."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.checkpoints[0].prompt_token_ids)

    @property
    def seed(self) -> int | None:
        """Of choice 0; None when greedy."""
        sampling = self.checkpoints[0].params.sampling
        return None if sampling.is_greedy else sampling.seed

    @property
    def max_tokens(self) -> int:
        """The budget of each choice."""
        max_tokens = self.checkpoints[0].params.stopping.max_tokens
        assert max_tokens is not None, "admission resolves max_tokens"
        return max_tokens


@dataclass(frozen=True, slots=True)
class Decided:
    """What the frontend that admitted a request first decided about it."""

    prompt_is_same: Callable[[Sequence[int]], bool]
    """Whether these are the prompt's ids."""
    tokenizer_fingerprint: str
    seed: int | None
    """Of choice 0; None when greedy."""
    max_tokens: int


def open_envelope(
    request: pb.GenerateRequest,
    *,
    new_request_id: Callable[[], str],
    migrations_max: int,
    policy: ContinuationPolicy,
) -> Envelope:
    """Check all that needs no model; `migrations_max` and `policy` are the frontend's defaults.

    Raises `InvalidField`.
    """
    if request.continuation not in pb.ContinuationPolicy.values():
        raise InvalidField("continuation", "a known ContinuationPolicy", request.continuation)
    if request.continuation != pb.CONTINUATION_POLICY_UNSPECIFIED:
        policy = ContinuationPolicy(request.continuation)
    if request.HasField("migrations_max"):
        migrations_max = _within("migrations_max", request.migrations_max, 0, MIGRATIONS_MAX)
        if migrations_max == 0 and policy is ContinuationPolicy.REQUIRE_EXACT:
            raise InvalidField("migrations_max", "at least 1 with REQUIRE_EXACT", 0)
    request_id = _identifier("request_id", request.request_id)
    parent_request_id = _identifier("parent_request_id", request.parent_request_id)
    if request_id and parent_request_id == request_id:
        raise InvalidField("parent_request_id", "another request", parent_request_id)
    return Envelope(
        request_id=request_id or new_request_id(),
        model=request.model,
        num_choices=_within("num_choices", request.num_choices, 0, CHOICES_MAX) or 1,
        policy=policy,
        migrations_max=migrations_max,
        priority=_within("priority", request.priority, -PRIORITY_MAX, PRIORITY_MAX),
        tenant=_identifier("tenant", request.tenant),
        parent_request_id=parent_request_id,
        orphan_grace_s=(
            _grace_s("orphan_grace", request.orphan_grace)
            if request.HasField("orphan_grace")
            else ORPHAN_GRACE_S_DEFAULT
        ),
        reader_grace_s=_grace_s("reader_grace", request.reader_grace),
    )


def choose_model(asked: str, known: Sequence[str]) -> str | None:
    """The name of the model to ask, among the names of those that are known.

    None: no name was given and no model is known yet. Raises MODEL_NOT_FOUND or `InvalidField`.
    """
    if asked:
        if asked not in known:
            raise UnbrokenError(
                Reason.MODEL_NOT_FOUND,
                f"expected a model that is served, got {_shown(asked)}; "
                f"known: {_shown(', '.join(known)) if known else 'none'}",
                metadata={"model": asked},
            )
        return asked
    if len(known) > 1:
        raise InvalidField("model", f"one of {_shown(', '.join(known))}", asked)
    return known[0] if known else None


def admit(
    request: pb.GenerateRequest, envelope: Envelope, model: Model, random: "Random"
) -> Admitted:
    """Resolve everything. Takes milliseconds for long texts; safe in a thread.

    Raises `InvalidField`, and NOT_CONTINUABLE for a request that demands the impossible.
    """
    vocab_size = model.tokenizer.asset.vocab_size
    params = params_from_proto(request.params, vocab_size=vocab_size)
    _check_abilities(params, model)
    name, prompt = _prompt(request, model.tokenizer)
    room = model.context_length - len(prompt)
    if room < 1:
        raise InvalidField(
            name,
            f"a prompt of at most {model.context_length - 1} tokens (the context of "
            f"{model.name} holds {model.context_length} with the output)",
            len(prompt),
        )
    params = _with_budget(params, room)
    params = _with_seed(params, model, envelope.num_choices, random)
    return _admitted(prompt, params, envelope, model)


def admit_again(
    request: pb.GenerateRequest, envelope: Envelope, model: Model, decided: Decided
) -> Admitted:
    """Resolve a request as another frontend did. As `admit` otherwise.

    Raises NOT_CONTINUABLE where the same request means something else by now.
    """
    if model.tokenizer_fingerprint != decided.tokenizer_fingerprint:
        raise _changed(model, "its tokenizer is another one")
    params = params_from_proto(request.params, vocab_size=model.tokenizer.asset.vocab_size)
    _, prompt = _prompt(request, model.tokenizer)
    if not decided.prompt_is_same(prompt):
        raise _changed(model, "the request gives other prompt tokens")
    stopping = replace(params.stopping, max_tokens=decided.max_tokens)
    sampling = params.sampling
    if not sampling.is_greedy:
        sampling = replace(sampling, seed=decided.seed)
    return _admitted(prompt, replace(params, stopping=stopping, sampling=sampling), envelope, model)


def _changed(model: Model, what: str) -> UnbrokenError:
    return UnbrokenError(
        Reason.NOT_CONTINUABLE,
        f"{model.name} has changed since the request began: {what}",
        metadata={"model": model.name},
    )


def _admitted(
    prompt: tuple[int, ...], params: GenerationParams, envelope: Envelope, model: Model
) -> Admitted:
    original = Checkpoint(prompt_token_ids=prompt, params=params)
    way, detail = _announced(original, envelope, model)
    return Admitted(
        envelope=envelope,
        model=model,
        checkpoints=tuple(_choice(original, index) for index in range(envelope.num_choices)),
        continuation_class=way,
        continuation_detail=detail,
    )


def num_text_bytes(request: pb.GenerateRequest) -> int:
    """About how much text there is to tokenise."""
    return 0 if request.HasField("token_ids") else request.ByteSize()


def num_prompt_tokens_about(request: pb.GenerateRequest) -> int:
    """About how many tokens the prompt has, before anything is tokenised; at least 1."""
    if request.HasField("token_ids"):
        return max(1, len(request.token_ids.ids))
    return max(1, request.ByteSize() // _TEXT_BYTES_PER_TOKEN)


# The prompt.


def _prompt(request: pb.GenerateRequest, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    """The prompt's ids, and the field they come from."""
    match request.WhichOneof("prompt"):
        case None:
            raise InvalidField("prompt", "one of token_ids, text, chat", None)
        case "token_ids":
            name, ids = "token_ids.ids", tuple(request.token_ids.ids)
            check_token_ids(name, ids, tokenizer.asset.vocab_size)
        case "text":
            name = "text"
            _check_text_bytes(name, len(request.text.encode()))
            if not request.text:
                raise InvalidField(name, "a text that is not empty", request.text)
            bos = tokenizer.asset.bos_token_id
            ids = tuple(tokenizer.encode(request.text, add_special=False))
            ids = ids if bos is None else (bos, *ids)
        case "chat":
            name = "chat.messages"
            ids = tuple(_chat(request.chat, tokenizer))
    if not ids:
        raise InvalidField(name, "at least one token", ())
    return name, ids


def _chat(chat: pb.Chat, tokenizer: Tokenizer) -> list[int]:
    if not 1 <= len(chat.messages) <= CHAT_MESSAGES_MAX:
        raise InvalidField("chat.messages", f"1 to {CHAT_MESSAGES_MAX}", len(chat.messages))
    _check_text_bytes("chat", chat.ByteSize())
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidField(
                f"chat.messages[{index}].role", f"one of {', '.join(ROLES)}", message.role
            )
    try:
        return chat_token_ids(tokenizer, [(m.role, m.content) for m in chat.messages])
    except ChatTemplateError as error:
        raise InvalidField("chat", "a chat that the model's template renders", str(error)) from (
            error
        )


def chat_token_ids(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[int]:
    """The ids of (role, content) messages, in which only the template speaks special tokens.

    A template yields one text, in which a "<|im_end|>" that a user typed looks like the template's
    own. So such text is broken by a mark before the template sees it, and what the template then
    writes as a special token is one. Without such text, the rendered chat is encoded as it is.

    Two things remain. A tokenizer that treats the beginning of a text apart sees more beginnings
    when there is such text. And special tokens that arise only when the template joins two contents
    with nothing between them are not noticed; no template we know does so.
    """
    special = _special_texts(tokenizer)
    contents = [content for _, content in messages]
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    if pattern is None or not any(pattern.search(content) for content in contents):
        rendered = tokenizer.render_chat([{"role": r, "content": c} for r, c in messages])
        return tokenizer.encode(rendered, add_special=False, parse_special=True)
    mark = _unused_character(contents)
    broken = [
        {"role": role, "content": pattern.sub(lambda m: _broken(m[0], mark), content)}
        for role, content in messages
    ]
    rendered = tokenizer.render_chat(broken)
    ids: list[int] = []
    position = 0
    for match in pattern.finditer(rendered):
        ids += _plain(tokenizer, rendered[position : match.start()], mark)
        ids.append(special[match[0]])
        position = match.end()
    return ids + _plain(tokenizer, rendered[position:], mark)


def _special_texts(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by what they look like, longest first."""
    texts = {
        tokenizer.pieces[token_id].decode(errors="replace"): token_id
        for token_id in tokenizer.special_ids
    }
    return dict(sorted(texts.items(), key=lambda item: (-len(item[0]), item[0])))


def _broken(text: str, mark: str) -> str:
    """With the mark after each character, so that no special token is left within it."""
    return mark.join(text) + mark


def _unused_character(contents: Sequence[str]) -> str:
    """A character of Unicode's private use area that none of the contents has."""
    used = set[str]().union(*contents)
    return next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)


def _plain(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    text = text.replace(mark, "")
    return tokenizer.encode(text, add_special=False) if text else []


# The parameters.


def _check_abilities(params: GenerationParams, model: Model) -> None:
    asked = {
        "params.sampling.logit_bias": (bool(params.sampling.logit_bias), model.has_logit_bias),
        "params.constraint": (
            params.constraint is not None,
            params.constraint is None or params.constraint.kind in model.constraints,
        ),
        "params.logprobs": (params.num_top_logprobs is not None, model.has_logprobs),
    }
    for field, (is_used, is_served) in asked.items():
        if is_used and not is_served:
            raise InvalidField(field, f"none, as no engine of {model.name} has it", "some")


def _with_budget(params: GenerationParams, room: int) -> GenerationParams:
    """With max_tokens, no more than there is room in the context."""
    stopping = params.stopping
    max_tokens = room if stopping.max_tokens is None else min(stopping.max_tokens, room)
    if stopping.min_tokens > max_tokens:
        raise InvalidField(
            "params.stopping.min_tokens",
            f"at most the {max_tokens} tokens for which there is room after the prompt",
            stopping.min_tokens,
        )
    return replace(params, stopping=replace(stopping, max_tokens=max_tokens))


def _with_seed(
    params: GenerationParams, model: Model, num_choices: int, random: "Random"
) -> GenerationParams:
    """With a seed whose successors for the other choices the engines accept as well."""
    sampling = params.sampling
    if sampling.is_greedy:
        return params
    if sampling.seed is None:
        seed = random.randrange((1 << model.seed_bits) - CHOICES_MAX)
        return replace(params, sampling=replace(sampling, seed=seed))
    if (sampling.seed + num_choices - 1) % _SEED_MODULUS >> model.seed_bits:
        raise InvalidField(
            "params.sampling.seed",
            f"seeds of at most {model.seed_bits} bits for the choices of {model.name}",
            sampling.seed,
        )
    return params


def _choice(original: Checkpoint, index: int) -> Checkpoint:
    sampling = original.params.sampling
    if index == 0 or sampling.seed is None:
        return original
    seed = (sampling.seed + index) % _SEED_MODULUS
    params = replace(original.params, sampling=replace(sampling, seed=seed))
    return replace(original, params=params)


def _announced(
    original: Checkpoint, envelope: Envelope, model: Model
) -> tuple[ContinuationClass, str]:
    if envelope.policy is ContinuationPolicy.NEVER:
        return ContinuationClass.NONE, "the request asks not to go on elsewhere"
    if envelope.migrations_max == 0:
        way, detail = ContinuationClass.NONE, "it may lose no worker (migrations_max is 0)"
    else:
        way, detail = announced_way(original, model.abilities)
    if way is not ContinuationClass.NONE:
        return way, ""
    if envelope.policy is ContinuationPolicy.ALLOW_INEXACT and envelope.migrations_max:
        return ContinuationClass.INEXACT, detail
    if envelope.policy is ContinuationPolicy.REQUIRE_EXACT:
        raise UnbrokenError(
            Reason.NOT_CONTINUABLE,
            f"REQUIRE_EXACT, but this request could not go on exactly elsewhere: {detail}",
            metadata={"model": model.name},
        )
    return way, detail


# The envelope.


def _identifier(field: str, text: str) -> str:
    if len(text) > ID_CHARS_MAX or not _PRINTABLE.issuperset(text):
        raise InvalidField(field, f"at most {ID_CHARS_MAX} printable ASCII characters", text)
    return text


def _within(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidField(field, f"{low} to {high}", value)
    return value


def _grace_s(field: str, grace: Duration) -> float:
    seconds = grace.seconds + grace.nanos / 1e9
    if not 0 <= seconds <= GRACE_S_MAX or abs(grace.nanos) >= 10**9:
        raise InvalidField(field, f"0 to {GRACE_S_MAX:g} s", seconds)
    return seconds


def _check_text_bytes(field: str, num_bytes: int) -> None:
    if num_bytes > TEXT_BYTES_MAX:
        raise InvalidField(field, f"at most {TEXT_BYTES_MAX} bytes", num_bytes)


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
