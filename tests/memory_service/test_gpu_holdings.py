"""What becomes of a GPU's memory when the GPU is in trouble."""

import dataclasses
from collections.abc import Callable

import pytest

from memory_service import gpu_health, labels
from memory_service.accounts import Device, Limits, MemoryKind
from memory_service.gpu_health import Gone, Health, Xid
from memory_service.news import NewsKind
from memory_service.segments import SegmentClass, State
from tests.memory_service.host import POLICY, Host, Memory, Process, key_of
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.checksums import Algorithm

UUID = "GPU-1"
GPU = Device(MemoryKind.CUDA, UUID, page_bytes=2 << 20)
OTHER = Device(MemoryKind.CUDA, "GPU-2", page_bytes=2 << 20)
LIMITS = Limits(64 << 20, 64 << 20)
POLICY_WITH_GPUS = dataclasses.replace(POLICY, gpus={GPU: LIMITS, OTHER: LIMITS})
PAGES = 512


def host_with_everything() -> tuple[Host, Process]:
    """On both GPUs: blocks, sealed weights, and a pool in use."""
    host = Host(POLICY_WITH_GPUS)
    owner = host.bind()
    for number, device in enumerate((GPU, OTHER)):
        slab = host.open_slab(owner, device=device)
        host.put(owner, slab.slab_id, number)
        epoch = host.create(owner, f"w{number}", SegmentClass.WEIGHTS, PAGES, device=device)
        host.holdings.seal_segment(owner.session, f"w{number}", epoch, [1], b"", Algorithm.MLH64)
        epoch = host.create(owner, f"kv{number}", SegmentClass.KV_POOL, PAGES, device=device)
        host.holdings.freeze_pool(owner.session, f"kv{number}", epoch, b"")
        host.obey()
    return host, owner


def tell(host: Host, event: gpu_health.Event) -> None:
    host.holdings.gpu_seen(UUID, event, host.now)
    host.obey()


def names(host: Host) -> set[str]:
    return {version.name for version in host.holdings.segments}


def find(host: Host, number: int) -> int:
    return len(host.holdings.store.find("t", [key_of(number)]))


def takes_new(host: Host, process: Process) -> bool:
    """Whether anything new may go to the GPU, of either kind."""

    def reason(call: Callable[[], object]) -> Reason | None:
        try:
            call()
        except UnbrokenError as error:
            return error.reason
        return None

    reasons = (
        reason(lambda: host.create(process, "new", SegmentClass.SCRATCH, PAGES, device=GPU)),
        reason(lambda: host.open_slab(process, device=GPU)),
    )
    assert reasons in ((None, None), (Reason.GPU_FAILED, Reason.GPU_FAILED))
    return reasons == (None, None)


@pytest.mark.parametrize("number", [31, 94, 9999])
def test_an_error_of_an_engine_changes_nothing(number: int) -> None:
    host, owner = host_with_everything()
    before = names(host)
    tell(host, Xid(number))
    assert names(host) == before
    assert find(host, 0) == 1
    assert takes_new(host, owner)


def test_a_gpu_that_drains_keeps_what_it_has_and_gets_nothing_new() -> None:
    host, owner = host_with_everything()
    before = names(host)
    tell(host, Xid(63))
    assert names(host) == before
    assert find(host, 0) == 1
    assert not takes_new(host, owner)
    host.die(owner)
    assert host.holdings.adopt_pool(host.bind().session, "kv0", 0, host.tick())
    host.create(host.bind(), "elsewhere", SegmentClass.SCRATCH, PAGES, device=OTHER)


def test_of_a_tainted_gpu_nobody_new_gets_anything() -> None:
    host, owner = host_with_everything()
    epoch = host.create(owner, "w2", SegmentClass.WEIGHTS, PAGES, device=GPU)
    tell(host, Xid(95))
    assert names(host) == {"kv0", "w2", "w1", "kv1"}, "its owner knows what it computes there"
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.seal_segment(owner.session, "w2", epoch, [1], b"", Algorithm.MLH64)
    assert raised.value.reason is Reason.GPU_FAILED
    standby = host.bind()
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.attach_segment(standby.session, "kv0", 0)
    assert raised.value.reason is Reason.GPU_FAILED
    assert not host.holdings.segments.attached(standby.session_id), "nor is it noted as a reader"
    assert (find(host, 0), find(host, 1)) == (0, 1)
    assert not takes_new(host, owner)
    slab = next(one for one in host.holdings.store if one.device == GPU)
    assert not host.put(owner, slab.slab_id, 7), "what is written now is not taken either"
    assert find(host, 7) == 0
    host.die(owner)
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.adopt_pool(host.bind().session, "kv0", 0, host.tick())
    assert raised.value.reason is Reason.GPU_FAILED
    assert host.holdings.adopt_pool(host.bind().session, "kv1", 0, host.tick())


def test_records_that_are_read_of_a_dead_process_do_not_count_on_a_tainted_gpu() -> None:
    host = Host(POLICY_WITH_GPUS)
    owner = host.bind()
    slab = host.open_slab(owner, device=GPU)
    host.mark(slab.slab_id, 0)
    host.fill(slab.slab_id, 0, 1)
    host.record(slab.slab_id, 0, key_of(0))
    tell(host, Xid(48))
    host.die(owner)
    assert find(host, 0) == 0
    assert host.holdings.ledger.accounts[GPU].total_in_use == 0


