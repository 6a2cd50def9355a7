"""Reads the tokenizer of a GGUF model file, to encode exactly as llama.cpp does with that file.

GGUF holds the vocabulary and the merges but only the *name* of the pre-tokenizer; what the name
stands for is in llama.cpp's code (`src/llama-vocab.cpp`). So a name that is not in
`_PRE_TOKENIZERS` is refused: a guess would give slightly different ids, and nobody would notice.
"""

import json
import re
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from unbroken.tokenizer import BYTE_OF_CHAR, TokenizerAsset


class GgufTokenizerError(ValueError):
    """The file is no intact GGUF, or its tokenizer is of a kind that we can't reproduce."""


def asset_from_gguf(path: Path) -> TokenizerAsset:
    """The tokenizer of the model file at `path`, of which only the header is read.

    Raises:
        GgufTokenizerError: See there.
        OSError: The file can't be read.
    """
    header = read_header(path)
    model = header.string("tokenizer.ggml.model", "")
    if model != "gpt2":
        raise GgufTokenizerError(f"tokenizer.ggml.model is {model!r}, expected 'gpt2'")
    pre = header.string("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise GgufTokenizerError(f"tokenizer.ggml.pre is {pre!r}, expected one of {known}")

    vocabulary = _Vocabulary(header)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(_PRE_TOKENIZERS[pre], vocabulary),
        "post_processor": _framing(header, vocabulary, add_bos=pre in _ADDS_BOS),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _IGNORES_MERGES,
            "vocab": vocabulary.used(),
            "merges": [_merge(line) for line in header.strings("tokenizer.ggml.merges")],
        },
    }
    return TokenizerAsset(
        tokenizer_json=json.dumps(spec, ensure_ascii=False).encode(),
        chat_template=header.string("tokenizer.chat_template", ""),
        bos_token_id=vocabulary.id_of_role.get("bos"),
        eos_token_ids=vocabulary.end_of_generation_ids(),
        vocab_size=len(vocabulary.tokens),
        eos_token_id=vocabulary.id_of_role.get("eos"),
    )


# How text is cut into words, inside which the merges work, by the name in `tokenizer.ggml.pre`.
# Each pattern cuts what the ones before it left; what lies between matches is a word, too.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The models' own files say (?i:'s|'t|…), which also matches U+017F, an old s; llama.cpp's doesn't.
_GPT4 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_GPT4 % 3,),
    "qwen2": (_GPT4 % 1,),
    "smollm": (r"\p{N}", _GPT2),
}
_IGNORES_MERGES = {"llama-bpe"}  # A word that is a token is that token, whatever the merges say.
_ADDS_BOS = {"llama-bpe"}  # Unless the file says otherwise.

_BYTE_LEVEL: dict[str, object] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,  # The words are cut by then.
}


# The letters, digits and punctuation new in Unicode 16: `tokenizers` knows them as such, llama.cpp,
# whose tables are of Unicode 15, as neither. Found by comparing the two on every code point.
_UNICODE_16 = "".join(
    rf"\x{{{first:x}}}-\x{{{last:x}}}"
    for first, last in (
        (0x1B4E, 0x1B4F),
        (0x1B7F, 0x1B7F),
        (0x1C89, 0x1C8A),
        (0xA7CB, 0xA7CD),
        (0xA7DA, 0xA7DC),
        (0x105C0, 0x105F3),
        (0x10D40, 0x10D65),
        (0x10D6E, 0x10D85),
        (0x10EC2, 0x10EC4),
        (0x11380, 0x113D8),
        (0x116D0, 0x116E3),
        (0x11BC0, 0x11BF9),
        (0x13460, 0x143FA),
        (0x16100, 0x16139),
        (0x16D40, 0x16D79),
        (0x18CFF, 0x18CFF),
        (0x1CCF0, 0x1CCF9),
        (0x1E5D0, 0x1E5FF),
    )
)


