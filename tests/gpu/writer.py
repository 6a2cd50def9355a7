"""An engine that stores its blocks on the GPU, and is killed.

    python -m tests.gpu.writer <session socket> <uuid> <seed> <blocks>

Stores so many blocks of 2 MiB, says their checksums as a line of JSON, and goes on storing others.
"""

import json
import sys
from pathlib import Path

from tests.gpu.filling import BLOCK_BYTES, fill, keys_of
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.device_slabs import DeviceSlabs
from unbroken.memory.gpu import Access
from unbroken.memory.gpu_client import GpuMemoryClient


def main() -> int:
    """Store until killed."""
    socket, uuid, seed, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    gpu = CudaGpu(uuid)
    client = GpuMemoryClient(Path(socket), gpu, client="writer")
    handle = gpu.create(number * BLOCK_BYTES)
    cache = DeviceSlabs(gpu, [number * BLOCK_BYTES])
    cache.map([gpu.export(handle)], Access.READ_WRITE)
    fill(gpu, cache.address, number * BLOCK_BYTES, seed=int(seed))
    addresses = [cache.address + place * BLOCK_BYTES for place in range(number)]
    writer = client.open_writer_on_gpu(BLOCK_BYTES, number)
    writer.put(keys_of(seed, number), addresses, 16)
    writer.flush()
    print(json.dumps(gpu.checksums(addresses, BLOCK_BYTES)), flush=True)  # noqa: T201
    other, turn = client.open_writer_on_gpu(BLOCK_BYTES, number), 0
    while True:
        turn += 1
        other.put(keys_of(f"{seed} {turn}", 8), addresses[:8], 16)


if __name__ == "__main__":
    sys.exit(main())
