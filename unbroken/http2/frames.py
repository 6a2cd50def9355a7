"""HTTP/2 frames (RFC 9113, sections 4 and 6): their names, and how they are written."""

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES: Final = 9
FRAME_BYTES_MAX: Final = 16_384
"""Largest payload that we take, and send: the smallest that may be announced."""
WINDOW_MAX: Final = 2**31 - 1
WINDOW_DEFAULT: Final = 65_535
STREAM_ID_MAX: Final = 2**31 - 1


class FrameType(IntEnum):
    """What a frame is; others are to be ignored."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20


class Setting(IntEnum):
    """What a SETTINGS frame can say."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (RFC 9113, section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


_HEADER: Final = struct.Struct(">IBI")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_SETTING: Final = struct.Struct(">HI")


def parse_header(data: bytes | bytearray, at: int) -> tuple[int, int, int, int]:
    """Length, type, flags and stream of the frame header at that place."""
    length_and_type, flags, stream_id = _HEADER.unpack_from(data, at)
    return length_and_type >> 8, length_and_type & 0xFF, flags, stream_id & STREAM_ID_MAX


def frame(kind: FrameType, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return _HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def headers(stream_id: int, block: bytes, *, ends: bool) -> bytes:
    """A header block, in as many frames as it takes."""
    flags = END_STREAM if ends else 0
    if len(block) <= FRAME_BYTES_MAX:
        return frame(FrameType.HEADERS, flags | END_HEADERS, stream_id, block)
    parts = [frame(FrameType.HEADERS, flags, stream_id, block[:FRAME_BYTES_MAX])]
    for begin in range(FRAME_BYTES_MAX, len(block), FRAME_BYTES_MAX):
        end = begin + FRAME_BYTES_MAX
        last = END_HEADERS if end >= len(block) else 0
        parts.append(frame(FrameType.CONTINUATION, last, stream_id, block[begin:end]))
    return b"".join(parts)


def settings(values: Mapping[Setting, int]) -> bytes:
    """What we announce."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values.items())
    return frame(FrameType.SETTINGS, 0, 0, payload)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """Names, known or not, and values, in their order."""
    return list(_SETTING.iter_unpack(payload))


def reset(stream_id: int, code: ErrorCode) -> bytes:
    """RST_STREAM."""
    return frame(FrameType.RST_STREAM, 0, stream_id, _U32.pack(code))


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection."""
    return frame(FrameType.WINDOW_UPDATE, 0, stream_id, _U32.pack(increment))


def ping(opaque: bytes, *, is_ack: bool) -> bytes:
    """PING, of 8 bytes."""
    return frame(FrameType.PING, ACK if is_ack else 0, 0, opaque)


def go_away(last_stream_id: int, code: ErrorCode, detail: bytes = b"") -> bytes:
    """GOAWAY."""
    return frame(FrameType.GOAWAY, 0, 0, _U64.pack(last_stream_id << 32 | code) + detail)


def parse_u32(payload: bytes, at: int = 0) -> int:
    """An unsigned number in network order."""
    (value,) = _U32.unpack_from(payload, at)
    return value


def data_header(stream_id: int, size: int) -> bytes:
    """The header of a DATA frame that ends nothing."""
    return _HEADER.pack(size << 8, 0, stream_id)
