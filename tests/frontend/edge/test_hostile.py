"""Each attack that is known by name, and the bound that it meets."""

from collections.abc import Callable
from typing import Final

import pytest

from tests.frontend.edge.peer import REQUEST, Peer, data, setting
from unbroken.http2 import frames
from unbroken.http2.connection import CLOSED_REMEMBERED, LimitHit, RequestReceived, Writable
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.headers import Fields
from unbroken.http2.limits import EdgeLimits

CALM = ErrorCode.ENHANCE_YOUR_CALM


def assert_calmed(peer: Peer, limit: str) -> None:
    """The connection was ended for that limit."""
    assert peer.connection_error() is CALM
    assert LimitHit(limit) in peer.events


def say_until_over(peer: Peer, *parts: bytes, at_most: int) -> int:
    """Repeat it; how often it was taken."""
    for count in range(at_most):
        peer.say(*parts)
        if peer.connection.is_over:
            return count
    raise AssertionError(f"said {at_most} times without end")


# CVE-2023-44487: open and reset, again and again. CVE-2025-8671 and 2019-9514: have it reset.

OF_ONE_BYTE: Fields = [*REQUEST, (b"content-length", b"1")]
RESETS: dict[str, Callable[[Peer, int], tuple[bytes, ...]]] = {
    "by the client": lambda peer, stream_id: (
        peer.headers(stream_id),
        frames.reset(stream_id, ErrorCode.CANCEL),
    ),
    "a window update of 0": lambda peer, stream_id: (
        peer.headers(stream_id),
        frames.window_update(stream_id, 0),
    ),
    "a window that overflows": lambda peer, stream_id: (
        peer.headers(stream_id),
        frames.window_update(stream_id, 2**31 - 1),
    ),
    "more data than the window": lambda peer, stream_id: (
        peer.headers(stream_id),
        *[data(stream_id, b"x" * 16_384)] * 4,
    ),
    "data after the end": lambda peer, stream_id: (
        peer.headers(stream_id, ends=True),
        data(stream_id, b"x"),
    ),
    "headers after the end": lambda peer, stream_id: (
        peer.headers(stream_id, ends=True),
        peer.headers(stream_id, [(b"x", b"y")], ends=True),
    ),
    "trailers without an end": lambda peer, stream_id: (
        peer.headers(stream_id),
        peer.headers(stream_id, [(b"x", b"y")]),
    ),
    "malformed trailers": lambda peer, stream_id: (
        peer.headers(stream_id),
        peer.headers(stream_id, [(b"X", b"y")], ends=True),
    ),
    "a body longer than announced": lambda peer, stream_id: (
        peer.headers(stream_id, OF_ONE_BYTE),
        data(stream_id, b"xx"),
    ),
    "a body shorter than announced": lambda peer, stream_id: (
        peer.headers(stream_id, OF_ONE_BYTE),
        data(stream_id, ends=True),
    ),
    "no body where one was announced": lambda peer, stream_id: (
        peer.headers(stream_id, OF_ONE_BYTE, ends=True),
    ),
    "a malformed request": lambda peer, stream_id: (
        peer.headers(stream_id, [*REQUEST, (b"X", b"y")]),
    ),
}
NEVER_OPENED: Final = {"no body where one was announced", "a malformed request"}


@pytest.mark.parametrize("how", RESETS)
def test_streams_that_are_reset_end_at_the_burst(how: str) -> None:
    peer = Peer(EdgeLimits(stream_window=65_535, resets_burst=50, resets_per_s=10))
    for number in range(60):
        peer.say(*RESETS[how](peer, 2 * number + 1))
    assert_calmed(peer, "resets")
    num_opened = sum(isinstance(event, RequestReceived) for event in peer.events)
    assert num_opened == (0 if how in NEVER_OPENED else 51)


@pytest.mark.parametrize("how", RESETS)
def test_a_client_that_errs_now_and_then_is_borne_for_ever(how: str) -> None:
    peer = Peer(EdgeLimits(stream_window=65_535, resets_burst=50, resets_per_s=10))
    for number in range(200):
        peer.wait(0.11)
        peer.say(*RESETS[how](peer, 2 * number + 1))
    assert not peer.connection.is_over


def test_what_is_cut_off_because_of_time_is_no_reset_of_the_client() -> None:
    peer = Peer(EdgeLimits(request_timeout_s=5, resets_burst=1, resets_per_s=0))
    ids = range(1, 40, 2)
    peer.open(*ids)
    for stream_id in ids:
        peer.connection.expect_end(stream_id, peer.now)
    for _ in range(6):
        peer.wait(1.0)
        peer.say(data(1, b"x"))  # It is alive.
    assert peer.lost() == list(ids)
    assert not peer.connection.is_over


def test_a_client_may_take_back_all_that_it_has_open() -> None:
    limits = EdgeLimits()
    peer = Peer(limits)
    ids = range(1, 2 * limits.streams_max, 2)
    peer.say(*(peer.headers(stream_id) for stream_id in ids))
    peer.say(*(frames.reset(stream_id, ErrorCode.CANCEL) for stream_id in ids))
    assert not peer.connection.is_over
    assert peer.connection.num_streams == 0


