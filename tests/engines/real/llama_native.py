"""What llama.cpp's server gives when it is asked in its own words, not in OpenAI's.

As a reference: had our adapter for OpenAI's HTTP left something out, the two would not agree.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp

from tests.worker.engines import Attempt
from unbroken.generation import Constraint, GenerationParams, TokenLogprobs
from unbroken.v1 import attempt_pb2, generation_pb2

LLAMA_NATIVE: Final = "llama-native"
_REASONS: Final = {
    "eos": generation_pb2.FINISH_REASON_STOP,
    "word": generation_pb2.FINISH_REASON_STOP,
    "limit": generation_pb2.FINISH_REASON_LENGTH,
}


async def completion(address: str, params: GenerationParams, prompt: Sequence[int]) -> Attempt:
    """One answer of `/completion`, as a whole."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{address}/completion", json=_body(params, prompt)) as response,
    ):
        response.raise_for_status()
        told: Mapping[str, Any] = await response.json()
    attempt = Attempt()
    attempt.token_ids = list(told["tokens"])
    for index, token_id in enumerate(attempt.token_ids):
        if token_id in params.stopping.stop_token_ids:  # It knows none.
            del attempt.token_ids[index + 1 :]
    listed: Sequence[Mapping[str, Any]] = told.get("completion_probabilities", ())
    attempt.logprobs = [TokenLogprobs(one["logprob"]) for one in listed]
    reason = _REASONS[told["stop_type"]]
    attempt.ended = attempt_pb2.AttemptEnded(finish_reason=reason)
    return attempt


def _body(params: GenerationParams, prompt: Sequence[int]) -> Mapping[str, object]:
    sampling, stopping = params.sampling, params.stopping
    body: dict[str, object] = {
        "prompt": list(prompt),
        "return_tokens": True,
        "n_predict": -1 if stopping.max_tokens is None else stopping.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "ignore_eos": stopping.ignore_eos,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
    }
    if params.num_top_logprobs is not None:
        body["n_probs"] = max(1, params.num_top_logprobs)
    if params.constraint is not None:
        body |= _constraint(params.constraint)
    return body


def _constraint(constraint: Constraint) -> Mapping[str, object]:
    assert constraint.kind == "json_schema", "it has no other"
    return {"json_schema": json.loads(constraint.text)}
