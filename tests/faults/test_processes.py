"""A fault on a process is over only when the kernel says that it took effect."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from unbroken.chaos import processes
from unbroken.chaos.processes import FullDisk, NoDescriptors, NoEffect, Slowdown

LIMIT_S = 20.0

# Counts, so that it can be seen running; opens a file and says how that went when it reads a line.
COUNTING = """
import itertools, os, sys, threading, time
def say(text):
    os.write(1, f"{text}\\n".encode())
def count():
    for number in itertools.count():
        say(number)
        time.sleep(0.001)
threading.Thread(target=count, daemon=True).start()
for line in sys.stdin:
    try:
        with open(line.strip(), "a") as file:
            file.write("x" * 100)
        say("written")
    except OSError as error:
        say(error.strerror)
"""


@asynccontextmanager
async def counting() -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COUNTING),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answer(process: asyncio.subprocess.Process, path: Path) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{path}\n".encode())
    while (line := (await process.stdout.readline()).decode().strip()).isdigit():
        pass
    return line


async def _read_on(output: asyncio.StreamReader) -> int:
    """Read until there is nothing more to read for 50 ms; how many lines there were."""
    num_lines = 0
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.05):
                await output.readline()
            num_lines += 1
    return num_lines


def run(scenario: Callable[[asyncio.subprocess.Process], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S), counting() as process:
            await scenario(process)

    uvloop.run(limited())


def test_a_kill_ends_a_whole_group() -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        assert processes.group(process.pid) == (process.pid,)
        await processes.kill(processes.group(process.pid))
        assert not processes.is_alive(process.pid)
        assert await process.wait() == -signal.SIGKILL
        assert processes.group(process.pid) == ()

    run(scenario)


def test_a_stopped_process_does_nothing_until_it_goes_on() -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        await processes.stop([process.pid])
        assert processes.is_stopped(process.pid)
        assert processes.is_alive(process.pid)
        await _read_on(process.stdout)  # What it had written before; and it comes to an end.
        await processes.resume([process.pid])
        assert not processes.is_stopped(process.pid)
        assert await process.stdout.readline()

    run(scenario)


def test_a_terminated_process_has_taken_the_signal() -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        await processes.terminate([process.pid])
        assert await process.wait() == -signal.SIGTERM

    run(scenario)


def test_a_slowed_process_runs_for_a_share_of_the_time() -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        async with Slowdown(lambda: [process.pid], running_s=0.002, stopped_s=0.02) as slow:
            while slow.num_stops < 5:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.005)
        assert not processes.is_stopped(process.pid)

    run(scenario)


def test_without_descriptors_nothing_can_be_opened(tmp_path: Path) -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        assert await answer(process, tmp_path / "before") == "written"
        starved = NoDescriptors(process.pid)
        starved.begin()
        assert await answer(process, tmp_path / "during") == os.strerror(24)
        starved.end()
        assert await answer(process, tmp_path / "after") == "written"

    run(scenario)


def test_on_a_full_disk_nothing_can_be_written(tmp_path: Path) -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        full = FullDisk(process.pid)
        full.begin()
        path = tmp_path / "log"
        assert await answer(process, path) == os.strerror(27)
        assert path.stat().st_size <= 1
        full.end()
        assert await answer(process, path) == "written"

    run(scenario)


def test_a_fault_on_nothing_is_no_fault() -> None:
    async def scenario(process: asyncio.subprocess.Process) -> None:
        process.kill()
        await process.wait()
        with pytest.raises(NoEffect):
            await processes.stop(processes.group(process.pid))
        with pytest.raises(NoEffect):
            await processes.kill([])
        with pytest.raises(NoEffect):
            processes.group(0)

    run(scenario)
