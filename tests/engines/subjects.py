"""The engines that have to conform, each behind its adapter, with a frontend before them.

A new engine is a line in `SUBJECTS`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from sidecar.engines.base import Engine
from sidecar.engines.calls import CallEngine, Pace
from sidecar.engines.kinds import adapter_of
from sidecar.engines.lives import Launch
from sidecar.engines.native import NativeEngine
from sidecar.hub import Hub
from sidecar.watchdog import WatchdogPolicy
from tests.engines import openai_server, sglang_server, trtllm_server, vllm_server
from tests.engines.backend import Backend
from tests.engines.real.subject import Real
from tests.sidecar.fakes import Frontend
from tests.worker.engines import Attempt as Expected
from tests.worker.engines import Engine as Reference
from tests.worker.engines import starting
from unbroken.generation import GenerationParams, params_to_proto
from unbroken.restart import RestartPolicy
from unbroken.transport import listen, make_server
from unbroken.v1 import attempt_pb2, worker_pb2
from worker.service import EngineService

LIMIT_S = 20.0 if Real.of_environment() is None else 200.0
FAST = RestartPolicy(backoff_initial_s=0.02, backoff_max_s=0.02, crash_loop_limit=50)
QUICK = Pace(health_s=0.05, load_s=0.02, tap_retry_s=0.05)
"""So that a test need not wait."""


class Talk:
    """A frontend at the hub before one engine."""

    def __init__(self, about: "Tending") -> None:
        self.engine = about.engine
        self.backend = about.backend
        """What computes, wherever it is; of a real engine, nothing does here."""
        self.real = about.real
        self.hub = Hub(about.engine, watchdog_policy=about.watchdog)
        self.frontend = Frontend(self.hub, time.monotonic())
        self._num_started = 0

    @property
    def tokens(self) -> Mapping[int, list[int]]:
        """By slot, as they were read."""
        return self.frontend.tokens

    def start(
        self,
        params: GenerationParams,
        prompt: Sequence[int] = (1, 2, 3),
        *,
        first_offset: int = 0,
        window_tokens: int = 0,
        deadline_s: float | None = None,
        output: Sequence[int] = (),
        rank: int | None = None,
    ) -> int:
        """Begin a stream of its own; returns its slot."""
        self._num_started += 1
        slot = self._num_started
        message = attempt_pb2.StartAttempt(
            slot=slot,
            stream=attempt_pb2.StreamKey(request_id=f"r{slot}"),
            epoch=1,
            window_tokens=window_tokens,
            rank=rank,
            checkpoint=attempt_pb2.Checkpoint(
                prompt_token_ids=prompt,
                output_token_ids=output,
                params=params_to_proto(params),
                first_offset=first_offset,
            ),
        )
        if deadline_s is not None:
            message.deadline.FromNanoseconds(round(deadline_s * 1e9))
        self.frontend.offsets[slot] = first_offset
        self.hub.start(self.frontend.link, message)
        return slot

    def abort(self, slot: int) -> None:
        self.hub.abort(self.frontend.link, slot)

    async def until(self, claim: Callable[[], object], why: str = "") -> None:
        """Read until `claim` is true."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while True:
                    self.frontend.read()
                    if claim():
                        return
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(why or "it did not come to pass") from None

    async def ended(self, slot: int) -> attempt_pb2.AttemptEnded:
        """The end of a stream that was not refused."""
        frontend = self.frontend
        await self.until(
            lambda: slot in frontend.ended or slot in frontend.refused, f"slot {slot} never ended"
        )
        assert slot not in frontend.refused, frontend.refused[slot]
        return frontend.ended[slot]

    async def refused(self, slot: int) -> attempt_pb2.AttemptRefused:
        await self.until(lambda: slot in self.frontend.refused, f"slot {slot} was not refused")
        return self.frontend.refused[slot]

    async def state(self, state: "worker_pb2.EngineState.ValueType", incarnation: int) -> None:
        """Until the engine was said to be so."""
        await self.until(
            lambda: any(
                one.state == state and one.engine_incarnation == incarnation
                for one in self.frontend.verdicts
            ),
            f"never {worker_pb2.EngineState.Name(state)} in life {incarnation}",
        )

    @property
    def context_length(self) -> int:
        assert self.hub.up is not None, "it serves"
        return self.hub.up.description.context_length

    @property
    def kv_blocks(self) -> int:
        return self.real.kv_blocks if self.real is not None else self.backend.spec.kv_blocks

    def lacks(self, feature: str) -> bool:
        """A real engine does not know it, so it has to be refused."""
        return self.real is not None and feature in self.real.lacks

    async def alone(self, params: GenerationParams, prompt: Sequence[int] = (1, 2, 3)) -> Expected:
        """What an engine without anything around it gives; of a real one, asked in other words."""
        if self.real is not None:
            return await self.real.alone(params, prompt)
        return self.expected(params, prompt)

    def expected(self, params: GenerationParams, prompt: Sequence[int] = (1, 2, 3)) -> Expected:
        """The same, of an engine whose backend is here."""
        assert self.real is None, "what a real engine gives is asked for"
        reference = Reference(self.backend.runner)
        return reference.generate_meanwhile(starting(prompt, params=params_to_proto(params)))


