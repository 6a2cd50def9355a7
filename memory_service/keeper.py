"""Has the descriptors, and does what `holdings` says is to be done about them."""

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import assert_never

from memory_service import labels, memfd
from memory_service.accounts import HOST, Device
from memory_service.backend import Allocation, Backend, NeverSealed
from memory_service.holdings import (
    ForgetSession,
    Free,
    Holdings,
    Keep,
    KeepGpu,
    KeepSession,
    KillSession,
    ReadSlab,
    SealSlab,
)
from memory_service.store import Block, StoreSlab
from memory_service.vault_link import VaultLink
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory import channel, checksums, records
from unbroken.memory.records import RECORD_BYTES, Record, RecordState
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

LIFELINE_BYTES = 4096
FULL_RETRIES = 20
FULL_RETRY_S = 0.025
"""What was freed is back when the vault has closed its descriptors, too."""
JUST_FREED_S = 2.0
CHECKED_AT_DEATH_BYTES_MAX = 256 * 1024 * 1024
"""Of blocks that a process left without telling: their bytes are compared at once, up to this."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """Memory, and who knows what to do with it."""

    backend: Backend
    allocation: Allocation


@dataclass(slots=True)
class Ends:
    """What is held of a process."""

    lifeline: int
    pidfd: int


class Keeper:
    """All descriptors of the service.

    Attributes:
        backends: Of the host and of each GPU.
        on_forget: Told of sessions of which nothing is left, before their descriptors are closed.
        on_sealed: Told of slabs that nobody writes to any more, and whose records are to be read
            (`read_sealed`) and told to the holdings.
        unsealed: Slabs whose owner is gone and which the kernel did not let us seal yet.
    """

    def __init__(
        self,
        holdings: Holdings,
        backends: Mapping[Device, Backend],
        *,
        on_forget: Callable[[int], None],
        absent: Collection[str] = (),
    ) -> None:
        """`absent` are GPUs that are configured and not there: what is on them may come back."""
        assert backends.keys() == holdings.ledger.accounts.keys(), "one for each memory"
        self.holdings = holdings
        self.backends = backends
        self.vault: VaultLink | None = None
        self.ends: dict[int, Ends] = {}
        self.unsealed: set[int] = set()
        self.on_forget = on_forget
        self.on_sealed: Callable[[StoreSlab], None] = self._read_here
        self._slabs: dict[int, Held] = {}
        self._tables: dict[int, Held] = {}
        self._absent_gpus = frozenset(absent)
        self._absent: dict[int, tuple[wire.VaultEntry, Sequence[int]]] = {}
        """By entry, what the vault has of GPUs that are not there."""
        self._driver = ThreadPoolExecutor(1, "driver")
        """One call after the other: what was freed before something is allocated is back."""
        self._freed_at = 0.0
        """When it was last asked to free something."""

    def close(self) -> None:
        """Wait for what drivers were asked for. Idempotent."""
        self._driver.shutdown()

    @property
    def num_fds(self) -> int:
        of_absent = sum(len(fds) for _, fds in self._absent.values())
        return len(self._slabs) + len(self._tables) + 2 * len(self.ends) + of_absent

    # Memory.

    def allocate(
        self, slab_ids: Sequence[int], sizes: Sequence[int], device: Device = HOST
    ) -> None:
        """Memory for the slabs of a segment. Raises MEMORY_EXHAUSTED, with none of it left.

        It takes the place of what the commands say is to be freed.
        """
        self.obey()
        made = _allocated(self.backends[device], slab_ids, sizes)
        self._slabs.update(zip(slab_ids, made, strict=True))

    async def allocate_in_order(
        self, slab_ids: Sequence[int], sizes: Sequence[int], device: Device
    ) -> None:
        """The same, of a memory that is slow, once what is to be freed has been."""
        self.obey()
        retries = FULL_RETRIES if time.monotonic() - self._freed_at < JUST_FREED_S else 0
        made = await asyncio.get_running_loop().run_in_executor(
            self._driver, _allocated, self.backends[device], slab_ids, sizes, retries
        )
        self._slabs.update(zip(slab_ids, made, strict=True))

    def allocate_table(self, slab: StoreSlab) -> None:
        """Memory for the records of blocks. Raises MEMORY_EXHAUSTED: then give the slab up."""
        size = RECORD_BYTES * slab.num_slots
        name = f"unbroken-{slab.slab_id}-t"
        host = self.backends[HOST]
        try:
            self._tables[slab.slab_id] = Held(host, host.allocate(size, name))
        except OSError as error:
            raise _no_memory(error) from error

    def writable(self, slab_ids: Iterable[int]) -> list[int]:
        """Descriptors for their owner; ours, not to be closed."""
        return [self._slabs[slab_id].allocation.fd for slab_id in slab_ids]

    def table(self, slab_id: int) -> int:
        """The descriptor of a slab's records, for its owner."""
        return self._tables[slab_id].allocation.fd

    def read_only(self, slab_ids: Iterable[int]) -> list[int]:
        """Descriptors for readers, which the caller closes. Raises MEMORY_EXHAUSTED."""
        fds: list[int] = []
        try:
            for slab_id in slab_ids:  # One by one: those before are to be closed.
                held = self._slabs[slab_id]
                fds.append(held.backend.read_only(held.allocation))
        except OSError as error:
            channel.close_all(fds)
            raise _no_memory(error) from error
        return fds

    def seal(self, slab_ids: Iterable[int]) -> bool:
        """Whether nobody can write to any of them, or to their records, any more.

        Raises NeverSealed.
        """
        return all(
            held.backend.seal(held.allocation)
            for slab_id in slab_ids
            for held in (self._slabs.get(slab_id), self._tables.get(slab_id))
            if held is not None
        )

    def is_readable(self, device: Device) -> bool:
        """Whether the bytes of its slabs can be looked at here."""
        return self.backends[device].is_readable

    def slab_view(self, slab_id: int) -> memoryview:
        """The bytes of a slab, of a memory that is readable."""
        held = self._slabs[slab_id]
        return held.backend.view(held.allocation)

    def block_view(self, block: Block) -> memoryview:
        """The bytes of a block."""
        size = block.slab.block_bytes
        return self.slab_view(block.slab.slab_id)[block.slot * size : (block.slot + 1) * size]

    def record(self, slab_id: int, slot: int) -> Record | None:
        """What the table of a slab says of a slot."""
        held = self._tables[slab_id]
        table = held.backend.view(held.allocation)
        data = bytes(table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES])
        return records.parse(data, slab_id=slab_id, slot=slot)

    def read(self, slab: StoreSlab) -> list[tuple[int, Record | None]]:
        """All records of a slab."""
        held = self._tables[slab.slab_id]
        table = bytes(held.backend.view(held.allocation))
        return [
            (
                slot,
                records.parse(
                    table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES],
                    slab_id=slab.slab_id,
                    slot=slot,
                ),
            )
            for slot in range(slab.num_slots)
        ]

    # Commands.

    def obey(self) -> None:
        """Do what is to be done."""
        holdings = self.holdings
        while holdings.commands:
            command = holdings.commands.pop(0)
            match command:
                case Free(slab_id=slab_id):
                    self._free(slab_id)
                case Keep(slab_id=slab_id):
                    self._keep(slab_id)
                case KeepSession(session_id=session_id):
                    self._keep_session(session_id)
                case KeepGpu(device=device):
                    self._keep_gpu(device)
                case ForgetSession(session_id=session_id):
                    self._forget(session_id)
                case SealSlab(slab_id=slab_id):
                    self.unsealed.add(slab_id)
                    self.seal_left()
                case ReadSlab(slab_id=slab_id):
                    if (slab := holdings.store.get_slab(slab_id)) is not None:
                        holdings.records_read(slab, self.read(slab))
                case KillSession(session_id=session_id):
                    if (ends := self.ends.get(session_id)) is not None:
                        _log.warning("session killed", session=session_id)
                        with contextlib.suppress(ProcessLookupError):  # It has just exited.
                            signal.pidfd_send_signal(ends.pidfd, signal.SIGKILL)
                case _:
                    assert_never(command)

    def seal_left(self) -> None:
        """Try again what the kernel refused: somebody still had it mapped."""
        for slab_id in list(self.unsealed):
            slab = self.holdings.store.get_slab(slab_id)
            if slab is None or slab_id not in self._slabs:
                self.unsealed.discard(slab_id)
                continue
            try:
                is_sealed = self.seal([slab_id])
            except NeverSealed as error:
                _log.error("slab given up", slab=slab_id, detail=str(error))
                self.unsealed.discard(slab_id)
                self.holdings.give_up_slab(slab)
                continue
            if is_sealed:
                self.unsealed.discard(slab_id)
                self.on_sealed(slab)

    def _read_here(self, slab: StoreSlab) -> None:
        self.holdings.slab_sealed(slab.slab_id, self.read_sealed(slab, set(slab.blocks)))

    def read_sealed(
        self, slab: StoreSlab, known: Collection[int]
    ) -> list[tuple[int, Record | None]]:
        """Records of a slab; without those that are new and whose bytes are wrong.

        `known` are the slots whose blocks were told of. For a thread: it only counts.
        """
        found = self.read(slab)
        if not self.is_readable(slab.device):
            return found
        left = CHECKED_AT_DEATH_BYTES_MAX
        view, size = self.slab_view(slab.slab_id), slab.block_bytes
        for index, (slot, record) in enumerate(found):
            if record is None or record.state is not RecordState.COMMITTED or left < size:
                continue
            if slot in known:
                continue
            left -= size
            seen = checksums.compute(view[slot * size : (slot + 1) * size], record.algorithm)
            if seen != record.checksum:
                _log.error("block corrupt", slab=slab.slab_id, slot=slot, where="adoption")
                self.holdings.num_corrupt += 1
                found[index] = (slot, None)
        return found

    def use_vault(
        self, vault: VaultLink, found: Sequence[tuple[wire.VaultEntry, list[int]]]
    ) -> None:
        """Give a vault all it lacks, and let it forget what is gone since it had `found`."""
        holdings = self.holdings
        self.vault = vault
        known = self._slabs.keys() | self.ends.keys() | self._absent.keys()
        known |= set(holdings.gpu_entries.values())
        for entry, fds in found:
            channel.close_all(fds)  # We have them.
            if entry.entry_id not in known:
                vault.drop(entry.entry_id)
        for entry, fds in self._absent.values():
            vault.put(entry, fds)
        for device in holdings.gpu_entries:
            self._keep_gpu(device)
        for session in holdings.sessions:
            self._keep_session(session.session_id)
        for version in holdings.segments:
            for slab_id in version.slab_ids:
                self._keep(slab_id)
        for slab in holdings.store:
            self._keep(slab.slab_id)

    def take_back(self, found: Sequence[tuple[wire.VaultEntry, list[int]]], now: float) -> int:
        """Hold what a vault kept; returns how many entries were of use."""
        good: list[wire.VaultEntry] = []
        for entry, fds in found:
            try:
                self._take(entry, fds)
            except (OSError, ValueError, UnbrokenError) as error:
                if labels.device_of(entry) in self._absent_gpus:
                    self._absent[entry.entry_id] = (entry, fds)
                    labels.restore_absent(self.holdings, entry)
                    continue
                _log.error("entry of the vault unusable", entry=entry.entry_id, detail=str(error))
                channel.close_all(fds)
                if self.vault is not None:
                    self.vault.drop(entry.entry_id)  # Else it would keep that memory for ever.
            else:
                good.append(entry)
        if self._absent:
            _log.warning("memory of GPUs that are not there is kept", entries=len(self._absent))
        labels.restore(self.holdings, good, now)
        self.obey()
        used = {one for version in self.holdings.segments for one in version.slab_ids}
        used |= {slab.slab_id for slab in self.holdings.store}
        for slab_id in set(self._slabs) - used:
            self._free(slab_id)
        return len(good)

    def _take(self, entry: wire.VaultEntry, fds: Sequence[int]) -> None:
        if entry.HasField("gpu"):
            self.holdings.ledger.device(pb.MEMORY_KIND_CUDA, entry.gpu.device)  # Or InvalidField.
            return
        if entry.HasField("session"):
            lifeline, pidfd = fds
            self.ends[entry.entry_id] = Ends(lifeline, pidfd)
            return
        (slab,) = entry.segment.slabs
        data, *table = fds
        backend = self.backends[self.holdings.ledger.device(slab.memory_kind, slab.device)]
        held = Held(backend, backend.adopt(data, slab.size_bytes))
        if slab.num_slots:
            (fd,) = table
            host = self.backends[HOST]
            adopted = host.adopt(fd, RECORD_BYTES * slab.num_slots)
            self._tables[entry.entry_id] = Held(host, adopted)
        self._slabs[entry.entry_id] = held

    def _keep(self, slab_id: int) -> None:
        if self.vault is None or slab_id not in self._slabs:
            return
        entry = labels.slab_entry(self.holdings, slab_id)
        if entry is None:
            return
        table = self._tables.get(slab_id)
        fds = [held.allocation.fd for held in (self._slabs[slab_id], table) if held is not None]
        self.vault.put(entry, fds)

    def _keep_gpu(self, device: Device) -> None:
        if self.vault is not None:
            self.vault.put(labels.gpu_entry(self.holdings, device), ())

    def _keep_session(self, session_id: int) -> None:
        session, ends = self.holdings.sessions.get(session_id), self.ends.get(session_id)
        if self.vault is not None and session is not None and ends is not None:
            self.vault.put(labels.session_entry(session), (ends.lifeline, ends.pidfd))

    def _free(self, slab_id: int) -> None:
        for held in (self._slabs.pop(slab_id, None), self._tables.pop(slab_id, None)):
            if held is not None and held.backend.is_slow:
                self._freed_at = time.monotonic()
                self._driver.submit(_free, held)
            elif held is not None:
                _free(held)
        if self.vault is not None:
            self.vault.drop(slab_id)

    def _forget(self, session_id: int) -> None:
        self.on_forget(session_id)
        ends = self.ends.pop(session_id, None)
        if ends is not None:
            os.close(ends.lifeline)
            os.close(ends.pidfd)
        if self.vault is not None:
            self.vault.drop(session_id)


