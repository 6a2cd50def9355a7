"""A sidecar as a process: what it is made of, how it starts, how it stops."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, assert_never

import grpc.aio

from sidecar import drain
from sidecar.admin import Admin
from sidecar.canary import Canary, CanaryPolicy
from sidecar.canary_watch import CanaryWatch
from sidecar.config import SidecarConfig
from sidecar.drain import Drain, Plan
from sidecar.engine_load import orca_report
from sidecar.engines.base import Engine
from sidecar.engines.kinds import engine_of
from sidecar.hub import Hub
from sidecar.ledger import Retention
from sidecar.metrics import HubCollector
from sidecar.relay import RELAY_SERVICE, Relay
from sidecar.watchdog import LOOK_INTERVAL_S, WatchdogPolicy
from unbroken import discovery, log, metrics, orca
from unbroken.config import split_address
from unbroken.discovery import WORKERS, Discovery, Registration
from unbroken.edge.native import NativeEdge
from unbroken.errors import Reason, UnbrokenError
from unbroken.garbage import collected_in_quiet
from unbroken.health import ALSO_SERVED, HealthServicer, add_health
from unbroken.http2.limits import EdgeLimits
from unbroken.loop_watch import watched_loop
from unbroken.probes import Probes
from unbroken.recurring import Recurring
from unbroken.signals import heed, heed_no_more
from unbroken.third_party import orca_pb2_grpc
from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport
from unbroken.transport import MESH_KEEPALIVE, RECEIVE_BYTES_MAX, make_server
from unbroken.v1 import relay_service_pb2_grpc, sidecar_service_pb2_grpc, worker_pb2

SIDECAR_SERVICE = "unbroken.v1.SidecarService"
DRAIN_CALL = f"/{SIDECAR_SERVICE}/Drain"
UNSENT_BYTES_MAX = 64 * 1024 * 1024
"""In the socket of one frontend: a tokenizer or a step of streams taken over, a few times."""
FLUSH_TIMEOUT_S = 1.0
"""How long frontends may take to read where their streams were cut."""

_log = log.get_logger(__name__)


class Sidecar:
    """One life of a sidecar, from `start` to `stop`."""

    def __init__(
        self,
        config: SidecarConfig,
        engine: Engine,
        *,
        where: Discovery | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`where` is the discovery of the configuration, unless given."""
        self._config = config
        self._engine = engine
        self._discovery = where or discovery.connect(config.discovery)
        self._clock = clock
        self.hub = Hub(
            engine,
            orphan_grace_s=config.orphan_grace_s,
            deadline_margin_s=config.deadline_margin_s,
            retention=Retention(ended_s=config.retention_s),
            watchdog_policy=WatchdogPolicy(
                silence_min_s=config.engine_stall_min_s,
                prefill_unmeasured_s=config.engine_prefill_unmeasured_s,
                restart_after_s=config.engine_stall_restart_s,
            ),
            clock=clock,
        )
        self._canary = Canary(
            CanaryPolicy(
                period_s=config.canary_period_s,
                timeout_s=config.canary_timeout_s,
                failures_max=config.canary_failures_max,
            )
        )
        self._drain_plan = Plan(config.drain_policy, config.drain_budget_s)
        self.drain = Drain(self._drain_plan)
        self.stop_wanted = asyncio.Event()
        """It is time for `stop`."""
        self.hurry_wanted = asyncio.Event()
        """And that waits for nobody."""
        self.address = ""
        """host:port of RelayService, once started."""
        self._model = ""
        """Of the engine's latest life."""
        self._server: grpc.aio.Server | None = None
        self._edge: NativeEdge | None = None
        self._admin: Admin | None = None
        self._health: HealthServicer | None = None
        self._metrics_server: metrics.MetricsServer | None = None
        self._registration: Registration[worker_pb2.WorkerRecord] | None = None
        self._engine_task: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._looks = Recurring(self._look, LOOK_INTERVAL_S, clock)
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    async def start(self) -> None:
        """Serve and join the mesh; the engine starts meanwhile. Raises OSError."""
        config = self._config
        registry = metrics.new_registry()
        collector = HubCollector(self.hub, self._canary, registry)
        incarnation = await self._discovery.new_incarnation(WORKERS, config.worker_id)
        self._identity = worker_pb2.WorkerIdentity(
            worker_id=config.worker_id, incarnation=incarnation
        )
        self._canary_watch = CanaryWatch(
            self.hub,
            self._canary,
            name=str(incarnation),
            prompt=config.canary_ids,
            text=config.canary_text,
            on_unfit=lambda: self.tell_drain(drain.Failed()),
        )
        reporter = orca.LoadReporter(self._load_report, clock=self._clock)
        server = self._server = make_server(trailers=reporter.trailers)
        relay = Relay(
            self.hub,
            self._identity,
            heartbeat_interval_s=config.heartbeat_interval_s,
            write_max_s=config.link_write_max_s,
            clock=self._clock,
        )
        relay_service_pb2_grpc.add_RelayServiceServicer_to_server(relay, server)
        self._admin = Admin(
            self.hub,
            self._engine,
            self.drain,
            self._drain_plan,
            self._identity,
            ask=lambda plan: self.tell_drain(drain.Asked(plan)),
        )
        sidecar_service_pb2_grpc.add_SidecarServiceServicer_to_server(self._admin, server)
        orca_pb2_grpc.add_OpenRcaServiceServicer_to_server(orca.OpenRca(reporter), server)
        health = self._health = add_health(
            server, [RELAY_SERVICE, SIDECAR_SERVICE], also_reflected=[orca.SERVICE]
        )
        health.set("liveness", is_serving=True)
        health.set(SIDECAR_SERVICE, is_serving=True)  # Whatever the engine does.
        for probe in ("startup", "readiness"):
            health.set(probe, is_serving=False)
        self._probes = Probes(health)
        self._edge = NativeEdge.before(
            server,
            relay.answers,
            edge_limits(config.link_write_max_s),
            collector.edge,
            services=(RELAY_SERVICE, SIDECAR_SERVICE, orca.SERVICE, *ALSO_SERVED),
            tls=None,
            trailers=reporter.trailers,
            clock=self._clock,
        )
        if config.metrics_listen is not None:
            host, port = split_address(config.metrics_listen)
            self._metrics_server = metrics.serve(registry, host, port, probes=self._probes)
        await server.start()
        self.address = await self._edge.start(config.listen)
        self.hub.on_change.append(self._changed.set)
        self.hub.on_over.append(self._over.set)
        self.hub.on_step.append(self._stepped)
        ticks = Recurring(self._tick, config.heartbeat_interval_s, self._clock)
        self.hub.on_woken += (ticks.join, self._looks.join)
        self._registration = await self._discovery.register(WORKERS, self._record())
        self._engine_task = asyncio.create_task(self._engine.run(self.hub), name="engine")
        self._tasks = [
            asyncio.create_task(self._probes.run(), name="signs of life"),
            asyncio.create_task(ticks.run(), name="heartbeats"),
            asyncio.create_task(self._looks.run(), name="watchdog"),
            asyncio.create_task(self._follow_engine(), name="follow engine"),
            asyncio.create_task(self._follow_drain(), name="follow drain"),
        ]
        _log.info("sidecar serves", address=self.address, incarnation=incarnation)

    async def wait(self) -> None:
        """Until it cannot go on: the engine is given up (then it returns), or it raises.

        Raises `UnbrokenError` with FENCED if another process took the worker's id.
        """
        assert self._engine_task is not None, "started before"
        tasks = [self._engine_task, *self._tasks]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def tell_drain(self, event: drain.Event) -> None:
        """Something happened that may begin a drain, or make it more urgent."""
        now = self._clock()
        self._obey(self.drain.handle(event, now))
        self._obey(self.drain.handle(self._seen(), now))
        self._over.set()  # There may be another deadline now.

    async def stop(self) -> None:
        """Hand over what still runs, have it read, end the engine, leave the mesh."""
        self.hub.drain()
        self._set_health()
        hurry = asyncio.create_task(self.hurry_wanted.wait(), name="hurry")
        flush = asyncio.create_task(self._flush(), name="flush")
        await asyncio.wait((flush, hurry), return_when=asyncio.FIRST_COMPLETED)
        stop_engine = asyncio.create_task(self._engine.stop(), name="stop engine")
        await asyncio.wait((stop_engine, hurry), return_when=asyncio.FIRST_COMPLETED)
        if not stop_engine.done():
            self._engine.kill()
        await stop_engine
        await self._close_connections(hurry)
        tasks: list[asyncio.Task[Any]] = [hurry, flush, *self._tasks]
        for task in tasks:
            task.cancel()
        if self._engine_task is not None:
            tasks.append(self._engine_task)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._registration is not None:
            await self._registration.close()
        if self._server is not None:
            await self._server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        _log.info("sidecar stopped")

    async def _close_connections(self, hurry: asyncio.Task[Any]) -> None:
        """Frontends have a moment to read the last and close, unless it is to be quick."""
        if self._edge is None:
            return
        closing = asyncio.create_task(self._edge.stop(), name="close connections")
        await asyncio.wait((closing, hurry), return_when=asyncio.FIRST_COMPLETED)
        for client in list(self._edge.leaving):
            client.abort()
        await closing

    def _stepped(self) -> None:
        if self.drain.phase is drain.Phase.LAST_STEP:
            # Not from within a frame: the end of a stream may be read next, and engines are told
            # nothing while they tell.
            asyncio.get_running_loop().call_soon(self._last_step_over)

    def _last_step_over(self) -> None:
        self._obey(self.drain.handle(drain.Stepped(), self._clock()))

    def _obey(self, commands: Sequence[drain.Command]) -> None:
        for command in commands:
            match command:
                case drain.Announce(budget_s=budget_s):
                    _log.info("worker drains", budget_s=budget_s, num_attempts=self.hub.num_left)
                    self.hub.drain(budget_s)
                    self._set_health()
                case drain.HandOver():
                    _log.info("streams are handed over", num_attempts=self.hub.num_left)
                    self.hub.drain()
                    self._set_health()
                case drain.Stop():
                    self.stop_wanted.set()
                case drain.Hurry():
                    self.hurry_wanted.set()
                case _:
                    assert_never(command)

    def _seen(self) -> drain.Seen:
        hub = self.hub
        return drain.Seen(
            hub.num_left, is_engine_up=hub.up is not None, is_stalled=hub.watchdog.is_stalled
        )

    async def _follow_drain(self) -> None:
        """See attempts come to their end, and the budget too."""
        while True:
            self._over.clear()
            now = self._clock()
            self._obey(self.drain.handle_timeout(now))
            self._obey(self.drain.handle(self._seen(), now))
            due_at = self.drain.deadline()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due_at is None else max(0.0, due_at - now)):
                    await self._over.wait()

    def _tick(self) -> float:
        self.hub.tick(silence_max_s=self._config.link_silence_max_s)
        return self._clock() + self._config.heartbeat_interval_s

    def _look(self) -> float:
        is_all = self.hub.watch(judges=not self._looks.is_joining)  # It may be one of many frames.
        self._canary_watch.look()
        return self._clock() + (LOOK_INTERVAL_S if is_all else 0.0)

    async def _follow_engine(self) -> None:
        """Health and the record in discovery say what the engine is now."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._set_health()
            assert self._registration is not None, "registered before"
            try:
                await self._registration.update(self._record())
            except UnbrokenError as error:
                if error.reason is Reason.FENCED:
                    raise
                _log.warning("record not updated", detail=error.detail)
            except OSError as error:  # Frontends know the worker, and ask it itself.
                _log.warning("record not updated", detail=str(error))

    def _set_health(self) -> None:
        if self._health is None:
            return  # It has yet to start.
        up = self.hub.up
        if up is not None:
            self._model = up.description.model
            self._health.set("startup", is_serving=True)  # It never takes that back.
        services = ["", RELAY_SERVICE, "readiness"]
        if self._model:
            services.append(f"model/{self._model}")
        for service in services:
            self._health.set(service, is_serving=self.hub.takes_work)

    async def _flush(self) -> None:
        """Wait until the links, and who asked for the drain, have been told all they are to be."""
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                while not self._is_idle():  # noqa: ASYNC110 - Rare.
                    await asyncio.sleep(0.005)
        except TimeoutError:
            _log.warning("frontends do not read the end of their streams")

    def _is_idle(self) -> bool:
        is_told = self._admin is None or self._admin.is_idle
        if self._edge is not None and self._edge.is_called(DRAIN_CALL):
            is_told = False  # Its last word is on its way through the edge.
        return is_told and all(link.is_idle for link in self.hub.links)

    def _load_report(self, now: float) -> OrcaLoadReport:
        hub = self.hub
        return orca_report(
            hub.engine_load,
            takes_work=hub.takes_work,
            rps=hub.attempts.per_second(now),
            eps=hub.faults.per_second(now),
        )

    def _record(self) -> worker_pb2.WorkerRecord:
        up = self.hub.up
        return worker_pb2.WorkerRecord(
            identity=self._identity,
            address=self._config.advertise or self.address,
            model=self._model,
            sidecar_pid=os.getpid(),
            engine_pgid=up.process_group if up is not None else 0,
            metrics_address=self._metrics_server.address if self._metrics_server else "",
        )


def edge_limits(link_write_max_s: float) -> EdgeLimits:
    """What callers may do. Heartbeats notice who hangs, and links who does not read: so pings are
    rare, and streams that stand still are cut later."""
    return EdgeLimits(
        request_bytes_max=RECEIVE_BYTES_MAX,
        unsent_bytes_max=UNSENT_BYTES_MAX,
        stall_timeout_s=max(EdgeLimits().stall_timeout_s, 2 * link_write_max_s),
        ping_interval_s=MESH_KEEPALIVE.interval_s,
        ping_idle_interval_s=MESH_KEEPALIVE.interval_s,
        ping_timeout_s=MESH_KEEPALIVE.timeout_s,
    )


async def serve(config: SidecarConfig) -> int:
    """Run a sidecar until it has drained, or cannot go on; returns its exit status.

    SIGTERM and SIGINT begin a drain, a second one ends it. Raises OSError if it cannot start, and
    as `Sidecar.wait`.
    """
    with tempfile.TemporaryDirectory(prefix="unbroken-") as directory:
        sidecar = Sidecar(config, engine_of(config, Path(directory)))
        heed(lambda _: sidecar.tell_drain(drain.Signalled()))
        async with watched_loop():
            try:
                await first_of(sidecar.start(), sidecar.hurry_wanted.wait())
                if not sidecar.hurry_wanted.is_set():
                    async with collected_in_quiet(lambda: sidecar.hub.num_left == 0):
                        await first_of(sidecar.wait(), sidecar.stop_wanted.wait())
            finally:
                sidecar.tell_drain(drain.Failed())  # Nothing new if it was asked to stop.
                await sidecar.stop()
    heed_no_more()
    return sidecar.drain.exit_status


async def first_of(*waiting: Coroutine[Any, Any, object]) -> None:
    """Run them until one is done, and cancel the others. Raises what that one raised."""
    tasks = [asyncio.create_task(one) for one in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
