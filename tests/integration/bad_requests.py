"""What a client can say wrong to a frontend."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from tests.integration.bad_input import Answer, BadInput, answer_of
from unbroken.generation import CONSTRAINT_BYTES_MAX
from unbroken.transport import METADATA_BYTES_MAX, RECEIVE_BYTES_MAX, open_channel
from unbroken.v1 import generation_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

VOCAB_SIZE = 4096
CONTEXT_LENGTH = 512
"""What the mesh is started with."""

_SERVICE = "/unbroken.v1.InferenceService"


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection to the frontend."""

    address: str
    channel: grpc.aio.Channel

    @property
    def stub(self) -> InferenceServiceStub:
        return InferenceServiceStub(self.channel)

    @property
    def untyped(self) -> Any:
        """The channel, for calls that take and give bytes."""
        return self.channel


Say = Callable[[Edge], Awaitable[Answer]]


async def _answer(call: Awaitable[object]) -> Answer:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return answer_of(error)
    return Answer("OK")


async def _read(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def _generate(*, timeout_s: float = 10.0, **fields: Any) -> Say:
    """A request of these fields; a good one apart from them."""

    async def say(edge: Edge) -> Answer:
        request = pb.GenerateRequest(**fields)
        if request.WhichOneof("prompt") is None and "prompt" not in fields:
            request.text = "hello"
        if not request.params.stopping.HasField("max_tokens"):
            request.params.stopping.max_tokens = 4
        return await _answer(_read(edge.stub.Generate(request, timeout=timeout_s)))

    return say


def _sampling(**fields: Any) -> Say:
    sampling = generation_pb2.SamplingParams(**fields)
    return _generate(params=generation_pb2.GenerationParams(sampling=sampling))


def _stopping(**fields: Any) -> Say:
    stopping = generation_pb2.StopConditions(**fields)
    return _generate(params=generation_pb2.GenerationParams(stopping=stopping))


def _constraint(**fields: Any) -> Say:
    constraint = generation_pb2.Constraint(**fields)
    return _generate(params=generation_pb2.GenerationParams(constraint=constraint))


def _no_prompt() -> Say:
    async def say(edge: Edge) -> Answer:
        return await _answer(_read(edge.stub.Generate(pb.GenerateRequest(), timeout=10)))

    return say


def _chat(role: str, content: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content)])


def _bytes(data: bytes) -> Say:
    """Bytes of our own where a GenerateRequest should be."""

    async def say(edge: Edge) -> Answer:
        return await _answer(
            _read(edge.untyped.unary_stream(f"{_SERVICE}/Generate")(data, timeout=10))
        )

    return say


def _call(method: str, request: Message) -> Say:
    path = method if method.startswith("/") else f"{_SERVICE}/{method}"
    return _bytes_at(path, request.SerializeToString())


def _bytes_at(path: str, data: bytes) -> Say:
    async def say(edge: Edge) -> Answer:
        return await _answer(edge.untyped.unary_unary(path)(data, timeout=10))

    return say


async def _resume(edge: Edge) -> Answer:
    return await _answer(_read(edge.stub.Resume(pb.ResumeRequest(), timeout=10)))


async def _duplicate(edge: Edge) -> Answer:
    request = pb.GenerateRequest(request_id="twin", text="hello")
    request.params.stopping.max_tokens = CONTEXT_LENGTH // 2
    first = edge.stub.Generate(request, timeout=20)
    await first.read()
    request.params.stopping.max_tokens = 1
    try:
        return await _answer(_read(edge.stub.Generate(request, timeout=10)))
    finally:
        first.cancel()


async def _no_message(edge: Edge) -> Answer:
    """A call that ends before its one message: gRPC itself waits for it, as long as it may."""
    return await _answer(edge.untyped.stream_unary(f"{_SERVICE}/Cancel")(iter(()), timeout=0.3))


async def _large_metadata(edge: Edge) -> Answer:
    metadata = (("x-large", "x" * (2 * METADATA_BYTES_MAX)),)
    return await _answer(
        edge.stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=10)
    )


async def _late(edge: Edge) -> Answer:
    """Which side of the connection notices first is a matter of luck."""
    request = pb.GenerateRequest(text="hello")
    answer = await _answer(_read(edge.stub.Generate(request, timeout=0)))
    return Answer(answer.code)


