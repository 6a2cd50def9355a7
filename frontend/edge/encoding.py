"""Messages as they lie in a body; by hand the one that is sent a million times, of one token.

Its bytes are those that protobuf writes (a property test holds them together). Protobuf's own way
costs about a microsecond, which is as much as all else that happens to the token; of two tokens and
more it is the quicker one.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb

_SIZE_LONG: Final = 0xFF
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


class TokenFields:
    """Per token id of a vocabulary what a message says of it, made when it is first asked for; no
    offset."""

    def __init__(self, texts: Sequence[str | None]) -> None:
        """`texts` has what each id says by itself."""
        self._texts = texts
        # Flat: with a dict each token would cost another miss in the caches.
        self.made: list[bytes | None] = [None] * len(texts)
        """What has been asked for, by id."""
        self.sizes = bytearray([_SIZE_LONG]) * len(texts)
        """Bytes of it, by id; `_SIZE_LONG` where a message of it may have a longer prefix, and for
        what has not been asked for."""

    def of(self, token_id: int) -> bytes:
        """What is said of that one. Raises as `make`."""
        return self.made[token_id] or self.make(token_id)

    def make(self, token_id: int) -> bytes:
        """It, for the first time. Raises `LookupError` if its text depends on others."""
        text = self._texts[token_id]
        if text is None:
            raise LookupError(token_id)
        fields = pb.GenerateResponse(token_ids=[token_id], text=text).SerializeToString()
        self.made[token_id] = fields
        if len(fields) + _OFFSET_FIELD_BYTES_MAX < _VARINT_1_MAX:
            self.sizes[token_id] = len(fields)
        return fields

    def has_short(self, token_id: int) -> bool:
        """Whether a message of it is sure to have a size below `NUM_SIZES`."""
        try:
            return len(self.of(token_id)) < NUM_SIZES - _OFFSET_FIELD_BYTES_MAX
        except LookupError:
            return False


class TokenBodies:
    """What lies in a body for one token of a vocabulary, whose text depends on no other token.

    After most steps that is all a stream has to say, so all that returns is made once: per token
    id its fields, per offset its field, per size what stands before the message.
    """

    def __init__(self, fields: TokenFields, *, answers_resume: bool) -> None:
        self.fields = fields
        self._answers_resume = answers_resume
        self.prefixes = [self._prefix_of(size) for size in range(NUM_SIZES)]
        """What stands before a message of that size."""
        lengths = [(len(prefix) + size).to_bytes(3) for size, prefix in enumerate(self.prefixes)]
        self.heads = lengths, self.prefixes
        """Per size of a message, how a DATA frame with it begins; and those."""

    def body(self, offset: int, token_id: int) -> bytes:
        """The message, as it lies in the body. Raises as `TokenFields.make`."""
        message = offset_field(offset) + self.fields.of(token_id)
        size = len(message)
        return (self.prefixes[size] if size < NUM_SIZES else self._prefix_of(size)) + message

    def size(self, offset: int, token_ids: Sequence[int]) -> int:
        """Bytes of the bodies of these tokens, the first of which stands at `offset`."""
        # With one more, since of one alone there is no tuple.
        sizes = bytes(itemgetter(*token_ids, 0)(self.fields.sizes)[:-1])
        if _SIZE_LONG in sizes:
            return sum(len(self.body(*one)) for one in enumerate(token_ids, offset))
        num_tokens = len(token_ids)
        places = _offset_bytes_below(offset + num_tokens) - _offset_bytes_below(offset)
        return sum(sizes) + places + num_tokens * len(self.prefixes[0])

    def _prefix_of(self, size: int) -> bytes:
        prefix = b""
        if self._answers_resume:
            prefix = _RESPONSE + varint(size)
        return PREFIX.pack(0, len(prefix) + size) + prefix


def offset_field(offset: int) -> bytes:
    """The offset of a message; nothing for 0."""
    return OFFSETS[offset] if offset < len(OFFSETS) else _OFFSET + varint(offset)


def _offset_bytes_below(end: int) -> int:
    """Bytes of the fields of all offsets below that one."""
    # From 1 << bits on a varint has one more byte.
    longer = sum(max(0, end - (1 << bits)) for bits in (7, 14, 21, 28))
    return longer + len(_OFFSET + varint(1)) * max(0, end - 1)


def have_offsets(end: int) -> int:
    """Have more in `OFFSETS` if there are fewer; returns how many there are. Some at once, which
    takes a millisecond or two."""
    first = len(OFFSETS)
    if first < min(end, OFFSETS_MAX):
        end = min(OFFSETS_MAX, first + _OFFSETS_MORE)
        OFFSETS.extend(_OFFSET + varint(offset) for offset in range(first, end))
    return len(OFFSETS)


OFFSETS_MAX: Final = 1 << 17
"""Of which the fields are kept; they take 6 MB then."""
_OFFSETS_MORE: Final = 4096
OFFSETS: Final = [b""]
"""Fields of the first offsets."""
have_offsets(_OFFSETS_MORE)
NUM_SIZES: Final = 320
"""Of messages of one token, which almost all are below."""
_OFFSET_FIELD_BYTES_MAX: Final = 6
_VARINT_1_MAX: Final = 0x80
BODY_BYTES_MAX: Final = NUM_SIZES + PREFIX.size + 3
"""Of one token whose message has such a size."""
