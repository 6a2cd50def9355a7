"""gRPC over HTTP/2: what a call says in its header fields, and how messages lie in a body.

After https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum
from typing import Final
from urllib.parse import unquote_to_bytes

from hpack import NeverIndexedHeaderTuple

from unbroken.http2.headers import Fields, Request

PREFIX: Final = struct.Struct(">BI")
"""Whether a message is compressed, and its length."""
ACCEPT_ENCODING: Final = b"identity,gzip"
STATUS_MESSAGE_BYTES_MAX: Final = 4096
TIMEOUT_S_MAX: Final = 1e9
"""More is as good as for ever, and grpc.aio takes what its clock cannot count for the past."""
_GZIP_WBITS: Final = 31
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TO_ENCODE: Final = re.compile(rb"[^\x20-\x24\x26-\x7e]")
_METADATA_KEY: Final = re.compile(rb"[0-9a-z_.\-]+")
_METADATA_VALUE: Final = re.compile(rb"[\x20-\x7e]*")
_NOT_METADATA: Final = frozenset(
    {b"te", b"content-type", b"content-length", b"host", b"user-agent", b"accept-encoding"}
)


class Code(IntEnum):
    """The statuses that the protocol itself gives; ours are in `unbroken.status`."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    DEADLINE_EXCEEDED = 4
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Refused(Exception):  # noqa: N818 - it names what happened.
    """The protocol does not allow what the client sent; the text says what."""

    def __init__(self, code: Code, detail: str, fields: Fields = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.fields = fields
        """What the answer has beside its status."""


def http_status(request: Request) -> int:
    """200 if this is a gRPC call, else the status that HTTP has for what it is."""
    if request.method != b"POST":
        return 405
    content_type = request.get(b"content-type") or b""
    is_grpc = content_type == b"application/grpc" or content_type.startswith(
        (b"application/grpc+", b"application/grpc;")
    )
    return 200 if is_grpc else 415


def timeout_s(request: Request) -> float | None:
    """How long the client waits. Raises `Refused`."""
    value = request.get(b"grpc-timeout")
    if value is None:
        return None
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise Refused(Code.INTERNAL, f"expected a grpc-timeout, got {value[:20]!r}")
    return min(int(match[1]) * _UNITS_S[match[2]], TIMEOUT_S_MAX)


def metadata(fields: Fields, also: Collection[bytes] = ()) -> list[tuple[str, str | bytes]]:
    """Custom metadata: what is neither HTTP's nor gRPC's own, but `also` that. Raises `Refused`."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name in _NOT_METADATA or (name.startswith(b"grpc-") and name not in also):
            continue
        if not (_METADATA_KEY.fullmatch(name) and _METADATA_VALUE.fullmatch(value)):
            raise Refused(Code.INTERNAL, f"expected metadata, got {name[:40]!r}")
        key = name.decode()
        if name.endswith(b"-bin"):
            found += [(key, _from_base64(part.strip())) for part in value.split(b",")]
        else:
            found.append((key, value.decode()))
    return found


def fields_of(given: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """The inverse of `metadata`."""
    return [
        (
            key.encode(),
            base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode(),
        )
        for key, value in given
    ]


def passing_fields_of(given: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """As `fields_of`, for values that come once: they take no room in the table of headers."""
    return [NeverIndexedHeaderTuple(key, value) for key, value in fields_of(given)]


def _from_base64(value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(Code.INTERNAL, "expected base64 in binary metadata") from error


def trailers(code: int, detail: str, more: Fields = ()) -> list[tuple[bytes, bytes]]:
    """The end of an answer."""
    fields = [(b"grpc-status", b"%d" % code)]
    if detail:
        # What comes once takes no room in the table of headers.
        fields.append(NeverIndexedHeaderTuple(b"grpc-message", _percent_encoded(detail)))
    fields += more
    return fields


def _percent_encoded(text: str) -> bytes:
    plain = text.encode(errors="replace")[:STATUS_MESSAGE_BYTES_MAX]
    encoded = _TO_ENCODE.sub(lambda found: b"%%%02X" % found[0][0], plain)
    # Field values neither begin nor end with a space (RFC 9113, section 8.2.1).
    if encoded[:1] == b" ":
        encoded = b"%20" + encoded[1:]
    return encoded[:-1] + b"%20" if encoded[-1:] == b" " else encoded


def text_of(encoded: bytes) -> str:
    """What was percent-encoded; what was not, or wrongly, as it is."""
    return unquote_to_bytes(encoded).decode(errors="replace")


class MessageReader:
    """Takes a body apart into messages, whichever way it was cut into frames."""

    __slots__ = ("_buffer", "_is_gzip", "_is_known", "_message_bytes_max")

    def __init__(self, encoding: bytes | None, message_bytes_max: int) -> None:
        """`encoding` is what the sender says of it in grpc-encoding."""
        encoding = encoding or b"identity"
        self._is_gzip = encoding == b"gzip"
        self._is_known = encoding in (b"gzip", b"identity")
        self._message_bytes_max = message_bytes_max
        self._buffer = bytearray()

    @property
    def num_held(self) -> int:
        """Bytes of a message that has not come to its end."""
        return len(self._buffer)

    def may_begin(self, num_bytes: int) -> bool:
        """Whether a message of so many bytes may come next, and nothing else has to."""
        return not self._buffer and num_bytes <= self._message_bytes_max

    def feed(self, data: bytes) -> Sequence[bytes]:
        """The messages that are complete with this data. Raises `Refused`."""
        if not self._buffer and len(data) >= PREFIX.size:
            flag, length = PREFIX.unpack_from(data)
            if not flag and length == len(data) - PREFIX.size:  # Most often: one, and whole.
                self._check(flag, length)
                return [data[PREFIX.size :]]
        self._buffer += data
        messages: list[bytes] = []
        at = 0
        while len(self._buffer) - at >= PREFIX.size:
            flag, length = PREFIX.unpack_from(self._buffer, at)
            self._check(flag, length)
            end = at + PREFIX.size + length
            if len(self._buffer) < end:
                break
            message = bytes(self._buffer[at + PREFIX.size : end])
            messages.append(self._inflated(message) if flag else message)
            at = end
        del self._buffer[:at]
        return messages

    def finish(self) -> None:
        """The body has ended. Raises `Refused` if it did so within a message."""
        if self._buffer:
            raise Refused(Code.INTERNAL, f"a body ended {len(self._buffer)} bytes into a message")

    def _check(self, flag: int, length: int) -> None:
        if flag > 1:
            raise Refused(Code.INTERNAL, f"expected 0 or 1 before a message, got {flag}")
        if length > self._message_bytes_max:
            raise _too_large(length, self._message_bytes_max)
        if flag and not self._is_known:
            raise Refused(
                Code.UNIMPLEMENTED,
                "expected grpc-encoding identity or gzip",
                ((b"grpc-accept-encoding", ACCEPT_ENCODING),),
            )
        if flag and not self._is_gzip:
            raise Refused(Code.INTERNAL, "a compressed message without a grpc-encoding")

    def _inflated(self, message: bytes) -> bytes:
        inflater = zlib.decompressobj(_GZIP_WBITS)
        try:
            data = inflater.decompress(message, self._message_bytes_max + 1)
        except zlib.error as error:
            raise Refused(Code.INTERNAL, "expected gzip") from error
        if len(data) > self._message_bytes_max:
            raise _too_large(len(data), self._message_bytes_max)
        if not inflater.eof or inflater.unused_data:
            raise Refused(Code.INTERNAL, "expected one whole gzip member")
        return data


def _too_large(size: int, size_max: int) -> Refused:
    return Refused(
        Code.RESOURCE_EXHAUSTED, f"expected a message of up to {size_max} bytes, got {size} or more"
    )
