"""The client's half of HTTP/2: what a server may say, what ends the call, and what is sent back."""

import base64
import random
import struct
from collections.abc import Sequence

import pytest
from hpack import Decoder, Encoder

from tests.frontend.edge.peer import Frame, parse, settings
from unbroken.http2 import frames
from unbroken.http2.caller import Caller, CallerLimits, Ended, Event, MessageReceived, Status
from unbroken.http2.connection import Connection, DataReceived, RequestReceived
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import PREFIX, Code, MessageReader, trailers
from unbroken.http2.rules import LATENESS_S

PATH = "/unbroken.v1.RelayService/Relay"
ANSWER = ((b":status", b"200"), (b"content-type", b"application/grpc"))


def hear(caller: Caller, data: bytes, now: float = 0.0) -> list[Event]:
    """What comes of bytes, as a transport asks for it."""
    lone = caller.receive_lone(data, now)
    return caller.receive(data, now) if lone is None else [MessageReceived(*lone)]


class Server:
    """Says to a call whatever a test wants, and reads what it answers."""

    def __init__(
        self, limits: CallerLimits | None = None, *, greets: bool = True, num_calls: int = 1
    ) -> None:
        self.now = 0.0
        self.caller = Caller("there:1", limits or CallerLimits(), self.now)
        for index in range(num_calls):
            assert self.caller.call(PATH, self.now) == 2 * index + 1
        self.encoder = Encoder()
        self.hello = self.caller.take_outbound()
        if greets:
            self.say(frames.settings({}))
            self.caller.take_outbound()

    def say(self, *parts: bytes) -> list[Event]:
        """Bytes in one piece; what came of them."""
        events = hear(self.caller, b"".join(parts), self.now)
        self.caller.check()
        return events

    def headers(self, *fields: tuple[bytes, bytes], ends: bool = False, call: int = 1) -> bytes:
        """A header block, compressed."""
        return frames.headers(call, self.encoder.encode(fields), ends=ends)

    def answer(self, call: int = 1) -> None:
        """The answer begins."""
        assert self.say(self.headers(*ANSWER, call=call)) == []

    def end(self, call: int = 1) -> bytes:
        """Trailers of a good end."""
        return self.headers((b"grpc-status", b"0"), ends=True, call=call)

    def heard(self) -> list[Frame]:
        """What the caller sent since the last time."""
        return parse(self.caller.take_outbound())

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
            events += hear(caller, piece)
    assert path == PATH.encode()
    assert got_up == up
    assert [event.message for event in events if isinstance(event, MessageReceived)] == down
    assert events[-1] == Ended(call, Status(0, ""))


class Exchange:
    """One of many calls: what is sent both ways, and what has come."""

    def __init__(self, rng: random.Random) -> None:
        sizes = [0, 1, 300, 5000, 40_000]
        self.up = rng.randbytes(rng.choice(sizes))
        self.down = [rng.randbytes(rng.choice(sizes)) for _ in range(rng.randrange(6))]
        self.left_down = list(self.down)
        self.reader = MessageReader(None, 10**6)
        self.got_up: list[bytes] = []
        self.has_ended_up = False
        self.events: list[Event] = []
        self.is_cancelled = False


def test_what_looks_like_a_message_of_its_own_within_one_is_none() -> None:
    server = Server()
    server.answer()
    inner = frames.frame(FrameType.DATA, 0, 1, message(b"inner"))
    outer = frames.frame(FrameType.DATA, 0, 1, message(inner))
    begin = frames.HEADER_BYTES + PREFIX.size
    assert server.say(outer[:begin]) == []
    assert server.say(outer[begin:]) == [MessageReceived(1, inner)]


def all_that_is_left(caller: Caller) -> list[object]:
    """Windows and allowances of a connection and its calls."""
    windows = [caller._receive, *(call.receive for call in caller._calls.values())]  # pyright: ignore
    return [caller._control._left, [(one.left, one._owed) for one in windows]]  # pyright: ignore


