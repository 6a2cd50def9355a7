"""Who waits while all workers are busy, in which order they get in, and who is sent away: no I/O.

    offer ──▶ nobody waits, and a worker is not busy ──────────────────────────▶ in
      │
      ├──▶ in line ──next, when a worker has room──▶ called ──settled──▶ in
      │      ▲  │                                       │
      │      │  └──▶ expired, displaced: sent away      │ no worker that has room is able
      │      └────────────────────────passed_over───────┘
      └──▶ sent away: the line is full, or too long to be worth it

*Order.* The highest priority first. Within one, tenants take turns by the prompt tokens that they
were let in with: start-time fair queueing, so that a tenant gets its share whatever others ask for,
and whoever was idle does not lay up credit. Within a tenant, the earliest deadline first. When the
line is full, who has most in it gives way: the last of the tenant that has most waiting.

*When to come back.* What leaves all frontends' lines in a second, measured while somebody waits,
is what workers get rid of; what waits at other frontends, and was promised there, is before
whoever comes, in proportion (`other_queues`). Whoever is sent away is told when his turn would be,
less half of what may wait in line, so that he waits the rest here and no worker stands idle. That
is a promise: the tokens he brings stay in the reckoning of those who come after him, and when he
comes back under the same request id he is not sent away again for the length of the line. So those
who do as they are told come back once, and do not find their place taken by newcomers.

Source: start-time fair queueing (Goyal, Vin and Cheng, 1996), with prompt tokens as length and all
weights equal; longest queue drop for the buffer (as in McKenney's stochastic fair queueing, 1990).
"""

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import exp, inf
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from frontend.other_queues import Deference, OtherQueues
from unbroken.v1 import relay_service_pb2 as pb

if TYPE_CHECKING:
    from random import Random

RETRY_AFTER_S_MIN: Final = 0.1
PROMISE_S_MAX: Final = 120.0
"""Nobody is told to come back later, and nothing is promised beyond it."""
RETRY_SPREAD: Final = 0.2
"""Of the time that somebody is told: they do not all come back at one moment."""
RETRY_SPREAD_EARLY: Final = 0.35
"""The part of it that is before that time. If all were later, those who come back would be fewer
than are let in, and workers would have nothing to do at times."""
SHARED_WAIT: Final = 0.7
"""Of the longest wait: so long new ones may have to wait while there are other lines, whose turns
are not exactly in the order in which requests came."""
EARLY_SHARE: Final = 0.1
"""Who comes back before so much of his time is left is not early."""
PROMISE_GRACE_S: Final = 2.0
"""A promise counts so long beyond its time, if whoever it was made to can be told from others."""
PROMISES_MAX: Final = 16_384
TENANTS_IDLE_MAX: Final = 1024
"""Of so many tenants without anything in line it is remembered how much they were let in with."""
TENANTS_MAX: Final = 2 * TENANTS_IDLE_MAX
"""If there are so many, no other one that has nothing in line is promised anything."""
MEMORY_S: Final = 10.0
"""What left the line so long ago counts a third."""
MEASURED_S_MIN: Final = 0.5
"""Somebody must have waited for so long before what leaves the line is a rate."""
DISPLACED_MAX: Final = 64
"""For one that comes."""

_SLACK: Final = 64
"""So many entries that are gone may lie in a heap before they are cleared away."""

K = TypeVar("K", bound=Hashable)


