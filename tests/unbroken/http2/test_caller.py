"""The client's half of HTTP/2: what a server may say, what ends the call, and what is sent back."""

import base64
import random
import struct
from collections.abc import Sequence

import pytest
from hpack import Encoder

from tests.frontend.edge.peer import parse
from unbroken.http2 import frames
from unbroken.http2.caller import Caller, CallerLimits, Ended, Event, MessageReceived, Status
from unbroken.http2.connection import Connection, DataReceived, RequestReceived
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import PREFIX, Code, MessageReader, trailers

PATH = "/unbroken.v1.RelayService/Relay"
ANSWER = ((b":status", b"200"), (b"content-type", b"application/grpc"))


class Server:
    """Says to a call whatever a test wants, and reads what it answers."""

    def __init__(self, limits: CallerLimits | None = None, *, greets: bool = True) -> None:
        self.now = 0.0
        self.caller = Caller("there:1", limits or CallerLimits(), self.now)
        assert self.caller.call(PATH, self.now) == 1
        self.encoder = Encoder()
        self.hello = self.caller.take_outbound()
        if greets:
            self.say(frames.settings({}))
            self.caller.take_outbound()

    def say(self, *parts: bytes) -> list[Event]:
        """Bytes in one piece; what came of them."""
        events = self.caller.receive(b"".join(parts), self.now)
        self.caller.check()
        return events

    def headers(self, *fields: tuple[bytes, bytes], ends: bool = False, call: int = 1) -> bytes:
        """A header block, compressed."""
        return frames.headers(call, self.encoder.encode(fields), ends=ends)

    def answer(self) -> None:
        """The answer begins."""
        assert self.say(self.headers(*ANSWER)) == []

    def code_of_goaway(self) -> ErrorCode:
        """What the call was ended for, as the server is told."""
        last = parse(self.caller.take_outbound())[-1]
        assert last.kind == FrameType.GOAWAY
        return ErrorCode(frames.parse_u32(last.payload, 4))


def data(body: bytes, *, flags: int = 0, stream_id: int = 1) -> bytes:
    return frames.frame(FrameType.DATA, flags, stream_id, body)


def message(payload: bytes) -> bytes:
    return PREFIX.pack(0, len(payload)) + payload


def only_end(events: Sequence[Event], call: int = 1) -> Status:
    (end,) = events
    assert isinstance(end, Ended)
    assert end.call == call
    return end.status


# With the server that we have.


@pytest.mark.parametrize("seed", range(20))
def test_messages_pass_both_ways_however_bytes_are_cut_and_windows_set(seed: int) -> None:
    rng = random.Random(seed)
    window = rng.choice([100, 3000, 70_000, 1_000_000])
    caller = Caller("there:1", CallerLimits(window=window), 0.0)
    call = caller.call(PATH, 0.0)
    limits = EdgeLimits(
        stream_window=rng.choice([100, 3000, 1_000_000]), control_burst=10**7, resets_burst=1
    )
    server = Connection(limits, 0.0)
    up = [rng.randbytes(rng.choice([0, 1, 300, 40_000])) for _ in range(rng.randrange(1, 6))]
    down = [rng.randbytes(rng.choice([0, 1, 300, 40_000])) for _ in range(rng.randrange(1, 6))]
    reader = MessageReader(None, 10**6)
    got_up: list[bytes] = []
    events: list[Event] = []
    left_up, left_down = list(up), list(down)
    path = b""
    # Until its SETTINGS have come, a client knows of no smaller windows (RFC 9113, section 6.9.2).
    assert caller.receive(server.take_outbound(), 0.0) == []
    for _ in range(10_000):
        if left_up and caller.has_room(call):
            caller.send(call, left_up.pop(0))
        to_server, to_client = caller.take_outbound(), server.take_outbound()
        if not (to_server or to_client or left_up or left_down) and not caller.num_calls:
            break
        for piece in cut(to_server, rng):
            for event in server.receive(piece, 0.0):
                if isinstance(event, RequestReceived):
                    path = event.request.path
                    server.send_headers(1, ANSWER)
                    for payload in left_down:
                        server.send_data(1, message(payload), 0.0)
                    left_down = []
                elif isinstance(event, DataReceived):
                    got_up += reader.feed(event.data)
                    server.consumed(1, len(event.data))
                    if len(got_up) == len(up):
                        server.end(1, trailers(Code.OK, ""))
            server.check()
        for piece in cut(to_client, rng):
            events += caller.receive(piece, 0.0)
    assert path == PATH.encode()
    assert got_up == up
    assert [event.message for event in events if isinstance(event, MessageReceived)] == down
    assert events[-1] == Ended(call, Status(0, ""))


