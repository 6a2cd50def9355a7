"""What a client knows of its connection, and so what the server may send to it (RFC 9113).

It reads both directions as they are on the wire, and nothing of the server's state: a server that
believes the wrong thing is found by what it sends, or does not send.
"""

import struct
from collections import deque
from typing import Final

from hpack import Decoder

from unbroken.http2 import frames
from unbroken.http2.connection import Connection
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.limits import EdgeLimits

_HEADER: Final = struct.Struct(">IBI")
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = map(
    int,
    (
        FrameType.DATA,
        FrameType.HEADERS,
        FrameType.RST_STREAM,
        FrameType.SETTINGS,
        FrameType.PING,
        FrameType.GOAWAY,
        FrameType.WINDOW_UPDATE,
        FrameType.CONTINUATION,
    ),
)
"""Plain numbers: every frame of millions is compared with them."""


class _Open:
    """A stream that neither side has reset and the server has not ended."""

    __slots__ = ("given", "has_answer", "kept", "receive", "window")

    def __init__(self, window: int, receive: int) -> None:
        self.window = window
        """What the server may send."""
        self.receive = receive
        """What the client may send."""
        self.has_answer = False
        self.given = 0
        """What the server was given to send and has not sent."""
        self.kept = 0
        """What came to the server and has not been consumed."""


