"""Blocks in a GPU's memory outlive their writers, with a fake GPU between real processes."""

import hashlib
import subprocess
import sys
from collections.abc import Generator, Sequence

import pytest

from tests.memory_service.gpu_service import UUID
from tests.memory_service.processes import ServiceProcess, until
from tests.memory_service.test_service import Stub, asked, usage
from tests.support.fake_gpu import GRANULARITY_BYTES, FakeGpu
from unbroken.memory.client import MAP_TRIES, MemoryClient
from unbroken.memory.gpu import Access, GpuCode, GpuError
from unbroken.memory.gpu_client import GpuMemoryClient
from unbroken.memory.mlh64 import compute
from unbroken.v1 import memory_pb2 as pb

BLOCK_BYTES = 4096 + 24
WRITES_AND_WAITS = """
import pathlib, sys, time
from tests.memory_service.test_gpu_blocks import BLOCK_BYTES, Room, keys_of
from tests.support.fake_gpu import FakeGpu
from unbroken.memory.gpu_client import GpuMemoryClient
gpu = FakeGpu(sys.argv[2])
client = GpuMemoryClient(pathlib.Path(sys.argv[1]), gpu)
room, keys = Room(gpu, 3), keys_of(sys.argv[3], 3)
room.fill(keys)
client.open_writer_on_gpu(BLOCK_BYTES, 4).put(keys, room.addresses, 16)
print("not told", flush=True)
time.sleep(60)
"""


def keys_of(seed: str, number: int) -> list[bytes]:
    return [hashlib.blake2b(f"{seed} {i}".encode(), digest_size=32).digest() for i in range(number)]


