"""What an engine can say wrong to its sidecar, and a sidecar to its engine.

A real sidecar and a real worker, and between their sockets somebody who changes what is said.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.bad_input import Answer, BadInput
from tests.integration.bad_requests import VOCAB_SIZE
from unbroken.client import Client
from unbroken.errors import UnbrokenError
from unbroken.framing import MESSAGE_BYTES_MAX
from unbroken.status import CODES
from unbroken.v1 import engine_pb2
from unbroken.v1 import inference_service_pb2 as inference_pb

MODEL = "tampered"
"""What the worker behind the meddler is started with."""
BREACH_AT = 3
"""Offset of the token with which the engine goes wrong."""

_SIZE = struct.Struct("<I")

Tamper = Callable[[engine_pb2.EngineResponse], bytes | None]
"""What is written instead of a response; None: the connection ends there."""


@dataclass
class Meddler:
    """A Unix socket that passes everything on to another one, and changes some of it."""

    path: Path
    target: Path
    tamper: Tamper | None = None
    """For the next frame that has a token at `BREACH_AT`."""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._connected, self.path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            from_engine, to_engine = await asyncio.open_unix_connection(self.target)
            try:
                copying = asyncio.create_task(_copy(reader, to_engine))
                await self._pass_on(from_engine, writer)
                copying.cancel()
            finally:
                to_engine.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # One side left, or the test is over.
        finally:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            (size,) = _SIZE.unpack(await reader.readexactly(4))
            data = await reader.readexactly(size)
            tamper = self.tamper
            if tamper is not None:
                response = engine_pb2.EngineResponse.FromString(data)
                if BREACH_AT in response.frame.offsets:
                    self.tamper = None
                    changed = tamper(response)
                    if changed is not None:
                        writer.write(changed)
                        await asyncio.sleep(0)
                    if changed is None or not _is_whole(changed):
                        return
                    continue
            writer.write(_SIZE.pack(size) + data)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass  # As good as its end.
    finally:
        writer.close()


def _framed(message: engine_pb2.EngineResponse) -> bytes:
    data = message.SerializeToString()
    return _SIZE.pack(len(data)) + data


def _is_whole(data: bytes) -> bool:
    return len(data) >= 4 and len(data) == 4 + int(_SIZE.unpack_from(data)[0])


@dataclass(frozen=True, slots=True)
class TamperedWorker:
    """A sidecar whose engine is not to be trusted, in a mesh."""

    meddler: Meddler
    client: Client


def _frame(change: Callable[[engine_pb2.EngineResponse], object]) -> Tamper:
    def tamper(response: engine_pb2.EngineResponse) -> bytes:
        change(response)
        return _framed(response)

    return tamper


def _in_stream(tamper: Tamper) -> Callable[[TamperedWorker], Awaitable[Answer]]:
    """A stream that may not go on elsewhere, whose engine goes wrong at `BREACH_AT`."""

    async def say(worker: TamperedWorker) -> Answer:
        worker.meddler.tamper = tamper
        request = inference_pb.GenerateRequest(
            model=MODEL, text="hello", continuation=inference_pb.CONTINUATION_POLICY_NEVER
        )
        request.params.sampling.temperature = 0
        request.params.stopping.max_tokens = BREACH_AT + 40
        try:
            async for _ in worker.client.start(request, timeout_s=10):
                pass
        except UnbrokenError as error:
            return Answer(
                CODES[error.reason].name, error.reason.name, error.metadata.get("failure", "")
            )
        return Answer("ignored")

    return say


def _set(column: str, value: int) -> Tamper:
    def change(response: engine_pb2.EngineResponse) -> None:
        getattr(response.frame, column)[0] = value

    return _frame(change)


def _delete(column: str) -> Tamper:
    return _frame(lambda response: response.frame.ClearField(column))  # pyright: ignore[reportArgumentType]


def _count_of_2(response: engine_pb2.EngineResponse) -> None:
    response.frame.token_counts.append(2)


def _end_early(response: engine_pb2.EngineResponse) -> None:
    response.frame.ended.add(slot=response.frame.slots[0], end_offset=1, finish_reason=2)


def _no_reason(response: engine_pb2.EngineResponse) -> None:
    response.frame.ended.add(slot=response.frame.slots[0], end_offset=BREACH_AT + 1)


def _stray_logprobs(response: engine_pb2.EngineResponse) -> None:
    response.frame.logprobs.add(slot=response.frame.slots[0])
    response.frame.logprobs[0].tokens.add()
    response.frame.logprobs[0].tokens.add()


def _lost(failure: str) -> Answer:
    return Answer("UNAVAILABLE", "WORKER_LOST", failure)


_PROTOCOL = _lost("PROTOCOL")

CASES: tuple[BadInput[TamperedWorker], ...] = (
    BadInput("a token left out", _PROTOCOL, _in_stream(_set("offsets", BREACH_AT + 1))),
    BadInput("a token that was there before", _PROTOCOL, _in_stream(_set("offsets", 0))),
    BadInput(
        "a token id beyond the vocabulary", _PROTOCOL, _in_stream(_set("token_ids", VOCAB_SIZE))
    ),
    BadInput("tokens of an unknown slot", _PROTOCOL, _in_stream(_set("slots", 999))),
    BadInput("a column left out", _PROTOCOL, _in_stream(_delete("offsets"))),
    BadInput("tokens left out", _PROTOCOL, _in_stream(_delete("token_ids"))),
    BadInput("fewer ids than the rows say", _PROTOCOL, _in_stream(_frame(_count_of_2))),
    BadInput("an end at another offset", _PROTOCOL, _in_stream(_frame(_end_early))),
    BadInput("an end without a reason", _PROTOCOL, _in_stream(_frame(_no_reason))),
    BadInput("log probabilities of other tokens", _PROTOCOL, _in_stream(_frame(_stray_logprobs))),
    BadInput(
        "bytes that are no message",
        _PROTOCOL,
        _in_stream(lambda _: _SIZE.pack(32) + b"\xff" * 32),
    ),
    BadInput(
        "a size of more than 16 MiB",
        _PROTOCOL,
        _in_stream(lambda _: _SIZE.pack(MESSAGE_BYTES_MAX + 1)),
    ),
    BadInput(
        "a message cut short", _lost("CRASH"), _in_stream(lambda response: _framed(response)[:-1])
    ),
    BadInput("the end of the connection", _lost("CRASH"), _in_stream(lambda _: None)),
)


# What a sidecar can say wrong to the engine's socket.


@dataclass(frozen=True, slots=True)
class EngineSocket:
    """The socket of a real worker, and where that logs."""

    path: Path
    log: Path


def _raw(
    *messages: bytes | engine_pb2.EngineRequest,
) -> Callable[[EngineSocket], Awaitable[Answer]]:
    """Say this on a connection of our own; the worker ends it, and logs why."""

    async def say(socket: EngineSocket) -> Answer:
        log_size = socket.log.stat().st_size
        reader, writer = await asyncio.open_unix_connection(socket.path)
        try:
            for message in messages:
                if isinstance(message, bytes):
                    writer.write(message)
                else:
                    data = message.SerializeToString()
                    writer.write(_SIZE.pack(len(data)) + data)
            if isinstance(messages[-1], bytes) and not _breaks_at_once(messages[-1]):
                writer.write_eof()
            async with asyncio.timeout(5):
                while await reader.read(65536):
                    pass
        except ConnectionError:
            pass
        finally:
            writer.close()
        with socket.log.open() as log:
            log.seek(log_size)
            news = log.read()
        kinds = [word for word in _FRAMING_ERRORS if f'"{word}"' in news]
        return Answer("connection closed", about=kinds[0] if kinds else "")

    return say


_FRAMING_ERRORS = ("MessageTooLarge", "MessageTruncated", "MessageUndecodable", "ContractBroken")


def _breaks_at_once(data: bytes) -> bool:
    return _is_whole(data) or int(_SIZE.unpack_from(data)[0]) > MESSAGE_BYTES_MAX


_HELLO = engine_pb2.EngineRequest(hello=engine_pb2.EngineHello(protocol_version=1))
_OLD_HELLO = engine_pb2.EngineRequest(hello=engine_pb2.EngineHello())
_START = engine_pb2.EngineRequest()
_START.start.slot = 1
_ACK = engine_pb2.EngineRequest()
_ACK.ack.slots.extend([1, 2])
_ACK.ack.offsets.append(1)


def _closed(kind: str) -> Answer:
    return Answer("connection closed", about=kind)


SOCKET_CASES: tuple[BadInput[EngineSocket], ...] = (
    BadInput("an attempt before hello", _closed("ContractBroken"), _raw(_START)),
    BadInput("a second hello", _closed("ContractBroken"), _raw(_HELLO, _HELLO)),
    BadInput("protocol version 0", _closed("ContractBroken"), _raw(_OLD_HELLO)),
    BadInput("an empty message", _closed("ContractBroken"), _raw(_HELLO, _SIZE.pack(0))),
    BadInput(
        "unequal columns in an acknowledgement", _closed("ContractBroken"), _raw(_HELLO, _ACK)
    ),
    BadInput(
        "bytes that are no message",
        _closed("MessageUndecodable"),
        _raw(_SIZE.pack(8) + b"\xff" * 8),
    ),
    BadInput("a size of more than 16 MiB", _closed("MessageTooLarge"), _raw(b"\xff\xff\xff\xff")),
    BadInput(
        "a message cut short", _closed("MessageTruncated"), _raw(_SIZE.pack(100) + b"only this")
    ),
)


async def is_greeted(socket: EngineSocket) -> bool:
    """Whether a worker answers a good hello."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket.path)
    except OSError:
        return False
    try:
        data = _HELLO.SerializeToString()
        writer.write(_SIZE.pack(len(data)) + data)
        (size,) = _SIZE.unpack(await reader.readexactly(4))
        response = engine_pb2.EngineResponse.FromString(await reader.readexactly(size))
        return response.ready.protocol_version == 1
    finally:
        writer.close()
