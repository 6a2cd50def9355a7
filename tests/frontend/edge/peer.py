"""A client that says to a connection whatever a test wants, and reads what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpack import Decoder, Encoder

from unbroken.http2 import frames
from unbroken.http2.connection import Connection, Event, Over, StreamLost
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.headers import Fields
from unbroken.http2.limits import EdgeLimits

REQUEST: Fields = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/unbroken.v1.InferenceService/Generate"),
    (b":authority", b"here"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
GREETING = frames.PREFACE + frames.settings({})
SETTINGS_ACK = frames.frame(FrameType.SETTINGS, frames.ACK, 0)
"""Who says it has seen the settings of the other."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One that the connection sent."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def parse(data: bytes) -> list[Frame]:
    """Frames, of which there must be whole ones only."""
    found: list[Frame] = []
    at = 0
    while at < len(data):
        length, kind, flags, stream_id = frames.parse_header(data, at)
        at += frames.HEADER_BYTES
        assert at + length <= len(data), "whole frames"
        found.append(Frame(kind, flags, stream_id, data[at : at + length]))
        at += length
    return found


class Peer:
    """The client's end of a connection in memory, under virtual time."""

    def __init__(
        self, limits: EdgeLimits | None = None, *, greets: bool = True, acknowledges: bool = True
    ) -> None:
        self.now = 0.0
        self.connection = Connection(limits or EdgeLimits(), self.now)
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.events: list[Event] = []
        if greets:
            self.say(GREETING, SETTINGS_ACK if acknowledges else b"")
            self.heard()

    def say(self, *parts: bytes) -> list[Event]:
        """Bytes in one piece; what came of them."""
        events = self.connection.receive(b"".join(parts), self.now)
        self.connection.check()
        self.events += events
        return events

    def wait(self, seconds: float) -> list[Event]:
        """Time passes; everything that falls due in it is handled when it is due."""
        end, events = self.now + seconds, list[Event]()
        while (due := self.connection.deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            events += self.connection.handle_timeout(self.now)
            self.connection.check()
        self.now = end
        self.events += events
        return events

    def heard(self) -> list[Frame]:
        """What the connection sent since the last time."""
        return parse(self.connection.take_outbound())

    def headers(self, stream_id: int, fields: Fields = REQUEST, *, ends: bool = False) -> bytes:
        """A header section."""
        return frames.headers(stream_id, self.encoder.encode(list(fields)), ends=ends)

    def open(self, *stream_ids: int, ends: bool = False) -> None:
        """Requests that are as they should be."""
        for stream_id in stream_ids:
            self.say(self.headers(stream_id, ends=ends))

    def fields(self, frame: Frame) -> list[tuple[bytes, bytes]]:
        """The header section in a frame."""
        return [(name, value) for name, value in self.decoder.decode(frame.payload, raw=True)]

    # What became of it.

    def connection_error(self) -> ErrorCode | None:
        """The code that the last GOAWAY told."""
        told = [frame for frame in self.heard() if frame.kind == FrameType.GOAWAY]
        over = [event for event in self.events if isinstance(event, Over)]
        assert bool(told) == bool(over), "who ends a connection says so"
        if not told:
            return None
        code = ErrorCode(frames.parse_u32(told[-1].payload, 4))
        assert over[0].code is code
        return code

    def resets(self) -> dict[int, ErrorCode]:
        """The codes of the streams that the connection reset since it was last heard."""
        return {
            frame.stream_id: ErrorCode(frames.parse_u32(frame.payload))
            for frame in self.heard()
            if frame.kind == FrameType.RST_STREAM
        }

    def lost(self) -> Sequence[int]:
        """Streams whose loss was an event."""
        return [event.stream_id for event in self.events if isinstance(event, StreamLost)]


def data(stream_id: int, payload: bytes = b"", *, ends: bool = False) -> bytes:
    """A DATA frame."""
    return frames.frame(FrameType.DATA, frames.END_STREAM if ends else 0, stream_id, payload)


def settings(*values: tuple[int, int]) -> bytes:
    """A SETTINGS frame, in which a setting may come more than once."""
    payload = b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in values)
    return frames.frame(FrameType.SETTINGS, 0, 0, payload)


def setting(name: int, value: int) -> bytes:
    """A SETTINGS frame with one setting."""
    return settings((name, value))
