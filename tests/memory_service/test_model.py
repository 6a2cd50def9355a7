"""Whatever order things happen in, the service holds what a much simpler model says it holds.

Processes write blocks step by step, and can be killed, or lose their connection, between any two
steps; so can the service. What is compared:

- Bytes that a reader has pinned are those of the key, for as long as the pin lasts.
- A block that was committed is found, unless it was evicted, or its slab's owner is neither
  connected nor proved dead since the service was started anew.
- Nothing is found that was not committed.
- Epochs of a segment grow. One process writes to it. A successor has what its predecessor wrote.
"""

import contextlib
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memory_service import fencing
from memory_service.segments import SegmentClass, State
from memory_service.store import Pin, SlabState
from tests.memory_service.host import Host, Process, content, key_of
from unbroken.errors import UnbrokenError

NUMBERS = st.integers(0, 5)
PICK = st.integers(0, 7)
HARM = st.sampled_from(
    ["connection", "process", "service", "service, and all come back", "time", "eviction", "close"]
)


class Put:
    """A block that is being written."""

    def __init__(self, process: Process, slab_id: int, slot: int, number: int) -> None:
        self.process, self.slab_id, self.slot, self.number = process, slab_id, slot, number
        self.step = 0


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.processes: list[Process] = []
        self.puts: list[Put] = []
        self.committed: set[tuple[str, int]] = set()
        """What must be found."""
        self.pending: dict[int, set[tuple[str, int]]] = {}
        """By session, what must be found when it is bound again, or dead."""
        self.written: set[tuple[str, int]] = set()
        """What may be found: its record was written."""
        self.pins: list[tuple[str, Pin]] = []
        self.epochs: dict[tuple[str, str], int] = {}
        self.pool_owners: dict[tuple[str, str], tuple[Process, int]] = {}
        self.pool_bytes: dict[tuple[str, str], int] = {}

    @rule(what=HARM, index=PICK, seconds=st.sampled_from([0.5, 6.0, 61.0]))
    def harm(self, what: str, index: int, seconds: float) -> None:
        """Rare enough that there is something to harm."""
        match what:
            case "connection":
                self.lose_connection(index)
            case "process":
                self.kill(index, 1 + index % 3)
            case "service" | "service, and all come back":
                self.crash_of_the_service()
                if what != "service":
                    for _ in self.processes:
                        self.bind_again(0)
            case "time":
                self.pass_time(seconds)
            case "eviction":
                self.evict("t")
            case _:
                self.close_slab(index)

    # Processes.

    @initialize()
    def begin(self) -> None:
        for _ in range(2):
            self.bind("t")
            self.open_slab(len(self.processes) - 1, 2)
        self.use_pool(0, 1, takes=False)

    @precondition(lambda self: len(self.processes) < 4)
    @rule(tenant=st.sampled_from(["t", "t", "t", "small"]))
    def bind(self, tenant: str) -> None:
        self.processes.append(self.host.bind(tenant))

    def connected(self) -> list[Process]:
        return [one for one in self.processes if one.is_alive and one.session.is_connected]

    def pick(self, among: list[Any], index: int) -> Any:
        return among[index % len(among)] if among else None

    def lose_connection(self, index: int) -> None:
        if (process := self.pick(self.connected(), index)) is not None:
            store = self.host.holdings.store
            before = len(store.owned_by(process.session_id))
            self.host.see(process, fencing.ConnectionLost())
            assert len(store.owned_by(process.session_id)) == before, "it may come back"
            self.pins = [(t, p) for t, p in self.pins if p.session != process.session_id]

    @rule(index=PICK)
    def bind_again(self, index: int) -> None:
        lost = [one for one in self.processes if one.is_alive and not one.session.is_connected]
        if (process := self.pick(lost, index)) is None:
            return
        before = {slab.slab_id for slab in self.host.holdings.store.owned_by(process.session_id)}
        if self.host.rebind(process):
            slabs = self.host.holdings.store.owned_by(process.session_id)
            assert {slab.slab_id for slab in slabs} == before
            self.records_were_read(process)
        else:
            self.forget(process)

    def kill(self, index: int, level: int) -> None:
        """And what follows is noticed, or some of it not yet."""
        if (process := self.pick(self.processes, index)) is None:
            return
        if process.is_alive:
            process.is_alive = False
            self.puts = [put for put in self.puts if put.process is not process]
            self.pins = [(t, p) for t, p in self.pins if p.session != process.session_id]
        events = (fencing.ConnectionLost(), fencing.LifelineSealed(), fencing.Exited())
        for event in events[:level]:
            self.host.see(process, event)
        if level >= 2:
            self.records_were_read(process)
            self.processes.remove(process)

    def forget(self, process: Process) -> None:
        self.processes.remove(process)
        self.puts = [put for put in self.puts if put.process is not process]
        self.pins = [(t, p) for t, p in self.pins if p.session != process.session_id]

    def records_were_read(self, process: Process) -> None:
        """Whatever stands in them is there, and what was committed before among it."""
        assert self.pending.pop(process.session_id, set()) <= self.present()
        for slab in self.host.holdings.store:
            if slab.slab_id in process.free:
                for block in slab.blocks.values():
                    self.committed.add((slab.tenant, int.from_bytes(block.key, "little")))

    def crash_of_the_service(self) -> None:
        for slab in self.host.holdings.store:
            if slab.state is SlabState.OPEN:
                mine = {
                    (slab.tenant, int.from_bytes(block.key, "little"))
                    for block in slab.blocks.values()
                }
                self.pending.setdefault(slab.owner, set()).update(mine)
                self.committed -= mine
        self.host.crash()
        self.pins.clear()
        for process in self.processes:
            process.session.is_connected = False

    def present(self) -> set[tuple[str, int]]:
        return {
            (block.slab.tenant, int.from_bytes(block.key, "little"))
            for block in self.host.holdings.store.blocks()
        }

    def pass_time(self, seconds: float) -> None:
        self.host.pass_time(seconds)
        self.pins = [(t, p) for t, p in self.pins if p.expires_at > self.host.now]

    # Blocks.

    @rule(index=PICK, num_slots=st.integers(1, 3))
    def open_slab(self, index: int, num_slots: int) -> None:
        if (process := self.pick(self.connected(), index)) is None:
            return
        with contextlib.suppress(UnbrokenError):
            self.host.open_slab(process, num_slots)
        self.committed &= self.present()  # Some may have been evicted for it.

    @rule(index=PICK, number=NUMBERS)
    def begin_put(self, index: int, number: int) -> None:
        if (process := self.pick(self.connected(), index)) is None:
            return
        slabs = [
            slab_id
            for slab_id, free in process.free.items()
            if free
            and (slab := self.host.holdings.store.get_slab(slab_id)) is not None
            and slab.owner == process.session_id
        ]
        if (slab_id := self.pick(slabs, number)) is not None:
            slot = process.free[slab_id].pop(0)
            self.puts.append(Put(process, slab_id, slot, number))

    @rule(index=PICK, number=NUMBERS)
    def put(self, index: int, number: int) -> None:
        """All steps of it."""
        before = len(self.puts)
        self.begin_put(index, number)
        if len(self.puts) > before:
            self.go_on_with_put(before, 4)

    @rule(index=PICK, num_steps=st.integers(1, 4))
    def go_on_with_put(self, index: int, num_steps: int) -> None:
        """Also while the service is away: nobody is asked."""
        if (put := self.pick(self.puts, index)) is None:
            return
        host, tenant, key = self.host, put.process.session.peer.tenant, key_of(put.number)
        for _ in range(num_steps):
            memory = host.memory.get(put.slab_id)
            if memory is None or memory.is_sealed:
                self.puts.remove(put)
                return
            if put.step == 0:
                host.mark(put.slab_id, put.slot)
            elif put.step == 1:
                host.fill(put.slab_id, put.slot, content(key))
            elif put.step == 2:
                host.record(put.slab_id, put.slot, key)
                self.written.add((tenant, put.number))
            elif put.process.session.is_connected:
                self.puts.remove(put)
                host.commit(put.process, put.slab_id, [put.slot])
                self.committed.add((tenant, put.number))
                return
            else:
                return
            put.step += 1

    @rule(index=PICK, number=NUMBERS, length=st.integers(1, 3), ttl=st.sampled_from([1.0, 30.0]))
    def get(self, index: int, number: int, length: int, ttl: float) -> None:
        if (process := self.pick(self.connected(), index)) is None:
            return
        tenant = process.session.peer.tenant
        known = sorted(number for of, number in self.present() if of == tenant)
        if known:
            number = known[number % len(known)]
        keys = [key_of(one % 6) for one in range(number, number + length)]
        pin, _ = self.host.holdings.get(process.session, keys, ttl, self.host.now)
        if pin is not None:
            self.pins.append((process.session.peer.tenant, pin))

    @rule(index=PICK)
    def unpin(self, index: int) -> None:
        if (found := self.pick(self.pins, index)) is not None:
            self.pins.remove(found)
            self.host.holdings.store.unpin(found[1].session, found[1].pin_id)

    @rule(index=PICK, num_slots=st.integers(1, 2))
    def reclaim(self, index: int, num_slots: int) -> None:
        if (process := self.pick(self.connected(), index)) is None:
            return
        for slab in self.host.holdings.store.owned_by(process.session_id):
            if any(put.slab_id == slab.slab_id and put.step == 3 for put in self.puts):
                continue  # Clients tell of all their blocks first.
            for slot in self.host.reclaim(process, slab.slab_id, num_slots):
                assert all(
                    (block.slab, block.slot) != (slab, slot)
                    for _, pin in self.pins
                    for block in pin.blocks
                )
        self.committed &= self.present()

    def close_slab(self, index: int) -> None:
        if (process := self.pick(self.connected(), index)) is None:
            return
        for slab in self.host.holdings.store.owned_by(process.session_id)[:1]:
            if all(put.slab_id != slab.slab_id for put in self.puts):
                self.host.holdings.close_slab(process.session, slab.slab_id)
                self.host.obey()

    def evict(self, tenant: str) -> None:
        self.host.holdings.evict(tenant, "")
        self.host.obey()
        self.committed &= self.present()

    # Pools.

    @rule(index=PICK, value=NUMBERS, takes=st.booleans())
    def use_pool(self, index: int, value: int, takes: bool) -> None:
        """Create one, or write to the process's own, or adopt a dead one's."""
        if (process := self.pick(self.connected(), index)) is None:
            return
        tenant = process.session.peer.tenant
        key = (tenant, "kv")
        owner, epoch = self.pool_owners.get(key, (None, 0))
        host, holdings = self.host, self.host.holdings
        if owner is process:
            try:
                version = holdings.segments.owned(process.session_id, tenant, "kv", epoch)
            except UnbrokenError:
                del self.pool_owners[key]
                return
            host.memory[version.slab_ids[0]].contents[0] = value
            self.pool_bytes[key] = value
            return
        try:
            if takes:
                version = holdings.adopt_pool(process.session, "kv", 0, host.tick())
                host.obey()
                assert owner is not None
                assert not owner.is_alive or owner not in self.processes
                assert host.memory[version.slab_ids[0]].contents[0] == self.pool_bytes[key]
            else:
                host.create(process, "kv", SegmentClass.KV_POOL)
                (version,) = [
                    one
                    for one in holdings.segments
                    if one.owner == process.session_id and one.state is State.BUILDING
                ]
                holdings.freeze_pool(process.session, "kv", version.epoch, b"")
                host.obey()
                host.memory[version.slab_ids[0]].contents[0] = value
                self.pool_bytes[key] = value
        except UnbrokenError:
            return
        assert version.epoch > self.epochs.get(key, 0), "epochs grow"
        self.epochs[key] = version.epoch
        self.pool_owners[key] = (process, version.epoch)

    # What is always true.

    @invariant()
    def everything_adds_up(self) -> None:
        self.host.holdings.check()
        held = {slab.slab_id for slab in self.host.holdings.store}
        held |= {i for version in self.host.holdings.segments for i in version.slab_ids}
        assert held == self.host.memory.keys(), "no memory leaks"

    @invariant()
    def readers_see_the_bytes_of_the_key(self) -> None:
        for _, pin in self.pins:
            for block in pin.blocks:
                memory = self.host.memory[block.slab.slab_id]
                assert memory.contents[block.slot] == content(block.key)

    @invariant()
    def what_was_committed_is_found_and_nothing_else(self) -> None:
        present = self.present()
        assert self.committed <= present
        assert present <= self.written


MemoryMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestMemory = MemoryMachine.TestCase
