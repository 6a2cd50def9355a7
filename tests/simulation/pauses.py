"""Streams that hold more than workers may have, in virtual time: who is paused, and goes on when.

Clients of several priorities come at frontends at random, workers hold KV blocks for prompt and
output, and die, hang, or are heard late. What is judged is what a pause does:

- every stream that ends well has the tokens of an undisturbed run, however often it was paused;
- only streams of its own are paused by a frontend, of a strictly lower priority than somebody who
  waits there, who go on exactly, are not nearly done, and ran for a while since the last time;
- nobody is paused while those that are stopping already make enough room;
- who is paused is at no worker, and new work brings no worker beyond its threshold but by itself;
- nobody is paused more often or for longer than he may, and no new work of the same priority or a
  lower one gets in before him;
- in the end nobody is left anywhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from random import Random
from typing import Any, assert_never

from frontend import stream as machine
from frontend.admission_queue import AdmissionQueue, Arrival, QueueLimits
from frontend.busy import Shedder, has_room_for, judge_known
from frontend.placement import Need, WorkerView, choose
from frontend.preemption import NEARLY_DONE_TOKENS, Candidate, Preemption, PreemptionLimits
from frontend.stream import HALT_S_MAX, Life, Limits, State, Stream
from sidecar.admission import Admission, Told
from tests.simulation.witness import Violation
from tests.support.streams import APPENDING, NATIVE, REGENERATING, params
from tests.support.vocabulary import EOS, tokenizer
from tests.support.world import World
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, FailureKind, FinishReason
from unbroken.thresholds import RankState, Thresholds, rank_states
from unbroken.v1 import worker_pb2

BLOCK_SIZE = 8
TOTAL = 200
LIMIT = 40
"""KV blocks that a worker may hold before it is busy."""
BATCH = 256
STEP_S = 0.1
HELD_FOR_NOTHING_S = 4 * STEP_S
"""So long after something ended at a worker frontends may not know that it has room."""
EVENTS_MAX = 40_000
MODEL = "m"
THRESHOLDS = Thresholds(kv_blocks_share=LIMIT / TOTAL)
_STREAM_LIMITS = Limits(migrations_max=100, relink_s=0.0)


class Event(StrEnum):
    """What happens in these worlds; each must be seen in some."""

    PAUSED = auto()
    PAUSED_TOGETHER = auto()
    """Several made room for one."""
    PAUSED_AGAIN = auto()
    WENT_ON = auto()
    WAITED_ENOUGH = auto()
    """One went on because it had been paused for as long as anybody may."""
    COMPLETE = auto()
    """One came to its end before its worker stopped it."""
    LOST = auto()
    """A worker died instead of stopping a stream."""
    LEFT = auto()
    """A worker did not stop a stream for too long."""
    CANCELLED = auto()
    """One that was paused was cancelled."""
    REGENERATED = auto()
    """One that was paused was generated again from its first token."""
    CRASH = auto()
    HUNG = auto()
    LATE = auto()
    REFUSED = auto()
    """A worker refused what a frontend had thought to fit."""


def truth(number: int, size: int, *, is_stopped: bool) -> list[int]:
    """The output of a request: each token depends on its place and on the one before."""
    ids: list[int] = []
    last = number
    for offset in range(size):
        last = (last * 31 + offset * 7 + number) % EOS
        ids.append(last)
    if is_stopped:
        ids[-1] = EOS
    return ids


@dataclass(eq=False)
class Job:
    """One request of one choice."""

    number: int
    tenant: str
    priority: int
    size: int
    """Of its output."""
    stream: Stream
    frontend: "Frontend | None" = None
    came_at: float = 0.0
    worker: "Worker | None" = None
    view: WorkerView | None = None
    slot: int = 0
    is_new: bool = True
    """Thresholds hold for it."""
    has_lost: bool = False
    num_pauses: int = 0
    paused_at: float | None = None
    went_on_at: float | None = None
    outcome: str = ""

    @property
    def name(self) -> str:
        return f"j{self.number}"

    @property
    def num_tokens(self) -> int:
        return len(self.stream.original.prompt_token_ids) + len(self.stream.ledger)


@dataclass(eq=False)
class Running:
    """An attempt inside an engine."""

    job: Job
    epoch: int
    frontend: "Frontend"
    left: int
    """Of what it has to compute before it goes on."""
    num_tokens: int
    offset: int
    end: int
    is_aborted: bool = False

    @property
    def kv_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_SIZE)


class Worker:
    """A sidecar and its engine, which begins and ends attempts between its steps."""

    def __init__(self, world: "Pauses", name: str) -> None:
        self.pauses, self.world, self.name = world, world.world, name
        self.admission = Admission[str]()
        self.latency_s = self.world.random.choice((0.0005, 0.01))
        self.late_until = self.hung_until = 0.0
        self.engine = self.slot = self.steps = 0
        self.is_up = False
        self.running: dict[int, Running] = {}
        self.unread: dict[int, Running] = {}
        self.load: worker_pb2.LoadReport | None = None
        self.freed_at = float("-inf")
        """When something ended here that nobody had asked to make room."""
        self._last_due = 0.0
        self.boot()

    @property
    def life(self) -> Life:
        return Life(self.name, 1, self.engine)

    @property
    def all(self) -> list[Running]:
        return [*self.unread.values(), *self.running.values()]

    def boot(self) -> None:
        self.engine += 1
        self.is_up, self.steps, self.load = True, 0, None
        self.admission.up(worker_pb2.EngineDescription(block_size=BLOCK_SIZE))
        # Before its first report nobody knows how large its pool is.
        nothing = worker_pb2.LoadReport(ranks=[worker_pb2.RankLoad(kv_blocks_total=TOTAL)])
        self.admission.reported(nothing, 0, self.world.now)
        self.world.after(STEP_S, self.step, self.engine)
        for frontend in self.pauses.frontends:
            self.admission.told(frontend.name, Told(THRESHOLDS))
            self.tell(frontend.hear_up, self, self.life)

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        due = max(self._last_due, self.late_until, self.world.now + self.latency_s)
        self._last_due = due
        self.world.at(due, what, *args)

    def start(self, frontend: "Frontend", job: Job, order: machine.Start, is_new: bool) -> None:
        epoch = order.epoch
        if not self.is_up or order.life != self.life:
            self.tell(frontend.hear_lost, job, epoch)
            return
        checkpoint = order.checkpoint
        num_tokens = len(checkpoint.prompt_token_ids) + len(checkpoint.output_token_ids)
        if is_new:
            now = self.world.now
            busy = self.admission.reason_to_refuse(frontend.name, job.tenant, num_tokens, now)
            if busy is not None:
                self.pauses.seen[Event.REFUSED] += 1
                load = self.admission.load(self.load, busy)
                self.tell(frontend.hear_refused, self, job, epoch, order.life, load)
                return
            # What runs grows by a block now and then, which the last report does not show.
            had = sum(one.kv_blocks for one in self.all)
            if had > LIMIT + len(self.running):
                raise Violation(f"{job.name} was let in at {self.name}, which has {had} blocks")
        self.slot += 1
        job.slot = self.slot
        self.unread[self.slot] = Running(
            job, epoch, frontend, num_tokens, num_tokens, checkpoint.first_offset, job.size
        )
        self.admission.began(self.slot, num_tokens, job.tenant)

    def abort(self, slot: int, epoch: int) -> None:
        """The engine looks between two steps."""
        one = self.unread.get(slot) or self.running.get(slot)
        if one is not None and one.epoch == epoch:
            one.is_aborted = True

    def step(self, engine: int) -> None:
        if engine != self.engine or not self.is_up or self.pauses.is_over:
            return
        now = self.world.now
        if now < self.hung_until:
            self.world.at(self.hung_until, self.step, engine)
            return
        self.running.update(self.unread)
        self.unread.clear()
        said: dict[Frontend, list[tuple[Job, int, int, int]]] = {}
        ended: list[tuple[Running, FinishReason]] = []
        room = BATCH
        for slot, one in list(self.running.items()):
            if one.is_aborted:
                ended.append((self.end(slot), FinishReason.CANCELLED))
                continue
            if one.left:
                done = min(room, one.left)
                room -= done
                one.left -= done
                if one.left:
                    continue
                self.admission.computed(slot)
            token_id = self.pauses.truths[one.job.number][one.offset]
            said.setdefault(one.frontend, []).append((one.job, one.epoch, one.offset, token_id))
            one.offset += 1
            one.num_tokens += 1
            if one.offset == one.end:
                self.freed_at = now
                ended.append((self.end(slot), FinishReason.LENGTH))
        self.steps += 1
        load = self.load = worker_pb2.LoadReport(engine_steps_total=self.steps)
        load.ranks.add(
            kv_blocks_total=TOTAL,
            kv_blocks_used=sum(one.kv_blocks for one in self.running.values()),
            prefill_tokens_queued=sum(one.left for one in self.running.values()),
        )
        self.admission.reported(load, self.slot, now)
        self.admission.check()
        for frontend in self.pauses.frontends:
            rows = said.get(frontend, [])
            ends = [(one, why) for one, why in ended if one.frontend is frontend]
            self.tell(frontend.hear, self, self.life, rows, ends, load)
        self.world.after(STEP_S, self.step, engine)

    def end(self, slot: int) -> Running:
        self.admission.over(slot)
        return self.running.pop(slot)

    def crash(self) -> None:
        if not self.is_up:
            return
        self.is_up, self.freed_at = False, self.world.now
        gone = self.all
        for slot in (*self.unread, *self.running):
            self.admission.over(slot)
        self.unread.clear()
        self.running.clear()
        for frontend in self.pauses.frontends:
            self.tell(frontend.hear_down, self)
        for one in gone:
            self.tell(one.frontend.hear_lost, one.job, one.epoch)
        self.world.after(self.world.random.uniform(0.1, 1.5), self.boot)


class Frontend:
    """The line before the workers, who stands in it, and who is paused for whom."""

    def __init__(self, world: "Pauses", name: str) -> None:
        self.pauses, self.world, self.name = world, world.world, name
        self.queue = AdmissionQueue[Job](world.queue_limits, Random(1))
        self.book = world.book_type(world.limits)
        self.shedder = Shedder(THRESHOLDS, Random(1), prefill_tokens_per_s=BATCH / STEP_S)
        self.views: dict[str, WorkerView] = {}
        self.homeless: list[Job] = []
        self.at_work: dict[Job, None] = {}
        self._is_giving_turns = False
        self._due = float("inf")

    # Workers.

    def hear_up(self, worker: Worker, life: Life) -> None:
        if worker.life == life:
            self.views[worker.name] = WorkerView(
                life, MODEL, self.pauses.abilities, BLOCK_SIZE, 100_000, prefill_tokens_max=BATCH
            )
            self.views[worker.name].reported([RankState(kv_blocks_total=TOTAL)])
            homeless, self.homeless = self.homeless, []
            for job in homeless:
                if not job.outcome:
                    self.place(job)
            self.queue.changed()
            self.give_turns()

    def hear_down(self, worker: Worker) -> None:
        self.views.pop(worker.name, None)
        self.book.workers(view.life for view in self.views.values())

    def hear(
        self,
        worker: Worker,
        life: Life,
        rows: Sequence[tuple[Job, int, int, int]],
        ends: Sequence[tuple[Running, FinishReason]],
        load: worker_pb2.LoadReport,
    ) -> None:
        """A frame: tokens, ends, and the load after them."""
        now = self.world.now
        orders: list[tuple[Job, Sequence[machine.Command]]] = []
        for job, epoch, offset, token_id in rows:
            was_halting = job.stream.is_halting
            commands = job.stream.token(epoch, offset, token_id, now)
            self.pauses.seen[Event.COMPLETE] += was_halting and job.stream.state is State.DONE
            orders.append((job, commands))
        for one, why in ends:
            commands = one.job.stream.ended(one.epoch, one.offset, why, now=now)
            orders.append((one.job, commands))
        view = self.views.get(worker.name)
        if view is not None and view.life == life:
            view.reported(rank_states(load))
            self.shedder.reported(life, load, now)
            self.book.reported(life, load.engine_steps_total, now)
        for job, commands in orders:
            self.obey(job, commands)
        self.queue.changed()
        self.give_turns()

    # Jobs.

    def arrive(self, job: Job) -> None:
        now = self.world.now
        if job.outcome:
            return
        job.frontend, job.came_at = self, now
        assert job.stream.start(now), "it looks for a worker"
        arrival = self.arrival(job)
        if not (self.queue.has_line(MODEL) or self.is_below(job.priority)) and self.has_room():
            self.queue.let_in(arrival, now)
            self.place(job)
            return
        refusal, displaced = self.queue.offer(job, arrival, now, rate_hint=1000.0)
        for other, _ in displaced:
            self.end(other, "sent away")
        if refusal is not None:
            self.end(job, "sent away")
            return
        self.look_again()
        self.give_turns()

    def arrival(self, job: Job) -> Arrival:
        return Arrival(
            MODEL, job.tenant, job.name, job.priority, job.num_tokens, job.came_at + 100.0
        )

    def is_below(self, priority: int) -> bool:
        """Whether new work of this priority waits for who is paused."""
        paused = self.book.highest_paused(MODEL)
        return paused is not None and priority <= paused

    def has_room(self) -> bool:
        return bool(self.views) and not self.shedder.busy(MODEL, self.views.values())

    def first_priority(self, model: str) -> int | None:
        first = self.queue.first(model)
        return first[0].priority if first is not None else None

    def give_turns(self) -> None:
        if self._is_giving_turns or self.pauses.is_over:
            return
        self._is_giving_turns = True
        for job, _, _ in self.queue.expired(self.world.now, lambda _: 1000.0):
            self.end(job, "sent away")
        while (priority := self.first_priority(MODEL)) is not None:
            if self.is_below(priority) or not self.has_room():
                break
            job = self.queue.next(MODEL, self.world.now)
            assert job is not None
            self.queue.settled(job, self.world.now)
            self.place(job)
        self.look()
        self._is_giving_turns = False
        self.queue.check_all()
        self.book.check()
        self.look_again()

    def look_again(self) -> None:
        """When something is due."""
        dues = [due for due in (self.queue.deadline(), self.book.deadline()) if due is not None]
        due = min(dues, default=float("inf"))
        if due != self._due and due < float("inf"):
            self._due = due
            self.world.at(due + 1e-6, self.give_turns)

    def place(self, job: Job) -> None:
        """It has its turn."""
        if job.outcome:
            raise Violation(f"{job.name} has ended, and was placed")
        if job.is_new:
            self.pauses.check_let_in(self, job)
        view = choose(
            self.views.values(),
            Need(MODEL, job.num_tokens),
            is_able=lambda view: job.stream.way_at(view.abilities) is not ContinuationClass.NONE,
            block_hashes=lambda _: (),
            is_busy=self.shedder.is_busy,
        )
        if view is None:
            if job.is_new:
                self.wait_again(job)
            else:
                self.homeless.append(job)
            return
        stream = job.stream
        self.obey(job, stream.placed(stream.epoch, view.life, view.abilities))

    def wait_again(self, job: Job) -> None:
        self.queue.come_back(
            job, self.arrival(job), self.world.now, since=job.came_at, is_first=job.has_lost
        )

    def obey(self, job: Job, commands: Sequence[machine.Command]) -> None:
        for command in commands:
            match command:
                case machine.Start():
                    self.start(job, command)
                case machine.Place():
                    self.leave(job)
                    if job.is_new and not job.stream.ledger:
                        self.wait_again(job)
                    else:
                        job.is_new = False
                        self.place(job)
                case machine.Halt():
                    self.abort(job)
                    self.world.after(HALT_S_MAX + 1e-6, self.time_is_up, job)
                case machine.Paused():
                    self.book.stopped(job, self.world.now)
                    self.leave(job)
                    self.pauses.note_paused(job)
                case machine.Abort():
                    self.abort(job)
                case machine.Finish():
                    self.leave(job)
                    self.book.forget(job)
                    self.pauses.note_end(job)
                case machine.Ack():
                    pass
                case machine.Relink() | machine.Adopt():
                    raise AssertionError(command)
                case _:
                    assert_never(command)

    def start(self, job: Job, order: machine.Start) -> None:
        view = next(view for view in self.views.values() if view.life == order.life)
        job.worker, job.view = self.pauses.workers[order.life.worker_id], view
        view.placed(job.num_tokens, 0)
        self.at_work[job] = None
        self.book.placed(job, self.world.now)
        if job.paused_at is not None:
            is_again = job.stream.attempts[-1].way is ContinuationClass.REGENERATE
            self.pauses.seen[Event.REGENERATED] += is_again and bool(job.stream.ledger)
            job.paused_at, job.went_on_at = None, self.world.now
        latency_s = job.worker.latency_s
        self.world.after(latency_s, job.worker.start, self, job, order, job.is_new)

    def abort(self, job: Job) -> None:
        if job.worker is not None:
            worker, epoch = job.worker, job.stream.epoch
            # Not before it has been begun there.
            self.world.after(worker.latency_s, self.abort_there, worker, job, epoch)

    def abort_there(self, worker: Worker, job: Job, epoch: int) -> None:
        for slot, one in (*worker.unread.items(), *worker.running.items()):
            if one.job is job and one.epoch <= epoch:
                worker.abort(slot, one.epoch)

    def leave(self, job: Job) -> None:
        self.at_work.pop(job, None)
        self.book.left(job, self.world.now)
        if job.worker is not None and job.stream.state is not State.PAUSED:
            job.worker.freed_at = max(job.worker.freed_at, self.world.now)
        job.worker = job.view = None

    def time_is_up(self, job: Job) -> None:
        commands = job.stream.handle_timeout(self.world.now)
        self.pauses.seen[Event.LEFT] += bool(commands)
        self.obey(job, commands)

    def hear_refused(
        self, worker: Worker, job: Job, epoch: int, life: Life, load: worker_pb2.LoadReport
    ) -> None:
        view = self.views.get(worker.name)
        if view is not None and view.life == life:
            view.reported(rank_states(load))
            view.crowded()
        if not job.outcome and not job.is_new and job.stream.epoch == epoch:
            raise Violation(f"{job.name} had begun, and was refused")
        overload = FailureKind.OVERLOAD
        now = self.world.now
        self.obey(job, job.stream.refused(epoch, overload, "busy", now=now, is_busy=True))
        self.give_turns()

    def hear_lost(self, job: Job, epoch: int) -> None:
        stream = job.stream
        is_current = stream.epoch == epoch and stream.state is State.RUNNING
        self.pauses.seen[Event.LOST] += is_current and stream.is_halting
        if is_current and job.is_new and not stream.ledger:
            job.has_lost, job.came_at = True, self.world.now
        self.obey(job, stream.lost(epoch, FailureKind.CRASH, "gone", self.world.now))
        self.give_turns()

    def cancel(self, job: Job) -> None:
        if job.outcome:
            return
        self.pauses.seen[Event.CANCELLED] += job.stream.state is State.PAUSED
        self.end(job, "cancelled")
        self.give_turns()

    def end(self, job: Job, outcome: str) -> None:
        job.outcome = outcome
        self.queue.remove(job)
        if job.worker is not None:
            job.worker.freed_at = self.world.now + job.worker.latency_s + STEP_S
        self.obey(job, job.stream.cancelled(UnbrokenError(Reason.CANCELLED, outcome)))

    # Pauses.

    def look(self) -> None:
        """As `frontend.pausing`."""
        now = self.world.now
        while (key := self.book.next(self.first_priority, self.has_room_for, now)) is not None:
            self.pauses.note_went_on(self.book.went_on(key, now))
            self.obey(key, key.stream.proceed(now))
        priority = self.first_priority(MODEL)
        if priority is None:
            return
        seem_busy = self.shedder.busy(MODEL, self.views.values())
        busy = [(view, judge_known(view, THRESHOLDS)) for view, _ in seem_busy]
        chosen = self.book.whom(MODEL, priority, busy, self.candidates(), now)
        if not chosen:
            return
        self.pauses.check_choice(self, chosen)
        for one in chosen:
            commands = one.key.stream.pause(f"for priority {priority}", now)
            assert commands, "who must not be paused is no candidate"
            self.book.halting(one, MODEL)
            self.obey(one.key, commands)

    def has_room_for(self, job: Job) -> bool:
        views = self.views.values()
        return any(has_room_for(view, THRESHOLDS, job.num_tokens) for view in views)

    def candidates(self) -> Iterator[Candidate[Job]]:
        for job in list(self.at_work):
            stream, view = job.stream, job.view
            if view is None:
                continue
            way = stream.way_back
            if way is ContinuationClass.NONE:
                continue
            num_tokens = job.num_tokens
            yield Candidate(
                job,
                view.life,
                job.priority,
                num_tokens,
                -(-num_tokens // BLOCK_SIZE),
                0 if stream.is_prefilled else num_tokens,
                stream.num_left_max,
                len(stream.ledger) if way is ContinuationClass.REGENERATE else 0,
            )

    jobs: list[Job] = field(default_factory=list[Job])


class Pauses:
    """Frontends, workers, clients, and trouble."""

    def __init__(
        self,
        seed: int,
        *,
        book_type: "type[Preemption[Job]]" = Preemption,
        stream_type: type[Stream] = Stream,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.world = world = World(seed, trace=trace)
        self.book_type = book_type
        self.seen = Counter[Event]()
        self.is_over = False
        random = world.random
        self.limits = PreemptionLimits(
            is_on=True,
            run_s_min=random.choice((0.0, 0.5, 1.0)),
            pauses_max=random.choice((1, 2, 3)),
            wait_s_max=random.choice((0.7, 2.0, 8.0)),
        )
        self.queue_limits = QueueLimits(wait_s_max=random.choice((1.0, 6.0)))
        self.abilities = random.choice((NATIVE, NATIVE, APPENDING, REGENERATING))
        self.frontends: list[Frontend] = []
        self.workers: dict[str, Worker] = {}
        for index in range(random.choice((1, 1, 2))):
            self.frontends.append(Frontend(self, f"f{index}"))
        for index in range(random.choice((1, 1, 2))):
            self.workers[f"w{index}"] = Worker(self, f"w{index}")
        self.jobs: list[Job] = []
        self.truths: list[list[int]] = []
        """By number of the job."""
        when = 0.05
        for number in range(random.choice((6, 10, 16))):
            when += random.expovariate(6.0)
            size = random.choice((5, 20, 45, 60, 80))
            prompt = tuple(random.choice((8, 40, 80, 160)) * [1])
            is_stopped = world.chance(0.5)  # Before the budget is spent.
            max_tokens = size + 100 * is_stopped
            original = Checkpoint(prompt, params(max_tokens=max_tokens, temperature=1.0))
            self.truths.append(truth(number, size, is_stopped=is_stopped))
            stream = stream_type(original, tokenizer(), limits=_STREAM_LIMITS)
            priority = random.choice((0, 0, 0, -1, 1, 2))
            job = Job(number, random.choice(("a", "b")), priority, size, stream)
            self.jobs.append(job)
            frontend = random.choice(self.frontends)
            world.at(when, frontend.arrive, job)
            if world.chance(0.15):
                world.at(when + random.uniform(0.0, 4.0), frontend.cancel, job)
        for _ in range(random.choice((0, 0, 1, 2))):
            world.at(random.uniform(0.1, 5.0), self.strike)
        world.after(0.5, self.look)

    def strike(self) -> None:
        """Trouble at one worker."""
        random = self.world.random
        worker = random.choice(list(self.workers.values()))
        now = self.world.now
        match random.choice((Event.CRASH, Event.HUNG, Event.LATE)):
            case Event.CRASH:
                self.seen[Event.CRASH] += bool(worker.all)
                worker.crash()
            case Event.HUNG:
                self.seen[Event.HUNG] += 1
                worker.hung_until = now + random.choice((0.5, HALT_S_MAX + 1.0))
            case _:
                self.seen[Event.LATE] += 1
                worker.late_until = now + random.uniform(0.1, 0.6)

    # What is promised.

    def check_let_in(self, frontend: Frontend, job: Job) -> None:
        """New work does not pass who is paused."""
        for other in self.jobs:
            if (
                other.frontend is frontend
                and other.stream.state is State.PAUSED
                and other.priority >= job.priority
            ):
                raise Violation(f"{job.name} was let in before {other.name}, which is paused")

    def check_choice(self, frontend: Frontend, chosen: Sequence[Candidate[Job]]) -> None:
        """Those who are to be paused may be, and it takes all of them."""
        now = self.world.now
        highest = max(arrival.priority for _, arrival, _ in frontend.queue.waiting())
        workers = {one.key.worker for one in chosen}
        (worker,) = workers
        assert worker is not None
        for job in (one.key for one in chosen):
            if job.frontend is not frontend:
                raise Violation(f"{job.name} of another frontend is to be paused")
            if job.priority >= highest:
                raise Violation(f"{job.name} is to be paused for no higher priority")
            if job.stream.num_left_max <= NEARLY_DONE_TOKENS:
                raise Violation(f"{job.name} is nearly done")
            if job.num_pauses >= self.limits.pauses_max:
                raise Violation(f"{job.name} was paused {job.num_pauses} times")
            ran_s = now - (job.went_on_at if job.went_on_at is not None else float("-inf"))
            if ran_s < self.limits.run_s_min:
                raise Violation(f"{job.name} went on {ran_s:.2f} s ago")
        self.seen[Event.PAUSED_TOGETHER] += len(chosen) > 1
        if now < max(worker.late_until, worker.hung_until, worker.freed_at) + HELD_FOR_NOTHING_S:
            return  # The frontend cannot know what there is.
        held = sum(
            -(-job.num_tokens // BLOCK_SIZE)  # On its way there, or there.
            for other in self.frontends
            for job in other.at_work
            if job.worker is worker and not (other is frontend and job.stream.is_halting)
        )  # What other frontends have stopped is not known here.
        if held <= LIMIT:
            raise Violation(f"{len(chosen)} are to be paused at {worker.name}, which has {held}")

    def note_paused(self, job: Job) -> None:
        self.seen[Event.PAUSED] += 1
        job.num_pauses += 1
        self.seen[Event.PAUSED_AGAIN] += job.num_pauses > 1
        job.paused_at, job.is_new = self.world.now, False
        if any(one.job is job for worker in self.workers.values() for one in worker.all):
            raise Violation(f"{job.name} is paused, and at a worker")
        self.world.after(self.limits.wait_s_max + 0.01, self.check_pause, job, job.num_pauses)

    def check_pause(self, job: Job, number: int) -> None:
        """It has been paused for long enough."""
        if job.num_pauses == number and job.stream.state is State.PAUSED:
            raise Violation(f"{job.name} is still paused")

    def note_went_on(self, paused_s: float) -> None:
        is_enough = paused_s >= self.limits.wait_s_max
        self.seen[Event.WAITED_ENOUGH if is_enough else Event.WENT_ON] += 1

    def note_end(self, job: Job) -> None:
        outcome = job.stream.outcome
        assert outcome is not None
        if outcome.error is None:
            job.outcome = "served"
            if job.stream.ledger.tolist() != self.truths[job.number]:
                raise Violation(f"{job.name} is not what an undisturbed run gives")
        elif not job.outcome:
            raise Violation(f"{job.name} failed: {outcome.error}")

    def look(self) -> None:
        """Once all is over nothing happens any more."""
        for job in self.jobs:
            job.stream.check()
        if all(job.outcome for job in self.jobs):
            self.is_over = True
        else:
            self.world.after(0.5, self.look)

    def live(self) -> None:
        """Let everything happen, then compare."""
        world = self.world
        while world.step():
            if world.num_events > EVENTS_MAX:
                raise Violation(f"not over after {EVENTS_MAX} events, {world.now:.1f} s")
        for frontend in self.frontends:
            frontend.queue.check_all()
            frontend.book.check()
            if frontend.queue.num_waiting or frontend.book.num_paused or frontend.at_work:
                raise Violation(f"somebody is left at {frontend.name}")
