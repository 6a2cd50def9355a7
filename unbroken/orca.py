"""Load reports for routers of other makes: ORCA, in the trailer of a call and out of band.

What is in a report, its process decides; docs/METRICS.md has the names.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc.aio
from typing_extensions import override

from unbroken.errors import Reason, UnbrokenError
from unbroken.third_party import orca_pb2 as pb
from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport
from unbroken.third_party.orca_pb2_grpc import OpenRcaServiceServicer

SERVICE: Final = "xds.service.orca.v3.OpenRcaService"
TRAILER: Final = "endpoint-load-metrics-bin"
REPORT_AGE_MAX_S: Final = 0.05
"""So old a report may be; many calls that end together share one."""
INTERVAL_S: Final = 10.0
"""Between two reports out of band, unless the caller says; gRPC's clients have the same default."""
INTERVAL_MIN_S: Final = 0.1
INTERVAL_MAX_S: Final = 3600.0
STREAMS_MAX: Final = 1_000
"""Callers that are told out of band; more are refused."""

Trailers = tuple[tuple[str, bytes], ...]

_Context = grpc.aio.ServicerContext[Any, Any]


class LoadReporter:
    """The newest report of this process."""

    def __init__(
        self,
        make: Callable[[float], OrcaLoadReport],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make` makes one of this moment."""
        self._make = make
        self._clock = clock
        self._made_at: float | None = None
        self._encoded = b""

    def report(self) -> OrcaLoadReport:
        """Of this moment."""
        return self._make(self._clock())

    def encoded(self) -> bytes:
        """As it lies in the trailer; at most `REPORT_AGE_MAX_S` old."""
        now = self._clock()
        if self._made_at is None or now - self._made_at > REPORT_AGE_MAX_S:
            self._made_at = now
            self._encoded = self._make(now).SerializeToString()
        return self._encoded

    def trailers(self) -> Trailers:
        """What a call ends with."""
        return ((TRAILER, self.encoded()),)


class OpenRca(OpenRcaServiceServicer):
    """Reports for routers that have no calls whose trailers they could read."""

    def __init__(self, reporter: LoadReporter, *, streams_max: int = STREAMS_MAX) -> None:
        self._reporter = reporter
        self._streams_max = streams_max
        self.num_streams = 0

    @override
    async def StreamCoreMetrics(
        self, request: pb.OrcaLoadReportRequest, context: _Context
    ) -> AsyncIterator[OrcaLoadReport]:
        if self.num_streams >= self._streams_max:
            detail = f"{self.num_streams} callers read load reports, which is the limit"
            raise UnbrokenError(Reason.OVERLOADED, detail, retry_after_s=INTERVAL_S)
        interval_s = interval_of(request)
        self.num_streams += 1
        try:
            while True:
                yield self._reporter.report()
                await asyncio.sleep(interval_s)
        finally:
            self.num_streams -= 1


def interval_of(request: pb.OrcaLoadReportRequest) -> float:
    """The time between two reports, in seconds: as it is wished, within bounds."""
    if not request.HasField("report_interval"):
        return INTERVAL_S
    wished_s = request.report_interval.seconds + request.report_interval.nanos / 1e9
    return min(max(wished_s, INTERVAL_MIN_S), INTERVAL_MAX_S)
