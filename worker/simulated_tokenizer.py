"""The tokenizer of the simulated engine: byte-level BPE over words that nobody has ever spoken.

Any text can be encoded, and what the engine makes up can be read: " batoki remu, sodali." Ids:

    0-255      the bytes
    then       pieces of punctuation, syllables, syllables after a space, words of two syllables
    last       the special tokens

Some characters are two tokens (the first three bytes of an emoji and its last), so that streams
have boundaries inside a character, as those of real models do.
"""

import json
from functools import cache

from unbroken.tokenizer import BYTE_OF_CHAR, TokenizerAsset

VOCAB_SIZE = 4096

BOS, START, END = "<|begin|>", "<|start|>", "<|end|>"
_SPECIALS = (BOS, START, END)
BOS_ID, START_ID, END_ID = range(VOCAB_SIZE - len(_SPECIALS), VOCAB_SIZE)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

EMOJI_HEAD = b"\xf0\x9f\x98"  # With any byte from 0x80 to 0xBF: U+1F600 to U+1F63F, faces.
_PIECES = (b'{"', b'":', b'",', b'"}', b", ", b'"]', b"\xc3\xa9", b"\xc3\xbc", EMOJI_HEAD)
_CONSONANTS = "bdfghjklmnprstvwz"
_VOWELS = "aeiou"


@cache
def asset() -> TokenizerAsset:
    """The tokenizer; the same in every process."""
    tokens, merges = _vocabulary()
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": VOCAB_SIZE - len(_SPECIALS) + index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, content in enumerate(_SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_written(token): index for index, token in enumerate(tokens)},
            "merges": [[_written(left), _written(right)] for left, right in merges],
        },
    }
    return TokenizerAsset(
        tokenizer_json=json.dumps(spec, ensure_ascii=False).encode(),
        chat_template=_CHAT_TEMPLATE,
        bos_token_id=BOS_ID,
        eos_token_ids=frozenset({END_ID}),
        vocab_size=VOCAB_SIZE,
        eos_token_id=END_ID,
    )


@cache
def pieces() -> tuple[bytes, ...]:
    """The bytes of each token that is not special, by id."""
    return tuple(_vocabulary()[0])


@cache
def _vocabulary() -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """All tokens that are not special, by id, and the merges that build them, first one first."""
    tokens = [bytes([byte]) for byte in range(256)]
    merges: list[tuple[bytes, bytes]] = []

    def merge(left: bytes, right: bytes) -> None:
        merges.append((left, right))
        tokens.append(left + right)

    for piece in _PIECES:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in tokens:
                merge(piece[: end - 1], piece[end - 1 : end])
    syllables = [(c + v).encode() for c in _CONSONANTS for v in _VOWELS]
    for syllable in syllables:
        merge(syllable[:1], syllable[1:])
    for syllable in syllables:
        merge(b" ", syllable)
    # As many words as there is room for, each syllable beginning about equally many of them.
    for index in range(VOCAB_SIZE - len(_SPECIALS) - len(tokens)):
        first, turn = index % len(syllables), index // len(syllables)
        second = (turn + 3 * first) % len(syllables)
        merge(b" " + syllables[first], syllables[second])
    return tokens, merges


_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def _written(token: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)
