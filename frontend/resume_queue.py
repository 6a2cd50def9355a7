"""When a stream that lost its worker may go to another, and when new work waits for it: no I/O.

    offer ──▶ in line ──next──▶ placement ──admitted──▶ being computed ──computed──▶ forgotten
      │          ▲                  │ no worker that has room is able
      │          └───passed_over────┘
      └──▶ refused: the fleet has just lost much, or the wait would be too long

A worker's death moves all its streams at once, and each has to be computed again from its first
token. So resumes and retries have one budget on every surviving worker, counted in prompt tokens
that are not cached there:

- *Window*: what was admitted and is not computed yet is at most one burst, or one stream. A burst
  is what prolongs a step by no more than its own length, and some thousand tokens in any case, so
  that few or cheap streams pass without delay.
- *Pace*: bursts are paid back at a share of the prefill rate that the worker was measured at, and
  what other frontends send there meanwhile is paid from the same purse.
- *Turn*: whoever has had nothing there for a second may send one stream, whatever others send.

Within a priority the least work goes first, and nobody is overtaken for long. The first in line
keeps the workers that it waits for, so that small streams do not pass it for ever. While somebody
waits to resume, new work shares the budget and gets a stated part of it; what stands in line then
goes at the same pace. Else new work is not held back at all.

A large part of a fleet that dies at once is a *fleet loss*: until its streams have found a place,
new work is refused, with the time that it will take.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, auto
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from frontend.placement import WorkerView, standing
from frontend.step_cost import StepCost
from frontend.stream import Life
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import worker_pb2

if TYPE_CHECKING:
    from random import Random

STEP_STRETCH: Final = 1.0
"""A burst prolongs a step by so many times its length."""
IDLE_BURST_S: Final = 1.0
"""A worker with nothing to do has no streams to protect: it takes so many seconds of prefill."""
BURST_MAX: Final = 16
"""A burst is never more than so many times the least one, however fast a worker seems to be."""
TURN_S: Final = 1.0
FLEET_WINDOW_S: Final = 10.0
"""Workers lost within so long are lost at once."""
OVERTAKING_TOKENS_PER_S: Final = 10_000
"""Who comes so much later is overtaken no more by a stream with so many tokens less to compute."""
RETRY_AFTER_S_MIN: Final = 0.1
RETRY_SPREAD: Final = 0.5
"""Those who are refused are told to come back over so much longer a time, not all at one moment."""

K = TypeVar("K", bound=Hashable)


class Work(IntEnum):
    """Whose prompt is to be computed. Integers, because their hashes cost nothing."""

    RESUME = auto()
    """A stream that has output or an attempt behind it."""
    NEW = auto()


_NOBODY_SERVED: Final = MappingProxyType(dict.fromkeys(Work, 0.0))


@dataclass(frozen=True, slots=True)
class ResumeLimits:
    """How much recomputing survivors bear."""

    is_on: bool = True
    """Without it, everybody goes to any worker at once, first come first served."""
    share: float = 0.5
    """Of its measured prefill rate that a worker gives while streams wait to resume."""
    new_work_share: float = 0.2
    """Of that, for new work."""
    burst_tokens: int = 4096
    """A burst is never smaller."""
    prefill_tokens_per_s: float = 20_000.0
    """Of a worker that was not measured yet."""
    fleet_loss_share: float = 0.5
    """More than this part of a model's workers lost at once is a fleet loss."""
    waiting_max: int = 16_384
    """In each line; more are refused."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What waits: one stream's need of a worker."""

    model: str
    work: Work
    priority: int
    num_tokens: int
    """To compute before the next one comes: prompt and delivered output."""
    give_up_at: float
    """When its client or its placement no longer waits, monotonic seconds."""
    avoid: frozenset[Life] = frozenset()
    """Lives to be taken only if there is no other."""
    cached: Mapping[Life, int] = field(default_factory=dict[Life, int])
    """Tokens of those that a worker has in its prefix cache, when the ticket was made."""
    is_let_in: bool = False
    """A choice of a request whose first one got in: it is not refused in part."""

    def price_at(self, life: Life) -> int:
        """Tokens that have to be computed there."""
        return max(1, self.num_tokens - self.cached.get(life, 0))

    @property
    def price(self) -> int:
        """The same, where it is least."""
        return max(1, self.num_tokens - max(self.cached.values(), default=0))


