"""A client in a process of its own: it can be killed, stopped, starved, and its history stays.

    python -m unbroken.chaos.recorder HOST:PORT [HOST:PORT ...]

It reads orders, one JSON object a line, and writes what happens to its streams, one JSON array a
line, once per turn of its loop: what it has read, its parent has too, however it ends.

    {"stream": "s1", "request": {…GenerateRequest…}, "timeout_s": 20}     begin a stream
    {"cancel": "s1"}                                                     stop reading it
    {"pause": "s1", "s": 0.5}                                            read nothing for so long
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import uvloop
from google.protobuf import json_format

from unbroken import tether
from unbroken.chaos.checker import Asked, Began, Came, Event, Failed, Finished
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.garbage import collect_nothing_in_forks
from unbroken.history import History
from unbroken.v1 import inference_service_pb2 as pb

LINE_BYTES_MAX: Final = 4 * 1024 * 1024

_KINDS: Final = {kind.__name__: kind for kind in (Asked, Began, Came, Finished, Failed)}


class RecorderError(Exception):
    """A recording client said what is no event."""


class Recorder:
    """The parent's side: starts the process, gives orders, keeps the history.

    async with Recorder(["127.0.0.1:7400"]) as recorder:
        recorder.ask("s1", request)
        await recorder.until(lambda: recorder.num_tokens("s1") >= 3)
    """

    def __init__(
        self, frontends: Sequence[str], *, path: Path | None = None, wrap: Sequence[str] = ()
    ) -> None:
        """Write the history to `path` as well; `wrap` goes before the command."""
        self._frontends = tuple(frontends)
        self._path = path
        self._wrap = tuple(wrap)
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self.history: list[Event] = []
        """Everything since the last `forget`, in the order in which the client saw it."""
        self._num_tokens: dict[str, int] = {}
        self._open: set[str] = set()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None, "expected a client that has started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def open_streams(self) -> frozenset[str]:
        """Asked for, without an end yet."""
        return frozenset(self._open)

    def num_tokens(self, stream: str) -> int:
        """How many tokens it has read of a stream."""
        return self._num_tokens.get(stream, 0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the process."""
        collect_nothing_in_forks()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", tether.__file__, str(os.getpid())),
            *self._wrap,
            *(sys.executable, "-m", __name__, *self._frontends),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
        self._reading = asyncio.create_task(self._read(), name="history of a client")

    async def close(self) -> None:
        """End the process, and read what it left. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reading is not None:
            await self._reading
            self._reading = None

    def ask(self, stream: str, request: pb.GenerateRequest, *, timeout_s: float = 60.0) -> None:
        """Begin a stream."""
        self._open.add(stream)
        self._order(stream=stream, request=json_format.MessageToDict(request), timeout_s=timeout_s)

    def cancel(self, stream: str) -> None:
        """Stop reading a stream."""
        self._order(cancel=stream)

    def pause(self, stream: str, pause_s: float) -> None:
        """Read nothing of a stream for so long."""
        self._order(pause=stream, s=pause_s)

    async def until(self, claim: Callable[[], bool]) -> None:
        """Wait for a claim about the history; the caller limits the time."""
        while not claim():
            self._news.clear()
            await self._news.wait()

    def forget(self) -> None:
        """Begin a new history; no stream may be open."""
        self.history = []
        self._num_tokens.clear()
        self._open.clear()

    def _order(self, **order: object) -> None:
        assert self._process is not None, "expected a client that has started"
        assert self._process.stdin is not None, "it was started with pipes"
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None, "it has just been started"
        assert self._process.stdout is not None, "it was started with pipes"
        output = self._process.stdout
        while line := await output.readline():
            if not line.endswith(b"\n"):
                break  # It was killed in the middle of a word.
            event = event_from_json(line)
            self.history.append(event)
            if isinstance(event, Came):
                count = self._num_tokens.get(event.stream, 0) + len(event.token_ids)
                self._num_tokens[event.stream] = count
            elif isinstance(event, Finished | Failed):
                self._open.discard(event.stream)
            if self._path is not None:
                with self._path.open("ab") as file:
                    file.write(line)
            self._news.set()
        self._news.set()


def event_to_json(event: Event) -> bytes:
    """One line."""
    fields = [getattr(event, name) for name in type(event).__slots__]
    return json.dumps([type(event).__name__, *fields]).encode() + b"\n"


def event_from_json(line: bytes | str) -> Event:
    """The opposite of `event_to_json`; raises `RecorderError`."""
    try:
        name, *fields = json.loads(line)
        return _KINDS[name](*map(_frozen, fields))
    except (ValueError, KeyError, TypeError) as error:
        raise RecorderError(f"expected an event, got {line[:200]!r}") from error


def _frozen(value: Any) -> Any:
    """As it was before it was JSON: with tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def billing_of(finished: pb.StreamFinished) -> object:
    """What the end says and an interruption must not change, as JSON has it."""
    return _frozen(
        [
            finished.usage.prompt_tokens,
            finished.usage.completion_tokens,
            [
                [
                    choice.choice_index,
                    choice.finish_reason,
                    choice.stop,
                    choice.stop_token_id if choice.HasField("stop_token_id") else None,
                    choice.num_tokens,
                    round(choice.cumulative_logprob, 6),  # Sums depend on their order.
                ]
                for choice in finished.choices
            ],
        ]
    )


