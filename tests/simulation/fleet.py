"""A fleet that is watched, in virtual time: the real detector, outliers, and queries of death.

The streams of `scenario` are whole and their workers simple; here it is the other way round. Jobs
only count tokens, and what is judged is who is believed to be dead, slow or deadly. Whatever a
detector says is compared with the truth, which the world knows:

- no link is given up that was neither silent nor deaf, and none without the detector's word for it;
- a link that stays silent or deaf is given up within the bound;
- no job is placed on a suspect or ejected worker while another would do;
- at most half of a fleet is ejected, and never the last worker;
- a deadly job kills no more engines than the limit, and nobody else is stopped;
- every job ends.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from random import Random
from typing import Any

from frontend import outliers
from frontend.failure_detector import DetectorLimits, FailureDetector, Liveness, Reach, Rhythm
from frontend.outliers import OutlierLimits, Outliers
from frontend.placement import Need, WorkerView, choose
from frontend.query_of_death import DEADLY, FRESH_S, Fingerprint, Queries, QueryLimits
from frontend.stream import Life
from tests.simulation.witness import Violation
from tests.support.streams import NATIVE
from tests.support.world import World
from unbroken.outcome import FailureKind

INTERVAL_S = 0.1
STEP_S = 0.05
END_S = 12.0
"""Trouble is over by then, except for what stays silent; jobs have as long again."""
EVENTS_MAX = 60_000
SILENCE_S_MIN = 0.6
"""No link may be given up for a shorter silence, whatever was learnt."""
SLACK_S = 0.5
LIMITS = DetectorLimits()


class Trouble(StrEnum):
    """What happens to a fleet."""

    STOP = auto()
    """A sidecar stands still, for a while or for ever."""
    BLIP = auto()
    """A link is silent for so short a time that nothing may follow."""
    DARK = auto()
    """Nothing passes on a link, either way."""
    DEAF = auto()
    """Nothing reaches a sidecar that is heard."""
    STANDSTILL = auto()
    """The frontend itself stands still."""
    STARVATION = auto()
    """All heartbeats of a worker are late, within bounds."""
    CRASH = auto()
    """An engine dies of itself."""
    DEADLY_JOB = auto()
    """A job kills every engine that gets far enough with it."""
    ERRORS = auto()
    """An engine fails every attempt for a while."""
    SLOW = auto()
    """An engine takes ten times as long for a step."""


# What follows from it; each must be seen in some world.
SUSPICION, DEATH, EJECTION, READMISSION, TRIAL, STOPPED = (
    "suspicion",
    "death",
    "ejection",
    "readmission",
    "trial",
    "stopped",
)


class Path:
    """One direction of a connection: in order, a little late, and held for a while at times."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last_due = 0.0
        self.held_until = 0.0
        self.held_since = 0.0

    def send(self, deliver: Callable[..., None], *args: Any) -> None:
        world = self._world
        latency_s = 0.0005 + 0.002 * world.random.random()
        self._last_due = max(self._last_due, self.held_until, world.now + latency_s)
        world.at(self._last_due, deliver, *args)

    def hold(self, duration_s: float) -> None:
        if self._world.now >= self.held_until:
            self.held_since = self._world.now
        self.held_until = max(self.held_until, self._world.now + duration_s)


@dataclass(eq=False)
class Job:
    """So many tokens to make, wherever."""

    query: Fingerprint
    num_tokens: int
    deadly_at: int | None = None
    """The engine that computes this offset dies."""
    offset: int = 0
    attempt: int = 0
    """Number of the current attempt; what others say of it is late."""
    life: Life | None = None
    started_at: float = 0.0
    lives_lost: set[Life] = field(default_factory=set[Life])
    killers: set[Fingerprint] = field(default_factory=set[Fingerprint])
    """Who killed the engines that died under it. Two of them, or one and chance, can make an
    innocent look guilty."""
    outcome: str = ""


