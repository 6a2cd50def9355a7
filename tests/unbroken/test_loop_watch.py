"""Claims of `unbroken.loop_watch`."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from unbroken.loop_watch import watched_loop

LATE_S = 0.2
STANDS_S = 1.0
"""Whatever else the machine does, it is looked at in this time."""
TIMEOUT_S = 30


def sleep_through() -> None:
    time.sleep(STANDS_S)


def compute() -> None:
    end = time.thread_time() + STANDS_S
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize(
    ("standing", "is_busy"), [(sleep_through, False), (compute, True)], ids=["waits", "computes"]
)
def test_a_loop_that_stands_is_told_of_with_where_it_is_and_what_it_had(
    caplog: pytest.LogCaptureFixture, standing: Callable[[], None], is_busy: bool
) -> None:
    def told() -> list[dict[str, Any]]:
        return [cast("dict[str, Any]", one.msg) for one in caplog.records]

    async def scenario() -> None:
        async with watched_loop(late_s=LATE_S), asyncio.timeout(TIMEOUT_S):
            await asyncio.sleep(0)  # It is watched from here on.
            standing()
            while len(told()) < 2:  # noqa: ASYNC110 - The loop's own tick tells.
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING):
        uvloop.run(scenario())
    stands, stood = told()[:2]
    assert stands["event"] == "event loop stands still"
    assert any(standing.__name__ in place for place in stands["at"])
    assert stood["event"] == "event loop stood still"
    assert stood["late_s"] > LATE_S
    assert (stood["cpu_s"] > STANDS_S / 2) is is_busy


def test_a_loop_that_goes_on_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with watched_loop(late_s=TIMEOUT_S):
            await asyncio.sleep(LATE_S)

    with caplog.at_level(logging.WARNING):
        uvloop.run(scenario())
    assert not caplog.records
