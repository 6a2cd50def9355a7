"""Reads the KV of llama.cpp's slots block by block, and puts a slot's KV together from blocks.

llama.cpp gives the KV of a sequence as a whole only (`worker.llama_state`): 23 kB a token of the
default model, so that to have each new block would cost a copy of all that is before it. Its cells
are read instead where they are: they are found once, by their contents, and a slot's tokens lie
there in order, since a slot is filled and cut at its end only. Both is compared with what llama.cpp
itself gives: whenever a slot has twice as many tokens as at the last time. If it ever differs,
nothing is read any more. What comes back goes through llama.cpp's own interface.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from worker import llama_state
from worker.llama_state import Rows, StateFormat

_CHUNK_BYTES = 1 << 24
_NEEDLE_BYTES = 256


class CellsMovedError(Exception):
    """The cells are not what llama.cpp says they are: never read them again."""


class NativeState(Protocol):
    """What is used of the binding's context."""

    def get_state_seq_data_with_flags(self, seq_id: int, flags: int) -> bytes: ...

    def set_state_seq_data_with_flags(self, src: bytes, seq_id: int, flags: int) -> None:
        """Raises ValueError if it is not taken; then the sequence is empty."""
        ...


class KvCells:
    """The KV of all slots of one context. `read` and `state_of` look at memory of llama.cpp's."""

    def __init__(
        self,
        context: NativeState,
        form: StateFormat,
        cells: NDArray[np.uint8],
        *,
        slot_tokens: int,
    ) -> None:
        """`cells` is (2, num_layers, num_slots, slot_tokens, row_bytes)."""
        self._context = context
        self._form = form
        self._cells = cells
        self._num_compared = [0] * (cells.shape[2])
        """By slot: tokens that were compared."""
        self.slot_tokens = slot_tokens

    @property
    def token_bytes(self) -> int:
        return self._form.token_bytes

    @property
    def layout(self) -> str:
        """How a block is arranged."""
        form = self._form
        return f"type {form.row_type}: kv 2, layer {form.num_layers}, token, row {form.row_bytes}"

    def read(self, slot: int, start: int, end: int) -> bytes:
        """Keys and values of these tokens, which the slot holds. Raises CellsMovedError."""
        if end >= 2 * self._num_compared[slot]:
            self._compare(slot, end)
        return self._cells[:, :, slot, start:end].tobytes()

    def trimmed(self, slot: int, keep_tokens: int) -> None:
        """The slot has forgotten what it held beyond these tokens."""
        self._num_compared[slot] = min(self._num_compared[slot], keep_tokens)

    def state_of(self, slot: int, start: int, blocks: Sequence[memoryview]) -> bytes:
        """What the slot holds of its first `start` tokens, and after them these blocks."""
        form = self._form
        num_block_tokens = len(blocks[0]) // form.token_bytes
        state, rows = form.empty(slot, start + len(blocks) * num_block_tokens)
        rows[:, :, :start] = self._cells[:, :, slot, :start]
        for index, block in enumerate(blocks):
            at = start + index * num_block_tokens
            rows[:, :, at : at + num_block_tokens] = np.frombuffer(block, np.uint8).reshape(
                2, form.num_layers, num_block_tokens, form.row_bytes
            )
        return bytes(state)

    def fill(self, slot: int, state: bytes, num_tokens: int) -> None:
        """Let the slot hold this state and nothing else.

        Raises:
            ValueError: llama.cpp does not take it; the slot may hold anything.
            CellsMovedError: It has it elsewhere than it should.
        """
        self._context.set_state_seq_data_with_flags(state, slot, 0)
        self._num_compared[slot] = 0
        self._expect(slot, self._form.rows(state, slot, num_tokens))
        self._num_compared[slot] = num_tokens

    def close(self) -> None:
        """Look at no memory any more: it is about to be freed."""
        self._cells = self._cells[:, :, :, :0]

    def _compare(self, slot: int, num_tokens: int) -> None:
        """With what llama.cpp gives, which may have some tokens more."""
        state = self._context.get_state_seq_data_with_flags(slot, 0)
        num_given = num_tokens + (len(state) - self._state_bytes(num_tokens)) // (
            self._state_bytes(1) - self._state_bytes(0)
        )
        try:
            rows = self._form.rows(state, slot, num_given)
        except ValueError as error:
            raise CellsMovedError(str(error)) from error
        if num_given < num_tokens:
            raise CellsMovedError(f"expected {num_tokens} tokens of slot {slot}, got {num_given}")
        self._expect(slot, rows[:, :, :num_tokens])
        self._num_compared[slot] = num_tokens

    def _expect(self, slot: int, rows: Rows) -> None:
        if not np.array_equal(self._cells[:, :, slot, : rows.shape[2]], rows):
            raise CellsMovedError(f"expected {rows.shape[2]} tokens of slot {slot} in order")

    def _state_bytes(self, num_tokens: int) -> int:
        return len(self._form.empty(0, 0)[0]) + num_tokens * (12 + self._form.token_bytes)


