"""Cancels at random moments while workers die and drain, and random deadlines, on real processes.

`make cancels` has many more of each.
"""

import asyncio
from pathlib import Path

import uvloop

from benchmarks.cancels import Bench, Figures, bench
from tests.sidecar.processes import no_process_left

LIMIT_S = 60.0
"""The machine may be busy."""


def measured(directory: Path, *, cancels: int = 0, deadlines: int = 0) -> Figures:
    async def scenario(it: Bench) -> None:
        if cancels:
            await it.cancels(cancels)
        if deadlines:
            await it.deadlines(deadlines)
        await it.until_empty()

    async def limited() -> Figures:
        async with asyncio.timeout(LIMIT_S), bench(directory) as it:
            await scenario(it)
            return it.figures

    with no_process_left():
        return uvloop.run(limited())


def test_cancels_while_workers_die_and_drain_leave_nothing_behind(tmp_path: Path) -> None:
    seen = measured(tmp_path, cancels=40)
    assert len(seen.free_s) == 40
    assert seen.kills
    assert seen.not_cancelled == []
    assert (seen.late_tokens, seen.usage_wrong) == (0, 0)
    assert seen.held == []
    assert sorted(seen.free_s)[20] < 0.5, "an orphan would take a second"


def test_random_deadlines_end_all_requests_and_the_hopeless_at_once(tmp_path: Path) -> None:
    seen = measured(tmp_path, deadlines=40)
    assert set(seen.deadlines) == {"refused at once", "DEADLINE_EXCEEDED"}
    assert seen.deadlines.total() == 40
    # What workers bear is measured, and on a busy machine not always right.
    assert seen.hopeless_begun < seen.deadlines["refused at once"]
    assert seen.held == []
