"""The attempts of an engine's frames, as long as these stay the same. No I/O.

With hundreds of streams nothing of a stream is in a near cache when its next token comes, so what
costs is to touch it. While frames have the same rows with one token each, no attempt is touched: a
step is a column of token ids beside those of the steps before, and is checked and handed on as a
whole. What an attempt has produced is entered when somebody asks for it, and every `STEPS_MAX`
steps. Whoever changes for whom a row is, or ends it, lets the rows `part` first; what is to be
entered then waits for who asks, as a death has to be told at once.

`frontend/convoy.py` does the like where streams leave the mesh.
"""

from array import array
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Final, Generic, NamedTuple, Protocol, TypeVar, cast

from typing_extensions import override

from sidecar.ledger import Attempt, Together
from unbroken.v1 import attempt_pb2

ROWS_MIN: Final = 8
"""Of a frame, for it to be worth it."""
STEPS_MAX: Final = 32
"""Tokens of an attempt that are not entered yet, at most."""


class Reader(Protocol):
    """Who is told tokens: a link."""

    def rows(self, slots: Sequence[int], offsets: Sequence[int], token_ids: Sequence[int]) -> None:
        """A token for each of its attempts; if `slots` is the same object as before, each at the
        next offset. The columns do not change afterwards."""
        ...


ReaderT = TypeVar("ReaderT", bound=Reader)


class _Share(NamedTuple, Generic[ReaderT]):
    """What one reader is told of a step."""

    reader: ReaderT
    slots: Sequence[int]
    """Its own, of its rows: one object for all steps, by which it knows them again."""
    take: Callable[[Sequence[int]], Sequence[int]] | None
    """Takes its rows out of a column; None: all are its own."""


class Rows(Together, Generic[ReaderT]):
    """Those of frames with one token for each of the same attempts."""

    def __init__(self, slots: list[int], attempts: Sequence[Attempt[ReaderT]]) -> None:
        """All must have entered all that came before, and be in no rows."""
        self.slots = slots
        """As the engine has them,"""
        self.attempts = attempts
        """and whose they are; both are empty once they have parted."""
        self._members = attempts
        self.ends = [attempt.end_offset for attempt in attempts]
        self._steps: list[array[int]] = []
        """The columns that are not entered yet."""
        self._shares = _shares(attempts)
        self.readers = [share.reader for share in self._shares]
        """Who is told by `step`."""
        for row, attempt in enumerate(attempts):
            assert attempt.place is None, "it has entered all that came before"
            attempt.place = self, row

    def step(self, frame: attempt_pb2.StepFrame) -> None:
        """Each has one more token. The frame has passed `frames.check` with these rows.

        The hot path.
        """
        # Columns of another message are copied much faster than lists, and slices of them are
        # lists, which take half the time to go through.
        token_ids, offsets = frame.token_ids[:], self.ends
        self._steps.append(array("I", token_ids))
        self.ends = [offset + 1 for offset in offsets]
        for reader, slots, take in self._shares:
            if take is None:
                reader.rows(slots, frame.offsets, frame.token_ids)
            else:
                reader.rows(slots, take(offsets), take(token_ids))
        if len(self._steps) >= STEPS_MAX:
            self.settle()

    @override
    def settle(self) -> None:
        steps, self._steps = self._steps, []
        if steps:
            for attempt, token_ids in zip(self._members, zip(*steps, strict=True), strict=True):
                attempt.entered.extend(token_ids)
        if not self.attempts:  # They have parted.
            for attempt in self._members:
                attempt.place = None
            self._members = ()

    @override
    def part(self) -> None:
        self.slots, self.attempts, self._shares, self.readers = [], (), [], []


def _shares(attempts: Sequence[Attempt[ReaderT]]) -> list[_Share[ReaderT]]:
    rows: dict[ReaderT, list[int]] = {}
    for row, attempt in enumerate(attempts):
        if attempt.live_link is not None:
            rows.setdefault(attempt.live_link, []).append(row)
    return [
        _Share(
            reader,
            attempt_pb2.StepFrame(slots=[attempts[row].link_slot for row in mine]).slots,
            None if len(mine) == len(attempts) else _taking(mine),
        )
        for reader, mine in rows.items()
    ]


def _taking(rows: Sequence[int]) -> Callable[[Sequence[int]], Sequence[int]]:
    """What takes those out of a column."""
    if len(rows) == 1:
        (row,) = rows
        return lambda column: (column[row],)
    return cast("Callable[[Sequence[int]], Sequence[int]]", itemgetter(*rows))
