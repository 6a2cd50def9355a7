"""Who holds which memory: everything the service decides, with no I/O.

A method is one call of a session, or one thing that was seen. It raises what the caller has to be
told, or changes what is held and leaves, in `commands`, what is to be done about it. Memory is
allocated by the shell after `plan_segment` or `plan_slab` named the slabs, which may take a while.
Then come `begin_segment` or `begin_slab`; or `abandon_segment` or `abandon_slab`, if it failed or
the caller is gone.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from memory_service import fencing, gpu_health
from memory_service.accounts import HOST, Device, Limits
from memory_service.fencing import Fence, FencePolicy, Verdict
from memory_service.gpu_health import EngineFault, GpuHealth, Health, Verify, Worsened
from memory_service.ledger import Charge, Charged, Ledger
from memory_service.news import News, NewsKind
from memory_service.segments import SegmentClass, Segments, State, Version, not_fenced
from memory_service.sessions import Peer, Session, Sessions
from memory_service.store import BlockStore, Pin, SlabState, StoreSlab
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.memory.checksums import Algorithm
from unbroken.memory.records import SLOTS_MAX, Record

SLABS_MAX = 250
"""Of a segment, or new in one answer: the kernel passes 253 descriptors in one message."""
OWNED_MAX = 1000
"""Segments of a session: the answer to its binding again lists them."""
LAYOUT_BYTES_MAX = 32 * 1024
PIN_S_MAX = 60.0
GPU_WORD_BYTES = 8
"""What a GPU computes checksums of."""
_UINT64_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Free:
    """Give the memory of a slab back."""

    slab_id: int


@dataclass(frozen=True, slots=True)
class Keep:
    """What is known of a slab changed: tell the vault."""

    slab_id: int


@dataclass(frozen=True, slots=True)
class KeepSession:
    """What is known of a session changed: tell the vault."""

    session_id: int


@dataclass(frozen=True, slots=True)
class KeepGpu:
    """A GPU is worse than it was: tell the vault."""

    device: Device


@dataclass(frozen=True, slots=True)
class ForgetSession:
    """Nothing is left of it: close its lifeline and its pidfd."""

    session_id: int


@dataclass(frozen=True, slots=True)
class SealSlab:
    """Its owner is gone: seal it and its table, then call `slab_sealed` with its records."""

    slab_id: int


@dataclass(frozen=True, slots=True)
class KillSession:
    """End the process, through its pidfd."""

    session_id: int


@dataclass(frozen=True, slots=True)
class ReadSlab:
    """It is from an earlier life of the service: call `records_read` with its records."""

    slab_id: int


Command: TypeAlias = (
    Free | Keep | KeepSession | KeepGpu | ForgetSession | SealSlab | KillSession | ReadSlab
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the service is configured for."""

    limits: Limits
    """Of the host's memory."""
    fence: FencePolicy = field(default_factory=FencePolicy)
    orphan_grace_s: float = 600.0
    """How long a pool waits to be adopted."""
    gpus: Mapping[Device, Limits] = field(default_factory=dict[Device, Limits])
    """Of the memory of each GPU."""
    slabs_max: int = 8192
    """Of all tenants: each takes two descriptors at most."""