@dataclass(frozen=True)
class Subject:
    """How an engine to be tested comes to be."""

    behind: Callable[[Backend, Path], AbstractAsyncContextManager[Engine]]
    """An adapter with its engine, which computes with the backend."""
    real: Real | None = None


@dataclass(frozen=True)
class Tending:
    """What a conversation is about."""

    engine: Engine
    backend: Backend
    watchdog: WatchdogPolicy | None = None
    """The usual one, unless it is what is tested: a busy machine must not look like a hung one."""
    real: Real | None = None


@asynccontextmanager
async def tending(what: Tending) -> AsyncGenerator[Talk, None]:
    """An engine that runs, and who speaks to it."""
    conversation = Talk(what)
    running = asyncio.create_task(what.engine.run(conversation.hub))
    watching = asyncio.create_task(_watch(conversation.hub))
    try:
        await conversation.until(lambda: conversation.hub.up is not None, "it never came up")
        yield conversation
        conversation.hub.ledger.check()
    finally:
        await what.engine.stop()
        watching.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)
    running.result()


@asynccontextmanager
async def talk(subject: Subject, directory: Path, **options: float) -> AsyncGenerator[Talk, None]:
    """The same, with a new engine of this make."""
    backend = Backend(**options)  # pyright: ignore[reportArgumentType]
    async with (
        subject.behind(backend, directory) as engine,
        tending(Tending(engine, backend, real=subject.real)) as conversation,
    ):
        yield conversation


def play(scenario: Coroutine[Any, Any, None]) -> None:
    """Run to the end, within bounds."""

    async def limited() -> None:
        async with asyncio.timeout(2 * LIMIT_S):
            await scenario

    uvloop.run(limited())


@dataclass(frozen=True)
class Served:
    """A protocol server that runs."""

    address: str
    servicer: object
    stop: Callable[[float], Awaitable[None]]
    """Take no more calls, and cut those that run after so many seconds."""


def _grpc(
    add: Callable[[grpc.aio.Server, Backend], object],
) -> Callable[[Backend, int], AbstractAsyncContextManager[Served]]:
    """A protocol on loopback, over gRPC."""

    @asynccontextmanager
    async def serving(backend: Backend, port: int = 0) -> AsyncGenerator[Served, None]:
        server = make_server()
        servicer = add(server, backend)
        address = listen(server, f"127.0.0.1:{port}")
        await server.start()
        try:
            yield Served(address, servicer, server.stop)
        finally:
            await server.stop(None)

    return serving


@asynccontextmanager
async def _http(backend: Backend, port: int = 0) -> AsyncGenerator[Served, None]:
    """OpenAI's HTTP, as vLLM serves it."""
    async with openai_server.serving(backend, port) as (address, server):
        yield Served(address, server, server.stop)


SERVERS: Mapping[str, Callable[[Backend, int], AbstractAsyncContextManager[Served]]] = {
    "vllm": _grpc(vllm_server.add),
    "sglang": _grpc(sglang_server.add),
    "trtllm": _grpc(trtllm_server.add),
    "openai": _http,
}
"""By protocol: what serves it, at a port or at any."""


def _called(protocol: str) -> "Subject":
    """An engine that is asked by calls."""

    @asynccontextmanager
    async def behind(backend: Backend, directory: Path) -> AsyncGenerator[Engine, None]:
        del directory
        cranking = asyncio.create_task(backend.run())
        try:
            async with SERVERS[protocol](backend, 0) as served:
                launch = Launch(None, served.address, restart=FAST)
                yield CallEngine(launch, adapter_of(protocol), pace=QUICK)
        finally:
            cranking.cancel()
            await asyncio.gather(cranking, return_exceptions=True)

    return Subject(behind)


@asynccontextmanager
async def _native(backend: Backend, directory: Path) -> AsyncGenerator[Engine, None]:
    """Our own contract; the worker's service in this process, with a runner as the others have."""
    path = directory / "engine.sock"
    service = EngineService(backend.runner)
    listening = asyncio.Event()
    serving = asyncio.create_task(service.serve(path, on_listening=listening.set))
    try:
        await listening.wait()
        yield NativeEngine(Launch(None, str(path), restart=FAST))
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


async def _watch(hub: Hub) -> None:
    while True:
        hub.watch()
        await asyncio.sleep(0.05)


def _real(real: Real) -> Subject:
    """An engine that runs somewhere."""

    @asynccontextmanager
    async def behind(backend: Backend, directory: Path) -> AsyncGenerator[Engine, None]:
        del backend, directory
        yield CallEngine(
            Launch(None, real.address, restart=FAST),
            adapter_of(real.protocol, real.tokenizer),
            pace=QUICK,
        )

    return Subject(behind, real)


def _subjects() -> Mapping[str, Subject]:
    real = Real.of_environment()
    if real is not None:
        return {f"real {real.protocol}": _real(real)}
    return {"native": Subject(_native), **{protocol: _called(protocol) for protocol in SERVERS}}


SUBJECTS: Mapping[str, Subject] = _subjects()
"""The real engine that the environment names, or all others."""
