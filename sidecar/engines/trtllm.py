"""TensorRT-LLM over `trtllm.TrtllmService`, as `trtllm-serve MODEL --grpc` serves it.

Written against the protocol and its servicer's source, never run against TensorRT-LLM itself:

- It tells neither load nor the size of its KV cache: the sidecar's own account is all there is.
- Presence and frequency penalties count the prompt, unless its length is to be ignored.
- A bias is a dense column of the vocabulary's size; it is not offered.
- The final message has all tokens, which may be more than came in chunks.
- Health is a text: "OK", or what is wrong.
"""

from collections.abc import Iterable
from typing import Final

from smg_grpc_proto.generated import trtllm_service_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from sidecar.engines.adapter import Call, Delta, Discovered, End, Part, Unhealthy
from sidecar.engines.smg import SmgAdapter
from sidecar.engines.tokenizer_process import read_asset
from unbroken.generation import Constraint, TokenLogprobs
from unbroken.outcome import FinishReason
from unbroken.v1 import worker_pb2

BLOCK_SIZE: Final = 32
"""Its default tokens_per_block; it does not tell."""

_CAPABILITIES: Final = worker_pb2.EngineCapabilities(
    random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL,
    constraints=worker_pb2.ConstraintCapabilities(json_schema=True, json_object=True, regex=True),
    logprobs=True,
    seed_bits=64,
)
_REASONS: Final = {
    "stop": FinishReason.STOP,
    "stop_word": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}
_HEALTHY: Final = "OK"

_BOTH: Final = pb.DisaggregatedParams(
    request_type=pb.DisaggregatedParams.REQUEST_TYPE_CONTEXT_AND_GENERATION
)
"""Half an engine that is asked so computes the other half too."""


class TrtllmAdapter(SmgAdapter):
    """One TensorRT-LLM server."""

    _service = pb.DESCRIPTOR.services_by_name["TrtllmService"]

    @override
    async def _describe(self) -> Discovered:
        self._has_taps = False
        model: pb.GetModelInfoResponse = await self._ask("GetModelInfo", pb.GetModelInfoRequest())
        server: pb.GetServerInfoResponse = await self._ask(
            "GetServerInfo", pb.GetServerInfoRequest()
        )
        files = await self._tokenizer_files(model.model_id)
        return Discovered(
            kind="trtllm",
            version=server.version,
            model=model.model_id,
            context_length=model.max_seq_len or model.max_input_len,
            tokenizer=await read_asset(files, vocab_size=model.vocab_size),
            capabilities=_CAPABILITIES,
            block_size=BLOCK_SIZE,
            batch_size_max=model.max_batch_size,
            facts={
                "backend": server.backend,
                "tensor_parallel_size": str(server.tensor_parallel_size),
                "pipeline_parallel_size": str(server.pipeline_parallel_size),
                "context_parallel_size": str(server.context_parallel_size),
            },
        )

    @override
    def _request(self, call: Call) -> pb.GenerateRequest:
        sampling, stopping = call.params.sampling, call.params.stopping
        num_top = call.params.num_top_logprobs
        constraint = call.params.constraint
        return pb.GenerateRequest(
            request_id=call.request_id,
            tokenized=pb.TokenizedInput(input_token_ids=call.prompt),
            sampling_config=pb.SamplingConfig(
                beam_width=1,
                num_return_sequences=1,
                temperature=sampling.temperature,
                top_k=1 if sampling.is_greedy else sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=None if sampling.is_greedy else sampling.seed,
                min_tokens=stopping.min_tokens,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                prompt_ignore_length=len(call.prompt),
            ),
            output_config=pb.OutputConfig(
                logprobs=None if num_top is None else max(1, num_top),
                exclude_input_from_output=True,
            ),
            max_tokens=call.max_tokens,
            streaming=True,
            guided_decoding=None if constraint is None else _guide(constraint),
            stop_token_ids=sorted(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
            include_stop_token_in_output=True,
            disaggregated_params=None if call.alone is Part.WHOLE else _BOTH,
        )

    @override
    def _delta(self, call: Call, response: pb.GenerateResponse, num_before: int) -> Delta | None:
        num_top = call.params.num_top_logprobs
        if response.HasField("chunk"):
            chunk = response.chunk
            logprobs = () if num_top is None else _logprobs(chunk.logprobs, num_top)
            return Delta(chunk.token_ids[:], logprobs, chunk.cached_tokens)
        if not response.HasField("complete"):
            return None
        complete = response.complete
        logprobs = ()
        if num_top is not None:
            logprobs = _logprobs(complete.logprobs[num_before:], num_top)
        end = End(
            _REASONS.get(complete.finish_reason, FinishReason.CANCELLED),
            complete.matched_token_id if complete.HasField("matched_token_id") else None,
            f"the engine ended the request as {complete.finish_reason!r}",
        )
        token_ids = complete.output_token_ids[num_before:]
        return Delta(token_ids, logprobs, complete.cached_tokens, end)

    @override
    async def abort(self, request_id: str) -> None:
        await self._tell_abort(pb.AbortRequest(request_id=request_id))

    @override
    async def check_health(self) -> None:
        await super().check_health()
        health: pb.HealthCheckResponse = await self._ask_health()
        if health.status != _HEALTHY:
            raise Unhealthy(f"the engine says: {health.status}")


def _logprobs(logprobs: Iterable[pb.TokenLogprob], num_top: int) -> list[TokenLogprobs]:
    result: list[TokenLogprobs] = []
    for one in logprobs:
        tops = sorted(one.top_logprobs, key=lambda top: (-top.logprob, top.token_id))[:num_top]
        ids = tuple(top.token_id for top in tops)
        result.append(TokenLogprobs(one.logprob, ids, tuple(top.logprob for top in tops)))
    return result


def _guide(constraint: Constraint) -> pb.GuidedDecodingParams:
    kinds = pb.GuidedDecodingParams.GuideType
    match constraint.kind:
        case "json_schema":
            kind, text = kinds.GUIDE_TYPE_JSON_SCHEMA, constraint.text
        case "json_object":
            kind, text = kinds.GUIDE_TYPE_JSON_SCHEMA, '{"type": "object"}'
        case "regex":
            kind, text = kinds.GUIDE_TYPE_REGEX, constraint.text
        case "choice" | "lark":
            raise AssertionError("not among its capabilities")
    return pb.GuidedDecodingParams(guide_type=kind, guide=text)
