"""Calls that pass on to the gRPC server behind the native edge, in both directions."""

import asyncio
import gc
import gzip
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from tests.frontend.edge.peer import Frame, data, setting
from tests.frontend.edge.raw import RawClient, connect
from tests.frontend.edge.test_server import NATIVE, path
from tests.frontend.fakes import MODEL, FakeSidecar
from tests.frontend.test_operators import tokens
from tests.frontend.worlds import run, world
from unbroken.edge.metrics import EdgeMetrics
from unbroken.edge.native import NativeEdge
from unbroken.edge.server import WRITE_BUFFER_HIGH
from unbroken.errors import Reason
from unbroken.health import ALSO_SERVED
from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import PREFIX
from unbroken.transport import open_channel
from unbroken.v1 import admin_service_pb2, admin_service_pb2_grpc
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

WATCH = "/grpc.health.v1.Health/Watch"
"""One of those that take one message."""
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
"""The one that takes many."""


def num_calls_open() -> int:
    """Calls of gRPC's own that this process makes, are answered by a stream, and go on."""
    kinds: Any = (grpc.aio.UnaryStreamCall, grpc.aio.StreamStreamCall)
    return sum(isinstance(one, kinds) and not one.done() for one in gc.get_objects())


# A server of the test's own behind the edge.


@dataclass
class Behind:
    """What serves `WATCH` and `REFLECTION` as a test wants it, and the edge before it."""

    address: str
    edge: NativeEdge
    registry: CollectorRegistry

    def num_hits(self, limit: str) -> float:
        """How often a client went beyond it."""
        return self.registry.get_sample_value("t_edge_limits_total", {"limit": limit}) or 0.0

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a state of the edge that nothing announces; fails after 5 s."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.002)


BEHIND_WINDOW = 64 * 1024
"""Bytes that the server behind is sent before it reads."""
Context = grpc.aio.ServicerContext[bytes, bytes]


@asynccontextmanager
async def behind(
    answer: Callable[[Any, Context], AsyncIterator[bytes]], **limits: Any
) -> AsyncGenerator[Behind]:
    """`answer` gets the message of a WATCH, and an iterator over those of a REFLECTION."""
    options = (("grpc.http2.lookahead_bytes", BEHIND_WINDOW), ("grpc.http2.bdp_probe", 0))
    server = grpc.aio.server(options=options)
    for method in (WATCH, REFLECTION):
        kind: Any = (
            grpc.stream_stream_rpc_method_handler
            if method == REFLECTION
            else grpc.unary_stream_rpc_method_handler
        )
        _, service, name = method.split("/")
        handler: Any = grpc.method_handlers_generic_handler(service, {name: kind(answer)})
        server.add_generic_rpc_handlers((handler,))
    registry = CollectorRegistry()
    edge = NativeEdge.before(
        server,
        {},
        EdgeLimits(ping_interval_s=60, **limits),
        EdgeMetrics(registry, "t"),
        services=ALSO_SERVED,
        tls=None,
        clock=asyncio.get_running_loop().time,
    )
    await server.start()
    try:
        yield Behind(await edge.start("127.0.0.1:0"), edge, registry)
    finally:
        await edge.stop()
        await server.stop(None)


