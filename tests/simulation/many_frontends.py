"""More requests than two workers can compute, at any number of frontends, in virtual time.

The engine, clients and loads are those of `benchmarks.overload`, the lines, their reports to each
other and the sidecars' count are the real ones. So what is seen here is what that would show on a
machine on which nothing but engines takes time.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from typing_extensions import override

from frontend.admission_queue import QueueLimits
from sidecar.queue_reports import QueueReports
from tests.simulation.fairness import CAPACITY, MODEL, NUM_WORKERS, Frontend, Job, Worker
from tests.support.world import World
from unbroken.v1 import relay_service_pb2 as pb

WAIT_S: Final = 0.25
HEARTBEAT_S: Final = 0.1
SETTLE_S: Final = 0.5
LOOK_S: Final = 0.01
WARM: Final = 0.5, 2.0
"""So many times the capacity and for how long, so that lines and engines have been measured."""


class Teller(Frontend):
    """A frontend that tells others what stands in its line."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, QueueLimits(wait_s_max=WAIT_S))
        self.sidecars: list[Sidecar] = []
        world.after(world.random.random() * HEARTBEAT_S, self.beat)
        world.after(LOOK_S, self.look)

    def beat(self) -> None:
        for sidecar in self.sidecars:
            report = self.queue.report(MODEL, self.world.now)
            sidecar.worker.tell(sidecar.hear, self, report)
        self.world.after(HEARTBEAT_S, self.beat)

    def hear(self, reports: Sequence[pb.QueueReport]) -> None:
        self.queue.heard(MODEL, reports, self.world.now)

    def look(self) -> None:
        """See who has waited for too long."""
        self.give_turns()
        self.world.after(LOOK_S, self.look)


class Sidecar:
    """Passes on what frontends say."""

    def __init__(self, worker: Worker, frontends: Sequence[Teller]) -> None:
        self.worker, self.frontends = worker, frontends
        self.reports = QueueReports[str]()
        worker.world.after(worker.world.random.random() * HEARTBEAT_S, self.beat)

    def hear(self, frontend: Teller, report: pb.QueueReport) -> None:
        self.reports.told(frontend.name, report, frontend_id=frontend.name, incarnation=1)

    def beat(self) -> None:
        for frontend in self.frontends:
            self.worker.tell(frontend.hear, self.reports.of_others(frontend.name))
        self.worker.world.after(HEARTBEAT_S, self.beat)


class Silent(Teller):
    """Tells nobody."""

    @override
    def beat(self) -> None:
        pass


def lived(
    seed: int,
    num_frontends: int,
    loads: Sequence[tuple[float, float]],
    frontend_type: type[Teller] = Teller,
) -> list[list[Job]]:
    """The jobs of each load, which is so many times the capacity for so long, until all of them are
    served. Clients go to frontends in turn, and come back when they were told.
    """
    world = World(seed)
    frontends = [frontend_type(world, f"f{index}") for index in range(num_frontends)]
    workers = [Worker(world, f"w{index}", list(frontends)) for index in range(NUM_WORKERS)]
    sidecars = [Sidecar(worker, frontends) for worker in workers]
    for frontend in frontends:
        frontend.sidecars = sidecars
    random = Random(seed)
    lives: list[list[Job]] = []
    for level, duration_s in (WARM, *loads):
        jobs: list[Job] = []
        when = world.now
        until = when + duration_s
        while (when := when + random.expovariate(level * CAPACITY)) < until:
            frontend = frontends[len(jobs) % num_frontends]
            job = Job(f"j{len(lives)}-{len(jobs)}", "", frontend, when)
            jobs.append(job)
            world.at(when, frontend.arrive, job)
        while any(job.served_at is None for job in jobs):
            live_until(world, world.now + SETTLE_S)
        lives.append(jobs)
    return lives[1:]


def live_until(world: World, when: float) -> None:
    """Let happen what does until then."""
    while world.now < when:
        world.step()
