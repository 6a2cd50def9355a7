"""Whether what an engine says in a frame can be believed. No I/O.

A frame is checked whole before any of it counts, so nothing of a broken one reaches a frontend.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from sidecar.engines.base import EngineUp
from sidecar.ledger import Attempt
from sidecar.rows import ReaderT, Rows
from unbroken.v1 import attempt_pb2


class BrokenContract(Exception):  # noqa: N818 - It names what happened.
    """The engine said what the contract does not allow."""


def check(
    frame: attempt_pb2.StepFrame,
    running: Mapping[int, Attempt[ReaderT]],
    up: EngineUp,
    rows: Rows[ReaderT] | None = None,
) -> Sequence[Attempt[ReaderT]]:
    """The attempt of each row: if they are those of `rows`, its own `attempts`.

    Raises `BrokenContract`. The hot path: every token passes here.
    """
    # Slices are lists, which take half the time to go through.
    slots, offsets, counts = frame.slots[:], frame.offsets[:], frame.token_counts[:]
    token_ids = frame.token_ids[:]
    num_rows, num_tokens = len(slots), len(token_ids)
    is_known = rows is not None and slots == rows.slots and not (counts or frame.logprobs)
    known = rows if is_known else None
    attempts: Sequence[Attempt[ReaderT]]
    if known is not None:
        attempts = known.attempts
    else:
        try:
            attempts = [running[slot] for slot in slots]
        except KeyError as error:
            raise BrokenContract(f"expected a slot that runs, got {error}") from None
    if len(offsets) != num_rows or (counts and len(counts) != num_rows):
        raise BrokenContract(
            f"expected columns of one length, got {num_rows} slots, {len(offsets)} offsets, "
            f"{len(counts)} counts"
        )
    num_expected = sum(counts) if counts else num_rows
    if num_tokens != num_expected or 0 in counts:
        raise BrokenContract(
            f"expected {num_expected} tokens, one or more a row, got {num_tokens} in {num_rows}"
        )
    if num_rows:
        vocab_size = up.tokenizer.vocab_size
        if (highest := max(token_ids)) >= vocab_size:
            raise BrokenContract(f"expected token ids below {vocab_size}, got {highest}")
        if known is None or offsets != known.ends:
            expected = [attempt.end_offset for attempt in attempts]
            if counts or expected != offsets or len(set(slots)) != num_rows:
                _check_offsets(frame, attempts)
    if frame.ended or frame.refused or frame.logprobs:
        _check_ends(frame, running)
    for events in frame.kv_events:
        if events.rank >= (up.description.num_ranks or 1):
            raise BrokenContract(
                f"expected ranks below {up.description.num_ranks or 1}, got {events.rank}"
            )
    return attempts


def _check_offsets(frame: attempt_pb2.StepFrame, attempts: Sequence[Attempt[ReaderT]]) -> None:
    """Rows of several tokens, several rows of a slot, or a gap."""
    ends: dict[int, int] = {}
    counts = frame.token_counts or [1] * len(attempts)
    for attempt, offset, count in zip(attempts, frame.offsets, counts, strict=True):
        expected = ends.get(attempt.slot, attempt.end_offset)
        if offset != expected:
            raise _gap(attempt.slot, expected, offset)
        ends[attempt.slot] = offset + count


def _check_ends(frame: attempt_pb2.StepFrame, running: Mapping[int, Attempt[ReaderT]]) -> None:
    """What comes beside tokens."""
    num_new = Counter[int]()
    for slot, count in zip(frame.slots, frame.token_counts or [1] * len(frame.slots), strict=True):
        num_new[slot] += count
    num_logprobs = Counter[int]()
    for logprobs in frame.logprobs:
        num_logprobs[logprobs.slot] += len(logprobs.tokens)
    for slot, num in num_logprobs.items():
        if num != num_new[slot]:
            raise BrokenContract(
                f"slot {slot}: expected {num_new[slot]} log probabilities, got {num}"
            )
    over = set[int]()
    for message in (*frame.ended, *frame.refused):
        attempt = running.get(message.slot)
        if attempt is None or message.slot in over:
            raise BrokenContract(f"expected the end of a slot that runs, got {message.slot}")
        over.add(message.slot)
        expected = attempt.end_offset + num_new[message.slot]
        if isinstance(message, attempt_pb2.AttemptRefused):
            if expected != attempt.first_offset:
                raise BrokenContract(f"slot {message.slot}: expected no refusal after tokens")
        elif message.end_offset != expected:
            raise _gap(message.slot, expected, message.end_offset)
        elif bool(message.finish_reason) == bool(message.failure):
            raise BrokenContract(
                f"slot {message.slot}: expected to end with a finish_reason or a failure, got "
                f"{message.finish_reason} and {message.failure}"
            )


def _gap(slot: int, expected: int, seen: int) -> BrokenContract:
    return BrokenContract(f"slot {slot}: expected offset {expected}, got {seen}")