class Limit(StrEnum):
    """Why somebody is sent away."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    WAIT = "wait"
    """He would wait for longer than he may."""
    EXPIRED = "expired"
    """He has."""
    EARLY = "early"
    """He was told to come back later."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait."""

    requests_max: int = 1024
    """Of one model. 0: nobody waits, all are sent away at once."""
    tokens_max: int = 1_000_000
    """Prompt tokens of those; one request is let in line whatever it has."""
    wait_s_max: float = 5.0
    """For one request."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that wants in."""

    model: str
    tenant: str
    request_id: str
    """Under which it can come back; empty if its client named none."""
    priority: int
    num_tokens: int
    """Prompt tokens of all its choices."""
    deadline: float
    """When its client gives up, monotonic seconds."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """It is sent away."""

    limit: Limit
    detail: str
    retry_after_s: float


@dataclass(slots=True, eq=False)
class _Entry(Generic[K]):
    key: K
    arrival: Arrival
    since: float
    order: tuple[float, int]
    """Deadline, and number of arrival."""
    is_gone: bool = False
    is_aside: bool = False
    """No worker that had room could take it; it has no turn."""
    is_first: bool = False
    """It goes before others of its tenant and priority, and is not sent away."""

    def __lt__(self, other: "_Entry[K]") -> bool:
        return self.order < other.order


@dataclass(slots=True)
class _Promise:
    """Somebody was told to come back."""

    arrival: Arrival
    made_at: float
    due: float
    until: float
    """So long its tokens count."""

    def is_early(self, now: float) -> bool:
        """Whether whoever was told is back before his time."""
        return now < self.due - EARLY_SHARE * (self.due - self.made_at)


class _Drain:
    """How fast tokens leave the line, over the time in which somebody waited."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._elapsed_s = 0.0
        self._last_at = 0.0
        self._was_waiting = False

    @property
    def per_s(self) -> float | None:
        """None while unknown."""
        if self._elapsed_s < MEASURED_S_MIN or self._tokens <= 0:
            return None
        return self._tokens / self._elapsed_s

    def note(self, num_tokens: int, now: float, *, is_waiting: bool) -> None:
        """So many left; `is_waiting`: somebody does from now on."""
        if self._was_waiting:
            elapsed_s = max(0.0, now - self._last_at)
            kept = exp(-elapsed_s / MEMORY_S)
            self._tokens = self._tokens * kept + num_tokens
            self._elapsed_s = self._elapsed_s * kept + elapsed_s
        self._last_at, self._was_waiting = now, is_waiting


@dataclass(slots=True)
class _Tenant(Generic[K]):
    """What one tenant has in line, and was let in with."""

    start: float = 0.0
    """Virtual time at which its next request begins."""
    lines: dict[int, list[_Entry[K]]] = field(default_factory=dict[int, "list[_Entry[K]]"])
    """Heaps by priority, with entries that are gone."""
    waiting: Counter[int] = field(default_factory=Counter[int])
    """Tokens in line by priority,"""
    promised: Counter[int] = field(default_factory=Counter[int])
    """and of those who were told to come back."""

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.promised)

    def total(self, priority: int) -> int:
        return self.waiting[priority] + self.promised[priority]

    def total_above(self, priority: int) -> int:
        waiting = sum(n for level, n in self.waiting.items() if level > priority)
        return waiting + sum(n for level, n in self.promised.items() if level > priority)

    def first(self, priority: int) -> _Entry[K] | None:
        """Who has its next turn in this priority."""
        line = self.lines.get(priority)
        while line:
            if not line[0].is_gone:
                return line[0]
            heapq.heappop(line)
        self.lines.pop(priority, None)
        return None


def _take(counts: Counter[int], priority: int, num_tokens: int) -> None:
    counts[priority] -= num_tokens
    assert counts[priority] >= 0, "no more is taken than there is"
    if not counts[priority]:
        del counts[priority]


