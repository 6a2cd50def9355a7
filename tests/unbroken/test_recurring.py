"""What is done again and again: when it is due, or beside something else around that time."""

import asyncio
import math
from collections.abc import Callable, Coroutine

import pytest

from unbroken.recurring import EARLY, LATE, Recurring

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
