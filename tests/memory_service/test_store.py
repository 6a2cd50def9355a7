"""Claims of `memory_service.store`."""

import pytest

from memory_service.accounts import HOST, Device, MemoryKind
from memory_service.store import BlockStore, SlabState, StoreSlab
from tests.memory_service.host import key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.records import Record, RecordState, writing


def record(slot: int, number: int, generation: int = 1) -> tuple[int, Record]:
    return slot, Record(RecordState.COMMITTED, 16, generation, slot, key_of(number), number)


def store_with(
    *numbers: int, tenant: str = "t", num_slots: int = 4
) -> tuple[BlockStore, StoreSlab]:
    store, slab = BlockStore(), StoreSlab(1, tenant, 7, 1, 64, num_slots)
    store.add(slab)
    store.commit(slab, [record(slot, number) for slot, number in enumerate(numbers)])
    return store, slab


def keys(*numbers: int) -> list[bytes]:
    return [key_of(number) for number in numbers]


def test_the_longest_stored_prefix_is_found() -> None:
    store, _ = store_with(1, 2, 4)
    assert [block.key for block in store.find("t", keys(1, 2, 3, 4))] == keys(1, 2)
    assert store.find("t", keys(3, 4)) == []
    store.check()


def test_tenants_do_not_find_each_others_blocks() -> None:
    store, _ = store_with(1)
    assert store.find("other", keys(1)) == []
    assert store.pin(3, store.find("other", keys(1)), 1.0) is None


def test_a_slot_without_a_valid_committed_record_is_free_and_no_block() -> None:
    store, slab = store_with(1)
    assert store.commit(slab, [(1, None), (2, writing(2, 1)), record(3, 3)]) == [1, 2]
    assert store.num_blocks == 2
    assert store.commit(slab, [(0, writing(0, 2))]) == [0], "overwritten"
    assert store.find("t", keys(1)) == []
    store.check()


def test_a_block_that_is_stored_already_is_not_needed_again() -> None:
    store, slab = store_with(1)
    assert store.commit(slab, [record(1, 1)]) == [1]
    assert store.commit(slab, [record(0, 1)]) == [], "told twice"
    store.check()


def test_the_owner_may_overwrite_what_was_used_least_recently_and_is_not_pinned() -> None:
    store, slab = store_with(1, 2, 3, 4)
    store.find("t", keys(1, 2))
    pin = store.pin(9, store.find("t", keys(3)), 10.0)
    assert pin is not None
    assert store.reclaim(slab, 2) == [3, 1], "of a sequence, its end first"
    assert store.reclaim(slab, 4) == [0]
    assert store.reclaim(slab, 4) == []
    store.unpin(9, pin.pin_id)
    assert store.reclaim(slab, 4) == [2]
    store.check()


def test_a_pin_is_of_its_session_and_ends_with_its_time() -> None:
    store, slab = store_with(1)
    pin = store.pin(9, store.find("t", keys(1)), 10.0)
    assert pin is not None
    store.unpin(8, pin.pin_id)
    store.expire(9.9)
    assert store.reclaim(slab, 1) == []
    store.expire(10.0)
    assert store.reclaim(slab, 1) == [0]
    store.unpin(9, pin.pin_id)
    store.check()


def test_pins_are_bounded() -> None:
    store = BlockStore(pins_max=1)
    slab = StoreSlab(1, "t", 7, 1, 64, 1)
    store.add(slab)
    store.commit(slab, [record(0, 1)])
    store.pin(9, store.find("t", keys(1)), 10.0)
    with pytest.raises(UnbrokenError) as raised:
        store.pin(9, store.find("t", keys(1)), 10.0)
    assert raised.value.reason is Reason.MEMORY_EXHAUSTED


def test_only_its_owner_writes_to_a_slab_and_nobody_once_it_is_sealed() -> None:
    store, slab = store_with(1)
    assert store.owned(7, 1) is slab
    for session in (8, 7):
        with pytest.raises(UnbrokenError) as raised:
            store.owned(session, 1)
        assert raised.value.reason is Reason.STALE_HANDLE
        store.seal(slab)
    assert slab.state is SlabState.SEALED
    store.check()


def test_sealed_slabs_are_evicted_whole_the_least_used_first_and_never_a_pinned_one() -> None:
    store = BlockStore()
    for slab_id in (1, 2, 3, 4):
        slab = StoreSlab(slab_id, "t", 7, 1, 64, 1)
        store.add(slab)
        store.commit(slab, [record(0, slab_id)])
        if slab_id < 4:
            store.seal(slab)
    store.find("t", keys(1))
    store.pin(9, store.find("t", keys(2)), 10.0)
    assert store.evict(1) == 2 * 4096, "whole pages, one of them for the record"
    assert [slab.slab_id for slab in store.freed] == [3]
    assert store.evict(1 << 40) == 2 * 4096
    assert [slab.slab_id for slab in store] == [2, 4], "one is pinned, one is open"
    store.check()


def test_the_slot_of_a_block_that_was_wrong_can_be_overwritten_once_nobody_reads_it() -> None:
    store, slab = store_with(1, 2)
    pin = store.pin(9, store.find("t", keys(1)), 10.0)
    assert pin is not None
    assert store.drop(1, 0, generation=1)
    assert store.reclaim(slab, 4) == [1]
    store.unpin(9, pin.pin_id)
    assert store.reclaim(slab, 4) == [0]
    assert store.reclaim(slab, 4) == []
    store.check()


def test_a_sealed_slab_without_a_block_is_freed() -> None:
    store, slab = store_with(1)
    store.seal(slab)
    assert not store.drop(1, 0, generation=2), "another generation is meant"
    assert store.drop(1, 0, generation=1)
    assert store.freed == [slab]
    empty = StoreSlab(2, "t", 7, 1, 64, 1)
    store.add(empty)
    store.seal(empty)
    assert empty in store.freed
    store.check()


def test_each_memory_has_a_block_of_its_own_under_one_key() -> None:
    store, _ = store_with(1, 2)
    gpus = [Device(MemoryKind.CUDA, uuid) for uuid in ("GPU-b", "GPU-a")]
    for number, gpu in enumerate(gpus):
        slab = StoreSlab(2 + number, "t", 7, 1, 64, 4, device=gpu)
        store.add(slab)
        assert store.commit(slab, [record(0, 1), record(1, 3)]) == [], "needed there too"
    for device, numbers in ((HOST, (1, 2)), (gpus[0], (1,)), (gpus[1], (1,)), (None, (1, 2, 3))):
        found = store.find("t", keys(1, 2, 3), device)
        assert [block.key for block in found] == keys(*numbers)
        assert device is None or {block.slab.device for block in found} == {device}
    found = store.find("t", keys(1, 3))
    assert [block.slab.device for block in found] == [HOST, gpus[1]], "the host's, then by name"
    store.check()


def test_of_a_key_that_is_dropped_in_one_memory_the_others_stay() -> None:
    store, host = store_with(1)
    gpu = StoreSlab(2, "t", 7, 1, 64, 4, device=Device(MemoryKind.CUDA, "GPU-a"))
    store.add(gpu)
    store.commit(gpu, [record(0, 1)])
    assert store.drop(host.slab_id, 0, 1)
    assert [block.slab for block in store.find("t", keys(1))] == [gpu]
    store.check()
    assert store.drop(gpu.slab_id, 0, 1)
    assert store.find("t", keys(1)) == []
    store.check()
