"""Claims of `worker.kv_store`, with a real memory service."""

import os
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from tests.memory_service.processes import ServiceProcess, serving, until
from tests.memory_service.test_service import remote_address
from unbroken.generation import GenerationParams
from worker import kv_store
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


def store(directory: Path, *, bytes_max: int = 64 * BLOCK_BYTES, layout: str = "test") -> KvStore:
    settings = StoreSettings(directory, bytes_max)
    return KvStore(settings, SPEC, block_bytes=BLOCK_BYTES, layout=layout)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def numbers(blocks: Sequence[memoryview]) -> list[int]:
    return [int.from_bytes(data[:8], "little") for data in blocks]


def fetched(store: KvStore, stream: Stream, end: int, first: int = 0) -> list[int]:
    num_blocks, taken = store.fetch(stream, first, end, numbers)
    assert num_blocks == len(taken or ())
    return taken or []


def put(store: KvStore, stream: Stream, num_blocks: int) -> None:
    before = store.use.blocks_put_total
    for index in range(num_blocks):
        store.put(stream, index, block(index))
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
    (writer,) = writing._writers  # pyright: ignore[reportPrivateUsage]
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
            (trusting, holder, [0, 1, 2, 3]),  # Two of its own, and the others.
            (trusting, KvHolder(address, b"forged"), [0, 1]),
            (doubting, holder, [0, 1]),
        ):
            hinted = stream(*range(20))
            hinted.kv_holders = (hint,)
            until(lambda s=store, h=hinted, e=expected: fetched(s, h, 5) == e, f"{expected}")
        for one in (writing, trusting, doubting):
            one.close()
