"""One HTTP/2 connection as its server sees it (RFC 9113): bytes in, events and bytes out.

                     HEADERS                    END_STREAM of the client
    idle ─────────────────────────▶ open ─────────────────────────────────▶ half-closed (remote)
                                     │ our END_STREAM, or RST_STREAM, either way     │
                                     ▼                                               ▼
                                   closed ◀──────────────────────────────────────────┘

A peer that breaks the protocol loses the stream or, where the RFC wants it so, the connection: the
code it is told is the RFC's. What a peer may do, but not without end, is an `Allowance`; what must
happen in time is in `deadline` and `handle_timeout`. When a connection is over, what is in
`outbound` is still worth sending; nothing is received any more.

Who reads events MUST call `consumed` for the data in them: flow control is how senders are slowed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, TypeAlias

from hpack import Encoder

from unbroken.http2 import frames
from unbroken.http2.allowance import Allowance
from unbroken.http2.flow_control import ReceiveWindow, SendWindow
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.header_blocks import HeaderBlocks, HeaderSection
from unbroken.http2.headers import (
    Fields,
    Malformed,
    Request,
    check_request,
    check_trailers,
    list_bytes,
)
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.rules import (
    DATA_EARNS,
    LATENESS_S,
    LIVENESS_PING,
    Fault,
    checked_settings,
    error_code,
    need_connection,
    need_length,
    need_stream,
    next_frame,
    resize_table,
    unpadded,
)

CLOSED_REMEMBERED: Final = 1024
"""Closed streams of which is known how they ended; frames for older ones are plainly refused."""
TOO_LARGE_COSTS: Final = 100.0
"""Control frames that such a header list counts for: it is dear to decode."""
DRAIN_PING_S: Final = 1.0
"""How long the first GOAWAY waits for its PING, before the second names the last stream."""
_DRAIN_PING: Final = b"draining"


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A stream was opened; with `ends`, the request has no body.

    If its header section `is_too_large`, it is to be answered so.
    """

    stream_id: int
    request: Request
    ends: bool
    is_too_large: bool = False


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A piece of a body, perhaps its last and perhaps empty."""

    stream_id: int
    data: bytes
    ends: bool


@dataclass(frozen=True, slots=True)
class StreamLost:
    """The stream is closed before its answer was complete: by the peer, or for what it did."""

    stream_id: int
    code: ErrorCode
    is_by_peer: bool


@dataclass(frozen=True, slots=True)
class Writable:
    """A stream that asked for room has it."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class LimitHit:
    """The peer went beyond a limit, of which this is the name."""

    limit: str


@dataclass(frozen=True, slots=True)
class Over:
    """The connection is to be closed, once what is outbound has been sent."""

    code: ErrorCode
    detail: str


Event: TypeAlias = RequestReceived | DataReceived | StreamLost | Writable | LimitHit | Over


class _End(Enum):
    """How a stream was closed."""

    ENDED = 1
    RESET_BY_PEER = 2
    RESET_BY_US = 3


class Ride(Protocol):
    """Who sends DATA on a stream himself, and takes it from its window later (`count_frames`)."""

    def settle(self) -> None:
        """Take it now."""
        ...

    def step_out(self) -> None:
        """Take it, and send no more."""
        ...


class HttpStream:
    """One stream, until it is closed. Only its connection and its ride look inside."""

    __slots__ = (
        "body_left",
        "is_closed",
        "is_remote_closed",
        "pending",
        "receive",
        "ride",
        "send",
        "stream_id",
        "trailers",
        "unconsumed",
    )

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.stream_id = stream_id
        self.send = SendWindow(send_window)
        self.receive = ReceiveWindow(receive_window)
        self.is_closed = False
        self.is_remote_closed = False
        self.body_left: int | None = None
        """What is to come of a body of announced length."""
        self.unconsumed = 0
        self.pending = bytearray()
        """What did not fit into the windows."""
        self.trailers: Fields | None = None
        """Follow what is pending."""
        self.ride: Ride | None = None

    @property
    def data_header_tail(self) -> bytes:
        """How the header of a DATA frame of it goes on after the length."""
        return frames.data_header(self.stream_id, 0)[3:]


