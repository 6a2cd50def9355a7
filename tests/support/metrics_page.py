"""What docs/METRICS.md has to say, from the metrics that the processes make."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from frontend.metrics import FrontendMetrics, ParentMetrics
from frontend.processes.sums import PARTS
from memory_service.accounts import Limits
from memory_service.holdings import Holdings, Policy
from memory_service.metrics import HoldingsCollector
from sidecar.canary import Canary
from sidecar.metrics import HubCollector
from tests.sidecar.fakes import Desk
from unbroken import metrics
from unbroken.v1 import worker_pb2

HEAD = """\
# Metrics

Generated from the code by `python -m tests.unbroken.test_metrics_page`.

A process that is given `--metrics-listen` serves these at `/metrics`, as Prometheus reads them; its
record in discovery says where (`metrics_address`). Counters, and only they, end with `_total`;
histograms have the series `_bucket`, `_count` and `_sum`. A counter or histogram with labels has no
series before it counts for the first time. No label ever has the id of a request, a client or a
tenant.
"""

LABELS = {
    "action": "`stopped`: a request that kills its workers was ended; `refused`: it came again",
    "block_size, num_gpu_blocks": "the figures themselves",
    "code": "error code of HTTP/2; `TLS`: a handshake failed; `NO_ALPN`",
    "failure": "`FailureKind` of the contract, as `CRASH`",
    "generation": "of Python's garbage collector, 0 to 2",
    "how": "`joined`: the request was here; `taken`: from another frontend",
    "implementation, major, minor, patchlevel, version": "of Python",
    "limit": "which limit: docs/decisions/edge.md",
    "liveness": "`alive`, `suspect` or `dead`",
    "model_name": "the model that the engine serves",
    "outcome": "`adopted` or `refused`",
    "phase": "`prefill` or `decode`",
    "rank": "data-parallel rank of the engine, from 0",
    "reason": "`OK` or a reason of docs/ERRORS.md",
    "result": "`good` or `bad`",
    "state": "`SegmentState` of the contract, as `SEALED`",
    "threshold": "a name in the table of docs/decisions/thresholds.md",
    "way": "continuation class, as `NATIVE`: docs/CONTINUATION.md",
}

UNITS = (
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
    ("_fds", "descriptors"),
    ("_draining", "0 or 1"),
    ("_engine_up", "0 or 1"),
    ("_perc", "0 to 1"),
    ("_info", "always 1"),
    ("_kv_blocks_accounted", "KV blocks"),
    ("_kv_blocks_used", "KV blocks"),
    ("_kv_blocks_cached", "KV blocks"),
    ("_kv_blocks", "KV blocks"),
    ("_tokens", "tokens"),
    ("_tokens_received", "tokens"),
    ("_tokens_delivered", "tokens"),
    ("_tokens_waiting", "tokens"),
    ("_tokens_outstanding", "tokens"),
    ("_tokens_queued", "tokens"),
)
"""By how a name ends, `_total` aside; all others count what they name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str:
        name = self.name.removesuffix("_total")
        return next((unit for end, unit in UNITS if name.endswith(end)), "count")


def rows_of(registry: CollectorRegistry) -> dict[str, Row]:
    """By name, as they are read."""
    declared: dict[str, tuple[str, ...]] = {}
    private: Any = registry
    for collector in list(private._collector_to_names):
        if isinstance(collector, MetricWrapperBase):
            metric: Any = collector
            declared[metric._name] = tuple(metric._labelnames)
    rows: dict[str, Row] = {}
    for family in registry.collect():
        labels = declared.get(family.name)
        if labels is None:
            labels = tuple(sorted({label for sample in family.samples for label in sample.labels}))
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows[name] = Row(name, family.type, labels, family.documentation)
    return rows


def frontend() -> dict[str, Row]:
    """Of one process of a frontend."""
    registry = CollectorRegistry()
    FrontendMetrics(registry)
    return rows_of(registry)


def parent() -> dict[str, Row]:
    """What a frontend of several processes has beside the sums."""
    registry = CollectorRegistry()
    ParentMetrics(registry)
    return rows_of(registry)


def sidecar() -> dict[str, Row]:
    """Of a sidecar whose engine is up."""
    desk = Desk()
    desk.hub.load = worker_pb2.LoadReport(ranks=[worker_pb2.RankLoad(kv_blocks_total=1)])
    registry = CollectorRegistry()
    HubCollector(desk.hub, Canary(), registry)
    return rows_of(registry)


