"""RFC 9113 and 7541: what concerns a server, each with the code that it answers."""

from collections.abc import Callable

import pytest
from hpack import Encoder

from tests.frontend.edge.peer import (
    GREETING,
    REQUEST,
    SETTINGS_ACK,
    Frame,
    Peer,
    data,
    setting,
    settings,
)
from unbroken.http2 import frames
from unbroken.http2.connection import DataReceived, RequestReceived, StreamLost, Writable
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.headers import Fields
from unbroken.http2.limits import EdgeLimits

PROTOCOL = ErrorCode.PROTOCOL_ERROR
SIZE = ErrorCode.FRAME_SIZE_ERROR
FLOW = ErrorCode.FLOW_CONTROL_ERROR
CLOSED = ErrorCode.STREAM_CLOSED


def raw(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Any frame."""
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    ) + payload


HEADERS, CONTINUATION = FrameType.HEADERS, FrameType.CONTINUATION
BLOCK_START = raw(HEADERS, 0, 1, b"\x82")
"""Headers that go on in a CONTINUATION."""
BLOCK = Encoder().encode(list(REQUEST))
"""The first request of a connection."""
OPENED = frames.headers(5, BLOCK, ends=False)
"""Stream 5."""

CONNECTION_ERRORS: dict[str, tuple[ErrorCode, bytes]] = {
    # 4.1, 4.2: frame format and size.
    "4.2 a frame above the size that was announced": (
        SIZE,
        raw(FrameType.DATA, 0, 1, b"x" * 16385),
    ),
    "4.2 an unknown frame above the size": (SIZE, raw(0xEE, 0, 0, b"x" * 16385)),
    # 4.3: header compression.
    "4.3 a header block that cannot be decoded": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x80"),
    ),
    "4.3 a header block that ends within a field": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x40\x0aabc"),
    ),
    "4.3 another frame within a header block": (
        PROTOCOL,
        BLOCK_START + raw(FrameType.PING, 0, 0, b"8" * 8),
    ),
    "4.3 an unknown frame within a header block": (PROTOCOL, BLOCK_START + raw(0xEE, 0, 1)),
    "4.3 a CONTINUATION of another stream": (PROTOCOL, BLOCK_START + raw(CONTINUATION, 4, 3)),
    # 5.1: stream states.
    "5.1 DATA on an idle stream": (PROTOCOL, data(1, b"x")),
    "5.1 RST_STREAM on an idle stream": (PROTOCOL, frames.reset(1, ErrorCode.CANCEL)),
    "5.1 WINDOW_UPDATE on an idle stream": (PROTOCOL, frames.window_update(1, 1)),
    "5.1 DATA on an idle stream of the server": (PROTOCOL, OPENED + data(2, b"x")),
    "5.1 RST_STREAM on an idle stream of the server": (
        PROTOCOL,
        OPENED + frames.reset(2, ErrorCode.CANCEL),
    ),
    "5.1 WINDOW_UPDATE on an idle stream of the server": (
        PROTOCOL,
        OPENED + frames.window_update(2, 1),
    ),
    "5.1.1 an even stream": (PROTOCOL, raw(HEADERS, 5, 2, b"\x82")),
    # 6: frame definitions.
    "6.1 DATA on stream 0": (PROTOCOL, data(0, b"x")),
    "6.2 HEADERS on stream 0": (PROTOCOL, raw(HEADERS, 5, 0, b"\x82")),
    "6.2 HEADERS with more padding than payload": (PROTOCOL, raw(HEADERS, 0xD, 1, b"\x05\x82")),
    "6.2 HEADERS too short for their padding": (SIZE, raw(HEADERS, 0xD, 1)),
    "6.2 HEADERS too short for their priority": (SIZE, raw(HEADERS, 0x25, 1, b"\x82")),
    "6.2 HEADERS whose padding reaches into their priority": (
        PROTOCOL,
        raw(HEADERS, 0x2D, 1, b"\x02" + b"\0" * 5 + b"\x82"),
    ),
    "6.2 padded HEADERS too short for their priority": (
        SIZE,
        raw(HEADERS, 0x2D, 1, b"\x04" + b"\0" * 4),
    ),
    "6.3 PRIORITY on stream 0": (PROTOCOL, raw(FrameType.PRIORITY, 0, 0, b"\0" * 5)),
    "6.3 PRIORITY of a wrong length": (SIZE, raw(FrameType.PRIORITY, 0, 1, b"\0" * 4)),
    "6.4 RST_STREAM on stream 0": (PROTOCOL, raw(FrameType.RST_STREAM, 0, 0, b"\0" * 4)),
    "6.4 RST_STREAM of a wrong length": (SIZE, raw(FrameType.RST_STREAM, 0, 1, b"\0" * 3)),
    "6.5 SETTINGS on a stream": (PROTOCOL, raw(FrameType.SETTINGS, 0, 1)),
    "6.5 an acknowledgement with a payload": (SIZE, raw(FrameType.SETTINGS, 1, 0, b"\0" * 6)),
    "6.5 SETTINGS of a wrong length": (SIZE, raw(FrameType.SETTINGS, 0, 0, b"\0" * 5)),
    "6.5.2 ENABLE_PUSH of 2": (PROTOCOL, setting(Setting.ENABLE_PUSH, 2)),
    "6.5.2 INITIAL_WINDOW_SIZE of 2^31": (FLOW, setting(Setting.INITIAL_WINDOW_SIZE, 2**31)),
    "6.5.2 MAX_FRAME_SIZE of 16383": (PROTOCOL, setting(Setting.MAX_FRAME_SIZE, 16383)),
    "6.5.2 MAX_FRAME_SIZE of 2^24": (PROTOCOL, setting(Setting.MAX_FRAME_SIZE, 2**24)),
    "6.5.3 a bad value is bad although another follows": (
        PROTOCOL,
        raw(FrameType.SETTINGS, 0, 0, b"\0\2\0\0\0\2" + b"\0\2\0\0\0\1"),
    ),
    "6.6 PUSH_PROMISE of a client": (PROTOCOL, raw(FrameType.PUSH_PROMISE, 4, 1, b"\0\0\0\2\x82")),
    "6.7 PING on a stream": (PROTOCOL, raw(FrameType.PING, 0, 1, b"8" * 8)),
    "6.7 PING of a wrong length": (SIZE, raw(FrameType.PING, 0, 0, b"7" * 7)),
    "6.8 GOAWAY on a stream": (PROTOCOL, raw(FrameType.GOAWAY, 0, 1, b"\0" * 8)),
    "6.8 GOAWAY of a wrong length": (SIZE, raw(FrameType.GOAWAY, 0, 0, b"\0" * 7)),
    "6.9 WINDOW_UPDATE of a wrong length": (SIZE, raw(FrameType.WINDOW_UPDATE, 0, 0, b"\0" * 3)),
    "6.9 WINDOW_UPDATE of 0 for the connection": (PROTOCOL, frames.window_update(0, 0)),
    "6.9.1 the connection's window overflows": (FLOW, frames.window_update(0, 2**31 - 1)),
    "6.10 CONTINUATION without HEADERS": (PROTOCOL, raw(CONTINUATION, 4, 1, b"\x82")),
    "6.10 CONTINUATION after the end of the headers": (
        PROTOCOL,
        raw(HEADERS, 4, 1, b"\x82\x86\x84") + raw(CONTINUATION, 4, 1, b"\x82"),
    ),
    "6.10 CONTINUATION on stream 0": (PROTOCOL, raw(CONTINUATION, 4, 0, b"\x82")),
    # RFC 7541.
    "7541 2.3.3 an index beyond both tables": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\xff\x20"),
    ),
    "7541 4.2 a table size above the limit": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x3f\xe1\x7f\x82"),
    ),
    "7541 4.2 a table size update after a field": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x82\x20"),
    ),
    "7541 4.4 an index of what a field larger than the table drove out": (
        ErrorCode.COMPRESSION_ERROR,
        OPENED + raw(HEADERS, 5, 7, b"\x40\x01x\x7f\x81\x1f" + b"y" * 4096 + b"\xbe"),
    ),
    "7541 5.1 an integer of a value that is taken, in more bytes than anybody needs": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, BLOCK + b"\0\x7f" + b"\x80" * 10_000 + b"\0" + b"a" * 127 + b"\x01b"),
    ),
    "7541 5.1 an integer that ends with the block": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\xff\x80"),
    ),
    "7541 5.2 padding of Huffman that is not of ones": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x00\x81\x00\x01a"),
    ),
    "7541 5.2 padding of Huffman longer than 7 bits": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x00\x82\x1f\xff\x01a"),
    ),
    "7541 5.2 the end-of-string symbol in a string": (
        ErrorCode.COMPRESSION_ERROR,
        raw(HEADERS, 5, 1, b"\x00\x84\xff\xff\xff\xff\x01a"),
    ),
    "7541 6.1 the index 0": (ErrorCode.COMPRESSION_ERROR, raw(HEADERS, 5, 1, b"\x80")),
}


@pytest.mark.parametrize("what", CONNECTION_ERRORS)
def test_it_ends_the_connection(what: str) -> None:
    code, bad = CONNECTION_ERRORS[what]
    peer = Peer()
    peer.say(bad)
    assert peer.connection_error() is code
    assert peer.connection.is_over
    assert peer.say(frames.ping(b"12345678", is_ack=False)) == []
    assert peer.heard() == []


@pytest.mark.parametrize("what", CONNECTION_ERRORS)
def test_it_ends_the_connection_when_it_comes_byte_by_byte(what: str) -> None:
    code, bad = CONNECTION_ERRORS[what]
    peer = Peer()
    for byte in bad:
        peer.say(bytes((byte,)))
    assert peer.connection_error() is code


def test_3_4_anything_but_the_preface_is_a_protocol_error() -> None:
    peer = Peer(greets=False)
    peer.say(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert peer.connection_error() is PROTOCOL


def test_3_4_anything_but_settings_first_is_a_protocol_error() -> None:
    peer = Peer(greets=False)
    peer.say(frames.PREFACE, frames.ping(b"12345678", is_ack=False))
    assert peer.connection_error() is PROTOCOL


def test_3_4_an_acknowledgement_first_is_a_protocol_error() -> None:
    peer = Peer(greets=False)
    peer.say(frames.PREFACE, SETTINGS_ACK)
    assert peer.connection_error() is PROTOCOL


def test_3_4_the_server_sends_settings_first_and_acknowledges_the_clients() -> None:
    peer = Peer(greets=False)
    for byte in GREETING:
        peer.say(bytes((byte,)))
    sent = peer.heard()
    assert (sent[0].kind, sent[0].flags) == (FrameType.SETTINGS, 0)
    announced = dict(frames.parse_settings(sent[0].payload))
    assert announced[Setting.MAX_CONCURRENT_STREAMS] == EdgeLimits().streams_max
    assert (sent[-1].kind, sent[-1].flags) == (FrameType.SETTINGS, frames.ACK)


IGNORED: dict[str, bytes] = {
    "4.1 unknown flags": raw(FrameType.PING, 0xFE, 0, b"12345678"),
    "4.1 the reserved bit of a stream": raw(FrameType.WINDOW_UPDATE, 0, 2**31, b"\0\0\0\1"),
    "5.5 an unknown frame": raw(0xEE, 0xFF, 7, b"whatever"),
    "6.3 a priority of an idle stream": raw(FrameType.PRIORITY, 0, 9, b"\0" * 5),
    "6.5.2 an unknown setting": setting(0xEEEE, 5),
    "6.7 an acknowledgement that nobody asked for": frames.ping(b"12345678", is_ack=True),
    "6.8 GOAWAY": frames.go_away(0, ErrorCode.NO_ERROR, b"debug"),
    "6.9 the reserved bit of an increment": raw(FrameType.WINDOW_UPDATE, 0, 0, b"\x80\0\0\1"),
}


@pytest.mark.parametrize("what", IGNORED)
def test_it_is_ignored(what: str) -> None:
    peer = Peer()
    peer.say(IGNORED[what])
    assert peer.connection_error() is None
    peer.open(1)
    assert isinstance(peer.events[-1], RequestReceived)


PRIORITY = b"\0\0\0\x03\x10"
REQUESTS: dict[str, bytes] = {
    "6.2 padding": raw(HEADERS, 0xD, 1, b"\x03" + BLOCK + b"\0" * 3),
    "6.2 padding of nothing": raw(HEADERS, 0xD, 1, b"\0" + BLOCK),
    "6.2 a priority": raw(HEADERS, 0x25, 1, PRIORITY + BLOCK),
    "6.2 a priority and padding": raw(HEADERS, 0x2D, 1, b"\x03" + PRIORITY + BLOCK + b"\0" * 3),
    "6.2 unknown flags": raw(HEADERS, 0x5 | 0xD2, 1, BLOCK),
    "6.10 a rest": raw(HEADERS, 1, 1, BLOCK[:3]) + raw(CONTINUATION, 4, 1, BLOCK[3:]),
    "6.10 a rest in pieces, one of them empty": b"".join(
        (
            raw(HEADERS, 1, 1, BLOCK[:3]),
            raw(CONTINUATION, 0, 1),
            raw(CONTINUATION, 0, 1, BLOCK[3:5]),
            raw(CONTINUATION, 4, 1, BLOCK[5:]),
        )
    ),
    "6.10 a rest of padded headers": raw(HEADERS, 9, 1, b"\x01" + BLOCK[:3] + b"\0")
    + raw(CONTINUATION, 0xC, 1, BLOCK[3:]),
    "6.10 only padding and priority before the rest": raw(
        HEADERS, 0x29, 1, b"\x01" + PRIORITY + b"\0"
    )
    + raw(CONTINUATION, 4, 1, BLOCK),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_may_come_so(what: str) -> None:
    peer = Peer()
    peer.say(REQUESTS[what])
    (received,) = peer.events
    assert isinstance(received, RequestReceived)
    assert received.ends
    assert [(b":path", received.request.path), *received.request.fields] == [
        field for field in REQUEST if field[0] in (b":path", b"content-type", b"te")
    ]


def test_6_2_trailers_may_be_padded_and_have_a_priority() -> None:
    peer = Peer()
    peer.open(1)
    block = peer.encoder.encode([(b"x", b"y")])
    peer.say(raw(HEADERS, 0x2D, 1, b"\x02" + PRIORITY + block + b"\0" * 2))
    assert peer.events[-1] == DataReceived(1, b"", ends=True)


def test_6_5_3_all_settings_are_acknowledged() -> None:
    peer = Peer()
    peer.say(settings(), setting(Setting.INITIAL_WINDOW_SIZE, 5), setting(0xEEEE, 1))
    assert peer.heard() == [Frame(FrameType.SETTINGS, frames.ACK, 0, b"")] * 3


def test_7541_4_4_a_field_larger_than_the_table_is_taken_and_empties_it() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(raw(HEADERS, 5, 1, b"\x40\x01x\x7f\x81\x1f" + b"y" * 4096))
    assert peer.events[-1] == DataReceived(1, b"", ends=True)
    peer.encoder = Encoder()  # One that starts from an empty table, too.
    peer.open(3)
    assert isinstance(peer.events[-1], RequestReceived)


def test_6_7_a_ping_is_answered_with_its_payload() -> None:
    peer = Peer()
    peer.say(frames.ping(b"abcdefgh", is_ack=False))
    (answer,) = peer.heard()
    assert (answer.kind, answer.flags, answer.payload) == (FrameType.PING, frames.ACK, b"abcdefgh")


# 5.1: streams.


def half_closed(peer: Peer) -> None:
    """Stream 1 waits for its answer."""
    peer.open(1, ends=True)


def reset_by_us(peer: Peer) -> None:
    """Stream 1 was reset by the server."""
    peer.open(1)
    peer.connection.reset(1, ErrorCode.CANCEL)
    peer.heard()


def reset_by_peer(peer: Peer) -> None:
    """Stream 1 was reset by the client."""
    peer.open(1)
    peer.say(frames.reset(1, ErrorCode.CANCEL))


def ended(peer: Peer) -> None:
    """Both sides of stream 1 have ended."""
    peer.open(1, ends=True)
    peer.connection.send_headers(1, [(b":status", b"200")], ends=True)
    peer.heard()


def test_5_1_data_on_a_half_closed_stream_is_a_stream_error() -> None:
    peer = Peer()
    half_closed(peer)
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: CLOSED}
    assert peer.lost() == [1]


def test_5_1_headers_on_a_half_closed_stream_are_a_stream_error() -> None:
    peer = Peer()
    half_closed(peer)
    peer.say(peer.headers(1, [(b"x", b"y")], ends=True))
    assert peer.resets() == {1: CLOSED}


@pytest.mark.parametrize("state", [half_closed, reset_by_us, reset_by_peer, ended])
def test_5_1_windows_resets_and_priorities_are_taken_in_every_later_state(
    state: Callable[[Peer], None],
) -> None:
    peer = Peer()
    state(peer)
    peer.say(
        frames.window_update(1, 5),
        raw(FrameType.PRIORITY, 0, 1, b"\0" * 5),
        frames.reset(1, ErrorCode.CANCEL),
    )
    assert peer.connection_error() is None
    assert not peer.connection.is_over


@pytest.mark.parametrize("state", [reset_by_peer, ended])
def test_5_1_data_on_a_closed_stream_is_a_stream_error_once(state: Callable[[Peer], None]) -> None:
    peer = Peer()
    state(peer)
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: CLOSED}
    peer.say(data(1, b"x"))
    assert peer.resets() == {}


@pytest.mark.parametrize("state", [reset_by_peer, ended])
def test_5_1_headers_on_a_closed_stream_end_the_connection(state: Callable[[Peer], None]) -> None:
    peer = Peer()
    state(peer)
    peer.say(peer.headers(1))
    assert peer.connection_error() is CLOSED


def test_5_1_what_was_on_its_way_to_a_stream_that_we_reset_is_ignored() -> None:
    peer = Peer()
    reset_by_us(peer)
    peer.say(data(1, b"x"), peer.headers(1, [(b"x", b"y")], ends=True))
    assert peer.heard() == []
    peer.open(3)  # Its headers were decoded: the tables still agree.
    assert isinstance(peer.events[-1], RequestReceived)


def refused(peer: Peer) -> None:
    """Stream 5 was refused as one too many."""
    peer.open(1, 3, 5)
    assert peer.resets() == {5: ErrorCode.REFUSED_STREAM}


def malformed(peer: Peer) -> None:
    """Stream 5 began with what is no request."""
    peer.open(1)
    peer.say(peer.headers(5, [(b"x", b"y")]))
    assert peer.resets() == {5: PROTOCOL}


def owed_a_body(peer: Peer) -> None:
    """Stream 5 ended before its body."""
    peer.open(1)
    peer.say(peer.headers(5, [*REQUEST, (b"content-length", b"1")], ends=True))
    assert peer.resets() == {5: PROTOCOL}


@pytest.mark.parametrize("state", [refused, malformed, owed_a_body])
def test_5_1_what_was_on_its_way_to_a_stream_that_never_opened_is_ignored(
    state: Callable[[Peer], None],
) -> None:
    peer = Peer(EdgeLimits(streams_max=2))
    state(peer)
    peer.say(
        data(5, b"x"),
        frames.window_update(5, 1),
        peer.headers(5, [(b"x", b"y")], ends=True),
        frames.reset(5, ErrorCode.CANCEL),
    )
    assert peer.heard() == []
    assert peer.lost() == []
    peer.say(data(1, b"x"))
    assert peer.events[-1] == DataReceived(1, b"x", ends=False)


def test_5_1_1_a_stream_below_one_that_was_opened_is_a_protocol_error() -> None:
    peer = Peer()
    peer.open(5)
    peer.say(peer.headers(3))
    assert peer.connection_error() is PROTOCOL


def test_5_1_2_streams_beyond_those_announced_are_refused_and_the_others_go_on() -> None:
    peer = Peer(EdgeLimits(streams_max=2))
    peer.open(1, 3, 5)
    assert peer.resets() == {5: ErrorCode.REFUSED_STREAM}
    peer.say(frames.reset(1, ErrorCode.CANCEL))
    peer.open(7)
    assert isinstance(peer.events[-1], RequestReceived)


def test_5_4_2_a_stream_error_leaves_the_connection_alone() -> None:
    peer = Peer()
    peer.open(1, 3)
    peer.say(frames.window_update(1, 0))
    assert peer.resets() == {1: PROTOCOL}
    peer.say(data(3, b"x"))
    assert peer.events[-1] == DataReceived(3, b"x", ends=False)


# 6.9: flow control.


def test_6_9_a_stream_window_that_overflows_is_a_stream_error() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(frames.window_update(1, 2**31 - 1))
    assert peer.resets() == {1: FLOW}
    assert peer.lost() == [1]


def test_6_9_2_a_setting_that_overflows_a_stream_window_ends_the_connection() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(frames.window_update(1, 2**31 - 1 - 65535))
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 65536))
    assert peer.connection_error() is FLOW


def test_6_5_3_a_window_that_overflows_does_so_although_a_smaller_one_follows() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(frames.window_update(1, 1))
    window = Setting.INITIAL_WINDOW_SIZE
    peer.say(settings((window, 2**31 - 1), (window, 65_535)))
    assert peer.connection_error() is FLOW


def test_6_5_3_no_more_is_sent_than_the_last_of_several_windows_takes() -> None:
    peer = Peer()
    window = Setting.INITIAL_WINDOW_SIZE
    peer.say(setting(window, 0))
    peer.open(1)
    peer.connection.send_data(1, b"x" * 100, now=0.0)
    peer.heard()
    peer.say(settings((window, 80), (window, 5), (window, 7)))
    assert [frame.payload for frame in peer.heard() if frame.kind == FrameType.DATA] == [b"x" * 7]
    peer.say(frames.window_update(1, 1))
    assert [frame.payload for frame in peer.heard()] == [b"x"]


def test_6_9_more_data_than_the_streams_window_is_a_stream_error() -> None:
    peer = Peer(EdgeLimits(stream_window=20_000))
    peer.open(1)
    peer.say(data(1, b"x" * 16_000), data(1, b"x" * 4000))
    assert peer.resets() == {}
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: FLOW}


def windows_given(peer: Peer, stream_id: int) -> int:
    """By how much the server has opened a window since it was last heard."""
    return sum(
        frames.parse_u32(frame.payload)
        for frame in peer.heard()
        if frame.kind == FrameType.WINDOW_UPDATE and frame.stream_id == stream_id
    )


def test_6_5_3_headers_that_settings_let_leave_follow_their_acknowledgement() -> None:
    """Compressed with the table that they tell of, of which the client is sure only then."""
    peer = Peer()
    peer.say(settings((Setting.HEADER_TABLE_SIZE, 0), (Setting.INITIAL_WINDOW_SIZE, 0)))
    peer.open(1)
    peer.connection.send_headers(1, [(b":status", b"200")])
    peer.connection.send_data(1, b"waits", peer.now)
    peer.connection.end(1, [(b"grpc-status", b"0")])
    peer.heard()
    peer.say(settings((Setting.HEADER_TABLE_SIZE, 4096), (Setting.INITIAL_WINDOW_SIZE, 100)))
    kinds = [frame.kind for frame in peer.heard()][:3]
    assert kinds == [FrameType.SETTINGS, FrameType.DATA, FrameType.HEADERS]


def test_6_9_3_a_client_that_has_not_seen_the_streams_window_may_fill_the_initial_one() -> None:
    peer = Peer(EdgeLimits(stream_window=1024), acknowledges=False)
    peer.open(1)
    peer.say(*[data(1, b"x" * 16_000)] * 4, data(1, b"x" * 1535))
    assert peer.resets() == {}
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: FLOW}


def test_6_9_2_a_window_that_the_acknowledgement_makes_negative_has_to_become_positive() -> None:
    peer = Peer(EdgeLimits(stream_window=1024), acknowledges=False)
    peer.open(1, 3)
    peer.say(data(1, b"x" * 2000), data(3, b"x" * 500), SETTINGS_ACK)
    assert peer.resets() == {}
    peer.connection.consumed(1, 1000)
    given = windows_given(peer, 1)
    assert given == 1000, "24 bytes of the window are left"
    peer.say(data(1, b"x" * 24))
    peer.say(data(3, b"x" * 524))
    peer.open(5)
    peer.say(data(5, b"x" * 1024))
    assert peer.resets() == {}
    for stream_id in (1, 3, 5):
        peer.say(data(stream_id, b"x"))
    assert peer.resets() == {1: FLOW, 3: FLOW, 5: FLOW}


def test_6_9_1_an_end_without_data_needs_no_window() -> None:
    peer = Peer(EdgeLimits(stream_window=1024), acknowledges=False)
    peer.open(1)
    peer.say(data(1, b"x" * 2000), SETTINGS_ACK, data(1, ends=True))
    assert peer.events[-1] == DataReceived(1, b"", ends=True)
    assert peer.resets() == {}


def test_6_9_2_what_was_consumed_before_the_acknowledgement_is_given_back_with_it() -> None:
    peer = Peer(EdgeLimits(stream_window=1024), acknowledges=False)
    peer.open(1)
    peer.open(3)
    for stream_id in (1, 3):
        peer.say(data(stream_id, b"x" * 16_000))
        peer.connection.consumed(stream_id, 16_000)
    peer.say(data(3, ends=True))
    assert peer.heard() == [], "it is not half of what it was"
    peer.say(SETTINGS_ACK)
    (update,) = peer.heard()
    assert (update.stream_id, frames.parse_u32(update.payload)) == (1, 16_000)
    peer.say(data(1, b"x" * 1024))
    assert peer.resets() == {}
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: FLOW}


def test_6_9_2_only_the_first_acknowledgement_changes_windows() -> None:
    peer = Peer(EdgeLimits(stream_window=1024))
    peer.open(1)
    peer.say(data(1, b"x" * 1000), SETTINGS_ACK, data(1, b"x" * 24))
    assert peer.resets() == {}
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: FLOW}


def test_6_9_2_a_larger_window_holds_from_the_start() -> None:
    peer = Peer(EdgeLimits(stream_window=100_000), acknowledges=False)
    peer.open(1)
    peer.say(*[data(1, b"x" * 10_000)] * 7, SETTINGS_ACK, *[data(1, b"x" * 10_000)] * 3)
    assert peer.resets() == {}
    peer.say(data(1, b"x"))
    assert peer.resets() == {1: FLOW}


def test_6_9_more_data_than_the_connections_window_ends_it() -> None:
    peer = Peer(EdgeLimits(stream_window=60_000, connection_window=65_535))
    peer.open(1, 3)
    for stream_id in (1, 3):
        peer.say(*[data(stream_id, b"x" * 10_000)] * 3)
    peer.say(data(1, b"x" * 5535))
    assert peer.connection_error() is None
    peer.say(data(3, b"x"))
    assert peer.connection_error() is FLOW


def test_6_9_1_padding_counts() -> None:
    peer = Peer(EdgeLimits(stream_window=10))
    peer.open(1)
    padded = raw(FrameType.DATA, frames.PADDED, 1, b"\x06" + b"xyz" + b"\0" * 6)
    peer.say(padded)
    assert peer.events[-1] == DataReceived(1, b"xyz", ends=False)
    peer.say(data(1, b"12345678"))
    assert peer.resets() == {1: FLOW}


def test_6_1_data_with_more_padding_than_payload_ends_the_connection() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(raw(FrameType.DATA, frames.PADDED, 1, b"\x04xyz"))
    assert peer.connection_error() is PROTOCOL


def test_6_9_windows_are_given_back_for_what_was_consumed() -> None:
    peer = Peer(EdgeLimits(stream_window=10_000, connection_window=65_535))
    peer.open(1)
    peer.say(data(1, b"x" * 6000))
    assert peer.heard() == []
    peer.connection.consumed(1, 6000)
    (update,) = peer.heard()
    assert (update.kind, update.stream_id) == (FrameType.WINDOW_UPDATE, 1)
    assert frames.parse_u32(update.payload) == 6000


def test_6_9_the_connections_window_comes_back_when_a_stream_is_closed() -> None:
    peer = Peer(EdgeLimits(stream_window=60_000, connection_window=65_535))
    given = 0
    for stream_id in range(1, 40, 2):
        peer.open(stream_id)
        peer.say(*[data(stream_id, b"x" * 10_000)] * 3, frames.reset(stream_id, ErrorCode.CANCEL))
        given += sum(
            frames.parse_u32(frame.payload)
            for frame in peer.heard()
            if frame.kind == FrameType.WINDOW_UPDATE and frame.stream_id == 0
        )
    assert not peer.connection.is_over
    assert given >= 20 * 30_000 - 65_535


def late(peer: Peer, stream_id: int) -> int:
    """Data for a stream that the client has reset."""
    peer.open(stream_id)
    peer.say(frames.reset(stream_id, ErrorCode.CANCEL), data(stream_id, b"x" * 9000))
    return 9000


def late_for_us(peer: Peer, stream_id: int) -> int:
    """Data for a stream that the server has reset."""
    peer.open(stream_id)
    peer.connection.reset(stream_id, ErrorCode.CANCEL)
    peer.say(data(stream_id, b"x" * 9000))
    return 9000


def after_the_end(peer: Peer, stream_id: int) -> int:
    """Data after the client's end."""
    peer.open(stream_id, ends=True)
    peer.say(data(stream_id, b"x" * 9000))
    return 9000


def never_opened(peer: Peer, stream_id: int) -> int:
    """Data for a request that was malformed."""
    peer.say(peer.headers(stream_id, [(b"x", b"y")]), data(stream_id, b"x" * 9000))
    return 9000


def above_the_window(peer: Peer, stream_id: int) -> int:
    """More data than the stream's window."""
    peer.open(stream_id)
    peer.say(data(stream_id, b"x" * 11_000))
    return 11_000


def above_the_length(peer: Peer, stream_id: int) -> int:
    """More data than was announced."""
    peer.say(peer.headers(stream_id, [*REQUEST, (b"content-length", b"1")]))
    peer.say(data(stream_id, b"x" * 9000))
    return 9000


def unread(peer: Peer, stream_id: int) -> int:
    """Data of which nobody had read when the stream was reset."""
    peer.open(stream_id)
    peer.say(data(stream_id, b"x" * 9000))
    peer.connection.reset(stream_id, ErrorCode.CANCEL)
    return 9000


def padding(peer: Peer, stream_id: int) -> int:
    """Padding, in 33 frames."""
    peer.open(stream_id)
    padded = raw(FrameType.DATA, frames.PADDED, stream_id, b"\xff" + b"\0" * 255)
    for _ in range(33):
        peer.say(padded)
    return 33 * 256


@pytest.mark.parametrize(
    "what",
    [
        late,
        late_for_us,
        after_the_end,
        never_opened,
        above_the_window,
        above_the_length,
        unread,
        padding,
    ],
)
def test_6_9_data_counts_for_the_connections_window_and_comes_back_to_it(
    what: Callable[[Peer, int], int],
) -> None:
    peer = Peer(EdgeLimits(stream_window=10_000, connection_window=65_535))
    said = given = 0
    for stream_id in range(1, 40, 2):
        said += what(peer, stream_id)
        given += windows_given(peer, 0)
        assert not peer.connection.is_over
        assert said - 65_535 // 2 - 1 <= given <= said


def test_6_9_1_padding_comes_back_to_the_streams_window_at_once() -> None:
    peer = Peer(EdgeLimits(stream_window=1000))
    peer.open(1)
    peer.say(*[raw(FrameType.DATA, frames.PADDED, 1, b"\xff" + b"x" + b"\0" * 255)] * 2)
    assert windows_given(peer, 1) == 2 * 256


def test_6_9_no_more_is_sent_than_the_windows_take() -> None:
    peer = Peer()
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 10))
    peer.open(1, 3)
    peer.heard()
    assert not peer.connection.send_data(1, b"a" * 25, now=0.0)
    assert peer.connection.send_data(3, b"b" * 10, now=0.0)
    assert [(f.stream_id, f.payload) for f in peer.heard()] == [(1, b"a" * 10), (3, b"b" * 10)]
    assert not peer.connection.has_room(3)
    peer.say(frames.window_update(1, 8))
    assert [frame.payload for frame in peer.heard()] == [b"a" * 8]
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 17))
    assert [frame.payload for frame in peer.heard() if frame.kind == FrameType.DATA] == [b"a" * 7]
    assert peer.connection.num_pending_bytes == 0


