"""What a stream decides: events in, commands out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.continuation import Abilities
from frontend.failure_detector import DetectorLimits
from frontend.stream import (
    ADOPTION_S_MAX,
    BUSY_AT_ONCE,
    BUSY_PAUSE_S_MAX,
    EPOCH_MAX,
    GENERATION_BITS,
    Abort,
    Ack,
    Adopt,
    Command,
    Finish,
    Life,
    Limits,
    Origin,
    Past,
    Place,
    Relink,
    State,
    Stream,
    first_epoch,
)
from tests.support.streams import (
    NATIVE,
    PROMPT,
    REGENERATING,
    W1,
    W2,
    W3,
    A,
    B,
    C,
    admitted,
    checkpoint,
    place,
    streaming,
)
from tests.support.vocabulary import EOS, PIECES, spelled, token, tokenizer
from unbroken import outcome
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import Constraint, TokenLogprobs
from unbroken.outcome import (
    ContinuationClass,
    ContinuationPolicy,
    Continued,
    FailureKind,
    FinishReason,
)
from unbroken.v1 import generation_pb2, inference_service_pb2, worker_pb2

CRASH = FailureKind.CRASH
CANCELLED = UnbrokenError(Reason.CANCELLED, "by request")


def lose(stream: Stream, kind: FailureKind = CRASH, now: float = 2.0) -> list[Command]:
    """The current attempt is lost."""
    return stream.lost(stream.epoch, kind, "gone", now)


def reason_of(stream: Stream) -> Reason:
    """Why it failed."""
    stream.check()
    assert stream.outcome is not None
    assert stream.outcome.error is not None
    return stream.outcome.error.reason


def text_of(stream: Stream) -> str:
    """All text that the client has not been sent."""
    return stream.take()[0].text


# Epochs.


def test_an_attempt_that_its_former_reader_let_go_is_no_failure_of_an_engine() -> None:
    for is_known in (True, False):
        stream = streaming([A])
        stream.unlinked(1, "reset", 2.0)
        stream.relinked(1, 2.1)
        if is_known:
            stream.ended(stream.epoch, 1, FinishReason.CANCELLED, now=2.2)
        else:
            detail = "the stream is not known here"
            stream.refused(stream.epoch, FailureKind.ENGINE_ERROR, detail, now=2.2)
        assert [a.failure for a in stream.attempts] == [FailureKind.PARTITION] * 2
        assert stream.state is State.PLACING
        stream.check()


def test_a_late_token_of_a_lost_worker_is_dropped() -> None:
    stream = streaming([A])
    assert lose(stream) == [Abort(1), Place(2, frozenset({W1}))]
    assert not stream.tokens(1, 1, [B], 2.1)
    assert not stream.token(1, 1, B, 2.1)
    assert stream.ledger.tolist() == [A]


def test_a_late_token_is_dropped_when_another_worker_has_begun() -> None:
    stream = streaming([A])
    stream.token(1, 1, B, 1.5)
    lose(stream)
    place(stream, W2)
    assert not stream.token(1, 2, C, 2.1)
    assert not stream.tokens(1, 2, [C], 2.1)
    assert stream.ledger.tolist() == [A, B]


def test_a_single_token_is_taken_as_a_row_of_one() -> None:
    by_row, one_by_one = streaming(max_tokens=3), streaming(max_tokens=3)
    for offset, token_id in enumerate([A, B, C]):
        assert by_row.tokens(1, offset, [token_id], 1.0) == one_by_one.token(
            1, offset, token_id, 1.0
        )
    assert by_row.outcome == one_by_one.outcome
    assert by_row.take()[0] == one_by_one.take()[0]


@given(
    token_ids=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=40),
    stop=st.sampled_from([(), ("no",)]),
    window_tokens=st.sampled_from([0, 1, 5, 1024]),
    polls=st.lists(st.sampled_from(["one", "all", "none"]), min_size=40, max_size=40),
)
def test_tokens_taken_singly_are_what_would_be_taken_in_pieces(
    token_ids: list[int], stop: tuple[str, ...], window_tokens: int, polls: list[str]
) -> None:
    limits = Limits(window_tokens=window_tokens)
    single, pieces = (streaming(max_tokens=100, stop=stop, limits=limits) for _ in range(2))
    ids, text, other_text = list[int](), "", ""
    commands, other_commands = list[Command](), list[Command]()
    for offset, (token_id, poll) in enumerate(zip(token_ids, polls, strict=False)):
        assert single.token(1, offset, token_id, 1.0) == pieces.token(1, offset, token_id, 1.0)
        if poll == "none":
            continue
        one = single.take_one() if poll == "one" else None
        if one is not None:
            assert one[0] == len(ids)
            ids.append(one[1])
            text += tokenizer().texts[one[1]] or "-"
        else:
            piece, acks = single.take()
            assert piece.offset == len(ids)
            ids += piece.token_ids
            text += piece.text
            commands += acks
        piece, acks = pieces.take()
        other_text += piece.text
        other_commands += acks
        assert text == other_text
        assert ids == single.ledger.tolist() == pieces.ledger.tolist()
        assert commands == other_commands
    single.check()


def test_one_token_is_taken_singly_and_two_or_half_a_character_are_not() -> None:
    stream = streaming([A])
    assert stream.take_one() is None
    stream.take()
    stream.token(1, 1, B, 1.0)
    assert stream.take_one() == (1, B)
    assert stream.take_one() is None
    stream.token(1, 2, A, 1.0)
    stream.token(1, 3, B, 1.0)
    assert stream.take_one() is None
    assert list(stream.take()[0].token_ids) == [A, B]
    half = PIECES.index(b"\xc3")
    for offset, token_id in ((4, half), (5, half + 1)):
        stream.token(1, offset, token_id, 1.0)
        assert stream.take_one() is None
        assert stream.take()[0].text == ("" if token_id == half else "é")


def test_how_far_an_attempt_got_is_known_at_any_time() -> None:
    stream = streaming([A])
    for offset in (1, 2):
        stream.token(1, offset, B, 1.0)
        assert stream.attempts[0].end_offset == offset + 1
    assert stream.is_prefilled
    stream.token(1, 3, C, 1.0)
    lose(stream)
    place(stream, W2)
    assert [attempt.end_offset for attempt in stream.attempts] == [4, 4]
    stream.check()


@given(
    token_ids=st.lists(st.integers(0, EOS), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    stop=st.sampled_from([(), ("no",)]),
    max_tokens=st.integers(1, 45),
)
def test_tokens_that_come_in_pieces_are_those_that_come_one_by_one(
    token_ids: list[int], cuts: list[int], stop: tuple[str, ...], max_tokens: int
) -> None:
    pieces, single = (streaming(max_tokens=max_tokens, stop=stop) for _ in range(2))
    offset = 0
    while offset < len(token_ids) and pieces.outcome is None:
        piece = token_ids[offset : offset + cuts[offset % len(cuts)]]
        pieces.tokens(1, offset, piece, 1.0)
        for index, token_id in enumerate(piece):
            single.token(1, offset + index, token_id, 1.0)
        offset += len(piece)
    assert pieces.outcome == single.outcome
    assert pieces.attempts == single.attempts
    assert pieces.take() == single.take()
    pieces.check()


def test_a_loss_that_is_reported_twice_counts_once() -> None:
    stream = streaming([A], limits=Limits(migrations_max=1))
    lose(stream)
    assert stream.lost(1, FailureKind.HANG, "silence", 2.1) == []
    place(stream, W2)
    assert stream.lost(1, FailureKind.HANG, "silence", 2.2) == []
    assert stream.state is State.RUNNING


def test_a_late_refusal_end_and_placement_are_dropped() -> None:
    stream = streaming([A])
    lose(stream)
    assert stream.refused(1, FailureKind.OVERLOAD, "full", now=2.0) == []
    assert stream.ended(1, 1, FinishReason.STOP, now=2.0) == []
    assert stream.placed(1, W3, NATIVE) == []
    assert stream.unplaceable(1, CANCELLED) == []
    assert stream.state is State.PLACING


# Offsets.


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_a_gap_or_a_repetition_is_a_protocol_failure(offset: int) -> None:
    stream = streaming([A])
    assert stream.tokens(1, offset, [B], 2.0) == [Abort(1), Place(2, frozenset({W1}))]
    assert stream.attempts[0].failure is FailureKind.PROTOCOL
    assert stream.ledger.tolist() == [A]


@pytest.mark.parametrize("offset", [0, 3])
def test_a_gap_before_a_single_token_is_a_protocol_failure(offset: int) -> None:
    stream = streaming([A])
    stream.token(1, 1, B, 1.5)
    assert stream.token(1, offset, C, 2.0) == [Abort(1), Place(2, frozenset({W1}))]
    assert stream.attempts[0].failure is FailureKind.PROTOCOL


def test_a_prefix_generated_again_is_verified_and_suppressed() -> None:
    stream = streaming([A, B], abilities=REGENERATING, temperature=1.0)
    assert text_of(stream) == "ab"
    lose(stream)
    start = place(stream, W2, REGENERATING)
    assert start.checkpoint == stream.original
    assert not stream.tokens(2, 0, [A], 3.0)
    assert not stream.has_output
    assert not stream.tokens(2, 1, [B, C], 3.0)
    assert text_of(stream) == "c"
    assert stream.accounts.recomputed_decode_tokens == 2
    assert stream.continued is Continued.EXACT


def test_a_prefix_that_diverges_leads_to_another_worker() -> None:
    stream = streaming([A, B], abilities=REGENERATING, temperature=1.0)
    lose(stream)
    place(stream, W2, REGENERATING)
    assert stream.tokens(2, 0, [A, C], 3.0) == [Abort(2), Place(3, frozenset({W1, W2}))]
    assert stream.attempts[1].failure is FailureKind.DIVERGED
    assert stream.ledger.tolist() == [A, B]


def test_a_worker_that_leaves_out_the_prefix_is_not_believed() -> None:
    stream = streaming([A, B], abilities=REGENERATING, temperature=1.0)
    lose(stream)
    place(stream, W2, REGENERATING)
    stream.tokens(2, 2, [C], 3.0)
    assert stream.attempts[1].failure is FailureKind.PROTOCOL
    assert stream.ledger.tolist() == [A, B]


@pytest.mark.parametrize(
    ("end_offset", "failure"), [(1, FailureKind.DIVERGED), (2, FailureKind.PROTOCOL)]
)
def test_an_output_that_ends_within_the_prefix_is_not_believed(
    end_offset: int, failure: FailureKind
) -> None:
    stream = streaming([A, B], abilities=REGENERATING, temperature=1.0)
    lose(stream)
    place(stream, W2, REGENERATING)
    stream.tokens(2, 0, [A], 3.0)
    stream.ended(2, end_offset, FinishReason.STOP, now=3.0)
    assert stream.attempts[1].failure is failure
    assert stream.state is State.PLACING


def test_an_end_at_another_offset_than_the_tokens_is_a_protocol_failure() -> None:
    stream = streaming([A])
    stream.ended(1, 2, FinishReason.LENGTH, now=2.0)
    assert stream.attempts[0].failure is FailureKind.PROTOCOL


# Ends.


def test_a_worker_that_dies_after_the_last_token_costs_nothing() -> None:
    stream = streaming([A], max_tokens=2)
    assert stream.tokens(1, 1, [B], 1.0) == [Finish()]
    assert lose(stream) == []
    assert stream.outcome is not None
    assert stream.outcome.finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_the_output_without_its_text() -> None:
    stream = streaming([A], stop_token_ids=frozenset({B}))
    assert stream.token(1, 1, B, 1.0) == [Finish()]
    assert stream.outcome is not None
    assert (stream.outcome.finish_reason, stream.outcome.stop_token_id) == (FinishReason.STOP, B)
    assert stream.ledger.tolist() == [A, B]
    assert text_of(stream) == "a"


def test_the_model_ends_the_output_unless_that_is_ignored() -> None:
    stream, ignoring = streaming([A]), streaming([A], ignore_eos=True)
    assert stream.token(1, 1, EOS, 1.0) == [Finish()]
    assert ignoring.token(1, 1, EOS, 1.0) == ()


def test_no_stop_token_ends_the_output_before_min_tokens() -> None:
    stream = streaming(stop_token_ids=frozenset({B}), min_tokens=2)
    assert not stream.tokens(1, 0, [B, A], 1.0)
    assert stream.tokens(1, 2, [B], 1.0) == [Finish()]
    assert text_of(stream) == "ba"


def test_what_comes_after_a_stop_token_in_the_same_row_is_dropped() -> None:
    stream = streaming(stop_token_ids=frozenset({B}), min_tokens=1)
    stream.tokens(1, 0, [B, B, C], 1.0)
    assert stream.ledger.tolist() == [B, B]


def test_what_comes_after_the_budget_is_dropped() -> None:
    stream = streaming(max_tokens=2)
    stream.tokens(1, 0, [A, B, C], 1.0)
    assert stream.ledger.tolist() == [A, B]


def test_a_stop_string_across_the_cut_is_found() -> None:
    stream = streaming([A, token("E")], stop=("END",))
    assert text_of(stream) == "a"
    lose(stream)
    place(stream, W2)
    n, d = token("no"), token("d")
    stream.tokens(2, 2, [n], 3.0)
    assert text_of(stream) == "Eno"
    stream.tokens(2, 3, [token("E")], 3.0)
    lose(stream)
    place(stream, W3)
    assert stream.tokens(3, 4, [token("END"), d], 3.0) == [Abort(3), Finish()]
    assert stream.outcome is not None
    assert (stream.outcome.finish_reason, stream.outcome.stop) == (FinishReason.STOP, "END")
    assert text_of(stream) == "E"
    assert stream.ledger.tolist() == [A, token("E"), n, token("E"), token("END")]


def test_a_stop_string_that_a_single_token_completes_ends_the_output() -> None:
    stream = streaming([A, token("E"), token("n")], stop=("no",))
    assert stream.token(1, 3, token("o"), 2.0) == [Abort(1), Finish()]
    assert text_of(stream) == "aE"


@pytest.mark.parametrize(("include_stop", "text"), [(False, "a"), (True, "ayes")])
def test_the_text_of_a_stop_string_is_delivered_only_if_asked_for(
    include_stop: bool, text: str
) -> None:
    stream = streaming(stop=("yes",), include_stop=include_stop)
    stream.tokens(1, 0, [A, token("yes"), C], 1.0)
    assert text_of(stream) == text
    assert stream.ledger.tolist() == [A, token("yes")]


def test_a_stop_string_that_the_rest_of_a_character_completes_ends_the_output() -> None:
    half_a_character = PIECES.index(b"\xc3")
    stream = streaming(max_tokens=2, stop=("\N{REPLACEMENT CHARACTER}",))
    stream.tokens(1, 0, [A, half_a_character], 1.0)
    assert stream.outcome is not None
    assert stream.outcome.finish_reason is FinishReason.STOP
    assert stream.outcome.stop == "\N{REPLACEMENT CHARACTER}"
    assert text_of(stream) == "a"


def test_a_character_across_the_cut_is_delivered_whole() -> None:
    first, last = PIECES.index(b"\xc3"), PIECES.index(b"\xa9")
    stream = streaming([A, first])
    assert text_of(stream) == "a"
    lose(stream)
    place(stream, W2)
    stream.tokens(2, 2, [last], 3.0)
    assert text_of(stream) == "é"


def test_held_back_text_is_delivered_at_the_end_but_not_with_an_error() -> None:
    ended = streaming([A, token("E")], stop=("END",))
    ended.ended(1, 2, FinishReason.LENGTH, now=2.0)
    assert text_of(ended) == "aE"
    failed = streaming([A, token("E")], stop=("END",))
    failed.cancelled(CANCELLED)
    assert text_of(failed) == "a"


def test_a_constraint_that_is_fulfilled_is_the_workers_to_tell() -> None:
    stream = streaming([token("yes")], constraint=Constraint("regex", "yes"))
    lose(stream)
    place(stream, W2)
    assert stream.ended(2, 1, FinishReason.STOP, now=3.0) == [Finish()]


def test_a_settled_stream_stays_settled() -> None:
    stream = streaming([A], max_tokens=2)
    stream.tokens(1, 1, [B], 1.0)
    settled = stream.outcome
    assert not stream.tokens(1, 2, [C], 2.0)
    assert not stream.token(1, 2, C, 2.0)
    assert stream.ended(1, 2, FinishReason.STOP, now=2.0) == []
    assert stream.lost(1, CRASH, "", 2.0) == []
    assert stream.refused(1, FailureKind.OVERLOAD, "", now=2.0) == []
    assert stream.cancelled(CANCELLED) == []
    assert stream.handle_timeout(1e9) == []
    assert stream.outcome is settled
    assert stream.ledger.tolist() == [A, B]


def test_a_cancel_settles_at_every_stage() -> None:
    unborn = Stream(streaming().original, tokenizer())
    assert unborn.cancelled(CANCELLED) == [Finish()]
    assert unborn.start(0.0) == []
    assert admitted().cancelled(CANCELLED) == [Finish()]
    running = streaming([A])
    assert running.cancelled(CANCELLED) == [Abort(1), Finish()]
    assert running.outcome is not None
    assert running.outcome.finish_reason is FinishReason.CANCELLED
    late = streaming([A])
    late.cancelled(UnbrokenError(Reason.DEADLINE_EXCEEDED, "late"))
    assert late.outcome is not None
    assert late.outcome.finish_reason is FinishReason.ERROR


def test_an_engine_that_keeps_the_deadline_ends_the_stream_and_is_no_lost_worker() -> None:
    stream = streaming([A])
    ended = stream.ended(1, 1, FinishReason.CANCELLED, now=2.0, is_expired=True)
    assert ended == [Finish()]
    assert reason_of(stream) is Reason.DEADLINE_EXCEEDED
    assert stream.attempts[-1].failure is FailureKind.UNSPECIFIED
    other = streaming([A])
    other.ended(1, 1, FinishReason.CANCELLED, now=2.0)
    assert other.attempts[0].failure is FailureKind.ENGINE_ERROR, "nobody had asked for its end"


# Losses and refusals.


def test_more_losses_than_allowed_end_the_stream() -> None:
    stream = streaming([A], limits=Limits(migrations_max=2))
    for life in (W2, W3):
        lose(stream)
        place(stream, life)
    assert lose(stream) == [Abort(3), Finish()]
    assert reason_of(stream) is Reason.MIGRATIONS_EXHAUSTED


def test_a_drain_is_not_counted() -> None:
    stream = streaming([A], limits=Limits(migrations_max=0))
    lose(stream, FailureKind.DRAIN)
    place(stream, W2)
    assert stream.state is State.RUNNING
    lose(stream)
    assert reason_of(stream) is Reason.MIGRATIONS_EXHAUSTED


def test_an_overload_in_mid_stream_is_not_counted() -> None:
    stream = streaming([A], limits=Limits(migrations_max=0))
    assert lose(stream, FailureKind.OVERLOAD) == [Abort(1), Place(2, frozenset({W1}))]


def test_workers_without_room_are_tried_at_longer_and_longer_intervals() -> None:
    stream = admitted(limits=Limits(migrations_max=0))
    pauses: list[float] = []
    for epoch in range(1, 12):
        stream.placed(epoch, W1, NATIVE)
        (command,) = stream.refused(epoch, FailureKind.OVERLOAD, "full", now=2.0)
        assert isinstance(command, Place)
        pauses.append(command.pause_s)
    assert pauses[:4] == [0.0, 0.01, 0.02, 0.04]
    assert max(pauses) == 1.0
    assert stream.deadline() == 30.0, "the wait goes on where it was"


def test_a_worker_that_hands_a_stream_back_at_once_counts_as_one_without_room() -> None:
    stream = admitted(limits=Limits(migrations_max=0))
    pauses: list[float] = []
    for epoch in range(1, 4):
        stream.placed(epoch, W1, NATIVE)
        _, command = stream.lost(epoch, FailureKind.OVERLOAD, "full", 5.0)
        assert isinstance(command, Place)
        pauses.append(command.pause_s)
    assert pauses == [0.0, 0.01, 0.02]
    assert stream.deadline() == 30.0


def test_progress_makes_refusals_forgotten() -> None:
    stream = streaming()
    stream.refused(1, FailureKind.OVERLOAD, "full", now=2.0)
    place(stream, W2)
    stream.tokens(2, 0, [A], 1.0)
    lose(stream)
    place(stream, W3)
    assert stream.refused(3, FailureKind.OVERLOAD, "full", now=2.0) == [
        Place(4, frozenset({W1, W2, W3}))
    ]


def test_a_refusal_is_no_interruption() -> None:
    stream = streaming()
    stream.refused(1, FailureKind.OVERLOAD, "full", now=2.0)
    place(stream, W2)
    stream.tokens(2, 0, [A], 1.0)
    stream.ended(2, 1, FinishReason.LENGTH, now=1.0, cached_tokens=2)
    assert stream.continued is Continued.NEVER
    assert stream.attempts[1].way is ContinuationClass.UNSPECIFIED
    assert stream.accounts.recomputed_prefill_tokens == 0
    assert stream.accounts.cached_prompt_tokens == 2


def test_a_stream_that_a_busy_worker_refused_was_never_there() -> None:
    stream = admitted()
    place(stream, W1)
    busy = FailureKind.OVERLOAD
    commands = stream.refused(1, busy, "over a threshold", now=2.0, is_busy=True)
    assert commands == [Place(2, frozenset())], "nobody is avoided, and there is no pause"
    assert (stream.attempts, stream.has_begun, stream.standing.life) == ([], False, None)
    pauses: list[float] = []
    for epoch in range(2, 10):
        place(stream, W2)
        (command,) = stream.refused(epoch, busy, "over a threshold", now=2.0, is_busy=True)
        assert isinstance(command, Place)
        pauses.append(command.pause_s)
    assert pauses[:BUSY_AT_ONCE] == [0.0] * BUSY_AT_ONCE
    assert pauses[-1] == BUSY_PAUSE_S_MAX, "two that contradict each other are no loop"
    place(stream, W1)
    stream.tokens(10, 0, [A], 2.1)
    assert [attempt.epoch for attempt in stream.attempts] == [10]
    stream.check()


def test_a_stream_that_lost_its_worker_before_a_token_was_never_where_it_is_refused() -> None:
    stream = admitted()
    place(stream, W1)
    lose(stream)
    place(stream, W2)
    (command,) = stream.refused(2, FailureKind.OVERLOAD, "", now=2.0, is_busy=True)
    assert command == Place(3, frozenset({W1})), "nobody else is avoided, and there is no pause"
    assert [attempt.life for attempt in stream.attempts] == [W1]
    assert stream.standing.life == W1
    stream.check()


def test_a_stream_with_output_that_is_refused_as_busy_is_refused_as_any() -> None:
    stream = streaming([A])
    lose(stream)
    place(stream, W2)
    (command,) = stream.refused(2, FailureKind.OVERLOAD, "", now=2.0, is_busy=True)
    assert command == Place(3, frozenset({W1, W2}))
    assert len(stream.attempts) == 2


def test_a_refused_continuation_is_not_charged() -> None:
    stream = streaming([A])
    lose(stream)
    place(stream, W2)
    stream.refused(2, FailureKind.OVERLOAD, "full", now=2.0)
    assert stream.accounts.recomputed_prefill_tokens == 0


def test_an_engine_of_another_life_is_only_a_refusal() -> None:
    stream = streaming([A])
    lose(stream)
    place(stream, W2)
    assert stream.refused(2, FailureKind.FENCED, "expected engine 2", now=2.0) == [
        Place(3, frozenset({W1, W2}))
    ]


def test_a_stream_with_a_newer_epoch_elsewhere_is_given_up() -> None:
    moved = streaming([A])
    lose(moved)
    place(moved, W2)
    moved.refused(2, FailureKind.FENCED, "old", epoch_known=9, now=2.0)
    assert reason_of(moved) is Reason.FENCED
    revoked = streaming([A])
    revoked.ended(1, 1, FinishReason.UNSPECIFIED, now=2.0, failure=FailureKind.FENCED)
    assert reason_of(revoked) is Reason.FENCED


def test_a_new_owner_whose_clock_is_behind_asks_again_above_but_not_for_ever() -> None:
    stream = Stream(checkpoint(), tokenizer(), epoch=first_epoch(5000), taken_ms=5000)
    stream.start(10.0)
    place(stream, W1)
    for _ in range(3):
        known = stream.epoch + 10 * (1 << GENERATION_BITS)
        (place_again,) = stream.refused(
            stream.epoch, FailureKind.FENCED, "old", epoch_known=known, now=10.005
        )
        assert isinstance(place_again, Place)
        assert place_again == Place(first_epoch(0, above=known), frozenset(), place_again.pause_s)
        place(stream, W1)
        assert stream.epoch > known
    stream.refused(stream.epoch, FailureKind.FENCED, "old", epoch_known=stream.epoch, now=11.0)
    assert reason_of(stream) is Reason.REQUEST_EXISTS


@pytest.mark.parametrize(("past", "reason"), [(None, "REQUEST_EXISTS"), (Past(), "FENCED")])
def test_who_is_refused_by_an_owner_that_may_have_come_later_gives_way(
    past: Past | None, reason: str
) -> None:
    stream = Stream(checkpoint(), tokenizer(), epoch=first_epoch(5000), taken_ms=5000, past=past)
    stream.start(10.0)
    place(stream, W1)
    known = first_epoch(5020)
    stream.refused(stream.epoch, FailureKind.FENCED, "taken", epoch_known=known, now=10.03)
    assert reason_of(stream) is Reason[reason]


@pytest.mark.parametrize("now_ms", [-1000, 0, 1_800_000_000_000, 2**42, 2**50])
def test_no_clock_is_so_wrong_that_there_are_no_epochs_left(now_ms: int) -> None:
    epoch = first_epoch(now_ms)
    assert epoch > 0
    for _ in range(1000):
        later = first_epoch(now_ms, above=epoch)
        assert epoch < later <= EPOCH_MAX
        epoch = later


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_rejected_request_fails_and_goes_nowhere_else(is_refused: bool) -> None:
    stream = streaming()
    if is_refused:
        stream.refused(1, FailureKind.REJECTED, "no such adapter", now=2.0)
    else:
        lose(stream, FailureKind.REJECTED)
    assert reason_of(stream) is Reason.REJECTED_BY_ENGINE


def test_an_end_without_a_finish_is_a_failure_of_the_engine() -> None:
    stream = streaming([A])
    stream.ended(1, 1, FinishReason.CANCELLED, now=2.0)
    assert stream.attempts[0].failure is FailureKind.ENGINE_ERROR
    assert stream.state is State.PLACING


def test_never_means_never() -> None:
    stream = streaming([A], policy=ContinuationPolicy.NEVER)
    assert lose(stream) == [Abort(1), Finish()]
    assert reason_of(stream) is Reason.WORKER_LOST


def test_never_does_not_mind_a_refusal() -> None:
    stream = streaming(policy=ContinuationPolicy.NEVER)
    assert stream.refused(1, FailureKind.OVERLOAD, "full", now=2.0) == [Place(2, frozenset({W1}))]


def test_a_stream_without_a_worker_fails_in_time() -> None:
    stream = admitted(limits=Limits(placement_timeout_s=5.0))
    assert stream.handle_timeout(4.9) == []
    assert stream.handle_timeout(5.0) == [Finish()]
    assert reason_of(stream) is Reason.NO_WORKER


def test_a_stream_that_every_worker_refuses_says_why() -> None:
    stream = admitted(limits=Limits(placement_timeout_s=5.0))
    stream.placed(1, W1, NATIVE)
    stream.refused(1, FailureKind.OVERLOAD, "full", now=2.0)
    stream.handle_timeout(5.0)
    assert reason_of(stream) is Reason.NO_WORKER
    assert stream.outcome is not None
    assert "OVERLOAD: full" in str(stream.outcome.error)


def test_a_stream_that_finds_no_other_worker_fails_in_time() -> None:
    stream = streaming([A], limits=Limits(placement_timeout_s=5.0))
    assert stream.deadline() is None
    lose(stream, now=2.0)
    assert stream.deadline() == 7.0
    stream.handle_timeout(7.0)
    assert reason_of(stream) is Reason.WORKER_LOST


def test_a_stream_that_is_unplaceable_fails_as_told() -> None:
    stream = admitted()
    assert stream.unplaceable(1, UnbrokenError(Reason.NO_WORKER, "gone")) == [Finish()]


# Ways.


def test_a_first_attempt_may_be_anywhere() -> None:
    stream = streaming(abilities=REGENERATING, temperature=1.0)
    lose(stream)
    other = Abilities("another", is_invariant=False)
    assert stream.way_at(other) is ContinuationClass.REGENERATE


def test_what_was_delivered_goes_on_in_its_own_numerics_class_only() -> None:
    stream = streaming([A])
    lose(stream)
    assert stream.way_at(Abilities("other", has_native_resume=True)) is (ContinuationClass.NONE)
    assert stream.way_at(NATIVE) is ContinuationClass.NATIVE


def test_an_inexact_continuation_is_allowed_marked_and_never_generated_again() -> None:
    stream = streaming(
        [A],
        abilities=REGENERATING,
        temperature=1.0,
        policy=ContinuationPolicy.ALLOW_INEXACT,
        limits=Limits(regenerate_tokens_max=0),
    )
    lose(stream)
    place(stream, W2, REGENERATING)
    assert stream.attempts[1].way is ContinuationClass.INEXACT
    assert stream.continued is not Continued.INEXACT, "nothing of it was delivered yet"
    stream.tokens(2, 1, [B], 3.0)
    assert stream.continued is Continued.INEXACT
    free = Stream(
        stream.original,
        tokenizer(),
        policy=ContinuationPolicy.ALLOW_INEXACT,
        limits=Limits(regenerate_tokens_max=100),
    )
    free.start(0.0)
    free.placed(1, W1, REGENERATING)
    free.tokens(1, 0, [A], 1.0)
    lose(free)
    place(free, W2, Abilities("other"))
    free.tokens(2, 1, [B], 3.0)
    lose(free)
    assert free.way_at(REGENERATING) is ContinuationClass.INEXACT


def test_without_permission_nothing_goes_on_inexactly() -> None:
    stream = streaming(
        [A], abilities=REGENERATING, temperature=1.0, limits=Limits(regenerate_tokens_max=0)
    )
    lose(stream)
    assert stream.way_at(REGENERATING) is ContinuationClass.NONE


# Windows.


@given(
    window=st.integers(0, 9),
    takes=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    cut=st.integers(0, 40),
)
def test_no_window_ever_stands_still(window: int, takes: list[int], cut: int) -> None:
    """A worker that keeps to its window comes to the end whenever the client reads."""
    stream = streaming(max_tokens=40, limits=Limits(window_tokens=window))
    first, offset, acked = 0, 0, 0
    rounds = iter(takes)
    for _ in range(400):
        if stream.state is State.DONE:
            break
        if stream.state is State.RUNNING and offset == cut and len(stream.attempts) == 1 and cut:
            lose(stream)
            start = place(stream, W2)
            first = offset = acked = start.checkpoint.first_offset
        if not window or offset < acked + window:
            stream.tokens(stream.epoch, offset, [A], 1.0)
            offset += 1
        for _ in range(next(rounds, 1)):
            _, commands = stream.take()
            for command in commands:
                assert isinstance(command, Ack)
                assert command.offset <= stream.num_sent
                assert first <= command.offset
                acked = max(acked, command.offset)
    assert stream.state is State.DONE
    assert len(stream.ledger) == 40


@pytest.mark.parametrize("num_taken", range(1, 9))
@pytest.mark.parametrize("num_held", range(9))
def test_no_window_stands_still_because_a_reader_left_with_what_it_took(
    num_taken: int, num_held: int
) -> None:
    stream = streaming(max_tokens=40, limits=Limits(window_tokens=8))
    for offset in range(8):
        stream.token(1, offset, A, 1.0)
        if offset + 1 == num_taken:
            stream.take()  # What it acknowledges is never heard.
    acks = [*stream.rewind(num_held, stream.text_after([A] * num_held, num_held))]
    acked = 0
    while stream.outcome is None:
        acks += stream.take()[1]
        for command in acks:
            assert isinstance(command, Ack)
            acked = max(acked, command.offset)
        offset = len(stream.ledger)
        assert offset < acked + 8, "the worker goes on"
        stream.token(1, offset, A, 1.0)
    assert len(stream.ledger) == 40
    stream.check()


def test_acknowledgements_come_in_strides() -> None:
    stream = streaming(max_tokens=40, limits=Limits(window_tokens=8))
    acks: list[Command] = []
    for offset in range(20):
        stream.token(1, offset, A, 1.0)
        acks += stream.take()[1]
    assert acks == [Ack(1, offset) for offset in (4, 8, 12, 16, 20)]


@pytest.mark.parametrize(
    ("window", "num_sent", "is_made"),
    [
        (1024, 255, False),  # Of a stride of 512 half may be missing,
        (1024, 256, True),
        (512, 127, False),
        (512, 128, True),
        (128, 61, False),  # of one of 64 no more than two.
        (128, 62, True),
        (6, 2, False),
        (0, 300, False),
    ],
)
def test_an_acknowledgement_may_be_made_early(window: int, num_sent: int, *, is_made: bool) -> None:
    stream = streaming(limits=Limits(window_tokens=window), max_tokens=1000)
    assert not stream.tokens(1, 0, [A] * num_sent, 1.0)
    stream.take()
    assert stream.is_ack_near == is_made
    assert bool(stream.acknowledge_early()) == is_made


def test_a_stream_without_a_window_acknowledges_nothing() -> None:
    stream = streaming([A], limits=Limits(window_tokens=0))
    assert stream.take()[1] == ()


def test_a_worker_that_generates_again_is_told_what_has_left() -> None:
    stream = streaming(
        [A] * 4, abilities=REGENERATING, temperature=1.0, limits=Limits(window_tokens=4)
    )
    stream.take()
    lose(stream)
    assert stream.placed(2, W2, REGENERATING)[1:] == [Ack(2, 4)]


# Accounts.


def test_work_done_again_is_metered_and_what_a_cache_saved_is_not() -> None:
    stream = streaming([A, B])
    lose(stream)
    place(stream, W2)
    assert stream.accounts.recomputed_prefill_tokens == 5
    stream.tokens(2, 2, [C], 3.0)
    for _ in range(2):
        stream.ended(2, 3, FinishReason.LENGTH, now=3.0, cached_tokens=4)
    assert stream.accounts.recomputed_prefill_tokens == 1
    assert stream.accounts.cached_prompt_tokens == 0


def test_an_attempt_that_restored_kv_is_called_so_and_it_is_not_metered() -> None:
    stream = streaming([A, B])
    lose(stream)
    place(stream, W2)
    stream.tokens(2, 2, [C], 3.0)
    assert stream.attempts[1].way is ContinuationClass.NATIVE
    stream.ended(2, 3, FinishReason.LENGTH, now=3.0, restored_tokens=4)
    assert stream.attempts[1].way is ContinuationClass.RESTORE
    assert stream.accounts.recomputed_prefill_tokens == 1
    assert stream.accounts.cached_prompt_tokens == 0, "what a tenant finds is a cache's alone"


def test_who_finds_kv_before_anything_was_delivered_has_continued_nothing() -> None:
    stream = streaming([])
    lose(stream)
    place(stream, W2)
    stream.tokens(2, 0, [A], 3.0)
    stream.ended(2, 1, FinishReason.LENGTH, now=3.0, restored_tokens=2)
    assert stream.attempts[1].way is ContinuationClass.NATIVE


def test_what_the_first_attempt_found_in_a_cache_is_remembered() -> None:
    stream = streaming([A], max_tokens=2)
    stream.tokens(1, 1, [B], 1.0)
    stream.ended(1, 2, FinishReason.LENGTH, now=1.0, cached_tokens=2)
    assert stream.accounts.cached_prompt_tokens == 2


def test_attempts_tell_their_story() -> None:
    stream = streaming([A], life=W1)
    stream.lost(1, FailureKind.HANG, "silence", 2.0)
    place(stream, W2)
    stream.tokens(2, 1, [B], 4.5)
    first, second = stream.attempts
    assert (first.life, first.first_offset, first.end_offset) == (W1, 0, 1)
    assert (first.failure, first.detail, first.gap_s) == (FailureKind.HANG, "silence", None)
    assert (second.life, second.way, second.gap_s) == (W2, ContinuationClass.NATIVE, 3.5)
    assert (second.first_offset, second.end_offset) == (1, 2)


def test_log_probabilities_stay_with_their_tokens() -> None:
    stream = streaming(abilities=REGENERATING, temperature=1.0, num_top_logprobs=0, max_tokens=3)
    one, two, three, four = (TokenLogprobs(-float(n)) for n in range(1, 5))
    stream.tokens(1, 0, [A, B], 1.0, [one, two])
    assert stream.take()[0].logprobs == [one, two]
    lose(stream)
    place(stream, W2, REGENERATING)
    stream.tokens(2, 0, [A, B, C, A], 3.0, [one, two, three, four])
    assert stream.take()[0].logprobs == [three]
    assert stream.cumulative_logprob == -6.0


def test_no_sum_of_log_probabilities_is_given_unasked() -> None:
    assert streaming([A]).cumulative_logprob is None


# Any story.


@given(st.data())
def test_any_cuts_and_rows_give_the_ids_and_text_of_an_undisturbed_run(data: st.DataObject) -> None:
    output = data.draw(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30))
    is_native = data.draw(st.booleans())
    abilities = NATIVE if is_native else REGENERATING
    stream = streaming(
        abilities=abilities,
        temperature=1.0,
        ignore_eos=True,
        max_tokens=len(output),
        limits=Limits(migrations_max=1000),
    )
    text, offset = "", 0
    ids: list[int] = []
    while stream.state is not State.DONE:
        count = data.draw(st.integers(1, 5))
        stream.tokens(stream.epoch, offset, output[offset : offset + count], 1.0)
        offset = min(len(output), offset + count)
        if data.draw(st.booleans()):
            piece, _ = stream.take()
            assert piece.offset == len(ids)
            ids += piece.token_ids
            text += piece.text
        may_be_cut = stream.state is State.RUNNING and len(stream.attempts) < 8
        if may_be_cut and data.draw(st.booleans()):
            lose(stream)
            life = Life("w", stream.epoch)
            offset = place(stream, life, abilities).checkpoint.first_offset
        stream.check()
    piece, _ = stream.take()
    assert [*ids, *piece.token_ids] == output
    assert text + piece.text == spelled(output)


# Adoption.


def adopting(*held: int, started_from: tuple[int, ...] = ()) -> Stream:
    """A stream of another frontend that was just asked for, of which the client holds so much."""
    first = len(started_from)
    past = Past(
        held, life=W1, started_epoch=5, num_begun=1, base=first, first_offset=first, serving=NATIVE
    )
    stream = Stream(checkpoint(), tokenizer(), epoch=9, past=past)
    assert stream.start(10.0) == [Relink(9, W1)]
    (adopt,) = stream.relinked(9, 10.0)
    assert isinstance(adopt, Adopt)
    return stream


def origin(*output: int) -> Origin:
    """What the sidecar says that the attempt was started from."""
    return Origin(PROMPT, output, len(output), None, 5)


def test_a_busy_sidecar_has_longer_to_answer_an_adoption_than_a_silent_link_lives() -> None:
    assert DetectorLimits().silence_max_s < ADOPTION_S_MAX
    stream = adopting(A)
    due = 10.0 + ADOPTION_S_MAX
    assert stream.deadline() == due
    assert stream.handle_timeout(due - 0.01) == []
    assert not stream.adopted(10, 2, origin(), due - 0.01)
    assert stream.deadline() is None


def test_an_epoch_above_which_there_is_none_ends_the_stream() -> None:
    stream = adopting(A)
    commands = stream.refused(10, FailureKind.FENCED, "taken", now=10.1, epoch_known=EPOCH_MAX)
    assert commands == [Finish()]
    assert stream.outcome is not None
    assert stream.outcome.error is not None
    assert stream.outcome.error.reason is Reason.FENCED


def test_an_adoption_that_is_outbid_asks_again_above() -> None:
    stream = adopting(A)
    (adopt,) = stream.refused(10, FailureKind.FENCED, "taken", now=10.1, epoch_known=77)
    assert isinstance(adopt, Adopt)
    assert adopt.epoch == first_epoch(0, above=77) > 77


def test_who_adopted_what_was_over_asks_again_above_an_owner_from_the_future() -> None:
    stream = adopting()
    stream.adopted(10, 2, origin(), 10.1)
    stream.tokens(10, 0, [A, B], 10.1)
    stream.ended(10, 2, FinishReason.UNSPECIFIED, now=10.1, failure=FailureKind.DRAIN)
    place(stream, W2)
    known = first_epoch(60_000)
    (place_again,) = stream.refused(
        stream.epoch, FailureKind.FENCED, "taken", epoch_known=known, now=10.2
    )
    assert isinstance(place_again, Place)
    assert place_again.epoch > known


def test_ids_that_are_none_in_what_an_adopted_attempt_began_with_lose_the_worker() -> None:
    foreign = tokenizer().asset.vocab_size
    stream = adopting(A, started_from=(A, B))
    commands = stream.adopted(10, 2, origin(A, foreign), 10.1)
    assert commands == [Abort(10), Place(11, frozenset({W1}))]
    assert stream.attempts[-1].failure is FailureKind.PROTOCOL
    assert list(stream.ledger) == [A]


# The contract.


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (outcome.FinishReason, generation_pb2.FinishReason, "FINISH_REASON_"),
        (outcome.FailureKind, worker_pb2.FailureKind, "FAILURE_KIND_"),
        (outcome.ContinuationClass, inference_service_pb2.ContinuationClass, "CONTINUATION_CLASS_"),
        (
            outcome.ContinuationPolicy,
            inference_service_pb2.ContinuationPolicy,
            "CONTINUATION_POLICY_",
        ),
        (outcome.Continued, inference_service_pb2.Continued, "CONTINUED_"),
    ],
)
def test_enums_are_those_of_the_contract(
    ours: type[outcome.FailureKind], theirs: type[worker_pb2.FailureKind], prefix: str
) -> None:
    expected = {name.removeprefix(prefix): number for name, number in theirs.items()}
    assert {member.name: member.value for member in ours} == expected
