"""Clients that never read, never close, or never say who they are, on real sockets.

What the kernels of both sides take and tell is part of each claim.
"""

import asyncio
import gzip
import os
import socket
import ssl
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.edge.peer import GREETING, REQUEST, data, setting
from tests.frontend.edge.raw import RawClient, connect
from tests.frontend.edge.test_server import NATIVE, metric
from tests.frontend.fakes import FakeSidecar
from tests.frontend.worlds import World, run, world
from unbroken.config import split_address
from unbroken.edge import server as edge_server
from unbroken.edge.native import NativeEdge
from unbroken.edge.server import ClientConnection
from unbroken.http2 import frames
from unbroken.http2.frames import FrameType, Setting
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb

WIDE = setting(Setting.INITIAL_WINDOW_SIZE, 2**31 - 1) + frames.window_update(0, 2**30)
"""Windows that never stop anything."""
PONG = frames.ping(b"12345678", is_ack=True)
BROKEN = frames.window_update(0, 0)
"""Ends the connection, with a farewell."""
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The beginning of what a TLS client says first."""
TAKEN_BYTES_MAX = 256 * 1024
"""As docs/decisions/edge.md promises."""
PATIENT: dict[str, Any] = {**NATIVE, "edge_unsent_bytes_max": 1 << 26}
"""For tests with clients that read nothing."""


def edge_of(it: World) -> NativeEdge:
    assert it.frontend.edge is not None
    return it.frontend.edge


def limits_hit(it: World, limit: str) -> float:
    return metric(it.frontend, "edge_limits_total", limit=limit)


def request(max_tokens: int) -> pb.GenerateRequest:
    made = pb.GenerateRequest(token_ids=pb.TokenIds(ids=b"once upon a time"))
    made.params.stopping.max_tokens = max_tokens
    return made


def client_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    return context


class Client(RawClient):
    """Reads nothing more, once its buffers are full, before a test does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.reader = reader
        self.writer = writer


@asynccontextmanager
async def greeted(it: World, certificates: Path | None = None) -> AsyncGenerator[Client]:
    """A client that has greeted and been greeted; over TLS with the certificates."""
    host, port = split_address(it.frontend.address)
    context = None if certificates is None else client_tls(certificates)
    client = Client(*await asyncio.open_connection(host, port, ssl=context))
    try:
        client.say(GREETING, WIDE)
        await client.frames_until(FrameType.SETTINGS)
        yield client
    finally:
        client.writer.transport.abort()


def the_one(it: World) -> ClientConnection:
    """Of the frontend, the only connection there is."""
    (one,) = edge_of(it).clients
    return one


async def fill(it: World) -> ClientConnection:
    """Write to the only connection what its kernels take, and a little more."""
    one = the_one(it)
    async with asyncio.timeout(5):
        while not one.is_paused:
            one.send_later(bytes(1 << 16))
            await asyncio.sleep(0.001)  # The kernels take what they can.
    return one


# A socket that is not read.


@pytest.mark.parametrize("is_tls", [False, True])
def test_who_reads_nothing_is_cut_off_though_he_gives_signs_of_life(
    certificates: Path, *, is_tls: bool
) -> None:
    async def scenario() -> None:
        settings: dict[str, Any] = {
            **PATIENT,
            "client_ping_interval_s": 0.5,
            "client_ping_timeout_s": 1.0,
            "edge_stall_timeout_s": 0.5,
            **(tls_settings(certificates) if is_tls else {}),
        }
        async with world(FakeSidecar("w1", step_s=None), **settings) as it:
            async with greeted(it, certificates if is_tls else None) as client:
                client.generate(1, request(10))
                await it.until(lambda: it.num_running() == 1)
                await fill(it)

                def is_gone() -> bool:
                    client.say(PONG)
                    return not edge_of(it).clients

                await it.until(is_gone)
                await it.until(lambda: it.num_running() == 0)
            assert limits_hit(it, "stall") == 1
            assert limits_hit(it, "silence") == 0

    run(scenario())


