"""A client process: opens many streams, reads them, reports what it saw as one line of JSON.

python -m benchmarks.reader ADDRESS --streams 256 --tokens 300 [--pause-ms 200]
"""

import argparse
import asyncio
import json
from dataclasses import dataclass, field

import grpc.aio
import uvloop

from benchmarks.stamps import age_s
from unbroken.transport import MESH_KEEPALIVE, RECEIVE_BYTES_MAX, channel_options
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

_WARM_UP_TOKENS = 25


@dataclass(slots=True)
class Seen:
    """What all streams saw together."""

    tokens: int = 0
    messages: int = 0
    complete: int = 0
    ages_s: list[float] = field(default_factory=list[float])


async def read(address: str, streams: int, tokens: int, pause_s: float) -> Seen:
    """Read so many streams of so many tokens over one connection."""
    seen = Seen()
    options = [*channel_options(RECEIVE_BYTES_MAX, MESH_KEEPALIVE)]
    if pause_s:  # Without this, gRPC itself reads far ahead of a slow reader.
        options += [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = InferenceServiceStub(channel)
        await asyncio.gather(*(_one(stub, i, tokens, pause_s, seen) for i in range(streams)))
    return seen


async def _one(
    stub: InferenceServiceStub, index: int, tokens: int, pause_s: float, seen: Seen
) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[index % 250, 1, 2]))
    request.params.sampling.temperature = 0.0
    request.params.stopping.max_tokens = tokens
    request.params.stopping.ignore_eos = True
    async for response in stub.Generate(request):
        seen.messages += 1
        seen.tokens += len(response.token_ids)
        if response.offset >= _WARM_UP_TOKENS:
            seen.ages_s += [age_s(token_id) for token_id in response.token_ids]
        if response.HasField("finished"):
            seen.complete += 1
        if pause_s:
            await asyncio.sleep(pause_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    seen = uvloop.run(
        read(arguments.address, arguments.streams, arguments.tokens, arguments.pause_ms / 1e3)
    )
    ages = sorted(seen.ages_s) or [0.0]
    print(  # noqa: T201
        json.dumps(
            {
                "tokens": seen.tokens,
                "messages": seen.messages,
                "complete": seen.complete,
                "age_ms_p50": round(ages[len(ages) // 2] * 1e3, 2),
                "age_ms_p99": round(ages[int(len(ages) * 0.99)] * 1e3, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
