"""How the processes of a frontend call each other: a Unix socket each, named by its process id."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry

from frontend import drain
from frontend.draining import BUDGET_S_MAX, Draining
from frontend.processes import sums
from frontend.processes.sums import Family
from frontend.requests import Requests
from unbroken import status
from unbroken.errors import Reason, UnbrokenError
from unbroken.transport import open_channel
from unbroken.v1 import admin_service_pb2 as pb_admin
from unbroken.v1 import inference_service_pb2 as pb

SERVICE: Final = "unbroken.frontend.Siblings"
"""Of the processes among themselves; never served to clients, and of one version at any time."""
CALL_TIMEOUT_S: Final = 2.0
"""How long a sibling may take to answer."""
DRAIN_TIMEOUT_S: Final = BUDGET_S_MAX + 60.0
"""How long one may take to drain."""

T = TypeVar("T")
Key = tuple[str, str]
"""Tenant and request id."""

_Context = grpc.aio.ServicerContext[Any, Any]


def socket_of(directory: Path, pid: int) -> Path:
    """Where the process of that id is called by its siblings."""
    return directory / f"{pid}.sock"


class Siblings:
    """The other processes of this frontend, as far as they live."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._channels: dict[int, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Close the connections; calls that still run are cancelled."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def others(self) -> Mapping[int, grpc.aio.Channel]:
        """Channels to all others, by process id."""
        return {pid: self.channel(pid) for pid in sorted(await self.forget_gone())}

    async def forget_gone(self) -> Set[int]:
        """Close the channels to processes that are gone; returns the ids of the others."""
        pids = {int(path.stem) for path in self._directory.glob("*.sock")} - {os.getpid()}
        # Taken all at once: who calls this meanwhile must not meet them.
        gone = [self._channels.pop(pid) for pid in self._channels.keys() - pids]
        await asyncio.gather(*(channel.close() for channel in gone))
        return pids

    def channel(self, pid: int) -> grpc.aio.Channel:
        """A channel to one of them."""
        channel = self._channels.get(pid)
        if channel is None:
            channel = open_channel(f"unix:{socket_of(self._directory, pid)}")
            self._channels[pid] = channel
        return channel

    async def ask_all(self, ask: Callable[[grpc.aio.Channel], Awaitable[T]]) -> Sequence[T]:
        """The answers of all others; those that die meanwhile have none.

        Raises UNREACHABLE if one does not answer although it lives, and what one answers otherwise.
        """
        asked = [_answer(pid, ask(channel)) for pid, channel in (await self.others()).items()]
        return [answer for answer in await asyncio.gather(*asked) if answer is not None]

    async def cancel(
        self, request: pb.CancelRequest, parents: Set[Key], *, is_first: bool
    ) -> Set[Key]:
        """Cancel what the others have below `parents` and, at first, of the request's own name."""
        order = {
            "request_id": request.request_id if is_first else None,
            "tenant": request.tenant,
            "soft": request.soft,
            "parents": sorted(parents),
        }
        message = json.dumps(order).encode()
        answers = await self.ask_all(lambda channel: _call(channel, "Cancel", message))
        return {(tenant, name) for answer in answers for tenant, name in json.loads(answer)}

    async def drain(
        self, budget_s: float | None, *, to_the_end: bool = False
    ) -> Mapping[int, pb_admin.DrainFrontendResponse]:
        """Have the others drain, too; how far each of them is that still lives, by process id.

        `to_the_end`: answer when nothing is left there.
        """
        message = json.dumps([budget_s, to_the_end]).encode()
        timeout_s = DRAIN_TIMEOUT_S if to_the_end else CALL_TIMEOUT_S
        answers = await self.ask_all(lambda channel: _call(channel, "Drain", message, timeout_s))
        return {
            int.from_bytes(answer[:4], "little"): pb_admin.DrainFrontendResponse.FromString(
                answer[4:]
            )
            for answer in answers
        }


def has_been_cancelled() -> bool:
    """Whether this task was cancelled, and not merely a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def ask_metrics(channel: grpc.aio.Channel) -> list[Family]:
    """What a process has counted. Raises `grpc.RpcError`."""
    return sums.from_json(json.loads(await _call(channel, "Metrics", b"", CALL_TIMEOUT_S / 2)))


def families_of(registry: CollectorRegistry) -> list[Family]:
    """What this process has counted."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            {
                (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
                for sample in metric.samples
                if not sample.name.endswith("_created")
            },
        )
        for metric in registry.collect()
    ]


def add_siblings(
    server: grpc.aio.Server, requests: Requests, registry: CollectorRegistry, draining: Draining
) -> None:
    """Serve what only siblings and the parent may ask."""
    counting = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    async def cancel(message: bytes, _: _Context) -> bytes:
        order = json.loads(message)
        parents = {(tenant, name) for tenant, name in order["parents"]}
        doomed = set(requests.cancel_below(parents, soft=order["soft"]))
        if order["request_id"] is not None:
            doomed.update(
                requests.cancel(order["request_id"], tenant=order["tenant"], soft=order["soft"])
            )
        return json.dumps(sorted(doomed)).encode()

    async def metrics(_: bytes, __: _Context) -> bytes:
        # In a thread, as where a scraper asks: it takes some milliseconds. In one of its own, since
        # the parent kills who does not answer, and long prompts may keep all others busy.
        loop = asyncio.get_running_loop()
        families = await loop.run_in_executor(counting, families_of, registry)
        return json.dumps(sums.to_json(families)).encode()

    async def drain_too(message: bytes, _: _Context) -> bytes:
        budget_s, is_waiting = json.loads(message)
        draining.tell(drain.Asked(budget_s))
        if is_waiting:
            await draining.stop_wanted.wait()
        return os.getpid().to_bytes(4, "little") + draining.response().SerializeToString()

    made: Any = grpc.unary_unary_rpc_method_handler  # For handlers of `grpc`, says its stub.
    handlers: Any = {
        "Cancel": made(cancel),
        "Metrics": made(metrics),
        "Drain": made(drain_too),
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.add_generic_rpc_handlers((handler,))


async def _call(
    channel: grpc.aio.Channel, method: str, message: bytes, timeout_s: float = CALL_TIMEOUT_S
) -> bytes:
    call = cast("Any", channel).unary_unary(f"/{SERVICE}/{method}")
    return await call(message, timeout=timeout_s)


async def _answer(pid: int, asked: Awaitable[T]) -> T | None:
    """None from one that is gone, or goes while it is asked."""
    try:
        return await asked
    except asyncio.CancelledError:
        if has_been_cancelled():
            raise
        return None  # Somebody else here has seen that it is gone, and closed the channel.
    except grpc.aio.AioRpcError as error:
        failure = status.from_rpc_error(error)
        if failure.reason is Reason.UNREACHABLE:
            return None
        if failure.reason is Reason.DEADLINE_EXCEEDED:
            raise UnbrokenError(
                Reason.UNREACHABLE, f"process {pid} of this frontend does not answer"
            ) from error
        raise failure from error
