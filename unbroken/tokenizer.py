"""Turns text and chat messages into token ids, and token ids back into text as they arrive.

A worker describes its tokenizer as one `TokenizerAsset`; whoever holds the asset encodes exactly as
that worker's engine would, without an engine:

    prompt  ──encode──▶ ids                      messages ──render_chat──▶ text ──encode──▶ ids
    ids ──Detokenizer.push──▶ text that is certain now, up to the first stop string

`Tokenizer` is immutable after construction and safe to share between threads and streams. A
`Detokenizer` belongs to one stream, and is a pure function of the ids pushed so far: pushed again
from the start after a migration, the same ids bring it to the same state.
"""

import hashlib
import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from unbroken.v1 import worker_pb2

# What a rendered chat may grow to. Far above any context window, far below what hurts a frontend.
RENDERED_CHARS_MAX = 16 * 2**20


class ChatTemplateError(ValueError):
    """The chat template can't be compiled, or refuses or can't render these messages."""


@dataclass(frozen=True)
class TokenizerAsset:
    """Everything that a process needs to tokenise for a model as its engine does."""

    tokenizer_json: bytes  # The format of Hugging Face's `tokenizers`.
    chat_template: str  # Jinja; empty if the model has none.
    bos_token_id: int | None
    eos_token_ids: frozenset[int]  # Every id that ends a generation.
    vocab_size: int  # Rows of the model's output, with padding; ids are below it.
    # The one among `eos_token_ids` that chat templates call `eos_token`; may be None if they are
    # fewer than two.
    eos_token_id: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        """128 bits in hex; equal exactly if two assets are equal."""
        ids = (self.bos_token_id, self.eos_token_id, self.vocab_size, sorted(self.eos_token_ids))
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokenizer_json, self.chat_template.encode(), json.dumps(ids).encode()):
            digest.update(len(part).to_bytes(8, "little"))  # Else parts could trade bytes.
            digest.update(part)
        return digest.hexdigest()


def asset_to_proto(asset: TokenizerAsset) -> worker_pb2.Tokenizer:
    """The asset as the contract carries it."""
    return worker_pb2.Tokenizer(
        tokenizer_json=asset.tokenizer_json,
        chat_template=asset.chat_template,
        bos_token_id=asset.bos_token_id,
        eos_token_ids=sorted(asset.eos_token_ids),
        vocab_size=asset.vocab_size,
        eos_token_id=asset.eos_token_id,
    )


def asset_from_proto(message: worker_pb2.Tokenizer) -> TokenizerAsset:
    """The inverse of `asset_to_proto`."""
    return TokenizerAsset(
        tokenizer_json=message.tokenizer_json,
        chat_template=message.chat_template,
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        eos_token_ids=frozenset(message.eos_token_ids),
        vocab_size=message.vocab_size,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
    )


