"""Load reports as other makers' clients read them: gRPC's own weighted round robin."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc.aio
import pytest
import uvloop

from tests.support.trailers import answer, load_in
from unbroken import transport
from unbroken.errors import Reason, UnbrokenError
from unbroken.orca import (
    INTERVAL_MAX_S,
    INTERVAL_MIN_S,
    INTERVAL_S,
    LoadReporter,
    OpenRca,
    interval_of,
)
from unbroken.status import from_rpc_error
from unbroken.third_party import orca_pb2 as pb
from unbroken.third_party import orca_pb2_grpc
from unbroken.third_party.orca_load_report_pb2 import OrcaLoadReport

TIME_LIMIT_S = 20.0


class Endpoint:
    """A server that answers any `Echo`, and whose load a test says."""

    def __init__(self, utilization: float, *, streams_max: int = 10, has_trailers: bool = True):
        self.num_calls = 0
        self.report = OrcaLoadReport(application_utilization=utilization, rps_fractional=100.0)
        self.address = ""
        reporter = LoadReporter(lambda _: self.report)
        self.open_rca = OpenRca(reporter, streams_max=streams_max)
        self.server = transport.make_server(trailers=reporter.trailers if has_trailers else tuple)
        orca_pb2_grpc.add_OpenRcaServiceServicer_to_server(self.open_rca, self.server)
        made: Any = grpc.unary_unary_rpc_method_handler  # For handlers of `grpc`, says its stub.
        handlers: Any = {"Echo": made(self._echo)}
        handler = grpc.method_handlers_generic_handler("test.Test", handlers)
        self.server.add_generic_rpc_handlers((handler,))

    async def _echo(self, message: bytes, _: object) -> bytes:
        self.num_calls += 1
        if message == b"fail":
            raise UnbrokenError(Reason.OVERLOADED, "full", retry_after_s=1.0)
        if message == b"bug":
            raise ValueError("a bug")
        return message


@asynccontextmanager
async def serving(*endpoints: Endpoint) -> AsyncGenerator[None]:
    try:
        for endpoint in endpoints:
            endpoint.address = transport.listen(endpoint.server, "127.0.0.1:0")
            await endpoint.server.start()
        yield
    finally:
        for endpoint in endpoints:
            await endpoint.server.stop(0)


def run(scenario: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIME_LIMIT_S):
            await scenario

    uvloop.run(limited())


def echo(channel: grpc.aio.Channel, message: bytes = b"") -> Any:
    return cast("Any", channel).unary_unary("/test.Test/Echo")(message, timeout=5)


def weighted(*endpoints: Endpoint, is_out_of_band: bool) -> grpc.aio.Channel:
    """A channel of gRPC's own to all of them, which weighs them by what they say."""
    policy = {
        "blackoutPeriod": "0s",
        "weightUpdatePeriod": "0.1s",
        "oobReportingPeriod": "0.1s",
        "enableOobLoadReport": is_out_of_band,
    }
    config = {"loadBalancingConfig": [{"weighted_round_robin": policy}]}
    addresses = ",".join(endpoint.address for endpoint in endpoints)
    options = [("grpc.service_config", json.dumps(config)), ("grpc.enable_http_proxy", 0)]
    return grpc.aio.insecure_channel(f"ipv4:{addresses}", options=options)


@pytest.mark.parametrize("is_out_of_band", [False, True])
def test_grpcs_own_client_sends_more_to_who_reports_less_load(is_out_of_band: bool) -> None:
    async def scenario() -> None:
        busy = Endpoint(0.9, has_trailers=not is_out_of_band)
        idle = Endpoint(0.1, has_trailers=not is_out_of_band)
        async with (
            serving(busy, idle),
            weighted(busy, idle, is_out_of_band=is_out_of_band) as channel,
        ):
            # Until the client has weights: then one gets nine times as many as the other.
            while True:
                before = busy.num_calls, idle.num_calls
                for _ in range(100):
                    await echo(channel)
                if idle.num_calls - before[1] >= 80:
                    break
            assert busy.num_calls > before[0], "it gets fewer, not none"

    run(scenario())


def test_calls_that_fail_say_the_load_too() -> None:
    async def scenario() -> None:
        endpoint = Endpoint(0.5)
        async with serving(endpoint), transport.open_channel(endpoint.address) as channel:
            for message in (b"", b"fail", b"bug"):
                fields = await answer(endpoint.address, "/test.Test/Echo", message)
                assert load_in(fields) == endpoint.report, message
                assert (fields[b"grpc-status"] == b"0") == (message == b"")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await echo(channel, b"fail")
            error = from_rpc_error(raised.value)
            assert (error.reason, error.retry_after_s) == (Reason.OVERLOADED, 1.0)

    run(scenario())


def test_reports_out_of_band_follow_the_load_and_leave_nothing_behind() -> None:
    async def scenario() -> None:
        endpoint = Endpoint(0.25, streams_max=1)
        async with serving(endpoint), transport.open_channel(endpoint.address) as channel:
            stub = orca_pb2_grpc.OpenRcaServiceStub(channel)
            request = pb.OrcaLoadReportRequest()
            request.report_interval.FromMilliseconds(1)
            call = stub.StreamCoreMetrics(request)
            reports = aiter(call)
            assert (await anext(reports)).application_utilization == 0.25
            endpoint.report.application_utilization = 0.75
            assert (await anext(reports)).application_utilization == 0.75
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in stub.StreamCoreMetrics(request):
                    pass
            assert from_rpc_error(raised.value).reason is Reason.OVERLOADED
            assert endpoint.open_rca.num_streams == 1
            call.cancel()
            while endpoint.open_rca.num_streams:  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.002)

    run(scenario())


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"),
    [
        (2, 500_000_000, 2.5),
        (0, 1, INTERVAL_MIN_S),
        (-(2**63), -1, INTERVAL_MIN_S),
        (2**63 - 1, 999_999_999, INTERVAL_MAX_S),
    ],
)
def test_an_interval_is_as_it_is_wished_within_bounds(
    seconds: int, nanos: int, expected: float
) -> None:
    request = pb.OrcaLoadReportRequest()
    assert interval_of(request) == INTERVAL_S
    request.report_interval.seconds = seconds
    request.report_interval.nanos = nanos
    assert interval_of(request) == expected


def test_calls_that_end_together_share_a_report() -> None:
    now = 10.0
    made: list[float] = []

    def make(at: float) -> OrcaLoadReport:
        made.append(at)
        return OrcaLoadReport(rps_fractional=at)

    reporter = LoadReporter(make, clock=lambda: now)
    first = reporter.encoded()
    now += 0.01
    assert reporter.encoded() == first
    now += 0.1
    assert OrcaLoadReport.FromString(reporter.encoded()).rps_fractional == now
    assert made == [10.0, now]
