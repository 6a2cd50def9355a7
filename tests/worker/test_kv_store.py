"""Claims of `worker.kv_store`, with a real memory service."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.memory_service.processes import ServiceProcess, serving, until
from tests.memory_service.test_service import remote_address
from unbroken.generation import GenerationParams
from unbroken.memory import records
from worker import kv_slabs, kv_store
from worker.engine import EngineSpec, KvHolder
from worker.engine import Sequence as Stream
from worker.kv_store import KvStore, StoreSettings
from worker.sampler import Sampler
from worker.simulated import simulated_runner

BLOCK_BYTES = 4096
SPEC: EngineSpec = simulated_runner(block_size=4).spec


def stream(*prompt: int, tenant: str = "") -> Stream:
    return Stream(
        slot=1,
        prompt=prompt,
        output=[],
        num_given=0,
        first_offset=0,
        output_max=1,
        stop_token_ids=frozenset(),
        min_tokens=0,
        window_tokens=1,
        sampler=Sampler(GenerationParams(), (), vocab_size=1, eos_token_ids=frozenset()),
        kv_root=0,
        tenant=tenant,
    )


def store(
    directory: Path,
    *,
    bytes_max: int = 64 * BLOCK_BYTES,
    block_bytes: int = BLOCK_BYTES,
    layout: str = "test",
) -> KvStore:
    settings = StoreSettings(directory, bytes_max)
    return KvStore(settings, SPEC, block_bytes=block_bytes, layout=layout)


def block(number: int, size: int = BLOCK_BYTES) -> bytes:
    return number.to_bytes(8, "little") * (size // 8)


def numbers(blocks: Sequence[memoryview]) -> list[int]:
    return [int.from_bytes(data[:8], "little") for data in blocks]


def fetched(store: KvStore, stream: Stream, end: int, first: int = 0) -> list[int]:
    num_blocks, taken = store.fetch(stream, first, end, numbers)
    assert num_blocks == len(taken or ())
    return taken or []


def put(store: KvStore, stream: Stream, num_blocks: int, size: int = BLOCK_BYTES) -> None:
    before = store.use.blocks_put_total
    for index in range(num_blocks):
        store.put(stream, index, block(index, size))
    until(lambda: store.use.blocks_put_total == before + num_blocks, "they are stored")


@pytest.fixture
def service(tmp_path: Path) -> Generator[ServiceProcess]:
    with serving(tmp_path, "--scrub-bytes-per-s", "0") as service:
        yield service


def test_another_engine_finds_what_one_has_stored_as_far_as_tokens_and_layout_are_equal(
    service: ServiceProcess,
) -> None:
    writing, reading = store(service.directory), store(service.directory)
    put(writing, stream(*range(12)), 3)
    until(lambda: fetched(reading, stream(*range(12)), 3) == [0, 1, 2], "it was told of")
    assert fetched(reading, stream(*range(12)), 3, first=1) == [1, 2]
    assert fetched(reading, stream(*range(8), 99, 98, 97, 96), 3) == [0, 1], "its prefix"
    assert fetched(reading, stream(*range(12), tenant="acme"), 3) == []
    other = store(service.directory, layout="other")
    assert fetched(other, stream(*range(12)), 3) == []
    for one in (writing, reading, other):
        one.close()


def test_a_corrupt_block_is_a_miss(service: ServiceProcess) -> None:
    writing, reading = store(service.directory), store(service.directory)
    put(writing, stream(*range(12)), 3)
    until(lambda: fetched(reading, stream(*range(12)), 3) == [0, 1, 2], "it was told of")
    (writer,) = writing._slabs.writers  # pyright: ignore[reportPrivateUsage]
    data = writer._view  # pyright: ignore[reportPrivateUsage]
    slot = next(s for s in range(64) if data[s * BLOCK_BYTES] == 1)  # That of block 1.
    data[slot * BLOCK_BYTES + 100] ^= 1
    assert fetched(reading, stream(*range(12)), 3) == [0]
    for one in (writing, reading):
        one.close()


def test_when_there_is_no_more_room_the_oldest_blocks_make_room(service: ServiceProcess) -> None:
    with_little = store(service.directory, bytes_max=4 * BLOCK_BYTES)
    tokens = stream(*range(80))
    put(with_little, tokens, 20)
    assert fetched(with_little, tokens, 20, first=19) == [19]
    assert fetched(with_little, tokens, 20, first=0) == []
    with_little.close()


def test_a_service_that_has_no_more_room_has_the_engine_overwrite_its_own_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_slabs, "SLAB_BYTES_MIN", 64 * BLOCK_BYTES)
    with serving(tmp_path, "--capacity-bytes", str(256 * BLOCK_BYTES)) as service:
        one = store(service.directory, bytes_max=1024 * BLOCK_BYTES)
        tokens = stream(*range(800))
        put(one, tokens, 200)  # A slab of 64, one of 128, and there is none of 256.
        until(lambda: fetched(one, tokens, 200, first=199) == [199], "it was told of")
        another = store(service.directory, bytes_max=1024 * BLOCK_BYTES)
        for _ in range(3):
            another.put(stream(*range(8)), 0, block(0))
            assert fetched(another, tokens, 200, first=199) == [199], "it reads what is there"
        for closing in (one, another):
            closing.close()


def test_blocks_that_are_smaller_or_larger_than_slabs_are_made_for_are_kept_too(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, others = stream(*range(16)), stream(*range(16))
    small = store(service.directory, bytes_max=64 << 20, block_bytes=8)
    put(small, tokens, 4, 8)  # For 4 MiB there were more slots than a slab may have.
    until(lambda: fetched(small, tokens, 4) == [0, 1, 2, 3], "in 65,536 slots")
    small.close()
    monkeypatch.setattr(kv_slabs, "SLAB_BYTES_MIN", BLOCK_BYTES // 4)
    monkeypatch.setattr(kv_slabs, "SLAB_BYTES_MAX", BLOCK_BYTES // 2)
    large = store(service.directory, bytes_max=5 * BLOCK_BYTES, layout="large")
    put(large, others, 4)
    until(lambda: fetched(large, others, 4) == [0, 1, 2, 3], "in a slab each")
    large.close()


def test_without_a_service_everything_is_a_miss_and_with_one_it_goes_on(tmp_path: Path) -> None:
    early = store(tmp_path)
    tokens = stream(*range(12))
    early.put(tokens, 0, block(0))
    begun = time.monotonic()
    assert fetched(early, tokens, 3) == []
    assert time.monotonic() - begun < kv_store.FETCH_S_MAX
    until(lambda: early.use.blocks_dropped_total == 1, "it is not kept")
    with serving(tmp_path) as service:

        def is_stored() -> bool:
            early.put(tokens, 0, block(0))
            return fetched(early, tokens, 1) == [0]

        until(is_stored, "it goes on")
        service.kill()
        begun = time.monotonic()
        fetched(early, tokens, 3)
        assert time.monotonic() - begun < kv_store.FETCH_S_MAX
        early.close()


def test_a_service_that_hangs_costs_one_wait_and_no_more(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "FETCH_S_MAX", 0.2)
    one = store(service.directory)
    tokens = stream(*range(12))
    put(one, tokens, 3)
    os.kill(service.pid, signal.SIGSTOP)
    try:
        assert fetched(one, tokens, 3) == [], "it does not answer"
        begun = time.monotonic()
        for _ in range(50):
            assert fetched(one, tokens, 3) == []
            for _ in range(10):
                one.put(tokens, 0, block(0))
        assert time.monotonic() - begun < 0.1, "nobody waits for it again"
        assert one.use.blocks_missed_total == 3 * 51
        assert one.use.blocks_dropped_total > 0, "nor are blocks kept without a bound"
    finally:
        os.kill(service.pid, signal.SIGCONT)
    until(lambda: fetched(one, tokens, 3) == [0, 1, 2], "it answers again")
    one.close()


def test_an_engine_of_another_host_reads_what_is_not_here_if_it_trusts_and_is_let_in(
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    listening = ("--listen", "127.0.0.1:0", "--scrub-bytes-per-s", "0")
    with serving(here) as local, serving(there, *listening) as remote:
        address = remote_address(remote)
        tokens = stream(*range(20))
        writing = KvStore(
            StoreSettings(remote.directory, 64 * BLOCK_BYTES, address),
            SPEC,
            block_bytes=BLOCK_BYTES,
            layout="test",
        )
        put(writing, tokens, 4)
        until(lambda: writing.holder() is not None, "others are let in")
        until(lambda: fetched(writing, tokens, 4) == [0, 1, 2, 3], "it was told of")
        holder = writing.holder()
        assert holder is not None
        assert holder.ticket.hex() not in f"{holder}", "it is secret"

        def reading(*peers: str) -> KvStore:
            return KvStore(
                StoreSettings(local.directory, 64 * BLOCK_BYTES, peers=frozenset(peers)),
                SPEC,
                block_bytes=BLOCK_BYTES,
                layout="test",
            )

        trusting, doubting = reading(address), reading("127.0.0.1:1")
        put(trusting, tokens, 2)
        for store, hint, expected in (
            (trusting, KvHolder(address, b"forged"), [0, 1]),
            (doubting, holder, [0, 1]),
            (trusting, holder, [0, 1, 2, 3]),  # Two of its own, and the others.
            (doubting, KvHolder(address, b"forged"), [0, 1, 2, 3]),  # They are here now.
        ):
            hinted = stream(*range(20))
            hinted.kv_holders = (hint,)
            until(lambda s=store, h=hinted, e=expected: fetched(s, h, 5) == e, f"{expected}")
        for one in (writing, trusting, doubting):
            one.close()


def test_another_host_that_says_nothing_costs_one_wait(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "FETCH_BASE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        settings = StoreSettings(service.directory, 64 * BLOCK_BYTES, peers=frozenset((address,)))
        one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
        hinted = stream(*range(12))
        hinted.kv_holders = (KvHolder(address, b"ticket"),)
        until(lambda: "worker.kv_peers" in sys.modules, "what it needs is imported")
        assert fetched(one, hinted, 3) == []
        begun = time.monotonic()
        for _ in range(3):
            assert fetched(one, hinted, 3) == []
        assert time.monotonic() - begun < 0.5, "steps do not wait for it again"
        one.close()


def test_who_read_of_another_host_goes_on_with_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "FETCH_S_MAX", 20.0)
    monkeypatch.setattr(kv_store, "FETCH_BASE_S", 20.0)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with serving(here) as local, serving(there, "--listen", "127.0.0.1:0") as remote:
        address = remote_address(remote)
        settings = StoreSettings(remote.directory, 64 * BLOCK_BYTES, address)
        writing = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
        put(writing, stream(*range(8)), 2)
        until(lambda: fetched(writing, stream(*range(8)), 2) == [0, 1], "it was told of")
        settings = StoreSettings(local.directory, 64 * BLOCK_BYTES, peers=frozenset((address,)))
        reading = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
        tokens = stream(*range(16))
        for index in (2, 3):  # All but the first two, which may have been evicted.
            reading.put(tokens, index, block(index))
        until(lambda: reading.use.blocks_put_total == 2, "they are stored")
        holder = writing.holder()
        assert holder is not None
        hinted = stream(*range(16))
        hinted.kv_holders = (holder,)
        assert fetched(reading, hinted, 4) == [0, 1, 2, 3], "a prefix there, the rest here"
        for one in (writing, reading):
            assert one.close()


def test_a_ticket_is_renewed_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "TICKET_S", 0.2)
    with serving(tmp_path) as service:
        settings = StoreSettings(service.directory, 64 * BLOCK_BYTES, "127.0.0.1:1")
        one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
        tickets: set[bytes] = set()

        def is_renewed() -> bool:
            if (holder := one.holder()) is not None:
                tickets.add(holder.ticket)
            return len(tickets) > 2

        until(is_renewed, "nobody asks it for anything")
        one.close()


def test_a_ticket_is_asked_for_again_when_the_service_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "GRANT_RETRY_S", 0.1)
    monkeypatch.setattr(kv_store, "RETRY_S", 0.05)
    settings = StoreSettings(tmp_path, 64 * BLOCK_BYTES, "127.0.0.1:1")
    one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
    with serving(tmp_path):
        until(lambda: one.holder() is not None, "it is let in")
        one.close()


def test_a_fault_of_the_engines_own_switches_its_store_off_and_says_so(
    service: ServiceProcess, caplog: pytest.LogCaptureFixture
) -> None:
    one, another = store(service.directory), store(service.directory)
    tokens = stream(*range(12))
    put(one, tokens, 3)
    until(lambda: fetched(another, tokens, 3) == [0, 1, 2], "it was told of")

    def faulty(_: Sequence[memoryview]) -> int:
        raise ZeroDivisionError

    begun = time.monotonic()
    assert one.fetch(tokens, 0, 3, faulty) == (0, None)
    until(lambda: one.use.is_off, "it says so")
    assert "ZeroDivisionError" in caplog.text
    for _ in range(kv_store.QUEUED_BLOCKS_MAX + 1):
        one.put(tokens, 0, block(0))
    assert fetched(one, tokens, 3) == []
    assert time.monotonic() - begun < kv_store.FETCH_BASE_S, "nobody waits for it"
    assert one.use.blocks_dropped_total == kv_store.QUEUED_BLOCKS_MAX + 1, "nothing is kept"
    assert one.holder() is None
    assert fetched(another, tokens, 3) == [0, 1, 2], "others go on"
    for closing in (one, another):
        assert closing.close()


@contextmanager
def held(store: KvStore, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The store's thread, over a block that it has stored: what it is told meanwhile waits."""
    is_held, release = threading.Event(), threading.Event()

    def take(_: Sequence[memoryview]) -> None:
        is_held.set()
        release.wait()

    def is_found() -> bool:
        store.fetch(stream, 0, 1, take)
        return is_held.is_set()

    monkeypatch.setattr(kv_store, "FETCH_S_MAX", 0.05)
    until(is_found, "it was told of")
    try:
        yield
    finally:
        release.set()


