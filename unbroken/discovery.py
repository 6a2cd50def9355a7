"""Who is in the mesh: what workers and frontends publish about themselves, and who watches it.

Losing discovery is never harmful (static stability): a watcher keeps the last membership it knew
until there is evidence against a member. Whether a member works is for the data plane to find out.
"""

import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from unbroken.errors import InvalidField
from unbroken.v1 import worker_pb2 as pb

INSTANCE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What names of workers and frontends look like."""

SettingT = TypeVar("SettingT", bound=pb.ThresholdsRecord)
RecordT = TypeVar("RecordT", pb.WorkerRecord, pb.FrontendRecord)
_RecordT_contra = TypeVar("_RecordT_contra", pb.WorkerRecord, pb.FrontendRecord, contravariant=True)


@dataclass(frozen=True, slots=True)
class Kind(Generic[RecordT]):
    """A kind of instances: where their records are kept and how to read them."""

    name: str
    record_type: type[RecordT]
    identity: Callable[[RecordT], tuple[str, int]]
    """Id and incarnation of a record."""

    def checked_identity(self, record: RecordT) -> tuple[str, int]:
        """Id and incarnation; raises `InvalidField` if they are not what the contract allows."""
        instance_id, incarnation = self.identity(record)
        if not INSTANCE_ID.fullmatch(instance_id):
            raise InvalidField("record id", "1 to 128 of [A-Za-z0-9._-]", instance_id)
        if incarnation == 0:
            raise InvalidField("record incarnation", "microseconds since 1970", incarnation)
        return instance_id, incarnation


WORKERS: Final = Kind(
    "workers",
    pb.WorkerRecord,
    lambda record: (record.identity.worker_id, record.identity.incarnation),
)
FRONTENDS: Final = Kind(
    "frontends", pb.FrontendRecord, lambda record: (record.frontend_id, record.incarnation)
)


@dataclass(frozen=True, slots=True)
class Setting(Generic[SettingT]):
    """A record that the whole mesh shares and that outlives its processes.

    It has a version, which grows by one with every change.
    """

    name: str
    record_type: type[SettingT]


THRESHOLDS: Final = Setting("thresholds", pb.ThresholdsRecord)


class Registration(Protocol[_RecordT_contra]):
    """One life of one instance in the mesh. It ends with `close` or with the process."""

    async def update(self, record: _RecordT_contra) -> None:
        """Publish `record` instead; raises FENCED if a newer incarnation has taken the id.

        Id and incarnation stay as they were.
        """
        ...

    async def close(self) -> None:
        """Leave the mesh. Idempotent."""
        ...


class Discovery(Protocol):
    """Where instances find each other."""

    async def new_incarnation(self, kind: Kind[Any], instance_id: str) -> int:
        """A number for a new life of the instance, above those of its earlier lives."""
        ...

    async def register(self, kind: Kind[RecordT], record: RecordT) -> Registration[RecordT]:
        """Join the mesh.

        Takes over the id from lower incarnations; raises FENCED if a higher one, or a living one of
        the same number, has it.
        """
        ...

    async def snapshot(self, kind: Kind[RecordT]) -> Mapping[str, RecordT]:
        """The members now, by id."""
        ...

    def watch(self, kind: Kind[RecordT]) -> AsyncGenerator[Mapping[str, RecordT], None]:
        """The members now, and again whenever they change: immutable, by id, whole each time.

        Never ends and never fails. A slow reader misses what lay between. Treat records as
        read-only.
        """
        ...

    async def setting(self, setting: Setting[SettingT]) -> SettingT:
        """What is set; empty, of version 0, if nothing ever was."""
        ...

    async def change(self, setting: Setting[SettingT], record: SettingT) -> None:
        """Set it, if the record's version is above the one that is there.

        Raises VERSION_MISMATCH otherwise, `InvalidField` if the record is too large, and
        UNREACHABLE if it cannot be kept.
        """
        ...

    def watch_setting(self, setting: Setting[SettingT]) -> AsyncGenerator[SettingT, None]:
        """What is set, and again whenever that changes, as `watch`. Versions only grow."""
        ...


def connect(location: str | Path) -> Discovery:
    """The discovery at `location`: a directory that all processes of one machine share."""
    from unbroken.file_discovery import FileDiscovery

    return FileDiscovery(Path(location))


def incarnation_now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def next_incarnation(now_us: int, *, known: int) -> int:
    """The time, or more if there was a higher one: a clock can be set back between two lives."""
    return max(now_us, known + 1)
