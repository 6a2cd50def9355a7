"""Calls over our own HTTP/2: against gRPC's own server, and against servers that behave badly."""

import asyncio
import gc
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from google.protobuf.descriptor_pb2 import UninterpretedOption
from google.protobuf.message import EncodeError
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health_pb2

from tests.unbroken.calls.raw import ANSWER, Accepted, RawServer, raw_server
from unbroken.calls import channel as channel_module
from unbroken.calls.channel import LARGE_BYTES, LIMITS, UNREAD_MAX, Answers, Channel
from unbroken.errors import Reason, UnbrokenError
from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.status import ErrorInterceptor, from_rpc_error
from unbroken.transport import (
    MESH_KEEPALIVE,
    RECEIVE_BYTES_MAX,
    listen,
    listen_locally,
    server_options,
)

Handler = Callable[[BytesValue, Any], AsyncIterator[BytesValue]]
PATH = "/test.Service/Call"
TIME_LIMIT_S = 8.0
"""Less than `CallerLimits.ping_interval_s`, at which what was forgotten would be made up for."""


def run(scenario: Coroutine[Any, Any, None], *, runner: Callable[..., Any] = uvloop.run) -> None:
    """Run a scenario for a limited time; nothing may reach the loop that nobody handles."""
    unhandled: list[dict[str, Any]] = []

    async def limited() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(TIME_LIMIT_S):
            await scenario
        gc.collect()

    runner(limited())
    assert not unhandled


@asynccontextmanager
async def serving(
    handler: Handler, *options: tuple[str, int], path: Path | None = None
) -> AsyncGenerator[str]:
    """gRPC's own server with that method, as ours are set up but for some options."""
    server = grpc.aio.server(
        options=[*server_options(RECEIVE_BYTES_MAX, MESH_KEEPALIVE), *options],
        interceptors=[ErrorInterceptor()],
    )
    make_handler: Any = grpc.unary_stream_rpc_method_handler
    method = make_handler(
        handler,
        request_deserializer=BytesValue.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Service", {"Call": method}),)
    )
    address = listen(server, "127.0.0.1:0") if path is None else listen_locally(server, path)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@asynccontextmanager
async def calling(address: str) -> AsyncGenerator[Channel]:
    """A channel."""
    channel = Channel(address)
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def with_raw_server(
    greeting: bytes = frames.settings({}),
) -> AsyncGenerator[tuple[RawServer, Channel]]:
    async with raw_server(greeting) as server, calling(server.address) as channel:
        yield server, channel


async def begin(
    channel: Channel, value: bytes = b"", timeout_s: float | None = None
) -> Answers[BytesValue]:
    return await channel.stream(PATH, BytesValue(value=value), BytesValue, timeout_s=timeout_s)


async def begun(server: RawServer, channel: Channel) -> tuple[Answers[BytesValue], Accepted, int]:
    """The first call on a new connection: here, there, and its number."""
    answers = await begin(channel)
    accepted = await server.accept()
    call, _ = await accepted.call()
    accepted.headers(call, *ANSWER)
    return answers, accepted, call


async def ask(channel: Channel, value: bytes = b"") -> bytes:
    return (await channel.unary(PATH, BytesValue(value=value), BytesValue)).value


async def read(answers: Answers[BytesValue]) -> list[bytes]:
    """All values."""
    return [message.value async for message in answers]


