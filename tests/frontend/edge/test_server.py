"""The native edge on real sockets: gRPC's own clients, and those that behave badly."""

import asyncio
import gzip
import socket
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
import pytest

from frontend.edge.calls import StreamingCall
from frontend.service import Frontend
from tests.frontend.edge.peer import REQUEST, data, setting
from tests.frontend.edge.raw import RawClient, connect
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import failure_of, read, read_some, run, world
from unbroken.client import Client
from unbroken.edge.server import IGNORED_BYTES_MAX, PINGS_SPREAD
from unbroken.errors import Reason
from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType, Setting
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

Message: TypeAlias = pb.GenerateResponse

PROMPT = list(b"once upon a time")
REQUEST_OF_TEN = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
REQUEST_OF_TEN.params.stopping.max_tokens = 10
REQUEST_OF_TEN.params.sampling.temperature = 0


NATIVE: dict[str, Any] = {"edge": "native", "client_ping_interval_s": 60}
"""For tests whose clients do not answer pings, however long they take."""


def metric(frontend: Frontend, name: str, **labels: str) -> float:
    """A metric of the frontend."""
    return frontend.registry.get_sample_value(f"unbroken_frontend_{name}", labels) or 0.0


def path(method: str) -> list[tuple[bytes, bytes]]:
    """A request for another method."""
    return [(name, method.encode() if name == b":path" else value) for name, value in REQUEST]


# gRPC's clients.


@pytest.mark.usefixtures("each_edge")
def test_the_sync_client_of_grpc_reads_streams() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            address = it.frontend.address

            def call() -> tuple[list[int], bool]:
                with grpc.insecure_channel(address) as channel:
                    stub = InferenceServiceStub(cast("Any", channel))
                    messages = list(cast("Iterable[Message]", stub.Generate(REQUEST_OF_TEN)))
                    ids = [one for message in messages for one in message.token_ids]
                    return ids, messages[-1].HasField("finished")

            assert await asyncio.to_thread(call) == (reference(PROMPT, 10), True)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_requests_may_be_compressed() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            channel = grpc.aio.insecure_channel(
                it.frontend.address, compression=grpc.Compression.Gzip
            )
            async with channel:
                request = pb.GenerateRequest(text="x" * 1000)
                request.params.stopping.max_tokens = 3
                call = InferenceServiceStub(channel).Generate(request)
                messages = [message async for message in call]
                assert messages[0].started.num_prompt_tokens == 1001
                assert messages[-1].HasField("finished")

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_a_large_request_comes_whole_and_too_large_a_one_is_refused() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stub = InferenceServiceStub(await it.client.channel())
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await anext(aiter(stub.Generate(pb.GenerateRequest(text="x" * 6_000_000))))
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # Beyond the context.
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await anext(aiter(stub.Generate(pb.GenerateRequest(text="x" * 17_000_000))))
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_many_streams_share_a_connection() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
            streams = [
                it.client.generate(token_ids=[*PROMPT, n % 256], max_tokens=20, seed=n)
                for n in range(300)
            ]
            outputs = await asyncio.gather(*(read(stream) for stream in streams))
            for n, (ids, _) in enumerate(outputs):
                assert ids == reference([*PROMPT, n % 256], 20, seed=n)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_what_is_no_message_is_the_callers_fault() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            channel: Any = await it.client.channel()
            method = channel.unary_stream("/unbroken.v1.InferenceService/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await anext(aiter(method(b"\xff")))
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "expected a message" in (error.value.details() or "")

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_a_drain_under_load_loses_no_stream_and_takes_no_new_one() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            streams = [
                it.client.generate(token_ids=[*PROMPT, n], seed=n, max_tokens=150)
                for n in range(30)
            ]
            heads = [await read_some(stream, 3) for stream in streams]
            stopping = asyncio.create_task(it.frontend.stop(grace_s=10))
            await it.until(lambda: it.frontend.is_draining)
            late = it.another_client().generate(token_ids=PROMPT)
            assert (await failure_of(late)).reason is Reason.DRAINING
            rests = await asyncio.gather(*(read(stream) for stream in streams))
            for n, (head, rest) in enumerate(zip(heads, rests, strict=True)):
                ids = [one for piece in head for one in piece.token_ids] + rest[0]
                assert ids == reference([*PROMPT, n], 150, seed=n)
            await stopping

    run(scenario())


# Clients that behave badly, and the others.


def test_what_is_no_grpc_is_answered_in_http() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, [(b":method", b"GET"), *REQUEST[1:]], ends=True)
            assert await client.answer(1) == {b":status": b"405"}
            fields = [field for field in REQUEST if field[0] != b"content-type"]
            client.request(3, fields, ends=True)
            assert await client.answer(3) == {b":status": b"415"}
            client.request(5, [(b":method", b"CONNECT"), (b":authority", b"there:443")])
            assert await client.answer(5) == {b":status": b"405"}

    run(scenario())


