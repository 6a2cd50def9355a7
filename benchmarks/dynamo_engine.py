# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
"""Stamping as an engine of NVIDIA Dynamo, in Dynamo's own environment (benchmarks/peers.py).

python dynamo_engine.py MODEL_DIRECTORY STEP_MS
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime


async def serve(model: str, step_s: float) -> None:
    """Run until killed."""
    loop = asyncio.get_running_loop()

    async def generate(request: Any) -> AsyncIterator[dict[str, object]]:
        num_tokens = request["stop_conditions"]["max_tokens"]
        due = loop.time() // step_s * step_s if step_s else 0.0  # All streams step together.
        for number in range(num_tokens):
            due += step_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            # As in benchmarks/stamps.py, which is not to be had in this environment.
            out: dict[str, object] = {"token_ids": [int(time.monotonic() / 1e-5) % 4_000]}
            if number + 1 == num_tokens:
                out["finish_reason"] = "length"
            yield out

    endpoint = DistributedRuntime(loop, "file", "tcp").endpoint("bench.backend.generate")
    await register_model(
        ModelInput.Tokens,
        ModelType.Completions,
        endpoint,
        model,
        "m",
        worker_type=WorkerType.Aggregated,
        ignore_weights=True,
    )
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], float(sys.argv[2]) / 1e3))
