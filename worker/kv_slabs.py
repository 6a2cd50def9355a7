"""The slabs of a memory service that one engine stores its blocks in; the oldest make room."""

import time

from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import MemoryClient
from unbroken.memory.records import RECORD_BYTES, SLOTS_MAX
from unbroken.memory.writer import BlockWriter

SLAB_BYTES_MIN = 4 << 20
SLAB_BYTES_MAX = 64 << 20
"""An engine begins with a small slab, and each further one is twice as large: of those that live
shortly little is left, and what a dead engine left is evicted by whole slabs."""
RETRY_S = 1.0
"""After the service was full, no more room is asked for so long."""
_NO_ROOM = (Reason.MEMORY_EXHAUSTED, Reason.INVALID_FIELD)
"""Why another slab is refused: there is no memory left, or one session may not have so many."""

_log = log.get_logger(__name__)


class Slabs:
    """Those of one engine, written one after the other, and again from the first on."""

    def __init__(self, block_bytes: int, *, block_tokens: int, bytes_max: int) -> None:
        """`bytes_max` is for blocks and their records."""
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._bytes_max = bytes_max
        self.writers: list[BlockWriter] = []
        self._turn = 0
        """Which of the writers is written to."""
        self._num_left = 0
        """Blocks until it is the next one's turn."""
        self._retry_at = 0.0

    def store(self, client: MemoryClient, key: bytes, data: bytes) -> bool:
        """Whether there was room. Raises what the service answers, but for that it has none."""
        if any(writer.is_lost for writer in self.writers):
            self.writers, self._num_left = [], 0  # Others may have what was in there.
        if not self._num_left and not self._next(client):
            return False
        is_stored = self.writers[self._turn].put(key, data, self._block_tokens)
        self._num_left -= 1
        return is_stored

    def flush(self) -> None:
        """Tell of what was stored."""
        for writer in self.writers:
            writer.flush()

    def _next(self, client: MemoryClient) -> bool:
        """Open one more, or else begin again with the first; whether there is one."""
        writers, slot_bytes = self.writers, self._block_bytes + RECORD_BYTES
        slab_bytes = min(SLAB_BYTES_MAX, SLAB_BYTES_MIN << min(len(writers), 16))
        used_bytes = sum(writer.num_slots for writer in writers) * slot_bytes
        num_slots = min(
            max(1, slab_bytes // self._block_bytes),
            max(0, self._bytes_max - used_bytes) // slot_bytes,
            SLOTS_MAX,
        )
        if (num_slots or not writers) and self._open(client, max(1, num_slots)):
            self._turn = len(writers) - 1
        elif writers:
            self._turn = (self._turn + 1) % len(writers)
        else:
            return False
        self._num_left = writers[self._turn].num_slots
        return True

    def _open(self, client: MemoryClient, num_slots: int) -> bool:
        """Whether the service has room for it."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.writers.append(client.open_writer(self._block_bytes, num_slots))
        except UnbrokenError as error:
            if error.reason not in _NO_ROOM:
                raise
            _log.warning("the memory service has no more room", detail=error.detail)
            self._retry_at = time.monotonic() + RETRY_S
            return False
        return True