def _allocated(
    backend: Backend, slab_ids: Sequence[int], sizes: Sequence[int], retries: int = 0
) -> list[Held]:
    """Memory of each size, all or, on MEMORY_EXHAUSTED, none."""
    made: list[Held] = []
    try:
        for slab_id, size in zip(slab_ids, sizes, strict=True):
            while True:
                try:
                    made.append(Held(backend, backend.allocate(size, f"unbroken-{slab_id}")))
                    break
                except OSError as error:
                    if error.errno != errno.ENOMEM or not retries:
                        raise
                    retries -= 1
                    time.sleep(FULL_RETRY_S)  # In the driver's thread: retries are for slow ones.
    except OSError as error:
        for held in made:
            _free(held)
        raise _no_memory(error) from error
    return made


def _free(held: Held) -> None:
    held.backend.free(held.allocation)


def make_lifeline(session_pid: int) -> int:
    """What a process maps for as long as it may write. Raises MEMORY_EXHAUSTED."""
    try:
        return memfd.allocate(LIFELINE_BYTES, f"unbroken-life-{session_pid}")
    except OSError as error:
        raise _no_memory(error) from error


def _no_memory(error: OSError) -> UnbrokenError:
    return UnbrokenError(
        Reason.MEMORY_EXHAUSTED,
        f"expected the kernel to have a descriptor and memory: {error}",
        metadata={"limit": "host"},
        retry_after_s=1.0,
    )
