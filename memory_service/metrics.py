"""What a memory service counts, read from its holdings when somebody asks."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from memory_service.accounts import HOST
from memory_service.holdings import Holdings
from memory_service.segments import State

_PREFIX = "unbroken_memory"


class HoldingsCollector(Collector):
    """Figures at the moment of the scrape, which has a thread of its own: meanwhile all goes on."""

    def __init__(
        self, holdings: Holdings, registry: CollectorRegistry, *, num_fds: Callable[[], int]
    ) -> None:
        self._holdings = holdings
        self._num_fds = num_fds
        self.num_scrubbed_bytes = 0
        registry.register(self)

    @override
    def collect(self) -> Iterator[Metric]:
        holdings = self._holdings
        limits = holdings.policy.limits
        host = holdings.ledger.accounts[HOST]
        yield _gauge("used_bytes", "Memory of the host that is given out.", host.total)
        yield _gauge(
            "unreclaimed_bytes",
            "Of that, memory that is freed and that somebody may have mapped.",
            host.total_unreclaimed,
        )
        yield _gauge("slabs", "Slabs, unreclaimed ones included.", holdings.ledger.num_slabs)
        yield _gauge("capacity_bytes", "Memory that may be given out.", limits.capacity_bytes)
        yield _gauge("quarantined_bytes", "Memory that nobody may touch.", quarantined(holdings))
        yield _gauge("sessions", "Processes that hold memory.", len(holdings.sessions))
        yield _gauge("blocks", "Committed blocks.", holdings.store.num_blocks)
        yield _gauge("pins", "Pins of blocks that are read.", holdings.store.num_pins)
        yield _gauge("held_fds", "Descriptors of memory and processes.", self._num_fds())
        states = [version.state for version in list(holdings.segments)]
        family = GaugeMetricFamily(
            f"{_PREFIX}_segments", "Versions of segments, by state.", labels=["state"]
        )
        for state in State:
            family.add_metric([state.name], states.count(state))
        yield family
        yield _counter("blocks_evicted", "Blocks evicted.", holdings.store.num_evicted)
        yield _counter(
            "checksum_failures", "Bytes that did not match their checksum.", holdings.num_corrupt
        )
        yield _counter(
            "stale_calls", "Calls to an earlier life of the service.", holdings.num_stale
        )
        yield _counter(
            "scrubbed_bytes",
            "Bytes compared with their checksums in the background.",
            self.num_scrubbed_bytes,
        )


def quarantined(holdings: Holdings) -> int:
    """Bytes of segments that nobody may touch."""
    return sum(
        holdings.size_of(slab_id)
        for version in list(holdings.segments)
        if version.state is State.QUARANTINED
        for slab_id in version.slab_ids
    )


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, value=float(value))


def _counter(name: str, help_text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{_PREFIX}_{name}", help_text, value=float(value))
