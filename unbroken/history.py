"""What a client saw of a stream, and how it differs from an undisturbed run."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from unbroken.generation import TokenLogprobs
from unbroken.generation_stream import GenerationStream, Piece
from unbroken.v1 import inference_service_pb2 as pb


@dataclass(slots=True)
class ChoiceHistory:
    """One choice as it arrived: token by token, with the time of arrival."""

    offsets: list[int] = field(default_factory=list[int])
    token_ids: list[int] = field(default_factory=list[int])
    arrived_at: list[float] = field(default_factory=list[float])
    """Monotonic seconds, one per token; tokens of one message share theirs."""
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])

    def add(self, piece: Piece, now: float) -> None:
        """Record a piece as it came, offsets as they were claimed."""
        count = len(piece.token_ids)
        self.offsets += range(piece.offset, piece.offset + count)
        self.token_ids += piece.token_ids
        self.arrived_at += [now] * count
        self.text += piece.text
        self.logprobs += piece.logprobs

    def gap_s(self, offset: int) -> float | None:
        """How long the client waited for the token at `offset` after the one before it."""
        if not 0 < offset < len(self.arrived_at):
            return None
        return self.arrived_at[offset] - self.arrived_at[offset - 1]


@dataclass(frozen=True, slots=True)
class Difference:
    """How a history differs from an undisturbed one, in tokens over all choices."""

    lost: int
    """Offsets that never came."""
    duplicated: int
    """Offsets that came more than once."""
    changed: int
    """Offsets with another token."""
    is_rest_equal: bool
    """Text, log probabilities, finish reasons and billed usage are equal."""

    @property
    def is_none(self) -> bool:
        return not (self.lost or self.duplicated or self.changed) and self.is_rest_equal


@dataclass(slots=True)
class History:
    """Everything one call delivered."""

    choices: dict[int, ChoiceHistory] = field(default_factory=dict[int, ChoiceHistory])
    started: pb.StreamStarted | None = None
    finished: pb.StreamFinished | None = None

    def add(self, piece: Piece, now: float) -> None:
        """Record a piece."""
        self.choices.setdefault(piece.choice_index, ChoiceHistory()).add(piece, now)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def migrations(self) -> list[pb.AttemptSummary]:
        """The attempts that went on where another had failed and delivered something."""
        if self.finished is None:
            return []
        return [
            attempt
            for attempt in self.finished.attempts
            if attempt.HasField("gap") and attempt.first_offset > 0
        ]

    def difference(self, undisturbed: "History") -> Difference:
        """Compare with a run of the same request in which nothing failed."""
        lost = duplicated = changed = 0
        is_rest_equal = self.choices.keys() == undisturbed.choices.keys()
        for index, expected in undisturbed.choices.items():
            seen = self.choices.get(index, ChoiceHistory())
            by_offset = dict(zip(seen.offsets, seen.token_ids, strict=True))
            duplicated += len(seen.offsets) - len(by_offset)
            lost += sum(offset not in by_offset for offset in expected.offsets)
            changed += _num_changed(by_offset, expected)
            is_rest_equal &= seen.text == expected.text and seen.logprobs == expected.logprobs
        is_rest_equal &= _billing(self.finished) == _billing(undisturbed.finished)
        return Difference(lost, duplicated, changed, is_rest_equal)


async def record(stream: GenerationStream, history: History | None = None) -> History:
    """Read a stream to its end; `history` grows while it is read."""
    history = history or History()
    async for piece in stream:
        history.started = stream.started
        history.add(piece, time.monotonic())
    history.started, history.finished = stream.started, stream.finished
    return history


def _num_changed(by_offset: Mapping[int, int], expected: ChoiceHistory) -> int:
    pairs = dict(zip(expected.offsets, expected.token_ids, strict=True))
    return sum(pairs.get(offset) != token_id for offset, token_id in by_offset.items())


def _billing(finished: pb.StreamFinished | None) -> object:
    """What the end says and an interruption must not change."""
    if finished is None:
        return None
    return (
        finished.usage.prompt_tokens,
        finished.usage.completion_tokens,
        [
            (
                choice.choice_index,
                choice.finish_reason,
                choice.stop,
                choice.HasField("stop_token_id"),
                choice.stop_token_id,
                choice.num_tokens,
                choice.cumulative_logprob,
            )
            for choice in finished.choices
        ],
    )