REFUSED: dict[str, tuple[bytes, list[tuple[bytes, bytes]], bytes]] = {
    "no message": (b"13", [], b""),
    "two messages": (b"13", [], PREFIX.pack(0, 0) * 2),
    "half a message": (b"13", [], PREFIX.pack(0, 5) + b"x"),
    "a message above the limit": (b"8", [], PREFIX.pack(0, 2**30)),
    "an unknown compression": (b"12", [(b"grpc-encoding", b"br")], PREFIX.pack(1, 1) + b"x"),
    "a bomb": (
        b"8",
        [(b"grpc-encoding", b"gzip")],
        PREFIX.pack(1, len(bomb := gzip.compress(bytes(30_000_000), mtime=0))) + bomb,
    ),
    "a bad timeout": (b"13", [(b"grpc-timeout", b"soon")], PREFIX.pack(0, 0)),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("method", ["Generate", "Resume"])
def test_what_the_protocol_forbids_is_refused_with_its_code(what: str, method: str) -> None:
    code, fields, body = REFUSED[what]

    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, [*path(f"/unbroken.v1.InferenceService/{method}"), *fields])
            for begin in range(0, max(1, len(body)), 16_000):
                part = body[begin : begin + 16_000]
                client.say(data(1, part, ends=begin + 16_000 >= len(body)))
            answer = await client.answer(1)
            assert answer[b":status"] == b"200"
            assert answer[b"grpc-status"] == code

    run(scenario())


def test_who_comes_while_an_edge_stops_is_sent_away() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it:
            assert it.frontend.edge is not None
            async with connect(it.frontend.address) as stays:
                await stays.frames_until(FrameType.SETTINGS)
                stopping = asyncio.create_task(it.frontend.edge.stop())
                await stays.until_closed()
                assert not stopping.done(), "it waits for who has not closed"
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    ours = socket.create_connection(listener.getsockname())
                    await it.frontend.edge.take(listener.accept()[0])
                reader, writer = await asyncio.open_connection(sock=ours)
                told = await RawClient(reader, writer).until_closed()
                assert FrameType.GOAWAY in {frame.kind for frame in told}
                writer.close()
            await stopping

    run(scenario())


def test_too_much_metadata_is_refused_by_grpc_and_by_http() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.request(1, [*REQUEST, (b"x", b"y" * 17_000)])
            assert (await client.answer(1))[b"grpc-status"] == b"8"
            client.request(3, [(b":method", b"GET"), *REQUEST[1:], (b"x", b"y" * 17_000)])
            assert await client.answer(3) == {b":status": b"431"}
            client.request(5, path("/unbroken.v1.InferenceService/ListModels"))
            client.say(data(5, PREFIX.pack(0, 0), ends=True))
            assert (await client.answer(5))[b"grpc-status"] == b"0"

    run(scenario())


def test_http_1_is_told_so_and_closed() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it:
            async with connect(it.frontend.address, greets=False) as client:
                client.say(b"GET / HTTP/1.1\r\nHost: here\r\nUser-Agent: some\r\n\r\n")
                told = await client.until_closed()
                assert told[-1].kind == FrameType.GOAWAY
            failed = metric(it.frontend, "edge_connections_failed_total", code="PROTOCOL_ERROR")
            assert failed == 1

    run(scenario())


def test_a_client_that_goes_on_speaking_is_told_all_the_same_why_it_is_left() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it, connect(it.frontend.address) as client:
            client.say(frames.headers(2, b"", ends=True), bytes(4 << 20))
            told = await client.until_closed()
            assert [frame.kind for frame in told].count(FrameType.GOAWAY) == 1
            client.say(bytes(IGNORED_BYTES_MAX))
            edge = it.frontend.edge
            assert edge is not None
            await it.until(lambda: not edge.leaving)

    run(scenario())


def test_what_was_not_written_yet_is_sent_before_the_end() -> None:
    async def scenario() -> None:
        async with world(**NATIVE) as it:
            assert it.frontend.edge is not None
            async with connect(it.frontend.address) as client:
                await client.frames_until(FrameType.SETTINGS)
                (one,) = it.frontend.edge.clients
                one.connection.outbound += frames.ping(b"the last", is_ack=False)
                one.close()
                assert (await client.until_closed())[-1].payload == b"the last"

    run(scenario())


