"""What goes to the socket of a client, and when; the socket is the test."""

import asyncio
import math
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from tests.frontend.edge.peer import GREETING
from unbroken.edge.server import (
    LOOK_GRAIN_S,
    UNWRITTEN_BYTES_MAX,
    ClientConnection,
    EdgeServer,
)
from unbroken.http2 import frames
from unbroken.http2.limits import EdgeLimits
from unbroken.recurring import TIMER_S_MIN, nap, naps

FRAMES = frames.data_header(1, 5) + b"hello"


class Socket:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.num_unsent = 0
        self.num_acknowledged = 0
        self.is_aborted = False
        self.protocol = asyncio.Protocol()
        self._high = 0
        self._is_full = False

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 0
        self._high = high

    def write(self, data: bytes) -> None:
        assert not self.is_aborted
        self.written.append(bytes(data))
        if self.num_unsent > self._high and not self._is_full:
            self._is_full = True
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.num_unsent

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_extra_info(self, name: str) -> "Socket":
        assert name == "socket"
        return self

    def fileno(self) -> int:
        return 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return (bytes(120) + self.num_acknowledged.to_bytes(8, sys.byteorder))[:size]

    def abort(self) -> None:
        self.is_aborted = True


class Observer:
    """Counts limits that were hit."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    def edge_connected(self, num_more: int) -> None:
        assert abs(num_more) == 1

    def edge_limit_hit(self, limit: str) -> None:
        self.hits.append(limit)

    def edge_connection_failed(self, code: str) -> None:
        raise AssertionError(code)


class World:
    """One client that has greeted and been greeted."""

    def __init__(self, limits: EdgeLimits | None = None) -> None:
        self.now = 100.0
        self.observer = Observer()
        self.server = EdgeServer(
            {},
            cast("Any", None),
            limits or EdgeLimits(),
            self.observer,
            services=(),
            clock=lambda: self.now,
        )
        self.socket = Socket()
        self.client = ClientConnection(self.server)
        self.socket.protocol = self.client
        self.client.connection_made(cast("Any", self.socket))
        self.client.data_received(GREETING)
        self.socket.written.clear()

    def send(self, data: bytes = FRAMES, num_bytes: int = 5, *, is_all: bool = True) -> bool:
        return self.client.send_frames(data, 1, num_bytes, is_all=is_all)


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(scenario())


def test_frames_that_are_all_of_a_turn_are_written_at_once() -> None:
    async def scenario() -> None:
        world = World()
        world.send()
        assert world.socket.written == [FRAMES]
        await asyncio.sleep(0)
        assert world.socket.written == [FRAMES]

    run(scenario)


def test_others_are_written_with_what_follows_and_after_what_was_there() -> None:
    async def scenario() -> None:
        world = World()
        ping = frames.ping(b"01234567", is_ack=True)
        world.client.connection.outbound += ping
        world.send()  # Not before that.
        world.send(is_all=False)
        assert world.socket.written == []
        await asyncio.sleep(0)
        assert world.socket.written == [ping + FRAMES + FRAMES]

    run(scenario)


def test_naps_end_when_all_has_been_written() -> None:
    async def scenario() -> None:
        world = World()
        world.send(is_all=False)
        await nap(0.0)  # It is seen whether something was done since.
        ended_at = naps()._ended_at  # pyright: ignore[reportPrivateUsage]
        assert ended_at > -math.inf

    run(scenario)


@pytest.mark.parametrize("num_more", [0, 1])
def test_frames_are_taken_from_the_connections_window(num_more: int) -> None:
    async def scenario() -> None:
        world = World()
        assert world.send()
        large = frames.data_header(1, 0)  # Whatever is in it: its sender says how much.
        left = frames.WINDOW_DEFAULT - 5
        assert world.send(large, left + num_more) == (num_more == 0)
        assert world.client.connection.send_window.left == (left if num_more else 0)
        assert world.socket.written == ([FRAMES] if num_more else [FRAMES, large])

    run(scenario)


def test_a_client_that_is_behind_is_sent_nothing() -> None:
    async def scenario() -> None:
        world = World()
        world.client.pause_writing()
        assert not world.send()
        world.client.resume_writing()
        world.client.connection.outbound += bytes(UNWRITTEN_BYTES_MAX)
        assert world.send()
        assert not world.send(), "now there is more than that"
        assert world.client.connection.send_window.left == frames.WINDOW_DEFAULT - 5
        await asyncio.sleep(0)
        assert world.socket.written == [bytes(UNWRITTEN_BYTES_MAX) + FRAMES]

    run(scenario)


class Alone:
    """Who sends on the only stream of a connection."""

    def __init__(self, world: World) -> None:
        self.connection = world.client.connection
        self.connection.ride = self
        self.has_stepped_out = False

    def settle(self) -> None:
        raise AssertionError("nobody asks")

    def step_out(self) -> None:
        self.has_stepped_out = True
        self.connection.ride = None


def test_who_sends_alone_is_written_at_once_or_after_what_waits() -> None:
    async def scenario() -> None:
        world = World()
        ping = frames.ping(b"01234567", is_ack=True)
        world.client.connection.outbound += ping
        world.client.send_now(FRAMES)
        assert world.socket.written == [FRAMES]
        assert not world.server.is_scheduled
        world.client.send_later(FRAMES)
        assert world.server.is_scheduled
        await asyncio.sleep(0)
        assert world.socket.written == [FRAMES, ping + FRAMES]

    run(scenario)


def test_who_sends_alone_stops_when_the_socket_is_full() -> None:
    async def scenario() -> None:
        world = World()
        alone = Alone(world)
        world.client.send_now(FRAMES)
        assert not alone.has_stepped_out
        world.socket.num_unsent = 1 << 30
        world.client.send_now(FRAMES)
        assert world.client.is_paused
        assert alone.has_stepped_out

    run(scenario)


def test_a_socket_that_is_closing_is_sent_nothing() -> None:
    async def scenario() -> None:
        world = World()
        world.client.abort()
        world.send()
        assert world.socket.written == []

    run(scenario)


@pytest.mark.parametrize("is_all", [True, False])
def test_who_leaves_too_much_in_the_socket_is_cut_off(*, is_all: bool) -> None:
    async def scenario() -> None:
        world = World(EdgeLimits(unsent_bytes_max=1000))
        world.socket.num_unsent = 1000
        world.send(is_all=is_all)
        await asyncio.sleep(0)
        assert not world.socket.is_aborted
        world.socket.num_unsent = 1001
        world.send(is_all=is_all)
        await asyncio.sleep(0)
        assert world.socket.is_aborted
        assert world.observer.hits == ["unsent_bytes"]
        world.send(is_all=is_all)
        await asyncio.sleep(0)
        assert world.socket.written == [FRAMES, FRAMES], "nothing more is"

    run(scenario)


def look(world: World, wait_s: float) -> None:
    """Time passes, in which the client says something all the time."""
    world.now += wait_s
    world.client.data_received(frames.ping(b"12345678", is_ack=True))
    world.client._look()  # pyright: ignore[reportPrivateUsage]


def test_a_client_that_takes_nothing_of_a_full_socket_is_cut_off_whatever_it_says() -> None:
    async def scenario() -> None:
        world = World(EdgeLimits(stall_timeout_s=60))
        world.client.pause_writing()
        look(world, 59.9)
        assert not world.socket.is_aborted
        look(world, 0.2)
        assert world.socket.is_aborted
        assert world.observer.hits == ["stall"]

    run(scenario)


def test_a_client_that_takes_little_of_a_full_socket_is_not() -> None:
    async def scenario() -> None:
        world = World(EdgeLimits(stall_timeout_s=60))
        world.client.pause_writing()
        for _ in range(10):
            world.socket.num_acknowledged += 1
            world.socket.num_unsent += 1000  # What others write meanwhile.
            look(world, 60.1)
        assert not world.socket.is_aborted
        world.client.resume_writing()
        look(world, 60.1)
        look(world, 60.1)
        assert not world.socket.is_aborted, "it is not full any more"
        world.client.pause_writing()
        look(world, 59.9)
        assert not world.socket.is_aborted, "it is full since then"
        look(world, 0.2)
        assert world.socket.is_aborted

    run(scenario)


def noted_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """After how many seconds each timer is to fire from now on; none does."""
    loop = asyncio.get_running_loop()
    waits: list[float] = []

    def noted(delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        waits.append(delay)
        return asyncio.TimerHandle(loop.time() + delay, callback, (), loop)

    monkeypatch.setattr(loop, "call_later", noted)
    return waits


def test_who_stops_taking_is_looked_at_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        waits = noted_waits(monkeypatch)
        world = World(EdgeLimits(stall_timeout_s=0.5))
        world.client.pause_writing()
        assert 0.5 <= waits[-1] <= 0.5 + 2 * LOOK_GRAIN_S

    run(scenario)


@pytest.mark.parametrize("began_at", [100.0, 100.0034, 100.0099999])
def test_connections_are_looked_at_together_and_none_again_at_once(
    began_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        waits = noted_waits(monkeypatch)
        limits = EdgeLimits(handshake_timeout_s=1.0)
        world = World(limits)
        world.now = began_at
        client = ClientConnection(world.server)
        client.connection_made(cast("Any", Socket()))
        looks_at = began_at + waits[-1]
        assert began_at + 1.0 <= looks_at + 1e-9
        assert looks_at < began_at + 1.0 + LOOK_GRAIN_S + 1e-9
        assert abs(looks_at / LOOK_GRAIN_S - round(looks_at / LOOK_GRAIN_S)) < 1e-6
        world.now = began_at + 1.0 - TIMER_S_MIN / 4  # A timer that was early.
        client._look()  # pyright: ignore[reportPrivateUsage]
        assert waits[-1] >= TIMER_S_MIN

    run(scenario)
