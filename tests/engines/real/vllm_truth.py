"""What vLLM's scheduler itself holds, step by step: the truth that reports are compared with.

Loaded by vLLM like a plug-in; without `UNBROKEN_TRUTH_LOG` it changes nothing. After each plan and
each result it writes a line: when (monotonic seconds), KV blocks in use of how many, requests that
run, new ones that wait; and so far, preemptions and tokens computed.

With `UNBROKEN_STEP_S` every step takes so much longer, as those of larger models do: a model of two
layers has steps so short that all which is seen of it is how its server falls behind its core.
"""

import importlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

VARIABLE: Final = "UNBROKEN_TRUTH_LOG"
STEP_VARIABLE: Final = "UNBROKEN_STEP_S"


@dataclass(frozen=True, slots=True)
class Moment:
    """One line."""

    at: float
    blocks_used: int
    blocks_total: int
    running: int
    waiting_new: int
    """Never scheduled yet: the engine was given more than fits."""
    preemptions: int
    computed: int


def read(path: Path) -> Sequence[Moment]:
    """All that was written; a last line may be cut."""
    lines = path.read_text().splitlines(keepends=True)
    return [Moment(*json.loads(line)) for line in lines if line.endswith("\n")]


def register() -> None:
    """Change the scheduler of this process."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    scheduler: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    if getattr(scheduler, "_tells_truth", False):
        return
    scheduler._tells_truth = True
    step_s = float(os.environ.get(STEP_VARIABLE, "0"))
    logs: list[IO[str]] = []
    preempted = computed = 0

    def note(self: Any) -> None:
        if not logs:
            logs.append(Path(path).open("a", buffering=1))  # noqa: SIM115 - As long as it lives.
        pool = self.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1  # One is nobody's.
        new = sum(one.status.name == "WAITING" for one in self.waiting)
        used = total - pool.get_num_free_blocks()
        line = [time.monotonic(), used, total, len(self.running), new, preempted, computed]
        logs[0].write(f"{json.dumps(line)}\n")

    def noting(method: Any, pause_s: float = 0.0) -> Any:
        def noted(self: Any, *more: Any, **named: Any) -> Any:
            nonlocal computed
            time.sleep(pause_s)
            result = method(self, *more, **named)
            computed += getattr(result, "total_num_scheduled_tokens", 0)
            note(self)
            return result

        return noted

    def counting(method: Any) -> Any:
        def counted(self: Any, *more: Any, **named: Any) -> Any:
            nonlocal preempted
            preempted += 1
            return method(self, *more, **named)

        return counted

    scheduler.schedule = noting(scheduler.schedule, step_s)
    scheduler.update_from_output = noting(scheduler.update_from_output)
    scheduler._preempt_request = counting(scheduler._preempt_request)
