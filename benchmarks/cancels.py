"""Requests cancelled at random moments while workers die and drain, and random deadlines.

    python -m benchmarks.cancels [--cancels 1000] [--deadlines 500] [--seed 0]

Three workers with simulated engines and two frontends. Requests are cancelled in every stage, by
name and by leaving them, softly and hard, alone and as trees, while an engine is killed or a worker
drained every second or two. After each cancel the engines are asked what they hold, until none
holds KV blocks for it. Then requests with random prompts and deadlines: one step after its deadline
no engine may hold one, and what is refused at once is asked again without a deadline, to see that
it could not have been in time. At the end the ledger of the whole mesh has to be empty.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop

from unbroken.client import Client
from unbroken.discovery import Discovery, connect
from unbroken.drain import drain_worker
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.holdings import num_held
from unbroken.mesh import LocalMesh
from unbroken.mesh_ledger import mesh_ledger
from unbroken.transport import open_channel
from unbroken.v1 import generation_pb2, holding_pb2
from unbroken.v1 import sidecar_service_pb2 as sidecar_pb
from unbroken.v1.sidecar_service_pb2_grpc import SidecarServiceStub

STEP_S: Final = 0.02
PREFILL_TOKENS_PER_S: Final = 20_000.0
PREFILL_TOKENS_MAX: Final = 512
BATCH_SIZE: Final = 24
STEP_S_MAX: Final = STEP_S + PREFILL_TOKENS_MAX / PREFILL_TOKENS_PER_S
"""Of a step that is full of prompts."""
OPTIONS: Final = (
    f"--step-base-ms {STEP_S * 1000:g} --prefill-tokens-per-s {PREFILL_TOKENS_PER_S:g} "
    f"--prefill-tokens-max {PREFILL_TOKENS_MAX} --batch-size-max {BATCH_SIZE}"
)
SLACK_S: Final = 0.01
FREE_S_MAX: Final = 2 * STEP_S_MAX + SLACK_S
"""From the answer to a cancel until the blocks are free."""
AT_ONCE: Final = 16
EMPTY_WITHIN_S: Final = 10.0
ASK_TIMEOUT_S: Final = 1.0
MOMENT_S_MAX: Final = 1.0
"""Of a request's life, at which it is cancelled."""
WARM_UPS_MAX: Final = 8
"""Until both frontends have measured all workers."""
MISJUDGED_SHARE_MAX: Final = 0.01
HOPELESS: Final = 0.25
"""With so small a part of the time that its prompt takes alone, a request must be refused."""


@dataclass(slots=True)
class Figures:
    """What was seen."""

    stages: Counter[str] = field(default_factory=Counter[str])
    ways: Counter[str] = field(default_factory=Counter[str])
    free_s: list[float] = field(default_factory=list[float])
    late_tokens: int = 0
    """Tokens that a client got of a hard cancel beyond those there were at its answer."""
    usage_wrong: int = 0
    not_cancelled: list[str] = field(default_factory=list[str])
    """What became of those that ended in any other way."""
    kills: int = 0
    drains: int = 0
    deadlines: Counter[str] = field(default_factory=Counter[str])
    """How requests with a deadline ended."""
    overdue: int = 0
    """Of those: held by an engine a step after their deadline."""
    feasible_refused: int = 0
    hopeless_begun: int = 0
    refused_s: list[float] = field(default_factory=list[float])
    held: list[str] = field(default_factory=list[str])
    """What was left at the end."""

    def to_json(self, num_cancels: int, num_deadlines: int) -> dict[str, Any]:
        p99_s = _quantile(self.free_s, 0.99)
        has_all = len(self.free_s) >= num_cancels and self.deadlines.total() >= num_deadlines
        is_exact = not (self.late_tokens or self.usage_wrong or self.not_cancelled)
        # Who was before it may have been cancelled since, and the machine may be busy.
        misjudged = self.feasible_refused + self.hopeless_begun
        is_in_time = not self.overdue and misjudged <= MISJUDGED_SHARE_MAX * num_deadlines
        return {
            "ok": has_all and is_exact and is_in_time and not self.held and p99_s <= FREE_S_MAX,
            "cancels": len(self.free_s),
            "stages": dict(self.stages),
            "ways": dict(self.ways),
            "kills": self.kills,
            "drains": self.drains,
            "free_ms_p50": round(_quantile(self.free_s, 0.5) * 1000, 1),
            "free_ms_p99": round(p99_s * 1000, 1),
            "free_ms_max": round(max(self.free_s, default=0.0) * 1000, 1),
            "free_ms_bound": round(FREE_S_MAX * 1000, 1),
            "late_tokens": self.late_tokens,
            "usage_wrong": self.usage_wrong,
            "not_cancelled": self.not_cancelled[:5],
            "deadlines": dict(self.deadlines),
            "overdue": self.overdue,
            "feasible_refused": self.feasible_refused,
            "hopeless_begun": self.hopeless_begun,
            "refused_ms_p99": round(_quantile(self.refused_s, 0.99) * 1000, 1),
            "held": self.held[:5],
        }


