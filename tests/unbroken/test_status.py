"""Claims of `unbroken.status`: errors cross a real gRPC connection and stay what they are."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from google.rpc import error_details_pb2  # pyright: ignore[reportMissingTypeStubs]
from google.rpc import status_pb2 as rpc_status_pb2  # pyright: ignore[reportMissingTypeStubs]
from typing_extensions import override

from tests.unbroken.servers import serving
from unbroken import status
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.transport import open_channel
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as inference
from unbroken.v1 import relay_service_pb2 as relay_pb
from unbroken.v1 import relay_service_pb2_grpc as relay

Context = grpc.aio.ServicerContext[Any, Any]

ERRORS_PAGE = Path(__file__).parents[2] / "docs" / "ERRORS.md"


def test_every_reason_has_a_code() -> None:
    assert set(status.CODES) == set(Reason)


def test_every_reason_is_either_migratable_or_not() -> None:
    assert set(Reason) == status.MIGRATABLE | status.NOT_MIGRATABLE
    assert not status.MIGRATABLE & status.NOT_MIGRATABLE


def test_every_reason_is_documented_with_its_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| [^|]+ \| [^|]+ \|$", ERRORS_PAGE.read_text(), re.M
    )
    assert dict(rows) == {reason.value: code.name for reason, code in status.CODES.items()}
    assert len(rows) == len(Reason)


class Failing(inference.InferenceServiceServicer):
    """Fails in every kind of handler with the error it was given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        raise self.error

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(offset=0, token_ids=[7])
        raise self.error


