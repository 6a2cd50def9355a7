"""What an edge counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class EdgeMetrics:
    """The observer of an `EdgeServer`."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self._connections = Gauge(
            f"{prefix}_edge_connections", "Connections open at the native edge.", registry=registry
        )
        self._limits = Counter(
            f"{prefix}_edge_limits_total",
            "Times that a caller went beyond a limit of the native edge (docs/decisions/edge.md).",
            ["limit"],
            registry=registry,
        )
        self._failures = Counter(
            f"{prefix}_edge_connections_failed_total",
            "Connections that the native edge ended with an error, by its HTTP/2 name.",
            ["code"],
            registry=registry,
        )

    def edge_connected(self, num_more: int) -> None:
        """A connection came (1) or went (-1)."""
        self._connections.inc(num_more)

    def edge_limit_hit(self, limit: str) -> None:
        """A client went beyond a limit."""
        self._limits.labels(limit).inc()

    def edge_connection_failed(self, code: str) -> None:
        """A connection was ended with an error."""
        self._failures.labels(code).inc()
