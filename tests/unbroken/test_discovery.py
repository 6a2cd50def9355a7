"""Claims of file discovery, with real owners that are killed and stopped."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from unbroken import discovery, file_discovery
from unbroken.discovery import FRONTENDS, THRESHOLDS, WORKERS
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.v1 import worker_pb2 as pb

POLL_S = 0.01
Members = Mapping[str, pb.WorkerRecord]


def worker(worker_id: str = "w1", incarnation: int = 1, address: str = "h:1") -> pb.WorkerRecord:
    identity = pb.WorkerIdentity(worker_id=worker_id, incarnation=incarnation)
    return pb.WorkerRecord(identity=identity, address=address)


class Watched:
    """The membership as one watcher sees it."""

    def __init__(self) -> None:
        self.members: Members = {}
        self.snapshots = 0
        self._changed = asyncio.Condition()

    async def follow(self, found: FileDiscovery) -> None:
        async for members in found.watch(WORKERS):
            async with self._changed:
                self.members = members
                self.snapshots += 1
                self._changed.notify_all()

    async def until(self, claim: Callable[[Members], bool]) -> None:
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(lambda: self.snapshots > 0 and claim(self.members))


@asynccontextmanager
async def watching(root: Path) -> AsyncGenerator[Watched, None]:
    watched = Watched()
    task = asyncio.create_task(watched.follow(FileDiscovery(root, poll_interval_s=POLL_S)))
    try:
        yield watched
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


_OWNER = """
import asyncio, sys
from pathlib import Path
from unbroken.discovery import WORKERS
from unbroken.file_discovery import FileDiscovery
from unbroken.v1 import worker_pb2 as pb