def _pre_tokenizer(patterns: Sequence[str], vocabulary: "_Vocabulary") -> dict[str, object]:
    cuts = [*(_split(_as_of_unicode_15(p), "Isolated") for p in patterns), _BYTE_LEVEL]
    # A byte that has no token is dropped, but nothing merges over the gap that it leaves.
    if missing := "".join(char for char in BYTE_OF_CHAR if char not in vocabulary.ids):
        cuts.append(_split(f"[{re.escape(missing)}]", "Removed"))
    return {"type": "Sequence", "pretokenizers": cuts}


def _as_of_unicode_15(pattern: str) -> str:
    return re.sub(r"\\p\{[LNP]\}", lambda p: f"[{p[0]}&&[^{_UNICODE_16}]]", pattern)


def _split(pattern: str, behavior: str) -> dict[str, object]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": behavior, "invert": False}


def _merge(line: str) -> tuple[str, str]:
    # llama.cpp looks for the space from the second character on: the first may be a space itself.
    cut = line.find(" ", 1)
    if cut < 0:
        raise GgufTokenizerError(f"a merge is {line!r}, expected two tokens with a space between")
    return line[:cut], line[cut + 1 :]


# Which tokens are what. llama.cpp goes by their text where a file doesn't say, and so must we. Its
# exceptions for single models are left out: it knows these by pre-tokenizers that we refuse.

