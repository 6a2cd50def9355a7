"""What a sidecar counts, read from the hub when somebody asks."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from sidecar.canary import Canary
from sidecar.engine_load import EngineLoad
from sidecar.hub import Hub
from sidecar.watchdog import Work
from unbroken.edge.metrics import EdgeMetrics
from unbroken.v1 import worker_pb2

_PREFIX = "unbroken_sidecar"


class HubCollector(Collector):
    """Figures of the hub at the moment of the scrape: nothing is counted on the hot path."""

    def __init__(self, hub: Hub, canary: Canary, registry: CollectorRegistry) -> None:
        self._hub = hub
        self._canary = canary
        self.edge = EdgeMetrics(registry, _PREFIX)
        registry.register(self)

    @override
    def collect(self) -> Iterator[Metric]:
        hub = self._hub
        yield _gauge("links", "Open Relay calls of frontends.", lambda: len(hub.links))
        yield _gauge("attempts_running", "Attempts on the engine.", lambda: hub.num_running)
        yield _gauge("engine_up", "1 while the engine takes work.", lambda: hub.takes_work)
        yield _gauge("draining", "1 while the worker takes no new work.", lambda: hub.is_draining)
        yield _gauge(
            "kv_blocks_accounted",
            "KV blocks of running attempts by the sidecar's own account, prefixes not shared.",
            hub.accounted_blocks,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_tokens",
            "Tokens relayed from the engine.",
            value=hub.num_relayed,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_attempts_drained",
            "Attempts that came to their own end while the worker drained.",
            value=hub.num_drained,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_attempts_handed_over",
            "Attempts that a drain ended, for other workers to go on.",
            value=hub.num_handed_over,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_attempts_shed",
            "Attempts at new work that were refused because the worker was over a threshold.",
            value=hub.num_shed,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_engine_failures",
            "Times the engine was lost.",
            value=hub.num_engine_failures,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_engine_restarts",
            "Times the engine was started again.",
            value=hub.num_engine_restarts,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_stalls",
            "Times the engine was called stalled.",
            value=hub.watchdog.num_stalls,
        )
        yield from self._watchdog()
        yield CounterMetricFamily(
            f"{_PREFIX}_canary_probes",
            "Tokens asked of an idle engine to see whether it works; counted nowhere else.",
            value=self._canary.num_probes,
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_canary_failures",
            "Times that it gave none, or another than always.",
            value=self._canary.num_failures,
        )
        yield _gauge(
            "canary_failing",
            "1 while the engine gets no work because of that.",
            lambda: self._canary.is_failing,
        )
        load = hub.load  # Scrapes have a thread of their own; meanwhile the hub goes on.
        if load is not None:
            yield from self._ranks(load)
            yield from _kv_store(load.kv_store)
        engine_load = hub.engine_load
        if engine_load is not None:
            yield from _for_routers(engine_load)

    def _watchdog(self) -> Iterator[Metric]:
        now, watchdog = self._hub.now(), self._hub.watchdog
        yield _gauge(
            "engine_silence_seconds",
            "How long nothing has come from it.",
            lambda: watchdog.silent_s,
        )
        yield _gauge(
            "engine_silence_bound_seconds",
            "Silence after which it is called hung; 0: it promised no signs of life.",
            lambda: watchdog.silence_bound_s(now) or 0.0,
        )
        yield _gauge(
            "engine_step_bound_seconds",
            "How long its next step may take, with what it has to do now.",
            lambda: watchdog.bound_s(now, Work(True, self._hub.queued_tokens)),
        )

    def _ranks(self, load: worker_pb2.LoadReport) -> Iterator[Metric]:
        for field, (name, help_text) in _RANK_GAUGES.items():
            family = GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["rank"])
            for rank in load.ranks:
                family.add_metric([str(rank.rank)], getattr(rank, field))
            yield family
        preemptions = CounterMetricFamily(
            f"{_PREFIX}_preemptions",
            "Times that a stream lost its KV blocks to another, in this life of the engine.",
            labels=["rank"],
        )
        for rank in load.ranks:
            preemptions.add_metric([str(rank.rank)], rank.preemptions_total)
        yield preemptions


_RANK_GAUGES = {
    "kv_blocks_total": ("kv_blocks", "KV blocks of the pool."),
    "kv_blocks_used": ("kv_blocks_used", "KV blocks held by running streams."),
    "kv_blocks_cached": ("kv_blocks_cached", "KV blocks that hold reusable prefixes only."),
    "requests_running": ("requests_running", "Streams in the batch."),
    "requests_waiting": ("requests_waiting", "Streams waiting for a place in the batch."),
    "prefill_tokens_queued": ("prefill_tokens_queued", "Prompt tokens not yet computed."),
}
"""By the field of `RankLoad`, the name and the meaning: only counters are called a total."""


_KV_STORE_COUNTERS = {
    "blocks_put_total": ("memory_blocks_put", "KV blocks stored in the memory service."),
    "blocks_dropped_total": (
        "memory_blocks_dropped",
        "KV blocks not stored there, for want of room or because it was away or too slow.",
    ),
    "blocks_restored_total": (
        "memory_blocks_restored",
        "KV blocks taken from there instead of being computed.",
    ),
    "blocks_missed_total": (
        "memory_blocks_missed",
        "KV blocks asked for there and not had: not stored, not intact, or not in time.",
    ),
    "put_bytes_total": ("memory_put_bytes", "Bytes of KV blocks stored there."),
    "restored_bytes_total": ("memory_restored_bytes", "Bytes of KV blocks taken from there."),
}
"""By the field of `KvStoreUse`, the name and the meaning. All are of this life of the engine."""


def _kv_store(use: worker_pb2.KvStoreUse) -> Iterator[Metric]:
    """Zeros of an engine that uses no memory service."""
    for field, (name, help_text) in _KV_STORE_COUNTERS.items():
        yield CounterMetricFamily(f"{_PREFIX}_{name}", help_text, value=getattr(use, field))
    yield _gauge(
        "memory_off",
        "1 once the engine has stopped using it, after a fault of its own.",
        lambda: use.is_off,
    )


def _for_routers(load: EngineLoad) -> Iterator[Metric]:
    """What inference gateways look for at a model server, under the names that vLLM has for it."""
    for name, help_text, value in (
        ("num_requests_running", "Streams in the batch.", load.num_running),
        ("num_requests_waiting", "Streams waiting for a place in it.", load.num_waiting),
        ("kv_cache_usage_perc", "KV blocks held by streams, as a share of all.", load.kv_usage),
    ):
        family = GaugeMetricFamily(f"vllm:{name}", help_text, labels=["model_name"])
        family.add_metric([load.model], value)
        yield family
    config = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Tokens of a KV block, and how many blocks there are.",
        labels=["block_size", "num_gpu_blocks"],
    )
    config.add_metric([str(load.block_size), str(load.kv_blocks)], 1.0)
    yield config


def _gauge(name: str, help_text: str, value: Callable[[], float]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, value=float(value()))
