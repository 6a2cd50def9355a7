"""When an alarm rings."""

import asyncio
from collections.abc import Callable, Coroutine

import uvloop

from frontend.alarm import Alarm


def alarmed(scenario: Callable[[Alarm, "list[float]"], Coroutine[None, None, None]]) -> None:
    """Run a scenario with an alarm, and when it rang, in seconds since the beginning."""

    async def limited() -> None:
        loop, rings = asyncio.get_running_loop(), list[float]()
        alarm = Alarm(lambda: rings.append(loop.time()), loop.time)
        async with asyncio.timeout(10):
            await scenario(alarm, rings)

    uvloop.run(limited())


async def until_rung(rings: list[float], times: int = 1) -> None:
    while len(rings) < times:  # noqa: ASYNC110 - nothing announces it.
        await asyncio.sleep(0.001)


def test_it_rings_once_at_the_earliest_time_whatever_came_first() -> None:
    async def scenario(alarm: Alarm, rings: list[float]) -> None:
        now = asyncio.get_running_loop().time()
        for due in (now + 60.0, None, now + 0.02, now + 30.0):
            alarm.set(due)
        await until_rung(rings)
        assert now + 0.01 < rings[0] < now + 10.0
        assert len(rings) == 1
        alarm.set(now)  # What is past is due at once.
        await until_rung(rings, 2)

    alarmed(scenario)


def test_it_is_stopped_and_set_again() -> None:
    async def scenario(alarm: Alarm, rings: list[float]) -> None:
        now = asyncio.get_running_loop().time()
        alarm.set(now)
        alarm.stop()
        alarm.stop()
        later = list[float]()
        asyncio.get_running_loop().call_later(0.02, later.append, 1.0)
        await until_rung(later)
        assert not rings
        alarm.set(now)
        await until_rung(rings)

    alarmed(scenario)
