"""Discovery in a directory: one file per instance, alive as long as its owner holds a lock on it.

    <root>/workers/<worker_id>.json      protobuf JSON of a WorkerRecord
    <root>/frontends/<frontend_id>.json  protobuf JSON of a FrontendRecord
    <root>/settings/<name>.json          protobuf JSON of what the whole mesh shares
    <root>/<kind>/.lock                  held for the moment of a change
    <root>/<kind>/.incarnation           the highest incarnation that has registered there

The kernel keeps the locks: they are gone the moment their owner is, however it ended, and they stay
while it is merely stopped. So there are no leases to renew and none to expire. Readers *query* the
lock (`F_OFD_GETLK`) and never take it, so they disturb nobody.

A file is locked before it appears under its name and is replaced, never rewritten, so a reader sees
whole records only. A record that somebody else deleted is still a member to those who knew it, and
its owner writes it again. docs/decisions/discovery.md says why it is done so.
"""

import asyncio
import fcntl
import os
import struct
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic

from google.protobuf import json_format

from unbroken import log
from unbroken.discovery import (
    Kind,
    RecordT,
    Registration,
    Setting,
    SettingT,
    incarnation_now,
    next_incarnation,
)
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.recurring import nap, naps

POLL_INTERVAL_S: Final = 0.2
"""Time between two looks at the directory; one takes a microsecond or two per instance."""

_SETTINGS_INTERVALS: Final = 3
"""Of those, between two looks at a setting: it is changed by people."""
_STAMP_TICK_S: Final = 0.1
"""Two changes of a folder within so much may have one stamp: it is that of a coarse clock."""
_REPAIR_INTERVAL_S: Final = 1.0
_LOCK_WAIT_S_MAX: Final = 5.0
_LOCK_RETRY_S: Final = 0.005
_RECORD_BYTES_MAX: Final = 64 * 1024
_SUFFIX: Final = ".json"
_TEMPORARY_SUFFIX: Final = ".tmp"
_SETTINGS: Final = "settings"
_HIGHEST: Final = ".incarnation"
_HIGHEST_BYTES_MAX: Final = 20
_INCARNATION_MAX: Final = 2**63

_log = log.get_logger(__name__)

_Stamp = tuple[int, int, int, int]  # Device, inode, size, time of change (ns): one state of a file.


