"""Kills processes that use memory, and judges what they left to others, and what leaks."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.memory_service.processes import ANSWER_S_MAX, ServiceProcess, Victims, until
from tests.memory_service.victim import BLOCK_BYTES, bytes_of, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.transport import open_channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_pb2_grpc

EVERY_LINE = 10**9
"""A line that no victim comes to: it counts those it runs, and lives."""
FENCED_S_MAX = 60.0
"""Of a process that was killed, on a machine that is full: as a rule it takes milliseconds."""
ResultT = TypeVar("ResultT")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT)


@dataclass(slots=True)
class Figures:
    """What was seen."""

    trials: int = 0
    killed: int = 0
    blocks_read: int = 0
    weights_read: int = 0
    pools_adopted: int = 0
    pools_fresh: int = 0
    violations: list[str] = field(default_factory=list[str])


class Control:
    """The control side of a service, asked from code that does not wait otherwise."""

    def __init__(self, service: ServiceProcess) -> None:
        self._runner = asyncio.Runner()
        self._service = service
        self._runner.run(self._connect())

    async def _connect(self) -> None:
        self._channel = open_channel(self._service.control)
        self._stub = memory_pb2_grpc.MemoryServiceStub(self._channel)

    def _ask(self, call: Callable[[], Awaitable[ResultT]]) -> ResultT:
        async def asked() -> ResultT:
            async with asyncio.timeout(ANSWER_S_MAX):
                return await call()

        return self._runner.run(asked())

    def usage(self) -> pb.GetUsageResponse:
        return self._ask(lambda: self._stub.GetUsage(pb.GetUsageRequest()))

    def sessions(self) -> dict[int, pb.Session]:
        response = self._ask(lambda: self._stub.ListSessions(pb.ListSessionsRequest()))
        return {session.session_id: session for session in response.sessions}

    def segments(self) -> list[pb.Segment]:
        return list(self._ask(lambda: self._stub.ListSegments(pb.ListSegmentsRequest())).segments)

    def evict(self, segment: str = "") -> int:
        return self._ask(lambda: self._stub.Evict(pb.EvictRequest(segment=segment))).freed_bytes

    def verify(self) -> pb.VerifyResponse:
        return self._ask(lambda: self._stub.Verify(pb.VerifyRequest()))

    def close(self) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()


class Trials:
    """One service, victims one after the other, and a reader that outlives them."""

    def __init__(self, service: ServiceProcess) -> None:
        self.service = service
        self.victims = Victims(service)
        self.control = Control(service)
        self.reader = service.client(client="reader")
        self.figures = Figures()
        self._seed = 0
        self._sealed = 0
        """Seed of the weights that were told to be sealed last."""
        self._wrote = 0
        """What the pool's latest owner said it wrote last."""
        self._epochs: dict[str, int] = {}
        self._num_fds = service.num_fds()

    def close(self) -> None:
        self.reader.close()
        self.control.close()
        self.victims.close()

    def num_lines(self, scenario: str) -> int:
        """How many lines of the library a victim runs that nobody kills."""
        self.trial(scenario, line=EVERY_LINE)
        return self._lines

    def trial(
        self, scenario: str, *, line: int = 0, after_s: float = 0.0, number: int = signal.SIGKILL
    ) -> None:
        """One victim, and everything that is promised of what it leaves."""
        self._seed += 1
        figures = self.figures
        figures.trials += 1
        result = self.victims.run(
            scenario, seed=self._seed, line=line, after_s=after_s, number=number
        )
        said: dict[str, list[Any]] = {}
        for word, *rest in result["said"]:
            said.setdefault(word, []).append(rest)
        self._lines = said["done"][0][0] if "done" in said else 0
        self._where = f"{scenario} {self._seed}, line {line}, after {after_s:.4f} s: {result}"
        figures.killed += "done" not in said
        if "failed" in said:
            self._wrong("it failed by itself")
        for name, epoch in said.get("epoch", []):
            if epoch <= self._epochs.get(name, 0):
                self._wrong(f"epoch {epoch} of {name} is not above {self._epochs[name]}")
            self._epochs[name] = epoch
        if "session" in said:
            self._until_fenced(said["session"][0][0])
        self._judge_blocks(said)
        self._judge_weights(said)
        self._judge_pool(said)

    def _until_fenced(self, session_id: int) -> None:
        def is_fenced() -> bool:
            session = self.control.sessions().get(session_id)
            return session is None or session.fence >= pb.FENCE_LEVEL_QUIET

        until(is_fenced, f"proof that {self._where} is dead", FENCED_S_MAX)

    def _judge_blocks(self, said: dict[str, list[Any]]) -> None:
        committed = {number for (number,) in said.get("committed", [])}
        for number in range(5):
            key = key_of(self._seed, number)
            with self.reader.get([key], ttl_s=1.0) as blocks:
                if len(blocks):
                    self.figures.blocks_read += 1
                    if bytes(blocks[0].data) != bytes_of(key):
                        self._wrong(f"block {number} has other bytes")
                elif number in committed and "overwrites" not in said:
                    self._wrong(f"block {number} is lost")

    def _judge_weights(self, said: dict[str, list[Any]]) -> None:
        try:
            segment = self.reader.attach("weights")
        except UnbrokenError as error:
            if error.reason is not Reason.SEGMENT_NOT_FOUND or self._sealed:
                self._wrong(f"weights are gone: {error.detail}")
            return
        of = int(segment.layout)
        if of < self._sealed or ("sealed" in said and of != self._seed):
            self._wrong(f"weights are those of {of}, expected {self._sealed} or later")
        self._sealed = of
        self.figures.weights_read += 1
        for index, slab in enumerate(segment.slabs):
            if slab[:] != bytes_of(key_of(of, index)) * (len(slab) // BLOCK_BYTES):
                self._wrong(f"weights of {of} have other bytes")
        self.reader.release(segment)

    def _judge_pool(self, said: dict[str, list[Any]]) -> None:
        if "fresh" in said:
            self.figures.pools_fresh += 1
            if self._wrote:
                self._wrong("the pool of a dead owner was not adopted")
        if "found" in said:
            self.figures.pools_adopted += "fresh" not in said
            (found,) = said["found"][0]
            if found < self._wrote:
                self._wrong(f"a pool has {found}, {self._wrote} were committed")
            self._wrote = found
        for (wrote,) in said.get("wrote", []):
            self._wrote = max(self._wrote, wrote)

    def judge_leaks(self) -> None:
        """After everything that outlives its process is evicted, nothing is left."""
        self._where = "at the end"
        self.reader.close()
        for segment in ("", "weights", "pool"):
            self.control.evict(segment)
        until(lambda: not self.control.sessions(), "sessions are forgotten")
        usage = self.control.usage()
        if usage.used_bytes or usage.num_blocks or usage.num_pinned or self.control.segments():
            self._wrong(f"something is left: {usage}")
        try:
            # The control connection and the reader's were there in the count, or one less.
            until(lambda: self.service.num_fds() <= self._num_fds, "descriptors are closed", 5)
        except AssertionError:
            self._wrong(f"{self.service.num_fds()} descriptors, {self._num_fds} before")
        self._wrote = 0

    def _wrong(self, what: str) -> None:
        self.figures.violations.append(f"{what} ({self._where})")
