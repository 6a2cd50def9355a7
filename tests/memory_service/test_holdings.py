"""Claims of `memory_service.holdings`: who gets which memory, and what becomes of it."""

import dataclasses

import pytest

from memory_service import fencing
from memory_service.accounts import HOST, Device, Limits, MemoryKind
from memory_service.fencing import FencePolicy
from memory_service.holdings import Policy
from memory_service.news import NewsKind
from memory_service.segments import SegmentClass, State, Version
from tests.memory_service.host import POLICY, Host, Process, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import memory_pb2 as pb

WEIGHTS, POOL, SCRATCH = SegmentClass.WEIGHTS, SegmentClass.KV_POOL, SegmentClass.SCRATCH


def refused(raised: pytest.ExceptionInfo[UnbrokenError]) -> Reason:
    return raised.value.reason


def publish(host: Host, process: Process, name: str = "w") -> Version:
    epoch = host.create(process, name, WEIGHTS)
    version = host.holdings.seal_segment(process.session, name, epoch, [1], b"layout")
    host.obey()
    return version


def live_pool(host: Host, process: Process, name: str = "kv") -> int:
    epoch = host.create(process, name, POOL)
    host.holdings.freeze_pool(process.session, name, epoch, b"layout")
    host.obey()
    return epoch


def states(host: Host) -> list[State]:
    return [version.state for version in host.holdings.segments]


def test_a_new_version_is_built_beside_the_old_and_takes_its_place_when_sealed() -> None:
    host = Host()
    writer, reader = host.bind(), host.bind()
    first = publish(host, writer)
    assert host.holdings.attach_segment(reader.session, "w", 0) is first
    epoch = host.create(writer, "w", WEIGHTS)
    assert host.holdings.attach_segment(host.bind().session, "w", 0) is first
    second = host.holdings.seal_segment(writer.session, "w", epoch, [2], b"")
    host.obey()
    assert states(host) == [State.RETIRED, State.SEALED], "it has readers"
    assert host.holdings.attach_segment(reader.session, "w", 0) is second
    assert second.version > first.version
    for process_id in list(first.readers):
        session = host.holdings.sessions.get(process_id)
        assert session is not None
        host.holdings.release_segment(session, "w", first.version)
    host.obey()
    assert states(host) == [State.SEALED]
    assert not host.memory.keys() & set(first.slab_ids)


def test_a_writer_that_dies_leaves_everything_as_it_was() -> None:
    host = Host()
    first = publish(host, host.bind())
    doomed = host.bind()
    host.create(doomed, "w", WEIGHTS)
    host.see(doomed, fencing.ConnectionLost())
    assert states(host) == [State.SEALED, State.BUILDING], "it might write yet"
    host.see(doomed, fencing.LifelineSealed())
    assert states(host) == [State.SEALED]
    assert host.holdings.attach_segment(host.bind().session, "w", 0) is first


def test_one_process_writes_to_a_segment() -> None:
    host = Host()
    host.create(host.bind(), "w", WEIGHTS)
    other = host.bind()
    with pytest.raises(UnbrokenError) as raised:
        host.create(other, "w", WEIGHTS)
    assert refused(raised) is Reason.SEGMENT_BUSY
    host.create(host.bind("other"), "w", WEIGHTS)


def test_what_is_not_sealed_is_read_by_nobody() -> None:
    host = Host()
    host.create(host.bind(), "w", WEIGHTS)
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.attach_segment(host.bind().session, "w", 0)
    assert refused(raised) is Reason.SEGMENT_NOT_FOUND


def test_tenants_do_not_see_each_others_segments() -> None:
    host = Host()
    publish(host, host.bind())
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.attach_segment(host.bind("other").session, "w", 0)
    assert refused(raised) is Reason.SEGMENT_NOT_FOUND


def test_who_lost_a_segment_cannot_write_under_its_old_epoch() -> None:
    host = Host()
    dead, heir = host.bind(), host.bind()
    epoch = live_pool(host, dead)
    host.die(dead)
    adopted = host.holdings.adopt_pool(heir.session, "kv", epoch, host.tick())
    assert adopted.epoch > epoch
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.segments.owned(dead.session_id, "t", "kv", epoch)
    assert refused(raised) is Reason.FENCED
    assert raised.value.metadata["epoch"] == str(adopted.epoch)
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.adopt_pool(host.bind().session, "kv", epoch, host.tick())
    assert refused(raised) is Reason.FENCED, "another was faster"


