"""Claims of `sidecar.supervisor` and its reaper, with real processes that are really killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from sidecar import supervisor
from sidecar.supervisor import EngineProcess
from tests.sidecar.processes import no_process_left, until
from unbroken.realtime import is_allowed, is_before_others, run_before_others

TIMEOUT_S = 20
SLEEP = "sleep 1000"
# A child in its group, an orphan with a session of its own, and itself.
FAMILY = ("sh", "-c", f"{SLEEP} & setsid --fork {SLEEP}; exec {SLEEP}")
IGNORES_SIGTERM = ("sh", "-c", f"trap '' TERM; {SLEEP} & exec {SLEEP}")
# Says so when it is told to end. `wait` returns for a trap, where a foreground child would not.
SAYS_GOODBYE = ("sh", "-c", "trap 'echo goodbye; exit 5' TERM; echo here; sleep 1000 & wait")
# Starts one more sleeper each time it is told to end.
COUNTS_SIGTERM = (
    "sh",
    "-c",
    f"trap 'echo asked; {SLEEP} &' TERM; {SLEEP} & while true; do wait; done",
)

Alive = Callable[[], list[str]]


def run(scenario: Callable[[Alive], Awaitable[None]]) -> None:
    async def with_limit(alive: Alive) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(alive)

    with no_process_left() as alive:
        uvloop.run(with_limit(alive))


async def started(command: tuple[str, ...], alive: Alive, num_sleeping: int) -> EngineProcess:
    process = EngineProcess.start(command)
    await until(lambda: alive().count(SLEEP) == num_sleeping and process.pid != 0)
    return process


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("sh", "-c", "exit 3"), "exited with status 3"),
        (("true",), "exited with status 0"),
        (("sh", "-c", "kill -SEGV $$"), "was killed by SIGSEGV"),
        (("no-such-command-anywhere",), "exited with status 127"),
    ],
)
def test_how_it_ended_is_told(command: tuple[str, ...], told: str) -> None:
    async def scenario(_alive: Alive) -> None:
        process = EngineProcess.start(command)
        assert str(await process.exited) == told
        await process.wait_gone()

    run(scenario)


def test_a_death_is_noticed_at_once() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(("sleep", "1000"), alive, 1)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        await process.exited
        assert time.monotonic() - began < 0.25  # Most often 1 ms; this machine is shared.
        await process.wait_gone()

    run(scenario)


def environment_in_group(group: int, command: str) -> bytes:
    """Of the process that runs `command` there."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended, or is somebody else's.
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if os.getpgid(int(process.name)) == group and " ".join(words).strip() == command:
                return (process / "environ").read_bytes()
    raise AssertionError(f"nobody runs {command}")


