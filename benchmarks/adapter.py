"""What a token of a real engine costs its sidecar: `make bench-adapter`.

Engines of other makes are asked by a call for each stream, and answer with a message for each
token. A server of vLLM's protocol stands for one (tests/engines), in a process of its own, at a
pace; 32 streams. In the same run:

    bare      one process reads the streams with grpc.aio and the package's stub, and nothing else
    idle      the sidecar beside the engine while nothing runs: polls of health and load, heartbeats
    sidecar   the same streams through sidecar and frontend

CPU is time on a CPU of all threads of a process, per token. The promise is of the sidecar, with
everything in it.

    python -m benchmarks.adapter [--streams 32] [--seconds 6] [--step-ms 20]
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop
from smg_grpc_proto.generated import vllm_engine_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]

from benchmarks.stamps import CpuClock
from sidecar.engines.adapter import Call
from sidecar.engines.vllm import request_of
from tests.engines.real.servers import free_port
from unbroken.client import Client
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.mesh import LocalMesh

TARGET_US: Final = 60.0
"""Of the sidecar, a token."""
IDLE_S: Final = 3.0
STEP_MS_OF_BARE: Final = 20.0
"""Only a number of tokens follows from it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--bare", help="read streams of this engine, and nothing else")
    arguments = parser.parse_args()
    num_tokens = round(arguments.seconds / arguments.step_ms * 1000)
    if arguments.bare:
        figures = uvloop.run(_read_bare(arguments.bare, arguments.streams, num_tokens))
    else:
        figures = uvloop.run(_measure(arguments.streams, num_tokens, arguments.step_ms))
    print(json.dumps(figures))  # noqa: T201 - The line that ends every measurement.
    sys.exit(not figures["ok"])


async def _measure(num_streams: int, num_tokens: int, step_ms: float) -> dict[str, object]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    engine = (
        *(sys.executable, "-m", "tests.engines", "--protocol", "vllm", "--port", str(port)),
        *("--step-ms", str(step_ms), "--kv-blocks", "4096"),
    )
    flags = (
        *("--engine-protocol", "vllm", "--engine-address", address),
        *("--engine-command", shlex.join(engine)),
    )
    with tempfile.TemporaryDirectory() as name:
        mesh = LocalMesh(Path(name) / "mesh", num_workers=1, engine=None, sidecar_flags=flags)
        async with mesh, Client(mesh.frontend_address) as client:
            (worker,) = mesh.workers.values()
            bare = await _bare(address, num_streams, num_tokens)
            idle = CpuClock(worker.sidecar_pid)
            await asyncio.sleep(IDLE_S)
            idle_s = idle.elapsed_s()
            clocks = {
                "sidecar": CpuClock(worker.sidecar_pid),
                "frontend": CpuClock(mesh.frontend_pid),
                "engine": CpuClock(worker.engine_pgid),
            }
            loop = asyncio.get_running_loop()
            began = loop.time()
            read = await asyncio.gather(*(_read(client, num_tokens) for _ in range(num_streams)))
            elapsed = loop.time() - began
            tokens = sum(read)
            spent = {process: clock.elapsed_s() for process, clock in clocks.items()}
    polls_us = idle_s / IDLE_S * elapsed / tokens * 1e6
    cost_us = {process: round(s / tokens * 1e6, 1) for process, s in spent.items()}
    of_bare = cost_us["sidecar"] / bare["us"]
    is_whole = tokens == num_streams * num_tokens
    return {
        "ok": is_whole and cost_us["sidecar"] <= TARGET_US,
        "streams": num_streams,
        "tokens_per_s": round(tokens / elapsed),
        "sidecar_us": cost_us["sidecar"],
        "target_us": TARGET_US,
        "of_bare": round(of_bare, 2),
        "of_it_polls_us": round(polls_us, 1),
        "bare_us": bare["us"],
        "bare_tokens_per_s": bare["tokens_per_s"],
        "frontend_us": cost_us["frontend"],
        "engine_us": cost_us["engine"],
    }


async def _read(client: Client, num_tokens: int) -> int:
    """One stream; how many tokens came."""
    stream = client.generate(
        token_ids=(5, 6, 7), max_tokens=num_tokens, ignore_eos=True, temperature=0.0
    )
    return sum([len(piece.token_ids) async for piece in stream])


async def _bare(address: str, num_streams: int, num_tokens: int) -> dict[str, float]:
    """The same by a process that does nothing else."""
    seconds = str(num_tokens * STEP_MS_OF_BARE / 1000)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.adapter", "--bare", address),
        *("--streams", str(num_streams), "--seconds", seconds),
        *("--step-ms", str(STEP_MS_OF_BARE)),
        stdin=DEVNULL,
        stdout=PIPE,
    )
    output, _ = await process.communicate()
    return json.loads(output)


async def _read_bare(address: str, num_streams: int, num_tokens: int) -> dict[str, object]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)  # pyright: ignore[reportUnknownVariableType]

        async def read(index: int) -> int:
            params = GenerationParams(
                SamplingParams(temperature=0.0), StopConditions(num_tokens, ignore_eos=True)
            )
            request = request_of(Call(f"bare-{index}", (5, 6, 7), params, num_tokens))
            num = 0
            async for response in stub.Generate(request):
                num += len(response.chunk.token_ids)
            return num

        await read(-1)  # Connected.
        loop = asyncio.get_running_loop()
        clock, began = CpuClock(), loop.time()
        tokens = sum(await asyncio.gather(*(read(index) for index in range(num_streams))))
        elapsed = loop.time() - began
        return {
            "ok": tokens == num_streams * num_tokens,
            "us": round(clock.elapsed_s() / tokens * 1e6, 1),
            "tokens_per_s": round(tokens / elapsed),
        }


if __name__ == "__main__":
    main()
