"""A sidecar as a process, with the simulated engine: how it starts, fails, stops."""

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from typing_extensions import override

from sidecar.engines.base import EngineDown
from sidecar.engines.kinds import launch_of
from sidecar.service import RELAY_SERVICE, SIDECAR_SERVICE
from tests.frontend.edge.peer import REQUEST
from tests.frontend.edge.raw import connect
from tests.sidecar.fakes import Frontend, engine_up
from tests.sidecar.processes import until
from tests.sidecar.worlds import config_of, connected, run, running, scripted
from unbroken.discovery import WORKERS, Discovery, Kind, Registration, Setting
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import FailureKind
from unbroken.recurring import EARLY
from unbroken.transport import open_channel
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1.relay_service_pb2_grpc import RelayServiceStub

CHECK = [
    (name, b"/grpc.health.v1.Health/Check" if name == b":path" else value)
    for name, value in REQUEST
]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    """What List says."""
    messages = cast("Any", health_pb2)
    list_ = channel.unary_unary(
        "/grpc.health.v1.Health/List",
        request_serializer=messages.HealthListRequest.SerializeToString,
        response_deserializer=messages.HealthListResponse.FromString,
    )
    response = await cast("Any", list_)(messages.HealthListRequest())
    return {name: status.status for name, status in response.statuses.items()}


def test_a_sidecar_registers_and_says_how_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            record = await world.member(lambda record: record.engine_pgid)
            assert record.sidecar_pid == world.process.pid
            assert record.model == "simulated"
            assert record.identity.incarnation > 1_700_000_000_000_000
            assert os.getpgid(record.engine_pgid) == record.engine_pgid
            health = cast("Any", health_pb2_grpc.HealthStub(world.channel))
            names = ["", RELAY_SERVICE, SIDECAR_SERVICE]
            names += ["startup", "liveness", "readiness", "model/simulated"]
            assert await statuses(world.channel) == dict.fromkeys(names, SERVING)
            for name in names:
                response = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert response.status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest(service="nonsense"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

            stub = cast("Any", reflection_pb2_grpc).ServerReflectionStub(world.channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            services = (await call.read()).list_services_response.service
            assert {service.name for service in services} >= {
                RELAY_SERVICE,
                SIDECAR_SERVICE,
                "grpc.health.v1.Health",
            }
            call.cancel()

            stub = RelayServiceStub(world.channel)
            tokenizer = await stub.GetTokenizer(pb.GetTokenizerRequest())
            assert tokenizer.tokenizer.vocab_size > 0

    run(scenario)


def test_the_death_of_the_engine_ends_every_stream_exactly_and_it_comes_back(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, "--engine-options=--step-base-ms 2") as world:
            record = await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                slots = await client.start(20)
                await client.until(lambda: all(len(client.tokens.get(s, [])) > 5 for s in slots))
                watch = cast("Any", health_pb2_grpc.HealthStub(world.channel)).Watch(
                    health_pb2.HealthCheckRequest(service="readiness")
                )
                assert (await watch.read()).status == SERVING
                began = asyncio.get_running_loop().time()
                os.kill(record.engine_pgid, signal.SIGKILL)
                await client.until(lambda: len(client.ended) == 20)  # Exactly: Reader checks it.
                assert asyncio.get_running_loop().time() - began < 1.0
                assert {e.failure for e in client.ended.values()} == {worker_pb2.FAILURE_KIND_CRASH}
                assert (await watch.read()).status == NOT_SERVING
                await client.until(
                    lambda: (
                        client.verdicts
                        and client.verdicts[-1].state == worker_pb2.ENGINE_STATE_SERVING
                    )
                )
                assert (await watch.read()).status == SERVING
                watch.cancel()
                states = [verdict.state for verdict in client.verdicts[-3:]]
                assert states == [
                    worker_pb2.ENGINE_STATE_DEAD,
                    worker_pb2.ENGINE_STATE_STARTING,
                    worker_pb2.ENGINE_STATE_SERVING,
                ]
                assert client.verdicts[-1].engine_incarnation == 2
                assert "SIGKILL" in client.verdicts[-3].detail
                (slot,) = await client.start(1)
                await client.until(lambda: len(client.tokens.get(slot, [])) > 5)
            again = await world.member(lambda now: now.engine_pgid not in (0, record.engine_pgid))
            assert again.identity == record.identity

    run(scenario)


def test_sigterm_hands_every_stream_over_exactly(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, "--engine-options=--step-base-ms 2") as world:
            await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                slots = await client.start(20)
                await client.until(lambda: all(len(client.tokens.get(s, [])) > 5 for s in slots))
                world.process.terminate()
                await client.until(lambda: len(client.ended) == 20)
                assert {e.failure for e in client.ended.values()} == {worker_pb2.FAILURE_KIND_DRAIN}
                assert any(verdict.is_draining for verdict in client.verdicts)
            assert await world.exit_status() == 0
            assert await world.discovery.snapshot(WORKERS) == {}

    run(scenario)


def test_no_engine_outlives_a_sidecar_that_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            record = await world.member(lambda record: record.engine_pgid)
            world.process.kill()
            await world.exit_status()
            await until(lambda: not Path(f"/proc/{record.engine_pgid}").exists())
            assert await world.discovery.snapshot(WORKERS) == {}

    run(scenario)


def test_an_engine_that_is_given_up_ends_the_sidecar_with_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, engine="--engine-socket=nowhere") as world:
            await asyncio.sleep(0)
            world.process.terminate()
            assert await world.exit_status() == 0, "while it waits for its engine"
        flags = ["--engine-command=/bin/false", "--log-level=error"]
        async with running(tmp_path, *flags, engine="--engine-socket=nowhere") as world:
            assert await world.exit_status() == 1

    run(scenario)


def test_a_port_that_is_taken_ends_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path / "1") as world:
            record = await world.member(lambda record: record.engine_pgid)
            second = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sidecar", "--worker-id=w2", f"--discovery={tmp_path}/2"),
                *("--engine=simulated", "--listen", record.address),
                stderr=asyncio.subprocess.PIPE,
            )
            _, told = await second.communicate()
            assert second.returncode == 1
            assert b"sidecar cannot start" in told
            assert b"address already in use" in told.lower()

    run(scenario)


