"""A whole mesh on this machine: frontends, and sidecars that each have an engine.

    mesh = LocalMesh(Path(".run/demo"), num_workers=2, num_frontends=2, engine="simulated")
    async with mesh, Client(*mesh.frontend_addresses) as client:
        ...
        mesh.kill("w1", "host")
        mesh.kill("f1")

For demos, tests and benchmarks. Everything runs as separate processes that are really killed, and
nothing outlives the mesh: processes are tethered to this one and carry a mark in their environment
by which leftovers of any generation are found and killed at the end. What is killed stays dead
until it is restarted, by `restart` or by whoever runs `supervise`.
"""

import asyncio
import os
import secrets
import shlex
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self, TypeVar

from unbroken import log, tether
from unbroken.chaos.processes import is_alive
from unbroken.client import Client
from unbroken.config import split_address
from unbroken.discovery import FRONTENDS, WORKERS
from unbroken.errors import Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.garbage import collect_nothing_in_forks
from unbroken.restart import RestartPolicy, Restarts
from unbroken.tls import ClientTls
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import worker_pb2 as pb

READY_TIMEOUT_S: Final = 120.0
"""How long a mesh may take to start: engines load their models."""

_STOP_GRACE_S: Final = 3.0
_SWEEP_TIMEOUT_S: Final = 5.0
_SWEEP_POLL_S: Final = 0.01
_POLL_S: Final = 0.05
_MARK: Final = "UNBROKEN_MESH"
_LOG_TAIL_LINES: Final = 20

MEMORY = "memory"
"""Name of the memory service of a mesh that has one."""

Target = Literal["engine", "sidecar", "host"]
"""What dies of a worker: its engine's process group, its sidecar alone, or both at one moment."""

_log = log.get_logger(__name__)


class MeshError(Exception):
    """The mesh did not start, or one of its processes ended by itself."""