class Engines:
    """Asks the engines of a mesh what they hold."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def stages(self) -> dict[str, str]:
        """By request id, where each request that an engine holds something for stands."""
        records = list(self._mesh.workers.values())
        answers = await asyncio.gather(*(self._ask(record.address) for record in records))
        return {
            holding.stream.request_id: holding.detail
            for processes in answers
            for process in processes or ()
            for holding in process.holdings
        }

    async def until_free(self, request_ids: Iterable[str], since: float) -> float:
        """Seconds since then until no engine holds anything for these requests."""
        wanted = set(request_ids)
        records = list(self._mesh.workers.values())
        times = await asyncio.gather(
            *(self._until_free_at(record.address, wanted, since) for record in records)
        )
        return max(times, default=0.0)

    async def _until_free_at(self, address: str, wanted: set[str], since: float) -> float:
        while True:
            processes = await self._ask(address)
            took_s = time.monotonic() - since
            if processes is None:
                return 0.0  # What a dead engine had is free.
            held = {h.stream.request_id for process in processes for h in process.holdings}
            if not wanted & held or took_s > EMPTY_WITHIN_S:
                return took_s
            await asyncio.sleep(0.003)

    async def _ask(self, address: str) -> Sequence[holding_pb2.ProcessHoldings] | None:
        """What the engine of a worker holds; None of one that is dead, starts or stops."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
        request = sidecar_pb.GetWorkerLedgerRequest(holdings_max=10_000)
        try:
            call = SidecarServiceStub(channel).GetWorkerLedger(request, timeout=ASK_TIMEOUT_S)
            processes = (await call).processes
        except grpc.aio.AioRpcError:
            return None
        engines = [one for one in processes if one.role == holding_pb2.PROCESS_ROLE_ENGINE]
        return engines if all(not one.detail for one in engines) else None


