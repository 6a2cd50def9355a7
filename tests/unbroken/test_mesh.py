"""Claims of `LocalMesh`; its frontend, sidecars and engines only pretend."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.mesh import LocalMesh, MeshError, kill_worker
from unbroken.v1 import worker_pb2 as pb

REPOSITORY = Path(__file__).parents[2]

# An engine that ignores SIGTERM and lives in a process group of its own, as real ones do.
SIDECAR = """
import argparse, asyncio, os, signal, subprocess, sys, time
from pathlib import Path
from unbroken.discovery import WORKERS, connect
from unbroken.v1 import worker_pb2 as pb

parser = argparse.ArgumentParser()
for flag in ("--worker-id", "--discovery", "--listen", "--engine", "--engine-options"):
    parser.add_argument(flag)
options = parser.parse_args()
if options.engine == "broken":
    sys.exit("no such engine")

async def main():
    engine = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' TERM; while true; do sleep 60; done"], start_new_session=True
    )
    found = connect(options.discovery)
    incarnation = await found.new_incarnation(WORKERS, options.worker_id)
    identity = pb.WorkerIdentity(worker_id=options.worker_id, incarnation=incarnation)
    await found.register(WORKERS, pb.WorkerRecord(
        identity=identity, address="127.0.0.1:1", model=options.engine_options or "",
        sidecar_pid=os.getpid(), engine_pgid=engine.pid,
    ))
    await asyncio.Event().wait()

asyncio.run(main())
"""

FRONTEND = """
import argparse, asyncio, os
from unbroken.discovery import FRONTENDS, WORKERS, connect
from unbroken import transport
from unbroken.v1 import admin_service_pb2 as pb, admin_service_pb2_grpc as grpc, worker_pb2

parser = argparse.ArgumentParser()
for flag in ("--frontend-id", "--discovery", "--listen"):
    parser.add_argument(flag)
options = parser.parse_args()
found = connect(options.discovery)

class Admin(grpc.AdminServiceServicer):
    async def ListWorkers(self, request, context):
        return pb.ListWorkersResponse(workers=[
            pb.WorkerInfo(record=record, link="LINK_STATE_UP", engine="ENGINE_STATE_SERVING")
            for record in (await found.snapshot(WORKERS)).values()
        ])

async def main():
    server = transport.make_server()
    grpc.add_AdminServiceServicer_to_server(Admin(), server)
    address = transport.listen(server, options.listen)
    await server.start()
    await found.register(FRONTENDS, worker_pb2.FrontendRecord(
        frontend_id=options.frontend_id, incarnation=1, address=address, pid=os.getpid()
    ))
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a mesh can be; `python -m` finds the pretenders first, in the current directory."""
    for name, text in (("sidecar", SIDECAR), ("frontend", FRONTEND)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "__main__.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    return tmp_path / "mesh"


def is_alive(pid: int) -> bool:
    """Zombies are dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(claim: Callable[[], bool]) -> None:
    """Wait for `claim`, which no event announces."""
    async with asyncio.timeout(5):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def pids_of(mesh: LocalMesh) -> list[int]:
    """All processes of a mesh."""
    workers = mesh.workers.values()
    return [mesh.frontend_pid] + [p for w in workers for p in (w.sidecar_pid, w.engine_pgid)]


def test_a_mesh_starts_serves_and_leaves_nothing_behind(directory: Path) -> None:
    async def scenario() -> None:
        async with LocalMesh(directory, num_workers=2, engine_options="tiny") as mesh:
            assert sorted(mesh.workers) == ["w1", "w2"]
            assert {record.model for record in mesh.workers.values()} == {"tiny"}
            async with Client(mesh.frontend_address) as client:
                assert len(await client.list_workers()) == 2
            pids = pids_of(mesh)
            assert len(pids) == 5
            assert all(map(is_alive, pids))
        assert not any(map(is_alive, pids))
        assert {path.name for path in mesh.log_directory.iterdir()} == {
            "f1.log",
            "w1.log",
            "w2.log",
        }

    uvloop.run(scenario())


