"""vLLM over `vllm.grpc.engine.VllmEngine`, as `vllm serve MODEL --grpc` serves it.

What its protocol does not say of itself, measured on vLLM 0.32 (docs/decisions/engine-adapters.md):

- The final message of a stream repeats the tokens of the last chunk, and counts only those.
- A request id that runs already is accepted again.
- `top_p` and `repetition_penalty` of 0 are taken for 1, an absent temperature for 1.
- Of the most probable tokens it tells the chosen one first, and that one counts.

With the plug-in `worker.vllm_plugin` it goes on with the output of another engine, and tells of its
load by itself. Whether it has that plug-in, and whether that works here, shows in what comes of
asking for it.
"""

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from smg_grpc_proto.generated import vllm_engine_pb2 as pb  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from sidecar.engines import continuation_key, load_tap
from sidecar.engines.adapter import (
    END_REASONS,
    Call,
    CallFailed,
    Delta,
    Discovered,
    End,
    LoadOfRank,
    NotReady,
    Unhealthy,
)
from sidecar.engines.smg import SmgAdapter, logprobs_of
from sidecar.engines.tokenizer_process import read_asset
from unbroken import log
from unbroken.generation import Constraint, GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import FailureKind, FinishReason
from unbroken.tokenizer import TokenizerAsset
from unbroken.v1 import worker_pb2

LOGPROBS_MAX: Final = 20
"""More are refused, unless vLLM was started with --max-logprobs."""

_CAPABILITIES: Final = worker_pb2.EngineCapabilities(
    random_source=worker_pb2.RANDOM_SOURCE_SEQUENTIAL,
    repetition_penalty_counts_prompt=True,
    logit_bias=True,
    constraints=worker_pb2.ConstraintCapabilities(
        json_schema=True, json_object=True, regex=True, choice=True
    ),
    logprobs=True,
    seed_bits=31,
)
_FIELD: Final = "unbroken_continuation"
_PROBE_TOKENS: Final = 6
_PROBE: Final = GenerationParams(
    SamplingParams(
        temperature=2.0,
        seed=1,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias=dict.fromkeys(range(8), 50.0),
    ),
    StopConditions(max_tokens=_PROBE_TOKENS, ignore_eos=True),
)
"""Generator, counts and budget of a request all show in what comes of it: few ids, some repeat."""

_log = log.get_logger(__name__)


