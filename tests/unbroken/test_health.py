"""Claims of grpc.health.v1 and reflection, as any client sees them."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.unbroken.fake_frontend import FakeFrontend
from tests.unbroken.servers import serving
from unbroken.health import HealthServicer, add_health
from unbroken.transport import open_channel
from unbroken.v1 import inference_service_pb2_grpc as inference_grpc

SERVICE = "unbroken.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Adding:
    """Adds health to a server, and keeps it."""

    health: HealthServicer

    def __call__(self, server: grpc.aio.Server) -> None:
        inference_grpc.add_InferenceServiceServicer_to_server(FakeFrontend(), server)
        self.health = add_health(server, [SERVICE])


def stub_of(channel: grpc.aio.Channel) -> Any:
    return cast("Any", health_pb2_grpc.HealthStub(channel))


def asking(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_check_and_list_tell_the_status_of_now() -> None:
    async def scenario() -> None:
        adding = Adding()
        async with serving(adding) as address, open_channel(address) as channel:
            stub = stub_of(channel)
            assert (await stub.Check(asking())).status == NOT_SERVING
            adding.health.set(SERVICE, is_serving=True)
            assert (await stub.Check(asking(SERVICE))).status == SERVING
            assert (await stub.Check(asking())).status == NOT_SERVING
            listed = await stub.List(cast("Any", health_pb2).HealthListRequest())
            assert {name: response.status for name, response in listed.statuses.items()} == {
                "": NOT_SERVING,
                SERVICE: SERVING,
            }
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Check(asking("other"))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND

    uvloop.run(scenario())


def test_watch_tells_every_lasting_change() -> None:
    async def scenario() -> None:
        adding = Adding()
        async with serving(adding) as address, open_channel(address) as channel:
            watch = stub_of(channel).Watch(asking(SERVICE))
            assert (await watch.read()).status == NOT_SERVING
            adding.health.set_all(is_serving=True)
            assert (await watch.read()).status == SERVING
            adding.health.set_all(is_serving=True)  # No change: nothing to tell.
            adding.health.set_all(is_serving=False)
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()

    uvloop.run(scenario())


def test_a_service_can_be_watched_before_it_exists() -> None:
    async def scenario() -> None:
        adding = Adding()
        async with serving(adding) as address, open_channel(address) as channel:
            watch = stub_of(channel).Watch(asking("later"))
            assert (await watch.read()).status == SERVICE_UNKNOWN
            adding.health.set("later", is_serving=True)
            assert (await watch.read()).status == SERVING
            watch.cancel()

    uvloop.run(scenario())


def test_grpcurl_finds_everything_by_reflection() -> None:
    async def scenario() -> None:
        adding = Adding()
        async with serving(adding) as address:
            adding.health.set_all(is_serving=True)

            async def grpcurl(*arguments: str) -> str:
                process = await asyncio.create_subprocess_exec(
                    *(str(Path(sys.executable).parent / "grpcurl"), "-plaintext", address),
                    *arguments,
                    stdout=asyncio.subprocess.PIPE,
                )
                out, _ = await asyncio.wait_for(process.communicate(), 20)
                assert process.returncode == 0
                return out.decode()

            assert (await grpcurl("list")).split() == [
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
                SERVICE,
            ]
            assert "rpc Generate (" in await grpcurl("describe", SERVICE)
            status = json.loads(await grpcurl("grpc.health.v1.Health/Check"))
            assert status == {"status": "SERVING"}

    uvloop.run(scenario())
