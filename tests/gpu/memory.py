"""`make memory-gpu`: memory of a GPU outlives its processes, and is what it was.

    python -m tests.gpu.memory [--gib 16] [--rounds 10] [--gpu 0] [--mps]

Needs a GPU, cuda-bindings, NVRTC and nvidia-ml-py; with PyTorch it also has a process write where
it may not. Ends with one line of JSON. Exits with 1 if a promise was broken, and with 2 if there is
no GPU.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memory_service import cuda
from memory_service.nvml import NvmlWatch
from tests.gpu import deeds
from tests.gpu.filling import BLOCK_BYTES, SLAB_BYTES, fill, keys_of
from tests.gpu.host_copies import HostCopies
from tests.gpu.watching import faults
from tests.memory_service import refusals
from tests.memory_service.processes import ServiceProcess, serving
from tests.memory_service.test_service import usage
from unbroken.memory import mlh64
from unbroken.memory.client import MemoryClient, SegmentClass
from unbroken.memory.cuda import CudaGpu, device_uuids
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import Access, GpuUnavailable
from unbroken.memory.gpu_client import GpuMemoryClient

ATTACH_MS_MAX = 5.0
"""16 slabs of 1 GiB, at the median, with what else there is to do about them."""
CHECKSUM_SHARE_MIN = 0.85
"""Of the traffic of one large copy, which reads and writes: the GPU's own measure."""
COPY_SHARE_MIN = 0.8
"""Of one large copy, by blocks of 2 MiB that lie anywhere, with their checksums."""
HOST_GIB = 2
H2D_SHARE_MIN = 0.9
"""Of copies from pinned memory."""
BLOCKS = 130
"""Of 2 MiB: KV of some 8,000 tokens of a model of 1.5 B, or 2,000 of one of 8 B."""
RESTORE_MS_MAX = 12.0
"""From the kill of their writer until the standby has all of them."""
CONTEXT_BYTES_MAX = 16 << 20
"""What a service without a context may take of the GPU; a context takes 500 MiB."""
SIZES = (0, 1, 7, 8, 9, 4096, (2 << 20) - 8, 2 << 20, (2 << 20) + 5, (5 << 20) + 3, 64 << 20)
FLIPS = 200

Figures = dict[str, Any]