class VllmAdapter(SmgAdapter):
    """One vLLM server."""

    _service = pb.DESCRIPTOR.services_by_name["VllmEngine"]

    @override
    async def _describe(self) -> Discovered:
        model: pb.GetModelInfoResponse = await self._ask("GetModelInfo", pb.GetModelInfoRequest())
        server: pb.GetServerInfoResponse = await self._ask(
            "GetServerInfo", pb.GetServerInfoRequest()
        )
        loads: pb.GetLoadsResponse = await self._ask("GetLoads", pb.GetLoadsRequest())
        files = await self._tokenizer_files(model.tokenizer_path)
        asset = await read_asset(
            files, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        capabilities = worker_pb2.EngineCapabilities()
        capabilities.CopyFrom(_CAPABILITIES)
        capabilities.native_resume = await self._continues(asset)
        tokens = max((load.max_total_num_tokens for load in loads.loads), default=0)
        return Discovered(
            kind="vllm",
            version=loads.version,
            model=model.served_model_name or model.model_path,
            context_length=model.max_context_length,
            tokenizer=asset,
            capabilities=capabilities,
            block_size=server.block_size,
            # One of them is nobody's, and its share of what is used is one of the others.
            kv_blocks=max(0, tokens // server.block_size - 1) if server.block_size else 0,
            batch_size_max=server.max_num_seqs,
            num_ranks=max(1, server.data_parallel_size),
            facts={
                "model_path": model.model_path,
                "dtype": server.model_dtype,
                "kv_cache_dtype": server.kv_cache_dtype,
                "attention_backend": server.attention_backend,
            },
        )

    async def _continues(self, asset: TokenizerAsset) -> bool:
        """Whether it goes on where another engine was, by doing so once. Raises `NotReady`."""
        if not continuation_key.get():
            return False
        bos = asset.bos_token_id if asset.bos_token_id is not None else min(1, asset.vocab_size - 1)
        try:
            whole = await self._probe_tokens(bos, ())
        except CallFailed as failed:
            if failed.failure is FailureKind.REJECTED:
                return False
            raise NotReady(f"no token: {failed.detail}") from failed
        try:
            rest = await self._probe_tokens(bos, tuple(whole[: _PROBE_TOKENS // 2]))
        except CallFailed as failed:  # It gives tokens, so it is good for everything else.
            if failed.failure is not FailureKind.REJECTED:
                _log.warning("engine fails to continue", detail=failed.detail)
            return False
        return len(whole) == _PROBE_TOKENS and rest == whole[_PROBE_TOKENS // 2 :]

    async def _probe_tokens(self, bos: int, output: tuple[int, ...]) -> Sequence[int]:
        name = f"continues-{secrets.token_hex(4)}"
        call = Call(name, (bos,), _PROBE, _PROBE_TOKENS, output=output)
        return [token async for delta in self.generate(call) for token in delta.token_ids]

    @override
    def _request(self, call: Call) -> pb.GenerateRequest:
        request = request_of(call)
        if call.output:
            said = {"key": continuation_key.get(), "num_output": len(call.output)}
            request.kv_transfer_params_json = json.dumps({_FIELD: said})
        return request

    @override
    def _delta(self, call: Call, response: pb.GenerateResponse, num_before: int) -> Delta | None:
        if response.HasField("chunk"):
            chunk = response.chunk
            num_top = call.params.num_top_logprobs
            logprobs = () if num_top is None else logprobs_of(chunk.output_logprobs, num_top)
            return Delta(chunk.token_ids[:], logprobs, chunk.cached_tokens)
        if not response.HasField("complete"):
            return None
        complete = response.complete  # Its tokens were in the last chunk.
        reason = END_REASONS.get(complete.finish_reason, FinishReason.CANCELLED)
        has_token = complete.HasField("matched_token_id")
        end = End(
            reason,
            complete.matched_token_id if has_token else None,
            f"the engine ended the request as {complete.finish_reason!r}",
        )
        return Delta((), (), complete.cached_tokens, end)

    @override
    async def abort(self, request_id: str) -> None:
        """Closing the call frees the request (23 ms)."""

    @override
    async def check_health(self) -> None:
        await super().check_health()
        health: pb.HealthCheckResponse = await self._ask_health()
        if not health.healthy:
            raise Unhealthy(f"the engine says: {health.message}")

    @override
    async def live_load(self) -> AsyncGenerator[LoadOfRank]:
        if path := load_tap.get():
            async for load in load_tap.listen(path):
                yield load

    @override
    async def load(self) -> Sequence[LoadOfRank]:
        loads: pb.GetLoadsResponse = await self._ask_load(pb.GetLoadsRequest())
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


def request_of(call: Call) -> pb.GenerateRequest:
    """A call in its words."""
    sampling, stopping = call.params.sampling, call.params.stopping
    num_top = call.params.num_top_logprobs
    params = pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=call.max_tokens,
        min_tokens=stopping.min_tokens,
        stop_token_ids=sorted(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        n=1,
        logprobs=None if num_top is None else _num_asked(num_top),
        seed=None if sampling.is_greedy else sampling.seed,
        logit_bias=sampling.logit_bias,
        grammar_from_first_token=call.params.constraint is not None,
    )
    if call.params.constraint is not None:
        _constrain(params, call.params.constraint)
    return pb.GenerateRequest(
        request_id=call.request_id,
        tokenized=pb.TokenizedInput(input_ids=(*call.prompt, *call.output)),
        sampling_params=params,
        stream=True,
        data_parallel_rank=call.rank,
    )


def _num_asked(num_top: int) -> int:
    """One more than wanted, as the chosen token counts as one of them."""
    return min(num_top + 1, LOGPROBS_MAX) if num_top else 0


def _constrain(params: pb.SamplingParams, constraint: Constraint) -> None:
    match constraint.kind:
        case "json_schema":
            params.json_schema = constraint.text
        case "json_object":
            params.json_object = True
        case "regex":
            params.regex = constraint.text
        case "choice":
            params.choice.choices.extend(constraint.options)
        case "lark":
            raise AssertionError("not among its capabilities")