def test_of_a_lost_gpu_nothing_is_left_and_its_bytes_are_free() -> None:
    host, owner = host_with_everything()
    tell(host, Gone())
    assert names(host) == {"w1", "kv1"}
    assert (find(host, 0), find(host, 1)) == (0, 1)
    assert not takes_new(host, owner)
    slab = next(one for one in host.holdings.store if one.device == GPU)
    assert host.holdings.ledger.accounts[GPU].total_in_use == slab.allocated_bytes, (
        "an open slab of a live owner"
    )
    host.die(owner)
    assert host.holdings.ledger.accounts[GPU].total_in_use == 0
    assert host.holdings.ledger.accounts[OTHER].total_in_use > 0


def test_weights_on_a_gpu_are_sealed_with_checksums_that_their_readers_can_compare() -> None:
    host = Host(POLICY_WITH_GPUS)
    owner = host.bind()
    epoch = host.create(owner, "w", SegmentClass.WEIGHTS, PAGES, device=GPU)
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.check_seal(owner.session, "w", epoch, [1], b"", Algorithm.XXH3)
    assert raised.value.reason is Reason.INVALID_FIELD
    host.holdings.seal_segment(owner.session, "w", epoch, [1], b"", Algorithm.MLH64)


@pytest.mark.parametrize("block_bytes", [1, 4, 4095, 4100])
def test_blocks_of_which_a_gpu_computes_no_checksums_are_refused(block_bytes: int) -> None:
    host = Host(POLICY_WITH_GPUS)
    session = host.bind().session
    with pytest.raises(UnbrokenError) as raised:
        host.holdings.plan_slab(session, block_bytes, 4, host.tick(), GPU)
    assert raised.value.reason is Reason.INVALID_FIELD
    assert host.holdings.ledger.num_slabs == 0
    host.holdings.plan_slab(session, block_bytes, 4, host.tick())


def test_whoever_watches_is_told() -> None:
    host, _ = host_with_everything()
    before = host.holdings.news.sequence
    for event in (Xid(31), Xid(94), Xid(79)):
        tell(host, event)
    told = [item for item in host.holdings.news.since(before)[0] if item.device]
    assert [(item.kind, item.value, item.device) for item in told] == [
        (NewsKind.GPU_FAULT, 31, UUID),
        (NewsKind.GPU_VERIFY, 0, UUID),
        (NewsKind.GPU_HEALTH, int(Health.LOST), UUID),
    ]


def test_a_pool_of_a_dead_owner_goes_with_a_tainted_gpu() -> None:
    host, owner = host_with_everything()
    host.die(owner)
    states = {version.name: version.state for version in host.holdings.segments}
    assert states["kv0"] is State.ADOPTABLE
    tell(host, Xid(140))
    assert names(host) == {"w1", "kv1"}


@pytest.mark.parametrize("number", [63, 95, 79])
def test_a_gpu_in_trouble_is_in_trouble_in_the_next_life_of_the_service(number: int) -> None:
    host, owner = host_with_everything()
    tell(host, Xid(number))
    health = host.holdings.health_of(GPU)
    before = names(host)
    host.crash()
    assert host.holdings.health_of(GPU) is health
    assert host.holdings.health_of(OTHER) is Health.HEALTHY
    assert names(host) == before
    assert host.rebind(owner)
    assert not takes_new(host, owner)
    tell(host, Gone())
    host.crash()
    assert host.holdings.health_of(GPU) is Health.LOST, "and what is worse is known, too"


def test_what_was_not_freed_before_the_service_died_is_freed_by_the_next_one() -> None:
    host, owner = host_with_everything()
    vault = dict(host.vault)
    tell(host, Xid(79))
    host.vault |= {number: entry for number, entry in vault.items() if number not in host.vault}
    for number in vault:
        host.memory.setdefault(number, Memory())
    host.crash()
    assert names(host) == {"w1", "kv1"}
    assert host.rebind(owner)


def test_who_owns_memory_of_a_gpu_that_is_not_there_is_not_forgotten() -> None:
    host = Host(POLICY_WITH_GPUS)
    owner = host.bind()
    epoch = host.create(owner, "kv", SegmentClass.KV_POOL, PAGES, device=GPU)
    host.holdings.freeze_pool(owner.session, "kv", epoch, b"")
    host.obey()
    absent = {number: one for number, one in host.vault.items() if labels.device_of(one)}
    assert len(absent) == 1
    host.vault = {number: one for number, one in host.vault.items() if number not in absent}
    host.policy = POLICY
    host.crash(absent)
    host.die(owner)
    assert owner.session_id in host.vault
    host.policy = POLICY_WITH_GPUS
    host.vault |= absent
    host.memory |= {number: Memory() for number in absent}
    host.crash()
    host.die(owner)
    assert host.holdings.adopt_pool(host.bind().session, "kv", 0, host.tick())