class Bench:
    """One mesh, and what is done to it."""

    def __init__(self, mesh: LocalMesh, clients: Sequence[Client], seed: int) -> None:
        """Of the clients, each begins at another frontend."""
        self.figures = Figures()
        self.engines = Engines(mesh)
        self.harm_came = asyncio.Event()
        """Set, and replaced, when a worker begins to die or to drain."""
        self._mesh = mesh
        self._where: Discovery = connect(mesh.directory)
        self._clients = clients
        self._seed = seed
        self._num = 0

    # Cancels.

    async def cancels(self, number: int, *, with_harm: bool = True) -> None:
        """So many cancels, some at once, while workers are hurt."""
        due = iter(range(number))

        async def some() -> None:
            for index in due:
                await self._cancel_one(random.Random(f"{self._seed} {index}"))

        harm = asyncio.create_task(self._hurt()) if with_harm else None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(number, AT_ONCE)):
                    group.create_task(some())
        finally:
            if harm is not None and not harm.done():
                harm.cancel()
                await asyncio.gather(harm, return_exceptions=True)
        if harm is not None and not harm.cancelled():
            harm.result()

    async def _cancel_one(self, chance: random.Random) -> None:
        client, other = chance.sample(self._clients, 2)
        name = self._name("c")
        shape = chance.choice(("long prompt", "short prompt", "short prompt", "choices", "tree"))
        streams = [self._stream(client, chance, name, shape)]
        readings = [Reading(streams[0])]
        if shape == "tree":
            await readings[0].until_started()  # Else it might come after it was cancelled.
            for index, one in enumerate((client, other)):
                streams.append(
                    self._stream(one, chance, f"{name}.{index}", "short prompt", parent=name)
                )
                readings.append(Reading(streams[-1]))
        await self._moment(chance)
        stage = (await self.engines.stages()).get(name)
        if stage is None and streams[0].started is None:
            stage = "on its way"
        elif stage is None:
            stage = "between workers" if readings[0].num_tokens else "in line"
        way = chance.choice(("hard", "hard", "soft", "leave"))
        if shape == "tree" and way == "leave":
            way = "hard"  # Only a cancel by name reaches what is at another frontend.
        there: dict[str, int] = {}
        if way == "leave":
            await streams[0].cancel()
        else:
            await self._cancel(other, streams, is_soft=way == "soft")
            if way == "hard":
                there = {s.request_id: await _num_tokens(other, s.request_id) for s in streams}
        answered_at = time.monotonic()
        took_s = await self.engines.until_free((s.request_id for s in streams), answered_at)
        figures = self.figures
        if way == "soft":
            # Nothing is freed before it has come to its end.
            await asyncio.wait([reading.task for reading in readings])
            ended_at = max(reading.ended_at for reading in readings)
            took_s = max(0.0, took_s - max(0.0, ended_at - answered_at))
        figures.free_s.append(took_s)
        figures.stages[stage] += 1
        figures.ways[f"{way}, {shape}"] += 1
        await asyncio.gather(*(reading.task for reading in readings))
        for reading in readings:
            if way != "leave":
                self._check_end(reading, there.get(reading.stream.request_id))

    def _check_end(self, reading: "Reading", num_there: int | None) -> None:
        figures, stream = self.figures, reading.stream
        num_read, error = reading.num_tokens, reading.error
        if error is None or error.reason is not Reason.CANCELLED:
            figures.not_cancelled.append(f"{stream.request_id}: {error!r}")
            return
        if num_there is not None:
            figures.late_tokens += max(0, num_read - num_there)
        finished = stream.finished
        if finished is None:
            # It was refused, for it came after the cancel or waited to be admitted.
            figures.usage_wrong += num_read > 0 or stream.started is not None
            return
        reasons = {choice.finish_reason for choice in finished.choices}
        is_exact = (
            finished.usage.completion_tokens
            == num_read
            == sum(choice.num_tokens for choice in finished.choices)
        )
        if not is_exact or reasons != {generation_pb2.FINISH_REASON_CANCELLED}:
            figures.usage_wrong += 1

    async def _cancel(
        self, client: Client, streams: Sequence[GenerationStream], *, is_soft: bool
    ) -> None:
        """Cancel the first, and with it the others; it may have yet to come to its frontend."""
        give_up_at = time.monotonic() + EMPTY_WITHIN_S
        while not await client.cancel(streams[0].request_id, is_soft=is_soft):
            assert time.monotonic() < give_up_at, "it never came"
            await asyncio.sleep(0.005)

    async def _moment(self, chance: random.Random) -> None:
        """A random one, or the next at which a worker is hurt."""
        if chance.random() < 0.6:
            await asyncio.sleep(chance.uniform(0, MOMENT_S_MAX))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(3 * MOMENT_S_MAX):
                await self.harm_came.wait()
        await asyncio.sleep(chance.choice((0, 0.001, 0.005, 0.02, 0.05)))

    async def _hurt(self) -> None:
        """Kill an engine, or drain a worker, in turns, for ever."""
        chance = random.Random(f"{self._seed} harm")
        while True:
            await asyncio.sleep(chance.uniform(0.2, 0.8))
            victim = chance.choice(sorted(self._mesh.workers))
            harm_came, self.harm_came = self.harm_came, asyncio.Event()
            if self.figures.kills <= self.figures.drains:
                before = self._mesh.workers[victim].engine_pgid
                self._mesh.kill(victim, "engine")
                harm_came.set()
                self.figures.kills += 1
                while self._mesh.workers[victim].engine_pgid in (0, before):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await self._mesh.until_serving([victim])
            else:
                asyncio.get_running_loop().call_later(0.002, harm_came.set)
                await drain_worker(self._where, victim)
                self.figures.drains += 1
                await self._mesh.restart(victim)

    # Deadlines.

    async def deadlines(self, number: int) -> None:
        """So many requests with random deadlines, some at once."""
        await self._warm_up()
        due = iter(range(number))

        async def some() -> None:
            for index in due:
                await self._one_deadline(random.Random(f"{self._seed} d{index}"))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(number, AT_ONCE)):
                group.create_task(some())

    async def _one_deadline(self, chance: random.Random) -> None:
        client = chance.choice(self._clients)
        num_tokens = chance.choice((16, 500, 4_000, 12_000))
        timeout_s = 0.05 * 50 ** chance.random()
        figures, prompt = self.figures, _prompt(chance, num_tokens)
        request_id = self._name("d")
        stream = client.generate(
            request_id=request_id,
            token_ids=prompt,
            max_tokens=20_000,
            ignore_eos=True,
            timeout_s=timeout_s,
        )
        began_at = time.monotonic()
        reading = Reading(stream)
        await reading.task
        error, ended_at = reading.error, reading.ended_at
        is_refused = error is not None and "first_token_s" in error.metadata
        alone_s = num_tokens / PREFILL_TOKENS_PER_S
        if is_refused:
            figures.deadlines["refused at once"] += 1
            figures.refused_s.append(ended_at - began_at)
            figures.feasible_refused += await self._ttft_s(client, prompt) <= timeout_s
            return
        figures.hopeless_begun += timeout_s < HOPELESS * alone_s
        reason = error.reason.value if error is not None else "COMPLETE"
        figures.deadlines[reason] += 1
        due_at = began_at + timeout_s + STEP_S_MAX + SLACK_S
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        asked_at = time.monotonic()
        if request_id in await self.engines.stages():
            figures.overdue += 1
            late_s = asked_at - began_at - timeout_s
            print(f"{request_id}: held {late_s:.3f} s after", file=sys.stderr)  # noqa: T201

    async def _ttft_s(self, client: Client, prompt: Sequence[int]) -> float:
        """How long a request like that waits for its first token."""
        began_at = time.monotonic()
        async with client.generate(token_ids=prompt, max_tokens=1) as stream:
            await anext(stream)
        return time.monotonic() - began_at

    async def _warm_up(self) -> None:
        """Let every engine be measured, with and without prompts."""
        chance = random.Random(0)

        async def one() -> None:
            client = chance.choice(self._clients)
            prompt = _prompt(chance, 6_000)
            async with client.generate(
                token_ids=prompt, max_tokens=30, ignore_eos=True, timeout_s=30
            ) as stream:
                await Reading(stream).task

        for _ in range(WARM_UPS_MAX):
            await asyncio.gather(*(one() for _ in range(4 * len(self._mesh.workers))))
            hopeless = [
                Reading(client.generate(token_ids=_prompt(chance, 12_000), timeout_s=0.1))
                for client in self._clients
            ]
            await asyncio.gather(*(reading.task for reading in hopeless))
            if all(one.error and "first_token_s" in one.error.metadata for one in hopeless):
                return

    # The end.

    async def until_empty(self) -> None:
        """Wait until nothing is held in the whole mesh; else what is held goes into the figures."""
        give_up_at = time.monotonic() + EMPTY_WITHIN_S
        while num_held(found := await mesh_ledger(self._clients[0], self._where)):
            if time.monotonic() > give_up_at:
                held = (str(one) for process in found for one in process.holdings)
                self.figures.held = [" ".join(text.split()) for text in held]
                return
            await asyncio.sleep(0.05)

    # Parts.

    def _name(self, kind: str) -> str:
        self._num += 1
        return f"{kind}{self._num}"

    def _stream(
        self, client: Client, chance: random.Random, name: str, shape: str, parent: str = ""
    ) -> GenerationStream:
        num_tokens = chance.randint(2_000, 8_000) if shape == "long prompt" else 16
        return client.generate(
            request_id=name,
            parent_request_id=parent,
            token_ids=_prompt(chance, num_tokens),
            num_choices=3 if shape == "choices" else 1,
            max_tokens=20_000,
            ignore_eos=True,
            temperature=0.8,
            seed=chance.randrange(1000),
            migrations_max=100,
            orphan_grace_s=1.0,
        )