def test_6_9_2_a_window_made_negative_has_to_become_positive_first() -> None:
    peer = Peer()
    peer.open(1)
    peer.connection.send_data(1, b"x" * 60_000, now=0.0)
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
    peer.heard()
    peer.connection.send_data(1, b"y" * 10, now=0.0)
    peer.say(frames.window_update(1, 60_000))
    assert peer.heard() == []
    peer.say(frames.window_update(1, 4))
    assert [frame.payload for frame in peer.heard()] == [b"y" * 4]


def test_the_connections_window_is_shared_in_turns() -> None:
    peer = Peer()
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 1_000_000))
    peer.open(1, 3)
    peer.heard()
    for stream_id in (1, 3):
        peer.connection.send_data(stream_id, b"x" * 65_535, now=0.0)
    peer.heard()
    served: list[int] = []
    for _ in range(4):
        peer.say(frames.window_update(0, 10))
        served += [frame.stream_id for frame in peer.heard()]
    assert served == [3, 3, 3, 3]  # The first had all it had to send.
    peer.connection.send_data(1, b"x" * 50, now=0.0)
    for _ in range(4):
        peer.say(frames.window_update(0, 10))
        served += [frame.stream_id for frame in peer.heard()]
    assert served[4:] == [3, 1, 3, 1]


