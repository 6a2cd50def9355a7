"""The channel between clients and the memory service."""

import socket
import time
from collections.abc import Generator

import pytest

from unbroken.memory import channel

_LONG_S = 30.0


@pytest.fixture
def ends() -> Generator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_looking_out_ends_with_what_comes_and_takes_nothing_of_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    theirs.send(b"news")
    begun = time.monotonic()
    channel.look_out(ours, _LONG_S)
    assert time.monotonic() - begun < _LONG_S / 2
    assert ours.recv(16) == b"news"


def test_looking_out_ends_with_the_connection(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.close()
    begun = time.monotonic()
    channel.look_out(ours, _LONG_S)
    assert time.monotonic() - begun < _LONG_S / 2


def test_looking_out_ends_by_itself_where_nothing_comes(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, _ = ends
    ours.setblocking(True)
    channel.look_out(ours, 0.001)
    with pytest.raises(BlockingIOError):
        ours.recv(1, socket.MSG_DONTWAIT)
