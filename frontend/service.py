"""A frontend as a process: what it is made of, how it starts, how it stops."""

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from random import SystemRandom

from frontend import resume_keys
from frontend.admin import Admin
from frontend.admission_queue import QueueLimits
from frontend.config import FrontendConfig
from frontend.dispatch import Choice, Dispatcher
from frontend.edge.native import NativeEdge
from frontend.failure_detector import DetectorLimits
from frontend.gateway import Gateway, GatewayLimits, Inference
from frontend.grpcio_edge import GrpcioEdge
from frontend.holdings import FrontendHoldings
from frontend.links import Links
from frontend.load import FrontendLoad
from frontend.mesh_view import MeshView
from frontend.metrics import FrontendMetrics
from frontend.outlier_watch import OutlierWatch
from frontend.outliers import OutlierLimits, Outliers
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
from unbroken.errors import Reason, UnbrokenError
from unbroken.health import add_health
from unbroken.outcome import ContinuationPolicy, FailureKind
from unbroken.status import Trailers
from unbroken.thresholds import Thresholds
from unbroken.transport import Keepalive, listen, make_server
from unbroken.v1 import admin_service_pb2_grpc, inference_service_pb2_grpc, worker_pb2

INFERENCE_SERVICE = "unbroken.v1.InferenceService"
ADMIN_SERVICE = "unbroken.v1.AdminService"
CANCELLED_GRACE_S = 1.0
"""How long clients may take to read the end of a stream that the shutdown cut."""

_log = log.get_logger(__name__)


class Frontend:
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
        self._following: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._tuning: asyncio.Task[None] | None = None

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
            num_links_up=lambda: self._links.num_up,
            num_busy=lambda: dispatcher.num_busy,
            outliers=outliers,
            workers_by_liveness=self._links.num_workers_by_liveness,
        )
        self._server = make_server(
            keepalive=Keepalive(config.client_ping_interval_s, config.client_ping_timeout_s),
            trailers=trailers,
        )
        served: Inference = self._gateway
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
            clock=self._clock,
        )
        if family is not None:
            served, served_admin = family.whole(self._gateway), family.whole_admin(admin)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
            GrpcioEdge(served), self._server
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(served_admin, self._server)
        self.health = add_health(self._server, [INFERENCE_SERVICE, ADMIN_SERVICE])
        if config.edge == "native":
            self.edge = NativeEdge.before(
                self._server,
                served,
                config.edge_limits,
                counted,
                tls=config.tls,
                trailers=trailers,
                clock=self._clock,
            )
        else:
            self.address = listen(self._server, config.listen, tls=config.tls)
        if config.metrics_listen is not None and family is None:
            host, port = split_address(config.metrics_listen)
            self._metrics_server = metrics.serve(self.registry, host, port)
        await self._server.start()
        if family is not None:
            await family.start(self._gateway, admin, self.requests, self.registry)
            self.address = family.place.address
        elif self.edge is not None:
            self.address = await self.edge.start(config.listen)
        self.health.set_all(is_serving=True)
        for name in ("readiness", "liveness"):
            self.health.set(name, is_serving=True)
        self.mesh.on_change.append(self._tell_models)
        self._following = asyncio.create_task(
            self._links.follow(self._discovery), name="follow discovery"
        )
        self._watching = asyncio.create_task(self._watch.run(), name="watch outliers")
        self._tuning = asyncio.create_task(thresholds.run(), name="follow thresholds")
        self._registration = await self._discovery.register(FRONTENDS, self._record(identity))
        if family is not None:
            family.receive(self._take)
        _log.info("frontend serves", address=self.address, incarnation=incarnation)

    async def wait(self) -> None:
        """Until it cannot go on: raises what ended it. Only a bug does."""
        assert self._following is not None, "started before"
        assert self._watching is not None, "started before"
        assert self._tuning is not None, "started before"
        tasks = (self._following, self._watching, self._tuning)
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take nothing new, let running streams finish for a while, end the rest. Idempotent."""
        self.is_draining = True
        self._gateway.drain()
        if self.edge is not None:
            self.edge.drain()
        self.health.set_all(is_serving=False)
        self.health.set("liveness", is_serving=True)
        if self._registration is not None:
            await self._registration.close()
        if not await self._until_none(grace_s):
            self.cut_short()
            await self._until_none(CANCELLED_GRACE_S)
        if self._family is not None:
            self._family.end_passed_on()
        await self._gateway.close()
        if self.edge is not None:
            await self.edge.stop()
        if self._family is not None:
            await self._family.stop()
        await self._server.stop(None)
        for task in (self._following, self._watching, self._tuning):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._watch.close()
        self._quarantine.close()
        self._dispatcher.close()
        await self._links.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
            self._metrics_server = None
        _log.info("frontend stopped")

    def cut_short(self) -> None:
        """End all running streams; their clients are told why."""
        self.requests.hand_over_all(UnbrokenError(Reason.DRAINING, "the frontend stops"))
        if self._family is not None:  # Siblings say the same of theirs, if they answer.
            asyncio.get_running_loop().call_later(CANCELLED_GRACE_S, self._family.end_passed_on)

    async def _until_none(self, timeout_s: float) -> bool:
        """Wait until no client of this process is served any more; False if one still is."""
        give_up_at = time.monotonic() + timeout_s
        has_ended = await self.requests.until_none(timeout_s)
        if self._family is not None:  # What a sibling has goes on as long as what is here.
            left_s = max(0.0, give_up_at - time.monotonic())
            has_ended = await self._family.until_none(left_s) and has_ended
        return has_ended

    async def _take(self, connection: socket.socket) -> asyncio.Future[None]:
        """Serve a connection that the parent accepted; what is done when it is closed."""
        assert self.edge is not None, "only the native edge takes connections"
        return (await self.edge.take(connection)).closed

    def _attempt_ended(self, choice: Choice, life: Life, attempt: Attempt) -> None:
        # An engine that fails at what others failed at has not shown that it is bad.
        is_own_fault = attempt.failure is not FailureKind.ENGINE_ERROR
        if is_own_fault or not self._quarantine.is_on_file(choice):
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
) -> None:
    """Run a frontend until SIGTERM or SIGINT; a second signal cuts the streams short.

    One of several processes may get SIGTERM from its parent and from systemd, which sends it to
    all: there only SIGINT means a second signal.
    """
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    again = asyncio.Event()

    def receive(number: signal.Signals) -> None:
        is_second = signalled.is_set() if place is None else number is signal.SIGINT
        signalled.set()
        if is_second:
            again.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive, number)
    frontend = Frontend(config, place=place)
    await frontend.start()
    on_ready()
    # What the start made lives as long as the process. A full collection that looks at it takes
    # 10 to 20 ms, in which every stream would stand still.
    gc.collect()
    gc.freeze()
    asked = asyncio.create_task(signalled.wait())
    life = asyncio.create_task(frontend.wait())
    await asyncio.wait({asked, life}, return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        life.result()  # Nobody would tell it of new workers any more.
    life.cancel()
    _log.info("frontend is asked to stop", grace_s=config.shutdown_grace_s)
    stopping = asyncio.create_task(frontend.stop(config.shutdown_grace_s))
    hurry = asyncio.create_task(again.wait())
    await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        frontend.cut_short()
    hurry.cancel()
    await stopping
