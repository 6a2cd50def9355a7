"""A vocabulary of two dozen tokens, so small that tokens repeat and penalties bite.

Some characters are spelled by two tokens, some tokens spell several characters, so that outputs can
be cut inside a character and inside a stop string.
"""

import json
from functools import cache

from unbroken.tokenizer import BYTE_OF_CHAR, Tokenizer, TokenizerAsset

PIECES: tuple[bytes, ...] = (
    *(bytes([byte]) for byte in b"abcdxyno es12{}"),
    b"ab",
    b"no",
    b"yes",
    b" ye",
    b"\xc3",  # The first byte of "é"; the last one is the next token.
    b"\xa9",
    b"END",
    b"E",
)
EOS = len(PIECES)
VOCAB_SIZE = EOS + 1
EOS_TEXT = "<|end|>"


def token(text: str) -> int:
    """The id of the token that spells `text`."""
    return PIECES.index(text.encode())


def spelled(token_ids: list[int] | tuple[int, ...]) -> str:
    """The text of ids, none of them special."""
    return b"".join(PIECES[token_id] for token_id in token_ids).decode(errors="replace")


@cache
def tokenizer() -> Tokenizer:
    """The real tokenizer of this vocabulary."""
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    spec: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": EOS,
                "content": EOS_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {
                "".join(char_of[byte] for byte in piece): token_id
                for token_id, piece in enumerate(PIECES)
            },
            "merges": [],
        },
    }
    return Tokenizer(
        TokenizerAsset(
            tokenizer_json=json.dumps(spec).encode(),
            chat_template="",
            bos_token_id=None,
            eos_token_ids=frozenset({EOS}),
            vocab_size=VOCAB_SIZE,
        )
    )