@pytest.mark.parametrize("is_tls", [False, True])
def test_who_reads_slowly_is_not_and_once_he_stops_he_is(
    certificates: Path, *, is_tls: bool
) -> None:
    async def scenario() -> None:
        settings = {**PATIENT, "edge_stall_timeout_s": 60.0, "edge_ping_idle_interval_s": 3600}
        tls = tls_settings(certificates) if is_tls else {}
        async with (
            world(**settings, **tls) as it,
            greeted(it, certificates if is_tls else None) as client,
        ):
            one = the_one(it)
            now = one.edge.clock()
            one.edge.clock = lambda: now
            was_paused: list[bool] = []
            for _ in range(5):
                await fill(it)
                taken = one._acknowledged()  # pyright: ignore[reportPrivateUsage]
                # So little that the kernel here does not ask for more.
                await client.reader.readexactly(1 << 18)
                await it.until(
                    lambda taken=taken: (
                        one._acknowledged() > taken  # pyright: ignore[reportPrivateUsage]
                    )
                )
                was_paused.append(one.is_paused)
                now += 60.1
                one._look()  # pyright: ignore[reportPrivateUsage]
                assert limits_hit(it, "stall") == 0
            assert any(was_paused)
            await fill(it)

            def is_cut_off() -> bool:
                nonlocal now
                now += 60.1
                one._look()  # pyright: ignore[reportPrivateUsage]
                return limits_hit(it, "stall") == 1

            await it.until(is_cut_off)
            await it.until(lambda: not edge_of(it).clients)

    run(scenario())


def test_nothing_is_taken_from_calls_once_256_kib_wait_in_the_socket() -> None:
    async def scenario() -> None:
        settings: dict[str, Any] = {"window_tokens": 64, **PATIENT}
        async with world(FakeSidecar("w1"), **settings) as it, greeted(it) as client:
            one = the_one(it)
            transport = one._transport  # pyright: ignore[reportPrivateUsage]
            assert transport is not None
            while (size := transport.get_write_buffer_size()) < TAKEN_BYTES_MAX - 20_000:
                one.send_later(bytes(1 << 16 if size == 0 else 1 << 13))
                await asyncio.sleep(0.001)  # The kernel takes what it can.
            assert not one.is_paused
            streams = range(1, 40, 2)
            for stream_id in streams:
                client.generate(stream_id, request(1000))
            await it.until(lambda: one.is_paused)
            size = transport.get_write_buffer_size()
            # What one step says of all streams may be above it.
            assert TAKEN_BYTES_MAX < size < TAKEN_BYTES_MAX + len(streams) * 64 * 50

            def num_waiting() -> list[int]:
                infos, _ = it.frontend.requests.page(0, "")
                (choices,) = zip(*(info.choices for info in infos), strict=True)
                return [choice.num_tokens - choice.num_tokens_sent for choice in choices]

            await it.until(lambda: min(num_waiting()) >= 32)  # It stays in ledgers.
            assert transport.get_write_buffer_size() == size

    run(scenario())


# Farewells.


@pytest.mark.parametrize("is_tls", [False, True])
def test_who_does_not_read_the_farewell_is_closed_in_the_end(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, *, is_tls: bool
) -> None:
    monkeypatch.setattr(edge_server, "CLOSE_S", 0.2)

    async def scenario() -> None:
        tls = tls_settings(certificates) if is_tls else {}
        async with (
            world(**PATIENT, **tls) as it,
            greeted(it, certificates if is_tls else None) as client,
        ):
            await fill(it)
            client.say(BROKEN)
            await it.until(lambda: edge_of(it).leaving)
            await it.until(lambda: not edge_of(it).leaving)
            assert limits_hit(it, "farewell") == 1

    run(scenario())


def test_who_says_no_more_and_reads_nothing_is_closed_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge_server, "CLOSE_S", 0.2)

    async def scenario() -> None:
        async with world(**PATIENT) as it, greeted(it) as client:
            await fill(it)
            client.writer.write_eof()
            await it.until(lambda: not edge_of(it).clients)
            assert limits_hit(it, "farewell") == 1

    run(scenario())