async def until(is_true: Callable[[], bool]) -> None:
    """Wait for what nothing announces; `run` limits it."""
    while not is_true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def failure(awaited: Coroutine[Any, Any, Any]) -> grpc.aio.AioRpcError:
    """With what it fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaited
    return caught.value


async def code(awaited: Coroutine[Any, Any, Any]) -> grpc.StatusCode:
    return (await failure(awaited)).code()


def num_connections(channel: Channel) -> int:
    """Those that are known to be open."""
    return sum(one.is_open for one in channel._connections)  # pyright: ignore[reportPrivateUsage]


async def echo(request: BytesValue, _: Any) -> AsyncIterator[BytesValue]:
    yield request


async def count(request: BytesValue, _: Any) -> AsyncIterator[BytesValue]:
    """As many messages as asked for."""
    for index in range(int(request.value)):
        yield BytesValue(value=b"%d" % index)


def counted(number: int) -> list[bytes]:
    return [b"%d" % index for index in range(number)]


class Waiting:
    """A handler whose calls say that they are there, and wait to be let go."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.ended: list[bytes] = []
        self.remaining_s: list[float | None] = []
        self.lets_go = asyncio.Event()

    async def handle(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        self.begun.append(request.value)
        self.remaining_s.append(context.time_remaining())
        try:
            yield request
            await self.lets_go.wait()
            yield BytesValue(value=b"last")
        finally:
            self.ended.append(request.value)


# What is asked for comes.


def test_a_unary_call_is_answered() -> None:
    async def scenario() -> None:
        async with serving(echo) as address, calling(address) as channel:
            assert await ask(channel, b"hello") == b"hello"
            assert await ask(channel) == b""

    run(scenario())


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_a_stream_comes_whole_and_in_order(number: int) -> None:
    async def scenario() -> None:
        async with serving(count) as address, calling(address) as channel:
            answers = await begin(channel, b"%d" % number)
            assert await read(answers) == counted(number)
            assert await answers.read() is None, "it stays ended"

    run(scenario())


@pytest.mark.parametrize("number", [0, 2])
def test_a_unary_call_takes_one_message_no_less_and_no_more(number: int) -> None:
    async def scenario() -> None:
        async with serving(count) as address, calling(address) as channel:
            assert await code(ask(channel, b"%d" % number)) is grpc.StatusCode.UNIMPLEMENTED

    run(scenario())


def test_five_hundred_calls_at_once_share_a_connection_and_mix_nothing_up() -> None:
    async def scenario() -> None:
        async with serving(count) as address, calling(address) as channel:

            async def one(number: int) -> list[bytes]:
                return await read(await begin(channel, b"%d" % number))

            got = await asyncio.gather(*(one(number % 70) for number in range(500)))
            assert got == [counted(number % 70) for number in range(500)]
            assert num_connections(channel) == 1

    run(scenario())


def test_large_messages_pass_both_ways() -> None:
    async def scenario() -> None:
        value = bytes(range(256)) * 16 * 1024  # 4 MiB
        async with serving(echo) as address, calling(address) as channel:
            assert await asyncio.gather(*(ask(channel, value) for _ in range(2))) == [value] * 2

    run(scenario())


def test_a_unix_socket_is_an_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(echo, path=tmp_path / "socket") as address,
            calling(address) as channel,
        ):
            assert await ask(channel, b"here") == b"here"

    run(scenario())


def test_what_a_cancelled_reader_has_not_read_the_next_one_reads() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            answers, accepted, call = await begun(server, channel)
            reader = asyncio.create_task(answers.read())
            await accepted.before_ping()
            reader.cancel()
            await asyncio.wait([reader])
            accepted.message(call, b"later")
            accepted.end(call)
            assert await read(answers) == [b"later"]

    run(scenario())


# A reader that is behind holds its server, and nobody else's.


def test_every_message_reaches_a_reader_that_was_behind() -> None:
    async def scenario() -> None:
        number, num_sent = 5000, 0

        async def handle(request: BytesValue, _: Any) -> AsyncIterator[BytesValue]:
            nonlocal num_sent
            for index in range(number if request.value else 1):
                yield BytesValue(value=b"%d" % index + bytes(2000))
                num_sent += 1

        async with serving(handle) as address, calling(address) as channel:
            answers = await begin(channel, b"many")
            await until(lambda: num_sent > UNREAD_MAX)
            for _ in range(50):
                await ask(channel)  # Others go on.
            assert num_sent < number, "the server waits"
            got = await read(answers)
            assert got == [b"%d" % index + bytes(2000) for index in range(number)]

    run(scenario())


