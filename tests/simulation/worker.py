"""Workers in virtual time: the sidecar's real hub and ledger, over an engine that is a hash."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.engines.base import EngineDown, EngineUp
from sidecar.hub import Hub
from tests.simulation.faults import Fault, Trouble
from tests.simulation.model import Generation, Personality
from tests.support.vocabulary import VOCAB_SIZE
from tests.support.world import World
from unbroken.checkpoint import checkpoint_from_proto
from unbroken.generation import logprobs_to_proto
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2

CONTEXT_LENGTH = 512
BLOCK_SIZE = 4
FOREVER = 1e9
_CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
_TOKENIZER = worker_pb2.Tokenizer(vocab_size=VOCAB_SIZE)


@dataclass(slots=True)
class _Running:
    """One attempt inside the engine."""

    generation: Generation
    offset: int
    """Of the next token."""
    acked: int
    window: int
    ready_at: float
    """When its prompt is computed."""


class Engine:
    """The engine of one process; it has one life after the other.

    It is what `sidecar.hub` takes for an engine, and tells the hub what it did.
    """

    def __init__(self, world: World, trouble: Trouble, personality: Personality) -> None:
        self._world = world
        self._trouble = trouble
        self.personality = personality
        self.hub: Hub | None = None
        """Whom to tell; set by whoever makes both."""
        self.incarnation = 0
        self.is_up = False
        self.running: dict[int, _Running] = {}
        self.after_step: Callable[[], None] = lambda: None
        self.before_goodbye: Callable[[], None] = lambda: None
        self._step_s = world.random.uniform(0.004, 0.016)
        self._is_step_planned = False
        self._stalled_until = 0.0

    # Its lives.

    def start_life(self) -> None:
        """Take up work."""
        self.incarnation += 1
        self.is_up = True
        self._stalled_until = 0.0
        description = worker_pb2.EngineDescription(
            kind="hash",
            model="m",
            context_length=CONTEXT_LENGTH,
            block_size=BLOCK_SIZE,
            tokenizer_fingerprint="t",
        )
        self._hub.on_up(EngineUp(self.incarnation, description, _TOKENIZER))

    def die(self, failure: FailureKind) -> None:
        """End this life; the hub is told."""
        self.vanish()
        self._hub.on_down(EngineDown(self.incarnation, failure, "it died"))

    def vanish(self) -> None:
        """End this life; there is nobody to tell."""
        self.is_up = False
        self.running.clear()

    def stall(self, duration_s: float) -> None:
        """Stand still."""
        self._stalled_until = self._world.now + duration_s

    # What the sidecar asks.

    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or refuse it."""
        if not self.is_up:
            return
        for fault, kind in _REFUSALS:
            if self._trouble.happens(fault):
                self._trouble.took_effect(fault)
                refused = attempt_pb2.AttemptRefused(slot=message.slot, kind=kind, detail=fault)
                self._say(attempt_pb2.StepFrame(refused=[refused]))
                return
        world, personality = self._world, self.personality
        assert personality.has_native_resume or not message.checkpoint.output_token_ids
        checkpoint = checkpoint_from_proto(message.checkpoint, vocab_size=VOCAB_SIZE)
        nonce = world.random.getrandbits(32)
        generation = Generation(checkpoint, personality, nonce)
        num_prefill = len(checkpoint.prompt_token_ids) + len(checkpoint.output_token_ids)
        self.running[message.slot] = _Running(
            generation,
            checkpoint.first_offset,
            checkpoint.first_offset,
            message.window_tokens or CONTEXT_LENGTH,
            world.now + 0.0002 * num_prefill,
        )
        if message.HasField("deadline"):
            # The clock of another machine: it is never early.
            due = message.deadline.ToNanoseconds() / 1e9 + 0.05
            world.after(due, self._cancel, message.slot, self.incarnation)
        self._plan_step()

    def abort(self, slot: int) -> None:
        """End an attempt within one step."""
        running = self.running.pop(slot, None)
        if running is not None:
            self._end(slot, running, attempt_pb2.AttemptEnded(finish_reason=_CANCELLED))

    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        """Move windows."""
        for slot, offset in zip(slots, offsets, strict=True):
            running = self.running.get(slot)
            if running is not None:
                running.acked = max(running.acked, offset)
        self._plan_step()

    async def run(self, listener: object) -> None:
        """Not in virtual time."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Not in virtual time."""
        raise NotImplementedError

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """It never breaks the contract."""
        raise AssertionError(detail, failure, after_s)

    # Steps.

    @property
    def _hub(self) -> Hub:
        assert self.hub is not None
        return self.hub

    def _plan_step(self) -> None:
        if self.running and not self._is_step_planned:
            self._is_step_planned = True
            self._world.after(self._step_s, self._step)

    def _step(self) -> None:
        self._is_step_planned = False
        if not self.is_up:
            return
        world, trouble = self._world, self._trouble
        if world.now < self._stalled_until:
            self._is_step_planned = True
            world.at(self._stalled_until, self._step)
            return
        frame = attempt_pb2.StepFrame()
        goodbyes: list[tuple[int, _Running, attempt_pb2.AttemptEnded]] = []
        has_long_rows = False
        is_waiting = False
        for slot, running in self.running.items():
            generation = running.generation
            if generation.end is None:
                if running.ready_at > world.now:
                    is_waiting = True
                    continue
                room = running.acked + running.window - running.offset
                if room <= 0:
                    trouble.took_effect(Fault.SLOW_CLIENT)
                    continue
                if trouble.happens(Fault.ENGINE_ERROR):
                    trouble.took_effect(Fault.ENGINE_ERROR)
                    failure = worker_pb2.FAILURE_KIND_ENGINE_ERROR
                    goodbyes.append((slot, running, attempt_pb2.AttemptEnded(failure=failure)))
                    continue
                if trouble.happens(Fault.PREEMPTION):
                    trouble.took_effect(Fault.PREEMPTION)
                    failure = worker_pb2.FAILURE_KIND_OVERLOAD
                    goodbyes.append((slot, running, attempt_pb2.AttemptEnded(failure=failure)))
                    continue
                count = min(room, world.random.choice((1, 1, 1, 1, 1, 1, 2, 4)))
                num_made = self._produce(slot, running, count, frame)
                has_long_rows = has_long_rows or num_made > 1
                is_waiting = True
            if generation.end is not None:
                end = generation.end
                ended = attempt_pb2.AttemptEnded(
                    finish_reason=end.finish_reason.value,  # pyright: ignore[reportArgumentType]
                    stop_token_id=end.stop_token_id,
                )
                goodbyes.append((slot, running, ended))
        if not has_long_rows:
            del frame.token_counts[:]
        if frame.slots:
            self._say(frame)
        for slot, running, ended in goodbyes:
            if ended.finish_reason and trouble.happens(Fault.LOST_GOODBYE):
                self.before_goodbye()
                if not self.is_up:
                    return
            if self.running.pop(slot, None) is not None:
                self._end(slot, running, ended)
        if is_waiting:
            self._plan_step()

    def _produce(
        self, slot: int, running: _Running, count: int, frame: attempt_pb2.StepFrame
    ) -> int:
        """Up to `count` tokens of one attempt as a row of the frame; returns how many."""
        generation = running.generation
        token_ids: list[int] = []
        logprobs: list[generation_pb2.TokenLogprobs] = []
        while len(token_ids) < count and generation.end is None:
            token_id, entry = generation.next()
            token_ids.append(token_id)
            if entry is not None:
                logprobs.append(logprobs_to_proto(entry))
        frame.slots.append(slot)
        frame.offsets.append(running.offset)
        frame.token_counts.append(len(token_ids))
        frame.token_ids.extend(token_ids)
        if logprobs:
            frame.logprobs.append(attempt_pb2.SlotLogprobs(slot=slot, tokens=logprobs))
        running.offset += len(token_ids)
        return len(token_ids)

    def _cancel(self, slot: int, incarnation: int) -> None:
        if self.is_up and self.incarnation == incarnation:
            self.abort(slot)

    def _end(self, slot: int, running: _Running, ended: attempt_pb2.AttemptEnded) -> None:
        ended.slot = slot
        ended.end_offset = running.offset
        self._say(attempt_pb2.StepFrame(ended=[ended]))

    def _say(self, frame: attempt_pb2.StepFrame) -> None:
        self._hub.on_frame(frame)
        self.after_step()


_REFUSALS = (
    (Fault.OVERLOAD, worker_pb2.FAILURE_KIND_OVERLOAD),
    (Fault.REJECTION, worker_pb2.FAILURE_KIND_REJECTED),
)


class Process:
    """One life of one worker: a sidecar and its engine."""

    def __init__(
        self,
        world: World,
        trouble: Trouble,
        personality: Personality,
        worker_id: str,
        incarnation: int,
    ) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.engine = Engine(world, trouble, personality)
        self.hub = Hub(self.engine, orphan_grace_s=2.0, clock=lambda: world.now)
        self.engine.hub = self.hub
        self.is_alive = True
        self.is_draining = False

    def kill(self) -> None:
        """The whole process group dies."""
        self.is_alive = False
        self.engine.vanish()

    def check_idle(self) -> None:
        """Assert that nothing runs that nobody wants."""
        if self.is_alive:
            assert not self.engine.running, "the engine still runs attempts"
            assert not self.hub.ledger.running, "the sidecar still runs attempts"