async def _out_of_time(edge: Edge) -> Answer:
    request = pb.GenerateRequest(text="hello")
    answer = await _answer(_read(edge.stub.Generate(request, timeout=0.2)))
    return Answer(answer.code)


def _raw(data: bytes) -> Say:
    """Bytes that are not gRPC; what counts is that the connection ends."""

    async def say(edge: Edge) -> Answer:
        host, _, port = edge.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(10):
                while await reader.read(65536):
                    pass
            return Answer("connection closed")
        except ConnectionError:
            return Answer("connection closed")
        finally:
            writer.close()

    return say


async def _abandoned(edge: Edge) -> Answer:
    """A connection that breaks in the middle of an output."""
    channel = open_channel(edge.address)
    request = pb.GenerateRequest(request_id="abandoned", text="hello")
    call = InferenceServiceStub(channel).Generate(request)
    for _ in range(3):
        await call.read()
    await channel.close()
    async with asyncio.timeout(5):
        while True:  # Until the frontend has noticed.
            info = pb.GetStreamRequest(request_id="abandoned")
            stream = (await edge.stub.GetStream(info)).stream
            if all(choice.state == pb.STREAM_STATE_DONE for choice in stream.choices):
                return Answer("stream cancelled")
            await asyncio.sleep(0.02)


def _invalid(field: str) -> Answer:
    return Answer("INVALID_ARGUMENT", "INVALID_FIELD", field)


_GARBAGE = Answer("INVALID_ARGUMENT", "PROTOCOL_VIOLATION")
_LIBRARY_TOO_LARGE = Answer("RESOURCE_EXHAUSTED")
_CLOSED = Answer("connection closed")
_REJECTED = Answer("INVALID_ARGUMENT", "REJECTED_BY_ENGINE")

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

