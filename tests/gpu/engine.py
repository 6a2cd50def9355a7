"""An engine that decodes on a GPU, and is killed; or that waits to go on where another is killed.

    python -m tests.gpu.engine <session socket> <uuid> <shape> <prompt tokens>

Commands are lines of JSON, answers too (`Engine`). Weights lie in a sealed segment that all engines
read. The KV of a sequence goes to the block store as it grows: blocks of 64 tokens, and every token
of the block that is not full yet as a small block of its own, told of before the token is said.

    step i+1 is given to the GPU ──▶ wait for step i ──▶ store its KV ──▶ say its token

So the GPU computes all the while: storing costs what is left of its bandwidth, and no step waits.
"""

import fcntl
import importlib
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.gpu.filling import SLAB_BYTES
from tests.gpu.model import SHAPES, Model
from unbroken.errors import Reason, UnbrokenError
from unbroken.memory.client import SegmentClass
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.device_slabs import DeviceSlab
from unbroken.memory.gpu_client import GpuMemoryClient, GpuSegment
from unbroken.memory.gpu_writer import GpuBlockWriter
from unbroken.memory.keys import KeyChain, KeySpace

BLOCK_TOKENS: Final = 64
ROOM_TOKENS: Final = 512
"""What a sequence may grow beyond its prompt."""
TAIL_SLOTS: Final = 256
IN_FLIGHT: Final = 4
"""Results of steps that are kept apart on the host."""
POOL_SLAB_BYTES: Final = 256 << 20
HIGH_FD: Final = 600
"""Files with low numbers are closed late when a process dies that uses a GPU."""
SAID: Final = struct.Struct("<qq")
WARM_TOKENS: Final = 8
"""After so many the standby maps what it will read from."""


