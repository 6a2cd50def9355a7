"""A whole mesh on this machine: a frontend, and sidecars that each have an engine.

    async with LocalMesh(Path(".run/demo"), num_workers=2, engine="simulated") as mesh:
        async with Client(mesh.frontend_address) as client:
            ...
            mesh.kill("w1", "host")

For demos, tests and benchmarks. Everything runs as separate processes that are really killed, and
nothing outlives the mesh: processes are tethered to this one and carry a mark in their environment
by which leftovers of any generation are found and killed at the end.
"""

import asyncio
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

from unbroken import log, tether
from unbroken.client import Client
from unbroken.discovery import FRONTENDS, WORKERS
from unbroken.errors import Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import worker_pb2 as pb

READY_TIMEOUT_S: Final = 120.0
"""How long a mesh may take to start: engines load their models."""

_STOP_GRACE_S: Final = 3.0
_SWEEP_TIMEOUT_S: Final = 5.0
_SWEEP_POLL_S: Final = 0.01
_POLL_S: Final = 0.05
_MARK: Final = "UNBROKEN_MESH"
_FRONTEND_ID: Final = "f1"
_LOG_TAIL_LINES: Final = 20

Target = Literal["engine", "sidecar", "host"]
"""What dies of a worker: its engine's process group, its sidecar alone, or both at one moment."""

_log = log.get_logger(__name__)


class MeshError(Exception):
    """The mesh did not start, or one of its processes ended by itself."""


