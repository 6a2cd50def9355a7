"""What is done again and again: when it is due, or beside something else around that time."""

import asyncio
import gc
import math
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from unbroken import recurring as recurring_module
from unbroken.recurring import EARLY, LATE, TIMER_S_MIN, Naps, Recurring, nap, naps

INTERVAL_S = 10.0
"""Longer than a test: what is done again has joined."""


class Clock:
    """One that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Counts what is done; it is due again after an interval."""

    def __init__(self, clock: Clock, interval_s: float = INTERVAL_S) -> None:
        self.times: list[float] = []
        self.interval_s = interval_s
        self.done = asyncio.Event()
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self._clock = clock

    def __call__(self) -> float:
        if self.error is not None:
            raise self.error
        self.times.append(self._clock())
        self.meanwhile()
        self.done.set()
        return self._clock() + self.interval_s


async def begun() -> tuple[Clock, Work, Recurring, "asyncio.Task[None]"]:
    """Some work that was done once, and the run that does it again."""
    clock = Clock()
    work = Work(clock)
    recurring = Recurring(work, INTERVAL_S, clock)
    running = asyncio.create_task(recurring.run())
    await work.done.wait()
    return clock, work, recurring, running


def run(scenario: Callable[[Clock, Work, Recurring], Coroutine[None, None, None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(5):
            clock, work, recurring, running = await begun()
            await scenario(clock, work, recurring)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(whole())


def test_it_is_done_at_once_and_joins_when_it_is_nearly_due() -> None:
    async def scenario(clock: Clock, work: Work, recurring: Recurring) -> None:
        assert work.times == [100.0]
        recurring.join()
        clock.now += INTERVAL_S * (1 - EARLY) - 0.01
        recurring.join()
        assert len(work.times) == 1, "it is too early"
        clock.now += 0.02
        recurring.join()
        recurring.join()
        assert work.times[1:] == [clock.now], "once"

    run(scenario)


def test_alone_it_is_done_when_it_is_due() -> None:
    async def scenario(clock: Clock, work: Work, recurring: Recurring) -> None:
        clock.now += INTERVAL_S
        work.interval_s = 0.0
        work.done.clear()
        recurring.join()
        for _ in range(3):
            work.done.clear()
            await work.done.wait()  # The timer's, as nothing else is done.

    run(scenario)


def test_what_joined_waits_a_little_to_join_again() -> None:
    async def scenario(clock: Clock, _: Work, recurring: Recurring) -> None:
        loop = asyncio.get_running_loop()
        clock.now += INTERVAL_S
        recurring.join()
        timer = recurring._timer  # pyright: ignore[reportPrivateUsage]
        assert timer is not None
        assert timer.when() - loop.time() == pytest.approx(INTERVAL_S * (1 + LATE), abs=1.0)

    run(scenario)


def test_what_it_does_cannot_make_it_join_itself() -> None:
    async def scenario(clock: Clock, work: Work, recurring: Recurring) -> None:
        work.meanwhile = recurring.join
        clock.now += INTERVAL_S
        recurring.join()
        assert len(work.times) == 2

    run(scenario)


def test_a_failure_is_the_runs_and_nobody_elses() -> None:
    async def scenario() -> None:
        clock, work, recurring, running = await begun()
        work.error = ValueError("a bug")
        clock.now += INTERVAL_S
        recurring.join()
        with pytest.raises(ValueError, match="a bug"):
            await running
        work.error = None
        recurring.join()
        assert len(work.times) == 1, "it runs no more"

    asyncio.run(scenario())


def test_who_wants_nothing_more_is_not_called_again() -> None:
    async def scenario(clock: Clock, work: Work, recurring: Recurring) -> None:
        work.interval_s = math.inf
        clock.now += INTERVAL_S
        recurring.join()
        assert len(work.times) == 2
        clock.now += 1000 * INTERVAL_S
        recurring.join()
        assert len(work.times) == 2
        assert recurring._timer is None  # pyright: ignore[reportPrivateUsage]

    run(scenario)


def test_nothing_is_left_of_a_run_that_is_over() -> None:
    async def scenario() -> None:
        clock, work, recurring, running = await begun()
        timer = recurring._timer  # pyright: ignore[reportPrivateUsage]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert timer is not None
        assert timer.cancelled()
        clock.now += INTERVAL_S
        recurring.join()
        assert len(work.times) == 1

    asyncio.run(scenario())


NAP_S = 10.0
"""Longer than a test: who wakes was woken."""


@dataclass
class Sleeper:
    """Somebody who naps in this loop, and what the naps see of the time."""

    clock: Clock
    task: "asyncio.Task[None]"
    waits: list[float]
    """What timers were asked for."""

    async def is_awake(self) -> bool:
        """After what was called soon was called."""
        for _ in range(3):
            await asyncio.sleep(0)
        return self.task.done()


async def asleep(monkeypatch: pytest.MonkeyPatch, *, ended_before_s: float = math.inf) -> Sleeper:
    """Somebody who has just fallen asleep, so long after something else was done."""
    clock, waits = Clock(), list[float]()
    monkeypatch.setattr(recurring_module, "time", SimpleNamespace(monotonic=clock))
    if ended_before_s < math.inf:
        naps().end()
        clock.now += ended_before_s
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(delay: float, *arguments: Any, **more: Any) -> asyncio.TimerHandle:
        waits.append(delay)
        return call_later(delay, *arguments, **more)

    monkeypatch.setattr(loop, "call_later", noted)
    sleeper = Sleeper(clock, asyncio.create_task(nap(NAP_S)), waits)
    assert not await sleeper.is_awake()
    return sleeper


def test_a_nap_is_a_sleep_where_nothing_else_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        sleeper = await asleep(monkeypatch)
        assert sleeper.waits == [NAP_S]
        sleeper.task.cancel()
        begun_at = time.monotonic()
        await nap(0.05)
        assert time.monotonic() - begun_at >= 0.05 - TIMER_S_MIN

    asyncio.run(scenario())


def test_a_nap_ends_beside_other_work_when_its_time_has_nearly_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        sleeper = await asleep(monkeypatch)
        sleeper.clock.now += NAP_S * (1 - EARLY) - 0.01
        naps().end()
        assert not await sleeper.is_awake(), "it is too early"
        sleeper.clock.now += 0.02
        naps().end()
        naps().end()
        assert await sleeper.is_awake()
        await sleeper.task

    asyncio.run(scenario())


@pytest.mark.parametrize(("before_s", "wait_s"), [(9.0, NAP_S * (1 + LATE)), (11.0, NAP_S)])
def test_a_nap_waits_for_other_work_where_there_was_some(
    monkeypatch: pytest.MonkeyPatch, before_s: float, wait_s: float
) -> None:
    async def scenario() -> None:
        sleeper = await asleep(monkeypatch, ended_before_s=before_s)
        assert sleeper.waits == [wait_s]
        sleeper.task.cancel()

    asyncio.run(scenario())


def test_each_nap_ends_in_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        sleeper = await asleep(monkeypatch)
        longer = Sleeper(sleeper.clock, asyncio.create_task(nap(2 * NAP_S)), [])
        assert not await longer.is_awake()
        sleeper.clock.now += NAP_S
        naps().end()
        assert await sleeper.is_awake()
        assert not await longer.is_awake()
        sleeper.clock.now += NAP_S
        naps().end()
        assert await longer.is_awake()

    asyncio.run(scenario())


def test_nothing_is_left_of_a_nap_that_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        sleeper = await asleep(monkeypatch)
        sleeper.task.cancel()
        await asyncio.gather(sleeper.task, return_exceptions=True)
        assert not naps()._naps  # pyright: ignore[reportPrivateUsage]
        sleeper.clock.now += NAP_S
        naps().end()

    asyncio.run(scenario())


class Asking:
    """A nap that asks whether it is over."""

    def __init__(self) -> None:
        self.is_over = False
        self.error: Exception | None = None
        self.num_asked = 0
        self.asked = asyncio.Event()

    def __call__(self) -> bool:
        self.num_asked += 1
        self.asked.set()
        if self.error is not None:
            raise self.error
        return self.is_over


def test_a_nap_that_asks_ends_with_the_answer() -> None:
    async def scenario() -> None:
        asking = Asking()
        sleeping = asyncio.create_task(naps().until(asking, 0.001))
        for _ in range(5):
            asking.asked.clear()
            await asking.asked.wait()
        assert not sleeping.done()
        asking.is_over = True
        await sleeping
        num_asked = asking.num_asked
        await naps().sleep(0.005)
        assert asking.num_asked == num_asked, "nobody asks any more"

    asyncio.run(scenario())


def test_it_is_asked_at_once_and_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock = Clock()
        monkeypatch.setattr(recurring_module, "time", SimpleNamespace(monotonic=clock))
        asking = Asking()
        sleeping = asyncio.create_task(naps().until(asking, INTERVAL_S))
        await asking.asked.wait()
        naps().end()
        assert asking.num_asked == 1
        for number in (2, 3, 4):
            clock.now += INTERVAL_S * (1 - EARLY) - 0.001
            naps().end()
            clock.now += 0.002
            naps().end()
            assert asking.num_asked == number
        asking.is_over = True
        clock.now += INTERVAL_S
        naps().end()
        await sleeping

    asyncio.run(scenario())


def test_a_nap_that_goes_on_has_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock, loop = Clock(), asyncio.get_running_loop()
        monkeypatch.setattr(recurring_module, "time", SimpleNamespace(monotonic=clock))
        timers: list[asyncio.TimerHandle] = []
        call_later = loop.call_later

        def noted(*arguments: Any) -> asyncio.TimerHandle:
            timers.append(call_later(*arguments))
            return timers[-1]

        monkeypatch.setattr(loop, "call_later", noted)
        asking = Asking()
        sleeping = asyncio.create_task(naps().until(asking, INTERVAL_S))
        await asking.asked.wait()
        for _ in range(5):
            clock.now += INTERVAL_S
            naps().end()
        assert len(timers) == 6
        assert [timer.cancelled() for timer in timers] == [True] * 5 + [False]
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        assert timers[-1].cancelled()

    asyncio.run(scenario())


def test_what_is_true_already_is_not_waited_for() -> None:
    async def scenario() -> None:
        asking = Asking()
        asking.is_over = True
        await naps().until(asking, INTERVAL_S)
        assert asking.num_asked == 1

    asyncio.run(scenario())


def test_a_question_that_fails_is_its_own_sleepers_failure() -> None:
    async def scenario() -> None:
        bad, good = Asking(), Asking()
        sleeping = [asyncio.create_task(naps().until(one, 0.001)) for one in (bad, good)]
        await bad.asked.wait()
        bad.error = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            await sleeping[0]
        good.is_over = True
        await sleeping[1]

    asyncio.run(scenario())


def test_each_loop_has_naps_of_its_own_and_takes_them_along() -> None:
    async def own() -> Naps:
        assert naps() is naps()
        return naps()

    first = asyncio.run(own())
    assert asyncio.run(own()) is not first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