_ENDS_GENERATION = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<\uff5cend▁of▁sentence\uff5c>",
)
_TEXTS_OF_ROLE = {
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<\uff5cfim▁begin\uff5c>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<\uff5cfim▁hole\uff5c>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<\uff5cfim▁end\uff5c>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# A model that fills in the middle has said all when it goes on to another file or repository.
_ROLES_THAT_END_GENERATION = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ROLES = ("bos", "eos", "eot", "eom", *_TEXTS_OF_ROLE)


class _TokenType(IntEnum):
    """The values in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Vocabulary:
    """The tokens of a model, indexed by id, with their types and roles."""

    def __init__(self, header: "Header") -> None:
        # An empty token gets llama.cpp's name for it, so that every token is a distinct text.
        texts = header.strings("tokenizer.ggml.tokens")
        self.tokens = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            raise GgufTokenizerError(
                f"tokenizer.ggml.tokens has {len(self.ids)} distinct of {len(self.tokens)} tokens"
            )
        self.types = header.integers("tokenizer.ggml.token_type") or (
            [_TokenType.NORMAL] * len(self.tokens)
        )
        if len(self.types) != len(self.tokens):
            raise GgufTokenizerError(
                f"tokenizer.ggml.token_type has {len(self.types)} entries, "
                f"expected {len(self.tokens)}"
            )
        self.id_of_role = dict[str, int]()
        control_looking = {self.ids[text] for text in _ENDS_GENERATION if text in self.ids}
        for role in _ROLES:
            token_id = header.integer(f"tokenizer.ggml.{role}_token_id")
            if token_id is not None and 0 <= token_id < len(self.tokens):
                self.id_of_role[role] = token_id
            elif text := next((t for t in _TEXTS_OF_ROLE.get(role, ()) if t in self.ids), None):
                self.id_of_role[role] = self.ids[text]
                control_looking.add(self.ids[text])
        for token_id in control_looking:
            self.types[token_id] = _TokenType.CONTROL

    def used(self) -> dict[str, int]:
        """Ids by token; unused tokens, which pad the vocabulary, have no text and are left out."""
        return {t: i for t, i in self.ids.items() if self.types[i] != _TokenType.UNUSED}

    def added_tokens(self) -> list[dict[str, object]]:
        """The tokens that are found in a text before it is cut into words.

        `tokenizers` takes the leftmost of them, llama.cpp the longest of the whole text first. That
        differs only where one ends as another begins, which control tokens never do.
        """
        specials = (_TokenType.CONTROL, _TokenType.UNKNOWN)
        return [
            {
                "id": token_id,
                "content": self.tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token_type in specials,
            }
            for token_id, token_type in enumerate(self.types)
            if token_type in specials or token_type == _TokenType.USER_DEFINED
        ]

    def end_of_generation_ids(self) -> frozenset[int]:
        by_text = {self.ids[text] for text in _ENDS_GENERATION if text in self.ids}
        roles = self.id_of_role
        return frozenset(by_text | {roles[r] for r in _ROLES_THAT_END_GENERATION if r in roles})


def _framing(
    header: "Header", vocabulary: _Vocabulary, *, add_bos: bool
) -> dict[str, object] | None:
    """What `add_special` puts around a text."""

    def special(role: str) -> list[object]:
        if role not in vocabulary.id_of_role:
            raise GgufTokenizerError(f"a text gets {role} added, but there is no {role}_token_id")
        token_id = vocabulary.id_of_role[role]
        token = vocabulary.tokens[token_id]
        specials[token] = {"id": token, "ids": [token_id], "tokens": [token]}
        return [{"SpecialToken": {"id": token, "type_id": 0}}]

    specials: dict[str, object] = {}
    before = special("bos") if header.boolean("tokenizer.ggml.add_bos_token", add_bos) else []
    after = special("eos") if header.boolean("tokenizer.ggml.add_eos_token", False) else []
    if not specials:
        return None
    single: list[object] = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    pair: list[object] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]  # Never used.
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": specials,
    }


# The file. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

_Scalar = int | float | bool | str
_STRING = 8
_ARRAY = 9
_SCALAR_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


class Header:
    """The metadata of a GGUF file, asked for by key and type.

    Each method raises `GgufTokenizerError` if the value is of another type.
    """

    def __init__(self, values: dict[str, _Scalar | list[_Scalar]]) -> None:
        self._values = values

    def string(self, key: str, default: str) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise _wrong_type(key, "a string", value)
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise _wrong_type(key, "a boolean", value)
        return value

    def integer(self, key: str) -> int | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, int):
            raise _wrong_type(key, "an integer", value)
        return value

    def strings(self, key: str) -> list[str]:
        """Empty if the key is missing."""
        values = self._array(key)
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) != len(values):
            raise _wrong_type(key, "an array of strings", values)
        return strings

    def integers(self, key: str) -> list[int]:
        """Empty if the key is missing."""
        values = self._array(key)
        integers = [value for value in values if isinstance(value, int)]
        if len(integers) != len(values):
            raise _wrong_type(key, "an array of integers", values)
        return integers

    def _array(self, key: str) -> list[_Scalar]:
        value = self._values.get(key, [])
        if not isinstance(value, list):
            raise _wrong_type(key, "an array", value)
        return value


def _wrong_type(key: str, expected: str, value: object) -> GgufTokenizerError:
    return GgufTokenizerError(f"{key} is {str(value)[:40]!r}, expected {expected}")


def read_header(path: Path) -> Header:
    """The metadata of a little-endian GGUF file of version 2 or 3.

    Raises:
        GgufTokenizerError: It isn't one, or it ends too early.
        OSError: The file can't be read.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if (magic := reader.take(4)) != b"GGUF":
            raise GgufTokenizerError(f"{path} begins with {magic!r}, expected b'GGUF'")
        if (version := reader.number("I")) not in (2, 3):
            raise GgufTokenizerError(f"{path} is of GGUF version {version}, expected 2 or 3")
        reader.number("Q")  # Tensors.
        num_values = int(reader.number("Q"))
        return Header({reader.string(): reader.value() for _ in range(num_values)})


class _Reader:
    """Takes values off a file, never more than is there, whatever the file claims."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._num_bytes_left = num_bytes

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._num_bytes_left:
            raise GgufTokenizerError(
                f"the file is cut short: {num_bytes} bytes expected, {self._num_bytes_left} left"
            )
        self._num_bytes_left -= num_bytes
        return self._file.read(num_bytes)

    def number(self, code: str) -> int | float | bool:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        data = self.take(int(self.number("Q")))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise GgufTokenizerError(f"a string is not UTF-8: {data[:40]!r}") from error

    def value(self) -> _Scalar | list[_Scalar]:
        value_type = int(self.number("I"))
        if value_type == _STRING:
            return self.string()
        if value_type != _ARRAY:
            return self.number(_format(value_type))
        item_type, count = int(self.number("I")), int(self.number("Q"))
        if item_type == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers(_format(item_type), count))


def _format(value_type: int) -> str:
    if value_type not in _SCALAR_FORMATS:
        raise GgufTokenizerError(f"a value is of the unknown type {value_type}")
    return _SCALAR_FORMATS[value_type]
