"""What a memory service says of GPUs."""

import asyncio

from tests.memory_service.processes import ServiceProcess
from tests.memory_service.test_service import Stub, asked
from unbroken.v1 import memory_pb2 as pb

FAULT_S_MAX = 10.0


def faults(service: ServiceProcess, sequence: int) -> list[int]:
    """The Xids of processes' own errors after this event, when the first of them has come."""

    async def ask(stub: Stub) -> list[int]:
        boot_token = (await stub.GetUsage(pb.GetUsageRequest())).boot_token
        request = pb.WatchRequest(boot_token=boot_token, sequence=sequence)
        try:
            async with asyncio.timeout(FAULT_S_MAX - 1):
                async for response in stub.Watch(request):
                    found = [
                        event.value
                        for event in response.events
                        if event.kind == pb.MEMORY_EVENT_KIND_GPU_FAULT
                    ]
                    if found:
                        return found
        except TimeoutError:
            pass
        return []

    return asked(service, ask)
