"""Units of an engine and its sidecar, as `unbroken run` starts them, behind one frontend."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from benchmarks.before_others import allowed_priority, before_others
from tests.engines.real.servers import tail
from unbroken import tether
from unbroken.client import Client
from unbroken.loop_watch import watched_loop
from unbroken.mesh import LocalMesh
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import worker_pb2

SETTINGS: Final[Mapping[str, str]] = MappingProxyType({
    "UNBROKEN_SIDECAR_ENGINE_IS_INVARIANT": "true",  # It is, in float32 on a CPU.
    "UNBROKEN_SIDECAR_ENGINE_START_TIMEOUT_S": "900",
})  # fmt: skip
_POLL_S: Final = 0.1
_STOP_S: Final = 20.0


@dataclass
class Units:
    """A mesh whose workers are these."""

    mesh: LocalMesh
    client: Client
    directory: Path
    processes: dict[str, asyncio.subprocess.Process] = field(
        default_factory=dict[str, "asyncio.subprocess.Process"]
    )
    hurt: dict[str, int] = field(default_factory=dict[str, int])
    """The process groups of engines that were hurt: others have to serve instead."""

    def group(self, name: str) -> int:
        """The process group of a unit's engine, led by its server."""
        return self.mesh.workers[name].engine_pgid

    async def until_serving(self, limit_s: float) -> None:
        """Wait until all units take work, none with an engine that was hurt.

        Raises RuntimeError, with the end of a log.
        """
        try:
            async with asyncio.timeout(limit_s):
                while not await self._are_serving():  # noqa: ASYNC110 - Others say so.
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            logs = "\n".join(tail(self.directory / f"{name}.log") for name in self.processes)
            raise RuntimeError(f"no engines within {limit_s:g} s:\n{logs}") from None

    async def _are_serving(self) -> bool:
        for name, process in self.processes.items():
            if process.returncode is not None:
                log = tail(self.directory / f"{name}.log")
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{log}")
        serving = {
            worker.record.identity.worker_id
            for worker in await self.client.list_workers()
            if worker.engine == worker_pb2.ENGINE_STATE_SERVING
            and worker.link == admin_pb.LINK_STATE_UP
        }
        groups = {name: record.engine_pgid for name, record in self.mesh.workers.items()}
        return serving >= self.processes.keys() and all(
            groups.get(name) not in (None, 0, self.hurt.get(name)) for name in self.processes
        )


@asynccontextmanager
async def running(
    directory: Path,
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    *,
    frontend_flags: Sequence[str] = (),
) -> AsyncGenerator[Units, None]:
    """`unbroken run -- COMMAND` for each name, and a frontend before them; not ready yet."""
    # Two vLLM on two cores let others wait for seconds, by the kernel's own account (`event loop
    # stood still`, in_line_s). A frontend that does not answer for so long is lost to its clients,
    # as it should be, and nothing of it is what is to be shown here.
    priority = allowed_priority()
    # Who kills engines on purpose is not to be told that a request kills engines.
    always = ("--query-deaths-max", "1000", "--realtime-priority", str(priority))
    mesh = LocalMesh(
        directory / "mesh", num_workers=0, engine=None, frontend_flags=[*always, *frontend_flags]
    )
    async with AsyncExitStack() as stack:
        stack.enter_context(before_others(priority))
        await stack.enter_async_context(mesh)
        client = await stack.enter_async_context(Client(mesh.frontend_address))
        units = Units(mesh, client, directory)
        stack.push_async_callback(_stop, units.processes)
        for name, command in commands.items():
            with (directory / f"{name}.log").open("wb") as output:
                units.processes[name] = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
                    *(sys.executable, "-m", "unbroken.cli", "run"),
                    *(f"--worker-id={name}", f"--discovery={mesh.directory}", "--", *command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env={
                        **os.environ,
                        **environment,
                        **SETTINGS,
                        "UNBROKEN_SIDECAR_REALTIME_PRIORITY": str(priority),
                    },
                )
        async with watched_loop():  # What it says of a frontend, it may be to blame for itself.
            yield units


async def _stop(processes: Mapping[str, asyncio.subprocess.Process]) -> None:
    """End them; their engines end with them."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in processes.values() if process.returncode is None]
        for process in left:
            with suppress(ProcessLookupError):
                process.send_signal(sent)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.gather(*(process.wait() for process in left))
