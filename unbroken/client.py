"""The client library: streams of tokens, checked against the contract as they arrive.

    async with Client("127.0.0.1:7400") as client:
        stream = client.generate(prompt="Once upon a time", max_tokens=64, temperature=0)
        async for piece in stream:
            print(piece.text, end="")
        print(stream.finished.usage.completion_tokens)

Every failure is an `UnbrokenError` with a reason of docs/ERRORS.md.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypedDict, TypeVar

import grpc
import grpc.aio
from typing_extensions import Unpack

from unbroken import status
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.generation import TokenLogprobs, logprobs_from_proto
from unbroken.transport import open_channel
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import admin_service_pb2_grpc as admin_grpc
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as inference_grpc

if TYPE_CHECKING:  # A generic class in the stubs only.
    _Call: TypeAlias = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]

CONNECT_TIMEOUT_S: Final = 2.0
"""How long one of several frontends may take to accept a connection before the next is tried."""

CALL_TIMEOUT_S: Final = 10.0
"""Deadline of calls other than `generate`."""

_STREAMS_PAGE_SIZE: Final = 1000

_ResponseT = TypeVar("_ResponseT")


class Params(TypedDict, total=False):
    """What shapes an output. Absent means the default; generation.proto has ranges and meanings."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    include_stop: bool
    json_schema: str
    json_object: bool
    regex: str
    lark: str
    choice: Sequence[str]
    num_top_logprobs: int


class Options(TypedDict, total=False):
    """What concerns a request apart from its prompt and output."""

    request_id: str
    model: str
    num_choices: int
    continuation: pb.ContinuationPolicy.ValueType
    migrations_max: int
    priority: int
    tenant: str
    parent_request_id: str
    orphan_grace_s: float


class GenerateOptions(Params, Options, total=False):
    """All keywords of `generate` apart from the prompt and the timeout."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one choice's output. Pieces of a choice follow each other without gaps."""

    choice_index: int
    offset: int
    """Position of the first token in the choice's output."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain with these tokens; it can lag behind them."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token, if asked for."""


class GenerationStream:
    """The output of one request: an async iterator of pieces.

    Used as a context manager, it cancels the request if it is left before the end. Iterating raises
    `UnbrokenError`: the frontend's, `WORKER_LOST` if the call ends without a word about its end,
    `PROTOCOL_VIOLATION` if the frontend breaks the contract. What was yielded is correct even then.
    """

    def __init__(
        self, client: "Client", request: pb.GenerateRequest, timeout_s: float | None
    ) -> None:
        self._client = client
        self._request = request
        self._timeout_s = timeout_s
        self._call: _Call | None = None
        self._checker = _ContractChecker(request)
        self._is_over = False

    @property
    def started(self) -> pb.StreamStarted | None:
        """How the frontend opened the stream: ids, continuation class, seed. None until then."""
        return self._checker.started

    @property
    def finished(self) -> pb.StreamFinished | None:
        """How the stream ended: finish reasons, usage, attempts. None until then."""
        return self._checker.finished

    @property
    def request_id(self) -> str:
        """Identity of the request; empty until known."""
        return self.started.request_id if self.started else self._request.request_id

    async def text(self) -> str:
        """Read to the end; the text of the first choice."""
        return "".join([piece.text async for piece in self if piece.choice_index == 0])

    async def cancel(self) -> None:
        """Stop reading, and let the frontend know. Idempotent."""
        self._is_over = True
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._is_over:
            response = await self._read()
            if response is None:
                self._is_over = True
                self._checker.close()
                break
            try:
                self._checker.check(response)
            except UnbrokenError:
                await self.cancel()
                raise
            if response.token_ids or response.text:
                return Piece(
                    response.choice_index,
                    response.offset,
                    tuple(response.token_ids),
                    response.text,
                    tuple(map(logprobs_from_proto, response.logprobs)),
                )
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.cancel()

    async def _read(self) -> pb.GenerateResponse | None:
        """The next message; None at the end of the call."""
        try:
            if self._call is None:
                stub = inference_grpc.InferenceServiceStub(await self._client.channel())
                self._call = stub.Generate(self._request, timeout=self._timeout_s)
            response = await self._call.read()
        except grpc.RpcError as error:
            self._is_over = True
            raise status.from_rpc_error(error) from error
        except BaseException:
            await self.cancel()
            raise
        return None if response is grpc.aio.EOF else response  # pyright: ignore[reportReturnType]


