"""Tenants that share two workers, in virtual time: the real line, thresholds and sidecar's count.

Engines compute prompts in turns of the tenants, at most a batch a step, in the time that
`benchmarks.overload` has them take; so what is seen here is what that would show on a machine on
which nothing but engines takes time. One tenant asks for what it likes, three for half their share.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from frontend.admission_queue import AdmissionQueue, Arrival, Limit, QueueLimits, Refusal
from frontend.busy import Shedder
from frontend.placement import Need, WorkerView, choose
from frontend.stream import Life
from frontend.waiting_room import PASSING_MAX
from sidecar.admission import Admission, Told
from tests.support.streams import NATIVE
from tests.support.world import World
from unbroken.thresholds import Thresholds, rank_states
from unbroken.v1 import worker_pb2

MODEL: Final = "m"
PROMPT: Final = 512
BATCH: Final = 1024
THRESHOLDS: Final = Thresholds(prefill_tokens=1024)
STEP_S: Final = 0.004
TOKENS_PER_S: Final = 8_000
FULL_STEP_S: Final = STEP_S + BATCH / TOKENS_PER_S
NUM_WORKERS: Final = 2
CAPACITY: Final = NUM_WORKERS * BATCH / PROMPT / FULL_STEP_S
"""Requests a second."""
LATENCY_S: Final = 0.002
"""Of a message; half of it to one and a half."""
DURATION_S: Final = 40.0
WARM_S: Final = 1.0
GREEDY: Final = "greedy"


@dataclass(eq=False)
class Job:
    """One request."""

    name: str
    tenant: str
    frontend: "Frontend"
    came_at: float
    called_at: float = 0.0
    """When it came the last time."""
    served_at: float | None = None
    refusals: Counter[Limit] = field(default_factory=Counter[Limit])
    slot: int = 0
    left: int = PROMPT
    turn: tuple[float, int] = (0.0, 0)
    """Its place in the engine's line: the tenant's virtual start, and the slot."""


class Worker:
    """A sidecar and its engine."""

    def __init__(self, world: World, name: str, frontends: "list[Frontend]") -> None:
        self.world, self.frontends = world, frontends
        self.life = Life(name, 1, 1)
        self.admission = Admission[str]()
        self.admission.up(worker_pb2.EngineDescription(block_size=16, prefill_tokens_max=BATCH))
        self.queued: list[Job] = []
        self.load = worker_pb2.LoadReport()
        self.load.ranks.add()
        self.is_computing = False
        self.slot = self.num_steps = self.num_tokens = 0
        self.virtual_now = 0.0
        self.ends: dict[str, float] = {}
        for frontend in frontends:
            self.admission.told(frontend.name, Told(THRESHOLDS))
            frontend.views[name] = WorkerView(
                self.life, MODEL, NATIVE, 16, 100_000, prefill_tokens_max=BATCH
            )
            frontend.workers[name] = self

    def start(self, job: Job) -> None:
        busy = self.admission.reason_to_refuse(
            job.frontend.name, job.tenant, PROMPT, self.world.now
        )
        if busy is not None:
            self.tell(job.frontend.hear_refused, self, job, self.admission.load(self.load, busy))
            return
        self.slot += 1
        job.slot = self.slot
        self.admission.began(job.slot, PROMPT, job.tenant, self.world.now)
        if not self.queued:
            self.virtual_now = max(self.virtual_now, *self.ends.values(), 0.0)
            self.ends.clear()
        begin = max(self.virtual_now, self.ends.get(job.tenant, 0.0))
        self.ends[job.tenant] = begin + PROMPT
        job.turn = begin, job.slot
        self.queued.append(job)
        if not self.is_computing:
            self.step()

    def step(self) -> None:
        """Begin one, if there is something to compute."""
        chosen: list[tuple[Job, int]] = []
        room = BATCH
        for job in sorted(self.queued, key=lambda one: one.turn):
            if room:
                chosen.append((job, min(room, job.left)))
                room -= min(room, job.left)
                self.virtual_now = max(self.virtual_now, job.turn[0])
        self.is_computing = bool(chosen)
        if chosen:
            self.world.after(STEP_S + (BATCH - room) / TOKENS_PER_S, self.end, chosen)

    def end(self, chosen: list[tuple[Job, int]]) -> None:
        """The step is over, and its load is told with it."""
        self.num_steps += 1
        for job, num_tokens in chosen:
            job.left -= num_tokens
            self.num_tokens += num_tokens
            if not job.left:
                self.queued.remove(job)
                self.admission.computed(job.slot)
                self.admission.over(job.slot)
                self.tell(job.frontend.hear_served, job)
        self.load = worker_pb2.LoadReport(
            engine_steps_total=self.num_steps, prefill_tokens_total=self.num_tokens
        )
        self.load.ranks.add(prefill_tokens_queued=sum(job.left for job in self.queued))
        self.admission.reported(self.load, self.slot, self.world.now)
        for frontend in self.frontends:
            self.tell(frontend.hear_load, self, self.load)
        self.step()

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        self.world.after(LATENCY_S * (0.5 + self.world.random.random()), what, *args)


class Frontend:
    """The line before the workers; what the waiting room and the dispatcher do with it."""

    def __init__(self, world: World, name: str, limits: QueueLimits | None = None) -> None:
        self.world, self.name = world, name
        self.views: dict[str, WorkerView] = {}
        self.workers: dict[str, Worker] = {}
        self.queue = AdmissionQueue[Job](limits or QueueLimits(), Random(1))
        self.shedder = Shedder(THRESHOLDS, Random(1))
        self.computing = Counter[str]()
        self.tried: set[str] = set()
        """Tenants of which one was tried since the last news, though all workers are busy."""
        self.tried_before: set[str] = set()
        """Tenants of which one was tried before others that have yet to be."""

    def arrive(self, job: Job) -> None:
        job.called_at = self.world.now
        arrival = self.arrival(job)
        if not self.queue.has_line(MODEL) and self.has_room():
            self.queue.let_in(arrival, self.world.now)
            self.place(job)
            return
        refusal, displaced = self.queue.offer(job, arrival, self.world.now, rate_hint=20_000.0)
        for other, reason in displaced:
            self.send_away(other, reason)
        if refusal is not None:
            self.send_away(job, refusal)
        self.give_turns()

    def send_away(self, job: Job, refusal: Refusal) -> None:
        job.refusals[refusal.limit] += 1
        self.world.after(refusal.retry_after_s, self.arrive, job)

    def arrival(self, job: Job) -> Arrival:
        return Arrival(MODEL, job.tenant, job.name, 0, PROMPT, job.called_at + 60.0)

    def has_room(self) -> bool:
        return not self.shedder.busy(MODEL, self.views.values())

    def give_turns(self) -> None:
        for job, _, refusal in self.queue.expired(self.world.now, lambda _: 20_000.0):
            self.send_away(job, refusal)
        while (first := self.queue.first(MODEL)) is not None:
            if self.has_room():
                due = self.queue.may_go_at(MODEL, self.world.now)
                has_few = self.computing[first[1]] < NUM_WORKERS
                is_modest = has_few and self.queue.has_several_tenants(MODEL)
                if due > self.world.now and not is_modest:
                    self.world.at(due, self.give_turns)
                    return
                self.tried_before.clear()
                job = self.queue.next(MODEL, self.world.now)
            else:
                self.queue.no_room(MODEL)
                if len(self.tried) >= PASSING_MAX:
                    return
                job = self.queue.next(MODEL, self.world.now, self.may_pass_first)
                if job is None:
                    self.tried_before.clear()
                    job = self.queue.next(MODEL, self.world.now, self.may_pass)
                if job is not None:
                    self.tried.add(job.tenant)
                    self.tried_before.add(job.tenant)
            if job is None:
                return
            self.queue.settled(job, self.world.now)
            self.place(job)

    def may_pass(self, _: Job, tenant: str) -> bool:
        """Whether the first of a tenant is tried although all workers are busy."""
        return self.computing[tenant] < NUM_WORKERS and tenant not in self.tried

    def may_pass_first(self, job: Job, tenant: str) -> bool:
        """Whether that is so, and it was not tried before others were."""
        return tenant not in self.tried_before and self.may_pass(job, tenant)

    def place(self, job: Job) -> None:
        view = choose(
            self.views.values(),
            Need(MODEL, PROMPT),
            is_able=lambda _: True,
            block_hashes=lambda _: (),
            is_busy=self.shedder.is_busy,
        )
        assert view is not None
        view.placed(PROMPT, 0)
        self.computing[job.tenant] += 1
        worker = self.workers[view.life.worker_id]
        worker.tell(worker.start, job)

    def hear_refused(self, worker: Worker, job: Job, load: worker_pb2.LoadReport) -> None:
        self.computing[job.tenant] -= 1
        view = self.views[worker.life.worker_id]
        view.reported(rank_states(load))
        view.crowded()
        self.queue.come_back(job, self.arrival(job), self.world.now, since=job.called_at)
        self.give_turns()

    def hear_served(self, job: Job) -> None:
        self.computing[job.tenant] -= 1
        job.served_at = self.world.now
        self.give_turns()

    def hear_load(self, worker: Worker, load: worker_pb2.LoadReport) -> None:
        self.views[worker.life.worker_id].reported(rank_states(load))
        self.shedder.reported(worker.life, load, self.world.now)
        self.tried.clear()
        self.give_turns()


def lived(seed: int, per_s: Mapping[str, float]) -> list[Job]:
    """All jobs of a run in which tenants ask for so many a second at random moments, which are the
    same for a tenant whatever others do.
    """
    world = World(seed)
    frontends = [Frontend(world, f"f{index}") for index in range(2)]
    for index in range(NUM_WORKERS):
        Worker(world, f"w{index}", frontends)
    jobs: list[Job] = []
    for number, (tenant, rate) in enumerate(sorted(per_s.items())):
        random, when = Random(seed * 100 + number), WARM_S
        while (when := when + random.expovariate(rate)) < WARM_S + DURATION_S:
            job = Job(f"j{len(jobs)}", tenant, random.choice(frontends), when)
            jobs.append(job)
            world.at(when, job.frontend.arrive, job)
    while world.now < WARM_S + DURATION_S and world.step():
        pass
    return jobs