def test_who_cuts_off_tls_and_reads_nothing_is_given_up_too(certificates: Path) -> None:
    async def scenario() -> None:
        settings = {**PATIENT, "edge_stall_timeout_s": 0.5, **tls_settings(certificates)}
        async with world(**settings) as it, greeted(it, certificates) as client:
            await fill(it)
            plain = client.writer.get_extra_info("socket")
            with socket.socket(fileno=os.dup(plain.fileno())) as ours:
                ours.shutdown(socket.SHUT_WR)  # Of which no protocol above TLS is told.
            await it.until(lambda: not edge_of(it).clients)
            assert limits_hit(it, "stall") == 1

    run(scenario())


def test_who_closes_when_he_is_told_has_gone_beyond_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge_server, "CLOSE_S", 60.0)

    async def scenario() -> None:
        async with world(**PATIENT) as it:
            edge = edge_of(it)
            async with greeted(it) as told, greeted(it) as leaves:
                both = list(edge.clients)
                told.say(BROKEN)
                await told.until_closed()
                told.writer.close()
                leaves.writer.write_eof()
                await leaves.until_closed()
            await it.until(lambda: not edge.clients and not edge.leaving)
            ends = [one._farewell for one in both]  # pyright: ignore[reportPrivateUsage]
            assert len(ends) == 2
            assert all(end is not None and end.cancelled() for end in ends)

    run(scenario())


def test_who_goes_on_speaking_after_the_farewell_is_closed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge_server, "CLOSE_S", 60.0)
    monkeypatch.setattr(edge_server, "IGNORED_BYTES_MAX", 1 << 20)

    async def scenario() -> None:
        async with world(**PATIENT) as it, greeted(it) as client:
            client.say(BROKEN)
            await client.until_closed()
            client.say(bytes(1 << 20))
            await client.writer.drain()
            assert edge_of(it).leaving
            client.say(b"\0")
            await it.until(lambda: not edge_of(it).leaving)
            assert limits_hit(it, "farewell") == 1

    run(scenario())


def test_who_is_leaving_has_his_place_until_he_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_server, "CLOSE_S", 60.0)

    async def scenario() -> None:
        async with world(edge_connections_max=1, **PATIENT) as it:
            async with greeted(it) as client:
                client.say(BROKEN)
                await client.until_closed()
                assert not edge_of(it).clients
                async with connect(it.frontend.address) as second:
                    assert await second.until_closed() == []
                assert limits_hit(it, "connections") == 1
            await it.until(lambda: not edge_of(it).leaving)
            async with greeted(it):
                assert limits_hit(it, "connections") == 1

    run(scenario())


# Handshakes of TLS.


def test_who_shakes_no_hands_has_a_place_and_those_beyond_are_closed_at_once(
    certificates: Path,
) -> None:
    async def scenario() -> None:
        settings: dict[str, Any] = {
            **NATIVE,
            "edge_connections_max": 3,
            "edge_handshake_timeout_s": 60,
            **tls_settings(certificates),
        }
        async with world(**settings) as it, AsyncExitStack() as stack:
            address = it.frontend.address
            for said in (b"", b"\x16", HALF_A_HELLO):
                client = await stack.enter_async_context(connect(address, greets=False))
                client.say(said)
            await it.until(lambda: metric(it.frontend, "edge_connections") == 3)
            async with connect(address, greets=False) as fourth:
                assert await fourth.until_closed() == []
            assert limits_hit(it, "connections") == 1
            await stack.aclose()
            await it.until(lambda: metric(it.frontend, "edge_connections") == 0)
            async with greeted(it, certificates), greeted(it, certificates):
                assert metric(it.frontend, "edge_connections") == 2
            assert limits_hit(it, "handshake") == 0, "who leaves has gone beyond nothing"
            failed = metric(it.frontend, "edge_connections_failed_total", code="TLS")
            assert failed == 0

    run(scenario())


