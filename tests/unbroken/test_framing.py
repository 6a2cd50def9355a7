"""Claims of `unbroken.framing`, each over a real Unix socket."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from unbroken import framing
from unbroken.framing import Connection
from unbroken.v1 import attempt_pb2, engine_pb2

Frame = engine_pb2.EngineResponse
TIMEOUT_S = 10


def frame(sequence: int, num_tokens: int = 0) -> Frame:
    return Frame(frame=attempt_pb2.StepFrame(sequence=sequence, token_ids=[2**31] * num_tokens))


def encoded(message: Frame) -> bytes:
    data = message.SerializeToString()
    return struct.pack("<I", len(data)) + data


def with_connections(
    scenario: Callable[[Connection[Frame], Connection[Frame]], Awaitable[None]],
    path: Path,
    *,
    message_bytes_max: int = framing.MESSAGE_BYTES_MAX,
) -> None:
    """Run `scenario(client, server)` with the two ends of one connection."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[Connection[Frame]] = loop.create_future()
        socket = str(path / "s")
        server = await framing.serve_unix(
            socket, Frame, accepted.set_result, message_bytes_max=message_bytes_max
        )
        client = await framing.connect_unix(socket, Frame)
        inbound = await accepted
        try:
            await scenario(client, inbound)
        finally:
            client.abort()
            inbound.abort()
            await client.wait_closed()
            await inbound.wait_closed()
            server.close()
            await server.wait_closed()

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))


def with_raw_client(
    scenario: Callable[[asyncio.StreamWriter, Connection[Frame]], Awaitable[None]], path: Path
) -> None:
    """Run `scenario` with a client that may write any bytes."""

    async def run() -> None:
        accepted: asyncio.Future[Connection[Frame]] = asyncio.get_running_loop().create_future()
        socket = str(path / "s")
        server = await framing.serve_unix(socket, Frame, accepted.set_result)
        _, writer = await asyncio.open_unix_connection(socket)
        inbound = await accepted
        try:
            await scenario(writer, inbound)
        finally:
            writer.close()
            inbound.abort()
            await inbound.wait_closed()
            server.close()
            await server.wait_closed()

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))


async def received(connection: Connection[Frame], count: int) -> list[Frame]:
    messages: list[Frame] = []
    while len(messages) < count:
        batch = await connection.receive()
        assert batch, "the stream ended early"
        messages += batch
    return messages


def test_messages_arrive_whole_and_in_order_both_ways(tmp_path: Path) -> None:
    async def scenario(client: Connection[Frame], server: Connection[Frame]) -> None:
        sent = [frame(i, num_tokens=i * 7 % 50) for i in range(300)]
        client.send_all(sent)
        server.send(frame(999))
        assert await received(server, 300) == sent
        assert await received(client, 1) == [frame(999)]

    with_connections(scenario, tmp_path)


def test_one_wake_up_takes_everything_that_has_arrived(tmp_path: Path) -> None:
    async def scenario(client: Connection[Frame], server: Connection[Frame]) -> None:
        client.send_all(frame(i) for i in range(50))
        assert len(await server.receive()) == 50

    with_connections(scenario, tmp_path)


def test_a_message_may_come_byte_by_byte(tmp_path: Path) -> None:
    async def scenario(writer: asyncio.StreamWriter, server: Connection[Frame]) -> None:
        for byte in encoded(frame(1, 3)) + encoded(Frame()):
            writer.write(bytes([byte]))
            await writer.drain()
        assert await received(server, 2) == [frame(1, 3), Frame()]

    with_raw_client(scenario, tmp_path)


def test_a_closed_stream_is_an_empty_batch_after_everything_sent(tmp_path: Path) -> None:
    async def scenario(client: Connection[Frame], server: Connection[Frame]) -> None:
        client.send(frame(1))
        client.close()
        assert await received(server, 1) == [frame(1)]
        assert await server.receive() == []
        assert await server.receive() == []

    with_connections(scenario, tmp_path)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_stream_that_ends_within_a_message_is_truncated(tmp_path: Path, cut: int) -> None:
    async def scenario(writer: asyncio.StreamWriter, server: Connection[Frame]) -> None:
        writer.write(encoded(frame(1)) + encoded(frame(2, 5))[:cut])
        writer.close()
        assert await received(server, 1) == [frame(1)]
        with pytest.raises(framing.MessageTruncated):
            await server.receive()

    with_raw_client(scenario, tmp_path)


def test_an_announced_size_above_the_limit_ends_the_connection_at_once(tmp_path: Path) -> None:
    async def scenario(writer: asyncio.StreamWriter, server: Connection[Frame]) -> None:
        writer.write(encoded(frame(1)) + struct.pack("<I", framing.MESSAGE_BYTES_MAX + 1))
        assert await received(server, 1) == [frame(1)]
        with pytest.raises(framing.MessageTooLarge, match="at most 16777216 bytes, got 16777217"):
            await server.receive()
        await server.wait_closed()

    with_raw_client(scenario, tmp_path)


def test_bytes_that_are_no_message_end_the_connection(tmp_path: Path) -> None:
    async def scenario(writer: asyncio.StreamWriter, server: Connection[Frame]) -> None:
        writer.write(struct.pack("<I", 5) + b"\xff" * 5)
        with pytest.raises(framing.MessageUndecodable):
            await server.receive()
        await server.wait_closed()

    with_raw_client(scenario, tmp_path)


def test_a_sender_is_told_of_a_message_the_peer_would_refuse(tmp_path: Path) -> None:
    async def scenario(_client: Connection[Frame], server: Connection[Frame]) -> None:
        with pytest.raises(framing.MessageTooLarge):
            server.send(frame(1, num_tokens=100))
        server.send(frame(2))  # The connection lives on.
        assert await received(_client, 1) == [frame(2)]

    with_connections(scenario, tmp_path, message_bytes_max=64)


def test_a_slow_reader_slows_the_sender_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario(client: Connection[Frame], server: Connection[Frame]) -> None:
        big = frame(1, num_tokens=100_000)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < 200:
                client.send(big)
                sent += 1
                await client.drain()

        sender = asyncio.create_task(send())
        # Nothing is read: the sender comes to rest when all buffers are full.
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert 0 < sent < 100
        assert await received(server, 200) == [big] * 200
        await sender

    with_connections(scenario, tmp_path)


def test_a_sender_does_not_wait_for_a_peer_that_is_gone(tmp_path: Path) -> None:
    async def scenario(client: Connection[Frame], server: Connection[Frame]) -> None:
        big = frame(1, num_tokens=1_000_000)
        for _ in range(5):
            client.send(big)
        drain = asyncio.create_task(client.drain())
        await asyncio.sleep(0)
        assert not drain.done()
        server.abort()
        await drain
        client.send(big)  # Nobody is there; nothing happens.

    with_connections(scenario, tmp_path)
