"""Claims of `memory_service.vault` and of what the service does about it, in one process."""

import contextlib
import os
import resource
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from memory_service.accounts import HOST, Device, Limits, MemoryKind
from memory_service.cuda import CudaBackend
from memory_service.fencing import FencePolicy
from memory_service.gpu_health import Health
from memory_service.holdings import Holdings, KillSession, Policy
from memory_service.keeper import Ends, Keeper
from memory_service.memfd import MemfdBackend
from memory_service.sessions import Peer
from memory_service.vault import Vault
from memory_service.vault_link import VaultLink
from tests.support.fake_gpu import GRANULARITY_BYTES, MADE_OF, FakeGpu
from unbroken.memory import channel
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

WAIT_S = 20.0


@contextlib.contextmanager
def vault_at(path: Path) -> Generator[None]:
    """One that ends soon after its service."""
    vault = Vault(path, 0.2)
    thread = threading.Thread(target=vault.run, daemon=True)
    thread.start()
    yield
    thread.join(WAIT_S)
    assert not thread.is_alive()
    vault.close()


@pytest.fixture
def keeper() -> Keeper:
    policy = Policy(Limits(1 << 20, 1 << 20), FencePolicy())
    return Keeper(Holdings(policy, 1), {HOST: MemfdBackend()}, on_forget=lambda _: None)


def open_slab(keeper: Keeper, number: int) -> int:
    """Held by a process that lives."""
    session = keeper.holdings.bind(Peer("test", "t", os.getpid(), 0), b"secret", number * 1000)
    lifeline = os.memfd_create("test")
    keeper.ends[session.session_id] = Ends(lifeline, os.pidfd_open(os.getpid()))
    slab = keeper.holdings.plan_slab(session, 4096, 1, number * 1000)
    keeper.allocate([slab.slab_id], [slab.data_bytes])
    keeper.allocate_table(slab)
    keeper.holdings.begin_slab(session, slab)
    keeper.obey()
    return slab.slab_id


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_vault_that_only_stalled_gets_no_descriptors_twice_and_forgets_what_is_gone(
    tmp_path: Path, keeper: Keeper
) -> None:
    path = tmp_path / "vault.sock"
    with vault_at(path):
        keeper.vault = VaultLink(path, 1.0)
        assert keeper.vault.list() == []
        kept, gone = open_slab(keeper, 1), open_slab(keeper, 2)
        keeper.vault.close()  # As after a packet that it did not take in time.
        slab = keeper.holdings.store.get_slab(gone)
        assert slab is not None
        keeper.holdings.give_up_slab(slab)
        keeper.obey()
        again = VaultLink(path, 1.0)
        found = again.list()
        before = num_fds() - sum(len(fds) for _, fds in found)
        keeper.use_vault(again, found)
        entries = again.list()
        for _, fds in entries:
            channel.close_all(fds)
        assert num_fds() == before - 2, "and the vault, a thread here, closed those of the slab"
        assert kept in {entry.entry_id for entry, _ in entries}
        assert gone not in {entry.entry_id for entry, _ in entries}
        again.close()


def test_a_vault_forgets_what_no_service_can_use_any_more(tmp_path: Path, keeper: Keeper) -> None:
    path = tmp_path / "vault.sock"
    slab = pb.Slab(slab_id=7, size_bytes=4096, memory_kind=pb.MEMORY_KIND_CUDA, device="GPU-gone")
    entry = wire.VaultEntry(entry_id=7, segment=pb.Segment(name="w", slabs=[slab]), num_slabs=1)
    with vault_at(path):
        keeper.vault = VaultLink(path, 1.0)
        assert keeper.vault.list() == []
        of_gpu = os.memfd_create("test")
        keeper.vault.put(entry, [of_gpu])
        os.close(of_gpu)
        found = keeper.vault.list()
        assert len(found) == 1
        assert keeper.take_back(found, 0.0) == 0
        assert keeper.vault.list() == []
        keeper.vault.close()


def test_what_is_on_a_gpu_that_is_not_there_now_is_kept_for_when_it_is(tmp_path: Path) -> None:
    gpu = Device(MemoryKind.CUDA, "GPU-away", GRANULARITY_BYTES)
    fake = FakeGpu(gpu.uuid)
    handle = fake.create(GRANULARITY_BYTES)
    fd = fake.export(handle)
    fake.release(handle)
    slab = pb.Slab(
        slab_id=7,
        size_bytes=GRANULARITY_BYTES,
        memory_kind=pb.MEMORY_KIND_CUDA,
        device=gpu.uuid,
        checksum=1,
    )
    segment = pb.Segment(
        name="w",
        version=8,
        epoch=8,
        slabs=[slab],
        state=pb.SEGMENT_STATE_SEALED,
        segment_class=pb.SEGMENT_CLASS_WEIGHTS,
    )
    health = wire.VaultGpu(device=gpu.uuid, health=pb.MEMORY_HEALTH_DRAINING)
    limits = Limits(1 << 30, 1 << 30)
    paths = tmp_path / "vault.sock", tmp_path / "other.sock"
    with vault_at(paths[0]), vault_at(paths[1]):
        link, other = (VaultLink(path, 1.0) for path in paths)
        assert link.list() == other.list() == []
        link.put(wire.VaultEntry(entry_id=7, segment=segment, num_slabs=1), [fd])
        link.put(wire.VaultEntry(entry_id=9, gpu=health), [])
        os.close(fd)
        without = Keeper(
            Holdings(Policy(limits), 1),
            {HOST: MemfdBackend()},
            on_forget=lambda _: None,
            absent=[gpu.uuid],
        )
        without.vault = link
        assert without.take_back(link.list(), 0.0) == 0
        assert without.num_fds == 1
        link.close()
        without.use_vault(other, other.list())  # The first one is lost.
        without.close()
        link = VaultLink(paths[1], 1.0)
        other.close()
        backend = CudaBackend(fake, made_of=MADE_OF)
        again = Keeper(
            Holdings(Policy(limits, gpus={gpu: limits}), 2),
            {HOST: MemfdBackend(), gpu: backend},
            on_forget=lambda _: None,
        )
        again.vault = link
        assert again.take_back(link.list(), 0.0) == 2
        (version,) = again.holdings.segments
        assert (version.name, version.device, version.slab_ids) == ("w", gpu, (7,))
        assert again.holdings.health_of(gpu) is Health.DRAINING
        (taken,) = again.read_only([7])
        fake.release(fake.import_fd(taken))
        os.close(taken)
        link.close()
        again.close()
    fake.check_empty()


def test_a_vault_keeps_more_descriptors_than_select_can_count(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this user may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    others = [os.dup(0) for _ in range(1100)]
    try:
        path = tmp_path / "vault.sock"
        with vault_at(path):
            link = VaultLink(path, 1.0)
            assert link.fileno() > 1024
            assert link.list() == []
            link.close()
    finally:
        channel.close_all(others)


def test_killing_a_process_that_was_just_reaped_is_no_failure(keeper: Keeper) -> None:
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    keeper.ends[7] = Ends(os.memfd_create("test"), pidfd)
    keeper.holdings.commands.append(KillSession(7))
    keeper.obey()
    assert not keeper.holdings.commands
    os.close(keeper.ends[7].lifeline)
    os.close(pidfd)