CASES: tuple[BadInput[Edge], ...] = (
    BadInput("no prompt at all", _invalid("prompt"), _no_prompt()),
    BadInput("empty text", _invalid("text"), _generate(text="")),
    BadInput("no token ids", _invalid("token_ids.ids"), _generate(token_ids=pb.TokenIds())),
    BadInput(
        "a token id beyond the vocabulary",
        _invalid("token_ids.ids[1]"),
        _generate(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])),
    ),
    BadInput(
        "a prompt as long as the context",
        _invalid("token_ids.ids"),
        _generate(token_ids=pb.TokenIds(ids=[1] * CONTEXT_LENGTH)),
    ),
    BadInput(
        "a text longer than the context", _invalid("text"), _generate(text="word " * CONTEXT_LENGTH)
    ),
    BadInput(
        "a text of more than 4 MiB", _invalid("text"), _generate(text="x" * (4 * 1024 * 1024 + 1))
    ),
    BadInput("a chat without messages", _invalid("chat.messages"), _generate(chat=pb.Chat())),
    BadInput(
        "an unknown role",
        _invalid("chat.messages[0].role"),
        _generate(chat=_chat("wizard", "hello")),
    ),
    BadInput("max_tokens of 0", _invalid("params.stopping.max_tokens"), _stopping(max_tokens=0)),
    BadInput(
        "min_tokens above max_tokens",
        _invalid("params.stopping.min_tokens"),
        _stopping(max_tokens=2, min_tokens=3),
    ),
    BadInput(
        "min_tokens beyond the context",
        _invalid("params.stopping.min_tokens"),
        _stopping(max_tokens=2**31, min_tokens=CONTEXT_LENGTH),
    ),
    BadInput(
        "temperature NaN", _invalid("params.sampling.temperature"), _sampling(temperature=math.nan)
    ),
    BadInput(
        "temperature infinite",
        _invalid("params.sampling.temperature"),
        _sampling(temperature=math.inf),
    ),
    BadInput(
        "temperature negative", _invalid("params.sampling.temperature"), _sampling(temperature=-0.5)
    ),
    BadInput("top_p of 0", _invalid("params.sampling.top_p"), _sampling(top_p=0)),
    BadInput("top_p above 1", _invalid("params.sampling.top_p"), _sampling(top_p=1.5)),
    BadInput("min_p NaN", _invalid("params.sampling.min_p"), _sampling(min_p=math.nan)),
    BadInput(
        "presence_penalty above 2",
        _invalid("params.sampling.presence_penalty"),
        _sampling(presence_penalty=2.5),
    ),
    BadInput(
        "frequency_penalty infinite",
        _invalid("params.sampling.frequency_penalty"),
        _sampling(frequency_penalty=-math.inf),
    ),
    BadInput(
        "repetition_penalty of 0",
        _invalid("params.sampling.repetition_penalty"),
        _sampling(repetition_penalty=0),
    ),
    BadInput(
        "a logit bias for no token",
        _invalid("params.sampling.logit_bias"),
        _sampling(logit_bias={VOCAB_SIZE: 1.0}),
    ),
    BadInput(
        "a logit bias of NaN",
        _invalid("params.sampling.logit_bias[7]"),
        _sampling(logit_bias={7: math.nan}),
    ),
    BadInput(
        "too many logit biases",
        _invalid("params.sampling.logit_bias"),
        _sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
    ),
    BadInput(
        "too many stop strings",
        _invalid("params.stopping.stop"),
        _stopping(stop=[f"stop {index}" for index in range(17)]),
    ),
    BadInput(
        "a stop string of 257 bytes",
        _invalid("params.stopping.stop[0]"),
        _stopping(stop=["x" * 257]),
    ),
    BadInput(
        "an empty stop string", _invalid("params.stopping.stop[1]"), _stopping(stop=["a", ""])
    ),
    BadInput(
        "a stop token beyond the vocabulary",
        _invalid("params.stopping.stop_token_ids[0]"),
        _stopping(stop_token_ids=[2**32 - 1]),
    ),
    BadInput(
        "too many stop tokens",
        _invalid("params.stopping.stop_token_ids"),
        _stopping(stop_token_ids=range(65)),
    ),
    BadInput(
        "too many top log probabilities",
        _invalid("params.logprobs.num_top"),
        _generate(
            params=generation_pb2.GenerationParams(
                logprobs=generation_pb2.LogprobParams(num_top=21)
            )
        ),
    ),
    BadInput(
        "a constraint of more than 64 KiB",
        _invalid("params.constraint"),
        _constraint(regex="a" * (CONSTRAINT_BYTES_MAX + 1)),
    ),
    BadInput("an empty regex", _invalid("params.constraint.regex"), _constraint(regex="")),
    BadInput(
        "json_object of false",
        _invalid("params.constraint.json_object"),
        _constraint(json_object=False),
    ),
    BadInput(
        "a choice without options",
        _invalid("params.constraint.choice.options"),
        _constraint(choice=generation_pb2.Choice()),
    ),
    BadInput(
        "a choice with an empty option",
        _invalid("params.constraint.choice.options"),
        _constraint(choice=generation_pb2.Choice(options=["yes", ""])),
    ),
    BadInput("a regex that is none", _REJECTED, _constraint(regex="a(b")),
    BadInput("a regex that looks around", _REJECTED, _constraint(regex="a(?=b)")),
    BadInput("a schema that is not JSON", _REJECTED, _constraint(json_schema="{")),
    BadInput("a schema that is none", _REJECTED, _constraint(json_schema='{"type": "whale"}')),
    BadInput("a grammar that is none", _REJECTED, _constraint(lark="start: ((")),
    BadInput("too many choices", _invalid("num_choices"), _generate(num_choices=17)),
    BadInput("an unknown continuation", _invalid("continuation"), _generate(continuation=99)),
    BadInput("too many migrations", _invalid("migrations_max"), _generate(migrations_max=1001)),
    BadInput(
        "REQUIRE_EXACT without a migration",
        _invalid("migrations_max"),
        _generate(migrations_max=0, continuation=pb.CONTINUATION_POLICY_REQUIRE_EXACT),
    ),
    BadInput("a priority of 101", _invalid("priority"), _generate(priority=101)),
    BadInput(
        "a request_id of 129 characters", _invalid("request_id"), _generate(request_id="x" * 129)
    ),
    BadInput("a request_id with a line feed", _invalid("request_id"), _generate(request_id="a\nb")),
    BadInput("a request_id beyond ASCII", _invalid("request_id"), _generate(request_id="naïve")),
    BadInput(
        "a request that is its own parent",
        _invalid("parent_request_id"),
        _generate(request_id="p", parent_request_id="p"),
    ),
    BadInput("a tenant beyond ASCII", _invalid("tenant"), _generate(tenant="Ünal")),
    BadInput(
        "an orphan_grace of 11 minutes",
        _invalid("orphan_grace"),
        _generate(orphan_grace=Duration(seconds=660)),
    ),
    BadInput(
        "a negative orphan_grace",
        _invalid("orphan_grace"),
        _generate(orphan_grace=Duration(seconds=-1)),
    ),
    BadInput(
        "a reader_grace of a day",
        _invalid("reader_grace"),
        _generate(reader_grace=Duration(seconds=86_400)),
    ),
    BadInput(
        "an unknown model", Answer("NOT_FOUND", "MODEL_NOT_FOUND"), _generate(model="whale-70b")
    ),
    BadInput("the request_id of another", Answer("ALREADY_EXISTS", "REQUEST_EXISTS"), _duplicate),
    BadInput("a deadline that is over", Answer("DEADLINE_EXCEEDED"), _late),
    BadInput("a deadline in mid-stream", Answer("DEADLINE_EXCEEDED"), _out_of_time),
    BadInput("Cancel without an id", _invalid("request_id"), _call("Cancel", pb.CancelRequest())),
    BadInput(
        "GetStream without an id", _invalid("request_id"), _call("GetStream", pb.GetStreamRequest())
    ),
    BadInput(
        "GetStream of nobody",
        Answer("NOT_FOUND", "STREAM_NOT_FOUND"),
        _call("GetStream", pb.GetStreamRequest(request_id="nobody")),
    ),
    BadInput(
        "pages of 1,001",
        _invalid("page_size"),
        _call("ListStreams", pb.ListStreamsRequest(page_size=1001)),
    ),
    BadInput(
        "a page token of somebody else",
        _invalid("page_token"),
        _call("ListStreams", pb.ListStreamsRequest(page_token="bm9uc2Vuc2U=")),
    ),
    BadInput(
        "Resume without a token", Answer("PERMISSION_DENIED", "RESUME_TOKEN_INVALID"), _resume
    ),
    BadInput("an unknown method", Answer("UNIMPLEMENTED"), _call("Whistle", pb.CancelRequest())),
    BadInput(
        "an unknown service",
        Answer("UNIMPLEMENTED"),
        _call("/unbroken.v1.TeaService/Brew", pb.CancelRequest()),
    ),
    BadInput("bytes that are no message", _GARBAGE, _bytes(b"\xff" * 64)),
    BadInput(
        "a message cut short",
        _GARBAGE,
        _bytes(pb.GenerateRequest(text="x" * 100).SerializeToString()[:50]),
    ),
    BadInput("text that is not UTF-8", _GARBAGE, _bytes(b"\x22\x02\xff\xfe")),
    BadInput("a length where a number belongs", _GARBAGE, _bytes(b"\x3d\x01")),
    BadInput(
        "bytes that are no message, for a single answer",
        _GARBAGE,
        _bytes_at(f"{_SERVICE}/Cancel", b"\x0a\xff"),
    ),
    BadInput("a call without its message", Answer("DEADLINE_EXCEEDED"), _no_message),
    BadInput(
        "a message of more than 16 MiB",
        _LIBRARY_TOO_LARGE,
        _bytes(bytes(RECEIVE_BYTES_MAX + 1)),
    ),
    BadInput("metadata of 32 KiB", _LIBRARY_TOO_LARGE, _large_metadata),
    BadInput("bytes that are not HTTP/2", _CLOSED, _raw(b"\x00\xff" * 4096)),
    BadInput("HTTP/1.1", _CLOSED, _raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
    BadInput(
        "a TLS handshake",
        _CLOSED,
        _raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)),
    ),
    BadInput(
        "an HTTP/2 frame of 16 MiB",
        _CLOSED,
        _raw(_PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"),
    ),
    BadInput(
        "a settings frame on a stream",
        _CLOSED,
        _raw(_PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x05"),
    ),
    BadInput("a connection that breaks in mid-stream", Answer("stream cancelled"), _abandoned),
)
