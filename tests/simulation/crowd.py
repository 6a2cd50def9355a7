"""More jobs than workers can do, in virtual time: the real line, thresholds and sidecar's count.

Jobs only have prompts. Clients come at frontends at random, and again when they were told; workers
compute so many tokens a step, and die. What is judged is who gets in, who waits and who is sent
away:

- new work never brings a worker beyond its threshold and one batch, however many frontends there
  are, however late news is, and whatever else it was given;
- what a worker has begun is never refused by another; what none has begun is new, waits first of
  its kind if its worker dies, and is not sent away;
- nobody waits for longer than he may, and no worker has nothing to do while somebody who could go
  there waits;
- whoever comes back when he was told is not sent away for the length of the line;
- every job ends once, and in the end nobody is in line and nothing on account.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from random import Random
from typing import Any

from frontend.admission_queue import (
    PROMISE_GRACE_S,
    PROMISE_S_MAX,
    RETRY_SPREAD,
    AdmissionQueue,
    Arrival,
    Limit,
    QueueLimits,
    Refusal,
)
from frontend.busy import Shedder
from frontend.placement import Need, WorkerView, choose
from frontend.stream import Life
from sidecar.admission import Admission, Told
from tests.simulation.witness import Violation
from tests.support.streams import NATIVE
from tests.support.world import World
from unbroken.thresholds import Thresholds, rank_states
from unbroken.v1 import worker_pb2

BATCH = 256
LIMIT = 512
STEP_S = 0.05
REST_S = 0.5
"""An engine that has nothing to do only says so, and so often."""
IDLE_S_MAX = 1.0
"""So long a worker may have nothing to do while somebody waits."""
CALLS_MAX = 60
EVENTS_MAX = 60_000
MODEL = "m"
THRESHOLDS = Thresholds(prefill_tokens=LIMIT)


class Event(StrEnum):
    """What happens to a crowd; each must be seen in some world."""

    CRASH = auto()
    """An engine died; its jobs go on elsewhere, and are not to be refused."""
    UNHEARD = auto()
    """It had not begun one of them, which waits again."""
    LATE = auto()
    """News of a worker is late for a while."""
    CANCEL = auto()
    """A client left."""
    WAITED = auto()
    """A job waited in line."""
    SENT_AWAY = auto()
    CAME_BACK = auto()
    """One that was sent away came when it was told."""
    EXPIRED = auto()
    DISPLACED = auto()
    """One in line gave way to another."""
    REFUSED = auto()
    """A worker refused what a frontend had thought to fit."""
    PASSED = auto()
    """One got in because its tenant had nothing there, though the worker was over its threshold."""


@dataclass(eq=False)
class Job:
    """One request."""

    name: str
    tenant: str
    priority: int
    num_tokens: int
    came_at: float = 0.0
    """When it came the last time."""
    told_at: float | None = None
    """When it was told to come back."""
    is_promised: bool = False
    num_calls: int = 0
    num_refusals: int = 0
    """By workers, in a row."""
    attempt: int = 0
    """Of the current attempt; what is said of another is late."""
    worker: "Worker | None" = None
    slot: int = 0
    is_new: bool = True
    """No attempt at it has begun anywhere."""
    has_lost: bool = False
    """It was on its way to a worker that died."""
    outcome: str = ""


@dataclass(eq=False)
class Prompt:
    """What an engine has to compute."""

    job: Job
    attempt: int
    frontend: "Frontend"
    left: int


class Worker:
    """A sidecar and its engine."""

    def __init__(self, crowd: "Crowd", name: str) -> None:
        self.crowd, self.world, self.name = crowd, crowd.world, name
        self.admission = crowd.admission_type()
        self.says_slots = crowd.world.chance(0.7)
        self.latency_s = crowd.world.random.choice((0.0005, 0.002, 0.01))
        self.late_until = 0.0
        self.engine = 0
        self.is_up = False
        self.slot = 0
        self.steps = 0
        self.load: worker_pb2.LoadReport | None = None
        self.unread: dict[int, Prompt] = {}
        self.queued: dict[int, Prompt] = {}
        self.idle_since = 0.0
        self._last_due = 0.0
        self._num_planned = 0
        self._is_resting = False
        self.boot()

    @property
    def life(self) -> Life:
        return Life(self.name, 1, self.engine)

    @property
    def num_tokens(self) -> int:
        """All that it was given and has not computed."""
        return sum(p.left for p in (*self.unread.values(), *self.queued.values()))

    def boot(self) -> None:
        self.engine += 1
        self.is_up, self.idle_since = True, self.world.now
        description = worker_pb2.EngineDescription(block_size=16, prefill_tokens_max=BATCH)
        self.admission.up(description)
        self.steps, self.load = 0, None
        self.plan_step(STEP_S)
        for frontend in self.crowd.frontends:
            self.welcome(frontend)

    def welcome(self, frontend: "Frontend") -> None:
        self.admission.told(frontend.name, Told(THRESHOLDS))
        self.tell(frontend.hear_up, self, self.life)

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """Have a frontend hear it, in order."""
        due = max(self._last_due, self.late_until, self.world.now + self.latency_s)
        self._last_due = due
        self.world.at(due, what, *args)

    def start(self, frontend: "Frontend", job: Job, attempt: int, life: Life, is_new: bool) -> None:
        if not self.is_up or life != self.life:
            self.tell(frontend.hear_lost, job, attempt, False)
            return
        if is_new:
            had = self.num_tokens
            busy = self.admission.reason_to_refuse(
                frontend.name, job.tenant, job.num_tokens, self.world.now
            )
            if busy is not None:
                self.crowd.seen[Event.REFUSED] += 1
                load = self.admission.load(self.load, busy)
                self.tell(frontend.hear_refused, self, job, attempt, life, load)
                return
            if had + job.num_tokens > LIMIT + BATCH:
                raise Violation(
                    f"{job.num_tokens} tokens to {self.name}, which has {had} of {LIMIT}"
                )
            self.crowd.seen[Event.PASSED] += had > LIMIT
        self.slot += 1
        job.slot = self.slot
        self.unread[self.slot] = Prompt(job, attempt, frontend, job.num_tokens)
        self.admission.began(self.slot, job.num_tokens, job.tenant, self.world.now)
        self.world.after(0.001, self.read, self.engine)

    def abort(self, slot: int, job: Job, attempt: int) -> None:
        prompt = self.unread.get(slot) or self.queued.get(slot)
        if prompt is not None and prompt.job is job and prompt.attempt == attempt:
            self.unread.pop(slot, None)
            self.queued.pop(slot, None)
            self.admission.over(slot)

    def read(self, engine: int) -> None:
        """The engine reads one of those that wait to be read."""
        if engine == self.engine and self.is_up and self.unread:
            slot = min(self.unread)
            self.queued[slot] = self.unread.pop(slot)
            if self._is_resting:
                self.plan_step(STEP_S)

    def plan_step(self, delay_s: float) -> None:
        self._num_planned += 1
        self._is_resting = delay_s > STEP_S
        self.world.after(delay_s, self.step, self._num_planned)

    def step(self, number: int) -> None:
        if number != self._num_planned or not self.is_up or self.crowd.is_over:
            return
        room, has_step = BATCH, bool(self.queued)
        for slot, prompt in list(self.queued.items()):
            done = min(room, prompt.left)
            room -= done
            prompt.left -= done
            if not prompt.left:
                del self.queued[slot]
                self.admission.computed(slot)
                self.admission.over(slot)
                self.tell(prompt.frontend.hear_done, prompt.job, prompt.attempt)
        if has_step:
            self.steps += 1
            self.idle_since = self.world.now
        if self.unread:
            self.idle_since = self.world.now
        load = self.load = worker_pb2.LoadReport(engine_steps_total=self.steps)
        load.ranks.add(prefill_tokens_queued=sum(p.left for p in self.queued.values()))
        seen = min(self.unread, default=self.slot + 1) - 1
        self.admission.reported(load, seen if self.says_slots else 0, self.world.now)
        self.admission.check()
        for frontend in self.crowd.frontends:
            self.tell(frontend.hear_load, self, self.life, load)
        self.plan_step(STEP_S if self.queued or self.unread or has_step else REST_S)

    def crash(self) -> None:
        if not self.is_up:
            return
        self.is_up = False
        gone = [*self.unread.values(), *self.queued.values()]
        for slot in (*self.unread, *self.queued):
            self.admission.over(slot)
        self.unread.clear()
        self.queued.clear()
        for frontend in self.crowd.frontends:
            self.tell(frontend.hear_down, self)
        for prompt in gone:
            has_begun = prompt.left < prompt.job.num_tokens  # As if it had said a token.
            self.tell(prompt.frontend.hear_lost, prompt.job, prompt.attempt, has_begun)
        self.world.after(self.world.random.uniform(0.1, 1.5), self.boot)


class Frontend:
    """The line before the workers, and who stands in it."""

    def __init__(self, crowd: "Crowd", name: str) -> None:
        self.crowd, self.world, self.name = crowd, crowd.world, name
        self.limits = crowd.limits
        self.queue = crowd.queue_type(self.limits, Random(1))
        self.shedder = Shedder(THRESHOLDS, Random(1), prefill_tokens_per_s=BATCH / STEP_S)
        self.views: dict[str, WorkerView] = {}
        self.homeless: list[Job] = []
        """Jobs that lost their worker while there was none."""

    # Workers.

    def hear_up(self, worker: Worker, life: Life) -> None:
        if worker.life == life:
            view = WorkerView(life, MODEL, NATIVE, 16, 100_000, prefill_tokens_max=BATCH)
            self.views[worker.name] = view
            homeless, self.homeless = self.homeless, []
            for job in homeless:
                self.resume(job)
            self.queue.changed()
            self.give_turns()

    def hear_down(self, worker: Worker) -> None:
        self.views.pop(worker.name, None)

    def hear_load(self, worker: Worker, life: Life, load: worker_pb2.LoadReport) -> None:
        view = self.views.get(worker.name)
        if view is not None and view.life == life:
            view.reported(rank_states(load))
            self.shedder.reported(life, load, self.world.now)
            self.queue.changed()
            self.give_turns()

    # Jobs.

    def arrive(self, job: Job) -> None:
        """A client asks, perhaps again."""
        now = self.world.now
        if job.outcome:
            return
        job.num_calls += 1
        if job.num_calls > CALLS_MAX:
            raise Violation(f"{job.name} was sent away {CALLS_MAX} times")
        is_back = job.told_at is not None and job.told_at <= now <= job.told_at + PROMISE_GRACE_S
        self.crowd.seen[Event.CAME_BACK] += is_back
        job.came_at = now
        arrival = self.arrival(job)
        if not self.queue.has_line(MODEL) and self.has_room():
            self.queue.let_in(arrival, now)
            self.place(job)
            return
        refusal, displaced = self.queue.offer(job, arrival, now, rate_hint=self.rate())
        for other, reason in displaced:
            self.crowd.seen[Event.DISPLACED] += 1
            self.send_away(other, reason)
        if refusal is not None:
            if is_back and job.is_promised and refusal.limit in {Limit.WAIT, Limit.EARLY}:
                raise Violation(f"{job.name} came when it was told, and was refused: {refusal}")
            self.send_away(job, refusal)
            return
        self.crowd.seen[Event.WAITED] += 1
        self.queue.check_all()
        self.expire_in_time()
        self.give_turns()

    def arrival(self, job: Job) -> Arrival:
        deadline = job.came_at + 100.0
        return Arrival(MODEL, job.tenant, job.name, job.priority, job.num_tokens, deadline)

    def send_away(self, job: Job, refusal: Refusal) -> None:
        if job.has_lost:
            raise Violation(f"{job.name} lost its worker, and was sent away: {refusal}")
        self.crowd.seen[Event.SENT_AWAY] += 1
        if refusal.retry_after_s <= 0:
            raise Violation(f"{job.name} was told to come back at once")
        job.told_at = self.world.now + refusal.retry_after_s
        job.is_promised = refusal.retry_after_s < (1 - RETRY_SPREAD) * PROMISE_S_MAX
        self.world.at(job.told_at + 0.001, self.arrive, job)

    def has_room(self) -> bool:
        return not self.shedder.busy(MODEL, self.views.values())

    def rate(self) -> float:
        return self.shedder.prefill_rate(self.views.values())

    def give_turns(self) -> None:
        """Let in whoever has a turn."""
        if self.crowd.is_over:
            return
        due = self.queue.deadline()
        if due is not None and due <= self.world.now:
            self.expire()
        tried: set[str] = set()
        has_called = False
        while self.views and self.queue.has_line(MODEL):
            first = self.queue.first(MODEL)
            if first is None:
                break
            if not self.has_room():
                if first[1] in tried or self.crowd.is_computing(self, first[1]):
                    break
                tried.add(first[1])
            job = self.queue.next(MODEL, self.world.now)
            assert job is not None
            self.queue.settled(job, self.world.now)
            self.place(job)
            has_called = True
        if has_called:
            self.queue.check_all()

    def place(self, job: Job) -> None:
        """It goes to a worker, if there is one."""
        if job.outcome:
            raise Violation(f"{job.name} has ended, and was let in")
        need = Need(MODEL, job.num_tokens)
        view = choose(
            self.views.values(),
            need,
            is_able=lambda _: True,
            block_hashes=lambda _: (),
            is_busy=self.shedder.is_busy,
        )
        if view is None:
            if job.is_new:
                self.wait_again(job)
            else:
                self.homeless.append(job)
            return
        job.attempt += 1
        job.worker = self.crowd.workers[view.life.worker_id]
        view.placed(job.num_tokens, 0)
        latency_s = job.worker.latency_s
        self.world.after(latency_s, job.worker.start, self, job, job.attempt, view.life, job.is_new)

    def hear_refused(
        self, worker: Worker, job: Job, attempt: int, life: Life, load: worker_pb2.LoadReport
    ) -> None:
        if job.attempt != attempt or job.outcome:
            return
        if not job.is_new:
            raise Violation(f"{job.name} had begun, and was refused")
        view = self.views.get(worker.name)
        if view is not None and view.life == life:
            view.reported(rank_states(load))
            view.crowded()
        job.worker = None
        self.wait_again(job)
        if self.has_room():
            self.give_turns()

    def hear_lost(self, job: Job, attempt: int, has_begun: bool) -> None:
        if job.attempt != attempt or job.outcome:
            return
        job.worker = None
        if has_begun or not job.is_new:
            job.is_new = False
            self.resume(job)
            return
        self.crowd.seen[Event.UNHEARD] += 1
        job.has_lost, job.came_at = True, self.world.now
        self.wait_again(job)
        self.give_turns()

    def wait_again(self, job: Job) -> None:
        arrival, now = self.arrival(job), self.world.now
        self.queue.come_back(job, arrival, now, since=job.came_at, is_first=job.has_lost)
        self.expire_in_time()

    def resume(self, job: Job) -> None:
        """It goes on elsewhere, whatever there is to do."""
        if not job.outcome:
            self.place(job)

    def hear_done(self, job: Job, attempt: int) -> None:
        if job.attempt == attempt and not job.outcome:
            self.crowd.end(job, "served")

    def cancel(self, job: Job) -> None:
        """Its client leaves."""
        if job.outcome:
            return
        self.crowd.seen[Event.CANCEL] += 1
        self.queue.remove(job)
        if job.worker is not None:
            worker, attempt = job.worker, job.attempt
            self.world.after(worker.latency_s, worker.abort, job.slot, job, attempt)
        self.crowd.end(job, "cancelled")

    def expire_in_time(self) -> None:
        due = self.queue.deadline()
        if due is not None:
            self.world.at(due, self.expire)

    def expire(self) -> None:
        for job, _, refusal in self.queue.expired(self.world.now, lambda _: self.rate()):
            self.crowd.seen[Event.EXPIRED] += 1
            self.send_away(job, refusal)
        waiting = (since for job, _, since in self.queue.waiting() if not job.has_lost)
        late_s = max((self.world.now - since for since in waiting), default=0.0)
        if late_s > self.limits.wait_s_max + 1e-6:
            raise Violation(f"somebody at {self.name} has waited for {late_s:.2f} s")


@dataclass
class _Load:
    """What comes."""

    until: float
    per_s: float
    tenants: list[str] = field(default_factory=list[str])


class Crowd:
    """Frontends, workers, clients, and trouble."""

    def __init__(
        self,
        seed: int,
        *,
        admission_type: "type[Admission[str]]" = Admission,
        queue_type: "type[AdmissionQueue[Job]]" = AdmissionQueue,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.world = world = World(seed, trace=trace)
        self.admission_type, self.queue_type = admission_type, queue_type
        self.seen = Counter[Event]()
        self.is_over = False
        random = world.random
        self.limits = QueueLimits(
            requests_max=random.choice((3, 10, 1000)),
            tokens_max=random.choice((1000, 1_000_000)),
            wait_s_max=random.choice((0.3, 1.0, 3.0)),
        )
        self.frontends: list[Frontend] = []
        self.workers: dict[str, Worker] = {}
        for index in range(random.choice((1, 2, 3))):
            self.frontends.append(Frontend(self, f"f{index}"))
        for index in range(random.choice((1, 2, 3))):
            self.workers[f"w{index}"] = Worker(self, f"w{index}")
        self.jobs: list[Job] = []
        tenants = random.choice((("",), ("a", "a", "a", "b"), ("a", "b", "c", "d")))
        capacity = len(self.workers) * BATCH / STEP_S / 120  # Jobs a second, about.
        level, pulse_s = random.choice((0.5, 1.0, 3.0, 6.0)), random.uniform(0.3, 1.0)
        when = 0.1
        while when < 0.1 + pulse_s and len(self.jobs) < 80:
            when += random.expovariate(level * capacity)
            job = Job(
                f"j{len(self.jobs)}",
                random.choice(tenants),
                random.choice((0, 0, 0, 0, 1, -1)),
                random.choice((16, 64, 128, BATCH)),
            )
            self.jobs.append(job)
            frontend = random.choice(self.frontends)
            world.at(when, frontend.arrive, job)
            if world.chance(0.1):
                world.at(when + random.uniform(0.0, 1.0), frontend.cancel, job)
        for _ in range(random.choice((0, 0, 1, 2, 4))):
            world.at(random.uniform(0.1, 1.5), self.strike)
        world.after(0.25, self.look)

    def strike(self) -> None:
        """Trouble at one worker."""
        worker = self.world.random.choice(list(self.workers.values()))
        if self.world.chance(0.5):
            self.seen[Event.CRASH] += bool(worker.num_tokens)
            worker.crash()
        else:
            self.seen[Event.LATE] += 1
            worker.late_until = self.world.now + self.world.random.uniform(0.05, 0.4)

    def is_computing(self, frontend: Frontend, tenant: str) -> bool:
        """Whether a prompt of the tenant is with a worker, as far as the frontend knows."""
        del frontend  # Who knows of others' too asks for less.
        return any(
            job.tenant == tenant and job.worker is not None and not job.outcome for job in self.jobs
        )

    def end(self, job: Job, outcome: str) -> None:
        if job.outcome:
            raise Violation(f"{job.name} ended twice")
        job.outcome = outcome

    def look(self) -> None:
        """No worker has nothing to do while somebody waits who could go there."""
        if self.is_over:
            return
        now = self.world.now
        waits = [
            now - since for frontend in self.frontends for _, _, since in frontend.queue.waiting()
        ]
        for worker in self.workers.values():
            idle_s = min(now - worker.idle_since, max(waits, default=0.0))
            if worker.is_up and worker.late_until < now - IDLE_S_MAX and idle_s > IDLE_S_MAX:
                raise Violation(f"{worker.name} has nothing to do for {idle_s:.2f} s")
        if all(job.outcome for job in self.jobs):
            self.is_over = True
            return
        self.world.after(0.25, self.look)

    def live(self) -> None:
        """Let everything happen, then compare."""
        world = self.world
        while world.step():
            if world.num_events > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events, {world.now:.1f} s")
        for frontend in self.frontends:
            frontend.queue.check_all()
            if frontend.queue.num_waiting or list(frontend.queue.waiting()):
                raise Violation(f"somebody is left in line at {frontend.name}")
        for worker in self.workers.values():
            worker.admission.check()
            if worker.num_tokens or worker.admission.given.prefill_tokens:
                raise Violation(f"something is left on account at {worker.name}")
