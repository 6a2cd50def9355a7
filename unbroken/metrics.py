"""Prometheus metrics of one process: its own registry and the endpoint that serves it.

Names start with `unbroken_` and the process, end with a base unit (`_seconds`, `_bytes`, `_tokens`)
and, for counters and for nothing else, `_total`: `unbroken_frontend_ttft_seconds`. Labels have few
values: never a request's id. docs/METRICS.md names them all.
"""

import threading
from collections.abc import Iterable
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from unbroken.probes import Probes

SECONDS_BUCKETS: Final = tuple(
    round(base * 10.0**exponent, 9) for exponent in range(-4, 2) for base in (1, 2, 5)
)
"""Histogram bounds for durations: 0.1 ms to 50 s, three a decade."""


class PlainCounter(Collector):
    """A counter that one thread counts by adding to `value`; prometheus-client's own costs 1 µs."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self.value = 0
        self._name = name
        self._documentation = documentation
        registry.register(self)

    @override
    def collect(self) -> Iterable[Metric]:
        """What the metrics page shows."""
        yield CounterMetricFamily(self._name, self._documentation, value=self.value)


class MetricsServer:
    """The HTTP endpoint of one registry, served by a thread of its own."""

    def __init__(self, server: WSGIServer, thread: threading.Thread, host: str) -> None:
        self._server = server
        self._thread = thread
        self.port = server.server_port
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def close(self) -> None:
        """Stop serving. Blocks until the thread has ended, at most half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def new_registry() -> CollectorRegistry:
    """A registry that has memory, CPU, descriptors and garbage collection of this process."""
    disable_created_metrics()  # Each would be a second series of its counter, which nobody reads.
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def serve(
    registry: CollectorRegistry,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    probes: Probes | None = None,
) -> MetricsServer:
    """Serve `registry` at http://host:port/metrics, and `probes`; port 0 lets the kernel choose.

    Raises OSError if the address is taken.
    """
    server, thread = start_http_server(port, addr=host, registry=registry)
    application = server.get_app()
    if probes is not None and application is not None:
        server.set_app(probes.before(application))
    return MetricsServer(server, thread, host)
