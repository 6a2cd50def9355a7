"""A mesh of two workers, whose first engine can be made sick."""

import asyncio
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration import lying_engine
from tests.integration.readers import Reader
from tests.integration.worlds import World, real_mesh, scrape
from unbroken.transport import open_channel
from unbroken.v1 import worker_pb2

PERIOD_S = 1.0
TIMEOUT_S = 0.5
SLACK_S = 3.0
"""The machine may be busy."""
STALLED = worker_pb2.ENGINE_STATE_STALLED
SERVING = worker_pb2.ENGINE_STATE_SERVING
NOT_SERVING_NOW = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING_NOW = health_pb2.HealthCheckResponse.SERVING


@dataclass
class Hospital:
    """A mesh of two workers, the first of which can be made sick."""

    world: World
    sickness: Path

    async def state(self) -> int:
        """Of the first worker's engine, as the frontend sees it."""
        workers = await self.world.client.list_workers()
        return {one.record.identity.worker_id: one.engine for one in workers}["w1"]

    async def until(self, state: int, limit_s: float) -> float:
        """Wait for that state; how long it took."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        async with asyncio.timeout(limit_s):
            while await self.state() != state:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.01)
        return loop.time() - began_at

    async def until_probed(self, times: int) -> None:
        """Wait until the canary has asked so often again, and so knows the right answer."""
        num_probes = self.metric("canary_probes_total")
        while self.metric("canary_probes_total") < num_probes + times:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def health(self, service: str) -> int:
        async with open_channel(self.world.mesh.workers["w1"].address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    def metric(self, name: str) -> float:
        return scrape(self.world.mesh.workers["w1"].metrics_address)[f"unbroken_sidecar_{name}"]

    def reader(self, index: int, *, max_tokens: int = 4000) -> Reader:
        return Reader(
            self.world,
            self.world.client.generate(
                token_ids=[300 + index, 301],
                temperature=0.8,
                seed=index,
                ignore_eos=True,
                max_tokens=max_tokens,
                timeout_s=40,
            ),
        )

    async def begun(self, worker_id: str) -> list[Reader]:
        """Streams of which two, at least, run there."""
        readers: list[Reader] = []
        while len([None for it in readers if await it.worker() == worker_id]) < 2:
            readers.append(self.reader(len(readers)))
            await readers[-1].until(5)
        return readers


@contextmanager
def hospital(directory: Path, *flags: str) -> Generator[Hospital]:
    sickness = directory / "sickness"
    sickness.write_text("")

    def engine(name: str, file: Path) -> list[str]:
        socket = directory / f"{name}.sock"
        words = [sys.executable, lying_engine.__file__, str(socket), str(file)]
        return ["--engine-command", shlex.join(words), "--engine-socket", str(socket)]

    (directory / "health").write_text("")
    with real_mesh(
        directory / "mesh",
        num_workers=2,
        engine=None,
        sidecar_flags=[
            *(f"--canary-period-s={PERIOD_S}", f"--canary-timeout-s={TIMEOUT_S}"),
            *("--metrics-listen=127.0.0.1:0", *flags),
        ],
        flags_of={
            "w1": engine("w1", sickness),
            "w2": engine("w2", directory / "health"),
        },
    ) as world:
        yield Hospital(world, sickness)
