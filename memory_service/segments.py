"""Decides which version of a segment may be written, read and adopted, and when it is freed.

    weights  BUILDING ──seal──▶ SEALED ──newer one sealed──▶ RETIRED ──last reader left──▶ freed
    pool     BUILDING ──freeze──▶ LIVE ──owner lost──▶ FENCING ──quiet──▶ ADOPTABLE ──adopt──▶ LIVE
                                                          └──given up──▶ QUARANTINED ──gone──▶ freed
    scratch  BUILDING ──owner quiet──▶ freed

A new version is built beside the one that is read and takes its place when it is sealed. So a
writer that dies leaves everything as it was, and nobody loses what he has mapped. Of what a dead
owner had, nothing is freed or given to another before it is proved that it writes no more
(`fencing`).

An epoch numbers one ownership. Whoever has an older one than the segment has lost it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from memory_service.accounts import HOST, Device
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.checksums import Algorithm


class SegmentClass(IntEnum):
    """As in the contract."""

    WEIGHTS = 1
    KV_POOL = 2
    KV_STORE = 3
    SCRATCH = 4


class State(IntEnum):
    """As `SegmentState` of the contract."""

    BUILDING = 1
    SEALED = 2
    LIVE = 3
    FENCING = 4
    ADOPTABLE = 5
    QUARANTINED = 6
    RETIRED = 7


ADOPT_RETRY_S = 0.005
"""When to ask again for a pool whose owner is not proved dead: with a GPU, 20 to 100 ms."""


@dataclass(slots=True, eq=False)
class Version:
    """One version of a segment."""

    tenant: str
    name: str
    kind: SegmentClass
    version: int
    epoch: int
    owner: int
    """Session id; 0: nobody."""
    slab_ids: tuple[int, ...]
    state: State = State.BUILDING
    layout: bytes = b""
    checksums: tuple[int, ...] = ()
    algorithm: Algorithm = Algorithm.XXH3
    """Of the checksums."""
    device: Device = HOST
    readers: set[int] = field(default_factory=set[int])
    adoptable_since: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} (version {self.version}, {self.state.name.lower()})"


class Segments:
    """All versions of all segments.

    Attributes:
        changed: Versions whose state or owner changed since somebody cleared this.
        freed: Versions that are gone since somebody cleared this.
    """

    def __init__(self) -> None:
        self._versions: dict[tuple[str, str], list[Version]] = {}
        self.changed: list[Version] = []
        self.freed: list[Version] = []

    def __iter__(self) -> Iterator[Version]:
        for key in sorted(self._versions):
            yield from self._versions[key]

    def restore(self, version: Version) -> None:
        """What an earlier life of the service knew."""
        versions = self._versions.setdefault((version.tenant, version.name), [])
        versions.append(version)
        versions.sort(key=lambda one: one.version)

    def check_begin(self, session: int, tenant: str, name: str, kind: SegmentClass) -> None:
        """Raise unless this session may begin a version now."""
        for other in self._of(tenant, name):
            if other.kind is not kind:
                raise UnbrokenError(
                    Reason.SEGMENT_BUSY,
                    f"expected a {kind.name} segment, {other} is {other.kind.name}",
                )
            if other.state in (State.BUILDING, State.LIVE) and other.owner != session:
                raise UnbrokenError(
                    Reason.SEGMENT_BUSY,
                    f"expected nobody to write, session {other.owner} owns {other}",
                    metadata={"epoch": str(other.epoch)},
                )

    def begin(self, version: Version) -> None:
        """Add a version, some time after `check_begin`. An older pool cannot be adopted any more.

        What the same owner had begun is given up: it may not have heard of it. Raises SEGMENT_BUSY
        if another began one since then.
        """
        self.check_begin(version.owner, version.tenant, version.name, version.kind)
        versions = self._of(version.tenant, version.name)
        if any(other.epoch > version.epoch for other in versions):
            raise UnbrokenError(
                Reason.SEGMENT_BUSY, f"expected nobody to begin another version of {version.name}"
            )
        for other in self.superseded(version.owner, version.tenant, version.name):
            self._free(other)
        for other in list(self._of(version.tenant, version.name)):
            if other.state is State.FENCING:
                self._move(other, State.QUARANTINED)
        self._versions.setdefault((version.tenant, version.name), []).append(version)
        self.changed.append(version)

    def superseded(self, session: int, tenant: str, name: str) -> list[Version]:
        """What is freed once this session begins a new version."""
        return [
            other
            for other in self._of(tenant, name)
            if other.state is State.ADOPTABLE or other.owner == session
        ]

    def owned(self, session: int, tenant: str, name: str, epoch: int) -> Version:
        """The version that this session owns under this epoch. Raises FENCED if it does not."""
        versions = self._of(tenant, name)
        for version in versions:
            if version.epoch == epoch and version.owner == session:
                return version
        if not versions:
            raise _not_found(name)
        highest = max(version.epoch for version in versions)
        raise UnbrokenError(
            Reason.FENCED,
            f"expected the owner of {name}, got session {session} with epoch {epoch}",
            metadata={"epoch": str(highest)},
        )

    def check_seal(self, session: int, tenant: str, name: str, epoch: int) -> Version:
        """The version that may be sealed, or was, should its writer not have heard of it."""
        for version in self._of(tenant, name):
            if version.epoch == epoch and version.state is State.SEALED:
                return version
        version = self.owned(session, tenant, name, epoch)
        if version.kind is not SegmentClass.WEIGHTS or version.state is not State.BUILDING:
            raise UnbrokenError(
                Reason.SEGMENT_BUSY, f"expected weights that are being built, got {version}"
            )
        return version

    def seal(
        self,
        version: Version,
        checksums: tuple[int, ...],
        layout: bytes,
        algorithm: Algorithm = Algorithm.XXH3,
    ) -> None:
        """Make it the newest, after `check_seal`; nothing writes to it any more."""
        if version.state is State.SEALED:
            return
        assert version.state is State.BUILDING, "checked before"
        assert len(checksums) == len(version.slab_ids), "one for each slab"
        version.checksums, version.algorithm = checksums, algorithm
        version.layout, version.owner = layout, 0
        self._move(version, State.SEALED)
        for other in list(self._of(version.tenant, version.name)):
            if other is not version and other.state is State.SEALED:
                self._retire(other)

    def freeze(self, version: Version, layout: bytes) -> None:
        """Let a pool be adopted from now on."""
        if version.kind is not SegmentClass.KV_POOL or version.state is not State.BUILDING:
            raise UnbrokenError(
                Reason.SEGMENT_BUSY, f"expected a pool that is being built, got {version}"
            )
        version.layout = layout
        self._move(version, State.LIVE)

    def check_attach(self, session: int, tenant: str, name: str, number: int) -> Version:
        """The version that this session may read; 0: the newest that can be."""
        readable = (State.SEALED, State.RETIRED, State.LIVE, State.FENCING, State.ADOPTABLE)
        versions = self._of(tenant, name)
        for version in reversed(versions):
            if version.state not in readable or (number and version.version != number):
                continue
            if not number and version.state is State.RETIRED:
                continue
            if version.owner == session:
                raise UnbrokenError(Reason.SEGMENT_BUSY, f"{version} is the session's own")
            return version
        raise _not_found(name, number)

    def reattach(self, session: int, tenant: str, numbers: Collection[int]) -> list[Version]:
        """Note a reader that has these mapped already; returns those that are there."""
        readable = (State.SEALED, State.RETIRED, State.LIVE, State.FENCING, State.ADOPTABLE)
        found = [
            version
            for version in self
            if version.version in numbers
            and (version.tenant, version.state in readable) == (tenant, True)
            and version.owner != session
        ]
        for version in found:
            version.readers.add(session)
        return found

    def attached(self, session: int) -> list[Version]:
        """What a session reads."""
        return [version for version in self if session in version.readers]

    def release(self, session: int, tenant: str, name: str, number: int) -> Version:
        """Give up what a session has: as owner, or else as reader. Without a name, by number."""
        for version in self._of(tenant, name) if name else list(self):
            if (version.tenant, version.version) != (tenant, number):
                continue
            if version.owner == session:
                self._free(version)
                return version
            if session in version.readers:
                self.detach(version, session)
                return version
        raise _not_found(name, number)

    def check_adopt(self, session: int, tenant: str, name: str, expected_epoch: int) -> Version:
        """The pool that may be adopted, as far as its own state goes.

        The session's own is given again: it may not have heard of it.
        """
        versions = [one for one in self._of(tenant, name) if one.kind is SegmentClass.KV_POOL]
        if not versions:
            raise _not_found(name)
        version = versions[-1]
        if version.owner == session and version.state is State.LIVE:
            return version
        if expected_epoch not in (0, version.epoch):
            raise UnbrokenError(
                Reason.FENCED,
                f"expected epoch {expected_epoch} of {name}, it is {version.epoch}",
                metadata={"epoch": str(version.epoch)},
            )
        match version.state:
            case State.ADOPTABLE:
                return version
            case State.FENCING | State.LIVE:
                raise not_fenced(version)
            case State.QUARANTINED:
                raise UnbrokenError(
                    Reason.QUARANTINED, f"expected proof that its owner is dead, {version}"
                )
            case _:
                raise _not_found(name)

    def adopt(self, version: Version, session: int, epoch: int) -> None:
        """Give it to this session, after `check_adopt`."""
        assert version.state is State.ADOPTABLE, "checked before"
        assert epoch > version.epoch, "epochs grow"
        version.owner, version.epoch = session, epoch
        version.readers.discard(session)
        self._move(version, State.LIVE)

    def refuse(self, version: Version) -> None:
        """Nobody may ever adopt it: another rank of its cohort cannot be."""
        if version.state is State.ADOPTABLE:
            self._free(version)
        elif version.state is State.FENCING:
            self._move(version, State.QUARANTINED)

    def owner_lost(self, session: int) -> None:
        """The owner seems dead: who wants its pools has to wait."""
        for version in self._owned_by(session):
            if version.state is State.LIVE:
                self._move(version, State.FENCING)

    def owner_back(self, session: int) -> None:
        """It is alive after all."""
        for version in self._owned_by(session):
            if version.state is State.FENCING:
                self._move(version, State.LIVE)

    def owner_quiet(self, session: int, now: float) -> None:
        """It is proved to write no more."""
        for version in self._owned_by(session):
            if version.state is State.FENCING:
                version.adoptable_since = now
                self._move(version, State.ADOPTABLE)
            elif version.state in (State.BUILDING, State.QUARANTINED):
                self._free(version)

    def owner_given_up(self, session: int) -> None:
        """There is no proof that it writes no more, and there may never be."""
        for version in self._owned_by(session):
            if version.state in (State.BUILDING, State.FENCING):
                self._move(version, State.QUARANTINED)

    def owner_ended(self, session: int) -> None:
        """It ended in order: nobody is to succeed it."""
        for version in self._owned_by(session):
            self._free(version)

    def reader_lost(self, session: int) -> None:
        """Forget what it had attached: its mappings keep what they map."""
        for version in self.attached(session):
            self.detach(version, session)

    def expire(self, now: float, grace_s: float) -> None:
        """Free the pools that nobody adopted in time."""
        for version in list(self):
            if version.state is State.ADOPTABLE and now - version.adoptable_since >= grace_s:
                self._free(version)

    def evict(self, tenant: str, name: str) -> list[Version]:
        """Free what nobody uses of a segment: sealed without readers, or waiting for adoption."""
        freed = [
            version
            for version in self._of(tenant, name)
            if version.state is State.ADOPTABLE
            or (version.state is State.SEALED and not version.readers)
        ]
        for version in freed:
            self._free(version)
        return freed

    def lose(self, version: Version) -> None:
        """Its bytes are wrong: nobody new may read them."""
        self._free(version)

    def check(self) -> None:
        """What is always true."""
        for key, versions in self._versions.items():
            assert versions, "no empty lists"
            numbers = [version.version for version in versions]
            assert numbers == sorted(set(numbers)), "versions grow"
            assert len({version.epoch for version in versions}) == len(versions), "own epochs"
            assert sum(one.state is State.SEALED for one in versions) <= 1, "one is the newest"
            assert sum(one.state in (State.BUILDING, State.LIVE) for one in versions) <= 1, (
                "one writer"
            )
            for version in versions:
                assert (version.tenant, version.name) == key
                assert version.state is not State.RETIRED or version.readers, "kept for readers"
                immutable = version.state in (State.SEALED, State.RETIRED)
                assert immutable == (version.owner == 0), "who owns it"

    def owned_by(self, session: int) -> list[Version]:
        """What a session owns, dead or alive."""
        return self._owned_by(session)

    def _of(self, tenant: str, name: str) -> list[Version]:
        return self._versions.get((tenant, name), [])

    def _owned_by(self, session: int) -> list[Version]:
        return [version for version in self if version.owner == session]

    def detach(self, version: Version, session: int) -> None:
        """A reader lets it go."""
        version.readers.discard(session)
        if version.state is State.RETIRED and not version.readers:
            self._free(version)

    def _retire(self, version: Version) -> None:
        if version.readers:
            self._move(version, State.RETIRED)
        else:
            self._free(version)

    def _move(self, version: Version, state: State) -> None:
        version.state = state
        self.changed.append(version)

    def _free(self, version: Version) -> None:
        versions = self._of(version.tenant, version.name)
        versions.remove(version)
        if not versions:
            del self._versions[version.tenant, version.name]
        self.freed.append(version)


def not_fenced(version: Version) -> UnbrokenError:
    """Its owner, or another of the cohort, is not proved dead."""
    return UnbrokenError(
        Reason.NOT_FENCED,
        f"expected its owner to be dead, {version} is of session {version.owner}",
        retry_after_s=ADOPT_RETRY_S,
    )


def _not_found(name: str, number: int = 0) -> UnbrokenError:
    what = f"version {number} of {name}" if number else name
    return UnbrokenError(Reason.SEGMENT_NOT_FOUND, f"expected a segment, there is no {what[:240]}")
