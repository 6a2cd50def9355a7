"""An engine whose tokens are stamps: for the mesh, and without it for the direct path.

    python -m benchmarks.stamping --socket PATH     the engine contract, for a sidecar
    python -m benchmarks.stamping --listen ADDRESS  InferenceService itself, over grpc.aio

Both make one token per stream and step, paced without drift; 0 ms is as fast as the reader allows.
For a sidecar, streams whose prompt begins with IDLE_ID get one token and then none, for ever.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
import uvloop
from typing_extensions import override

from benchmarks.stamps import NUM_IDS, stamp
from unbroken import framing
from unbroken.tokenizer import asset_to_proto
from unbroken.transport import listen, make_server
from unbroken.v1 import attempt_pb2, engine_pb2, generation_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from worker import simulated_tokenizer

IDLE_ID: Final = NUM_IDS - 1
_HEARTBEAT_S: Final = 0.1
"""How often there is a step if no stream has a token: an engine that makes none is a hung one."""


class StampingEngine:
    """Speaks engine.proto to one sidecar."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._num_frames = 0
        self._num_heartbeats = 0
        self._streams: dict[int, list[int]] = {}
        """Slot: next offset, offset after the last, window, acknowledged offset."""
        self._to_be_idle: set[int] = set()
        self._idle: dict[int, list[int]] = {}
        """As `_streams`; kept apart, so that they cost nothing here."""

    async def serve(self, path: str) -> None:
        """Run until cancelled."""
        connected: asyncio.Queue[framing.Connection[engine_pb2.EngineRequest]] = asyncio.Queue()
        server = await framing.serve_unix(path, engine_pb2.EngineRequest, connected.put_nowait)
        async with server:
            while True:
                connection = await connected.get()
                self._streams.clear()
                self._to_be_idle.clear()
                self._idle.clear()
                self._num_frames = 0
                stepping = asyncio.create_task(self._step(connection))
                while batch := await connection.receive():
                    for request in batch:
                        self._take(connection, request)
                stepping.cancel()

    def _take(
        self,
        connection: framing.Connection[engine_pb2.EngineRequest],
        request: engine_pb2.EngineRequest,
    ) -> None:
        match request.WhichOneof("request"):
            case "hello":
                connection.send(engine_pb2.EngineResponse(ready=_ready()))
            case "start":
                start = request.start
                first = start.checkpoint.first_offset
                end = first + start.checkpoint.params.stopping.max_tokens
                self._streams[start.slot] = [first, end, start.window_tokens or end, first]
                if list(start.checkpoint.prompt_token_ids[:1]) == [IDLE_ID]:
                    self._to_be_idle.add(start.slot)
            case "abort":
                slot = request.abort.slot
                self._to_be_idle.discard(slot)
                stream = self._streams.pop(slot, None) or self._idle.pop(slot, None)
                if stream is not None:
                    ended = attempt_pb2.AttemptEnded(
                        slot=slot,
                        end_offset=stream[0],
                        finish_reason=generation_pb2.FINISH_REASON_CANCELLED,
                    )
                    self._send(connection, attempt_pb2.StepFrame(ended=[ended]))
            case "ack":
                for slot, offset in zip(request.ack.slots, request.ack.offsets, strict=True):
                    if slot in self._streams:
                        self._streams[slot][3] = offset
            case "list_holdings" | None:
                pass

    def _send(
        self,
        connection: framing.Connection[engine_pb2.EngineRequest],
        frame: attempt_pb2.StepFrame,
    ) -> None:
        self._num_frames += 1
        frame.sequence = self._num_frames
        connection.send(engine_pb2.EngineResponse(frame=frame))

    async def _step(self, connection: framing.Connection[engine_pb2.EngineRequest]) -> None:
        loop = asyncio.get_running_loop()
        due = stepped_at = loop.time()
        while True:
            moving = [
                (slot, stream)
                for slot, stream in self._streams.items()
                if stream[0] < stream[3] + stream[2]
            ]
            if moving:
                token_id = stamp()
                frame = attempt_pb2.StepFrame(
                    slots=[slot for slot, _ in moving],
                    offsets=[stream[0] for _, stream in moving],
                    token_ids=[token_id] * len(moving),
                )
                for slot, stream in moving:
                    stream[0] += 1
                    if stream[0] == stream[1]:
                        frame.ended.add(
                            slot=slot,
                            end_offset=stream[0],
                            finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                        )
                        del self._streams[slot]
                    elif slot in self._to_be_idle:
                        self._to_be_idle.remove(slot)
                        self._idle[slot] = self._streams.pop(slot)
                self._send(connection, frame)
                await connection.drain()
                stepped_at = loop.time()
            elif self._idle and loop.time() > stepped_at + _HEARTBEAT_S:
                self._num_heartbeats += 1
                load = worker_pb2.LoadReport(engine_steps_total=self._num_heartbeats)
                self._send(connection, attempt_pb2.StepFrame(load=load))
                stepped_at = loop.time()
            if moving:
                due = max(due + self._step_s, loop.time() - self._step_s)
                await asyncio.sleep(max(0.0, due - loop.time()))
            else:
                await asyncio.sleep(0.001)
                due = loop.time()


class StampingService(InferenceServiceServicer):
    """The direct path: what a server without a mesh would do, one message per token."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(started=pb.StreamStarted(request_id=request.request_id))
        loop = asyncio.get_running_loop()
        due = loop.time() // self._step_s * self._step_s  # All streams step together.
        for offset in range(request.params.stopping.max_tokens):
            due += self._step_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            yield pb.GenerateResponse(offset=offset, token_ids=[stamp()], text="word ")
        yield pb.GenerateResponse(finished=pb.StreamFinished())


def _ready() -> engine_pb2.EngineReady:
    asset = simulated_tokenizer.asset()
    return engine_pb2.EngineReady(
        protocol_version=1,
        description=worker_pb2.EngineDescription(
            kind="stamping",
            model="stamping",
            context_length=1_000_000,
            block_size=16,
            batch_size_max=100_000,
            prefill_tokens_max=1_000_000,
            numerics=worker_pb2.NumericsClass(
                id="stamping", batch_invariant=True, split_invariant=True
            ),
            capabilities=worker_pb2.EngineCapabilities(native_resume=True, seed_bits=64),
            tokenizer_fingerprint=asset.fingerprint,
            num_ranks=1,
        ),
        tokenizer=asset_to_proto(asset),
    )


async def _serve_direct(address: str, step_s: float) -> None:
    server = make_server()
    service = StampingService(step_s)  # pyright: ignore[reportAbstractUsage] - Generate is enough.
    add_InferenceServiceServicer_to_server(service, server)
    bound = listen(server, address)
    await server.start()
    print(bound, flush=True)  # noqa: T201 - The starter reads the port from it.
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket")
    parser.add_argument("--listen")
    parser.add_argument("--step-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    step_s = arguments.step_ms / 1e3
    if arguments.socket:
        uvloop.run(StampingEngine(step_s).serve(arguments.socket))
    else:
        uvloop.run(_serve_direct(arguments.listen, step_s))


if __name__ == "__main__":
    main()
