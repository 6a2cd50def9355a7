"""Claims of `sidecar.engines.columns`."""

import pytest

from sidecar.engines.columns import Columns, Progress
from unbroken.generation import TokenLogprobs
from unbroken.v1 import attempt_pb2, generation_pb2

LENGTH = generation_pb2.FINISH_REASON_LENGTH


def begun(columns: Columns, slot: int = 1, window_tokens: int = 0, **more: object) -> Progress:
    wants_logprobs = bool(more.get("wants_logprobs"))
    first_offset = int(str(more.get("first_offset", 0)))
    return columns.begin(
        slot, first_offset=first_offset, window_tokens=window_tokens, wants_logprobs=wants_logprobs
    )


def frame_of(columns: Columns) -> attempt_pb2.StepFrame:
    frame = columns.take()
    assert frame is not None
    return frame


def end() -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(finish_reason=LENGTH)


def test_what_all_said_is_one_frame_with_a_row_for_each() -> None:
    columns = Columns()
    one, two = begun(columns), begun(columns, 2, first_offset=7)
    columns.produced(one, [10])
    columns.produced(two, [20])
    frame = frame_of(columns)
    assert (frame.slots[:], frame.offsets[:], frame.token_ids[:]) == ([1, 2], [0, 7], [10, 20])
    assert not frame.token_counts, "one each"
    assert columns.take() is None


def test_a_step_is_whole_when_all_that_have_begun_and_may_speak_did() -> None:
    columns = Columns()
    one, two, three = begun(columns), begun(columns, 2), begun(columns, 3, window_tokens=1)
    assert not columns.is_step_whole
    for progress in (one, two, three):
        columns.produced(progress, [10])
    assert columns.is_step_whole
    frame_of(columns)

    columns.produced(one, [11])
    columns.produced(three, [11])
    assert not columns.is_step_whole, "the second one is missing"
    columns.produced(two, [11])
    assert columns.is_step_whole, "the third one is beyond its window"
    frame_of(columns)

    columns.ended(two, end())
    frame_of(columns)
    columns.produced(one, [12])
    assert columns.is_step_whole, "nobody waits for what has ended"


def test_several_tokens_are_a_longer_row() -> None:
    columns = Columns()
    one, two = begun(columns), begun(columns, 2)
    columns.produced(one, [10])
    columns.produced(two, [20, 21])
    columns.produced(one, [11])
    frame = frame_of(columns)
    assert frame.token_counts[:] == [2, 2]
    assert frame.token_ids[:] == [10, 11, 20, 21]
    columns.produced(one, [12])
    assert frame_of(columns).offsets[:] == [2]


def test_tokens_beyond_the_window_are_held_and_their_end_with_them() -> None:
    columns = Columns()
    one = begun(columns, window_tokens=2)
    columns.produced(one, [10, 11, 12])
    columns.ended(one, end())
    frame = frame_of(columns)
    assert frame.token_ids[:] == [10, 11]
    assert not frame.ended
    assert columns.acknowledged(1, 1) is one
    frame = frame_of(columns)
    assert (frame.offsets[:], frame.token_ids[:]) == ([2], [12])
    assert frame.ended[0].end_offset == 3


def test_an_acknowledgement_of_the_past_moves_no_window() -> None:
    columns = Columns()
    one = begun(columns, window_tokens=2)
    columns.produced(one, [10, 11, 12, 13])
    columns.take()
    assert columns.acknowledged(1, 1) is None
    assert columns.acknowledged(1, 0) is None
    assert one.held == [13]


def test_what_is_cut_says_no_more() -> None:
    columns = Columns()
    one = begun(columns, window_tokens=1)
    columns.produced(one, [10, 11])
    columns.cut(one, end())
    columns.produced(one, [12])
    frame = frame_of(columns)
    assert frame.token_ids[:] == [10]
    assert frame.ended[0].end_offset == 1
    assert columns.acknowledged(1, 5) is None
    assert columns.take() is None


def test_log_probabilities_stay_with_their_tokens() -> None:
    columns = Columns()
    one = begun(columns, window_tokens=1, wants_logprobs=True)
    columns.produced(one, [10, 11], [TokenLogprobs(-1.0), TokenLogprobs(-2.0)])
    assert [one.logprob for one in frame_of(columns).logprobs[0].tokens] == [-1.0]
    columns.acknowledged(1, 1)
    assert [one.logprob for one in frame_of(columns).logprobs[0].tokens] == [-2.0]


def test_the_first_end_counts() -> None:
    columns = Columns()
    one = begun(columns)
    columns.ended(one, end())
    columns.ended(one, end())
    columns.cut(one, end())
    assert len(frame_of(columns).ended) == 1


def test_only_frames_with_tokens_are_steps() -> None:
    columns = Columns()
    one = begun(columns)
    columns.produced(one, [10])
    columns.take()
    columns.ended(one, end())
    columns.take()
    assert columns.num_steps == 1


def test_a_slot_is_used_once() -> None:
    columns = Columns()
    begun(columns)
    with pytest.raises(AssertionError):
        begun(columns)
