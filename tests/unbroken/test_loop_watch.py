"""Claims of `unbroken.loop_watch`."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from unbroken.loop_watch import watched_loop

LATE_S = 0.2
TIMEOUT_S = 30.0
IN_TIME_S = 1.5

Records = list[dict[str, Any]]


def told(caplog: pytest.LogCaptureFixture, event: str) -> Records:
    records = [cast("dict[str, Any]", one.msg) for one in caplog.records]
    return [one for one in records if one["event"] == event]


def sleep_until(is_enough: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not is_enough() and time.monotonic() < until:
        time.sleep(0.01)


def compute_until(is_enough: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not is_enough() and time.monotonic() < until:
        pass


@pytest.mark.parametrize(
    ("standing", "is_busy"),
    [(sleep_until, False), (compute_until, True)],
    ids=["waits", "computes"],
)
def test_a_loop_that_stands_is_told_of_with_where_it_is_and_what_it_had(
    caplog: pytest.LogCaptureFixture,
    standing: Callable[[Callable[[], bool]], None],
    is_busy: bool,
) -> None:
    def is_seen() -> bool:
        """In that function, not in what came before on a slow machine."""
        return any(
            standing.__name__ in place
            for one in told(caplog, "event loop stands still")
            for place in one["at"]
        )

    async def scenario() -> None:
        async with watched_loop(late_s=LATE_S), asyncio.timeout(TIMEOUT_S):
            await asyncio.sleep(0)  # It is watched from here on.
            standing(is_seen)
            while not told(caplog, "event loop stood still"):  # noqa: ASYNC110 - Its own tick tells.
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING):
        uvloop.run(scenario())
    assert is_seen()
    stood = max(told(caplog, "event loop stood still"), key=lambda one: one["late_s"])
    assert stood["late_s"] > LATE_S
    assert stood["disk_faults"] >= 0
    if is_busy:  # It computed, or others did and it stood in line.
        assert stood["cpu_s"] + stood.get("in_line_s", 0.0) > stood["late_s"] / 2
        assert stood["cpu_s"] > 0.01
    else:
        assert stood["cpu_s"] < stood["late_s"] / 2


def test_a_loop_that_goes_on_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """For longer than one that stands may take to be told of."""

    async def scenario() -> None:
        async with watched_loop(late_s=IN_TIME_S / 3):
            until = time.monotonic() + IN_TIME_S
            while time.monotonic() < until:
                turns.append(time.monotonic())
                await asyncio.sleep(0.01)

    turns: list[float] = []
    with caplog.at_level(logging.WARNING):
        uvloop.run(scenario())
    pauses_s = [after - before for before, after in itertools.pairwise(turns)]
    assert not caplog.records or max(pauses_s) > IN_TIME_S / 6, "unless the machine had it stand"


def test_nothing_of_it_is_left() -> None:
    async def scenario() -> None:
        async with watched_loop():
            assert any(one.name == "loop watch" for one in threading.enumerate())

    uvloop.run(scenario())
    assert not any(one.name == "loop watch" for one in threading.enumerate())
