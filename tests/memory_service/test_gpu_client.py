"""Memory of a GPU outlives its processes, with a fake GPU between real ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory_service.gpu_service import UUID
from tests.memory_service.processes import ServiceProcess, serving, until
from tests.memory_service.scripted import Scripted
from tests.memory_service.test_service import usage
from tests.support.fake_gpu import GRANULARITY_BYTES, FakeGpu
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import SegmentClass
from unbroken.memory.gpu import GpuCode, GpuError
from unbroken.memory.gpu_client import GpuMemoryClient
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

UNIT = GRANULARITY_BYTES
WRITES_AND_WAITS = """
import pathlib, sys, time
from tests.support.fake_gpu import FakeGpu
from unbroken.memory.client import SegmentClass
from unbroken.memory.gpu_client import GpuMemoryClient
gpu = FakeGpu(sys.argv[2])
client = GpuMemoryClient(pathlib.Path(sys.argv[1]), gpu)
pool = client.create_on_gpu(sys.argv[3], SegmentClass.KV_POOL, [2 << 20, 4 << 20])
client.freeze(pool, b"two slabs")
for number, slab in enumerate(pool.on_gpu.slabs):
    gpu.write(slab.address + slab.size_bytes - 5, b"kept%d" % number)
print(pool.epoch, flush=True)
time.sleep(60)
"""
ADOPTS_AND_WAITS = """
import pathlib, sys, time
from tests.support.fake_gpu import FakeGpu
from unbroken.memory.gpu_client import GpuMemoryClient
gpu = FakeGpu(sys.argv[2])
client = GpuMemoryClient(pathlib.Path(sys.argv[1]), gpu)
pool = client.attach_on_gpu(sys.argv[3], is_standby=True)
print("attached", flush=True)
sys.stdin.readline()
client.take_over(pool, timeout_s=20)
slab = pool.on_gpu.slabs[-1]
gpu.write(slab.address + slab.size_bytes - 5, b"first")
print(pool.epoch, flush=True)
time.sleep(60)
"""


def owner_of_pool(service: ServiceProcess, name: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that has written, and its epoch."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES_AND_WAITS, str(service.socket), UUID, name],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        return process, int(process.stdout.readline())


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)


def ends(gpu: FakeGpu, segment_address: int) -> list[bytes]:
    """What stands at the ends of both slabs of the pool."""
    return [gpu.read(segment_address + at - 5, 5) for at in (UNIT, 3 * UNIT)]


def used(service: ServiceProcess) -> int:
    _, on_gpu = usage(service).memories
    assert (on_gpu.memory_kind, on_gpu.device) == (pb.MEMORY_KIND_CUDA, UUID)
    return on_gpu.used_bytes


def test_weights_that_one_process_sealed_are_compared_by_the_next(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    with GpuMemoryClient(service.socket, gpu) as writing:
        built = writing.create_on_gpu("w", SegmentClass.WEIGHTS, [UNIT, 2 * UNIT, UNIT])
        for number, slab in enumerate(built.on_gpu.slabs):
            gpu.write(slab.address + 8 * number, b"weights")
        writing.seal(built, b"three slabs")
    with GpuMemoryClient(service.socket, gpu) as reading:
        weights = reading.attach_on_gpu("w")
        assert weights.layout == b"three slabs"
        assert len(set(weights.checksums)) == 3
        assert gpu.read(weights.on_gpu.slabs[2].address + 16, 7) == b"weights"
        with pytest.raises(GpuError):
            gpu.write(weights.on_gpu.address, b"no")
        reading.release(weights)


def test_weights_that_somebody_spoiled_are_not_attached(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    with GpuMemoryClient(service.socket, gpu) as client:
        client.seal(client.create_on_gpu("spoiled", SegmentClass.WEIGHTS, [UNIT]))
        hostile = client.attach_on_gpu("spoiled", is_standby=True)
        gpu.write(hostile.on_gpu.address + 4711, b"\x01")
        with pytest.raises(UnbrokenError) as raised:
            client.attach_on_gpu("spoiled")
        assert raised.value.reason is Reason.CHECKSUM_MISMATCH
        client.release(client.attach_on_gpu("spoiled", is_checked=False))
        with pytest.raises(UnbrokenError):
            client.verify(hostile)
        hostile.unmap()


@pytest.mark.parametrize("number", [pb.CHECKSUM_ALGORITHM_XXH3, 99])
def test_weights_that_cannot_be_compared_are_not_taken_for_compared(
    tmp_path: Path, gpu: FakeGpu, number: int
) -> None:
    handle = gpu.create(UNIT)
    fd = gpu.export(handle)
    gpu.release(handle)
    slab = pb.Slab(
        slab_id=5,
        size_bytes=UNIT,
        checksum=1,
        memory_kind=pb.MEMORY_KIND_CUDA,
        device=UUID,
        checksum_algorithm=pb.ChecksumAlgorithm.ValueType(number),
    )
    granted = wire.Granted(segment=pb.Segment(name="w", version=1, slabs=[slab]))
    service = Scripted(tmp_path / "session.sock")
    service.answers("attach", wire.SessionResponse(granted=granted), given=[fd])
    with service.running(), GpuMemoryClient(tmp_path / "session.sock", gpu) as client:
        with pytest.raises(UnbrokenError) as raised:
            client.attach_on_gpu("w")
        assert raised.value.reason is Reason.NOT_IMPLEMENTED
        client.release(client.attach_on_gpu("w", is_checked=False))


def test_a_pool_of_a_killed_process_is_adopted_with_its_bytes(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    owner, epoch = owner_of_pool(service, "kv")
    with GpuMemoryClient(service.socket, gpu) as successor:
        with pytest.raises(UnbrokenError) as raised:
            successor.adopt_on_gpu("kv", epoch, timeout_s=0.0)
        assert raised.value.reason is Reason.NOT_FENCED
        kill(owner)
        pool = successor.adopt_on_gpu("kv", epoch)
        assert pool.epoch > epoch
        assert ends(gpu, pool.on_gpu.address) == [b"kept0", b"kept1"]
        gpu.write(pool.on_gpu.address, b"goes on")


def test_a_pool_that_cannot_be_mapped_is_not_lost(service: ServiceProcess, gpu: FakeGpu) -> None:
    owner, epoch = owner_of_pool(service, "kv4")
    kill(owner)
    with GpuMemoryClient(service.socket, gpu) as successor:
        gpu.fail("map", 2, GpuCode.OUT_OF_MEMORY)
        with pytest.raises(GpuError):
            successor.adopt_on_gpu("kv4", epoch)
        pool = successor.adopt_on_gpu("kv4", epoch)
        assert ends(gpu, pool.on_gpu.address) == [b"kept0", b"kept1"]


def test_a_standby_takes_over_what_it_has_mapped_and_maps_nothing(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    owner, epoch = owner_of_pool(service, "kv2")
    with GpuMemoryClient(service.socket, gpu) as standby:
        pool = standby.attach_on_gpu("kv2", is_standby=True)
        num_calls = sum(gpu.num_calls.values())
        kill(owner)
        standby.take_over(pool)
        assert sum(gpu.num_calls.values()) == num_calls, "the driver is not asked for anything"
        assert pool.epoch > epoch
        assert ends(gpu, pool.on_gpu.address) == [b"kept0", b"kept1"]
        gpu.write(pool.on_gpu.address, b"goes on")
        before = used(service)
        standby.release(pool)
        until(lambda: used(service) == before - 3 * UNIT, "its old owner is gone, too")


def test_a_second_standby_takes_over_when_the_first_one_has_died_too(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    owner, epoch = owner_of_pool(service, "kv5")
    with GpuMemoryClient(service.socket, gpu) as standby:
        pool = standby.attach_on_gpu("kv5", is_standby=True)
        first = subprocess.Popen(
            [sys.executable, "-c", ADOPTS_AND_WAITS, str(service.socket), UUID, "kv5"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert first.stdin is not None
        assert first.stdout is not None
        with first.stdin, first.stdout:
            assert first.stdout.readline() == b"attached\n"
            kill(owner)
            first.stdin.write(b"\n")
            first.stdin.flush()
            taken = int(first.stdout.readline())
            kill(first)
        standby.take_over(pool)
        assert epoch < taken < pool.epoch
        assert ends(gpu, pool.on_gpu.address) == [b"kept0", b"first"]
        standby.release(pool)


def test_a_standby_does_not_take_over_what_was_begun_anew(
    service: ServiceProcess, gpu: FakeGpu
) -> None:
    owner, _ = owner_of_pool(service, "kv6")
    with GpuMemoryClient(service.socket, gpu) as standby:
        pool = standby.attach_on_gpu("kv6", is_standby=True)
        kill(owner)
        other = FakeGpu(UUID)
        with GpuMemoryClient(service.socket, other) as another:
            another.adopt_on_gpu("kv6")
            another.freeze(another.create_on_gpu("kv6", SegmentClass.KV_POOL, [UNIT]))
            with pytest.raises(UnbrokenError) as raised:
                standby.take_over(pool)
            assert raised.value.reason is Reason.SEGMENT_NOT_FOUND
            assert not pool.is_owned
        other.check_empty()


def test_memory_of_a_gpu_outlives_the_service(service: ServiceProcess, gpu: FakeGpu) -> None:
    owner, epoch = owner_of_pool(service, "kv3")
    service.kill()
    service.start()
    kill(owner)
    with GpuMemoryClient(service.socket, gpu) as successor:
        pool = successor.adopt_on_gpu("kv3", epoch)
        assert ends(gpu, pool.on_gpu.address) == [b"kept0", b"kept1"]
        again = successor.create_on_gpu("kv3b", SegmentClass.SCRATCH, [UNIT])
        assert gpu.read(again.on_gpu.address, 8) == bytes(8)


def test_what_cannot_be_mapped_is_given_back(service: ServiceProcess, gpu: FakeGpu) -> None:
    before = used(service)
    with GpuMemoryClient(service.socket, gpu) as client:
        gpu.fail("map", 2, GpuCode.OUT_OF_MEMORY)
        with pytest.raises(GpuError):
            client.create_on_gpu("unlucky", SegmentClass.SCRATCH, [UNIT, UNIT])
        assert used(service) == before
        gpu.check_empty()


@pytest.mark.parametrize(
    ("size", "reason"),
    [(4096, Reason.INVALID_FIELD), (128 << 20, Reason.MEMORY_EXHAUSTED)],
)
def test_the_gpu_has_pages_and_a_capacity_of_its_own(
    service: ServiceProcess, gpu: FakeGpu, size: int, reason: Reason
) -> None:
    with GpuMemoryClient(service.socket, gpu) as client:
        with pytest.raises(UnbrokenError) as raised:
            client.create_on_gpu("large", SegmentClass.SCRATCH, [size])
        assert raised.value.reason is reason


def test_memory_of_another_gpu_is_not_taken_for_this_ones(service: ServiceProcess) -> None:
    other = FakeGpu("GPU-other")
    with GpuMemoryClient(service.socket, FakeGpu(UUID)) as client:
        client.seal(client.create_on_gpu("here", SegmentClass.WEIGHTS, [UNIT]))
    with GpuMemoryClient(service.socket, other) as client:
        for call in (
            lambda: client.attach_on_gpu("here"),
            lambda: client.create_on_gpu("there", SegmentClass.SCRATCH, [UNIT]),
        ):
            with pytest.raises(UnbrokenError) as raised:
                call()
            assert raised.value.reason is Reason.INVALID_FIELD
    other.check_empty()


def test_a_gpu_that_fails_gives_out_nothing_and_costs_the_host_nothing(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    with (
        serving(
            tmp_path,
            *("--gpus", f"{UUID}={64 << 20}", "--no-has-vault"),
            module="tests.memory_service.gpu_service",
        ) as service,
        GpuMemoryClient(service.socket, gpu) as client,
    ):
        client.seal(client.create_on_gpu("w", SegmentClass.WEIGHTS, [UNIT]))
        os.kill(service.pid, signal.SIGUSR1)

        def is_tainted() -> bool:
            return usage(service).memories[1].health == pb.MEMORY_HEALTH_TAINTED

        until(is_tainted, "the GPU is tainted")
        with pytest.raises(UnbrokenError) as raised:
            client.create_on_gpu("new", SegmentClass.SCRATCH, [UNIT])
        assert raised.value.reason is Reason.GPU_FAILED
        with pytest.raises(UnbrokenError) as raised:
            client.attach_on_gpu("w")
        assert raised.value.reason is Reason.SEGMENT_NOT_FOUND
        client.release(client.create("of-the-host", SegmentClass.SCRATCH, [4096]))


def test_a_gpu_that_failed_has_failed_though_the_service_is_another(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    def health() -> pb.MemoryHealth.ValueType:
        return usage(service).memories[1].health

    flags = ("--gpus", f"{UUID}={64 << 20}")
    with serving(tmp_path, *flags, module="tests.memory_service.gpu_service") as service:
        os.kill(service.pid, signal.SIGUSR1)
        until(lambda: health() == pb.MEMORY_HEALTH_TAINTED, "the GPU is tainted")
        service.kill()
        service.start()
        assert health() == pb.MEMORY_HEALTH_TAINTED
        with GpuMemoryClient(service.socket, gpu) as client:
            with pytest.raises(UnbrokenError) as raised:
                client.create_on_gpu("new", SegmentClass.SCRATCH, [UNIT])
            assert raised.value.reason is Reason.GPU_FAILED


def test_the_command_line_shows_gpus_beside_the_host(service: ServiceProcess, gpu: FakeGpu) -> None:
    def shown(command: str) -> str:
        control = str(service.directory / "control.sock")
        line = [sys.executable, "-m", "unbroken.cli", "memory", command, "--control", control]
        return subprocess.run(line, check=True, capture_output=True, text=True, timeout=30).stdout

    with GpuMemoryClient(service.socket, gpu, tenant="shown") as client:
        scratch = client.create_on_gpu("scratch", SegmentClass.SCRATCH, [2 * UNIT])
        lines = shown("usage").splitlines()
        assert any(one.startswith(f"{UUID}: ") and one.endswith("is healthy") for one in lines)
        assert ["shown", UUID, "4.0MiB", "-"] in [one.split() for one in lines]
        assert UUID in next(one for one in shown("segments").splitlines() if "scratch" in one)
        client.release(scratch)
