"""Claims of `worker.constraints`."""

import json
import re

import numpy as np
import pytest

from unbroken.errors import InvalidField
from unbroken.generation import Constraint, ConstraintKind, GenerationParams, SamplingParams
from unbroken.tokenizer import Tokenizer
from worker import simulated_tokenizer
from worker.constraints import ConstraintCompiler, Matcher
from worker.sampler import Sampler, SamplingError
from worker.simulated_tokenizer import END_ID

TOKENIZER = Tokenizer(simulated_tokenizer.asset())
COMPILER = ConstraintCompiler(simulated_tokenizer.asset())

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"id": {"type": "integer"}, "tag": {"enum": ["x", "y"]}},
        "required": ["id", "tag"],
        "additionalProperties": False,
    }
)
OPTIONS = ("yes", "no", "a.b", "a|b (c)", "l1\nl2", "\\d+ [x] {2} ^$ #~&-/", "é😀", '"quoted"')


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


def accepts(constraint: Constraint, text: str) -> bool:
    """The text is a whole output of the language."""
    matcher = COMPILER.start(constraint)
    for token_id in ids(text):
        if matcher.is_fulfilled or not matcher.allowed()[token_id]:
            return False
        assert matcher.consume(token_id), "what is allowed can be consumed"
    return matcher.is_fulfilled or bool(matcher.allowed()[END_ID])


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (
            Constraint("json_schema", SCHEMA),
            ['{"id": 12, "tag": "x"}', '{"id":-1,"tag":"y"}'],
            ['{"id": 1.5, "tag": "x"}', '{"tag": "x"}', "[]", '{"id": 12', "x"],
        ),
        (
            Constraint("json_object"),
            ["{}", '{"a": [1, null, "é"]}', '{ "b" : {} }'],
            ["[]", "1", '{"a"}', "{} {}", "null"],
        ),
        (
            Constraint("regex", "[a-c]{2,3}(-x)?"),
            ["ab", "abc", "ab-x"],
            ["a", "abcd", "ab-", "-x", "AB"],
        ),
        (Constraint("lark", 'start: "go" /[0-9]+/'), ["go1", "go42"], ["go", "g1", "go4x"]),
        (Constraint("choice", options=OPTIONS), list(OPTIONS), ["ye", "yesno", "aXb", "", "12"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_exactly_the_language_is_allowed(
    constraint: Constraint, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(constraint, text)] == []
    assert [text for text in bad if accepts(constraint, text)] == []


def test_the_end_is_allowed_exactly_where_the_output_may_end() -> None:
    matcher = COMPILER.start(Constraint("regex", "a+"))
    assert not matcher.allowed()[END_ID]
    matcher.consume(ids("a")[0])
    assert matcher.allowed()[END_ID]
    assert not matcher.is_fulfilled
    matcher.consume(END_ID)
    assert matcher.is_fulfilled


def test_a_replayed_matcher_stands_where_the_first_one_stood() -> None:
    tokens = ids('{"id": 12, "tag": "y"}')
    first = COMPILER.start(Constraint("json_schema", SCHEMA))
    for cut, token_id in enumerate(tokens):
        again = COMPILER.start(Constraint("json_schema", SCHEMA))
        assert again.replay(tokens[:cut])
        assert np.array_equal(again.allowed(), first.allowed())
        first.consume(token_id)
    assert first.is_fulfilled


@pytest.mark.parametrize("text", ["b", "aab", "aaa"])
def test_an_output_outside_the_language_is_not_replayed(text: str) -> None:
    matcher = COMPILER.start(Constraint("regex", "aa"))
    assert not matcher.replay([t for char in text for t in ids(char)])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("json_schema", '{"type": "objectt"}'),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}'),
        ("json_schema", '{"$ref": "https://example.org/schema"}'),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}'),
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("regex", "(" * 5000 + "a" + ")" * 5000),
        ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000),
        ("lark", "start: foo"),
        ("lark", "nonsense"),
        ("lark", "start: /(/"),
    ],
)
def test_what_is_no_grammar_is_refused_by_name(kind: ConstraintKind, text: str) -> None:
    with pytest.raises(
        InvalidField, match=rf"^params\.constraint\.{kind}: expected a valid {kind}"
    ):
        COMPILER.start(Constraint(kind, text))


def test_a_constraint_that_takes_too_long_to_follow_fails_and_never_ends_the_output() -> None:
    params = GenerationParams(SamplingParams(temperature=0.0))
    matcher = COMPILER.start(Constraint("regex", "a{3000}{3000}{3000}"))
    sampler = Sampler(
        params,
        (),
        vocab_size=simulated_tokenizer.VOCAB_SIZE,
        eos_token_ids=frozenset({END_ID}),
        matcher=matcher,
    )
    logits = np.zeros(simulated_tokenizer.VOCAB_SIZE, dtype=np.float32)

    def write() -> None:
        for index in range(10_000):
            token_id, _ = sampler.sample(logits, index)
            assert token_id != END_ID
            sampler.accept(token_id)

    with pytest.raises(SamplingError, match="can't be followed"):
        write()
    assert not sampler.is_fulfilled


def test_a_constraint_is_compiled_once() -> None:
    constraint = Constraint("regex", "compiled-once")
    one, two = COMPILER.start(constraint), COMPILER.start(constraint)
    one.consume(ids("c")[0])
    assert two.allowed()[ids("c")[0]], "matchers do not share their position"


def written(matcher: Matcher) -> str:
    """The text that a writer gets who takes the lowest id that is allowed and not the end."""
    tokens: list[int] = []
    while not matcher.is_fulfilled and len(tokens) < 50:
        allowed = matcher.allowed()
        allowed[END_ID] = False
        tokens.append(int(allowed.argmax()))
        matcher.consume(tokens[-1])
    return TOKENIZER.detokenizer().push(tokens)


def test_whoever_stays_within_the_mask_writes_the_language() -> None:
    assert re.fullmatch("[x-z]{3}!", written(COMPILER.start(Constraint("regex", "[x-z]{3}!"))))
