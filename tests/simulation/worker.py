"""Workers in virtual time: the sidecar's real hub and ledger, over an engine that is a hash."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sidecar.engines.base import EngineDown, EngineUp
from sidecar.hub import Hub
from sidecar.watchdog import LOOK_INTERVAL_S, WatchdogPolicy
from tests.simulation.faults import Fault, Trouble
from tests.simulation.model import Generation, Personality
from tests.simulation.witness import Violation
from tests.support.vocabulary import VOCAB_SIZE
from tests.support.world import World
from unbroken.checkpoint import checkpoint_from_proto
from unbroken.generation import logprobs_to_proto
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2

CONTEXT_LENGTH = 512
BLOCK_SIZE = 4
BATCH = 40
"""Prompt tokens that an engine says to compute in one step."""
KV_BLOCKS = 200
FOREVER = 1e9
FRAME_INTERVAL_S = 0.05
"""So often an engine says that it lives, whatever it computes."""
POLICY = WatchdogPolicy(
    silence_min_s=0.16,
    decode_unmeasured_s=1.0,
    gaps_min=5,
    prefill_min_s=1.0,
    prefill_unmeasured_s=20.0,
    restart_after_s=0.5,
)
"""Streams are short here, and so is patience."""
_PREFILL_S_MAX = 0.9 * POLICY.prefill_unmeasured_s
"""What takes longer may be called a stall."""
_NOTICED_AFTER_S = {True: 0.8, False: 1.4}
"""A hung engine that has work is noticed within the first, one that only makes no step within the
second, unless something was to be prefilled."""
_CERTAIN_AFTER_S = 2 * LOOK_INTERVAL_S
"""A stall is called one at the second look that finds it."""
_CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
_TOKENIZER = worker_pb2.Tokenizer(vocab_size=VOCAB_SIZE)


@dataclass(frozen=True, slots=True)
class Pace:
    """How engines make steps."""

    step_s: tuple[float, float] = (0.004, 0.016)
    tokens: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 2, 4)
    """Of one attempt in one step, each as likely as the others."""
    batch: int = 0
    """Prompt tokens that it says to compute in one step; 0 if it does not."""
    slow_s_per_token: tuple[float, float] = (0.01, 0.3)
    """Of a prompt, where prefill is slow."""
    steps_a_load: int = 4
    """Frames with tokens between two reports of load, as real engines do not send one with each."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What an engine has, in truth."""

    prefill_tokens: int
    kv_blocks: int
    num_running: int