def bytes_of(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(BLOCK_BYTES)


class Room:
    """An engine's own cache on the GPU, with places for so many blocks."""

    def __init__(self, gpu: FakeGpu, number: int) -> None:
        self.gpu = gpu
        self._base = gpu.reserve(GRANULARITY_BYTES)
        handle = gpu.create(GRANULARITY_BYTES)
        gpu.map(self._base, GRANULARITY_BYTES, handle)
        gpu.release(handle)
        gpu.set_access(self._base, GRANULARITY_BYTES, Access.READ_WRITE)
        self.addresses = [self._base + i * BLOCK_BYTES for i in range(number)]

    def fill(self, keys: Sequence[bytes]) -> None:
        for key, address in zip(keys, self.addresses, strict=True):
            self.gpu.write(address, bytes_of(key))

    def holds(self, keys: Sequence[bytes]) -> bool:
        return all(
            self.gpu.read(address, BLOCK_BYTES) == bytes_of(key)
            for key, address in zip(keys, self.addresses, strict=False)
        )

    def close(self) -> None:
        self.gpu.unmap(self._base, GRANULARITY_BYTES)
        self.gpu.unreserve(self._base, GRANULARITY_BYTES)


@pytest.fixture
def room(gpu: FakeGpu) -> Generator[Room]:
    room = Room(gpu, 3)
    yield room
    room.close()


def test_what_one_process_put_another_restores(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("put", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as writing:
        writer = writing.open_writer_on_gpu(BLOCK_BYTES, 4)
        assert writer.put(keys, room.addresses, 16) == 3
        writer.flush()
        room.fill(keys_of("other", 3))
        assert writing.restore(keys, room.addresses) == 3, "its own, where it wrote them"
        assert room.holds(keys)
    room.fill(keys_of("other", 3))
    with GpuMemoryClient(service.socket, gpu) as reading:
        assert reading.find(keys) == 3
        assert reading.restore([*keys_of("none", 1), *keys], room.addresses) == 0
        assert reading.restore(keys, room.addresses) == 3
        assert room.holds(keys)


def test_blocks_of_a_killed_process_are_there_though_nobody_was_told(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("killed", 3)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES_AND_WAITS, str(service.socket), UUID, "killed"],
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    with writer.stdout, GpuMemoryClient(service.socket, gpu) as successor:
        assert writer.stdout.readline() == b"not told\n"
        assert successor.find(keys) == 0
        writer.kill()
        writer.wait(10)
        until(lambda: successor.find(keys) == 3, "its records are read")
        assert successor.restore(keys, room.addresses) == 3
        assert room.holds(keys)


def test_a_block_that_somebody_spoiled_is_a_miss(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("spoiled", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as client:
        writer = client.open_writer_on_gpu(BLOCK_BYTES, 4)
        writer.put(keys, room.addresses, 16)
        writer.flush()
        gpu.write(writer.as_reader().address(2) + 77, b"!")  # Slots are used from the first on.
        assert compute(gpu.read(writer.as_reader().address(2), BLOCK_BYTES)) != compute(
            bytes_of(keys[2])
        )
        assert client.restore(keys, room.addresses) == 2
        assert room.holds(keys[:2])
        assert client.find(keys) == 2, "it is dropped"


def test_the_oldest_make_room(service: ServiceProcess, gpu: FakeGpu, room: Room) -> None:
    keys = keys_of("many", 3)
    with GpuMemoryClient(service.socket, gpu) as client:
        writer = client.open_writer_on_gpu(BLOCK_BYTES, 2)
        room.fill(keys)
        assert writer.put(keys, room.addresses, 16) == 3
        writer.flush()
        assert client.find(keys) == 0
        assert client.restore(keys[2:], room.addresses) == 1
        assert room.holds(keys[2:])


def test_who_has_no_gpu_finds_them_and_gets_none(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("host", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as client:
        writer = client.open_writer_on_gpu(BLOCK_BYTES, 4)
        writer.put(keys, room.addresses, 16)
        writer.flush()
        with MemoryClient(service.socket) as host:
            assert host.find(keys) == 3
            assert len(host.get(keys)) == 0


def test_the_host_and_a_gpu_have_the_same_keys_each_for_itself(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("both", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as client:
        on_gpu = client.open_writer_on_gpu(BLOCK_BYTES, 4)
        on_gpu.put(keys, room.addresses, 16)
        on_gpu.flush()
        on_host = client.open_writer(BLOCK_BYTES, 4)
        for key in keys[:2]:
            assert on_host.put(key, bytes(BLOCK_BYTES), 16)
        on_host.flush()
        with client.get(keys) as blocks:
            assert [bytes(block.data) for block in blocks] == [bytes(BLOCK_BYTES)] * 2
        assert client.restore(keys, room.addresses) == 3
        assert room.holds(keys)


def test_who_cannot_map_a_slab_does_not_keep_it_from_others(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    async def evict(stub: Stub) -> int:
        return (await stub.Evict(pb.EvictRequest())).freed_bytes

    def unreclaimed() -> int:
        return usage(service).memories[1].unreclaimed_bytes

    keys = keys_of("kept", 3)
    room.fill(keys)
    with MemoryClient(service.socket) as host:
        with GpuMemoryClient(service.socket, gpu) as client:
            client.open_writer_on_gpu(BLOCK_BYTES, 4).put(keys, room.addresses, 16)
        before = unreclaimed()
        with host.get(keys) as blocks:
            assert len(blocks) == 0
        assert host.find(keys) == 3, "and has let them go"
        assert asked(service, evict) > 0
        assert unreclaimed() > before, "it was given a descriptor"
        host.get(keys).release()
        assert unreclaimed() == before


def test_a_put_that_fails_costs_no_slots(service: ServiceProcess, gpu: FakeGpu, room: Room) -> None:
    keys = keys_of("fails", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as client:
        writer = client.open_writer_on_gpu(BLOCK_BYTES, 3)
        gpu.fail("checksums", 1, GpuCode.UNKNOWN)
        with pytest.raises(GpuError):
            writer.put(keys, room.addresses, 16)
        assert writer.put(keys, room.addresses, 16) == 3
        writer.flush()
        assert client.find(keys) == 3


def test_a_slab_that_cannot_be_mapped_is_given_back(service: ServiceProcess, gpu: FakeGpu) -> None:
    def used() -> int:
        return usage(service).memories[1].used_bytes

    with GpuMemoryClient(service.socket, gpu) as client:
        before = used()
        gpu.fail("set_access", 1, GpuCode.OUT_OF_MEMORY)
        with pytest.raises(GpuError):
            client.open_writer_on_gpu(BLOCK_BYTES, 4)
        assert used() == before


def test_a_slab_that_could_not_be_mapped_once_is_asked_for_again(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("again", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as writing:
        writing.open_writer_on_gpu(BLOCK_BYTES, 4).put(keys, room.addresses, 16)
    with GpuMemoryClient(service.socket, gpu) as reading:
        gpu.fail("map", 1, GpuCode.UNKNOWN)
        assert reading.restore(keys, room.addresses) == 0
        assert reading.restore(keys, room.addresses) == 3
        assert room.holds(keys)


def test_a_slab_that_can_never_be_mapped_is_not_asked_for_for_ever(
    service: ServiceProcess, gpu: FakeGpu, room: Room
) -> None:
    keys = keys_of("never", 3)
    room.fill(keys)
    with GpuMemoryClient(service.socket, gpu) as writing:
        writing.open_writer_on_gpu(BLOCK_BYTES, 4).put(keys, room.addresses, 16)
    with GpuMemoryClient(service.socket, gpu) as reading:
        before = gpu.num_calls["map"]
        for _ in range(2 * MAP_TRIES):
            gpu.fail("map", 1, GpuCode.UNKNOWN)
            assert reading.restore(keys, room.addresses) == 0
        assert gpu.num_calls["map"] == before + MAP_TRIES
        gpu.forgive()
