"""gRPC's specification on a real socket, where docs/EDGE.md names no test closer to the code.

By a client that says bytes of the test's choosing: gRPC's own never do most of this.
"""

import itertools
import zlib
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.frontend.edge.peer import REQUEST, data
from tests.frontend.edge.raw import RawClient, connect
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, run, world
from unbroken.http2 import frames
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.headers import Fields
from unbroken.http2.messages import PREFIX, MessageReader
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

PROMPT = list(b"once upon a time")
PATIENT: dict[str, Any] = {"client_ping_interval_s": 60}
"""The raw client answers no pings."""
NATIVE: dict[str, Any] = {"edge": "native", **PATIENT}
CHECK = "/grpc.health.v1.Health/Check"


def request(max_tokens: int = 10) -> pb.GenerateRequest:
    """One whose output is known."""
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
    asked.params.stopping.max_tokens = max_tokens
    asked.params.sampling.temperature = 0
    return asked


def fields(
    *more: tuple[bytes, bytes], path: str = "", without: bytes = b""
) -> list[tuple[bytes, bytes]]:
    """Those of a request for Generate or another method."""
    given = [field for field in REQUEST if field[0] != without]
    if path:
        given = [(n, path.encode() if n == b":path" else value) for n, value in given]
    return [*given, *more]


def call(client: RawClient, stream_id: int, given: Fields, message: bytes) -> None:
    """A whole request."""
    client.request(stream_id, given)
    client.say(data(stream_id, PREFIX.pack(0, len(message)) + message, ends=True))


@dataclass
class Answer:
    """An answer, frame by frame."""

    kinds: list[int] = field(default_factory=list[int])
    sections: list[dict[bytes, bytes]] = field(default_factory=list[dict[bytes, bytes]])
    """The fields in each frame of HEADERS."""
    body: bytes = b""

    @property
    def ids(self) -> list[int]:
        """Its tokens, if it is one of Generate."""
        messages = map(pb.GenerateResponse.FromString, MessageReader(None, 9999).feed(self.body))
        return [token_id for message in messages for token_id in message.token_ids]


async def answer_of(client: RawClient, stream_id: int = 1) -> Answer:
    """The answer on that stream, up to its end."""
    answer = Answer()
    while (frame := await client.frame()) is not None:
        section = client.fields(frame) if frame.kind == FrameType.HEADERS else []
        if frame.stream_id != stream_id or frame.kind not in (FrameType.HEADERS, FrameType.DATA):
            continue
        answer.kinds.append(frame.kind)
        if frame.kind == FrameType.HEADERS:
            answer.sections.append(dict(section))
        else:
            answer.body += frame.payload
        if frame.flags & frames.END_STREAM:
            return answer
    raise AssertionError("expected an answer, the connection ended")


async def until_it_runs(it: World) -> FakeSidecar:
    """Wait for one attempt at the only worker."""
    (sidecar,) = it.sidecars
    await it.until(lambda: sidecar.running)
    return sidecar


# Answers.


@pytest.mark.usefixtures("each_edge")
def test_an_answer_is_headers_messages_and_trailers_with_a_status_that_may_be_0() -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            client.generate(1, request())
            answer = await answer_of(client)
            first, *bodies, last = answer.kinds
            assert (first, last) == (FrameType.HEADERS, FrameType.HEADERS)
            assert set(bodies) == {FrameType.DATA}
            head, end = answer.sections
            assert head[b":status"] == b"200"
            assert head[b"content-type"].startswith(b"application/grpc")
            assert b"grpc-status" not in head
            assert end[b"grpc-status"] == b"0"
            assert not [name for name in end if name.startswith(b":")]
            assert answer.ids == reference(PROMPT, 10)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize(
    ("path", "code"),
    [("", b"5"), ("/unbroken.v1.InferenceService/GetStream", b"3"), ("/no.such/Thing", b"12")],
)
def test_an_error_before_any_message_is_trailers_only(path: str, code: bytes) -> None:
    async def scenario() -> None:
        async with world(**PATIENT) as it, connect(it.frontend.address) as client:
            message = b"" if path else pb.GenerateRequest(model="x").SerializeToString()
            call(client, 1, fields(path=path), message)
            answer = await answer_of(client)
            assert answer.kinds == [FrameType.HEADERS]
            (only,) = answer.sections
            assert only[b":status"] == b"200"
            assert only[b"content-type"].startswith(b"application/grpc")
            assert only[b"grpc-status"] == code

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_clients_read_what_a_status_says_in_any_language() -> None:
    name = "größer als 100 % 模型"

    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            stub = InferenceServiceStub(await it.client.channel())
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await anext(aiter(stub.Generate(pb.GenerateRequest(text="x", model=name))))
            assert name in (error.value.details() or "")

    run(scenario())


