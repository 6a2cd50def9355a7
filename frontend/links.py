"""The links to all sidecars: one Relay call per worker, opened again whenever it is lost.

Discovery says who there is; whether a worker works is for its link to find out. So a worker that
discovery forgets stays for as long as its call does, and a worker that comes back under a new
incarnation is reached at once, however long the pause before the next try was.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Final, Literal

from frontend.failure_detector import Liveness, Rhythm
from frontend.mesh_view import LinkState, MeshView, Worker
from frontend.native_wire import NativeWire
from frontend.outliers import Outliers
from frontend.relay_call import (
    End,
    FrontendIdentity,
    LinkLimits,
    LinkObserver,
    RelayCall,
    Seat,
    TokenizerStore,
)
from frontend.relay_wire import GrpcioWire, Talker, Wire
from frontend.stream import Life
from unbroken import log
from unbroken.discovery import WORKERS, Discovery
from unbroken.http2.caller import CallerLimits
from unbroken.outcome import FailureKind
from unbroken.v1 import worker_pb2

PAUSE_S_MIN: Final = 0.02
PAUSE_S_MAX: Final = 1.0
STEADY_S: Final = 1.0
"""A link that was up for so long is opened again without a pause when it breaks."""
KNOWN_MAX: Final = 10_000
"""Workers whose latest life is remembered after they have gone."""

RelayKind = Literal["grpcio", "native"]
"""What carries the calls: grpc.aio, or our own HTTP/2."""
_CALL_LIMITS: Final = CallerLimits()

_log = log.get_logger(__name__)


class Fate(Enum):
    """What may be hoped of the link to one life of a worker."""

    UP = auto()
    PENDING = auto()
    """A call is being opened, or the worker may yet be announced."""
    GONE = auto()
    """That life is over, or cannot be reached."""


@dataclass(slots=True)
class _Known:
    """What is remembered of a worker after it has gone, should it come back."""

    incarnation: int
    num_calls: int = 0
    """Calls to this life of it: a sidecar refuses numbers that it knows."""


@dataclass(slots=True)
class _Link:
    """The link to one life of one worker."""

    worker: Worker
    known: _Known
    rhythm: Rhythm
    """Of its heartbeats."""
    task: asyncio.Task[None] | None = None
    call: RelayCall | None = None
    end: End | None = None
    """How the last call ended."""
    is_forgotten: bool = False
    """Discovery does not know it any more."""


class Links:
    """All links of this frontend."""

    def __init__(
        self,
        mesh: MeshView,
        identity: FrontendIdentity,
        limits: LinkLimits,
        *,
        observer: LinkObserver,
        outliers: Outliers,
        relay: RelayKind = "native",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._relay = relay
        self._mesh = mesh
        self._identity = identity
        self._limits = limits
        self._observer = observer
        self._outliers = outliers
        self._clock = clock
        self._tokenizers = TokenizerStore(mesh, limits.tokenizer_timeout_s)
        self._links: dict[str, _Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self.on_fate: list[Callable[[str], None]] = []
        """Called with a worker's id when the fate of the link to it may have changed."""

    def call_to(self, life: Life) -> RelayCall | None:
        """The call to this life of a worker, if it is up."""
        link = self._links.get(life.worker_id)
        if link is None or link.worker.record.identity.incarnation != life.incarnation:
            return None
        return None if link.call is None or link.call.is_over else link.call

    def fate_of(self, life: Life) -> Fate:
        """Whether the link to this life of a worker is up or may come up soon."""
        link = self._links.get(life.worker_id)
        known = self._known.get(life.worker_id) if link is None else link.known
        if known is None or known.incarnation < life.incarnation:
            return Fate.PENDING
        if link is None or known.incarnation > life.incarnation:
            return Fate.GONE
        if link.call is not None and not link.call.is_over:
            return Fate.UP if link.call.is_up else Fate.PENDING
        # The first call after one that broke tells whether the worker lives.
        end = link.end if link.call is None else link.call.outcome
        return Fate.PENDING if end is None or end.is_break else Fate.GONE

    def num_attempts(self, worker_id: str) -> int:
        """Attempts of this frontend that run on the worker."""
        link = self._links.get(worker_id)
        return link.call.num_attempts if link is not None and link.call is not None else 0

    def seats(self) -> Iterator[tuple[str, Seat]]:
        """All attempts that links carry, and to which worker."""
        for worker_id, link in self._links.items():
            if link.call is not None:
                for seat in link.call.seats:
                    yield worker_id, seat

    def cancel(self, request_id: str, tenant: str) -> None:
        """Have what nobody reads of a request ended at all workers, as `RelayCall.cancel`."""
        for link in self._links.values():
            if link.call is not None:
                link.call.cancel(request_id, tenant)

    def suspicion(self, worker_id: str) -> float:
        """How surprising the silence of the worker is now (phi); 0 without a link."""
        link = self._links.get(worker_id)
        return link.call.detector.phi(self._clock()) if link and link.call is not None else 0.0

    def num_workers_by_liveness(self) -> Mapping[Liveness, int]:
        """How many workers are thought to be what. Safe in the thread that serves the metrics."""
        return Counter(link.worker.liveness for link in list(self._links.values()))

    @property
    def num_up(self) -> int:
        """Links that are up. Safe in the thread that serves the metrics."""
        links = list(self._links.values())
        return sum(link.worker.link_state == LinkState.LINK_STATE_UP for link in links)

    async def follow(self, discovery: Discovery) -> None:
        """Keep the links to what discovery knows, for ever."""
        async with aclosing(discovery.watch(WORKERS)) as changes:
            async for members in changes:
                self.update(members)

    def update(self, members: Mapping[str, worker_pb2.WorkerRecord]) -> None:
        """These workers are announced, and no others."""
        for worker_id, record in sorted(members.items()):
            self._announced(worker_id, record)
        for worker_id in self._links.keys() - members.keys():
            self._links[worker_id].is_forgotten = True

    async def close(self) -> None:
        """End all links; their attempts are lost."""
        tasks = list(self._tasks)
        for link in self._links.values():
            if link.call is not None:
                link.call.end(FailureKind.PARTITION, "the frontend closes its links")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _announced(self, worker_id: str, record: worker_pb2.WorkerRecord) -> None:
        incarnation = record.identity.incarnation
        link = self._links.get(worker_id)
        known = self._known.get(worker_id) if link is None else link.known
        if known is not None and incarnation < known.incarnation:
            return  # An earlier life; whatever it says is late news.
        if known is None or incarnation > known.incarnation:
            known = _Known(incarnation)
        self._known[worker_id] = known
        self._known.move_to_end(worker_id)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        if link is not None and link.known is known:
            link.is_forgotten = False
            link.worker.record = record
            return
        if link is not None:
            detail = f"incarnation {incarnation} of {worker_id} was announced"
            self._replace(link, detail)
        worker = self._mesh.discovered(record)
        link = self._links[worker_id] = _Link(
            worker, known, Rhythm(self._limits.detector.heartbeat_interval_s)
        )
        link.task = asyncio.create_task(self._keep(link), name=f"link to {worker_id}")
        self._tasks.add(link.task)
        link.task.add_done_callback(self._done)
        self._tell_fate(worker_id)  # An earlier life is over.

    def _hurry(self) -> None:
        """Streams of one link have commands for others, and stand still until those are read."""
        for link in self._links.values():
            if link.call is not None:
                link.call.hurry()

    def _tell_fate(self, worker_id: str) -> None:
        for callback in self.on_fate:
            callback(worker_id)

    def _replace(self, link: _Link, detail: str) -> None:
        if link.call is not None:
            link.call.end(FailureKind.FENCED, detail)
        if link.task is not None:
            link.task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("bug in a link", task=task.get_name(), exc_info=error)

    async def _keep(self, link: _Link) -> None:
        """Call, and call again, until the worker is gone for good."""
        worker = link.worker
        pause_s = PAUSE_S_MIN
        lost_at = self._clock()
        while True:
            began_at = self._clock()
            link.known.num_calls += 1
            try:
                link.call = RelayCall(
                    partial(self._connect, worker.record.address),
                    worker,
                    self._mesh,
                    self._tokenizers,
                    self._identity,
                    self._limits,
                    call_number=link.known.num_calls,
                    rhythm=link.rhythm,
                    observer=self._observer,
                    outliers=self._outliers,
                    on_welcome=partial(self._tell_fate, worker.worker_id),
                    on_moved=self._hurry,
                    clock=self._clock,
                )
                worker.link_state = LinkState.LINK_STATE_CONNECTING
                end = link.end = await link.call.run()
            finally:
                link.call = None
            self._tell_fate(worker.worker_id)
            now = self._clock()
            if end.was_welcomed:
                lost_at = now
                pause_s = PAUSE_S_MIN
                _log.warning(
                    "link lost",
                    worker_id=worker.worker_id,
                    failure=end.failure.name,
                    detail=end.detail,
                )
            if end.failure is FailureKind.PROTOCOL:
                pause_s = PAUSE_S_MAX  # It will most likely say the same again.
            if link.is_forgotten and now - lost_at >= self._limits.forgotten_grace_s:
                self._forget(link)
                return
            if end.is_break and now - began_at >= STEADY_S:
                continue  # Streams wait to be told whether the worker lives.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def _connect(self, address: str, talker: Talker) -> Wire:
        if self._relay == "grpcio":
            return GrpcioWire(address, talker)
        return NativeWire(address, talker, limits=_CALL_LIMITS, clock=self._clock)

    def _forget(self, link: _Link) -> None:
        _log.info("worker forgotten", worker_id=link.worker.worker_id)
        del self._links[link.worker.worker_id]
        self._mesh.forgotten(link.worker.worker_id)
