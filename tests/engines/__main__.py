"""A protocol server as a process: python -m tests.engines --protocol vllm --port 50051."""

import argparse
import asyncio

import uvloop

from tests.engines.backend import Backend
from tests.engines.subjects import SERVERS


async def serve(protocol: str, port: int, step_s: float, kv_blocks: int) -> None:
    backend = Backend(step_s=step_s, kv_blocks=kv_blocks)
    cranking = asyncio.create_task(backend.run())
    async with SERVERS[protocol](backend, port):
        await cranking


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.engines")
    parser.add_argument("--protocol", required=True, choices=SERVERS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--kv-blocks", type=int, default=64)
    arguments = parser.parse_args()
    step_s = arguments.step_ms / 1000
    uvloop.run(serve(arguments.protocol, arguments.port, step_s, arguments.kv_blocks))
