"""Claims of the metrics endpoint."""

import urllib.error
import urllib.request

import pytest
from prometheus_client import Histogram

from unbroken import metrics


def test_a_registry_is_served_and_its_port_is_free_afterwards() -> None:
    registry = metrics.new_registry()
    seconds = Histogram(
        "unbroken_test_ttft_seconds",
        "Time to first token.",
        buckets=metrics.SECONDS_BUCKETS,
        registry=registry,
    )
    seconds.observe(0.003)
    server = metrics.serve(registry)
    assert server.address == f"127.0.0.1:{server.port}"
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5) as response:
        text = response.read().decode()
    assert 'unbroken_test_ttft_seconds_bucket{le="0.005"} 1.0' in text
    assert 'unbroken_test_ttft_seconds_bucket{le="0.002"} 0.0' in text
    assert "process_resident_memory_bytes" in text
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5)
    again = metrics.serve(registry, port=server.port)
    assert again.port == server.port
    again.close()


def test_a_taken_port_is_an_error() -> None:
    server = metrics.serve(metrics.new_registry())
    with pytest.raises(OSError, match="in use"):
        metrics.serve(metrics.new_registry(), port=server.port)
    server.close()


def test_two_registries_in_one_process_do_not_meet() -> None:
    for _ in range(2):
        Histogram("unbroken_test_seconds", "The same name.", registry=metrics.new_registry())
