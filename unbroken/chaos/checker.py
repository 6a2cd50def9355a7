"""Holds what clients recorded against what they had to read, and shows the shortest contradiction.

A history is what happened at the client's edge, in order: a stream was asked for, it began, tokens
came, it ended. The truth is what an undisturbed run of each request delivers; that is a pure
function of the request. From these two follow the promises, or a counter-example:

    P1, P2   every offset exactly once, in order, without gaps, with the token, the text and the log
             probabilities of the truth; exactly one end
    P3       the finish reasons and the usage of the truth

A stream may end with an error only if the error is one that the caller allows; what it delivered
before must be a correct prefix all the same. A counter-example is the fewest events of one stream
that contradict each other or the truth: most often one or two lines of many thousands.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import TypeAlias, assert_never


@dataclass(frozen=True, slots=True)
class Asked:
    """A client asked for a stream."""

    stream: str
    at: float
    """Monotonic seconds of the machine, here and everywhere."""


@dataclass(frozen=True, slots=True)
class Began:
    """The frontend has admitted it."""

    stream: str
    at: float


@dataclass(frozen=True, slots=True)
class Came:
    """A piece of one choice was read."""

    stream: str
    at: float
    choice: int
    offset: int
    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[object, ...] = ()
    """One per token, or none."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The stream says that it is complete."""

    stream: str
    at: float
    billing: object = None
    """Finish reasons, stops and usage: whatever an interruption must not change."""
    num_migrations: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The stream ended with an error."""

    stream: str
    at: float
    reason: str
    """One of docs/ERRORS.md."""
    detail: str = ""


Event: TypeAlias = Asked | Began | Came | Finished | Failed


@dataclass(frozen=True, slots=True)
class ChoiceTruth:
    """One choice of an undisturbed run."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Truth:
    """What an undisturbed run of a request delivers."""

    choices: tuple[ChoiceTruth, ...]
    billing: object = None


