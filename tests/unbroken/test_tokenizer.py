"""Encoding, chat templates, and text that comes back piece by piece."""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbroken import tokenizer as tokenizer_module
from unbroken.tokenizer import (
    BYTE_OF_CHAR,
    ChatTemplateError,
    Detokenizer,
    StopMatch,
    Tokenizer,
    TokenizerAsset,
    asset_from_proto,
    asset_to_proto,
)

BOS, EOS, TOOL = 256, 257, 258
VOCAB_SIZE = 264  # With padding.


def added(token_id: int, content: str, *, special: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **flags}


def byte_level_spec() -> dict[str, object]:
    """A token for each byte, one merge, BOS in front of documents."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokens = [*BYTE_OF_CHAR, "<s>", "</s>", "<tool>", "he"]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": {
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "added_tokens": [
            added(BOS, "<s>", special=True),
            added(EOS, "</s>", special=True),
            added(TOOL, "<tool>", special=False),
        ],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence],
            "pair": [bos, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [["h", "e"]],
        },
    }


def sentence_piece_spec() -> dict[str, object]:
    tokens = ["<unk>", "<s>", "<0x0A>", "<0xE2>", "\u2581he", "llo", "\u2581", "<0xag>"]
    return {
        "version": "1.0",
        "added_tokens": [added(0, "<unk>", special=True), added(1, "<s>", special=True)],
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [],
        },
    }


def asset(spec: Mapping[str, object] | None = None, chat_template: str = "") -> TokenizerAsset:
    return TokenizerAsset(
        tokenizer_json=json.dumps(spec or byte_level_spec()).encode(),
        chat_template=chat_template,
        bos_token_id=BOS,
        eos_token_ids=frozenset({EOS}),
        vocab_size=VOCAB_SIZE,
    )


BYTE_LEVEL = Tokenizer(asset())


# The asset.


def test_a_fingerprint_tells_assets_apart() -> None:
    one = asset(chat_template="ab")
    others = [
        replace(one, chat_template="abc"),
        replace(one, tokenizer_json=one.tokenizer_json + b"a", chat_template="b"),
        replace(one, bos_token_id=None),
        replace(one, eos_token_ids=frozenset({BOS, EOS})),
        replace(one, eos_token_id=EOS),
        replace(one, vocab_size=300),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert replace(others[3], eos_token_ids=frozenset({EOS})).fingerprint == one.fingerprint
    assert len(one.fingerprint) == 32


def test_an_asset_is_the_same_after_its_journey() -> None:
    for one in (
        asset(chat_template="ab"),
        replace(asset(), bos_token_id=None),
        replace(asset(), bos_token_id=0, eos_token_ids=frozenset({0}), eos_token_id=0),
    ):
        assert asset_from_proto(asset_to_proto(one)) == one


def test_an_unreadable_tokenizer_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="tokenizer_json"):
        Tokenizer(replace(asset(), tokenizer_json=b"{}"))


# Encoding.


def test_special_text_is_plain_text_unless_a_template_wrote_it() -> None:
    text = "he</s><s>"
    plain = BYTE_LEVEL.encode(text, add_special=False)
    assert {BOS, EOS}.isdisjoint(plain)
    assert b"".join(BYTE_LEVEL.pieces[i] for i in plain) == text.encode()
    assert BYTE_LEVEL.encode(text, add_special=False, parse_special=True) == [259, EOS, BOS]
    assert BYTE_LEVEL.encode(text, add_special=False) == plain  # The two ways don't mix.


def test_a_document_is_framed_on_demand_even_if_special_text_is_plain() -> None:
    assert BYTE_LEVEL.encode("he", add_special=True) == [BOS, 259]
    assert BYTE_LEVEL.encode("he", add_special=False) == [259]


def test_added_tokens_that_are_not_special_are_always_found() -> None:
    assert BYTE_LEVEL.encode("<tool>he", add_special=False) == [TOOL, 259]


def test_the_truncation_a_tokenizer_was_saved_with_is_not_applied() -> None:
    assert len(BYTE_LEVEL.encode("x" * 100, add_special=False)) == 100


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(TypeError):
        BYTE_LEVEL.encode("\ud800", add_special=False)


# Pieces.


@given(st.text())
def test_pieces_of_ids_are_the_bytes_of_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special=False)
    assert b"".join(BYTE_LEVEL.pieces[i] for i in ids) == text.encode()


def test_every_id_below_the_vocabulary_size_has_a_piece() -> None:
    assert len(BYTE_LEVEL.pieces) == VOCAB_SIZE
    assert sorted(BYTE_LEVEL.pieces[:256]) == [bytes([byte]) for byte in range(256)]
    assert list(BYTE_LEVEL.pieces[256:]) == [b"<s>", b"</s>", b"<tool>", b"he", *[b""] * 4]


def test_sentence_pieces_are_spaces_and_bytes() -> None:
    tokenizer = Tokenizer(replace(asset(sentence_piece_spec()), vocab_size=8))
    expected = [b"<unk>", b"<s>", b"\n", b"\xe2", b" he", b"llo", b" ", b"<0xag>"]
    assert list(tokenizer.pieces) == expected


def test_special_tokens_have_no_text() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    assert detokenizer.push([BOS]) + detokenizer.push([259, EOS, TOOL]) == "he<tool>"


# Chat templates.

USER = [{"role": "user", "content": "hi"}]


def render(template: str, messages: Sequence[Mapping[str, object]] = USER) -> str:
    return Tokenizer(asset(chat_template=template)).render_chat(messages)


def test_a_template_sees_messages_tools_and_tokens() -> None:
    template = """\
{%- for message in messages %}
    {% if not loop.first %}{% continue %}{% endif %}
{{ bos_token }}{{ message.role }}: {{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if tools %}
{{ tools | tojson }}
{% endif %}
{% if add_generation_prompt %}
assistant:
{%- endif %}"""
    tokenizer = Tokenizer(asset(chat_template=template))
    tools = [{"name": "f", "description": "<é>"}]
    assert tokenizer.render_chat(USER, tools=tools) == (
        '<s>user: hi</s>\n[{"name": "f", "description": "<é>"}]\nassistant:'
    )
    assert tokenizer.render_chat(USER + USER, add_generation_prompt=False) == "<s>user: hi</s>\n"


def test_what_messages_say_is_never_a_template() -> None:
    hostile = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{{ raise_exception('no') }}"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": hostile}]) == hostile


def test_the_time_a_template_shows_can_be_given() -> None:
    tokenizer = Tokenizer(asset(chat_template="{{ strftime_now('%d %b %Y') }}"))
    assert tokenizer.render_chat(USER, now=datetime(2026, 3, 1)) == "01 Mar 2026"


def test_generation_tags_render_what_they_enclose() -> None:
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "no chat template"),
        ("{% if %}", "broken"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "failed"),
        ("{{ messages[7].content.x }}", "failed"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({}) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ strftime_now.__self__.__class__.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "failed"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_typed_error(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        render(template)


def test_a_rendered_chat_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "RENDERED_CHARS_MAX", 1000)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    with pytest.raises(ChatTemplateError, match="over 1000 chars"):
        render("{% for i in range(1001) %}x{% endfor %}")


def test_an_eos_token_that_would_be_a_guess_fails_only_where_it_is_used() -> None:
    ambiguous = replace(asset(), eos_token_ids=frozenset({EOS, TOOL}))
    using = replace(ambiguous, chat_template="{{ eos_token }}")
    assert Tokenizer(replace(ambiguous, chat_template="ok")).render_chat(USER) == "ok"
    with pytest.raises(ChatTemplateError, match="ambiguous"):
        Tokenizer(using).render_chat(USER)
    assert Tokenizer(replace(using, eos_token_id=EOS)).render_chat(USER) == "</s>"


# Detokenizing.

PIECES = [
    *(b"a", b"b", b"c", b"ab", b"abc", b"\n", b"\n\n", b" ", b""),
    *("é".encode(), "€".encode(), "🙂".encode(), "e\u0301".encode(), "\ufffd".encode()),
    *(b"\xc3", b"\xa9", b"\xe2", b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x99\x82", b"a\xf0"),
    *(b"\x80", b"\xff", b"\xed\xa0", b"\xf4\x90", b"\xc0\xaf", b"\x82a"),
]
SPECIAL = len(PIECES)
PIECES.append(b"<special>")

ids = st.lists(st.integers(0, SPECIAL), max_size=30)
stops = st.lists(st.text("abc\né€🙂\ufffd", min_size=1, max_size=5), max_size=4)
widths = st.lists(st.integers(0, 4), max_size=30)


def chunks(token_ids: Sequence[int], num_each: Sequence[int]) -> list[Sequence[int]]:
    cuts = [0]
    for num in num_each:
        cuts.append(min(cuts[-1] + num, len(token_ids)))
    return [token_ids[start:end] for start, end in pairwise([*cuts, len(token_ids)])]


def text_of(token_ids: Sequence[int], *, final: bool) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(PIECES[i] for i in token_ids if i != SPECIAL), final)


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string ends, and which it is, by trying every end in turn."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return end, max(found, key=len)
    return None


@settings(deadline=None, max_examples=1000)
@given(ids, stops, widths, st.booleans())
def test_text_is_that_of_all_bytes_cut_at_the_first_stop_string(
    token_ids: list[int], stop: list[str], num_each: list[int], include_stop: bool
) -> None:
    detokenizer = Detokenizer(PIECES, stop, include_stop, frozenset({SPECIAL}))
    text = ""
    num_tokens = 0
    for chunk in chunks(token_ids, num_each):
        text += detokenizer.push(chunk)
        if detokenizer.stopped:
            num_tokens += detokenizer.stopped.num_tokens
            break
        num_tokens += len(chunk)
        certain = text_of(token_ids[:num_tokens], final=False)
        assert certain.startswith(text)
        beginnings = [i for i in range(len(text)) for s in stop if s.startswith(certain[i:])]
        assert not beginnings, "a part of a stop string got out"
        assert len(certain) - len(text) < max(map(len, stop), default=1)
    text += detokenizer.flush()

    whole = text_of(token_ids, final=True)
    match first_stop(whole, stop):
        case None:
            assert detokenizer.stopped is None
            assert text == whole
        case end, found:
            assert text == whole[: end if include_stop else end - len(found)]
            assert detokenizer.stopped is not None
            assert detokenizer.stopped.stop == found
            needed = [
                n
                for n in range(len(token_ids) + 1)
                if len(text_of(token_ids[:n], final=False)) >= end
            ]
            assert num_tokens == min(needed, default=len(token_ids))
            assert detokenizer.push(token_ids) + detokenizer.flush() == ""


@settings(deadline=None)
@given(ids, widths)
def test_without_stop_strings_nothing_but_half_characters_is_held(
    token_ids: list[int], num_each: list[int]
) -> None:
    detokenizer = Detokenizer(PIECES, special_ids=frozenset({SPECIAL}))
    text = "".join(detokenizer.push(chunk) for chunk in chunks(token_ids, num_each))
    assert text == text_of(token_ids, final=False)
    assert text + detokenizer.flush() == text_of(token_ids, final=True)


def push_text(detokenizer: Detokenizer, *texts: str) -> str:
    """Pushes each text at once, one id a byte."""
    return "".join(detokenizer.push(list(text.encode())) for text in texts)


def over_bytes(*stop: str, include_stop: bool = False) -> Detokenizer:
    return Detokenizer([bytes([byte]) for byte in range(256)], stop, include_stop)


def test_half_a_character_waits_for_its_other_half() -> None:
    detokenizer = over_bytes()
    first, *rest = "é".encode()
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(rest) == "é"
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_stop_string_is_found_across_tokens_and_nothing_after_it_is_returned() -> None:
    detokenizer = over_bytes("END")
    assert push_text(detokenizer, "one E") == "one "
    assert push_text(detokenizer, "N") == ""
    assert push_text(detokenizer, "Ds") == ""
    assert detokenizer.stopped == StopMatch("END", num_tokens=1)
    assert push_text(detokenizer, "more") == ""
    assert detokenizer.flush() == ""


def test_what_only_looked_like_a_stop_string_is_returned() -> None:
    detokenizer = over_bytes("\n\nUser")
    assert push_text(detokenizer, "a\n") == "a"
    assert push_text(detokenizer, "\nUse") == ""
    assert push_text(detokenizer, "ful\n") == "\n\nUseful"
    assert detokenizer.flush() == "\n"
    assert detokenizer.stopped is None


def test_a_stop_string_can_be_included() -> None:
    detokenizer = over_bytes("END", include_stop=True)
    assert push_text(detokenizer, "one EN", "D two") == "one END"


@pytest.mark.parametrize(
    ("stop", "text", "shown", "found", "num_tokens"),
    [
        (("abcd", "bc"), "abcd", "a", "bc", 3),  # The first to be complete,
        (("bc", "abc"), "abcd", "", "abc", 3),  # and the longer of two at once.
        (("ab", "abc"), "abcd", "", "ab", 2),
        (("aab",), "aaab", "a", "aab", 4),
        (("x", "b"), "abx", "a", "b", 2),
    ],
)
def test_the_first_stop_string_to_be_complete_wins_whatever_follows(
    stop: tuple[str, ...], text: str, shown: str, found: str, num_tokens: int
) -> None:
    at_once, one_by_one = over_bytes(*stop), over_bytes(*stop)
    assert push_text(at_once, text) == shown
    assert at_once.stopped == StopMatch(found, num_tokens)
    assert push_text(one_by_one, *text) == shown
    assert one_by_one.stopped == StopMatch(found, num_tokens=1)


def test_a_replay_of_delivered_ids_restores_a_half_seen_stop_string() -> None:
    delivered = list(b"one EN")
    resumed = over_bytes("END")
    assert resumed.push(delivered) == "one "
    assert resumed.push(list(b"D")) == ""
    assert resumed.stopped == StopMatch("END", num_tokens=1)


def test_a_stop_string_that_only_the_end_completes_needs_no_token() -> None:
    detokenizer = over_bytes("a\ufffd")
    assert detokenizer.push([ord("a"), 0xC3]) == ""
    assert detokenizer.flush() == ""
    assert detokenizer.stopped == StopMatch("a\ufffd", num_tokens=0)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(PIECES, ["a", ""])


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(IndexError):
        Detokenizer(PIECES).push([len(PIECES)])
