"""The simulated engine, asked as engines of other makes are: one call per request.

It can be hurt as they are: its core dies (every call fails, health says so), or hangs (nothing
comes, and health says that all is well).
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from unbroken.checkpoint import Checkpoint, checkpoint_to_proto
from unbroken.errors import InvalidField
from unbroken.generation import GenerationParams, TokenLogprobs
from unbroken.outcome import FinishReason
from unbroken.v1 import attempt_pb2
from worker.constraints import ConstraintCompiler
from worker.engine import admit
from worker.scheduler import Scheduler
from worker.simulated import CostModel, SimulatedRunner, simulated_runner


class CoreDead(Exception):  # noqa: N818 - It names what happened.
    """The engine's core is gone."""


@dataclass
class Output:
    """What came since the last one, merged while nobody read."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    cached_tokens: int = 0
    reason: FinishReason | None = None
    stop_token_id: int | None = None


class _Request:
    def __init__(self, slot: int, name: str) -> None:
        self.slot = slot
        self.name = name
        self.output = Output()
        self.changed = asyncio.Event()
        self.is_aborted = False


class Backend:
    """One engine. `run` turns its crank."""

    def __init__(
        self,
        *,
        step_s: float = 0.001,
        context_length: int = 512,
        eos_probability: float = 0.0,
        native_resume: bool = False,
        kv_blocks: int = 64,
    ) -> None:
        """An engine as vLLM is seen from outside: no native resume, a generator with a history."""
        self.runner: SimulatedRunner = simulated_runner(
            model="tiny",
            context_length=context_length,
            eos_probability=eos_probability,
            kv_blocks=kv_blocks,
            batch_size_max=32,
            cost=CostModel(step_base_s=step_s),
            native_resume=native_resume,
            random_source="sequential",
        )
        self.spec = self.runner.spec
        self.scheduler = Scheduler(self.spec)
        self.requests: dict[int, _Request] = {}
        self.asked: list[str] = []
        """Names of all requests so far."""
        self.closed: list[str] = []
        """Names of those that their caller let go of before the end."""
        self.is_dead = False
        self._compiler = ConstraintCompiler(self.spec.tokenizer)
        self._next_slot = 1
        self._has_work = asyncio.Event()
        self._runs = asyncio.Event()
        self._runs.set()

    async def run(self) -> None:
        """Step after step, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._runs.wait()
            self._has_work.clear()
            plan = self.scheduler.plan(loop.time())
            if plan is None:
                self._hand_out()
                await self._has_work.wait()
                continue
            result = await self.runner.execute(plan)
            await self._runs.wait()
            self.scheduler.commit(plan, result)
            self._hand_out()

    # What harms it.

    def hang(self) -> None:
        """Its core is stopped."""
        self._runs.clear()

    def go_on(self) -> None:
        """It is continued."""
        self._runs.set()

    def die(self) -> None:
        """Its core is killed."""
        self.is_dead = True
        self._runs.clear()
        for request in self.requests.values():
            request.changed.set()

    # What it is asked.

    async def generate(
        self,
        name: str,
        prompt: Sequence[int],
        params: GenerationParams,
        past: Sequence[int] = (),
    ) -> AsyncGenerator[Output]:
        """Raises `InvalidField` for what it cannot do, `CoreDead`."""
        if self.is_dead:
            raise CoreDead
        self.asked.append(name)
        start = attempt_pb2.StartAttempt(
            slot=self._next_slot,
            stream=attempt_pb2.StreamKey(request_id="r"),
            epoch=1,
            checkpoint=checkpoint_to_proto(
                Checkpoint(tuple(prompt), params, tuple(past), len(past))
            ),
        )
        self._next_slot += 1
        loop = asyncio.get_running_loop()
        stream = admit(start, self.spec, self._compiler, now=loop.time())
        if not self.scheduler.submit(stream):
            raise InvalidField("request", "room in the line", "none")
        request = self.requests[start.slot] = _Request(start.slot, name)
        self._has_work.set()
        try:
            while True:
                await request.changed.wait()
                request.changed.clear()
                if self.is_dead:
                    raise CoreDead
                output, request.output = request.output, Output()
                yield output
                if output.reason is not None:
                    return
        finally:
            if self.requests.pop(start.slot, None) is not None:
                self.closed.append(name)
                self.scheduler.abort(start.slot)
                self._has_work.set()

    def abort(self, name: str) -> bool:
        """End all requests of this name."""
        found = [one for one in self.requests.values() if one.name == name]
        for request in found:
            self.scheduler.abort(request.slot)
        self._has_work.set()
        return bool(found)

    def _hand_out(self) -> None:
        outcome = self.scheduler.take_outcome()
        for slot, token_id in zip(outcome.slots, outcome.token_ids, strict=True):
            if slot in self.requests:
                self.requests[slot].output.token_ids.append(token_id)
                self.requests[slot].changed.set()
        for slot, logprobs in outcome.logprobs:
            if slot in self.requests:
                self.requests[slot].output.logprobs.append(logprobs)
        for ended in outcome.ended:
            request = self.requests.pop(ended.slot, None)
            if request is not None:
                output = request.output
                output.reason = FinishReason(ended.finish_reason)
                output.cached_tokens = ended.cached_tokens
                if ended.HasField("stop_token_id"):
                    output.stop_token_id = ended.stop_token_id
                request.changed.set()
