"""KV blocks of llama.cpp: read where they are, put together elsewhere, and bit-equal afterwards."""

import asyncio
import ctypes
import mmap
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.worker.stores import Shelf, ShelfStore
from tests.worker.test_llama import FEATURES, LIST, PROSE, Engine, Output, encode, load
from unbroken.generation import GenerationParams, StopConditions
from unbroken.tokenizer import Tokenizer
from worker import llama_kv, llama_state
from worker.llama import BLOCK_SIZE, LlamaRunner
from worker.llama_kv import CellsMovedError, KvCells
from worker.llama_state import StateFormat

# The bytes of a state.

FORM = StateFormat(magic=0xAF143CD8, num_streams=3, num_layers=2, row_type=1, row_bytes=8)


def state_of(slot: int, num_tokens: int) -> bytes:
    state, rows = FORM.empty(slot, num_tokens)
    rows[:] = np.arange(rows.size, dtype=np.uint32).astype(np.uint8).reshape(rows.shape)
    return bytes(state)


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_state_is_understood_and_written_again_byte_by_byte(slot: int) -> None:
    state = state_of(slot, 5)
    form, rows = llama_state.parse(state, slot, 5)
    assert form == FORM
    again, into = form.empty(slot, 5)
    into[:] = rows
    assert bytes(again) == state


def test_whatever_is_arranged_otherwise_is_refused() -> None:
    state = state_of(1, 5)
    layers_at = 12 + 2 * 4 + 5 * 12
    for at, value in (
        (12 + 2 * 4, 7),  # The position of a token.
        (layers_at, 1),  # Transposed.
        (layers_at + 4, 9),  # The number of layers.
        (layers_at + 8 + 4, 9),  # The bytes of a row.
        (layers_at + 8 + 12 + 5 * 8 + 4, 4),  # Those of another layer.
        (len(state) - 4, 1),  # Tokens of another stream.
    ):
        other = bytearray(state)
        other[at] = value
        with pytest.raises(ValueError, match="expected"):
            llama_state.parse(bytes(other), 1, 5)
    for short in (b"", state[:11], state[:-1], state + b"\0"):
        with pytest.raises(ValueError, match="expected"):
            llama_state.parse(short, 1, 5)


class Given:
    """A context that says what it has been told, whatever is in its cells."""

    def __init__(self, state: bytes) -> None:
        self.state = state

    def get_state_seq_data_with_flags(self, seq_id: int, flags: int) -> bytes:  # noqa: ARG002
        return self.state

    def set_state_seq_data_with_flags(self, src: bytes, seq_id: int, flags: int) -> None:  # noqa: ARG002
        self.state = src


def test_cells_are_read_only_if_they_have_so_many_tokens_and_in_order() -> None:
    state = state_of(1, 6)
    rows = FORM.rows(state, 1, 6)
    cells = np.zeros((2, 2, 3, 8, 8), np.uint8)
    cells[:, :, 1, :6] = rows

    def read(state: bytes, end: int) -> bytes:
        return KvCells(Given(state), FORM, cells, slot_tokens=8).read(1, 0, end)

    assert read(state, 6) == rows.tobytes()
    assert read(state, 4) == rows[:, :, :4].tobytes(), "it may have more"
    with pytest.raises(CellsMovedError, match="expected 8 tokens of slot 1, got 6"):
        read(state, 8)
    first, second = (slice(at, at + 12) for at in (12 + 2 * 4, 12 + 2 * 4 + 12))
    swapped = bytearray(state)
    swapped[first], swapped[second] = state[second], state[first]
    with pytest.raises(CellsMovedError, match="in order"):
        read(bytes(swapped), 6)


PAGE = mmap.PAGESIZE
NEEDLE = b"a needle of the test"