def test_an_exception_leaves_nothing_behind(directory: Path) -> None:
    async def scenario() -> None:
        pids: list[int] = []
        with contextlib.suppress(ZeroDivisionError):
            async with LocalMesh(directory, num_workers=1) as mesh:
                pids = pids_of(mesh)
                raise ZeroDivisionError
        assert len(pids) == 3
        assert not any(map(is_alive, pids))

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("what", "dead"),
    [("engine", {"engine"}), ("sidecar", {"sidecar"}), ("host", {"engine", "sidecar"})],
)
def test_a_kill_kills_what_it_says_and_a_restart_replaces_the_worker(
    directory: Path, what: str, dead: set[str]
) -> None:
    async def scenario() -> None:
        async with LocalMesh(directory, num_workers=2) as mesh:
            old = mesh.workers["w1"]
            others = [mesh.frontend_pid, mesh.workers["w2"].sidecar_pid]
            mesh.kill("w1", what)  # pyright: ignore[reportArgumentType]
            pids = {"engine": old.engine_pgid, "sidecar": old.sidecar_pid}
            await until(lambda: {n for n, pid in pids.items() if not is_alive(pid)} >= dead)
            assert {name for name, pid in pids.items() if not is_alive(pid)} == dead
            if "sidecar" in dead:
                await until(lambda: "w1" not in mesh.workers)
                with pytest.raises(UnbrokenError) as raised:
                    mesh.kill("w1")
                assert raised.value.reason is Reason.NO_WORKER
            await mesh.restart("w1")
            assert not any(map(is_alive, pids.values()))
            new = mesh.workers["w1"]
            assert new.identity.incarnation > old.identity.incarnation
            assert is_alive(new.sidecar_pid)
            assert all(map(is_alive, others))

    uvloop.run(scenario())


def test_a_process_that_fails_at_the_start_is_quoted(directory: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(MeshError, match="no such engine"):
            await LocalMesh(directory, engine="broken").start()

    uvloop.run(scenario())


def test_a_mesh_that_does_not_get_ready_is_an_error_and_stopped(directory: Path) -> None:
    async def scenario() -> None:
        mesh = LocalMesh(directory, ready_timeout_s=0.01)
        with pytest.raises(MeshError, match=r"within 0\.01 s"):
            await mesh.start()
        assert not mesh._processes  # pyright: ignore[reportPrivateUsage]

    uvloop.run(scenario())


def test_a_second_mesh_does_not_take_over_the_directory_of_a_first(directory: Path) -> None:
    async def scenario() -> None:
        async with LocalMesh(directory, num_workers=1) as mesh:
            with pytest.raises(MeshError, match="found f1"):
                await LocalMesh(directory, num_workers=1).start()
            assert all(map(is_alive, pids_of(mesh)))

    uvloop.run(scenario())


STARTER = """
import asyncio, sys
from pathlib import Path
from unbroken.mesh import LocalMesh

async def main():
    async with LocalMesh(Path(sys.argv[1]), num_workers=1) as mesh:
        print(mesh.frontend_pid, *(w.sidecar_pid for w in mesh.workers.values()), flush=True)
        print(*(w.engine_pgid for w in mesh.workers.values()), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_frontend_and_sidecars_die_with_a_killed_starter(directory: Path) -> None:
    async def scenario() -> None:
        command = [sys.executable, "-c", STARTER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:  # noqa: ASYNC220
            try:
                assert starter.stdout is not None
                tethered = list(map(int, starter.stdout.readline().split()))
                engine = int(starter.stdout.readline())
            finally:
                starter.kill()
        try:
            assert len(tethered) == 2
            await until(lambda: not any(map(is_alive, tethered)))
        finally:
            os.killpg(engine, signal.SIGKILL)  # Its pretended sidecar does not care for it.

    uvloop.run(scenario())


def test_a_record_without_processes_cannot_be_killed() -> None:
    record = pb.WorkerRecord(identity=pb.WorkerIdentity(worker_id="far", incarnation=1))
    for what in ("engine", "sidecar", "host"):
        with pytest.raises(UnbrokenError):
            kill_worker(record, what)  # pyright: ignore[reportArgumentType]
