"""One gRPC call on a connection of its own, as its client sees it: bytes in, events and bytes out.

                  answer's HEADERS                trailers
    asked ─────────────────────▶ answered ─────────────────────▶ over
      │                                                            ▲
      └── trailers only, RST_STREAM, GOAWAY before the stream,    ─┘
          a breach of the protocol, a PING without an answer, `cancel`

Whatever ends the call is an `Ended` with a status of gRPC's, as gRPC's own clients give it. It
comes once, and after it nothing. What is in `outbound` then is still worth sending. Messages are
taken as they come, so the windows of the server open again at once; who wants to slow it down has
to do so in the messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from hpack import Decoder, Encoder, HPACKError

from unbroken.http2 import frames
from unbroken.http2.allowance import Allowance
from unbroken.http2.flow_control import ReceiveWindow, SendWindow
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.headers import Fields, Malformed, check_answer, check_trailers
from unbroken.http2.messages import (
    ACCEPT_ENCODING,
    PREFIX,
    Code,
    MessageReader,
    Refused,
    metadata,
    text_of,
)
from unbroken.http2.rules import (
    Fault,
    check_setting,
    error_code,
    need_connection,
    need_length,
    need_stream,
    next_frame,
    unpadded,
)

STREAM_ID: Final = 1
"""The only one that there is."""
_STATUS_DETAILS: Final = frozenset({b"grpc-status-details-bin", b"grpc-retry-pushback-ms"})
"""What of gRPC's own fields says more of a status."""
_LIVENESS_PING: Final = b"unbroken"
_DATA_EARNS: Final = 4.0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a server may do before the call is given up. Times in seconds, sizes in bytes."""

    message_bytes_max: int = 16 * 1024 * 1024
    header_list_bytes_max: int = 16 * 1024
    """Of the answer's headers, and of its trailers, uncompressed."""
    header_frames_max: int = 8
    """HEADERS and CONTINUATION frames of either."""
    window: int = 16 * 1024 * 1024
    """What the server may send ahead; announced."""
    control_burst: int = 10_000
    control_per_s: float = 1000.0
    """Frames that bring nothing (PING, SETTINGS, WINDOW_UPDATE, unknown, empty DATA).

    Each DATA frame, either way, allows four more: for its window and for probes of the line.
    """
    ping_interval_s: float = 10.0
    """A server that was silent for so long is asked for a sign of life."""
    ping_timeout_s: float = 2.0
    """How long the answer may take."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message."""

    message: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The call is over."""

    code: int
    """gRPC's number of the status."""
    detail: str
    trailers: Sequence[tuple[str, str | bytes]] = ()
    """Metadata that came with it."""

    @classmethod
    def by_server(cls, trailers: Fields) -> "Ended":
        """The server's own last word."""
        own = dict(reversed(trailers))
        status = own.get(b"grpc-status", b"")
        if not status.isdigit() or len(status) > 9:
            return cls(Code.UNKNOWN, "the answer ended without a status")
        detail = text_of(own.get(b"grpc-message", b""))
        return cls(int(status), detail, tuple(metadata(trailers, also=_STATUS_DETAILS)))


Event: TypeAlias = MessageReceived | Ended