def test_a_client_that_breaks_the_protocol_harms_no_other() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None), **NATIVE) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=3, temperature=0)
            reading = asyncio.create_task(read(stream))
            async with connect(it.frontend.address) as client:
                client.generate(1, REQUEST_OF_TEN)
                await it.sidecars[0].until(lambda: len(it.sidecars[0].running) == 2)
                client.say(frames.window_update(0, 0))
                await client.until_closed()
            await it.sidecars[0].until(lambda: len(it.sidecars[0].running) == 1)
            for _ in range(3):
                it.sidecars[0].step()
            assert (await reading)[0] == reference(PROMPT, 3)

    run(scenario())


@pytest.mark.parametrize("how", ["reset", "close"])
def test_who_leaves_frees_what_was_computed_for_him(how: str) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=None), **NATIVE) as it:
            async with connect(it.frontend.address) as client:
                client.generate(1, REQUEST_OF_TEN)
                await it.until(lambda: it.num_running() == 1)
                if how == "reset":
                    client.say(frames.reset(1, ErrorCode.CANCEL))
                    await it.until(lambda: it.num_running() == 0)
            await it.until(lambda: it.num_running() == 0)
            await it.sidecars[0].until(lambda: len(it.sidecars[0].aborts) == 1)

    run(scenario())


def test_a_client_that_takes_nothing_stops_its_engine_and_then_gets_it_in_one_piece() -> None:
    async def scenario() -> None:
        settings = {"window_tokens": 64, **NATIVE}
        async with world(FakeSidecar("w1"), **settings) as it:  # noqa: SIM117
            async with connect(it.frontend.address) as client:
                client.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
                request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
                request.params.stopping.max_tokens = 500
                client.generate(1, request)
                await it.until(lambda: it.num_tokens() == 64)
                await asyncio.sleep(0.1)  # Time in which the engine could go beyond the window.
                assert it.num_tokens() == 64
                (info,), _ = it.frontend.requests.page(0, "")
                assert info.choices[0].num_tokens_sent == 0  # It waits in the ledger.
                client.say(frames.window_update(1, 20))  # Enough for the beginning of all of it.
                await it.until(
                    lambda: it.frontend.requests.page(0, "")[0][0].choices[0].num_tokens_sent
                )
                await asyncio.sleep(0.1)
                assert it.num_tokens() == 64  # It has not left.
                client.say(frames.window_update(1, 1_000_000))
                ids: list[int] = []
                body = b""
                biggest = 0
                while len(ids) < 500:
                    frame = await client.frame()
                    assert frame is not None
                    if frame.kind != FrameType.DATA:
                        continue
                    body += frame.payload
                    while len(body) >= 5 and len(body) >= 5 + PREFIX.unpack(body[:5])[1]:
                        size = PREFIX.unpack(body[:5])[1]
                        message = pb.GenerateResponse.FromString(body[5 : 5 + size])
                        body = body[5 + size :]
                        assert not message.token_ids or message.offset == len(ids)
                        ids += message.token_ids
                        biggest = max(biggest, len(message.token_ids))
                assert biggest == 64

    run(scenario())


def test_a_full_socket_leaves_output_in_the_ledger() -> None:
    async def scenario() -> None:
        settings = {"window_tokens": 64, **NATIVE}
        async with world(FakeSidecar("w1"), **settings) as it:
            edge = it.frontend.edge
            assert edge is not None
            stream = it.client.generate(token_ids=PROMPT, max_tokens=500, temperature=0)
            ids = [one for piece in await read_some(stream, 5) for one in piece.token_ids]
            (connection,) = edge.clients
            connection.pause_writing()  # As the transport says it.

            def num_sent() -> int:
                infos, _ = it.frontend.requests.page(0, "")
                return infos[0].choices[0].num_tokens_sent

            sent = num_sent()
            await it.until(lambda: it.num_tokens() >= sent + 32)
            assert num_sent() == sent
            connection.resume_writing()
            assert ids + (await read(stream))[0] == reference(PROMPT, 500)

    run(scenario())


def test_a_client_that_takes_nothing_for_too_long_is_cut_off() -> None:
    async def scenario() -> None:
        settings = {**NATIVE, "edge_stall_timeout_s": 0.3}
        async with world(FakeSidecar("w1"), **settings) as it:
            async with connect(it.frontend.address) as client:
                client.say(setting(Setting.INITIAL_WINDOW_SIZE, 0))
                client.generate(1, REQUEST_OF_TEN)
                told = await client.frames_until(FrameType.RST_STREAM)
                assert frames.parse_u32(told[-1].payload) == ErrorCode.CANCEL
            await it.until(lambda: it.num_running() == 0)
            assert metric(it.frontend, "edge_limits_total", limit="stall") == 1

    run(scenario())


