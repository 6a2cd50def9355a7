"""What `bench-edge`, `bench-peers` and `bench-idle` put under load."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from benchmarks.edge_rows import Hop
from unbroken.mesh import LocalMesh

_START_S_MAX: Final = 30.0


def hop_of(mesh: LocalMesh, edge: str) -> Hop:
    """The only frontend of a mesh with one worker."""
    (worker,) = mesh.workers.values()
    return Hop(edge, mesh.frontend_address, mesh.frontend_pid, worker.sidecar_pid)


def stamping_mesh(
    directory: Path,
    edge: str,
    step_ms: float,
    frontend_flags: Sequence[str] = (),
    sidecar_flags: Sequence[str] = (),
) -> LocalMesh:
    """One frontend, one sidecar, an engine of stamps."""
    socket = directory / "engine.sock"
    engine = f"{sys.executable} -m benchmarks.stamping --socket {socket} --step-ms {step_ms}"
    stamping = (
        *("--engine-socket", str(socket), "--engine-command", engine),
        *("--canary-period-s", "0"),  # No two of its answers are the same.
    )
    return LocalMesh(
        directory / "mesh",
        num_workers=1,
        engine=None,
        sidecar_flags=(*stamping, *sidecar_flags),
        frontend_flags=("--edge", edge, *frontend_flags),
    )


def bare_engine(
    step_ms: float, model: Path | None = None
) -> AbstractAsyncContextManager[tuple[str, int]]:
    """The direct path: address and process id."""
    path = "" if model is None else str(model)
    return stepping("benchmarks.bare_engine", step_ms, "--model-path", path)


@asynccontextmanager
async def stepping(module: str, step_ms: float, *flags: str) -> AsyncGenerator[tuple[str, int]]:
    """Run a module that serves clients at that pace: its address and process id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--step-ms", str(step_ms), *flags), stdout=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S_MAX):
            address = (await process.stdout.readline()).decode().strip()
        yield address, process.pid
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
