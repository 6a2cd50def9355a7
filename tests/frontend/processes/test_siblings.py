"""How the processes of a frontend call each other, in one process."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import Counter

from frontend.processes.siblings import Siblings, add_siblings, ask_metrics, socket_of
from frontend.requests import Requests
from unbroken import metrics
from unbroken.transport import listen_locally, make_server


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    uvloop.run(limited())


@asynccontextmanager
async def sibling(directory: Path, pid: int) -> AsyncGenerator[None]:
    """One that serves as the process of that id, and has counted to 3."""
    registry = metrics.new_registry()
    Counter("counted", "What it has counted.", registry=registry).inc(3)
    server = make_server()
    add_siblings(server, Requests(running_max=1), registry)
    listen_locally(server, socket_of(directory, pid))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def test_a_process_whose_threads_are_all_busy_still_answers_its_parent(tmp_path: Path) -> None:
    async def scenario() -> None:
        is_over = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, is_over.wait)
        siblings = Siblings(tmp_path)
        try:
            async with sibling(tmp_path, 1):
                families = await ask_metrics(siblings.channel(1))
        finally:
            is_over.set()
            await busy
            await siblings.close()
        samples = {one.name: one.samples for one in families}
        assert samples["counted"] == {("counted_total", ()): 3.0}

    run(scenario())
