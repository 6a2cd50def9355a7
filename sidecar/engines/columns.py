"""What many calls to an engine said, gathered into frames of the contract. No I/O.

Engines that are asked by one call per attempt know no steps. What all calls said within a
moment becomes one frame: that is an engine step, or nearly so. A step is whole when all attempts
that have begun said something. Windows are kept here, since
such engines cannot pause: tokens beyond one are held until it moves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from unbroken.generation import TokenLogprobs, logprobs_to_proto
from unbroken.v1 import attempt_pb2, worker_pb2


@dataclass(slots=True, eq=False)
class Progress:
    """How far an attempt is."""

    slot: int
    first_offset: int
    offset: int
    """After the last token that a frame has or will have."""
    window_tokens: int
    """0: none."""
    acknowledged: int
    wants_logprobs: bool
    held: list[int] = field(default_factory=list[int])
    """Tokens beyond the window."""
    held_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    end: attempt_pb2.AttemptEnded | None = None
    """Its last word, once nothing is held any more."""

    @property
    def num_produced(self) -> int:
        """Tokens that came, told or not."""
        return self.offset - self.first_offset + len(self.held)

    @property
    def room(self) -> int | None:
        """Tokens that its window has room for; None: any number."""
        if not self.window_tokens:
            return None
        return max(0, self.acknowledged + self.window_tokens - self.offset)


class Columns:
    """The next frame."""

    def __init__(self) -> None:
        self.num_steps = 0
        """Frames with tokens, so far."""
        self._running: dict[int, Progress] = {}
        self._speaking: set[int] = set()
        """Slots that run, have begun and hold nothing back."""
        self._rows: dict[int, tuple[int, list[int]]] = {}  # By slot: first offset, tokens.
        self._frame = attempt_pb2.StepFrame()  # All but the rows.
        self._logprobs: dict[int, attempt_pb2.SlotLogprobs] = {}
        self._has_news = False

    def __iter__(self) -> Iterator[Progress]:
        """Attempts that are not over."""
        return iter(self._running.values())

    @property
    def is_step_whole(self) -> bool:
        """Whoever can be expected to say something in each step has done so since the last one."""
        return bool(self._rows) and len(self._rows) >= len(self._speaking)

    def begin(
        self, slot: int, *, first_offset: int, window_tokens: int, wants_logprobs: bool
    ) -> Progress:
        """An attempt runs."""
        assert slot not in self._running, "a slot is used once"
        progress = self._running[slot] = Progress(
            slot, first_offset, first_offset, window_tokens, first_offset, wants_logprobs
        )
        return progress

    def produced(
        self, progress: Progress, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Tokens came; the hot path. Those beyond the window are held."""
        if progress.end is not None or not token_ids:
            return
        assert not progress.wants_logprobs or len(logprobs) == len(token_ids), "one for each"
        room = progress.room
        if progress.held or (room is not None and room < len(token_ids)):
            progress.held += token_ids
            progress.held_logprobs += logprobs
            self._release(progress)
            if progress.held:
                self._speaking.discard(progress.slot)
            return
        self._enter(progress, token_ids, logprobs)

    def acknowledged(self, slot: int, offset: int) -> Progress | None:
        """The window moves; returns the attempt if it holds nothing (any more)."""
        progress = self._running.get(slot)
        if progress is None:
            return None
        progress.acknowledged = max(progress.acknowledged, offset)
        if progress.held:
            self._release(progress)
        return None if progress.held else progress

    def ended(self, progress: Progress, ended: attempt_pb2.AttemptEnded) -> None:
        """The attempt came to its end, behind all that it produced. The first end counts."""
        if progress.end is None:
            progress.end = ended
            self._speaking.discard(progress.slot)
            self._end_if_told(progress)

    def cut(self, progress: Progress, ended: attempt_pb2.AttemptEnded) -> None:
        """The attempt is over now; what is held is not told any more."""
        if self._running.get(progress.slot) is progress:
            progress.held.clear()
            progress.held_logprobs.clear()
            progress.end = ended
            self._speaking.discard(progress.slot)
            self._end_if_told(progress)

    def refused(self, refused: attempt_pb2.AttemptRefused) -> None:
        """An attempt did not begin."""
        self._running.pop(refused.slot, None)
        self._frame.refused.append(refused)
        self._has_news = True

    def load(self, load: worker_pb2.LoadReport) -> None:
        """The engine's load now."""
        self._frame.load.CopyFrom(load)
        self._has_news = True

    def kv_events(self, events: worker_pb2.KvEvents) -> None:
        """What became of reusable blocks."""
        self._frame.kv_events.append(events)
        self._has_news = True

    def take(self) -> attempt_pb2.StepFrame | None:
        """Everything since the last frame; None if that is nothing."""
        if not (self._rows or self._has_news):
            return None
        frame, self._frame = self._frame, attempt_pb2.StepFrame()
        if self._rows:
            rows, self._rows = self._rows, {}
            self.num_steps += 1
            columns = list(rows.values())
            frame.slots.extend(rows)
            frame.offsets.extend([offset for offset, _ in columns])
            if any(len(token_ids) != 1 for _, token_ids in columns):
                frame.token_counts.extend([len(token_ids) for _, token_ids in columns])
            frame.token_ids.extend([token for _, token_ids in columns for token in token_ids])
            if self._logprobs:
                frame.logprobs.extend(self._logprobs.values())
                self._logprobs = {}
        self._has_news = False
        return frame

    def _enter(
        self, progress: Progress, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        slot = progress.slot
        self._speaking.add(slot)
        row = self._rows.get(slot)
        if row is None:
            self._rows[slot] = (progress.offset, list(token_ids))
        else:
            row[1].extend(token_ids)
        progress.offset += len(token_ids)
        if progress.wants_logprobs:
            mine = self._logprobs.get(slot)
            if mine is None:
                mine = self._logprobs[slot] = attempt_pb2.SlotLogprobs(slot=slot)
            mine.tokens.extend(map(logprobs_to_proto, logprobs))

    def _release(self, progress: Progress) -> None:
        room = progress.room
        num = len(progress.held) if room is None else min(room, len(progress.held))
        if num:
            self._enter(progress, progress.held[:num], progress.held_logprobs[:num])
            del progress.held[:num], progress.held_logprobs[:num]
            self._end_if_told(progress)

    def _end_if_told(self, progress: Progress) -> None:
        if progress.end is None or progress.held:
            return
        del self._running[progress.slot]
        progress.end.slot, progress.end.end_offset = progress.slot, progress.offset
        self._frame.ended.append(progress.end)
        self._has_news = True
