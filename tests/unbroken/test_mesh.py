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
from unbroken.chaos.processes import is_alive
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.mesh import LocalMesh, MeshError, kill_worker
from unbroken.restart import RestartPolicy
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


def leave_a_file(pid: int) -> Path:
    """In the directory of the process for temporary files."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (named,) = (one for one in variables if one.startswith(b"TMPDIR="))
    path = Path(os.fsdecode(named).removeprefix("TMPDIR=")) / "left"
    path.touch()
    return path


def test_temporary_files_of_who_was_killed_go_with_the_mesh(directory: Path) -> None:
    async def scenario() -> Path:
        async with LocalMesh(directory, num_workers=1) as mesh:
            return leave_a_file(mesh.frontend_pid)

    assert not uvloop.run(scenario()).parent.exists()


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


def test_frontends_are_killed_and_restarted_at_their_addresses(directory: Path) -> None:
    async def scenario() -> None:
        async with LocalMesh(directory, num_workers=1, num_frontends=2) as mesh:
            addresses = mesh.frontend_addresses
            assert addresses[0] == mesh.frontend_address
            assert len(set(addresses)) == 2
            assert sorted(mesh.frontends) == ["f1", "f2"]
            pids = {name: record.pid for name, record in mesh.frontends.items()}
            others = [pids["f2"], mesh.workers["w1"].sidecar_pid]
            mesh.kill("f1")
            await until(lambda: not is_alive(pids["f1"]) and "f1" not in mesh.frontends)
            assert all(map(is_alive, others))
            assert mesh.frontend_addresses == addresses
            with pytest.raises(UnbrokenError) as raised:
                mesh.kill("f1")
            assert raised.value.reason is Reason.NO_WORKER
            await mesh.restart("f1")
            assert mesh.frontend_addresses == addresses
            assert mesh.frontend_pid not in (pids["f1"], pids["f2"])
            async with Client(addresses[0]) as client:
                assert len(await client.list_workers()) == 1
            assert all(map(is_alive, others))
            mesh.kill("f2")
            await mesh.restart("w1")  # With the frontend that is left.

    uvloop.run(scenario())


def test_frontends_listen_at_ports_in_a_row(tmp_path: Path) -> None:
    def listens(first: str, number: int) -> list[str]:
        mesh = LocalMesh(tmp_path, num_frontends=number, frontend_listen=first)
        return list(mesh._listen.values())  # pyright: ignore[reportPrivateUsage]

    assert listens("127.0.0.1:7400", 3) == ["127.0.0.1:7400", "127.0.0.1:7401", "127.0.0.1:7402"]
    assert listens("[::1]:0", 2) == ["[::1]:0", "[::1]:0"]
    with pytest.raises(ValueError, match="port"):
        listens("127.0.0.1:65535", 2)


def test_a_frontend_is_killed_whole(directory: Path) -> None:
    with pytest.raises(ValueError, match="whole"):
        LocalMesh(directory).kill("f1", "engine")


def test_supervision_restarts_whoever_ends(directory: Path) -> None:
    async def scenario() -> None:
        told: list[str] = []
        async with LocalMesh(directory, num_workers=1, num_frontends=2) as mesh:
            supervision = asyncio.create_task(mesh.supervise(told.append))
            old = {"f2": mesh.frontends["f2"].pid, "w1": mesh.workers["w1"].sidecar_pid}
            engine = mesh.workers["w1"].engine_pgid
            address = mesh.frontends["f2"].address
            mesh.kill("f2")
            mesh.kill("w1", "sidecar")
            await until(lambda: "f2" in mesh.frontends and mesh.frontends["f2"].pid != old["f2"])
            await until(
                lambda: "w1" in mesh.workers and mesh.workers["w1"].sidecar_pid != old["w1"]
            )
            assert mesh.frontends["f2"].address == address
            assert not is_alive(engine)
            assert sorted(line.split(";")[0] for line in told) == [
                "f2 ended with status -9",
                "f2 is started again",
                "w1 ended with status -9",
                "w1 is started again",
            ]
            supervision.cancel()
            await asyncio.gather(supervision, return_exceptions=True)
            mesh.kill("f2")
            await until(lambda: "f2" not in mesh.frontends)

    uvloop.run(scenario())


def test_supervision_gives_up_what_crashes_in_a_loop(directory: Path) -> None:
    async def scenario() -> None:
        told: list[str] = []
        policy = RestartPolicy(backoff_initial_s=0.01, crash_loop_limit=2)
        async with LocalMesh(directory, num_workers=1) as mesh:
            supervision = asyncio.create_task(mesh.supervise(told.append, policy=policy))
            for _ in range(2):
                pid = mesh.frontends["f1"].pid
                mesh.kill("f1")
                await until(
                    lambda pid=pid: (
                        supervision.done()
                        or ("f1" in mesh.frontends and mesh.frontends["f1"].pid != pid)
                    )
                )
            with pytest.raises(MeshError, match="no frontend is left"):
                await supervision
        assert "f1 ended with status -9 and is given up" in told[-1]

    uvloop.run(scenario())


def test_restarting_a_worker_leaves_those_with_longer_names_alone(directory: Path) -> None:
    async def scenario() -> None:
        async with LocalMesh(directory, num_workers=10) as mesh:
            tenth = mesh.workers["w10"].sidecar_pid
            await mesh.restart("w1")
            assert is_alive(tenth)

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
