"""What happened, numbered, so that who watches can go on where it was."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class NewsKind(IntEnum):
    """As `MemoryEventKind` of the contract."""

    SESSION_BOUND = 1
    SESSION_FENCED = 2
    SEGMENT_SEALED = 3
    SEGMENT_CHANGED = 4
    FREED = 5
    BLOCKS_EVICTED = 6
    CORRUPTION = 7
    PRESSURE = 8
    GPU_FAULT = 9
    GPU_VERIFY = 10
    GPU_HEALTH = 11


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that happened."""

    sequence: int
    kind: NewsKind
    tenant: str = ""
    session: int = 0
    segment: str = ""
    epoch: int = 0
    slab_id: int = 0
    value: int = 0
    device: str = ""


class News:
    """The latest items; a reader that is away for longer than that has to list everything anew."""

    def __init__(self, items_max: int = 4096) -> None:
        self._items: deque[Item] = deque(maxlen=items_max)
        self.sequence = 0
        """Of the last item."""

    def add(
        self,
        kind: NewsKind,
        *,
        tenant: str = "",
        session: int = 0,
        segment: str = "",
        epoch: int = 0,
        slab_id: int = 0,
        value: int = 0,
        device: str = "",
    ) -> None:
        """Something happened."""
        self.sequence += 1
        self._items.append(
            Item(self.sequence, kind, tenant, session, segment, epoch, slab_id, value, device)
        )

    def since(self, sequence: int, items_max: int = 256) -> tuple[Sequence[Item], bool]:
        """The items after this one, and whether some are missing before them."""
        oldest = self._items[0].sequence if self._items else self.sequence + 1
        has_gap = sequence > self.sequence or sequence + 1 < oldest
        start = 0 if has_gap else sequence + 1 - oldest
        return [
            self._items[i] for i in range(start, min(len(self._items), start + items_max))
        ], has_gap
