"""Restarts a mesh, one process after the other, while its streams go on.

    for each worker, then for each frontend:
        drain it ──▶ it leaves ──▶ somebody starts its successor ──▶ that one serves ──▶ the next

Who starts the successor is not our business: `unbroken up`, systemd, Kubernetes. Nothing more is
drained before a successor does all that the one before did, so a mesh that does not come back
loses one process by a rollout and not all.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from unbroken.client import Client
from unbroken.discovery import FRONTENDS, WORKERS, Discovery, Kind
from unbroken.drain import drain_frontend, drain_worker
from unbroken.errors import Reason, UnbrokenError
from unbroken.tls import ClientTls
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import sidecar_service_pb2 as sidecar_pb
from unbroken.v1 import worker_pb2

READY_TIMEOUT_S: Final = 300.0
"""How long a successor may take: engines load their models."""
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Replaced:
    """One process that was drained, and has a successor that serves."""

    name: str
    is_frontend: bool
    num_finished: int
    """Streams that came to their own end there."""
    num_moved: int
    """Streams that went on elsewhere."""
    num_cut: int
    """Streams that had to be resumed by clients which cannot move by themselves."""
    drain_s: float
    """Until it had nothing left, and had left the mesh."""
    away_s: float
    """From then until its successor served."""


async def roll_out(
    where: Discovery,
    *,
    workers: bool = True,
    frontends: bool = True,
    policy: sidecar_pb.DrainPolicy.ValueType = sidecar_pb.DRAIN_POLICY_UNSPECIFIED,
    ready_timeout_s: float = READY_TIMEOUT_S,
    tls: ClientTls | None = None,
    admin_token: str | None = None,
    tell: Callable[[Replaced], None] = lambda _: None,
) -> Sequence[Replaced]:
    """Replace all that is in the mesh now, by name: workers first. `tell` hears of each.

    Raises `UnbrokenError`; what has not been replaced by then goes on as it is.
    """
    replaced: list[Replaced] = []

    def done(one: Replaced) -> None:
        replaced.append(one)
        tell(one)

    if workers:
        for worker_id in await where.snapshot(WORKERS):
            one = await replace_worker(where, worker_id, policy, ready_timeout_s, tls, admin_token)
            done(one)
    if frontends:
        for frontend_id in whole_frontends(await where.snapshot(FRONTENDS)):
            done(await replace_frontend(where, frontend_id, ready_timeout_s, tls, admin_token))
    return replaced


async def replace_worker(
    where: Discovery,
    worker_id: str,
    policy: sidecar_pb.DrainPolicy.ValueType,
    ready_timeout_s: float,
    tls: ClientTls | None,
    admin_token: str | None,
) -> Replaced:
    """Drain a worker and wait until every frontend can send work to its successor."""
    drained = await drain_worker(where, worker_id, policy=policy)
    began_at = asyncio.get_running_loop().time()
    async with _limit(ready_timeout_s, worker_id):
        record = await _successor(
            where, WORKERS, worker_id, lambda it: it.identity.incarnation > drained.incarnation
        )
        for frontend in _addresses(await where.snapshot(FRONTENDS)):
            lives = {worker_id: record.identity.incarnation}
            await _until_known(frontend, lives, tls, admin_token)
    away_s = asyncio.get_running_loop().time() - began_at
    return Replaced(
        worker_id,
        is_frontend=False,
        num_finished=drained.num_finished,
        num_moved=drained.num_handed_over,
        num_cut=0,
        drain_s=drained.took_s,
        away_s=away_s,
    )


async def replace_frontend(
    where: Discovery,
    frontend_id: str,
    ready_timeout_s: float,
    tls: ClientTls | None,
    admin_token: str | None,
) -> Replaced:
    """Drain a frontend and wait until its successor can send work to every worker."""
    drained = await drain_frontend(where, frontend_id, tls=tls, admin_token=admin_token)
    began_at = asyncio.get_running_loop().time()
    async with _limit(ready_timeout_s, frontend_id):
        record = await _successor(
            where, FRONTENDS, frontend_id, lambda it: it.incarnation > drained.incarnation
        )
        workers = await where.snapshot(WORKERS)
        lives = {name: worker.identity.incarnation for name, worker in workers.items()}
        await _until_known(record.address, lives, tls, admin_token)
    away_s = asyncio.get_running_loop().time() - began_at
    return Replaced(
        frontend_id,
        is_frontend=True,
        num_finished=drained.num_finished,
        num_moved=drained.num_moved,
        num_cut=drained.num_cut,
        drain_s=drained.took_s,
        away_s=away_s,
    )


def whole_frontends(members: Mapping[str, worker_pb2.FrontendRecord]) -> Sequence[str]:
    """The names without those of the processes that a frontend has, which it drains itself."""
    return [
        name
        for name, record in members.items()
        if (parent := members.get(name.rpartition(".")[0])) is None
        or parent.address != record.address
    ]


_MemberT = TypeVar("_MemberT", worker_pb2.WorkerRecord, worker_pb2.FrontendRecord)


async def _successor(
    where: Discovery, kind: Kind[_MemberT], name: str, is_it: Callable[[_MemberT], bool]
) -> _MemberT:
    async with aclosing(where.watch(kind)) as changes:
        async for members in changes:
            record = members.get(name)
            if record is not None and is_it(record):
                return record
    raise AssertionError("a watch never ends")


def _addresses(members: Mapping[str, worker_pb2.FrontendRecord]) -> Sequence[str]:
    return [members[name].address for name in whole_frontends(members)]


async def _until_known(
    address: str, lives: Mapping[str, int], tls: ClientTls | None, admin_token: str | None
) -> None:
    """Wait until the frontend is ready, and would send work to these lives of workers."""
    async with Client(address, tls=tls, admin_token=admin_token) as client:
        while True:
            try:
                workers = {
                    info.record.identity.worker_id: info for info in await client.list_workers()
                }
                health: Any = health_pb2_grpc.HealthStub(await client.channel())
                answer = await health.Check(
                    health_pb2.HealthCheckRequest(service="readiness"), timeout=POLL_S * 20
                )
            except (UnbrokenError, grpc.RpcError) as error:
                if isinstance(error, UnbrokenError) and error.reason is Reason.NOT_PERMITTED:
                    raise
            else:
                is_ready = answer.status == health_pb2.HealthCheckResponse.SERVING
                if is_ready and all(
                    _takes_work(workers.get(name), life) for name, life in lives.items()
                ):
                    return
            await asyncio.sleep(POLL_S)


def _takes_work(info: admin_pb.WorkerInfo | None, incarnation: int) -> bool:
    """Whether the frontend sees that life of the worker, or a later one, and would use it."""
    return (
        info is not None
        and info.record.identity.incarnation >= incarnation
        and info.link == admin_pb.LINK_STATE_UP
        and info.engine == worker_pb2.ENGINE_STATE_SERVING
        and not info.is_draining
        and not info.detail
    )


@asynccontextmanager
async def _limit(timeout_s: float, name: str) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise UnbrokenError(
            Reason.DEADLINE_EXCEEDED,
            f"expected a successor of {name} that serves within {timeout_s:g} s, got none; "
            "does somebody start processes again that end?",
        ) from None
