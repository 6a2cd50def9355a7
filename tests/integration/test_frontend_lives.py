"""A frontend of several processes as a whole: its port, signals, exit statuses, its own death."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frontend.config import FrontendConfig
from tests.frontend.edge.certificates import make_certificates, tls_settings
from tests.integration.test_frontend_processes import FLAGS, LONG, begun, client_of_each
from tests.integration.worlds import real_mesh
from tests.sidecar.processes import no_process_left, until
from unbroken.chaos import processes
from unbroken.client import Client
from unbroken.config import ConfigError, merge, split_address
from unbroken.discovery import FRONTENDS
from unbroken.errors import Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.tls import ClientTls


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


class Life:
    """A frontend of two processes, from its start on."""

    def __init__(self, directory: Path, *flags: str, name: str = "f1") -> None:
        directory.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "frontend", "--frontend-id", name]
        command += ["--discovery", str(directory), "--edge", "native", "--processes", "2", *flags]
        self.discovery = FileDiscovery(directory)
        self.log = directory / "log"
        self.address = ""
        self.modules = directory / "modules"
        environment = {**os.environ, "PYTHONPATH": str(self.modules)}
        self.modules.mkdir()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    async def addresses(self) -> dict[str, int]:
        """Process ids by name, when all serve."""
        async with asyncio.timeout(45):
            while len(found := await self.discovery.snapshot(FRONTENDS)) < 3:
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)
        self.address = found["f1"].address
        return {name: record.pid for name, record in found.items()}

    async def status(self, timeout_s: float = 30) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)


def test_its_port_is_refused_to_any_other_frontend_and_sigterm_ends_it_in_order(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        life = Life(tmp_path, "--shutdown-grace-s", "30")
        await life.addresses()
        for number in ("1", "2"):
            second = Life(
                tmp_path / number, "--listen", life.address, "--processes", number, name="f2"
            )
            assert await second.status(45) == 1
            told = second.log.read_text()
            assert "frontend cannot start" in told
            assert "address already in use" in told.lower()
        life.process.send_signal(signal.SIGTERM)
        assert await life.status() == 0
        assert await life.discovery.snapshot(FRONTENDS) == {}

    with no_process_left():
        asyncio.run(scenario())


@pytest.mark.parametrize("to", ["parent", "all", "parent twice"])
def test_running_streams_are_finished_or_with_a_second_signal_handed_over(
    tmp_path: Path, to: str
) -> None:
    is_twice = to == "parent twice"

    with real_mesh(
        tmp_path,
        num_workers=1,
        engine_options="--step-base-ms 10",
        frontend_flags=[*FLAGS, "--shutdown-grace-s", "20"],
    ) as world:

        async def scenario() -> None:
            async with client_of_each(world) as clients:
                options: dict[str, Any] = {
                    **LONG,
                    "max_tokens": 2000 if is_twice else 200,
                }
                streams = [client.generate(**options) for client in clients.values()]
                for stream in streams:
                    await begun(stream)
                parent = world.mesh.frontend_pid
                pids = [record.pid for record in world.mesh.frontends.values()]
                for pid in pids if to == "all" else [parent]:  # To all, as systemd does.
                    os.kill(pid, signal.SIGTERM)
                await until(lambda: "f1" not in world.mesh.frontends)  # It has taken the first.
                if is_twice:
                    os.kill(parent, signal.SIGTERM)
                ends = await asyncio.gather(
                    *(stream.text() for stream in streams), return_exceptions=True
                )
                name, status = await world.mesh.until_one_ends()
                assert (name, status) == ("f1", 4 if is_twice else 0)
                for end in ends:
                    if is_twice:
                        assert isinstance(end, UnbrokenError)
                        assert end.reason is Reason.DRAINING
                    else:
                        assert isinstance(end, str), end

        world.run(scenario(), limit_s=60)


def test_a_stream_that_is_passed_on_is_finished_as_well(tmp_path: Path) -> None:
    with real_mesh(
        tmp_path,
        num_workers=1,
        engine_options="--step-base-ms 10",
        frontend_flags=[*FLAGS, "--shutdown-grace-s", "20"],
    ) as world:

        async def scenario() -> None:
            async with client_of_each(world) as clients:
                options: dict[str, Any] = {**LONG, "max_tokens": 300}
                expected = await clients["f1.1"].generate(**options).text()
                first = clients["f1.1"].generate(request_id="passed on", **options)
                assert await begun(first) == "f1.1"
                stream = clients["f1.2"].generate(request_id="passed on", **options)
                piece = await anext(stream)
                assert stream.started is not None
                assert stream.started.frontend_id == "f1.1"
                os.kill(world.mesh.frontend_pid, signal.SIGTERM)
                assert piece.text + await stream.text() == expected
                assert await world.mesh.until_one_ends() == ("f1", 0)

        world.run(scenario(), limit_s=60)


def test_connections_over_tls_are_handed_over_and_those_that_fail_are_not_counted(
    certificates: Path, tmp_path: Path
) -> None:
    files = tls_settings(certificates)
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    tls = ClientTls(ca=certificates / "ca.pem")
    with real_mesh(
        tmp_path,
        num_workers=1,
        engine_options="--step-base-ms 10",
        frontend_flags=[*FLAGS, *flags],
        client_tls=tls,
    ) as world:

        async def scenario() -> None:
            address = world.mesh.frontend_address
            for _ in range(5):  # In the clear, which fails, one after the other.
                async with Client(address) as client:
                    with pytest.raises(UnbrokenError):
                        await client.list_models()
            host, port = split_address(address)
            for _ in range(5):  # An odd number for one process, without a word.
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
            clients = [Client(address, tls=tls) for _ in range(4)]
            try:
                names = [await begun(client.generate(**LONG)) for client in clients]
            finally:
                for client in clients:
                    await client.close()
            assert sorted(names) == ["f1.1", "f1.1", "f1.2", "f1.2"]

        world.run(scenario(), limit_s=60)


def test_a_killed_parent_leaves_nobody_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        life = Life(tmp_path)
        pids = await life.addresses()
        life.process.kill()
        assert await life.status() == -signal.SIGKILL
        await until(lambda: not any(map(processes.is_alive, pids.values())))

    with no_process_left():
        asyncio.run(scenario())


def test_a_process_that_cannot_start_ends_the_whole_with_status_1(tmp_path: Path) -> None:
    async def scenario() -> None:
        missing = tmp_path / "missing.pem"
        tls = ("--tls-certificate", str(missing), "--tls-key", str(missing))
        life = Life(tmp_path, *tls)
        assert await life.status(45) == 1
        assert "frontend cannot start" in life.log.read_text()

    with no_process_left():
        asyncio.run(scenario())


def test_when_all_processes_crash_in_a_loop_the_status_is_3(tmp_path: Path) -> None:
    async def scenario() -> None:
        life = Life(tmp_path)
        pids = await life.addresses()
        # Found first by who starts from now on, who so ends early: five lives have a minute.
        (life.modules / "uvloop.py").write_text("raise SystemExit(1)")
        for name in ("f1.1", "f1.2"):
            os.kill(pids[name], signal.SIGKILL)
        assert await life.status(90) == 3
        assert "crashes in a loop" in life.log.read_text()

    with no_process_left():
        asyncio.run(scenario())


def test_the_grpcio_edge_is_refused_by_name() -> None:
    flags = ["--frontend-id", "f", "--discovery", "d", "--processes", "2", "--edge", "grpcio"]
    with pytest.raises(ConfigError, match="expected edge native with processes above 1"):
        merge(FrontendConfig, flags, {}, prog="frontend")
    config = merge(
        FrontendConfig,
        [*flags[:4], "--edge", "native"],
        {"UNBROKEN_FRONTEND_PROCESSES": "3"},
        prog="frontend",
    )
    assert config.processes == 3
