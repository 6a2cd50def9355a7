"""llama.cpp's own HTTP server out of the package xllamacpp, run by that package's environment.

python llama_serve.py MODEL PORT SLOTS CONTEXT
"""

import importlib
import signal
import sys
from typing import Any


def main() -> None:
    """Serve until killed."""
    model, port, slots, context = sys.argv[1:]
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"tiny"}
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.n_parallel = int(slots)
    params.n_ctx = int(slots) * int(context)
    params.kv_unified = False  # Each slot has a context of its own.
    params.cache_prompt = False  # What was asked before changes how a prompt is split.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    while server is not None:  # It serves as long as somebody has it.
        signal.pause()


if __name__ == "__main__":
    main()