class ClientView:
    """One client's; `says` and `hears` everything, then `settle`s. Raises AssertionError."""

    def __init__(self, limits: EdgeLimits, *, knows_given: bool = True) -> None:
        """Who `knows_given` says what the server was given to send."""
        self._knows_given = knows_given
        self.open: dict[int, _Open] = {}
        self._receive_size = max(limits.connection_window, frames.WINDOW_DEFAULT)
        self._stream_receive_size = limits.stream_window
        self._num_preface_left = len(frames.PREFACE)
        self._unsaid = b""
        """The beginning of a frame."""
        self._window = frames.WINDOW_DEFAULT
        self._initial_window = frames.WINDOW_DEFAULT
        self._receive = frames.WINDOW_DEFAULT
        self._frame_bytes_max = frames.FRAME_BYTES_MAX
        self._last_id = 0
        """Of the streams that the client opened."""
        self._last_answered = 0
        self._last_accepted = frames.STREAM_ID_MAX
        """What the last GOAWAY named."""
        self._reset: set[int] = set()
        """Streams that the server has reset."""
        self._is_told_off = False
        """A GOAWAY named an error."""
        self._is_greeted = False
        self._tables: deque[int | None] = deque()
        """Of each SETTINGS that the server has not acknowledged, what it says of header tables."""
        """Those that are not acknowledged."""
        self._pings: deque[bytes] = deque()
        self._own_block: tuple[int, int] | None = None
        """Stream and flags of the header block that the client has begun."""
        self._block: tuple[int, int, bytearray] | None = None
        """The same of the server's, and what has come of it."""
        self._decoder = Decoder()
        self._just_reset = 0
        """The stream that the only frame just said has reset."""
        self._taken_back: list[tuple[int, int]] = []
        """Streams and what is to be taken from their windows, or 0 for all that they are."""
        self._doomed: list[int] = []
        """Streams on which the client did what it must not."""

    # What the client sends.

    def says(self, data: bytes) -> None:
        """Bytes leave for the server."""
        if self._num_preface_left:
            taken = min(self._num_preface_left, len(data))
            self._num_preface_left -= taken
            data = data[taken:]
        buffer = self._unsaid + data if self._unsaid else data
        at, end = 0, len(buffer)
        said: list[tuple[int, int, int, bytes]] = []
        while at + 9 <= end:
            length_and_kind, flags, stream_id = _HEADER.unpack_from(buffer, at)
            to = at + 9 + (length_and_kind >> 8)
            if to > end:
                break
            stream_id &= frames.STREAM_ID_MAX
            said.append((length_and_kind & 0xFF, flags, stream_id, buffer[at + 9 : to]))
            at = to
        self._unsaid = buffer[at:]
        self._just_reset = 0
        is_alone = len(said) == 1
        for kind, flags, stream_id, payload in said:
            self._says(kind, flags, stream_id, payload, is_alone=is_alone)

    def _says(
        self, kind: int, flags: int, stream_id: int, payload: bytes, *, is_alone: bool
    ) -> None:
        """One frame. Of several, nobody knows which the server had read before it answered: what
        they take from it counts after its answer, what they give before.
        """
        stream = self.open.get(stream_id)
        if kind == _DATA:
            self._receive -= len(payload)
            if stream is not None:
                stream.receive -= len(payload)
                if stream.receive < 0:
                    self._doomed.append(stream_id)
        elif kind == _HEADERS:
            if flags & frames.END_HEADERS:
                self._opens(stream_id)
            else:
                self._own_block = stream_id, flags
        elif kind == _CONTINUATION:
            if flags & frames.END_HEADERS and self._own_block is not None:
                self._opens(self._own_block[0])
                self._own_block = None
        elif kind == _RST_STREAM:
            if is_alone:
                self._just_reset = stream_id
                self.open.pop(stream_id, None)
            else:
                self._taken_back.append((stream_id, 0))
        elif kind == _SETTINGS:
            if not flags & frames.ACK and not len(payload) % 6:
                self._sets(dict(frames.parse_settings(payload)), is_alone=is_alone)
        elif kind == _PING:
            if not flags & frames.ACK:
                self._pings.append(payload)
        elif kind == _WINDOW_UPDATE and len(payload) == 4:
            increment = frames.parse_u32(payload) & frames.WINDOW_MAX
            if stream_id == 0:
                self._window += increment
            elif stream is not None:
                stream.window += increment
                if is_alone and (not increment or stream.window > frames.WINDOW_MAX):
                    self._doomed.append(stream_id)

    def _opens(self, stream_id: int) -> None:
        if stream_id % 2 and self._last_id < stream_id <= self._last_accepted:
            self._last_id = stream_id
            self.open[stream_id] = _Open(self._initial_window, self._stream_receive_size)

    def _sets(self, values: dict[int, int], *, is_alone: bool) -> None:
        self._tables.append(values.get(Setting.HEADER_TABLE_SIZE))
        self._frame_bytes_max = values.get(Setting.MAX_FRAME_SIZE, self._frame_bytes_max)
        if (window := values.get(Setting.INITIAL_WINDOW_SIZE)) is not None:
            change, self._initial_window = window - self._initial_window, window
            for stream_id, stream in self.open.items():
                if change > 0 or is_alone:
                    stream.window += change
                elif change:
                    self._taken_back.append((stream_id, -change))

    # What the server sends.

    def hears(self, data: bytes) -> None:
        """Bytes came from the server."""
        at, end = 0, len(data)
        while at < end:
            assert at + 9 <= end, "whole frames"
            length_and_kind, flags, stream_id = _HEADER.unpack_from(data, at)
            kind, length = length_and_kind & 0xFF, length_and_kind >> 8
            at += 9 + length
            assert at <= end, "whole frames"
            assert length <= self._frame_bytes_max, "no frame is larger than MAX_FRAME_SIZE"
            assert not self._is_told_off, "nothing follows a GOAWAY with an error"
            assert (kind == _CONTINUATION) == (self._block is not None), (
                "a header block is in one piece, and CONTINUATION in a header block"
            )
            if kind == _DATA:
                self._hears_data(flags, stream_id, length)
                continue
            self._hears(kind, flags, stream_id, data[at - length : at])

    def _hears_data(self, flags: int, stream_id: int, length: int) -> None:
        stream = self.open.get(stream_id)
        assert stream is not None, f"DATA on stream {stream_id}, which is idle, ended or reset"
        assert stream.has_answer, "DATA follows HEADERS"
        assert stream_id <= self._last_accepted, "no DATA beyond what GOAWAY named"
        self._window -= length
        stream.window -= length
        stream.given -= length
        assert stream.given >= 0 or not self._knows_given, "what is sent was given"
        assert not length or self._window >= 0, "no DATA beyond the connection's window"
        assert not length or stream.window >= 0, f"no DATA beyond the window of stream {stream_id}"
        if flags & frames.END_STREAM:
            del self.open[stream_id]

    def _hears(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == _HEADERS:
            assert stream_id in self.open, (
                f"HEADERS on stream {stream_id}, which is idle, ended or reset"
            )
            self._hears_block(flags, stream_id, bytearray(payload), flags)
        elif kind == _CONTINUATION:
            assert self._block is not None
            of, first_flags, block = self._block
            assert stream_id == of, "a header block is of one stream"
            self._hears_block(first_flags, stream_id, block + payload, flags)
        elif kind == _RST_STREAM:
            assert len(payload) == 4
            assert stream_id <= min(self._last_id, self._last_accepted), "no reset of an idle one"
            assert stream_id % 2, "no reset of what the client cannot open"
            assert stream_id not in self._reset, f"stream {stream_id} is reset once"
            assert stream_id != self._just_reset, "no reset answers a reset"
            self._reset.add(stream_id)
            self.open.pop(stream_id, None)
        elif kind == _WINDOW_UPDATE:
            self._hears_window(stream_id, frames.parse_u32(payload))
        elif kind == _SETTINGS:
            self._hears_settings(flags, payload)
        elif kind == _PING:
            assert len(payload) == 8
            assert not flags & frames.ACK or (self._pings and payload == self._pings.popleft()), (
                "each PING is answered once, in their order"
            )
        elif kind == _GOAWAY:
            last_id, code = frames.parse_u32(payload), frames.parse_u32(payload, 4)
            assert last_id <= self._last_accepted, "GOAWAY names no more than before"
            assert last_id >= self._last_answered, "GOAWAY names all that was answered"
            self._last_accepted = last_id
            self._is_told_off = code != ErrorCode.NO_ERROR
            for beyond in [each for each in self.open if each > last_id]:
                del self.open[beyond]
        else:
            raise AssertionError(f"no server sends frames of type {kind}")

    def _hears_block(self, first_flags: int, stream_id: int, block: bytearray, flags: int) -> None:
        if not flags & frames.END_HEADERS:
            self._block = stream_id, first_flags, block
            return
        self._block = None
        ends = bool(first_flags & frames.END_STREAM)
        fields = self._decoder.decode(bytes(block), raw=True)
        stream = self.open[stream_id]
        names = [name for name, _ in fields]
        if stream.has_answer:
            assert ends, "what follows the first HEADERS are the trailers"
            assert b":status" not in names, "trailers have no status"
        else:
            assert names.index(b":status") == 0, "an answer begins with its status"
        stream.has_answer = True
        self._last_answered = max(self._last_answered, stream_id)
        if ends:
            assert not stream.given or not self._knows_given, "trailers follow all the data"
            del self.open[stream_id]

    def _hears_window(self, stream_id: int, increment: int) -> None:
        assert 0 < increment <= frames.WINDOW_MAX, "a window is opened by something"
        if stream_id == 0:
            self._receive += increment
            assert self._receive <= self._receive_size, "no more is given back than was taken"
            return
        stream = self.open.get(stream_id)
        assert stream is not None, f"a window for stream {stream_id}: idle, ended or reset"
        stream.receive += increment
        assert stream.receive <= self._stream_receive_size, "nor for a stream"

    def _hears_settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            assert not payload
            assert self._tables, "each SETTINGS is acknowledged once"
            size = self._tables.popleft()
            if size is not None:  # What was sent before need not know it.
                self._decoder.max_allowed_table_size = size
            return
        assert not self._is_greeted, "settings are said once, and first"
        self._is_greeted = True
        values = dict(frames.parse_settings(payload))
        assert values[Setting.INITIAL_WINDOW_SIZE] == self._stream_receive_size

    # What holds in between.

    def settle(self, connection: Connection) -> None:
        """The server has answered to all that was said, and its connection is not over."""
        for stream_id, change in self._taken_back:
            if not change:
                self.open.pop(stream_id, None)
            elif stream_id in self.open:
                self.open[stream_id].window -= change
        self._taken_back.clear()
        for stream_id in self._doomed:
            assert stream_id not in self.open, f"stream {stream_id} is reset for what it did"
        self._doomed.clear()
        assert self._receive >= 0, "who sends more than the connection's window loses it"
        assert self._window <= frames.WINDOW_MAX, "so does who opens it beyond all bounds"
        assert not self._tables, "every SETTINGS is acknowledged"
        assert not self._pings, "every PING is answered"
        assert self._block is None, "header blocks are whole"
        assert connection.num_streams == len(self.open), "both sides know what is open"
        num_given = num_kept = 0
        for stream_id, stream in self.open.items():
            num_kept += stream.kept
            if stream.given:
                num_given += stream.given
                assert min(self._window, stream.window) <= 0, (
                    f"stream {stream_id} waits though both windows are open"
                )
        num_taken = self._receive_size - self._receive
        assert (num_taken - num_kept) * 2 < self._receive_size, "what is consumed is given back"
        assert connection.num_pending_bytes == num_given, "what was given is sent, or waits"