def test_a_pool_is_adopted_after_the_proof_and_not_before() -> None:
    host = Host()
    dead, heir = host.bind(), host.bind()
    epoch = live_pool(host, dead)
    host.holdings.attach_segment(heir.session, "kv", 0)  # As a standby, before anything happens.
    for event in (None, fencing.ConnectionLost()):
        if event is not None:
            host.see(dead, event)
        with pytest.raises(UnbrokenError) as raised:
            host.holdings.adopt_pool(heir.session, "kv", epoch, host.tick())
        assert refused(raised) is Reason.NOT_FENCED
        assert raised.value.retry_after_s
    host.see(dead, fencing.LifelineSealed())
    version = host.holdings.adopt_pool(heir.session, "kv", epoch, host.tick())
    host.obey()
    assert (version.owner, version.state, version.layout) == (
        heir.session_id,
        State.LIVE,
        b"layout",
    )
    host.see(dead, fencing.Exited())


def test_an_owner_that_binds_again_keeps_its_pool() -> None:
    host = Host()
    owner = host.bind()
    epoch = live_pool(host, owner)
    host.see(owner, fencing.ConnectionLost())
    assert states(host) == [State.FENCING]
    assert host.rebind(owner)
    assert states(host) == [State.LIVE]
    assert host.holdings.segments.owned(owner.session_id, "t", "kv", epoch)


def test_without_proof_a_pool_is_kept_from_everybody_until_its_owner_has_exited() -> None:
    host = Host()
    hung, heir = host.bind(), host.bind()
    live_pool(host, hung)
    host.see(hung, fencing.ConnectionLost())
    host.pass_time(5.0)
    assert states(host) == [State.QUARANTINED]
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.adopt_pool(heir.session, "kv", 0, host.tick())
    assert refused(raised) is Reason.QUARANTINED
    assert not host.rebind(hung)
    live_pool(host, heir)
    assert states(host) == [State.QUARANTINED, State.LIVE], "it begins anew, beside it"
    host.see(hung, fencing.Exited())
    assert states(host) == [State.LIVE]


def test_where_allowed_a_hung_owner_is_killed_and_then_succeeded() -> None:
    host = Host(Policy(POLICY.limits, FencePolicy(kills=True)))
    hung, heir = host.bind(), host.bind()
    epoch = live_pool(host, hung)
    host.see(hung, fencing.ConnectionLost())
    host.pass_time(5.0)
    assert host.killed == [hung.session_id]
    host.see(hung, fencing.Exited())
    assert host.holdings.adopt_pool(heir.session, "kv", epoch, host.tick())


def test_pools_of_a_cohort_are_adopted_when_all_ranks_are_dead() -> None:
    host = Host()
    ranks = [host.bind(cohort="c", rank=rank, num_ranks=2) for rank in range(2)]
    epochs = [live_pool(host, process, f"kv/{i}") for i, process in enumerate(ranks)]
    heirs = [host.bind(cohort="c2", rank=rank, num_ranks=2) for rank in range(2)]
    host.die(ranks[0])
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.adopt_pool(heirs[0].session, "kv/0", epochs[0], host.tick())
    assert refused(raised) is Reason.NOT_FENCED
    host.die(ranks[1])
    for i, heir in enumerate(heirs):
        assert host.holdings.adopt_pool(heir.session, f"kv/{i}", epochs[i], host.tick())
        host.obey()
    assert not [one for one in host.holdings.sessions if one.peer.cohort == "c"], "forgotten"


def test_a_rank_that_cannot_be_adopted_keeps_the_others_from_being() -> None:
    host = Host()
    ranks = [host.bind(cohort="c", rank=rank, num_ranks=2) for rank in range(2)]
    epochs = [live_pool(host, process, f"kv/{i}") for i, process in enumerate(ranks)]
    heir = host.bind()
    host.die(ranks[0])
    host.see(ranks[1], fencing.ConnectionLost())
    host.pass_time(5.0)  # No proof of rank 1.
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.adopt_pool(heir.session, "kv/0", epochs[0], host.tick())
    assert refused(raised) in (Reason.QUARANTINED, Reason.SEGMENT_NOT_FOUND)
    host.see(ranks[1], fencing.Exited())
    assert states(host) == [], "of no use to anybody"