class Connection:
    """The state of one connection."""

    def __init__(self, limits: EdgeLimits, now: float) -> None:
        self._limits = limits
        self.outbound = bytearray(
            frames.settings(
                {
                    Setting.MAX_CONCURRENT_STREAMS: limits.streams_max,
                    Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
                    Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes_max,
                }
            )
        )
        """What is to be sent; whoever sends it takes it with `take_outbound`."""
        self.ping_interval_min_s = 0.0
        """Less often than the limits say, because there are so many other connections."""
        if limits.connection_window > frames.WINDOW_DEFAULT:
            increment = limits.connection_window - frames.WINDOW_DEFAULT
            self.outbound += frames.window_update(0, increment)
        self.is_over = False
        self._streams: dict[int, HttpStream] = {}
        self._closed: OrderedDict[int, _End] = OrderedDict()
        self._last_stream_id = 0
        self._header_blocks = HeaderBlocks(
            list_bytes_max=limits.header_list_bytes_max, frames_max=limits.header_frames_max
        )
        self._encoder = Encoder()
        self.send_window = SendWindow(frames.WINDOW_DEFAULT)
        """Of all streams together."""
        self.ride: Ride | None = None
        """Of the only stream there is, who takes what it sends from this window later, too."""
        self._receive = ReceiveWindow(max(limits.connection_window, frames.WINDOW_DEFAULT))
        self._peer_initial_window = frames.WINDOW_DEFAULT
        self._initial_window: int = max(limits.stream_window, frames.WINDOW_DEFAULT)
        """Of a new stream, for what we receive: as announced, once the peer has to know it."""
        self._inbound = bytearray()
        self._num_preface_left = len(frames.PREFACE)
        self._is_greeted = False
        """Its first SETTINGS came."""
        self._began_at = now
        self._heard_at = now
        self._partial_since: float | None = None
        self._pinged_at: float | None = None
        self._uploads: dict[int, float] = {}
        """Since when streams upload that have to come to an end."""
        self._blocked: dict[int, float] = {}
        """Since when streams wait for a window, in the order in which they are served."""
        self._drain_at: float | None = None
        self._last_accepted: int | None = None
        """Once drained: streams beyond it are not served."""
        self._settings = Allowance(limits.settings_burst, limits.settings_per_s, now)
        self._resets = Allowance(limits.resets_burst, limits.resets_per_s, now)
        self._control = Allowance(limits.control_burst, limits.control_per_s, now)
        self._num_data_sent = 0
        """DATA frames for which the allowance has not been raised yet."""
        self._events: list[Event] = []

    @property
    def num_streams(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    @property
    def has_dues(self) -> bool:
        """Whether a stream waits for a window, or has to bring something to its end in time."""
        return bool(self._blocked or self._uploads)

    @property
    def num_pending_bytes(self) -> int:
        """What waits for windows to open."""
        return sum(len(stream.pending) for stream in self._streams.values())

    # What comes.

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Bytes came."""
        if self.is_over:
            return []
        self._heard_at = now
        self._pinged_at = None
        buffer: bytes | bytearray = data
        if self._inbound:
            self._inbound += data
            buffer = self._inbound
        at, end = 0, len(buffer)
        try:
            if self._num_preface_left:
                at = self._receive_preface(buffer)
            begin = at
            while not (self.is_over or self._num_preface_left):
                if (frame := next_frame(buffer, at)) is None:
                    break
                kind, flags, stream_id, payload = frame
                at += frames.HEADER_BYTES + len(payload)
                self._frame(kind, flags, stream_id, payload, now)
        except Fault as fault:
            self._fail(fault)
            at = begin = end
        if at > begin or self._partial_since is None:
            self._partial_since = now if at < end else None
        self._inbound = bytearray(buffer[at:])
        return self._take_events()

    def _receive_preface(self, buffer: bytes | bytearray) -> int:
        done = len(frames.PREFACE) - self._num_preface_left
        given = bytes(buffer[: self._num_preface_left])
        if given != frames.PREFACE[done : done + len(given)]:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected the HTTP/2 preface")
        self._num_preface_left -= len(given)
        return len(given)

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        self._header_blocks.check_order(kind, stream_id)
        if not self._is_greeted and (kind != FrameType.SETTINGS or flags & frames.ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected SETTINGS first")
        match kind:
            case FrameType.DATA:
                self._data(flags, stream_id, payload, now)
            case FrameType.HEADERS:
                self._headers(flags, stream_id, payload, now)
            case FrameType.WINDOW_UPDATE:
                self._window_update(stream_id, payload, now)
            case FrameType.RST_STREAM:
                self._rst_stream(stream_id, payload, now)
            case FrameType.SETTINGS:
                self._settings_frame(flags, stream_id, payload, now)
            case FrameType.PING:
                self._ping(flags, stream_id, payload, now)
            case FrameType.CONTINUATION:
                self._header_section(self._header_blocks.go_on(flags, stream_id, payload))
            case FrameType.GOAWAY:
                self._spend_control(now)
                need_connection(stream_id)
                need_length(len(payload) >= 8)
            case FrameType.PRIORITY:
                self._spend_control(now)
                need_stream(stream_id)
                need_length(len(payload) == 5)
            case FrameType.PUSH_PROMISE:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "a client cannot push")
            case _:
                self._spend_control(now)  # Unknown frames are ignored.

    # DATA.

    def _data(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        need_stream(stream_id)
        size = len(payload)
        if not self._receive.take(size):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        data = unpadded(flags, payload)
        ends = bool(flags & frames.END_STREAM)
        stream = self._streams.get(stream_id)
        if stream is None or stream.is_remote_closed:
            self._give_connection(size)
            self._late(stream_id, now)
            return
        if not data and not ends:
            self._spend_control(now)
        if not stream.receive.take(size):
            self._give_connection(size)
            self._stream_error(stream, ErrorCode.FLOW_CONTROL_ERROR, now)
            return
        if stream.body_left is not None:
            stream.body_left -= len(data)
            if stream.body_left < 0 or (ends and stream.body_left):
                self._give_connection(size)
                self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, now)
                return
        stream.unconsumed += size
        if size > len(data):
            self.consumed(stream_id, size - len(data))
        if ends:
            self._remote_closed(stream)
        if data or ends:
            self._events.append(DataReceived(stream_id, data, ends))

    def _late(self, stream_id: int, now: float) -> None:
        """A frame for a stream that takes none any more."""
        self._spend_control(now)
        self._need_begun(stream_id)
        if self._is_beyond_drain(stream_id):
            return
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED, now)
        elif self._closed.get(stream_id) is not _End.RESET_BY_US:
            self.outbound += frames.reset(stream_id, ErrorCode.STREAM_CLOSED)
            self._remember(stream_id, _End.RESET_BY_US)

    def consumed(self, stream_id: int, num_bytes: int) -> None:
        """Data has been dealt with: the peer may send as much again."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # The connection's window got it back when the stream was closed.
        stream.unconsumed -= num_bytes
        self._give_connection(num_bytes)
        if not stream.is_remote_closed and (increment := stream.receive.give(num_bytes)):
            self.outbound += frames.window_update(stream_id, increment)

    def _give_connection(self, num_bytes: int) -> None:
        if increment := self._receive.give(num_bytes):
            self.outbound += frames.window_update(0, increment)

    # HEADERS and CONTINUATION.

    def _headers(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        need_stream(stream_id)
        if stream_id % 2 == 0:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "clients open odd streams")
        self._header_section(self._header_blocks.begin(flags, stream_id, payload, now))

    def _header_section(self, section: HeaderSection | None) -> None:
        if section is None:
            return  # Not complete.
        stream_id, ends, fields = section.stream_id, section.ends, section.fields
        now = section.began_at
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._request_trailers(stream, fields, now, ends=ends)
            return
        if stream_id <= self._last_stream_id:
            how = self._closed.get(stream_id)
            if how is _End.RESET_BY_US:
                self._spend_control(now)
                return  # It was on its way.
            code = ErrorCode.PROTOCOL_ERROR if how is None else ErrorCode.STREAM_CLOSED
            raise Fault(code, f"HEADERS for the closed stream {stream_id}")
        if self._is_beyond_drain(stream_id):
            self._spend_control(now)
            return
        self._last_stream_id = stream_id
        if len(self._streams) >= self._limits.streams_max:
            self._events.append(LimitHit("streams"))
            self._spend_control(now)
            self._refuse(stream_id, ErrorCode.REFUSED_STREAM)
            return
        try:
            request = check_request(fields)
        except Malformed:
            self._spend_resets(now)
            self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        if ends and request.content_length:
            self._spend_resets(now)
            self._refuse(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        if self.ride is not None:
            self.ride.step_out()  # It is not the only stream any more.
        limits = self._limits
        stream = HttpStream(stream_id, self._peer_initial_window, self._initial_window)
        stream.body_left = request.content_length
        self._streams[stream_id] = stream
        if ends:
            stream.is_remote_closed = True
        is_too_large = list_bytes(fields) > limits.header_list_bytes_max
        if is_too_large:
            self._spend_control(now, TOO_LARGE_COSTS)
            self._events.append(LimitHit("header_bytes"))
        self._events.append(RequestReceived(stream_id, request, ends, is_too_large))

    def _request_trailers(
        self, stream: HttpStream, fields: Fields, now: float, *, ends: bool
    ) -> None:
        if stream.is_remote_closed:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED, now)
            return
        try:
            check_trailers(fields)
        except Malformed:
            ends = False
        if not ends or stream.body_left:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, now)
            return
        self._remote_closed(stream)
        self._events.append(DataReceived(stream.stream_id, b"", ends=True))

    def _need_begun(self, stream_id: int) -> None:
        """The frame has to be of a stream that the client opened; beyond a drain, it may have."""
        is_known = stream_id <= self._last_stream_id or self._is_beyond_drain(stream_id)
        if stream_id % 2 == 0 or not is_known:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"a frame for the idle stream {stream_id}")

    def _is_beyond_drain(self, stream_id: int) -> bool:
        return self._last_accepted is not None and stream_id > self._last_accepted

    # The other frames.

    def _rst_stream(self, stream_id: int, payload: bytes, now: float) -> None:
        need_stream(stream_id)
        need_length(len(payload) == 4)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._spend_control(now)
            self._need_begun(stream_id)
            return
        self._spend_resets(now)
        self._close(stream, _End.RESET_BY_PEER)
        code = error_code(frames.parse_u32(payload))
        self._events.append(StreamLost(stream_id, code, is_by_peer=True))

    def _settings_frame(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        need_connection(stream_id)
        if not self._settings.spend(now):
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many SETTINGS", "settings")
        if flags & frames.ACK:
            need_length(not payload)
            self._acknowledged()
            return
        values = checked_settings(payload)
        if sizes := values.get(Setting.HEADER_TABLE_SIZE):
            resize_table(self._encoder, sizes)
        before = self._peer_initial_window
        if sizes := values.get(Setting.INITIAL_WINDOW_SIZE):
            self._resize_sending(sizes)
        self._is_greeted = True
        self.outbound += frames.frame(FrameType.SETTINGS, frames.ACK, 0)
        # After that: headers, too, may leave now, compressed as the peer is told with it.
        if self._peer_initial_window > before:
            self._serve_blocked(now)

    def _acknowledged(self) -> None:
        """The peer keeps to our windows; before, it may not have known (RFC 9113, 6.9.3)."""
        size = self._limits.stream_window
        if size == self._initial_window:
            return
        self._initial_window = size
        for stream in self._streams.values():
            increment = stream.receive.resize(size)
            if increment and not stream.is_remote_closed:
                self.outbound += frames.window_update(stream.stream_id, increment)

    def _resize_sending(self, sizes: Sequence[int]) -> None:
        """The peer takes so much on each stream: first this, then that."""
        before, self._peer_initial_window = self._peer_initial_window, sizes[-1]
        for stream in self._streams.values():
            if stream.ride is not None:
                stream.ride.step_out()
            if not stream.send.resize(before, sizes):
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window overflows")

    def _ping(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        self._spend_control(now)
        need_connection(stream_id)
        need_length(len(payload) == 8)
        if not flags & frames.ACK:
            self.outbound += frames.ping(payload, is_ack=True)
        elif payload == _DRAIN_PING:
            self._name_last_stream()

    def _window_update(self, stream_id: int, payload: bytes, now: float) -> None:
        need_length(len(payload) == 4)
        self._spend_control(now)
        increment = frames.parse_u32(payload) & frames.WINDOW_MAX
        if stream_id == 0:
            if not increment:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "a window update of 0")
            if self.ride is not None:
                self.ride.settle()
            if not self.send_window.grow(increment):
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window overflows")
            if self._blocked:
                self._serve_blocked(now)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._need_begun(stream_id)
            return
        if stream.ride is not None:
            stream.ride.settle()
        if not increment:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, now)
        elif not stream.send.grow(increment):
            self._stream_error(stream, ErrorCode.FLOW_CONTROL_ERROR, now)
        elif stream_id in self._blocked:
            self._serve(stream, now)

    def _spend_control(self, now: float, amount: float = 1.0) -> None:
        self._control.earn(DATA_EARNS * self._num_data_sent)
        self._num_data_sent = 0
        if not self._control.spend(now, amount):
            raise Fault(
                ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring nothing", "control"
            )

    def _spend_resets(self, now: float) -> None:
        """The peer takes a stream back, or makes us do so: either is cheap for it alone."""
        if not self._resets.spend(now):
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many resets", "resets")

    # What goes.

    def send_headers(self, stream_id: int, fields: Fields, *, ends: bool = False) -> None:
        """The header section of an answer. Ignored if the stream is closed."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        # Huffman coding would take a quarter off what comes once, and a fifth of the time of a
        # refusal; what comes again is an index either way.
        block = self._encoder.encode(fields, huffman=False)
        self.outbound += frames.headers(stream_id, block, ends=ends)
        if ends:
            self._local_closed(stream)

    def has_room(self, stream_id: int) -> bool:
        """Whether something sent now would leave now, at least in part."""
        stream = self._streams.get(stream_id)
        return (
            stream is not None
            and not stream.pending
            and stream.send.left > 0
            and self.send_window.left > 0
        )

    def want_room(self, stream_id: int, now: float) -> None:
        """Something waits for the stream: say `Writable` when there is room."""
        if stream_id in self._streams:
            self._blocked.setdefault(stream_id, now)

    def send_data(self, stream_id: int, data: bytes, now: float) -> bool:
        """Send as much as the windows take, and the rest when they open; whether all has left.

        Ignored if the stream is closed.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return True
        return self.send_on(stream, data, now)

    def stream(self, stream_id: int) -> HttpStream | None:
        """For `send_on`, if it is not closed."""
        return self._streams.get(stream_id)

    def send_on(self, stream: HttpStream, data: bytes, now: float) -> bool:
        """As `send_data`. The hot path."""
        size, send, connection_send = len(data), stream.send, self.send_window
        if (
            size <= send.left
            and size <= connection_send.left
            and size <= frames.FRAME_BYTES_MAX
            and not stream.pending
            and not stream.is_closed
        ):
            send.left -= size
            connection_send.left -= size
            self._num_data_sent += 1
            outbound = self.outbound
            outbound += frames.data_header(stream.stream_id, size)
            outbound += data
            return True
        if stream.is_closed:
            return True
        stream_id = stream.stream_id
        stream.pending += data
        self._send_pending(stream)
        if stream.pending:
            self._blocked.setdefault(stream_id, now)
            return False
        return True

    def count_frames(self, num_frames: int, num_bytes: int) -> None:
        """DATA frames of several streams, with so much in them, leave after what is outbound now;
        somebody else has made them.

        The connection MUST have room for it, and so must each stream, of which it is not taken.
        """
        self.send_window.left -= num_bytes
        self._num_data_sent += num_frames

    def end(self, stream_id: int, trailers: Fields) -> None:
        """End the answer, after all that is pending. Ignored if the stream is closed."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.pending:
            stream.trailers = trailers
        else:
            self.send_headers(stream_id, trailers, ends=True)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Close a stream. Idempotent."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.outbound += frames.reset(stream_id, code)
            self._close(stream, _End.RESET_BY_US)

    def expect_end(self, stream_id: int, now: float) -> None:
        """The request of this stream, or a message of it, has to come to an end in time."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.is_remote_closed:
            self._uploads.setdefault(stream_id, now)

    def expect_nothing(self, stream_id: int) -> None:
        """What had to come to an end has: the stream may be idle."""
        self._uploads.pop(stream_id, None)

    def drain(self, now: float) -> None:
        """Let the client open no more streams, and be over when all have ended."""
        if self.is_over or self._drain_at is not None:
            return
        self.outbound += frames.go_away(frames.STREAM_ID_MAX, ErrorCode.NO_ERROR)
        self.outbound += frames.ping(_DRAIN_PING, is_ack=False)
        self._drain_at = now + DRAIN_PING_S

    def take_outbound(self) -> bytes:
        """What is to be sent now."""
        outbound, self.outbound = self.outbound, bytearray()
        return bytes(outbound)

    def _send_pending(self, stream: HttpStream) -> None:
        """As much as the windows take."""
        pending = stream.pending
        size = min(len(pending), stream.send.left, self.send_window.left)
        if size <= 0:
            return
        stream.send.left -= size
        self.send_window.left -= size
        for begin in range(0, size, frames.FRAME_BYTES_MAX):
            part = pending[begin : min(begin + frames.FRAME_BYTES_MAX, size)]
            self._num_data_sent += 1
            self.outbound += frames.data_header(stream.stream_id, len(part))
            self.outbound += part
        del pending[:size]

    def _serve_blocked(self, now: float) -> None:
        for stream_id in list(self._blocked):
            if self.send_window.left <= 0:
                return
            self._serve(self._streams[stream_id], now)

    def _serve(self, stream: HttpStream, now: float) -> None:
        """A window opened for a stream that waits."""
        before = len(stream.pending)
        self._send_pending(stream)
        if len(stream.pending) < before:
            # To the end of the line, as some of it has left.
            del self._blocked[stream.stream_id]
            self._blocked[stream.stream_id] = now
        if stream.pending:
            return
        if stream.trailers is not None:
            self.send_headers(stream.stream_id, stream.trailers, ends=True)
        elif stream.send.left > 0 and self.send_window.left > 0:
            del self._blocked[stream.stream_id]
            self._events.append(Writable(stream.stream_id))

    # Ends.

    def _remote_closed(self, stream: HttpStream) -> None:
        stream.is_remote_closed = True
        self._uploads.pop(stream.stream_id, None)

    def _local_closed(self, stream: HttpStream) -> None:
        if stream.is_remote_closed:
            self._close(stream, _End.ENDED)
        else:  # The rest of the request is of no interest (RFC 9113, section 8.1).
            self.outbound += frames.reset(stream.stream_id, ErrorCode.NO_ERROR)
            self._close(stream, _End.RESET_BY_US)

    def _stream_error(self, stream: HttpStream, code: ErrorCode, now: float) -> None:
        """The peer did on it what it may not."""
        self._spend_resets(now)
        self._lose(stream, code)

    def _lose(self, stream: HttpStream, code: ErrorCode) -> None:
        self.outbound += frames.reset(stream.stream_id, code)
        self._close(stream, _End.RESET_BY_US)
        self._events.append(StreamLost(stream.stream_id, code, is_by_peer=False))

    def _refuse(self, stream_id: int, code: ErrorCode) -> None:
        """Never opened."""
        self.outbound += frames.reset(stream_id, code)
        self._remember(stream_id, _End.RESET_BY_US)

    def _close(self, stream: HttpStream, how: _End) -> None:
        stream_id = stream.stream_id
        del self._streams[stream_id]
        stream.is_closed = True
        self._blocked.pop(stream_id, None)
        self._uploads.pop(stream_id, None)
        if stream.unconsumed:
            self._give_connection(stream.unconsumed)
        self._remember(stream_id, how)
        if not self._streams and self._last_accepted is not None:
            self._over(ErrorCode.NO_ERROR, "drained")

    def _remember(self, stream_id: int, how: _End) -> None:
        self._closed[stream_id] = how
        if len(self._closed) > CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    def _name_last_stream(self) -> None:
        """The second step of a drain: whatever the client opened before it knew, has come."""
        if self._drain_at is None or self._last_accepted is not None:
            return
        self._last_accepted = self._last_stream_id
        self.outbound += frames.go_away(self._last_stream_id, ErrorCode.NO_ERROR)
        if not self._streams:
            self._over(ErrorCode.NO_ERROR, "drained")

    def _fail(self, fault: Fault) -> None:
        if fault.limit:
            self._events.append(LimitHit(fault.limit))
        detail = str(fault)
        self.outbound += frames.go_away(self._last_stream_id, fault.code, detail.encode()[:200])
        self._over(fault.code, detail)

    def _over(self, code: ErrorCode, detail: str) -> None:
        if not self.is_over:
            self.is_over = True
            self._events.append(Over(code, detail))

    # Time.

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing comes before."""
        if self.is_over:
            return None
        return min(self._dues())[0]

    def _dues(self) -> list[tuple[float, str]]:
        """What is due when."""
        limits = self._limits
        dues: list[tuple[float, str]] = []
        if not self._is_greeted:
            dues.append((self._began_at + limits.handshake_timeout_s, "handshake"))
        elif self._pinged_at is not None:
            dues.append((self._pinged_at + limits.ping_timeout_s, "silent"))
        else:
            is_idle = not self._streams
            interval_s = limits.ping_idle_interval_s if is_idle else limits.ping_interval_s
            interval_s = max(interval_s, self.ping_interval_min_s)
            dues.append((self._heard_at + interval_s, "ping"))
        if self._partial_since is not None:
            dues.append((self._partial_since + limits.header_timeout_s, "header"))
        if (since := self._header_blocks.open_since) is not None:
            dues.append((since + limits.header_timeout_s, "header"))
        if self._uploads:
            first = next(iter(self._uploads.values()))
            dues.append((first + limits.request_timeout_s, "request"))
        if self._blocked:
            first = next(iter(self._blocked.values()))
            dues.append((first + limits.stall_timeout_s, "stall"))
        if self._drain_at is not None and self._last_accepted is None:
            dues.append((self._drain_at, "drain"))
        return dues

    def handle_timeout(self, now: float) -> list[Event]:
        """Time passed; see `deadline`."""
        if self.is_over:
            return []
        for due, name in self._dues():
            if now >= due and not self.is_over:
                self._due(name, due, now)
        return self._take_events()

    def _due(self, name: str, due: float, now: float) -> None:
        match name:
            case "ping":
                self.outbound += frames.ping(LIVENESS_PING, is_ack=False)
                self._pinged_at = now
            case "silent" if now - due > LATENESS_S:
                self._pinged_at = now - self._limits.ping_timeout_s / 2  # Its answer may be here.
            case "silent":
                self._fail(Fault(ErrorCode.NO_ERROR, "no sign of life", "silence"))
            case "handshake":
                self._fail(Fault(ErrorCode.SETTINGS_TIMEOUT, "no SETTINGS in time", "handshake"))
            case "header":
                self._fail(Fault(ErrorCode.ENHANCE_YOUR_CALM, "a frame took too long", "header"))
            case "drain":
                self._name_last_stream()
            case "request":
                self._cut(self._uploads, self._limits.request_timeout_s, "request", now)
            case "stall":
                self._cut(self._blocked, self._limits.stall_timeout_s, "stall", now)
            case _:
                raise AssertionError(name)

    def _cut(self, since: dict[int, float], timeout_s: float, limit: str, now: float) -> None:
        for stream_id, at in list(since.items()):
            if now < at + timeout_s:
                return
            self._events.append(LimitHit(limit))
            self._lose(self._streams[stream_id], ErrorCode.CANCEL)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Assert what is always true."""
        assert self._blocked.keys() <= self._streams.keys(), "closed streams wait for nothing"
        assert self._uploads.keys() <= self._streams.keys(), "closed streams upload nothing"
        assert len(self._streams) <= self._limits.streams_max, "streams are bounded"
        assert len(self._closed) <= CLOSED_REMEMBERED, "memory of the closed is bounded"
        assert len(self._inbound) < frames.HEADER_BYTES + frames.FRAME_BYTES_MAX, "one frame waits"
        waiting = [stream for stream in self._streams.values() if stream.pending]
        assert all(stream.stream_id in self._blocked for stream in waiting), (
            "all that wait are known"
        )
        unconsumed = sum(stream.unconsumed for stream in self._streams.values())
        assert unconsumed <= self._limits.connection_window, "what came is within the window"
