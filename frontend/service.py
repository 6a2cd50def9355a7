"""A frontend as a process: what it is made of, how it starts, how it stops."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import SystemRandom

from typing_extensions import override

from frontend import drain, resume_keys
from frontend.admin import Admin
from frontend.admission_queue import QueueLimits
from frontend.config import FrontendConfig
from frontend.dispatch import Choice, Dispatcher
from frontend.drain import Drain, ExitStatus
from frontend.draining import Draining, Leaving
from frontend.edge.calls import InferenceCalls
from frontend.failure_detector import DetectorLimits
from frontend.gateway import Gateway, GatewayLimits, Inference
from frontend.grpcio_edge import GrpcioEdge
from frontend.holdings import FrontendHoldings
from frontend.links import Links
from frontend.load import FrontendLoad
from frontend.mesh_view import MeshView
from frontend.metrics import FrontendMetrics
from frontend.operators import ForOperators, Operators
from frontend.outlier_watch import OutlierWatch
from frontend.outliers import TAKES_ALL, OutlierLimits, Outliers
from frontend.preemption import PreemptionLimits
from frontend.processes.child import Family, Place
from frontend.quarantine import Quarantine
from frontend.query_of_death import Queries, QueryLimits
from frontend.relay_call import FrontendIdentity, LinkLimits
from frontend.requests import Requests
from frontend.resume_keys import ResumeKeys
from frontend.resume_queue import ResumeLimits
from frontend.stream import Attempt, Life, Limits
from frontend.thresholds import MeshThresholds
from unbroken import discovery, log, metrics, orca
from unbroken.config import split_address
from unbroken.discovery import FRONTENDS, Discovery, Registration
from unbroken.edge.native import NativeEdge
from unbroken.errors import Reason, UnbrokenError
from unbroken.garbage import collected_in_quiet
from unbroken.health import ALSO_SERVED, add_health
from unbroken.loop_watch import watched_loop
from unbroken.outcome import ContinuationPolicy, FailureKind
from unbroken.probes import Probes
from unbroken.signals import heed, heed_no_more
from unbroken.status import Trailers
from unbroken.thresholds import Thresholds
from unbroken.transport import MESH_KEEPALIVE, Keepalive, listen, make_server
from unbroken.v1 import admin_service_pb2_grpc, inference_service_pb2_grpc, worker_pb2

INFERENCE_SERVICE = "unbroken.v1.InferenceService"
ADMIN_SERVICE = "unbroken.v1.AdminService"
DRAIN_CALL = "/unbroken.v1.AdminService/DrainFrontend"
TOLD_S = 1.0
"""How long who asked for a drain may take to read that it is over."""

_log = log.get_logger(__name__)


class Frontend(Leaving):
    """One life of a frontend, from `start` to `stop`."""

    def __init__(
        self,
        config: FrontendConfig,
        *,
        where: Discovery | None = None,
        place: Place | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`where` is the discovery of the configuration, unless given; `place` says which of the
        frontend's processes this is, if it has several.
        """
        self._config = config
        self._place = place
        self._family: Family | None = None
        self._clock = clock
        self._discovery = where or discovery.connect(config.discovery)
        self.registry = metrics.new_registry()
        self.mesh = MeshView()
        self.is_draining = False
        """It takes no new requests."""
        self.address = ""
        """host:port of the services, once started."""
        self.edge: NativeEdge | None = None
        """What serves clients instead of grpcio, if something does; once started."""
        self._metrics_server: metrics.MetricsServer | None = None
        self._registration: Registration[worker_pb2.FrontendRecord] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: list[asyncio.Task[None]] = []
        """What was begun because it drains."""

    async def start(self) -> None:
        """Serve, then join the mesh. Raises OSError if an address is taken."""
        config = self._config
        family = self._family = None if self._place is None else Family(self._place)
        incarnation = await self._discovery.new_incarnation(FRONTENDS, config.frontend_id)
        identity = FrontendIdentity(config.frontend_id, incarnation)
        keys = ResumeKeys(
            config.resume_keys or resume_keys.make_once(config.discovery), clock=self._clock
        )
        counted = FrontendMetrics(self.registry)
        random = SystemRandom()
        outliers = Outliers(
            OutlierLimits(
                failures_max=config.outlier_failures_max,
                slow_factor=config.outlier_slow_factor,
                ejection_s=config.ejection_s,
                ejection_s_max=config.ejection_s_max,
                ejected_share_max=config.ejected_share_max,
            ),
            random,
        )
        self._links = Links(
            self.mesh,
            identity,
            LinkLimits(
                detector=DetectorLimits(
                    heartbeat_interval_s=config.heartbeat_interval_s,
                    silence_max_s=config.link_silence_max_s,
                    phi_suspect=config.link_suspect_phi,
                    phi_dead=config.link_dead_phi,
                    allowance_s=config.link_allowance_s,
                ),
                forgotten_grace_s=config.link_forgotten_grace_s,
            ),
            observer=counted,
            outliers=outliers,
            relay=config.relay,
            clock=self._clock,
        )
        self._quarantine = Quarantine(
            Queries(
                QueryLimits(
                    deaths_max=config.query_deaths_max,
                    memory_s=config.query_of_death_memory_s,
                )
            ),
            outliers,
            counted,
            key=random.randbytes(32),
            clock=self._clock,
        )
        dispatcher = Dispatcher(
            self.mesh,
            self._links,
            counted,
            self._quarantine,
            limits=ResumeLimits(
                is_on=config.resume_queue,
                share=config.resume_share,
                new_work_share=config.new_work_share,
                burst_tokens=config.resume_burst_tokens,
                prefill_tokens_per_s=config.prefill_tokens_per_s,
                fleet_loss_share=config.fleet_loss_share,
            ),
            thresholds=Thresholds(
                kv_blocks_share=config.busy_kv_blocks_share,
                prefill_tokens=config.busy_prefill_tokens,
                prefill_share=config.busy_prefill_share,
            ),
            waiting=QueueLimits(
                requests_max=config.queue_requests_max,
                tokens_max=config.queue_tokens_max,
                wait_s_max=config.queue_wait_s_max,
            ),
            preemption=PreemptionLimits(
                is_on=config.preemption,
                run_s_min=config.preemption_run_s_min,
                pauses_max=config.preemption_pauses_max,
                wait_s_max=config.preemption_wait_s_max,
            ),
            deadline_share=config.deadline_estimate_share,
            random=random,
            clock=self._clock,
        )
        self._dispatcher = dispatcher
        self._watch = OutlierWatch(
            outliers,
            self.mesh,
            self._links,
            counted,
            name=f"probe-{config.frontend_id[:64]}-{incarnation}",
            clock=self._clock,
        )
        dispatcher.on_attempt_ended.insert(0, self._attempt_ended)
        self.requests = Requests(
            running_max=config.requests_running_max,
            claims=None if family is None else family.claims,
            clock=self._clock,
        )
        self._gateway = Gateway(
            config.frontend_id,
            self.mesh,
            dispatcher,
            self.requests,
            GatewayLimits(
                Limits(
                    migrations_max=config.migrations_max,
                    window_tokens=config.window_tokens,
                    placement_timeout_s=config.placement_timeout_s,
                    regenerate_tokens_max=config.regenerate_tokens_max,
                    relink_s=config.relink_s,
                ),
                policy=ContinuationPolicy[config.continuation.upper()],
                deadline_margin_s=config.deadline_margin_s,
                resume_token_lifetime_s=config.resume_token_lifetime_s,
            ),
            keys=lambda: keys.keyring,
            random=random,
            clock=self._clock,
        )
        load = FrontendLoad(
            counted,
            num_running=lambda: self.requests.num_running,
            running_max=config.requests_running_max,
            num_waiting=lambda: dispatcher.num_waiting,
            clock=self._clock,
        )
        trailers: Callable[[], Trailers] = tuple
        if config.load_trailers:
            trailers = orca.LoadReporter(load.report, clock=self._clock).trailers
        counted.observe(
            num_running=lambda: self.requests.num_running,
            num_waiting=lambda: dispatcher.num_waiting,
            queue=dispatcher.queue,
            waiting_room=dispatcher.room.queue,
            num_paused=lambda: dispatcher.pausing.num_paused,
            num_links_up=lambda: self._links.num_up,
            num_busy=lambda: dispatcher.num_busy,
            outliers=outliers,
            workers_by_liveness=self._links.num_workers_by_liveness,
        )
        keepalive = Keepalive(config.client_ping_interval_s, config.client_ping_timeout_s)
        if config.edge == "native":
            keepalive = MESH_KEEPALIVE  # Its only client is this process.
        self._server = make_server(keepalive=keepalive, trailers=trailers)
        served: Inference = self._gateway
        self.draining = Draining(
            Drain(config.shutdown_grace_s),
            config.frontend_id
            if family is None
            else config.frontend_id.removesuffix(f".{family.place.number}"),
            self.requests,
            self,
            clock=self._clock,
        )
        thresholds = MeshThresholds(self._discovery, self.mesh, dispatcher.shedder)
        thresholds.on_change.append(dispatcher.thresholds_changed)
        admin = served_admin = Admin(
            self.mesh,
            self._links,
            outliers,
            dispatcher.shedder,
            thresholds,
            identity,
            FrontendHoldings(self.requests, self._gateway.readers, dispatcher, self._links),
            self.draining,
            clock=self._clock,
        )
        if family is not None:
            served, served_admin = family.whole(self._gateway), family.whole_admin(admin)
            family.on_less_passed_on(self.draining.look)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
            GrpcioEdge(served), self._server
        )
        if config.admin_tokens is not None:
            served_admin = ForOperators(
                served_admin, Operators(config.admin_tokens, clock=self._clock)
            )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(served_admin, self._server)
        self.health = add_health(self._server, [INFERENCE_SERVICE, ADMIN_SERVICE])
        self.health.set("startup", is_serving=False)
        self.health.set("liveness", is_serving=True)
        probes = Probes(self.health)
        if config.edge == "native":
            self.edge = NativeEdge.before(
                self._server,
                InferenceCalls(served).answers,
                config.edge_limits,
                counted.edge,
                services=(INFERENCE_SERVICE, ADMIN_SERVICE, *ALSO_SERVED),
                tls=config.tls,
                trailers=trailers,
                clock=self._clock,
            )
        else:
            self.address = listen(self._server, config.listen, tls=config.tls)
        if config.metrics_listen is not None and family is None:
            host, port = split_address(config.metrics_listen)
            self._metrics_server = metrics.serve(self.registry, host, port, probes=probes)
        await self._server.start()
        if family is not None:
            await family.start(self._gateway, admin, self.requests, self.registry)
            self.address = family.place.address
        elif self.edge is not None:
            self.address = await self.edge.start(config.listen)
        self.health.set_all(is_serving=True)
        for name in ("startup", "readiness"):
            self.health.set(name, is_serving=True)
        self.mesh.on_change.append(self._tell_models)
        self._tasks = [
            asyncio.create_task(self._links.follow(self._discovery), name="follow discovery"),
            asyncio.create_task(self._watch.run(), name="watch outliers"),
            asyncio.create_task(thresholds.run(), name="follow thresholds"),
            asyncio.create_task(self.draining.follow(), name="follow drain"),
            asyncio.create_task(probes.run(), name="signs of life"),
        ]
        self._registration = await self._discovery.register(FRONTENDS, self._record(identity))
        if self.is_draining:
            await self._registration.close()
        if family is not None:
            family.receive(self._take)
        _log.info("frontend serves", address=self.address, incarnation=incarnation)

    @property
    def has_started(self) -> bool:
        return bool(self._tasks)

    async def wait(self) -> None:
        """Until it cannot go on: raises what ended it. Only a bug does."""
        assert self.has_started, "started before"
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Drain within so long, if it does not sooner, and close everything. Idempotent."""
        self.draining.tell(drain.Asked(grace_s))
        await self.draining.over.wait()
        self.cut_short()  # Nothing runs any more, unless deadlines were not seen.
        await self._until_told()
        if self._family is not None:
            self._family.end_passed_on()
        await self._gateway.close()
        if self.edge is not None:
            await self.edge.stop()
        if self._family is not None:
            await self._family.stop()
        await self._server.stop(None)
        await asyncio.gather(*self._leaving)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._watch.close()
        self._quarantine.close()
        self._dispatcher.close()
        await self._links.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
            self._metrics_server = None
        _log.info("frontend stopped")

    # What a drain does.

    @override
    def leave(self) -> None:
        self.is_draining = True
        self._gateway.drain()
        if self.edge is not None:
            self.edge.drain()
        self.health.set_all(is_serving=False)
        for name in ("startup", "liveness"):
            self.health.set(name, is_serving=True)
        if self._registration is not None:
            self._leaving.append(asyncio.create_task(self._registration.close()))
        _log.info("frontend drains", requests=self.requests.num_running)

    @override
    def go_away(self, within_s: float) -> None:
        if self.edge is None:  # The native edge has said so, and answers who comes all the same.
            self._leaving.append(asyncio.create_task(self._server.stop(within_s)))

    @override
    def cut_short(self) -> None:
        self.requests.hand_over_all(UnbrokenError(Reason.DRAINING, "the frontend stops"))

    @override
    def num_elsewhere(self) -> int:
        return 0 if self._family is None else self._family.num_waited_for

    async def _until_told(self) -> None:
        """Wait until who asked for the drain has been told that it is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TOLD_S):
                while not self.draining.is_told or (  # noqa: ASYNC110 - Rare.
                    self.edge is not None and self.edge.is_called(DRAIN_CALL)
                ):
                    await asyncio.sleep(0.005)

    async def _take(self, connection: socket.socket) -> asyncio.Future[None]:
        """Serve a connection that the parent accepted; what is done when it is closed."""
        assert self.edge is not None, "only the native edge takes connections"
        return (await self.edge.take(connection)).closed

    def _attempt_ended(self, choice: Choice, life: Life, attempt: Attempt) -> None:
        # An engine that fails at what others failed at has not shown that it is bad.
        is_own_fault = attempt.failure is not FailureKind.ENGINE_ERROR
        if attempt.failure in TAKES_ALL:  # Nobody is placed there now, ejected or not.
            self._quarantine.afterwards.do(partial(self._watch.attempt_ended, life, attempt))
        elif is_own_fault or not self._quarantine.is_on_file(choice):
            self._watch.attempt_ended(life, attempt)

    def _record(self, identity: FrontendIdentity) -> worker_pb2.FrontendRecord:
        return worker_pb2.FrontendRecord(
            frontend_id=identity.frontend_id,
            incarnation=identity.incarnation,
            address=self._config.advertise or self.address,
            pid=os.getpid(),
            metrics_address=self._metrics_server.address if self._metrics_server else "",
        )

    def _tell_models(self) -> None:
        """Health of each model: whether a worker takes requests for it."""
        for name in self.mesh.model_names():
            is_serving = not self.is_draining and self.mesh.num_ready(name) > 0
            self.health.set(f"model/{name}", is_serving=is_serving)


