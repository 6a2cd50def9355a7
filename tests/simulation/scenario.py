"""One seed: who asks for what, of which workers, and what goes wrong."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from types import MappingProxyType

from frontend.resume_queue import ResumeLimits, ResumeQueue
from frontend.stream import Limits, Mismatch, Stream
from tests.simulation.clocks import Clocks
from tests.simulation.door import Event, Rules
from tests.simulation.faults import Fault, Trouble
from tests.simulation.frontend import TOKEN_LIFETIME_S, Call, Choice, Frontend
from tests.simulation.model import Personality
from tests.simulation.witness import Held, Violation
from tests.simulation.worker import Pace, Process
from tests.support.vocabulary import EOS, PIECES
from tests.support.world import World
from unbroken import discovery
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import Constraint, GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import ContinuationPolicy, FailureKind

_PRIORITIES = (0, 0, 1, 0, -1)
_RESUMES_MAX = 12
"""Of one choice, with all the frontends that it can lose."""
EVENTS_MAX = 20_000
"""A world that is not over after so many never will be."""


@dataclass(slots=True)
class Report:
    """What became of one seed."""

    seed: int
    violation: str | None = None
    faults: Counter[Fault] = field(default_factory=Counter[Fault])
    num_events: int = 0
    num_streams: int = 0
    num_tokens: int = 0


def run_seed(
    seed: int,
    *,
    stream_type: type[Stream] = Stream,
    queue_type: type[ResumeQueue[Choice]] = ResumeQueue,
    trace: Callable[[str], None] | None = None,
) -> Report:
    """Live through one world and report."""
    return report_of(Mesh(seed, stream_type, queue_type, trace), seed)


def report_of(mesh: "Mesh", seed: int) -> Report:
    """Live through this world and report."""
    report = Report(seed, faults=mesh.trouble.seen)
    try:
        mesh.live()
    except AssertionError as violation:
        # Also those of the core itself: a bug there is a broken promise here.
        report.violation = str(violation) or repr(violation)
        mesh.world.tell("VIOLATION %s", report.violation)
        if not isinstance(violation, Violation):
            report.violation += f" ({_where(violation)})"
    report.num_events = mesh.world.num_events
    report.num_streams = len(mesh.choices)
    report.num_tokens = sum(len(choice.stream.ledger) for choice in mesh.choices)
    return report


@contextmanager
def quiet() -> Generator[None]:
    """Keep the sidecar's log silent: engines die by the thousand here."""
    logger = logging.getLogger("sidecar")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class Worker:
    """A worker through all its lives."""

    def __init__(self, mesh: "Mesh", worker_id: str, personality: Personality) -> None:
        self._mesh = mesh
        self._personality = personality
        self._worker_id = worker_id
        self._num_lives = 0
        self._incarnation = 0
        self.clock = mesh.clocks.new()
        self.process = self._new_process()

    @property
    def name(self) -> str:
        """Its id."""
        return self._worker_id

    def boot(self) -> None:
        """A new life, which discovery tells the frontend about."""
        if self.process.is_alive and self._num_lives > 1:
            return
        world = self._mesh.world
        if not self.process.is_alive:
            self.process = self._new_process()
        process = self.process
        world.tell("%s boots as %d", self._worker_id, process.incarnation)
        world.after(world.random.uniform(0.0, 0.05), self._start_engine, process)
        for frontend in self._mesh.frontends:
            world.after(world.random.uniform(0.0, 0.05), frontend.discover, process)

    def die(self, *, silently: bool) -> None:
        """The whole process group is killed."""
        process, world = self.process, self._mesh.world
        if not process.is_alive:
            return
        world.tell("%s dies%s", self._worker_id, " silently" if silently else "")
        process.kill()
        keeps_in_flight = world.chance(0.5)
        for call in self._mesh.calls_to(process):
            call.up.cut(drops_in_flight=True)
            call.down.cut(drops_in_flight=not keeps_in_flight)
            noticed = world.random.uniform(0.3, 1.0) if silently else 0.001
            failure = FailureKind.HANG if silently else FailureKind.CRASH
            # A reset connection and a dead peer look the same.
            world.at(call.down.flushed_at() + noticed, call.end, failure, not silently)
        world.after(self._downtime_s(), self.boot)

    def crash_engine(self) -> None:
        """The engine dies under its sidecar."""
        process, world = self.process, self._mesh.world
        if process.is_alive and process.engine.is_up:
            world.tell("%s: the engine dies", self._worker_id)
            if world.chance(0.5):
                # News of it is late, so that attempts are still meant for the life that is over.
                for call in self._mesh.calls_to(process):
                    call.down.hold(world.now + world.random.uniform(0.05, 0.4))
            process.engine.die(FailureKind.CRASH)
            self._mesh.pump(process)
            world.after(world.random.choice((0.0, 0.02, 0.3)), self._start_engine, process)

    def _start_engine(self, process: Process) -> None:
        if process.is_alive and not process.engine.is_up:
            process.engine.start_life()
            self._mesh.pump(process)

    def _downtime_s(self) -> float:
        random = self._mesh.world.random
        return random.uniform(4.0, 40.0) if random.random() < 0.15 else random.uniform(0.05, 0.6)

    def _new_process(self) -> Process:
        mesh = self._mesh
        self._num_lives += 1
        known, now_us = self._incarnation, self.clock.now_us()
        self._incarnation = discovery.next_incarnation(now_us, known=known)
        if self._incarnation <= known:
            raise Violation(f"{self._worker_id} begins as {self._incarnation}, after {known}")
        process = Process(
            mesh.world,
            mesh.trouble,
            self._personality,
            self._worker_id,
            self._incarnation,
            mesh.pace,
        )
        process.engine.after_step = partial(mesh.pump, process)
        process.engine.before_goodbye = partial(self._lose_goodbye)
        process.engine.restart = partial(mesh.world.after, 0.02, self._start_engine, process)
        return process

    def _lose_goodbye(self) -> None:
        """Die between the last token and the goodbye."""
        if any(choice.runs_on(self.process) for choice in self._mesh.choices):
            self._mesh.trouble.took_effect(Fault.LOST_GOODBYE)
        self.die(silently=self._mesh.world.chance(0.3))


