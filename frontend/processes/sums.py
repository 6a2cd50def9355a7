"""Makes the metrics of several processes those of one: what has been counted is never lost again.

Counters and histograms are added up, those of processes that have ended included, so that they
never fall. Of gauges some are parts of a whole and are added up; the others are views that each
process has of the same thing, and the highest counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

PARTS: Final = frozenset(
    {
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "unbroken_frontend_choices_paused",
        "unbroken_frontend_choices_waiting",
        "unbroken_frontend_edge_connections",
        "unbroken_frontend_links_up",
        "unbroken_frontend_queue_prefill_tokens",
        "unbroken_frontend_queue_promises",
        "unbroken_frontend_queue_requests",
        "unbroken_frontend_requests_running",
        "unbroken_frontend_resume_prefill_tokens_outstanding",
        "unbroken_frontend_resume_prefill_tokens_waiting",
        "unbroken_frontend_resumes_waiting",
    }
)
"""Gauges that are added up."""

VIEWS: Final = frozenset(
    {
        "process_max_fds",
        "process_start_time_seconds",
        "python_info",
        "unbroken_frontend_fleet_losses",
        "unbroken_frontend_models_panicking",
        "unbroken_frontend_processes",
        "unbroken_frontend_queue_elsewhere_tokens",
        "unbroken_frontend_workers",
        "unbroken_frontend_workers_busy",
        "unbroken_frontend_workers_ejected",
    }
)
"""Gauges of which the highest counts; so does that of any that is named nowhere."""

_ADDED: Final = frozenset({"counter", "histogram"})

SampleKey = tuple[str, tuple[tuple[str, str], ...]]
"""Name and sorted labels."""


@dataclass(slots=True)
class Family:
    """What a metric with all its labels stands at."""

    name: str
    documentation: str
    kind: str
    """counter, histogram, gauge …"""
    samples: dict[SampleKey, float] = field(default_factory=dict[SampleKey, float])

    def add(self, other: "Family", *, is_sum: bool) -> None:
        """Take in what another process says of the same metric."""
        for key, value in other.samples.items():
            before = self.samples.get(key)
            if before is None:
                self.samples[key] = value
            else:
                self.samples[key] = before + value if is_sum else max(before, value)


class Sums:
    """The metrics of the whole, from what its processes report. A life is a process, by its id."""

    def __init__(self) -> None:
        self._ended: dict[str, Family] = {}
        """What processes that are gone have counted."""
        self._latest: dict[int, Sequence[Family]] = {}

    def report(self, life: int, families: Sequence[Family]) -> None:
        """What a life has counted so far."""
        self._latest[life] = families

    def ended(self, life: int) -> None:
        """The life is over; what it reported last remains counted."""
        for family in self._latest.pop(life, ()):
            if family.kind in _ADDED:
                _into(self._ended, family)

    def families(self) -> Sequence[Family]:
        """The whole, by name."""
        whole: dict[str, Family] = {}
        for family in self._ended.values():
            _into(whole, family)
        for life in sorted(self._latest):
            for family in self._latest[life]:
                _into(whole, family)
        return [whole[name] for name in sorted(whole)]


def _into(whole: dict[str, Family], family: Family) -> None:
    known = whole.get(family.name)
    if known is None:
        known = whole[family.name] = Family(family.name, family.documentation, family.kind)
    if known.kind == family.kind:  # Else they are of two versions, and cannot be added.
        known.add(family, is_sum=family.kind in _ADDED or family.name in PARTS)


def to_json(families: Iterable[Family]) -> list[Any]:
    """For another process."""
    return [
        [
            one.name,
            one.documentation,
            one.kind,
            [[*key, value] for key, value in one.samples.items()],
        ]
        for one in families
    ]


def from_json(encoded: Iterable[Any]) -> list[Family]:
    """What `to_json` made."""
    return [
        Family(
            name,
            documentation,
            kind,
            {
                (sample, tuple((label, text) for label, text in labels)): value
                for sample, labels, value in samples
            },
        )
        for name, documentation, kind, samples in encoded
    ]