@dataclass(frozen=True, slots=True)
class Turn(Generic[K]):
    """Who may be placed now, and where."""

    key: K
    lives: frozenset[Life]


_Order = tuple[int, float, int]
"""Negated priority, work, number of arrival. Lower goes first; no two are equal."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[K]):
    """A ticket in line."""

    key: K
    ticket: Ticket
    order: _Order
    since: float
    unable: set[Life]
    """Workers that can't take it, or had room and did not."""


@dataclass(slots=True)
class _Worker:
    """What is known of a worker's prefill."""

    view: WorkerView
    limits: ResumeLimits
    cost: StepCost = field(default_factory=StepCost)
    is_idle: bool = False
    outstanding: int = 0
    """Tokens in the window."""
    debt: float = 0.0
    """Tokens admitted that the pace has not paid back, as of"""
    paid_at: float = 0.0
    admitted_at: float = float("-inf")
    """When the last ticket that fills the window was admitted."""
    tokens_sent: int = 0
    """Admitted from here, ever."""
    foreign: int | None = None
    """Prefill of others, ever: computed and queued in all, less ours."""
    last_report: bytes = b""

    @property
    def rate(self) -> float:
        """Prompt tokens that it computes in a second."""
        return self.cost.prefill_tokens_per_s or self.limits.prefill_tokens_per_s

    @property
    def pace(self) -> float:
        """Prompt tokens a second that it takes while streams wait."""
        return self.rate if self.is_idle else self.limits.share * self.rate

    @property
    def burst(self) -> float:
        """Prompt tokens that it takes at once."""
        seconds = IDLE_BURST_S if self.is_idle else STEP_STRETCH * (self.cost.step_s or 0.0)
        least = self.limits.burst_tokens
        return max(least, min(seconds * self.rate, least * BURST_MAX))

    def pay(self, now: float) -> None:
        """Time passed."""
        if self.debt:
            self.debt = max(0.0, self.debt - (now - self.paid_at) * self.pace)
        self.paid_at = now

    def room_at(self, price: int, now: float) -> float:
        """When it has room for so many tokens; infinity if something has to happen first."""
        self.pay(now)
        burst = self.burst
        if self.outstanding and self.outstanding + price > burst:
            return float("inf")
        allowed = max(0.0, burst - price)  # What is larger than a burst goes when all is paid.
        if self.debt <= allowed:
            return now
        due = now + (self.debt - allowed) / self.pace
        if not self.outstanding:
            due = min(due, max(now, self.admitted_at + TURN_S))
        return due


@dataclass(slots=True)
class _Computing:
    """An attempt whose prompt a worker has not computed yet, as far as we know."""

    worker: _Worker
    price: int
    is_counted: bool
    """It fills the window; new work that nobody held back does not."""
    since: float


