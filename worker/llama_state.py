"""The bytes in which llama.cpp gives and takes the KV of one sequence, cut into rows of tokens.

    magic, slot, number of streams                          3 x uint32
    for each stream: number of tokens                       uint32; 0 for all but the slot's
        for each token: position, 1, slot                   3 x uint32
        transposed (0), number of layers                    2 x uint32
        for each layer: type, bytes of a row, keys          int32, uint64, (tokens, row)
        for each layer: type, bytes of a row, values        int32, uint64, (tokens, row)

So a token's keys and values are rows of their own, and those of some tokens can be put beside those
of others. Another arrangement (rows that differ in size, values that are transposed, another
version) is not understood, and is refused: `parse` accepts what `compose` would write.
"""

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.uint8]  # (2, num_layers, tokens, row_bytes): keys, then values

_WORDS = struct.Struct("<3I")
_WORD = struct.Struct("<I")
_LAYERS = struct.Struct("<2I")
_ROW = struct.Struct("<iQ")


@dataclass(frozen=True, slots=True)
class StateFormat:
    """What the states of one context have in common."""

    magic: int
    num_streams: int
    num_layers: int
    row_type: int
    row_bytes: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.num_layers * self.row_bytes

    def empty(self, slot: int, num_tokens: int) -> tuple[bytearray, Rows]:
        """A state whose rows are zeros, and a view of them to be filled in."""
        state = self._head(slot, num_tokens)
        rows_at = len(state)
        state += bytes(self._rows_bytes(num_tokens) + self._tail_bytes(slot))
        layers = np.frombuffer(
            state, np.uint8, count=self._rows_bytes(num_tokens), offset=rows_at
        ).reshape(2, self.num_layers, -1)
        layers[:, :, : _ROW.size] = np.frombuffer(
            _ROW.pack(self.row_type, self.row_bytes), np.uint8
        )
        return state, self._cut(layers, num_tokens)

    def rows(self, state: bytes, slot: int, num_tokens: int) -> Rows:
        """The rows of a state of this format, of its first tokens in order.

        Raises ValueError if it is none, or has other tokens than these.
        """
        head = self._head(slot, num_tokens)
        size = len(head) + self._rows_bytes(num_tokens) + self._tail_bytes(slot)
        if len(state) != size:
            raise ValueError(f"expected {num_tokens} tokens of {self}, got {len(state)} bytes")
        if state[: len(head)] != bytes(head):
            raise ValueError(f"expected tokens 0 to {num_tokens - 1} of slot {slot} in order")
        layers = np.frombuffer(
            state, np.uint8, count=self._rows_bytes(num_tokens), offset=len(head)
        ).reshape(2, self.num_layers, -1)
        return self._cut(layers, num_tokens)

    def _head(self, slot: int, num_tokens: int) -> bytearray:
        """What stands before the rows."""
        head = bytearray(_WORDS.pack(self.magic, slot, self.num_streams))
        head += bytes(_WORD.size * slot) + _WORD.pack(num_tokens)
        tokens = np.empty((num_tokens, 3), "<u4")
        tokens[:] = 0, 1, slot
        tokens[:, 0] = np.arange(num_tokens)
        head += tokens.tobytes()
        head += _LAYERS.pack(0, self.num_layers)
        return head

    def _tail_bytes(self, slot: int) -> int:
        """Of what stands after them: the streams that have nothing."""
        return _WORD.size * (self.num_streams - slot - 1)

    def _rows_bytes(self, num_tokens: int) -> int:
        return 2 * self.num_layers * (_ROW.size + num_tokens * self.row_bytes)

    def _cut(self, layers: NDArray[np.uint8], num_tokens: int) -> Rows:
        """Without what stands before the rows of each layer: a view."""
        return layers[:, :, _ROW.size :].reshape(
            2, self.num_layers, num_tokens, self.row_bytes, copy=False
        )


def parse(state: bytes, slot: int, num_tokens: int) -> tuple[StateFormat, Rows]:
    """The format of a state that has these tokens in this slot, and its rows.

    Raises ValueError if it is not arranged as this page says.
    """
    try:
        magic, _, num_streams = _WORDS.unpack_from(state, 0)
        layers_at = _WORDS.size + _WORD.size * (slot + 1) + _WORDS.size * num_tokens
        _, num_layers = _LAYERS.unpack_from(state, layers_at)
        row_type, row_bytes = _ROW.unpack_from(state, layers_at + _LAYERS.size)
    except struct.error as error:
        raise ValueError(
            f"expected a state of {num_tokens} tokens, got {len(state)} bytes"
        ) from error
    if not (slot < num_streams <= 4096 and num_layers <= 4096 and row_bytes <= 1 << 20):
        raise ValueError("expected the state of a sequence, got something else")
    form = StateFormat(magic, num_streams, num_layers, row_type, row_bytes)
    rows = form.rows(state, slot, num_tokens)
    written, into = form.empty(slot, num_tokens)
    into[:] = rows
    if bytes(written) != state:
        raise ValueError("expected keys and values of equal rows, one after the other")
    return form, rows
