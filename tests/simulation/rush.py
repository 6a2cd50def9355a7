"""More work than workers can do, while clients leave, processes drain, and everything fails.

The streams, links and sidecars of `scenario`, with thresholds, a waiting room and pauses before
them (`door`). Requests of several tenants and priorities come at several frontends; some are sent
away, and come back when they were told. Beside what a witness sees of each stream (P1 to P3, P5):

- new work brings no worker beyond its thresholds by more than one batch, however many frontends
  there are, however late news is, and whatever fails;
- only who is of a strictly lower priority is paused, not too often, not too soon again, and for no
  longer than he may be; no new work of the same priority or a lower one gets in before him;
- nobody waits for longer than he may, and no worker has nothing to do while somebody waits who
  could go there; whoever comes back when he was told is not sent away for the length of the line;
- what was begun is refused by nobody, and who lost a worker that had said nothing waits first;
- nothing is worked on for which nobody waits any more;
- a worker and a frontend that drain are gone in their time, by their own plans;
- every request ends once, and in the end nobody is in line, paused or on account anywhere.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final, assert_never

from typing_extensions import override

from frontend import drain as frontend_drain
from frontend.admission_queue import QueueLimits
from frontend.preemption import NEARLY_DONE_TOKENS, PreemptionLimits
from frontend.resume_queue import ResumeQueue
from frontend.stream import Limits, Stream
from sidecar import drain as worker_drain
from sidecar.drain import Plan, Policy
from tests.simulation.door import Rules
from tests.simulation.faults import Fault
from tests.simulation.frontend import Call, Choice, Frontend
from tests.simulation.scenario import Mesh, Worker, original_of, personalities_of
from tests.simulation.witness import Violation
from tests.simulation.worker import BATCH, BLOCK_SIZE, FOREVER, KV_BLOCKS, Pace, Process
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import GenerationParams, StopConditions
from unbroken.outcome import ContinuationPolicy
from unbroken.thresholds import Thresholds

CALLS_MAX: Final = 200
LOOK_S: Final = 0.25
PULSE_S: Final = 0.2
FREED_S: Final = 0.15
"""So long after something ended at a worker frontends may not know that it has room."""
LATE_S: Final = 0.5
"""So long after the end of a request its attempt is gone, if nothing holds the news up."""
NUM_LOOKS_IDLE_MAX: Final = 5
CLOSE_S_MAX: Final = 1.0
"""So long after its budget a worker that drains is gone."""
STRIKES: Final = (
    Fault.ENGINE_CRASH,
    Fault.PROCESS_RESET,
    Fault.PROCESS_SILENT,
    Fault.LINK_RESET,
    Fault.PARTITION,
    Fault.STALL,
    Fault.HANG,
    Fault.THEFT,
    Fault.FRONTEND_DEATH,
    Fault.CLIENT_MOVES,
    Fault.DRAIN,
    Fault.DRAIN,
    Fault.FRONTEND_DRAIN,
    Fault.FRONTEND_DRAIN,
)


@dataclass(eq=False)
class Ask:
    """What a client wants, however often it has to ask."""

    name: str
    original: Checkpoint
    priority: int
    tenant: str
    limits: Limits
    deadline_s: float | None
    client_pause_s: float
    num_calls: int = 0
    has_left: bool = False
    choice: Choice | None = None
    """Its latest."""


class Rush(Mesh):
    """Frontends, workers, clients, and trouble."""

    def __init__(
        self,
        seed: int,
        stream_type: type[Stream] = Stream,
        queue_type: type[ResumeQueue[Choice]] = ResumeQueue,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.asks: dict[str, Ask] = {}
        self.leaving: list[LeavingWorker] = []
        self.closing: dict[Frontend, LeavingFrontend] = {}
        self._is_over = False
        self._idle = Counter[tuple[Frontend, Process]]()
        super().__init__(seed, stream_type, queue_type, trace)

    @override
    def _populate(self, seed: int) -> None:
        world, random = self.world, self.world.random
        self.clocks.are_wrong, self.clocks.num_moves = False, 0  # The world of streams has that.
        self.rules = _rules(random)
        self.pace = Pace(
            steps_a_load=1,  # What is promised of loads is promised of those that were told.
            step_s=(0.01, 0.04),
            tokens=(1, 3, 4),
            batch=BATCH,
            slow_s_per_token=(0.005, 0.04),
        )
        for index in range(random.choice((1, 1, 2, 3))):
            self.frontends.append(self._frontend(f"f{index}"))
        num_workers = random.choice((1, 1, 2, 3))
        for index, one in enumerate(personalities_of(random, num_workers)):
            self.workers.append(Worker(self, f"w{index}", one))
        for worker in self.workers:
            worker.boot()
        when, gap_s = 0.1, random.choice((0.01, 0.03, 0.06))
        for index in range(random.choice((3, 6, 8))):
            when += random.expovariate(1 / gap_s)
            self._ask(f"r{index}", when)
        for _ in range(random.choice((0, 1, 2, 3))):
            world.at(random.uniform(0.1, 1.2), self._strike, random.choice(STRIKES))
        world.after(LOOK_S, self._look)
        world.after(PULSE_S, self._pulse)

    @override
    def _frontend(self, name: str) -> Frontend:
        frontend = super()._frontend(name)
        frontend.door.on_sent_away = self._sent_away
        frontend.door.on_halt = self._check_halt
        return frontend

    # Clients.

    def _ask(self, name: str, when: float) -> None:
        world, random = self.world, self.world.random
        original = original_of(random, prompts=(4, 16, 40), sizes=(5, 60, 80))
        if world.chance(0.7):
            original = replace(original, params=_to_the_end(original.params))
        ask = self.asks[name] = Ask(
            name,
            original,
            priority=random.choice((0, 0, -1, 1, 2)),
            tenant=random.choice(("a", "a", "b")),
            limits=Limits(
                migrations_max=random.choice((3, 8)),
                window_tokens=random.choice((5, 1024, 1024)),
                placement_timeout_s=random.choice((3.0, 30.0)),
                relink_s=random.choice((0.0, 0.25)),
            ),
            deadline_s=random.uniform(0.05, 1.5) if world.chance(0.1) else None,
            client_pause_s=random.choice((0.0, 0.0, 0.02)),
        )
        frontend = random.choice(self.frontends)
        world.at(when, self._come, ask, frontend, None)
        if world.chance(0.15):
            world.at(when + random.uniform(0.0, 1.5), self._leave, ask)

    def _come(self, ask: Ask, frontend: Frontend, told_at: float | None) -> None:
        """A client asks, perhaps again: there, or elsewhere if nobody takes it there."""
        if ask.has_left:
            return
        if frontend.is_dead or frontend in self.closing:
            frontend, told_at = self.frontends[-1], None
        ask.num_calls += 1
        if ask.num_calls > CALLS_MAX:
            raise Violation(f"{ask.name} was sent away {CALLS_MAX} times")
        choice = ask.choice = Choice(
            frontend,
            ask.name,
            0,
            ask.original,
            stream_type=self._stream_type,
            policy=ContinuationPolicy.PREFER_EXACT,
            limits=ask.limits,
            deadline_s=ask.deadline_s,
            client_pause_s=ask.client_pause_s,
            priority=ask.priority,
            taken_ms=frontend.clock.now_ms(),
            tenant=ask.tenant,
            told_at=told_at,
        )
        self.choices.append(choice)
        choice.begin()

    def _leave(self, ask: Ask) -> None:
        ask.has_left = True
        choice = self._latest(ask)
        if choice is not None and not choice.is_abandoned:
            choice.end(Reason.CANCELLED)

    def _latest(self, ask: Ask) -> Choice | None:
        """Where its stream is, wherever its client has taken it."""
        mine = [choice for choice in self.choices if choice.request_id == ask.name]
        return mine[-1] if mine else None

    def _sent_away(self, choice: Choice, error: UnbrokenError) -> None:
        assert error.retry_after_s is not None
        due = self.world.now + error.retry_after_s
        ask = self.asks[choice.request_id]
        if not choice.is_abandoned:
            self.world.at(due + 0.001, self._come, ask, choice.frontend, due)

    # Trouble.

    @override
    def _strike(self, fault: Fault) -> None:
        random = self.world.random
        if fault is Fault.DRAIN:
            worker = random.choice(self.workers)
            if worker.process.is_alive and not worker.process.is_draining:
                policy = random.choice(list(Policy))
                self.leaving.append(LeavingWorker(self, worker, Plan(policy, 0.3)))
                self.trouble.took_effect(fault)
        elif fault is Fault.FRONTEND_DRAIN:
            frontend = self._one_to_lose()
            if frontend is not None:
                self.closing[frontend] = LeavingFrontend(self, frontend, random.choice((0.2, 3.0)))
                self.trouble.took_effect(fault)
        else:
            super()._strike(fault)

    @override
    def _one_to_lose(self) -> Frontend | None:
        """A frontend that serves; another one takes its place."""
        serving = [one for one in self.frontends if not one.is_dead and one not in self.closing]
        frontend = self.world.random.choice(serving)
        self._standby()
        return frontend

    def move(self, choice: Choice) -> None:
        """Its frontend tells a client to go on elsewhere."""
        self._client_goes(choice, is_dead=False)

    def _pulse(self) -> None:
        """Engines that have nothing to do say so, too: else nobody knows that there is room."""
        for worker in self.workers:
            if worker.process.is_alive:
                worker.process.engine.say_alive()
                worker.process.hub.tick(silence_max_s=FOREVER)
                self.pump(worker.process)
        if not self._is_over:
            self.world.after(PULSE_S, self._pulse)

    # What is promised.

    def _look(self) -> None:
        now = self.world.now
        for frontend in self.frontends:
            if not frontend.is_dead:
                frontend.door.check_waits()
                self._check_idle(frontend)
        for choice in self.choices:
            if not choice.frontend.is_dead and choice.is_nowhere:
                raise Violation(f"{choice.name} is forgotten")
        for worker in self.workers:
            process = worker.process
            if process.is_alive and not process.engine.seems_to_stand:
                self._check_wanted(process)
        has_ended = all(ask.has_left or self._has_ended(ask) for ask in self.asks.values())
        self._is_over = has_ended and now >= 1.5
        if not self._is_over:
            self.world.after(LOOK_S, self._look)

    def _has_ended(self, ask: Ask) -> bool:
        choice = self._latest(ask)
        if choice is None:
            return False
        outcome = choice.stream.outcome
        is_sent_away = (
            outcome is not None
            and outcome.error is not None
            and outcome.error.reason is Reason.OVERLOADED
        )
        return choice.is_abandoned or (outcome is not None and not is_sent_away)

    def _check_wanted(self, process: Process) -> None:
        """Nothing is worked on for which nobody waits any more."""
        now = self.world.now
        calls = self.calls_to(process)
        for attempt in process.hub.ledger.running.values():
            if attempt.given_up is not None:
                raise Violation(f"{attempt.stream} was given up, and is worked on")
            if attempt.link is None:
                until = attempt.orphaned_until
                if until is not None and now > until + LATE_S:
                    raise Violation(f"{attempt.stream} has had no reader for too long")
                continue
            call = next((one for one in calls if one.link is attempt.link), None)
            if call is None:
                continue  # Somebody else's, or nobody has noticed yet that it is over.
            readers = [one for one in self.choices if one.runs_as(attempt.stream, call)]
            ended_at = max((one.ended_at for one in readers), default=0.0)
            are_over = all(one.stream.outcome is not None for one in readers)
            if are_over and now > max(ended_at, call.up.held_until) + LATE_S:
                raise Violation(f"{attempt.stream} ended at {ended_at:.3f}, and is worked on")

    def _check_halt(self, choice: Choice) -> None:
        """It is to be paused, may be, and that is needed."""
        door, now, name = choice.frontend.door, self.world.now, choice.name
        limits = self.rules.preemption
        waiting = [arrival.priority for _, arrival, _ in door.room.queue.waiting()]
        if choice.priority >= max(waiting, default=choice.priority):
            raise Violation(f"{name} is to be paused for no higher priority")
        if choice.stream.num_left_max <= NEARLY_DONE_TOKENS:
            raise Violation(f"{name} is nearly done")
        if choice.num_pauses >= limits.pauses_max:
            raise Violation(f"{name} was paused {choice.num_pauses} times")
        if choice.num_pauses and now < choice.went_on_at + limits.run_s_min:
            raise Violation(f"{name} went on {now - choice.went_on_at:.2f} s ago")
        choice.halted_at = now
        for other in self.choices:
            is_earlier = other.stream.is_halting and other.halted_at < now
            if is_earlier and other.frontend is choice.frontend and not choice.frontend.is_dead:
                raise Violation(f"{name} is to be paused, and {other.name} has not stopped yet")
        process = choice.process
        assert process is not None, "what is to be paused runs"
        if (
            now < process.freed_at + FREED_S
            or not process.is_alive
            or process.engine.seems_to_stand
            or not all(_is_sound(call, now) for call in self.calls_to(process))
        ):
            return  # The frontend cannot know what there is.
        held = [  # On its way there, or there. What other frontends have stopped is not known here.
            one
            for one in self.choices
            if one.process is process
            and (one is choice or one.frontend is not choice.frontend or not one.stream.is_halting)
        ]
        # What was placed just now may count beside a report that has it already.
        held += [one for one in held if now < one.started_at + FREED_S]
        thresholds = self.rules.thresholds
        tokens = sum(one.num_tokens for one in held if not one.stream.is_prefilled)
        blocks = sum(-(-one.num_tokens // BLOCK_SIZE) for one in held)
        if not (
            (thresholds.prefill_tokens is not None and tokens > thresholds.prefill_tokens)
            or (
                thresholds.kv_blocks_share is not None
                and blocks > thresholds.kv_blocks_share * KV_BLOCKS
            )
        ):
            raise Violation(f"{name} is to be paused, and {process.worker_id} has room")

    def _check_idle(self, frontend: Frontend) -> None:
        """No worker has nothing to do while somebody waits who could go there."""
        queue = frontend.door.room.queue
        waiting = [one for one, _, _ in queue.waiting() if not queue.is_called(one)]
        is_held = frontend.queue.holds_new_work("m") or frontend.door.pausing.num_paused
        for view in frontend.views():
            process = frontend.processes[view.life.worker_id]
            call = frontend.call_to(view.life)
            key = frontend, process
            if (
                is_held
                or call is None
                or not _is_sound(call, self.world.now)
                or process.hub.ledger.running
                or not process.hub.takes_work
                or process.engine.seems_to_stand
                or not any(choice.could_take(view) for choice in waiting)
            ):
                del self._idle[key]
                continue
            self._idle[key] += 1
            if self._idle[key] > NUM_LOOKS_IDLE_MAX:
                raise Violation(f"{process.worker_id} is idle while {len(waiting)} wait")

    @override
    def live(self) -> None:
        super().live()
        for ask in self.asks.values():
            if not ask.has_left and not self._has_ended(ask):
                raise Violation(f"{ask.name} has not ended")
        for worker in self.workers:
            process = worker.process
            process.hub.admission.check()
            given = process.hub.admission.given
            if process.is_alive and (given.prefill_tokens or given.kv_blocks):
                raise Violation(f"{process.worker_id} has {given} on account")
        for one in self.leaving:
            one.finish()
        for one in self.closing.values():
            one.finish()


class LeavingWorker:
    """A worker that drains, by its sidecar's plan."""

    def __init__(self, rush: Rush, worker: Worker, plan: Plan) -> None:
        self._rush, self._worker, self._world = rush, worker, rush.world
        self._process = process = worker.process
        self._plan = plan
        self._drain = worker_drain.Drain(plan)
        self._is_look_planned = False
        self._planned_at: float | None = None
        process.is_draining = True
        process.hub.on_over.append(self._look_soon)
        process.hub.on_step.append(self._stepped)
        self._handle(worker_drain.Asked(plan))
        self._look_soon()
        if plan.policy is not Policy.FINISH:
            self._world.after(plan.budget_s + CLOSE_S_MAX, self.finish)

    def finish(self) -> None:
        """It has to be gone."""
        if self._process.is_alive and self._worker.process is self._process:
            raise Violation(f"{self._process.worker_id} drains for ever")

    def _look_soon(self) -> None:
        if not self._is_look_planned:
            self._is_look_planned = True
            self._world.after(0.0, self._look)

    def _look(self) -> None:
        self._is_look_planned = False
        if self._process.is_alive:
            hub = self._process.hub
            self._handle(
                worker_drain.Seen(
                    hub.num_left,
                    is_engine_up=hub.up is not None,
                    is_stalled=hub.watchdog.is_stalled,
                )
            )

    def _stepped(self) -> None:
        if self._drain.phase is worker_drain.Phase.LAST_STEP:
            self._world.after(0.0, self._last_step_over)

    def _last_step_over(self) -> None:
        if self._process.is_alive:
            self._handle(worker_drain.Stepped())

    def _time_is_up(self) -> None:
        if self._process.is_alive:
            self._obey(self._drain.handle_timeout(self._world.now))
            self._look_soon()

    def _handle(self, event: worker_drain.Event) -> None:
        self._obey(self._drain.handle(event, self._world.now))

    def _obey(self, commands: Sequence[worker_drain.Command]) -> None:
        process, world = self._process, self._world
        for command in commands:
            world.tell("%s drains: %s", process.worker_id, command)
            match command:
                case worker_drain.Announce(budget_s=budget_s):
                    process.hub.drain(budget_s)
                case worker_drain.HandOver():
                    process.hub.drain()
                case worker_drain.Stop():
                    self._rush.pump(process)
                    read_at = [call.down.flushed_at() for call in self._rush.calls_to(process)]
                    # Who does not read is not waited for any longer than that.
                    due = min(max(read_at, default=0.0), world.now + CLOSE_S_MAX / 2)
                    world.at(due, self._exit)
                case worker_drain.Hurry():
                    raise AssertionError(command)
                case _:
                    assert_never(command)
        if process.is_alive:
            self._rush.pump(process)
        due = self._drain.deadline()
        if due is not None and due != self._planned_at:
            self._planned_at = due
            world.at(max(due, world.now), self._time_is_up)

    def _exit(self) -> None:
        if self._process.is_alive:
            self._worker.die(silently=False)


