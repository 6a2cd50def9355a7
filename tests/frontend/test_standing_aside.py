"""Whom no free worker can take has a turn when a worker is free that was busy, and not sooner."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from frontend.admission_queue import Arrival, QueueLimits
from frontend.busy import Shedder
from frontend.metrics import FrontendMetrics
from frontend.placement import WorkerView
from frontend.waiting_room import Standing, WaitingRoom
from tests.frontend.test_busy import worker
from tests.frontend.worlds import run
from tests.support.streams import W1, W2
from unbroken.thresholds import RankState, Thresholds
from unbroken.v1.relay_service_pb2 import QueueReport

IDLE = RankState(kv_blocks_total=100)
FULL = RankState(kv_blocks_total=100, prefill_tokens_queued=101)


@dataclass(eq=False)
class Waiter:
    """Who waits; all that a waiting room asks of him is his standing."""

    waits_as: Standing


class Room:
    """A waiting room whose second worker alone can take who waits."""

    def __init__(self) -> None:
        self.views: Sequence[WorkerView] = worker(IDLE, life=W1), worker(FULL, life=W2)
        self.room: Any = WaitingRoom(
            QueueLimits(),
            Random(1),
            Shedder(Thresholds(prefill_tokens=100), Random(1)),
            FrontendMetrics(CollectorRegistry()),
            views_of=self.views_of,
            highest_paused=self.highest_paused,
            on_expiry=lambda: None,
            on_turn=lambda: None,
            clock=lambda: 100.0,
        )

    def views_of(self, _: str) -> Sequence[WorkerView]:
        return self.views

    def highest_paused(self, _: str) -> int | None:
        return None

    def is_held(self, _: str) -> bool:
        return False

    def comes(self, name: str, tenant: str = "") -> Waiter:
        """He was let in, and refused by a worker."""
        waiter = Waiter(Standing(Arrival("m", tenant, name, 0, 10, 200.0), 100.0, is_in=True))
        self.room.come_back(waiter, waiter.waits_as)
        return waiter

    def give_turns(self) -> list[Waiter]:
        """Everybody tries the worker that he needs; returns who got in there."""
        got_in: list[Waiter] = []
        tried = 0
        while (waiter := self.room.next(self.is_held)) is not None:
            tried += 1
            assert tried < 10, "who was passed over has no other turn"
            needed = self.views[1]
            if needed.prefill_tokens_queued > 100:
                self.room.come_back(waiter, waiter.waits_as)
            else:
                self.room.settled(waiter, waiter.waits_as)
                got_in.append(waiter)
        self.room.looked()
        return got_in

    def report(self, number: int, state: RankState) -> int:
        """A worker tells its load; how many are tried again for that."""
        view = self.views[number]
        view.reported([state])
        self.room.reported(view)
        return self.room.queue.num_waiting if self.room.queue.has_line("m") else 0


def test_news_of_a_worker_that_was_free_before_recalls_nobody() -> None:
    async def scenario() -> None:
        it = Room()
        waiters = [it.comes(name) for name in "abc"]
        assert it.give_turns() == []
        for _ in range(3):
            assert it.report(0, IDLE) == 0
            assert it.report(1, FULL) == 0
        assert it.report(1, IDLE) == 3
        assert it.give_turns() == waiters
        it.room.close()

    run(scenario())


def test_a_worker_that_was_busy_meanwhile_is_news_for_those_before_and_after() -> None:
    async def scenario() -> None:
        it = Room()
        waiters = [it.comes("a")]
        assert it.give_turns() == []
        assert it.report(0, FULL) == 0
        waiters.append(it.comes("b"))
        it.report(0, IDLE)
        assert it.give_turns() == []
        assert it.report(0, FULL) == 0
        assert it.report(1, IDLE) == 2
        assert it.give_turns() == waiters
        it.room.close()

    run(scenario())


def test_a_worker_that_has_room_without_a_report_is_news_with_its_next_one() -> None:
    async def scenario() -> None:
        it = Room()
        waiters = [it.comes("a")]
        assert it.give_turns() == []
        it.views[1].reported([IDLE])  # As when others place less there.
        waiters.append(it.comes("b"))
        waiters = [*it.give_turns(), *waiters]
        assert it.report(1, IDLE) == 1
        assert it.give_turns() == waiters[1:2]
        it.room.close()

    run(scenario())


def test_a_tenant_that_has_few_prompts_with_workers_defers_to_no_older_ones_elsewhere() -> None:
    async def scenario() -> None:
        it = Room()
        it.report(1, IDLE)
        waiters = [it.comes("a"), it.comes("b", "other"), it.comes("c")]
        elsewhere = QueueReport(frontend_id="f2", incarnation=1, sequence=1, tokens_waiting=9)
        it.room.heard("m", [elsewhere])
        assert it.give_turns() == waiters[:2], "and who is left alone waits a moment"
        assert it.room.queue.num_waiting == 1
        it.room.close()

    run(scenario())
