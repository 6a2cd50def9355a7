"""gRPC calls on one connection, as their client sees them: bytes in, events and bytes out.

              call                 answer's HEADERS                trailers
    (nothing) ─────▶ asked ─────────────────────▶ answered ─────────────────────▶ over
                       │                                                            ▲
                       └── trailers only, RST_STREAM, GOAWAY before the call,      ─┘
                           a breach of the protocol, a PING without an answer, `cancel`

Whatever ends a call, but `cancel`, is an `Ended` with a status of gRPC's, as gRPC's own clients
give it. It comes once, and after it nothing of that call. When the connection is over, all its
calls are; what is in `outbound` then is still worth sending.

Messages are taken as they come, so the windows of the server open again at once. Who cannot deal
with more of a call may `hold` it: then the server can send as much as one window, and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

from hpack import Encoder

from unbroken.http2 import frames
from unbroken.http2.allowance import Allowance
from unbroken.http2.flow_control import ReceiveWindow, SendWindow
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.header_blocks import HeaderBlocks, HeaderSection
from unbroken.http2.headers import Fields, Malformed, check_answer, check_trailers, list_bytes
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

_STATUS_DETAILS: Final = frozenset({b"grpc-status-details-bin", b"grpc-retry-pushback-ms"})
"""What of gRPC's own fields says more of a status."""
_LONE: Final = Struct(">IBIBI")
"""The headers of a DATA frame and of the message in it: length and type, flags, stream; whether it
is compressed, length."""
_NO_STATUS: Final = "the answer ended without a status"


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What a server may do before it is given up. Times in seconds, sizes in bytes."""

    message_bytes_max: int = 16 * 1024 * 1024
    header_list_bytes_max: int = 16 * 1024
    """Of an answer's headers, and of its trailers, uncompressed; announced."""
    header_frames_max: int = 8
    """HEADERS and CONTINUATION frames of either."""
    window: int = 16 * 1024 * 1024
    """What the server may send ahead of a call; announced."""
    connection_window: int = 16 * 1024 * 1024
    """What it may send ahead of all calls."""
    control_burst: int = 10_000
    control_per_s: float = 1000.0
    """Frames that bring nothing (PING, SETTINGS, WINDOW_UPDATE, unknown, empty DATA, late ones).

    Each DATA frame, either way, allows four more: for its window and for probes of the line.
    """
    ping_interval_s: float = 10.0
    """A server with calls that was silent for so long is asked for a sign of life."""
    ping_timeout_s: float = 2.0
    """How long the answer may take."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended."""

    code: int
    """gRPC's number of it."""
    detail: str
    trailers: Sequence[tuple[str, str | bytes]] = ()
    """Metadata that came with it."""

    @classmethod
    def by_server(cls, trailers: Fields) -> "Status":
        """The server's own last word."""
        own = dict(reversed(trailers))
        status = own.get(b"grpc-status", b"")
        if not status.isdigit() or len(status) > 9:
            return cls(Code.UNKNOWN, _NO_STATUS)
        detail = text_of(own.get(b"grpc-message", b""))
        return cls(int(status), detail, tuple(metadata(trailers, also=_STATUS_DETAILS)))


class MessageReceived(NamedTuple):
    """A whole message."""

    call: int
    message: bytes


class Ended(NamedTuple):
    """The call is over."""

    call: int
    status: Status


Event: TypeAlias = MessageReceived | Ended


class _Call:
    """One that is not over; its number is that of its stream."""

    __slots__ = (
        "body",
        "ends",
        "has_ended",
        "is_held",
        "pending",
        "receive",
        "send",
        "stream_id",
        "unreturned",
    )

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.stream_id = stream_id
        self.send = SendWindow(send_window)
        self.receive = ReceiveWindow(receive_window)
        self.body: MessageReader | None = None
        """Once the answer has begun."""
        self.pending = bytearray()
        """What did not fit into the windows."""
        self.ends = False
        """Nothing follows what is pending."""
        self.has_ended = False
        """That has been said."""
        self.is_held = False
        self.unreturned = 0
        """Bytes that came since it is held."""


