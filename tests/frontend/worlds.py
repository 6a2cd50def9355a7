"""A frontend in this process, fake sidecars, and a client that checks the contract."""

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from frontend.config import FrontendConfig
from frontend.service import Frontend
from tests.frontend.fakes import MODEL, FakeDiscovery, FakeSidecar
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.generation_stream import GenerationStream, Piece

TIME_LIMIT_S = 20.0


@dataclass
class World:
    """What a test needs."""

    frontend: Frontend
    discovery: FakeDiscovery
    client: Client
    sidecars: list[FakeSidecar]
    clients: list[Client] = field(default_factory=list[Client])

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a state of the frontend that no event of ours announces; fails after 5 s."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.002)

    async def until_ready(self, num_workers: int) -> None:
        """Wait until so many workers take requests."""
        await self.until(lambda: self.frontend.mesh.num_ready(MODEL) == num_workers)

    async def add(self, sidecar: FakeSidecar) -> None:
        """Start another sidecar and announce it."""
        await sidecar.begin()
        self.sidecars.append(sidecar)
        self.announce()

    def announce(self) -> None:
        """Announce all sidecars."""
        self.discovery.announce(*(sidecar.record for sidecar in self.sidecars))

    def another_client(self) -> Client:
        """A client with a connection of its own."""
        client = Client(self.frontend.address)
        self.clients.append(client)
        return client

    def detail_of(self, worker_id: str) -> str:
        """Why the worker takes no work; empty if it is not known."""
        worker = self.frontend.mesh.workers.get(worker_id)
        return worker.detail if worker else ""

    def num_running(self) -> int:
        """Requests that run."""
        return self.frontend.requests.num_running

    def num_tokens(self) -> int:
        """Tokens in the ledgers of all requests that run."""
        infos, _ = self.frontend.requests.page(0, "")
        return sum(choice.num_tokens for info in infos for choice in info.choices)

    async def sidecar_of(self, request_id: str) -> FakeSidecar:
        """The sidecar on which choice 0 of the request runs, as soon as it does."""
        found: list[FakeSidecar] = []

        def runs() -> bool:
            found[:] = [
                sidecar
                for sidecar in self.sidecars
                for running in sidecar.running.values()
                if running.start.stream.request_id == request_id
            ]
            return bool(found)

        await self.until(runs)
        return found[0]


edge = os.environ.get("UNBROKEN_FRONTEND_EDGE", "native")
"""What serves clients, unless a world says; see the fixture `each_edge`, and `make test-grpcio`."""
relay = os.environ.get("UNBROKEN_FRONTEND_RELAY", "native")
"""What carries the calls to sidecars, likewise."""


@asynccontextmanager
async def world(*sidecars: FakeSidecar, **settings: Any) -> AsyncGenerator[World]:
    """A frontend with these sidecars, all ready."""
    discovery = FakeDiscovery()
    directory = tempfile.TemporaryDirectory()  # Only for the resume keys.
    settings.setdefault("edge", edge)
    settings.setdefault("relay", relay)
    config = FrontendConfig(frontend_id="f0", discovery=Path(directory.name), **settings)
    frontend = Frontend(config, where=discovery)
    it: World | None = None
    try:
        for sidecar in sidecars:
            await sidecar.begin()
        await frontend.start()
        async with Client(frontend.address) as client:
            it = World(frontend, discovery, client, list(sidecars))
            if sidecars:
                it.announce()
                num_serving = sum(s.model == MODEL for s in sidecars)
                await it.until_ready(num_serving)
            yield it
    finally:
        for client in it.clients if it else ():
            await client.close()
        await frontend.stop()
        for sidecar in it.sidecars if it else sidecars:
            await sidecar.die()
        directory.cleanup()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario, for a limited time."""

    async def limited() -> None:
        async with asyncio.timeout(TIME_LIMIT_S):
            await scenario

    uvloop.run(limited())


async def read(stream: GenerationStream) -> tuple[list[int], str]:
    """All token ids and text of choice 0."""
    ids: list[int] = []
    text: list[str] = []
    async for piece in stream:
        if piece.choice_index == 0:
            ids.extend(piece.token_ids)
            text.append(piece.text)
    return ids, "".join(text)


async def read_some(stream: GenerationStream, num_tokens: int) -> list[Piece]:
    """Pieces with at least so many tokens together."""
    pieces: list[Piece] = []
    while sum(len(piece.token_ids) for piece in pieces) < num_tokens:
        pieces.append(await anext(stream))
    return pieces


async def failure_of(stream: GenerationStream) -> UnbrokenError:
    """The error with which the stream ends."""
    try:
        await read(stream)
    except UnbrokenError as error:
        return error
    raise AssertionError("expected the stream to fail, it ended well")
