"""GenerateResponse by hand: the one message that is sent a million times.

The bytes are those that protobuf writes (a property test holds them together); protobuf's own way
costs about a microsecond more for each.
"""

from collections.abc import Sequence

from frontend.edge.messages import PREFIX
from unbroken.generation import TokenLogprobs, logprobs_to_proto

_CHOICE_INDEX = b"\x08"
_OFFSET = b"\x10"
_TOKEN_IDS = b"\x1a"
_TEXT = b"\x22"
_LOGPROBS = b"\x2a"
_RESUME_TOKEN = b"\x42"
_RESPONSE = b"\x0a"


def varint(value: int) -> bytes:
    """An unsigned number as protobuf writes it."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def generate_response(
    choice_index: int,
    offset: int,
    token_ids: Sequence[int],
    text: str,
    logprobs: Sequence[TokenLogprobs] = (),
    resume_token: bytes = b"",
) -> bytes:
    """A piece of output as a GenerateResponse."""
    message = b""
    if choice_index:
        message = _CHOICE_INDEX + varint(choice_index)
    if offset:
        message += _OFFSET + varint(offset)
    if token_ids:
        ids = b"".join(map(varint, token_ids)) if len(token_ids) > 1 else varint(token_ids[0])
        message += _TOKEN_IDS + varint(len(ids)) + ids
    if text:
        data = text.encode()
        message += _TEXT + varint(len(data)) + data
    for entry in logprobs:
        data = logprobs_to_proto(entry).SerializeToString()
        message += _LOGPROBS + varint(len(data)) + data
    if resume_token:
        message += _RESUME_TOKEN + varint(len(resume_token)) + resume_token
    return message


def resume_response(generate_response: bytes) -> bytes:
    """The same as a ResumeResponse."""
    return _RESPONSE + varint(len(generate_response)) + generate_response


class TokenBodies:
    """What lies in a body for one token of a vocabulary, whose text depends on no other token.

    After most steps that is all a stream has to say, so all that returns is made once: per token
    id its fields, per offset its field, per size what stands before the message.
    """

    def __init__(self, texts: Sequence[str | None], *, answers_resume: bool) -> None:
        """`texts` has what each id says by itself."""
        self._texts = texts
        self._answers_resume = answers_resume
        self._fields: dict[int, bytes] = {}
        self._prefixes: dict[int, bytes] = {}

    def body(self, offset: int, token_id: int) -> bytes:
        """The message, as it lies in the body."""
        try:
            fields = self._fields[token_id]
        except KeyError:
            fields = self._fields_of(token_id)
        if offset < _NUM_OFFSETS:
            message = _OFFSETS[offset] + fields
        else:
            message = _OFFSET + varint(offset) + fields
        size = len(message)
        try:
            return self._prefixes[size] + message
        except KeyError:
            return self._prefix_of(size) + message

    def _fields_of(self, token_id: int) -> bytes:
        fields = generate_response(0, 0, (token_id,), self._texts[token_id] or "")
        self._fields[token_id] = fields
        return fields

    def _prefix_of(self, size: int) -> bytes:
        """What stands before a message of that size."""
        prefix = b""
        if self._answers_resume:
            prefix = _RESPONSE + varint(size)
        prefix = PREFIX.pack(0, len(prefix) + size) + prefix
        self._prefixes[size] = prefix
        return prefix


_NUM_OFFSETS = 4096
_OFFSETS = [b"", *(_OFFSET + varint(offset) for offset in range(1, _NUM_OFFSETS))]