async def echo(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:  # noqa: ARG001
    """Answers each message with its length."""
    async for message in messages:
        yield b"%d" % len(message)


async def read_all(request: bytes | AsyncIterator[bytes]) -> int:
    """How many messages a call has."""
    if isinstance(request, bytes):
        return 1
    return len([message async for message in request])


def wire(message: bytes) -> bytes:
    """A message as it lies in a body."""
    return PREFIX.pack(0, len(message)) + message


async def sections(client: RawClient, stream_id: int) -> list[dict[bytes, bytes]]:
    """The header sections of the answer on that stream, up to its end."""
    found: list[dict[bytes, bytes]] = []
    while (frame := await client.frame()) is not None:
        if frame.kind == FrameType.HEADERS:
            fields = dict(client.fields(frame))
            if frame.stream_id == stream_id:
                found.append(fields)
                if frame.flags & frames.END_STREAM:
                    return found
    raise AssertionError("expected an answer, the connection ended")


# One port for all.


def test_every_other_call_is_answered_at_the_same_port() -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **NATIVE) as it,
            open_channel(it.frontend.address) as channel,
        ):
            inference: Any = InferenceServiceStub(channel)
            models = await inference.ListModels(pb.ListModelsRequest())
            assert [model.model for model in models.models] == [MODEL]
            admin: Any = admin_service_pb2_grpc.AdminServiceStub(cast("Any", channel))
            workers = await admin.ListWorkers(admin_service_pb2.ListWorkersRequest())
            assert len(workers.workers) == 1
            health: Any = health_pb2_grpc.HealthStub(cast("Any", channel))
            status = await health.Check(health_pb2.HealthCheckRequest())
            assert status.status == health_pb2.HealthCheckResponse.SERVING

    run(scenario())


def test_streams_both_ways_pass_too() -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **NATIVE) as it,
            open_channel(it.frontend.address) as channel,
        ):
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await call.read()).list_services_response.service
            assert "unbroken.v1.InferenceService" in [one.name for one in listed]
            symbol = "unbroken.v1.InferenceService"
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
            files = (await call.read()).file_descriptor_response.file_descriptor_proto
            names = [FileDescriptorProto.FromString(one).name for one in files]
            assert "unbroken/v1/inference_service.proto" in names
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK

            health: Any = health_pb2_grpc.HealthStub(cast("Any", channel))
            watch = health.Watch(health_pb2.HealthCheckRequest())
            first = await watch.read()
            assert first.status == health_pb2.HealthCheckResponse.SERVING
            it.frontend.health.set("", is_serving=False)
            second = await watch.read()
            assert second.status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()

    run(scenario())


def test_errors_pass_with_their_details() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **NATIVE) as it:
            with pytest.raises(Exception, match="no request 'nobody'") as caught:
                await it.client.get_stream("nobody")
            assert getattr(caught.value, "reason", None) is Reason.STREAM_NOT_FOUND
            channel: Any = await it.client.channel()
            unknown = channel.unary_unary("/unbroken.v1.InferenceService/Unknown")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await unknown(b"")
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED

    run(scenario())


def test_other_calls_that_are_taken_back_at_once_are_given_up_behind() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **NATIVE) as it, connect(it.frontend.address) as client:
            before = num_calls_open()
            methods = ("/grpc.health.v1.Health/Watch", REFLECTION)
            for stream_id, method in zip(range(1, 100, 2), itertools.cycle(methods), strict=False):
                client.request(stream_id, path(method))
                client.say(data(stream_id, PREFIX.pack(0, 0), ends=True))
                client.say(frames.reset(stream_id, ErrorCode.CANCEL))
            client.request(101, path("/grpc.health.v1.Health/Check"))
            client.say(data(101, PREFIX.pack(0, 0), ends=True))
            await client.answer(101)
            await it.until(lambda: num_calls_open() == before)

    run(scenario())


FORWARDED = {
    "/unbroken.v1.InferenceService/Cancel": b"13",
    "/grpc.health.v1.Health/Watch": b"13",
    "/unbroken.v1.InferenceService/Nothing": b"12",
    "/no.such.Service/Nothing": b"12",
    REFLECTION: b"0",
}
"""What is answered where nothing comes: a method that takes many messages can do with none."""


@pytest.mark.parametrize("method", FORWARDED)
@pytest.mark.parametrize("at", ["headers", "data"])
def test_a_forwarded_call_that_ends_without_its_message_is_answered(method: str, at: str) -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, path(method), ends=at == "headers")
            if at == "data":
                client.say(data(1, b"", ends=True))
            assert (await client.answer(1))[b"grpc-status"] == FORWARDED[method]

    run(scenario())