def test_scratch_and_unfrozen_pools_die_with_their_owner() -> None:
    host = Host()
    owner = host.bind()
    host.create(owner, "s", SCRATCH)
    host.create(owner, "kv", POOL)
    host.die(owner)
    assert states(host) == []
    assert not host.memory
    assert not host.vault
    assert host.holdings.ledger.accounts[HOST].total == 0
    assert len(host.holdings.sessions) == 0


def test_a_pool_that_nobody_adopts_is_freed_after_its_grace() -> None:
    host = Host()
    owner = host.bind()
    live_pool(host, owner)
    host.die(owner)
    host.pass_time(59.0)
    assert states(host) == [State.ADOPTABLE]
    host.pass_time(1.0)
    assert states(host) == []
    assert len(host.holdings.sessions) == 0


def test_blocks_outlive_their_writer_those_it_had_no_time_to_tell_of_included() -> None:
    host = Host()
    writer, reader = host.bind(), host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    host.mark(slab.slab_id, 1)
    host.fill(slab.slab_id, 1, 2)
    host.record(slab.slab_id, 1, key_of(2))
    host.mark(slab.slab_id, 2)
    host.fill(slab.slab_id, 2, 3)
    host.die(writer)
    pin, new = host.holdings.get(reader.session, [key_of(i) for i in (1, 2, 3)], 1.0, host.now)
    assert pin is not None
    assert [block.slot for block in pin.blocks] == [0, 1]
    assert [one.slab_id for one in new] == [slab.slab_id]
    assert host.memory[slab.slab_id].is_sealed


def test_descriptors_are_sent_once_a_connection() -> None:
    host = Host()
    writer, reader = host.bind(), host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    for expected in ([slab.slab_id], []):
        _, new = host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
        assert [one.slab_id for one in new] == expected
    assert host.rebind(reader), "its pins keep its session"
    _, new = host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
    assert [one.slab_id for one in new] == [slab.slab_id]


def test_readers_are_told_which_slabs_are_gone() -> None:
    host = Host()
    writer, reader, other = host.bind(), host.bind(), host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    pin, _ = host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
    assert pin is not None
    host.holdings.store.unpin(reader.session_id, pin.pin_id)
    host.die(writer)
    host.holdings.evict("t", "")
    host.obey()
    assert reader.session.freed == [slab.slab_id]
    assert reader.session.shown == set()
    assert other.session.freed == []


def test_records_of_a_process_that_is_lost_and_not_proved_dead_are_not_read() -> None:
    host = Host()
    writer = host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    assert host.reclaim(writer, slab.slab_id, 1) == [0]
    # As if it had not got round to saying in the record that it will overwrite the block.
    host.record(slab.slab_id, 0, key_of(1))
    host.see(writer, fencing.ConnectionLost())
    assert host.holdings.store.find("t", [key_of(1)]) == []


def test_a_tenant_has_its_quota_and_evicts_its_own_blocks_only() -> None:
    host = Host()
    rich, small = host.bind("t"), host.bind("small")
    rich_slab = host.open_slab(rich)
    host.put(rich, rich_slab.slab_id, 1)
    host.die(rich)
    first = host.open_slab(small)
    host.put(small, first.slab_id, 1)
    with pytest.raises(UnbrokenError) as raised:
        host.open_slab(small)
    assert refused(raised) is Reason.MEMORY_EXHAUSTED
    assert raised.value.metadata["limit"] == "quota"
    host.holdings.close_slab(small.session, first.slab_id)
    host.obey()
    host.open_slab(small)
    assert {slab.slab_id for slab in host.holdings.store} >= {rich_slab.slab_id}
    assert first.slab_id not in host.memory, "evicted for it"
    host.holdings.check()


def test_above_the_high_watermark_blocks_are_evicted_down_to_the_low_one() -> None:
    host = Host()
    for tenant in ("a", "b"):
        for _ in range(7):
            writer = host.bind(tenant)
            slab = host.open_slab(writer)
            host.put(writer, slab.slab_id, slab.slab_id)
            host.die(writer)
    assert host.holdings.ledger.accounts[HOST].total == 56 * 4096
    host.open_slab(host.bind("c"), num_slots=5)
    limits = POLICY.limits
    assert host.holdings.ledger.accounts[HOST].total <= limits.low_share * limits.capacity_bytes
    kinds = [item.kind for item in host.holdings.news.since(0)[0]]
    assert NewsKind.FREED in kinds


