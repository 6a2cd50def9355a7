"""A corrupted history is caught, and the shortest counter-example is shown."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from unbroken.chaos.checker import (
    Asked,
    Came,
    ChoiceTruth,
    Event,
    Failed,
    Finished,
    Kind,
    Truth,
    Verdict,
    check,
    longest_wait_s,
    truth_of,
)
from unbroken.chaos.recorder import RecorderError, event_from_json, event_to_json

BILLING = (7, 6, ((0, 1),))
TRUTH = Truth((ChoiceTruth((10, 11, 12, 13, 14, 15), "abcdef", ("p",) * 6),), BILLING)
ASKED = Asked("s", 0.0)
ENDED = Finished("s", 9.0, BILLING)


def piece(offset: int, count: int = 2, *, stream: str = "s", at: float | None = None) -> Came:
    choice = TRUTH.choices[0]
    return Came(
        stream,
        1.0 + offset if at is None else at,
        0,
        offset,
        choice.token_ids[offset : offset + count],
        choice.text[offset : offset + count],
        choice.logprobs[offset : offset + count],
    )


GOOD: Sequence[Event] = (ASKED, piece(0), piece(2), piece(4), ENDED)


def judged(*history: Event) -> Verdict:
    return check(history, {"s": TRUTH})


def test_an_undisturbed_history_passes() -> None:
    verdict = judged(*GOOD)
    assert verdict.is_ok
    assert verdict.counter_example is None
    assert (verdict.streams, verdict.complete, verdict.refused) == (1, 1, 0)


def test_pieces_may_be_cut_anywhere() -> None:
    assert judged(ASKED, piece(0, 1), piece(1, 4), piece(5, 1), ENDED).is_ok


SECOND_END = Finished("s", 9.5, BILLING)
FAILED = Failed("s", 9.0, "WORKER_LOST")
OTHER_BILLING = replace(ENDED, billing=(7, 8, ()))
CHANGED = replace(piece(2), token_ids=(12, 99))
OTHER_TEXT = replace(piece(2), text="cX")
OTHER_LOGPROBS = replace(piece(2), logprobs=("p", "q"))
TOO_MANY = replace(piece(4), token_ids=(14, 15, 16))
OVERLAP = piece(1, 2, at=3.5)
LATE = piece(4, at=9.9)


@pytest.mark.parametrize(
    ("history", "kind", "witnesses"),
    [
        ((ASKED, piece(0), piece(4), ENDED), Kind.LOST, (piece(0), piece(4))),
        ((ASKED, piece(2), piece(4), ENDED), Kind.LOST, (ASKED, piece(2))),
        ((ASKED, piece(0), piece(2), ENDED), Kind.LOST, (piece(2), ENDED)),
        ((ASKED, ENDED), Kind.LOST, (ENDED,)),
        ((*GOOD[:3], piece(2), *GOOD[3:]), Kind.REPEATED, (piece(2), piece(2))),
        ((ASKED, piece(0), OVERLAP, piece(3, 3), ENDED), Kind.REPEATED, (piece(0), OVERLAP)),
        (
            (ASKED, piece(2), piece(0), piece(4), ENDED),
            Kind.OUT_OF_ORDER,
            (piece(2), piece(0)),
        ),
        ((ASKED, piece(0), CHANGED, piece(4), ENDED), Kind.CHANGED, (CHANGED,)),
        ((ASKED, piece(0), piece(2), TOO_MANY, ENDED), Kind.INVENTED, (TOO_MANY,)),
        ((ASKED, piece(0), OTHER_TEXT, piece(4), ENDED), Kind.TEXT, (OTHER_TEXT,)),
        ((ASKED, piece(0), OTHER_LOGPROBS, piece(4), ENDED), Kind.LOGPROBS, (OTHER_LOGPROBS,)),
        ((*GOOD[:4], OTHER_BILLING), Kind.BILLING, (OTHER_BILLING,)),
        (GOOD[:4], Kind.NO_END, (piece(4),)),
        ((*GOOD, SECOND_END), Kind.TWO_ENDS, (ENDED, SECOND_END)),
        ((*GOOD[:3], ENDED, LATE), Kind.AFTER_END, (ENDED, LATE)),
        ((*GOOD[:3], FAILED), Kind.NOT_ALLOWED, (FAILED,)),
        (GOOD[1:], Kind.UNKNOWN, (piece(0),)),
    ],
)
def test_each_kind_of_corruption_is_caught(
    history: Sequence[Event], kind: Kind, witnesses: tuple[Event, ...]
) -> None:
    found = [v for v in judged(*history).violations if v.kind is kind]
    assert found, judged(*history).violations
    assert found[0].witnesses == witnesses


def test_the_shortest_counter_example_of_many_streams_is_shown() -> None:
    history: list[Event] = []
    for index in range(50):
        name = f"s{index}"
        pieces = [piece(0, stream=name), piece(2, stream=name), piece(4, stream=name)]
        if index == 20:
            pieces.insert(1, pieces[0])  # Two witnesses.
        if index == 30:
            pieces[1] = replace(pieces[1], token_ids=(12, 99))  # One.
        history += [Asked(name, 0.0), *pieces, Finished(name, 9.0, BILLING)]
    verdict = check(history, {f"s{index}": TRUTH for index in range(50)})
    shown = verdict.counter_example
    assert shown is not None
    assert shown.stream == "s30"
    assert shown.kind is Kind.CHANGED
    assert [type(event) for event in shown.witnesses] == [Came]
    assert "expected 13, got 99" in str(shown)
    assert len(str(shown).splitlines()) == 2
    assert (verdict.duplicated, verdict.changed, verdict.lost) == (2, 1, 0)
    assert verdict.complete == 48


def test_lost_tokens_are_counted_once() -> None:
    assert judged(ASKED, piece(0), piece(4), ENDED).lost == 2
    assert judged(ASKED, piece(0), ENDED).lost == 4
    assert judged(ASKED, piece(2), piece(0), piece(4), ENDED).lost == 0


def test_an_error_that_is_allowed_is_a_refusal_and_its_prefix_still_counts() -> None:
    allowed = {"s": {"WORKER_LOST"}}
    good = check((*GOOD[:3], FAILED), {"s": TRUTH}, reasons_allowed=allowed)
    assert good.is_ok
    assert good.refused == 1
    bad = check((ASKED, piece(0), CHANGED, FAILED), {"s": TRUTH}, reasons_allowed=allowed)
    assert [v.kind for v in bad.violations] == [Kind.CHANGED]


def test_the_history_of_a_dead_client_may_end_anywhere_but_not_be_wrong() -> None:
    assert check(GOOD[:2], {"s": TRUTH}, may_be_open={"s"}).is_ok
    wrong = check((ASKED, piece(0), piece(0)), {"s": TRUTH}, may_be_open={"s"})
    assert [v.kind for v in wrong.violations] == [Kind.REPEATED]


def test_choices_are_judged_apart() -> None:
    truth = Truth((TRUTH.choices[0], ChoiceTruth((20, 21), "xy")), BILLING)
    second = Came("s", 2.5, 1, 0, (20, 21), "xy")
    history = (*GOOD[:2], second, *GOOD[2:])
    assert check(history, {"s": truth}).is_ok
    assert truth_of(history) == truth
    (missing,) = check(GOOD, {"s": truth}).violations
    assert missing.kind is Kind.LOST
    assert "choice 1" in missing.detail


def test_the_longest_wait_after_a_fault_counts_and_not_what_was_under_way() -> None:
    times = [1.0, 1.1, 1.2, 2.4, 2.5]
    assert longest_wait_s(times, 1.15) == pytest.approx(1.2)
    assert longest_wait_s(times, 2.45) == pytest.approx(0.1)
    assert longest_wait_s(times, 0.5) == pytest.approx(1.2)
    assert longest_wait_s(times[:1], 0.4) == pytest.approx(0.6)
    assert longest_wait_s(times, 3.0) is None


@pytest.mark.parametrize("event", [*GOOD, FAILED])
def test_events_survive_the_file(event: Event) -> None:
    assert event_from_json(event_to_json(event)) == event


@pytest.mark.parametrize("line", [b"", b"[]", b'["Came"]', b'["Nonsense", 1]', b'{"a": 1}'])
def test_what_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(RecorderError):
        event_from_json(line)