class Caller:
    """The state of one connection and its calls."""

    def __init__(self, authority: str, limits: CallerLimits, now: float) -> None:
        self._authority = authority.encode()
        self._limits = limits
        self._encoder = Encoder()
        self.outbound = bytearray(frames.PREFACE)
        """What is to be sent; whoever sends it takes it with `take_outbound`."""
        self.outbound += frames.settings(
            {
                Setting.ENABLE_PUSH: 0,
                Setting.INITIAL_WINDOW_SIZE: limits.window,
                Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes_max,
            }
        )
        if limits.connection_window > frames.WINDOW_DEFAULT:
            increment = limits.connection_window - frames.WINDOW_DEFAULT
            self.outbound += frames.window_update(0, increment)
        self.is_greeted = False
        """The server's SETTINGS came, so it is known how much it takes."""
        self.is_over = False
        self._calls: dict[int, _Call] = {}  # By stream.
        self._blocked: dict[int, _Call] = {}  # Those of which something is pending.
        self._last_stream_id = -1
        self._is_told_to_go = False
        self._inbound = bytearray()
        self._header_blocks = HeaderBlocks(
            list_bytes_max=limits.header_list_bytes_max, frames_max=limits.header_frames_max
        )
        self._peer_calls_max = frames.STREAM_ID_MAX
        self._peer_initial_window = frames.WINDOW_DEFAULT
        self._send = SendWindow(frames.WINDOW_DEFAULT)
        self._receive = ReceiveWindow(max(limits.connection_window, frames.WINDOW_DEFAULT))
        self._control = Allowance(limits.control_burst, limits.control_per_s, now)
        self._heard_at = now
        self._pinged_at: float | None = None
        self._events: list[Event] = []

    # Calls.

    @property
    def num_calls(self) -> int:
        """Calls that are not over."""
        return len(self._calls)

    @property
    def num_pending_bytes(self) -> int:
        """What waits for windows to open."""
        return sum(len(call.pending) for call in self._blocked.values())

    @property
    def takes_calls(self) -> bool:
        """Whether one more would be served, as far as is known."""
        return not (
            self.is_over
            or self._is_told_to_go
            or len(self._calls) >= self._peer_calls_max
            or self._last_stream_id >= frames.STREAM_ID_MAX
        )

    @property
    def is_spent(self) -> bool:
        """No call is left, and none can come: the connection is good for nothing."""
        is_last = self._is_told_to_go or self._last_stream_id >= frames.STREAM_ID_MAX
        return is_last and not self._calls

    def call(self, path: str, now: float, fields: Fields = ()) -> int:
        """Begin one, while it `takes_calls`; returns what it is called here."""
        assert self.takes_calls, "asked before"
        if not self._calls:
            self._heard_at, self._pinged_at = now, None  # Nothing was expected until now.
        stream_id = self._last_stream_id = self._last_stream_id + 2
        self._calls[stream_id] = _Call(stream_id, self._peer_initial_window, self._limits.window)
        block = self._encoder.encode(
            [
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", self._authority),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
                (b"user-agent", b"grpc-python-unbroken"),
                (b"grpc-accept-encoding", ACCEPT_ENCODING),
                *fields,
            ]
        )
        self.outbound += frames.headers(stream_id, block, ends=False)
        return stream_id

    def has_room(self, call: int) -> bool:
        """Whether something sent now would leave now, at least in part."""
        one = self._calls.get(call)
        return one is not None and not one.pending and one.send.left > 0 and self._send.left > 0

    def send(self, call: int, message: bytes, *, ends: bool = False) -> None:
        """Send a message, what does not fit into the windows when they open.

        With `ends` it is the last one. Ignored if the call is over.
        """
        one = self._calls.get(call)
        if one is None:
            return
        size = PREFIX.size + len(message)
        if (
            not (ends or one.pending)
            and size <= frames.FRAME_BYTES_MAX
            and size <= one.send.left
            and size <= self._send.left
        ):  # Most often: all of it in one frame.
            one.send.left -= size
            self._send.left -= size
            self._control.earn(DATA_EARNS)
            self.outbound += _LONE.pack(size << 8, 0, call, 0, len(message))
            self.outbound += message
            return
        one.pending += PREFIX.pack(0, len(message))
        one.pending += message
        one.ends = one.ends or ends
        self._send_pending(one)

    def hold(self, call: int) -> None:
        """Let the server send no more of it than a window, until `release`. Idempotent."""
        if (one := self._calls.get(call)) is not None:
            one.is_held = True

    def release(self, call: int) -> None:
        """More is welcome. Idempotent."""
        one = self._calls.get(call)
        if one is None or not one.is_held:
            return
        one.is_held = False
        num_bytes, one.unreturned = one.unreturned, 0
        if increment := one.receive.give(num_bytes):
            self.outbound += frames.window_update(call, increment)

    def cancel(self, call: int) -> None:
        """The call is of no use any more. Idempotent."""
        if call in self._calls:
            self.outbound += frames.reset(call, ErrorCode.CANCEL)
            self._forget(call)

    def take_outbound(self) -> bytes:
        """What is to be sent now."""
        outbound, self.outbound = self.outbound, bytearray()
        return bytes(outbound)

    def _send_pending(self, call: _Call) -> None:
        """As much as the windows take."""
        pending, stream_id = call.pending, call.stream_id
        size = min(len(pending), call.send.left, self._send.left)
        if size > 0:
            call.send.left -= size
            self._send.left -= size
            is_last = call.ends and size == len(pending)
            for begin in range(0, size, frames.FRAME_BYTES_MAX):
                end = min(begin + frames.FRAME_BYTES_MAX, size)
                flags = frames.END_STREAM if is_last and end == size else 0
                self._control.earn(DATA_EARNS)
                part = bytes(pending[begin:end])
                self.outbound += frames.frame(FrameType.DATA, flags, stream_id, part)
            call.has_ended = is_last
            del pending[:size]
        if pending:
            self._blocked[stream_id] = call
        else:
            self._blocked.pop(stream_id, None)

    # What comes.

    def receive_lone(self, data: bytes, now: float) -> tuple[int, bytes] | None:
        """What most data is: a frame with a message, both whole, and nothing else that is due.

        Returns of which call, and the message. None: nothing has been done with the data. What
        comes after a pause is met with cold caches, where each function on its way costs
        microseconds, so this is all of it.
        """
        size = len(data) - frames.HEADER_BYTES
        if size < PREFIX.size or self._inbound:
            return None
        length_and_type, flags, stream_id, compression, message_bytes = _LONE.unpack_from(data)
        call = self._calls.get(stream_id)
        if (
            length_and_type != size << 8  # And of type 0, DATA.
            or size > frames.FRAME_BYTES_MAX
            or flags
            or compression
            or message_bytes != size - PREFIX.size
            or call is None
            or call.is_held
            or call.body is None
            or not call.body.may_begin(message_bytes)
            or self._header_blocks.open_since is not None
            or not call.receive.take_and_give(size, self._receive)
        ):
            return None
        self._heard_at = now
        self._pinged_at = None
        self._control.earn(DATA_EARNS)
        return stream_id, data[frames.HEADER_BYTES + PREFIX.size :]

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Bytes came. (`receive_lone` is the shorter way for what comes most.)"""
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
            while (frame := next_frame(buffer, at)) is not None:
                kind, flags, stream_id, payload = frame
                at += frames.HEADER_BYTES + len(payload)
                try:
                    self._frame(kind, flags, stream_id, payload, now)
                except Refused as refused:
                    self.outbound += frames.reset(stream_id, ErrorCode.CANCEL)
                    self._end(stream_id, Status(refused.code, refused.detail))
                except Malformed as error:
                    self.outbound += frames.reset(stream_id, ErrorCode.PROTOCOL_ERROR)
                    self._end(stream_id, Status(Code.INTERNAL, f"a malformed answer: {error}"))
        except Fault as fault:
            self.outbound += frames.go_away(0, fault.code, str(fault).encode()[:200])
            self._over(Status(Code.INTERNAL, f"{fault.code.name}: {fault}"))
            at = end
        self._inbound = bytearray(buffer[at:])
        return self._take_events()

    def closed(self, detail: str) -> list[Event]:
        """The connection is gone."""
        self._over(Status(Code.UNAVAILABLE, detail))
        return self._take_events()

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes, now: float) -> None:
        self._header_blocks.check_order(kind, stream_id)
        if not self.is_greeted and (kind != FrameType.SETTINGS or flags & frames.ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected SETTINGS first")
        match kind:
            case FrameType.DATA:
                self._data(flags, stream_id, payload, now)
            case FrameType.HEADERS:
                self._need_begun(stream_id)
                section = self._header_blocks.begin(flags, stream_id, payload, now)
                self._header_section(section, now)
            case FrameType.CONTINUATION:
                section = self._header_blocks.go_on(flags, stream_id, payload)
                self._header_section(section, now)
            case FrameType.WINDOW_UPDATE:
                self._spend_control(now)
                self._window_update(stream_id, payload)
            case FrameType.RST_STREAM:
                self._need_begun(stream_id)
                need_length(len(payload) == 4)
                self._reset_by_server(stream_id, error_code(frames.parse_u32(payload)), now)
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
        """The hot path."""
        self._need_begun(stream_id)
        size = len(payload)
        if not self._receive.take(size):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window")
        if increment := self._receive.give(size):
            self.outbound += frames.window_update(0, increment)
        call = self._calls.get(stream_id)
        if call is None:  # It was on its way when the call was cancelled.
            if not payload:
                self._spend_control(now)
            return
        if not call.receive.take(size):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window")
        if call.body is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected headers before data")
        data = unpadded(flags, payload)
        if data:
            self._control.earn(DATA_EARNS)
        else:
            self._spend_control(now)
        for message in call.body.feed(data):
            self._events.append(MessageReceived(stream_id, message))
        if flags & frames.END_STREAM:
            self._end_by_server(call, Status(Code.UNKNOWN, _NO_STATUS))
        elif call.is_held:
            call.unreturned += size
        elif increment := call.receive.give(size):
            self.outbound += frames.window_update(stream_id, increment)

    def _header_section(self, section: HeaderSection | None, now: float) -> None:
        if section is None:
            return  # Not complete.
        call = self._calls.get(section.stream_id)
        if call is None:
            self._spend_control(now)
            return
        if list_bytes(section.fields) > self._limits.header_list_bytes_max:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"expected up to {self._limits.header_list_bytes_max} bytes of headers",
            )
        if call.body is None:
            self._answer(call, section, now)
        else:
            self._trailers(call, call.body, section)

    def _trailers(self, call: _Call, body: MessageReader, section: HeaderSection) -> None:
        check_trailers(section.fields)
        if not section.ends:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "expected an end with the trailers")
        status = Status.by_server(section.fields)
        if not status.code:  # Servers that give up do so in the middle of a message, too.
            body.finish()
        self._end_by_server(call, status)

    def _answer(self, call: _Call, section: HeaderSection, now: float) -> None:
        status, fields = check_answer(section.fields)
        if 100 <= status < 200 and not section.ends:
            self._spend_control(now)
            return  # Interim; the answer follows.
        content_type = next((value for name, value in fields if name == b"content-type"), b"")
        if status != 200:
            code = _STATUS_OF_HTTP.get(status, Code.UNKNOWN)
            raise Refused(code, f"expected an answer of gRPC, got HTTP status {status}")
        if not content_type.startswith(b"application/grpc"):
            raise Refused(
                Code.UNKNOWN, f"expected an answer of gRPC, got {bytes(content_type[:80])!r}"
            )
        if section.ends:
            self._end_by_server(call, Status.by_server(fields))
            return
        encoding = next((value for name, value in fields if name == b"grpc-encoding"), None)
        call.body = MessageReader(encoding, self._limits.message_bytes_max)

    def _reset_by_server(self, stream_id: int, code: ErrorCode, now: float) -> None:
        if stream_id in self._calls:
            status = _STATUS_OF_RESET.get(code, Code.INTERNAL)
            self._end(stream_id, Status(status, f"the server reset the stream: {code.name}"))
        else:
            self._spend_control(now)

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        need_length(len(payload) == 4)
        increment = frames.parse_u32(payload) & frames.WINDOW_MAX
        if not increment:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a window update of 0")
        if stream_id == 0:
            if not self._send.grow(increment):
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window overflows")
            self._send_blocked()
            return
        self._need_begun(stream_id)
        call = self._calls.get(stream_id)
        if call is None:
            return
        if not call.send.grow(increment):
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window overflows")
        if call.pending:
            self._send_pending(call)

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        need_connection(stream_id)
        if flags & frames.ACK:
            need_length(not payload)
            return
        values = checked_settings(payload)
        if any(values.get(Setting.ENABLE_PUSH, ())):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a server cannot ask for pushes")
        if sizes := values.get(Setting.HEADER_TABLE_SIZE):
            resize_table(self._encoder, sizes)
        if maxima := values.get(Setting.MAX_CONCURRENT_STREAMS):
            self._peer_calls_max = maxima[-1]
        if sizes := values.get(Setting.INITIAL_WINDOW_SIZE):
            before, self._peer_initial_window = self._peer_initial_window, sizes[-1]
            for call in self._calls.values():
                if not call.send.resize(before, sizes):
                    raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window overflows")
        self.is_greeted = True
        self.outbound += frames.frame(FrameType.SETTINGS, frames.ACK, 0)
        self._send_blocked()

    def _send_blocked(self) -> None:
        for call in list(self._blocked.values()):
            self._send_pending(call)

    def _go_away(self, payload: bytes) -> None:
        self._is_told_to_go = True
        last_stream_id = frames.parse_u32(payload) & frames.STREAM_ID_MAX
        code = error_code(frames.parse_u32(payload, 4))
        # The others it serves to their end, or it closes the connection.
        for stream_id in [one for one in self._calls if one > last_stream_id]:
            detail = f"the server takes no calls: {code.name}"
            self._end(stream_id, Status(Code.UNAVAILABLE, detail))

    def _need_begun(self, stream_id: int) -> None:
        """The frame has to be of a call, be it over."""
        need_stream(stream_id)
        if stream_id > self._last_stream_id or stream_id % 2 == 0:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"a frame of stream {stream_id}, not ours")

    def _spend_control(self, now: float) -> None:
        if not self._control.spend(now):
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    # Time.

    def deadline(self) -> float | None:
        """When `handle_timeout` is due if nothing comes before; None: not before the next call."""
        if self.is_over or not self._calls:
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
            self.outbound += frames.ping(LIVENESS_PING, is_ack=False)
            self._pinged_at = now
            return []
        if now - due > LATENESS_S:
            self._pinged_at = now - self._limits.ping_timeout_s / 2  # Its answer may be here.
            return []
        return self.closed("no answer to a ping")

    # Ends.

    def _end_by_server(self, call: _Call, status: Status) -> None:
        if not call.has_ended:  # Nobody reads the rest of it (RFC 9113, section 8.1).
            self.outbound += frames.reset(call.stream_id, ErrorCode.CANCEL)
        self._end(call.stream_id, status)

    def _end(self, stream_id: int, status: Status) -> None:
        if stream_id in self._calls:
            self._forget(stream_id)
            self._events.append(Ended(stream_id, status))

    def _forget(self, stream_id: int) -> None:
        self._blocked.pop(stream_id, None)
        del self._calls[stream_id]

    def _over(self, status: Status) -> None:
        self.is_over = True
        for stream_id in list(self._calls):
            self._end(stream_id, status)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Assert what is always true."""
        waiting = {stream_id for stream_id, call in self._calls.items() if call.pending}
        assert self._blocked.keys() == waiting, "all that wait are known, and no others"
        assert not (self.is_over and self._calls), "a connection ends with its calls"
        assert all(call.is_held or not call.unreturned for call in self._calls.values()), (
            "what is not held is given back"
        )


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