@pytest.mark.parametrize("seed", range(200))
def test_it_makes_no_difference_whether_a_message_comes_alone(seed: int) -> None:
    """Alone and whole it goes by a short way; in two pieces it does not."""
    rng = random.Random(seed)
    most = rng.choice([150, 8000, 20_000])
    limits = CallerLimits(
        window=rng.choice([500, 20_000, 100_000]),
        connection_window=rng.choice([65_535, 150_000]),
        message_bytes_max=most,
        control_burst=20,
        control_per_s=0.0,
    )
    short, long = Server(limits, num_calls=2), Server(limits, num_calls=2)
    answered = rng.choice([(1,), (1, 3), (1, 3), (1, 3)])
    for one in (short, long):
        for call in answered:
            one.answer(call)
    for _ in range(60):
        call = rng.choice([1, 3])
        payload = rng.choice([b"", b"abc", bytes(most // 2), bytes(most), bytes(most)])
        kind, flags, whole = FrameType.DATA, 0, message(payload)
        match rng.randrange(60):
            case 0:
                flags = rng.choice([frames.END_STREAM, frames.PADDED])
            case 1:
                whole = rng.choice([whole[:-1], whole + b"x", b"\1" + whole[1:], whole[:3], b""])
            case 2:
                call, kind = rng.choice([(0, kind), (5, kind), (call, FrameType.PRIORITY)])
            case 3:
                whole = message(bytes(most + 1))
            case 4:
                for one in (short, long):  # A CONTINUATION has to follow.
                    one.say(frames.frame(FrameType.HEADERS, 0, 1))
            case 5 | 6 | 7:
                held = rng.choice([1, 3])
                act = rng.choice(["hold", "release"])
                for one in (short, long):
                    getattr(one.caller, act)(held)
            case _:
                pass
        data = frames.frame(kind, flags, call, whole)
        seen = short.say(data)
        assert long.say(data[:1]) == []
        assert long.say(data[1:]) == seen
        assert short.caller.outbound == long.caller.outbound
        assert short.caller.is_over == long.caller.is_over
        assert all_that_is_left(short.caller) == all_that_is_left(long.caller)


@pytest.mark.parametrize("seed", range(30))
def test_each_of_many_calls_gets_what_is_its_own_once_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    limits = CallerLimits(window=rng.choice([100, 3000, 1_000_000]))
    caller = Caller("there:1", limits, 0.0)
    server = Connection(
        EdgeLimits(stream_window=rng.choice([100, 3000, 1_000_000]), control_burst=10**7), 0.0
    )
    exchanges: dict[int, Exchange] = {}
    num_left = rng.randrange(2, 12)
    for _ in range(20_000):
        for _ in range(min(num_left, rng.randrange(3))):
            num_left -= 1
            call = caller.call(PATH, 0.0)
            exchanges[call] = Exchange(rng)
            caller.send(call, exchanges[call].up, ends=True)
        call = rng.choice(list(exchanges) or [1])
        rng.choice([caller.hold, caller.release, caller.release])(call)
        if rng.random() < 0.005 and call in exchanges:
            exchanges[call].is_cancelled = bool(caller.num_calls)
            caller.cancel(call)
        for piece in cut(caller.take_outbound(), rng):
            for event in server.receive(piece, 0.0):
                if isinstance(event, RequestReceived):
                    assert not event.ends
                    server.send_headers(event.stream_id, ANSWER)
                elif isinstance(event, DataReceived):
                    one = exchanges[event.stream_id]
                    one.got_up += one.reader.feed(event.data)
                    one.has_ended_up = event.ends
                    server.consumed(event.stream_id, len(event.data))
            server.check()
        for call, one in exchanges.items():
            if one.has_ended_up and rng.random() < 0.5:
                if one.left_down:
                    server.send_data(call, message(one.left_down.pop(0)), 0.0)
                else:
                    server.end(call, trailers(Code.OK, f"of {call}"))
        for piece in cut(server.take_outbound(), rng):
            for event in hear(caller, piece):
                exchanges[event.call].events.append(event)
            caller.check()
        if not (num_left or caller.num_calls):
            break
        if not rng.randrange(3):
            for call in exchanges:
                caller.release(call)
    assert not num_left
    assert (caller.is_over, caller.num_calls, caller.num_pending_bytes) == (False, 0, 0)
    for call, one in exchanges.items():
        whole = [MessageReceived(call, payload) for payload in one.down]
        if one.is_cancelled and one.events[-1:] != [Ended(call, Status(0, f"of {call}"))]:
            assert one.events == whole[: len(one.events)]
        else:
            assert one.got_up == [one.up]
            assert one.events == [*whole, Ended(call, Status(0, f"of {call}"))]


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


def test_a_message_of_the_status_may_have_spaces_around_it() -> None:
    """gRPC's own servers send it so."""
    server = Server()
    said = server.headers(
        *ANSWER, (b"grpc-status", b"3"), (b"grpc-message", b" of what: "), ends=True
    )
    assert only_end(server.say(said)) == Status(3, " of what: ")


def test_a_server_that_gives_up_in_the_middle_of_a_message_says_why() -> None:
    server = Server()
    server.answer()
    assert server.say(data(message(b"half of it")[:7])) == []
    assert only_end(server.say(server.headers((b"grpc-status", b"4"), ends=True))).code == 4
    server = Server()
    server.answer()
    assert server.say(data(message(b"half of it")[:7])) == []
    assert only_end(server.say(server.end())).code == Code.INTERNAL


# Of many calls, one ends.


def test_the_last_piece_of_a_request_ends_it() -> None:
    server = Server()
    server.caller.send(1, b"all", ends=True)
    assert server.heard() == [Frame(FrameType.DATA, frames.END_STREAM, 1, message(b"all"))]


def test_a_request_ends_with_its_last_piece_also_if_that_had_to_wait() -> None:
    server = Server()
    server.caller.send(1, bytes(70_000), ends=True)
    assert not any(frame.flags for frame in server.heard())
    server.say(frames.window_update(0, 10**6), frames.window_update(1, 4000))
    assert not any(frame.flags for frame in server.heard())
    server.say(frames.window_update(1, 470))
    (last,) = server.heard()
    assert (len(last.payload), last.flags) == (470, frames.END_STREAM)


def test_settings_that_open_the_windows_let_go_what_waits() -> None:
    server = Server()
    server.caller.send(1, bytes(70_000), ends=True)
    server.say(frames.window_update(0, 10**6))
    server.heard()
    server.say(frames.settings({Setting.INITIAL_WINDOW_SIZE: 70_005}))
    sent = [(frame.kind, frame.flags, len(frame.payload)) for frame in server.heard()]
    assert sent == [(FrameType.SETTINGS, frames.ACK, 0), (FrameType.DATA, 1, 4470)]


@pytest.mark.parametrize("left", ["call", "connection"])
@pytest.mark.parametrize("num_less", [0, 1])
def test_a_message_that_does_not_fit_into_a_window_waits(left: str, num_less: int) -> None:
    """Also the last of many that did."""
    server = Server(num_calls=2)
    num_calls = 1 if left == "call" else 2
    if left == "call":
        server.say(frames.window_update(0, 10**6))
    window = 65_535
    for number in range(100):
        server.caller.send(1 + 2 * (number % num_calls), bytes(600 - 5))
    server.caller.send(1, bytes(window - 100 * 600 - 5 - num_less))
    server.heard()
    server.caller.send(1, b"more")
    sent = [frame.payload for frame in server.heard()]
    assert sent == ([b"\0"] if num_less else []), "what is left of the window, and no more"


def test_many_messages_earn_what_their_server_answers_them_with() -> None:
    """Each may be acknowledged, whatever else is allowed in a second."""
    server = Server(CallerLimits(control_burst=10, control_per_s=0.0))
    server.answer()
    for _ in range(100):
        server.caller.send(1, b"one")
        server.heard()
        assert server.say(frames.window_update(1, 8), frames.window_update(0, 8)) == []
        assert not server.caller.is_over


def test_a_message_alone_is_a_sign_of_life() -> None:
    server = Server()
    server.answer()
    server.now = 10.0
    server.caller.handle_timeout(10.0)  # A ping,
    server.now = 11.9
    server.say(data(message(b"on")))  # and no answer to it.
    assert server.caller.deadline() == 21.9
    assert server.caller.handle_timeout(12.1) == []
    assert not server.caller.is_over


def test_of_a_request_of_many_frames_the_last_one_ends_it() -> None:
    server = Server()
    server.caller.send(1, bytes(40_000), ends=True)
    assert [frame.flags for frame in server.heard()] == [0, 0, frames.END_STREAM]


def test_one_request_that_waits_for_its_own_window_keeps_no_other_waiting() -> None:
    server = Server(num_calls=2)
    server.say(
        frames.window_update(0, 10**6),
        frames.settings({Setting.INITIAL_WINDOW_SIZE: 10}),
        frames.window_update(3, 1000),
    )
    server.heard()
    server.caller.send(1, bytes(100), ends=True)
    server.caller.send(3, b"other", ends=True)
    assert [(frame.stream_id, len(frame.payload)) for frame in server.heard()] == [(1, 10), (3, 10)]


@pytest.mark.parametrize("is_sent", [True, False])
def test_a_request_that_nobody_reads_to_its_end_is_taken_back(is_sent: bool) -> None:
    """Else it would count as one of those that run, at the server, for ever."""
    for has_trailers in (True, False):
        server = Server()
        server.caller.send(1, bytes(10 if is_sent else 70_000), ends=True)
        server.heard()
        server.answer()
        end = server.end() if has_trailers else data(b"", flags=frames.END_STREAM)
        only_end(server.say(end))
        server.say(frames.window_update(0, 10**6))
        expected = [] if is_sent else [(FrameType.RST_STREAM, 1)]
        assert [(frame.kind, frame.stream_id) for frame in server.heard()] == expected


def test_data_on_its_way_to_a_call_that_is_over_gives_the_connections_window_back() -> None:
    server = Server(CallerLimits(connection_window=70_000), num_calls=2)
    server.answer(1)
    server.caller.cancel(1)
    server.heard()
    for _ in range(3):
        server.say(data(bytes(10_000)))
    assert server.heard() == []
    server.say(data(bytes(5_000)))
    assert server.caller.take_outbound() == frames.window_update(0, 35_000)
    server.answer(3)
    assert server.say(data(message(b"on"), stream_id=3)) == [MessageReceived(3, b"on")]


def test_headers_of_a_call_that_is_over_are_decoded_for_those_that_follow() -> None:
    server = Server(num_calls=2)
    server.caller.cancel(1)
    late = server.headers(*ANSWER, (b"x-of-the-table", b"of all"), call=1)
    indexed = server.headers(
        *ANSWER, (b"grpc-status", b"9"), (b"x-of-the-table", b"of all"), call=3, ends=True
    )
    assert len(indexed) < len(late)
    assert server.say(late) == []
    end = only_end(server.say(indexed), call=3)
    assert (end.code, dict(end.trailers)) == (9, {"x-of-the-table": "of all"})


@pytest.mark.parametrize("kind", ["data", "headers", "reset"])
def test_a_flood_of_frames_for_a_call_that_is_over_ends_the_connection(kind: str) -> None:
    server = Server(CallerLimits(control_burst=100, control_per_s=1.0), num_calls=2)
    server.caller.cancel(1)
    events: list[Event] = []
    while not events:
        late = {
            "data": data(b""),
            "headers": server.headers(*ANSWER),
            "reset": frames.reset(1, ErrorCode.CANCEL),
        }[kind]
        events = server.say(late)
    assert only_end(events, call=3).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("stream_id", [2, 5, 7])
@pytest.mark.parametrize("kind", ["data", "headers", "reset", "window"])
def test_frames_of_calls_never_begun_are_a_breach(kind: str, stream_id: int) -> None:
    server = Server(num_calls=2)
    said = {
        "data": data(b"x", stream_id=stream_id),
        "headers": server.headers(*ANSWER, call=stream_id),
        "reset": frames.reset(stream_id, ErrorCode.CANCEL),
        "window": frames.window_update(stream_id, 1),
    }[kind]
    ends = server.say(said)
    assert [event.call for event in ends] == [1, 3]
    assert server.code_of_goaway() == ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("kind", ["size", "gzip", "flag", "http", "type", "binary", "length"])
def test_what_is_wrong_with_one_answer_ends_that_call_alone(kind: str) -> None:
    server = Server(CallerLimits(message_bytes_max=100), num_calls=3)
    for call in (1, 5):
        server.answer(call)
    if kind in ("size", "flag", "binary", "length"):
        server.answer(3)
    said, code = {
        "size": (data(message(bytes(101)), stream_id=3), Code.RESOURCE_EXHAUSTED),
        "flag": (data(b"\2" + bytes(4), stream_id=3), Code.INTERNAL),
        "http": (server.headers((b":status", b"404"), call=3), Code.UNIMPLEMENTED),
        "type": (server.headers((b":status", b"200"), call=3), Code.UNKNOWN),
        "gzip": (
            server.headers(*ANSWER, (b"grpc-encoding", b"gzip"), call=3)
            + data(b"\1\0\0\0\1x", stream_id=3),
            Code.INTERNAL,
        ),
        "binary": (
            server.headers((b"grpc-status", b"0"), (b"x-bin", b"!"), call=3, ends=True),
            Code.INTERNAL,
        ),
        "length": (
            server.headers((b"x", b"y" * 20_000), call=3, ends=True),
            Code.RESOURCE_EXHAUSTED,
        ),
    }[kind]
    assert only_end(server.say(said), call=3).code == code
    assert server.caller.take_outbound() == frames.reset(3, ErrorCode.CANCEL)
    for call in (1, 5):
        assert server.say(data(message(b"on"), stream_id=call)) == [MessageReceived(call, b"on")]
        assert only_end(server.say(server.end(call)), call) == Status(0, "")


def test_a_fault_ends_each_call_once_after_what_came_before_it() -> None:
    server = Server(num_calls=3)
    server.answer(3)
    events = server.say(data(message(b"still"), stream_id=3), data(b"", stream_id=0))
    assert events[0] == MessageReceived(3, b"still")
    assert [event.call for event in events[1:]] == [1, 3, 5]
    assert all(isinstance(event, Ended) and event.status.code == 13 for event in events[1:])
    assert server.caller.is_over
    assert not server.caller.takes_calls
    assert server.caller.closed("gone") == []


@pytest.mark.parametrize("state", ["asked", "sending", "answered", "held", "over"])
def test_a_call_can_be_cancelled_in_every_state(state: str) -> None:
    server = Server(num_calls=2)
    caller = server.caller
    caller.send(1, bytes(70_000 if state == "sending" else 10), ends=True)
    if state in ("answered", "held"):
        server.answer()
    if state == "held":
        caller.hold(1)
        server.say(data(b"\0\0\0\0\x09half"))
    if state == "over":
        only_end(server.say(server.headers(*ANSWER, (b"grpc-status", b"0"), ends=True)))
    caller.take_outbound()
    caller.cancel(1)
    caller.check()
    told = b"" if state == "over" else frames.reset(1, ErrorCode.CANCEL)
    assert caller.take_outbound() == told
    caller.release(1)
    caller.send(1, b"more")
    assert not caller.has_room(1)
    assert server.say(frames.window_update(0, 10**6), frames.window_update(1, 10**6)) == []
    assert caller.take_outbound() == b""
    assert (caller.num_calls, caller.num_pending_bytes) == (1, 0)


# Of a held call, the server can send a window, and no more.


def test_a_held_call_gives_no_window_back_and_others_do() -> None:
    server = Server(CallerLimits(window=1000, connection_window=10**6), num_calls=2)
    caller = server.caller
    for call in (1, 3):
        server.answer(call)
    caller.hold(1)
    caller.hold(1)
    said = message(bytes(595))
    for call in (1, 3):
        assert server.say(data(said, stream_id=call)) == [MessageReceived(call, bytes(595))]
    assert caller.take_outbound() == frames.window_update(3, 600)
    assert server.say(data(message(bytes(395)), stream_id=1)) == [MessageReceived(1, bytes(395))]
    assert caller.take_outbound() == b""
    caller.release(1)
    caller.release(1)
    assert caller.take_outbound() == frames.window_update(1, 1000)
    server.say(data(said, stream_id=1))
    assert caller.take_outbound() == frames.window_update(1, 600), "it is as it was before"


def test_more_than_a_window_for_a_held_call_is_a_breach() -> None:
    server = Server(CallerLimits(window=1000))
    server.answer()
    server.caller.hold(1)
    server.say(data(b"\0\0\1\0\0" + bytes(995)))
    assert only_end(server.say(data(b"x"))).code == Code.INTERNAL
    assert server.code_of_goaway() == ErrorCode.FLOW_CONTROL_ERROR


def test_a_held_call_ends_like_any_other() -> None:
    server = Server()
    server.answer()
    server.caller.hold(1)
    assert server.say(data(message(b"last")), server.end()) == [
        MessageReceived(1, b"last"),
        Ended(1, Status(0, "")),
    ]
    server.caller.release(1)
    assert [frame.kind for frame in server.heard()] == [FrameType.RST_STREAM]


# How many calls a connection takes.


def test_a_goaway_ends_the_calls_beyond_its_last_and_lets_the_others_end() -> None:
    server = Server(num_calls=3)
    caller = server.caller
    assert caller.takes_calls
    ended = server.say(frames.go_away(3, ErrorCode.NO_ERROR))
    assert only_end(ended, call=5).code == Code.UNAVAILABLE
    assert not caller.takes_calls
    for call in (3, 1):
        assert not caller.is_spent
        server.answer(call)
        assert only_end(server.say(server.end(call)), call) == Status(0, "")
    assert caller.is_spent
    assert not caller.is_over


def test_a_goaway_for_later_ends_nothing_and_a_second_one_does() -> None:
    server = Server(num_calls=2)
    assert server.say(frames.go_away(frames.STREAM_ID_MAX, ErrorCode.NO_ERROR)) == []
    assert not server.caller.takes_calls
    assert only_end(server.say(frames.go_away(1, ErrorCode.NO_ERROR)), call=3).code == 14
    server.caller.cancel(1)
    assert server.caller.is_spent


def test_a_server_says_how_many_calls_it_takes_at_once() -> None:
    server = Server()
    caller = server.caller
    server.say(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 2}))
    assert caller.takes_calls
    assert caller.call(PATH, 0.0) == 3
    assert not caller.takes_calls
    caller.cancel(1)
    assert caller.takes_calls
    server.say(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 0}))
    assert not caller.takes_calls
    server.answer(3)
    assert server.say(data(message(b"on"), stream_id=3)) == [MessageReceived(3, b"on")]
    server.say(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1}))
    assert not caller.takes_calls
    only_end(server.say(server.end(3)), call=3)
    assert caller.takes_calls
    server.say(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 0}))
    assert not caller.takes_calls, "not even the first"
    assert not caller.is_spent


