"""Messages as they lie in a body; by hand the one that is sent a million times, of one token.

Its bytes are those that protobuf writes (a property test holds them together). Protobuf's own way
costs about a microsecond, which is as much as all else that happens to the token; of two tokens and
more it is the quicker one.
"""

from collections.abc import Sequence

from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb

_OFFSET = b"\x10"
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


def body(response: bytes, *, answers_resume: bool) -> bytes:
    """A GenerateResponse as it lies in the body, or a ResumeResponse of it."""
    if answers_resume:
        response = _RESPONSE + varint(len(response)) + response
    return PREFIX.pack(0, len(response)) + response


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
        response = pb.GenerateResponse(token_ids=[token_id], text=self._texts[token_id] or "")
        fields = self._fields[token_id] = response.SerializeToString()
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
