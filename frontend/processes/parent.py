"""The parent of a frontend's processes: it listens, hands out connections, and restarts who dies.

It has the port, so a second frontend on it fails as it should; it gives each connection to the
process that has the fewest; it adds up what they count. Processes die with it, however it ends.

    starting ──ready──▶ serving ──dies──▶ backoff ──▶ starting
                                    └──crashes in a loop──▶ given up
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, cast

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from frontend.config import FrontendConfig
from frontend.drain import ExitStatus
from frontend.metrics import ParentMetrics
from frontend.processes.child import DRAINS, READY, TAKEN_AT_ONCE, Place
from frontend.processes.siblings import Siblings, ask_metrics, families_of, socket_of
from frontend.processes.sums import Sums
from unbroken import discovery, log, metrics, tether
from unbroken.config import split_address
from unbroken.discovery import FRONTENDS
from unbroken.edge.server import BACKLOG
from unbroken.garbage import collect_nothing_in_forks
from unbroken.health import HealthServicer
from unbroken.loop_watch import watched_loop
from unbroken.probes import Probes
from unbroken.restart import RestartPolicy, Restarts
from unbroken.scratch import Scratch
from unbroken.signals import heed, heed_no_more
from unbroken.v1 import worker_pb2

POLL_INTERVAL_S: Final = 1.0
"""Between two looks at each process; what it counted since the last one is lost if it is killed."""
SILENT_S: Final = 2.5
"""A process that does not answer for so long gets no connections while others do."""
HUNG_S: Final = 5.0
"""A process that does not answer for so long is killed, if"""
MISSES_MIN: Final = 3
"""it has missed so many looks in a row: one can have been missed because the parent stood still."""
START_TIMEOUT_S: Final = 60.0
"""A process that does not serve by then is killed."""
START_PAUSE_S: Final = 1.0
"""Between two tries to start a process where none can be started."""
STOP_MARGIN_S: Final = 10.0
"""Beyond its grace, how long a process may take to stop."""
ACCEPT_PAUSE_S: Final = 0.1
"""After an error of `accept`, such as too many open files."""
SCRAPE_TIMEOUT_S: Final = 3.0

EXIT_GIVEN_UP: Final = 3

_log = log.get_logger(__name__)


async def serve(config: FrontendConfig, argv: Sequence[str]) -> int:
    """Run a frontend of several processes until it is asked to stop; returns the exit status.

    Raises OSError or `UnbrokenError` if it cannot start. `argv` is what it was told, for them.
    """
    listener, address = await _listen(config.listen)
    with listener, closing(Scratch("unbroken-frontend-")) as scratch:
        parent = Parent(config, argv, listener, address, scratch.path)
        heed(lambda _: parent.asked_to_stop())
        try:
            await parent.start()
            async with watched_loop():
                return await parent.run()
        finally:
            await parent.close()
            heed_no_more()


class Parent:
    """One life of a frontend of several processes."""

    def __init__(
        self,
        config: FrontendConfig,
        argv: Sequence[str],
        listener: socket.socket,
        address: str,
        directory: Path,
    ) -> None:
        """`listener` listens at `address`; in `directory` processes meet."""
        self._config = config
        self._argv = argv
        self._listener = listener
        self._address = address
        self._directory = directory
        self._siblings = Siblings(directory)
        self._metrics_server: metrics.MetricsServer | None = None
        self._registration: discovery.Registration[worker_pb2.FrontendRecord] | None = None
        self._is_stopping = asyncio.Event()
        self._num_signals = 0
        self._budget_s = config.shutdown_grace_s
        """How long what runs may go on when they stop."""
        self._is_accepting = False
        self._children: list[Child] = []
        self._asked: list[Child] = []
        """Those that served when all were asked to stop: the status is theirs."""
        self._tasks: list[asyncio.Task[None]] = []
        self._health = HealthServicer(["startup", "readiness"])
        self._health.set("liveness", is_serving=True)
        self._probes = Probes(self._health)
        self._sums = Sums()
        self._registry = metrics.new_registry()
        self._counted = ParentMetrics(self._registry)
        self._counted.processes.set_function(
            lambda: sum(child.is_ready for child in self._children)
        )

    async def start(self) -> None:
        """Start all processes, wait until they serve, and join the mesh. Raises OSError."""
        config = self._config
        if config.metrics_listen is not None:
            registry = CollectorRegistry()
            registry.register(_Whole(self))
            self._metrics_server = metrics.serve(
                registry, *split_address(config.metrics_listen), probes=self._probes
            )
        self._children = [Child(self, number + 1) for number in range(config.processes)]
        await asyncio.gather(*(child.start() for child in self._children))
        for child in self._children:
            if not child.is_ready and not self._is_stopping.is_set():
                raise OSError(f"process {child.number} ended with status {child.status}")
        self._tasks = [
            *(asyncio.create_task(child.keep()) for child in self._children),
            asyncio.create_task(self._poll()),
            asyncio.create_task(self._probes.run()),
        ]
        where = discovery.connect(config.discovery)
        incarnation = await where.new_incarnation(FRONTENDS, config.frontend_id)
        record = worker_pb2.FrontendRecord(
            frontend_id=config.frontend_id,
            incarnation=incarnation,
            address=config.advertise or self._address,
            pid=os.getpid(),
            metrics_address=self._metrics_server.address if self._metrics_server else "",
        )
        self._registration = await where.register(FRONTENDS, record)
        for probe in ("startup", "readiness"):
            self._health.set(probe, is_serving=not self.is_stopping)
        _log.info("frontend serves", address=self._address, processes=config.processes)

    async def run(self) -> int:
        """Until it is asked to stop, or every process is given up; returns the exit status."""
        asked = asyncio.create_task(self._is_stopping.wait())
        kept = asyncio.gather(*self._tasks[: len(self._children)])
        await asyncio.wait({asked, kept}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not self._is_stopping.is_set():
            kept.result()
            _log.error("every process crashes in a loop")
            return EXIT_GIVEN_UP
        if self._registration is not None:
            await self._registration.close()
            self._registration = None
        await asyncio.gather(*(child.until_stopped() for child in self._children))
        statuses = [child.status for child in self._asked]
        _log.info("frontend stopped", statuses=statuses)
        if not all(status in (ExitStatus.DRAINED, ExitStatus.CUT_SHORT) for status in statuses):
            return ExitStatus.FAILED
        return ExitStatus.CUT_SHORT if ExitStatus.CUT_SHORT in statuses else ExitStatus.DRAINED

    async def close(self) -> None:
        """Leave nothing and nobody behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in self._children:
            await child.kill()
        self._accept_no_more()
        if self._registration is not None:
            await self._registration.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        await self._siblings.close()

    def asked_to_stop(self) -> None:
        """A signal came: pass it on. The second one means at once."""
        self._num_signals += 1
        self._stop(self._config.shutdown_grace_s)
        for child in self._children:
            child.signal(signal.SIGTERM if self._num_signals == 1 else signal.SIGINT)

    def asked_to_drain(self, budget_s: float | None) -> None:
        """One of the processes was asked to, and tells the others."""
        self._stop(self._config.shutdown_grace_s if budget_s is None else budget_s)

    def _stop(self, budget_s: float) -> None:
        if not self._is_stopping.is_set():
            _log.info("frontend is asked to stop", budget_s=budget_s)
            self._is_stopping.set()
            self._health.set("readiness", is_serving=False)
            self._asked = [child for child in self._children if child.is_ready]
            self._budget_s = budget_s

    # What children need.

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping.is_set()

    @property
    def stop_timeout_s(self) -> float:
        """How long a process may take to stop."""
        return self._budget_s + STOP_MARGIN_S

    def command(self, place: Place) -> Sequence[str]:
        """What a process is started with; it dies with this one."""
        return (
            *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
            *(sys.executable, "-m", "frontend.processes.child", place.to_argument()),
            *self._argv,
        )

    def place(self, number: int, descriptor: int) -> Place:
        return Place(number, str(self._directory), self._address, descriptor)

    def child_began(self, *, is_again: bool) -> None:
        """A process serves."""
        if is_again:
            self._counted.restarts.inc()
        self._accept_more()

    def child_ended(self, pid: int) -> None:
        """A process is gone."""
        self._sums.ended(pid)
        with suppress(FileNotFoundError):
            socket_of(self._directory, pid).unlink()

    # Connections.

    def _accept_more(self) -> None:
        if not self._is_accepting and self._listener.fileno() >= 0:
            self._is_accepting = True
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept_no_more(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            asyncio.get_running_loop().remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(TAKEN_AT_ONCE):
            ready = [child for child in self._children if child.is_ready]
            if not ready:
                self._accept_no_more()  # Who connects now waits for the next process that serves.
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("no connection accepted", detail=str(error))
                self._accept_no_more()
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._accept_more)
                return
            with connection:  # Whoever gets it has a descriptor of its own.
                ready.sort(key=lambda child: (child.is_silent, child.num_connections))
                if not any(child.give(connection) for child in ready):
                    _log.warning("connection refused: no process takes any")

    # Metrics.

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            for child, pid in await self.ask_all():
                child.missed(pid)
            await self._siblings.forget_gone()

    async def ask_all(self) -> Sequence[tuple["Child", int]]:
        """Have every process report what it has counted; returns those that do not answer."""
        asked = [(child, child.pid) for child in self._children if child.is_ready]
        answers = await asyncio.gather(*(self._ask(child, pid) for child, pid in asked))
        return [one for one, has_answered in zip(asked, answers, strict=True) if not has_answered]

    async def _ask(self, child: "Child", pid: int) -> bool:
        try:
            families = await ask_metrics(self._siblings.channel(pid))
        except grpc.RpcError as error:
            code = cast("grpc.aio.AioRpcError", error).code()
            _log.warning("a process does not answer", pid=pid, code=code.name)
            return False
        if child.pid == pid and child.is_ready:
            child.answered()
            self._sums.report(pid, families)
        return True

    def collect(self) -> Iterable[Metric]:
        """What the metrics page shows, from the newest reports."""
        self._sums.report(os.getpid(), families_of(self._registry))
        for family in self._sums.families():
            metric = Metric(family.name, family.documentation, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


class Child:
    """One of the processes, and those that come after it in its place."""

    def __init__(self, parent: Parent, number: int) -> None:
        self.number = number
        self.is_ready = False
        self.num_connections = 0
        self._parent = parent
        self._process: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self._ready_at: float | None = None
        self._answered_at = 0.0
        self._num_missed = 0
        """Looks in a row that it has not answered."""

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    @property
    def status(self) -> int | None:
        """With which it ended; None while it runs."""
        return None if self._process is None else self._process.returncode

    @property
    def is_silent(self) -> bool:
        """It has not answered for a while."""
        return asyncio.get_running_loop().time() - self._answered_at > SILENT_S

    async def start(self) -> None:
        """Start it; returns when it serves or has ended. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            place = self._parent.place(self.number, theirs.fileno())
            collect_nothing_in_forks()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._parent.command(place),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in the terminal is for the parent alone.
                )
            except BaseException:
                ours.close()
                raise
        self._channel = ours
        self.num_connections = 0
        if self._parent.is_stopping:
            self.signal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._read, ours)
        if not await self._becomes_ready(self._process):
            self._ended()
            return
        self.answered()
        self._ready_at = loop.time()
        self.is_ready = True

    async def _becomes_ready(self, process: asyncio.subprocess.Process) -> bool:
        """Wait until it serves; False if it has ended."""
        assert process.stdout is not None, "it is a pipe"
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if await process.stdout.readline() == READY:
                    return True
                await process.wait()
        except TimeoutError:
            _log.error("a process does not start and is killed", number=self.number)
            self.signal(signal.SIGKILL)
            await process.wait()
        return False

    async def keep(self) -> None:
        """Start it again whenever it ends, until it is given up or all stop."""
        restarts = Restarts(RestartPolicy())
        loop = asyncio.get_running_loop()
        is_again = False
        while True:
            if self.is_ready:
                self._parent.child_began(is_again=is_again)
            assert self._process is not None, "it was started"
            pid, status = self.pid, await self._process.wait()
            self._ended()
            if self._parent.is_stopping:
                return
            _log.error("a process ended", number=self.number, pid=pid, status=status)
            backoff_s = restarts.life_ended(served_since=self._ready_at, now=loop.time())
            if backoff_s is None:
                _log.error("a process is given up: it crashes in a loop", number=self.number)
                return
            await asyncio.sleep(backoff_s)
            if self._parent.is_stopping:
                return
            is_again = True
            self._ready_at = None
            await self._start_again()

    async def _start_again(self) -> None:
        """Start it, if not now then later: that there is no memory for it may pass."""
        while not self._parent.is_stopping:
            try:
                await self.start()
            except OSError as error:
                _log.error("a process cannot be started", number=self.number, detail=str(error))
                await asyncio.sleep(START_PAUSE_S)
            else:
                return

    async def until_stopped(self) -> None:
        """Wait until it has stopped, as it was asked to. Who takes too long is killed."""
        process = self._process
        if process is None:
            return
        try:
            async with asyncio.timeout(self._parent.stop_timeout_s):
                await process.wait()
        except TimeoutError:
            _log.error("a process does not stop and is killed", number=self.number)
            process.kill()
            await process.wait()

    async def kill(self) -> None:
        """End it now, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._ended()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def give(self, connection: socket.socket) -> bool:
        """Hand it a connection; False if it takes none."""
        if self._channel is None:
            return False
        try:
            socket.send_fds(self._channel, [b"connection"], [connection.fileno()])
        except OSError:  # It is about to end, or has not read for long.
            return False
        self.num_connections += 1
        return True

    def answered(self) -> None:
        """It has given a sign of life."""
        self._answered_at = asyncio.get_running_loop().time()
        self._num_missed = 0

    def missed(self, pid: int) -> None:
        """The process of that id has not answered; if it has not for long, it never will."""
        if pid != self.pid or not self.is_ready:
            return  # It has ended, and another may have begun.
        self._num_missed += 1
        silent_s = asyncio.get_running_loop().time() - self._answered_at
        if self._num_missed >= MISSES_MIN and silent_s > HUNG_S:
            _log.error("a process hangs and is killed", number=self.number, pid=pid)
            self.signal(signal.SIGKILL)

    def _read(self, channel: socket.socket) -> None:
        """Connections were closed, or it was asked to drain."""
        for _ in range(TAKEN_AT_ONCE):
            try:
                data = channel.recv(64)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                asyncio.get_running_loop().remove_reader(channel.fileno())
                return
            if data.startswith(DRAINS):
                budget = data.removeprefix(DRAINS)
                self._parent.asked_to_drain(float(budget) if budget else None)
            else:
                self.num_connections -= 1

    def _ended(self) -> None:
        self.is_ready = False
        channel, self._channel = self._channel, None
        if channel is not None:
            asyncio.get_running_loop().remove_reader(channel.fileno())
            channel.close()
            self._parent.child_ended(self.pid)


class _Whole(Collector):
    """Asks for the newest figures whenever the page is asked for, from the page's own thread."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is is known when it is asked for."""
        return ()

    @override
    def collect(self) -> Iterable[Metric]:
        """What the page shows; of processes that do not answer, what was known before."""
        return asyncio.run_coroutine_threadsafe(self._fresh(), self._loop).result(SCRAPE_TIMEOUT_S)

    async def _fresh(self) -> Sequence[Metric]:
        await self._parent.ask_all()
        return list(self._parent.collect())


async def _listen(address: str) -> tuple[socket.socket, str]:
    """A socket that listens at "host:port", and the address with its port. Raises OSError."""
    host, port = split_address(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Not SO_REUSEPORT: another frontend on this port has to fail.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(f"expected an address to listen on, got {address}: {error}") from error
    bound = cast("tuple[str, int]", listener.getsockname())[1]
    return listener, f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
