"""Metrics of several processes as those of one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from frontend.metrics import FrontendMetrics, ParentMetrics
from frontend.processes.siblings import families_of
from frontend.processes.sums import PARTS, VIEWS, Sums, from_json, to_json
from unbroken import metrics


class Process:
    """A life of a process that counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counter = Counter("unbroken_x_total", "X.", ["reason"], registry=self.registry)
        self.histogram = Histogram("unbroken_h", "H.", buckets=(1, 2), registry=self.registry)
        self.part = Gauge("unbroken_frontend_requests_running", "R.", registry=self.registry)
        self.view = Gauge("unbroken_frontend_workers", "W.", registry=self.registry)

    def report_to(self, sums: Sums, life: int) -> None:
        """As between processes: through JSON."""
        sums.report(life, from_json(json.loads(json.dumps(to_json(families_of(self.registry))))))


def value(sums: Sums, sample: str, **labels: str) -> float | None:
    key = sample, tuple(sorted(labels.items()))
    found = [family.samples[key] for family in sums.families() if key in family.samples]
    assert len(found) <= 1
    return found[0] if found else None


def test_counters_and_histograms_are_added_up_by_label() -> None:
    sums, one, two = Sums(), Process(), Process()
    one.counter.labels("a").inc(2)
    two.counter.labels("a").inc(3)
    two.counter.labels("b").inc(5)
    one.histogram.observe(0.5)
    two.histogram.observe(1.5)
    one.report_to(sums, 1)
    two.report_to(sums, 2)
    assert value(sums, "unbroken_x_total", reason="a") == 5
    assert value(sums, "unbroken_x_total", reason="b") == 5
    assert value(sums, "unbroken_h_bucket", le="1.0") == 1
    assert value(sums, "unbroken_h_bucket", le="+Inf") == 2
    assert value(sums, "unbroken_h_sum") == 2.0
    assert value(sums, "unbroken_h_count") == 2


def test_gauges_that_are_parts_are_added_up_and_of_views_the_highest_counts() -> None:
    sums, one, two = Sums(), Process(), Process()
    for process, number in ((one, 3), (two, 4)):
        process.part.set(number)
        process.view.set(number)
    one.report_to(sums, 1)
    two.report_to(sums, 2)
    assert value(sums, "unbroken_frontend_requests_running") == 7
    assert value(sums, "unbroken_frontend_workers") == 4


def test_what_a_dead_process_counted_stays_and_what_it_held_does_not() -> None:
    sums, one = Sums(), Process()
    one.counter.labels("a").inc(2)
    one.part.set(3)
    one.report_to(sums, 1)
    sums.ended(1)
    sums.ended(1)
    assert value(sums, "unbroken_x_total", reason="a") == 2
    assert value(sums, "unbroken_frontend_requests_running") is None
    again = Process()
    again.counter.labels("a").inc(1)
    again.report_to(sums, 2)
    assert value(sums, "unbroken_x_total", reason="a") == 3


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["count", "report", "die"]))))
def test_a_counter_never_falls(steps: list[tuple[int, str]]) -> None:
    sums, lives, last = Sums(), [0, 1, 2], 0.0
    processes = [Process(), Process(), Process()]
    for index, step in steps:
        if step == "count":
            processes[index].counter.labels("a").inc()
        elif step == "report":
            processes[index].report_to(sums, lives[index])
        else:
            sums.ended(lives[index])
            lives[index] += 3
            processes[index] = Process()
        now = value(sums, "unbroken_x_total", reason="a") or 0.0
        assert now >= last
        last = now


def test_every_gauge_is_a_part_or_a_view() -> None:
    registry = metrics.new_registry()
    FrontendMetrics(registry)
    ParentMetrics(registry)
    gauges = {metric.name for metric in registry.collect() if metric.type == "gauge"}
    assert gauges == PARTS | VIEWS
    assert not PARTS & VIEWS


@pytest.mark.parametrize("life", [1, 2])
def test_metrics_of_another_kind_under_the_same_name_are_not_added(life: int) -> None:
    sums, one = Sums(), Process()
    one.counter.labels("a").inc(2)
    one.report_to(sums, 3 - life)
    registry = CollectorRegistry()
    Gauge("unbroken_x", "X.", registry=registry).set(7)
    sums.report(life, families_of(registry))
    assert len([family for family in sums.families() if family.name == "unbroken_x"]) == 1
