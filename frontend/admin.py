"""AdminService: what operators ask of a frontend."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc.aio
from typing_extensions import override

from frontend import drain
from frontend.busy import Shedder
from frontend.draining import Draining, budget_of
from frontend.holdings import FrontendHoldings
from frontend.links import Links
from frontend.mesh_view import LinkState, MeshView, Worker
from frontend.outliers import Outliers
from frontend.relay_call import FrontendIdentity
from frontend.thresholds import MeshThresholds
from unbroken import holdings
from unbroken.v1 import admin_service_pb2 as pb
from unbroken.v1 import admin_service_pb2_grpc as pb_grpc
from unbroken.v1 import holding_pb2

_Context = grpc.aio.ServicerContext[Any, Any]


class Admin(pb_grpc.AdminServiceServicer):
    """The service."""

    def __init__(
        self,
        mesh: MeshView,
        links: Links,
        outliers: Outliers,
        shedder: Shedder,
        thresholds: MeshThresholds,
        identity: FrontendIdentity,
        held: FrontendHoldings,
        draining: Draining,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mesh = mesh
        self._links = links
        self._outliers = outliers
        self._shedder = shedder
        self._thresholds = thresholds
        self._identity = identity
        self._held = held
        self.draining = draining
        self._clock = clock

    @override
    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: _Context
    ) -> pb.ListWorkersResponse:
        workers = sorted(self._mesh.workers.items())
        return pb.ListWorkersResponse(workers=[self._info(worker) for _, worker in workers])

    @override
    async def GetThresholds(
        self, request: pb.GetThresholdsRequest, context: _Context
    ) -> pb.GetThresholdsResponse:
        return self._thresholds.get(request)

    @override
    async def SetThresholds(
        self, request: pb.SetThresholdsRequest, context: _Context
    ) -> pb.SetThresholdsResponse:
        return await self._thresholds.set(request)

    @override
    async def GetLedger(
        self, request: pb.GetLedgerRequest, context: _Context
    ) -> pb.GetLedgerResponse:
        own = holdings.told(
            holding_pb2.PROCESS_ROLE_FRONTEND,
            self._identity.frontend_id,
            self._identity.incarnation,
            self._held,
            now=self._clock(),
            listed_max=holdings.listed_max(request.holdings_max),
        )
        return pb.GetLedgerResponse(processes=[own])

    @override
    async def DrainFrontend(
        self, request: pb.DrainFrontendRequest, context: _Context
    ) -> AsyncIterator[pb.DrainFrontendResponse]:
        budget_s = budget_of(request, self.draining.frontend_id)
        self.draining.tell(drain.Asked(budget_s))
        async for response in self.draining.progress(context):
            yield response

    def _info(self, worker: Worker) -> pb.WorkerInfo:
        info = pb.WorkerInfo(
            record=worker.record,
            link=worker.link_state,
            engine=worker.engine_state,
            description=worker.description,
            load=worker.load,
            is_draining=worker.is_draining,
            num_attempts=self._links.num_attempts(worker.worker_id),
            liveness=cast("pb.Liveness.ValueType", int(worker.liveness)),
            suspicion=self._links.suspicion(worker.worker_id),
        )
        if worker.load is not None:
            info.load_age.FromNanoseconds(max(0, int((self._clock() - worker.load_at) * 1e9)))
        ejection = self._outliers.ejection(worker.worker_id)
        if ejection is not None:
            info.ejection.detail = ejection.detail
            info.ejection.num_in_a_row = ejection.num_in_a_row
            if ejection.until is not None:
                left_s = max(0.0, ejection.until - self._clock())
                info.ejection.remaining.FromNanoseconds(int(left_s * 1e9))
        if worker.view is None or not worker.view.is_ready:
            info.detail = worker.detail or _why_not_ready(worker)
        else:
            info.busy = self._shedder.detail(worker.view)
        return info


def _why_not_ready(worker: Worker) -> str:
    if worker.link_state != LinkState.LINK_STATE_UP:
        return "no link yet"
    return "its tokenizer has not been fetched yet"