class FileDiscovery:
    """Discovery for the processes of one machine. Files are local: calls do not leave the loop."""

    def __init__(self, root: Path, *, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        self.root = root
        self._poll_interval_s = poll_interval_s

    async def new_incarnation(self, kind: Kind[Any], instance_id: str) -> int:
        """As `Discovery.new_incarnation`: the time, or more if the clock was set back.

        The record of an earlier life may be gone, but those who knew that life go on.
        """
        folder = self.root / kind.name
        last = _incarnation_at(kind, _path(folder, instance_id))
        return next_incarnation(incarnation_now(), known=max(last, _highest_in(folder)))

    async def register(self, kind: Kind[RecordT], record: RecordT) -> Registration[RecordT]:
        """As `Discovery.register`. Also removes what dead owners left behind."""
        registration = _FileRegistration(self.root / kind.name, kind, record)
        await registration.open()
        return registration

    async def snapshot(self, kind: Kind[RecordT]) -> Mapping[str, RecordT]:
        """As `Discovery.snapshot`."""
        reader = _Reader(self.root / kind.name, kind)
        try:
            return reader.read()
        finally:
            reader.close()

    async def watch(self, kind: Kind[RecordT]) -> AsyncGenerator[Mapping[str, RecordT], None]:
        """As `Discovery.watch`."""
        reader = _Reader(self.root / kind.name, kind)
        last: Mapping[str, RecordT] | None = None
        try:
            while True:
                await naps().until(partial(reader.has_changed, last), self._poll_interval_s)
                last = reader.members
                yield last
        finally:
            reader.close()

    async def setting(self, setting: Setting[SettingT]) -> SettingT:
        """As `Discovery.setting`. What cannot be read counts as not set."""
        path = _path(self.root / _SETTINGS, setting.name)
        try:
            return _read_setting(setting, path)
        except OSError as error:
            _not_readable(path, error)
            return setting.record_type()

    async def change(self, setting: Setting[SettingT], record: SettingT) -> None:
        """As `Discovery.change`."""
        text = json_format.MessageToJson(record, preserving_proto_field_name=True).encode()
        if len(text) > _RECORD_BYTES_MAX:
            raise InvalidField(setting.name, f"at most {_RECORD_BYTES_MAX} bytes", len(text))
        folder = self.root / _SETTINGS
        path = _path(folder, setting.name)
        try:
            async with _exclusive(folder):
                seen = _read_setting(setting, path).version
                if record.version <= seen:
                    raise UnbrokenError(
                        Reason.VERSION_MISMATCH,
                        f"{setting.name}: expected version {record.version - 1}, got {seen}",
                        metadata={"version": str(seen)},
                    )
                temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
                temporary.write_bytes(text)
                temporary.rename(path)
        except OSError as error:
            raise UnbrokenError(Reason.UNREACHABLE, f"{path}: {error}") from error

    async def watch_setting(self, setting: Setting[SettingT]) -> AsyncGenerator[SettingT, None]:
        """As `Discovery.watch_setting`."""
        path = _path(self.root / _SETTINGS, setting.name)
        interval_s = _SETTINGS_INTERVALS * self._poll_interval_s
        last: SettingT | None = None
        is_readable = True
        while True:
            stamp = _stamp_at(path)  # Before it is read: what changes meanwhile is read again.
            try:
                record = _read_setting(setting, path)
            except OSError as error:
                if is_readable:
                    _not_readable(path, error)
                is_readable = False
                record = setting.record_type()
            else:
                is_readable = True
            if last is None or record.version > last.version:
                last = record
                yield record
            if is_readable:
                await naps().until(partial(_has_changed, path, stamp), interval_s)
            else:
                await nap(interval_s)


def _has_changed(path: Path, stamp: _Stamp | None) -> bool:
    return _stamp_at(path) != stamp


def _not_readable(path: Path, error: OSError) -> None:
    """No descriptor is left, perhaps, or somebody took a right away."""
    _log.warning("setting not readable", path=str(path), error=str(error))


def _read_setting(setting: Setting[SettingT], path: Path) -> SettingT:
    """What is in a file, empty if that is no record. Raises OSError if it cannot be looked at."""
    try:
        with path.open("rb") as file:
            text = file.read(_RECORD_BYTES_MAX + 1)
        if len(text) > _RECORD_BYTES_MAX:
            raise ValueError(f"expected at most {_RECORD_BYTES_MAX} bytes")
        return json_format.Parse(text, setting.record_type(), ignore_unknown_fields=True)
    except FileNotFoundError:
        return setting.record_type()
    except (ValueError, json_format.ParseError, RecursionError) as error:
        _log.warning("setting skipped", path=str(path), error=str(error))
        return setting.record_type()


class _FileRegistration(Generic[RecordT]):
    """Holds the lock on the file of one instance."""

    def __init__(self, folder: Path, kind: Kind[RecordT], record: RecordT) -> None:
        self._folder = folder
        self._kind = kind
        self._record = record
        self._id, self._incarnation = kind.checked_identity(record)
        self._path = _path(folder, self._id)
        self._fd = -1
        self._repair: asyncio.Task[None] | None = None

    async def open(self) -> None:
        async with _exclusive(self._folder):
            self._remove_stale()
            self._publish()
        self._repair = asyncio.create_task(self._keep(), name=f"keep {self._path.name}")

    async def update(self, record: RecordT) -> None:
        if self._kind.checked_identity(record) != (self._id, self._incarnation):
            raise InvalidField("record", f"the identity of {self._id}", record)
        if self._fd < 0:
            raise ValueError("the registration is closed")
        async with _exclusive(self._folder):
            self._record = record
            self._publish()

    async def close(self) -> None:
        if self._repair is not None:
            self._repair.cancel()
            await asyncio.gather(self._repair, return_exceptions=True)
            self._repair = None
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            async with _exclusive(self._folder):
                if _stamp_at(self._path) == _stamp(os.fstat(fd)):
                    self._path.unlink()
        except (OSError, UnbrokenError) as error:  # Left to the next registrar.
            _log.warning("record not removed", path=str(self._path), error=str(error))
        finally:
            os.close(fd)  # From here on the record counts as dead.

    def _publish(self) -> None:
        """Put our record under its name. The folder is ours; raises FENCED."""
        seen = _incarnation_at(self._kind, self._path)
        is_other = _stamp_at(self._path) != (_stamp(os.fstat(self._fd)) if self._fd >= 0 else None)
        if seen > self._incarnation or (
            seen == self._incarnation and is_other and _is_owned_at(self._path)
        ):
            raise UnbrokenError(
                Reason.FENCED,
                f"{self._id}: expected no incarnation from {self._incarnation} on, got {seen}",
                metadata={"incarnation": str(seen)},
            )
        temporary = self._path.with_name(self._path.name + _TEMPORARY_SUFFIX)
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            assert _lock(fd), "nobody else knows the file"
            text = json_format.MessageToJson(self._record, preserving_proto_field_name=True)
            os.write(fd, text.encode())
            temporary.rename(self._path)
            _note_highest(self._folder, self._incarnation)
        except BaseException:
            os.close(fd)
            raise
        fd, self._fd = self._fd, fd
        if fd >= 0:
            os.close(fd)

    def _remove_stale(self) -> None:
        """Delete what dead owners left. The folder is ours."""
        for path in self._folder.iterdir():
            is_stale = path.name.endswith(_TEMPORARY_SUFFIX) or (
                path.name.endswith(_SUFFIX)
                and path != self._path  # Its incarnation is still to be compared with ours.
                and _incarnation_at(self._kind, path) > 0  # Else it may be somebody's treasure.
                and not _is_owned_at(path)
            )
            if is_stale:
                with suppress(OSError):
                    path.unlink()

    async def _keep(self) -> None:
        """Write the record again whenever somebody has removed it."""
        while True:
            await nap(_REPAIR_INTERVAL_S)
            if _stamp_at(self._path) == _stamp(os.fstat(self._fd)):
                continue
            try:
                async with _exclusive(self._folder):
                    self._publish()
                _log.warning("record was gone and is written again", path=str(self._path))
            except UnbrokenError as error:
                if error.reason is Reason.FENCED:
                    _log.error("a newer incarnation has our id", path=str(self._path))
                    return
                _log.warning("record cannot be restored", path=str(self._path), error=str(error))
            except OSError as error:
                _log.warning("record cannot be restored", path=str(self._path), error=str(error))


@dataclass(slots=True)
class _Seen(Generic[RecordT]):
    """A record that was read. Its descriptor stays open to ask about the lock."""

    fd: int
    stamp: _Stamp
    incarnation: int
    record: RecordT


class _Reader(Generic[RecordT]):
    """Reads one folder again and again, remembering what it saw."""

    def __init__(
        self, folder: Path, kind: Kind[RecordT], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._clock = clock
        self._seen: dict[str, _Seen[RecordT]] = {}
        self._highest: dict[str, int] = {}  # Incarnations only grow, also past a death.
        self._ignored: dict[str, _Stamp] = {}  # Garbage, outdated or dead; dead stays dead.
        self._is_readable = True
        self._members: Mapping[str, RecordT] = MappingProxyType({})
        self._stamp: _Stamp | None = None
        """Of the folder,"""
        self._stamped_at = 0.0
        """and when it was first seen."""
        self._is_read = False
        """Whether all that has this stamp has been read."""
        self._is_complete = True
        """Whether the latest look missed nothing."""

    @property
    def members(self) -> Mapping[str, RecordT]:
        """Those that it saw when it last looked."""
        return self._members

    def has_changed(self, members: Mapping[str, RecordT] | None) -> bool:
        """Look, and say whether the members are others than those."""
        return self.read() is not members

    def read(self) -> Mapping[str, RecordT]:
        """The members now: the same object as before if nothing has changed."""
        # Files are only ever put in place, so what is in a folder changes with its stamp.
        stamp, now = _stamp_at(self._folder), self._clock()
        if stamp != self._stamp:
            self._stamp, self._stamped_at, self._is_read = stamp, now, False
        if not (self._is_read and self._are_all_owned):
            members = self._read()
            is_settled = now - self._stamped_at >= _STAMP_TICK_S
            self._is_read = stamp is not None and is_settled and self._is_complete
            if members != self._members:
                self._members = members
        return self._members

    @property
    def _are_all_owned(self) -> bool:
        return all(_is_owned(seen.fd) for seen in self._seen.values())

    def _read(self) -> Mapping[str, RecordT]:
        self._is_complete = True
        try:
            names = [n for n in sorted(os.listdir(self._folder)) if n.endswith(_SUFFIX)]
            self._is_readable = True
        except FileNotFoundError:
            names = []  # Nobody has registered yet, or somebody swept; known owners show by locks.
        except OSError as error:
            names = []
            self._is_complete = False
            if self._is_readable:
                _log.warning("discovery not readable", path=str(self._folder), error=str(error))
            self._is_readable = False
        ids = [name.removesuffix(_SUFFIX) for name in names]
        self._ignored = {i: self._ignored[i] for i in ids if i in self._ignored}
        for instance_id in ids:
            self._look(instance_id)
        for instance_id, seen in list(self._seen.items()):
            if not _is_owned(seen.fd):
                # Its owner may have put a newer file in place since we looked.
                self._look(instance_id)
                if (now := self._seen[instance_id]) is seen or not _is_owned(now.fd):
                    self._forget(instance_id)
        return MappingProxyType({i: self._seen[i].record for i in sorted(self._seen)})

    def close(self) -> None:
        for instance_id in list(self._seen):
            self._forget(instance_id)

    def _look(self, instance_id: str) -> None:
        """Read the file of an instance if it changed; keep it if owned and not outdated."""
        path = _path(self._folder, instance_id)
        stamp = _stamp_at(path)
        old = self._seen.get(instance_id)
        if stamp in (None, old and old.stamp, self._ignored.get(instance_id)):
            return
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._is_complete = False  # No descriptor is left, perhaps.
            return
        try:
            stamp = _stamp(os.fstat(fd))
            if not _is_owned(fd):
                self._ignored[instance_id] = stamp
                return
            record, incarnation = _parse(
                self._kind, instance_id, os.read(fd, _RECORD_BYTES_MAX + 1)
            )
            if incarnation < self._highest.get(instance_id, 0):
                self._ignored[instance_id] = stamp
                return
            if old:
                os.close(old.fd)
            self._highest[instance_id] = incarnation
            self._seen[instance_id] = _Seen(fd, stamp, incarnation, record)
            fd = -1  # Kept.
        except (ValueError, UnbrokenError, OSError) as error:
            self._ignored[instance_id] = stamp
            _log.warning("record skipped", path=str(path), error=str(error))
        finally:
            if fd >= 0:
                os.close(fd)

    def _forget(self, instance_id: str) -> None:
        os.close(self._seen.pop(instance_id).fd)


@asynccontextmanager
async def _exclusive(folder: Path) -> AsyncGenerator[None, None]:
    """Keep others from changing `folder`, for a moment. Creates it.

    Raises UnbrokenError if somebody else (stopped, perhaps) holds it for seconds.
    """
    os.makedirs(folder, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _LOCK_WAIT_S_MAX
        while not _lock(fd):
            if loop.time() > give_up_at:
                raise UnbrokenError(
                    Reason.UNREACHABLE,
                    f"expected {folder} to be free, got a lock on it for seconds",
                )
            await asyncio.sleep(_LOCK_RETRY_S)
        yield
    finally:
        os.close(fd)


def _path(folder: Path, instance_id: str) -> Path:
    return folder / f"{instance_id}{_SUFFIX}"


def _highest_in(folder: Path) -> int:
    """The highest incarnation that has registered in the folder; 0 if that is not known."""
    try:
        with (folder / _HIGHEST).open("rb") as file:
            highest = int(file.read(_HIGHEST_BYTES_MAX))
    except (OSError, ValueError):
        return 0
    return highest if 0 < highest < _INCARNATION_MAX else 0


def _note_highest(folder: Path, incarnation: int) -> None:
    """Remember an incarnation beyond the life of its record. The folder is ours."""
    if incarnation <= _highest_in(folder):
        return
    path = folder / _HIGHEST
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        temporary.write_text(f"{incarnation}")
        temporary.rename(path)
    except OSError as error:  # It is needed only if a clock is set back.
        _log.warning("highest incarnation not noted", path=str(path), error=str(error))


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _stamp_at(path: Path) -> _Stamp | None:
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def _parse(kind: Kind[RecordT], instance_id: str, text: bytes) -> tuple[RecordT, int]:
    """The record in a file, and its incarnation. Raises ValueError or UnbrokenError."""
    if len(text) > _RECORD_BYTES_MAX:
        raise ValueError(f"expected at most {_RECORD_BYTES_MAX} bytes")
    try:
        record = json_format.Parse(text, kind.record_type(), ignore_unknown_fields=True)
    except (json_format.ParseError, RecursionError) as error:
        raise ValueError(str(error)) from error
    seen_id, incarnation = kind.checked_identity(record)
    if seen_id != instance_id:
        raise ValueError(f"expected the record of {instance_id}, got that of {seen_id}")
    return record, incarnation


def _incarnation_at(kind: Kind[Any], path: Path) -> int:
    """Incarnation of the record there; 0 if there is none."""
    try:
        with path.open("rb") as file:
            return _parse(kind, path.name.removesuffix(_SUFFIX), file.read(_RECORD_BYTES_MAX + 1))[
                1
            ]
    except (OSError, ValueError, UnbrokenError):
        return 0


# struct flock of Linux: type, whence, start, length (0: all), pid (0 for locks of descriptors).
_FLOCK: Final = struct.Struct("hhqqi4x")


def _lock(fd: int) -> bool:
    """Lock the whole file for as long as this opening of it exists; False if it is locked."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with suppress(BlockingIOError, PermissionError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        return True
    return False


def _is_owned(fd: int) -> bool:
    """Whether somebody holds the lock through another opening of the file."""
    question = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    except OSError:
        return True  # No evidence of a death.
    return _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK


def _is_owned_at(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _is_owned(fd)
    finally:
        os.close(fd)
