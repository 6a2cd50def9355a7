"""Clients that stop in the middle of a stream to do something, and compare what they read."""

import asyncio
from dataclasses import dataclass, field

from tests.integration.worlds import World
from unbroken.generation_stream import GenerationStream, Piece
from unbroken.history import History


@dataclass
class Reader:
    """Reads a stream, and does something when so many tokens have come."""

    world: World
    stream: GenerationStream
    history: History = field(default_factory=History)

    async def until(self, num_tokens: int) -> None:
        """Read on until the client has so many tokens."""
        while self.history.num_tokens < num_tokens:
            self._take(await anext(self.stream))

    async def to_the_end(self) -> History:
        async for piece in self.stream:
            self._take(piece)
        self.history.started, self.history.finished = self.stream.started, self.stream.finished
        return self.history

    async def worker(self) -> str:
        """Where choice 0 runs now."""
        info = await self.world.client.get_stream(self.stream.request_id)
        return info.choices[0].worker.worker_id

    async def until_elsewhere(self, worker_id: str) -> str:
        """Wait until choice 0 has gone on at another worker; its name."""
        while (name := await self.worker()) in ("", worker_id):  # noqa: ASYNC110 - Unannounced.
            await asyncio.sleep(0.002)
        return name

    def _take(self, piece: Piece) -> None:
        self.history.add(piece, asyncio.get_running_loop().time())


def assert_equal(seen: History, expected: History, *, num_migrations: int = 1) -> None:
    """The stream equals the undisturbed one, and so many of its attempts failed."""
    assert seen.difference(expected).is_none, seen.difference(expected)
    assert seen.finished is not None
    failed = [attempt for attempt in seen.finished.attempts if attempt.failure]
    assert len(failed) == num_migrations, seen.finished.attempts