class _Line(Generic[K]):
    """Those who wait for workers of one model."""

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant[K]] = {}
        self.virtual_now = 0.0
        self.num_waiting = 0
        self.tokens_waiting = 0
        self.tokens_promised = 0
        self.aside: dict[K, _Entry[K]] = {}
        """Whom no worker that had room could take."""
        self.promises: dict[Hashable, _Promise] = {}
        self.drain = _Drain()
        self.tokens_let_in = 0
        """Ever; those that wait again are taken off."""
        self.others = OtherQueues()
        self.deference = Deference()
        self._promises_end: list[tuple[float, int, Hashable]] = []  # Heap, with some that are kept.
        self._num_promises = 0

    def rate(self, hint: float) -> float:
        """Tokens that leave it in a second."""
        return max(1.0, self.drain.per_s or hint)

    def let_in(self, num_tokens: int, now: float) -> None:
        """So many are; fewer than none: they wait again."""
        self.tokens_let_in += num_tokens
        self.note_drain(num_tokens, now)

    def note_drain(self, num_tokens: int, now: float) -> None:
        """So many were let in here or elsewhere, while somebody waited anywhere."""
        is_waiting = self.num_waiting > 0 or self.others.elsewhere.tokens_waiting > 0
        self.drain.note(num_tokens, now, is_waiting=is_waiting)

    def promise(self, name: Hashable, promise: _Promise) -> None:
        """Somebody was told when to come back."""
        arrival = promise.arrival
        self.promises[name] = promise
        self.tenant(arrival.tenant).promised[arrival.priority] += arrival.num_tokens
        self.tokens_promised += arrival.num_tokens
        self._num_promises += 1
        heapq.heappush(self._promises_end, (promise.until, self._num_promises, name))

    def keep_promise(self, name: Hashable) -> None:
        """Whoever was told has come, or will be told anew. Idempotent."""
        promise = self.promises.pop(name, None)
        if promise is not None:
            arrival = promise.arrival
            promised = self.tenants[arrival.tenant].promised
            _take(promised, arrival.priority, arrival.num_tokens)
            self.tokens_promised -= arrival.num_tokens

    def forget_promises(self, now: float) -> None:
        """Of those who did not come."""
        ends = self._promises_end
        while ends and ends[0][0] <= now:
            name = heapq.heappop(ends)[2]
            promise = self.promises.get(name)
            if promise is not None and promise.until <= now:
                self.keep_promise(name)
        if len(ends) > 2 * len(self.promises) + _SLACK:
            self._promises_end = [end for end in ends if self._is_promised(end)]
            heapq.heapify(self._promises_end)

    def _is_promised(self, end: tuple[float, int, Hashable]) -> bool:
        promise = self.promises.get(end[2])
        return promise is not None and promise.until == end[0]

    def may_promise(self, tenant: str) -> bool:
        """Whether more can be remembered: names that nobody has seen are cheap to make up."""
        if len(self.promises) >= PROMISES_MAX:
            return False
        return tenant in self.tenants or len(self.tenants) < TENANTS_MAX

    def tenant(self, name: str) -> _Tenant[K]:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant(start=self.virtual_now)
        return tenant

    def charge(self, arrival: Arrival, *, before: _Entry[K] | None = None) -> None:
        """It is let in; before that one, if it had no turn yet: then virtual time stands still for
        those who have, or a turn out of order would wipe out what they had more than others.
        """
        tenant = self.tenant(arrival.tenant)
        tenant.start = max(tenant.start, self.virtual_now)
        passed = tenant if before is None else self.tenants[before.arrival.tenant]
        self.virtual_now = max(self.virtual_now, min(tenant.start, passed.start))
        tenant.start += arrival.num_tokens

    def refund(self, arrival: Arrival) -> None:
        """It was let in, and is not."""
        self.tenant(arrival.tenant).start -= arrival.num_tokens

    def forget_idle(self) -> None:
        """Whoever was let in with no more than others has nothing to be remembered for."""
        if len(self.tenants) > TENANTS_IDLE_MAX:
            idle = [name for name, one in self.tenants.items() if one.is_idle]
            idle.sort(key=lambda name: self.tenants[name].start)
            for name in idle[: len(self.tenants) - TENANTS_IDLE_MAX]:
                del self.tenants[name]

    def levels(self) -> list[int]:
        """Priorities in which somebody waits, the highest first."""
        return sorted({p for one in self.tenants.values() for p in one.lines}, reverse=True)

    def first(self, is_able: Callable[[K, str], bool] | None = None) -> _Entry[K] | None:
        """Who has the next turn; of those that are able to have one, if there are others of the
        same priority.
        """
        for priority in self.levels():
            found = [
                (max(tenant.start, self.virtual_now), tenant.start, entry)
                for tenant in self.tenants.values()
                if (entry := tenant.first(priority)) is not None
            ]
            if found:
                if is_able is not None:
                    found = [one for one in found if is_able(one[2].key, one[2].arrival.tenant)]
                # Of equal turns, whoever had his last one before.
                return min(found)[2] if found else None
        return None

    def put(self, entry: _Entry[K]) -> None:
        """It stands in line."""
        arrival = entry.arrival
        tenant = self.tenant(arrival.tenant)
        if entry.is_aside:
            self.aside[entry.key] = entry
        else:
            heapq.heappush(tenant.lines.setdefault(arrival.priority, []), entry)
        tenant.waiting[arrival.priority] += arrival.num_tokens
        self.num_waiting += 1
        self.tokens_waiting += arrival.num_tokens

    def take(self, entry: _Entry[K]) -> None:
        """It stands in line no more."""
        entry.is_gone = True
        self.aside.pop(entry.key, None)
        arrival = entry.arrival
        tenant = self.tenants[arrival.tenant]
        _take(tenant.waiting, arrival.priority, arrival.num_tokens)
        self.num_waiting -= 1
        self.tokens_waiting -= arrival.num_tokens
        line = tenant.lines.get(arrival.priority, [])
        if len(line) > 2 * self.num_waiting + _SLACK:  # Its turn may never come.
            line[:] = [one for one in line if not one.is_gone]
            heapq.heapify(line)

    def recall(self) -> None:
        """Those who had no turn have one again."""
        for entry in self.aside.values():
            entry.is_aside = False
            arrival = entry.arrival
            lines = self.tenant(arrival.tenant).lines
            heapq.heappush(lines.setdefault(arrival.priority, []), entry)
        self.aside.clear()

    def ahead_of(self, arrival: Arrival, *, is_in_line: bool = False) -> int:
        """Tokens that are let in before it, as turns go; its own are in line already, or not."""
        own = self.tenants.get(arrival.tenant)
        mine = (own.total(arrival.priority) if own is not None else 0) + arrival.num_tokens
        if is_in_line:
            mine -= arrival.num_tokens
        ahead = 0
        for name, tenant in self.tenants.items():
            if tenant.is_idle:
                continue
            ahead += tenant.total_above(arrival.priority)
            if name != arrival.tenant:
                ahead += min(tenant.total(arrival.priority), mine)
        ahead += mine
        if elsewhere := self.others.elsewhere.num_tokens:
            # Of those as much as of all that is here, whose turns are counted tenant by tenant.
            here = self.tokens_waiting + self.tokens_promised
            here += 0 if is_in_line else arrival.num_tokens
            ahead += elsewhere * ahead // here
        return ahead - arrival.num_tokens

    def last_before(self, arrival: Arrival) -> _Entry[K] | None:
        """Who gives way to it in a full line, if anybody: the last of who has most of the least."""
        levels = {level for one in self.tenants.values() for level in one.waiting}
        priority = min(levels, default=None)
        if priority is None or arrival.priority < priority:
            return None
        name, longest = max(
            self.tenants.items(), key=lambda item: (item[1].waiting[priority], item[0])
        )
        if arrival.priority == priority:
            own = self.tenants.get(arrival.tenant)
            mine = (own.waiting[priority] if own is not None else 0) + arrival.num_tokens
            if name == arrival.tenant or longest.waiting[priority] <= mine:
                return None
        entries = [one for one in longest.lines.get(priority, ()) if not one.is_gone]
        entries += [
            one
            for one in self.aside.values()
            if (one.arrival.tenant, one.arrival.priority) == (name, priority)
        ]
        return max((one for one in entries if not one.is_first), default=None)

    def check(self) -> None:
        """Assert what is always true."""
        entries = [
            entry
            for tenant in self.tenants.values()
            for line in tenant.lines.values()
            for entry in line
            if not entry.is_gone
        ]
        entries += self.aside.values()
        assert len(entries) == self.num_waiting, "who waits is counted"
        assert sum(one.arrival.num_tokens for one in entries) == self.tokens_waiting
        waiting, promised = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for entry in entries:
            arrival = entry.arrival
            waiting[arrival.tenant, arrival.priority] += arrival.num_tokens
        for promise in self.promises.values():
            arrival = promise.arrival
            promised[arrival.tenant, arrival.priority] += arrival.num_tokens
        for name, tenant in self.tenants.items():
            for counts, known in ((tenant.waiting, waiting), (tenant.promised, promised)):
                assert all(known[name, p] == n for p, n in counts.items()), "tokens are counted"
        assert promised.total() == self.tokens_promised, "tokens are counted"