@pytest.mark.parametrize("has_sleep", [True, False])
def test_the_death_of_its_group_is_noticed_by_a_companion_that_is_sleep_where_there_is_one(
    has_sleep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not has_sleep:
        monkeypatch.setattr(supervisor, "COMPANION", "/nowhere/sleep")
    other = tmp_path / "sleep"  # What an engine's environment does to it is not for the companion.
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/allocator.so")
    command, companion = ("/bin/sleep", "1000"), f"sleep {2**31 - 1}"

    async def scenario(alive: Alive) -> None:
        process = EngineProcess.start(command)
        await until(lambda: " ".join(command) in alive())
        await until(lambda: len(alive()) == 3 and alive().count(companion) == has_sleep)
        if has_sleep:
            assert b"LD_PRELOAD" not in environment_in_group(process.pid, companion)
        assert not process.group_killed.done()
        os.killpg(process.pid, signal.SIGKILL)
        await process.group_killed
        await process.wait_gone()

    run(scenario)


def test_it_leads_a_session_and_a_group() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(("sleep", "1000"), alive, 1)
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        process.kill()
        await process.wait_gone()

    run(scenario)


def test_it_has_no_real_time_priority_though_its_starter_has() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(("sleep", "1000"), alive, 1)
        assert is_before_others()
        assert not is_before_others(process.pid)
        process.kill()
        await process.wait_gone()

    if not is_allowed(10):
        pytest.skip("no real-time priority for this user")
    run_before_others(10)
    try:
        run(scenario)
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _signal_masks(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = [line.split() for line in lines if line.startswith("Sig")]
    return {name: int(mask, 16) for name, mask in fields if name != "SigQ:"}


def test_it_begins_with_no_signal_blocked_and_none_ignored_by_us() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(("sleep", "1000"), alive, 1)
        masks, ours = _signal_masks(process.pid), _signal_masks(os.getpid())
        of_libc = 0b11 << 31  # Signals 32 and 33, which no program may touch, but libraries do.
        # What whoever started us ignores (nohup, a shell's background) is meant for all below us.
        of_python = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
        inherited = ours["SigIgn:"] & ~of_python
        assert masks["SigBlk:"] & ~of_libc == 0
        assert masks["SigIgn:"] & ~(of_libc | inherited) == 0
        process.kill()
        await process.wait_gone()

    run(scenario)


def test_what_an_engine_started_dies_with_it_even_in_another_session() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(FAMILY, alive, 3)
        os.kill(process.pid, signal.SIGKILL)
        await process.exited
        await process.wait_gone()
        assert alive() == []

    run(scenario)


def test_kill_ends_everything() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(FAMILY, alive, 3)
        process.kill()
        process.kill()
        await process.wait_gone()
        assert alive() == []
        assert str(process.exited.result()) == "was killed by SIGKILL"

    run(scenario)


def test_kill_ends_everything_even_if_it_was_stopped_with_its_reaper() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(FAMILY, alive, 3)
        reaper = parent_of(process.pid)
        os.kill(reaper, signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGSTOP)
        await until(lambda: state_of(reaper) == state_of(process.pid) == "T")
        process.kill()
        async with asyncio.timeout(5):  # Long before the reaper itself is given up.
            await process.wait_gone()
        assert alive() == []

    run(scenario)


def stat_of(pid: int) -> list[str]:
    """What follows the name in /proc/<pid>/stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state_of(pid: int) -> str:
    return stat_of(pid)[0]


def parent_of(pid: int) -> int:
    return int(stat_of(pid)[1])


STARTER = """
import asyncio, sys
from sidecar.supervisor import EngineProcess

async def main():
    process = EngineProcess.start(sys.argv[1:])
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("is_group_stopped", [False, True])
def test_sigkill_of_the_parent_leaves_no_engine_and_no_grandchild(is_group_stopped: bool) -> None:
    async def scenario(alive: Alive) -> None:
        starter = subprocess.Popen([sys.executable, "-c", STARTER, *FAMILY])  # noqa: ASYNC220
        try:
            await until(lambda: alive().count(SLEEP) == 3)
            if is_group_stopped:
                os.killpg(group_of_sleepers(starter.pid), signal.SIGSTOP)
        finally:
            starter.kill()
            starter.wait()
        await until(lambda: alive() == [])

    run(scenario)


def group_of_sleepers(starter: int) -> int:
    """The engine's group: starter, its child the reaper, whose first child is the engine."""
    (reaper,) = children_of(starter)
    return children_of(reaper)[0]


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_sigkill_of_the_reaper_leaves_nothing_of_the_group() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(IGNORES_SIGTERM, alive, 2)
        (reaper,) = [p for p in children_of(os.getpid()) if process.pid in children_of(p)]
        os.kill(reaper, signal.SIGKILL)
        assert (await process.exited).status is None
        await process.wait_gone()
        await until(lambda: alive() == [])

    run(scenario)


def test_sigkill_of_parent_and_reaper_together_leaves_no_engine() -> None:
    async def scenario(alive: Alive) -> None:
        starter = subprocess.Popen([sys.executable, "-c", STARTER, "sleep", "1000"])  # noqa: ASYNC220
        try:
            await until(lambda: alive().count(SLEEP) == 1)
            (reaper,) = children_of(starter.pid)
            starter.send_signal(signal.SIGSTOP)  # It must not see the reaper die.
            os.kill(reaper, signal.SIGKILL)
        finally:
            starter.kill()
            starter.wait()
        await until(lambda: alive() == [])

    run(scenario)


def test_stop_lets_it_end_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(_alive: Alive) -> None:
        err = ""

        def is_here() -> bool:
            nonlocal err
            err += capfd.readouterr().err
            return "here" in err

        process = EngineProcess.start(SAYS_GOODBYE)
        await until(is_here)
        began = time.monotonic()
        await asyncio.gather(process.stop(grace_s=TIMEOUT_S), process.stop(grace_s=TIMEOUT_S))
        assert time.monotonic() - began < TIMEOUT_S / 2
        assert str(process.exited.result()) == "exited with status 5"
        assert capfd.readouterr().err == "[engine] goodbye\n"
        await process.stop(grace_s=TIMEOUT_S)

    run(scenario)


def test_it_is_asked_to_end_only_once(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(COUNTS_SIGTERM, alive, 1)
        process.terminate()
        await until(lambda: alive().count(SLEEP) == 2)
        process.terminate()
        await process.stop(grace_s=0.1)

    run(scenario)
    assert capfd.readouterr().err == "[engine] asked\n"


def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(IGNORES_SIGTERM, alive, 2)
        began = time.monotonic()
        await process.stop(grace_s=0.2)
        assert time.monotonic() - began >= 0.2
        assert alive() == []
        assert str(process.exited.result()) == "was killed by SIGKILL"

    run(scenario)


def test_a_stopped_engine_is_killed_after_its_grace() -> None:
    async def scenario(alive: Alive) -> None:
        process = await started(FAMILY, alive, 3)
        os.killpg(process.pid, signal.SIGSTOP)
        await process.stop(grace_s=0.1)
        assert alive() == []

    run(scenario)


def test_killing_one_that_has_hardly_begun_leaves_nothing() -> None:
    async def scenario(alive: Alive) -> None:
        for wait_s in (0, 0.005, 0.01, 0.015, 0.02, 0.03):
            process = EngineProcess.start(FAMILY)
            await asyncio.sleep(wait_s)
            process.kill()
            await process.wait_gone()
            assert alive() == []

    run(scenario)


def test_its_output_comes_line_by_line_and_long_lines_in_pieces(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def scenario(_alive: Alive) -> None:
        script = "import sys; print('out', flush=True); sys.stderr.write('x' * 5000 + '\\nlast')"
        process = EngineProcess.start((sys.executable, "-c", script))
        await process.exited
        await process.wait_gone()

    run(scenario)
    assert capfd.readouterr().err.splitlines() == [
        "[engine] out",
        "[engine] " + "x" * 4000,
        "[engine] " + "x" * 1000,
        "[engine] last",
    ]
