"""A process that writes where it may only read: with a kernel, as a bug would.

    python -m tests.gpu.offender <session socket> <uuid> <name>

Says `attached`, then waits for a line. Needs PyTorch.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from unbroken.memory.cuda import CudaGpu
from unbroken.memory.gpu_client import GpuMemoryClient


def main() -> int:
    """Exits with 3 when the GPU says no."""
    socket, uuid, name = sys.argv[1:]
    torch: Any = importlib.import_module("torch")
    gpu = CudaGpu(uuid)
    client = GpuMemoryClient(Path(socket), gpu, client="offender")
    weights = client.attach_on_gpu(name)
    tensor = torch.as_tensor(weights.on_gpu.slabs[0])
    assert tensor.data_ptr() == weights.on_gpu.address, "it is the slab itself"
    assert int(tensor[:1024].sum()) >= 0, "it may be read"
    print("attached", flush=True)  # noqa: T201
    sys.stdin.readline()
    try:
        tensor[:4096].fill_(1)
        torch.cuda.synchronize(tensor.device)
    except Exception as error:
        print(f"refused: {str(error).splitlines()[0]}", flush=True)  # noqa: T201
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