@pytest.mark.parametrize(
    ("number", "size"), [(200, 1000), (2, LARGE_BYTES + 1000)], ids=["many", "large"]
)
def test_no_more_than_a_window_comes_before_what_is_unread_is_read(number: int, size: int) -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            answers, accepted, call = await begun(server, channel)
            assert LIMITS.window // 2 < number * size < LIMITS.window
            for _ in range(number):
                accepted.message(call, bytes(size))
            updates = [
                frame.stream_id
                for frame in await accepted.before_ping()
                if frame.kind == FrameType.WINDOW_UPDATE
            ]
            assert call not in updates
            for _ in range(number):
                await answers.read()
            update = await accepted.until(FrameType.WINDOW_UPDATE)
            assert update.stream_id == call
            assert frames.parse_u32(update.payload) > number * size

    run(scenario())


# How calls end.


def test_an_error_comes_with_its_reason_its_detail_and_its_metadata() -> None:
    async def fence(request: BytesValue, _: Any) -> AsyncIterator[BytesValue]:
        yield request
        raise UnbrokenError(Reason.OVERLOADED, "genug „für heute“", retry_after_s=1.5)

    async def scenario() -> None:
        async with serving(fence) as address, calling(address) as channel:
            answers = await begin(channel, b"first")
            assert await answers.read() == BytesValue(value=b"first")
            for _ in range(2):  # It stays so.
                error = from_rpc_error(await failure(answers.read()))
                assert (error.reason, error.detail) == (Reason.OVERLOADED, "genug „für heute“")
                assert error.retry_after_s == 1.5

    run(scenario())


@pytest.mark.parametrize(
    ("detail", "status"),
    [
        ("it says why: ", (grpc.StatusCode.NOT_FOUND, "it says why: ")),
        ("a\nb", (grpc.StatusCode.NOT_FOUND, "a\nb")),
        (
            "x" * 20_000,
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "expected up to 16384 bytes of headers"),
        ),
    ],
    ids=["spaces", "lines", "length"],
)
def test_no_detail_of_one_call_harms_another(
    detail: str, status: tuple[grpc.StatusCode, str]
) -> None:
    async def scenario() -> None:
        waiting = Waiting()

        async def handle(request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
            if request.value:
                await context.abort(grpc.StatusCode.NOT_FOUND, detail)
            async for one in waiting.handle(request, context):
                yield one

        async with serving(handle) as address, calling(address) as channel:
            other = await begin(channel)
            await other.read()
            error = await failure(ask(channel, b"x"))
            assert (error.code(), error.details()) == status
            waiting.lets_go.set()
            assert await read(other) == [b"last"]

    run(scenario())


def test_a_method_that_is_not_there_is_unimplemented() -> None:
    async def scenario() -> None:
        async with serving(echo) as address, calling(address) as channel:
            check = channel.unary(
                "/grpc.health.v1.Health/Check",
                health_pb2.HealthCheckRequest(),
                health_pb2.HealthCheckResponse,
            )
            assert await code(check) is grpc.StatusCode.UNIMPLEMENTED

    run(scenario())


def test_a_deadline_ends_a_call_here_and_there() -> None:
    async def scenario() -> None:
        waiting = Waiting()
        async with serving(waiting.handle) as address, calling(address) as channel:
            answers = await begin(channel, b"slow", timeout_s=1.0)
            assert await answers.read() == BytesValue(value=b"slow")
            assert await code(answers.read()) is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: waiting.ended == [b"slow"])
            (remaining_s,) = waiting.remaining_s
            assert remaining_s is not None
            assert 0 < remaining_s <= 1.0, "it is told"

    run(scenario())


@pytest.mark.parametrize(
    ("timeout_s", "told"),
    [(0.05, rb"([1-9]|[1-4]\d|50)m"), (0.0, b"0m"), (-1.0, b"0m"), (10.0**6, b"1000000S|999999S")],
)
def test_a_deadline_needs_nothing_of_the_server(timeout_s: float, told: bytes) -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            await begin(channel)  # So there is a connection.
            accepted = await server.accept()
            await accepted.call()
            answers = await begin(channel, timeout_s=timeout_s)
            call, fields = await accepted.call()
            assert re.fullmatch(told, fields[b"grpc-timeout"])
            if timeout_s < 1:
                assert await code(answers.read()) is grpc.StatusCode.DEADLINE_EXCEEDED
                reset = await accepted.until(FrameType.RST_STREAM)
                assert reset.stream_id == call

    run(scenario())


