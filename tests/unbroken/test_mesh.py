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

from tests.unbroken import pretenders
from tests.unbroken.pretenders import is_alive
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.mesh import LocalMesh, MeshError, kill_worker
from unbroken.v1 import worker_pb2 as pb


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a mesh of pretenders can be."""
    pretenders.install(tmp_path, monkeypatch)
    return tmp_path / "mesh"


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
