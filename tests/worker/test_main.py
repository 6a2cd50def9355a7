"""`python -m worker` as its parent sees it."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from tests.worker.engines import starting
from unbroken import framing
from unbroken.v1 import engine_pb2

TIMEOUT_S = 30


@asynccontextmanager
async def worker(*arguments: str) -> AsyncGenerator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "--log-format", "json", *arguments, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ready(process: Process) -> str:
    """Everything logged up to the line that says so."""
    assert process.stderr is not None
    logged = ""
    while line := (await process.stderr.readline()).decode():
        logged += line
        if '"event": "ready"' in line:
            return logged
    raise AssertionError(f"it never got ready: {logged}")


@pytest.mark.parametrize("busy", [False, True])
def test_it_exits_with_0_when_asked_even_in_the_middle_of_a_step(
    tmp_path: Path, busy: bool
) -> None:
    async def run() -> None:
        path = tmp_path / "engine"
        flags = ("--engine", "simulated", "--socket", str(path), "--step-base-ms", "60000")
        async with worker(*flags) as process:
            await ready(process)
            connection = await framing.connect_unix(str(path), engine_pb2.EngineResponse)
            connection.send(
                engine_pb2.EngineRequest(hello=engine_pb2.EngineHello(protocol_version=1))
            )
            if busy:
                connection.send(engine_pb2.EngineRequest(start=starting(slot=1)))
            await connection.receive()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 5) == 0
            while await connection.receive():
                pass
            connection.abort()
            await connection.wait_closed()
        assert not path.exists()

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_it_takes_the_place_of_a_socket_that_a_killed_one_left(tmp_path: Path) -> None:
    async def run() -> None:
        flags = ("--engine", "simulated", "--socket", str(tmp_path / "engine"))
        async with worker(*flags) as process:
            await ready(process)
            process.kill()
            await process.wait()
        async with worker(*flags) as process:
            await ready(process)

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--engine", "llama", "--model", "/nowhere.gguf"), 1, "engine can't be loaded"),
        (("--engine", "simulated", "--kv-blocks", "3"), 1, "room for context_length"),
        (("--engine", "magic"), 2, "engine: expected one of llama, simulated"),
    ],
)
def test_an_engine_that_can_not_be_loaded_is_said_and_told_by_the_exit_status(
    tmp_path: Path, flags: tuple[str, ...], status: int, said: str
) -> None:
    async def run() -> None:
        async with worker("--socket", str(tmp_path / "engine"), *flags) as process:
            _, logged = await process.communicate()
            assert process.returncode == status
            assert said in logged.decode()

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))