class Call:
    """The state of the call and its connection."""

    def __init__(self, path: str, authority: str, limits: CallLimits, now: float) -> None:
        self._limits = limits
        self._encoder = Encoder()
        self._decoder = Decoder(limits.header_list_bytes_max)
        self.outbound = bytearray(frames.PREFACE)
        """What is to be sent; whoever sends it takes it with `take_outbound`."""
        self.outbound += frames.settings(
            {
                Setting.ENABLE_PUSH: 0,
                Setting.INITIAL_WINDOW_SIZE: limits.window,
                Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes_max,
            }
        )
        if limits.window > frames.WINDOW_DEFAULT:
            self.outbound += frames.window_update(0, limits.window - frames.WINDOW_DEFAULT)
        block = self._encoder.encode(
            [
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", authority.encode()),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
                (b"user-agent", b"grpc-python-unbroken"),
                (b"grpc-accept-encoding", ACCEPT_ENCODING),
            ]
        )
        self.outbound += frames.headers(STREAM_ID, block, ends=False)
        self.is_over = False
        self._inbound = bytearray()
        self._body: MessageReader | None = None
        """Once the answer has begun."""
        self._block: bytearray | None = None
        """A header block that is not complete,"""
        self._block_ends = False
        self._num_block_frames = 0
        self._is_greeted = False
        """Its SETTINGS came."""
        self._peer_initial_window = frames.WINDOW_DEFAULT
        self._pending = bytearray()
        """What did not fit into the windows."""
        self._send = SendWindow(frames.WINDOW_DEFAULT)
        self._send_connection = SendWindow(frames.WINDOW_DEFAULT)
        self._receive = ReceiveWindow(limits.window)
        self._receive_connection = ReceiveWindow(max(limits.window, frames.WINDOW_DEFAULT))
        self._control = Allowance(limits.control_burst, limits.control_per_s, now)
        self._heard_at = now
        self._pinged_at: float | None = None
        self._events: list[Event] = []

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
            while not self.is_over and (frame := next_frame(buffer, at)) is not None:
                kind, flags, stream_id, payload = frame
                at += frames.HEADER_BYTES + len(payload)
                self._frame(kind, flags, stream_id, payload, now)
        except Fault as fault:
            self.outbound += frames.go_away(0, fault.code, str(fault).encode()[:200])
            self._end(Code.INTERNAL, f"{fault.code.name}: {fault}")
            at = end
        except Refused as refused:
            self.outbound += frames.reset(STREAM_ID, ErrorCode.CANCEL)
            self._end(refused.code, refused.detail)
            at = end
        self._inbound = bytearray(buffer[at:])
        events, self._events = self._events, []
        return events

    def closed(self, detail: str) -> list[Event]:
        """The connection is gone."""
        self._end(Code.UNAVAILABLE, detail)
        events, self._events = self._events, []
        return events

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        if self._block is not None and kind != FrameType.CONTINUATION:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected the rest of a header block")
        if not self._is_greeted and (kind != FrameType.SETTINGS or flags & frames.ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected SETTINGS first")
        match kind:
            case FrameType.DATA:
                self._data(flags, stream_id, payload, now)
            case FrameType.HEADERS:
                _need_ours(stream_id)
                fragment = unpadded(flags, payload)
                if flags & frames.HAS_PRIORITY:
                    need_length(len(fragment) >= 5)
                    fragment = fragment[5:]
                self._block, self._num_block_frames = bytearray(), 0
                self._block_ends = bool(flags & frames.END_STREAM)
                self._block_grew(fragment, flags)
            case FrameType.CONTINUATION:
                _need_ours(stream_id)
                if self._block is None:
                    raise Fault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
                self._block_grew(payload, flags)
            case FrameType.WINDOW_UPDATE:
                self._spend_control(now)
                self._window_update(stream_id, payload)
            case FrameType.RST_STREAM:
                _need_ours(stream_id)
                need_length(len(payload) == 4)
                code = error_code(frames.parse_u32(payload))
                status = _STATUS_OF_RESET.get(code, Code.INTERNAL)
                self._end(status, f"the server reset the stream: {code.name}")
            case FrameType.SETTINGS:
                self._spend_control(now)
                self._settings(flags, stream_id, payload)
            case FrameType.PING:
                self._spend_control(now)
                need_connection(stream_id)
                need_length(len(payload) == 8)
                if not flags & frames.ACK:
                    self.outbound += frames.ping(payload, is_ack=True)
            case FrameType.GOAWAY:
                self._spend_control(now)
                need_connection(stream_id)
                need_length(len(payload) >= 8)
                self._go_away(payload)
            case FrameType.PRIORITY:
                self._spend_control(now)
                need_stream(stream_id)
                need_length(len(payload) == 5)
            case FrameType.PUSH_PROMISE:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "expected no push, as was asked for")
            case _:
                self._spend_control(now)  # Unknown frames are ignored.

    def _data(self, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        _need_ours(stream_id)
        size = len(payload)
        if not (self._receive_connection.take(size) and self._receive.take(size)):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window")
        if self._body is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected headers before data")
        data = unpadded(flags, payload)
        if data:
            self._control.earn(_DATA_EARNS)
        else:
            self._spend_control(now)
        self._events += [MessageReceived(message) for message in self._body.feed(data)]
        if increment := self._receive_connection.give(size):
            self.outbound += frames.window_update(0, increment)
        if flags & frames.END_STREAM:
            self._end(Code.UNKNOWN, "the answer ended without a status")
        elif increment := self._receive.give(size):
            self.outbound += frames.window_update(STREAM_ID, increment)

    def _block_grew(self, fragment: bytes, flags: int) -> None:
        block, limits = self._block, self._limits
        assert block is not None, "called for one"
        block += fragment
        self._num_block_frames += 1
        if self._num_block_frames > limits.header_frames_max:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames of headers")
        if len(block) > limits.header_list_bytes_max:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many bytes of headers")
        if not flags & frames.END_HEADERS:
            return
        self._block = None
        try:
            # An oversized list is one of these errors.
            fields = [(name, value) for name, value in self._decoder.decode(bytes(block), raw=True)]
        except (HPACKError, IndexError) as error:
            raise Fault(ErrorCode.COMPRESSION_ERROR, "a bad or oversized header block") from error
        try:
            self._header_section(fields, ends=self._block_ends)
        except Malformed as error:
            raise Fault(ErrorCode.PROTOCOL_ERROR, str(error)) from error

    def _header_section(self, fields: Fields, *, ends: bool) -> None:
        if self._body is not None:
            check_trailers(fields)
            if not ends:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "expected an end with the trailers")
            self._body.finish()
            self._end_with(Ended.by_server(fields))
            return
        status, fields = check_answer(fields)
        if 100 <= status < 200 and not ends:
            return  # Interim; the answer follows.
        content_type = next((value for name, value in fields if name == b"content-type"), b"")
        if status != 200:
            code = _STATUS_OF_HTTP.get(status, Code.UNKNOWN)
            raise Refused(code, f"expected an answer of gRPC, got HTTP status {status}")
        if not content_type.startswith(b"application/grpc"):
            raise Refused(
                Code.UNKNOWN, f"expected an answer of gRPC, got {bytes(content_type[:80])!r}"
            )
        if ends:
            self._end_with(Ended.by_server(fields))
            return
        encoding = next((value for name, value in fields if name == b"grpc-encoding"), None)
        self._body = MessageReader(encoding, self._limits.message_bytes_max)

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        need_length(len(payload) == 4)
        if stream_id:
            _need_ours(stream_id)
        increment = frames.parse_u32(payload) & frames.WINDOW_MAX
        window = self._send if stream_id else self._send_connection
        if not increment:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a window update of 0")
        if not window.grow(increment):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window overflows")
        self._send_pending()

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        need_connection(stream_id)
        if flags & frames.ACK:
            need_length(not payload)
            return
        need_length(len(payload) % 6 == 0)
        values = frames.parse_settings(payload)
        for name, value in values:
            check_setting(name, value)
        # HEADER_TABLE_SIZE matters to nobody: the only headers that we send have left.
        for name, value in values:
            if name == Setting.ENABLE_PUSH and value:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "a server cannot ask for pushes")
            if name == Setting.INITIAL_WINDOW_SIZE:
                change, self._peer_initial_window = value - self._peer_initial_window, value
                if not self._send.grow(change):
                    raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window overflows")
        self._is_greeted = True
        self.outbound += frames.frame(FrameType.SETTINGS, frames.ACK, 0)
        self._send_pending()

    def _go_away(self, payload: bytes) -> None:
        last_stream_id = frames.parse_u32(payload) & frames.STREAM_ID_MAX
        if last_stream_id < STREAM_ID:
            code = error_code(frames.parse_u32(payload, 4))
            self._end(Code.UNAVAILABLE, f"the server takes no calls: {code.name}")
        # Else it serves this call to its end, or closes the connection.

    def _spend_control(self, now: float) -> None:
        if not self._control.spend(now):
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    # What goes.

    @property
    def has_room(self) -> bool:
        """Whether something sent now would leave now, at least in part."""
        return (
            not self._pending
            and self._send.left > 0
            and self._send_connection.left > 0
            and not self.is_over
        )

    def send(self, message: bytes) -> None:
        """Send a message, what does not fit into the windows when they open."""
        if self.is_over:
            return
        self._pending += PREFIX.pack(0, len(message))
        self._pending += message
        self._send_pending()

    def cancel(self) -> None:
        """The call is of no use any more. Idempotent."""
        if not self.is_over:
            self.outbound += frames.reset(STREAM_ID, ErrorCode.CANCEL)
            self.is_over = True

    def take_outbound(self) -> bytes:
        """What is to be sent now."""
        outbound, self.outbound = self.outbound, bytearray()
        return bytes(outbound)

    def _send_pending(self) -> None:
        pending = self._pending
        size = min(len(pending), self._send.left, self._send_connection.left)
        if size <= 0:
            return
        self._send.left -= size
        self._send_connection.left -= size
        for begin in range(0, size, frames.FRAME_BYTES_MAX):
            part = pending[begin : min(begin + frames.FRAME_BYTES_MAX, size)]
            self._control.earn(_DATA_EARNS)
            self.outbound += frames.data_header(STREAM_ID, len(part))
            self.outbound += part
        del pending[:size]

    # Time.

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing comes before."""
        if self.is_over:
            return None
        if self._pinged_at is not None:
            return self._pinged_at + self._limits.ping_timeout_s
        return self._heard_at + self._limits.ping_interval_s

    def handle_timeout(self, now: float) -> list[Event]:
        """Time passed; see `deadline`."""
        due = self.deadline()
        if due is None or now < due:
            return []
        if self._pinged_at is None:
            self.outbound += frames.ping(_LIVENESS_PING, is_ack=False)
            self._pinged_at = now
            return []
        return self.closed("no answer to a ping")

    def _end(self, code: int, detail: str) -> None:
        self._end_with(Ended(code, detail))

    def _end_with(self, ended: Ended) -> None:
        if not self.is_over:
            self.is_over = True
            self._events.append(ended)


# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Errors"
_STATUS_OF_RESET: Final = {
    ErrorCode.REFUSED_STREAM: Code.UNAVAILABLE,
    ErrorCode.CANCEL: Code.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
}
# https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md
_STATUS_OF_HTTP: Final = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}


def _need_ours(stream_id: int) -> None:
    need_stream(stream_id)
    if stream_id != STREAM_ID:
        raise Fault(ErrorCode.PROTOCOL_ERROR, f"a frame of stream {stream_id}, which is not ours")