def test_a_connection_whose_numbers_are_used_up_is_spent_when_its_calls_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "STREAM_ID_MAX", 3)
    server = Server()
    assert server.caller.call(PATH, 0.0) == 3
    assert not server.caller.takes_calls
    for call in (1, 3):
        assert not server.caller.is_spent
        server.caller.cancel(call)
    assert server.caller.is_spent


def test_a_server_may_want_no_table_of_headers() -> None:
    server = Server()
    server.say(frames.settings({Setting.HEADER_TABLE_SIZE: 0}))
    server.caller.take_outbound()
    decoder = Decoder()
    blocks: list[bytes] = []
    for call in (3, 5):
        assert server.caller.call(PATH, 0.0, ((b"x", b"y"),)) == call
        (frame,) = server.heard()
        blocks.append(frame.payload)
        assert (b"x", b"y") in [tuple(field) for field in decoder.decode(frame.payload, raw=True)]
    assert blocks[0][:1] == b"\x20", "the table is of no size from here on"
    assert blocks[1] == blocks[0][1:], "nothing was kept"


def test_the_least_and_the_last_size_of_a_servers_table_are_told_it() -> None:
    server = Server()
    size = Setting.HEADER_TABLE_SIZE
    server.say(settings((size, 0), (size, 4096)), settings((size, 4096)))
    server.caller.take_outbound()
    server.caller.call(PATH, 0.0)
    (frame,) = server.heard()
    assert frame.payload.startswith(b"\x20\x3f\xe1\x1f")


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
        (
            frames.window_update(1, 1)
            + settings((Setting.INITIAL_WINDOW_SIZE, 2**31 - 1), (Setting.INITIAL_WINDOW_SIZE, 9)),
            ErrorCode.FLOW_CONTROL_ERROR,
        ),
        (
            settings((Setting.ENABLE_PUSH, 1), (Setting.ENABLE_PUSH, 0)),
            ErrorCode.PROTOCOL_ERROR,
        ),
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
        ((b":status", b"200"), (b"x", b"a\nb")),
    ],
)
def test_malformed_headers_end_their_call_and_no_other(
    fields: Sequence[tuple[bytes, bytes]],
) -> None:
    server = Server(num_calls=2)
    assert only_end(server.say(server.headers(*fields))).code == Code.INTERNAL
    assert server.caller.take_outbound() == frames.reset(1, ErrorCode.PROTOCOL_ERROR)
    server.answer(3)
    assert server.say(data(message(b"on"), stream_id=3)) == [MessageReceived(3, b"on")]


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
        + frames.frame(FrameType.CONTINUATION, 0, 1, bytes(16_384)) * 4,
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
    assert server.code_of_goaway() == ErrorCode.ENHANCE_YOUR_CALM


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