def test_a_client_that_does_not_close_holds_nobody_up_for_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        for num_signals in (1, 2):
            async with running(tmp_path / str(num_signals)) as world:
                record = await world.member(lambda record: record.engine_pgid)
                async with connect(record.address) as client:
                    client.request(1, CHECK)  # It never comes to an end.
                    await client.frame()
                    for _ in range(num_signals):
                        world.process.terminate()
                    await world.exit_status()

    run(scenario)


def test_methods_that_nobody_serves_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world:
            record = await world.member(lambda record: record.engine_pgid)
            async with open_channel(record.address) as channel:
                untyped = cast("Any", channel)
                method = untyped.unary_unary("/unbroken.v1.RelayService/Nothing")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await method(b"")
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    run(scenario)


def test_metrics_have_the_names_that_are_documented(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, "--metrics-listen=127.0.0.1:0") as world:
            record = await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                (slot,) = await client.start(1)
                await client.until(lambda: len(client.tokens.get(slot, [])) > 20)
                url = f"http://{record.metrics_address}/metrics"

                def fetch() -> str:
                    with urllib.request.urlopen(url, timeout=5) as response:
                        return response.read().decode()

                samples = dict(
                    line.rsplit(" ", 1)
                    for line in (await asyncio.to_thread(fetch)).splitlines()
                    if line.startswith("unbroken_sidecar_")
                )
                for name in ("links", "attempts_running", "engine_up"):
                    assert float(samples[f"unbroken_sidecar_{name}"]) == 1, name
                assert float(samples["unbroken_sidecar_tokens_total"]) > 20
                for name in ("engine_failures", "attempts_drained", "attempts_handed_over"):
                    assert float(samples[f"unbroken_sidecar_{name}_total"]) == 0, name
                assert float(samples["unbroken_sidecar_draining"]) == 0
                assert float(samples["unbroken_sidecar_edge_connections"]) == 1
                assert float(samples["unbroken_sidecar_kv_blocks_accounted"]) >= 2
                ranks = {name.split("{")[0] for name in samples if '{rank="0"}' in name}
                assert ranks == {
                    f"unbroken_sidecar_{name}"
                    for name in (
                        "kv_blocks",
                        "kv_blocks_used",
                        "kv_blocks_cached",
                        "requests_running",
                        "requests_waiting",
                        "prefill_tokens_queued",
                        "preemptions_total",
                    )
                }

    run(scenario)


# In this process, with an engine that does what it is told.