def cut(given: bytes, rng: random.Random) -> list[bytes]:
    """The same bytes in pieces."""
    pieces: list[bytes] = []
    while given:
        size = rng.choice([1, 9, 500, 10**6]) if len(given) < 2000 else 10**6
        pieces.append(given[:size])
        given = given[size:]
    return pieces


# How a call ends.


def test_a_call_says_who_it_is_for() -> None:
    first, *rest = parse(Server().hello[len(frames.PREFACE) :])
    assert first.kind == FrameType.SETTINGS
    assert (Setting.ENABLE_PUSH, 0) in frames.parse_settings(first.payload)
    assert [frame.kind for frame in rest] == [FrameType.WINDOW_UPDATE, FrameType.HEADERS]


def test_the_servers_status_comes_with_its_detail_and_its_metadata() -> None:
    server = Server()
    server.answer()
    details = base64.b64encode(b"\0\1\2").rstrip(b"=")
    end = only_end(
        server.say(
            server.headers(
                (b"grpc-status", b"9"),
                (b"grpc-message", b"100%25 gone%0A"),
                (b"grpc-status-details-bin", details),
                (b"grpc-retry-pushback-ms", b"7"),
                (b"grpc-other", b"hidden"),
                ends=True,
            )
        )
    )
    assert (end.code, end.detail) == (9, "100% gone\n")
    assert dict(end.trailers) == {
        "grpc-status-details-bin": b"\0\1\2",
        "grpc-retry-pushback-ms": "7",
    }
    assert not server.caller.num_calls


def test_an_answer_of_trailers_alone_is_a_status() -> None:
    server = Server()
    assert only_end(server.say(server.headers(*ANSWER, (b"grpc-status", b"14"), ends=True))) == (
        Status(14, "")
    )


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (((b":status", b"503"),), Code.UNAVAILABLE),
        (((b":status", b"404"),), Code.UNIMPLEMENTED),
        (((b":status", b"302"),), Code.UNKNOWN),
        (((b":status", b"200"), (b"content-type", b"text/html")), Code.UNKNOWN),
    ],
)
def test_who_does_not_speak_grpc_gets_the_status_that_grpc_has_for_it(
    fields: Sequence[tuple[bytes, bytes]], code: Code
) -> None:
    server = Server()
    assert only_end(server.say(server.headers(*fields))).code == code


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCode.NO_ERROR, Code.INTERNAL),
        (ErrorCode.CANCEL, Code.CANCELLED),
        (ErrorCode.REFUSED_STREAM, Code.UNAVAILABLE),
        (ErrorCode.ENHANCE_YOUR_CALM, Code.RESOURCE_EXHAUSTED),
    ],
)
def test_a_reset_is_the_status_that_grpc_has_for_it(code: ErrorCode, status: Code) -> None:
    assert only_end(Server().say(frames.reset(1, code))).code == status


def test_a_goaway_ends_a_call_that_is_not_served_and_no_other() -> None:
    server = Server()
    server.answer()
    assert server.say(frames.go_away(1, ErrorCode.NO_ERROR)) == []
    assert server.say(data(message(b"on"))) == [MessageReceived(1, b"on")]
    assert only_end(server.say(frames.go_away(0, ErrorCode.NO_ERROR))).code == Code.UNAVAILABLE


def test_an_end_without_a_status_is_an_error() -> None:
    server = Server()
    server.answer()
    assert only_end(server.say(data(b"", flags=frames.END_STREAM))).code == Code.UNKNOWN
    server = Server()
    server.answer()
    assert only_end(server.say(server.headers((b"x", b"y"), ends=True))).code == Code.UNKNOWN


def test_a_lost_connection_ends_the_call_once() -> None:
    server = Server()
    assert only_end(server.caller.closed("gone")) == Status(Code.UNAVAILABLE, "gone")
    assert server.caller.closed("gone") == []
    assert server.say(data(b"")) == []


def test_a_cancelled_call_says_so_and_hears_no_more() -> None:
    server = Server()
    server.caller.cancel(1)
    assert server.caller.take_outbound() == frames.reset(1, ErrorCode.CANCEL)
    server.caller.cancel(1)
    assert server.caller.take_outbound() == b""
    assert server.say(frames.reset(1, ErrorCode.CANCEL)) == []


