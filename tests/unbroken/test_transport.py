"""Claims of the transport presets, on real connections, with processes that are really stopped."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest
import uvloop
from typing_extensions import override

from tests.unbroken.fake_frontend import Context, FakeFrontend, serving_frontend, started
from tests.unbroken.servers import serving
from unbroken import transport
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as inference_grpc

BRISK = transport.Keepalive(interval_s=0.1, timeout_s=0.3)
"""The presets' shape in a tenth of the time and less."""


class Quiet(FakeFrontend):
    """Says one thing, then nothing; knows when its client is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.client_is_gone = asyncio.Event()

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        try:
            await asyncio.Event().wait()
        finally:
            self.client_is_gone.set()


def add_to(servicer: FakeFrontend) -> Callable[[grpc.aio.Server], None]:
    return lambda server: inference_grpc.add_InferenceServiceServicer_to_server(servicer, server)


async def listening_on(
    address: str, keepalive: transport.Keepalive
) -> tuple[grpc.aio.Channel, "asyncio.Task[str]"]:
    """A quiet stream's channel, and how the stream will end."""
    channel = transport.open_channel(address, keepalive=keepalive)
    call = inference_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
    await call.read()

    async def end() -> str:
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"

    return channel, asyncio.create_task(end())


def test_a_client_that_pings_without_data_is_not_sent_away() -> None:
    async def scenario() -> None:
        # A server with gRPC's defaults tells how long it takes to lose patience.
        impatient = grpc.aio.server()
        add_to(Quiet())(impatient)
        port = impatient.add_insecure_port("127.0.0.1:0")
        await impatient.start()
        async with serving(add_to(Quiet())) as address:
            channel, end = await listening_on(address, BRISK)
            other_channel, other_end = await listening_on(f"127.0.0.1:{port}", BRISK)
            started_at = time.monotonic()
            async with asyncio.timeout(20):
                assert "Too many pings" in await other_end
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(end), (time.monotonic() - started_at) / 2)
            await channel.close()
            await other_channel.close()
            await asyncio.gather(end, return_exceptions=True)
        await impatient.stop(0)

    uvloop.run(scenario())


_SERVER = """
import asyncio
from tests.unbroken.servers import serving
from tests.unbroken.test_transport import Quiet, add_to

async def main():
    async with serving(add_to(Quiet())) as address:
        print(address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

_CLIENT = """
import asyncio, sys
from tests.unbroken.test_transport import BRISK, listening_on

async def main():
    channel, end = await listening_on(sys.argv[1], BRISK)
    print("listening", flush=True)
    await end

asyncio.run(main())
"""


@contextmanager
def process(code: str, *arguments: str) -> Generator[tuple[int, str], None, None]:
    """Another process that runs `code`; its pid and the first line it prints."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield running.pid, running.stdout.readline().strip()
        finally:
            running.kill()


def test_a_stopped_server_is_noticed_though_its_kernel_answers() -> None:
    with process(_SERVER) as (pid, address):

        async def scenario() -> None:
            channel, end = await listening_on(address, BRISK)
            os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(5):
                assert (await end).startswith("UNAVAILABLE")
            await channel.close()

        uvloop.run(scenario())


def test_a_killed_server_is_noticed_at_once() -> None:
    with process(_SERVER) as (pid, address):

        async def scenario() -> None:
            channel, end = await listening_on(address, transport.MESH_KEEPALIVE)
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(1):
                assert (await end).startswith("UNAVAILABLE")
            await channel.close()

        uvloop.run(scenario())


def test_a_stopped_client_does_not_keep_its_handler_running() -> None:
    async def scenario() -> None:
        quiet = Quiet()
        async with serving(add_to(quiet), keepalive=BRISK) as address:
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _CLIENT, address), stdout=asyncio.subprocess.PIPE
            )
            try:
                assert client.stdout is not None
                assert await client.stdout.readline() == b"listening\n"
                client.send_signal(signal.SIGSTOP)
                async with asyncio.timeout(5):
                    await quiet.client_is_gone.wait()
            finally:
                client.kill()
                await client.wait()

    uvloop.run(scenario())


@pytest.mark.parametrize(("size", "code"), [(900_000, "OK"), (1_100_000, "RESOURCE_EXHAUSTED")])
def test_the_largest_message_is_what_was_asked_for(size: int, code: str) -> None:
    async def scenario() -> str:
        async with (
            serving(add_to(FakeFrontend()), receive_bytes_max=1_000_000) as address,
            transport.open_channel(address) as channel,
        ):
            stub = inference_grpc.InferenceServiceStub(channel)
            try:
                await stub.Cancel(pb.CancelRequest(request_id="x" * size))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    assert uvloop.run(scenario()) == code


def test_a_long_prompt_fits_by_default() -> None:
    async def scenario() -> None:
        async with (
            serving_frontend(FakeFrontend()) as address,
            transport.open_channel(address) as channel,
        ):
            stub = inference_grpc.InferenceServiceStub(channel)
            await stub.Cancel(pb.CancelRequest(request_id="x" * 15_000_000))

    uvloop.run(scenario())


def test_a_taken_address_is_an_error() -> None:
    async def scenario() -> None:
        async with serving(add_to(FakeFrontend())) as address:
            with pytest.raises(OSError, match=address):
                transport.listen(transport.make_server(), address)

    uvloop.run(scenario())


def test_an_http_proxy_in_the_environment_is_not_for_mesh_links(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")

    async def scenario() -> None:
        async with (
            serving_frontend(FakeFrontend()) as address,
            transport.open_channel(address) as channel,
        ):
            await inference_grpc.InferenceServiceStub(channel).Cancel(pb.CancelRequest())

    uvloop.run(scenario())
