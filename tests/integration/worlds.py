"""A mesh of real processes that a module's tests share, and the loop on which they talk to it."""

import asyncio
import os
import urllib.request
from collections.abc import Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from tests.sidecar.processes import no_process_left
from unbroken.client import Client
from unbroken.file_discovery import FileDiscovery
from unbroken.holdings import num_held
from unbroken.mesh import LocalMesh
from unbroken.mesh_ledger import mesh_ledger
from unbroken.v1 import holding_pb2

TIME_LIMIT_S = 30.0
"""Of one scenario; the machine may be busy with other tests."""
EMPTIED_S = 10.0
"""How long what tests left behind may take to be let go; attempts without a frontend take 5 s."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """A mesh that runs, and a client of its frontend."""

    mesh: LocalMesh
    client: Client
    runner: asyncio.Runner

    def run(self, scenario: Coroutine[Any, Any, T], *, limit_s: float = TIME_LIMIT_S) -> T:
        """Run a scenario on the world's loop, for a limited time."""

        async def limited() -> T:
            async with asyncio.timeout(limit_s):
                return await scenario

        return self.runner.run(limited())


@contextmanager
def real_mesh(directory: Path, *, is_emptied: bool = False, **settings: Any) -> Generator[World]:
    """A mesh with these settings of `LocalMesh`; none of its processes is left at the end.

    `is_emptied`: what the tests were done with was let go by all processes, too.
    """
    with no_process_left(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        mesh = LocalMesh(directory, **settings)
        client: Client | None = None
        try:
            runner.run(mesh.start())
            client = Client(mesh.frontend_address)
            yield World(mesh, client, runner)
            if is_emptied:
                runner.run(until_nothing_is_held(mesh))
        finally:
            if client is not None:
                runner.run(client.close())
            runner.run(mesh.stop())


async def until_nothing_is_held(mesh: LocalMesh, limit_s: float = EMPTIED_S) -> None:
    """Wait until no process of the mesh holds anything for a request; fails with what is held."""
    where = FileDiscovery(mesh.directory)
    held: Sequence[holding_pb2.ProcessHoldings] = ()
    async with Client(*mesh.frontend_addresses) as client:
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    held = await mesh_ledger(client, where)
                    if not num_held(held):
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            listed = [str(holding) for process in held for holding in process.holdings]
            raise AssertionError(
                "expected nothing to be held, found:\n" + "\n".join(listed)
            ) from None


def start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks: a pid that is used again has another one."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def scrape(address: str) -> dict[str, float]:
    """The metrics without labels at "host:port", by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