# What a server must not do.


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frames.ping(b"12345678", is_ack=False), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.SETTINGS, frames.ACK, 0), ErrorCode.PROTOCOL_ERROR),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ErrorCode.FRAME_SIZE_ERROR),
    ],
)
def test_a_server_greets_first(said: bytes, code: ErrorCode) -> None:
    server = Server(greets=False)
    assert only_end(server.say(said)).code == Code.INTERNAL
    assert server.code_of_goaway() == code


U32 = struct.Struct(">I")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frames.frame(FrameType.PUSH_PROMISE, 4, 1, b"\0\0\0\2"), ErrorCode.PROTOCOL_ERROR),
        (frames.settings({Setting.ENABLE_PUSH: 1}), ErrorCode.PROTOCOL_ERROR),
        (frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.settings({Setting.MAX_FRAME_SIZE: 1}), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.SETTINGS, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.frame(FrameType.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.SETTINGS, frames.ACK, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (data(message(b"early")), ErrorCode.PROTOCOL_ERROR),
        (data(b"", stream_id=0), ErrorCode.PROTOCOL_ERROR),
        (data(b"", stream_id=3), ErrorCode.PROTOCOL_ERROR),
        (frames.headers(2, b"", ends=False), ErrorCode.PROTOCOL_ERROR),
        (frames.headers(1, b"\xff\xff\xff", ends=False), ErrorCode.COMPRESSION_ERROR),
        (frames.frame(FrameType.CONTINUATION, 4, 1), ErrorCode.PROTOCOL_ERROR),
        (
            frames.frame(FrameType.HEADERS, 0, 1) + frames.ping(b"12345678", is_ack=True),
            ErrorCode.PROTOCOL_ERROR,
        ),
        (frames.window_update(1, 0), ErrorCode.PROTOCOL_ERROR),
        (frames.window_update(3, 1), ErrorCode.PROTOCOL_ERROR),
        (frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.window_update(1, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (frames.frame(FrameType.WINDOW_UPDATE, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.frame(FrameType.PING, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.frame(FrameType.PING, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.GOAWAY, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.frame(FrameType.GOAWAY, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.RST_STREAM, 0, 1, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (frames.frame(FrameType.RST_STREAM, 0, 3, b"1234"), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.PRIORITY, 0, 0, b"12345"), ErrorCode.PROTOCOL_ERROR),
        (frames.frame(FrameType.PRIORITY, 0, 1, b"1"), ErrorCode.FRAME_SIZE_ERROR),
        (U32.pack(16_385 << 8) + bytes(5), ErrorCode.FRAME_SIZE_ERROR),
    ],
)
def test_a_breach_of_the_protocol_ends_the_connection_with_the_codes_of_the_rfc(
    said: bytes, code: ErrorCode
) -> None:
    server = Server()
    assert only_end(server.say(said)).code == Code.INTERNAL
    assert server.code_of_goaway() == code


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ((b"content-type", b"application/grpc"),),
        ((b":status", b"2x0"),),
        ((b":status", b"200"), (b":path", b"/")),
        ((b":status", b"200"), (b"Upper", b"x")),
        ((b":status", b"200"), (b"connection", b"close")),
    ],
)
def test_malformed_headers_are_a_breach(fields: Sequence[tuple[bytes, bytes]]) -> None:
    server = Server()
    assert only_end(server.say(server.headers(*fields))).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.PROTOCOL_ERROR


def test_headers_in_the_middle_of_an_answer_are_a_breach() -> None:
    server = Server()
    server.answer()
    assert only_end(server.say(server.headers((b"grpc-status", b"0")))).code == Code.INTERNAL


def test_unknown_frames_priorities_and_interim_answers_are_passed_over() -> None:
    server = Server()
    said = [
        frames.settings({})[:3] + bytes([99]) + bytes(5),
        frames.frame(FrameType.PRIORITY, 0, 1, b"12345"),
        server.headers((b":status", b"103")),
    ]
    assert server.say(*said) == []
    server.answer()


def test_a_ping_is_answered() -> None:
    server = Server()
    server.say(frames.ping(b"12345678", is_ack=False))
    assert server.caller.take_outbound() == frames.ping(b"12345678", is_ack=True)


# What is bounded.


def test_more_than_the_window_is_a_breach() -> None:
    server = Server(CallerLimits(window=100))
    server.answer()
    assert server.say(data(b"\0" + U32.pack(200) + bytes(95))) == []
    assert server.caller.take_outbound() == (frames.window_update(1, 100)), (
        "what came was taken, and the connection's window is larger"
    )
    assert only_end(server.say(data(bytes(101)))).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.FLOW_CONTROL_ERROR


def test_a_message_beyond_the_limit_ends_the_call() -> None:
    server = Server(CallerLimits(message_bytes_max=10))
    server.answer()
    assert only_end(server.say(data(b"\0" + U32.pack(11)))).code == Code.RESOURCE_EXHAUSTED
    assert server.caller.take_outbound() == frames.reset(1, ErrorCode.CANCEL)


@pytest.mark.parametrize(
    "nothing",
    [
        frames.ping(b"12345678", is_ack=False),
        frames.settings({}),
        frames.window_update(1, 1),
        frames.frame(FrameType.PRIORITY, 0, 1, b"12345"),
        frames.go_away(1, ErrorCode.NO_ERROR),
        data(b""),
    ],
    ids=["ping", "settings", "window_update", "priority", "goaway", "data"],
)
def test_a_flood_of_frames_that_bring_nothing_ends_the_call(nothing: bytes) -> None:
    server = Server(CallerLimits(control_burst=100, control_per_s=1.0))
    server.answer()
    assert only_end(server.say(nothing * 200)).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "flood",
    [
        frames.frame(FrameType.HEADERS, 0, 1) + frames.frame(FrameType.CONTINUATION, 0, 1) * 20,
        frames.frame(FrameType.HEADERS, 0, 1, bytes(16_384))
        + frames.frame(FrameType.CONTINUATION, 0, 1, bytes(16_384)),
    ],
    ids=["frames", "bytes"],
)
def test_endless_headers_end_the_call(flood: bytes) -> None:
    server = Server()
    assert only_end(server.say(flood)).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.ENHANCE_YOUR_CALM


def test_a_header_bomb_is_not_unpacked() -> None:
    server = Server()
    bomb = server.encoder.encode([(b"x", b"y" * 4000)]) + b"\xbe" * 10_000
    assert only_end(server.say(frames.headers(1, bomb, ends=False))).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.COMPRESSION_ERROR


def test_what_does_not_fit_waits_and_nothing_more_is_asked_for() -> None:
    server = Server()
    caller = server.caller
    caller.send(1, bytes(70_000))
    sent = sum(len(frame.payload) for frame in parse(caller.take_outbound()))
    assert sent == frames.WINDOW_DEFAULT
    assert not caller.has_room(1)
    server.say(frames.window_update(0, 10_000), frames.window_update(1, 4470))
    assert sum(len(frame.payload) for frame in parse(caller.take_outbound())) == 70_005 - sent
    assert not caller.has_room(1), "the stream's window is used up"
    server.say(frames.settings({Setting.INITIAL_WINDOW_SIZE: 65_536}))
    assert caller.has_room(1)


# Time.


def test_a_silent_server_is_asked_for_a_sign_of_life_and_lost_without_one() -> None:
    server = Server()
    caller = server.caller
    assert caller.deadline() == 10.0
    assert caller.handle_timeout(9.9) == []
    assert caller.take_outbound() == b""
    assert caller.handle_timeout(10.0) == []
    assert [frame.kind for frame in parse(caller.take_outbound())] == [FrameType.PING]
    assert only_end(caller.handle_timeout(12.0)).code == Code.UNAVAILABLE
    assert caller.deadline() is None


def test_a_server_that_answers_is_not_lost() -> None:
    server = Server()
    server.caller.handle_timeout(10.0)
    server.now = 11.0
    server.say(frames.ping(b"unbroken", is_ack=True))
    assert server.caller.deadline() == 21.0


@pytest.mark.parametrize("seed", range(300))
def test_nothing_that_a_server_says_crashes_a_call_or_makes_it_end_twice(seed: int) -> None:
    rng = random.Random(seed)
    server = Server(CallerLimits(control_burst=50, message_bytes_max=1000))
    kinds = [*FrameType, 77]
    events: list[Event] = []
    if rng.random() < 0.7:
        server.answer()
    for _ in range(60):
        kind = rng.choice(kinds)
        payload = rng.randbytes(rng.choice([0, 4, 5, 6, 8, 30]))
        if rng.random() < 0.5 and kind == FrameType.DATA:
            payload = message(payload)
        header = U32.pack(len(payload) << 8 | kind) + bytes([rng.choice([0, 1, 4, 5, 8, 0x20])])
        events += server.say(header + U32.pack(rng.choice([0, 1, 1, 1, 3])) + payload)
        server.caller.send(1, b"x")
    ends = [event for event in events if isinstance(event, Ended)]
    assert len(ends) == (not server.caller.num_calls)
    assert not ends or events[-1] is ends[0]
