"""The frontend as a process: health, metrics, discovery, stopping."""

import asyncio
import json
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import failure_of, read, read_some, run, world
from unbroken.client import Client
from unbroken.discovery import FRONTENDS, WORKERS, connect
from unbroken.errors import Reason
from unbroken.resumption import ResumePolicy

PROMPT = list(b"once upon a time")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    """What grpc.health.v1 says about it."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def test_health_tells_of_the_process_its_services_and_each_model() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            channel = await it.client.channel()
            for service in ("", "readiness", "liveness", f"model/{MODEL}"):
                assert await health_of(channel, service) == SERVING
            for service in ("unbroken.v1.InferenceService", "unbroken.v1.AdminService"):
                assert await health_of(channel, service) == SERVING
            await it.sidecars[0].die()
            await it.until_ready(0)
            assert await health_of(channel, f"model/{MODEL}") == NOT_SERVING
            assert await health_of(channel, "readiness") == SERVING

    run(scenario())


def test_grpcio_tells_connections_to_go_away_after_a_while_and_streams_finish() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.01), edge="grpcio") as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=400, temperature=0)
            ids = [i for piece in await read_some(stream, 1) for i in piece.token_ids]
            stopping = asyncio.create_task(it.frontend.stop(15.0))
            await it.until(lambda: it.frontend.is_draining)
            error = await failure_of(it.another_client().generate(token_ids=PROMPT))
            assert error.reason is Reason.DRAINING, "at first it says why"
            async with asyncio.timeout(10):
                while error.reason is not Reason.UNREACHABLE:
                    await asyncio.sleep(0.05)
                    error = await failure_of(it.another_client().generate(token_ids=PROMPT))
            assert it.num_running() == 1
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 400)
            await stopping

    run(scenario())


def test_a_frontend_that_stops_finishes_what_runs_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005)) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=40, temperature=0)
            ids = [i for piece in await read_some(stream, 1) for i in piece.token_ids]
            stopping = asyncio.create_task(it.frontend.stop(10.0))
            channel = await it.client.channel()
            await it.until(lambda: it.frontend.is_draining)
            assert await health_of(channel, "readiness") == NOT_SERVING
            assert await health_of(channel, "liveness") == SERVING
            error = await failure_of(it.client.generate(token_ids=PROMPT))
            assert error.reason is Reason.DRAINING
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 40)
            await stopping

    run(scenario())


def test_a_stream_that_outlives_the_grace_is_told_why_it_ends_here() -> None:
    async def scenario() -> None:
        once = ResumePolicy(resumes_max=0)
        async with (
            world(FakeSidecar("w1", step_s=0.005)) as it,
            Client(it.frontend.address, resume_policy=once) as client,
        ):
            stream = client.generate(token_ids=PROMPT, max_tokens=3000)
            await read_some(stream, 1)
            stopping = asyncio.create_task(it.frontend.stop(0.05))
            error = await failure_of(stream)
            assert error.reason is Reason.DRAINING
            assert stream.finished is None, "it may go on elsewhere"
            await stopping
            assert not it.sidecars[0].aborts, "who resumes it elsewhere adopts the attempt"

    run(scenario())


def test_a_frontend_says_in_discovery_where_it_is() -> None:
    async def scenario() -> None:
        async with world() as it:
            (record,) = it.discovery.registered
            assert record.frontend_id == "f0"
            assert record.address == it.frontend.address
            assert record.incarnation == 1

    run(scenario())


async def start_process(directory: Path, *flags: str) -> asyncio.subprocess.Process:
    """`python -m frontend` on this discovery."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontend", "--frontend-id", "f1"),
        *("--discovery", str(directory), "--listen", "127.0.0.1:0", *flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )


async def record_of(directory: Path, process: asyncio.subprocess.Process) -> Any:
    """What the process published, once it did."""
    async for members in connect(directory).watch(FRONTENDS):
        assert process.returncode is None
        if "f1" in members:
            return members["f1"]
    raise AssertionError("a watch never ends")


async def end(process: asyncio.subprocess.Process) -> None:
    """Whatever happened, it is dead afterwards."""
    if process.returncode is None:
        process.kill()
    await process.communicate()


def test_a_process_serves_counts_and_exits_with_zero_when_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        await sidecar.begin()
        registration = await connect(tmp_path).register(WORKERS, sidecar.record)
        process = await start_process(tmp_path, "--metrics-listen", "127.0.0.1:0")
        try:
            record = await record_of(tmp_path, process)
            assert record.pid == process.pid
            async with Client(record.address) as client:
                stream = client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
                reading = asyncio.create_task(read(stream))
                assert (await reading)[0] == reference(PROMPT, 5)
            url = f"http://{record.metrics_address}/metrics"
            page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
            assert 'unbroken_frontend_requests_finished_total{reason="OK"} 1.0' in page
            assert "unbroken_frontend_tokens_delivered_total 5.0" in page
            assert "unbroken_frontend_links_up 1.0" in page
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                _, log = await process.communicate()
            assert process.returncode == 0
            levels = [json.loads(line)["level"] for line in log.splitlines()]
            assert levels.count("info") == len(levels) > 3, log.decode()
            assert "f1" not in await connect(tmp_path).snapshot(FRONTENDS)
        finally:
            await end(process)
            await registration.close()
            await sidecar.die()

    run(scenario())


def test_a_process_whose_address_is_taken_exits_with_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world() as it:
            process = await start_process(tmp_path, "--listen", it.frontend.address)
            try:
                async with asyncio.timeout(10):
                    _, errors = await process.communicate()
                assert process.returncode == 1
                assert "cannot start" in errors.decode()
            finally:
                await end(process)

    run(scenario())
