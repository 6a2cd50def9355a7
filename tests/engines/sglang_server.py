"""A server that speaks SGLang's gRPC protocol, with the simulated engine behind it."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from tests.engines.backend import Backend, CoreDead, Output
from tests.engines.vllm_server import FINISH_REASONS, Context, Health, tokenizer_chunks
from unbroken.errors import InvalidField
from unbroken.generation import (
    Constraint,
    GenerationParams,
    SamplingParams,
    StopConditions,
    params_from_proto,
    params_to_proto,
)
from unbroken.outcome import FinishReason

OWN_SEED = 77
"""It takes none from outside. The one that the suite asks for, so that the suite can compare."""


def add(server: grpc.aio.Server, backend: Backend) -> "SglangServer":
    """Serve SGLang's protocol and the standard health service."""
    servicer = SglangServer(backend)
    sglang_scheduler_pb2_grpc.add_SglangSchedulerServicer_to_server(servicer, server)  # pyright: ignore[reportUnknownMemberType]
    health_pb2_grpc.add_HealthServicer_to_server(Health(backend), server)
    return servicer


class SglangServer(sglang_scheduler_pb2_grpc.SglangSchedulerServicer):
    """The servicer. It pushes no KV events, as started without a publisher."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.requests: list[pb.GenerateRequest] = []

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse]:
        self.requests.append(request)
        prompt = list(request.tokenized.input_ids)
        num = 0
        try:
            params = _params(request, self.backend.spec.vocab_size)
            async for output in self.backend.generate(request.request_id, prompt, params):
                num += len(output.token_ids)
                if output.reason is FinishReason.CANCELLED:
                    # Its own aborts are statuses, never a message.
                    await context.abort(grpc.StatusCode.CANCELLED, "aborted by the scheduler")
                yield pb.GenerateResponse(
                    request_id=request.request_id,
                    chunk=pb.GenerateStreamChunk(
                        token_ids=output.token_ids,
                        prompt_tokens=len(prompt),
                        completion_tokens=num,
                        cached_tokens=output.cached_tokens,
                        output_logprobs=_logprobs(output, params.num_top_logprobs),
                    ),
                )
                if output.reason is not None:
                    complete = pb.GenerateComplete(
                        output_ids=output.token_ids,  # The last delta once more.
                        finish_reason=FINISH_REASONS[output.reason],
                        prompt_tokens=len(prompt),
                        completion_tokens=num,
                        cached_tokens=output.cached_tokens,
                    )
                    if output.stop_token_id is not None:
                        complete.matched_token_id = output.stop_token_id
                    yield pb.GenerateResponse(request_id=request.request_id, complete=complete)
        except InvalidField as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.detail)
        except CoreDead:
            await context.abort(grpc.StatusCode.INTERNAL, "the scheduler is gone")

    @override
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        del context
        return pb.AbortResponse(success=self.backend.abort(request.request_id))

    @override
    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        del request, context
        spec = self.backend.spec
        return pb.GetModelInfoResponse(
            model_path="/models/tiny",
            served_model_name=spec.model,
            max_context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            eos_token_ids=sorted(spec.tokenizer.eos_token_ids),
            weight_version="default",
        )

    @override
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        del request, context
        spec = self.backend.spec
        info = pb.GetServerInfoResponse(
            sglang_version="0.5.23", max_total_num_tokens=spec.kv_blocks * spec.block_size
        )
        arguments: dict[str, Any] = {
            "page_size": spec.block_size,
            "dtype": "auto",
            "tp_size": 1,
            "dp_size": 1,
            "chunked_prefill_size": -1,  # Off.
            "max_running_requests": None,
            "attention_backend": None,
        }
        info.server_args.update(arguments)  # pyright: ignore[reportUnknownMemberType]
        return info

    @override
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        del request, context
        (rank,) = self.backend.scheduler.load().ranks
        load = pb.SchedulerLoad(
            num_running_reqs=rank.requests_running,
            num_waiting_reqs=rank.requests_waiting,
            token_usage=rank.kv_blocks_used / self.backend.spec.kv_blocks,
        )
        return pb.GetLoadsResponse(version="0.5.23", dp_rank_count=1, loads=[load])

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
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "KV events are not enabled")
        yield common_pb2.KvEventBatch()  # Never; it makes this a generator.


def _params(request: pb.GenerateRequest, vocab_size: int) -> GenerationParams:
    """As SGLang's servicer reads them: a temperature that was not set is greedy."""
    params = request.sampling_params
    if params.n != 1:
        raise InvalidField("n", "1", params.n)
    constraint = None
    match params.WhichOneof("constraint"):
        case None:
            pass
        case "json_schema" if params.json_schema == '{"type": "object"}':
            constraint = Constraint("json_object")
        case "json_schema":
            constraint = Constraint("json_schema", params.json_schema)
        case "regex":
            constraint = Constraint("regex", params.regex)
        case other:
            raise InvalidField("constraint", "one that is known", other)
    asked = GenerationParams(
        SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p or 1.0,
            top_k=max(0, params.top_k),
            min_p=params.min_p,
            seed=OWN_SEED,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty or 1.0,
            logit_bias={int(token): bias for token, bias in params.logit_bias.items()},
        ),
        StopConditions(
            max_tokens=params.max_new_tokens,
            min_tokens=params.min_new_tokens,
            stop_token_ids=frozenset(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
        ),
        constraint,
        request.top_logprobs_num if request.return_logprob else None,
    )
    return params_from_proto(params_to_proto(asked), vocab_size=vocab_size)


def _logprobs(output: Output, num_top: int | None) -> pb.OutputLogProbs | None:
    if num_top is None:
        return None
    return pb.OutputLogProbs(
        token_ids=output.token_ids,
        token_logprobs=[one.logprob for one in output.logprobs],
        top_logprobs=[
            pb.TopLogProbs(values=one.top_logprobs, token_ids=one.top_token_ids)
            for one in output.logprobs
        ]
        if num_top
        else [],
    )