def test_what_is_refused_whatever_it_says_is_refused_with_its_own_code(tmp_path: Path) -> None:
    """However the answer and the message cross on the way to the server behind."""

    async def scenario() -> None:
        settings = {**NATIVE, "admin_tokens": tokens(tmp_path)}
        async with world(**settings) as it, connect(it.frontend.address) as client:
            for stream_id in range(1, 200, 2):
                client.request(stream_id, path("/unbroken.v1.AdminService/ListWorkers"))
                await asyncio.sleep(0)
                client.say(data(stream_id, PREFIX.pack(0, 0), ends=True))
                assert (await client.answer(stream_id))[b"grpc-status"] == b"7"

    run(scenario())


def test_a_deadline_holds_for_a_message_that_never_comes() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, [*path("/grpc.health.v1.Health/Check"), (b"grpc-timeout", b"50m")])
            assert (await client.answer(1))[b"grpc-status"] == b"4"

    run(scenario())


def test_what_another_process_serves_is_not_known_here() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, path("/unbroken.v1.RelayService/Relay"))
            assert (await client.answer(1))[b"grpc-status"] == b"12"

    run(scenario())


def test_a_forwarded_call_takes_no_second_message() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, path("/grpc.health.v1.Health/Check"))
            client.say(data(1, 2 * PREFIX.pack(0, 0)))
            assert (await client.answer(1))[b"grpc-status"] == b"13"

    run(scenario())


# What passes with a call.


@pytest.mark.parametrize("method", [WATCH, REFLECTION])
def test_the_deadline_of_another_call_is_told_to_the_server_behind(method: str) -> None:
    told: list[float | None] = []

    async def answer(request: Any, context: Context) -> AsyncIterator[bytes]:
        told.append(context.time_remaining())
        await read_all(request)
        yield b""

    async def scenario() -> None:
        async with behind(answer) as it, connect(it.address) as client:
            client.request(1, [*path(method), (b"grpc-timeout", b"100S")])
            client.say(data(1, wire(b""), ends=True))
            assert (await client.answer(1))[b"grpc-status"] == b"0"
            client.request(3, path(method))
            client.say(data(3, wire(b""), ends=True))
            assert (await client.answer(3))[b"grpc-status"] == b"0"

    run(scenario())
    first, second = told
    assert first is not None
    assert 90 < first <= 101
    assert second is None, "who does not say waits for ever"


def test_the_deadline_and_the_cancellation_of_another_call_pass_too() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            watchers = it.frontend.health.watchers
            # A client that does not look at its deadline itself.
            client.request(1, [*path(WATCH), (b"grpc-timeout", b"300m")])
            client.say(data(1, wire(b""), ends=True))
            await it.until(lambda: len(watchers) == 1)
            async with asyncio.timeout(5):
                assert (await client.answer(1))[b"grpc-status"] == b"4"
            await it.until(lambda: not watchers)
            client.request(3, path(WATCH))
            client.say(data(3, wire(b""), ends=True))
            await it.until(lambda: len(watchers) == 1)
            client.say(frames.reset(3, ErrorCode.CANCEL))
            await it.until(lambda: not watchers)

    run(scenario())