class LeavingFrontend:
    """A frontend that drains, by its own plan."""

    def __init__(self, rush: Rush, frontend: Frontend, budget_s: float) -> None:
        self._rush, self._frontend, self._world = rush, frontend, rush.world
        self._drain = frontend_drain.Drain(budget_s)
        self._told: set[Choice] = set()
        self._obey(self._drain.handle(frontend_drain.Asked(), self._world.now))
        self._look()

    def finish(self) -> None:
        """It has to be gone."""
        if not self._frontend.is_dead:
            raise Violation(f"{self._frontend.name} drains for ever")

    def _left(self) -> list[Choice]:
        return [
            choice
            for choice in self._rush.choices
            if choice.frontend is self._frontend and choice.stream.outcome is None
        ]

    def _look(self) -> None:
        if self._frontend.is_dead:
            return
        left = self._left()
        num_untold = sum(choice not in self._told for choice in left)
        now = self._world.now
        self._obey(self._drain.handle(frontend_drain.Seen(len(left), num_untold), now))
        due = self._drain.deadline()
        if due is not None and due <= now:
            self._obey(self._drain.handle_timeout(now))
        self._world.after(0.02, self._look)

    def _obey(self, commands: Sequence[frontend_drain.Command]) -> None:
        for command in commands:
            self._world.tell("%s drains: %s", self._frontend.name, command)
            match command:
                case frontend_drain.Announce() | frontend_drain.GoAway():
                    pass  # Nobody comes here any more.
                case frontend_drain.Tell(num_requests):
                    untold = [choice for choice in self._left() if choice not in self._told]
                    for choice in untold[:num_requests]:
                        self._tell(choice)
                case frontend_drain.Cut():
                    for choice in self._left():
                        self._tell(choice)
                case frontend_drain.Stop():
                    self._frontend.die()
                case _:
                    assert_never(command)

    def _tell(self, choice: Choice) -> None:
        self._told.add(choice)
        if not choice.is_abandoned and choice.held:
            self._rush.move(choice)


