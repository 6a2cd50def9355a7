"""An engine that owns memory of the GPU, as far as memory is concerned, and is killed.

    python -m tests.gpu.owner <session socket> <uuid> <name> <slabs>

Fills a pool of so many slabs of 1 GiB, says their checksums as a line of JSON, and then writes to
the last one without end.
"""

import json
import sys
from pathlib import Path

from tests.gpu.filling import SLAB_BYTES, fill
from unbroken.memory.client import SegmentClass
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.gpu_client import GpuMemoryClient


def main() -> int:
    """Write until killed."""
    socket, uuid, name, num_slabs = sys.argv[1:]
    gpu = CudaGpu(uuid)
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
    while True:  # A copy waits for its end, so this is its own clock: 0.25 ms of work each.
        at = (at + (1 << 20)) % half
        gpu.copy(last + at, last + half, half - at)


if __name__ == "__main__":
    sys.exit(main())