def test_all_connections_together_are_asked_for_so_many_signs_of_life() -> None:
    async def scenario() -> None:
        settings = {**NATIVE, "edge_pings_per_s_max": 0.5}
        async with world(FakeSidecar("w1"), **settings) as it, AsyncExitStack() as stack:
            edge = it.frontend.edge
            assert edge is not None
            for _ in range(3):
                client = await stack.enter_async_context(connect(it.frontend.address))
                client.generate(1, REQUEST_OF_TEN)
                await client.frames_until(FrameType.HEADERS)
            asked_every_s = [one.connection.ping_interval_min_s for one in edge.clients]
            least_s = 2.0 * len(edge.clients)  # As the last one that came knows.
            assert least_s <= max(asked_every_s) <= least_s * (1 + PINGS_SPREAD)
            shares = [every_s / number for number, every_s in enumerate(sorted(asked_every_s), 1)]
            assert len(set(shares)) == 3, "not all at the same times"

    run(scenario())


def test_a_client_that_gives_no_sign_of_life_is_gone() -> None:
    async def scenario() -> None:
        settings = {"client_ping_interval_s": 0.2, "client_ping_timeout_s": 0.3}
        async with world(FakeSidecar("w1", step_s=None), edge="native", **settings) as it:
            async with connect(it.frontend.address) as client:
                client.generate(1, REQUEST_OF_TEN)
                await it.until(lambda: it.num_running() == 1)
                await client.until_closed()
            await it.until(lambda: it.num_running() == 0)
            assert metric(it.frontend, "edge_limits_total", limit="silence") == 1
            await it.until(lambda: metric(it.frontend, "edge_connections") == 0)

    run(scenario())


def test_a_client_that_has_its_streams_reset_again_and_again_starts_no_more_than_its_burst() -> (
    None
):
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        settings = {**NATIVE, "edge_resets_burst": 3, "edge_resets_per_s": 0}
        async with world(sidecar, **settings) as it, connect(it.frontend.address) as client:
            for number in range(4):
                client.generate(2 * number + 1, REQUEST_OF_TEN)
                await it.until(lambda number=number: len(sidecar.aborts) == number)
                await it.until(lambda: it.num_running() == 1)
                client.request(2 * number + 1, [(b"after", b"the end")], ends=True)
            told = await client.until_closed()
            assert frames.parse_u32(told[-1].payload, 4) == ErrorCode.ENHANCE_YOUR_CALM
            await it.until(lambda: len(sidecar.aborts) == 4)
            assert metric(it.frontend, "edge_limits_total", limit="resets") == 1

    run(scenario())


def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async def scenario() -> None:
        async with world(edge_connections_max=2, **NATIVE) as it:
            address = it.frontend.address
            async with connect(address) as first, connect(address):
                await first.frame()
                await it.until(lambda: metric(it.frontend, "edge_connections") == 2)
                async with connect(address) as third:
                    assert await third.until_closed() == []
            await it.until(lambda: metric(it.frontend, "edge_connections") == 0)
            assert metric(it.frontend, "edge_limits_total", limit="connections") == 1
            async with Client(address) as client:
                assert await client.list_models() == []

    run(scenario())


def test_requests_that_come_in_part_are_bounded_together() -> None:
    async def scenario() -> None:
        async with world(edge_held_bytes_max=50_000, **NATIVE) as it:
            edge = it.frontend.edge
            assert edge is not None
            async with connect(it.frontend.address) as first:
                first.request(1)
                first.say(
                    data(1, PREFIX.pack(0, 1_000_000) + b"x" * 16_000), data(1, b"x" * 16_000)
                )
                async with connect(it.frontend.address) as second:
                    await it.until(lambda: edge.num_held > 30_000)
                    second.request(1)
                    second.say(data(1, PREFIX.pack(0, 1_000_000)), *[data(1, b"x" * 16_000)] * 2)
                    assert (await second.answer(1))[b"grpc-status"] == b"8"
                    # What the first one held is free again when it leaves.
                    first.say(frames.reset(1, ErrorCode.CANCEL))
                    await it.until(lambda: edge.num_held == 0)

    run(scenario())


def test_a_bug_that_is_met_outside_of_a_turn_of_its_call_is_told_at_once() -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **NATIVE) as it,
            connect(it.frontend.address) as client,
        ):
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
            request.params.stopping.max_tokens = 100_000
            client.generate(1, request)
            await client.until_data(1)
            edge = it.frontend.edge
            assert edge is not None
            (call,) = [one for connection in edge.clients for one in connection.calls.values()]
            assert isinstance(call, StreamingCall)
            call.crashed(ValueError("a bug"))  # As a convoy does.
            async with asyncio.timeout(5):
                assert (await client.answer(1))[b"grpc-status"] == b"13"

    run(scenario())