class Mesh:
    """A frontend, a few workers, their clients, and trouble."""

    def __init__(
        self,
        seed: int,
        stream_type: type[Stream],
        queue_type: type[ResumeQueue[Choice]],
        trace: Callable[[str], None] | None,
    ) -> None:
        self.world = world = World(seed, trace=trace)
        self.trouble = Trouble(world)
        self._limits = _resume_limits(seed)
        self._queue_type = queue_type
        self.clocks = Clocks(world, seed)
        moves = sorted(_NEEDS_STANDBY)
        for _ in range(self.clocks.num_moves):
            self.trouble.strikes.append(moves[self.clocks.choose(len(moves))])
        self.rules = Rules()
        self.pace = Pace()
        self.seen = Counter[Event]()
        """What happened before the workers."""
        self.frontends: list[Frontend] = []
        self.workers: list[Worker] = []
        self.choices: list[Choice] = []
        self._stream_type = stream_type
        self._late_s = 0.0
        self._pauses = Random(seed ^ 0x9A5E)
        self._populate(seed)

    def _populate(self, seed: int) -> None:
        """Who is there, and what is going to happen."""
        world = self.world
        self.frontends.append(self._frontend("f0"))
        if _NEEDS_STANDBY.intersection(self.trouble.strikes):
            self.frontends.append(self._frontend("f1"))
        random = world.random
        num_workers = random.choice((1, 2, 2, 3, 3, 4))
        personalities = personalities_of(random, num_workers)
        self.workers += [
            Worker(self, f"w{index}", personality)
            for index, personality in enumerate(personalities)
        ]
        # Now and then new work comes when much has happened already.
        self._late_s = 0.3 if Random(seed ^ 0x1A7E).random() < 0.2 else 0.0
        for index in range(random.choice((2, 3, 4, 6))):
            self._request(f"r{index}")
        if self.clocks.num_moves:
            self.frontends.insert(0, self._frontend("fx"))  # For clients that ask twice.
        for worker in self.workers:
            worker.boot()
        for fault in self.trouble.strikes:
            world.at(random.uniform(0.05, 0.65), self._strike, fault)
        for when in self.clocks.steps:
            world.at(when, self._set_a_clock)
        if self._pauses.random() < 0.2:
            for _ in range(self._pauses.choice((1, 2, 5))):
                world.at(self._pauses.uniform(0.1, 0.8), self._pause)

    def live(self) -> None:
        """Let everything happen, then compare."""
        world = self.world
        while world.step():
            if world.num_events > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events, {world.now:.1f} s")
        for choice in self.choices:
            if not choice.is_abandoned:
                choice.witness.finish()
        for frontend in self.frontends:
            if not frontend.is_dead:
                frontend.watch.finish()
                frontend.door.finish()
        for worker in self.workers:
            worker.process.check_idle()
            worker.process.hub.ledger.check()

    def _frontend(self, name: str) -> Frontend:
        clock = self.clocks.new()
        frontend = Frontend(
            self.world,
            self.trouble,
            name,
            self.pump,
            self._limits,
            self._queue_type,
            clock,
            self.rules,
            self._note,
        )
        frontend.on_overtaken = self._overtaken
        return frontend

    def _note(self, event: Event) -> None:
        self.seen[event] += 1

    def pump(self, process: Process) -> None:
        """A sidecar writes what it has to say."""
        if process.is_alive:
            for frontend in self.frontends:
                for call in frontend.calls.get(process.worker_id, ()):
                    if call.link is not None and call.process is process:
                        call.pump()

    def calls_to(self, process: Process) -> list[Call]:
        """All calls that are open to this life of a worker."""
        return [
            call
            for frontend in self.frontends
            for call in frontend.calls.get(process.worker_id, ())
            if call.process is process and not call.is_over
        ]

    def _request(self, request_id: str) -> None:
        world = self.world
        random = world.random
        begin_at = random.choice((0.1, 0.1 + 0.2 * random.random()))
        if request_id != "r0":
            begin_at += self._late_s
        original = original_of(random)
        policy = random.choices(
            (
                ContinuationPolicy.PREFER_EXACT,
                ContinuationPolicy.ALLOW_INEXACT,
                ContinuationPolicy.NEVER,
            ),
            (8, 3, 1),
        )[0]
        limits = Limits(
            migrations_max=random.choice((0, 1, 2, 3, 3, 8)),
            window_tokens=random.choice((1, 2, 3, 5, 16, 1024, 1024, 1024)),
            placement_timeout_s=random.choice((0.5, 3.0, 30.0)),
            regenerate_tokens_max=random.choice((0, 8, 4096, 4096, 4096)),
            relink_s=random.choice((0.0, 0.02, 0.25, 0.25)),
        )
        deadline_s = random.uniform(0.05, 0.6) if random.random() < 0.06 else None
        client_pause_s = random.choice((0.0, 0.0, 0.001, 0.02, 0.3))
        for index in range(random.choice((1, 1, 1, 2))):
            choice = Choice(
                self.frontends[0],
                request_id,
                index,
                _with_seed(original, index),
                stream_type=self._stream_type,
                policy=policy,
                limits=limits,
                deadline_s=deadline_s,
                client_pause_s=client_pause_s,
                priority=_PRIORITIES[len(self.choices) % len(_PRIORITIES)],
                taken_ms=self.frontends[0].clock.now_ms() + int(begin_at * 1000),
            )
            self.choices.append(choice)
            world.at(begin_at, choice.begin)
        world.at(
            begin_at,
            world.tell,
            "%s begins: %s %s %s",
            request_id,
            policy.name,
            limits,
            original,
        )

    def _strike(self, fault: Fault) -> None:
        world, trouble = self.world, self.trouble
        random = world.random
        busy = [w for w in self.workers if any(c.runs_on(w.process) for c in self.choices)]
        if fault is Fault.CANCEL:
            random.choice(self.choices).end(Reason.CANCELLED)
            return
        if fault in _NEEDS_STANDBY:
            self._lose_frontend(is_dead=fault is Fault.FRONTEND_DEATH)
            return
        # Trouble where nobody is does little.
        worker = random.choice(busy if busy and random.random() < 0.9 else self.workers)
        is_busy = worker in busy
        process = worker.process
        if not process.is_alive:
            return
        match fault:
            case Fault.ENGINE_CRASH:
                worker.crash_engine()
            case Fault.PROCESS_RESET | Fault.PROCESS_SILENT:
                worker.die(silently=fault is Fault.PROCESS_SILENT)
            case Fault.TWO_DEATHS:
                others = [w for w in busy if w is not worker]
                worker.die(silently=world.chance(0.5))
                is_busy = is_busy and bool(others)
                if others:
                    random.choice(others).die(silently=world.chance(0.5))
            case Fault.LINK_RESET | Fault.PARTITION:
                self._break_link(worker, fault)
            case Fault.STALL | Fault.HANG:
                durations = (random.uniform(0.05, 0.5), random.uniform(1.5, 2.0), 30.0)
                process.engine.stall(random.choice(durations), is_hung=fault is Fault.HANG)
                process.watch_soon()
            case Fault.THEFT:
                victims = [c for c in self.choices if c.runs_on(process) and c.is_running]
                is_busy = bool(victims) and process.engine.is_up and not process.is_draining
                if is_busy:
                    random.choice(victims).steal(process)
            case Fault.DRAIN:
                if not process.is_draining:
                    process.is_draining = True
                    process.hub.drain()
                    self.pump(process)
                    world.after(0.5, partial(worker.die, silently=False))
            case _:
                raise AssertionError(fault)
        if is_busy:
            trouble.took_effect(fault)

    def _pause(self) -> None:
        """Somebody has to make room for a while."""
        random = self._pauses
        running = [c for c in self.choices if c.is_running and not c.frontend.is_dead]
        if running:
            random.choice(running).pause(random.choice((0.0, 0.05, 0.5)))

    def _set_a_clock(self) -> None:
        """The time of day jumps on one host."""
        hosts: list[Frontend | Worker] = [one for one in self.frontends if not one.is_dead]
        hosts += self.workers
        host = hosts[self.clocks.choose(len(hosts))]
        by_s = self.clocks.set(host.clock)
        name = host.name
        self.world.tell("the clock of %s is set by %+.3f s", name, by_s)
        if isinstance(host, Worker) or any(
            choice.frontend is host and choice.stream.outcome is None for choice in self.choices
        ):
            self.trouble.took_effect(Fault.CLOCK_STEP)

    def _lose_frontend(self, *, is_dead: bool) -> None:
        """All clients of a frontend go to another one; or some, although it lives."""
        world, trouble = self.world, self.trouble
        frontend = self._one_to_lose()
        if frontend is None:
            return
        running = [
            choice
            for choice in self.choices
            if choice.frontend is frontend
            and not choice.is_abandoned
            and choice.held
            and choice.stream.outcome is None
        ]
        if is_dead:
            world.tell("%s dies", frontend.name)
            frontend.die()
        # A client learns the end of a stream that is settled with the next message.
        for choice in self.choices if is_dead else ():
            if choice.frontend is frontend and not choice.is_abandoned and choice not in running:
                choice.is_abandoned = True
        for choice in running:
            if is_dead or world.chance(0.7):
                trouble.took_effect(Fault.FRONTEND_DEATH if is_dead else Fault.CLIENT_MOVES)
                self._client_goes(choice, is_dead=is_dead)
        if is_dead:
            self._standby()

    def _one_to_lose(self) -> Frontend | None:
        """The frontend that is lost next."""
        return self.frontends[-2]

    def _standby(self) -> None:
        """Another frontend, in place of one that is lost."""
        world = self.world
        standby = self._frontend(f"f{len(self.frontends)}")
        self.frontends.append(standby)
        for worker in self.workers:
            if worker.process.is_alive:
                world.after(world.random.uniform(0.0, 0.05), standby.discover, worker.process)

    def _client_goes(self, choice: Choice, *, is_dead: bool) -> None:
        """To another frontend, with what it holds."""
        world, random = self.world, self.world.random
        choice.is_abandoned = True
        choice.witness.note_cut()
        world.after(random.choice((0.0, 0.005, 0.1, 1.0)), self._resume, choice)
        if not is_dead:
            choice.witness.orders |= {Reason.FENCED, Reason.REQUEST_EXISTS}
            world.after(random.uniform(0.0, 1.5), choice.end, Reason.CANCELLED)

    def _resume(self, choice: Choice, num_expired: int = 0) -> None:
        world, trouble = self.world, self.trouble
        held = choice.held[-1]
        if len(choice.held) > 1 and trouble.happens(Fault.LOST_MESSAGES):
            trouble.took_effect(Fault.LOST_MESSAGES)
            held = world.random.choice(choice.held[-4:-1])
        if held.token_ids and trouble.happens(Fault.FORGERY):
            trouble.took_effect(Fault.FORGERY)
            held = _forged(held, world.random)
        self._resume_at(self.frontends[-1], choice, held, num_expired)

    def _resume_at(self, frontend: Frontend, choice: Choice, held: Held, num_expired: int) -> None:
        world, trouble = self.world, self.trouble
        world.tell(
            "%s resumes at %s with %d tokens%s",
            *(choice.name, frontend.name, len(held.token_ids)),
            ", some forged" if held.is_forged else "",
        )
        try:
            successor = choice.resumed(frontend, held)
        except (Mismatch, UnbrokenError) as mismatch:
            if _is_expiry(mismatch):
                self._expired(choice, held, frontend, num_expired + 1)
                return
            if not held.is_forged:
                raise Violation(f"{choice.name}: an honest client is refused: {mismatch}") from None
            trouble.took_effect(Fault.FORGERY_FOUND)
            return
        self.choices.append(successor)
        if self.clocks.are_wrong:
            successor.witness.orders.add(Reason.FENCED)  # Then its client resumes again.
        successor.begin()
        delay_s = self.clocks.breaks_off_after_s()
        if delay_s is not None and frontend is not self.frontends[0]:
            world.after(delay_s, self._break_off, choice, successor, held)

    def _break_off(self, choice: Choice, successor: Choice, held: Held) -> None:
        """A client loses its call before it was answered, and asks elsewhere with what it held."""
        if successor.is_abandoned or successor.frontend.is_dead:
            return
        self.world.tell("%s: the call breaks off", successor.name)
        successor.is_abandoned = True
        self.world.after(
            self.world.random.choice((0.0, 0.01, 0.05)), successor.end, Reason.CANCELLED
        )
        self._resume_at(self.frontends[0], choice, held, 0)

    def _overtaken(self, choice: Choice) -> None:
        """A client whose stream was taken over, by an earlier call of its own for all it knows,
        resumes again, as the SDK does. By then its frontend is surely later.
        """
        if not (choice.is_resumed and self.clocks.are_wrong) or choice.is_abandoned:
            return
        if choice.is_stolen:
            return  # Not by an earlier call.
        if choice.name.count("'") > _RESUMES_MAX:
            raise Violation(f"{choice.name} was overtaken again and again")
        self.trouble.took_effect(Fault.OVERTAKEN)
        choice.is_abandoned = True
        self.world.after(0.05, self._resume_again, choice)

    def _resume_again(self, choice: Choice) -> None:
        """At the same frontend, if it lives: that may be the only one that its client reaches."""
        frontend = self.frontends[-1] if choice.frontend.is_dead else choice.frontend
        self._resume_at(frontend, choice, choice.held[-1], 0)

    def _expired(self, choice: Choice, held: Held, frontend: Frontend, num_expired: int) -> None:
        """A frontend takes a token for too old. The client asks again, as the SDK does."""
        ahead_s = frontend.clock.offset_s - held.clock_offset_s
        if ahead_s < TOKEN_LIFETIME_S:
            raise Violation(
                f"{choice.name}: a token has expired, {self.world.now - held.minting.now:.1f} s "
                f"old, where the clock is {ahead_s:.1f} s ahead"
            )
        self.trouble.took_effect(Fault.EXPIRY)
        if num_expired < len(self.frontends):
            self.world.after(0.1, self._resume, choice, num_expired)

    def _break_link(self, worker: Worker, fault: Fault) -> None:
        world = self.world
        random = world.random
        for call in self.calls_to(worker.process):
            if fault is Fault.LINK_RESET:
                call.up.cut(drops_in_flight=world.chance(0.5))
                call.down.cut(drops_in_flight=world.chance(0.5))
                world.at(
                    call.down.flushed_at() + random.uniform(0.0, 0.02),
                    call.end,
                    FailureKind.PARTITION,
                    True,
                )
                world.at(
                    call.up.flushed_at() + random.uniform(0.0, 0.02),
                    call.sidecar_loses,
                )
            else:
                until = world.now + random.uniform(0.1, 1.5)
                call.down.hold(until)
                if world.chance(0.5):
                    call.up.hold(until)
                silence_max_s = random.uniform(0.05, 0.5)
                if world.now + silence_max_s < until:
                    # The frontend gives up; the worker goes on, and is heard late.
                    world.after(silence_max_s, call.end, FailureKind.HANG)
                    world.after(silence_max_s + random.uniform(0.0, 1.0), call.sidecar_loses)


