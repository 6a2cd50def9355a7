"""`make cohort-gpu`: a model that is split over two GPUs, one process each, dies and is adopted.

    python -m tests.gpu.cohort              all of it; needs two GPUs
    python -m tests.gpu.cohort <rank> …     one rank (`Rank`)

Each rank has a pool on its GPU, in a session that names the cohort. While one rank lives neither
pool is given to anybody, since the KV of one is of no use without that of the other; when both are
proved dead the ranks of the next life adopt both, and find in them what was written. Ends with one
line of JSON. Exits with 2 without two GPUs.
"""

import importlib
import json
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.memory_service.processes import serving
from unbroken.errors import UnbrokenError
from unbroken.memory.client import SegmentClass
from unbroken.memory.gpu import GpuUnavailable
from unbroken.memory.gpu_client import GpuMemoryClient

ANSWER_S_MAX: Final = 60.0
POOL_BYTES: Final = 4 << 20
MARK_BYTES: Final = 4096
TRIALS: Final = 5


class Rank:
    """One process of a life of the model."""

    def __init__(
        self, socket: Path, uuid: str, cohort: str, rank: int, num_ranks: int, *, is_fake: bool
    ) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.gpu.cohort", str(socket), uuid, cohort),
                *(str(rank), str(num_ranks), "fake" if is_fake else "real"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")

    def ask(self, verb: str, wait_s: float = 0.0) -> str:
        """The mark that stands in its pool; or the reason why it has none."""
        self.tell(verb, wait_s)
        return self.answer()

    def tell(self, verb: str, wait_s: float = 0.0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"verb": verb, "wait_s": wait_s}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        said = self._said.get(timeout=ANSWER_S_MAX)
        assert said, f"the rank ended with {self._process.wait(10)}"
        return json.loads(said)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)
        for file in (self._process.stdin, self._process.stdout):
            if file is not None:
                file.close()


def life(socket: Path, uuids: Sequence[str], cohort: str, *, is_fake: bool) -> list[Rank]:
    """All ranks of one life, on a GPU each."""
    return [
        Rank(socket, uuid, cohort, number, len(uuids), is_fake=is_fake)
        for number, uuid in enumerate(uuids)
    ]


def main() -> int:
    """A rank, or all of it."""
    return rank_of(*sys.argv[1:]) if sys.argv[1:] else prove()


def rank_of(path: str, uuid: str, cohort: str, rank: str, num_ranks: str, kind: str) -> int:
    """Do what is asked for until killed."""
    gpu = _gpu(uuid, kind)
    client = GpuMemoryClient(
        Path(path),
        gpu,
        client=f"rank {rank}",
        cohort=cohort,
        rank=int(rank),
        num_ranks=int(num_ranks),
    )
    name = f"kv/{rank}"  # The same in each life.
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            if wanted["verb"] == "write":
                pool: Any = client.create_on_gpu(name, SegmentClass.KV_POOL, [POOL_BYTES])
                client.freeze(pool)
                _write(gpu, pool.on_gpu.address, secrets.token_bytes(MARK_BYTES))
            else:
                pool = client.adopt_on_gpu(name, timeout_s=wanted["wait_s"])
            told = f"{gpu.checksums([pool.on_gpu.address], POOL_BYTES)[0]:016x}"
        except UnbrokenError as error:
            told = error.reason.value
        print(json.dumps(told), flush=True)  # noqa: T201
    return 0


def _gpu(uuid: str, kind: str) -> Any:
    if kind == "fake":
        from tests.support.fake_gpu import FakeGpu

        return FakeGpu(uuid)
    from unbroken.memory.cuda import CudaGpu

    return CudaGpu(uuid)


def _write(gpu: Any, address: int, data: bytes) -> None:
    if hasattr(gpu, "write"):
        gpu.write(address, data)
        return
    import numpy as np

    torch: Any = importlib.import_module("torch")
    from unbroken.memory.device_slabs import DeviceSlab

    on_gpu = torch.as_tensor(DeviceSlab(address, len(data)), device="cuda")
    on_gpu.copy_(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    torch.cuda.synchronize()


def prove() -> int:
    """On two real GPUs, often."""
    from unbroken.memory.cuda import CudaGpu

    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    uuids = [line.split("UUID: ")[1].rstrip(")") for line in listed.stdout.splitlines()]
    try:
        if len(uuids) < 2:
            raise GpuUnavailable(f"expected two GPUs, there are {len(uuids)}")
        CudaGpu(uuids[1]).close()
    except (GpuUnavailable, OSError) as error:
        say({"ok": False, "skipped": "no two GPUs", "detail": str(error)})
        return 2
    uuids = uuids[:2]
    refused = adopted = 0
    took_ms: list[float] = []
    gpus = [flag for uuid in uuids for flag in ("--gpus", f"{uuid}={1 << 30}")]
    with (
        tempfile.TemporaryDirectory(prefix="unbroken-memory-") as directory,
        serving(Path(directory), "--orphan-grace-s", "60", *gpus) as service,
    ):
        owners = life(service.socket, uuids, "life-0", is_fake=False)
        written = [rank.ask("write") for rank in owners]
        for number in range(TRIALS):
            nexts = life(service.socket, uuids, f"life-{number + 1}", is_fake=False)
            owners[number % 2].kill()  # One of them first.
            refused += [rank.ask("adopt", 0.5) for rank in nexts] == ["NOT_FENCED"] * 2
            begun = time.monotonic()
            owners[1 - number % 2].kill()
            for rank in nexts:
                rank.tell("adopt", 20.0)
            adopted += [rank.answer() for rank in nexts] == written
            took_ms.append(round((time.monotonic() - begun) * 1000, 1))
            owners = nexts
        for rank in owners:
            rank.kill()
    say(
        {
            "ok": refused == adopted == TRIALS,
            "gpus": len(uuids),
            "trials": TRIALS,
            "refused_while_one_rank_lived": refused,
            "both_pools_adopted_as_they_were": adopted,
            "last_kill_to_both_adopted_ms": took_ms,
        }
    )
    return 0 if refused == adopted == TRIALS else 1


def say(told: dict[str, Any]) -> None:
    print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
