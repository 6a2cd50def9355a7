"""An engine that owns memory of the GPU, as far as memory is concerned, and is killed.

    python -m tests.gpu.owner <session socket> <uuid> <name> <slabs>

Fills a pool of so many slabs of 1 GiB, says their checksums as a line of JSON, and then writes to
the last one without end, with much of that in the GPU's queue: what is dead must not finish it.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.gpu.filling import SLAB_BYTES, fill
from unbroken.memory.client import SegmentClass
from unbroken.memory.cuda import CudaGpu, device_uuids
from unbroken.memory.cuda_kernels import asked
from unbroken.memory.gpu_client import GpuMemoryClient

QUEUED = 1000


def main() -> int:
    """Write until killed."""
    socket, uuid, name, num_slabs = sys.argv[1:]
    gpu = CudaGpu(uuid)
    cu: Any = importlib.import_module("cuda.bindings.driver")
    (device,) = asked(cu, "give a device", cu.cuDeviceGet(device_uuids().index(uuid)))
    (context,) = asked(cu, "give a context", cu.cuDevicePrimaryCtxRetain(device))
    asked(cu, "use its context", cu.cuCtxSetCurrent(context))
    client = GpuMemoryClient(Path(socket), gpu, client="owner")
    pool = client.create_on_gpu(name, SegmentClass.KV_POOL, [SLAB_BYTES] * int(num_slabs))
    slabs = pool.on_gpu.slabs
    for number, slab in enumerate(slabs):
        fill(gpu, slab.address, slab.size_bytes, seed=number)
    sums = gpu.checksums([slab.address for slab in slabs], SLAB_BYTES)
    client.freeze(pool, b"pool of an engine")
    print(json.dumps({"epoch": pool.epoch, "sums": sums}), flush=True)  # noqa: T201
    last, half = slabs[-1].address, SLAB_BYTES // 2
    at = 0
    while True:
        for _ in range(QUEUED):  # Of 256 MiB in the mean.
            at = (at + (1 << 20)) % half
            copied = cu.cuMemcpyDtoDAsync(
                cu.CUdeviceptr(last + at), cu.CUdeviceptr(last + half), half - at, cu.CUstream(0)
            )
            asked(cu, "queue a copy", copied)
        gpu.synchronize()


if __name__ == "__main__":
    sys.exit(main())