class FailingRelay(relay.RelayServiceServicer):
    """Fails in handlers of streams of requests."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @override
    async def Relay(  # type: ignore[override]  # A coroutine that writes is allowed as well.
        self, request_iterator: AsyncIterator[relay_pb.RelayRequest], context: Context
    ) -> None:
        async for _ in request_iterator:
            await context.write(relay_pb.RelayResponse())
            raise self.error


async def failure_of(
    error: Exception, call: Callable[[grpc.aio.Channel], Awaitable[object]]
) -> grpc.aio.AioRpcError:
    """How `call` fails against servers whose handlers raise `error`."""
    failing = Failing(error)  # pyright: ignore[reportAbstractUsage]
    failing_relay = FailingRelay(error)  # pyright: ignore[reportAbstractUsage]
    async with (
        serving(
            lambda server: inference.add_InferenceServiceServicer_to_server(failing, server),
            lambda server: relay.add_RelayServiceServicer_to_server(failing_relay, server),
        ) as address,
        open_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(channel)
        return raised.value


async def unary(channel: grpc.aio.Channel) -> None:
    await inference.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())


async def stream(channel: grpc.aio.Channel) -> None:
    seen = 0
    try:
        async for _ in inference.InferenceServiceStub(channel).Generate(pb.GenerateRequest()):
            seen += 1
    finally:
        assert seen == 1


async def duplex(channel: grpc.aio.Channel) -> None:
    call = relay.RelayServiceStub(channel).Relay()
    await call.write(relay_pb.RelayRequest())
    assert await call.read() == relay_pb.RelayResponse()
    await call.read()


CALLS = pytest.mark.parametrize("call", [unary, stream, duplex])


@CALLS
@pytest.mark.parametrize("reason", Reason)
def test_an_error_arrives_as_it_was_raised(
    reason: Reason, call: Callable[[grpc.aio.Channel], Awaitable[object]]
) -> None:
    sent = UnbrokenError(reason, "what Ω was seen", metadata={"key": "välue"})
    failure = uvloop.run(failure_of(sent, call))
    got = status.from_rpc_error(failure)
    assert failure.code() is status.CODES[reason]
    assert failure.details() == sent.detail
    assert (got.reason, got.detail, got.metadata, got.retry_after_s) == (
        reason,
        sent.detail,
        sent.metadata,
        None,
    )


@CALLS
def test_a_bug_shows_the_caller_an_id_and_nothing_else(
    call: Callable[[grpc.aio.Channel], Awaitable[object]], caplog: pytest.LogCaptureFixture
) -> None:
    failure = uvloop.run(failure_of(KeyError("the password"), call))
    got = status.from_rpc_error(failure)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "password" not in str(failure)
    assert "password" not in repr(failure.trailing_metadata())
    assert got.reason is Reason.INTERNAL
    assert got.metadata["error_id"] in caplog.text
    assert "the password" in caplog.text


def test_an_error_in_a_task_group_keeps_its_reason() -> None:
    group = ExceptionGroup("tasks", [UnbrokenError(Reason.DRAINING, "bye")])
    got = status.from_rpc_error(uvloop.run(failure_of(group, unary)))
    assert got.reason is Reason.DRAINING
    mixed = ExceptionGroup("tasks", [UnbrokenError(Reason.DRAINING, "bye"), ValueError()])
    got = status.from_rpc_error(uvloop.run(failure_of(mixed, unary)))
    assert got.reason is Reason.INTERNAL


def test_a_method_nobody_wrote_is_not_implemented() -> None:
    async def cancel(channel: grpc.aio.Channel) -> None:
        await inference.InferenceServiceStub(channel).Cancel(pb.CancelRequest())

    got = status.from_rpc_error(uvloop.run(failure_of(ValueError(), cancel)))
    assert got.reason is Reason.NOT_IMPLEMENTED


def test_the_pushback_of_grpc_equals_the_retry_info() -> None:
    sent = UnbrokenError(Reason.OVERLOADED, "full", retry_after_s=1.2345)
    failure = uvloop.run(failure_of(sent, unary))
    trailers = dict(failure.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == "1235"
    assert status.from_rpc_error(failure).retry_after_s == 1.235


def test_a_wrong_field_is_a_bad_request() -> None:
    sent = InvalidField("params.sampling.top_p", "above 0, up to 1", 7)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.to_status(sent).details)
    (violation,) = bad.field_violations
    assert violation.field == "params.sampling.top_p"
    assert violation.description == "params.sampling.top_p: expected above 0, up to 1, got 7"


def test_busy_workers_are_a_failure_of_each_quota_that_is_named() -> None:
    told = {"model": "m", "thresholds": "a,b", "a": "a is 2, above 1", "b": "b is 4, above 3"}
    sent = UnbrokenError(Reason.OVERLOADED, "busy", metadata=told, retry_after_s=1.0)
    quota = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(quota) for detail in status.to_status(sent).details)
    shown = [(one.subject, one.quota_id, one.description) for one in quota.violations]
    assert shown == [("model:m", "a", "a is 2, above 1"), ("model:m", "b", "b is 4, above 3")]
    assert status.from_rpc_error(uvloop.run(failure_of(sent, unary))).metadata == told
    other = UnbrokenError(Reason.OVERLOADED, "full")
    assert not any(detail.Unpack(quota) for detail in status.to_status(other).details)


def test_the_longest_error_still_arrives() -> None:
    sent = InvalidField("f" * 100_000, "é" * 100_000, "x")
    got = status.from_rpc_error(uvloop.run(failure_of(sent, stream)))
    assert got.reason is Reason.INVALID_FIELD
    assert got.detail.endswith("…")


def bare(
    code: grpc.StatusCode, details: bytes | None = None, text: str = "text"
) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata(
        *([("grpc-status-details-bin", details)] if details is not None else [])
    )
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, text)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"])
def test_a_status_without_details_gets_a_reason(code: grpc.StatusCode) -> None:
    error = status.from_rpc_error(bare(code))
    assert error.detail == "text"
    assert error.metadata == {"grpc_code": code.name}
    unspecific = {"UNKNOWN", "INTERNAL", "PERMISSION_DENIED", "UNAUTHENTICATED"}
    assert (error.reason is Reason.INTERNAL) == (code.name in unspecific)


def test_details_of_others_or_garbage_are_not_trusted() -> None:
    foreign = rpc_status_pb2.Status(code=14, message="m")
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="FENCED", domain="envoy"))
    torn = rpc_status_pb2.Status(code=14, message="m")
    torn.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    for details in (foreign.SerializeToString(), torn.SerializeToString(), b"\xff\xff", b""):
        error = status.from_rpc_error(bare(grpc.StatusCode.UNAVAILABLE, details))
        assert error.reason is Reason.UNREACHABLE


def test_a_reason_of_a_newer_peer_falls_back_to_its_code() -> None:
    newer = rpc_status_pb2.Status(code=14, message="m")
    newer.details.add().Pack(error_details_pb2.ErrorInfo(reason="METEOR", domain="unbroken"))
    error = status.from_rpc_error(bare(grpc.StatusCode.UNAVAILABLE, newer.SerializeToString()))
    assert error.reason is Reason.UNREACHABLE
    assert error.metadata["reason"] == "METEOR"


def test_a_handler_is_closed_when_its_client_leaves() -> None:
    closed = asyncio.Event()

    class Endless(inference.InferenceServiceServicer):
        @override
        async def Generate(
            self, request: pb.GenerateRequest, context: Context
        ) -> AsyncIterator[pb.GenerateResponse]:
            try:
                while True:
                    yield pb.GenerateResponse()
                    await asyncio.sleep(0.001)
            finally:
                closed.set()

    async def scenario() -> None:
        endless = Endless()  # pyright: ignore[reportAbstractUsage]
        async with (
            serving(
                lambda server: inference.add_InferenceServiceServicer_to_server(endless, server)
            ) as address,
            open_channel(address) as channel,
        ):
            call = inference.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
            await call.read()
            call.cancel()
            async with asyncio.timeout(5):
                await closed.wait()

    uvloop.run(scenario())