class Client:
    """Talks to a frontend. Safe for many concurrent calls of one event loop.

    Of several addresses the first that can be reached serves a call. A stream whose frontend dies
    ends with `UNREACHABLE`; this version does not resume it on another.
    """

    def __init__(self, *addresses: str, call_timeout_s: float = CALL_TIMEOUT_S) -> None:
        """`addresses` are "host:port", at least one. Connections are made when needed."""
        if not addresses:
            raise ValueError("expected the address of a frontend, got none")
        self._addresses = addresses
        self._call_timeout_s = call_timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; calls that still run are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    def generate(
        self,
        *,
        prompt: str | None = None,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Mapping[str, str]] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """The output for exactly one of `prompt` (text), `token_ids` and `messages`.

        Messages have a `role` and a `content`. `timeout_s` bounds the whole generation. The call
        begins with the first read. Raises `InvalidField` for what no frontend would take.
        """
        request = request_to_proto(prompt, token_ids, messages, options)
        return self.start(request, timeout_s=timeout_s)

    def start(
        self, request: pb.GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """As `generate`, from a request of the contract."""
        return GenerationStream(self, request, timeout_s)

    async def cancel(self, request_id: str, *, is_soft: bool = False) -> bool:
        """End a request, from any connection. False: it is not known there, or had ended.

        Soft: the current engine step is finished and its tokens are delivered.
        """
        request = pb.CancelRequest(request_id=request_id, soft=is_soft)
        stub = inference_grpc.InferenceServiceStub(await self.channel())
        return (await _answer(stub.Cancel(request, timeout=self._call_timeout_s))).was_running

    async def list_models(self) -> Sequence[pb.ModelInfo]:
        """The models that workers serve now or served before, by name."""
        stub = inference_grpc.InferenceServiceStub(await self.channel())
        request = pb.ListModelsRequest()
        return (await _answer(stub.ListModels(request, timeout=self._call_timeout_s))).models

    async def get_stream(self, request_id: str) -> pb.StreamInfo:
        """One request of this frontend; raises `STREAM_NOT_FOUND`."""
        stub = inference_grpc.InferenceServiceStub(await self.channel())
        request = pb.GetStreamRequest(request_id=request_id)
        return (await _answer(stub.GetStream(request, timeout=self._call_timeout_s))).stream

    async def list_streams(self) -> AsyncIterator[pb.StreamInfo]:
        """The requests of this frontend, oldest first, page by page."""
        stub = inference_grpc.InferenceServiceStub(await self.channel())
        request = pb.ListStreamsRequest(page_size=_STREAMS_PAGE_SIZE)
        while True:
            page = await _answer(stub.ListStreams(request, timeout=self._call_timeout_s))
            for stream in page.streams:
                yield stream
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def list_workers(self) -> Sequence[admin_pb.WorkerInfo]:
        """The workers as this frontend sees them, by name."""
        stub = admin_grpc.AdminServiceStub(await self.channel())
        request = admin_pb.ListWorkersRequest()
        return (await _answer(stub.ListWorkers(request, timeout=self._call_timeout_s))).workers

    async def channel(self) -> grpc.aio.Channel:
        """The channel for the next call; for services that this class does not know.

        With several addresses, the first that can be reached; raises `UNREACHABLE` if none can.
        """
        if len(self._addresses) == 1:
            return self._open(self._addresses[0])  # The call itself finds out.
        for address in self._addresses:
            channel = self._open(address)
            if await _is_connected(channel):
                return channel
        raise UnbrokenError(
            Reason.UNREACHABLE, f"expected a frontend at one of {', '.join(self._addresses)}"
        )

    def _open(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]


class _ContractChecker:
    """Holds one call's messages against the contract (inference_service.proto)."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.started: pb.StreamStarted | None = None
        self.finished: pb.StreamFinished | None = None
        self._wants_logprobs = request.params.HasField("logprobs")
        self._offsets = [0] * max(1, request.num_choices)

    def check(self, response: pb.GenerateResponse) -> None:
        """Take in the next message; raises `PROTOCOL_VIOLATION`."""
        index, num_tokens = response.choice_index, len(response.token_ids)
        if self.finished is not None:
            raise _violation("nothing after `finished`", f"a message at offset {response.offset}")
        if response.HasField("started") != (self.started is None):
            raise _violation("`started` in the first message and only there", "it elsewhere")
        if response.HasField("started"):
            self.started = response.started
        if index >= len(self._offsets):
            raise _violation(f"choices below {len(self._offsets)}", f"choice {index}")
        if num_tokens:
            if response.offset != self._offsets[index]:
                raise _violation(
                    f"offset {self._offsets[index]} of choice {index}", f"offset {response.offset}"
                )
            if len(response.logprobs) != (num_tokens if self._wants_logprobs else 0):
                raise _violation(
                    f"log probabilities {'for each of' if self._wants_logprobs else 'for none of'} "
                    f"{num_tokens} tokens",
                    f"{len(response.logprobs)}",
                )
            self._offsets[index] += num_tokens
        if response.HasField("finished"):
            self._check_end(response.finished)
            self.finished = response.finished

    def close(self) -> None:
        """The call ended without an error; raises unless it may."""
        if self.finished is None:
            raise UnbrokenError(
                Reason.WORKER_LOST, "expected `finished` before the end of the stream, got none"
            )

    def _check_end(self, finished: pb.StreamFinished) -> None:
        ends = [(choice.choice_index, choice.num_tokens) for choice in finished.choices]
        if ends != list(enumerate(self._offsets)):
            raise _violation(f"choices to end at {self._offsets}", f"ends (choice, offset) {ends}")


def request_to_proto(
    prompt: str | None,
    token_ids: Iterable[int] | None,
    messages: Iterable[Mapping[str, str]] | None,
    options: GenerateOptions,
) -> pb.GenerateRequest:
    """The request of the contract; raises `InvalidField` for what it cannot say."""
    prompts = {"prompt": prompt, "token_ids": token_ids, "messages": messages}
    given = [name for name, value in prompts.items() if value is not None]
    if len(given) != 1:
        raise InvalidField("prompt", "exactly one of prompt, token_ids, messages", given)
    languages = sorted(_LANGUAGES & options.keys())
    if len(languages) > 1:
        raise InvalidField("constraint", "at most one", languages)
    request = pb.GenerateRequest()
    for name, value in (prompts | options).items():
        if value is None:
            continue
        try:
            _set(request, name, value)
        except (TypeError, ValueError) as error:  # protobuf's; its text names types and ranges.
            raise InvalidField(name, f"what its field can hold ({error})", value) from error
    return request


_LANGUAGES: Final = frozenset({"json_schema", "json_object", "regex", "lark", "choice"})


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """Put one keyword where it belongs; raises TypeError or ValueError if it does not fit."""
    params = request.params
    match name:
        case "prompt":
            request.text = value
        case "token_ids":
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(value)
        case "messages":
            request.chat.SetInParent()
            for message in value:
                request.chat.messages.add(**message)
        case "num_top_logprobs":
            params.logprobs.SetInParent()
            params.logprobs.num_top = value
        case "choice":
            params.constraint.choice.SetInParent()
            params.constraint.choice.options.extend(value)
        case "orphan_grace_s":
            request.orphan_grace.FromNanoseconds(round(value * 1e9))
        case "logit_bias":
            params.sampling.logit_bias.update(value)
        case "stop" | "stop_token_ids":
            if isinstance(value, str):
                raise TypeError("a list, not a text")
            getattr(params.stopping, name).extend(value)
        case _ if name in _LANGUAGES:
            setattr(params.constraint, name, value)
        case _ if name in Options.__annotations__:
            setattr(request, name, value)
        case _ if name in Params.__annotations__:
            is_sampling = name in params.sampling.DESCRIPTOR.fields_by_name
            setattr(params.sampling if is_sampling else params.stopping, name, value)
        case _:
            raise TypeError("`generate` has no such keyword")


async def _answer(call: Awaitable[_ResponseT]) -> _ResponseT:
    try:
        return await call
    except grpc.RpcError as error:
        raise status.from_rpc_error(error) from error


async def _is_connected(channel: grpc.aio.Channel) -> bool:
    """Whether `channel` is, or soon gets, connected."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            state = channel.get_state(try_to_connect=True)
            while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        return False
    return state is grpc.ChannelConnectivity.READY


def _violation(expected: str, seen: str) -> UnbrokenError:
    return UnbrokenError(Reason.PROTOCOL_VIOLATION, f"expected {expected}, got {seen}")
