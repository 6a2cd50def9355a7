"""Calls of a slow driver hold up nobody but who waits for them, and come one after the other."""

import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from typing_extensions import override

from memory_service.accounts import Device, Limits, MemoryKind
from memory_service.cuda import CudaBackend
from memory_service.holdings import Policy
from tests.memory_service.gpu_service import UUID
from tests.memory_service.inside import Inside, inside
from tests.memory_service.processes import until
from tests.support.fake_gpu import GRANULARITY_BYTES, MADE_OF, FakeGpu
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import SegmentClass
from unbroken.memory.gpu import GpuCode, GpuError
from unbroken.memory.gpu_client import GpuMemoryClient, GpuSegment

UNIT = GRANULARITY_BYTES
NUM_UNITS = 4
DEVICE = Device(MemoryKind.CUDA, UUID, UNIT)
WAIT_S = 10.0


class Card(FakeGpu):
    """One that has no more memory than it has, and whose driver can be held up."""

    def __init__(self) -> None:
        super().__init__(UUID)
        self.gate = threading.Event()
        self.gate.set()
        self.is_asked = threading.Event()
        self._given: list[tuple[int, int]] = []

    @property
    def used_bytes(self) -> int:
        """Of what the service has a descriptor of."""
        return sum(os.fstat(fd).st_size for fd, inode in self._given if _is(fd, inode))

    @override
    def create(self, size_bytes: int) -> int:
        self.is_asked.set()
        assert self.gate.wait(WAIT_S)
        if self.used_bytes + size_bytes > NUM_UNITS * UNIT:
            raise GpuError("create", GpuCode.OUT_OF_MEMORY)
        return super().create(size_bytes)

    @override
    def export(self, handle: int) -> int:
        fd = super().export(handle)
        self._given.append((fd, os.fstat(fd).st_ino))
        return fd


def _is(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def here(tmp_path: Path, card: Card) -> Generator[Inside]:
    limits = Limits(NUM_UNITS * UNIT, NUM_UNITS * UNIT, high_share=1.0)
    policy = Policy(Limits(1 << 30, 1 << 30), gpus={DEVICE: limits})
    with inside(tmp_path, policy, {DEVICE: CudaBackend(card, made_of=MADE_OF)}) as service:
        yield service


@pytest.fixture
def elsewhere() -> Generator[Callable[[Callable[[], GpuSegment]], Future[GpuSegment]]]:
    """Another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_what_is_freed_is_back_before_something_takes_its_place(
    here: Inside, card: Card, gpu: FakeGpu
) -> None:
    with GpuMemoryClient(here.socket, gpu) as client:
        room = client.create_on_gpu("room", SegmentClass.SCRATCH, [UNIT])
        writer = client.open_writer_on_gpu(4096, 2 * UNIT // 4096)
        writer.put([bytes(32)], [room.on_gpu.address], 16)
        writer.close()
        assert card.used_bytes == 3 * UNIT
        client.release(client.create_on_gpu("large", SegmentClass.SCRATCH, [3 * UNIT]))
        assert client.find([bytes(32)]) == 0, "evicted, since there was no other room"


def test_while_a_driver_takes_its_time_others_are_answered(
    here: Inside,
    card: Card,
    gpu: FakeGpu,
    elsewhere: Callable[[Callable[[], GpuSegment]], Future[GpuSegment]],
) -> None:
    with GpuMemoryClient(here.socket, gpu) as waiting, here.client() as other:
        card.gate.clear()
        answer = elsewhere(lambda: waiting.create_on_gpu("w", SegmentClass.SCRATCH, [UNIT]))
        try:
            assert card.is_asked.wait(WAIT_S)
            assert other.find([bytes(32)]) == 0
            assert not answer.done()
        finally:
            card.gate.set()
        waiting.release(answer.result(WAIT_S))
    until(lambda: card.used_bytes == 0, "and its memory is back")


def test_memory_for_a_process_that_has_gone_meanwhile_is_given_back(
    here: Inside,
    card: Card,
    gpu: FakeGpu,
    elsewhere: Callable[[Callable[[], GpuSegment]], Future[GpuSegment]],
) -> None:
    with GpuMemoryClient(here.socket, gpu) as waiting:
        card.gate.clear()
        answer = elsewhere(lambda: waiting.create_on_gpu("w", SegmentClass.SCRATCH, [UNIT]))
        try:
            assert card.is_asked.wait(WAIT_S)
            here.cut_off(waiting)
        finally:
            card.gate.set()
        waiting.release(answer.result(WAIT_S))  # It has asked again.
    until(lambda: card.used_bytes == 0, "both are back")
    assert here.run(lambda: here.holdings.ledger.num_slabs) == 0


def test_of_two_who_begin_a_segment_at_once_one_is_refused(
    here: Inside,
    card: Card,
    gpu: FakeGpu,
    elsewhere: Callable[[Callable[[], GpuSegment]], Future[GpuSegment]],
) -> None:
    with (
        GpuMemoryClient(here.socket, gpu) as slow,
        here.client() as quick,
    ):
        card.gate.clear()
        answer = elsewhere(lambda: slow.create_on_gpu("kv", SegmentClass.KV_POOL, [UNIT]))
        try:
            assert card.is_asked.wait(WAIT_S)
            pool = quick.create("kv", SegmentClass.KV_POOL, [4096])
        finally:
            card.gate.set()
        with pytest.raises(UnbrokenError) as raised:
            answer.result(WAIT_S)
        assert raised.value.reason is Reason.SEGMENT_BUSY
        quick.release(pool)
    until(lambda: card.used_bytes == 0, "its memory is back")
