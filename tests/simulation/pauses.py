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
from dataclasses import field
from random import Random
from typing import assert_never

from frontend import stream as machine
from frontend.admission_queue import AdmissionQueue, Arrival, QueueLimits
from frontend.busy import Shedder, has_room_for, judge_known
from frontend.placement import Need, WorkerView, choose
from frontend.preemption import NEARLY_DONE_TOKENS, Candidate, Preemption, PreemptionLimits
from frontend.stream import HALT_S_MAX, Life, Limits, State, Stream
from tests.simulation.pausing_worker import (
    BATCH,
    BLOCK_SIZE,
    LIMIT,
    STEP_S,
    THRESHOLDS,
    TOTAL,
    Event,
    Job,
    Running,
    Worker,
    truth,
)
from tests.simulation.witness import Violation
from tests.support.streams import APPENDING, NATIVE, REGENERATING, params
from tests.support.vocabulary import tokenizer
from tests.support.world import World
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, FailureKind, FinishReason
from unbroken.thresholds import RankState, rank_states
from unbroken.v1 import worker_pb2

HELD_FOR_NOTHING_S = 4 * STEP_S
"""So long after something ended at a worker frontends may not know that it has room."""
EVENTS_MAX = 40_000
MODEL = "m"
_STREAM_LIMITS = Limits(migrations_max=100, relink_s=0.0)


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