class Reading:
    """A stream that is read to its end."""

    def __init__(self, stream: GenerationStream) -> None:
        self.stream = stream
        self.num_tokens = 0
        self.error: UnbrokenError | None = None
        self.ended_at = 0.0
        self.task = asyncio.create_task(self._read())

    async def until_started(self) -> None:
        """Until its frontend has it, or it has failed."""
        while self.stream.started is None and not self.task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def _read(self) -> None:
        try:
            async for piece in self.stream:
                self.num_tokens += len(piece.token_ids)
        except UnbrokenError as error:
            self.error = error
        self.ended_at = time.monotonic()


async def _num_tokens(client: Client, request_id: str) -> int:
    """How many tokens a request has, of all choices, by the frontend that has it."""
    try:
        info = await client.get_stream(request_id)
    except UnbrokenError as error:
        if error.reason is not Reason.STREAM_NOT_FOUND:
            raise
        return 0  # It was refused.
    return sum(choice.num_tokens for choice in info.choices)


def _prompt(chance: random.Random, num_tokens: int) -> list[int]:
    """One that no prefix cache knows."""
    return [chance.randrange(300, 900) for _ in range(num_tokens)]


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@asynccontextmanager
async def bench(directory: Path, *, num_workers: int = 3, seed: int = 0) -> AsyncGenerator[Bench]:
    """A mesh of two frontends, and what is needed to measure it."""
    mesh = LocalMesh(
        directory,
        num_workers=num_workers,
        num_frontends=2,
        engine_options=OPTIONS,
        sidecar_flags=["--drain-policy", "hand_over"],
    )
    async with mesh:
        first, second = mesh.frontend_addresses
        async with Client(first, second) as one, Client(second, first) as other:
            it = Bench(mesh, [one, other], seed)
            try:
                yield it
            finally:
                await it.engines.close()


async def _measure(num_cancels: int, num_deadlines: int, seed: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="unbroken-cancels-") as directory:
        async with bench(Path(directory), seed=seed) as it:
            await it.cancels(num_cancels)
            await it.deadlines(num_deadlines)
            await it.until_empty()
            return it.figures


def main() -> None:
    """Measure, and say what came of it in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--deadlines", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figures = uvloop.run(_measure(given.cancels, given.deadlines, given.seed))
    result = figures.to_json(given.cancels, given.deadlines)
    print(json.dumps(result))  # noqa: T201
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
