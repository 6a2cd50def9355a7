"""How a stream is paused for another and goes on later: events in, commands out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.continuation import Abilities
from frontend.stream import HALT_S_MAX, Abort, Finish, Halt, Paused, Place, Relink, State, Stream
from tests.support.streams import (
    APPENDING,
    NATIVE,
    PROMPT,
    REGENERATING,
    W1,
    W2,
    A,
    B,
    C,
    admitted,
    place,
    streaming,
)
from tests.support.vocabulary import token
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, ContinuationPolicy, Continued, FailureKind
from unbroken.outcome import FinishReason as Finished

SHAKY = Abilities("n", is_invariant=False)


def paused(stream: Stream, at: float = 2.0) -> Stream:
    """The same, after its worker has ended the attempt."""
    assert stream.pause("for r2", at) == [Halt(stream.epoch)]
    size = len(stream.ledger)
    assert stream.ended(stream.epoch, size, Finished.CANCELLED, now=at + 0.1) == [Paused()]
    return stream


def test_a_stream_is_paused_only_when_its_worker_has_said_so() -> None:
    stream = streaming([A, B])
    assert stream.pause("for r2", 2.0) == [Halt(1)]
    assert stream.state is State.RUNNING
    assert stream.is_halting
    assert stream.ended(1, 2, Finished.CANCELLED, now=2.1) == [Paused()]
    assert stream.state is State.PAUSED
    assert stream.attempts[-1].failure is FailureKind.PREEMPTED
    assert stream.attempts[-1].detail == "for r2"
    assert stream.deadline() is None
    stream.check()


def test_what_comes_before_its_worker_stops_is_delivered() -> None:
    stream = streaming([A])
    stream.pause("for r2", 2.0)
    assert stream.token(1, 1, B, 2.05) == ()
    stream.ended(1, 2, Finished.CANCELLED, now=2.1)
    assert list(stream.ledger) == [A, B]
    assert stream.token(1, 2, C, 2.2) == (), "the attempt is over"
    assert list(stream.ledger) == [A, B]


@pytest.mark.parametrize("abilities", [NATIVE, APPENDING, REGENERATING])
def test_a_paused_stream_goes_on_where_it_stands(abilities: Abilities) -> None:
    stream = paused(streaming([A, B], abilities=abilities))
    assert stream.proceed(9.0) == [Place(2, frozenset())]
    start = place(stream, W1, abilities)  # Its worker did nothing wrong.
    way = stream.attempts[-1].way
    if way is ContinuationClass.NATIVE:
        assert start.checkpoint.output_token_ids == (A, B)
    elif way is ContinuationClass.APPEND:
        assert start.checkpoint.prompt_token_ids == (*PROMPT, A, B)
    else:
        assert start.checkpoint == stream.original
        assert stream.tokens(2, 0, (A, B), 9.1) == ()
    assert stream.tokens(2, 2, (C,), 9.2) == ()
    assert list(stream.ledger) == [A, B, C]
    assert stream.continued is Continued.EXACT
    assert stream.accounts.recomputed_prefill_tokens >= len(PROMPT)


def test_a_pause_is_no_loss() -> None:
    stream = streaming([A])
    for number in range(10):
        paused(stream, 2.0 + number)
        stream.proceed(2.5 + number)
        place(stream, W1)
    assert stream.outcome is None


def test_a_stream_that_completes_while_it_is_to_be_paused_is_complete() -> None:
    stream = streaming([A], max_tokens=2)
    stream.pause("for r2", 2.0)
    assert stream.tokens(1, 1, (B,), 2.1) == [Finish()]
    assert stream.ended(1, 2, Finished.CANCELLED, now=2.2) == []
    assert stream.state is State.DONE
    stream.check()


def test_a_worker_that_dies_instead_of_pausing_is_lost_as_any_other() -> None:
    stream = streaming([A])
    stream.pause("for r2", 2.0)
    assert stream.lost(1, FailureKind.CRASH, "gone", 2.1) == [Abort(1), Place(2, frozenset({W1}))]
    place(stream, W2)
    assert not stream.is_halting
    stream.check()


def test_a_link_that_breaks_instead_leaves_the_attempt_to_be_adopted() -> None:
    stream = streaming([A])
    stream.pause("for r2", 2.0)
    assert stream.unlinked(1, "reset", 2.1) == [Relink(1, W1)]
    assert not stream.is_halting
    stream.relinked(1, 2.2)
    assert stream.way_back is ContinuationClass.NONE, "whose attempt it is, is not known yet"


def test_a_worker_that_does_not_stop_is_left() -> None:
    stream = streaming([A])
    stream.pause("for r2", 2.0)
    assert stream.deadline() == 2.0 + HALT_S_MAX
    assert stream.handle_timeout(2.0 + HALT_S_MAX) == [Abort(1), Place(2, frozenset({W1}))]


def test_a_paused_stream_hears_of_no_loss_and_ends_when_it_is_cancelled() -> None:
    stream = paused(streaming([A]))
    assert stream.lost(1, FailureKind.CRASH, "gone", 3.0) == []
    assert stream.unlinked(1, "reset", 3.0) == []
    assert stream.handle_timeout(1e9) == []
    assert stream.cancelled(UnbrokenError(Reason.CANCELLED, "by request")) == [Finish()]
    assert stream.proceed(4.0) == []


def test_who_is_not_paused_does_not_proceed() -> None:
    stream = streaming([A])
    assert stream.proceed(2.0) == []


@pytest.mark.parametrize(
    ("abilities", "policy", "may_pause"),
    [
        (NATIVE, ContinuationPolicy.PREFER_EXACT, True),
        (NATIVE, ContinuationPolicy.NEVER, False),
        (SHAKY, ContinuationPolicy.PREFER_EXACT, False),
        (SHAKY, ContinuationPolicy.ALLOW_INEXACT, True),
    ],
)
def test_only_what_can_go_on_as_its_caller_wants_is_paused(
    abilities: Abilities, policy: ContinuationPolicy, may_pause: bool
) -> None:
    stream = streaming([A, B], abilities=abilities, policy=policy)
    assert bool(stream.pause("for r2", 2.0)) is may_pause
    assert stream.is_halting is may_pause


def test_what_is_not_at_a_worker_is_not_paused_nor_what_is_being_paused() -> None:
    assert admitted().pause("for r2", 2.0) == []
    stream = streaming([A])
    stream.pause("for r2", 2.0)
    assert stream.pause("for r3", 2.0) == []
    assert paused(streaming([A])).pause("for r2", 3.0) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from(["token", "pause", "stop", "crash", "late"]), max_size=40))
def test_every_token_is_delivered_once_however_often_it_is_paused(events: list[str]) -> None:
    truth = [token(letter) for letter in "abababababababababab"]
    stream = streaming()
    halted: set[int] = set()
    now = 1.0
    for event in events:
        now += 0.01
        epoch, size = stream.epoch, len(stream.ledger)
        if stream.outcome is not None:
            break
        if event == "token" and stream.state is State.RUNNING:
            stream.token(epoch, size, truth[size], now)
        elif event == "pause":
            halted |= {order.epoch for order in stream.pause("", now) if isinstance(order, Halt)}
        elif event == "stop" and epoch in halted and stream.state is State.RUNNING:
            assert stream.ended(epoch, size, Finished.CANCELLED, now=now) == [Paused()]
        elif event == "crash":
            stream.lost(epoch, FailureKind.CRASH, "", now)
        elif event == "late":
            stream.token(epoch - 1, size, truth[0], now)
            stream.proceed(now)
        if stream.state is State.PLACING:
            place(stream, W1)
        stream.check()
    assert list(stream.ledger) == truth[: len(stream.ledger)]