def test_pools_and_open_slabs_are_never_evicted() -> None:
    host = Host()
    owner = host.bind()
    host.create(owner, "kv", POOL, num_pages=38)
    with pytest.raises(UnbrokenError):
        host.open_slab(owner)
    assert states(host) == [State.BUILDING]


def test_a_call_to_another_life_of_the_service_is_stale() -> None:
    host = Host()
    host.holdings.check_boot(1)
    host.crash()
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.check_boot(1)
    assert refused(raised) is Reason.STALE_HANDLE
    assert raised.value.metadata["what"] == "boot_token"


def test_another_life_of_the_service_knows_everything_from_the_vault() -> None:
    host = Host()
    writer, reader, dead = host.bind(), host.bind(), host.bind()
    weights = publish(host, writer)
    epoch = live_pool(host, writer)
    live_pool(host, dead, "kv2")
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    host.die(dead)
    host.holdings.attach_segment(reader.session, "w", 0)
    host.crash()
    assert host.holdings.store.num_blocks == 0, "its owner might be about to overwrite some"
    assert host.rebind(writer)
    assert host.holdings.store.find("t", [key_of(1)])
    assert host.holdings.segments.owned(writer.session_id, "t", "kv", epoch).state is State.LIVE
    assert not host.rebind(reader), "it owned nothing"
    again = host.holdings.attach_segment(host.bind().session, "w", 0)
    assert (again.version, again.checksums, again.layout) == (weights.version, (1,), b"layout")
    host.die(dead)
    newer = host.holdings.adopt_pool(host.bind().session, "kv2", 0, host.tick())
    assert newer.epoch > epoch


def test_epochs_grow_across_lives_of_the_service_without_a_vault_too() -> None:
    host = Host()
    epoch = live_pool(host, host.bind())
    host.vault.clear()
    host.crash()
    assert states(host) == []
    assert live_pool(host, host.bind()) > epoch


def test_a_session_is_gone_on_with_by_its_own_process_only() -> None:
    host = Host()
    owner = host.bind()
    live_pool(host, owner)
    host.see(owner, fencing.ConnectionLost())
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.rebind(owner.session_id, owner.session.peer, b"guess!", host.now)
    assert refused(raised) is Reason.NOT_PERMITTED


def test_who_leaves_with_nothing_in_hand_is_forgotten_at_once() -> None:
    host = Host()
    process = host.bind()
    publish(host, process)
    host.see(process, fencing.ConnectionLost())
    assert len(host.holdings.sessions) == 0
    assert states(host) == [State.SEALED]


def test_corrupt_blocks_and_weights_are_misses_from_then_on() -> None:
    host = Host()
    writer = host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    weights = publish(host, writer)
    host.holdings.block_corrupt(slab.slab_id, 0, generation=1)
    host.holdings.segment_corrupt(weights)
    host.obey()
    assert host.holdings.store.find("t", [key_of(1)]) == []
    assert states(host) == []
    assert host.holdings.num_corrupt == 2


def test_watchers_go_on_where_they_were_and_learn_of_gaps() -> None:
    host = Host()
    news = host.holdings.news
    process = host.bind()
    items, has_gap = news.since(0)
    assert [item.kind for item in items] == [NewsKind.SESSION_BOUND]
    assert not has_gap
    live_pool(host, process)
    items, has_gap = news.since(1)
    assert [(item.sequence, item.value) for item in items] == [
        (2, State.BUILDING),
        (3, State.LIVE),
    ]
    assert news.since(99)[1], "of another life"
    for _ in range(5000):
        news.add(NewsKind.PRESSURE)
    assert news.since(2)[1]
    assert not news.since(news.sequence)[1]


def test_whoever_asks_for_more_than_can_be_told_is_told_of_as_much() -> None:
    host = Host()
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.plan_slab(host.bind().session, 2**64 - 1, 65_536, host.tick())
    assert refused(raised) is Reason.MEMORY_EXHAUSTED
    (told,) = [one for one in host.holdings.news.since(0)[0] if one.kind is NewsKind.PRESSURE]
    assert pb.MemoryEvent(value=told.value).value == 2**64 - 1


GPU = Device(MemoryKind.CUDA, "GPU-1", page_bytes=2 << 20)
WITH_GPU = dataclasses.replace(POLICY, gpus={GPU: Limits(8 << 20, 6 << 20)})