@dataclass(slots=True)
class _Running:
    """One attempt inside the engine."""

    generation: Generation
    first_offset: int
    offset: int
    """Of the next token."""
    acked: int
    window: int
    ready_at: float
    """When its prompt is computed."""
    num_prefill: int
    is_counted: bool = False
    """They are in what was prefilled in all."""

    @property
    def room(self) -> int:
        """Tokens that it may produce now."""
        return self.acked + self.window - self.offset

    @property
    def kv_blocks(self) -> int:
        """That it holds."""
        return -(-(self.num_prefill + self.offset - self.first_offset) // BLOCK_SIZE)


class Engine:
    """The engine of one process; it has one life after the other.

    It is what `sidecar.hub` takes for an engine, and tells the hub what it did.
    """

    def __init__(
        self, world: World, trouble: Trouble, personality: Personality, pace: Pace
    ) -> None:
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
        self._prefill_tokens = 0
        self._pace = pace
        self._step_s = world.random.uniform(*pace.step_s)
        self._is_step_planned = False
        self._stalled_until = 0.0
        self._is_hung = False
        self._unread: list[Callable[[], None]] = []  # What it was asked since it hangs.
        self._said_at = 0.0
        self._went_on_at = -FOREVER
        self._left_prefill_at = -FOREVER
        """When an attempt ended whose prompt it may have been computing."""
        self._num_steps = 0
        self._is_pulse_planned = False
        self._slot_seen = self._unread_prefill = 0
        self._s_per_token = 0.0002
        if trouble.happens(Fault.SLOW_PREFILL):
            self._s_per_token = world.random.uniform(*pace.slow_s_per_token)
        self.restart: Callable[[], None] = lambda: None
        """Begin its next life soon."""

    def held(self) -> Holding:
        """What it has now, what it has not read included."""
        running, now = list(self.running.values()), self._world.now
        return Holding(
            self._unread_prefill + sum(one.num_prefill for one in running if one.ready_at > now),
            self._unread_prefill // BLOCK_SIZE + sum(one.kv_blocks for one in running),
            len(running),
        )

    # Its lives.

    def start_life(self) -> None:
        """Take up work."""
        self.incarnation += 1
        self.is_up = True
        self._stalled_until = self._said_at = 0.0
        self._is_hung = False
        self._num_steps = self._prefill_tokens = 0
        description = worker_pb2.EngineDescription(
            kind="hash",
            model="m",
            context_length=CONTEXT_LENGTH,
            block_size=BLOCK_SIZE,
            tokenizer_fingerprint="t",
            prefill_tokens_max=self._pace.batch,
        )
        up = EngineUp(self.incarnation, description, _TOKENIZER, frame_interval_s=FRAME_INTERVAL_S)
        self._hub.on_up(up)

    def die(self, failure: FailureKind) -> None:
        """End this life; the hub is told."""
        self.vanish()
        self._hub.on_down(EngineDown(self.incarnation, failure, "it died"))

    def vanish(self) -> None:
        """End this life; there is nobody to tell."""
        self.is_up = False
        self.running.clear()
        self._unread.clear()
        self._unread_prefill = 0

    def stall(self, duration_s: float, *, is_hung: bool) -> None:
        """Make no step; one that hangs does not read or say anything either."""
        world = self._world
        if not self.is_up or self.is_standing:
            return
        self._stalled_until = world.now + duration_s
        self._is_hung = is_hung
        world.tell("the engine %s for %.2f s", "hangs" if is_hung else "stalls", duration_s)
        world.after(duration_s, self._go_on, self.incarnation)
        if duration_s > _NOTICED_AFTER_S[is_hung] and self.running:
            # Who has work when it stops, and keeps it, has to be noticed.
            due = _NOTICED_AFTER_S[is_hung]
            world.after(due, self._must_be_noticed, self.incarnation, self._hub.watchdog.num_stalls)

    @property
    def is_standing(self) -> bool:
        """Whether it makes no steps."""
        return self._world.now < self._stalled_until

    @property
    def seems_to_stand(self) -> bool:
        """The same, as far as can be known: it has to say or do something first."""
        since_s = self._world.now - self._went_on_at
        return self.is_standing or since_s <= FRAME_INTERVAL_S + self._step_s

    def _go_on(self, incarnation: int) -> None:
        if not self.is_up or incarnation != self.incarnation:
            return
        self._world.tell("the engine goes on")
        self._went_on_at = self._world.now
        self._stalled_until = 0.0
        self._is_hung = False
        unread, self._unread, self._unread_prefill = self._unread, [], 0
        for handle in unread:
            handle()
        self._plan_step()
        self._pulse()

    def _must_be_noticed(self, incarnation: int, num_stalls: int) -> None:
        """Unless all it had was taken from it."""
        left_s = self._world.now - self._left_prefill_at
        if not self._is_hung and left_s <= _CERTAIN_AFTER_S:
            # Until then it may have been computing that.
            due = _CERTAIN_AFTER_S - left_s + LOOK_INTERVAL_S
            self._world.after(due, self._must_be_noticed, incarnation, num_stalls)
            return
        if (
            self.is_up
            and incarnation == self.incarnation
            and (self._hub.ledger.running or self._is_hung)
            and num_stalls == self._hub.watchdog.num_stalls
            and not self._hub.watchdog.is_stalled
            and (self._is_hung or not self._hub.queued_tokens)
        ):
            raise Violation("an engine that stands still was not noticed")

    def say_alive(self) -> None:
        """Say so, if that is due. An idle engine is spared the events until somebody looks."""
        is_due = self._world.now - self._said_at >= FRAME_INTERVAL_S
        if self.is_up and not self._is_hung and is_due:
            self._say(attempt_pb2.StepFrame())

    def _pulse(self) -> None:
        """Say that it lives, while it has something to compute or stands still."""
        self._is_pulse_planned = False
        self.say_alive()
        if not self.is_up or self._is_hung:
            return
        if self.running or self.is_standing or self._hub.watchdog.is_stalled:
            self._is_pulse_planned = True
            self._world.after(FRAME_INTERVAL_S, self._pulse)

    # What the sidecar asks.

    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or refuse it."""
        if not self.is_up:
            return
        if self._is_hung:
            self._unread.append(partial(self.start, message))
            self._unread_prefill += len(message.checkpoint.prompt_token_ids)
            return
        for fault, kind in _REFUSALS:
            if self._trouble.happens(fault):
                self._trouble.took_effect(fault)
                refused = attempt_pb2.AttemptRefused(slot=message.slot, kind=kind, detail=fault)
                self._say(attempt_pb2.StepFrame(refused=[refused]))
                return
        self._slot_seen = message.slot
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
            checkpoint.first_offset,
            message.window_tokens or CONTEXT_LENGTH,
            world.now + min(_PREFILL_S_MAX, self._s_per_token * num_prefill),
            num_prefill,
        )
        if message.HasField("deadline"):
            # It reads the message late, or at once: then it is earlier than its frontend, by the
            # margin of its sidecar.
            due = message.deadline.ToNanoseconds() / 1e9 + (0.05 if message.slot % 2 else 0.0)
            world.after(due, self._expire, message.slot, self.incarnation)
        if self._s_per_token * num_prefill > POLICY.silence_min_s:
            self._trouble.took_effect(Fault.SLOW_PREFILL)
        self._plan_step()
        if not self._is_pulse_planned:
            self._pulse()

    def abort(self, slot: int) -> None:
        """End an attempt within one step."""
        if self._is_hung:
            self._unread.append(partial(self.abort, slot))
            return
        running = self.running.pop(slot, None)
        if running is not None:
            self._end(slot, running, attempt_pb2.AttemptEnded(finish_reason=_CANCELLED))

    async def holdings(self) -> None:
        """It does not say: `running` does."""

    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        """Move windows."""
        if self._is_hung:
            self._unread.append(partial(self.ack, slots, offsets))
            return
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

    def kill(self) -> None:
        """Not in virtual time."""
        raise NotImplementedError

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """It never breaks the contract, but it may hang."""
        if failure not in {FailureKind.HANG, FailureKind.STALL}:
            raise AssertionError(detail)
        if after_s < POLICY.restart_after_s or not self.seems_to_stand:
            raise Violation(f"a restart after {after_s:g} s of an engine that goes on")
        self._trouble.took_effect(Fault.RESTARTED)
        self._world.after(0.001, self._end_life, self.incarnation, failure)

    def _end_life(self, incarnation: int, failure: FailureKind) -> None:
        if self.is_up and incarnation == self.incarnation:
            self.die(failure)
            self.after_step()
            self.restart()

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
        if self.is_standing:
            return  # It is planned again when it goes on.
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
                room = running.room
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
                count = min(room, world.random.choice(self._pace.tokens))
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

    def _expire(self, slot: int, incarnation: int) -> None:
        if not self.is_up or self.incarnation != incarnation:
            return
        if self._is_hung:  # Not before it goes on.
            self._unread.append(partial(self._expire, slot, incarnation))
            return
        running = self.running.pop(slot, None)
        if running is not None:
            ended = attempt_pb2.AttemptEnded(finish_reason=_CANCELLED, is_expired=True)
            self._end(slot, running, ended)

    def _end(self, slot: int, running: _Running, ended: attempt_pb2.AttemptEnded) -> None:
        ended.slot = slot
        ended.end_offset = running.offset
        num_queued = self._hub.queued_tokens
        self._say(attempt_pb2.StepFrame(ended=[ended]))
        if self._hub.queued_tokens < num_queued:
            self._left_prefill_at = self._world.now

    def _say(self, frame: attempt_pb2.StepFrame) -> None:
        self._said_at = self._world.now
        self._num_steps += bool(frame.slots)
        for running in self.running.values():
            if running.ready_at <= self._world.now and not running.is_counted:
                running.is_counted = True
                self._prefill_tokens += running.num_prefill
        is_busy = self.is_standing or any(
            running.ready_at > self._world.now or running.room > 0
            for running in self.running.values()
        )
        num_queued = sum(
            running.num_prefill
            for running in self.running.values()
            if running.ready_at > self._world.now
        )
        rank = worker_pb2.RankLoad(
            requests_running=len(self.running) if is_busy else 0,
            prefill_tokens_queued=num_queued,
            kv_blocks_used=sum(running.kv_blocks for running in self.running.values()),
            kv_blocks_total=KV_BLOCKS,
        )
        load = worker_pb2.LoadReport(
            engine_steps_total=self._num_steps,
            prefill_tokens_total=self._prefill_tokens,
            ranks=[rank],
            is_computing=self.is_standing,
            steps_us_total=int(self._world.now * 1e6),
        )
        if not frame.slots or frame.ended or self._num_steps % self._pace.steps_a_load == 0:
            frame.load.CopyFrom(load)
            frame.slot_seen = self._slot_seen
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
        pace: Pace,
    ) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.engine = Engine(world, trouble, personality, pace)
        self.hub = Hub(
            self.engine,
            orphan_grace_s=2.0,
            watchdog_policy=POLICY,
            rows_min=1,
            clock=lambda: world.now,
        )
        self.engine.hub = self.hub
        self._world = world
        self._trouble = trouble
        self._is_look_planned = False
        self.freed_at = -FOREVER
        """When something ended here that nobody had asked to make room."""
        self.is_alive = True
        self.is_draining = False

    def watch_soon(self) -> None:
        """See to it that the sidecar looks at its engine as long as there is anything to see."""
        if not self._is_look_planned:
            self._is_look_planned = True
            self._world.after(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        self._is_look_planned = False
        if not self.is_alive:
            return
        hub, engine = self.hub, self.engine
        was_stalled = hub.watchdog.is_stalled
        engine.say_alive()
        hub.watch()
        if hub.watchdog.is_stalled and not was_stalled:
            detail = hub.verdict.detail
            self._world.tell("%s: called stalled: %s", self.worker_id, detail)
            self._trouble.took_effect(Fault.CALLED_STALLED)
            if not engine.seems_to_stand:
                raise Violation("an engine that makes progress was called stalled")
        engine.after_step()
        if engine.is_up and (hub.ledger.running or engine.is_standing or hub.watchdog.is_stalled):
            self.watch_soon()

    def kill(self) -> None:
        """The whole process group dies."""
        self.is_alive = False
        self.engine.vanish()

    def check_idle(self) -> None:
        """Assert that nothing runs that nobody wants."""
        if self.is_alive:
            assert not self.engine.running, "the engine still runs attempts"
            assert not self.hub.ledger.running, "the sidecar still runs attempts"
            assert not self.hub.holdings(), f"the sidecar still holds {self.hub.holdings()}"
