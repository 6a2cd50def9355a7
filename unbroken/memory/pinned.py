"""Blocks that are pinned, where they lie in this process's memory."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from unbroken.memory import checksums
from unbroken.memory.checksums import Algorithm
from unbroken.memory.mapped import ReaderSlab
from unbroken.memory.rows import Row, Rows


class StoredBlock(NamedTuple):
    """A block where it lies, for as long as its pin lasts."""

    data: memoryview
    num_tokens: int
    checksum: int
    algorithm: Algorithm
    """Of the checksum."""


_stored: Callable[[Iterable[object]], StoredBlock] = partial(
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType] - Its elements are what is given.
    StoredBlock,
)
"""As `StoredBlock._make`, with no line of Python: a get makes many."""


class Pinning(Protocol):
    """Who pinned them: see `MemoryClient`."""

    def is_bound(self, life: int) -> bool: ...

    def release_pin(self, pin_id: int, life: int) -> None: ...


class Pinned:
    """Blocks that nobody overwrites. Use it as a context; its views must not outlive that."""

    def __init__(
        self,
        client: Pinning,
        pin_id: int,
        life: int,
        found: "Located",
        expires_at: float,
    ) -> None:
        """`life` is the client's when it was pinned."""
        self._client = client
        self._pin_id = pin_id
        self._life = life
        self._found = found
        self._expires_at = expires_at
        self._is_released = False

    def __len__(self) -> int:
        return len(self._found.rows)

    def __iter__(self) -> Iterator[StoredBlock]:
        return self._found.blocks()

    def __getitem__(self, index: int) -> StoredBlock:
        return self._found.block(self._found.rows[index])

    @property
    def is_valid(self) -> bool:
        """Whether the bytes cannot have been overwritten. Look after you used them."""
        return (
            not self._is_released
            and time.monotonic() < self._expires_at
            and self._client.is_bound(self._life)
        )

    def release(self) -> None:
        """Let others overwrite them. Idempotent."""
        self._is_released = True
        self._found = NOTHING
        if self._pin_id:
            self._client.release_pin(self._pin_id, self._life)
            self._pin_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Located:
    """Rows of blocks, and the slabs that they lie in. A block is made when somebody looks at it:
    to see how many there are takes no view of any."""

    __slots__ = ("_views", "rows")

    def __init__(self, rows: Rows, views: Mapping[int, tuple[memoryview, int]]) -> None:
        """`views` has the memory of each slab, and the size of its blocks."""
        self.rows = rows
        self._views = views

    def first(self, number: int) -> "Located":
        """So many of them, or all."""
        if number >= len(self.rows):
            return self
        return Located(self.rows.first(number), self._views)

    def blocks(self) -> Iterator[StoredBlock]:
        """All, in order."""
        # By columns, and no loop of our own where none is needed: this is a hot path.
        rows = self.rows
        places = zip(rows.slots, map(self._views.__getitem__, rows.slab_ids), strict=True)
        datas = [view[slot * size : (slot + 1) * size] for slot, (view, size) in places]
        known = map(_ALGORITHMS.__getitem__, rows.algorithms)
        return map(_stored, zip(datas, rows.num_tokens, rows.checksums, known, strict=True))

    def block(self, row: Row) -> StoredBlock:
        """One of them."""
        view, size = self._views[row.slab_id]
        data = view[row.slot * size : (row.slot + 1) * size]
        return StoredBlock(data, row.num_tokens, row.checksum, _ALGORITHMS[row.algorithm])

    def num_intact(self) -> int:
        """How many of the first match their checksums."""
        for number, block in enumerate(self.blocks()):
            if checksums.compute(block.data, block.algorithm) != block.checksum:
                return number
        return len(self.rows)


NOTHING = Located(Rows(), {})
_ALGORITHMS = {0: Algorithm.XXH3} | {int(one): one for one in Algorithm}
"""By the contract's number."""


def located(rows: Rows, slab_of: Callable[[int], ReaderSlab | None]) -> Located:
    """The first of them that this process can read, and can compare with their checksums."""
    views: dict[int, tuple[memoryview, int]] = {}
    slab_ids, slots, algorithms = rows.slab_ids, rows.slots, rows.algorithms
    readable = len(rows)
    for slab_id in dict.fromkeys(slab_ids):
        slab = slab_of(slab_id)
        if slab is None:
            readable = slab_ids.index(slab_id)
            break
        views[slab_id] = (memoryview(slab.mapping).toreadonly(), slab.block_bytes)
    num_slots = {slab_id: len(view) // size for slab_id, (view, size) in views.items()}
    if num_slots and max(slots) >= min(num_slots.values()):  # Of another slab, or beyond its end.
        places = zip(slots, slab_ids[:readable], strict=False)
        beyond = (index for index, (slot, of) in enumerate(places) if slot >= num_slots[of])
        readable = next(beyond, readable)
    for number in set(algorithms) - _ALGORITHMS.keys():
        readable = min(readable, algorithms.index(number))
    return Located(rows, views).first(readable)
