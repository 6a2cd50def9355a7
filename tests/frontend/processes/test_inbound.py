"""Connections that a parent hands over, and what it is told of them."""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

import uvloop

from frontend.processes.child import CLOSED, Inbound


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario

    uvloop.run(limited())


def pair() -> tuple[socket.socket, Inbound]:
    """The parent's end, and the process's, with little room between them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    ours.setblocking(False)
    return ours, Inbound(theirs.detach())


async def hear(ours: socket.socket) -> None:
    assert await asyncio.get_running_loop().sock_recv(ours, len(CLOSED)) == CLOSED


def test_a_parent_learns_of_every_end_however_many_come_at_once() -> None:
    async def scenario() -> None:
        ends: list[asyncio.Future[None]] = []

        async def take(connection: socket.socket) -> asyncio.Future[None]:
            connection.close()
            ends.append(asyncio.get_running_loop().create_future())
            return ends[-1]

        ours, inbound = pair()
        with ours:
            inbound.start(take)
            num = 100
            for _ in range(num):
                connection, other = socket.socketpair()
                with connection, other:
                    while True:
                        try:
                            socket.send_fds(ours, [b"connection"], [connection.fileno()])
                            break
                        except BlockingIOError:
                            await asyncio.sleep(0.001)
            while len(ends) < num:  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.001)
            for end in ends:
                end.set_result(None)
            await asyncio.sleep(0)
            for _ in range(num):
                await hear(ours)
            await inbound.stop()

    run(scenario())


def test_a_connection_that_is_lost_on_its_way_is_not_counted_for_ever() -> None:
    async def scenario() -> None:
        async def take(_: socket.socket) -> asyncio.Future[None]:
            raise AssertionError("there is none")

        ours, inbound = pair()
        with ours:
            inbound.start(take)
            ours.send(b"connection")  # As one that finds no room for a descriptor.
            await hear(ours)
            await inbound.stop()

    run(scenario())
