"""Streams in the words of the contract. Enums of `unbroken.outcome` have the contract's values."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from frontend.stream import Attempt, Life, Piece, State, Stream
from unbroken.generation import TokenLogprobs, logprobs_to_proto
from unbroken.outcome import ContinuationClass, FailureKind, FinishReason
from unbroken.v1 import generation_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

TOKENS_PER_MESSAGE_MAX = 256
TEXT_CHARS_PER_MESSAGE_MAX = 64 * 1024

_STATES = {
    State.PLACING: pb.STREAM_STATE_PLACING,
    State.UNLINKED: pb.STREAM_STATE_PLACING,
    State.RUNNING: pb.STREAM_STATE_RUNNING,
    State.PAUSED: pb.STREAM_STATE_PAUSED,
    State.DONE: pb.STREAM_STATE_DONE,
}


class Part(NamedTuple):
    """What one message tells of a piece."""

    offset: int
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[TokenLogprobs]


def parts(piece: Piece) -> Sequence[Part]:
    """A piece in parts of bounded size; the text follows the tokens it became certain with."""
    token_ids, text, logprobs = piece.token_ids, piece.text, piece.logprobs
    if len(token_ids) <= TOKENS_PER_MESSAGE_MAX and len(text) <= TEXT_CHARS_PER_MESSAGE_MAX:
        return (Part(*piece),)
    texts = [
        text[begin : begin + TEXT_CHARS_PER_MESSAGE_MAX]
        for begin in range(0, len(text), TEXT_CHARS_PER_MESSAGE_MAX)
    ]
    found: list[Part] = []
    for begin in range(0, len(token_ids), TOKENS_PER_MESSAGE_MAX):
        end = begin + TOKENS_PER_MESSAGE_MAX
        is_last = end >= len(token_ids)
        first_text = texts.pop(0) if is_last and texts else ""
        found.append(
            Part(piece.offset + begin, token_ids[begin:end], first_text, logprobs[begin:end])
        )
    end_offset = piece.offset + len(token_ids)
    found += [Part(end_offset, (), rest, ()) for rest in texts]
    return found


def messages(
    choice_index: int, piece: Piece, *, resume_token: bytes = b""
) -> list[pb.GenerateResponse]:
    """A piece as messages of bounded size; a resume token goes with the first."""
    found = [
        pb.GenerateResponse(
            choice_index=choice_index,
            offset=part.offset,
            token_ids=part.token_ids,
            text=part.text,
            logprobs=map(logprobs_to_proto, part.logprobs),
        )
        for part in parts(piece)
    ]
    found[0].resume_token = resume_token
    return found


def choice(index: int, stream: Stream, detail: str = "") -> pb.ChoiceInfo:
    """Where one choice stands; `detail` is what it waits for."""
    info = pb.ChoiceInfo(
        choice_index=index,
        state=_STATES[stream.state],
        num_tokens=len(stream.ledger),
        num_tokens_sent=stream.num_sent,
        detail=detail,
    )
    if stream.state is State.RUNNING:
        info.epoch = stream.epoch
        info.worker.CopyFrom(identity(stream.attempts[-1].life))
    return info


def result(index: int, stream: Stream) -> pb.ChoiceResult:
    """How one choice ended."""
    outcome = stream.outcome
    assert outcome is not None, "only a stream that is done has a result"
    return pb.ChoiceResult(
        choice_index=index,
        finish_reason=_finish_reason(outcome.finish_reason),
        stop=outcome.stop,
        stop_token_id=outcome.stop_token_id,
        num_tokens=len(stream.ledger),
        cumulative_logprob=stream.cumulative_logprob,
        continued=cast("pb.Continued.ValueType", int(stream.continued)),
    )


def attempt(choice_index: int, attempt: Attempt) -> pb.AttemptSummary:
    """One attempt's story."""
    summary = pb.AttemptSummary(
        choice_index=choice_index,
        epoch=attempt.epoch,
        worker=identity(attempt.life),
        continuation_class=way(attempt.way),
        first_offset=attempt.first_offset,
        end_offset=attempt.end_offset,
        failure=_failure(attempt.failure),
        detail=attempt.detail[:1000],
        adopted=attempt.is_adopted,
    )
    if attempt.gap_s is not None:
        summary.gap.FromNanoseconds(round(attempt.gap_s * 1e9))
    return summary


def identity(life: Life) -> worker_pb2.WorkerIdentity:
    """Of the sidecar; that of its engine is not told."""
    return worker_pb2.WorkerIdentity(worker_id=life.worker_id, incarnation=life.incarnation)


def way(value: ContinuationClass) -> pb.ContinuationClass.ValueType:
    """The same in the contract."""
    return cast("pb.ContinuationClass.ValueType", int(value))


def _finish_reason(value: FinishReason) -> generation_pb2.FinishReason.ValueType:
    return cast("generation_pb2.FinishReason.ValueType", int(value))


def _failure(value: FailureKind) -> worker_pb2.FailureKind.ValueType:
    return cast("worker_pb2.FailureKind.ValueType", int(value))
