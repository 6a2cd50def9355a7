"""A server that speaks TensorRT-LLM's gRPC protocol, with the simulated engine behind it."""

from collections.abc import AsyncGenerator, Sequence

import grpc
import grpc.aio
from smg_grpc_proto.generated import common_pb2, trtllm_service_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
from smg_grpc_proto.generated import trtllm_service_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from tests.engines.backend import Backend, CoreDead
from tests.engines.vllm_server import Context, tokenizer_chunks
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


def add(server: grpc.aio.Server, backend: Backend) -> "TrtllmServer":
    """Serve TensorRT-LLM's protocol. There is no standard health service."""
    servicer = TrtllmServer(backend)
    trtllm_service_pb2_grpc.add_TrtllmServiceServicer_to_server(servicer, server)  # pyright: ignore[reportUnknownMemberType]
    return servicer


class TrtllmServer(trtllm_service_pb2_grpc.TrtllmServiceServicer):
    """The servicer. It tells no load."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.requests: list[pb.GenerateRequest] = []

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse]:
        self.requests.append(request)
        prompt = list(request.tokenized.input_token_ids)
        all_ids: list[int] = []
        all_logprobs: list[pb.TokenLogprob] = []
        try:
            params = _params(request, self.backend.spec.vocab_size)
            async for output in self.backend.generate(request.request_id, prompt, params):
                all_ids += output.token_ids
                logprobs = _logprobs(output.token_ids, output.logprobs)
                all_logprobs += logprobs
                if output.reason is None or len(all_ids) % 2:  # Some last tokens come in the end.
                    yield pb.GenerateResponse(
                        request_id=request.request_id,
                        chunk=pb.GenerateStreamChunk(
                            token_ids=output.token_ids,
                            prompt_tokens=len(prompt),
                            completion_tokens=len(all_ids),
                            cached_tokens=output.cached_tokens,
                            logprobs=logprobs,
                        ),
                    )
                if output.reason is not None:
                    reasons = {
                        FinishReason.STOP: "stop",
                        FinishReason.LENGTH: "length",
                        FinishReason.CANCELLED: "cancelled",
                    }
                    complete = pb.GenerateComplete(
                        output_token_ids=all_ids,
                        finish_reason=reasons[output.reason],
                        prompt_tokens=len(prompt),
                        completion_tokens=len(all_ids),
                        cached_tokens=output.cached_tokens,
                        logprobs=all_logprobs,
                    )
                    if output.stop_token_id in request.stop_token_ids:
                        assert output.stop_token_id is not None
                        complete.matched_token_id = output.stop_token_id
                        complete.finish_reason = "stop_word"
                    yield pb.GenerateResponse(request_id=request.request_id, complete=complete)
        except InvalidField as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.detail)
        except CoreDead:
            await context.abort(grpc.StatusCode.INTERNAL, "the executor is gone")

    @override
    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        del request, context
        is_dead = self.backend.is_dead
        return pb.HealthCheckResponse(status="the executor is gone" if is_dead else "OK")

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
        # Neither where its tokenizer is nor which tokens end a text.
        return pb.GetModelInfoResponse(
            model_id=spec.model, max_seq_len=spec.context_length, max_batch_size=spec.batch_size_max
        )

    @override
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        del request, context
        return pb.GetServerInfoResponse(
            version="1.2.0", backend="pytorch", tensor_parallel_size=1, world_size=1
        )

    @override
    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[common_pb2.GetTokenizerChunk]:
        del request, context
        for chunk in tokenizer_chunks(self.backend):
            yield chunk


def _params(request: pb.GenerateRequest, vocab_size: int) -> GenerationParams:
    config = request.sampling_config
    if not request.include_stop_token_in_output:
        raise InvalidField("include_stop_token_in_output", "true, else a token is missing", False)
    if config.prompt_ignore_length != len(request.tokenized.input_token_ids):
        raise InvalidField("prompt_ignore_length", "the prompt", config.prompt_ignore_length)
    constraint = None
    guide = request.guided_decoding
    kinds = pb.GuidedDecodingParams.GuideType
    if request.HasField("guided_decoding"):
        if guide.guide_type == kinds.GUIDE_TYPE_REGEX:
            constraint = Constraint("regex", guide.guide)
        elif guide.guide == '{"type": "object"}':
            constraint = Constraint("json_object")
        else:
            assert guide.guide_type == kinds.GUIDE_TYPE_JSON_SCHEMA
            constraint = Constraint("json_schema", guide.guide)
    logprobs = (
        request.output_config.logprobs if request.output_config.HasField("logprobs") else None
    )
    asked = GenerationParams(
        SamplingParams(
            temperature=config.temperature if config.HasField("temperature") else 1.0,
            top_p=config.top_p if config.HasField("top_p") else 1.0,
            top_k=config.top_k,
            min_p=config.min_p,
            seed=config.seed if config.HasField("seed") else None,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            repetition_penalty=config.repetition_penalty or 1.0,
        ),
        StopConditions(
            max_tokens=request.max_tokens,
            min_tokens=config.min_tokens,
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
        ),
        constraint,
        logprobs,
    )
    return params_from_proto(params_to_proto(asked), vocab_size=vocab_size)


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[pb.TokenLogprob]:
    """The chosen token is among the alternatives, whether it is one or not."""
    messages: list[pb.TokenLogprob] = []
    for token_id, one in zip(token_ids, logprobs, strict=False):
        entries = {token_id: one.logprob}
        entries.update(zip(one.top_token_ids, one.top_logprobs, strict=True))
        tops = [pb.TopLogprob(token_id=top, logprob=value) for top, value in entries.items()]
        messages.append(pb.TokenLogprob(token_id=token_id, logprob=one.logprob, top_logprobs=tops))
    return messages
