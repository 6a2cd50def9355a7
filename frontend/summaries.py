"""Streams in the words of the contract. Enums of `unbroken.outcome` have the contract's values."""

from typing import cast

from frontend.stream import Attempt, Life, Piece, State, Stream
from unbroken.generation import logprobs_to_proto
from unbroken.outcome import ContinuationClass, FailureKind, FinishReason
from unbroken.v1 import generation_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

TOKENS_PER_MESSAGE_MAX = 256
TEXT_CHARS_PER_MESSAGE_MAX = 64 * 1024

_STATES = {
    State.PLACING: pb.STREAM_STATE_PLACING,
    State.UNLINKED: pb.STREAM_STATE_PLACING,
    State.RUNNING: pb.STREAM_STATE_RUNNING,
    State.DONE: pb.STREAM_STATE_DONE,
}


def messages(choice_index: int, piece: Piece) -> list[pb.GenerateResponse]:
    """A piece as messages of bounded size; the text follows the tokens it became certain with."""
    if (
        len(piece.token_ids) <= TOKENS_PER_MESSAGE_MAX
        and len(piece.text) <= TEXT_CHARS_PER_MESSAGE_MAX
    ):
        message = pb.GenerateResponse(
            choice_index=choice_index,
            offset=piece.offset,
            token_ids=piece.token_ids,
            text=piece.text,
        )
        if piece.logprobs:
            message.logprobs.extend(map(logprobs_to_proto, piece.logprobs))
        return [message]
    parts = [
        pb.GenerateResponse(
            choice_index=choice_index,
            offset=piece.offset + begin,
            token_ids=piece.token_ids[begin : begin + TOKENS_PER_MESSAGE_MAX],
            logprobs=map(logprobs_to_proto, piece.logprobs[begin : begin + TOKENS_PER_MESSAGE_MAX]),
        )
        for begin in range(0, len(piece.token_ids), TOKENS_PER_MESSAGE_MAX)
    ]
    texts = [
        piece.text[begin : begin + TEXT_CHARS_PER_MESSAGE_MAX]
        for begin in range(0, len(piece.text), TEXT_CHARS_PER_MESSAGE_MAX)
    ]
    end = piece.offset + len(piece.token_ids)
    if parts and texts:
        parts[-1].text = texts.pop(0)
    parts += [
        pb.GenerateResponse(choice_index=choice_index, offset=end, text=text) for text in texts
    ]
    return parts


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
