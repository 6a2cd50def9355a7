"""A server that speaks vLLM's gRPC protocol as vLLM 0.32 does, before the simulated engine."""

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncGenerator
from functools import cache
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import vllm_engine_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from tests.engines.backend import Backend, CoreDead, Output
from unbroken.errors import InvalidField
from unbroken.generation import (
    Constraint,
    GenerationParams,
    SamplingParams,
    StopConditions,
    TokenLogprobs,
    params_from_proto,
    params_to_proto,
)
from unbroken.outcome import FinishReason
from unbroken.tokenizer import TokenizerAsset
from worker.vllm_plugin import continuation

Context = grpc.aio.ServicerContext[Any, Any]
CHUNK_BYTES = 64 * 1024
FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
}


def add(server: grpc.aio.Server, backend: Backend) -> "VllmServer":
    """Serve vLLM's protocol and the standard health service."""
    servicer = VllmServer(backend)
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)  # pyright: ignore[reportUnknownMemberType]
    health_pb2_grpc.add_HealthServicer_to_server(Health(backend), server)
    return servicer


class Health(health_pb2_grpc.HealthServicer):
    """The flag of an engine that died; a hung one is well."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @override
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        del request, context
        status = health_pb2.HealthCheckResponse.SERVING
        if self._backend.is_dead:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)

    @override
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        yield await self.Check(request, context)  # And ends, as theirs does.


class VllmServer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """The servicer."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.requests: list[pb.GenerateRequest] = []
        self.plugin_key = ""
        """Of the plug-in that continues natively; empty: it has none."""
        self.fails_to_continue = False
        """Whoever asks it to go on is told of an error of its own."""
        self.taps_refused: grpc.StatusCode | None = None
        """With what who subscribes to KV events is refused."""
        self.num_taps_refused = 0
        self.subscribers: list[asyncio.Queue[common_pb2.KvEventBatch]] = []

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.fails_to_continue and request.kv_transfer_params_json:
            await context.abort(grpc.StatusCode.INTERNAL, "EngineCore encountered an issue.")
        prompt = list(request.tokenized.input_ids)
        told, past = prompt, list[int]()
        num_top = (
            request.sampling_params.logprobs
            if request.sampling_params.HasField("logprobs")
            else None
        )
        try:
            params = _params(request.sampling_params, self.backend.spec.vocab_size)
            if self.plugin_key:
                told, past = _continued(request, self.plugin_key)
            outputs = self.backend.generate(request.request_id, told, params, past)
            async for output in outputs:
                yield pb.GenerateResponse(
                    chunk=pb.GenerateStreamChunk(
                        token_ids=output.token_ids,
                        prompt_tokens=len(prompt),
                        completion_tokens=len(output.token_ids),
                        cached_tokens=output.cached_tokens,
                        output_logprobs=_logprobs(output, num_top),
                    )
                )
                if output.reason is not None:
                    # The last delta once more, and nothing of what came before.
                    complete = pb.GenerateComplete(
                        output_ids=output.token_ids,
                        finish_reason=FINISH_REASONS[output.reason],
                        prompt_tokens=len(prompt),
                        completion_tokens=len(output.token_ids),
                        cached_tokens=output.cached_tokens,
                        output_logprobs=_logprobs(output, num_top),
                    )
                    if output.stop_token_id in request.sampling_params.stop_token_ids:
                        assert output.stop_token_id is not None
                        complete.matched_token_id = output.stop_token_id  # Not for EOS.
                    yield pb.GenerateResponse(complete=complete)
        except InvalidField as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.detail)
        except CoreDead:
            await context.abort(
                grpc.StatusCode.INTERNAL, "EngineCore encountered an issue. See stack trace."
            )

    @override
    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        del request, context
        is_dead = self.backend.is_dead
        message = "Engine is not alive" if is_dead else "Health"
        return pb.HealthCheckResponse(healthy=not is_dead, message=message)

    @override
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        del context
        for name in request.request_ids:
            self.backend.abort(name)
        return pb.AbortResponse()

    @override
    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        del request, context
        spec = self.backend.spec
        return pb.GetModelInfoResponse(
            model_path="/models/tiny",
            is_generation=True,
            max_context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            served_model_name=spec.model,
            tokenizer_path="/models/tiny",
            eos_token_ids=sorted(spec.tokenizer.eos_token_ids),
            max_req_input_len=spec.context_length,
        )

    @override
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        del request, context
        spec = self.backend.spec
        # It does not fill in what runs, since when, or what kind of server it is.
        return pb.GetServerInfoResponse(
            data_parallel_size=1,
            block_size=spec.block_size,
            model_dtype="torch.float32",
            kv_cache_dtype="auto",
            attention_backend="CPU_ATTN",
            max_num_seqs=spec.batch_size_max,
        )

    @override
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        del request, context
        (rank,) = self.backend.scheduler.load().ranks
        spec = self.backend.spec
        return pb.GetLoadsResponse(
            version="0.32.0",
            dp_rank_count=1,
            loads=[
                pb.SchedulerLoad(
                    num_running_reqs=rank.requests_running,
                    num_waiting_reqs=rank.requests_waiting,
                    # Of one more than there are to use.
                    max_total_num_tokens=(spec.kv_blocks + 1) * spec.block_size,
                    token_usage=rank.kv_blocks_used / spec.kv_blocks,
                    max_running_requests=spec.batch_size_max,
                )
            ],
        )

    @override
    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[common_pb2.GetTokenizerChunk]:
        del request, context
        for chunk in tokenizer_chunks(self.backend):
            yield chunk

    @override
    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context
    ) -> AsyncGenerator[common_pb2.KvEventBatch]:
        del request
        if self.taps_refused is not None:
            self.num_taps_refused += 1
            await context.abort(self.taps_refused, "KV cache events not enabled.")
        queue = asyncio.Queue[common_pb2.KvEventBatch](100)
        self.subscribers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self.subscribers.remove(queue)


