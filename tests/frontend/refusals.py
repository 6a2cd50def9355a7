"""What a request that is refused for want of room is told on the wire."""

from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2  # pyright: ignore[reportMissingTypeStubs]
from google.rpc import status_pb2 as rpc_status_pb2  # pyright: ignore[reportMissingTypeStubs]

from tests.frontend.worlds import World
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub


@dataclass(frozen=True, slots=True)
class Refused:
    """What the status says; that its parts agree was seen."""

    message: str
    quota: error_details_pb2.QuotaFailure
    retry_ms: int


async def refused(it: World, request: pb.GenerateRequest) -> Refused:
    """Ask, and be told that there is no room, and when to come back."""
    stub = InferenceServiceStub(await it.client.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(caught.value.trailing_metadata() or ())
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = rpc_status_pb2.Status.FromString(details)
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert sum(one.Unpack(quota) for one in status.details) == 1
    assert sum(one.Unpack(retry) for one in status.details) == 1
    retry_ms = retry.retry_delay.ToMilliseconds()
    assert retry_ms > 0
    assert trailers["grpc-retry-pushback-ms"] == str(retry_ms)
    return Refused(status.message, quota, retry_ms)
