"""docs/METRICS.md names what the processes export; tests/integration compares it with real ones.

Write it anew with: python -m tests.unbroken.test_metrics_page
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support import metrics_page
from tests.support.metrics_page import LABELS, Row
from worker.config import WorkerConfig

PAGE = Path(__file__).parents[2] / "docs" / "METRICS.md"
PROCESSES = (
    metrics_page.frontend,
    metrics_page.parent,
    metrics_page.sidecar,
    metrics_page.memory_service,
    metrics_page.every,
)

Rows = Callable[[], Mapping[str, Row]]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == metrics_page.page(), (
        "run: python -m tests.unbroken.test_metrics_page"
    )


@pytest.mark.parametrize("rows", PROCESSES)
def test_every_metric_has_a_meaning_and_every_label_its_values(rows: Rows) -> None:
    explained = {label for labels in LABELS for label in labels.split(", ")}
    for row in rows().values():
        assert row.meaning
        assert set(row.labels) <= explained, row


@pytest.mark.parametrize("rows", PROCESSES[:4])
def test_names_keep_prometheus_conventions(rows: Rows) -> None:
    for name, row in rows().items():
        assert name.startswith(
            ("unbroken_frontend_", "unbroken_sidecar_", "unbroken_memory_", "vllm:")
        ), name
        assert name.endswith("_total") == (row.kind == "counter"), name
        assert not name.endswith(("_ms", "_us", "_millis", "_count", "_sum", "_bucket")), name
        assert row.kind != "histogram" or row.unit == "seconds", name


def test_a_worker_has_no_metrics_of_its_own() -> None:
    assert "metrics_listen" not in WorkerConfig.model_fields


if __name__ == "__main__":
    PAGE.write_text(metrics_page.page())
