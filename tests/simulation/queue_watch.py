"""Watches the resume queue: its promises, by accounts of its own.

- What was admitted to a worker and is not computed is one burst, or one stream.
- Nobody is admitted before one of a higher priority, or of the same and with less to compute, who
  came no later and could have gone to the same worker.
- Nobody waits while a worker that could take it has had nothing to compute for long.
- New streams wait only while somebody waits to resume and until those who did so have gone, and
  are refused only while somebody does.
- In the end nothing is on account.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from frontend.placement import WorkerView, standing
from frontend.resume_queue import TURN_S, ResumeLimits, ResumeQueue, Ticket, Work
from frontend.stream import Life
from tests.simulation.witness import Violation
from unbroken.errors import Reason, UnbrokenError

_LATE_S = 0.1


@dataclass(slots=True)
class _Waiting:
    name: str
    ticket: Ticket
    is_able: Callable[[WorkerView], bool]
    since: float


_Ables: TypeAlias = list[tuple[_Waiting, set[Life]]]
"""All who wait, and the workers that each may have."""


class QueueWatch:
    """One frontend's."""

    def __init__(self, queue: ResumeQueue[Any], limits: ResumeLimits) -> None:
        self._queue = queue
        self._limits = limits
        self._waiting: dict[Hashable, _Waiting] = {}
        self._computing: dict[Hashable, tuple[Life, int]] = {}
        self._held = False
        self._views: dict[Life, WorkerView] = {}
        self._free_since: dict[Life, float] = {}
        """Since when a worker has had nothing to compute for who lost another."""

    # What the shell tells it.

    def workers(self, ready: Iterable[WorkerView], now: float) -> None:
        """These take work."""
        self._views = {view.life: view for view in ready}
        self._free_since = {life: self._free_since.get(life, now) for life in self._views}
        self._note_holding()

    def offered(
        self,
        key: Hashable,
        name: str,
        ticket: Ticket,
        is_able: Callable[[WorkerView], bool],
        now: float,
    ) -> None:
        """A stream stands in line."""
        self._waiting[key] = _Waiting(name, ticket, is_able, now)
        self._note_holding()

    def refused(self, ticket: Ticket, error: UnbrokenError, now: float) -> None:
        """A stream was refused."""
        _expect(ticket.work is Work.NEW, "a stream that lost its worker was refused")
        _expect(error.reason is Reason.OVERLOADED, f"refused with {error.reason}")
        _expect(bool(error.retry_after_s), "refused without a time to come back")
        # Whether a worker that has just come is able to take a resume turns out with its turn.
        # And those who were held back meanwhile go at the same pace, before whoever comes now.
        is_right = any(one.ticket.work is Work.RESUME for one in self._waiting.values())
        is_right = is_right or self._note_holding()
        _expect(is_right, f"refused at {now:.3f} though nobody waits to resume or was held back")

    def admitted(self, key: Hashable, life: Life, now: float) -> None:
        """It goes to this worker; the queue has not counted it yet."""
        mine = self._waiting[key]
        ticket = mine.ticket
        if not self._limits.is_on:
            return
        if ticket.work is Work.NEW and not self._note_holding():
            return
        price = ticket.price_at(life)
        before = sum(tokens for at, tokens in self._computing.values() if at == life)
        burst = self._queue.burst_of(life)
        _expect(
            before == 0 or before + price <= burst,
            f"{mine.name}: {price} tokens to {life}, which has {before} of {burst:.0f}",
        )
        if ticket.work is Work.RESUME:
            self._check_order(mine, life)
        self._computing[key] = (life, price)
        if life in self._free_since:
            self._free_since[life] = now

    def computed(self, key: Hashable, now: float) -> None:
        """Its prompt is computed, or its attempt is over."""
        life, _ = self._computing.pop(key, (None, 0))
        if life is not None and life in self._free_since:
            self._free_since[life] = now

    def left(self, key: Hashable) -> None:
        """It stands in line no more."""
        self._waiting.pop(key, None)
        self._note_holding()

    def is_waiting(self, key: Hashable) -> bool:
        """Whether it stands in line."""
        return key in self._waiting

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody stands in line."""
        return bool(self._waiting)

    def check(self, now: float) -> None:
        """Everybody who had a turn has used it."""
        busy = {life for life, _ in self._computing.values()}
        if not self._waiting:
            self._held = False
            return
        ables = self._ables()
        is_contended = _is_contended(ables)
        is_holding = self._limits.is_on and self._note_holding(ables)
        for waiting, able in ables:
            if waiting.ticket.work is Work.NEW or not self._limits.is_on:
                _expect(is_holding or not able, f"{waiting.name} waits for nothing")
                if is_contended or not is_holding:
                    continue
            for life in able - busy:
                free_s = now - max(self._free_since[life], waiting.since)
                _expect(
                    free_s < TURN_S + _LATE_S,
                    f"{waiting.name} waits though {life} has had nothing for {free_s:.3f} s",
                )

    def finish(self) -> None:
        """Everything is over."""
        queue = self._queue
        queue.check()
        _expect(not self._waiting, "somebody still waits")
        _expect(not self._computing, "something is still computed")
        _expect(
            queue.num_waiting == queue.tokens_waiting == queue.tokens_outstanding == 0,
            "the queue has something on account",
        )

    # Inside.

    def _ables(self) -> _Ables:
        return [(one, self._able(one)) for one in self._waiting.values()]

    def _note_holding(self, ables: _Ables | None = None) -> bool:
        """While somebody waits to resume, and until those who were held back have gone."""
        if not (self._waiting and self._views):
            self._held = False
            return False
        ables = self._ables() if ables is None else ables
        waits_on = any(able for one, able in ables if one.ticket.work is Work.NEW)
        self._held = _is_contended(ables) or (self._held and waits_on)
        return self._held

    def _able(self, waiting: _Waiting) -> set[Life]:
        able = [view for view in self._views.values() if waiting.is_able(view)]
        ranks = {view.life: standing(view, waiting.ticket.avoid) for view in able}
        best = min(ranks.values(), default=None)
        return {life for life, rank in ranks.items() if rank == best}

    def _check_order(self, mine: _Waiting, life: Life) -> None:
        for other in self._waiting.values():
            ticket = other.ticket
            is_before = ticket.priority > mine.ticket.priority or (
                ticket.priority == mine.ticket.priority and ticket.price < mine.ticket.price
            )
            goes_first = (
                ticket.work is Work.RESUME
                and is_before
                and other.since <= mine.since
                and life in self._able(other)
            )
            _expect(not goes_first, f"{mine.name} was admitted before {other.name}")


def _is_contended(ables: _Ables) -> bool:
    return any(able and one.ticket.work is Work.RESUME for one, able in ables)


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Violation(otherwise)
