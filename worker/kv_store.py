"""An engine's KV blocks in the memory service of its host.

    put    name the block, copy its bytes, go on            a thread stores it: copy, checksum, tell
    fetch  name the blocks, wait for the thread a little    it pins, compares and hands them over

What may wait, or fail, is done by one thread. A step waits for that only where it would have to
compute instead, and not for long: whatever does not come in time, is not there or is not intact is
a miss. The memory service sees one client for all tenants of the engine; what tenants must not
share has their names in its keys.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import KEYS_A_CALL, MemoryClient, Pinned
from unbroken.memory.keys import KeyChain, KeySpace
from unbroken.memory.records import SLOTS_MAX
from unbroken.memory.writer import BlockWriter
from unbroken.v1 import worker_pb2
from worker.config import WorkerConfig
from worker.engine import EngineSpec, KvHolder
from worker.engine import Sequence as Stream

QUEUED_BLOCKS_MAX = 256
"""Blocks that wait to be stored; more are dropped."""
FETCH_S_MAX = 2.0
FETCH_BASE_S = 0.25
FETCH_TOKEN_S = 0.001
"""A fetch that takes longer than the base and this for each token, or than the maximum, is a miss:
whoever watches the engine allows a step as much for tokens that it might have to compute."""
RETRY_S = 1.0
"""After a failure nothing is asked of the service for so long; if it was full, no more room."""
PEER_RETRY_S = 10.0
"""Nor of another host that a fetch has waited for in vain: it may be gone."""
SLAB_BYTES_MIN = 4 << 20
SLAB_BYTES_MAX = 64 << 20
"""An engine begins with a small slab, and each further one is twice as large: of those that live
shortly little is left, and what a dead engine left is evicted by whole slabs."""
TICKET_S = 86_400.0
"""How long other hosts may read: as long as a memory service allows."""
_READ_SHARE = 0.75
"""Of the time that a fetch has left: for another host; then something is made of what came."""
_PIN_S = 30.0
_REBIND_S = 0.1
_CLOSE_S = 2.0
_NO_ROOM = (Reason.MEMORY_EXHAUSTED, Reason.INVALID_FIELD)
"""Why another slab is refused: there is no memory left, or one session may not have so many."""

Take: TypeAlias = Callable[[Sequence[memoryview]], Any]
"""Makes something of blocks, which lie where they were written. It must not keep a view of them."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Which memory service, and how much of it."""

    directory: Path
    """That of the service."""
    bytes_max: int
    """Of blocks that this engine keeps there; then the oldest make room."""
    address: str = ""
    """Where other hosts may read there; empty: nowhere."""
    peers: frozenset[str] = frozenset()
    """Memory services of other hosts that are trusted."""

    @property
    def socket(self) -> Path:
        return self.directory / "session.sock"

    @property
    def name(self) -> str:
        """The same for all processes that use this service, whatever became of it meanwhile."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity = f"{boot_id} {self.directory.resolve()}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def store_settings(config: WorkerConfig) -> StoreSettings | None:
    """What a worker was told; None: it has no memory service."""
    if config.memory is None:
        return None
    return StoreSettings(
        config.memory,
        config.memory_bytes,
        config.memory_address or "",
        frozenset(config.memory_peers),
    )


@dataclass(slots=True)
class _Put:
    key: bytes
    data: bytes


@dataclass(slots=True, eq=False)
class _Fetch:
    keys: list[bytes]
    take: Take
    holders: tuple[KvHolder, ...]
    give_up_at: float
    done: threading.Event = field(default_factory=threading.Event)
    num_blocks: int = 0
    taken: Any = None


class Blocks(Protocol):
    """Where an engine keeps its blocks; see `KvStore`."""

    use: worker_pb2.KvStoreUse
    """What was exchanged so far."""

    def put(self, stream: Stream, index: int, data: bytes) -> None: ...

    def fetch(
        self, stream: Stream, first_block: int, end_block: int, take: Take
    ) -> tuple[int, Any]: ...

    def holder(self) -> KvHolder | None: ...

    def close(self) -> None: ...


class KvStore:
    """The blocks of one engine. All methods are for the one thread that executes its steps."""

    def __init__(
        self, settings: StoreSettings, spec: EngineSpec, *, block_bytes: int, layout: str
    ) -> None:
        """`layout` says how the bytes of a block are arranged."""
        self._settings = settings
        self._spec = spec
        self._block_bytes = block_bytes
        self._layout = layout
        self._jobs: queue.Queue[_Put | _Fetch | None] = queue.Queue()
        """Bounded by who puts into it: `QUEUED_BLOCKS_MAX`, one fetch and the end."""
        self._client: MemoryClient | None = None
        self._writers: list[BlockWriter] = []
        self._turn = 0
        """Which of the writers is written to."""
        self._num_left = 0
        """Blocks until it is the next one's turn."""
        self._retry_at = 0.0
        self._room_retry_at = 0.0
        self._peer_retry_at: dict[str, float] = {}
        self._late: _Fetch | None = None
        """What was waited for too long, until it is done."""
        self._holder: KvHolder | None = None
        self.use = worker_pb2.KvStoreUse()
        self._thread = threading.Thread(target=self._work, name="kv-store", daemon=True)
        self._thread.start()

    # For the engine.

    def put(self, stream: Stream, index: int, data: bytes) -> None:
        """Store block `index` of the sequence, soon; or not."""
        assert len(data) == self._block_bytes, "blocks are of one size"
        key = self._keys(stream, index + 1)[index]
        if self._jobs.qsize() < QUEUED_BLOCKS_MAX:
            self._jobs.put(_Put(key, data))
        else:
            self.use.blocks_dropped_total += 1

    def fetch(
        self, stream: Stream, first_block: int, end_block: int, take: Take
    ) -> tuple[int, Any]:
        """Make something of blocks of the sequence: how many of the first there are, and `take`'s.

        All of them are intact. `take` is called by another thread, and not at all if there is none.
        """
        holders = tuple(one for one in stream.kv_holders if one.address in self._settings.peers)
        keys = self._keys(stream, end_block)[first_block:end_block]
        num_tokens = len(keys) * self._spec.block_size
        wait_s = min(FETCH_S_MAX, FETCH_BASE_S + FETCH_TOKEN_S * num_tokens)
        give_up_at = time.monotonic() + wait_s
        job = _Fetch(keys, take, holders, give_up_at)
        if self._late is not None and self._late.done.is_set():
            self._late = None
        if self._late is None:
            self._jobs.put(job)
            if job.done.wait(wait_s):
                num_blocks = job.num_blocks
                self.use.blocks_restored_total += num_blocks
                self.use.restored_bytes_total += num_blocks * self._block_bytes
                self.use.blocks_missed_total += len(job.keys) - num_blocks
                return num_blocks, job.taken
            _log.warning("the memory service is too slow", waited_s=wait_s)
            self._late = job
        self.use.blocks_missed_total += len(job.keys)
        return 0, None

    def holder(self) -> KvHolder | None:
        """Where other hosts read what is stored here; None if that is not known yet.

        May be called by any thread.
        """
        return self._holder

    def close(self) -> None:
        """Leave the blocks to others."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_S)  # If it hangs, it ends with the process.

    def _keys(self, stream: Stream, num_blocks: int) -> list[bytes]:
        chain = stream.kv_keys
        spec = self._spec
        if chain is None:
            space = KeySpace(
                model=spec.model,
                numerics_id=spec.numerics_id,
                layout=self._layout,
                parallelism="",
                block_size=spec.block_size,
                tenant=stream.tenant,
            )
            chain = stream.kv_keys = KeyChain(space)
        end = num_blocks * spec.block_size
        if chain.num_tokens < end:
            marks_output = not spec.split_invariant
            chain.extend(stream.tokens_to_chain(chain.num_tokens, end, marks_output=marks_output))
        return chain.keys

    # The thread.

    def _work(self) -> None:
        try:
            self._grant_reads()  # First: the sidecar is told when it greets, which is soon.
        except (UnbrokenError, OSError):  # It may come later; then other hosts do not read there.
            self._retry_at = time.monotonic() + RETRY_S
        if self._settings.peers:
            import_module("worker.kv_peers")  # With gRPC: 0.1 s that no fetch shall wait for.
        while (job := self._jobs.get()) is not None:
            try:
                self._do(job)
            except (UnbrokenError, OSError) as error:
                _log.warning("the memory service failed", error=str(error))
                self._retry_at = time.monotonic() + RETRY_S
            finally:
                if isinstance(job, _Fetch):
                    job.done.set()
        if self._client is not None:
            try:
                self._client.close()
            except UnbrokenError as error:
                _log.warning("the memory service failed", error=str(error))

    def _do(self, job: _Put | _Fetch) -> None:
        if isinstance(job, _Fetch):
            if (client := self._bound()) is not None:
                self._take(client, job)
        else:
            self._put(job)
        if self._jobs.empty():
            for writer in self._writers:
                writer.flush()

    def _put(self, put: _Put) -> None:
        is_stored = False
        try:
            client = self._bound()
            is_stored = client is not None and self._store(client, put)
        finally:
            if is_stored:
                self.use.blocks_put_total += 1
                self.use.put_bytes_total += len(put.data)
            else:
                self.use.blocks_dropped_total += 1

    def _bound(self) -> MemoryClient | None:
        """The client, if the service is there, or has not failed just now."""
        if time.monotonic() < self._retry_at:
            return None
        if self._client is None:
            self._client = MemoryClient(
                self._settings.socket, client=self._spec.kind, rebind_timeout_s=_REBIND_S
            )
        return self._client

    def _store(self, client: MemoryClient, put: _Put) -> bool:
        """Whether there was room."""
        if any(writer.is_lost for writer in self._writers):
            self._writers, self._num_left = [], 0  # Others may have what was in there.
        if not self._num_left and not self._next_writer(client):
            return False
        is_stored = self._writers[self._turn].put(put.key, put.data, self._spec.block_size)
        self._num_left -= 1
        return is_stored

    def _next_writer(self, client: MemoryClient) -> bool:
        """Open one more, or else begin again with the first; whether there is one."""
        writers, block_bytes = self._writers, self._block_bytes
        slab_bytes = min(SLAB_BYTES_MAX, SLAB_BYTES_MIN << min(len(writers), 16))
        used_bytes = sum(writer.num_slots for writer in writers) * block_bytes
        num_slots = min(
            max(1, slab_bytes // block_bytes),
            max(0, self._settings.bytes_max - used_bytes) // block_bytes,
            SLOTS_MAX,
        )
        if (num_slots or not writers) and self._open_writer(client, max(1, num_slots)):
            self._turn = len(writers) - 1
        elif writers:
            self._turn = (self._turn + 1) % len(writers)
        else:
            return False
        self._num_left = writers[self._turn].num_slots
        return True

    def _open_writer(self, client: MemoryClient, num_slots: int) -> bool:
        """Whether the service has room for it."""
        if time.monotonic() < self._room_retry_at:
            return False
        try:
            self._writers.append(client.open_writer(self._block_bytes, num_slots))
        except UnbrokenError as error:
            if error.reason not in _NO_ROOM:
                raise
            _log.warning("the memory service has no more room", detail=error.detail)
            self._room_retry_at = time.monotonic() + RETRY_S
            return False
        return True

    def _take(self, client: MemoryClient, fetch: _Fetch) -> None:
        with ExitStack() as pins:
            blocks: list[memoryview] = []
            pinned: list[Pinned] = []
            for at in range(0, len(fetch.keys), KEYS_A_CALL):
                keys = fetch.keys[at : at + KEYS_A_CALL]
                part = pins.enter_context(client.get(keys, ttl_s=_PIN_S))
                pinned.append(part)
                blocks += takewhile(self._is_ours, (block.data for block in part))
                if len(blocks) < at + len(keys):
                    break
            for holder in fetch.holders:
                if len(blocks) == len(fetch.keys):
                    break
                blocks += self._read(holder, fetch, len(blocks))
            taken = fetch.take(blocks) if blocks else None
            num_blocks = len(blocks)
            blocks.clear()
            if all(part.is_valid for part in pinned):
                fetch.num_blocks, fetch.taken = num_blocks, taken

    def _read(self, holder: KvHolder, fetch: _Fetch, start: int) -> list[memoryview]:
        """Those of another host from there on, as many as come in time."""
        from worker import kv_peers

        begun = time.monotonic()
        left_s = (fetch.give_up_at - begun) * _READ_SHARE
        if left_s <= 0 or begun < self._peer_retry_at.get(holder.address, 0.0):
            return []
        size = self._spec.block_size
        found = kv_peers.read_blocks(
            holder, fetch.keys[start:], self._block_bytes, num_tokens=size, timeout_s=left_s
        )
        if not found and time.monotonic() - begun >= left_s:
            self._peer_retry_at[holder.address] = time.monotonic() + PEER_RETRY_S
        return [memoryview(block) for block in found]

    def _grant_reads(self) -> None:
        """Let other hosts read there; and be bound before the first block is stored."""
        client = self._bound()
        if client is not None and self._settings.address:
            ticket = client.grant_reads(TICKET_S)
            self._holder = KvHolder(self._settings.address, ticket)

    def _is_ours(self, data: memoryview) -> bool:
        return len(data) == self._block_bytes