def test_a_gpus_memory_is_given_in_its_own_pages_and_records_are_the_hosts() -> None:
    host = Host(WITH_GPU)
    owner = host.bind()
    slab = host.open_slab(owner, device=host.holdings.ledger.device(2, "GPU-1"))
    accounts = host.holdings.ledger.accounts
    assert (accounts[GPU].total, accounts[HOST].total) == (2 << 20, 4096)
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.plan_segment(owner.session, "kv", POOL, [4096], host.tick(), GPU)
    assert refused(raised) is Reason.INVALID_FIELD
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.plan_segment(owner.session, "kv", POOL, [6 << 20], host.tick(), GPU)
    assert refused(raised) is Reason.MEMORY_EXHAUSTED, "more than the quota of this memory"
    host.put(owner, slab.slab_id, 1)
    host.die(owner)
    assert host.holdings.evict("t", "") == (2 << 20) + 4096
    assert (accounts[GPU].total, accounts[HOST].total) == (0, 0)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnbrokenError) as raised:
        Host(WITH_GPU).holdings.ledger.device(2, "GPU-2")
    assert refused(raised) is Reason.INVALID_FIELD
    assert Host().holdings.ledger.device(0, "") == Host().holdings.ledger.device(1, "") == HOST


def test_memory_of_a_gpu_is_known_as_such_to_the_next_life_of_the_service() -> None:
    host = Host(WITH_GPU)
    owner = host.bind()
    host.open_slab(owner, device=GPU)
    host.create(owner, "kv", POOL, 512, device=GPU)
    host.crash()
    accounts = host.holdings.ledger.accounts
    assert (accounts[GPU].total, accounts[HOST].total) == (4 << 20, 4096)
    assert {version.device for version in host.holdings.segments} == {GPU}


def used(host: Host) -> tuple[int, int]:
    """Pages, and those of them that are not back."""
    accounts = host.holdings.ledger.accounts[HOST]
    return accounts.total // 4096, accounts.total_unreclaimed // 4096


def test_a_slab_takes_whole_pages_of_blocks_and_of_records() -> None:
    host = Host()
    session = host.bind().session
    host.holdings.plan_slab(session, 1, 1, host.tick())
    assert used(host) == (2, 0)


def test_there_are_only_so_many_slabs_however_small_and_unreclaimed_ones_count() -> None:
    host = Host(dataclasses.replace(POLICY, slabs_max=3))
    owner = host.bind()
    host.create(owner, "kv", POOL)
    for _ in range(2):
        host.open_slab(owner, num_slots=1)
    with pytest.raises(UnbrokenError) as raised:
        host.open_slab(owner, num_slots=1)
    assert raised.value.metadata["limit"] == "slabs"
    host.see(owner, fencing.ConnectionLost(), fencing.LifelineSealed())
    assert host.holdings.ledger.num_slabs == 3, "its process has not exited"
    host.see(owner, fencing.Exited())
    host.open_slab(host.bind(), num_slots=1)


def test_nothing_is_evicted_for_what_would_not_have_room_even_then() -> None:
    host = Host()
    writer = host.bind("small")
    slab = host.open_slab(writer, num_slots=1)
    host.put(writer, slab.slab_id, 1)
    host.die(writer)
    with pytest.raises(UnbrokenError):
        host.open_slab(host.bind("small"), num_slots=5)
    assert host.holdings.store.num_blocks == 1
    host.open_slab(host.bind("small"), num_slots=2)
    assert host.holdings.store.num_blocks == 0, "for this it has"


def test_what_was_evicted_and_is_mapped_is_not_given_out_nor_evicted_for_again() -> None:
    host = Host()
    slabs: list[int] = []
    reader = host.bind("small")
    for number in (1, 2):
        writer = host.bind("small")
        slabs.append(host.open_slab(writer, num_slots=1).slab_id)
        host.put(writer, slabs[-1], number)
        host.die(writer)
    pin, new = host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
    assert pin is not None
    assert [slab.slab_id for slab in new] == slabs[:1]
    host.holdings.store.unpin(reader.session_id, pin.pin_id)
    writer = host.bind("small")
    host.open_slab(writer, num_slots=1)
    assert host.holdings.store.num_blocks == 1, "the one that nobody has mapped went first"
    with pytest.raises(UnbrokenError):
        host.open_slab(writer, num_slots=1)
    assert host.holdings.store.num_blocks == 0
    assert used(host) == (4, 2), "freed, and mapped by the reader"
    assert reader.session.freed == slabs[:1], "it is told"
    host.holdings.unmapped(reader.session, slabs[:1])
    host.open_slab(writer, num_slots=1)