@pytest.mark.parametrize("method", [WATCH, REFLECTION])
@pytest.mark.parametrize("num_messages", [0, 2])
def test_the_metadata_of_another_call_passes_both_ways(method: str, num_messages: int) -> None:
    told: dict[str, str | bytes] = {}

    async def answer(request: Any, context: Context) -> AsyncIterator[bytes]:
        await read_all(request)
        told.update(dict(cast("Any", context.invocation_metadata())))
        context.set_trailing_metadata((("last", "c"), ("last-bin", b"\xff\x01")))
        await context.send_initial_metadata((("first", "a"), ("first-bin", b"\0b")))
        for _ in range(num_messages):
            yield b"message"

    async def scenario() -> None:
        async with behind(answer) as it, connect(it.address) as client:
            client.request(1, [*path(method), (b"mine", b"x"), (b"mine-bin", b"AAE=")])
            client.say(data(1, wire(b""), ends=True))
            found = await sections(client, 1)
            assert len(found) == (2 if num_messages else 1)
            assert (
                found[0].items()
                >= {
                    b":status": b"200",
                    b"first": b"a",
                    b"first-bin": b"AGI",
                }.items()
            )
            assert (
                found[-1].items()
                >= {
                    b"grpc-status": b"0",
                    b"last": b"c",
                    b"last-bin": b"/wE",
                }.items()
            )

    run(scenario())
    assert (told["mine"], told["mine-bin"]) == ("x", b"\0\1")


# What is too much, and what takes too long.


def test_a_message_of_many_that_is_too_large_is_refused_and_counted() -> None:
    async def scenario() -> None:
        async with behind(echo, request_bytes_max=1000) as it, connect(it.address) as client:
            client.request(1, path(REFLECTION))
            client.say(data(1, PREFIX.pack(0, 1001)))
            async with asyncio.timeout(5):
                assert (await client.answer(1))[b"grpc-status"] == b"8"
            assert it.num_hits("request_bytes") == 1
            client.request(3, path(REFLECTION))
            client.say(data(3, PREFIX.pack(2, 1)))
            assert (await client.answer(3))[b"grpc-status"] == b"13"
            assert it.num_hits("request_bytes") == 1, "this one broke another rule"

    run(scenario())


def test_what_is_refused_after_the_answer_began_is_said_at_its_end() -> None:
    async def scenario() -> None:
        async with behind(echo, request_bytes_max=1000) as it, connect(it.address) as client:
            client.request(1, path(REFLECTION))
            client.say(data(1, wire(b"")))
            assert (await client.frames_until(FrameType.DATA))[-1].payload == wire(b"0")
            client.say(data(1, PREFIX.pack(0, 1001)))
            (told,) = await sections(client, 1)
            assert told[b"grpc-status"] == b"8"
            assert b":status" not in told

    run(scenario())


PART = (data(1, PREFIX.pack(0, 40_000) + b"x" * 15_000), data(1, b"x" * 15_000))
"""The beginning of a message."""
GOES: dict[str, tuple[bytes, ...]] = {
    "passed on": (data(1, b"x" * 10_000, ends=True),),
    "refused": (data(1, b"", ends=True),),
    "reset": (frames.reset(1, ErrorCode.CANCEL),),
    "connection error": (frames.window_update(0, 0),),
}
"""What makes it go."""


@pytest.mark.parametrize("how", [*GOES, "answered"])
def test_messages_that_come_in_part_are_held_until_they_go(how: str) -> None:
    knows_enough = asyncio.Event()

    async def answer(messages: Any, context: Context) -> AsyncIterator[bytes]:
        if how == "answered":
            await knows_enough.wait()
            return
        async for each in echo(messages, context):
            yield each

    async def scenario() -> None:
        async with (
            behind(answer, held_bytes_max=50_000) as it,
            connect(it.address) as first,
            connect(it.address) as second,
        ):
            first.request(1, path(REFLECTION))
            first.say(*PART)
            await it.until(lambda: it.edge.num_held == 30_005)
            second.request(1, path(REFLECTION))
            second.say(*PART)
            assert (await second.answer(1))[b"grpc-status"] == b"8"
            assert it.num_hits("held_bytes") == 1
            assert it.edge.num_held == 30_005, "what was refused is not held"
            first.say(*GOES.get(how, ()))
            knows_enough.set()
            await it.until(lambda: it.edge.num_held == 0)

    run(scenario())