def test_a_connection_that_does_not_come_takes_no_longer_than_the_deadline() -> None:
    async def scenario() -> None:
        async with with_raw_server(b"") as (_, channel):
            begun = begin(channel, timeout_s=0.05)
            assert await code(begun) is grpc.StatusCode.DEADLINE_EXCEEDED

    run(scenario())


def test_a_call_that_ended_in_time_has_no_deadline_any_more() -> None:
    async def scenario() -> None:
        async with serving(echo) as address, calling(address) as channel:
            answers = await begin(channel, b"x", timeout_s=100.0)
            assert await read(answers) == [b"x"]
            timer = answers._deadline  # pyright: ignore[reportPrivateUsage]
            assert timer is not None
            assert timer.cancelled()

    run(scenario())


def test_cancelling_frees_the_call_at_the_server_and_no_other() -> None:
    async def scenario() -> None:
        waiting = Waiting()
        async with serving(waiting.handle) as address, calling(address) as channel:
            first, second = await begin(channel, b"1"), await begin(channel, b"2")
            for answers in (first, second):
                await answers.read()
            reader = asyncio.create_task(first.read())
            await asyncio.sleep(0)
            for _ in range(2):
                first.cancel()
            assert await code(_result(reader)) is grpc.StatusCode.CANCELLED
            await until(lambda: waiting.ended == [b"1"])
            waiting.lets_go.set()
            assert await read(second) == [b"last"]
            second.cancel()  # It is over: nothing to say.
            assert await second.read() is None

    run(scenario())


async def _result(task: "asyncio.Task[BytesValue | None]") -> BytesValue | None:
    return await task


def test_a_unary_call_that_nobody_waits_for_is_taken_back() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            task = asyncio.create_task(ask(channel, b"x"))
            accepted = await server.accept()
            await accepted.call()
            request = await accepted.until(FrameType.DATA)
            assert request.flags & frames.END_STREAM
            task.cancel()
            await asyncio.wait([task])
            await accepted.until(FrameType.RST_STREAM)

    run(scenario())


def test_what_has_come_of_a_cancelled_call_is_dropped() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            answers, accepted, call = await begun(server, channel)
            accepted.message(call, b"unread")
            await accepted.before_ping()
            answers.cancel()
            assert await code(answers.read()) is grpc.StatusCode.CANCELLED

    run(scenario())


def test_bytes_that_are_no_message_are_an_error_and_the_call_is_taken_back() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            answers, accepted, call = await begun(server, channel)
            accepted.say(frames.frame(FrameType.DATA, 0, call, b"\0\0\0\0\2\xff\xff"))
            assert await code(answers.read()) is grpc.StatusCode.INTERNAL
            reset = await accepted.until(FrameType.RST_STREAM)
            assert reset.stream_id == call
            assert frames.parse_u32(reset.payload) == ErrorCode.CANCEL

    run(scenario())


def test_a_request_that_cannot_be_written_is_no_call() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            answers, accepted, _ = await begun(server, channel)
            with pytest.raises(EncodeError):
                await channel.unary(PATH, UninterpretedOption.NamePart(), BytesValue)
            said = await accepted.before_ping()
            assert FrameType.HEADERS not in [frame.kind for frame in said]
            answers.cancel()

    run(scenario())


def test_what_a_server_leaves_unread_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "PENDING_BYTES_MAX", 1000)

    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            first = await begin(channel, bytes(frames.WINDOW_DEFAULT + 900))
            second = await begin(channel, bytes(900))
            error = await failure(ask(channel))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            accepted = await server.accept()
            assert [(await accepted.call())[0] for _ in range(2)] == [1, 3]
            said = await accepted.before_ping()
            assert FrameType.HEADERS not in [frame.kind for frame in said]
            for answers in (first, second):
                answers.cancel()
            third = await begin(channel)
            accepted.say(frames.window_update(0, 100))
            call, _ = await accepted.call()
            accepted.headers(call, *ANSWER)
            accepted.message(call, b"on")
            assert await third.read() == BytesValue(value=b"on")

    run(scenario())


