"""An engine's KV blocks in the memory service of its host.

    put    name the block, copy its bytes, go on            a thread stores it: copy, checksum, tell
    fetch  name the blocks, wait for the thread a little    it pins, compares and hands them over

What may wait, or fail, is done by one thread. A step waits for that only where it would have to
compute instead, and not for long: whatever does not come in time, is not there or is not intact is
a miss. A bug in there costs the engine its store and nothing else: it is told as an error, and of
every report of load from then on. The memory service sees one client for all tenants of the engine;
what tenants must not share has their names in its keys.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from unbroken import log
from unbroken.errors import UnbrokenError
from unbroken.memory.client import KEYS_A_CALL, MemoryClient, Pinned
from unbroken.memory.keys import KeyChain, KeySpace
from unbroken.v1 import worker_pb2
from worker.config import WorkerConfig
from worker.engine import EngineSpec, KvHolder
from worker.engine import Sequence as Stream
from worker.kv_slabs import Slabs

QUEUED_BLOCKS_MAX = 256
"""Blocks that wait to be stored; more are dropped."""
FETCH_S_MAX = 2.0
FETCH_BASE_S = 0.25
FETCH_TOKEN_S = 0.001
"""A fetch that takes longer than the base and this for each token, or than the maximum, is a miss:
whoever watches the engine allows a step as much for tokens that it might have to compute."""
RETRY_S = 1.0
"""After a failure nothing is asked of the service for so long."""
GRANT_RETRY_S = 10.0
"""After a service that gave no ticket is asked for one again."""
PEER_RETRY_S = 10.0
"""Nor of another host that a fetch has waited for in vain: it may be gone."""
TICKET_S = 3600.0
"""How long other hosts may read with a ticket. There is a new one when half of that is over: so one
that somebody has kept is not good for long."""
_READ_SHARE = 0.75
"""Of the time that a fetch has left: for another host; then something is made of what came."""
_PIN_S = 30.0
_REBIND_S = 0.1
_CLOSE_S = 2.0
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

    def turn_off(self) -> None: ...

    def close(self) -> bool: ...


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
        self._slabs = Slabs(block_bytes, block_tokens=spec.block_size, bytes_max=settings.bytes_max)
        self._retry_at = 0.0
        self._peer_retry_at: dict[str, float] = {}
        self._late: _Fetch | None = None
        """What was waited for too long, until it is done."""
        self._holder: KvHolder | None = None
        self._renew_at: float | None = None
        """When there is to be another ticket; None: nobody reads there."""
        self.use = worker_pb2.KvStoreUse()
        self._thread = threading.Thread(target=self._work, name="kv-store", daemon=True)
        self._thread.start()

    # For the engine.

    def put(self, stream: Stream, index: int, data: bytes) -> None:
        """Store block `index` of the sequence, soon; or not."""
        assert len(data) == self._block_bytes, "blocks are of one size"
        key = self._keys(stream, index + 1)[index]
        if not self._queue(_Put(key, data)):
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
        if self._late is None and not self.use.is_off:
            self._jobs.put(job)
            if self.use.is_off:  # Meanwhile: nobody may take it.
                job.done.set()
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
        """Where other hosts read what is stored here; None if that is not known yet. It changes.

        May be called by any thread.
        """
        return None if self.use.is_off else self._holder

    def turn_off(self) -> None:
        """Nothing is stored or fetched any more, and whoever places streams is told so."""
        self.use.is_off = True

    def close(self) -> bool:
        """Leave the blocks to others. Whether that is done.

        If not, the thread hangs: it may still call `take`, until the process ends.
        """
        self._jobs.put(None)
        self._thread.join(_CLOSE_S)
        return not self._thread.is_alive()

    def _queue(self, put: _Put) -> bool:
        if self.use.is_off or self._jobs.qsize() >= QUEUED_BLOCKS_MAX:
            return False
        self._jobs.put(put)
        return True

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
            self._serve()
        except Exception:
            _log.exception("a fault of the engine's own: its KV is not stored any more")
            self.turn_off()
        finally:
            while not self._jobs.empty():
                if isinstance(job := self._jobs.get(), _Fetch):
                    job.done.set()
        if self._client is not None:
            try:
                self._client.close()
            except UnbrokenError as error:
                _log.warning("the memory service failed", error=str(error))

    def _serve(self) -> None:
        self._tried(self._grant_reads)  # First: the sidecar is told when it greets, which is soon.
        if self._settings.peers:
            import_module("worker.kv_peers")  # With gRPC: 0.1 s that no fetch shall wait for.
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_s())
            except queue.Empty:
                self._tried(self._grant_reads)
                continue
            if job is None:
                return
            try:
                if self._renew_at is not None and time.monotonic() >= self._renew_at:
                    self._tried(self._grant_reads)
                self._tried(partial(self._do, job))
            finally:
                if isinstance(job, _Fetch):
                    job.done.set()

    def _tried(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (UnbrokenError, OSError) as error:
            _log.warning("the memory service failed", error=str(error))
            self._retry_at = time.monotonic() + RETRY_S

    def _idle_s(self) -> float | None:
        """How long to wait for work, at most."""
        return None if self._renew_at is None else max(0.0, self._renew_at - time.monotonic())

    def _do(self, job: _Put | _Fetch) -> None:
        if isinstance(job, _Fetch):
            if (client := self._bound()) is not None:
                self._take(client, job)
        else:
            self._put(job)
        if self._jobs.empty():
            self._slabs.flush()

    def _put(self, put: _Put) -> None:
        is_stored = False
        try:
            client = self._bound()
            if client is not None and not self.use.is_off:  # It may be turned off meanwhile.
                is_stored = self._slabs.store(client, put.key, put.data)
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

    def _take(self, client: MemoryClient, fetch: _Fetch) -> None:
        with ExitStack() as pins:
            blocks: list[memoryview] = []
            strange: list[_Put] = []
            pinned = self._pin(client, fetch, blocks, pins)
            for holder in fetch.holders:
                if len(blocks) == len(fetch.keys):
                    break
                at = len(blocks)
                if not (found := self._read(holder, fetch, at)):
                    continue
                strange += map(_Put, fetch.keys[at:], found)
                blocks += map(memoryview, found)
                # What comes after them may be here: they alone were evicted, or never came.
                pinned += self._pin(client, fetch, blocks, pins)
            taken = fetch.take(blocks) if blocks else None
            num_blocks = len(blocks)
            blocks.clear()
            if all(part.is_valid for part in pinned):
                fetch.num_blocks, fetch.taken = num_blocks, taken
        # The engine has them now, and does not store again what it has taken from a store: so the
        # next one would have to ask the other host again, if that is still there.
        for put in strange:
            self.use.blocks_dropped_total += not self._queue(put)

    def _pin(
        self, client: MemoryClient, fetch: _Fetch, blocks: list[memoryview], pins: ExitStack
    ) -> list[Pinned]:
        """Add those that are stored here and come after these."""
        pinned: list[Pinned] = []
        while len(blocks) < len(fetch.keys):
            keys = fetch.keys[len(blocks) : len(blocks) + KEYS_A_CALL]
            part = pins.enter_context(client.get(keys, ttl_s=_PIN_S))
            pinned.append(part)
            found = [*takewhile(self._is_ours, (block.data for block in part))]
            blocks += found
            if len(found) < len(keys):
                break
        return pinned

    def _read(self, holder: KvHolder, fetch: _Fetch, start: int) -> list[bytes]:
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
        return found

    def _grant_reads(self) -> None:
        """Let other hosts read there; and be bound before the first block is stored."""
        if self._settings.address:
            self._renew_at = time.monotonic() + GRANT_RETRY_S  # Unless it is granted.
        client = self._bound()
        if client is not None and self._settings.address:
            ticket = client.grant_reads(TICKET_S)
            self._renew_at = time.monotonic() + TICKET_S / 2
            self._holder = KvHolder(self._settings.address, ticket)

    def _is_ours(self, data: memoryview) -> bool:
        return len(data) == self._block_bytes
