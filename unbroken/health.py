"""grpc.health.v1 (Check, Watch, List) and reflection for our servers.

The servicer of grpcio-health-checking does not answer List, and one watcher that does not read
makes its `set` wait; this one does neither.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from typing_extensions import override

HEALTH_SERVICE: Final = "grpc.health.v1.Health"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_ListResponse = cast("Any", health_pb2).HealthListResponse  # Younger than the type stubs.

_Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Tells who asks whether each service takes work. The service "" stands for the process."""

    def __init__(self, services: Iterable[str] = ()) -> None:
        """`services` start as NOT_SERVING, and so does the process."""
        self._statuses: dict[str, int] = dict.fromkeys(["", *services], _NOT_SERVING)
        self.watchers: set[asyncio.Event] = set()
        """One for each call of Watch; set when a status changed."""

    def set(self, service: str, *, is_serving: bool) -> None:
        """Say whether `service` takes work. Call it on the server's event loop."""
        self._statuses[service] = _SERVING if is_serving else _NOT_SERVING
        for changed in self.watchers:
            changed.set()

    def is_serving(self, service: str) -> bool | None:
        """Whether it takes work; None if it is not known. From any thread."""
        status = self._statuses.get(service)
        return None if status is None else status == _SERVING

    def set_all(self, *, is_serving: bool) -> None:
        """Say whether the process and all its services take work."""
        for service in list(self._statuses):
            self.set(service, is_serving=is_serving)

    @override
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND, as the protocol wants it, for a service that is not ours."""
        status = self._statuses.get(request.service)
        if status is None:
            known = ", ".join(filter(None, sorted(self._statuses)))
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"expected one of {known}, got {request.service[:80]!r}"
            )
        return health_pb2.HealthCheckResponse(status=status)

    @override
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes; a slow reader gets the newest only."""
        changed = asyncio.Event()
        self.watchers.add(changed)
        last: int | None = None
        try:
            while True:
                changed.clear()
                status = self._statuses.get(request.service, _SERVICE_UNKNOWN)
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                await changed.wait()
        finally:
            self.watchers.discard(changed)

    @override
    async def List(self, request: object, context: _Context) -> object:  # pyright: ignore[reportGeneralTypeIssues]
        """The status of every service."""
        return _ListResponse(
            statuses={
                service: health_pb2.HealthCheckResponse(status=status)
                for service, status in self._statuses.items()
            }
        )


ALSO_SERVED: Final = (HEALTH_SERVICE, reflection.SERVICE_NAME)
"""What `add_health` adds to a server."""


def add_health(
    server: grpc.aio.Server, services: Iterable[str], *, also_reflected: Iterable[str] = ()
) -> HealthServicer:
    """Serve grpc.health.v1 and reflection for `services`, given by their full names.

    Every service starts as NOT_SERVING. Call it after the services have been added. Reflection also
    tells of `also_reflected`, which have no health of their own.
    """
    names = tuple(services)
    health = HealthServicer(names)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflected = [*names, *also_reflected, *ALSO_SERVED]
    reflection.enable_server_reflection(reflected, server)
    return health
