"""Claims of `unbroken.garbage`."""

import asyncio
import gc
import subprocess
import sys
import weakref

import pytest
import uvloop

from unbroken import garbage
from unbroken.garbage import collected_in_quiet

TIMEOUT_S = 30


class Cycle:
    """Only a collection ends it."""

    def __init__(self) -> None:
        self.itself = self


def num_full() -> int:
    """Full collections so far."""
    return gc.get_stats()[2]["collections"]


def old_cycle() -> "weakref.ref[Cycle]":
    """One that only a full collection finds."""
    it = Cycle()
    for _ in range(2):
        gc.collect(1)  # It survives, and is looked at less often.
    return weakref.ref(it)


async def until_gone(what: "weakref.ref[Cycle]") -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while what() is not None:  # noqa: ASYNC110 - The collector tells nobody.
            await asyncio.sleep(0.001)


def test_a_burst_of_objects_brings_no_full_collection() -> None:
    def burst() -> None:
        _ = [[[index]] for index in range(200_000)]

    async def scenario() -> None:
        async with collected_in_quiet(lambda: False):
            begun = num_full()
            burst()
            assert num_full() == begun

    gc.collect()
    begun = num_full()
    burst()
    assert num_full() > begun, "otherwise it brings one"
    uvloop.run(scenario())


def num_young() -> int:
    """Collections of young objects so far."""
    return gc.get_stats()[0]["collections"]


def test_nothing_is_collected_while_it_waits_which_ends_with_the_whole() -> None:
    kept: list[list[int]] = []

    def burst() -> None:
        kept.extend([index] for index in range(2_000))

    async def scenario() -> None:
        async with collected_in_quiet(lambda: False):
            garbage.wait()
            begun = num_young()
            burst()
            assert num_young() == begun
            garbage.wait_no_more()
            burst()
            assert num_young() > begun
            garbage.wait()
        assert gc.isenabled()
        garbage.wait()
        assert gc.isenabled(), "nobody would end it"

    uvloop.run(scenario())


def test_what_is_old_and_in_a_cycle_goes_as_soon_as_nothing_runs() -> None:
    async def scenario() -> None:
        is_idle = False
        async with collected_in_quiet(
            lambda: is_idle, look_interval_s=0.001, idle_interval_s=0.0, busy_interval_s=1e9
        ):
            it, begun = old_cycle(), num_full()
            await asyncio.sleep(0.05)  # Many looks.
            assert num_full() == begun
            assert it() is not None
            is_idle = True
            await until_gone(it)

    uvloop.run(scenario())


def test_a_process_that_is_never_idle_keeps_it_no_longer_than_an_interval() -> None:
    async def scenario() -> None:
        now = 0.0
        async with collected_in_quiet(
            lambda: False, look_interval_s=0.001, busy_interval_s=100.0, clock=lambda: now
        ):
            it = old_cycle()
            now = 99.0
            await asyncio.sleep(0.05)
            assert it() is not None
            now = 100.0
            await until_gone(it)

    uvloop.run(scenario())


def test_afterwards_all_is_as_before() -> None:
    async def scenario() -> None:
        async with collected_in_quiet(lambda: True):
            assert gc.get_freeze_count() > 0

    before = gc.get_threshold()
    uvloop.run(scenario())
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


STARTS_A_PROCESS = """
import asyncio, gc, os, sys, uvloop
from unbroken.garbage import collect_nothing_in_forks

if "uncollected" in sys.argv:
    collect_nothing_in_forks()
    collect_nothing_in_forks()
os.register_at_fork(after_in_child=lambda: print(gc.isenabled(), flush=True))

async def start():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()

uvloop.run(start())
print(gc.isenabled())
"""


@pytest.mark.parametrize(("how", "said"), [("uncollected", ["False", "True"]), ("", ["True"] * 2)])
def test_nothing_is_collected_between_a_fork_and_the_program_that_follows(
    how: str, said: list[str]
) -> None:
    command = [sys.executable, "-c", STARTS_A_PROCESS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout.split() == said
