"""Workers that hold KV blocks for prompt and output in virtual time, and what they run.

They belong to the world of `pauses`, which says what happens to them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any

from frontend import stream as machine
from frontend.placement import WorkerView
from frontend.stream import Life, Stream
from sidecar.admission import Admission, Told
from tests.simulation.witness import Violation
from tests.support.vocabulary import EOS
from unbroken.outcome import FinishReason
from unbroken.thresholds import Thresholds
from unbroken.v1 import worker_pb2

if TYPE_CHECKING:
    from tests.simulation.pauses import Frontend, Pauses

BLOCK_SIZE = 8
TOTAL = 200
LIMIT = 40
"""KV blocks that a worker may hold before it is busy."""
BATCH = 256
STEP_S = 0.1
THRESHOLDS = Thresholds(kv_blocks_share=LIMIT / TOTAL)


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
        self.admission.began(self.slot, num_tokens, job.tenant, self.world.now)

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
