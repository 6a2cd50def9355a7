"""What the gRPC protocols of the package smg-grpc-proto have in common: vLLM, SGLang, TensorRT-LLM.

They are separate protocols with messages, numbers and meanings of their own; the same are the shape
of a call, the archive with the tokenizer, and the stream of KV events with load records.
"""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from smg_grpc_proto.generated import common_pb2  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from sidecar.engines.adapter import (
    Adapter,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Call,
    CallFailed,
    Delta,
    Discovered,
    LoadOfRank,
    NotReady,
    Tapped,
    Unhealthy,
    Unusable,
)
from sidecar.engines.model_directory import read_directory
from sidecar.engines.tokenizer_files import ARCHIVE_BYTES_MAX, BadTokenizer, unpack
from unbroken.calls.channel import Answers, Channel
from unbroken.generation import TokenLogprobs
from unbroken.outcome import FailureKind

_DISCOVER_TIMEOUT_S: Final = 10.0
_TOKENIZER_TIMEOUT_S: Final = 60.0
_LOAD_TIMEOUT_S: Final = 2.0
_REJECTED: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,  # Of a constraint that cannot be followed.
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
_ON_DEVICE: Final = (0, 1)  # KvCacheTier: not told, or the accelerator's own memory.


class SmgAdapter(Adapter):
    """One channel to one engine. Subclasses have the messages.

    The channel is ours: a message through grpc.aio costs most of what a token may.
    """

    health_timeout_s = 10.0
    _service: ClassVar[ServiceDescriptor]
    """The protocol."""

    def __init__(self, address: str, tokenizer: Path | None = None) -> None:
        """`tokenizer` is a directory with its files, for engines that hand out none.

        Raises ValueError for an address that is none.
        """
        self._channel = Channel(address)
        self._methods = {
            name: (f"/{self._service.full_name}/{name}", GetMessageClass(method.output_type))
            for name, method in self._service.methods_by_name.items()
        }
        self._tokenizer = tokenizer
        self._has_taps = True
        self._num_ranks = 1
        self._is_cleared = False

    # Of each protocol.

    @abstractmethod
    async def _describe(self) -> Discovered:
        """Ask what it is. Raises `grpc.aio.AioRpcError`, `BadTokenizer`."""

    @abstractmethod
    def _request(self, call: Call) -> Message:
        """A call in its words."""

    @abstractmethod
    def _delta(self, call: Call, response: Any, num_before: int) -> Delta | None:
        """What a response says that is new, after so many tokens; None: nothing."""

    # Of all.

    @override
    async def discover(self) -> Discovered:
        try:
            async with asyncio.timeout(_DISCOVER_TIMEOUT_S + _TOKENIZER_TIMEOUT_S):
                await self._check_serving()
                found = await self._describe()
        except TimeoutError:
            raise NotReady("it does not say what it is") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise Unusable(f"it speaks another protocol: {_said(error)}") from error
            raise NotReady(_said(error)) from error
        except BadTokenizer as error:
            raise Unusable(f"its tokenizer cannot be used: {error}") from error
        self._num_ranks = found.num_ranks
        return found

    @override
    async def generate(self, call: Call) -> AsyncGenerator[Delta]:
        num = 0
        try:
            async with self._answers("Generate", self._request(call)) as answers:
                # Half a microsecond counts here: `read` is cheaper than an iterator.
                while (response := await answers.read()) is not None:
                    delta = self._delta(call, response, num)
                    if delta is not None:
                        num += len(delta.token_ids)
                        yield delta
        except grpc.aio.AioRpcError as error:
            raise failed(error) from error

    @override
    async def check_health(self) -> None:
        try:
            await self._check_serving()
        except NotReady as error:
            raise Unhealthy(f"{error}") from error
        except grpc.aio.AioRpcError as error:
            raise Unhealthy(f"the engine refuses calls: {_said(error)}") from error

    async def _check_serving(self) -> None:
        """The standard service's word, if it is there. Its `Watch` ends at once: it is asked."""
        try:
            response = await self._channel.unary(
                _HEALTH_CHECK, health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
                return
            raise
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            raise NotReady("the engine says that it does not serve")

    @override
    async def load(self) -> Sequence[LoadOfRank]:
        return ()

    @override
    async def taps(self) -> AsyncIterator[Tapped]:
        if not self._has_taps:
            return
        for cleared in self._cleared():  # What was told is not kept up to date any more.
            yield cleared
        request = common_pb2.SubscribeKvEventsRequest(load_records_before_first_batch=True)
        sequences: dict[int, int] = {}  # By rank.
        try:
            async with self._answers("SubscribeKvEvents", request) as batches:
                while (batch := await batches.read()) is not None:
                    rank = batch.dp_rank
                    if batch.HasField("load"):
                        yield load_of_record(rank, batch.load)
                        if batch.load.load_only:
                            continue
                    before = sequences.get(rank)
                    if before is not None and batch.sequence_number > before + 1:
                        return  # Something is missing, so all of it is asked for again.
                    sequences[rank] = batch.sequence_number
                    for event in batch.events:
                        for tapped in block_events(rank, event):
                            self._is_cleared = False
                            yield tapped
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                self._has_taps = False
                return
            raise failed(error) from error

    def _cleared(self) -> Sequence[BlocksCleared]:
        """That nothing is reusable, unless nothing was said to be since that was said last."""
        was_cleared, self._is_cleared = self._is_cleared, True
        return () if was_cleared else [BlocksCleared(rank) for rank in range(self._num_ranks)]

    @override
    async def close(self) -> None:
        await self._channel.close()

    async def _ask(
        self, method: str, request: Message, *, timeout_s: float | None = _DISCOVER_TIMEOUT_S
    ) -> Any:
        """Raises `grpc.aio.AioRpcError`."""
        path, response = self._methods[method]
        return await self._channel.unary(path, request, response, timeout_s=timeout_s)

    @asynccontextmanager
    async def _answers(
        self, method: str, request: Message, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Answers[Any]]:
        """A call with more than one. Leaving it frees the request at the engine."""
        path, response = self._methods[method]
        answers = await self._channel.stream(path, request, response, timeout_s=timeout_s)
        try:
            yield answers
        finally:
            answers.cancel()

    async def _ask_load(self, request: Message) -> Any:
        try:
            return await self._ask("GetLoads", request, timeout_s=_LOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise failed(error) from error

    async def _ask_health(self) -> Any:
        """The protocol's own word. Raises `Unhealthy`."""
        try:
            request = GetMessageClass(self._service.methods_by_name["HealthCheck"].input_type)()
            return await self._ask("HealthCheck", request, timeout_s=None)
        except grpc.aio.AioRpcError as error:
            raise Unhealthy(f"the engine refuses calls: {error.details()}") from error

    async def _tell_abort(self, request: Message) -> None:
        """Closing a call says the same; this one may come to nothing."""
        with suppress(grpc.aio.AioRpcError):
            await self._ask("Abort", request, timeout_s=None)

    async def _tokenizer_files(self, told_path: str) -> Mapping[str, bytes]:
        """From the operator, the engine, or where the engine has them. Raises `BadTokenizer`."""
        if self._tokenizer is not None:
            return await asyncio.to_thread(read_directory, self._tokenizer)
        packed, sha256 = bytearray(), ""
        try:
            request = common_pb2.GetTokenizerRequest()
            async with self._answers(
                "GetTokenizer", request, timeout_s=_TOKENIZER_TIMEOUT_S
            ) as chunks:
                while (chunk := await chunks.read()) is not None:
                    packed += chunk.data
                    sha256 = chunk.sha256 or sha256
                    if len(packed) > ARCHIVE_BYTES_MAX:
                        raise BadTokenizer(f"expected at most {ARCHIVE_BYTES_MAX} bytes")
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise
            directory = Path(told_path)
            if told_path and await asyncio.to_thread(directory.is_dir):
                return await asyncio.to_thread(read_directory, directory)
            raise BadTokenizer(
                f"the engine hands out none ({_said(error)}); say where its files are with "
                "--engine-tokenizer"
            ) from error
        return await asyncio.to_thread(unpack, bytes(packed), sha256)


def failed(error: grpc.aio.AioRpcError) -> CallFailed:
    """What a status of an engine means; none of them is a status of ours."""
    code, detail = error.code(), _said(error)
    if code in _REJECTED:
        return CallFailed(FailureKind.REJECTED, detail)
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CallFailed(FailureKind.OVERLOAD, detail)
        case grpc.StatusCode.UNAVAILABLE:
            return CallFailed(FailureKind.CRASH, detail)
        case grpc.StatusCode.CANCELLED | grpc.StatusCode.ABORTED:  # Not by us.
            return CallFailed(FailureKind.PARTITION, detail)
        case _:
            return CallFailed(FailureKind.ENGINE_ERROR, detail)


def logprobs_of(logprobs: Any, num_top: int) -> list[TokenLogprobs]:
    """Of each token of a chunk, in the messages of vLLM and SGLang."""
    tops: Sequence[Any] = logprobs.top_logprobs
    result: list[TokenLogprobs] = []
    for index, logprob in enumerate(logprobs.token_logprobs):
        if not num_top or index >= len(tops):
            result.append(TokenLogprobs(logprob))
            continue
        pairs = sorted(
            zip(tops[index].values, tops[index].token_ids, strict=True),
            key=lambda pair: (-pair[0], pair[1]),
        )[:num_top]
        result.append(
            TokenLogprobs(logprob, tuple(one[1] for one in pairs), tuple(one[0] for one in pairs))
        )
    return result


def load_of_record(rank: int, load: common_pb2.EngineLoad) -> LoadOfRank:
    """What an engine pushes of its load."""
    has_active = load.HasField("active_token_usage")
    has_tokens = load.HasField("waiting_uncached_tokens")
    return LoadOfRank(
        rank,
        load.running_requests,
        load.waiting_requests,
        load.active_token_usage if has_active else load.token_usage,
        load.waiting_uncached_tokens if has_tokens else None,
    )


def block_events(rank: int, event: common_pb2.KvCacheEvent) -> Iterable[Tapped]:
    """What became of blocks that any prompt without a LoRA adapter or salt can use."""
    match event.WhichOneof("data"):
        case "cleared":
            return [BlocksCleared(rank)]
        case "removed":
            is_here = event.removed.tier in _ON_DEVICE
            return [BlocksRemoved(rank, tuple(event.removed.block_hashes))] if is_here else []
        case "stored":
            stored = event.stored
            is_special = stored.lora_name or stored.cache_salt
            is_special = is_special or stored.kv_cache_spec_sliding_window
            is_special = is_special or any(block.extra_keys for block in stored.blocks)
            if is_special or stored.tier not in _ON_DEVICE:
                return []
            parent = stored.parent_block_hash if stored.HasField("parent_block_hash") else None
            blocks = [(block.block_hash, tuple(block.token_ids)) for block in stored.blocks]
            return [BlocksStored(rank, parent, blocks)]
        case _:
            return []


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
