"""What a client has of a stream, held against the contract as it comes. No I/O."""

from array import array
from dataclasses import dataclass, field

from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import inference_service_pb2 as pb


@dataclass(slots=True)
class ReceivedChoice:
    """What came of one choice."""

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    num_text_bytes: int = 0
    logprob_sum: float | None = 0.0
    """Of the tokens, if they were asked for; None if it is not known."""


@dataclass(slots=True)
class _Overlap:
    """What a call tells of one choice that is known from the call before."""

    offset: int
    """Of the token that it tells next."""
    num_text_bytes: int
    """Of the text that it tells next, how much is known."""


class Received:
    """The output of one request over all of its calls (inference_service.proto).

    It is what `Resume` has to be told, and the reason why a seam between two frontends cannot hide
    a token that is missing or comes twice.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.started: pb.StreamStarted | None = None
        self.finished: pb.StreamFinished | None = None
        self.resume_token = b""
        """The newest; empty if none came."""
        self._request = request
        self._wants_logprobs = request.params.HasField("logprobs")
        self._choices = [ReceivedChoice() for _ in range(max(1, request.num_choices))]
        self._is_first = True
        self._overlaps: dict[int, _Overlap] = {}
        """By choice; those that are over are gone."""

    @classmethod
    def restored(cls, resume: pb.ResumeRequest) -> "Received":
        """What the holder of `resume` has; raises `PROTOCOL_VIOLATION` if that cannot be."""
        received = cls(resume.request)
        received.resume_token = resume.resume_token
        for position in resume.positions:
            choice = received._choice(position.choice_index)
            choice.token_ids.extend(position.token_ids)
            choice.num_text_bytes = position.num_text_bytes
            has_sum = position.HasField("cumulative_logprob")
            choice.logprob_sum = position.cumulative_logprob if has_sum else None
        return received

    def resume_request(self) -> pb.ResumeRequest:
        """How any frontend is asked for the rest."""
        resume = pb.ResumeRequest(request=self._request, resume_token=self.resume_token)
        for index, choice in enumerate(self._choices):
            if choice.token_ids:
                resume.positions.add(
                    choice_index=index,
                    token_ids=choice.token_ids,
                    num_text_bytes=choice.num_text_bytes,
                    cumulative_logprob=choice.logprob_sum if self._wants_logprobs else None,
                )
        return resume

    def num_tokens(self, choice_index: int = 0) -> int:
        """Offset after the choice's last token."""
        return len(self._choices[choice_index].token_ids)

    def begin_call(self) -> None:
        """What comes next is the first message of a call."""
        self._is_first = True
        self._overlaps.clear()

    def begin_overlapping_call(self, asked: pb.ResumeRequest) -> None:
        """As `begin_call`, of one that was `asked` for before the last that came.

        What it tells again goes through `without_overlap`.
        """
        self.begin_call()
        positions = {one.choice_index: one for one in asked.positions}
        for index, choice in enumerate(self._choices):
            position = positions.get(index, pb.ResumePosition())
            offset = len(position.token_ids)
            num_text_bytes = choice.num_text_bytes - position.num_text_bytes
            if offset < len(choice.token_ids) or num_text_bytes:
                self._overlaps[index] = _Overlap(offset, num_text_bytes)

    @property
    def has_overlap(self) -> bool:
        """Whether the call may tell again what is known."""
        return bool(self._overlaps)

    def without_overlap(self, response: pb.GenerateResponse) -> pb.GenerateResponse:
        """The message, to be added, without what is known; raises `PROTOCOL_VIOLATION`."""
        index = response.choice_index
        overlap = self._overlaps.get(index)
        if overlap is None:
            return response
        known = self._choices[index].token_ids
        again = known[overlap.offset : overlap.offset + len(response.token_ids)]
        if response.token_ids and response.offset != overlap.offset:
            raise _violation(
                f"offset {overlap.offset} of choice {index}", f"offset {response.offset}"
            )
        if list(response.token_ids[: len(again)]) != again.tolist():
            raise _violation(f"tokens {again.tolist()}", f"{list(response.token_ids)}")
        text = response.text.encode()
        num_bytes = min(len(text), overlap.num_text_bytes)
        try:
            rest = text[num_bytes:].decode()
        except UnicodeDecodeError:
            raise _violation(f"characters that end after {num_bytes} bytes", "others") from None
        overlap.offset += len(response.token_ids)
        overlap.num_text_bytes -= num_bytes
        if overlap.offset >= len(known) and not overlap.num_text_bytes:
            del self._overlaps[index]
        trimmed = pb.GenerateResponse()
        trimmed.CopyFrom(response)
        trimmed.text = rest
        trimmed.offset += len(again)
        del trimmed.token_ids[: len(again)]
        del trimmed.logprobs[: len(again)]
        return trimmed

    def add(self, response: pb.GenerateResponse) -> None:
        """Take in the next message; raises `PROTOCOL_VIOLATION`."""
        is_first, self._is_first = self._is_first, False
        if self.finished is not None:
            raise _violation("nothing after `finished`", f"a message at offset {response.offset}")
        self._add_started(response, is_first=is_first)
        choice = self._choice(response.choice_index)
        if num_tokens := len(response.token_ids):
            if response.offset != len(choice.token_ids):
                raise _violation(
                    f"offset {len(choice.token_ids)} of choice {response.choice_index}",
                    f"offset {response.offset}",
                )
            if len(response.logprobs) != (num_tokens if self._wants_logprobs else 0):
                raise _violation(
                    f"log probabilities {'for each of' if self._wants_logprobs else 'for none of'} "
                    f"{num_tokens} tokens",
                    f"{len(response.logprobs)}",
                )
            choice.token_ids.extend(response.token_ids)
            if choice.logprob_sum is not None:
                for entry in response.logprobs:
                    choice.logprob_sum += entry.logprob
        if response.text:
            choice.num_text_bytes += len(response.text.encode())
        if response.resume_token:
            self.resume_token = response.resume_token
        if response.HasField("finished"):
            self._check_end(response.finished)
            self.finished = response.finished

    def _add_started(self, response: pb.GenerateResponse, *, is_first: bool) -> None:
        """`started` opens the stream; a call that goes on with it may repeat it."""
        has_started = response.HasField("started")
        if (has_started and not is_first) or not (has_started or self._has_begun):
            raise _violation("`started` in the first message and only there", "it elsewhere")
        if not has_started:
            return
        expected, seen = self._request.request_id, response.started.request_id
        if expected and seen != expected:
            raise _violation(f"request {expected}", f"request {seen}")
        if self.started is None:
            self.started = response.started
        if response.started.resume_token:
            self.resume_token = response.started.resume_token

    @property
    def _has_begun(self) -> bool:
        return self.started is not None or bool(self.resume_token)

    def _choice(self, index: int) -> ReceivedChoice:
        if index >= len(self._choices):
            raise _violation(f"choices below {len(self._choices)}", f"choice {index}")
        return self._choices[index]

    def _check_end(self, finished: pb.StreamFinished) -> None:
        ends = [(choice.choice_index, choice.num_tokens) for choice in finished.choices]
        expected = [(i, len(choice.token_ids)) for i, choice in enumerate(self._choices)]
        if ends != expected:
            raise _violation(f"choices to end at {expected}", f"ends (choice, offset) {ends}")


def _violation(expected: str, seen: str) -> UnbrokenError:
    return UnbrokenError(Reason.PROTOCOL_VIOLATION, f"expected {expected}, got {seen}")
