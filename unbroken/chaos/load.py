"""Keeps a number of streams running on an arena, and judges each when it has ended."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final, Self

from unbroken.chaos.arena import Arena
from unbroken.chaos.checker import Failed, Finished, Verdict, check
from unbroken.v1 import inference_service_pb2 as pb

_REVIVAL_POLL_S: Final = 0.02


class Load:
    """Streams of these requests, in turns; a new one whenever one has ended.

    async with Load(arena, requests, num_streams=8) as load:
        ...
        await load.end()
        load.verdict
    """

    def __init__(
        self,
        arena: Arena,
        requests: Sequence[pb.GenerateRequest],
        *,
        num_streams: int,
        timeout_s: float = 120.0,
    ) -> None:
        self._arena = arena
        self._requests = requests
        self._timeout_s = timeout_s
        self.num_streams = num_streams
        """How many run at once; may be changed."""
        self._running: dict[str, pb.GenerateRequest] = {}
        self._orphans: set[str] = set()
        """Their client was killed: nobody knows how they went on."""
        self._tolerated: dict[str, set[str]] = {}
        self._num = 0
        self._task: asyncio.Task[None] | None = None
        self.verdict = Verdict()
        """On all streams that have ended."""

    @property
    def running(self) -> Collection[str]:
        """Streams that have not ended."""
        return self._running.keys()

    async def __aenter__(self) -> Self:
        """Learn what undisturbed runs deliver, and begin."""
        requests = {str(index): request for index, request in enumerate(self._requests)}
        await self._arena.truths(requests, limit_s=self._timeout_s)
        self._task = asyncio.create_task(self._keep(), name="load")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def end(self, limit_s: float = 60.0) -> None:
        """Begin no more streams, wait for those that run, and judge whatever there is."""
        self.num_streams = 0
        with suppress(TimeoutError):  # The checker says which have no end.
            async with asyncio.timeout(limit_s):
                await self._arena.client.until(lambda: not self._arena.client.open_streams)
        await self.__aexit__()
        await self._judge(set(self._running))

    def client_died(self) -> None:
        """The histories of streams that run now may end anywhere."""
        self._orphans.update(self._running)

    def tolerate(self, reasons: Collection[str]) -> None:
        """Streams that run now may end with these errors (docs/ERRORS.md)."""
        for name in self._running:
            self._tolerated.setdefault(name, set()).update(reasons)

    async def _keep(self) -> None:
        while True:
            client = self._arena.client
            if client.is_running:
                while len(self._running) - len(self._orphans) < self.num_streams:
                    self._begin()
            ended = {e.stream for e in client.history if isinstance(e, Finished | Failed)}
            if over := self._running.keys() & (ended | self._orphans):
                await self._judge(over)
            await self._news()

    async def _news(self) -> None:
        """Wait for the client to have something new, or to be another one."""
        client = self._arena.client
        if not client.is_running:
            await asyncio.sleep(_REVIVAL_POLL_S)
            return
        num_open = len(client.open_streams)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.until(
                    lambda: len(client.open_streams) != num_open or not client.is_running
                )

    def _begin(self) -> None:
        request = pb.GenerateRequest()
        request.CopyFrom(self._requests[self._num % len(self._requests)])
        self._num += 1
        request.request_id = f"load-{self._num}"
        self._running[request.request_id] = request
        self._arena.client.ask(request.request_id, request, timeout_s=self._timeout_s)

    async def _judge(self, names: Collection[str]) -> None:
        """Take the events of these streams out of the history, and hold them against the truth."""
        client = self._arena.client
        own = [event for event in client.history if event.stream in names]
        client.history = [event for event in client.history if event.stream not in names]
        truths = await self._arena.truths({name: self._running[name] for name in names})
        allowed = {name: self._tolerated.get(name, ()) for name in names}
        self.verdict.add(check(own, truths, reasons_allowed=allowed, may_be_open=self._orphans))
        for name in names:
            del self._running[name]
            self._orphans.discard(name)
            self._tolerated.pop(name, None)