class LocalMesh:
    """One frontend ("f1") and workers "w1" to "wN", from `start` to `stop`."""

    def __init__(
        self,
        directory: Path,
        *,
        num_workers: int = 2,
        engine: str | None = "simulated",
        engine_options: str = "",
        sidecar_flags: Sequence[str] = (),
        frontend_flags: Sequence[str] = (),
        frontend_listen: str = "127.0.0.1:0",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """Discovery lives in `directory`, logs in `directory`/logs.

        `engine_options` go to the engine's command line, the flags to the processes they name;
        without an `engine`, `sidecar_flags` have to say which to start.
        """
        self.directory = directory
        self._worker_ids = [f"w{i + 1}" for i in range(num_workers)]
        self._engine = engine
        self._engine_options = engine_options
        self._sidecar_flags = tuple(sidecar_flags)
        self._frontend_flags = tuple(frontend_flags)
        self._frontend_listen = frontend_listen
        self._ready_timeout_s = ready_timeout_s
        self._discovery = FileDiscovery(directory)
        self._mark = secrets.token_hex(8)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._records: Mapping[str, pb.WorkerRecord] = MappingProxyType({})
        self._frontend: pb.FrontendRecord | None = None
        self._ends_told: set[str] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def frontend_address(self) -> str:
        """host:port of the InferenceService."""
        return self._started_frontend().address

    @property
    def frontend_pid(self) -> int:
        """Process id of the frontend."""
        return self._started_frontend().pid

    @property
    def workers(self) -> Mapping[str, pb.WorkerRecord]:
        """What discovery knows of the workers now, by id; the dead are missing."""
        return self._records

    @property
    def log_directory(self) -> Path:
        """One file for each process."""
        return self.directory / "logs"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start everything and wait until every worker takes work; raises `MeshError`."""
        for running in (
            await self._discovery.snapshot(FRONTENDS),
            await self._discovery.snapshot(WORKERS),
        ):
            if running:
                raise MeshError(
                    f"expected no mesh in {self.directory}, found {', '.join(sorted(running))}"
                )
        self.log_directory.mkdir(parents=True, exist_ok=True)
        for path in self.log_directory.glob("*.log"):
            path.unlink()  # Of an earlier mesh. A restart within this one adds to its log.
        self._watch = asyncio.create_task(self._follow(), name="mesh membership")
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                for worker_id in self._worker_ids:
                    await self._start_sidecar(worker_id)
                await self._start_frontend()
                await self.until_serving(self._worker_ids)
        except TimeoutError:
            await self.stop()
            raise MeshError(
                f"expected a mesh within {self._ready_timeout_s:g} s, see {self.log_directory}"
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End everything: kindly at first, then whatever is left. Idempotent."""
        running = [p for p in self._processes.values() if p.returncode is None]
        for process in running:
            process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_GRACE_S):
                await asyncio.gather(*(process.wait() for process in running))
        await self._sweep(self._mark)
        await asyncio.gather(*(process.wait() for process in running))
        self._processes.clear()
        self._frontend = None
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    @property
    def is_serving(self) -> bool:
        """Whether the frontend runs."""
        frontend = self._processes.get(_FRONTEND_ID)
        return frontend is not None and frontend.returncode is None

    async def until_one_ends(self) -> tuple[str, int]:
        """Wait until a process of the mesh ends by itself or is killed; its name and status.

        Each end is told once. Raises `MeshError` if none is left.
        """
        waits = {
            asyncio.create_task(process.wait()): name
            for name, process in self._processes.items()
            if name not in self._ends_told
        }
        if not waits:
            raise MeshError("all processes have ended")
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        task = min(done, key=waits.__getitem__)
        self._ends_told.add(waits[task])
        return waits[task], task.result()

    def kill(self, worker_id: str, what: Target = "host") -> None:
        """SIGKILL `what` of a worker; raises UnbrokenError if it is not there."""
        if worker_id not in self._records:
            raise UnbrokenError(Reason.NO_WORKER, f"expected a living worker, got {worker_id!r}")
        kill_worker(self._records[worker_id], what)

    async def restart(self, worker_id: str) -> None:
        """Kill what is left of a worker, start it anew and wait until it takes work."""
        await self._sweep(f"{self._mark}/{worker_id}")
        if (process := self._processes.pop(worker_id, None)) is not None:
            await process.wait()
        await self._start_sidecar(worker_id)
        async with asyncio.timeout(self._ready_timeout_s):
            await self.until_serving([worker_id])

    async def _start_sidecar(self, worker_id: str) -> None:
        flags = [
            *("--worker-id", worker_id),
            *("--discovery", str(self.directory)),
            *("--listen", "127.0.0.1:0"),
            *(("--engine", self._engine) if self._engine else ()),
            *(("--engine-options", self._engine_options) if self._engine_options else ()),
            *self._sidecar_flags,
        ]
        await self._run(worker_id, "sidecar", flags)

    async def _start_frontend(self) -> None:
        flags = [
            *("--frontend-id", _FRONTEND_ID),
            *("--discovery", str(self.directory)),
            *("--listen", self._frontend_listen),
            *self._frontend_flags,
        ]
        await self._run(_FRONTEND_ID, "frontend", flags)

    async def _run(self, name: str, module: str, flags: Sequence[str]) -> None:
        """Start `python -m module`, tethered and marked; its output goes to its log file."""
        command = [sys.executable, "-m", module, *flags]
        self._ends_told.discard(name)
        path = self.log_directory / f"{name}.log"
        with path.open("ab") as output:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone.
                env={**os.environ, _MARK: f"{self._mark}/{name}"},
            )
        _log.info("process started", name=name, command=shlex.join(command), log=str(path))

    async def _follow(self) -> None:
        """Keep `workers` up to date."""
        async with aclosing(self._discovery.watch(WORKERS)) as changes:
            async for records in changes:
                self._records = records

    async def until_serving(self, worker_ids: Sequence[str]) -> None:
        """Wait until the frontend can send work to the workers; raises `MeshError`."""
        while self._frontend is None:
            self._check_running([_FRONTEND_ID])
            frontends = await self._discovery.snapshot(FRONTENDS)
            self._frontend = frontends.get(_FRONTEND_ID)
            await asyncio.sleep(_POLL_S)
        async with Client(self._frontend.address) as client:
            while True:
                self._check_running([_FRONTEND_ID, *worker_ids])
                try:
                    workers = await client.list_workers()
                except UnbrokenError as error:
                    if error.reason is not Reason.UNREACHABLE:
                        raise
                    workers = ()
                ready = {
                    worker.record.identity.worker_id: worker.record.sidecar_pid
                    for worker in workers
                    if worker.engine == pb.ENGINE_STATE_SERVING
                    and worker.link == admin_pb.LINK_STATE_UP
                }
                # By process, so that an earlier life of a restarted worker does not count.
                pids = {worker_id: self._processes[worker_id].pid for worker_id in worker_ids}
                known = {
                    worker_id: record.sidecar_pid
                    for worker_id, record in self._records.items()
                    if record.engine_pgid  # Published a moment after the engine serves.
                }
                if pids.items() <= ready.items() and pids.items() <= known.items():
                    return
                await asyncio.sleep(_POLL_S)

    def _check_running(self, names: Sequence[str]) -> None:
        for name in names:
            status = self._processes[name].returncode
            if status is not None:
                path = self.log_directory / f"{name}.log"
                lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
                raise MeshError("\n".join([f"{name} ended with status {status}:", *lines]))

    async def _sweep(self, mark: str) -> None:
        """SIGKILL every process whose mark begins so, until there is none."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _SWEEP_TIMEOUT_S
        while pids := _marked_processes(mark):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if loop.time() > give_up_at:
                raise MeshError(f"expected processes to die, still there: {pids}")
            await asyncio.sleep(_SWEEP_POLL_S)

    def _started_frontend(self) -> pb.FrontendRecord:
        if self._frontend is None:
            raise MeshError("expected a started mesh")
        return self._frontend


def kill_worker(record: pb.WorkerRecord, what: Target) -> None:
    """SIGKILL `what` of the worker on this machine; raises UnbrokenError if it is not there."""
    worker_id = record.identity.worker_id
    if what in ("sidecar", "host"):  # The sidecar first: it must not live to tell of the engine.
        _kill(worker_id, "sidecar", record.sidecar_pid, os.kill)
    if what in ("engine", "host"):
        with suppress(UnbrokenError) if what == "host" else nullcontext():  # It may die by itself.
            _kill(worker_id, "engine", record.engine_pgid, os.killpg)


def _kill(worker_id: str, part: str, number: int, send: Callable[[int, int], None]) -> None:
    if number <= 1:  # 0 would be our own process group.
        raise UnbrokenError(Reason.NO_WORKER, f"the {part} of {worker_id} has no process here")
    try:
        send(number, signal.SIGKILL)
    except ProcessLookupError:
        raise UnbrokenError(Reason.NO_WORKER, f"the {part} of {worker_id} is gone") from None


def _marked_processes(mark: str) -> list[int]:
    """Living processes whose mark begins so."""
    wanted = f"{_MARK}={mark}".encode()
    found: list[int] = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):  # Gone meanwhile, or somebody else's.
                environ = Path(entry.path, "environ").read_bytes()  # Empty for zombies.
                if any(variable.startswith(wanted) for variable in environ.split(b"\0")):
                    found.append(int(entry.name))
    return found