def test_memory_of_a_dead_process_is_given_out_when_it_has_exited() -> None:
    host = Host()
    owner = host.bind("small")
    host.create(owner, "scratch", SCRATCH, num_pages=4)
    host.see(owner, fencing.ConnectionLost(), fencing.LifelineSealed())
    assert used(host) == (4, 4), "it writes no more, and is not gone"
    with pytest.raises(UnbrokenError):
        host.create(host.bind("small"), "scratch", SCRATCH, num_pages=4)
    host.see(owner, fencing.Exited())
    host.create(host.bind("small"), "scratch", SCRATCH, num_pages=4)


def test_an_orphaned_pool_makes_way_for_a_new_one_if_there_is_no_room_for_both() -> None:
    host = Host()
    owner = host.bind("small")
    host.holdings.freeze_pool(owner.session, "kv", host.create(owner, "kv", POOL, 3), b"")
    host.die(owner)
    heir = host.bind("small")
    with pytest.raises(UnbrokenError):
        host.create(heir, "kv", POOL, num_pages=5)
    assert [one.state for one in host.holdings.segments] == [State.ADOPTABLE], "not for nothing"
    host.create(heir, "kv", POOL, num_pages=4)
    assert [one.owner for one in host.holdings.segments] == [heir.session_id]


def test_a_pool_stays_until_the_new_one_is_allocated() -> None:
    host = Host()
    owner = host.bind()
    host.holdings.freeze_pool(owner.session, "kv", host.create(owner, "kv", POOL), b"")
    host.die(owner)
    heir = host.bind()
    version = host.holdings.plan_segment(heir.session, "kv", POOL, [4096], host.tick())
    assert [one.state for one in host.holdings.segments] == [State.ADOPTABLE]
    host.holdings.abandon_segment(version)
    assert used(host) == (1, 0)
    assert [one.state for one in host.holdings.segments] == [State.ADOPTABLE]


def test_a_process_whose_session_was_given_up_says_anew_what_it_has_mapped() -> None:
    host = Host()
    reader, writer = host.bind(), host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    pin, _ = host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
    assert pin is not None
    host.see(reader, fencing.ConnectionLost())
    host.pass_time(6.0)
    assert not host.rebind(reader)
    again = host.holdings.bind(reader.session.peer, b"secret", host.tick())
    host.holdings.succeed(again, reader.session_id, b"secret", attached=(), mapped=[slab.slab_id])
    host.die(writer)
    host.holdings.evict("t", "")
    assert used(host)[1] > 0
    assert again.freed == [slab.slab_id]
    host.holdings.unmapped(again, again.freed)
    assert used(host) == (0, 0)
    host.obey()


def test_a_process_that_only_reads_is_never_killed() -> None:
    policy = dataclasses.replace(POLICY, fence=FencePolicy(rebind_grace_s=1.0, kills=True))
    host = Host(policy)
    reader, writer = host.bind(), host.bind()
    slab = host.open_slab(writer)
    host.put(writer, slab.slab_id, 1)
    host.holdings.get(reader.session, [key_of(1)], 1.0, host.now)
    host.see(reader, fencing.ConnectionLost())
    host.pass_time(2.0)
    host.pass_time(10.0)
    assert host.killed == []


def test_what_was_begun_meanwhile_is_not_superseded_by_what_was_planned_before() -> None:
    host = Host()
    first, second = host.bind(), host.bind()

    def planned(process: Process, name: str, kind: SegmentClass) -> Version:
        return host.holdings.plan_segment(process.session, name, kind, [4096], host.tick())

    def refused(version: Version) -> Reason:
        with pytest.raises(UnbrokenError) as raised:
            host.holdings.begin_segment(version)
        host.holdings.abandon_segment(version)
        return raised.value.reason

    older = planned(first, "w", SegmentClass.WEIGHTS)
    newer = planned(second, "w", SegmentClass.WEIGHTS)
    host.holdings.begin_segment(newer)
    host.holdings.seal_segment(second.session, "w", newer.epoch, [1], b"")
    assert refused(older) is Reason.SEGMENT_BUSY, "versions grow"
    one, other = (planned(each, "kv", SegmentClass.KV_POOL) for each in (first, second))
    host.holdings.begin_segment(one)
    assert refused(other) is Reason.SEGMENT_BUSY, "it has an owner"
