"""What is computed on a GPU: `unbroken.memory.mlh64`, by kernels of CUDA (mlh64.cu).

They are compiled when they are first used (0.4 s), for the GPU that is there, by NVRTC. CUDA's
toolkit and PyTorch bring that; else the package nvidia-cuda-nvrtc does.
"""

import ctypes
import importlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

import numpy as np

from unbroken.memory.gpu import GpuCode, GpuError, GpuUnavailable
from unbroken.memory.mlh64 import CHUNK_BYTES, CHUNK_WORDS, SIZE_BYTES_MAX, Words

THREADS: Final = 256
"""In a block, as the kernels are compiled for."""
PARTS: Final = 16
"""Of a chunk: each has a block of threads."""
_KERNELS: Final = ("coefficients", "chunk_digests", "copied_digests", "wholes")
_LAUNCHED_MAX: Final = 32_768
"""Wholes in one launch; a grid has 65,535 in this direction."""


def asked(cu: Any, call: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the driver answered. Raises GpuError."""
    code = answer[0]
    if code != cu.CUresult.CUDA_SUCCESS:
        raise GpuError(call, _known(int(code)), code.name)
    return answer[1:]


def _known(code: int) -> int:
    try:
        return GpuCode(code)
    except ValueError:
        return code


class Checksums:
    """The kernels, and memory for them. In a context, one at a time."""

    def __init__(self, cu: Any, device: Any) -> None:
        self._cu = cu
        self._module, self._kernels = compiled(cu, device, _source(), _KERNELS)
        self._stream: Any = cu.CUstream(0)
        self._factors = _Buffer(cu)
        self._buffers = [_Buffer(cu) for _ in range(4)]
        self._factors.hold(CHUNK_BYTES)
        self._launch("coefficients", (CHUNK_WORDS // THREADS, 1), self._factors.address)

    def close(self) -> None:
        for buffer in (self._factors, *self._buffers):
            buffer.close()
        self._cu.cuModuleUnload(self._module)

    def of(
        self, addresses: Sequence[int], size_bytes: int, targets: Sequence[int] | None = None
    ) -> list[int]:
        """One for each address; with `targets`, of what is copied from there."""
        if not 0 <= size_bytes <= SIZE_BYTES_MAX:
            raise ValueError(f"expected at most {SIZE_BYTES_MAX} bytes, got {size_bytes}")
        given = np.array([addresses] if targets is None else [addresses, targets], dtype=np.uint64)
        if np.any(given & np.uint64(7)):
            raise ValueError("expected addresses that are multiples of 8")
        found: list[int] = []
        for start in range(0, len(addresses), _LAUNCHED_MAX):
            found += self._some(list(given[:, start : start + _LAUNCHED_MAX]), size_bytes)
        return found

    def _some(self, places: list[Words], size_bytes: int) -> list[int]:
        """`places` are sources, and perhaps targets."""
        cu, count = self._cu, len(places[0])
        num_chunks = -(-size_bytes // CHUNK_BYTES)
        num_parts = -(-size_bytes // (CHUNK_BYTES // PARTS))
        *given, digests, results = self._buffers
        digests.hold(8 * count * num_chunks)
        results.hold(8 * count)
        size = 8 * count
        for place, buffer in zip(places, given, strict=False):
            buffer.hold(size)
            sent = cu.cuMemcpyHtoD(cu.CUdeviceptr(buffer.address), place.ctypes.data, size)
            asked(cu, "take addresses", sent)
        if num_chunks:
            cleared = cu.cuMemsetD8Async(
                cu.CUdeviceptr(digests.address), 0, 8 * count * num_chunks, self._stream
            )
            asked(cu, "clear digests", cleared)
            self._launch(
                "chunk_digests" if len(places) == 1 else "copied_digests",
                (num_parts, count),
                *(buffer.address for buffer in given[: len(places)]),
                *(size_bytes, num_chunks),
                *(self._factors.address, digests.address),
            )
        self._launch(
            "wholes",
            (count, 1),
            *(digests.address, size_bytes, num_chunks, self._factors.address, results.address),
        )
        host = np.empty(count, dtype=np.uint64)
        got = cu.cuMemcpyDtoH(host.ctypes.data, cu.CUdeviceptr(results.address), size)
        asked(cu, "compute checksums", got)
        answers: list[int] = host.tolist()
        return answers

    def _launch(self, name: str, grid: tuple[int, int], *arguments: int) -> None:
        """All arguments of our kernels have 64 bits."""
        cu = self._cu
        kinds = (ctypes.c_uint64,) * len(arguments)
        launched = cu.cuLaunchKernel(
            self._kernels[name], *(*grid, 1), *(THREADS, 1, 1), 0, self._stream,
            (arguments, kinds), 0,
        )  # fmt: skip
        asked(cu, f"launch {name}", launched)


class _Buffer:
    """Memory of this process on the GPU, which only grows."""

    def __init__(self, cu: Any) -> None:
        self._cu = cu
        self._size_bytes = 0
        self.address = 0

    def hold(self, size_bytes: int) -> None:
        if size_bytes <= self._size_bytes:
            return
        self.close()
        got = self._cu.cuMemAlloc(size_bytes)
        (address,) = asked(self._cu, f"allocate {size_bytes} bytes", got)
        self.address, self._size_bytes = int(address), size_bytes

    def close(self) -> None:
        if self._size_bytes:
            self._cu.cuMemFree(self._cu.CUdeviceptr(self.address))
            self.address = self._size_bytes = 0


def _source() -> bytes:
    return resources.files("unbroken.memory").joinpath("mlh64.cu").read_bytes()


def compiled(
    cu: Any, device: Any, source: bytes, names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """A module and its kernels, for this GPU. Raises GpuUnavailable without a compiler."""
    attributes = cu.CUdevice_attribute
    capability = [
        asked(cu, "tell its capability", cu.cuDeviceGetAttribute(attribute, device))[0]
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    ]
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(),
        f"-DCHUNK_WORDS={CHUNK_WORDS}ull".encode(),
        f"-DPARTS={PARTS}".encode(),
    ]
    try:
        compiler: Any = importlib.import_module("cuda.bindings.nvrtc")
        image = _image(compiler, source, options)
    except (ImportError, RuntimeError) as error:
        raise GpuUnavailable(f"expected NVRTC, to compile kernels: {error}") from error
    (module,) = asked(cu, "load kernels", cu.cuModuleLoadData(image))
    kernels = {
        name: asked(cu, f"find {name}", cu.cuModuleGetFunction(module, name.encode()))[0]
        for name in names
    }
    return module, kernels


def _image(compiler: Any, source: bytes, options: list[bytes]) -> bytes:
    """Machine code. Raises GpuUnavailable with the compiler's words."""

    def asked(what: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        if int(answer[0]):
            raise GpuUnavailable(f"expected NVRTC to {what}, it answers {answer[0].name}")
        return answer[1:]

    (program,) = asked(
        "take the source",
        compiler.nvrtcCreateProgram(source, b"mlh64.cu", 0, [], []),
    )
    answer = compiler.nvrtcCompileProgram(program, len(options), options)
    if int(answer[0]):
        (size,) = asked("tell what is wrong", compiler.nvrtcGetProgramLogSize(program))
        words = b" " * size
        asked("tell what is wrong", compiler.nvrtcGetProgramLog(program, words))
        raise GpuUnavailable(f"expected NVRTC to compile the checksum: {words.decode()}")
    (size,) = asked("give the code", compiler.nvrtcGetCUBINSize(program))
    image = b" " * size
    asked("give the code", compiler.nvrtcGetCUBIN(program, image))
    compiler.nvrtcDestroyProgram(program)
    return image
