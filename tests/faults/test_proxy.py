"""Every toxic does what its name says, in its direction only."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop

from unbroken.chaos.proxy import (
    HELD_BYTES_MAX,
    Bandwidth,
    Direction,
    Latency,
    LimitData,
    Proxy,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
)

UP, DOWN = Direction.UPSTREAM, Direction.DOWNSTREAM
LIMIT_S = 10.0
BLOCKED_S = 0.1


@dataclass
class Ends:
    """A client, a server, and the proxy between."""

    proxy: Proxy
    client: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    server: asyncio.StreamReader
    to_client: asyncio.StreamWriter

    async def sent_up(self, data: bytes) -> bytes:
        self.to_server.write(data)
        return await self.server.readexactly(len(data))

    async def sent_down(self, data: bytes) -> bytes:
        self.to_client.write(data)
        return await self.client.readexactly(len(data))


@asynccontextmanager
async def ends() -> AsyncGenerator[Ends]:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    listener = await asyncio.start_server(lambda r, w: accepted.put_nowait((r, w)), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with Proxy(f"127.0.0.1:{port}") as proxy:
        host, _, proxy_port = proxy.address.rpartition(":")
        client, to_server = await asyncio.open_connection(host, int(proxy_port))
        server, to_client = await accepted.get()
        while not proxy.num_open:  # noqa: ASYNC110 - The server may know before the proxy.
            await asyncio.sleep(0)
        try:
            yield Ends(proxy, client, to_server, server, to_client)
        finally:
            to_server.close()
            to_client.close()
            listener.close()


def run(scenario: Callable[[Ends], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S), ends() as both:
            await scenario(both)

    uvloop.run(limited())


async def timed(work: Coroutine[Any, Any, Any]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work
    return loop.time() - began


async def blocked(work: Coroutine[Any, Any, bytes]) -> bool:
    """Whether nothing comes although there is time."""
    try:
        async with asyncio.timeout(BLOCKED_S):
            await work
    except TimeoutError:
        return True
    return False


def test_without_toxics_everything_passes() -> None:
    async def scenario(ends: Ends) -> None:
        data = bytes(range(256)) * 4096
        up, down = await asyncio.gather(ends.sent_up(data), ends.sent_down(data[::-1]))
        assert up == data
        assert down == data[::-1]
        assert ends.proxy.traffic[UP].bytes_delivered == len(data)
        assert ends.proxy.traffic[DOWN].bytes_held == 0

    run(scenario)


def test_latency_delays_its_direction_and_keeps_the_order() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Latency(0.1, jitter_s=0.05), DOWN)
        assert await timed(ends.sent_up(b"x")) < 0.05
        assert await timed(ends.sent_down(b"x")) >= 0.05

        async def sending() -> None:
            for number in range(50):
                ends.to_client.write(bytes([number]))
                await ends.to_client.drain()
                await asyncio.sleep(0)

        received, _ = await asyncio.gather(ends.client.readexactly(50), sending())
        assert received == bytes(range(50))

    run(scenario)


def test_bandwidth_is_bytes_a_second() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Bandwidth(100_000), UP)
        assert await timed(ends.sent_up(bytes(20_000))) >= 0.18
        assert await timed(ends.sent_down(bytes(20_000))) < 0.1

    run(scenario)


def test_a_blackhole_swallows_one_way_and_heals() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Timeout(), UP)
        ends.to_server.write(b"lost?")
        assert await blocked(ends.server.readexactly(5))
        assert ends.proxy.traffic[UP].bytes_held == 5
        assert await ends.sent_down(b"fine") == b"fine"
        ends.proxy.clear()
        assert await ends.server.readexactly(5) == b"lost?"

    run(scenario)


def test_a_blackhole_applies_to_new_connections_and_bounds_what_it_holds() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Timeout())
        assert await blocked(ends.sent_down(b"x"))

        async def flood() -> bytes:
            while True:
                ends.to_server.write(bytes(HELD_BYTES_MAX))
                await ends.to_server.drain()

        assert await blocked(flood())
        assert 0 < ends.proxy.traffic[UP].bytes_held <= 2 * HELD_BYTES_MAX

    run(scenario)


def test_a_timeout_closes_the_connection() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Timeout(0.05), DOWN)
        assert await ends.client.read() == b""
        assert await ends.server.read() == b""

    run(scenario)


async def is_reset(reader: asyncio.StreamReader) -> bool:
    try:
        await reader.read()
    except ConnectionResetError:
        return True
    return False


def test_a_reset_is_seen_as_such_on_both_sides() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(ResetPeer())
        assert await is_reset(ends.client)
        assert await is_reset(ends.server)
        assert ends.proxy.num_reset == 1
        while ends.proxy.num_open:  # noqa: ASYNC110 - Nothing announces it.
            await asyncio.sleep(0)

    run(scenario)


@pytest.mark.parametrize("side", [UP, DOWN])
def test_a_reset_of_one_side_leaves_the_other_open_and_silent(side: Direction) -> None:
    async def scenario(ends: Ends) -> None:
        assert ends.proxy.reset(side) == 1
        hit, other = (ends.server, ends.client) if side is UP else (ends.client, ends.server)
        assert await is_reset(hit)
        assert await blocked(other.read())

    run(scenario)


def test_a_slicer_cuts_into_pieces() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(Slicer(size_average=10, size_variation=5, delay_s=0.005), UP)
        data = bytes(range(100))
        assert await timed(ends.sent_up(data)) >= 0.03
        assert await ends.sent_up(data) == data

    run(scenario)


def test_a_limit_of_data_closes_when_it_is_reached() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(LimitData(10), DOWN)
        ends.to_client.write(bytes(25))
        assert await ends.client.read() == bytes(10)

    run(scenario)


def test_a_slow_close_keeps_the_other_side_open() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.add(SlowClose(0.15), UP)
        ends.to_server.write_eof()
        assert await timed(ends.server.read()) >= 0.14

    run(scenario)


def test_a_server_that_is_not_there_refuses_through_the_proxy() -> None:
    async def scenario(ends: Ends) -> None:
        ends.proxy.upstream = "127.0.0.1:1"
        host, _, port = ends.proxy.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await is_reset(reader)
        writer.close()

    run(scenario)


def test_a_proxy_can_refuse_and_listen_again_and_what_is_open_stays() -> None:
    async def scenario(ends: Ends) -> None:
        host, _, port = ends.proxy.address.rpartition(":")
        ends.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))
        assert await ends.sent_up(b"still there") == b"still there"
        await ends.proxy.start()
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()

    run(scenario)