def test_what_waits_when_a_store_is_turned_off_is_not_stored(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "TICKET_S", 0.01)  # There is another one whenever it has a turn.
    settings = StoreSettings(service.directory, 64 * BLOCK_BYTES, "127.0.0.1:1")
    one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
    tokens = stream(*range(16))
    put(one, tokens, 1)
    with held(one, tokens, monkeypatch):
        for index in range(1, 4):
            one.put(tokens, index, block(index))
        one.turn_off()
    until(lambda: one.use.blocks_dropped_total == 3, "they are dropped")
    assert one.use.blocks_put_total == 1
    assert one.holder() is None
    assert one.close()


def test_a_block_that_waits_while_no_ticket_is_to_be_had_is_counted(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "TICKET_S", 0.01)
    settings = StoreSettings(service.directory, 64 * BLOCK_BYTES, "127.0.0.1:1")
    one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
    tokens = stream(*range(16))
    put(one, tokens, 1)
    with held(one, tokens, monkeypatch):
        one.put(tokens, 1, block(1))
        service.kill()
    until(lambda: one.use.blocks_dropped_total == 1, "it is dropped")
    assert one.close()


def test_records_count_as_what_an_engine_keeps(service: ServiceProcess) -> None:
    bytes_max = 1 << 13
    one = store(service.directory, bytes_max=bytes_max, block_bytes=64)
    put(one, stream(*range(4 * 200)), 200, 64)
    (writer,) = one._slabs.writers  # pyright: ignore[reportPrivateUsage]
    assert bytes_max // 2 < writer.num_slots * (64 + records.RECORD_BYTES) <= bytes_max
    one.close()


def test_a_store_that_hangs_says_so_when_it_is_closed(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_store, "_CLOSE_S", 0.1)
    one = store(service.directory)
    put(one, stream(*range(4)), 1)
    os.kill(service.pid, signal.SIGSTOP)
    try:
        one.put(stream(*range(100, 104)), 0, block(0))
        assert not one.close(), "its thread may still look at what the engine has"
    finally:
        os.kill(service.pid, signal.SIGCONT)
    until(one.close, "it answers again")


def test_others_are_let_in_before_anything_else_is_prepared(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told = threading.Event()

    def import_slowly(_: str) -> None:
        is_told.wait(20)

    monkeypatch.setattr(kv_store, "import_module", import_slowly)
    settings = StoreSettings(
        service.directory, 64 * BLOCK_BYTES, "127.0.0.1:1", frozenset(("127.0.0.1:2",))
    )
    one = KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout="test")
    until(lambda: one.holder() is not None, "a sidecar may greet now")
    is_told.set()
    one.close()
