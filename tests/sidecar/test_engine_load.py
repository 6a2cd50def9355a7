"""What routers of other makes are told of an engine."""

import asyncio
import os
import signal
import urllib.request
from operator import itemgetter
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from sidecar.canary import Canary
from sidecar.engine_load import EngineLoad, orca_report
from sidecar.metrics import HubCollector
from tests.sidecar.fakes import Desk, engine_up
from tests.sidecar.worlds import World, connected, run, running
from tests.support.trailers import answer, load_in
from unbroken.third_party import orca_pb2, orca_pb2_grpc
from unbroken.v1 import attempt_pb2, worker_pb2

CHECK = "/grpc.health.v1.Health/Check"
DESCRIPTION = worker_pb2.EngineDescription(model="m", block_size=16, batch_size_max=8)
LOAD = worker_pb2.LoadReport(
    ranks=[
        worker_pb2.RankLoad(
            kv_blocks_total=100, kv_blocks_used=50, requests_running=3, prefill_tokens_queued=7
        ),
        worker_pb2.RankLoad(
            rank=1,
            kv_blocks_total=100,
            kv_blocks_used=70,
            kv_blocks_cached=30,
            requests_running=4,
            requests_waiting=5,
        ),
    ]
)


def test_a_load_is_that_of_all_ranks_together() -> None:
    load = EngineLoad.of(LOAD, DESCRIPTION)
    assert load.kv_usage == pytest.approx(0.6)
    assert load.batch_usage == pytest.approx(12 / 8)
    report = orca_report(load, takes_work=True, rps=2.0, eps=0.5)
    assert report.application_utilization == pytest.approx(1.5)
    assert report.rps_fractional == 2.0
    assert report.eps == 0.5
    assert dict(report.utilization) == {"kv_cache": pytest.approx(0.6), "batch": 1.0}
    assert dict(report.named_metrics) == {
        "engine_up": 1,
        "num_requests_running": 7,
        "num_requests_waiting": 5,
        "kv_cache_usage_perc": pytest.approx(0.6),
        "kv_blocks": 200,
        "kv_blocks_free": 80,
        "prefill_tokens_queued": 7,
    }


def test_an_engine_that_takes_no_work_is_full_however_idle_it_was() -> None:
    idle = EngineLoad.of(worker_pb2.LoadReport(), worker_pb2.EngineDescription())
    assert orca_report(idle, takes_work=True, rps=0, eps=0).application_utilization == 0
    for load in (idle, None):
        report = orca_report(load, takes_work=False, rps=0, eps=0)
        assert report.application_utilization == 1
        assert report.named_metrics["engine_up"] == 0


def scraped(desk: Desk) -> dict[str, float]:
    registry = CollectorRegistry()
    HubCollector(desk.hub, Canary(), registry)
    return {
        family.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if family.name.startswith("vllm:")
    }


def test_what_a_dead_or_stalled_engine_said_last_is_not_told() -> None:
    desk = Desk(is_up=False)
    desk.hub.on_up(engine_up(frame_interval_s=0.2))
    assert scraped(desk) == {}, "it has said nothing yet"
    desk.hub.on_frame(attempt_pb2.StepFrame(load=LOAD))
    assert scraped(desk)["vllm:num_requests_waiting"] == 5
    desk.watch(2.0)
    assert desk.hub.watchdog.is_stalled
    assert scraped(desk) == {}
    desk.hub.on_frame(attempt_pb2.StepFrame(load=LOAD))
    assert scraped(desk)["vllm:num_requests_waiting"] == 5
    desk.down()
    assert scraped(desk) == {}


async def scrape(world: World) -> dict[str, tuple[dict[str, str], float]]:
    """Labels and value of what is there under vLLM's names."""
    url = f"http://{world.record.metrics_address}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read().decode()

    text = await asyncio.to_thread(fetch)
    return {
        sample.name: (dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }


def test_a_sidecar_tells_its_load_in_a_trailer_out_of_band_and_as_a_model_server(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        options = "--engine-options=--step-base-ms 5 --batch-size-max 2 --kv-blocks 10000"
        async with running(tmp_path, "--metrics-listen=127.0.0.1:0", options) as world:
            record = await world.member(lambda record: record.engine_pgid)
            request = orca_pb2.OrcaLoadReportRequest()
            request.report_interval.FromMilliseconds(100)
            call = orca_pb2_grpc.OpenRcaServiceStub(world.channel).StreamCoreMetrics(request)
            reports = aiter(call)
            async with connected(world) as client:
                slots = await client.start(5)
                await client.until(lambda: len(client.tokens) == 2)
                # An engine tells its load every 100 ms: it may have while they still came.
                report = await anext(reports)
                running_and_waiting = itemgetter("num_requests_running", "num_requests_waiting")
                while running_and_waiting(report.named_metrics) != (2, 3):
                    report = await anext(reports)
                assert report.application_utilization == 2.5
                assert report.utilization["batch"] == 1
                assert 0 < report.utilization["kv_cache"] <= 1
                assert report.rps_fractional > 0.3
                assert report.eps == 0

                fields = await answer(record.address, CHECK, b"")
                assert load_in(fields).named_metrics["num_requests_waiting"] == 3

                told = await scrape(world)
                model = {"model_name": "simulated"}
                assert told["vllm:num_requests_running"] == (model, 2)
                assert told["vllm:num_requests_waiting"] == (model, 3)
                labels, usage = told["vllm:kv_cache_usage_perc"]
                assert labels == model
                assert 0 < usage <= 1
                config = {"block_size": "16", "num_gpu_blocks": "10000"}
                assert told["vllm:cache_config_info"] == (config, 1)

                os.kill(record.engine_pgid, signal.SIGKILL)
                while report.named_metrics["engine_up"]:
                    report = await anext(reports)
                assert report.application_utilization == 1, "full, not idle"
                assert report.eps > 0
                await client.until(lambda: len(client.ended) == len(slots))
            call.cancel()

    run(scenario)