class AdmissionQueue(Generic[K]):
    """The line before the workers of every model. Times are monotonic seconds."""

    def __init__(self, limits: QueueLimits, random: "Random") -> None:
        self._limits = limits
        self._random = random
        self._lines: dict[str, _Line[K]] = {}
        self._entries: dict[K, _Entry[K]] = {}  # In line.
        self._called: dict[K, _Entry[K]] = {}
        self._expiries: list[tuple[float, int, _Entry[K]]] = []  # Heap, with some that are gone.
        self._num_arrived = 0
        self._num_reports = 0

    # Questions.

    @property
    def is_on(self) -> bool:
        """Whether anybody may wait."""
        return self._limits.requests_max > 0

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._entries)

    @property
    def tokens_waiting(self) -> int:
        """Prompt tokens of those."""
        return sum(line.tokens_waiting for line in list(self._lines.values()))

    @property
    def num_promised(self) -> int:
        """Requests that were told to come back, and may yet."""
        return sum(len(line.promises) for line in list(self._lines.values()))

    @property
    def tokens_elsewhere(self) -> int:
        """Prompt tokens that wait at other frontends, or were promised there a time."""
        return sum(line.others.elsewhere.num_tokens for line in list(self._lines.values()))

    def is_waiting(self, key: K) -> bool:
        """Whether it stands in line, or was called and has not settled."""
        return key in self._entries or key in self._called

    def is_called(self, key: K) -> bool:
        """Whether it was called, and has not settled."""
        return key in self._called

    def waiting(self) -> Iterator[tuple[K, Arrival, float]]:
        """Who is in line, or was called and has not settled; for what, and since when."""
        for key, entry in (*self._entries.items(), *self._called.items()):
            yield key, entry.arrival, entry.since

    def models(self) -> list[str]:
        """For which somebody waits who can have a turn."""
        return [model for model, line in self._lines.items() if line.num_waiting > len(line.aside)]

    def has_line(self, model: str) -> bool:
        """Whether whoever comes has to stand behind somebody."""
        line = self._lines.get(model)
        return line is not None and line.num_waiting > len(line.aside)

    def first(
        self, model: str, is_able: Callable[[K, str], bool] | None = None
    ) -> tuple[K, str] | None:
        """Who has the next turn, and of which tenant he is.

        With `is_able`, of the first of each tenant who are: the others keep their turns. None of a
        lower priority goes before them.
        """
        line = self._lines.get(model)
        entry = line.first(is_able) if line is not None else None
        return None if entry is None else (entry.key, entry.arrival.tenant)

    def has_several_tenants(self, model: str) -> bool:
        """Whether more than one has somebody in line."""
        line = self._lines.get(model)
        tenants = line.tenants.values() if line is not None else ()
        return sum(bool(tenant.waiting) for tenant in tenants) > 1

    def may_go_at(self, model: str, now: float) -> float:
        """When the first in line takes the room that there is: others wait elsewhere, and go before
        it if they have waited longer.
        """
        line = self._lines.get(model)
        entry = line.first() if line is not None else None
        if line is None or entry is None or not line.others.elsewhere.tokens_waiting:
            return now
        wait_s_max = 0.0 if entry.is_first else self._limits.wait_s_max
        return line.deference.due(now, waited_s=now - entry.since, wait_s_max=wait_s_max)

    def no_room(self, model: str) -> None:
        """No worker has any."""
        if (line := self._lines.get(model)) is not None:
            line.deference.no_room()

    def report(self, model: str, now: float) -> pb.QueueReport:
        """What other frontends are told of a line."""
        line = self._line(model, now)
        self._num_reports += 1
        return pb.QueueReport(
            sequence=self._num_reports,
            tokens_waiting=line.tokens_waiting,
            tokens_promised=line.tokens_promised,
            tokens_let_in_total=line.tokens_let_in,
        )

    def detail(self, key: K) -> str:
        """What it waits for, for people; empty if it is not in line."""
        entry = self._entries.get(key)
        if entry is None:
            return ""
        line = self._lines[entry.arrival.model]
        ahead = line.ahead_of(entry.arrival, is_in_line=True)
        return f"all workers are busy: at most {ahead} prompt tokens go before it"

    def deadline(self) -> float | None:
        """When `expired` has somebody."""
        while self._expiries and self._expiries[0][2].is_gone:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    # Events.

    def check(self, arrival: Arrival, now: float, *, rate_hint: float) -> Refusal | None:
        """Whether it is sent away if it has to stand in line. Nobody gives way yet.

        `rate_hint` is what all workers get rid of in a second, for as long as what leaves the line
        was not measured.
        """
        line = self._line(arrival.model, now)
        limit = self._judge(line, arrival, now, rate_hint)
        return None if limit is None else self._send_away(line, arrival, limit, now, rate_hint)

    def offer(
        self, key: K, arrival: Arrival, now: float, *, rate_hint: float
    ) -> tuple[Refusal | None, list[tuple[K, Refusal]]]:
        """It stands in line from now on, or is sent away; also returns who gave way to it."""
        assert not self.is_waiting(key), "a request stands in line once"
        line = self._line(arrival.model, now)
        displaced: list[tuple[K, Refusal]] = []
        limit = self._judge(line, arrival, now, rate_hint)
        if limit is None:
            limit, gone = self._make_room(line, arrival)
            for last in gone:
                refusal = self._send_away(line, last.arrival, Limit.REQUESTS, now, rate_hint)
                displaced.append((last.key, refusal))
        if limit is not None:
            return self._send_away(line, arrival, limit, now, rate_hint), []
        line.keep_promise(_name(arrival))
        self._enter(line, key, arrival, since=now)
        line.note_drain(0, now)
        return None, displaced

    def heard(self, model: str, reports: Sequence[pb.QueueReport], now: float) -> None:
        """Other frontends told of their lines."""
        line = self._line(model, now)
        line.note_drain(line.others.heard(reports, now), now)

    def let_in(self, arrival: Arrival, now: float) -> None:
        """It went to a worker without having to wait."""
        line = self._line(arrival.model, now)
        line.keep_promise(_name(arrival))
        line.charge(arrival)
        line.let_in(arrival.num_tokens, now)
        line.forget_idle()

    def come_back(
        self, key: K, arrival: Arrival, now: float, *, since: float, is_first: bool = False
    ) -> None:
        """It was let in, having come at `since`, and no worker took it: it waits again.

        It is not sent away for want of room: it had some. `is_first`: it had a worker, and lost it;
        it goes before others of its tenant and priority, and is not sent away for anything.
        """
        assert not self.is_waiting(key), "a request stands in line once"
        line = self._line(arrival.model, now)
        line.refund(arrival)
        self._enter(line, key, arrival, since=since, is_first=is_first)
        line.let_in(-arrival.num_tokens, now)

    def next(
        self, model: str, now: float, is_able: Callable[[K, str], bool] | None = None
    ) -> K | None:
        """Whose turn it is (`first`), now that a worker of the model has room. He is `settled`
        after it, or `passed_over`, or removed.
        """
        line = self._lines.get(model)
        entry = line.first(is_able) if line is not None else None
        if line is None or entry is None:
            return None
        before = line.first() if is_able is not None else None
        self._drop(line, entry)
        self._called[entry.key] = entry
        line.charge(entry.arrival, before=before)
        line.let_in(entry.arrival.num_tokens, now)
        if not line.num_waiting:
            line.deference.no_room()
        line.forget_idle()
        return entry.key

    def settled(self, key: K, now: float) -> float:
        """A worker took it; returns how long it waited."""
        entry = self._called.pop(key)
        return now - entry.since

    def passed_over(self, key: K, now: float) -> None:
        """None of the workers that have room can take it: it has no turn until `changed`."""
        entry = self._called.pop(key)
        line = self._line(entry.arrival.model, now)
        line.refund(entry.arrival)
        entry.is_aside = True
        self._enter_again(line, entry)
        line.let_in(-entry.arrival.num_tokens, now)

    def changed(self) -> None:
        """Workers may take whom they could not."""
        for line in self._lines.values():
            line.recall()

    def remove(self, key: K) -> None:
        """It wants in no more. Idempotent."""
        entry = self._entries.get(key)
        if entry is not None:
            self._drop(self._lines[entry.arrival.model], entry)
        self._called.pop(key, None)

    def expired(
        self, now: float, rate_hint: Callable[[str], float]
    ) -> list[tuple[K, str, Refusal]]:
        """Who has waited for as long as anybody may, and for which model: they are sent away."""
        found: list[tuple[K, str, Refusal]] = []
        while (due := self.deadline()) is not None and due <= now:
            entry = heapq.heappop(self._expiries)[2]
            arrival = entry.arrival
            line = self._line(arrival.model, now)
            self._drop(line, entry)
            hint = rate_hint(arrival.model)
            refusal = self._send_away(line, arrival, Limit.EXPIRED, now, hint)
            found.append((entry.key, arrival.model, refusal))
        return found

    def models_known(self, models: Iterable[str]) -> None:
        """Of other models nothing is remembered, unless somebody waits."""
        for name in self._lines.keys() - set(models):
            if not self._lines[name].num_waiting:
                del self._lines[name]

    def check_all(self) -> None:
        """Assert what is always true."""
        for line in self._lines.values():
            line.check()
        num = sum(line.num_waiting for line in self._lines.values())
        assert num == len(self._entries), "who waits stands in one line"
        assert not self._entries.keys() & self._called.keys(), "who is called left the line"

    # Inside.

    def _line(self, model: str, now: float) -> _Line[K]:
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = _Line()
        line.forget_promises(now)
        line.others.forget(now)
        return line

    def _judge(
        self, line: _Line[K], arrival: Arrival, now: float, rate_hint: float
    ) -> Limit | None:
        """Why it is sent away, if it is."""
        promise = line.promises.get(_name(arrival))
        if promise is not None and promise.is_early(now):
            return Limit.EARLY
        if (full := self._is_full(line, arrival)) is not None and line.last_before(arrival) is None:
            return full
        if promise is None:
            wait_s = line.ahead_of(arrival) / line.rate(rate_hint)
            wait_s_max = self._limits.wait_s_max
            if line.others.elsewhere.tokens_waiting:
                wait_s_max *= SHARED_WAIT
            if wait_s > wait_s_max or now + wait_s > arrival.deadline:
                return Limit.WAIT
        return None

    def _make_room(self, line: _Line[K], arrival: Arrival) -> tuple[Limit | None, list[_Entry[K]]]:
        """Who gives way to it; nobody if that is not enough, and then why not."""
        gone: list[_Entry[K]] = []
        while (limit := self._is_full(line, arrival)) is not None:
            last = line.last_before(arrival) if len(gone) < DISPLACED_MAX else None
            if last is None:
                for entry in gone:
                    self._enter_again(line, entry)
                return limit, []
            self._drop(line, last)
            gone.append(last)
        return None, gone

    def _is_full(self, line: _Line[K], arrival: Arrival) -> Limit | None:
        limits = self._limits
        if line.num_waiting >= limits.requests_max:
            return Limit.REQUESTS
        if line.num_waiting and line.tokens_waiting + arrival.num_tokens > limits.tokens_max:
            return Limit.TOKENS
        return None

    def _send_away(
        self, line: _Line[K], arrival: Arrival, limit: Limit, now: float, rate_hint: float
    ) -> Refusal:
        """Promise it a time."""
        name = _name(arrival)
        promise = line.promises.get(name)
        if limit is Limit.EARLY and promise is not None:
            left_s = max(RETRY_AFTER_S_MIN, promise.due - now)
            return Refusal(limit, f"it was told to come back {left_s:.1f} s later", left_s)
        line.keep_promise(name)
        rate = line.rate(rate_hint)
        wait_s = line.ahead_of(arrival) / rate
        waiting = line.tokens_waiting + line.others.elsewhere.tokens_waiting
        lead_s = min(self._limits.wait_s_max, waiting / rate) / 2
        told_s = min(wait_s - lead_s, PROMISE_S_MAX)
        told_s *= 1 + RETRY_SPREAD * (self._random.random() - RETRY_SPREAD_EARLY)
        told_s = max(RETRY_AFTER_S_MIN, told_s)
        if wait_s <= PROMISE_S_MAX and line.may_promise(arrival.tenant):
            if name is None:
                self._num_arrived += 1
                line.promise(self._num_arrived, _Promise(arrival, now, now + told_s, now + told_s))
            else:
                until = now + told_s + PROMISE_GRACE_S
                line.promise(name, _Promise(arrival, now, now + told_s, until))
        shown = f"{line.num_waiting} requests with {line.tokens_waiting} prompt tokens wait"
        return Refusal(limit, f"{shown}; its turn would be in {wait_s:.1f} s", told_s)

    def _enter(
        self, line: _Line[K], key: K, arrival: Arrival, *, since: float, is_first: bool = False
    ) -> None:
        self._num_arrived += 1
        order = (-inf if is_first else arrival.deadline, self._num_arrived)
        self._stand(line, _Entry(key, arrival, since, order, is_first=is_first))

    def _enter_again(self, line: _Line[K], entry: _Entry[K]) -> None:
        """It left the line and has its place again. What left it is not what stands there now."""
        self._stand(line, replace(entry, is_gone=False))

    def _stand(self, line: _Line[K], entry: _Entry[K]) -> None:
        self._entries[entry.key] = entry
        line.put(entry)
        if not entry.is_first:
            expiry = (entry.since + self._limits.wait_s_max, entry.order[1], entry)
            heapq.heappush(self._expiries, expiry)

    def _drop(self, line: _Line[K], entry: _Entry[K]) -> None:
        """It stands in line no more."""
        del self._entries[entry.key]
        line.take(entry)
        if len(self._expiries) > 2 * len(self._entries) + _SLACK:
            self._expiries = [one for one in self._expiries if not one[2].is_gone]
            heapq.heapify(self._expiries)


def _name(arrival: Arrival) -> tuple[str, str] | None:
    """By which a client that comes back is known again."""
    return (arrival.tenant, arrival.request_id) if arrival.request_id else None