class Worker:
    """Sidecar and engine."""

    def __init__(self, fleet: "Fleet", worker_id: str) -> None:
        self.fleet = fleet
        self.world = fleet.world
        self.worker_id = worker_id
        self.up, self.down = Path(self.world), Path(self.world)
        self.engine = 1
        self.is_serving = True
        self.jobs: dict[tuple[Job, int], int] = {}
        """Attempts that run here, and the offset of each."""
        self.stopped_since: float | None = None
        self.missed: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.late_s = 0.0
        self.fails_until = 0.0
        self.is_slow_until = 0.0
        self.sequence_seen = 0
        self.link_number = 0
        self.world.after(self.world.random.random() * INTERVAL_S, self.beat)
        self.world.after(self.world.random.random() * STEP_S, self.step)

    @property
    def life(self) -> Life:
        return Life(self.worker_id, 1, self.engine)

    def run(self, do: Callable[..., None], *args: Any) -> None:
        """Do it, unless the process stands still; then when it goes on."""
        if self.stopped_since is None:
            do(*args)
        else:
            self.missed.append((do, args))

    def stop(self, duration_s: float | None) -> None:
        if self.stopped_since is None:
            self.stopped_since = self.world.now
            if duration_s is not None:
                self.world.after(duration_s, self.go_on)

    def go_on(self) -> None:
        self.stopped_since = None
        while self.missed and self.stopped_since is None:
            do, args = self.missed.popleft()
            do(*args)

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        self.down.send(self.fleet.hear, self, self.link_number, what, args)

    def beat(self) -> None:
        if self.fleet.is_over:
            return
        late_s = self.late_s * self.world.random.random()
        self.world.after(INTERVAL_S + late_s, self.run, self.beat)
        self.tell(self.fleet.hear_heartbeat, self, self.sequence_seen)

    def hear(self, link_number: int, do: Callable[..., None], *args: Any) -> None:
        self.run(self._hear, link_number, do, args)

    def _hear(self, link_number: int, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        if link_number < self.link_number:
            return
        if link_number > self.link_number:  # A new call: what the old one carried is orphaned.
            self.link_number, self.sequence_seen = link_number, 0
            self.jobs.clear()
            self.tell(self.fleet.hear_verdict, self, self.life, self.is_serving)
        do(*args)

    def hear_heartbeat(self, sequence: int) -> None:
        self.sequence_seen = max(self.sequence_seen, sequence)

    def start(self, job: Job, attempt: int, offset: int, life: Life) -> None:
        if self.is_serving and life == self.life:
            self.jobs[job, attempt] = offset
        else:
            self.tell(self.fleet.hear_end, job, attempt, None)

    def abort(self, job: Job, attempt: int) -> None:
        self.jobs.pop((job, attempt), None)

    def step(self) -> None:
        if self.fleet.is_over:
            return
        is_slow = self.world.now < self.is_slow_until
        self.world.after(STEP_S * (10 if is_slow else 1), self.run, self.step)
        if not self.is_serving or not self.jobs:
            return
        if self.world.now < self.fails_until:
            for job, attempt in list(self.jobs):
                del self.jobs[job, attempt]
                error = FailureKind.ENGINE_ERROR
                self.tell(self.fleet.hear_end, job, attempt, error)
            return
        for (job, _), offset in list(self.jobs.items()):
            if job.deadly_at is not None and offset >= job.deadly_at:
                self.fleet.num_kills[job.query] += 1
                for other, _ in self.jobs:
                    other.killers.add(job.query)
                self.crash()
                return
        for key, offset in list(self.jobs.items()):
            self.jobs[key] = offset + 1
            if offset + 1 >= key[0].num_tokens:
                del self.jobs[key]
        self.tell(self.fleet.hear_frame, self, dict(self.jobs))

    def crash(self) -> None:
        """The engine dies: every attempt is ended, then the verdict comes, then a new engine."""
        if not self.is_serving:
            return
        self.is_serving = False
        gone, self.jobs = list(self.jobs), {}
        self.world.random.shuffle(gone)
        for job, attempt in gone:
            self.tell(self.fleet.hear_end, job, attempt, FailureKind.CRASH)
        if self.world.chance(0.5):
            self.down.hold(0.02)  # The verdict comes later than the ends.
        self.tell(self.fleet.hear_verdict, self, self.life, False)
        self.world.after(self.world.random.uniform(0.1, 1.0), self.restart)

    def restart(self) -> None:
        self.engine += 1
        self.is_serving = True
        self.run(self.tell, self.fleet.hear_verdict, self, self.life, True)


class Link:
    """The frontend's end of one call."""

    def __init__(self, fleet: "Fleet", worker: Worker, number: int) -> None:
        self.worker = worker
        self.number = number
        self.began_at = fleet.world.now
        self.is_over = False
        self.num_sent = 0
        self.beats_at = fleet.world.now
        self.sampled: tuple[float, int] | None = None
        self.detector = fleet.detector_type(LIMITS, fleet.rhythms[worker.worker_id], self.began_at)


class Fleet:
    """A frontend, workers, jobs, trouble."""

    def __init__(
        self,
        seed: int,
        *,
        detector_type: type[FailureDetector] = FailureDetector,
        outliers_type: type[Outliers] = Outliers,
        queries_type: type[Queries] = Queries,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.world = world = World(seed, trace=trace)
        self.detector_type = detector_type
        self.seen = Counter[str]()
        self.is_over = False
        random = world.random
        num_workers = random.choice((1, 2, 3, 4, 5, 6))
        names = [f"w{index}" for index in range(num_workers)]
        self.rhythms = {name: Rhythm(INTERVAL_S) for name in names}
        self.outliers = outliers_type(
            OutlierLimits(ejection_s=1.0, probe_timeout_s=1.0), Random(seed)
        )
        self.queries = queries_type(QueryLimits())
        self.num_kills = Counter[Fingerprint]()
        self.num_unseen = Counter[Fingerprint]()
        """Kills of which nobody could tell, or not whose they were."""
        self.chance_deaths: set[Life] = set()
        """Engines that died of themselves."""
        self.workers = {name: Worker(self, name) for name in names}
        self.links: dict[str, Link] = {}
        self.views: dict[str, WorkerView] = {}
        self.waiting: dict[Job, None] = {}
        self.trials: dict[Job, None] = {}
        self.asleep_until = 0.0
        self._slept: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._last_standstill = (0.0, 0.0)
        for worker in self.workers.values():
            self.connect(worker)
        self.jobs = [
            Job(Fingerprint(bytes([index])), random.choice((1, 5, 40, 80)))
            for index in range(random.choice((2, 12, 24)))
        ]
        for job in self.jobs:
            world.at(random.uniform(0.2, 6.0), self.place, job)
        for _ in range(random.choice((0, 1, 2, 3, 5))):
            world.at(random.uniform(0.5, 6.0), self.strike, random.choice(list(Trouble)))
        world.after(0.5, self.compare)
        world.at(END_S, self.heal)

    # Trouble.

    def strike(self, trouble: Trouble) -> None:
        world, random = self.world, self.world.random
        worker = random.choice(list(self.workers.values()))
        world.tell("* %s at %s", trouble, worker.worker_id)
        self.seen[trouble] += 1
        match trouble:
            case Trouble.STOP:
                worker.stop(random.choice((None, 0.3, 2.5, 4.0)))
                self.expect_death(worker, lambda: worker.stopped_since)
            case Trouble.BLIP:
                worker.down.hold(random.uniform(0.05, 0.4))
            case Trouble.DARK:
                duration_s = random.uniform(1.0, 5.0)
                worker.down.hold(duration_s)
                worker.up.hold(duration_s)
                self.expect_death(worker, lambda: self._held_since(worker.down))
            case Trouble.DEAF:
                worker.up.hold(random.uniform(1.0, 5.0))
                self.expect_death(worker, lambda: self._held_since(worker.up))
            case Trouble.STANDSTILL:
                self.stand_still(random.choice((0.07, 0.5, 3.0)))
            case Trouble.STARVATION:
                worker.late_s = 0.3
            case Trouble.CRASH:
                self.chance_deaths.add(worker.life)
                worker.crash()
            case Trouble.DEADLY_JOB:
                at = random.choice((0, 0, 3, 20))
                bad = Job(Fingerprint(b"bad at %d" % at), 80, deadly_at=at)
                self.jobs.append(bad)
                self.place(bad)
            case Trouble.ERRORS:
                worker.fails_until = world.now + random.uniform(0.1, 2.0)
            case Trouble.SLOW:
                worker.is_slow_until = world.now + random.uniform(4.0, 8.0)

    def heal(self) -> None:
        """Whoever stands still goes on, so that jobs can end."""
        for worker in self.workers.values():
            worker.late_s = 0.0
            if worker.stopped_since is not None:
                worker.go_on()

    def stand_still(self, duration_s: float) -> None:
        now = self.world.now
        self.asleep_until = max(self.asleep_until, now + duration_s)
        self._last_standstill = (now, self.asleep_until)
        self.world.at(self.asleep_until, self._wake)

    def _wake(self) -> None:
        if self.world.now < self.asleep_until:
            return
        self.asleep_until = 0.0
        slept, self._slept = list(self._slept), deque()
        if self.world.chance(0.5):  # Timers first, then what is to be read, or as it came.
            slept.sort(key=lambda one: one[0] != self.look)
        for do, args in slept:
            do(*args)

    def awake(self, do: Callable[..., None], *args: Any) -> None:
        """Do it, unless the frontend stands still; then when it goes on."""
        if self.world.now < self.asleep_until:
            self._slept.append((do, args))
        else:
            do(*args)

    def _held_since(self, path: Path) -> float | None:
        return path.held_since if self.world.now < path.held_until else None

    def expect_death(self, worker: Worker, harmed_since: Callable[[], float | None]) -> None:
        """If the harm lasts, the link that is there now must be given up within the bound."""
        link = self.links[worker.worker_id]
        since = harmed_since()
        bound_s = LIMITS.silence_max_s + 2 * INTERVAL_S + SLACK_S

        def check() -> None:
            if harmed_since() != since or link.is_over or self.is_over:
                return
            if self._last_standstill[1] > self.world.now - bound_s:
                return  # It could not know.
            self._expect(False, f"{worker.worker_id} is silent or deaf, and not given up")

        if link.detector.liveness in (Liveness.ALIVE, Liveness.SUSPECT):
            self.world.after(bound_s, check)

    # Links.

    def connect(self, worker: Worker) -> None:
        before = self.links.get(worker.worker_id)
        number = 1 if before is None else before.number + 1
        link = self.links[worker.worker_id] = Link(self, worker, number)
        self.send(link, lambda: None)  # Hello.
        self.look_later(link)

    def send(self, link: Link, do: Callable[..., None], *args: Any) -> None:
        link.worker.up.send(link.worker.hear, link.number, do, *args)

    def look_later(self, link: Link) -> None:
        now = self.world.now
        at = max(now + 0.001, min(link.beats_at, link.detector.deadline()))
        link.detector.expects_to_look(at)
        self.world.at(at, self.awake, self.look, link)

    def look(self, link: Link) -> None:
        if link.is_over or self.is_over:
            return
        now, detector = self.world.now, link.detector
        was_suspect = detector.liveness is Liveness.SUSPECT
        death = detector.judge(now)
        if death is not None:
            self.lose(link, death.failure)
            return
        if detector.liveness is Liveness.SUSPECT and not was_suspect:
            self.seen[SUSPICION] += 1
            is_there = self._held_since(link.worker.up) is None
            detector.reached(Reach.ANSWERS if is_there else Reach.UNKNOWN)
        self._show(link)
        if now >= link.beats_at:
            link.num_sent += 1
            link.beats_at = now + INTERVAL_S
            self.send(link, link.worker.hear_heartbeat, link.num_sent)
            detector.sent(link.num_sent, now)
        self.look_later(link)

    def lose(self, link: Link, failure: FailureKind) -> None:
        """The detector gave the link up."""
        worker, now = link.worker, self.world.now
        self.world.tell("%s given up: %s", worker.worker_id, failure.name)
        self.seen[DEATH] += 1
        self._expect(link.detector.liveness is Liveness.DEAD, "given up without being dead")
        harms = [
            since
            for since in (
                worker.stopped_since,
                *(
                    path.held_since
                    for path in (worker.up, worker.down)
                    if path.held_until > now - 0.5
                ),
            )
            if since is not None
        ]
        self._expect(bool(harms), f"{worker.worker_id} was healthy, and given up")
        self._expect(now - min(harms) >= SILENCE_S_MIN, f"{worker.worker_id} given up too early")
        link.is_over = True
        view = self.views.pop(worker.worker_id, None)
        self._members()
        if view is not None:
            for job in [job for job in self.jobs if job.life == view.life]:
                self.ended(job, view.life, failure)
        self.world.after(0.02, self.awake, self.connect, worker)

    def hear(
        self, worker: Worker, number: int, do: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        self.awake(self._hear, worker, number, do, args)

    def _hear(
        self, worker: Worker, number: int, do: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        link = self.links[worker.worker_id]
        if link.number != number or link.is_over or self.is_over:
            return
        if link.detector.heard(self.world.now):
            self._show(link)
        do(*args)

    def hear_heartbeat(self, worker: Worker, sequence_seen: int) -> None:
        detector = self.links[worker.worker_id].detector
        detector.heartbeat(sequence_seen, INTERVAL_S, self.world.now)

    def hear_verdict(self, worker: Worker, life: Life, is_serving: bool) -> None:
        view = self.views.get(worker.worker_id)
        if view is not None and (not is_serving or view.life != life):
            for job in [job for job in self.jobs if job.life == view.life]:
                self.ended(job, view.life, FailureKind.CRASH)
        if is_serving:
            self.views[worker.worker_id] = WorkerView(life, "m", NATIVE, 16, 4096)
        else:
            self.views.pop(worker.worker_id, None)
        self._members()

    def hear_frame(self, worker: Worker, offsets: dict[tuple[Job, int], int]) -> None:
        now, link = self.world.now, self.links[worker.worker_id]
        before, link.sampled = link.sampled, (now, len(offsets))
        if before is not None and before[1] and now - before[0] < 1.0:
            self.outliers.inter_token(worker.worker_id, now - before[0], now)
        for job in [job for job in self.jobs if job.life == worker.life]:
            offset = offsets.get((job, job.attempt))
            job.offset = job.num_tokens if offset is None else offset
            if offset is None:
                life, job.life = worker.life, None
                self.queries.left(job.query, life)
                self.queries.went_well(job.query)
                self.outliers.went_well(worker.worker_id)
                self.finish(job, "complete")
            elif self.queries.got_to(job.query, job.offset):
                # With tokens lost at its first death, even a killer gets further once.
                self.num_unseen[job.query] += QueryLimits().deaths_max - 1
                self.room()

    def hear_end(self, job: Job, attempt: int, failure: FailureKind | None) -> None:
        if job.attempt == attempt and job.life is not None:
            self.ended(job, job.life, failure)

    def _show(self, link: Link) -> None:
        view = self.views.get(link.worker.worker_id)
        if view is not None:
            view.is_suspect = link.detector.liveness is Liveness.SUSPECT

    def _members(self) -> None:
        self.outliers.members(dict.fromkeys(self.views, "m"), list(self.workers))
        self.room()

    # Jobs.

    def place(self, job: Job) -> None:
        self.awake(self._place, job)

    def _place(self, job: Job) -> None:
        now, queries = self.world.now, self.queries
        if job.outcome or job.life is not None:
            return
        if queries.stopped(job.query, now) is not None:
            self.seen[STOPPED] += 1
            self.finish(job, "stopped")
            return
        ejected = self.outliers.ejected
        for worker_id, view in self.views.items():
            view.is_ejected = worker_id in ejected
        able = [
            view for view in self.views.values() if queries.may_start(job.query, view.life, now)
        ]
        need = Need("m", 10, frozenset(job.lives_lost))
        view = choose(able, need, is_able=lambda _: True, block_hashes=lambda _: ())
        if view is None:
            if job not in self.waiting:
                self.waiting[job] = None
                self.world.after(FRESH_S, self.try_again, job)
            return
        self.waiting.pop(job, None)
        better = [one for one in able if not (one.is_suspect or one.is_ejected)]
        self._expect(
            not better or not (view.is_suspect or view.is_ejected), "placed on a suspect or outlier"
        )
        job.attempt += 1
        job.life = view.life
        job.started_at = now
        self.world.tell("%s starts at %s", job.query, view.life)
        if queries.is_suspect(job.query):
            self.seen[TRIAL] += 1
        queries.started(job.query, view.life, now)
        link = self.links[view.life.worker_id]
        self.send(link, link.worker.start, job, job.attempt, job.offset, view.life)

    def try_again(self, job: Job) -> None:
        if job in self.waiting:
            del self.waiting[job]
            self.place(job)

    def ended(self, job: Job, life: Life, failure: FailureKind | None) -> None:
        """An attempt is over before the job; None if it was refused."""
        now = self.world.now
        job.life = None
        job.lives_lost.add(life)
        is_known = self.queries.is_on_file(job.query)
        if failure is None:
            self.queries.left(job.query, life)
        else:
            is_error = failure is FailureKind.ENGINE_ERROR
            if not (is_error and is_known):
                self.obey(self.outliers.failed(life.worker_id, failure, now))
            if failure in DEADLY and not (is_error and self.outliers.fails_others(life.worker_id)):
                self.queries.died(job.query, life, failure, job.offset, now)
            else:
                self.num_unseen[job.query] += 1
                self.queries.left(job.query, life)
        self.queries.check()
        self.world.after(0.0, self.place, job)
        self.room()

    def finish(self, job: Job, outcome: str) -> None:
        self.world.tell("%s is %s", job.query, outcome)
        job.outcome = outcome
        self.waiting.pop(job, None)
        is_bad = job.deadly_at is not None
        self._expect(
            outcome != "stopped"
            or is_bad
            or len(job.killers) > 1
            or bool(job.lives_lost & self.chance_deaths),
            f"{job.query!r} was stopped for nothing",
        )
        self.room()

    def room(self) -> None:
        """Those who wait may have a worker."""
        for job in list(self.waiting):
            self.world.after(0.0, self.place, job)

    # Outliers.

    def compare(self) -> None:
        if self.is_over:
            return
        self.world.after(0.5, self.awake, self.compare)
        self.obey(self.outliers.handle_timeout(self.world.now))
        self.room()

    def obey(self, commands: list[outliers.Command]) -> None:
        for command in commands:
            self.world.tell("%s", command)
            match command:
                case outliers.Eject():
                    self.seen[EJECTION] += 1
                case outliers.Readmit():
                    self.seen[READMISSION] += 1
                case outliers.Probe(worker_id, number):
                    self.world.after(0.05, self.awake, self._probed, worker_id, number)
        self.outliers.check()
        ready = len(self.views)
        num_ejected = len(self.outliers.ejected & self.views.keys())
        self._expect(2 * num_ejected <= ready, f"{num_ejected} of {ready} workers are ejected")

    def _probed(self, worker_id: str, number: int) -> None:
        worker = self.workers[worker_id]
        is_good = worker.is_serving and worker.stopped_since is None
        is_good = is_good and self.world.now >= worker.fails_until
        self.obey(
            self.outliers.probed(
                worker_id, number, is_good=is_good, detail="as it is", now=self.world.now
            )
        )

    # The end.

    def live(self) -> None:
        """Let everything happen, then compare."""
        world = self.world
        while world.step():
            if not self.is_over and world.now > 6.5 and all(job.outcome for job in self.jobs):
                self.is_over = True
            if world.now > 4 * END_S or world.num_events > EVENTS_MAX:
                left = [job.query for job in self.jobs if not job.outcome]
                raise Violation(f"not over at {world.now:.1f} s: {left}")
        limit = QueryLimits().deaths_max
        for query, num in self.num_kills.items():
            # The same query several times at once kills several engines before the first is told.
            num_more = sum(job.query == query for job in self.jobs) - 1
            may_be = limit + num_more + self.num_unseen[query]
            self._expect(num <= may_be, f"{query!r} killed {num} engines")

    def _expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            raise Violation(f"{self.world.now:.3f}: {otherwise}")