def test_who_asked_for_room_is_told_of_it() -> None:
    peer = Peer()
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
    peer.open(1)
    peer.connection.want_room(1, 0.0)
    assert not peer.connection.has_room(1)
    assert Writable(1) in peer.say(frames.window_update(1, 1))
    assert peer.connection.has_room(1)


def test_trailers_follow_what_is_pending() -> None:
    peer = Peer()
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 3))
    peer.open(1, ends=True)
    peer.connection.send_headers(1, [(b":status", b"200")])
    peer.connection.send_data(1, b"abcde", now=0.0)
    peer.connection.end(1, [(b"grpc-status", b"0")])
    assert [frame.kind for frame in peer.heard()][-2:] == [HEADERS, FrameType.DATA]
    peer.say(frames.window_update(1, 5))
    last, end = peer.heard()
    assert last.payload == b"de"
    assert (end.kind, end.flags) == (HEADERS, frames.END_STREAM | frames.END_HEADERS)
    assert peer.connection.num_streams == 0


def test_what_is_larger_than_a_frame_is_cut() -> None:
    peer = Peer()
    peer.open(1)
    peer.connection.send_data(1, b"x" * 40_000, now=0.0)
    assert [len(frame.payload) for frame in peer.heard()] == [16_384, 16_384, 7232]


