"""SGLang over `sglang.grpc.scheduler.SglangScheduler`, as `--smg-grpc-mode` serves it.

Written against the protocol and its servicer's source, never run against SGLang itself:

- Scalars have no presence: a temperature that is not set is 0 on the wire, so all are set.
- There is no seed: what is sampled cannot be reproduced.
- The repetition penalty counts output only.
- The final message repeats the last chunk.
- `HealthCheck` generates a token and takes as long as one; the standard service is asked instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from sidecar.engines.adapter import END_REASONS, Call, Delta, Discovered, End, LoadOfRank, Part
from sidecar.engines.smg import SmgAdapter, logprobs_of
from sidecar.engines.tokenizer_process import read_asset
from unbroken.generation import Constraint
from unbroken.outcome import FinishReason
from unbroken.v1 import worker_pb2

_ANY_OBJECT: Final = '{"type": "object"}'
_CAPABILITIES: Final = worker_pb2.EngineCapabilities(
    logit_bias=True,
    constraints=worker_pb2.ConstraintCapabilities(json_schema=True, json_object=True, regex=True),
    logprobs=True,
)
_FACTS: Final = (
    *("model_path", "revision", "dtype", "quantization", "kv_cache_dtype"),
    *("tp_size", "pp_size", "attention_backend", "sampling_backend"),
    "enable_deterministic_inference",
)
"""Arguments of the server that its logits depend on."""

_NOBODY: Final = pb.DisaggregatedParams(bootstrap_host="2.2.2.2", bootstrap_room=0)
"""Its FAKE_BOOTSTRAP_HOST: half an engine that is asked so waits for no other half."""


class SglangAdapter(SmgAdapter):
    """One SGLang server."""

    health_timeout_s = 30.0  # Its readiness waits so long for the scheduler.

    _service = pb.DESCRIPTOR.services_by_name["SglangScheduler"]

    @override
    async def _describe(self) -> Discovered:
        model: pb.GetModelInfoResponse = await self._ask("GetModelInfo", pb.GetModelInfoRequest())
        server: pb.GetServerInfoResponse = await self._ask(
            "GetServerInfo", pb.GetServerInfoRequest()
        )
        arguments: Mapping[str, Any] = MessageToDict(server.server_args)
        files = await self._tokenizer_files(model.tokenizer_path)
        block_size = _number(arguments, "page_size") or 1
        return Discovered(
            kind="sglang",
            version=server.sglang_version,
            model=model.served_model_name or model.model_path,
            context_length=model.max_context_length,
            tokenizer=await read_asset(
                files, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
            ),
            capabilities=_CAPABILITIES,
            block_size=block_size,
            kv_blocks=server.max_total_num_tokens // block_size,
            batch_size_max=_number(arguments, "max_running_requests"),
            prefill_tokens_max=_number(arguments, "chunked_prefill_size"),
            num_ranks=_number(arguments, "dp_size") or 1,
            facts={
                "weight_version": model.weight_version,
                **{name: str(arguments[name]) for name in _FACTS if name in arguments},
            },
        )

    @override
    def _request(self, call: Call) -> pb.GenerateRequest:
        sampling, stopping = call.params.sampling, call.params.stopping
        num_top = call.params.num_top_logprobs
        params = pb.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=call.max_tokens,
            min_new_tokens=stopping.min_tokens,
            stop_token_ids=sorted(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
            no_stop_trim=True,
            n=1,
            stream_interval=1,
            logit_bias={str(token): bias for token, bias in sampling.logit_bias.items()},
        )
        if call.params.constraint is not None:
            _constrain(params, call.params.constraint)
        return pb.GenerateRequest(
            request_id=call.request_id,
            tokenized=pb.TokenizedInput(input_ids=call.prompt),
            sampling_params=params,
            return_logprob=num_top is not None,
            logprob_start_len=-1,
            top_logprobs_num=num_top or 0,
            stream=True,
            data_parallel_rank=call.rank,
            disaggregated_params=None if call.alone is Part.WHOLE else _NOBODY,
        )

    @override
    def _delta(self, call: Call, response: pb.GenerateResponse, num_before: int) -> Delta | None:
        if response.HasField("chunk"):
            chunk = response.chunk
            num_top = call.params.num_top_logprobs
            logprobs = () if num_top is None else logprobs_of(chunk.output_logprobs, num_top)
            return Delta(chunk.token_ids[:], logprobs, chunk.cached_tokens)
        if not response.HasField("complete"):
            return None
        complete = response.complete
        end = End(
            END_REASONS.get(complete.finish_reason, FinishReason.CANCELLED),
            complete.matched_token_id if complete.HasField("matched_token_id") else None,
            f"the engine ended the request as {complete.finish_reason!r}",
        )
        return Delta((), (), complete.cached_tokens, end)

    @override
    async def abort(self, request_id: str) -> None:
        request = pb.AbortRequest(request_id=request_id, reason="cancelled")
        await self._tell_abort(request)

    @override
    async def load(self) -> Sequence[LoadOfRank]:
        loads: pb.GetLoadsResponse = await self._ask_load(pb.GetLoadsRequest(include=["core"]))
        return [
            LoadOfRank(
                load.dp_rank,
                load.num_running_reqs,
                load.num_waiting_reqs,
                load.token_usage,
                load.num_waiting_uncached_tokens,
            )
            for load in loads.loads
        ]


def _number(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments.get(name)
    return int(value) if isinstance(value, (int, float)) and value > 0 else 0


def _constrain(params: pb.SamplingParams, constraint: Constraint) -> None:
    match constraint.kind:
        case "json_schema":
            params.json_schema = constraint.text
        case "json_object":
            params.json_schema = _ANY_OBJECT
        case "regex":
            params.regex = constraint.text
        case "choice" | "lark":
            raise AssertionError("not among its capabilities")