def _is_expiry(error: Exception) -> bool:
    return isinstance(error, UnbrokenError) and error.reason is Reason.RESUME_TOKEN_EXPIRED


_NEEDS_STANDBY = frozenset({Fault.FRONTEND_DEATH, Fault.CLIENT_MOVES})


def _forged(held: Held, random: Random) -> Held:
    """Of the same length, or one longer, with a token that the client never received."""
    token_ids = list(held.token_ids)
    index = random.randrange(len(token_ids) + 1)
    token_ids[index : index + 1] = [(held.token_ids[min(index, len(token_ids) - 1)] + 1) % EOS]
    return replace(held, token_ids=tuple(token_ids), is_forged=True)


def _where(error: AssertionError) -> str:
    """The innermost line of a traceback."""
    frame = error.__traceback__
    assert frame is not None
    while frame.tb_next is not None:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    return f"{code.co_filename.rsplit('/', 2)[-1]}:{frame.tb_lineno} in {code.co_name}"


def personalities_of(random: Random, num: int) -> list[Personality]:
    """Engines of one kind mostly; sometimes one can do more or less, or is another model's."""
    rarely = 0.1
    base = {
        "has_native_resume": random.random() < 0.35,
        "has_positional_random": random.random() < 0.4,
        "has_seeds": random.random() > rarely,
        "is_invariant": random.random() > rarely,
        "repetition_penalty_counts_prompt": random.random() < 0.7,
        "has_logit_bias": random.random() < 0.8,
        "adds_bias_first": random.random() < 0.3,
    }
    is_mixed = random.random() < 0.4
    result: list[Personality] = []
    for _ in range(num):
        own = dict(base)
        salt = 0
        if is_mixed:
            if random.random() < 0.5:
                own["has_native_resume"] = not own["has_native_resume"]
            if random.random() < 0.25:
                salt = 1
            if random.random() < 0.1:
                own["has_positional_random"] = not own["has_positional_random"]
        result.append(Personality(model_salt=salt, **own))
    return result


