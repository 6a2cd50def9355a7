"""The simulated engine without time and sockets, for tests of what it produces."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from unbroken.generation import TokenLogprobs
from unbroken.v1 import attempt_pb2, generation_pb2
from worker import simulated_tokenizer
from worker.constraints import ConstraintCompiler
from worker.engine import PrefillChunk, StepPlan, admit
from worker.scheduler import Outcome, Scheduler
from worker.simulated import SimulatedRunner, simulated_runner

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH
CANCELLED = generation_pb2.FINISH_REASON_CANCELLED


@dataclass
class Attempt:
    """What one attempt produced."""

    token_ids: list[int] = field(default_factory=list[int])
    offsets: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    ended: attempt_pb2.AttemptEnded | None = None

    @property
    def finish_reason(self) -> "generation_pb2.FinishReason.ValueType":
        assert self.ended is not None
        return self.ended.finish_reason


@cache
def _compiler() -> ConstraintCompiler:
    return ConstraintCompiler(simulated_tokenizer.asset())


class Engine:
    """One simulated engine that steps when it is told to, and checks itself after every step."""

    def __init__(self, runner: SimulatedRunner | None = None) -> None:
        self.runner = runner or simulated_runner(context_length=512, kv_blocks=128)
        self.spec = self.runner.spec
        self.scheduler = Scheduler(self.spec)
        self.compiler = _compiler()
        self.attempts: dict[int, Attempt] = {}
        self.now = 0.0
        self.plans: list[list[PrefillChunk]] = []
        self._next_slot = 0

    def start(self, message: attempt_pb2.StartAttempt) -> int:
        """Submit an attempt, under the next slot."""
        self._next_slot += 1
        message.slot = self._next_slot
        stream = admit(message, self.spec, self.compiler, now=self.now)
        assert self.scheduler.submit(stream)
        self.attempts[message.slot] = Attempt()
        return message.slot

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        return plan

    def commit(self, plan: StepPlan) -> Outcome:
        """Compute and apply what a plan produces."""
        self.plans.append(plan.prefills)
        self.scheduler.commit(plan, self.runner.compute(plan))
        self.scheduler.check()
        return self.collect()

    def step(self) -> bool:
        """One step; False if there was nothing to do."""
        plan = self.plan()
        if plan is None:
            self.collect()
            return False
        self.commit(plan)
        return True

    def run(self, steps_max: int = 10_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(steps_max):
            if not self.step():
                return
        raise AssertionError(f"still running after {steps_max} steps")

    def collect(self) -> Outcome:
        outcome = self.scheduler.take_outcome()
        for slot, offset, token_id in zip(
            outcome.slots, outcome.offsets, outcome.token_ids, strict=True
        ):
            assert self.attempts[slot].ended is None, "a token after the end"
            self.attempts[slot].token_ids.append(token_id)
            self.attempts[slot].offsets.append(offset)
        for slot, logprobs in outcome.logprobs:
            self.attempts[slot].logprobs.append(logprobs)
        for ended in outcome.ended:
            assert self.attempts[ended.slot].ended is None, "ended twice"
            self.attempts[ended.slot].ended = ended
        return outcome

    def generate_meanwhile(self, message: attempt_pb2.StartAttempt) -> Attempt:
        """Step until one attempt has ended, whatever else goes on."""
        attempt = self.attempts[self.start(message)]
        while attempt.ended is None:
            assert self.step(), "nothing to do, and it has not ended"
        return attempt

    def generate(self, message: attempt_pb2.StartAttempt) -> Attempt:
        """Run one attempt to its end."""
        slot = self.start(message)
        self.run()
        attempt = self.attempts[slot]
        assert attempt.ended is not None, "it never ended"
        return attempt


def starting(
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    *,
    params: generation_pb2.GenerationParams | None = None,
    max_tokens: int | None = None,
    first_offset: int | None = None,
    window_tokens: int = 0,
    priority: int = 0,
    tenant: str = "",
    request_id: str = "r",
    epoch: int = 1,
    slot: int = 0,
) -> attempt_pb2.StartAttempt:
    """A start, greedy unless `params` says otherwise."""
    message = attempt_pb2.StartAttempt(
        slot=slot,
        stream=attempt_pb2.StreamKey(request_id=request_id, tenant=tenant),
        epoch=epoch,
        window_tokens=window_tokens,
        priority=priority,
    )
    checkpoint = message.checkpoint
    checkpoint.prompt_token_ids.extend(prompt)
    checkpoint.output_token_ids.extend(output)
    checkpoint.first_offset = len(output) if first_offset is None else first_offset
    if params is None:
        checkpoint.params.sampling.temperature = 0.0
    else:
        checkpoint.params.CopyFrom(params)
    if max_tokens is not None:
        checkpoint.params.stopping.max_tokens = max_tokens
    return message
