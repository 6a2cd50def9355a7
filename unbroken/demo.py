"""The main job, for everybody to see: a worker dies in mid-stream, and the client reads on.

Two workers with a real model. Each scene runs some requests undisturbed, then again; this time
SIGKILL takes a worker's whole process group, engine and sidecar alike, in the middle of what is
printed. At the end both runs are compared token by token.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unbroken.chaos.processes import is_alive
from unbroken.client import Client
from unbroken.generation_stream import GenerationStream, Piece
from unbroken.history import History, record
from unbroken.mesh import LocalMesh
from unbroken.request import GenerateOptions
from unbroken.v1 import worker_pb2 as pb

_MAX_TOKENS = 96
_KILL_AT_TOKEN = 40


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the scene."""

    text: str
    options: GenerateOptions


_SHOWN = Request(
    "Tell me a short story about a lighthouse keeper who never lets the light go out.",
    {"temperature": 0.8, "top_p": 0.95, "seed": 7, "max_tokens": _MAX_TOKENS},
)
_OTHERS = (
    Request("Explain in plain words what a heartbeat is.", {"temperature": 0.0}),
    Request(
        "List ten things to pack for a voyage.",
        {"temperature": 1.0, "seed": 11, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    ),
    Request(
        "Describe a ship as JSON.",
        {
            "temperature": 0.7,
            "seed": 3,
            "json_schema": '{"type":"object","properties":{"name":{"type":"string","maxLength":60},'
            '"masts":{"type":"integer"},"crew":{"type":"array","items":{"type":"string",'
            '"maxLength":30},"minItems":2,"maxItems":5}},"required":["name","masts","crew"]}',
        },
    ),
)


@dataclass(slots=True)
class Result:
    """What the demo proved, or did not."""

    streams: int = 0
    kills: int = 0
    migrated: int = 0
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    equal: bool = True
    gaps_s: list[float] = field(default_factory=list[float])

    def to_json(self) -> dict[str, object]:
        """The figures; `ok` only if a stream really had to go on elsewhere, and all were equal."""
        gaps_ms = [gap * 1e3 for gap in self.gaps_s] or [float("inf")]
        is_ok = (
            self.equal
            and self.kills > 0
            and self.migrated >= self.kills
            and not (self.lost or self.duplicated or self.changed)
        )
        return {
            "ok": is_ok,
            "streams": self.streams,
            "kills": self.kills,
            "migrated": self.migrated,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "equal": self.equal,
            "gap_ms_p50": round(statistics.median(gaps_ms), 1),
            "gap_ms_max": round(max(gaps_ms), 1),
        }


async def play(
    directory: Path, write: Callable[[str], None], *, engine: str = "llama", num_scenes: int = 1
) -> Result:
    """Play the scenes; `write` receives what the terminal shows."""
    result = Result()
    write("Starting a frontend and two workers with a real model ...\n")
    async with LocalMesh(directory, num_workers=2, engine=engine) as mesh:
        for worker_id, worker in sorted(mesh.workers.items()):
            write(
                f"  {worker_id}: sidecar {worker.sidecar_pid}, engine group {worker.engine_pgid}\n"
            )
        async with Client(mesh.frontend_address) as client:
            for scene in range(num_scenes):
                if scene:
                    for worker_id in {"w1", "w2"} - mesh.workers.keys():
                        await mesh.restart(worker_id)
                await _scene(mesh, client, write, result)
    return result


async def _scene(
    mesh: LocalMesh, client: Client, write: Callable[[str], None], result: Result
) -> None:
    requests = (_SHOWN, *_OTHERS)
    write("\nAn undisturbed run first, to compare with.\n")
    undisturbed = [await record(_generate(client, request)) for request in requests]
    write(f"\n> {_SHOWN.text}\n\n")
    scene = _Scene(mesh, client, write)
    disturbed = await scene.play(requests)
    result.kills += scene.num_kills
    for expected, seen in zip(undisturbed, disturbed, strict=True):
        difference = seen.difference(expected)
        migrations = seen.migrations()
        result.streams += 1
        result.migrated += bool(migrations)
        result.lost += difference.lost
        result.duplicated += difference.duplicated
        result.changed += difference.changed
        result.equal &= difference.is_none
        for attempt in migrations:
            gap = seen.choices[0].gap_s(attempt.first_offset)
            if gap is not None:
                result.gaps_s.append(gap)
        worker_ids = [attempt.worker.worker_id for attempt in seen.finished.attempts]  # pyright: ignore[reportOptionalMemberAccess]
        write(
            f"  {' -> '.join(worker_ids):<9} {seen.num_tokens:>3} tokens, "
            f"{'equal to' if difference.is_none else 'DIFFERENT FROM'} the undisturbed run\n"
        )


class _Scene:
    """The requests once more, with a death in the middle."""

    def __init__(self, mesh: LocalMesh, client: Client, write: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._client = client
        self._write = write
        self.num_kills = 0

    async def play(self, requests: Sequence[Request]) -> list[History]:
        """Stream all of them at once, print the first, kill its worker on the way."""
        async with asyncio.TaskGroup() as group:
            shown = group.create_task(self._show(requests[0]))
            others = [
                group.create_task(record(_generate(self._client, request)))
                for request in requests[1:]
            ]
        return [shown.result(), *(task.result() for task in others)]

    async def _show(self, request: Request) -> History:
        history = History()
        stream = _generate(self._client, request)
        async for piece in stream:
            history.started = stream.started
            history.add(piece, time.monotonic())
            self._write(piece.text)
            if not self.num_kills and _tokens(piece) >= _KILL_AT_TOKEN:
                await self._kill(stream.request_id)
        history.finished = stream.finished
        self._write("\n\n")
        return history

    async def _kill(self, request_id: str) -> None:
        """SIGKILL the worker under the stream, and see that it is dead."""
        stream = await self._client.get_stream(request_id)
        worker_id = stream.choices[0].worker.worker_id
        record_ = self._mesh.workers[worker_id]
        self._mesh.kill(worker_id, "host")
        await _until_dead(record_)
        self.num_kills += 1
        self._write(f"\n\x1b[1;31m[SIGKILL: {worker_id}, engine and sidecar]\x1b[0m\n")


def _generate(client: Client, request: Request) -> GenerationStream:
    options: GenerateOptions = {"max_tokens": _MAX_TOKENS, **request.options}
    return client.generate(
        messages=[{"role": "user", "content": request.text}], timeout_s=120, **options
    )


def _tokens(piece: Piece) -> int:
    return piece.offset + len(piece.token_ids)


async def _until_dead(worker: pb.WorkerRecord) -> None:
    """Wait until no process of the worker is left but zombies; the proof that the kill worked."""
    async with asyncio.timeout(5):
        while is_alive(worker.sidecar_pid) or _is_group_alive(worker.engine_pgid):  # noqa: ASYNC110 - The kernel has no event for this.
            await asyncio.sleep(0.001)


def _is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(
        _group_of(int(entry)) == group and is_alive(int(entry))
        for entry in os.listdir("/proc")
        if entry.isdigit()
    )


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