def test_compressed_messages_are_held_at_the_size_that_they_have_here() -> None:
    async def answer(messages: Any, context: Context) -> AsyncIterator[bytes]:  # noqa: ARG001
        await asyncio.Event().wait()
        yield b""

    async def scenario() -> None:
        async with (
            behind(answer, held_bytes_max=10_000_000) as it,
            connect(it.address) as client,
        ):
            client.request(1, [*path(REFLECTION), (b"grpc-encoding", b"gzip")])
            bomb = gzip.compress(bytes(1_000_000), mtime=0)
            client.say(*[data(1, PREFIX.pack(1, len(bomb)) + bomb)] * 40)
            async with asyncio.timeout(5):
                assert (await client.answer(1))[b"grpc-status"] == b"8"
            assert it.num_hits("held_bytes") == 1
            await it.until(lambda: it.edge.num_held == 0)

    run(scenario())


def test_a_stream_may_be_idle_but_a_message_has_to_come_to_its_end_in_time() -> None:
    async def scenario() -> None:
        async with behind(echo, request_timeout_s=0.2) as it, connect(it.address) as client:
            client.request(1, path(REFLECTION))
            client.say(data(1, b"\0\0"), data(1, b"\0\0\2"), data(1, b"xx"))
            assert (await client.frames_until(FrameType.DATA))[-1].payload == wire(b"2")
            client.request(3, path(REFLECTION))
            client.say(data(3, wire(b"x") + PREFIX.pack(0, 1 << 20)))
            told = list[Frame]()
            async with asyncio.timeout(5):
                while not any(frame.kind == FrameType.RST_STREAM for frame in told):
                    client.say(data(3, b"x"))  # Each piece comes, and not the whole.
                    told += await heard(client)
            (reset,) = [frame for frame in told if frame.kind == FrameType.RST_STREAM]
            assert reset.stream_id == 3
            assert frames.parse_u32(reset.payload) == ErrorCode.CANCEL
            assert it.num_hits("request") == 1
            assert it.edge.num_held == 0
            client.say(data(1, wire(b"still")))  # Which was idle before the other one began.
            assert (await client.frames_until(FrameType.DATA))[-1].payload == wire(b"5")

    run(scenario())


# Who takes nothing, on either side.


async def heard(client: RawClient) -> list[Frame]:
    """What the edge says until it has dealt with all that it was told."""
    client.say(frames.ping(b"are you?", is_ack=False))
    found: list[Frame] = []
    while (frame := await client.frame()) is not None:
        if frame.kind == FrameType.PING and frame.payload == b"are you?":
            return found
        found.append(frame)
    raise AssertionError("expected an answer to a PING, the connection ended")


WINDOW = 1 << 20
LARGE = wire(bytes(300_000))
"""More than `BEHIND_WINDOW`."""
MESSAGES: dict[str, bytes] = {
    "whole": LARGE * 3 + wire(bytes(WINDOW - 3 * len(LARGE) - PREFIX.size)),
    "in part": (LARGE + wire(bytes(WINDOW)))[:WINDOW],
    "whole, and in part": (LARGE * 4)[:WINDOW],
}
"""What fills the window of a stream."""


def upload(client: RawClient, stream_id: int, body: bytes) -> None:
    """A piece of a body, in frames."""
    for begin in range(0, len(body), frames.FRAME_BYTES_MAX):
        client.say(data(stream_id, body[begin : begin + frames.FRAME_BYTES_MAX]))


def opened(told: list[Frame], stream_id: int) -> int:
    """By how much the window of a stream was opened."""
    return sum(
        frames.parse_u32(frame.payload)
        for frame in told
        if frame.kind == FrameType.WINDOW_UPDATE and frame.stream_id == stream_id
    )


