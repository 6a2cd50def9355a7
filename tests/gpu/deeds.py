"""Plays on the GPU what a driver refuses (`tests.memory_service.refusals`), in other processes.

    python -m tests.gpu.deeds <uuid>      # names of deeds as lines, answers as lines of JSON

A deed that spoils its context, or ends its process, spoils no other: the next has a new one.
"""

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests.memory_service import refusals
from unbroken.memory.cuda import CudaGpu
from unbroken.memory.gpu import GpuCode

ANSWER_S_MAX = 60.0


def play(uuid: str, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    """How the driver answers each: a code, None, or the words for how it went wrong."""
    left = list(names)
    while left:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.deeds", uuid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while left:
                name = left.pop(0)
                process.stdin.write(f"{name}\n".encode())
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], ANSWER_S_MAX)
                line = process.stdout.readline() if ready else b""
                if not line:
                    process.kill()
                    yield name, f"its process ended ({process.wait(10)})"
                    break
                answered = json.loads(line)
                yield name, answered["answer"]
                if answered["is_spoiled"]:
                    break
        finally:
            process.kill()
            process.wait(10)
            process.stdin.close()
            process.stdout.close()


def main() -> int:
    """Play what is wanted."""
    gpu = CudaGpu(sys.argv[1])
    for line in sys.stdin:
        answer: object
        try:
            answer = refusals.answer(gpu, line.strip())
        except AssertionError as error:
            answer = f"done, but wrongly: {error}"
        try:
            is_spoiled = refusals.answer(gpu, "map_one_twice") is not None
        except Exception:
            is_spoiled = True
        print(json.dumps({"answer": answer, "is_spoiled": is_spoiled}), flush=True)  # noqa: T201
    return 0


def word(answer: object) -> object:
    """For people."""
    return answer.name if isinstance(answer, GpuCode) else answer


if __name__ == "__main__":
    sys.exit(main())
