"""What a reader of Relay frames makes of those that say little."""

from unbroken.v1 import attempt_pb2


def frame_of(
    tokens: attempt_pb2.NextTokens, before: attempt_pb2.StepFrame
) -> attempt_pb2.StepFrame:
    """The StepFrame that says the same after that one; checks that it may be said so."""
    assert before.slots, "there are rows"
    assert len(before.slots) == len(set(before.slots)), "one of each slot"
    assert not before.token_counts, "of one token"
    assert not before.logprobs, "without log probabilities"
    over = {one.slot for one in (*before.ended, *before.refused)}
    assert over.isdisjoint(before.slots), "which go on"
    assert len(tokens.token_ids) == len(before.slots)
    return attempt_pb2.StepFrame(
        sequence=tokens.sequence,
        slots=before.slots,
        offsets=[offset + 1 for offset in before.offsets],
        token_ids=tokens.token_ids,
    )


def tokens_of(
    frame: attempt_pb2.StepFrame, before: attempt_pb2.StepFrame
) -> attempt_pb2.NextTokens | None:
    """The inverse, if it may be said so: what comes in the rows of the frame before."""
    tokens = attempt_pb2.NextTokens(sequence=frame.sequence, token_ids=frame.token_ids)
    try:
        same = frame_of(tokens, before)
    except AssertionError:
        return None
    return tokens if same == frame else None
