"""SidecarService: what operators ask of a sidecar."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc.aio
from typing_extensions import override

from sidecar.drain import Drain, Phase, Plan, Policy
from sidecar.engines.base import Engine
from sidecar.hub import Hub
from unbroken import holdings
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.v1 import holding_pb2, worker_pb2
from unbroken.v1 import sidecar_service_pb2 as pb
from unbroken.v1.sidecar_service_pb2_grpc import SidecarServiceServicer

BUDGET_S_MAX: Final = 86_400.0

_Context = grpc.aio.ServicerContext[Any, Any]


class Admin(SidecarServiceServicer):
    """The service."""

    def __init__(
        self,
        hub: Hub,
        engine: Engine,
        drain: Drain,
        configured: Plan,
        identity: worker_pb2.WorkerIdentity,
        *,
        ask: Callable[[Plan], None],
    ) -> None:
        """`ask` begins a drain, or makes it more urgent; `configured` is what it is by default."""
        self._hub = hub
        self._engine = engine
        self._drain = drain
        self._configured = configured
        self._identity = identity
        self._ask = ask
        self._calls: set[asyncio.Event] = set()  # Each is told when something changed.
        hub.on_change.append(self._tell)
        hub.on_over.append(self._tell)

    @property
    def is_idle(self) -> bool:
        """Nobody has yet to be told how a drain ended."""
        return not self._calls

    @override
    async def Drain(
        self, request: pb.DrainRequest, context: _Context
    ) -> AsyncIterator[pb.DrainResponse]:
        if request.expected_worker_incarnation not in (0, self._identity.incarnation):
            raise UnbrokenError(
                Reason.FENCED,
                f"expected worker incarnation {request.expected_worker_incarnation}, this is "
                f"{self._identity.incarnation}",
            )
        plan = plan_of(request, self._configured)
        changed = asyncio.Event()
        self._calls.add(changed)
        try:
            self._ask(plan)
            told: object = None
            while True:
                changed.clear()
                response = self._response()
                news = (response.num_attempts, response.num_handed_over, self._hub.hand_over_at)
                if news != told or self._drain.phase is Phase.STOPPING:
                    told = news
                    yield response
                if response.phase == pb.DRAIN_PHASE_STOPPING:
                    return
                await changed.wait()
        finally:
            self._calls.discard(changed)

    @override
    async def GetWorkerLedger(
        self, request: pb.GetWorkerLedgerRequest, context: _Context
    ) -> pb.GetWorkerLedgerResponse:
        listed_max = holdings.listed_max(request.holdings_max)
        hub, identity = self._hub, self._identity
        response = pb.GetWorkerLedgerResponse()
        if hub.up is not None:
            response.processes.append(await self._engine_holdings(hub.up.incarnation, listed_max))
        # After the engine: what it let go meanwhile is not held here any more, either.
        own = holdings.told(
            holding_pb2.PROCESS_ROLE_SIDECAR,
            identity.worker_id,
            identity.incarnation,
            hub.holdings(),
            now=hub.now(),
            listed_max=listed_max,
        )
        response.processes.insert(0, own)
        return response

    async def _engine_holdings(
        self, incarnation: int, listed_max: int
    ) -> holding_pb2.ProcessHoldings:
        """What the engine holds by its own word; without that, by its load report."""
        told = await self._engine.holdings()
        now, detail = self._hub.now(), ""
        if told is not None:
            held = [one for each in told if (one := holdings.from_proto(each, now)) is not None]
        else:
            detail = "the engine does not say what it holds; this is its latest load report"
            held = holdings.of_load(self._hub.load)
        return holdings.told(
            holding_pb2.PROCESS_ROLE_ENGINE,
            self._identity.worker_id,
            incarnation,
            held,
            now=now,
            listed_max=listed_max,
            detail=detail,
        )

    def _response(self) -> pb.DrainResponse:
        hub, is_stopping = self._hub, self._drain.phase is Phase.STOPPING
        response = pb.DrainResponse(
            phase=pb.DRAIN_PHASE_STOPPING if is_stopping else pb.DRAIN_PHASE_FINISHING,
            num_attempts=hub.num_left,
            num_finished=hub.num_drained,
            num_handed_over=hub.num_handed_over,
        )
        if not is_stopping and hub.hand_over_at is not None:
            left_s = max(0.0, hub.hand_over_at - hub.now())
            response.budget_left.FromNanoseconds(round(left_s * 1e9))
        return response

    def _tell(self) -> None:
        for changed in self._calls:
            changed.set()


_POLICIES: Final = {
    pb.DRAIN_POLICY_FINISH: Policy.FINISH,
    pb.DRAIN_POLICY_HAND_OVER: Policy.HAND_OVER,
    pb.DRAIN_POLICY_BUDGET: Policy.BUDGET,
}


def plan_of(request: pb.DrainRequest, configured: Plan) -> Plan:
    """What the request asks for. Raises `InvalidField`."""
    if request.HasField("budget") and request.policy != pb.DRAIN_POLICY_BUDGET:
        raise InvalidField("budget", "none without the policy BUDGET", request.policy)
    if request.policy == pb.DRAIN_POLICY_UNSPECIFIED:
        return configured
    if request.policy not in _POLICIES:
        raise InvalidField("policy", "a DrainPolicy", request.policy)
    budget_s = configured.budget_s
    if request.HasField("budget"):
        budget_s = request.budget.ToNanoseconds() / 1e9
        if not 0 <= budget_s <= BUDGET_S_MAX:
            raise InvalidField("budget", f"0 to {BUDGET_S_MAX:g} seconds", budget_s)
    return Plan(_POLICIES[request.policy], budget_s)