class Holdings:
    """All memory, and all who hold it.

    Attributes:
        commands: What the shell has yet to do, in order.
        ledger: What every slab is charged for.
    """

    def __init__(self, policy: Policy, boot_token: int) -> None:
        self.policy = policy
        self.boot_token = boot_token
        self.sessions = Sessions(policy.fence)
        self.segments = Segments()
        self.store = BlockStore()
        self.ledger = Ledger({HOST: policy.limits, **policy.gpus}, slabs_max=policy.slabs_max)
        self.gpus = {device: GpuHealth() for device in policy.gpus}
        self.gpu_entries: dict[Device, int] = {}
        """Of those that are in trouble: the numbers under which the vault knows them."""
        self._absent_owners: set[int] = set()
        self.news = News()
        self.commands: list[Command] = []
        self.num_corrupt = 0
        self.num_stale = 0
        self._highest = 0

    # Sessions.

    def check_boot(self, boot_token: int) -> None:
        """Raise unless the caller means this life of the service."""
        if boot_token != self.boot_token:
            self.num_stale += 1
            raise UnbrokenError(
                Reason.STALE_HANDLE,
                f"expected boot token {self.boot_token:016x}, got {boot_token:016x}",
                metadata={"what": "boot_token", "boot_token": str(self.boot_token)},
            )

    def bind(self, peer: Peer, secret: bytes, wall_us: int) -> Session:
        """A process that has no session yet."""
        if not 0 <= peer.rank < max(1, peer.num_ranks) or peer.num_ranks > 1024:
            raise InvalidField("rank", "a rank below num_ranks, 1024 at most", peer.rank)
        session = self.sessions.add(self._next(wall_us), peer, secret)
        self.commands.append(KeepSession(session.session_id))
        self._tell_session(NewsKind.SESSION_BOUND, session)
        return session

    def rebind(
        self,
        session_id: int,
        peer: Peer,
        secret: bytes,
        now: float,
        *,
        attached: Collection[int] = (),
        mapped: Collection[int] = (),
    ) -> Session | None:
        """A process that goes on; None if its session is over. Its records have to be read anew.

        `attached` and `mapped` are the versions and slabs that it says it has mapped for reading.
        """
        session = self.sessions.rebind(session_id, peer, secret)
        if session is not None and session.is_connected:  # It knows before we do.
            self.seen(session_id, fencing.ConnectionLost(), now)
            session = self.sessions.get(session_id)
        if session is None:
            return None
        session.fence.handle(fencing.Connected(), now)
        session.is_connected = True
        self.segments.owner_back(session_id)
        # What it does not name it never heard of, or has let go.
        for version in list(self.segments):
            if session_id in version.readers and version.version not in attached:
                self._detach(session, version)
        known = self.ledger.mappings.of(session_id)
        self.ledger.mappings.unmapped(
            session_id,
            [
                slab.slab_id
                for slab in self.store
                if slab.slab_id in known and slab.slab_id not in mapped and slab.owner != session_id
            ],
        )
        self._reads(session, attached, mapped)
        self._tell_session(NewsKind.SESSION_BOUND, session)
        self._settle()
        return session

    def succeed(
        self,
        session: Session,
        old_id: int,
        secret: bytes,
        *,
        attached: Collection[int],
        mapped: Collection[int],
    ) -> None:
        """A process that is bound anew, since its old session is over, says what it has mapped."""
        old = self.sessions.given_up(old_id, session.peer, secret)
        if old is not None:
            owned = {slab.slab_id for slab in self.store.owned_by(old_id)}
            for version in self.segments.owned_by(old_id):
                owned.update(version.slab_ids)
            moved = self.ledger.mappings.of(old_id) - owned
            self.ledger.mappings.given(session.session_id, moved)
            self.ledger.mappings.unmapped(old_id, moved)
        self._reads(session, attached, mapped)
        self._settle()

    def _reads(self, session: Session, attached: Collection[int], mapped: Collection[int]) -> None:
        """A process that binds has these versions and slabs mapped, as far as they are there."""
        session_id, tenant = session.session_id, session.peer.tenant
        for version in self.segments.reattach(session_id, tenant, attached):
            self.ledger.mappings.given(session_id, version.slab_ids)
        session.shown.clear()
        session.freed.clear()
        for slab_id in mapped:
            slab = self.store.get_slab(slab_id)
            if slab is None or slab.tenant != tenant:
                session.freed.append(slab_id)
            else:
                session.shown.add(slab_id)
        self.ledger.mappings.given(session_id, session.shown)
        session.shown.update(slab.slab_id for slab in self.store.owned_by(session_id))

    def unmapped(self, session: Session, slab_ids: Iterable[int]) -> None:
        """It says that it has nothing of these slabs mapped; of those it writes to, it has."""
        owned = {slab.slab_id for slab in self.store.owned_by(session.session_id)}
        gone = set(slab_ids) - owned
        session.shown -= gone
        self.ledger.mappings.unmapped(session.session_id, gone)
        self._settle()

    def unbind(self, session: Session) -> None:
        """It ends in order, and has nothing mapped."""
        session_id = session.session_id
        self.store.unpin_all(session_id)
        self.segments.reader_lost(session_id)
        self.segments.owner_ended(session_id)
        self._seal_owned(session)
        self.ledger.mappings.ended(session_id)
        self._settle()

    def seen(self, session_id: int, event: fencing.Event, now: float) -> None:
        """Something was noticed about a process. Late news of one that is forgotten is dropped."""
        session = self.sessions.get(session_id)
        if session is None:
            return
        if isinstance(event, fencing.ConnectionLost):
            session.is_connected = False
            session.shown.clear()
            session.freed.clear()
        self._obey(session, session.fence.handle(event, now), now)

    def deadline(self) -> float | None:
        """When `handle_timeout` has something to do."""
        due = [session.fence.deadline() for session in self.sessions]
        due.append(self.store.next_expiry())
        due += [
            version.adoptable_since + self.policy.orphan_grace_s
            for version in self.segments
            if version.state is State.ADOPTABLE
        ]
        return min((at for at in due if at is not None), default=None)

    def handle_timeout(self, now: float) -> None:
        """Time has passed."""
        for session in list(self.sessions):
            self._obey(session, session.fence.handle_timeout(now), now)
        self.store.expire(now)
        self.segments.expire(now, self.policy.orphan_grace_s)
        self._settle()

    # GPUs.

    def gpu_seen(self, uuid: str, event: gpu_health.Event, now: float) -> None:
        """The driver told something of a GPU. What it makes doubtful, nobody new gets."""
        for device, gpu in self.gpus.items():
            if device.uuid != uuid:
                continue
            for command in gpu.handle(event, now):
                match command:
                    case EngineFault(xid=xid):
                        self.news.add(NewsKind.GPU_FAULT, value=xid, device=uuid)
                    case Verify():
                        self.news.add(NewsKind.GPU_VERIFY, device=uuid)
                    case Worsened(health=health):
                        self.news.add(NewsKind.GPU_HEALTH, value=int(health), device=uuid)
                        self.gpu_entries.setdefault(device, self._next(0))
                        self.commands.append(KeepGpu(device))
                        if health >= Health.TAINTED:
                            self._give_up(device, with_owned=health is Health.LOST)
        self._settle()

    def health_of(self, device: Device) -> Health:
        """How a memory is; the host's is healthy as long as anybody can say so."""
        gpu = self.gpus.get(device)
        return Health.HEALTHY if gpu is None else gpu.health

    def _check_health(self, device: Device, worst: Health) -> None:
        """Raise if a memory is worse than that."""
        if (health := self.health_of(device)) > worst:
            raise UnbrokenError(
                Reason.GPU_FAILED,
                f"expected a GPU that is {worst.name} at worst, {device} is {health.name}",
                metadata={"device": device.uuid, "health": health.name},
            )

    def _sound(
        self, slab: StoreSlab, records: Iterable[tuple[int, Record | None]]
    ) -> list[tuple[int, Record | None]]:
        """The records; none of a memory whose bytes may be wrong."""
        is_sound = self.health_of(slab.device) < Health.TAINTED
        return [(slot, record if is_sound else None) for slot, record in records]

    def _give_up(self, device: Device, *, with_owned: bool) -> None:
        """Free what is in a memory; or else what nobody has to himself."""
        owned = (State.BUILDING, State.LIVE, State.FENCING, State.QUARANTINED)
        for version in list(self.segments):
            if version.device == device and (with_owned or version.state not in owned):
                self.segments.lose(version)
        for block in list(self.store.blocks()):
            if block.slab.device == device:
                self.store.drop(block.slab.slab_id, block.slot, block.generation)

    # Segments.

    def plan_segment(
        self,
        session: Session,
        name: str,
        kind: SegmentClass,
        slab_bytes: Sequence[int],
        wall_us: int,
        device: Device = HOST,
    ) -> Version:
        """Name the slabs of a new version; the caller allocates them, and then begins it."""
        if kind is SegmentClass.KV_STORE:
            raise InvalidField("segment_class", "WEIGHTS, KV_POOL or SCRATCH", kind.name)
        if not 1 <= len(slab_bytes) <= SLABS_MAX:
            raise InvalidField("slab_bytes", f"1 to {SLABS_MAX} slabs", len(slab_bytes))
        for size in slab_bytes:
            if size <= 0 or size % device.page_bytes:
                raise InvalidField("slab_bytes", f"multiples of {device.page_bytes}", size)
        self._check_health(device, Health.HEALTHY)
        tenant = session.peer.tenant
        self.segments.check_begin(session.session_id, tenant, name, kind)
        if len(self.segments.owned_by(session.session_id)) >= OWNED_MAX:
            raise InvalidField("name", f"at most {OWNED_MAX} segments of a session", name)
        self.ledger.check_number(len(slab_bytes))
        wanted = Charge(device, sum(slab_bytes))
        try:
            self._make_room(tenant, [wanted])
        except UnbrokenError:
            self._give_up_superseded(session, name, wanted)
        slab_ids = tuple(self._next(wall_us) for _ in slab_bytes)
        epoch = self._next(wall_us)
        for slab_id, size in zip(slab_ids, slab_bytes, strict=True):
            self.ledger.charge(slab_id, tenant, [Charge(device, size)])
        return Version(
            tenant, name, kind, epoch, epoch, session.session_id, slab_ids, device=device
        )

    def begin_segment(self, version: Version) -> None:
        """Its slabs are allocated: it takes the place of what it supersedes.

        Raises SEGMENT_BUSY if another began one meanwhile, and GPU_FAILED.
        """
        self._check_health(version.device, Health.HEALTHY)
        self.segments.begin(version)
        self.ledger.mappings.given(version.owner, version.slab_ids)
        self._settle()

    def abandon_segment(self, version: Version) -> None:
        """Its slabs could not be allocated, and it was not begun."""
        for slab_id in version.slab_ids:
            self._drop(slab_id)
        self._settle()

    def _give_up_superseded(self, session: Session, name: str, wanted: Charge) -> None:
        """Free what a new version takes the place of, if there is no room for both.

        Raises MEMORY_EXHAUSTED, with nothing freed, if there would not be room for one either.
        """
        tenant = session.peer.tenant
        old = [
            version
            for version in self.segments.superseded(session.session_id, tenant, name)
            if not any(map(self.ledger.mappings.is_mapped, version.slab_ids))
        ]
        gain = sum(
            self.ledger.size_of(slab_id, wanted.device)
            for version in old
            for slab_id in version.slab_ids
        )
        accounts = self.ledger.accounts[wanted.device]
        if max(accounts.missing(tenant, wanted.num_bytes)) > gain:
            accounts.charge(tenant, wanted.num_bytes)  # Says what is missing.
        for version in old:
            self.segments.lose(version)
        self._settle()

    def check_seal(
        self,
        session: Session,
        name: str,
        epoch: int,
        checksums: Sequence[int],
        layout: bytes,
        algorithm: Algorithm = Algorithm.XXH3,
    ) -> Version:
        """The version whose slabs the caller now seals and compares with `checksums`."""
        version = self.segments.check_seal(session.session_id, session.peer.tenant, name, epoch)
        self._check_health(version.device, Health.DRAINING)
        _check_layout(layout)
        if version.device != HOST and algorithm is not Algorithm.MLH64:
            # Only its readers can compare it, on the GPU.
            raise InvalidField("checksum_algorithm", "MLH64 for a GPU's memory", algorithm.name)
        if len(checksums) != len(version.slab_ids):
            raise InvalidField("checksums", f"{len(version.slab_ids)} of them", len(checksums))
        return version

    def seal_segment(
        self,
        session: Session,
        name: str,
        epoch: int,
        checksums: Sequence[int],
        layout: bytes,
        algorithm: Algorithm = Algorithm.XXH3,
    ) -> Version:
        """Its bytes are what the writer meant, and nobody can change them: publish it."""
        version = self.check_seal(session, name, epoch, checksums, layout, algorithm)
        self.segments.seal(version, tuple(checksums), layout, algorithm)
        self.ledger.mappings.unmapped(session.session_id, version.slab_ids)
        self._settle()
        return version

    def freeze_pool(self, session: Session, name: str, epoch: int, layout: bytes) -> None:
        """Its owner can be succeeded from now on."""
        _check_layout(layout)
        version = self.segments.owned(session.session_id, session.peer.tenant, name, epoch)
        self.segments.freeze(version, layout)
        self._settle()

    def check_attach(self, session: Session, name: str, number: int) -> Version:
        """The version that the caller now gets descriptors of."""
        version = self.segments.check_attach(session.session_id, session.peer.tenant, name, number)
        self._check_health(version.device, Health.DRAINING)
        return version

    def attach_segment(self, session: Session, name: str, number: int) -> Version:
        """A reader, or a standby, has them."""
        version = self.check_attach(session, name, number)
        version.readers.add(session.session_id)
        self.ledger.mappings.given(session.session_id, version.slab_ids)
        return version

    def adopt_pool(self, session: Session, name: str, expected_epoch: int, wall_us: int) -> Version:
        """Give a dead owner's pool to this session, if all ranks of its cohort are dead."""
        tenant = session.peer.tenant
        version = self.segments.check_adopt(session.session_id, tenant, name, expected_epoch)
        if version.owner == session.session_id:
            return version  # It was given before.
        self._check_health(version.device, Health.DRAINING)
        owner = self.sessions.get(version.owner)
        verdict = Verdict.REFUSE if owner is None else self.sessions.judge(owner)
        if verdict is Verdict.WAIT:
            raise not_fenced(version)
        if verdict is Verdict.REFUSE:
            self._refuse(version)
            self._settle()
            raise UnbrokenError(
                Reason.QUARANTINED, f"expected all ranks of its cohort to agree, {version}"
            )
        self.segments.adopt(version, session.session_id, self._next(wall_us))
        self.ledger.mappings.given(session.session_id, version.slab_ids)
        self._settle()
        return version

    def release_segment(self, session: Session, name: str, number: int) -> None:
        """Its owner frees it, or a reader lets it go; it has nothing of it mapped."""
        version = self.segments.release(session.session_id, session.peer.tenant, name, number)
        self.ledger.mappings.unmapped(session.session_id, version.slab_ids)
        self._settle()

    def segment_corrupt(self, version: Version) -> None:
        """A sealed version does not match its checksums."""
        self.num_corrupt += 1
        self.news.add(
            NewsKind.CORRUPTION,
            tenant=version.tenant,
            segment=version.name,
            epoch=version.epoch,
        )
        self.segments.lose(version)
        self._settle()

    # Blocks.

    def plan_slab(
        self,
        session: Session,
        block_bytes: int,
        num_slots: int,
        wall_us: int,
        device: Device = HOST,
    ) -> StoreSlab:
        """Name a slab for blocks; the caller allocates it and its table."""
        if block_bytes <= 0:
            raise InvalidField("block_bytes", "a size", block_bytes)
        if device != HOST and block_bytes % GPU_WORD_BYTES:
            known = f"a multiple of {GPU_WORD_BYTES} on a GPU"
            raise InvalidField("block_bytes", known, block_bytes)
        if not 1 <= num_slots <= SLOTS_MAX:
            raise InvalidField("num_slots", f"1 to {SLOTS_MAX}", num_slots)
        self._check_health(device, Health.HEALTHY)
        if len(self.store.owned_by(session.session_id)) >= SLABS_MAX:
            raise InvalidField("num_slots", f"at most {SLABS_MAX} slabs of a session", num_slots)
        self.ledger.check_number(1)
        tenant, slab_id = session.peer.tenant, self._next(wall_us)
        slab = StoreSlab(
            slab_id,
            tenant,
            session.session_id,
            self._next(wall_us),
            block_bytes,
            num_slots,
            device=device,
        )
        self._make_room(tenant, _charges(slab))
        self.ledger.charge(slab_id, tenant, _charges(slab))
        return slab

    def begin_slab(self, session: Session, slab: StoreSlab) -> None:
        """It is allocated: its owner has it. Raises GPU_FAILED."""
        self._check_health(slab.device, Health.HEALTHY)
        self.store.add(slab)
        session.shown.add(slab.slab_id)
        self.ledger.mappings.given(session.session_id, [slab.slab_id])
        self.commands.append(Keep(slab.slab_id))
        self._settle()

    def abandon_slab(self, slab: StoreSlab) -> None:
        """It could not be allocated, and was not begun."""
        self._drop(slab.slab_id)
        self._settle()

    def give_up_slab(self, slab: StoreSlab) -> None:
        """Nobody can say who writes to it: nobody may find what is in it."""
        self.store.abandon(slab)
        self._settle()

    def commit(
        self,
        session: Session,
        slab_id: int,
        slots: Sequence[int],
        read: Callable[[int], Record | None],
    ) -> list[int]:
        """Take in the records of slots, of which `read` gives each; returns the free ones."""
        slab = self.store.owned(session.session_id, slab_id)
        for slot in slots:
            if not 0 <= slot < slab.num_slots:
                raise InvalidField("slots", f"below {slab.num_slots}", slot)
        return self.store.commit(slab, self._sound(slab, [(slot, read(slot)) for slot in slots]))

    def records_read(self, slab: StoreSlab, records: Iterable[tuple[int, Record | None]]) -> None:
        """All records of a slab: it is sealed, or its owner has bound again."""
        self.store.commit(slab, self._sound(slab, records))
        if slab.state is SlabState.SEALED:
            self.store.seal(slab)  # It is freed if there is nothing in it.
        self._settle()

    def get(
        self,
        session: Session,
        keys: Sequence[bytes],
        ttl_s: float,
        now: float,
        device: Device | None = None,
    ) -> tuple[Pin | None, list[StoreSlab]]:
        """Pin blocks for a reader; also the slabs whose descriptors it does not have.

        They are those of one memory, or of any (`BlockStore.find`).

        So many blocks that the descriptors fit into one packet.
        """
        if not 0 < ttl_s <= PIN_S_MAX:
            raise InvalidField("ttl", f"a time up to {PIN_S_MAX:g} s", ttl_s)
        blocks = self.store.find(session.peer.tenant, keys, device)
        new: list[StoreSlab] = []
        slabs = dict.fromkeys([block.slab for block in blocks])
        if any(slab.slab_id not in session.shown for slab in slabs):
            new = [slab for slab in slabs if slab.slab_id not in session.shown]
        if len(new) > SLABS_MAX:
            new, beyond = new[:SLABS_MAX], new[SLABS_MAX]
            blocks = list(itertools.takewhile(lambda block: block.slab is not beyond, blocks))
        pin = self.store.pin(session.session_id, blocks, now + ttl_s)
        if new:
            slab_ids = [slab.slab_id for slab in new]
            session.shown.update(slab_ids)
            self.ledger.mappings.given(session.session_id, slab_ids)
        return pin, new

    def close_slab(self, session: Session, slab_id: int) -> None:
        """Its owner gives it up."""
        slab = self.store.owned(session.session_id, slab_id)
        self.commands.append(SealSlab(slab.slab_id))

    def slab_sealed(self, slab_id: int, records: Iterable[tuple[int, Record | None]]) -> None:
        """The kernel lets nobody write to it any more, and these are its records."""
        slab = self.store.get_slab(slab_id)
        if slab is None or slab.state is SlabState.SEALED:
            return
        self.store.commit(slab, self._sound(slab, records))
        owner = self.sessions.get(slab.owner)
        if owner is not None and owner.is_connected:  # It says that it has it no longer.
            owner.shown.discard(slab_id)
            self.ledger.mappings.unmapped(owner.session_id, [slab_id])
        self.store.seal(slab)
        if self.store.get_slab(slab_id) is not None:
            self.commands.append(Keep(slab_id))
        self._settle()

    def block_corrupt(self, slab_id: int, slot: int, generation: int) -> None:
        """A block's bytes do not match its checksum: from now on it is a miss."""
        slab = self.store.get_slab(slab_id)
        if slab is not None and self.store.drop(slab_id, slot, generation):
            self.num_corrupt += 1
            self.news.add(NewsKind.CORRUPTION, tenant=slab.tenant, slab_id=slab_id, value=slot)
            self._settle()

    def evict(self, tenant: str, name: str) -> int:
        """What an operator wants freed; returns the bytes."""
        before = self.ledger.total
        if name:
            self.segments.evict(tenant, name)
        else:
            for device in self.ledger.accounts:
                self._evict(1 << 62, device, tenant)
        self._settle()
        return before - self.ledger.total

    # What an earlier life of the service knew.

    def restore_session(self, session_id: int, peer: Peer, secret: bytes, now: float) -> None:
        """It is not connected; it binds again, or it is proved dead."""
        self._highest = max(self._highest, session_id)
        session = self.sessions.add(session_id, peer, secret)
        session.is_connected = False
        session.fence.handle(fencing.ConnectionLost(), now)

    def restore_gpu(self, device: Device, health: Health, entry_id: int) -> None:
        """It was in trouble, and still is. Before its memory."""
        self._highest = max(self._highest, entry_id)
        self.gpus[device].restore(health)
        self.gpu_entries[device] = entry_id

    def restore_absent(self, owner: int, numbers: Iterable[int]) -> None:
        """There is memory of a GPU that is not there, and may be when the service starts again.

        Whoever owned it is not forgotten, and its numbers are not used again. Before the sessions.
        """
        self._absent_owners.add(owner)
        self._highest = max(self._highest, *numbers)

    def restore_version(self, version: Version, slab_bytes: Sequence[int], now: float) -> None:
        """Its slabs are all there. After the sessions."""
        self._highest = max(self._highest, version.epoch, *version.slab_ids)
        for slab_id, size in zip(version.slab_ids, slab_bytes, strict=True):
            self.ledger.restore(slab_id, version.tenant, [Charge(version.device, size)])
        version.adoptable_since = now
        if version.state is State.LIVE:
            version.state = State.FENCING
        self.segments.restore(version)
        if self.sessions.get(version.owner) is not None:
            self.ledger.mappings.given(version.owner, version.slab_ids)
        if version.state is State.RETIRED:
            self.segments.lose(version)  # Nobody can ask for it; who maps it keeps it.
        elif version.owner and self.sessions.get(version.owner) is None:
            self.segments.lose(version)  # It cannot be proved who writes there.

    def restore_slab(self, slab: StoreSlab) -> None:
        """A slab of blocks. After the sessions. Its records are read when its owner is known."""
        self._highest = max(self._highest, slab.epoch, slab.slab_id)
        self.ledger.restore(slab.slab_id, slab.tenant, _charges(slab))
        self.store.add(slab)
        if self.sessions.get(slab.owner) is not None:
            self.ledger.mappings.given(slab.owner, [slab.slab_id])

    def restored(self) -> None:
        """That was all."""
        for slab in list(self.store):
            if slab.owner and self.sessions.get(slab.owner) is None:
                self.give_up_slab(slab)  # It cannot be proved who writes there.
            elif slab.state is SlabState.SEALED:
                self.commands.append(ReadSlab(slab.slab_id))
        for device, gpu in self.gpus.items():
            if gpu.health >= Health.TAINTED:  # Not all may have been freed before.
                self._give_up(device, with_owned=gpu.health is Health.LOST)
        self._settle()

    def size_of(self, slab_id: int) -> int:
        """Bytes of a slab, records included."""
        return self.ledger.size_of(slab_id)

    def check(self) -> None:
        """What is always true."""
        self.segments.check()
        self.store.check()
        slabs = {slab.slab_id: Charged(slab.tenant, _charges(slab)) for slab in self.store}
        for version in self.segments:
            for slab_id in version.slab_ids:
                assert slab_id not in slabs, "every slab is somewhere, once"
                charge = Charge(version.device, self.ledger.size_of(slab_id))
                slabs[slab_id] = Charged(version.tenant, (charge,))
            assert not version.owner or self.sessions.get(version.owner), "owners are known"
            assert all(self.sessions.get(one) for one in version.readers), "readers are known"
        self.ledger.check(slabs)
        assert all(not slab.owner or self.sessions.get(slab.owner) for slab in self.store)
        for session in self.sessions:
            assert session.is_connected or self._holds(session), "the dead are forgotten"

    def _obey(self, session: Session, commands: Sequence[fencing.Command], now: float) -> None:
        for command in commands:
            match command:
                case fencing.Rose(fence=fence):
                    self._tell_session(NewsKind.SESSION_FENCED, session, int(fence))
                    self._fenced(session, fence, now)
                case fencing.Kill():
                    if self._writes(session):  # Who only reads does no harm.
                        self.commands.append(KillSession(session.session_id))
                case fencing.GiveUp():
                    for version in self.segments.owned_by(session.session_id):
                        self._refuse(version)
                    self.segments.owner_given_up(session.session_id)
                    self.segments.reader_lost(session.session_id)
        self._settle()

    def _fenced(self, session: Session, fence: Fence, now: float) -> None:
        if fence is Fence.HINT:
            self.segments.owner_lost(session.session_id)
            return
        self.store.unpin_all(session.session_id)
        self.segments.reader_lost(session.session_id)
        self.segments.owner_quiet(session.session_id, now)
        self._seal_owned(session)
        if fence is Fence.GONE:
            self.ledger.mappings.ended(session.session_id)

    def _seal_owned(self, session: Session) -> None:
        for slab in self.store.owned_by(session.session_id):
            if SealSlab(slab.slab_id) not in self.commands:
                self.commands.append(SealSlab(slab.slab_id))

    def _detach(self, session: Session, version: Version) -> None:
        self.segments.detach(version, session.session_id)
        self.ledger.mappings.unmapped(session.session_id, version.slab_ids)

    def _refuse(self, version: Version) -> None:
        """No pool of this cohort is ever adopted."""
        owner = self.sessions.get(version.owner)
        if owner is None:
            self.segments.refuse(version)
            return
        for session in self.sessions.cohort(owner):
            for one in self.segments.owned_by(session.session_id):
                if not session.is_connected:
                    self.segments.refuse(one)

    def _holds(self, session: Session) -> bool:
        """Whether anything of it is left, or of the others whose fate it decides."""
        if self._owns(session) or self.ledger.mappings.of(session.session_id):
            return True
        if session.session_id in self._absent_owners:
            return True
        if session.is_connected or not session.peer.cohort:
            return False
        return any(self._owns(one) for one in self.sessions.cohort(session))

    def needs_proof(self, session: Session) -> bool:
        """Whether anything waits for proof that it writes no more: not if it only reads."""
        return bool(session.peer.cohort) or self._writes(session)

    def _writes(self, session: Session) -> bool:
        """Whether it may write to anything."""
        session_id = session.session_id
        return bool(self.segments.owned_by(session_id) or self.store.owned_by(session_id))

    def _owns(self, session: Session) -> bool:
        return self._writes(session) or self.store.has_pins(session.session_id)

    def _make_room(self, tenant: str, charges: Sequence[Charge]) -> None:
        """Evict until this much can be given.

        Raises MEMORY_EXHAUSTED if it cannot be: with nothing evicted, unless it will be there once
        readers have unmapped what was.
        """
        for charge in charges:
            device, num_bytes = charge.device, charge.num_bytes
            accounts = self.ledger.accounts[device]
            of_tenant, of_all = accounts.to_evict(tenant, num_bytes)
            can_tenant = self.store.evictable(device, tenant)
            if of_tenant <= can_tenant and of_all <= self.store.evictable(device, None):
                freed = self._evict(of_tenant, device, tenant) if of_tenant else 0
                if of_all > freed:
                    self._evict(of_all - freed, device, None)
            if any(accounts.missing(tenant, num_bytes)):
                wanted = min(num_bytes, _UINT64_MAX)  # Whatever a caller asked for.
                self.news.add(NewsKind.PRESSURE, tenant=tenant, value=wanted)
                accounts.charge(tenant, num_bytes)

    def _evict(self, num_bytes: int, device: Device, tenant: str | None) -> int:
        before = self.store.num_evicted
        freed = self.store.evict(
            num_bytes, device=device, tenant=tenant, is_mapped=self.ledger.mappings.is_mapped
        )
        if self.store.num_evicted > before:
            self.news.add(
                NewsKind.BLOCKS_EVICTED,
                tenant=tenant or "",
                value=self.store.num_evicted - before,
            )
        self._settle()
        return freed

    def _next(self, wall_us: int) -> int:
        """A number above all that were given, in this life and, by the clock, in earlier ones."""
        self._highest = max(wall_us, self._highest + 1)
        return self._highest

    def _settle(self) -> None:
        """Say what became of segments and slabs, and forget sessions of which nothing is left."""
        for version in self.segments.freed:
            for slab_id in version.slab_ids:
                self._drop(slab_id)
            owner = self.sessions.get(version.owner)
            if owner is not None and owner.peer.cohort and not owner.is_connected:
                owner.has_lost_pool |= version.kind is SegmentClass.KV_POOL
            self._tell_version(NewsKind.FREED, version)
        self.segments.freed.clear()
        for slab in self.store.freed:
            self._drop(slab.slab_id)
            self.news.add(NewsKind.FREED, tenant=slab.tenant, slab_id=slab.slab_id)
        self.store.freed.clear()
        for version in self.segments.changed:
            is_sealed = version.state is State.SEALED
            kind = NewsKind.SEGMENT_SEALED if is_sealed else NewsKind.SEGMENT_CHANGED
            self._tell_version(kind, version)
            self.commands += [
                Keep(slab_id) for slab_id in version.slab_ids if self.ledger.is_used(slab_id)
            ]
        self.segments.changed.clear()
        lost = [
            session
            for session in self.sessions
            if not session.is_connected and not self._holds(session)
        ]
        for session in lost:
            self.segments.reader_lost(session.session_id)
            self.sessions.remove(session)
            self.commands.append(ForgetSession(session.session_id))
        self.ledger.settle()
        for device, accounts in self.ledger.accounts.items():
            excess = accounts.above_watermark()
            if excess and self.store.evictable(device, None):
                self._evict(excess, device, None)

    def _drop(self, slab_id: int) -> None:
        self.ledger.free(slab_id)
        self.commands.append(Free(slab_id))
        for session in self.sessions:
            if slab_id in session.shown:
                session.shown.remove(slab_id)
                session.freed.append(slab_id)

    def _tell_session(self, kind: NewsKind, session: Session, value: int = 0) -> None:
        self.news.add(kind, tenant=session.peer.tenant, session=session.session_id, value=value)

    def _tell_version(self, kind: NewsKind, version: Version) -> None:
        self.news.add(
            kind,
            tenant=version.tenant,
            segment=version.name,
            epoch=version.epoch,
            value=int(version.state),
        )


def _charges(slab: StoreSlab) -> tuple[Charge, ...]:
    """What a slab of blocks takes: of its own memory, and for its records of the host's."""
    devices = (HOST,) if slab.device == HOST else (slab.device, HOST)
    return tuple(Charge(device, slab.bytes_of(device)) for device in devices)


def _check_layout(layout: bytes) -> None:
    if len(layout) > LAYOUT_BYTES_MAX:
        raise InvalidField("layout", f"at most {LAYOUT_BYTES_MAX} bytes", len(layout))