class _Client:
    """The process's side."""

    def __init__(self, frontends: Sequence[str]) -> None:
        self._client = Client(*frontends)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, float] = {}

    async def obey(self, orders: AsyncIterator[bytes]) -> None:
        async with self._client:
            async for line in orders:
                order: Mapping[str, Any] = json.loads(line)
                if "stream" in order:
                    name = order["stream"]
                    self._tasks[name] = asyncio.create_task(self._stream(name, order))
                elif "cancel" in order:
                    self._tasks[order["cancel"]].cancel()
                elif "pause" in order:
                    self._pauses[order["pause"]] = order["s"]

    async def _stream(self, name: str, order: Mapping[str, Any]) -> None:
        request = json_format.ParseDict(order["request"], pb.GenerateRequest())
        _write(Asked(name, time.monotonic()))
        stream = self._client.start(request, timeout_s=order["timeout_s"])
        has_begun = False
        try:
            async for piece in stream:
                now = time.monotonic()
                if not has_begun:
                    has_begun = True
                    _write(Began(name, now))
                _write(
                    Came(
                        name,
                        now,
                        piece.choice_index,
                        piece.offset,
                        piece.token_ids,
                        piece.text,
                        tuple(repr(logprob) for logprob in piece.logprobs),
                    )
                )
                if (pause_s := self._pauses.pop(name, None)) is not None:
                    await asyncio.sleep(pause_s)
        except UnbrokenError as error:
            _write(Failed(name, time.monotonic(), error.reason.name, error.detail))
        except asyncio.CancelledError:
            await stream.cancel()
            _write(Failed(name, time.monotonic(), "CANCELLED", "by the client"))
        else:
            assert stream.finished is not None, "a stream without an end raises"
            history = History(finished=stream.finished)
            _write(
                Finished(
                    name,
                    time.monotonic(),
                    billing_of(stream.finished),
                    len(history.migrations()),
                )
            )
        finally:
            self._tasks.pop(name, None)


_unwritten = bytearray()


def _write(event: Event) -> None:
    """Write before anything is read: a system call for each token would slow the client down."""
    if not _unwritten:
        asyncio.get_running_loop().call_soon(_flush)
    _unwritten.extend(event_to_json(event))


def _flush() -> None:
    data = bytes(_unwritten)
    _unwritten.clear()
    while data:
        data = data[os.write(1, data) :]


async def _lines() -> AsyncIterator[bytes]:
    """Orders, until the parent closes the pipe."""
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line


async def _main() -> None:
    await _Client(sys.argv[1:]).obey(_lines())


if __name__ == "__main__":
    uvloop.run(_main())
