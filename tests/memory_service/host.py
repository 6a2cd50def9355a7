"""A host in memory: slabs with contents, processes that write there, and the shell's part of it.

It does what the kernel and `memory_service.service` do about the commands of `Holdings`, so that a
test can run any order of events. Bytes are numbers: `content(key)` is what a block of this key has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from memory_service import fencing, labels
from memory_service.accounts import HOST, Device, Limits
from memory_service.fencing import FencePolicy
from memory_service.holdings import (
    ForgetSession,
    Free,
    Holdings,
    Keep,
    KeepGpu,
    KeepSession,
    KillSession,
    Policy,
    ReadSlab,
    SealSlab,
)
from memory_service.segments import SegmentClass
from memory_service.sessions import Peer, Session
from memory_service.store import StoreSlab
from unbroken.memory.records import Record, RecordState, writing
from unbroken.v1 import memory_session_pb2 as wire

POLICY = Policy(
    Limits(capacity_bytes=64 * 4096, quota_bytes=40 * 4096, quotas={"small": 4 * 4096}),
    FencePolicy(rebind_grace_s=5.0),
    orphan_grace_s=60.0,
)
BLOCK_BYTES = 3072
"""Four of them take three pages, and their records another."""


def content(key: bytes) -> int:
    return int.from_bytes(key[:7], "little") + 1


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


@dataclass(eq=False)
class Memory:
    """One slab: what its slots hold, and what their records say."""

    contents: dict[int, int] = field(default_factory=dict[int, int])
    records: dict[int, Record] = field(default_factory=dict[int, Record])
    is_sealed: bool = False


@dataclass(eq=False)
class Process:
    """A client, as `unbroken.memory.client` is one."""

    session: Session
    free: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """By slab, slots that it may write to."""
    is_alive: bool = True

    @property
    def session_id(self) -> int:
        return self.session.session_id


class Host:
    """The service's shell and the kernel."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy = policy
        self.now = 1000.0
        self.wall_us = 1_000_000
        self.boots = 1
        self.holdings = Holdings(policy, self.boots)
        self.memory: dict[int, Memory] = {}
        self.vault: dict[int, wire.VaultEntry] = {}
        self.killed: list[int] = []

    def bind(
        self, tenant: str = "t", *, cohort: str = "", rank: int = 0, num_ranks: int = 1
    ) -> Process:
        pid = self.wall_us
        peer = Peer("test", tenant, pid, 0, cohort, rank, num_ranks)
        process = Process(self.holdings.bind(peer, b"secret", self.tick()))
        self.obey()
        return process

    def tick(self) -> int:
        self.wall_us += 1000  # More than a call takes numbers.
        return self.wall_us

    def rebind(self, process: Process) -> bool:
        """Whether it is still known; then its records are read."""
        session = self.holdings.rebind(
            process.session_id, process.session.peer, b"secret", self.now
        )
        if session is not None:
            process.session = session
            for slab in self.holdings.store.owned_by(session.session_id):
                self.holdings.records_read(slab, self.read(slab))
        self.obey()
        return session is not None

    def see(self, process: Process, *events: fencing.Event) -> None:
        for event in events:
            self.holdings.seen(process.session_id, event, self.now)
            self.obey()

    def die(self, process: Process) -> None:
        """And everything about it is noticed."""
        process.is_alive = False
        self.see(process, fencing.ConnectionLost(), fencing.LifelineSealed(), fencing.Exited())

    def open_slab(
        self, process: Process, num_slots: int = 4, *, device: Device = HOST
    ) -> StoreSlab:
        slab = self.holdings.plan_slab(process.session, BLOCK_BYTES, num_slots, self.tick(), device)
        self.holdings.begin_slab(process.session, slab)
        self.memory[slab.slab_id] = Memory()
        process.free[slab.slab_id] = list(range(num_slots))
        self.obey()
        return slab

    def create(
        self,
        process: Process,
        name: str,
        kind: int,
        num_pages: int = 1,
        *,
        device: Device = HOST,
    ) -> int:
        """The epoch of a new version of one slab."""
        version = self.holdings.plan_segment(
            process.session, name, SegmentClass(kind), [num_pages * 4096], self.tick(), device
        )
        for slab_id in version.slab_ids:
            self.memory[slab_id] = Memory()
        self.holdings.begin_segment(version)
        self.obey()
        return version.epoch

    def mark(self, slab_id: int, slot: int) -> None:
        """A client says that it is about to write."""
        memory = self.memory[slab_id]
        assert not memory.is_sealed, "the kernel refuses"
        old = memory.records.get(slot)
        memory.records[slot] = writing(slot, 1 if old is None else old.generation + 1)

    def fill(self, slab_id: int, slot: int, value: int) -> None:
        memory = self.memory[slab_id]
        assert not memory.is_sealed, "the kernel refuses"
        assert memory.records[slot].state is RecordState.WRITING, "said before"
        memory.contents[slot] = value

    def record(self, slab_id: int, slot: int, key: bytes) -> None:
        memory = self.memory[slab_id]
        generation = memory.records[slot].generation
        memory.records[slot] = Record(
            RecordState.COMMITTED, 16, generation, slot, key, content(key)
        )

    def commit(self, process: Process, slab_id: int, slots: list[int]) -> list[int]:
        free = self.holdings.commit(
            process.session, slab_id, slots, self.memory[slab_id].records.get
        )
        for slot in free:
            self.mark(slab_id, slot)
        process.free[slab_id] += free
        self.obey()
        return free

    def put(self, process: Process, slab_id: int, number: int) -> bool:
        """Whether the block was of use."""
        slot = process.free[slab_id].pop(0)
        self.mark(slab_id, slot)
        self.fill(slab_id, slot, content(key_of(number)))
        self.record(slab_id, slot, key_of(number))
        return not self.commit(process, slab_id, [slot])

    def reclaim(self, process: Process, slab_id: int, num_slots: int) -> list[int]:
        slab = self.holdings.store.owned(process.session_id, slab_id)
        slots = self.holdings.store.reclaim(slab, num_slots)
        for slot in slots:
            self.mark(slab_id, slot)
        process.free[slab_id] += slots
        return slots

    def read(self, slab: StoreSlab) -> list[tuple[int, Record | None]]:
        records = self.memory[slab.slab_id].records
        return [(slot, records.get(slot)) for slot in range(slab.num_slots)]

    def crash(self, absent: Mapping[int, wire.VaultEntry] | None = None) -> None:
        """The service dies; another one begins with what the vault has.

        `absent` are entries of GPUs that are not there.
        """
        self.boots += 1
        self.holdings = Holdings(self.policy, self.boots)
        for entry in (absent or {}).values():
            labels.restore_absent(self.holdings, entry)
        entries = [self.vault[entry_id] for entry_id in sorted(self.vault)]
        labels.restore(self.holdings, entries, self.now)
        self.obey()
        known = {slab.slab_id for slab in self.holdings.store}
        known |= {one for version in self.holdings.segments for one in version.slab_ids}
        for slab_id in set(self.memory) - known:
            del self.memory[slab_id]
            self.vault.pop(slab_id, None)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.holdings.handle_timeout(self.now)
        self.obey()

    def obey(self) -> None:
        """What `memory_service.service` does about commands."""
        holdings = self.holdings
        while holdings.commands:
            match holdings.commands.pop(0):
                case Free(slab_id=slab_id):
                    del self.memory[slab_id]
                    self.vault.pop(slab_id, None)
                case Keep(slab_id=slab_id):
                    if (entry := labels.slab_entry(holdings, slab_id)) is not None:
                        self.vault[slab_id] = entry
                case KeepSession(session_id=session_id):
                    if (session := holdings.sessions.get(session_id)) is not None:
                        self.vault[session_id] = labels.session_entry(session)
                case KeepGpu(device=device):
                    entry = labels.gpu_entry(holdings, device)
                    self.vault[entry.entry_id] = entry
                case ForgetSession(session_id=session_id):
                    self.vault.pop(session_id, None)
                case SealSlab(slab_id=slab_id):
                    slab = holdings.store.get_slab(slab_id)
                    if slab is not None:
                        self.memory[slab_id].is_sealed = True
                        holdings.slab_sealed(slab_id, self.read(slab))
                case ReadSlab(slab_id=slab_id):
                    if (slab := holdings.store.get_slab(slab_id)) is not None:
                        holdings.records_read(slab, self.read(slab))
                case KillSession(session_id=session_id):
                    self.killed.append(session_id)
        holdings.check()