@pytest.mark.parametrize("said", [b"", HALF_A_HELLO])
@pytest.mark.parametrize("way", ["accepted here", "taken"])
def test_who_does_not_end_the_handshake_in_time_is_closed_and_counted(
    certificates: Path, said: bytes, way: str
) -> None:
    async def scenario() -> None:
        settings = {**NATIVE, "edge_handshake_timeout_s": 0.3, **tls_settings(certificates)}
        async with world(**settings) as it:
            if way == "taken":
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    ours = socket.create_connection(listener.getsockname())
                    taken = await edge_of(it).take(listener.accept()[0])
                reader, writer = await asyncio.open_connection(sock=ours)
                client = RawClient(reader, writer)
                client.say(said)
                assert await client.until_closed() == []
                writer.close()
                await taken.closed
            else:
                async with connect(it.frontend.address, greets=False) as client:
                    client.say(said)
                    assert await client.until_closed() == []
            await it.until(lambda: metric(it.frontend, "edge_connections") == 0)
            assert limits_hit(it, "handshake") == 1
            assert not edge_of(it).clients

    run(scenario())


def test_tls_and_the_greeting_after_it_have_that_time_together(certificates: Path) -> None:
    async def scenario() -> None:
        settings = {**NATIVE, "edge_handshake_timeout_s": 1.0, **tls_settings(certificates)}
        async with world(**settings) as it:
            host, port = split_address(it.frontend.address)
            context = client_tls(certificates)
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            told = await RawClient(reader, writer).until_closed()
            assert told[-1].kind == FrameType.GOAWAY
            writer.close()
            assert limits_hit(it, "handshake") == 1

    run(scenario())


def test_a_handshake_that_fails_is_counted_and_its_place_is_free(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(**NATIVE, **tls_settings(certificates)) as it:
            async with connect(it.frontend.address, greets=False) as client:
                client.say(b"GET / HTTP/1.1\r\n\r\n")
                await client.until_closed()
            await it.until(lambda: metric(it.frontend, "edge_connections") == 0)
            assert metric(it.frontend, "edge_connections_failed_total", code="TLS") == 1
            assert limits_hit(it, "handshake") == 0

    run(scenario())


def test_a_stop_waits_for_no_handshake_and_takes_no_more(certificates: Path) -> None:
    async def scenario() -> None:
        settings = {**NATIVE, "edge_handshake_timeout_s": 60, **tls_settings(certificates)}
        async with world(**settings) as it:
            async with connect(it.frontend.address, greets=False) as client:
                await it.until(lambda: edge_of(it).clients)
                await edge_of(it).stop()
                assert await client.until_closed() == []
            await it.until(lambda: not edge_of(it).clients)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*split_address(it.frontend.address))

    run(scenario())


def test_who_shakes_hands_during_a_drain_is_told_of_it_then(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(**NATIVE, **tls_settings(certificates)) as it:
            host, port = split_address(it.frontend.address)
            reader, writer = await asyncio.open_connection(host, port)
            await it.until(lambda: edge_of(it).clients)
            edge_of(it).drain()
            await writer.start_tls(client_tls(certificates), server_hostname=host)
            client = RawClient(reader, writer)
            client.say(GREETING)
            told = await client.frames_until(FrameType.GOAWAY)
            assert told[-1].kind == FrameType.GOAWAY
            writer.close()

    run(scenario())


# Requests that are too large.

BOMB = gzip.compress(bytes(2_000_000), mtime=0)
TOO_LARGE = {
    "request_bytes": (b"8", PREFIX.pack(0, 1_000_001)),
    "request_bytes, unpacked": (b"8", PREFIX.pack(1, len(BOMB)) + BOMB),
    "held_bytes": (b"8", PREFIX.pack(0, 900_000) + bytes(15_000)),
    "none, but malformed": (b"13", PREFIX.pack(2, 0)),
}
"""Status and body."""


@pytest.mark.parametrize("what", TOO_LARGE)
def test_requests_beyond_their_limits_are_counted(what: str) -> None:
    code, body = TOO_LARGE[what]

    async def scenario() -> None:
        settings = {**NATIVE, "edge_request_bytes_max": 1_000_000, "edge_held_bytes_max": 10_000}
        async with world(**settings) as it, connect(it.frontend.address) as client:
            client.request(1, [*REQUEST, (b"grpc-encoding", b"gzip")])
            client.say(data(1, body))
            assert (await client.answer(1))[b"grpc-status"] == code
            for limit in ("request_bytes", "held_bytes"):
                assert limits_hit(it, limit) == (limit == what.split(",")[0])

    run(scenario())