class UnwillingDiscovery(Discovery):
    """Registers, and fails on every change after that."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_updates = 0

    @override
    async def new_incarnation(self, kind: Kind[Any], instance_id: str) -> int:
        return 7

    @override
    async def register(self, kind: Kind[Any], record: Any) -> Registration[Any]:
        return self

    async def update(self, record: Any) -> None:  # noqa: ARG002 - A fake.
        self.num_updates += 1
        raise self.error

    async def close(self) -> None:
        pass

    @override
    async def snapshot(self, kind: Kind[Any]) -> Mapping[str, Any]:
        return {}

    @override
    def watch(self, kind: Kind[Any]) -> Any:
        raise NotImplementedError

    @override
    async def setting(self, setting: Setting[Any]) -> Any:
        raise NotImplementedError

    @override
    async def change(self, setting: Setting[Any], record: Any) -> None:
        raise NotImplementedError

    @override
    def watch_setting(self, setting: Setting[Any]) -> Any:
        raise NotImplementedError


def test_health_follows_the_engine_and_stays_down_in_a_drain(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            scripted(tmp_path) as (sidecar, _, engine),
            open_channel(sidecar.address) as channel,
        ):

            async def until_statuses(expected: dict[str, int]) -> None:
                async with asyncio.timeout(5):
                    while (seen := await statuses(channel)) != expected:
                        assert seen["liveness"] == SERVING
                        await asyncio.sleep(0.005)

            ours = ["", RELAY_SERVICE, "readiness"]
            always = dict.fromkeys(["liveness", SIDECAR_SERVICE], SERVING)
            await until_statuses(always | dict.fromkeys([*ours, "startup"], NOT_SERVING))
            always["startup"] = SERVING  # From the first model on, for ever.
            ours.append("model/m")
            engine.on_up(engine_up())
            await until_statuses(always | dict.fromkeys(ours, SERVING))
            engine.on_down(EngineDown(1, FailureKind.CRASH, "it died"))
            await until_statuses(always | dict.fromkeys(ours, NOT_SERVING))
            engine.on_up(engine_up(2))
            await until_statuses(always | dict.fromkeys(ours, SERVING))
            sidecar.hub.drain()
            await until_statuses(always | dict.fromkeys(ours, NOT_SERVING))

    run(scenario)


def test_a_sidecar_goes_on_without_discovery(tmp_path: Path) -> None:
    async def scenario() -> None:
        where = UnwillingDiscovery(OSError("no space left"))
        async with scripted(tmp_path, where) as (sidecar, _, engine):
            life = asyncio.create_task(sidecar.wait())
            engine.on_up(engine_up())
            await until(lambda: where.num_updates == 1)
            engine.on_down(EngineDown(1, FailureKind.CRASH, "it died"))
            await until(lambda: where.num_updates == 2)
            assert not life.done()
            life.cancel()

    run(scenario)


def test_a_sidecar_whose_id_another_took_does_not_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        where = UnwillingDiscovery(UnbrokenError(Reason.FENCED, "a newer incarnation"))
        async with scripted(tmp_path, where) as (sidecar, _, engine):
            engine.on_up(engine_up())
            with pytest.raises(UnbrokenError, match="a newer incarnation"):
                async with asyncio.timeout(5):
                    await sidecar.wait()

    run(scenario)


def test_a_sidecar_is_done_when_its_engine_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(tmp_path) as (sidecar, engine, _):
            life = asyncio.create_task(sidecar.wait())
            await engine.stop()
            async with asyncio.timeout(5):
                await life

    run(scenario)


# Configuration.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine_command": "true"},
        {"engine": "simulated", "engine_socket": "/s"},
        {"engine": "simulated", "engine_command": "true"},
        {"engine": "simulated", "engine_options": "--model 'unfinished"},
        {"engine_socket": "/s", "engine_command": "'unfinished"},
    ],
)
def test_an_engine_is_named_in_one_way(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="expected"):
        config_of(**settings)


def test_the_command_of_an_engine_is_made_from_the_settings() -> None:
    config = config_of(engine="llama", engine_options="--model 'a b'")
    launch = launch_of(config, Path("tmp"))
    assert launch.command == (
        *(sys.executable, "-m", "worker", "--engine", "llama"),
        *("--socket", "tmp/engine.sock", "--model", "a b"),
    )
    found = config_of(engine_socket="e.sock")
    assert launch_of(found, Path("tmp")).command is None
    assert launch_of(found, Path("tmp")).address == "e.sock"


def test_a_heartbeat_that_is_nearly_due_comes_with_a_frame(tmp_path: Path) -> None:
    async def scenario() -> None:
        now = 100.0
        async with scripted(
            tmp_path, clock=lambda: now, heartbeat_interval_s=8.0, link_silence_max_s=30.0
        ) as (sidecar, _, engine):
            engine.on_up(engine_up())
            frontend = Frontend(sidecar.hub, now)
            frontend.read()
            num_heartbeats = len(frontend.heartbeats)
            now += 8.0 * (1 - EARLY) - 0.1
            engine.on_frame(attempt_pb2.StepFrame())
            frontend.read()
            assert len(frontend.heartbeats) == num_heartbeats, "it is not due for long"
            now += 0.2
            engine.on_frame(attempt_pb2.StepFrame())
            frontend.read()
            assert len(frontend.heartbeats) == num_heartbeats + 1
            engine.on_frame(attempt_pb2.StepFrame())
            frontend.read()
            assert len(frontend.heartbeats) == num_heartbeats + 1, "once"

    run(scenario)


def test_looks_join_frames_and_judge_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        now = 100.0
        async with scripted(tmp_path, clock=lambda: now) as (sidecar, _, engine):
            judged: list[bool] = []

            def watch(*, judges: bool = True) -> bool:
                judged.append(judges)
                return judges  # Who may not judge sees reason to.

            monkeypatch.setattr(sidecar.hub, "watch", watch)
            engine.on_up(engine_up())
            now += 1.0
            judged.clear()
            engine.on_frame(attempt_pb2.StepFrame())
            assert judged == [False]
            await until(lambda: len(judged) > 1)
            assert judged[1]

    run(scenario)