def _rules(random: Random) -> Rules:
    prefill_tokens = random.choice((None, None, BATCH, 2 * BATCH))
    kv_share = random.choice((None, 20 / KV_BLOCKS, 20 / KV_BLOCKS, 40 / KV_BLOCKS))
    if prefill_tokens is None and kv_share is None:
        prefill_tokens = BATCH
    return Rules(
        Thresholds(kv_blocks_share=kv_share, prefill_tokens=prefill_tokens),
        QueueLimits(
            requests_max=random.choice((2, 10, 1000)),
            tokens_max=random.choice((60, 1_000_000)),
            wait_s_max=random.choice((0.2, 0.6, 2.0)),
        ),
        PreemptionLimits(
            is_on=random.random() < 0.9,
            run_s_min=random.choice((0.0, 0.1)),
            pauses_max=random.choice((1, 2, 3)),
            wait_s_max=random.choice((0.3, 1.5)),
        ),
    )


def _to_the_end(params: GenerationParams) -> GenerationParams:
    """Nothing ends the output before its budget."""
    stopping = StopConditions(max_tokens=params.stopping.max_tokens, ignore_eos=True)
    return replace(params, stopping=stopping, constraint=None)


def _is_sound(call: Call, now: float) -> bool:
    """Whether nothing holds up what is said there."""
    since = now - LATE_S
    return call.is_welcomed and max(call.up.held_until, call.down.held_until) < since
