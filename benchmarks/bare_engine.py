"""An engine that serves clients itself over the bare HTTP/2 of unbroken/http2: the direct path.

    python -m benchmarks.bare_engine --step-ms 20       prints its address

Tokens are stamps. All streams step together, a message per token, and each connection is written to
once a step; 0 ms is as fast as windows and sockets allow. It answers InferenceService.Generate, and
also what a router asks of an engine that speaks vllm.grpc.engine.VllmEngine, so that all hops can
be measured in front of the same engine.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Final, cast

import uvloop
from typing_extensions import override

from benchmarks.stamps import NUM_IDS, stamp
from frontend.edge.encoding import body, varint
from unbroken.edge.answering import ANSWER_FIELDS
from unbroken.http2.connection import Connection, DataReceived, Over, RequestReceived, StreamLost
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import Code, trailers

PROMPT_TOKENS: Final = 3
CONTEXT_LENGTH: Final = 10_000_000
LIMITS: Final = EdgeLimits(streams_max=100_000, control_burst=1_000_000_000)
_WRITE_BUFFER_HIGH: Final = 256 * 1024
_VLLM: Final = b"/vllm.grpc.engine.VllmEngine/"


def _field(number: int, value: bytes | int) -> bytes:
    """One field as protobuf writes it."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def generate_response(offset: int, token_id: int) -> bytes:
    """GenerateResponse of unbroken.v1."""
    return _field(2, offset) + _field(3, varint(token_id)) + _field(4, b"word ")


def _vllms(offset: int, token_id: int) -> bytes:
    """GenerateResponse.chunk of smg-grpc-proto 0.4.28."""
    chunk = _field(1, varint(token_id)) + _field(2, PROMPT_TOKENS) + _field(3, offset + 1)
    return _field(1, chunk)


_STREAMING: Final[dict[bytes, Callable[[int, int], bytes]]] = {
    b"/unbroken.v1.InferenceService/Generate": generate_response,
    _VLLM + b"Generate": _vllms,
}
"""By path: the message for a token at an offset."""
_UNARY: Final = {
    _VLLM + b"HealthCheck": _field(1, 1),
    _VLLM + b"GetModelInfo": b"".join((
        _field(2, 1),  # is_generation
        _field(3, CONTEXT_LENGTH),
        _field(4, NUM_IDS),  # vocab_size
        _field(6, b"m"),  # served_model_name
        _field(8, b"llama"),  # model_type
    )),
    _VLLM + b"GetServerInfo": _field(5, b"vllm-grpc"),
    _VLLM + b"GetLoads": b"",
    _VLLM + b"Abort": b"",
}  # fmt: skip


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, clients: "set[Client]") -> None:
        self._clients = clients
        self._connection = Connection(LIMITS, time.monotonic())
        self._paths: dict[int, bytes] = {}
        """Of requests that have not ended."""
        self._streams: dict[int, Callable[[int, int], bytes]] = {}
        self._offsets: dict[int, int] = {}
        self._is_paused = False
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_HIGH)
        self._clients.add(self)
        self._write()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.discard(self)

    @override
    def pause_writing(self) -> None:
        self._is_paused = True

    @override
    def resume_writing(self) -> None:
        self._is_paused = False

    @override
    def data_received(self, data: bytes) -> None:
        for event in self._connection.receive(data, time.monotonic()):
            match event:
                case RequestReceived(stream_id=stream_id, request=request, ends=ends):
                    self._paths[stream_id] = request.path
                    if ends:
                        self._begin(stream_id)
                case DataReceived(stream_id=stream_id, data=data, ends=ends):
                    self._connection.consumed(stream_id, len(data))
                    if ends:
                        self._begin(stream_id)
                case StreamLost(stream_id=stream_id):
                    self._paths.pop(stream_id, None)
                    self._streams.pop(stream_id, None)
                case Over() if self._transport is not None:
                    self._transport.close()
                case _:
                    pass
        self._write()

    def step(self, token_id: int) -> None:
        """One more token for each stream that has room, in one write."""
        if self._is_paused or not self._streams:
            return
        connection, offsets, now = self._connection, self._offsets, time.monotonic()
        for stream_id, encode in self._streams.items():
            if connection.has_room(stream_id):
                offset = offsets[stream_id]
                connection.send_data(
                    stream_id, body(encode(offset, token_id), answers_resume=False), now
                )
                offsets[stream_id] = offset + 1
        self._write()

    def _begin(self, stream_id: int) -> None:
        path, connection = self._paths.pop(stream_id), self._connection
        if path in _STREAMING:
            connection.send_headers(stream_id, ANSWER_FIELDS)
            self._streams[stream_id], self._offsets[stream_id] = _STREAMING[path], 0
        elif path in _UNARY:
            connection.send_headers(stream_id, ANSWER_FIELDS)
            connection.send_data(
                stream_id, body(_UNARY[path], answers_resume=False), time.monotonic()
            )
            connection.end(stream_id, trailers(Code.OK, ""))
        else:
            fields = trailers(Code.UNIMPLEMENTED, "nobody serves it")
            connection.send_headers(stream_id, [*ANSWER_FIELDS, *fields], ends=True)

    def _write(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            outbound = self._connection.take_outbound()
            if outbound:
                self._transport.write(outbound)


async def serve(step_s: float, model_path: str) -> None:
    """Run until cancelled."""
    _UNARY[_VLLM + b"GetModelInfo"] += _field(1, model_path.encode())
    clients: set[Client] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Client(clients), "127.0.0.1", 0, backlog=1024)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201
    due = loop.time()
    while True:
        token_id = stamp()
        for client in list(clients):
            client.step(token_id)
        if clients:
            due = max(due + step_s, loop.time() - step_s)
            await asyncio.sleep(max(0.0, due - loop.time()))
        else:
            await asyncio.sleep(0.001)
            due = loop.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--model-path", default="", help="where a router finds the tokenizer")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.step_ms / 1e3, arguments.model_path))


if __name__ == "__main__":
    main()
