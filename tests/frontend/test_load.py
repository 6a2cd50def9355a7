"""What clients are told of a frontend's load, whichever edge their calls came through."""

import pytest
from prometheus_client import CollectorRegistry

from frontend.load import FrontendLoad
from frontend.metrics import FrontendMetrics
from tests.frontend.fakes import FakeSidecar
from tests.frontend.worlds import run, world
from tests.support.trailers import answer, load_in
from unbroken.errors import Reason
from unbroken.orca import TRAILER
from unbroken.v1 import inference_service_pb2 as pb

REQUEST = pb.GenerateRequest(token_ids=pb.TokenIds(ids=b"once upon a time"))
REQUEST.params.stopping.max_tokens = 3
UNKNOWN = pb.GenerateRequest(model="unknown", token_ids=pb.TokenIds(ids=b"once"))


@pytest.mark.parametrize("edge", ["grpcio", "native"])
def test_every_call_ends_with_the_load(edge: str) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), edge=edge, requests_running_max=10) as it:
            address = it.frontend.address
            for method, message, status in (
                ("Generate", REQUEST, b"0"),
                ("ListModels", pb.ListModelsRequest(), b"0"),
                ("Generate", UNKNOWN, b"5"),
                ("Generate", pb.GenerateRequest(), b"3"),
                ("Cancel", pb.CancelRequest(), b"3"),
            ):
                path = f"/unbroken.v1.InferenceService/{method}"
                fields = await answer(address, path, message.SerializeToString())
                assert fields[b"grpc-status"] == status
                told = load_in(fields)
                assert set(told.named_metrics) == {"requests_running", "choices_waiting"}
                assert told.eps == 0, "no other frontend could have done better"
                assert (b"grpc-status-details-bin" in fields) == (status != b"0")

    run(scenario())


@pytest.mark.parametrize("edge", ["grpcio", "native"])
def test_clients_are_told_nothing_if_it_is_switched_off(edge: str) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), edge=edge, load_trailers=False) as it:
            path = "/unbroken.v1.InferenceService/Generate"
            fields = await answer(it.frontend.address, path, REQUEST.SerializeToString())
            assert fields[b"grpc-status"] == b"0"
            assert TRAILER.encode() not in fields

    run(scenario())


def test_a_frontend_is_as_loaded_as_its_scarcest_part() -> None:
    now, cpu_s, num_running = 0.0, 0.0, 20
    counted = FrontendMetrics(CollectorRegistry())
    load = FrontendLoad(
        counted,
        num_running=lambda: num_running,
        running_max=100,
        num_waiting=lambda: 3,
        clock=lambda: now,
        cpu_clock=lambda: cpu_s,
    )
    now, cpu_s = 2.0, 1.0
    report = load.report(now)
    assert report.cpu_utilization == 0.5
    assert report.application_utilization == 0.5
    assert report.utilization["requests"] == 0.2
    assert dict(report.named_metrics) == {"requests_running": 20, "choices_waiting": 3}
    now, cpu_s, num_running = 2.5, 1.5, 90
    report = load.report(now)
    assert report.cpu_utilization == 0.5, "half a second is too short to judge by"
    assert report.application_utilization == 0.9
    now = 4.0
    assert load.report(now).cpu_utilization == 0.25


def test_rates_tell_ends_from_faults() -> None:
    counted = FrontendMetrics(CollectorRegistry())
    load = FrontendLoad(counted, num_running=lambda: 0, running_max=1, num_waiting=lambda: 0)
    counted.request_finished(None, 5.0)
    counted.request_refused(Reason.MODEL_NOT_FOUND, 5.0)
    assert load.report(5.0).rps_fractional == pytest.approx(0.2)
    assert load.report(5.0).eps == 0
    counted.request_refused(Reason.OVERLOADED, 5.0)
    counted.request_finished(Reason.WORKER_LOST, 5.0)
    assert load.report(5.0).rps_fractional == pytest.approx(0.4)
    assert load.report(5.0).eps == pytest.approx(0.2)
