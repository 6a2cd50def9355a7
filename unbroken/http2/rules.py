"""What either side of an HTTP/2 connection keeps to, and how a breach is told (RFC 9113)."""

from collections.abc import Sequence
from typing import Final

from hpack import Encoder

from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, Setting

DATA_EARNS: Final = 4.0
"""Frames that bring nothing, for each DATA frame: for its window, and for probes of the line."""
ENCODER_TABLE_BYTES_MAX: Final = 4096
"""What we keep to compress headers, however much the peer would keep."""
LATENESS_S: Final = 0.1
"""A timeout that is handled so late proves nothing: this process stood still itself."""
LIVENESS_PING: Final = b"unbroken"
ERROR_CODES: Final = frozenset(map(int, ErrorCode))
"""Those that are known; others mean INTERNAL_ERROR."""


class Fault(Exception):  # noqa: N818 - what the peer did.
    """Ends the connection."""

    def __init__(self, code: ErrorCode, detail: str, limit: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.limit = limit


def next_frame(buffer: bytes | bytearray, at: int) -> tuple[int, int, int, bytes] | None:
    """Type, flags, stream and payload of the frame that begins there; None if it is not all there.

    Raises `Fault` if it is larger than we allow.
    """
    payload_at = at + frames.HEADER_BYTES
    if payload_at > len(buffer):
        return None
    length, kind, flags, stream_id = frames.parse_header(buffer, at)
    if length > frames.FRAME_BYTES_MAX:
        raise Fault(
            ErrorCode.FRAME_SIZE_ERROR,
            f"expected up to {frames.FRAME_BYTES_MAX} bytes in a frame, got {length}",
        )
    if payload_at + length > len(buffer):
        return None
    return kind, flags, stream_id, bytes(buffer[payload_at : payload_at + length])


def error_code(value: int) -> ErrorCode:
    """What a peer gives as its reason."""
    return ErrorCode(value) if value in ERROR_CODES else ErrorCode.INTERNAL_ERROR


def checked_settings(payload: bytes) -> dict[int, list[int]]:
    """The values of each setting in a SETTINGS frame, in their order. Raises `Fault`, as all here.

    The last one counts, but what those before it would have done is not forgotten.
    """
    need_length(len(payload) % 6 == 0)
    values: dict[int, list[int]] = {}
    for name, value in frames.parse_settings(payload):
        _check_setting(name, value)
        values.setdefault(name, []).append(value)
    return values


def resize_table(encoder: Encoder, sizes: Sequence[int]) -> None:
    """The peer wants headers compressed with tables of these sizes, one after the other.

    The next block tells it the least and the last of all since the last block, no more (RFC 7541,
    section 4.2).
    """
    for wanted in (min(sizes), sizes[-1]):
        size = min(wanted, ENCODER_TABLE_BYTES_MAX)
        if size != encoder.header_table_size:  # Else the encoder would forget that it changed.
            encoder.header_table_size = size
    changes = encoder.table_size_changes
    if len(changes) > 2:
        changes[:] = min(changes), changes[-1]


def _check_setting(name: int, value: int) -> None:
    """Whether a setting has a value that it may have."""
    if name == Setting.ENABLE_PUSH and value > 1:
        raise Fault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
    if name == Setting.INITIAL_WINDOW_SIZE and value > frames.WINDOW_MAX:
        raise Fault(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
    if name == Setting.MAX_FRAME_SIZE and not frames.FRAME_BYTES_MAX <= value < 2**24:
        raise Fault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")


def need_stream(stream_id: int) -> None:
    """The frame has to be of a stream."""
    if stream_id == 0:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "expected a frame of a stream, got the connection's")


def need_connection(stream_id: int) -> None:
    """The frame has to be of the connection."""
    if stream_id != 0:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "expected a frame of the connection, got a stream's")


def need_length(is_right: bool) -> None:
    """The frame has to be as long as its type wants it."""
    if not is_right:
        raise Fault(ErrorCode.FRAME_SIZE_ERROR, "a frame of a wrong length")


def unpadded(flags: int, payload: bytes, size_min: int = 0) -> bytes:
    """What is in a frame that may be padded; so much of it cannot be padding."""
    if not flags & frames.PADDED:
        return payload
    need_length(len(payload) > size_min)
    padding = payload[0]
    if padding >= len(payload) - size_min:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - padding]
