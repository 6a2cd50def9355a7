"""A sidecar process with a real engine, and a frontend that reads from it; or one in here."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from sidecar.config import SidecarConfig
from sidecar.engines.base import EngineListener
from sidecar.service import Sidecar
from tests.sidecar.fakes import Reader, ScriptedEngine, start_of
from tests.sidecar.processes import no_process_left, until
from unbroken.discovery import WORKERS, Discovery, connect
from unbroken.transport import open_channel
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1 import worker_pb2
from unbroken.v1.relay_service_pb2_grpc import RelayServiceStub

LIMIT_S = 20.0


class Client(Reader):
    """A frontend of one worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__()
        self.call = RelayServiceStub(channel).Relay()
        self._hearing: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._slot = 0

    async def open(self, call_number: int = 1) -> pb.RelayWelcome:
        hello = pb.RelayHello(
            protocol_version=1,
            frontend_id="f",
            incarnation=1,
            call_number=call_number,
            takes_next_tokens=True,
        )
        await self.call.write(pb.RelayRequest(hello=hello))
        response = await self.call.read()
        assert isinstance(response, pb.RelayResponse)
        self._hearing = asyncio.create_task(self._hear_all())
        return response.welcome

    async def start(self, number: int, *, max_tokens: int | None = None) -> list[int]:
        """Begin so many streams, which do not end unless told when; returns their slots."""
        slots = list(range(self._slot + 1, self._slot + number + 1))
        self._slot += number
        for slot in slots:
            start = start_of(slot, f"r{slot}", prompt=[5, slot])
            start.checkpoint.params.sampling.temperature = 0
            start.checkpoint.params.stopping.ignore_eos = True
            if max_tokens is not None:
                start.checkpoint.params.stopping.max_tokens = max_tokens
            await self.call.write(pb.RelayRequest(start=start))
        return slots

    async def until(self, claim: Callable[[], object]) -> None:
        assert self._hearing is not None
        async with asyncio.timeout(LIMIT_S):
            while not claim():
                if self._hearing.done():
                    self._hearing.result()
                self._heard.clear()
                await self._heard.wait()

    async def close(self) -> None:
        self.call.cancel()
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)

    async def _hear_all(self) -> None:
        try:
            while isinstance(response := await self.call.read(), pb.RelayResponse):
                self.hear(response)
                self._heard.set()
        finally:
            self._heard.set()


class World:
    """One sidecar process and what can be seen of it."""

    def __init__(self, process: asyncio.subprocess.Process, where: Discovery) -> None:
        self.process = process
        self.discovery = where
        self.record = worker_pb2.WorkerRecord()
        self.channel: grpc.aio.Channel

    async def member(
        self, claim: Callable[[worker_pb2.WorkerRecord], object]
    ) -> worker_pb2.WorkerRecord:
        """The record in discovery, once it is as claimed."""
        async with asyncio.timeout(LIMIT_S):
            async for members in self.discovery.watch(WORKERS):
                record = members.get("w1")
                if record is not None and claim(record):
                    self.record = record
                    return record
        raise AssertionError("a watch does not end")

    async def exit_status(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            return await self.process.wait()


@asynccontextmanager
async def running(
    directory: Path, *flags: str, engine: str = "--engine=simulated"
) -> AsyncGenerator[World, None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sidecar", "--worker-id=w1", f"--discovery={directory}"),
        *("--log-level=error", engine, *flags),
    )
    world = World(process, connect(directory))
    try:
        await world.member(lambda record: record.address)
        async with open_channel(world.record.address) as world.channel:
            yield world
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def config_of(**settings: object) -> SidecarConfig:
    return SidecarConfig.model_validate({"worker_id": "w", "discovery": "d"} | settings)


@asynccontextmanager
async def scripted(
    directory: Path,
    where: Discovery | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    **settings: object,
) -> AsyncGenerator[tuple[Sidecar, ScriptedEngine, EngineListener], None]:
    config = config_of(worker_id="w1", discovery=directory, engine="simulated", **settings)
    engine = ScriptedEngine()
    sidecar = Sidecar(config, engine, where=where, clock=clock)
    await sidecar.start()
    try:
        await until(lambda: engine.listener is not None)
        assert engine.listener is not None
        yield sidecar, engine, engine.listener
    finally:
        await sidecar.stop()


@asynccontextmanager
async def connected(world: World, call_number: int = 1) -> AsyncGenerator[Client, None]:
    client = Client(world.channel)
    try:
        verdict = (await client.open(call_number)).verdict
        if verdict.state != worker_pb2.ENGINE_STATE_SERVING:
            await client.until(lambda: client.verdicts)
        yield client
    finally:
        await client.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a loop of its own; no process is left afterwards."""

    async def limited() -> None:
        async with asyncio.timeout(45):
            await scenario()

    with no_process_left() as alive:
        uvloop.run(limited())
        uvloop.run(until(lambda: not alive()))
