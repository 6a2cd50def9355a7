"""An engine's load in a few figures, and how they are told to routers of other makes. No I/O."""

from dataclasses import dataclass

from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport
from unbroken.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """All ranks together, as the engine reported it last."""

    model: str
    num_running: int
    """Streams in the batch."""
    num_waiting: int
    """Streams that wait for a place in it."""
    prefill_tokens_queued: int
    kv_blocks: int
    kv_blocks_used: int
    """By streams; blocks of reusable prefixes are free."""
    block_size: int
    batch_size_max: int
    """0 if the engine does not say."""

    @classmethod
    def of(
        cls, load: worker_pb2.LoadReport, description: worker_pb2.EngineDescription
    ) -> "EngineLoad":
        """What a report comes to."""
        ranks = load.ranks
        return cls(
            model=description.model,
            num_running=sum(rank.requests_running for rank in ranks),
            num_waiting=sum(rank.requests_waiting for rank in ranks),
            prefill_tokens_queued=sum(rank.prefill_tokens_queued for rank in ranks),
            kv_blocks=sum(rank.kv_blocks_total for rank in ranks),
            kv_blocks_used=sum(rank.kv_blocks_used for rank in ranks),
            block_size=description.block_size,
            batch_size_max=description.batch_size_max,
        )

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that streams hold, 0 to 1."""
        return min(1.0, self.kv_blocks_used / self.kv_blocks) if self.kv_blocks else 0.0

    @property
    def batch_usage(self) -> float:
        """Streams as a share of what one batch takes; above 1 when some have to wait."""
        num_streams = self.num_running + self.num_waiting
        return num_streams / self.batch_size_max if self.batch_size_max else 0.0


def orca_report(
    load: EngineLoad | None, *, takes_work: bool, rps: float, eps: float
) -> OrcaLoadReport:
    """What routers are told. An engine that takes no work is full, whatever it says of itself."""
    report = OrcaLoadReport(rps_fractional=rps, eps=eps)
    report.named_metrics["engine_up"] = float(takes_work)
    if load is not None:
        report.application_utilization = max(load.kv_usage, load.batch_usage)
        report.utilization["kv_cache"] = load.kv_usage
        report.utilization["batch"] = min(1.0, load.batch_usage)
        named = report.named_metrics
        named["num_requests_running"] = load.num_running
        named["num_requests_waiting"] = load.num_waiting
        named["kv_cache_usage_perc"] = load.kv_usage
        named["kv_blocks"] = load.kv_blocks
        named["kv_blocks_free"] = load.kv_blocks - load.kv_blocks_used
        named["prefill_tokens_queued"] = load.prefill_tokens_queued
    if not takes_work:
        report.application_utilization = max(1.0, report.application_utilization)
    return report
