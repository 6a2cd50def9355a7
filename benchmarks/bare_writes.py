"""The least that a process can do: a write(2) for each connection and step, and nothing beside it.

    python -m benchmarks.bare_writes --step-ms 20       prints its address

Answers InferenceService.Generate with stamps as benchmarks/bare_engine.py does, one stream on each
connection. Between the writes of a step nothing happens: no flow control, no limit, no loop of
events, and one frame serves all streams that began in the same step. Whoever sends a token of each
stream when it is there has this to pay, whatever the language; nearly all of it is the kernel's.
"""

import argparse
import asyncio
import os
import time
from contextlib import suppress
from typing import Final, cast

import uvloop
from typing_extensions import override

from benchmarks.bare_engine import LIMITS, generate_response
from benchmarks.stamps import stamp
from frontend.edge.encoding import body
from unbroken.edge.answering import ANSWER_FIELDS
from unbroken.http2 import frames
from unbroken.http2.connection import Connection, DataReceived

_STREAM_ID: Final = 1
"""Of the only stream of a connection."""


class Client(asyncio.Protocol):
    """One connection, until its request has come."""

    def __init__(self, waiting: list[int], is_gone: asyncio.Event) -> None:
        """`waiting` gets its socket then."""
        self._waiting = waiting
        self._is_gone = is_gone
        self._connection = Connection(LIMITS, time.monotonic())
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        assert self._transport is not None, "it was connected"
        for event in self._connection.receive(data, time.monotonic()):
            if isinstance(event, DataReceived) and event.ends:
                self._connection.send_headers(_STREAM_ID, ANSWER_FIELDS)
                self._waiting.append(self._transport.get_extra_info("socket").fileno())
        self._transport.write(self._connection.take_outbound())

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone.set()


async def serve(step_s: float) -> None:
    """Serve one client process, until it goes. Raises OSError if it goes amid a step."""
    waiting: list[int] = []
    is_gone = asyncio.Event()
    cohorts: list[tuple[int, list[int]]] = []
    """Sockets whose streams began together, and in which step."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Client(waiting, is_gone), "127.0.0.1", 0, backlog=1024
    )
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201
    due, step = loop.time(), 0
    while not is_gone.is_set():
        token_id = stamp()
        for began, sockets in cohorts:
            said = body(generate_response(step - began, token_id), answers_resume=False)
            frame = frames.data_header(_STREAM_ID, len(said)) + said
            for socket in sockets:
                os.write(socket, frame)
        step += 1
        if waiting:
            cohorts.append((step, waiting.copy()))
            waiting.clear()
        due = max(due + step_s, loop.time() - step_s)
        await asyncio.sleep(max(0.0, due - loop.time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    with suppress(BrokenPipeError, ConnectionResetError):
        uvloop.run(serve(arguments.step_ms / 1e3))


if __name__ == "__main__":
    main()
