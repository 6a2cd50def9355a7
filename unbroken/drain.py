"""Takes a worker or a frontend out of service: asks it to drain, and waits until it has left.

What becomes of its streams, it decides itself; docs/OPERATIONS.md has the policies.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import grpc.aio

from unbroken import status
from unbroken.discovery import FRONTENDS, WORKERS, Discovery
from unbroken.errors import Reason, UnbrokenError
from unbroken.tls import ClientTls
from unbroken.transport import admin_metadata, open_channel
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import sidecar_service_pb2 as pb
from unbroken.v1.admin_service_pb2_grpc import AdminServiceStub
from unbroken.v1.sidecar_service_pb2_grpc import SidecarServiceStub

LEAVE_TIMEOUT_S: Final = 60.0
"""How long a worker whose streams have ended may take to stop its engine and leave."""


@dataclass(frozen=True, slots=True)
class Drained:
    """A worker that has left, and what became of its streams."""

    worker_id: str
    incarnation: int
    num_finished: int
    """They came to their own end there while it drained."""
    num_handed_over: int
    """They went on at other workers."""
    took_s: float


@dataclass(frozen=True, slots=True)
class FrontendDrained:
    """A frontend that has left, and what became of its requests."""

    frontend_id: str
    incarnation: int
    num_finished: int
    """They came to their own end there while it drained."""
    num_moved: int
    """Their clients went on with them at other frontends."""
    num_left: int
    """Their clients left, or cancelled them, when they had been told."""
    num_cut: int
    """They were cut when the budget was over."""
    took_s: float


async def drain_worker(
    where: Discovery,
    worker_id: str,
    *,
    policy: pb.DrainPolicy.ValueType = pb.DRAIN_POLICY_UNSPECIFIED,
    budget_s: float | None = None,
    tell: Callable[[pb.DrainResponse], None] = lambda _: None,
) -> Drained:
    """Drain the worker of that name; returns when it has left the mesh. `tell` hears of progress.

    The worker's own settings count for what is not given. If this is cancelled the drain goes on.
    Raises `UnbrokenError`.
    """
    members = await where.snapshot(WORKERS)
    if worker_id not in members:
        known = ", ".join(members) or "none"
        raise UnbrokenError(
            Reason.NO_WORKER, f"expected a worker of the mesh ({known}), got {worker_id!r}"
        )
    record = members[worker_id]
    incarnation = record.identity.incarnation
    request = pb.DrainRequest(policy=policy, expected_worker_incarnation=incarnation)
    if budget_s is not None:
        request.budget.FromNanoseconds(round(budget_s * 1e9))
    began_at = asyncio.get_running_loop().time()
    last = pb.DrainResponse()
    try:
        async with open_channel(record.address) as channel:
            async for last in SidecarServiceStub(channel).Drain(request):
                tell(last)
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error
    if last.phase != pb.DRAIN_PHASE_STOPPING:
        raise UnbrokenError(Reason.UNREACHABLE, f"{worker_id} said no more in the middle of it")
    try:
        async with asyncio.timeout(LEAVE_TIMEOUT_S), aclosing(where.watch(WORKERS)) as changes:
            async for members in changes:
                now = members.get(worker_id)
                if now is None or now.identity.incarnation != incarnation:
                    break
    except TimeoutError:
        raise UnbrokenError(
            Reason.DEADLINE_EXCEEDED,
            f"expected {worker_id} to leave within {LEAVE_TIMEOUT_S:g} s, its streams have ended",
        ) from None
    took_s = asyncio.get_running_loop().time() - began_at
    return Drained(worker_id, incarnation, last.num_finished, last.num_handed_over, took_s)


async def drain_frontend(
    where: Discovery,
    frontend_id: str,
    *,
    budget_s: float | None = None,
    tls: ClientTls | None = None,
    admin_token: str | None = None,
    tell: Callable[[admin_pb.DrainFrontendResponse], None] = lambda _: None,
) -> FrontendDrained:
    """Drain the frontend of that name; returns when it serves nobody any more, as `drain_worker`.

    Its own setting counts if no budget is given. `admin_token` is that of an operator, if it asks.
    """
    members = await where.snapshot(FRONTENDS)
    if frontend_id not in members:
        known = ", ".join(members) or "none"
        raise UnbrokenError(
            Reason.NO_WORKER, f"expected a frontend of the mesh ({known}), got {frontend_id!r}"
        )
    record = members[frontend_id]
    request = admin_pb.DrainFrontendRequest(frontend_id=frontend_id)
    if budget_s is not None:
        request.budget.FromNanoseconds(round(budget_s * 1e9))
    began_at = asyncio.get_running_loop().time()
    last = admin_pb.DrainFrontendResponse()
    try:
        async with open_channel(
            record.address,
            credentials=None if tls is None else tls.credentials(),
            server_name=None if tls is None else tls.server_name,
        ) as channel:
            calls = AdminServiceStub(channel)
            as_operator = admin_metadata(admin_token)
            async for last in calls.DrainFrontend(request, metadata=as_operator):
                tell(last)
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error
    if last.phase != admin_pb.FRONTEND_DRAIN_PHASE_STOPPING:
        raise UnbrokenError(Reason.UNREACHABLE, f"{frontend_id} said no more in the middle of it")
    took_s = asyncio.get_running_loop().time() - began_at
    return FrontendDrained(
        frontend_id,
        record.incarnation,
        last.num_finished,
        last.num_moved,
        last.num_left,
        last.num_cut,
        took_s,
    )