def test_streams_opened_beyond_the_limit_without_end_end_it() -> None:
    peer = Peer(EdgeLimits(streams_max=1, control_burst=100, control_per_s=1))
    for number in range(200):
        peer.say(peer.headers(2 * number + 1))
    assert_calmed(peer, "control")
    assert LimitHit("streams") in peer.events


# CVE-2024-27316: headers without end.


def test_a_continuation_flood_ends_at_the_number_of_frames() -> None:
    peer = Peer()
    peer.say(frames.frame(FrameType.HEADERS, 0, 1, b"\x82"))
    taken = say_until_over(peer, frames.frame(FrameType.CONTINUATION, 0, 1), at_most=50)
    assert taken < EdgeLimits().header_frames_max
    assert_calmed(peer, "header_frames")


def test_a_continuation_flood_ends_at_the_number_of_bytes() -> None:
    peer = Peer()
    peer.say(frames.frame(FrameType.HEADERS, 0, 1, b"\x82"))
    taken = say_until_over(
        peer, frames.frame(FrameType.CONTINUATION, 0, 1, b"\x82" * 16_000), at_most=50
    )
    assert taken < 5
    assert_calmed(peer, "header_bytes")


def too_large(peer: Peer, stream_id: int) -> bytes:
    """A header section above the limit."""
    return peer.headers(stream_id, [*REQUEST, *((b"x%d" % n, b"y" * 100) for n in range(120))])


def test_a_header_list_above_the_limit_is_known_and_the_connection_lives() -> None:
    peer = Peer()
    peer.say(too_large(peer, 1))
    (received,) = (event for event in peer.events if isinstance(event, RequestReceived))
    assert received.is_too_large
    peer.open(3)
    received = peer.events[-1]
    assert isinstance(received, RequestReceived)
    assert not received.is_too_large


def test_header_lists_above_the_limit_cost_more_than_other_frames() -> None:
    peer = Peer(EdgeLimits(control_burst=1000, control_per_s=0))
    for number in range(11):
        peer.say(too_large(peer, 2 * number + 1))
    assert_calmed(peer, "control")


def test_a_header_bomb_is_not_unpacked() -> None:
    peer = Peer()
    # A field of 4,000 bytes, and then a byte for each of its copies.
    value = b"\x40\x01a\x7f" + bytes(((4000 - 127) & 0x7F | 0x80, (4000 - 127) >> 7)) + b"v" * 4000
    peer.say(frames.headers(1, value + b"\xbe" * 10_000, ends=True))
    assert_calmed(peer, "header_bytes")


# CVE-2019-9512, 9515, 9517, 9518 and their kin.

