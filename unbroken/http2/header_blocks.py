"""Header blocks, put together from frames and decoded (RFC 9113, section 4.3, and RFC 7541)."""

from dataclasses import dataclass
from typing import Final

from hpack import Decoder, HPACKError, OversizedHeaderListError

from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.headers import Fields
from unbroken.http2.rules import Fault, need_length, need_stream, unpadded

HARD_FACTOR: Final = 4
"""A header list of so many times the limit ends the connection; below, only its request or call."""


@dataclass(frozen=True, slots=True)
class HeaderSection:
    """A block that is complete, decoded; nothing of it has been checked."""

    stream_id: int
    ends: bool
    """It is the last of its stream."""
    fields: Fields
    began_at: float


@dataclass(slots=True)
class _Block:
    """One that is not complete."""

    stream_id: int
    ends: bool
    began_at: float
    data: bytearray
    num_frames: int = 0


class HeaderBlocks:
    """Those that the peer of one connection sends: one after the other, no frame between.

    All are decoded, also those of no interest: each changes the table for what follows. Methods
    raise `Fault` for what ends a connection; beyond a limit, with its name.
    """

    def __init__(self, *, list_bytes_max: int, frames_max: int) -> None:
        self._bytes_max = HARD_FACTOR * list_bytes_max
        self._frames_max = frames_max
        self._decoder = Decoder(self._bytes_max)
        self._block: _Block | None = None

    @property
    def open_since(self) -> float | None:
        """When the block began that is not complete, if there is one."""
        return None if self._block is None else self._block.began_at

    def check_order(self, kind: int, stream_id: int) -> None:
        """Whether a frame may come now."""
        if self._block is not None and (
            kind != FrameType.CONTINUATION or stream_id != self._block.stream_id
        ):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected the rest of a header block")

    def begin(self, flags: int, stream_id: int, payload: bytes, now: float) -> HeaderSection | None:
        """A HEADERS frame came."""
        priority_size = 5 if flags & frames.HAS_PRIORITY else 0
        fragment = unpadded(flags, payload, priority_size)
        need_length(len(fragment) >= priority_size)
        fragment = fragment[priority_size:]
        ends = bool(flags & frames.END_STREAM)
        return self._grew(_Block(stream_id, ends, now, bytearray()), fragment, flags)

    def go_on(self, flags: int, stream_id: int, payload: bytes) -> HeaderSection | None:
        """A CONTINUATION frame came."""
        need_stream(stream_id)
        if self._block is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        return self._grew(self._block, payload, flags)

    def _grew(self, block: _Block, fragment: bytes, flags: int) -> HeaderSection | None:
        block.data += fragment
        block.num_frames += 1
        if block.num_frames > self._frames_max:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames of headers", "header_frames")
        if len(block.data) > self._bytes_max:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many bytes of headers", "header_bytes")
        if not flags & frames.END_HEADERS:
            self._block = block
            return None
        self._block = None
        try:
            fields = [
                (name, value) for name, value in self._decoder.decode(bytes(block.data), raw=True)
            ]
        except OversizedHeaderListError as error:
            raise Fault(
                ErrorCode.ENHANCE_YOUR_CALM, "too large a header list", "header_bytes"
            ) from error
        except (HPACKError, IndexError) as error:
            raise Fault(ErrorCode.COMPRESSION_ERROR, "a bad header block") from error
        return HeaderSection(block.stream_id, block.ends, fields, block.began_at)