@pytest.mark.parametrize("hole", [None, 0, 1, 4])
def test_what_is_looked_for_is_found_behind_pages_that_are_gone(hole: int | None) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    size, private, writable = 5 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 3
    start: int = libc.mmap(None, ctypes.c_size_t(size), writable, private, -1, ctypes.c_long(0))
    pages = {number: ctypes.c_void_p(start + number * PAGE) for number in range(5)}
    offsets = [5, 2 * PAGE - 7, 2 * PAGE + 40, 4 * PAGE - 20]
    for offset in offsets:
        ctypes.memmove(start + offset, NEEDLE, len(NEEDLE))
    try:
        if hole is not None:
            assert libc.munmap(pages.pop(hole), ctypes.c_size_t(PAGE)) == 0
        with open("/proc/self/mem", "rb") as memory:
            last = start + size - len(NEEDLE)
            found = list(llama_kv.occurrences(memory.fileno(), NEEDLE, start, last))
    finally:
        for page in pages.values():
            libc.munmap(page, ctypes.c_size_t(PAGE))
    spans = [range(offset // PAGE, (offset + len(NEEDLE) - 1) // PAGE + 1) for offset in offsets]
    there = [offset for offset, span in zip(offsets, spans, strict=True) if hole not in span]
    assert [where - start for where in found] == there


# A real model.

SHORT = StopConditions(max_tokens=20)


@dataclass(frozen=True)
class Place:
    """A context, and where its cells are."""

    runner: LlamaRunner
    cells: KvCells

    def with_shelf(self, shelf: Shelf) -> LlamaRunner:
        """The same model with empty slots, and with its blocks on a shelf."""
        for slot in range(self.runner.spec.batch_size_max):
            self.runner._context.trim(slot, 0)  # pyright: ignore[reportPrivateUsage]
            self.cells.trimmed(slot, 0)
        spec = replace(self.runner.spec, kv_restore=True)
        return LlamaRunner(
            spec,
            self.runner._context,  # pyright: ignore[reportPrivateUsage]
            self.cells,
            ShelfStore(shelf, spec),
        )


async def whole(
    runner: LlamaRunner,
    prompt: Sequence[int],
    params: GenerationParams,
    given: Sequence[int] = (),
    *,
    beside: Sequence[int] = (),
) -> Output:
    """What becomes of one attempt, perhaps beside another; all is stored then."""
    engine = Engine(runner)
    if beside:
        engine.submit(beside, params)
        await engine.step()
    output = await engine.complete(prompt, params, given)
    while await engine.step() is not None:
        pass
    return output


@pytest.fixture(scope="module")
def contexts() -> Generator[tuple[Place, Place]]:
    """Of different sizes, so that cells lie differently."""
    places: list[Place] = []
    for runner in (
        load(batch_size_max=3, context_length=256),
        load(batch_size_max=2, context_length=512),
    ):
        cells = runner._context.find_cells()  # pyright: ignore[reportPrivateUsage]
        assert cells is not None
        places.append(Place(runner, cells))
    first, second = places
    yield first, second
    for place in places:
        asyncio.run(place.runner.close())


@pytest.mark.llama
@pytest.mark.parametrize("feature", ["seeded", "json_schema"])
def test_what_is_restored_in_another_context_goes_on_bit_for_bit(
    contexts: tuple[Place, Place], feature: str
) -> None:
    text, params = FEATURES[feature]
    params = replace(params, stopping=SHORT, num_top_logprobs=3)
    shelf = Shelf()
    first, second = (place.with_shelf(shelf) for place in contexts)
    prompt = encode(Tokenizer(first.spec.tokenizer), text * 5)

    async def scenario() -> None:
        truth = await whole(first, prompt, params, beside=prompt[:30])
        cut = len(truth.token_ids) // 2
        given = truth.token_ids[:cut]
        resumed = await whole(second, prompt, params, given, beside=prompt[7:40])
        assert resumed.token_ids == truth.token_ids[cut:]
        assert resumed.logprobs == truth.logprobs[cut:], "to the last bit"
        assert resumed.ended is not None
        num_known = len(prompt) + cut
        assert resumed.ended.restored_tokens == (num_known - 1) // BLOCK_SIZE * BLOCK_SIZE

    asyncio.run(scenario())


@pytest.mark.llama
def test_the_blocks_of_a_restored_sequence_are_those_that_were_computed(
    contexts: tuple[Place, Place],
) -> None:
    shelf = Shelf()
    first, second = (place.with_shelf(shelf) for place in contexts)
    prompt = encode(Tokenizer(first.spec.tokenizer), PROSE * 10)[:70]
    params = replace(FEATURES["greedy"][1], stopping=SHORT)

    async def scenario() -> None:
        await whole(first, prompt, params)
        computed = dict(shelf.blocks)
        for key in list(shelf.blocks)[2:]:
            del shelf.blocks[key]
        await whole(second, prompt, params)
        assert shelf.blocks == computed, "two of them restored, the others computed after them"

    asyncio.run(scenario())


@pytest.mark.llama
def test_once_cells_are_not_where_they_were_nothing_is_stored_and_tokens_stay_the_same(
    contexts: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    runner = contexts[0].with_shelf(shelf)
    prompt = encode(Tokenizer(runner.spec.tokenizer), LIST * 10)[:60]
    params = replace(FEATURES["seeded"][1], stopping=SHORT)

    async def scenario() -> None:
        truth = await whole(runner, prompt, params)
        before = dict(shelf.blocks)
        assert before
        cells = contexts[0].cells
        monkeypatch.setattr(cells, "_cells", cells._cells[:, :, ::-1])  # pyright: ignore[reportPrivateUsage]
        shelf.blocks = {key: shelf.blocks[key] for key in list(shelf.blocks)[:3]}
        kept = dict(shelf.blocks)
        again = await whole(runner, prompt[3:], params)
        assert shelf.blocks == kept, "nothing that might be another's"
        assert runner._cells is None  # pyright: ignore[reportPrivateUsage]
        assert runner.kv_store_use is not None
        assert runner.kv_store_use.is_off, "whoever places streams is told"
        assert len(again.token_ids) == len(truth.token_ids)
        assert (await whole(runner, prompt, params)).token_ids == truth.token_ids

    asyncio.run(scenario())


@pytest.mark.llama
def test_what_a_store_that_hangs_may_look_at_is_not_freed(contexts: tuple[Place, Place]) -> None:
    shelf = Shelf()
    hanging = contexts[1].with_shelf(shelf)
    assert isinstance(hanging._store, ShelfStore)  # pyright: ignore[reportPrivateUsage]
    hanging._store.is_hung = True  # pyright: ignore[reportPrivateUsage]
    asyncio.run(hanging.close())
    cells = contexts[1].cells._cells  # pyright: ignore[reportPrivateUsage]
    assert cells.shape[3], "they are looked at still"
    contexts[1].with_shelf(shelf)  # Nor is the context.