FLOODS = {
    "ping": (frames.ping(b"12345678", is_ack=False), "control"),
    "ping acknowledgements": (frames.ping(b"12345678", is_ack=True), "control"),
    "settings": (frames.settings({}), "settings"),
    "settings acknowledgements": (
        frames.frame(FrameType.SETTINGS, frames.ACK, 0),
        "settings",
    ),
    "window toggle": (
        setting(Setting.INITIAL_WINDOW_SIZE, 0) + setting(Setting.INITIAL_WINDOW_SIZE, 1),
        "settings",
    ),
    "priority": (frames.frame(FrameType.PRIORITY, 0, 9, b"\0" * 5), "control"),
    "unknown frames": (b"\0\0\0\xee\0\0\0\0\0", "control"),
    "empty data": (data(1), "control"),
    "small windows": (frames.window_update(1, 1), "control"),
    "small windows of the connection": (frames.window_update(0, 1), "control"),
    "goaway": (frames.go_away(0, ErrorCode.NO_ERROR), "control"),
    "resets of a closed stream": (frames.reset(3, ErrorCode.CANCEL), "control"),
    "data for a closed stream": (data(3, b"x"), "control"),
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_ends_at_the_burst(what: str) -> None:
    flood, limit = FLOODS[what]
    peer = Peer(EdgeLimits(control_burst=100, control_per_s=1))
    peer.open(1, 3)
    peer.say(frames.reset(3, ErrorCode.CANCEL))
    sent = len(peer.connection.outbound)
    taken = say_until_over(peer, flood, at_most=200)
    assert taken <= 100
    assert len(peer.connection.outbound) < sent + 100 * 30
    assert_calmed(peer, limit)


def test_who_is_sent_much_may_acknowledge_much() -> None:
    peer = Peer(EdgeLimits(control_burst=10, control_per_s=0))
    peer.open(1)
    for _ in range(1000):
        assert peer.connection.send_data(1, b"x" * 40, now=0.0)
        peer.say(
            frames.window_update(1, 40),
            frames.window_update(0, 40),
            frames.ping(b"12345678", is_ack=False),
        )
    assert not peer.connection.is_over


# Windows that are played with.


def test_a_client_that_opens_no_window_is_cut_off_and_what_waited_is_let_go() -> None:
    peer = Peer(EdgeLimits(stall_timeout_s=5, ping_interval_s=100, ping_idle_interval_s=100))
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
    peer.open(1)
    peer.connection.send_data(1, b"x" * 1000, now=0.0)
    peer.wait(4.9)
    assert peer.lost() == []
    peer.wait(0.2)
    assert peer.lost() == [1]
    assert LimitHit("stall") in peer.events
    assert peer.connection.num_pending_bytes == 0


def test_a_client_that_takes_a_byte_now_and_then_is_slow_not_stalled() -> None:
    peer = Peer(EdgeLimits(stall_timeout_s=5, ping_interval_s=100, ping_idle_interval_s=100))
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
    peer.open(1)
    peer.connection.send_data(1, b"x" * 10, now=0.0)
    for _ in range(10):
        peer.wait(4)
        peer.say(frames.window_update(1, 1))
    assert peer.lost() == []
    assert peer.connection.num_pending_bytes == 0


def test_a_stream_whose_call_waits_for_room_in_vain_is_cut_off_too() -> None:
    peer = Peer(EdgeLimits(stall_timeout_s=5, ping_interval_s=100, ping_idle_interval_s=100))
    peer.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
    peer.open(1)
    peer.connection.want_room(1, 0.0)
    assert Writable(1) not in peer.events
    peer.wait(5.1)
    assert peer.lost() == [1]


# Slow loris and half-open connections.


def test_who_does_not_greet_in_time_is_closed() -> None:
    peer = Peer(greets=False)
    peer.say(frames.PREFACE[:10])
    peer.wait(EdgeLimits().handshake_timeout_s + 0.1)
    assert peer.connection_error() is ErrorCode.SETTINGS_TIMEOUT
    assert LimitHit("handshake") in peer.events


@pytest.mark.parametrize(
    "start",
    [
        frames.frame(FrameType.HEADERS, 0, 1, b"\x82"),
        frames.frame(FrameType.HEADERS, 4, 1, b"\x82" * 100)[:50],
        b"\0",
    ],
    ids=["header block", "frame", "frame header"],
)
def test_what_does_not_come_to_its_end_in_time_ends_the_connection(start: bytes) -> None:
    peer = Peer()
    peer.say(start)
    for _ in range(9):
        peer.wait(1.0)
        assert not peer.connection.is_over
        peer.say(b"")  # It is alive.
    peer.wait(1.1)
    assert_calmed(peer, "header")


def test_a_request_that_dribbles_is_cut_off_in_time() -> None:
    limits = EdgeLimits(request_timeout_s=30)
    peer = Peer(limits)
    peer.open(1, 3)
    peer.connection.expect_end(1, peer.now)
    for _ in range(31):
        peer.wait(1.0)
        peer.say(data(1, b"x"))
        if peer.lost():
            break
    assert peer.now == pytest.approx(30, abs=1.1)  # pyright: ignore[reportUnknownMemberType]
    assert peer.lost() == [1]
    assert LimitHit("request") in peer.events


def test_a_silent_client_with_streams_is_gone_after_two_and_a_half_seconds() -> None:
    peer = Peer()
    peer.open(1)
    peer.wait(1.0)
    assert [frame.kind for frame in peer.heard()] == [FrameType.PING]
    peer.wait(1.4)
    assert not peer.connection.is_over
    peer.wait(0.2)
    assert peer.connection.is_over
    assert LimitHit("silence") in peer.events


def test_a_client_that_answers_lives() -> None:
    peer = Peer()
    peer.open(1)
    for _ in range(100):
        peer.wait(2.0)
        for frame in peer.heard():
            peer.say(frames.ping(frame.payload, is_ack=True))
    assert not peer.connection.is_over


def test_an_idle_connection_is_asked_less_often() -> None:
    peer = Peer()
    peer.wait(9.9)
    assert peer.heard() == []
    peer.wait(0.2)
    assert [frame.kind for frame in peer.heard()] == [FrameType.PING]


def test_among_many_connections_each_is_asked_less_often() -> None:
    peer = Peer()
    peer.open(1)
    peer.connection.ping_interval_min_s = 5.0
    peer.wait(4.9)
    assert peer.heard() == []
    peer.wait(0.2)
    assert [frame.kind for frame in peer.heard()] == [FrameType.PING]


def test_who_looks_late_gives_the_answer_another_chance() -> None:
    peer = Peer()
    peer.open(1)
    peer.wait(1.0)
    late = peer.connection.handle_timeout(peer.now + 30)  # We stood still, not the client.
    assert late == []
    assert not peer.connection.is_over
    peer.now += 30
    peer.wait(1.0)
    assert peer.connection.is_over


# Memory.


def test_what_is_remembered_of_closed_streams_is_bounded() -> None:
    peer = Peer()
    for number in range(2 * CLOSED_REMEMBERED):
        peer.open(2 * number + 1, ends=True)
        peer.connection.send_headers(2 * number + 1, [(b":status", b"200")], ends=True)
        peer.heard()
    peer.connection.check()
    assert not peer.connection.is_over
