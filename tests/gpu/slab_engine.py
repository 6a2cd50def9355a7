"""Continuous batching with its KV in slabs: an engine that is killed, or one that comes after it.

    python -m tests.gpu.slab_engine <session socket> <cpu, or a GPU's uuid> <size> <pool> <adopt?>

Commands are lines of JSON: {"name", "prompt", "max_tokens"}, and {"spoil": name}, which changes a
page of that sequence. So are answers: first {"ready", …}, then {"name", "tokens"} with all tokens
of a sequence so far, whenever there are more.
"""

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from tests.gpu import slab_cache
from tests.gpu.slab_cache import CacheShape
from tests.gpu.transformers_serve import SIZES, make_manager, make_model
from unbroken.memory.client import MemoryClient
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.gpu_client import GpuMemoryClient

PAGES: Final = {"tiny": 256, "1b": 1024}
PAGE_TOKENS: Final = {"tiny": 16, "1b": 64}


def shape_of(size: str) -> CacheShape:
    """What the cache of such a model takes, in float32.

    The tokens after the last full page are computed again, by other kernels: with 8 bits of a
    mantissa that would choose other tokens, of a model whose weights are random.
    """
    of = SIZES[size]
    token_bytes = of["hidden"] // of["heads"] * of["kv_heads"] * 4
    return CacheShape(of["layers"], PAGES[size], PAGE_TOKENS[size], token_bytes)


async def serve() -> None:
    """Until killed."""
    path, device, size, name, is_adopting = sys.argv[1:]
    on_gpu = device != "cpu"
    gpu = CudaGpu(device) if on_gpu else None
    client = MemoryClient(Path(path)) if gpu is None else GpuMemoryClient(Path(path), gpu)
    shape = shape_of(size)
    model = make_model(size, "float32", "cuda" if on_gpu else "cpu")
    if is_adopting == "adopt":
        print(json.dumps({"loaded": True}), flush=True)  # noqa: T201
        await asyncio.to_thread(sys.stdin.readline)  # Until the one before is dead.
    begun = time.perf_counter()
    make = slab_cache.adopted if is_adopting == "adopt" else slab_cache.created
    pool = make(client, name, shape, on_gpu=on_gpu)
    took_s = time.perf_counter() - begun

    def say(**told: object) -> None:
        print(json.dumps(told), flush=True)  # noqa: T201

    with slab_cache.in_slabs(pool, size) as made:
        manager = make_manager(
            model,
            use_cuda_graph=False,
            shape=(shape.num_pages, shape.page_tokens),
            allow_block_sharing=True,
        )

        def ask(wanted: dict[str, Any]) -> None:
            def heard(output: Any) -> None:
                cache = made[0]
                say(
                    name=wanted["name"],
                    tokens=list(output.generated_tokens),
                    error=output.error,
                    is_over=output.is_finished(),
                    num_shared=cache._total_prefix_length,
                )

            manager.register_result_handler(wanted["name"], heard)
            manager.add_request(
                list(wanted["prompt"]),
                request_id=wanted["name"],
                max_new_tokens=wanted["max_tokens"],
                streaming=True,
            )

        say(
            ready=True,
            pool_ms=round(took_s * 1000, 1),
            num_found=len(pool.found),
            num_spoilt=pool.num_spoilt,
        )

        def spoil(name: str) -> None:
            """Change KV of the first page of a sequence, as no engine would."""
            cache = made[0]
            page = cache.group_cache_managers[0].block_table[name][0]
            cache.key_cache[0][page * shape.page_tokens] += 1
            if gpu is not None:
                importlib.import_module("torch").cuda.synchronize()
            say(spoilt=page)

        while line := await asyncio.to_thread(sys.stdin.readline):
            wanted = json.loads(line)
            if "spoil" in wanted:
                spoil(wanted["spoil"])
            else:
                ask(wanted)


if __name__ == "__main__":
    asyncio.run(serve())