class Tokenizer:
    """Encodes and renders for one model.

    Raises:
        ValueError: `tokenizer_json` is not a tokenizer that we can read.
    """

    def __init__(self, asset: TokenizerAsset) -> None:
        self.asset = asset
        self._trusting = _load(asset.tokenizer_json)
        # The switch belongs to the object, not to the call, so each of the two ways has its own.
        self._plain = _load(asset.tokenizer_json)
        self._plain.encode_special_tokens = True

        added = self._trusting.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.pieces: Sequence[bytes] = _pieces(self._trusting, asset.vocab_size)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: Well-formed Unicode, as in any protobuf; a lone surrogate is a `TypeError`.
            add_special: Frame the ids as the model was trained to see a document, usually with BOS.
            parse_special: Whether the text of a special token ("<|im_end|>") stands for that token.
                True only for text that a template wrote: in a plain prompt it is just characters.
        """
        encoder = self._trusting if parse_special else self._plain
        return encoder.encode(text, add_special_tokens=add_special).ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt for `messages`, to encode with `add_special=False, parse_special=True`.

        The template runs in a sandbox; what the messages say is data to it, never a template.

        Args:
            messages: JSON-like values, each with at least what the template reads ("role" and
                "content").
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.
            now: What the template's `strftime_now` shows; the local time if None.

        Raises:
            ChatTemplateError: The model has no template, it is broken, or it refuses the messages.
        """
        variables: dict[str, object] = {
            "messages": list(messages),
            "tools": list(tools) if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._text_of(self.asset.bos_token_id),
            "eos_token": self._eos_text(),
            "strftime_now": (now or datetime.now()).strftime,
        }
        chunks: list[str] = []
        num_chars = 0
        try:
            for chunk in self._chat_template.generate(variables):
                num_chars += len(chunk)
                if num_chars > RENDERED_CHARS_MAX:
                    raise ChatTemplateError(f"the chat renders to over {RENDERED_CHARS_MAX} chars")
                chunks.append(chunk)
        except ChatTemplateError:
            raise
        except Exception as error:  # A template is a program: it can fail in any way there is.
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        return "".join(chunks)

    def detokenizer(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> "Detokenizer":
        """A fresh `Detokenizer` for one stream, which shows no special tokens."""
        return Detokenizer(self.pieces, stop, include_stop, self.special_ids, self.texts)

    @cached_property
    def texts(self) -> Sequence[str | None]:
        """What each id says by itself; None if that depends on its neighbours."""
        return ["" if i in self.special_ids else _text(p) for i, p in enumerate(self.pieces)]

    @cached_property
    def _chat_template(self) -> jinja2.Template:
        if not self.asset.chat_template:
            raise ChatTemplateError("the model has no chat template")
        try:
            return _chat_environment().from_string(self.asset.chat_template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template is broken: {error}") from error

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._trusting.id_to_token(token_id) or ""

    def _eos_text(self) -> str | jinja2.Undefined:
        eos_token_id, ids = self.asset.eos_token_id, self.asset.eos_token_ids
        if eos_token_id is None and len(ids) > 1:
            # A guess would be silently wrong, so only a template that asks for it fails.
            return jinja2.StrictUndefined("eos_token is ambiguous: the asset names several")
        return self._text_of(eos_token_id if eos_token_id is not None else next(iter(ids), None))


def _load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # The binding raises bare exceptions.
        raise ValueError(f"tokenizer_json is not a tokenizer: {error}") from error
    # Files carry these settings from training; a prompt is never cut or filled up in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# Pieces: the bytes that each id stands for.


def _pieces(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of each id, indexed by id; b"" for the padding of the vocabulary."""
    # Whether tokens are written in GPT-2's alphabet, the model's own decoder knows best.
    is_byte_level = tokenizer.decoder is not None and tokenizer.decoder.decode(["aĠb"]) == "a b"
    piece_of = _byte_level_piece if is_byte_level else _sentence_piece

    vocab = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * max(vocab_size, 1 + max(vocab.values(), default=-1))
    for token, token_id in vocab.items():
        pieces[token_id] = piece_of(token)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        pieces[token_id] = token.content.encode()  # Added tokens are text, not in any alphabet.
    return tuple(pieces)


def _text(piece: bytes) -> str | None:
    """What whole characters spell; None for bytes that need others to be any."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in GPT-2's alphabet.

    A byte that is a printable Latin-1 character stands for itself; the other bytes, in order, are
    U+0100, U+0101 and so on. Source: `bytes_to_unicode` in openai/gpt-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTE_OF_CHAR: Mapping[str, int] = _byte_alphabet()
_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # Not in the alphabet: `tokenizers` takes such a token as plain text, too.
        return token.encode()


def _sentence_piece(token: str) -> bytes:
    if byte := _BYTE_FALLBACK.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


# Chat templates, as Hugging Face's `transformers` runs them.


@cache
def _chat_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    filters = cast(dict[str, Callable[..., object]], environment.filters)
    filters["tojson"] = _tojson
    variables = cast(dict[str, object], environment.globals)
    variables["raise_exception"] = _raise_exception
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}, which marks what to train on, renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so.

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# Back to text.


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string completed."""

    stop: str
    # How many of the ids in the push that completed it belong to the output; the rest come after
    # the end. 0 if only `flush` completed it.
    num_tokens: int


class Detokenizer:
    """Turns one stream's ids into text, as soon as it is certain and no further than a stop string.

    All that `push` and `flush` return, joined, is `bytes.decode("utf-8", errors="replace")` of the
    pieces joined, cut at the first stop string, however the ids are spread over pushes.

    The first stop string is the one whose last character comes first. It is known as soon as it is
    there, whatever follows; had the one that *begins* first to win, "bc" in "abc" would have to
    wait for a "d" while "abcd" is possible. Of two that end together, the longer wins: it is all
    cut, and a caller of either gets no part of it.

    What is held back is at most an incomplete character (3 bytes) and one character less than the
    longest stop string.

    Attributes:
        stopped: The stop string that ended the text; from then on nothing more is returned.
    """

    __slots__ = (
        "_first_chars",
        "_held",
        "_include_stop",
        "_pieces",
        "_prefixes",
        "_special_ids",
        "_stops",
        "_tail",
        "_texts",
        "stopped",
    )

    def __init__(
        self,
        pieces: Sequence[bytes],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        special_ids: frozenset[int] = frozenset(),
        texts: Sequence[str | None] = (),
    ) -> None:
        """Start a stream.

        Args:
            pieces: The bytes of each id; shared, never changed.
            stop: Strings that end the text; none of them empty.
            include_stop: Whether the text ends after the stop string rather than before it.
            special_ids: Ids that have no text, whatever their pieces.
            texts: For each id its text, if that never depends on its neighbours, else None. A
                shortcut for `push_one`, which does without if it is empty.
        """
        if "" in stop:
            raise ValueError("a stop string is empty: it would match before the first token")
        self._pieces = pieces
        self._special_ids = special_ids
        self._include_stop = include_stop
        self._stops = tuple(stop)
        self._texts = () if stop else texts
        # Proper prefixes of stop strings, longest first.
        self._prefixes = sorted({s[:n] for s in stop for n in range(1, len(s))}, key=len)[::-1]
        self._first_chars = frozenset(s[0] for s in stop)  # Most text has none of them.
        self._tail = b""  # The bytes of an incomplete character.
        self._held = ""  # Text that may turn out to be the beginning of a stop string.
        self.stopped: StopMatch | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids make certain.

        Raises:
            IndexError: An id is outside the vocabulary.
        """
        if self.stopped is not None:
            return ""
        pieces, special_ids, tail = self._pieces, self._special_ids, self._tail
        if self._texts and not tail:
            try:
                return "".join(map(cast("Sequence[str]", self._texts).__getitem__, token_ids))
            except TypeError:
                pass  # One has no text of its own.
        if len(token_ids) == 1:  # One step of the engine; worth not building a list.
            token_id = token_ids[0]
            data = tail if token_id in special_ids else tail + pieces[token_id]
        else:
            data = tail + b"".join([pieces[i] for i in token_ids if i not in special_ids])
        text, num_bytes = utf_8_decode(data, "replace", False)
        self._tail = data[num_bytes:]
        if not self._held and self._first_chars.isdisjoint(text):
            return text
        return self._release(text, token_ids, tail)

    def push_one(self, token_id: int) -> str:
        """As `push`, for one id. Quicker where no stop string has to be looked for."""
        if self._texts and not self._tail:
            text = self._texts[token_id]
            if text is not None:
                return text
        return self.push((token_id,))

    @property
    def texts_apart(self) -> Sequence[str | None]:
        """For each id the text that it gives if it is pushed next, and None if it depends on more.

        Empty while all depend on what was before. Who sends such a text need not push its id.
        """
        return () if self._tail else self._texts

    def flush(self) -> str:
        """The rest of the text, when no more ids will come; an incomplete character is U+FFFD."""
        text, _ = utf_8_decode(self._tail, "replace", True)
        self._tail = b""
        released = self._release(text, (), b"") if text else ""
        released += self._held
        self._held = ""
        return released

    def _release(self, text: str, token_ids: Sequence[int], tail: bytes) -> str:
        """What stop strings allow of the held text and `text`, which `tail` and these ids gave."""
        window = self._held + text
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := window.find(stop)) >= 0
        ]
        if not matches:
            self._held = next((p for p in self._prefixes if window.endswith(p)), "")
            return window[: len(window) - len(self._held)]
        end, start, stop = min(matches)  # The earliest end, then the earliest start.
        self.stopped = StopMatch(stop, self._num_tokens_for(end - len(self._held), token_ids, tail))
        self._tail = b""
        self._held = ""
        return window[: end if self._include_stop else start]

    def _num_tokens_for(self, num_chars: int, token_ids: Sequence[int], tail: bytes) -> int:
        """How many of these ids, after the bytes `tail`, make `num_chars` characters certain."""
        for index, token_id in enumerate(token_ids):
            if token_id not in self._special_ids:
                tail += self._pieces[token_id]
            text, num_bytes = utf_8_decode(tail, "replace", False)
            tail = tail[num_bytes:]
            num_chars -= len(text)
            if num_chars <= 0:
                return index + 1
        assert not token_ids, "the match lies in text that these ids gave"
        return 0