def _continued(request: pb.GenerateRequest, key: str) -> tuple[list[int], list[int]]:
    """Prompt and output, as the plug-in tells them apart. Raises `InvalidField`."""
    prompt = list(request.tokenized.input_ids)
    transfer: Any = json.loads(request.kv_transfer_params_json or "null")
    params = SimpleNamespace(extra_args={"kv_transfer_params": transfer} if transfer else None)
    try:
        num_output = continuation.take_note(params, len(prompt), key)
    except ValueError as error:
        raise InvalidField("kv_transfer_params", "a continuation", f"{error}") from error
    return continuation.split(prompt, num_output) if num_output else (prompt, [])


def tokenizer_chunks(backend: Backend) -> list[common_pb2.GetTokenizerChunk]:
    """The packed tokenizer; its last piece has the digest of all."""
    packed = zipped(backend.spec.tokenizer)
    chunks = [
        common_pb2.GetTokenizerChunk(data=packed[begin : begin + CHUNK_BYTES])
        for begin in range(0, len(packed), CHUNK_BYTES)
    ]
    chunks[-1].sha256 = hashlib.sha256(packed).hexdigest()
    return chunks


@cache
def zipped(asset: TokenizerAsset) -> bytes:
    """The tokenizer as the servers of this family pack it."""
    config: dict[str, object] = {"chat_template": asset.chat_template}
    added = {
        entry["id"]: entry["content"] for entry in json.loads(asset.tokenizer_json)["added_tokens"]
    }
    if asset.bos_token_id is not None:
        config["bos_token"] = added[asset.bos_token_id]
    if asset.eos_token_id is not None:
        config["eos_token"] = {"content": added[asset.eos_token_id], "lstrip": False}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.json", asset.tokenizer_json)
        archive.writestr("tokenizer_config.json", json.dumps(config))
        archive.writestr("config.json", json.dumps({"eos_token_id": sorted(asset.eos_token_ids)}))
    return file.getvalue()


def _params(params: pb.SamplingParams, vocab_size: int) -> GenerationParams:
    """As vLLM's servicer reads them, zeros of proto3 included. Raises `InvalidField`."""
    if params.stop:
        raise InvalidField("stop", "none from a sidecar, which sees no text", params.stop)
    asked = GenerationParams(
        SamplingParams(
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_p=params.top_p or 1.0,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed if params.HasField("seed") else None,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty or 1.0,
            logit_bias=dict(params.logit_bias),
        ),
        StopConditions(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
        ),
        _constraint(params),
        params.logprobs if params.HasField("logprobs") else None,
    )
    if params.min_tokens > params.max_tokens:
        raise InvalidField("min_tokens", "at most max_tokens", params.min_tokens)
    return params_from_proto(params_to_proto(asked), vocab_size=vocab_size)


def _constraint(params: pb.SamplingParams) -> Constraint | None:
    match params.WhichOneof("constraint"):
        case None:
            return None
        case "json_schema":
            return Constraint("json_schema", params.json_schema)
        case "regex":
            return Constraint("regex", params.regex)
        case "json_object":
            return Constraint("json_object")
        case "choice":
            return Constraint("choice", options=tuple(params.choice.choices))
        case other:
            raise InvalidField("constraint", "one that is known", other)


def _logprobs(output: Output, num_top: int | None) -> pb.OutputLogProbs | None:
    if num_top is None:
        return None
    message = pb.OutputLogProbs(
        token_ids=output.token_ids, token_logprobs=[one.logprob for one in output.logprobs]
    )
    if num_top:
        for token_id, one in zip(output.token_ids, output.logprobs, strict=True):
            message.top_logprobs.append(_top(token_id, one, num_top))
    return message


def _top(token_id: int, logprobs: TokenLogprobs, num_top: int) -> pb.TopLogProbs:
    """The chosen token first, then the most probable ones; cut after so many."""
    entries = {token_id: logprobs.logprob}
    entries.update(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True))
    cut = list(entries.items())[:num_top]
    return pb.TopLogProbs(token_ids=[one[0] for one in cut], values=[one[1] for one in cut])