class _Fleet(Generic[K]):
    """The workers of one model, and those that want one."""

    def __init__(self, is_able: Callable[[K, WorkerView], bool]) -> None:
        self._is_able = is_able
        self.ready: dict[Life, _Worker] = {}
        self.lines: dict[Work, list[tuple[_Order, _Entry[K]]]] = {work: [] for work in Work}
        self.tokens_waiting: dict[Work, int] = dict.fromkeys(Work, 0)
        self.served: dict[Work, float] = dict.fromkeys(Work, 0.0)
        """Tokens admitted while both lines wanted them, over each one's share."""
        self.sizes: deque[tuple[float, int]] = deque()
        """How many workers were ready, and since when."""
        self.peak_of_loss: int | None = None
        """During a fleet loss: how many there were before it."""
        self.is_holding = False
        """As of `judge_holding`: new work stands in line."""

    @property
    def is_empty(self) -> bool:
        return not (self.ready or any(self.lines.values()))

    def unable(self, key: K, ticket: Ticket) -> set[Life]:
        """Workers that can't take it. For new work it turns out when it has its turn."""
        if ticket.work is Work.NEW:
            return set()
        return {life for life, one in self.ready.items() if not self._is_able(key, one.view)}

    def able(self, entry: _Entry[K]) -> set[Life]:
        """Workers that it may be placed on, as far as is known."""
        able = self.ready.keys() - entry.unable
        if len(able) < 2:
            return able
        avoid = entry.ticket.avoid
        ranks = {life: standing(self.ready[life].view, avoid) for life in able}
        best = min(ranks.values())
        return {life for life, rank in ranks.items() if rank == best}

    def changed(self, ready: dict[Life, _Worker], now: float) -> None:
        """These take work from now on."""
        if len(self.ready) != len(ready):
            self.sizes.append((now, len(ready)))
            while len(self.sizes) > 1 and self.sizes[1][0] <= now - FLEET_WINDOW_S:
                self.sizes.popleft()
        self.ready = ready
        if not ready:
            self.is_holding = False  # Where there is no room, none is kept for anybody.
        for line in self.lines.values():
            for _, entry in line:
                entry.unable = self.unable(entry.key, entry.ticket)

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits to resume on a worker that is there."""
        return self.has_able(Work.RESUME)

    def judge_holding(self) -> bool:
        """Whether new work stands in line: while somebody waits to resume, and until those who were
        held back meanwhile have had their turns. Else they would all go at once."""
        if self.is_contended:
            self.is_holding = True
        elif self.is_holding:
            self.is_holding = self.has_able(Work.NEW)
        return self.is_holding

    def has_able(self, work: Work) -> bool:
        ready = self.ready.keys()
        return any(not ready <= entry.unable for _, entry in self.lines[work])

    def in_turn(self) -> Iterator[_Entry[K]]:
        """All that wait, in the order of their turns."""
        first, second = Work.RESUME, Work.NEW
        if self.served[second] < self.served[first]:
            first, second = second, first
        for work in (first, second):
            if work is Work.NEW and self.peak_of_loss is not None:
                continue
            yield from (entry for _, entry in self.lines[work])


class ResumeQueue(Generic[K]):
    """The budget of all resumes and retries of one frontend, and the lines before it.

    Times are monotonic seconds. `next` is asked, and obeyed with `admitted` or `passed_over`, until
    it returns None; and again after every event, and at `deadline`.
    """

    def __init__(
        self, limits: ResumeLimits, random: "Random", is_able: Callable[[K, WorkerView], bool]
    ) -> None:
        """`is_able` tells whether a stream that resumes could go on at a worker."""
        self._is_able = is_able
        self._limits = limits
        self._random = random
        self._fleets: dict[str, _Fleet[K]] = {}
        self._workers: dict[Life, _Worker] = {}
        self._entries: dict[K, _Entry[K]] = {}
        self._computing: dict[K, _Computing] = {}
        self._num_offered = 0
        self._due = float("inf")

    # Questions.

    @property
    def num_waiting(self) -> int:
        """Streams in line."""
        return len(self._entries)

    @property
    def num_resumes_waiting(self) -> int:
        """Those of them that resume."""
        return sum(len(fleet.lines[Work.RESUME]) for fleet in list(self._fleets.values()))

    @property
    def tokens_waiting(self) -> int:
        """Prompt tokens of the resumes in line."""
        return sum(fleet.tokens_waiting[Work.RESUME] for fleet in list(self._fleets.values()))

    @property
    def tokens_outstanding(self) -> int:
        """Prompt tokens that fill windows."""
        return sum(worker.outstanding for worker in list(self._workers.values()))

    @property
    def num_fleet_losses(self) -> int:
        """Models whose new work is refused."""
        return sum(fleet.peak_of_loss is not None for fleet in list(self._fleets.values()))

    def outstanding_at(self, life: Life) -> int:
        """Prompt tokens that fill one window."""
        worker = self._workers.get(life)
        return worker.outstanding if worker is not None else 0

    def cost_at(self, life: Life) -> StepCost | None:
        """What steps cost there, as far as that was measured; None if it is not known at all."""
        worker = self._workers.get(life)
        return worker.cost if worker is not None else None

    def price_of(self, key: K) -> int:
        """Prompt tokens of an attempt that is being computed."""
        return self._computing[key].price

    def burst_of(self, life: Life) -> float:
        """How many that may be, unless it is one stream."""
        return self._workers[life].burst

    def detail(self, key: K) -> str:
        """What a stream in line waits for, for people; empty if it is not in line."""
        entry = self._entries.get(key)
        if entry is None:
            return ""
        fleet = self._fleets[entry.ticket.model]
        if not fleet.able(entry):
            return "no worker"
        line = fleet.lines[entry.ticket.work]
        place = bisect_left(line, entry.order, key=lambda item: item[0])
        name = "resume queue" if entry.ticket.work is Work.RESUME else "held back by resumes"
        return f"{name}: {place} before it, {entry.ticket.price} tokens to compute"

    def holds_new_work(self, model: str) -> bool:
        """Whether new work that was offered waits here, or would be refused."""
        fleet = self._fleets.get(model)
        return fleet is not None and (fleet.peak_of_loss is not None or fleet.has_able(Work.NEW))

    def waiting(self) -> Iterator[tuple[K, Ticket, float]]:
        """Who is in line, for what, and since when."""
        for entry in self._entries.values():
            yield entry.key, entry.ticket, entry.since

    def computing(self) -> Iterator[tuple[K, Life, int, float]]:
        """Who is on a worker's account, on whose, with how many prompt tokens, and since when."""
        for key, one in self._computing.items():
            yield key, one.worker.view.life, one.price, one.since

    def deadline(self) -> float | None:
        """When `next` may have somebody though nothing happened."""
        return self._due if self._due < float("inf") else None

    # Events.

    def offer(self, key: K, ticket: Ticket, now: float) -> UnbrokenError | None:
        """A stream wants a worker: it stands in line, or is refused."""
        assert key not in self._entries, "a stream stands in line once"
        fleet = self._fleet(ticket.model)
        line = fleet.lines[ticket.work]
        error = self._reason_to_refuse(fleet, ticket, now)
        if error is not None:
            return error
        self._num_offered += 1
        work = 0.0
        if ticket.work is Work.RESUME and self._limits.is_on:
            work = ticket.price + now * OVERTAKING_TOKENS_PER_S
        order = (-ticket.priority if self._limits.is_on else 0, work, self._num_offered)
        entry = _Entry(key, ticket, order, now, fleet.unable(key, ticket))
        if not line:  # Who wanted nothing has saved nothing.
            if any(fleet.lines.values()):
                fleet.served[ticket.work] = max(fleet.served.values())
            else:
                fleet.served.update(_NOBODY_SERVED)
        insort(line, (order, entry))
        self._entries[key] = entry
        fleet.tokens_waiting[ticket.work] += ticket.price
        return None

    def cancel(self, key: K) -> None:
        """A stream wants no worker any more. Idempotent."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        fleet = self._fleets[entry.ticket.model]
        line = fleet.lines[entry.ticket.work]
        index = 0
        if line[0][1] is not entry:  # Mostly it is who has had his turn.
            index = bisect_left(line, entry.order, key=lambda item: item[0])
        assert line[index][1] is entry, "a line is in order"
        del line[index]
        fleet.tokens_waiting[entry.ticket.work] -= entry.ticket.price

    def next(self, now: float) -> Turn[K] | None:
        """Who may be placed now, if anybody."""
        self._due = float("inf")
        if not self._entries:
            for fleet in self._fleets.values():
                fleet.peak_of_loss = None  # Whoever asks next whether new work may come is told.
            return None
        for fleet in self._fleets.values():
            turn = self._next_of(fleet, now)
            if turn is not None:
                return turn
        return None

    def admitted(self, key: K, life: Life, now: float) -> float:
        """It was placed, as `next` said, and its attempt begins; returns how long it waited."""
        entry = self._entries[key]
        assert key not in self._computing, "its last attempt has ended"
        ticket = entry.ticket
        fleet, worker = self._fleets[ticket.model], self._workers[life]
        is_holding = self._limits.is_on and fleet.is_holding  # As `next` has just judged.
        is_counted = self._limits.is_on and (is_holding or ticket.work is Work.RESUME)
        self.cancel(key)
        price = ticket.price_at(life)
        self._computing[key] = _Computing(worker, price, is_counted, now)
        worker.tokens_sent += price
        if is_counted:
            worker.pay(now)
            worker.debt += price
            worker.outstanding += price
            worker.admitted_at = now
        if is_holding:
            share = self._limits.new_work_share
            share = share if ticket.work is Work.NEW else 1 - share
            fleet.served[ticket.work] += price / max(share, 1e-3)
        return now - entry.since

    def passed_over(self, key: K, lives: Iterable[Life]) -> None:
        """None of the workers that have room can take it; others may, some time."""
        self._entries[key].unable.update(lives)

    def computed(self, key: K) -> None:
        """Its prompt is computed, or its attempt is over. Idempotent."""
        computing = self._computing.pop(key, None)
        if computing is None or not computing.is_counted:
            return
        computing.worker.outstanding -= computing.price

    def workers(self, views: Iterable[WorkerView], now: float) -> None:
        """All workers that are known now; what could not be placed on some may be, from now on."""
        known: set[Life] = set()
        ready: dict[str, dict[Life, _Worker]] = {model: {} for model in self._fleets}
        for view in sorted(views, key=lambda view: view.life):
            known.add(view.life)
            worker = self._workers.get(view.life)
            if worker is None or worker.view is not view:
                worker = self._workers[view.life] = _Worker(view, self._limits, paid_at=now)
            if view.is_ready:
                ready.setdefault(view.model, {})[view.life] = worker
        for life in self._workers.keys() - known:
            del self._workers[life]
        for model, workers in ready.items():
            fleet = self._fleet(model)
            fleet.changed(workers, now)
            if fleet.is_empty:
                del self._fleets[model]

    def reported(self, life: Life, load: worker_pb2.LoadReport, now: float) -> None:
        """A worker told its load."""
        worker = self._workers.get(life)
        if worker is None:
            return
        content = load.SerializeToString(deterministic=True)
        if content == worker.last_report:
            return  # Heartbeats repeat what is known.
        worker.last_report = content
        worker.pay(now)
        worker.cost.reported(load)
        worker.is_idle = not any(
            rank.requests_running or rank.requests_waiting for rank in load.ranks
        )
        if not load.prefill_tokens_total:
            return  # It does not say, or has done nothing.
        queued = sum(rank.prefill_tokens_queued for rank in load.ranks)
        foreign = load.prefill_tokens_total + queued - worker.tokens_sent
        if worker.foreign is None:
            worker.foreign = foreign
        growth = foreign - worker.foreign
        worker.foreign = max(worker.foreign, foreign)
        if growth > 0 and any(
            life in fleet.ready and fleet.lines[Work.RESUME] for fleet in self._fleets.values()
        ):
            # Others resume there too. It is bounded, so that what they did is not held against us
            # for ever.
            debt_max = worker.burst + worker.pace * TURN_S
            worker.debt = max(worker.debt, min(worker.debt + growth, debt_max))

    def check(self) -> None:
        """Assert what is always true."""
        for fleet in self._fleets.values():
            for work, line in fleet.lines.items():
                orders = [order for order, _ in line]
                assert orders == sorted(orders), "a line is in order"
                waiting = sum(entry.ticket.price for _, entry in line)
                assert waiting == fleet.tokens_waiting[work], "what waits is counted"
        lines = [line for fleet in self._fleets.values() for line in fleet.lines.values()]
        assert len(self._entries) == sum(map(len, lines)), "who waits stands in one line"
        counted = [one for one in self._computing.values() if one.is_counted]
        for worker in self._workers.values():
            window = [one.price for one in counted if one.worker is worker]
            assert worker.outstanding == sum(window), "windows are filled by what is computed"
            assert worker.debt >= 0

    # Inside.

    def _fleet(self, model: str) -> _Fleet[K]:
        fleet = self._fleets.get(model)
        if fleet is None:
            fleet = self._fleets[model] = _Fleet(self._is_able)
        return fleet

    def _next_of(self, fleet: _Fleet[K], now: float) -> Turn[K] | None:
        if not fleet.ready:
            return None
        is_holding = self._limits.is_on and fleet.judge_holding()
        self._judge_loss(fleet, now)
        promised: set[Life] = set()  # The next room there belongs to somebody before.
        for entry in fleet.in_turn():
            able = fleet.able(entry) - promised
            if not able:
                continue
            is_free = not self._limits.is_on or (entry.ticket.work is Work.NEW and not is_holding)
            if is_free:
                return Turn(entry.key, frozenset(able))
            rooms = {
                life: fleet.ready[life].room_at(entry.ticket.price_at(life), now) for life in able
            }
            open_ = frozenset(life for life, due in rooms.items() if due <= now)
            if open_:
                return Turn(entry.key, open_)
            self._due = min(self._due, *rooms.values())
            promised |= able
            if len(promised) == len(fleet.ready):
                break
        return None

    def _reason_to_refuse(
        self, fleet: _Fleet[K], ticket: Ticket, now: float
    ) -> UnbrokenError | None:
        line = fleet.lines[ticket.work]
        if len(line) >= self._limits.waiting_max:
            return self._overloaded(f"{len(line)} streams wait", self._drain_s(fleet))
        if ticket.work is Work.RESUME or ticket.is_let_in:
            return None
        if not self._limits.is_on or not fleet.ready:
            return None
        self._judge_loss(fleet, now)
        if fleet.peak_of_loss is not None:
            detail = (
                f"{fleet.peak_of_loss - len(fleet.ready)} of {fleet.peak_of_loss} workers of "
                f"{ticket.model} were lost at once; their streams go first"
            )
            return self._overloaded(detail, self._drain_s(fleet))
        if fleet.judge_holding():
            pace = sum(worker.pace for worker in fleet.ready.values())
            share = self._limits.new_work_share if fleet.is_contended else 1.0
            wait_s = fleet.tokens_waiting[Work.NEW] / max(1.0, pace * share)
            if now + wait_s > ticket.give_up_at:
                return self._overloaded("streams that lost their worker go first", wait_s)
        return None

    def _judge_loss(self, fleet: _Fleet[K], now: float) -> None:
        """Whether so many workers were lost at once that new work has to stay away."""
        sizes = fleet.sizes
        while len(sizes) > 1 and sizes[1][0] <= now - FLEET_WINDOW_S:
            sizes.popleft()
        num_ready = len(fleet.ready)
        if len(sizes) < 2 and fleet.peak_of_loss is None:
            return  # As many as ever.
        peak = fleet.peak_of_loss or max((size for _, size in sizes), default=0)
        is_few = num_ready < peak * (1 - self._limits.fleet_loss_share)
        is_loss = self._limits.is_on and is_few and fleet.is_contended
        fleet.peak_of_loss = peak if is_loss else None

    def _drain_s(self, fleet: _Fleet[K]) -> float:
        """How long the resumes in line will take."""
        pace = sum(worker.pace for worker in fleet.ready.values())
        debt = sum(worker.debt for worker in fleet.ready.values())
        return (fleet.tokens_waiting[Work.RESUME] + debt) / max(1.0, pace)

    def _overloaded(self, detail: str, wait_s: float) -> UnbrokenError:
        spread = 1 + RETRY_SPREAD * self._random.random()
        return UnbrokenError(
            Reason.OVERLOADED, detail, retry_after_s=max(RETRY_AFTER_S_MIN, wait_s * spread)
        )