# Requests.


def test_a_request_without_te_is_served() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **NATIVE) as it, connect(it.frontend.address) as client:
            call(client, 1, fields(without=b"te"), request().SerializeToString())
            assert (await answer_of(client)).ids == reference(PROMPT, 10)
            call(client, 3, fields(without=b"te", path=CHECK), b"")
            assert (await client.answer(3))[b"grpc-status"] == b"0"

    run(scenario())


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("path", ["", CHECK])
def test_unknown_fields_of_grpc_are_ignored(path: str) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            more = [(b"grpc-foo", b"bar"), (b"grpc-foo-bin", b"AAE")]
            call(
                client, 1, fields(*more, path=path), b"" if path else request().SerializeToString()
            )
            assert (await client.answer(1))[b"grpc-status"] == b"0"

    run(scenario())


JOINED = b"AAE=,AAE"
"""Two values in one field, which only our edge takes."""


@pytest.mark.parametrize(
    ("edge", "value"),
    [*itertools.product(["grpcio", "native"], [b"AAE=", b"AAE"]), ("native", JOINED)],
)
def test_binary_metadata_is_taken_padded_or_not(edge: str, value: bytes) -> None:
    async def scenario() -> None:
        async with world(edge=edge, **PATIENT) as it, connect(it.frontend.address) as client:
            call(client, 1, fields((b"x-bin", value), path=CHECK), b"")
            assert (await client.answer(1))[b"grpc-status"] == b"0"

    run(scenario())


@pytest.mark.parametrize(
    ("edge", "encoding", "code"),
    [
        ("native", b"deflate", b"12"),
        ("native", b"snappy", b"12"),
        ("grpcio", b"deflate", b"0"),
        ("grpcio", b"snappy", b"13"),
    ],
)
def test_another_compression_than_gzip_is_what_the_edges_differ_in(
    edge: str, encoding: bytes, code: bytes
) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), edge=edge, **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            message = zlib.compress(request().SerializeToString())
            client.request(1, fields((b"grpc-encoding", encoding)))
            client.say(data(1, PREFIX.pack(1, len(message)) + message, ends=True))
            answer = await client.answer(1)
            assert answer[b"grpc-status"] == code
            if code == b"12":
                assert answer[b"grpc-accept-encoding"] == b"identity,gzip"

    run(scenario())


# Time.


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("timeout", [b"300m", b"300000u", b"300000n"])
def test_a_timeout_ends_the_call_and_its_work(timeout: bytes) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1", step_s=None), **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            call(client, 1, fields((b"grpc-timeout", timeout)), request().SerializeToString())
            assert (await client.answer(1))[b"grpc-status"] == b"4"
            await it.until(lambda: it.num_running() == 0)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("timeout", [b"", b"1H"])
def test_a_call_without_a_timeout_has_no_deadline_anywhere(timeout: bytes) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1", step_s=None), **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            more = [(b"grpc-timeout", timeout)] if timeout else []
            call(client, 1, fields(*more), request().SerializeToString())
            sidecar = await until_it_runs(it)
            assert sidecar.starts[0].HasField("deadline") == bool(timeout)

    run(scenario())


# The end of a call by its client.


CODES = [ErrorCode.CANCEL, ErrorCode.NO_ERROR, ErrorCode.REFUSED_STREAM, ErrorCode.INTERNAL_ERROR]


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("code", [*CODES, 0xFF])
def test_a_reset_cancels_the_call_whatever_its_code_and_no_other(code: int) -> None:
    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1", step_s=None), **PATIENT) as it,
            connect(it.frontend.address) as client,
        ):
            client.generate(1, request())
            sidecar = await until_it_runs(it)
            client.generate(3, request())
            await it.until(lambda: len(sidecar.running) == 2)
            client.say(frames.frame(FrameType.RST_STREAM, 0, 1, code.to_bytes(4, "big")))
            await sidecar.until(lambda: len(sidecar.aborts) == 1)
            await it.until(lambda: it.num_running() == 1)
            while sidecar.step() is not None:
                pass
            assert (await answer_of(client, 3)).ids == reference(PROMPT, 10)

    run(scenario())
