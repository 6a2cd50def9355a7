"""What a sidecar counts, read from the hub when somebody asks."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from sidecar.hub import Hub
from unbroken.v1 import worker_pb2

_PREFIX = "unbroken_sidecar"


class HubCollector(Collector):
    """Figures of the hub at the moment of the scrape: nothing is counted on the hot path."""

    def __init__(self, hub: Hub, registry: CollectorRegistry) -> None:
        self._hub = hub
        registry.register(self)

    @override
    def collect(self) -> Iterator[Metric]:
        hub = self._hub
        yield _gauge("links", "Open Relay calls of frontends.", lambda: len(hub.links))
        yield _gauge("attempts_running", "Attempts on the engine.", lambda: len(hub.ledger.running))
        yield _gauge("engine_up", "1 while the engine takes work.", lambda: hub.up is not None)
        yield _gauge(
            "kv_blocks_accounted",
            "KV blocks of running attempts by the sidecar's own account, prefixes not shared.",
            hub.accounted_blocks,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_tokens", "Tokens relayed from the engine.", value=hub.num_tokens
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_engine_failures",
            "Times the engine was lost.",
            value=hub.num_engine_failures,
        )
        load = hub.load  # Scrapes have a thread of their own; meanwhile the hub goes on.
        if load is not None:
            yield from self._ranks(load)

    def _ranks(self, load: worker_pb2.LoadReport) -> Iterator[Metric]:
        for name, help_text in _RANK_GAUGES.items():
            family = GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["rank"])
            for rank in load.ranks:
                family.add_metric([str(rank.rank)], getattr(rank, name))
            yield family


_RANK_GAUGES = {
    "kv_blocks_total": "KV blocks of the pool.",
    "kv_blocks_used": "KV blocks held by running streams.",
    "kv_blocks_cached": "KV blocks that hold reusable prefixes only.",
    "requests_running": "Streams in the batch.",
    "requests_waiting": "Streams waiting for a place in the batch.",
    "prefill_tokens_queued": "Prompt tokens not yet computed.",
}


def _gauge(name: str, help_text: str, value: Callable[[], float]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, value=float(value()))
