"""Restricts outputs to a language: what the next token may be, after the tokens so far.

The grammars are llguidance's; engines see only a mask over the vocabulary. A `Matcher` is a pure
function of the constraint and the tokens consumed, so that it can be rebuilt on another worker.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from unbroken.errors import InvalidField
from unbroken.generation import Constraint
from unbroken.tokenizer import TokenizerAsset

COMPILED_MAX = 256
"""Compiled constraints that are kept, because requests repeat theirs."""

# A fifth of llguidance's own limits for compiling: a hostile grammar stops the engine's steps for
# tens of milliseconds, not hundreds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,  # A schema may be confidential; it does not belong in our logs.
)


class Matcher:
    """Where one output stands in its language."""

    __slots__ = ("_bitmask", "_matcher", "_vocab_size")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bitmask = allocate_token_bitmask(1, vocab_size)

    @property
    def is_fulfilled(self) -> bool:
        """The output is complete: nothing that the language allows could follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why no further token can be judged; empty if one can."""
        if not self._matcher.is_error():
            return ""
        lines = self._matcher.get_error().splitlines()
        return lines[0] if lines else "the matcher failed"

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size,): which tokens may come next.

        Tokens that end a generation are among them exactly if the output may end here.
        """
        fill_next_token_bitmask(self._matcher, self._bitmask)
        bits = np.unpackbits(self._bitmask[0].view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(np.bool_)

    def consume(self, token_id: int) -> bool:
        """Go on after a token; False if the language does not allow it. Then nothing follows."""
        return self._matcher.consume_token(token_id)

    def replay(self, token_ids: Sequence[int]) -> bool:
        """Go on after tokens produced earlier; False if the language does not allow them."""
        return self._matcher.consume_tokens(list(token_ids))


class ConstraintCompiler:
    """Makes matchers for one tokenizer."""

    def __init__(self, asset: TokenizerAsset) -> None:
        eos = sorted(asset.eos_token_ids)
        self._vocab_size = asset.vocab_size
        self._tokenizer = LLTokenizer(
            asset.tokenizer_json.decode(), n_vocab=asset.vocab_size, eos_token=eos or None
        )
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()  # Oldest use first.

    def start(self, constraint: Constraint) -> Matcher:
        """A matcher before the first token.

        Raises:
            InvalidField: The constraint is not in its notation, or too large to compile.
        """
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            self._compiled[constraint] = compiled
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(constraint)
        return Matcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        name = f"params.constraint.{constraint.kind}"
        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise InvalidField(
                name, f"a valid {constraint.kind} ({error})", _shown(constraint)
            ) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            problem = " ".join(matcher.get_error().split()) or "it can't be compiled"
            raise InvalidField(
                name, f"a valid {constraint.kind} ({problem[:300]})", _shown(constraint)
            )
        return matcher


def _shown(constraint: Constraint) -> object:
    return constraint.options or constraint.text


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(constraint.text)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_escape, constraint.options)))


_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def _escape(text: str) -> str:
    """A regular expression for `text` itself, in the syntax of Rust's regex."""
    return _SPECIAL.sub(r"\\\g<0>", text).replace("\n", r"\n").replace("\r", r"\r")