def test_a_timeout_that_is_handled_late_proves_nothing() -> None:
    server = Server(num_calls=2)
    caller = server.caller
    caller.handle_timeout(10.0)
    late = 12.0 + 2 * LATENESS_S
    assert caller.handle_timeout(late) == []
    due = caller.deadline()
    assert due is not None
    assert late < due < late + 2.0
    ends = caller.handle_timeout(due)
    assert [event.call for event in ends] == [1, 3]
    assert caller.is_over


def test_who_has_no_calls_waits_for_nothing_and_begins_anew_with_the_next() -> None:
    server = Server(num_calls=2)
    caller = server.caller
    caller.handle_timeout(10.0)  # A ping.
    caller.cancel(1)
    assert caller.deadline() == 12.0
    caller.cancel(3)
    assert caller.deadline() is None
    assert caller.handle_timeout(100.0) == []
    assert caller.call(PATH, 200.0) == 5
    assert caller.deadline() == 210.0
    caller.call(PATH, 205.0)
    assert caller.deadline() == 210.0, "the first has waited since then"


class Erratic(Server):
    """Says to some calls what it may, and seldom what it must not."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(CallerLimits(control_burst=200, message_bytes_max=1000, window=500))
        self.rng = rng
        self.answered = set[int]()

    def next(self, call: int) -> bytes:
        """Something for that call, or for all."""
        rng, is_rare = self.rng, self.rng.random() < 0.03
        if (call not in self.answered) != is_rare:
            self.answered.add(call)
            return self.headers(*ANSWER, call=call)
        match rng.randrange(9):
            case 0 | 1:
                return data(message(rng.randbytes(rng.choice([0, 40, 300]))), stream_id=call)
            case 2:
                return data(b"", stream_id=call, flags=rng.choice([0, 0, 1]))
            case 3 if is_rare:
                return data(rng.randbytes(3), stream_id=call, flags=rng.choice([0, 1, 8]))
            case 3 | 4:
                increment = rng.choice([1, 100, 10_000])
                return frames.window_update(rng.choice([0, call]), increment)
            case 5:
                return frames.settings({Setting.INITIAL_WINDOW_SIZE: rng.choice([0, 99, 70_000])})
            case 6:
                return frames.settings({Setting.MAX_CONCURRENT_STREAMS: rng.choice([0, 3, 99])})
            case 7:
                return frames.reset(call, ErrorCode.CANCEL)
            case _:
                if is_rare:
                    return frames.go_away(call, ErrorCode.NO_ERROR)
                return self.end(call)


@pytest.mark.parametrize("seed", range(200))
def test_nothing_that_a_server_says_crashes_many_calls_or_makes_one_end_twice(seed: int) -> None:
    rng = random.Random(seed)
    server = Erratic(rng)
    caller = server.caller
    live, last = {1}, 1
    for _ in range(100):
        if caller.takes_calls and rng.random() < 0.3:
            last = caller.call(PATH, 0.0)
            live.add(last)
        end = last + 3 if rng.random() < 0.02 else last + 1
        call = rng.choice([*sorted(live), rng.randrange(1, end, 2)])
        match rng.randrange(12):
            case 0:
                caller.cancel(call)
                live.discard(call)
            case 1:
                caller.hold(call)
            case 2:
                caller.release(call)
            case 3:
                caller.send(call, rng.randbytes(rng.choice([0, 100, 50_000])), ends=True)
            case _:
                pass
        for event in server.say(server.next(call)):
            assert event.call in live
            if isinstance(event, Ended):
                live.remove(event.call)
        assert caller.num_calls == len(live)
    for event in caller.closed("gone"):
        live.remove(event.call)
    caller.check()
    assert not live


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
