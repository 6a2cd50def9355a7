"""Slabs of a GPU are mapped all or not at all, and where they were before."""

from collections.abc import Generator, Sequence

import pytest

from memory_service.cuda import CudaBackend
from tests.support.fake_gpu import GRANULARITY_BYTES, MADE_OF, FakeGpu, num_descriptors
from unbroken.memory import mlh64
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import Access, AddressTaken, GpuCode, GpuError

SIZES = (GRANULARITY_BYTES, 3 * GRANULARITY_BYTES, 2 * GRANULARITY_BYTES)


@pytest.fixture
def gpu() -> Generator[FakeGpu]:
    """A process's."""
    before = num_descriptors()
    gpu = FakeGpu()
    yield gpu
    gpu.check_empty()
    gpu.check_failed()
    assert num_descriptors() == before


@pytest.fixture
def fds() -> Generator[Sequence[int]]:
    """What the service gives out: it has no handle any more, and has mapped nothing."""
    vmm = FakeGpu()
    backend = CudaBackend(vmm, made_of=MADE_OF)
    allocations = [backend.allocate(size, "") for size in SIZES]
    yield [allocation.fd for allocation in allocations]
    for allocation in allocations:
        backend.free(allocation)
    vmm.check_empty()


def test_what_one_process_writes_another_reads(gpu: FakeGpu, fds: Sequence[int]) -> None:
    other = FakeGpu()
    mine, its = DeviceSlabs(gpu, SIZES), DeviceSlabs(other, SIZES)
    mine.map(fds, Access.READ_WRITE)
    its.map(fds, Access.READ)
    for number, slab in enumerate(mine.slabs):
        gpu.write(slab.address + slab.size_bytes - 8, bytes([number] * 8))
    sums = [gpu.checksums([slab.address], slab.size_bytes) for slab in mine.slabs]
    assert sums == [other.checksums([slab.address], slab.size_bytes) for slab in its.slabs]
    assert sums[1] == [mlh64.compute(bytes(SIZES[1] - 8) + bytes([1] * 8))]
    with pytest.raises(GpuError):
        other.write(its.address, b"no")
    mine.close()
    assert other.read(its.slabs[2].address + SIZES[2] - 8, 8) == bytes([2] * 8)
    its.close()
    its.close()
    other.check_empty()


@pytest.mark.parametrize(
    ("call", "number"),
    [*((call, number) for call in ("import_fd", "map") for number in (1, 2, 3)), ("set_access", 1)],
)
def test_a_refusal_in_the_middle_leaves_nothing_behind(
    gpu: FakeGpu, fds: Sequence[int], call: str, number: int
) -> None:
    slabs = DeviceSlabs(gpu, SIZES)
    gpu.fail(call, number, GpuCode.OUT_OF_MEMORY)
    with pytest.raises(GpuError) as raised:
        slabs.map(fds, Access.READ)
    assert raised.value.code == GpuCode.OUT_OF_MEMORY
    assert not slabs.slabs
    slabs.map(fds, Access.READ)
    assert len(slabs.slabs) == 3
    slabs.close()


def test_a_range_that_was_kept_is_filled_again_where_it_was(
    gpu: FakeGpu, fds: Sequence[int]
) -> None:
    slabs = DeviceSlabs(gpu, SIZES)
    slabs.map(fds, Access.READ_WRITE)
    before = slabs.slabs
    gpu.write(before[1].address, b"as it was")
    slabs.unmap()
    assert gpu.num_calls["synchronize"] == 1, "what the GPU does there is over"
    with pytest.raises(GpuError):
        gpu.read(before[1].address, 9)
    slabs.map(fds, Access.READ)
    assert slabs.slabs == before
    assert gpu.read(before[1].address, 9) == b"as it was"
    slabs.close()


def test_a_successor_has_its_memory_where_its_predecessor_had_it(
    gpu: FakeGpu, fds: Sequence[int]
) -> None:
    slabs = DeviceSlabs(gpu, SIZES)
    address = slabs.address
    with pytest.raises(AddressTaken):
        DeviceSlabs(gpu, SIZES, address=address)
    slabs.close()
    again = DeviceSlabs(gpu, SIZES, address=address)
    again.map(fds, Access.READ)
    assert again.slabs[0].address == address
    again.close()


def test_a_slab_says_where_it_is_as_arrays_do(gpu: FakeGpu, fds: Sequence[int]) -> None:
    slabs = DeviceSlabs(gpu, SIZES)
    slabs.map(fds, Access.READ)
    described = slabs.slabs[1].__cuda_array_interface__
    assert described["data"] == (slabs.address + SIZES[0], False)
    assert described["shape"] == (SIZES[1],)
    slabs.close()
