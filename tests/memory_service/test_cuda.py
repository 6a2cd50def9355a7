"""Claims of `memory_service.cuda`, with a fake driver; and that the bindings have what we use."""

import errno
import importlib
import os
import re
from pathlib import Path

import pytest

from memory_service.cuda import CudaBackend
from tests.support.fake_gpu import GRANULARITY_BYTES, MADE_OF, FakeGpu
from unbroken.memory import cuda, cuda_kernels
from unbroken.memory.gpu import Access, GpuCode, GpuUnavailable

SIZE = 2 * GRANULARITY_BYTES


def test_memory_lives_by_its_descriptor_alone() -> None:
    vmm = FakeGpu()
    backend = CudaBackend(vmm, made_of=MADE_OF)
    allocation = backend.allocate(SIZE, "slab")
    vmm.check_empty()
    assert not os.get_inheritable(allocation.fd)
    later = CudaBackend(FakeGpu(), made_of=MADE_OF).adopt(os.dup(allocation.fd), SIZE)
    backend.free(allocation)
    gpu = FakeGpu()
    address = gpu.reserve(SIZE)
    handle = gpu.import_fd(later.fd)
    gpu.map(address, SIZE, handle)
    gpu.set_access(address, SIZE, Access.READ)
    assert gpu.read(address, SIZE) == bytes(SIZE)
    gpu.unmap(address, SIZE)
    gpu.release(handle)
    gpu.unreserve(address, SIZE)
    os.close(later.fd)


@pytest.mark.parametrize(
    ("call", "code", "expected"),
    [
        ("create", GpuCode.OUT_OF_MEMORY, errno.ENOMEM),
        ("export", GpuCode.OPERATING_SYSTEM, errno.EIO),
    ],
)
def test_what_cannot_be_allocated_leaves_nothing(call: str, code: GpuCode, expected: int) -> None:
    vmm = FakeGpu()
    vmm.fail(call, 1, code)
    with pytest.raises(OSError, match=code.name) as raised:
        CudaBackend(vmm, made_of=MADE_OF).allocate(SIZE, "slab")
    assert raised.value.errno == expected
    vmm.check_failed()
    vmm.check_empty()


def test_a_descriptor_of_something_else_is_not_adopted(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="nvidiactl"):
        CudaBackend(FakeGpu()).adopt(file.fileno(), SIZE)


def test_the_bindings_have_all_that_is_used_of_them() -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    compiler = importlib.import_module("cuda.bindings.nvrtc")
    source = Path(cuda.__file__).read_text() + Path(cuda_kernels.__file__).read_text()
    wanted = set(re.findall(r"\bcu\.(\w+)", source))
    assert {"cuMemCreate", "cuMemMap", "cuLaunchKernel"} <= wanted, "it finds them"
    assert [name for name in sorted(wanted) if not hasattr(driver, name)] == []
    wanted = set(re.findall(r"\bcompiler\.(\w+)", source))
    assert [name for name in sorted(wanted) if not hasattr(compiler, name)] == []
    for code in GpuCode:
        assert driver.CUresult(int(code)).name in (
            f"CUDA_ERROR_{code.name}",
            f"CUDA_ERROR_{code.name.removeprefix('NO_')}",
        )
    for access in Access:
        name = {"NONE": "NONE", "READ": "READ", "READ_WRITE": "READWRITE"}[access.name]
        assert driver.CUmemAccess_flags(int(access)).name.endswith(f"_PROT_{name}")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_driver_it_says_so() -> None:
    with pytest.raises(GpuUnavailable, match="driver"):
        cuda.CudaGpu()