class LocalMesh:
    """Frontends "f1" to "fM" and workers "w1" to "wN", from `start` to `stop`."""

    def __init__(
        self,
        directory: Path,
        *,
        num_workers: int = 2,
        num_frontends: int = 1,
        engine: str | None = "simulated",
        engine_options: str = "",
        sidecar_flags: Sequence[str] = (),
        frontend_flags: Sequence[str] = (),
        frontend_listen: str = "127.0.0.1:0",
        flags_of: Mapping[str, Sequence[str]] = MappingProxyType({}),
        wrap_of: Mapping[str, Sequence[str]] = MappingProxyType({}),
        client_tls: ClientTls | None = None,
        admin_token: str | None = None,
        has_memory: bool = False,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """Discovery lives in `directory`, logs in `directory`/logs.

        `engine_options` go to the engine's command line, the flags to the processes they name;
        without an `engine`, `sidecar_flags` have to say which to start. The first frontend listens
        at `frontend_listen`, each further one at the next port; 0 lets the kernel choose for all.
        `has_memory` starts a memory service, and has the engines, which must be our own, use it.
        `flags_of` are more flags of one process by its name, which count before all others, and
        `wrap_of` a command, with its full path, that becomes its process, such as `ip netns exec`.
        """
        self.directory = directory
        self._worker_ids = [f"w{i + 1}" for i in range(num_workers)]
        self._listen = _addresses(frontend_listen, num_frontends)
        self._engine = engine
        self._engine_options = engine_options
        self._memory_ids = [MEMORY] if has_memory else []
        if has_memory:
            self._engine_options += f" --memory {shlex.quote(str(self.memory_directory))}"
        self._sidecar_flags = tuple(sidecar_flags)
        self._frontend_flags = tuple(frontend_flags)
        self._flags_of = flags_of
        self._wrap_of = wrap_of
        self._client_tls = client_tls
        """How the frontends are asked whether they serve, if their flags say TLS."""
        self._admin_token = admin_token
        """What they are asked with, if they ask for the token of an operator."""
        self._ready_timeout_s = ready_timeout_s
        self._discovery = FileDiscovery(directory)
        self._mark = secrets.token_hex(8)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._workers: Mapping[str, pb.WorkerRecord] = MappingProxyType({})
        self._frontends: Mapping[str, pb.FrontendRecord] = MappingProxyType({})
        self._known_frontends: dict[str, pb.FrontendRecord] = {}
        """The dead included; who is restarted listens where it did, since clients know it."""
        self._ends_told: set[str] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._restarting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        """Temporary files of all processes, since those that are killed remove none."""

    @property
    def frontend_address(self) -> str:
        """host:port of the InferenceService of the first frontend."""
        return self._known_frontend("f1").address

    @property
    def frontend_addresses(self) -> Sequence[str]:
        """host:port of every frontend's InferenceService, whether it lives or not; "f1" first."""
        return [self._known_frontend(frontend_id).address for frontend_id in self._listen]

    @property
    def frontend_pid(self) -> int:
        """Process id of the first frontend."""
        return self._known_frontend("f1").pid

    @property
    def frontends(self) -> Mapping[str, pb.FrontendRecord]:
        """What discovery knows of the frontends now, by id; the dead are missing."""
        return self._frontends

    @property
    def workers(self) -> Mapping[str, pb.WorkerRecord]:
        """What discovery knows of the workers now, by id; the dead are missing."""
        return self._workers

    @property
    def memory_directory(self) -> Path:
        """That of the memory service, if there is one."""
        return self.directory / "memory"

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
        self._scratch = tempfile.TemporaryDirectory(prefix="unbroken-", ignore_cleanup_errors=True)
        self._watches = [
            asyncio.create_task(self._follow_workers(), name="workers of the mesh"),
            asyncio.create_task(self._follow_frontends(), name="frontends of the mesh"),
        ]
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                for name in (*self._memory_ids, *self._worker_ids, *self._listen):
                    await self._start(name)
                await self.until_serving(self._worker_ids, list(self._listen))
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
        marked = _marked_processes(self._mark)
        for process in running:
            process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_GRACE_S):
                await asyncio.gather(*(process.wait() for process in running))
        await self._sweep(self._mark, marked)
        await asyncio.gather(*(process.wait() for process in running))
        self._processes.clear()
        self._known_frontends.clear()
        watches, self._watches = self._watches, []
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def is_serving(self) -> bool:
        """Whether a frontend runs."""
        return any(map(self._is_running, self._listen))

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

    async def supervise(
        self, tell: Callable[[str], None], *, policy: RestartPolicy | None = None
    ) -> None:
        """Start processes again that end; raises `MeshError` once no frontend is left to start.

        `tell` receives a line about every end, every restart, and whoever is given up.
        """
        policy = policy or RestartPolicy()
        kept = {
            asyncio.create_task(self._keep(name, Restarts(policy), tell), name=f"keep {name}"): name
            for name in (*self._memory_ids, *self._worker_ids, *self._listen)
        }
        try:
            while self._listen.keys() & kept.values():
                given_up, _ = await asyncio.wait(kept, return_when=asyncio.FIRST_COMPLETED)
                for task in given_up:
                    del kept[task]
                    task.result()
            raise MeshError("no frontend is left")
        finally:
            for task in kept:
                task.cancel()
            await asyncio.gather(*kept, return_exceptions=True)

    def kill(self, name: str, what: Target | None = None) -> None:
        """SIGKILL a frontend, the memory service, or `what` of a worker ("host" if not told).

        Raises UnbrokenError if it is not there.
        """
        if name in self._listen:
            if what is not None:
                raise ValueError(f"expected a frontend to be killed whole, got {what!r}")
            kill_frontend(_member(self._frontends, name))
        elif name in self._memory_ids:
            _kill(name, "memory service", self._processes[name].pid, os.kill)
        else:
            kill_worker(_member(self._workers, name), what or "host")

    async def restart(self, name: str) -> None:
        """Kill what is left of a worker or frontend, start it anew and wait until it serves.

        A memory service is not waited for: engines do without it as long as it is not there.
        """
        async with self._restarting[name]:
            await self._replace(name)
        async with asyncio.timeout(self._ready_timeout_s):
            if name in self._listen:
                running = [worker for worker in self._worker_ids if self._is_running(worker)]
                await self.until_serving(running, [name])
            elif name in self._worker_ids:
                await self.until_serving([name])

    async def until_serving(
        self, worker_ids: Sequence[str], frontend_ids: Sequence[str] | None = None
    ) -> None:
        """Wait until the frontends (those that run, if not told) can send work to the workers.

        Raises `MeshError` if one that was told has ended, or all have.
        """
        for frontend_id in self._listen if frontend_ids is None else frontend_ids:
            try:
                await self._until_reaching(frontend_id, worker_ids)
            except MeshError:
                if frontend_ids is not None or self._is_running(frontend_id):
                    raise  # Else it was killed just now, perhaps: that is known a moment later.
        if not self.is_serving:
            raise MeshError("expected a frontend, all have ended")

    async def _until_reaching(self, frontend_id: str, worker_ids: Sequence[str]) -> None:
        """Wait until the frontend can send work to the workers."""
        pid = self._processes[frontend_id].pid
        while (record := self._frontends.get(frontend_id)) is None or record.pid != pid:
            self._check_running([frontend_id])
            await asyncio.sleep(_POLL_S)
        async with Client(
            record.address, tls=self._client_tls, admin_token=self._admin_token
        ) as client:
            while True:
                self._check_running([frontend_id, *worker_ids])
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
                    for worker_id, record in self._workers.items()
                    if record.engine_pgid  # Published a moment after the engine serves.
                }
                if pids.items() <= ready.items() and pids.items() <= known.items():
                    return
                await asyncio.sleep(_POLL_S)

    async def _keep(self, name: str, restarts: Restarts, tell: Callable[[str], None]) -> None:
        """Start a process again whenever it ends, until it is given up."""
        loop = asyncio.get_running_loop()
        while True:
            began_at = loop.time()
            process = self._processes[name]
            status = await process.wait()
            log_path = self.log_directory / f"{name}.log"
            backoff_s = restarts.life_ended(served_since=began_at, now=loop.time())
            if backoff_s is None:
                tell(f"{name} ended with status {status} and is given up; log: {log_path}")
                return
            tell(f"{name} ended with status {status}; log: {log_path}")
            await asyncio.sleep(backoff_s)
            async with self._restarting[name]:
                if self._processes.get(name) is process:  # Else somebody else restarted it.
                    await self._replace(name)
                    tell(f"{name} is started again")

    async def _replace(self, name: str) -> None:
        """Kill what is left of a process and of what it started, and start it anew."""
        await self._sweep(f"{self._mark}/{name}/")
        if (process := self._processes.get(name)) is not None:
            await process.wait()
        await self._start(name)

    async def _start(self, name: str) -> None:
        if name in self._listen:
            known = self._known_frontends.get(name)
            flags = [
                *("--frontend-id", name),
                *("--discovery", str(self.directory)),
                *("--listen", known.address if known else self._listen[name]),
                *self._frontend_flags,
            ]
            await self._run(name, "frontend", flags)
            return
        if name == MEMORY:
            await self._run(name, "memory_service", ["--directory", str(self.memory_directory)])
            return
        flags = [
            *("--worker-id", name),
            *("--discovery", str(self.directory)),
            *("--listen", "127.0.0.1:0"),
            *(("--engine", self._engine) if self._engine else ()),
            *(("--engine-options", self._engine_options) if self._engine_options else ()),
            *self._sidecar_flags,
        ]
        await self._run(name, "sidecar", flags)

    async def _run(self, name: str, module: str, flags: Sequence[str]) -> None:
        """Start `python -m module`, tethered and marked; its output goes to its log file."""
        command = [
            *self._wrap_of.get(name, ()),
            *(sys.executable, "-m", module, *flags),
            *self._flags_of.get(name, ()),  # The last of a flag counts.
        ]
        assert self._scratch is not None, "the mesh is started"
        self._ends_told.discard(name)
        path = self.log_directory / f"{name}.log"
        collect_nothing_in_forks()
        with path.open("ab") as output:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone.
                env={
                    **os.environ,
                    _MARK: f"{self._mark}/{name}/",
                    "TMPDIR": self._scratch.name,
                },
            )
        _log.info("process started", name=name, command=shlex.join(command), log=str(path))

    async def _follow_workers(self) -> None:
        """Keep `workers` up to date."""
        async with aclosing(self._discovery.watch(WORKERS)) as changes:
            async for self._workers in changes:
                pass

    async def _follow_frontends(self) -> None:
        """Keep `frontends` up to date."""
        async with aclosing(self._discovery.watch(FRONTENDS)) as changes:
            async for self._frontends in changes:
                self._known_frontends.update(self._frontends)

    def _is_running(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.returncode is None

    def _check_running(self, names: Sequence[str]) -> None:
        for name in names:
            status = self._processes[name].returncode
            if status is not None:
                path = self.log_directory / f"{name}.log"
                lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
                raise MeshError("\n".join([f"{name} ended with status {status}:", *lines]))

    async def _sweep(self, mark: str, dying: Sequence[int] = ()) -> None:
        """SIGKILL every process whose mark begins so, until there is none, nor any of the dying.

        A process that is about to end shows no mark any more, but may still hold what it had.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _SWEEP_TIMEOUT_S
        seen = set(dying)
        while True:
            marked = _marked_processes(mark)
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            seen.update(marked)
            seen = {pid for pid in seen if is_alive(pid)}
            if not (marked or seen):
                return
            if loop.time() > give_up_at:
                raise MeshError(f"expected processes to die, still there: {sorted(seen)}")
            await asyncio.sleep(_SWEEP_POLL_S)

    def _known_frontend(self, frontend_id: str) -> pb.FrontendRecord:
        if frontend_id not in self._known_frontends:
            raise MeshError("expected a started mesh")
        return self._known_frontends[frontend_id]


_MemberT = TypeVar("_MemberT", pb.WorkerRecord, pb.FrontendRecord)


def _member(members: Mapping[str, _MemberT], name: str) -> _MemberT:
    if name not in members:
        raise UnbrokenError(Reason.NO_WORKER, f"expected a living member of the mesh, got {name!r}")
    return members[name]


def kill_frontend(record: pb.FrontendRecord) -> None:
    """SIGKILL the frontend on this machine; raises UnbrokenError if it is not there."""
    _kill(record.frontend_id, "frontend", record.pid, os.kill)


def kill_worker(record: pb.WorkerRecord, what: Target) -> None:
    """SIGKILL `what` of the worker on this machine; raises UnbrokenError if it is not there."""
    worker_id = record.identity.worker_id
    if what in ("sidecar", "host"):  # The sidecar first: it must not live to tell of the engine.
        _kill(worker_id, "sidecar", record.sidecar_pid, os.kill)
    if what in ("engine", "host"):
        with suppress(UnbrokenError) if what == "host" else nullcontext():  # It may die by itself.
            _kill(worker_id, "engine", record.engine_pgid, os.killpg)


def _kill(name: str, part: str, number: int, send: Callable[[int, int], None]) -> None:
    if number <= 1:  # 0 would be our own process group.
        raise UnbrokenError(Reason.NO_WORKER, f"the {part} of {name} has no process here")
    try:
        send(number, signal.SIGKILL)
    except ProcessLookupError:
        raise UnbrokenError(Reason.NO_WORKER, f"the {part} of {name} is gone") from None


def _addresses(first: str, number: int) -> Mapping[str, str]:
    """Where the frontends listen, by id: ports in a row, or any. Raises ValueError."""
    host, port = split_address(first)
    shown = f"[{host}]" if ":" in host else host
    addresses = {f"f{i + 1}": f"{shown}:{port + i if port else 0}" for i in range(max(1, number))}
    for address in addresses.values():
        split_address(address)  # The last ports may be too high.
    return MappingProxyType(addresses)


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