def find_cells(
    context: NativeState,
    probe: Callable[[int], int],
    *,
    slot: int,
    num_slots: int,
    slot_tokens: int,
) -> KvCells:
    """Find the cells.

    `probe` lets the slot, and no other, hold the text of that number, and tells how many tokens
    that are. Raises ValueError if the state of a sequence is not as `worker.llama_state` says, or
    the cells are not where they are looked for; OSError if this process's memory can't be read.
    """
    form, rows = _given(context, slot, probe(0))
    if form.num_streams != num_slots:
        raise ValueError(f"expected {num_slots} streams, got {form.num_streams}")
    place = _Place(form, slot, num_slots, slot_tokens)
    needle = rows[0, 0].tobytes()[:_NEEDLE_BYTES]
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Looked at through the kernel: what else matches may be gone in the next moment, or be what
        # another context had before.
        found = [
            address - place.before
            for first, end in _mappings(place.size)
            for address in occurrences(
                memory, needle, first + place.before, end - place.size + place.before
            )
            if place.holds(memory, address - place.before, rows)
        ]
        _, rows = _given(context, slot, probe(1))
        found = [address for address in found if place.holds(memory, address, rows)]
    finally:
        os.close(memory)
    if len(found) != 1:
        raise ValueError(f"expected the cells once in memory, found them {len(found)} times")
    return KvCells(context, form, place.mapped(found[0]), slot_tokens=slot_tokens)


def _given(context: NativeState, slot: int, num_tokens: int) -> tuple[StateFormat, Rows]:
    state = context.get_state_seq_data_with_flags(slot, 0)
    return llama_state.parse(state, slot, num_tokens)


@dataclass(frozen=True, slots=True)
class _Place:
    """How cells lie in memory: (num_layers, 2, num_slots, slot_tokens, row_bytes)."""

    form: StateFormat
    slot: int
    num_slots: int
    slot_tokens: int

    @property
    def before(self) -> int:
        """Bytes before the slot's first row of keys."""
        return self.slot * self.slot_tokens * self.form.row_bytes

    @property
    def layer_bytes(self) -> int:
        """Of keys, or of values."""
        return self.num_slots * self.slot_tokens * self.form.row_bytes

    @property
    def size(self) -> int:
        return 2 * self.form.num_layers * self.layer_bytes

    def holds(self, memory: int, address: int, rows: Rows) -> bool:
        """Whether the slot has these rows, if cells begin there."""
        num_bytes = rows.shape[2] * self.form.row_bytes
        try:
            return all(
                os.pread(
                    memory,
                    num_bytes,
                    address + (2 * layer + kind) * self.layer_bytes + self.before,
                )
                == rows[kind, layer].tobytes()
                for layer in range(self.form.num_layers)
                for kind in range(2)
            )
        except OSError:
            return False

    def mapped(self, address: int) -> NDArray[np.uint8]:
        """A view of the cells, as `KvCells` has it. llama.cpp frees them with the context."""
        buffer = memoryview((ctypes.c_ubyte * self.size).from_address(address))
        flat: NDArray[np.uint8] = np.frombuffer(buffer.toreadonly(), np.uint8)
        shape = (self.form.num_layers, 2, self.num_slots, self.slot_tokens, self.form.row_bytes)
        return flat.reshape(shape).swapaxes(0, 1)


def _mappings(num_bytes: int) -> list[tuple[int, int]]:
    """This process's own writable memory, in pieces of at least so many bytes."""
    joined: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, end = (int(text, 16) for text in span.split("-"))
        if rights.startswith("rw-p"):
            if joined and joined[-1][1] == first:
                first = joined.pop()[0]  # What lies in it may have grown across the seam.
            joined.append((first, end))
    return [(first, end) for first, end in joined if end - first >= num_bytes]


def occurrences(memory: int, needle: bytes, first: int, last: int) -> Iterator[int]:
    """Where these bytes are, at addresses from `first` to `last`.

    What was one mapping may have holes by now: only the pages that are gone are passed over.
    """
    start = first
    while start <= last:
        # Chunks overlap by a needle, less one byte.
        wanted = min(_CHUNK_BYTES, last + 1 - start) + len(needle) - 1
        try:
            chunk = os.pread(memory, wanted, start)
        except OSError:
            chunk = b""
        at = chunk.find(needle)
        while at >= 0:
            yield start + at
            at = chunk.find(needle, at + 1)
        if len(chunk) == wanted:
            start += wanted - (len(needle) - 1)
        else:
            start = (start + len(chunk)) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