async def main(root, worker_id, incarnation):
    identity = pb.WorkerIdentity(worker_id=worker_id, incarnation=int(incarnation))
    record = pb.WorkerRecord(identity=identity, address="owner:1")
    await FileDiscovery(Path(root)).register(WORKERS, record)
    print("registered", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def owner(root: Path, worker_id: str = "w1", incarnation: int = 1) -> Generator[int, None, None]:
    """Another process that has registered; yields its pid."""
    command = [sys.executable, "-c", _OWNER, str(root), worker_id, str(incarnation)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"registered\n"
            yield process.pid
        finally:
            process.kill()


def test_a_record_appears_changes_and_goes_with_its_registration(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with watching(tmp_path) as watched:
            await watched.until(lambda members: members == {})
            registration = await FileDiscovery(tmp_path).register(WORKERS, worker())
            await watched.until(lambda members: members == {"w1": worker()})
            await registration.update(worker(address="h:2"))
            await watched.until(lambda members: members == {"w1": worker(address="h:2")})
            await registration.close()
            await watched.until(lambda members: members == {})
            await registration.close()

    uvloop.run(scenario())


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = discovery.connect(tmp_path)
        frontend = pb.FrontendRecord(frontend_id="f1", incarnation=5, address="h:3", pid=7)
        registrations = [
            await found.register(WORKERS, worker()),
            await found.register(FRONTENDS, frontend),
        ]
        assert await found.snapshot(WORKERS) == {"w1": worker()}
        assert await found.snapshot(FRONTENDS) == {"f1": frontend}
        for registration in registrations:
            await registration.close()

    uvloop.run(scenario())


def test_the_record_of_a_killed_owner_is_gone_though_its_file_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with watching(tmp_path) as watched:
            with owner(tmp_path) as pid:
                await watched.until(lambda members: "w1" in members)
                os.kill(pid, signal.SIGKILL)
                await watched.until(lambda members: members == {})
                assert (tmp_path / "workers" / "w1.json").exists()
                assert await FileDiscovery(tmp_path).snapshot(WORKERS) == {}

    uvloop.run(scenario())


def test_the_record_of_a_stopped_owner_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with watching(tmp_path) as watched:
            with owner(tmp_path) as pid:
                await watched.until(lambda members: "w1" in members)
                os.kill(pid, signal.SIGSTOP)
                os.waitid(os.P_PID, pid, os.WSTOPPED)  # noqa: ASYNC222 - it stops at once.
                await asyncio.sleep(10 * POLL_S)
                assert "w1" in watched.members
                assert "w1" in await FileDiscovery(tmp_path).snapshot(WORKERS)

    uvloop.run(scenario())


def test_a_new_incarnation_replaces_an_old_one_and_is_never_replaced_by_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        old = await found.register(WORKERS, worker(incarnation=1))
        async with watching(tmp_path) as watched:
            await watched.until(lambda members: "w1" in members)
            new = await found.register(WORKERS, worker(incarnation=2))
            await watched.until(lambda members: members == {"w1": worker(incarnation=2)})
            for attempt in (
                old.update(worker(incarnation=1, address="h:9")),
                found.register(WORKERS, worker(incarnation=1)),
                found.register(WORKERS, worker(incarnation=2)),
            ):
                with pytest.raises(UnbrokenError) as raised:
                    await attempt
                assert raised.value.reason is Reason.FENCED
            await old.close()
            assert await found.snapshot(WORKERS) == {"w1": worker(incarnation=2)}
            await new.close()
            await watched.until(lambda members: members == {})

    uvloop.run(scenario())


def test_a_watcher_never_goes_back_to_a_lower_incarnation(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        async with watching(tmp_path) as watched:
            new = await found.register(WORKERS, worker(incarnation=2))
            await watched.until(lambda members: "w1" in members)
            await new.close()
            await watched.until(lambda members: members == {})
            zombie = await found.register(WORKERS, worker(incarnation=1))
            other = await found.register(WORKERS, worker("w2"))
            await watched.until(lambda members: "w2" in members)
            assert "w1" not in watched.members
            await zombie.close()
            await other.close()

    uvloop.run(scenario())


def test_a_new_incarnation_is_above_the_last_one_even_if_the_clock_went_back(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        future = 2**60
        with owner(tmp_path, incarnation=future):
            pass
        assert await found.new_incarnation(WORKERS, "w1") == future + 1
        elsewhere = FileDiscovery(tmp_path / "other")
        assert 2**50 < await elsewhere.new_incarnation(WORKERS, "w1") < 2**52  # 2005 to 2112.

    uvloop.run(scenario())


@pytest.mark.parametrize("damage", [None, b"", b"what", b"-7", b"9" * 100])
def test_a_new_incarnation_is_above_the_last_one_even_if_its_record_is_gone(
    tmp_path: Path, damage: bytes | None
) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        future = 2**60
        async with watching(tmp_path) as watched:
            registration = await found.register(WORKERS, worker(incarnation=future))
            await watched.until(lambda members: "w1" in members)
            await registration.close()
            await watched.until(lambda members: "w1" not in members)
            highest = tmp_path / "workers" / ".incarnation"
            assert highest.read_bytes() == b"%d" % future
            if damage is not None:
                highest.write_bytes(damage)
            incarnation = await found.new_incarnation(WORKERS, "w1")
            if damage is not None:
                assert 2**50 < incarnation < 2**52  # 2005 to 2112.
                return
            assert incarnation == future + 1
            again = await found.register(WORKERS, worker(incarnation=incarnation))
            await watched.until(lambda members: "w1" in members)
            await again.close()

    uvloop.run(scenario())


def test_the_next_registrar_removes_what_dead_owners_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        with owner(tmp_path, "dead"):
            pass
        with owner(tmp_path, "stopped") as pid:
            os.kill(pid, signal.SIGSTOP)
            (tmp_path / "workers" / "torn.json.tmp").write_text("{")
            (tmp_path / "workers" / "notes.json").write_text("keep me")
            registration = await FileDiscovery(tmp_path).register(WORKERS, worker())
            names = {path.name for path in (tmp_path / "workers").iterdir()}
            assert names == {".incarnation", ".lock", "notes.json", "stopped.json", "w1.json"}
            await registration.close()

    uvloop.run(scenario())


GARBAGE = {
    "empty": b"",
    "torn": b'{"identity": {"worker_id": "torn", "inc',
    "list": b"[]",
    "binary": bytes(range(256)),
    "deep": b"[" * 60_000,
    "huge": b" " * 100_000,
    "no-identity": b'{"address": "h:1"}',
    "no-incarnation": b'{"identity": {"worker_id": "no-incarnation"}}',
    "other-name": b'{"identity": {"worker_id": "w9", "incarnation": "1"}}',
    "wrong-type": b'{"identity": {"worker_id": "wrong-type", "incarnation": "x"}}',
    "text": b"hello",
    "sp ace": b'{"identity": {"worker_id": "sp ace", "incarnation": "1"}}',
}


def test_garbage_is_skipped(tmp_path: Path) -> None:
    from unbroken.file_discovery import _lock  # pyright: ignore[reportPrivateUsage]

    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        registration = await found.register(WORKERS, worker())
        folder = tmp_path / "workers"
        locked: list[int] = []
        for name, content in GARBAGE.items():
            (folder / f"{name}.json").write_bytes(content)
            locked.append(os.open(folder / f"{name}.json", os.O_RDWR))
            assert _lock(locked[-1])  # As if a living process had written it.
        (folder / "folder.json").mkdir()
        (folder / "dangling.json").symlink_to("nowhere")
        try:
            assert await found.snapshot(WORKERS) == {"w1": worker()}
        finally:
            for fd in locked:
                os.close(fd)
            await registration.close()

    uvloop.run(scenario())


def test_unknown_fields_of_newer_peers_are_ignored(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        registration = await found.register(WORKERS, worker())
        path = tmp_path / "workers" / "w1.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"a_field_of_tomorrow": 1}))
        assert await found.snapshot(WORKERS) == {"w1": worker()}
        await registration.close()

    uvloop.run(scenario())


def test_a_living_owner_stays_a_member_when_its_record_is_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        registration = await found.register(WORKERS, worker())
        async with watching(tmp_path) as watched:
            await watched.until(lambda members: "w1" in members)
            shutil.rmtree(tmp_path)
            await asyncio.sleep(10 * POLL_S)
            assert "w1" in watched.members
            assert watched.snapshots == 1
            async with watching(tmp_path) as newcomer:  # Its owner writes it again.
                await newcomer.until(lambda members: "w1" in members)
            assert watched.snapshots == 1
            await registration.close()
            await watched.until(lambda members: members == {})

    uvloop.run(scenario())


def test_a_dead_owner_is_noticed_even_after_the_directory_vanished(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with watching(tmp_path) as watched:
            with owner(tmp_path) as pid:
                await watched.until(lambda members: "w1" in members)
                shutil.rmtree(tmp_path)
                os.kill(pid, signal.SIGKILL)
                await watched.until(lambda members: members == {})

    uvloop.run(scenario())


def test_updates_never_make_a_member_blink(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        registration = await found.register(WORKERS, worker())
        sizes: set[int] = set()
        looking = True

        async def look() -> None:
            async for members in FileDiscovery(tmp_path, poll_interval_s=0).watch(WORKERS):
                sizes.add(len(members))
                if not looking:
                    return

        looker = asyncio.create_task(look())
        for i in range(300):
            await registration.update(worker(address=f"h:{i}"))
            await asyncio.sleep(0)
        looking = False
        await registration.update(worker(address="last:1"))
        await looker
        await registration.close()
        assert sizes == {1}

    uvloop.run(scenario())


def test_an_update_between_the_look_and_the_question_is_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        registration = await found.register(WORKERS, worker())
        reader = file_discovery._Reader(tmp_path / "workers", WORKERS)  # pyright: ignore[reportPrivateUsage]
        assert reader.read() == {"w1": worker()}
        is_owned = file_discovery._is_owned  # pyright: ignore[reportPrivateUsage]
        pending = [registration.update(worker(address="h:2"))]

        def update_first(fd: int) -> bool:
            while pending:
                with pytest.raises(StopIteration):  # It finds nothing to wait for.
                    pending.pop().send(None)  # type: ignore[attr-defined]
            return is_owned(fd)

        monkeypatch.setattr(file_discovery, "_is_owned", update_first)
        assert reader.read() == {"w1": worker(address="h:2")}
        reader.close()
        await registration.close()

    uvloop.run(scenario())


def test_a_folder_without_news_is_not_read_again_and_a_death_in_it_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        now, folder = 100.0, tmp_path / "workers"
        reader = file_discovery._Reader(folder, WORKERS, lambda: now)  # pyright: ignore[reportPrivateUsage]
        registration = await FileDiscovery(tmp_path).register(WORKERS, worker())
        os.utime(folder, (1000.0, 1000.0))
        members = reader.read()
        assert list(members) == ["w1"]
        now += 1.0
        assert reader.read() is members
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", _never)
            assert reader.read() is members
        await registration.close()
        os.utime(folder, (1000.0, 1000.0))  # As if it had not removed its file.
        assert dict(reader.read()) == {}
        reader.close()

    asyncio.run(scenario())


def test_what_changes_in_the_moment_of_a_look_is_seen_by_the_next(tmp_path: Path) -> None:
    """Both leave the folder with the same stamp, as a coarse clock of the kernel may."""

    async def scenario() -> None:
        now, folder = 100.0, tmp_path / "workers"
        folder.mkdir()
        reader = file_discovery._Reader(folder, WORKERS, lambda: now)  # pyright: ignore[reportPrivateUsage]
        os.utime(folder, (1000.0, 1000.0))
        assert dict(reader.read()) == {}
        registration = await FileDiscovery(tmp_path).register(WORKERS, worker())
        os.utime(folder, (1000.0, 1000.0))
        now += 1.0
        assert list(reader.read()) == ["w1"]
        await registration.close()
        reader.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["open", "listdir"])
def test_a_look_that_failed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def scenario() -> None:
        now, folder = 100.0, tmp_path / "workers"
        reader = file_discovery._Reader(folder, WORKERS, lambda: now)  # pyright: ignore[reportPrivateUsage]
        registration = await FileDiscovery(tmp_path).register(WORKERS, worker())
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _fails)
            assert dict(reader.read()) == {}
            now += 1.0
            assert dict(reader.read()) == {}
        assert list(reader.read()) == ["w1"]
        await registration.close()
        reader.close()

    asyncio.run(scenario())


def _fails(*_: object) -> int:
    raise OSError(errno.EMFILE, "too many open files")


def _never(*_: object) -> list[str]:
    raise AssertionError("expected no look into the folder")


def test_of_many_registrars_of_one_id_the_highest_incarnation_wins(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        order = [3, 8, 1, 6, 2, 7, 5, 4]
        results = await asyncio.gather(
            *(found.register(WORKERS, worker(incarnation=i)) for i in order),
            return_exceptions=True,
        )
        assert await found.snapshot(WORKERS) == {"w1": worker(incarnation=8)}
        for result in results:
            if isinstance(result, BaseException):
                assert isinstance(result, UnbrokenError)
                assert result.reason is Reason.FENCED
            else:
                await result.close()
        assert await found.snapshot(WORKERS) == {}

    uvloop.run(scenario())


def test_registering_fails_when_the_directory_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(file_discovery, "_LOCK_WAIT_S_MAX", 0.05)

    async def scenario() -> None:
        async with file_discovery._exclusive(tmp_path / "workers"):  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(UnbrokenError) as raised:
                await FileDiscovery(tmp_path).register(WORKERS, worker())
            assert raised.value.reason is Reason.UNREACHABLE

    uvloop.run(scenario())


@pytest.mark.parametrize("worker_id", ["", "../evil", "a/b", "x" * 129, "a b", "é"])
def test_ids_that_are_no_ids_are_refused(tmp_path: Path, worker_id: str) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidField):
            await FileDiscovery(tmp_path).register(WORKERS, worker(worker_id))

    uvloop.run(scenario())


def test_watching_leaves_no_descriptors_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            registration = await found.register(WORKERS, worker())
            async with watching(tmp_path) as watched:
                await watched.until(lambda members: "w1" in members)
            await registration.close()
        assert len(os.listdir("/proc/self/fd")) == before

    uvloop.run(scenario())


# What the whole mesh shares.


def thresholds(version: int, tokens: int = 7) -> pb.ThresholdsRecord:
    entry = pb.ModelThresholds(model="m", thresholds=pb.BusyThresholds(prefill_tokens=tokens))
    return pb.ThresholdsRecord(version=version, models=[entry])


def test_a_setting_is_empty_then_what_was_set_and_outlives_who_set_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        assert await found.setting(THRESHOLDS) == pb.ThresholdsRecord()
        await found.change(THRESHOLDS, thresholds(1))
        assert await FileDiscovery(tmp_path).setting(THRESHOLDS) == thresholds(1)

    uvloop.run(scenario())


def test_of_two_changes_of_one_version_one_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        changes = [
            FileDiscovery(tmp_path).change(THRESHOLDS, thresholds(1, tokens)) for tokens in range(8)
        ]
        results = await asyncio.gather(*changes, return_exceptions=True)
        errors = [result for result in results if result is not None]
        assert len(errors) == 7
        for error in errors:
            assert isinstance(error, UnbrokenError)
            assert error.reason is Reason.VERSION_MISMATCH
            assert error.metadata == {"version": "1"}
        winner = results.index(None)
        assert await FileDiscovery(tmp_path).setting(THRESHOLDS) == thresholds(1, winner)

    uvloop.run(scenario())


def test_a_watcher_of_a_setting_sees_changes_and_never_goes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path, poll_interval_s=POLL_S)
        path = tmp_path / "settings" / "thresholds.json"
        watch = found.watch_setting(THRESHOLDS)
        async with asyncio.timeout(5), aclosing(watch):
            assert await anext(watch) == pb.ThresholdsRecord()
            await found.change(THRESHOLDS, thresholds(5))
            assert await anext(watch) == thresholds(5)
            following = asyncio.ensure_future(anext(watch))
            for harm in ("no JSON", '{"version": "4"}', None):
                path.write_text(harm) if harm is not None else path.unlink()
                await asyncio.sleep(5 * POLL_S)
                assert not following.done()
            await found.change(THRESHOLDS, thresholds(6))
            assert await following == thresholds(6)

    uvloop.run(scenario())


def test_a_setting_that_is_changed_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path, poll_interval_s=POLL_S)
        read = file_discovery._read_setting  # pyright: ignore[reportPrivateUsage]

        def changed_meanwhile(setting: Any, path: Path) -> Any:
            record = read(setting, path)
            monkeypatch.undo()
            with pytest.raises(StopIteration):  # It finds nothing to wait for.
                found.change(THRESHOLDS, thresholds(1)).send(None)
            return record

        monkeypatch.setattr(file_discovery, "_read_setting", changed_meanwhile)
        watch = found.watch_setting(THRESHOLDS)
        async with asyncio.timeout(5), aclosing(watch):
            assert await anext(watch) == pb.ThresholdsRecord()
            assert await anext(watch) == thresholds(1)

    uvloop.run(scenario())


def test_a_look_at_a_setting_that_failed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path, poll_interval_s=POLL_S)
        watch = found.watch_setting(THRESHOLDS)
        async with asyncio.timeout(5), aclosing(watch):
            assert await anext(watch) == pb.ThresholdsRecord()
            await found.change(THRESHOLDS, thresholds(1))
            with monkeypatch.context() as patch:
                patch.setattr(Path, "open", _fails)
                following = asyncio.ensure_future(anext(watch))
                await asyncio.sleep(10 * POLL_S)
                assert not following.done()
            assert await following == thresholds(1)

    uvloop.run(scenario())


def test_a_setting_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        record = pb.ThresholdsRecord(
            version=1, models=[pb.ModelThresholds(model="m" * 1000) for _ in range(100)]
        )
        with pytest.raises(InvalidField):
            await FileDiscovery(tmp_path).change(THRESHOLDS, record)
        assert await FileDiscovery(tmp_path).setting(THRESHOLDS) == pb.ThresholdsRecord()

    uvloop.run(scenario())