def _resume_limits(seed: int) -> ResumeLimits:
    """Budgets that a few short streams exhaust, mostly. By a randomness of their own."""
    random = Random(seed)
    return ResumeLimits(
        is_on=random.random() < 0.9,
        share=random.choice((0.2, 0.5, 1.0)),
        burst_tokens=random.choice((1, 8, 20, 40, 4096)),
        prefill_tokens_per_s=random.choice((50.0, 300.0, 5000.0)),
        fleet_loss_share=random.choice((0.1, 0.2, 0.3, 1.0)),
    )


def _stop_strings(random: Random) -> tuple[str, ...]:
    """Strings that are likely to come, most of them in several tokens."""
    stops = {
        b"".join(random.choices(PIECES, k=random.choice((1, 2, 2, 2, 2, 3, 3))))
        for _ in range(random.choice((8, 16, 16)))
    }
    return tuple(sorted(stop.decode(errors="replace") for stop in stops if b"\xc3" not in stop))


def _with_seed(original: Checkpoint, index: int) -> Checkpoint:
    sampling = original.params.sampling
    if sampling.seed is None:
        return original
    sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
    return replace(original, params=replace(original.params, sampling=sampling))


def original_of(
    random: Random,
    *,
    prompts: Sequence[int] = (1, 4, 9),
    sizes: Sequence[int] = (1, 5, 24, 40, 64),
) -> Checkpoint:
    """What a client asks for, as admission resolves it."""

    def sometimes(probability: float) -> bool:
        return random.random() < probability

    is_sampled = sometimes(0.4)
    bias: dict[int, float] = {}
    if sometimes(0.15):
        bias = {random.randrange(len(PIECES)): random.choice((-4.0, 3.0, 99.0)) for _ in range(3)}
    sampling = SamplingParams(
        temperature=random.choice((0.5, 1.0)) if is_sampled else 0.0,
        seed=random.getrandbits(64) if is_sampled else None,
        presence_penalty=random.choice((-1.0, 1.5)) if sometimes(0.15) else 0.0,
        frequency_penalty=random.choice((-0.5, 0.5, 2.0)) if sometimes(0.25) else 0.0,
        repetition_penalty=random.choice((0.5, 2.0)) if sometimes(0.2) else 1.0,
        logit_bias=MappingProxyType(bias),
    )
    max_tokens = random.choice(sizes)
    min_tokens = random.randrange(max_tokens + 1) if sometimes(0.25) else 0
    stopping = StopConditions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stop_strings(random) if sometimes(0.45) else (),
        stop_token_ids=(
            frozenset(random.sample(range(len(PIECES)), 2)) if sometimes(0.15) else frozenset()
        ),
        ignore_eos=sometimes(0.6),
        include_stop=sometimes(0.3),
    )
    constraint: Constraint | None = None
    if sometimes(0.12):
        constraint = Constraint("regex", f"{random.choice((2, 9, 20, 30))}:{random.choice((2, 3))}")
    elif sometimes(0.15):
        options = ("yes", "yes no", "no", "noyes", "END12", "ab yes", "é2", "éé12", "ab ab ab ab")
        constraint = Constraint("choice", options=tuple(random.sample(options, 4)))
    return Checkpoint(
        prompt_token_ids=tuple(
            random.randrange(len(PIECES)) for _ in range(random.choice(prompts))
        ),
        params=GenerationParams(
            sampling=sampling,
            stopping=stopping,
            constraint=constraint,
            num_top_logprobs=0 if sometimes(0.15) else None,
        ),
    )
