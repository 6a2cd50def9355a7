"""vLLM's page of metrics, as far as it tells of load: what it says of each rank. No I/O.

Every sample names its data-parallel rank in the label `engine`. A server may have some of all ranks
only, so they are counted here from 0, in their order, as it counts those that it is asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from sidecar.engines.adapter import CallFailed, LoadOfRank
from unbroken.outcome import FailureKind

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_USAGE: Final = "vllm:kv_cache_usage_perc"
_CONFIG: Final = "vllm:cache_config_info"
_NAMES: Final = frozenset({_RUNNING, _WAITING, _USAGE, _CONFIG})


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One data-parallel rank."""

    load: LoadOfRank
    block_size: int
    kv_blocks: int
    """That can be used: of those that vLLM counts, one is nobody's."""


def ranks_of(page: str) -> Sequence[RankMetrics]:
    """All ranks of a server, in order; none if the page tells of none. Raises `CallFailed`."""
    values: dict[int, dict[str, float]] = {}
    configs: dict[int, Mapping[str, str]] = {}
    lines = [line for line in page.splitlines() if line.startswith(tuple(_NAMES))]
    try:
        families = list(text_string_to_metric_families("\n".join(lines) + "\n"))
    except ValueError as error:
        raise CallFailed(FailureKind.PROTOCOL, f"its metrics: {error}") from error
    for sample in (one for family in families for one in family.samples):
        rank = _digits(sample.labels.get("engine"))
        if sample.name == _CONFIG:
            configs[rank] = sample.labels
        elif sample.name in _NAMES:
            value = sample.value if math.isfinite(sample.value) else 0.0
            values.setdefault(rank, {})[sample.name] = value
    return [
        RankMetrics(
            LoadOfRank(
                position,
                round(told.get(_RUNNING, 0.0)),
                round(told.get(_WAITING, 0.0)),
                told.get(_USAGE, 0.0),
            ),
            _digits(configs.get(number, {}).get("block_size")),
            max(0, _digits(configs.get(number, {}).get("num_gpu_blocks")) - 1),
        )
        for position, (number, told) in enumerate(sorted(values.items()))
    ]


def _digits(value: str | None) -> int:
    """A number that is written as a text; 0 if it is something else."""
    return int(value) if value is not None and value.isdecimal() else 0