class Kind(Enum):
    """What is wrong."""

    LOST = "a token never came"
    REPEATED = "a token came twice"
    OUT_OF_ORDER = "a token came after a later one"
    CHANGED = "a token is another"
    INVENTED = "there are more tokens than there may be"
    TEXT = "the text is another"
    LOGPROBS = "the log probabilities are others"
    BILLING = "finish reasons or usage are others"
    NO_END = "the stream has no end"
    TWO_ENDS = "the stream ended twice"
    AFTER_END = "something came after the end"
    UNKNOWN = "nobody asked for it"
    NOT_ALLOWED = "it ended with an error that is not allowed"


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise, and the fewest events of the stream that show it."""

    kind: Kind
    stream: str
    witnesses: tuple[Event, ...]
    detail: str

    @property
    def rank(self) -> tuple[int, int, float]:
        """The shorter, the better; then the one that happened first."""
        size = sum(len(event.token_ids) for event in self.witnesses if isinstance(event, Came))
        return len(self.witnesses), size, max(event.at for event in self.witnesses)

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.kind.value}: {self.stream}: {self.detail}", *map(_shown, self.witnesses)]
        )


@dataclass(slots=True)
class Verdict:
    """What a whole history shows."""

    streams: int = 0
    complete: int = 0
    refused: int = 0
    """Ended with an error that is allowed."""
    migrated: int = 0
    lost: int = 0
    """Tokens, as the next three."""
    duplicated: int = 0
    changed: int = 0
    violations: list[Violation] = field(default_factory=list[Violation])

    @property
    def is_ok(self) -> bool:
        return not self.violations

    @property
    def counter_example(self) -> Violation | None:
        """The shortest of all contradictions."""
        return min(self.violations, key=lambda violation: violation.rank, default=None)

    def add(self, other: "Verdict") -> None:
        """Take in the verdict on another history."""
        self.streams += other.streams
        self.complete += other.complete
        self.refused += other.refused
        self.migrated += other.migrated
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.changed += other.changed
        self.violations += other.violations


def check(
    history: Sequence[Event],
    truths: Mapping[str, Truth],
    *,
    reasons_allowed: Mapping[str, Collection[str]] | None = None,
    may_be_open: Collection[str] = (),
) -> Verdict:
    """Judge a history. `truths` are by stream; of others nothing but order is known.

    `reasons_allowed` are the errors with which a stream may end; `may_be_open` are the streams
    whose client died or was cut off, so that their histories may end anywhere.
    """
    by_stream: dict[str, list[Event]] = {}
    for event in history:
        by_stream.setdefault(event.stream, []).append(event)
    verdict = Verdict()
    for stream, events in by_stream.items():
        allowed = (reasons_allowed or {}).get(stream, ())
        one = _Stream(stream, truths.get(stream), allowed, verdict)
        one.read(events, may_be_open=stream in may_be_open)
    return verdict


@dataclass(slots=True)
class _Choice:
    """One choice, as far as it was read."""

    pieces: list[Came] = field(default_factory=list[Came])
    next_offset: int = 0
    seen: set[int] = field(default_factory=set[int])
    text: str = ""
    logprobs: list[object] = field(default_factory=list[object])
    is_broken: bool = False
    """Offsets or tokens were wrong; what follows from them is no news."""


class _Stream:
    """Reads the events of one stream."""

    def __init__(
        self, name: str, truth: Truth | None, allowed: Collection[str], verdict: Verdict
    ) -> None:
        self._name = name
        self._truth = truth
        self._allowed = allowed
        self._verdict = verdict
        self._choices: dict[int, _Choice] = {}
        self._asked: Asked | None = None
        self._end: Finished | Failed | None = None

    def read(self, events: Sequence[Event], *, may_be_open: bool) -> None:
        self._verdict.streams += 1
        for event in events:
            self._one(event)
        if self._end is None and not may_be_open:
            self._violated(Kind.NO_END, (events[-1],), "this is the last that is known of it")

    def _one(self, event: Event) -> None:
        if isinstance(event, Asked):
            self._asked = event
            return
        if self._asked is None:
            self._violated(Kind.UNKNOWN, (event,), "no request came before")
        if self._end is not None:
            kind = Kind.TWO_ENDS if isinstance(event, Finished | Failed) else Kind.AFTER_END
            self._violated(kind, (self._end, event), "the first end is the only one")
            return
        match event:
            case Began():
                pass
            case Came():
                self._came(event)
            case Finished():
                self._end = event
                self._finished(event)
            case Failed():
                self._end = event
                if event.reason in self._allowed:
                    self._verdict.refused += 1
                else:
                    allowed = ", ".join(sorted(self._allowed)) or "none"
                    self._violated(Kind.NOT_ALLOWED, (event,), f"allowed are {allowed}")
            case _:
                assert_never(event)

    def _came(self, piece: Came) -> None:
        choice = self._choices.setdefault(piece.choice, _Choice())
        offsets = range(piece.offset, piece.offset + len(piece.token_ids))
        if repeated := sorted(choice.seen.intersection(offsets)):
            self._verdict.duplicated += len(repeated)
            before = _with(choice.pieces, repeated[0])
            choice.is_broken = True
            detail = f"offset {repeated[0]} of choice {piece.choice}"
            self._violated(Kind.REPEATED, (before, piece), detail)
        elif offsets and piece.offset < choice.next_offset:
            before = next(p for p in choice.pieces if p.offset > piece.offset)
            detail = f"offset {piece.offset} of choice {piece.choice} after {before.offset}"
            self._verdict.lost -= len(offsets)
            self._violated(Kind.OUT_OF_ORDER, (before, piece), detail)
        elif offsets and piece.offset > choice.next_offset:
            self._verdict.lost += piece.offset - choice.next_offset
            choice.is_broken = True
            before = choice.pieces[-1:] or ([self._asked] if self._asked else [])
            detail = f"offset {choice.next_offset} of choice {piece.choice}"
            self._violated(Kind.LOST, (*before, piece), detail)
        choice.seen.update(offsets)
        choice.next_offset = max(choice.next_offset, offsets.stop)
        choice.pieces.append(piece)
        choice.text += piece.text
        choice.logprobs += piece.logprobs
        self._compare(piece, choice)

    def _compare(self, piece: Came, choice: _Choice) -> None:
        """With the truth, as far as the choice has come."""
        if self._truth is None:
            return
        if piece.choice >= len(self._truth.choices):
            detail = f"choice {piece.choice} of {len(self._truth.choices)}"
            self._violated(Kind.INVENTED, (piece,), detail)
            return
        truth = self._truth.choices[piece.choice]
        expected = truth.token_ids[piece.offset : piece.offset + len(piece.token_ids)]
        changed = [i for i, (a, b) in enumerate(zip(expected, piece.token_ids)) if a != b]  # noqa: B905 - What is beyond the truth is judged below.
        if changed:
            self._verdict.changed += len(changed)
            choice.is_broken = True
            where = piece.offset + changed[0]
            seen = piece.token_ids[changed[0]]
            detail = f"offset {where}: expected {expected[changed[0]]}, got {seen}"
            self._violated(Kind.CHANGED, (piece,), detail)
        if piece.offset + len(piece.token_ids) > len(truth.token_ids):
            choice.is_broken = True
            detail = f"expected {len(truth.token_ids)} tokens"
            self._violated(Kind.INVENTED, (piece,), detail)
        if choice.is_broken:
            return
        if not truth.text.startswith(choice.text):
            choice.is_broken = True
            expected_text = truth.text[len(choice.text) - len(piece.text) : len(choice.text)]
            detail = f"expected {expected_text!r}, got {piece.text!r}"
            self._violated(Kind.TEXT, (piece,), detail)
        elif tuple(choice.logprobs) != truth.logprobs[: len(choice.logprobs)]:
            choice.is_broken = True
            detail = f"at offset {piece.offset} of choice {piece.choice}"
            self._violated(Kind.LOGPROBS, (piece,), detail)

    def _finished(self, end: Finished) -> None:
        self._verdict.migrated += end.num_migrations > 0
        if self._truth is None:
            self._verdict.complete += 1
            return
        is_complete = True
        for index, truth in enumerate(self._truth.choices):
            choice = self._choices.get(index, _Choice())
            is_complete &= not choice.is_broken
            missing = len(truth.token_ids) - choice.next_offset
            if missing > 0:
                is_complete = False
                self._verdict.lost += missing
                before = choice.pieces[-1:]
                detail = f"offset {choice.next_offset} of choice {index}"
                self._violated(Kind.LOST, (*before, end), detail)
            elif not choice.is_broken and choice.text != truth.text:
                is_complete = False
                detail = f"choice {index} lacks {truth.text[len(choice.text) :]!r}"
                self._violated(Kind.TEXT, (end,), detail)
            elif not choice.is_broken and len(choice.logprobs) != len(truth.logprobs):
                is_complete = False
                detail = f"choice {index}: expected {len(truth.logprobs)}"
                self._violated(Kind.LOGPROBS, (end,), detail)
        if end.billing != self._truth.billing:
            is_complete = False
            detail = f"expected {self._truth.billing}, got {end.billing}"
            self._violated(Kind.BILLING, (end,), detail)
        self._verdict.complete += is_complete

    def _violated(self, kind: Kind, witnesses: tuple[Event, ...], detail: str) -> None:
        self._verdict.violations.append(Violation(kind, self._name, witnesses, detail))


def truth_of(history: Sequence[Event]) -> Truth:
    """The truth, from the history of one undisturbed stream."""
    (end,) = [event for event in history if isinstance(event, Finished)]
    pieces = [event for event in history if isinstance(event, Came)]
    choices: list[ChoiceTruth] = []
    for index in range(max((piece.choice for piece in pieces), default=-1) + 1):
        own = [piece for piece in pieces if piece.choice == index]
        choices.append(
            ChoiceTruth(
                tuple(token_id for piece in own for token_id in piece.token_ids),
                "".join(piece.text for piece in own),
                tuple(logprob for piece in own for logprob in piece.logprobs),
            )
        )
    return Truth(tuple(choices), end.billing)


def longest_wait_s(times: Sequence[float], since: float) -> float | None:
    """How long a reader waited at most for its next token, from a moment on; None if none came.

    `times` are those at which its tokens came, in order. The wait that `since` falls into counts
    from the token before it, if there was one. Longest, not first: what was under way when a fault
    began still comes, and only then it is quiet.
    """
    after = [at for at in times if at > since]
    if not after:
        return None
    before = max((at for at in times if at <= since), default=since)
    return max(b - a for a, b in pairwise([before, *after]))


def _with(pieces: Sequence[Came], offset: int) -> Came:
    """The piece that brought an offset."""
    return next(p for p in pieces if p.offset <= offset < p.offset + len(p.token_ids))


def _shown(event: Event) -> str:
    return f"    {event.at:.6f} {event}"