def test_headers_larger_than_a_frame_are_continued() -> None:
    peer = Peer()
    peer.open(1, ends=True)
    value = bytes(range(33, 127)) * 300
    peer.connection.send_headers(1, [(b":status", b"200"), (b"x", value)], ends=True)
    first, *rest = peer.heard()
    assert first.flags == frames.END_STREAM
    assert [frame.kind for frame in rest] == [CONTINUATION] * len(rest)
    assert rest[-1].flags == frames.END_HEADERS
    whole = type(first)(HEADERS, 0, 1, first.payload + b"".join(frame.payload for frame in rest))
    assert peer.fields(whole)[1] == (b"x", value)


# 8: requests.


def changed(*, without: bytes = b"", **fields: bytes) -> Fields:
    """The request with other fields."""
    new = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    kept = [(n, v) for n, v in REQUEST if n != without and n.lstrip(b":") not in new]
    pseudo = {b"method", b"scheme", b"path", b"authority"}
    first = [(b":" + name, value) for name, value in new.items() if name in pseudo]
    return [*first, *kept, *((n, v) for n, v in new.items() if n not in pseudo)]


CONNECT: Fields = ((b":method", b"CONNECT"), (b":authority", b"there:443"))
MALFORMED: dict[str, Fields] = {
    "8.2.1 a name in capitals": [*REQUEST, (b"X-Y", b"z")],
    "8.2.1 a space in a name": [*REQUEST, (b"x y", b"z")],
    "8.2.1 a colon in a name": [*REQUEST, (b"x:y", b"z")],
    "8.2.1 an empty name": [*REQUEST, (b"", b"z")],
    "8.2.1 a byte above ASCII in a name": [*REQUEST, (b"x\xff", b"z")],
    "8.2.1 a zero in a value": [*REQUEST, (b"x", b"a\0b")],
    "8.2.1 a line feed in a value": [*REQUEST, (b"x", b"a\nb")],
    "8.2.1 a carriage return in a value": [*REQUEST, (b"x", b"a\rb")],
    "8.2.1 a space before a value": [*REQUEST, (b"x", b" a")],
    "8.2.1 a tab after a value": [*REQUEST, (b"x", b"a\t")],
    "8.2.1 DEL in a name": [*REQUEST, (b"x\x7f", b"z")],
    "8.2.1 a control character in a name": [*REQUEST, (b"x\x1f", b"z")],
    "8.2.1 a zero in a path": changed(path=b"/a\0b"),
    "8.2.1 a line feed in a method": changed(method=b"POST\n/"),
    "8.2.1 a carriage return in an authority": changed(authority=b"here\rthere"),
    "8.2.1 a space before a path": changed(path=b" /a"),
    "8.2.1 a tab after a scheme": changed(scheme=b"http\t"),
    "8.2.2 connection": [*REQUEST, (b"connection", b"close")],
    "8.2.2 keep-alive": [*REQUEST, (b"keep-alive", b"5")],
    "8.2.2 proxy-connection": [*REQUEST, (b"proxy-connection", b"x")],
    "8.2.2 transfer-encoding": [*REQUEST, (b"transfer-encoding", b"chunked")],
    "8.2.2 upgrade": [*REQUEST, (b"upgrade", b"h2c")],
    "8.2.2 te of something else": [*changed(without=b"te"), (b"te", b"gzip")],
    "8.3 an unknown pseudo-header field": [(b":extra", b"x"), *REQUEST],
    "8.3 a pseudo-header field of answers": [(b":status", b"200"), *REQUEST],
    "8.3 a pseudo-header field after another field": [*REQUEST[1:], REQUEST[0]],
    "8.3.1 no method": changed(without=b":method"),
    "8.3.1 no scheme": changed(without=b":scheme"),
    "8.3.1 no path": changed(without=b":path"),
    "8.3.1 an empty path": changed(path=b""),
    "8.3.1 two methods": [REQUEST[0], *REQUEST],
    "8.3.1 host against authority": [*REQUEST, (b"host", b"there")],
    "8.5 CONNECT with a scheme": [*CONNECT, (b":scheme", b"http")],
    "8.5 CONNECT with a path": [*CONNECT, (b":path", b"/")],
    "8.5 CONNECT to nowhere": CONNECT[:1],
    "8.1.1 a content-length that is none": [*REQUEST, (b"content-length", b"-1")],
    "8.1.1 two content-lengths": [*REQUEST, (b"content-length", b"1"), (b"content-length", b"2")],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_request_is_a_stream_error_and_never_seen(what: str) -> None:
    peer = Peer()
    peer.say(peer.headers(1, MALFORMED[what]))
    assert peer.resets() == {1: PROTOCOL}
    assert peer.events == []
    peer.open(3)
    assert isinstance(peer.events[-1], RequestReceived)


def test_8_5_connect_is_a_request_with_no_scheme_and_no_path() -> None:
    peer = Peer()
    peer.say(peer.headers(1, [*CONNECT, (b"x", b"y")]))
    (received,) = peer.events
    assert isinstance(received, RequestReceived)
    request = received.request
    assert (request.method, request.authority, request.path) == (b"CONNECT", b"there:443", b"")


@pytest.mark.parametrize(
    ("length", "parts"), [(b"5", [b"abc"]), (b"2", [b"a", b"bc"]), (b"0", [b"a"])]
)
def test_8_1_1_a_body_that_is_not_of_its_content_length_is_a_stream_error(
    length: bytes, parts: list[bytes]
) -> None:
    peer = Peer()
    peer.say(peer.headers(1, [*REQUEST, (b"content-length", length)]))
    for part in parts:
        peer.say(data(1, part, ends=part is parts[-1]))
    assert peer.resets() == {1: PROTOCOL}
    assert peer.lost() == [1]


def test_8_1_1_no_body_where_one_was_announced_is_a_stream_error() -> None:
    peer = Peer()
    peer.say(peer.headers(1, [*REQUEST, (b"content-length", b"5")], ends=True))
    assert peer.resets() == {1: PROTOCOL}


def test_8_1_1_trailers_before_the_end_of_an_announced_body_are_a_stream_error() -> None:
    peer = Peer()
    peer.say(peer.headers(1, [*REQUEST, (b"content-length", b"5")]), data(1, b"abc"))
    peer.say(peer.headers(1, [(b"x", b"y")], ends=True))
    assert peer.resets() == {1: PROTOCOL}
    assert peer.lost() == [1]


def test_8_1_trailers_after_an_announced_body_end_a_request() -> None:
    peer = Peer()
    peer.say(peer.headers(1, [*REQUEST, (b"content-length", b"3")]), data(1, b"abc"))
    peer.say(peer.headers(1, [(b"x", b"y")], ends=True))
    assert peer.events[-1] == DataReceived(1, b"", ends=True)


def test_8_1_trailers_end_a_request() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(data(1, b"x"), peer.headers(1, [(b"x", b"y")], ends=True))
    assert peer.events[-1] == DataReceived(1, b"", ends=True)


@pytest.mark.parametrize(
    ("fields", "ends"),
    [([(b"x", b"y")], False), ([(b":path", b"/")], True), ([(b"X", b"y")], True)],
)
def test_8_1_trailers_that_are_none_are_a_stream_error(fields: Fields, ends: bool) -> None:
    peer = Peer()
    peer.open(1)
    peer.say(peer.headers(1, fields, ends=ends))
    assert peer.resets() == {1: PROTOCOL}
    assert peer.lost() == [1]


def test_8_1_an_answer_that_is_complete_before_its_request_resets_it_without_error() -> None:
    peer = Peer()
    peer.open(1)
    peer.connection.send_headers(1, [(b":status", b"200")], ends=True)
    sent = peer.heard()
    assert [frame.kind for frame in sent] == [HEADERS, FrameType.RST_STREAM]
    assert frames.parse_u32(sent[-1].payload) == ErrorCode.NO_ERROR


def test_a_reset_of_the_client_is_an_event_with_its_code() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(frames.reset(1, ErrorCode.CANCEL))
    assert peer.events[-1] == StreamLost(1, ErrorCode.CANCEL, is_by_peer=True)
    assert peer.heard() == []


def test_7_an_unknown_error_code_is_taken_for_an_internal_error() -> None:
    peer = Peer()
    peer.open(1)
    peer.say(raw(FrameType.RST_STREAM, 0, 1, b"\xff" * 4))
    assert peer.events[-1] == StreamLost(1, ErrorCode.INTERNAL_ERROR, is_by_peer=True)


# 6.8: drains.


def go_aways(peer: Peer) -> list[int]:
    """Last streams that were named."""
    return [
        frames.parse_u32(frame.payload) for frame in peer.heard() if frame.kind == FrameType.GOAWAY
    ]


def test_6_8_a_drain_names_the_last_stream_when_the_client_has_heard_of_it() -> None:
    peer = Peer()
    peer.open(1, ends=True)
    peer.connection.drain(peer.now)
    first, ping = peer.heard()
    assert frames.parse_u32(first.payload) == 2**31 - 1
    peer.open(3, ends=True)  # It was on its way.
    assert isinstance(peer.events[-1], RequestReceived)
    peer.say(frames.ping(ping.payload, is_ack=True))
    assert go_aways(peer) == [3]
    num_events = len(peer.events)
    peer.open(5)
    peer.say(data(5, b"x"), frames.window_update(5, 1), frames.reset(5, ErrorCode.CANCEL))
    assert peer.heard() == []
    assert len(peer.events) == num_events
    assert not peer.connection.is_over
    for stream_id in (1, 3):
        peer.connection.send_headers(stream_id, [(b":status", b"200")], ends=True)
    assert peer.connection.is_over


def test_6_8_an_error_names_the_last_stream_that_was_opened() -> None:
    peer = Peer()
    peer.open(1, 7)
    peer.say(frames.reset(7, ErrorCode.CANCEL), data(0, b"x"))
    assert go_aways(peer) == [7]


def test_6_8_an_error_after_a_drain_names_no_later_stream_than_the_drain() -> None:
    peer = Peer()
    peer.open(1, 3)
    peer.connection.drain(peer.now)
    _, ping = peer.heard()
    peer.say(frames.ping(ping.payload, is_ack=True))
    peer.open(5)
    peer.say(data(0, b"x"))
    assert go_aways(peer) == [3, 3]


def test_6_8_data_beyond_a_drain_comes_back_to_the_connections_window() -> None:
    peer = Peer(EdgeLimits(connection_window=65_535))
    peer.open(1)
    peer.connection.drain(peer.now)
    _, ping = peer.heard()
    peer.say(frames.ping(ping.payload, is_ack=True))
    peer.say(peer.headers(3), *[data(3, b"x" * 10_000)] * 4)
    assert windows_given(peer, 0) == 40_000


def test_5_1_beyond_a_drain_too_no_stream_of_the_server_may_be_reset() -> None:
    peer = Peer()
    peer.open(1)
    peer.connection.drain(peer.now)
    _, ping = peer.heard()
    peer.say(frames.ping(ping.payload, is_ack=True), frames.reset(4, ErrorCode.CANCEL))
    assert peer.connection_error() is PROTOCOL


def test_6_8_a_drain_does_not_wait_for_a_client_that_does_not_answer() -> None:
    peer = Peer()
    peer.connection.drain(peer.now)
    peer.heard()
    peer.wait(1.0)
    assert go_aways(peer) == [0]
    assert peer.connection.is_over


def test_what_comes_after_the_end_of_a_drain_is_not_answered() -> None:
    peer = Peer()
    peer.connection.drain(peer.now)
    _, ping = peer.heard()
    more = frames.ping(b"12345678", is_ack=False)
    peer.say(frames.ping(ping.payload, is_ack=True), more)
    assert [frame.kind for frame in peer.heard()] == [FrameType.GOAWAY]


# RFC 7541, as the server compresses.


def answers(peer: Peer, *values: bytes, since: int = 1) -> list[Frame]:
    """The header sections of as many answers, on streams since that, each with its value."""
    found: list[Frame] = []
    for stream_id, value in zip(range(since, 2**31, 2), values, strict=False):
        peer.open(stream_id, ends=True)
        peer.connection.send_headers(stream_id, [(b":status", b"200"), (b"x", value)], ends=True)
        found += [frame for frame in peer.heard() if frame.kind == HEADERS]
    return found


def test_the_clients_table_size_bounds_what_answers_are_compressed_with() -> None:
    peer = Peer()
    peer.say(setting(Setting.HEADER_TABLE_SIZE, 0))
    peer.decoder.max_allowed_table_size = 0
    for frame in answers(peer, b"y", b"y"):
        assert peer.fields(frame)[-1] == (b"x", b"y")


SIZE_UPDATES: dict[str, tuple[list[bytes], bytes]] = {
    "smaller and back": (
        [settings((Setting.HEADER_TABLE_SIZE, 0), (Setting.HEADER_TABLE_SIZE, 4096))],
        b"\x20\x3f\xe1\x1f",
    ),
    "smaller and back in two frames": (
        [setting(Setting.HEADER_TABLE_SIZE, 0), setting(Setting.HEADER_TABLE_SIZE, 4096)],
        b"\x20\x3f\xe1\x1f",
    ),
    "the same twice": ([setting(Setting.HEADER_TABLE_SIZE, 0)] * 2, b"\x20"),
    "the least and the last of many": (
        [setting(Setting.HEADER_TABLE_SIZE, size) for size in (30, 100, 1, 9, 2, 7, 5)],
        b"\x21\x25",
    ),
    "what it is": ([setting(Setting.HEADER_TABLE_SIZE, 4096)], b""),
    "more than we keep": ([setting(Setting.HEADER_TABLE_SIZE, 2**32 - 1)], b""),
}


@pytest.mark.parametrize("what", SIZE_UPDATES)
def test_7541_4_2_the_next_block_says_the_least_and_the_last_size_of_the_table(what: str) -> None:
    said, update = SIZE_UPDATES[what]
    peer = Peer()
    (first,) = answers(peer, b"y")
    peer.say(*said)
    second, third = answers(peer, b"y", b"y", since=3)
    assert second.payload.startswith(update)
    assert not third.payload.startswith(update or b"\x20")
    # Whoever obeys his own words at once finds what he is sent in the table that he has then.
    for frame in (first, second, third):
        if frame is second:
            for part in said:
                for name, value in frames.parse_settings(part[frames.HEADER_BYTES :]):
                    assert name == Setting.HEADER_TABLE_SIZE
                    peer.decoder.header_table_size = min(value, 4096)
        assert peer.fields(frame) == [(b":status", b"200"), (b"x", b"y")]


def test_what_is_kept_to_compress_answers_is_bounded_however_much_a_client_would_keep() -> None:
    peer = Peer()
    peer.say(setting(Setting.HEADER_TABLE_SIZE, 2**32 - 1))
    large = [b"%d" % number * 300 for number in range(10, 30)]
    again = answers(peer, *large, large[0])[-1]
    assert len(again.payload) > 100, "the first of them is forgotten"