class Sequence:
    """Prompt and tokens, and the keys of their KV."""

    def __init__(self, seed: int, num_prompt: int, vocabulary: int, salt: str = "") -> None:
        drawn = np.random.default_rng(seed).integers(0, vocabulary, num_prompt)
        self.prompt: list[int] = [int(one) for one in drawn]
        self.tokens: list[int] = []
        self.digests: list[int] = []
        self.blocks = _chain(f"gpu engine{salt}", BLOCK_TOKENS)
        self.tails = _chain(f"gpu engine{salt}, tail", 1)
        for chain in (self.blocks, self.tails):
            chain.extend(self.prompt)

    @property
    def num_known(self) -> int:
        """Tokens whose KV there is: all but the last one that was said."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    def say(self, token: int, digest: int) -> None:
        """One more; with it the KV of the one before is there."""
        if self.tokens:
            for chain in (self.blocks, self.tails):
                chain.extend([self.tokens[-1]])
        self.tokens.append(token)
        self.digests.append(digest)


def _chain(model: str, block_size: int) -> KeyChain:
    return KeyChain(KeySpace(model, "gpu engine", "token-major bf16", "tp 0/1", block_size, ""))


class Engine:
    """One process's model, KV and session."""

    def __init__(self, path: Path, uuid: str, shape: str, num_prompt: int) -> None:
        torch = self.torch = importlib.import_module("torch")
        torch.cuda.init()
        torch.empty(1, device="cuda")
        self.gpu = CudaGpu(uuid)
        self.client = GpuMemoryClient(path, self.gpu, client=f"engine {os.getpid()}")
        self.shape = SHAPES[shape]
        self.num_prompt = num_prompt
        self.tokens_max = num_prompt + ROOM_TOKENS
        self.stream = torch.cuda.Stream()
        self.weights: GpuSegment | None = None
        self.pool: GpuSegment | None = None
        self.is_adopted = False
        self.writers: list[GpuBlockWriter] = []
        self.said: socket.socket | None = None
        self.listener: socket.socket | None = None

    # Getting ready.

    def build(self) -> dict[str, Any]:
        """Draw the weights, and seal them."""
        sizes = [SLAB_BYTES] * -(-self.shape.weight_bytes // SLAB_BYTES)
        built = self.client.create_on_gpu("weights", SegmentClass.WEIGHTS, sizes)
        Model(self.shape, self._tensor(built), BLOCK_TOKENS).draw(1)
        self.torch.cuda.synchronize()
        self.client.seal(built)
        return {}

    def ready(self, *, has_pool: bool) -> dict[str, Any]:
        """Attach the weights, and warm everything up; with a pool of its own, or over scratch."""
        torch = self.torch
        begun = time.perf_counter()
        self.weights = self.client.attach_on_gpu("weights")
        attached_s = time.perf_counter() - begun
        self.model = Model(self.shape, self._tensor(self.weights), self.tokens_max)
        self._token = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._result = torch.zeros(2, dtype=torch.int64, device="cuda")
        self._host = [torch.zeros(2, dtype=torch.int64, pin_memory=True) for _ in range(IN_FLIGHT)]
        self._events = [torch.cuda.Event() for _ in range(IN_FLIGHT)]
        self.gpu.checksums([], 0)
        if has_pool:
            size = self.tokens_max * self.shape.token_bytes
            self.pool = self.client.create_on_gpu(
                f"kv/{os.getpid()}",
                SegmentClass.KV_POOL,
                [POOL_SLAB_BYTES] * -(-size // POOL_SLAB_BYTES),
            )
            self.kv = self.model.kv(self._tensor(self.pool))
        else:
            bytes_max = self.tokens_max * self.shape.token_bytes
            self.kv = self.model.kv(torch.zeros(bytes_max, dtype=torch.uint8, device="cuda"))
        self.prefill(Sequence(0, self.num_prompt, self.shape.vocabulary).prompt)
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        if has_pool:
            self._capture()
        else:
            del self.kv
        torch.cuda.empty_cache()
        return {"attached_ms": attached_s * 1000}

    def _tensor(self, segment: GpuSegment) -> Any:
        whole = DeviceSlab(segment.on_gpu.address, segment.on_gpu.size_bytes)
        return self.torch.as_tensor(whole, device="cuda")

    def _step(self) -> None:
        token, digest = self.model.step(self.kv, self._token, self._position)
        self._token.copy_(token)
        self._position += 1
        self._result[0:1].copy_(token)
        self._result[1:2].copy_(digest.view(1))

    def _capture(self) -> None:
        torch = self.torch
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self.stream, capture_error_mode="thread_local"):
            self._step()
        torch.cuda.synchronize()

    # Computing.

    def prefill(self, ids: list[int]) -> tuple[int, int]:
        """KV of all of them; the next token and its digest. Waits."""
        with self.torch.inference_mode(), self.torch.cuda.stream(self.stream):
            token, digest = self.model.prefill(self.kv, ids)
            found = int(token), int(digest)
        self._go_on(found[0], len(ids))
        return found

    def _go_on(self, token: int, position: int) -> None:
        """Step from here."""
        with self.torch.cuda.stream(self.stream):
            self._token.fill_(token)
            self._position.fill_(position)
        self.stream.synchronize()

    def _launch(self, number: int) -> None:
        with self.torch.cuda.stream(self.stream):
            self._graph.replay()
            place = number % IN_FLIGHT
            self._host[place].copy_(self._result, non_blocking=True)
            self._events[place].record(self.stream)

    def _wait(self, number: int) -> tuple[int, int]:
        self._events[number % IN_FLIGHT].synchronize()
        token, digest = self._host[number % IN_FLIGHT].tolist()
        return token, digest

    def steps(self, count: int, *, is_ahead: bool = True) -> Iterator[tuple[int, int]]:
        """So many, of which the next one is computed while the caller has this one."""
        if is_ahead and count:
            self._launch(0)
        for number in range(count):
            if not is_ahead:
                self._launch(number)
            elif number + 1 < count:
                self._launch(number + 1)
            yield self._wait(number)

    # Storing.

    def _address(self, position: int) -> int:
        return self.kv.data_ptr() + position * self.shape.token_bytes

    def open_writers(self) -> None:
        """For blocks, and for tokens of blocks that are not full."""
        while self.writers:
            self.writers.pop().close()
        token_bytes = self.shape.token_bytes
        num_blocks = -(-self.tokens_max // BLOCK_TOKENS) + 4
        for size, slots in ((BLOCK_TOKENS * token_bytes, num_blocks), (token_bytes, TAIL_SLOTS)):
            self.writers.append(self._opened(size, slots))

    def _opened(self, size: int, slots: int) -> GpuBlockWriter:
        """One slab. What this process has mapped of older ones may have to go first."""
        for _ in range(10):
            try:
                return self.client.open_writer_on_gpu(size, slots)
            except UnbrokenError as error:
                if error.reason is not Reason.MEMORY_EXHAUSTED:
                    raise
            self.client.restore([bytes(32)], [self._address(0)])  # Learns which slabs are gone.
            time.sleep(0.05)
        raise AssertionError(f"expected room for {slots} slots of {size} bytes")

    def store_prompt(self, sequence: Sequence) -> None:
        blocks, tails = self.writers
        keys = sequence.blocks.keys[: self.num_prompt // BLOCK_TOKENS]
        stored = blocks.put(
            keys,
            [self._address(place * BLOCK_TOKENS) for place in range(len(keys))],
            BLOCK_TOKENS,
        )
        assert stored == len(keys), "there is room for a prompt"
        blocks.flush()
        rest = range(len(keys) * BLOCK_TOKENS, self.num_prompt)
        tails.put([sequence.tails.keys[at] for at in rest], [*map(self._address, rest)], 1)
        tails.flush()

    def store_token(self, sequence: Sequence) -> None:
        """The KV of the token before the one that was said last."""
        at = sequence.num_known - 1
        blocks, tails = self.writers
        tails.put([sequence.tails.keys[at]], [self._address(at)], 1)
        tails.flush()
        if (at + 1) % BLOCK_TOKENS == 0:
            first = at + 1 - BLOCK_TOKENS
            blocks.put(
                [sequence.blocks.keys[at // BLOCK_TOKENS]], [self._address(first)], BLOCK_TOKENS
            )
            blocks.flush()

    # What is asked for.

    def reference(self, *, seed: int, count: int) -> dict[str, Any]:
        """What it says if nobody kills it."""
        sequence = Sequence(seed, self.num_prompt, self.shape.vocabulary)
        sequence.say(*self.prefill(sequence.prompt))
        for token, digest in self.steps(count):
            sequence.say(token, digest)
        return {"tokens": sequence.tokens, "digests": sequence.digests}

    def own(self, *, seed: int, path: str, is_stored: bool) -> dict[str, Any]:
        """Prefill, and store that; then wait for `go`."""
        self.sequence = Sequence(seed, self.num_prompt, self.shape.vocabulary)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        self.said = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH_FD))
        sock.close()
        self.is_stored = is_stored
        if is_stored:
            self.open_writers()
        first = self.prefill(self.sequence.prompt)
        if is_stored:
            self.store_prompt(self.sequence)
        elif not self.is_adopted:
            assert self.pool is not None, "it has one"
            self.client.freeze(self.pool)
            self.is_adopted = True
        self._say(*first)
        assert self.pool is not None, "it has one"
        return {"pool": self.pool.name}

    def _say(self, token: int, digest: int) -> None:
        assert self.said is not None, "connected"
        self.sequence.say(token, digest)
        if self.is_stored and len(self.sequence.tokens) > 1:
            self.store_token(self.sequence)
        self.said.send(SAID.pack(token, digest))

    def go(self) -> dict[str, Any]:
        """Decode until killed."""
        for token, digest in self.steps(ROOM_TOKENS - 2):
            self._say(token, digest)
        time.sleep(60)
        return {}

    def stand(self, *, seed: int, path: str) -> dict[str, Any]:
        """Listen to what the owner will say."""
        self.sequence = Sequence(seed, self.num_prompt, self.shape.vocabulary)
        Path(path).unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(1)
        return {}

    def attach(self, *, name: str) -> dict[str, Any]:
        """Map the owner's pool, and capture the step over it."""
        begun = time.perf_counter()
        self.pool = self.client.attach_on_gpu(name, is_standby=True)
        attached_s = time.perf_counter() - begun
        self.kv = self.model.kv(self._tensor(self.pool))
        self._capture()
        return {"attached_ms": attached_s * 1000}

    def warm(self) -> dict[str, Any]:
        """Map what the prompt's blocks lie in."""
        return {"warm": self.client.restore(self.sequence.blocks.keys[:1], [self._address(0)])}

    def succeed(self, *, is_stored: bool, count: int) -> dict[str, Any]:
        """Follow until the owner is dead; then go on, at once."""
        assert self.listener is not None, "it stands by"
        owner, _ = self.listener.accept()
        self.listener.close()
        sequence = self.sequence
        while data := owner.recv(SAID.size):
            sequence.say(*SAID.unpack(data))
            if is_stored and len(sequence.tokens) == WARM_TOKENS:
                at = self.num_prompt
                self.client.restore(sequence.tails.keys[at : at + 1], [self._address(at)])
        hinted = time.monotonic_ns()
        owner.close()
        num_said, known = len(sequence.tokens), sequence.num_known
        if is_stored:
            restored = self._restore(known)
        else:
            assert self.pool is not None, "it is attached"
            self.client.take_over(self.pool)
            self.is_adopted = True
            restored = known
        there = time.monotonic_ns()
        ids = [*sequence.prompt, *sequence.tokens]
        self._go_on(ids[restored], restored)
        again = [self._one(number) for number in range(known - restored + 1)]
        done = time.monotonic_ns()
        sequence.say(*again[-1])
        is_replay_equal = [token for token, _ in again[:-1]] == ids[restored + 1 : known + 1]
        room = ROOM_TOKENS - 2 - len(sequence.tokens)
        for token, digest in self.steps(min(count, room)):
            sequence.say(token, digest)
        return {
            "hinted": hinted,
            "there": there,
            "done": done,
            "num_said": num_said,
            "replayed": len(again) - 1,
            "is_replay_equal": is_replay_equal,
            "tokens": sequence.tokens,
            "digests": sequence.digests,
        }

    def _one(self, number: int) -> tuple[int, int]:
        self._launch(number)
        return self._wait(number)

    def _restore(self, known: int) -> int:
        """Copy what is stored to where it belongs; of how many tokens that is."""
        sequence = self.sequence
        keys = sequence.blocks.keys[: known // BLOCK_TOKENS]
        there = BLOCK_TOKENS * self.client.restore(
            keys, [self._address(place * BLOCK_TOKENS) for place in range(len(keys))]
        )
        rest = range(there, known)
        if rest:
            tails = [sequence.tails.keys[at] for at in rest[:1000]]
            there += self.client.restore(tails, [*map(self._address, rest[:1000])])
        return there

    def again(self, *, num_said: int) -> dict[str, Any]:
        """What a prefill of all that was said takes, and says; warmed up by another of its size."""
        ids = [*self.sequence.prompt, *self.sequence.tokens[:num_said]]
        self.prefill(ids)
        begun = time.perf_counter()
        token, digest = self.prefill(ids)
        return {"ms": (time.perf_counter() - begun) * 1000, "token": token, "digest": digest}

    def cost(self, *, count: int, rounds: int) -> dict[str, Any]:
        """What storing each token takes of a step: not at all, meanwhile, and before the next."""
        seen: dict[str, list[float]] = {"none": [], "meanwhile": [], "before": []}
        self.open_writers()
        for turn in range(rounds):
            for name, steps in seen.items():
                sequence = Sequence(9, self.num_prompt, self.shape.vocabulary, f" {turn} {name}")
                self.prefill(sequence.prompt)
                sequence.say(0, 0)
                last = time.perf_counter()
                for token, digest in self.steps(count, is_ahead=name != "before"):
                    sequence.say(token, digest)
                    if name != "none":
                        self.store_token(sequence)
                    now = time.perf_counter()
                    steps.append(now - last)
                    last = now
        return {
            name: {
                "p50_ms": round(statistics.median(steps) * 1000, 4),
                "mean_ms": round(statistics.fmean(steps) * 1000, 4),
            }
            for name, steps in seen.items()
        }


def main() -> int:
    """Do what is asked for."""
    path, uuid, shape, num_prompt = sys.argv[1:]
    engine = Engine(Path(path), uuid, shape, int(num_prompt))
    for line in sys.stdin:
        wanted = json.loads(line)
        verb: Callable[..., dict[str, Any]] = getattr(engine, wanted.pop("verb"))
        try:
            with engine.torch.inference_mode():
                answer = verb(**wanted)
        except UnbrokenError as error:
            if error.reason is Reason.UNREACHABLE:
                raise
            answer = {"error": f"{error.reason.value}: {error.detail}"}
        print(json.dumps(answer), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
