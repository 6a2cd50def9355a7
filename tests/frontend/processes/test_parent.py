"""How the parent of a frontend's processes keeps them, with programs that do as a test says."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from typing_extensions import override

from frontend.config import FrontendConfig
from frontend.processes import parent
from frontend.processes.child import Place
from frontend.processes.parent import MISSES_MIN, Child, Parent

SERVES = "print('ready', flush=True); import time; time.sleep(60)"
HANGS = "import time; time.sleep(60)"
CHATS = "print('hello', flush=True); import time; time.sleep(60)"


def program(text: str) -> Sequence[str]:
    return sys.executable, "-I", "-S", "-c", text


class OtherParent(Parent):
    """One whose processes are no frontends."""

    program = program(SERVES)
    num_tries = 0

    @override
    def command(self, place: Place) -> Sequence[str]:
        self.num_tries += 1
        return self.program


class WatchedChild(Child):
    """One that tells which signals it was sent."""

    def __init__(self, parent: Parent) -> None:
        super().__init__(parent, 1)
        self.signals: list[signal.Signals] = []

    @override
    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        super().signal(number)


@asynccontextmanager
async def family(directory: Path) -> AsyncGenerator[tuple[OtherParent, WatchedChild]]:
    """A parent, and a process that has not been started."""
    settings: dict[str, Any] = {"edge": "native", "processes": 2}
    config = FrontendConfig(frontend_id="f1", discovery=directory, **settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        parent = OtherParent(config, [], listener, "127.0.0.1:1", directory)
        child = WatchedChild(parent)
        try:
            yield parent, child
        finally:
            await child.kill()
            await parent.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    uvloop.run(limited())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing announces it.
        await asyncio.sleep(0.01)


def test_a_process_that_cannot_be_started_again_at_once_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "START_PAUSE_S", 0.01)

    async def scenario() -> None:
        async with family(tmp_path) as (it, child):
            await child.start()
            keeping = asyncio.create_task(child.keep())
            it.program, it.num_tries = ["/there/is/no/such/program"], 0
            before = child.pid
            os.kill(before, signal.SIGKILL)
            await until(lambda: it.num_tries >= 3 or keeping.done())
            assert not keeping.done(), keeping
            it.program = program(SERVES)
            await until(lambda: child.is_ready)
            assert child.pid != before
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize("text", [HANGS, CHATS])
def test_a_process_that_hangs_when_it_starts_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(parent, "START_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with family(tmp_path) as (it, child):
            it.program = program(text)
            await child.start()
            assert not child.is_ready
            assert child.status == -signal.SIGKILL

    run(scenario())


def test_a_process_is_killed_that_has_missed_several_looks_in_a_row_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "HUNG_S", -1.0)  # As if it were always over.

    async def scenario() -> None:
        async with family(tmp_path) as (_, child):
            child.missed(child.pid)  # It has not been started.
            await child.start()
            for _ in range(MISSES_MIN - 1):
                child.missed(child.pid)
            child.answered()
            for _ in range(MISSES_MIN):
                child.missed(child.pid + 1)  # The one before it.
            for _ in range(MISSES_MIN - 1):
                child.missed(child.pid)
            assert child.signals == []
            child.missed(child.pid)
            assert child.signals == [signal.SIGKILL]

    run(scenario())