@pytest.mark.parametrize("what", MESSAGES)
def test_a_server_behind_that_reads_nothing_stops_who_sends_to_it(what: str) -> None:
    may_read = asyncio.Event()

    async def answer(messages: Any, context: Context) -> AsyncIterator[bytes]:
        if ("waits", "yes") in tuple(cast("Any", context.invocation_metadata())):
            await may_read.wait()
        async for each in echo(messages, context):
            yield each

    async def scenario() -> None:
        limits = {"stream_window": WINDOW, "request_timeout_s": 0.4}
        async with behind(answer, **limits) as it, connect(it.address) as client:
            client.request(1, [*path(REFLECTION), (b"waits", b"yes")])
            body = MESSAGES[what]
            upload(client, 1, body[: len(LARGE)])
            assert opened(await heard(client), 1) == 0
            upload(client, 1, body[len(LARGE) :])
            # Longer than a message may take that could be sent:
            client.request(3, path(REFLECTION))
            client.say(data(3, b"\0"))
            told = await client.frames_until(FrameType.RST_STREAM)
            assert told[-1].stream_id == 3
            assert opened(told, 1) == 0
            assert it.edge.num_held == WINDOW
            may_read.set()
            async with asyncio.timeout(5):
                told = await client.frames_until(FrameType.WINDOW_UPDATE)
                if what == "whole":
                    client.say(data(1, b"", ends=True))
                    assert (await client.answer(1))[b"grpc-status"] == b"0"
                else:  # Its client could go on, and does not.
                    told = await client.frames_until(FrameType.RST_STREAM)
                    assert told[-1].stream_id == 1
            assert it.num_hits("request") == (1 if what == "whole" else 2)
            assert it.edge.num_held == 0

    run(scenario())


PIECE = b"y" * (32 * 1024)
PIECES_BYTES = 600 * len(wire(PIECE))


async def pieces(request: bytes, context: Context) -> AsyncIterator[bytes]:  # noqa: ARG001
    """More than any buffer on the way takes."""
    for _ in range(600):
        yield PIECE


def test_of_an_answer_from_behind_no_more_than_a_message_waits_for_a_window() -> None:
    async def scenario() -> None:
        async with behind(pieces) as it, connect(it.address) as client:
            client.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
            client.request(1, path(WATCH))
            client.say(data(1, wire(b""), ends=True))
            async with asyncio.timeout(5):
                await client.frames_until(FrameType.HEADERS)  # They need no window.
            (connection,) = [one.connection for one in it.edge.clients]
            num_read = 0
            while num_read < PIECES_BYTES:
                client.say(frames.window_update(0, 50_000), frames.window_update(1, 50_000))
                due = min(num_read + 50_000, PIECES_BYTES)
                while num_read < due:
                    frame = await client.frame()
                    assert frame is not None
                    if frame.kind == FrameType.DATA:
                        num_read += len(frame.payload)
                    assert connection.num_pending_bytes <= len(wire(PIECE))
            assert (await sections(client, 1))[-1][b"grpc-status"] == b"0"

    run(scenario())


def test_of_an_answer_from_behind_no_more_than_it_may_waits_in_a_socket() -> None:
    async def scenario() -> None:
        async with behind(pieces) as it, connect(it.address) as client:
            client.say(setting(Setting.INITIAL_WINDOW_SIZE, frames.WINDOW_MAX))
            client.say(frames.window_update(0, frames.WINDOW_MAX - frames.WINDOW_DEFAULT))
            client.request(1, path(WATCH))
            client.say(data(1, wire(b""), ends=True))
            await it.until(lambda: any(one.is_paused for one in it.edge.clients))
            (one,) = it.edge.clients
            transport = one._transport  # pyright: ignore[reportPrivateUsage]
            assert transport is not None
            num_read = 0
            while num_read < PIECES_BYTES:
                frame = await client.frame()
                assert frame is not None
                if frame.kind == FrameType.DATA:
                    num_read += len(frame.payload)
                assert transport.get_write_buffer_size() <= WRITE_BUFFER_HIGH + 2 * len(wire(PIECE))
            assert (await sections(client, 1))[-1][b"grpc-status"] == b"0"

    run(scenario())