# Connections that are lost, and those that never were.


def test_a_lost_connection_ends_its_calls_and_the_next_call_opens_another() -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            first, accepted, call = await begun(server, channel)
            second = await begin(channel)
            await accepted.call()
            accepted.message(call, b"before")
            await until(lambda: bool(first._unread))  # pyright: ignore[reportPrivateUsage]
            accepted.kill()
            assert await code(second.read()) is grpc.StatusCode.UNAVAILABLE
            assert await first.read() == BytesValue(value=b"before")
            assert await code(first.read()) is grpc.StatusCode.UNAVAILABLE
            third, accepted, call = await begun(server, channel)
            accepted.end(call)
            assert await third.read() is None
            assert len(channel._connections) == 1  # pyright: ignore[reportPrivateUsage]

    run(scenario())


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "unix:/nowhere/socket", f"{'a' * 70}.invalid:1"]
)
def test_a_server_that_is_not_there_is_unavailable(address: str) -> None:
    async def scenario() -> None:
        async with calling(address) as channel:
            errors = await asyncio.gather(*(failure(ask(channel)) for _ in range(3)))
            assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
            assert address in (errors[0].details() or "")

    run(scenario())


@pytest.mark.parametrize("address", ["nowhere", "", "host:port", "host:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Channel(address)


def test_a_server_of_another_protocol_is_unavailable() -> None:
    async def scenario() -> None:
        greeting = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
        async with with_raw_server(greeting) as (_, channel):
            assert await code(ask(channel)) is grpc.StatusCode.UNAVAILABLE
            assert num_connections(channel) == 0

    run(scenario())


def test_a_server_that_never_greets_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "GREET_S_MAX", 0.05)

    async def scenario() -> None:
        async with with_raw_server(b"") as (server, channel):
            assert await code(ask(channel)) is grpc.StatusCode.UNAVAILABLE
            accepted = await server.accept()
            await accepted.until_closed()

    run(scenario())


@pytest.mark.parametrize("farewell", ["close", "goaway"])
def test_a_server_that_greets_and_leaves_is_asked_once(farewell: str) -> None:
    async def scenario() -> None:
        greeting = frames.settings({})
        if farewell == "goaway":
            greeting += frames.go_away(0, ErrorCode.NO_ERROR)
        async with with_raw_server(greeting) as (server, channel):
            server.closes_at_once = farewell == "close"
            assert await code(ask(channel)) is grpc.StatusCode.UNAVAILABLE
            assert server.num_accepted == 1

    run(scenario())
    run(scenario(), runner=asyncio.run)


def test_who_does_not_wait_any_more_leaves_the_connection_to_the_others() -> None:
    async def scenario() -> None:
        async with with_raw_server(b"") as (server, channel):
            impatient, patient = (asyncio.create_task(begin(channel)) for _ in range(2))
            accepted = await server.accept()
            impatient.cancel()
            await asyncio.wait([impatient])
            assert impatient.cancelled()
            accepted.say(frames.settings({}))
            answers = await patient
            call, _ = await accepted.call()
            assert call == 1, "the other one has not called"
            accepted.headers(call, *ANSWER)
            accepted.end(call)
            assert await answers.read() is None
            assert server.num_accepted == 1

    run(scenario())


# Servers that take few calls on a connection, or no more.


def test_calls_that_one_connection_does_not_take_go_on_others() -> None:
    async def scenario() -> None:
        waiting = Waiting()
        async with (
            serving(waiting.handle, ("grpc.max_concurrent_streams", 2)) as address,
            calling(address) as channel,
        ):
            values = counted(9)
            calls = await asyncio.gather(*(begin(channel, value) for value in values))
            await until(lambda: sorted(waiting.begun) == values)  # All at once.
            assert num_connections(channel) == 5
            waiting.lets_go.set()
            for answers, value in zip(calls, values, strict=True):
                assert await read(answers) == [value, b"last"]
            assert await ask_one(channel) == b"again"
            assert num_connections(channel) == 5

    async def ask_one(channel: Channel) -> bytes:
        answers = await begin(channel, b"again")
        first = await answers.read()
        answers.cancel()
        assert first is not None
        return first.value

    run(scenario())


def test_a_server_that_takes_no_calls_is_exhausted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECTIONS_MAX", 3)

    async def scenario() -> None:
        greeting = frames.settings({Setting.MAX_CONCURRENT_STREAMS: 0})
        async with with_raw_server(greeting) as (server, channel):
            errors = await asyncio.gather(*(failure(ask(channel)) for _ in range(5)))
            assert {one.code() for one in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert server.num_accepted == 3

    run(scenario())


def test_a_connection_that_is_told_to_go_serves_its_calls_to_their_end_and_is_closed() -> None:
    async def scenario() -> None:
        waiting = Waiting()
        async with (
            serving(waiting.handle, ("grpc.max_connection_age_ms", 50)) as address,
            calling(address) as channel,
        ):
            answers = await begin(channel, b"old")
            (old,) = channel._connections  # pyright: ignore[reportPrivateUsage]
            await until(lambda: not old.takes_calls)
            new = await begin(channel, b"new")
            assert await new.read() == BytesValue(value=b"new")
            new.cancel()
            assert num_connections(channel) >= 1
            waiting.lets_go.set()
            assert await read(answers) == [b"old", b"last"]
            await until(lambda: old._transport is None)  # pyright: ignore[reportPrivateUsage]
            assert not old.is_open

    run(scenario())


@pytest.mark.parametrize("how", ["server", "cancel"])
def test_the_last_call_of_a_connection_that_is_told_to_go_closes_it(how: str) -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            first, accepted, call = await begun(server, channel)
            second = await begin(channel)
            later, _ = await accepted.call()
            accepted.say(frames.go_away(call, ErrorCode.NO_ERROR))
            assert await code(second.read()) is grpc.StatusCode.UNAVAILABLE
            assert later > call
            await accepted.before_ping()
            third, another, number = await begun(server, channel)
            if how == "server":
                accepted.end(call)
                assert await first.read() is None
            else:
                first.cancel()
            said = await accepted.until_closed()
            assert FrameType.RST_STREAM in [frame.kind for frame in said] or how == "server"
            another.end(number)
            assert await third.read() is None

    run(scenario())


# The end.


@pytest.mark.parametrize("runner", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_closing_ends_all_calls_and_leaves_nothing(runner: Callable[..., Any]) -> None:
    async def scenario() -> None:
        async with with_raw_server() as (server, channel):
            first, accepted, _ = await begun(server, channel)
            second = await begin(channel, bytes(10**6), timeout_s=100.0)
            await accepted.call()
            reader = asyncio.create_task(first.read())
            await asyncio.sleep(0)
            (connection,) = channel._connections  # pyright: ignore[reportPrivateUsage]
            for _ in range(2):
                await channel.close()
            assert await code(_result(reader)) is grpc.StatusCode.CANCELLED
            assert await code(second.read()) is grpc.StatusCode.CANCELLED
            assert await code(ask(channel)) is grpc.StatusCode.CANCELLED
            said = await accepted.until_closed()
            assert sum(frame.kind == FrameType.RST_STREAM for frame in said) == 2
            await until(lambda: connection._transport is None)  # pyright: ignore[reportPrivateUsage]
            for timer in (connection._timer, second._deadline):  # pyright: ignore[reportPrivateUsage]
                assert timer is not None
                assert timer.cancelled()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert server.num_accepted == 1

    run(scenario(), runner=runner)


def test_closing_while_a_connection_opens_ends_those_who_wait_for_it() -> None:
    async def scenario() -> None:
        async with with_raw_server(b"") as (server, channel):
            waiting = [asyncio.create_task(failure(ask(channel))) for _ in range(3)]
            accepted = await server.accept()
            await channel.close()
            errors = await asyncio.gather(*waiting)
            assert {error.code() for error in errors} == {grpc.StatusCode.CANCELLED}
            await accepted.until_closed()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())