class Proof:
    """All that is shown, and what was wrong."""

    def __init__(self, gpu: CudaGpu, gib: int, rounds: int) -> None:
        self.gpu = gpu
        self.gib = gib
        self.rounds = rounds
        self.figures: Figures = {}
        self.violations: list[str] = []
        self.is_mps = False
        """Whether all of them are clients of an MPS server, which has their channels."""

    def expect(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.violations.append(what)

    # The driver.

    def refusals(self) -> None:
        """The driver answers as the fake does, whatever is done to it."""
        different: dict[str, object] = {}
        for name, answer in deeds.play(self.gpu.uuid, list(refusals.DEEDS)):
            expected = refusals.EXPECTED[name]
            is_same = (
                str(answer).startswith("its process ended")
                if expected is refusals.Bug.CRASH
                else answer == expected
            )
            if not is_same:
                different[name] = answer
        self.figures["refusals"] = len(refusals.DEEDS)
        self.figures["refusals_different"] = different
        self.expect(not different, f"the driver answers otherwise than the fake: {different}")

    def checksums(self) -> None:
        """The GPU and the processor compute the same, of anything; and no flipped bit is missed."""
        gpu, chance = self.gpu, random.Random(1)
        slabs = self._slabs(1, 64 << 20)
        data = chance.randbytes(64 << 20)
        gpu.write(slabs.address, data)
        cases = [(size, at) for size in SIZES for at in (0, 8, 24) if at + size <= len(data)]
        wrong = [
            (size, at)
            for size, at in cases
            if gpu.checksums([slabs.address + at], size)
            != [mlh64.compute(memoryview(data)[at : at + size])]
        ]
        many = [slabs.address + number * 65536 for number in range(1024)]
        expected = [
            mlh64.compute(memoryview(data)[at : at + 65536]) for at in range(0, 64 << 20, 65536)
        ]
        self.expect(not wrong, f"the checksum is another on the GPU: {wrong}")
        self.expect(gpu.checksums(many, 65536) == expected, "checksums of many blocks differ")
        copies = self._slabs(1, 64 << 20)
        uneven = (64 << 10) - 24 + 5
        sources = [slabs.address + number * (64 << 10) + 8 for number in range(500)]
        targets = [copies.address + number * (64 << 10) + 8 for number in range(500)]
        told = gpu.copy_blocks(targets, sources, uneven)
        self.expect(told == gpu.checksums(targets, uneven), "a copied block has another checksum")
        self.expect(
            gpu.read(targets[7] - 8, 64 << 10)
            == bytes(8) + data[7 * (64 << 10) + 8 :][:uneven] + bytes((64 << 10) - 8 - uneven),
            "a copied block has other bytes, or its neighbours have",
        )
        whole = gpu.checksums([slabs.address], len(data))
        self.expect(
            gpu.copy_blocks([copies.address], [slabs.address], len(data)) == whole
            and gpu.checksums([copies.address], len(data)) == whole,
            "64 MiB that are copied have another checksum",
        )
        copies.close()
        missed = 0
        for _ in range(FLIPS):
            at = chance.randrange(len(data))
            gpu.write(slabs.address + at, bytes([data[at] ^ 1 << chance.randrange(8)]))
            missed += gpu.checksums([slabs.address], len(data)) == whole
            gpu.write(slabs.address + at, data[at : at + 1])
        self.expect(missed == 0, f"{missed} of {FLIPS} flipped bits were missed")
        slabs.close()
        self.figures |= {
            "checksums_compared": len(cases) + len(many),
            "flips": FLIPS,
            "missed": missed,
        }

    def speed(self) -> None:
        """How fast it reads, beside a copy of the same run."""
        gpu = self.gpu
        slabs = self._slabs(self.gib, SLAB_BYTES)
        for number, slab in enumerate(slabs.slabs):
            fill(gpu, slab.address, slab.size_bytes, seed=number)
        size = self.gib * SLAB_BYTES
        addresses = [slab.address for slab in slabs.slabs]
        blocks = [slabs.address + at for at in range(0, size, 2 << 20)]
        pages = [slabs.address + at for at in range(0, size // 16, 64 << 10)]
        half = size // 2
        lower, upper = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        random.Random(1).shuffle(upper)
        copied = 2 * half / self._best(lambda: gpu.copy(slabs.address, slabs.address + half, half))
        whole = size / self._best(lambda: gpu.checksums(addresses, SLAB_BYTES))
        blocked = 2 * half / self._best(lambda: gpu.copy_blocks(lower, upper, 2 << 20))
        self.figures |= {
            "copy_traffic_tb_s": _tera(copied),
            "checksum_tb_s": _tera(whole),
            "copy_2_mib_blocks_traffic_tb_s": _tera(blocked),
            "checksum_2_mib_blocks_tb_s": _tera(
                size / self._best(lambda: gpu.checksums(blocks, 2 << 20))
            ),
            "checksum_64_kib_blocks_tb_s": _tera(
                size / 16 / self._best(lambda: gpu.checksums(pages, 64 << 10))
            ),
            "checksum_one_2_mib_block_us": round(
                1e6 * self._best(lambda: gpu.checksums(blocks[:1], 2 << 20)), 1
            ),
        }
        self.expect(
            whole >= CHECKSUM_SHARE_MIN * copied,
            f"the checksum reads {_tera(whole)} TB/s, a copy moves {_tera(copied)}",
        )
        self.expect(
            blocked >= COPY_SHARE_MIN * copied,
            f"copying blocks moves {_tera(blocked)} TB/s, one copy {_tera(copied)}",
        )
        slabs.close()

    def attach(self) -> None:
        """What its parts take, of memory that this process has just allocated."""
        gpu, count = self.gpu, self.gib
        took: dict[str, list[float]] = {"create": [], "export": [], "map": [], "unmap": []}
        for _ in range(self.rounds):
            marks = [time.perf_counter()]
            handles = [gpu.create(SLAB_BYTES) for _ in range(count)]
            marks.append(time.perf_counter())
            fds = [gpu.export(handle) for handle in handles]
            marks.append(time.perf_counter())
            for handle in handles:
                gpu.release(handle)
            begun = time.perf_counter()
            slabs = DeviceSlabs(gpu, [SLAB_BYTES] * count)
            slabs.map(fds, Access.READ)
            mapped = time.perf_counter()
            slabs.close()
            closed = time.perf_counter()
            for fd in fds:
                os.close(fd)
            took["create"].append(marks[1] - marks[0])
            took["export"].append(marks[2] - marks[1])
            took["map"].append(mapped - begun)
            took["unmap"].append(closed - mapped)
        for name, seconds in took.items():
            self.figures[f"{name}_ms"] = _ms(seconds)

    # The service.

    def served(self, directory: Path) -> None:
        """All that needs a service."""
        watch = NvmlWatch([self.gpu.uuid], lambda _uuid, _event: None)
        try:
            before = watch.used_bytes(self.gpu.uuid)
            capacity = (3 * self.gib + 4) * SLAB_BYTES
            with serving(
                directory,
                *("--scrub-bytes-per-s", "0", "--gpus", f"{self.gpu.uuid}={capacity}"),
            ) as service:
                taken = watch.used_bytes(self.gpu.uuid) - before
                self.figures["service_takes_mib"] = round(taken / 2**20, 1)
                self.expect(taken <= CONTEXT_BYTES_MAX, f"the service takes {taken} bytes")
                if self.is_mps:
                    self.killed(service, is_standby=False)
                    self.killed(service, is_standby=True)
                    self.blocks(service)
                    return
                self.weights(service)
                self.host(service)
                self.killed(service, is_standby=False)
                self.killed(service, is_standby=True)
                self.blocks(service)
                self.outage(service)
                if find_spec("torch") is not None:
                    self.offence(service)
                say(f"service: {self.figures}")
                held = watch.used_bytes(self.gpu.uuid) - before
                self.figures["held_at_the_end_gib"] = round(held / 2**30, 2)
                self.expect(held >= SLAB_BYTES, "sealed weights are held without any process")
            give_up_at = time.monotonic() + 10
            while (left := watch.used_bytes(self.gpu.uuid) - before) > SLAB_BYTES // 4:
                if time.monotonic() > give_up_at:
                    break
                time.sleep(0.01)
            self.figures["left_mib"] = round(left / 2**20, 1)
            self.expect(left <= SLAB_BYTES // 4, f"{left} bytes are not back without the service")
        finally:
            watch.close()

    def weights(self, service: ServiceProcess) -> None:
        """Sealed by one, attached by another, compared on the GPU."""
        gpu = self.gpu
        with GpuMemoryClient(service.socket, gpu) as client:
            built = client.create_on_gpu("weights", SegmentClass.WEIGHTS, [SLAB_BYTES] * self.gib)
            for number, slab in enumerate(built.on_gpu.slabs):
                fill(gpu, slab.address, slab.size_bytes, seed=number)
            begun = time.perf_counter()
            client.seal(built)
            self.figures["seal_ms"] = _ms([time.perf_counter() - begun])
            attached: list[float] = []
            compared: list[float] = []
            for _ in range(self.rounds):
                begun = time.perf_counter()
                weights = client.attach_on_gpu("weights", is_checked=False)
                mapped = time.perf_counter()
                client.verify(weights)
                compared.append(time.perf_counter() - mapped)
                attached.append(mapped - begun)
                client.release(weights)
        self.figures["attach_ms"], self.figures["verify_ms"] = _ms(attached), _ms(compared)
        self.expect(
            statistics.median(attached) * 1000 <= ATTACH_MS_MAX,
            f"attaching {self.gib} GiB took {_ms(attached)} ms",
        )

    def host(self, service: ServiceProcess) -> None:
        """Sealed weights of the host's memory go to the GPU as fast as pinned memory does."""
        size = HOST_GIB << 30
        target = self._slabs(HOST_GIB, SLAB_BYTES)
        with MemoryClient(service.socket, client="host") as client:
            built = client.create("host", SegmentClass.WEIGHTS, [size])
            part = random.Random(2).randbytes(32 << 20)
            for at in range(0, size, len(part)):
                built.slabs[0][at : at + len(part)] = part
            client.seal(built)
            weights = client.attach("host")
            copies = HostCopies(self.gpu)
            pinned_s = copies.pinned(target.address, size, self.rounds)
            registered_s = copies.registered(weights.slabs[0], target.address, size, self.rounds)
            copied = self.gpu.checksums([target.address + size - len(part)], len(part))
            self.expect(copied == [mlh64.compute(part)], "other bytes are on the GPU")
            client.release(weights)
        target.close()
        self.figures |= {
            "h2d_pinned_gb_s": round(size / pinned_s / 1e9, 1),
            "h2d_sealed_gb_s": round(size / registered_s / 1e9, 1),
        }
        self.expect(
            pinned_s / registered_s >= H2D_SHARE_MIN,
            f"sealed memory goes to the GPU in {registered_s:.4f} s, pinned in {pinned_s:.4f}",
        )

    def killed(self, service: ServiceProcess, *, is_standby: bool) -> None:
        """An owner is killed while the GPU writes for it; a successor has its very bytes."""
        gpu, word = self.gpu, "take_over" if is_standby else "adopt"
        num_slabs = min(4, self.gib)
        took: list[float] = []
        num_equal = num_quiet = 0
        for number in range(self.rounds):
            name = f"{word}-{number}"
            owner = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.gpu.owner"),
                    *(str(service.socket), gpu.uuid, name, str(num_slabs)),
                ],
                stdout=subprocess.PIPE,
            )
            assert owner.stdout is not None
            with owner.stdout:
                told = json.loads(owner.stdout.readline())
            with GpuMemoryClient(service.socket, gpu) as successor:
                pool = successor.attach_on_gpu(name, is_standby=True) if is_standby else None
                time.sleep(random.Random(number).uniform(0.01, 0.03))  # Somewhere in its writing.
                begun = time.perf_counter()
                owner.kill()
                if pool is None:
                    pool = successor.adopt_on_gpu(name, told["epoch"])
                else:
                    successor.take_over(pool)
                took.append(time.perf_counter() - begun)
                addresses = [slab.address for slab in pool.on_gpu.slabs]
                sums = gpu.checksums(addresses, SLAB_BYTES)
                time.sleep(0.05)
                later = gpu.checksums(addresses, SLAB_BYTES)
                num_equal += sums[:-1] == told["sums"][:-1] and sums[-1] != told["sums"][-1]
                num_quiet += sums == later
                owner.wait(30)
        self.figures |= {
            f"{word}_rounds": self.rounds,
            f"{word}_equal": num_equal,
            f"{word}_quiet": num_quiet,
            f"kill_to_{word}_ms": _ms(took),
        }
        self.expect(num_equal == self.rounds, f"{word}: bytes were equal in {num_equal} rounds")
        self.expect(num_quiet == self.rounds, f"{word}: nobody wrote later in {num_quiet} rounds")

    def blocks(self, service: ServiceProcess) -> None:
        """A writer is killed among its blocks; a standby copies them into a cache of its own."""
        gpu, number = self.gpu, BLOCKS
        cache = self._slabs(1, number * BLOCK_BYTES)
        addresses = [cache.address + place * BLOCK_BYTES for place in range(number)]
        took: list[float] = []
        num_equal = 0
        for turn in range(self.rounds):
            keys = keys_of(str(turn), number)
            writer = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.gpu.writer"),
                    *(str(service.socket), gpu.uuid, str(turn), str(number)),
                ],
                stdout=subprocess.PIPE,
            )
            assert writer.stdout is not None
            with writer.stdout:
                expected = json.loads(writer.stdout.readline())
            with GpuMemoryClient(service.socket, gpu) as standby:
                self.expect(standby.restore(keys[:1], addresses) == 1, "a first block is there")
                fill(gpu, cache.address, cache.size_bytes, seed=4711)
                time.sleep(random.Random(turn).uniform(0.01, 0.03))  # Somewhere in its writing.
                begun = time.perf_counter()
                writer.kill()
                restored = standby.restore(keys, addresses)
                took.append(time.perf_counter() - begun)
                is_equal = gpu.checksums(addresses, BLOCK_BYTES) == expected
                num_equal += restored == number and is_equal
                writer.wait(30)
        cache.close()
        self.figures |= {
            "restored_blocks": number,
            "restored_equal": num_equal,
            "kill_to_restored_ms": _ms(took),
        }
        self.expect(num_equal == self.rounds, f"blocks were equal in {num_equal} rounds")
        self.expect(
            statistics.median(took) * 1000 <= RESTORE_MS_MAX,
            f"restoring {number} blocks took {_ms(took)} ms",
        )

    def outage(self, service: ServiceProcess) -> None:
        """The service dies; its next life gives out what the first one made."""
        begun = time.perf_counter()
        service.kill()
        service.start()
        with GpuMemoryClient(service.socket, self.gpu) as client:
            client.release(client.attach_on_gpu("weights"))
        self.figures["attached_after_outage_s"] = round(time.perf_counter() - begun, 2)

    def offence(self, service: ServiceProcess) -> None:
        """A kernel writes where it may only read: its process ends, and nobody else notices."""
        gpu = self.gpu
        offender = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.gpu.offender"),
                *(str(service.socket), gpu.uuid, "weights"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert offender.stdout is not None
        with GpuMemoryClient(service.socket, gpu) as client:
            weights = client.attach_on_gpu("weights")
            attached = offender.stdout.readline()
            self.expect(attached == b"attached\n", f"the offender said {attached!r}")
            before = usage(service).event_sequence
            words, _ = offender.communicate(b"\n", timeout=60)
            self.figures["offender"] = words.decode().strip()
            self.expect(offender.returncode == 3, f"the offender ended with {offender.returncode}")
            seen = faults(service, before)
            self.figures["offence_xids"] = seen
            self.expect(31 in seen, f"the service heard of Xids {seen}")
            client.verify(weights)
            client.release(weights)
            self.expect(usage(service).memories[1].health <= 1, "the GPU is healthy all the same")

    def _slabs(self, count: int, size: int) -> DeviceSlabs:
        gpu = self.gpu
        fds: list[int] = []
        for _ in range(count):
            handle = gpu.create(size)
            fds.append(gpu.export(handle))
            gpu.release(handle)
        slabs = DeviceSlabs(gpu, [size] * count)
        slabs.map(fds, Access.READ_WRITE)
        for fd in fds:
            os.close(fd)
        return slabs

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of some."""
        seconds: list[float] = []
        for _ in range(max(3, self.rounds)):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return min(seconds)


def _tera(bytes_per_s: float) -> float:
    return round(bytes_per_s / 1e12, 2)


def _ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": round(statistics.median(ordered) * 1000, 2),
        "max": round(ordered[-1] * 1000, 2),
    }


def start_mps() -> None:
    """For this process and its children; it ends with the last of them, or with the machine."""
    directory = tempfile.mkdtemp(prefix="unbroken-mps-")
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": directory, "CUDA_MPS_LOG_DIRECTORY": directory}
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
    assert not cuda.seal_is_proof(), "the service knows of it"


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    """Prove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.memory")
    parser.add_argument("--gib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--mps", action="store_true", help="Only deaths, of clients of CUDA's MPS.")
    parser.add_argument("--gpu", type=int, default=0, help="Of several, in CUDA's order.")
    given = parser.parse_args()
    begun = time.monotonic()
    if given.mps:
        start_mps()
    try:
        number: int = given.gpu
        gpu = CudaGpu(device_uuids()[number])
        gpu.checksums([], 0)  # Compiles the kernels.
    except GpuUnavailable as error:
        say(f"there is no GPU to show this on: {error}")
        say(json.dumps({"ok": False, "skipped": "no GPU", "detail": str(error)}))
        return 2
    proof = Proof(gpu, given.gib, given.rounds)
    proof.is_mps = given.mps
    parts = (proof.refusals, proof.checksums, proof.speed, proof.attach)
    for part in () if given.mps else parts:
        part()
        say(f"{part.__name__}: {proof.figures}")
    with tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory:
        proof.served(Path(directory))
    gpu.close()
    for violation in proof.violations:
        say(violation)
    figures = {
        "ok": not proof.violations,
        "gpu": gpu.name,
        "gib": given.gib,
        **proof.figures,
        "violations": len(proof.violations),
        "seconds": round(time.monotonic() - begun, 1),
    }
    say(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