async def serve(
    config: FrontendConfig,
    *,
    place: Place | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Run a frontend until it has drained; returns its exit status (`drain.ExitStatus`).

    SIGTERM and SIGINT begin a drain, a second one ends it. One of several processes may get SIGTERM
    from its parent and from systemd, which sends it to all: there only SIGINT means a second one.
    """
    signalled = asyncio.Event()
    hurry = asyncio.Event()
    frontend = Frontend(config, place=place)

    def receive(number: signal.Signals) -> None:
        is_again = signalled.is_set() if place is None else number is signal.SIGINT
        signalled.set()
        if is_again:
            hurry.set()
        if frontend.has_started:
            frontend.draining.tell(drain.Signalled(is_again=is_again))

    heed(receive)
    starting = asyncio.create_task(frontend.start())
    in_a_hurry = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait({starting, in_a_hurry}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        in_a_hurry.cancel()
    if not starting.done():  # It has served nobody.
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        heed_no_more()
        return ExitStatus.CUT_SHORT
    starting.result()
    on_ready()
    if signalled.is_set():
        frontend.draining.tell(drain.Signalled(is_again=hurry.is_set()))
    async with watched_loop(), collected_in_quiet(lambda: frontend.requests.num_running == 0):
        asked = asyncio.create_task(frontend.draining.stop_wanted.wait())
        life = asyncio.create_task(frontend.wait())
        await asyncio.wait({asked, life}, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            life.result()  # Nobody would tell it of new workers any more.
        life.cancel()
        asked.cancel()
        await frontend.stop()
    heed_no_more()
    return frontend.draining.drain.exit_status
