"""What all processes of a mesh hold for requests: asked of each, told together.

Whoever cannot be asked, or does not tell all, is in the answer with a `detail`.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc.aio

from unbroken import status
from unbroken.client import Client
from unbroken.discovery import WORKERS, Discovery
from unbroken.errors import UnbrokenError
from unbroken.transport import open_channel
from unbroken.v1 import holding_pb2, worker_pb2
from unbroken.v1 import sidecar_service_pb2 as pb
from unbroken.v1.sidecar_service_pb2_grpc import SidecarServiceStub

CALL_TIMEOUT_S: Final = 5.0


async def mesh_ledger(
    client: Client, where: Discovery, *, holdings_max: int = 0
) -> Sequence[holding_pb2.ProcessHoldings]:
    """What the frontends of the client, and the workers that discovery knows, hold.

    At most so many holdings of each process are listed; 0 is its default. Frontends come first.
    Raises `UnbrokenError` if no frontend can be reached, or if they refuse.
    """
    workers = await where.snapshot(WORKERS)
    frontends, *told = await asyncio.gather(
        client.ledger(holdings_max=holdings_max),
        *(
            worker_ledger(record, holdings_max=holdings_max)
            for _, record in sorted(workers.items())
        ),
    )
    return [*frontends, *(process for processes in told for process in processes)]


async def worker_ledger(
    record: worker_pb2.WorkerRecord, *, holdings_max: int = 0
) -> Sequence[holding_pb2.ProcessHoldings]:
    """What a worker's sidecar and engine hold; if it cannot be asked, that it cannot."""
    try:
        async with open_channel(record.address) as channel:
            request = pb.GetWorkerLedgerRequest(holdings_max=holdings_max)
            call = SidecarServiceStub(channel).GetWorkerLedger(request, timeout=CALL_TIMEOUT_S)
            return list((await call).processes)
    except grpc.aio.AioRpcError as error:
        return [_silent(record, status.from_rpc_error(error))]


def _silent(record: worker_pb2.WorkerRecord, error: UnbrokenError) -> holding_pb2.ProcessHoldings:
    return holding_pb2.ProcessHoldings(
        role=holding_pb2.PROCESS_ROLE_SIDECAR,
        name=record.identity.worker_id,
        incarnation=record.identity.incarnation,
        detail=f"{error.reason.value}: {error.detail}",
    )