def memory_service() -> dict[str, Row]:
    """Of a memory service."""
    registry = CollectorRegistry()
    holdings = Holdings(Policy(Limits(0, 0)), 1)
    HoldingsCollector(holdings, registry, num_fds=lambda: 0)
    return rows_of(registry)


def every() -> dict[str, Row]:
    """Of every process that serves metrics."""
    return rows_of(metrics.new_registry())


FRONTEND = """\
## Frontend

With `--processes` above 1 the parent serves the metrics of all. Counters and histograms are summed,
those of processes that have ended included; the last column says what becomes of a gauge.
"""

SIDECAR = """\
## Sidecar

What has a `rank` is what the engine reported last, and absent while it is down.
"""

FOR_ROUTERS = """\
### For other routers

The same under the names that vLLM has for it, for which the Gateway API Inference Extension and
other routers look: of all ranks together, and absent while the engine is down or stalled, since
what it said last would draw requests to it.
"""

LOAD_REPORTS = """\
## Load reports

Routers that speak gRPC are told by ORCA (`xds.data.orca.v3.OrcaLoadReport`): in the trailer
`endpoint-load-metrics-bin` of every call that a sidecar or a frontend answers, refusals
included (of a frontend unless it has `--no-load-trailers`), and out of band by a sidecar, from
`xds.service.orca.v3.OpenRcaService/StreamCoreMetrics`, every 0.1 s at most. gRPC's own
`weighted_round_robin` needs nothing else.

Of a sidecar:

- `application_utilization`: the higher of the shares of KV blocks and of the batch in use;
  above 1 if streams wait, and at least 1 while the engine takes no work.
- `utilization`: these shares, as `kv_cache` and `batch`, up to 1.
- `rps_fractional`, `eps`: attempts a second, and those that failed by this worker's fault.
- `named_metrics`: `num_requests_running`, `num_requests_waiting`, `kv_cache_usage_perc`,
  `kv_blocks`, `kv_blocks_free`, `prefill_tokens_queued`, `engine_up`; of the engine only while
  it is up.

Of a frontend, or of one of its processes:

- `cpu_utilization`: the share of one core that it uses, over a second or longer.
- `application_utilization`: that, or the share of `--requests-running-max` if it is higher.
- `utilization`: the latter, as `requests`.
- `rps_fractional`, `eps`: requests that ended or were refused, a second, and those of them that
  another frontend might have served.
- `named_metrics`: `requests_running`, `choices_waiting`.

Rates are averages in which an event of 10 s ago counts for a third of a new one.
"""

WORKER = """\
## Worker

An engine of ours serves no metrics: what it counts is in the load reports to its sidecar, which
serves them.
"""

MEMORY_SERVICE = """\
## Memory service
"""

EVERY = """\
## Every process

Of a frontend of several processes, memory, descriptors and CPU seconds are sums.
"""


def page() -> str:
    """The whole page."""
    told = sidecar()
    used = {
        label
        for part in (frontend(), parent(), told, memory_service(), every())
        for label in _labels(part)
    }
    return "\n".join(
        (
            HEAD,
            FRONTEND,
            _table(frontend(), is_whole=True),
            "Only with `--processes` above 1:\n",
            _table(parent()),
            SIDECAR,
            _table({name: row for name, row in told.items() if ":" not in name}),
            FOR_ROUTERS,
            _table({name: row for name, row in told.items() if ":" in name}),
            LOAD_REPORTS,
            WORKER,
            MEMORY_SERVICE,
            _table(memory_service()),
            EVERY,
            _table(every()),
            "## Labels\n",
            "| label | values |",
            "|---|---|",
            *(
                f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {values} |"
                for names, values in LABELS.items()
                if set(names.split(", ")) <= used
            ),
            "",
        )
    )


def _labels(rows: Mapping[str, Row]) -> Iterable[str]:
    return (label for row in rows.values() for label in row.labels)


def _table(rows: Mapping[str, Row], *, is_whole: bool = False) -> str:
    head = ["name", "type", "labels", "unit", "meaning", *(["processes"] if is_whole else [])]
    lines = ["|".join(["", *(f" {one} " for one in head), ""]), "|---" * len(head) + "|"]
    for name, row in sorted(rows.items()):
        labels = ", ".join(f"`{label}`" for label in row.labels)
        cells = [f"`{name}`", row.kind, labels, row.unit, row.meaning]
        if is_whole:
            cells.append(_whole(row))
        lines.append("|".join(["", *(f" {one} " if one else " " for one in cells), ""]))
    return "\n".join([*lines, ""])


def _whole(row: Row) -> str:
    return "sum" if row.kind != "gauge" or row.name in PARTS else "highest"
