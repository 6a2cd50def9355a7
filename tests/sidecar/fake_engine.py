"""An engine of the real contract that does what its caller says.

    python fake_engine.py <socket> [<what to do at the start>]

What a StartAttempt's `request_id` says is done when it arrives; its slot goes into the frames.
Started with "listen" it is an engine that is well.
"""

import asyncio
import os
import signal
import subprocess
import sys
from typing import NoReturn

from unbroken import framing
from unbroken.framing import Connection
from unbroken.v1 import attempt_pb2, engine_pb2, worker_pb2

Inbound = Connection[engine_pb2.EngineRequest]


def response(sequence: int, slot: int, offset: int) -> engine_pb2.EngineResponse:
    return engine_pb2.EngineResponse(
        frame=attempt_pb2.StepFrame(
            sequence=sequence, slots=[slot], offsets=[offset], token_ids=[offset]
        )
    )


READY = engine_pb2.EngineResponse(
    ready=engine_pb2.EngineReady(
        protocol_version=1,
        description=worker_pb2.EngineDescription(kind="fake", model="fake"),
        tokenizer=worker_pb2.Tokenizer(vocab_size=7),
    )
)


class FakeEngine:
    def __init__(self) -> None:
        self.num_frames = 0
        self.num_batches = 0

    def connected(self, connection: Inbound) -> None:
        self.reader = asyncio.create_task(self.read(connection))

    async def read(self, connection: Inbound) -> None:
        while batch := await connection.receive():
            self.num_batches += 1
            for request in batch:
                match request.WhichOneof("request"):
                    case "hello" if what == "wrong-version":
                        wrong = engine_pb2.EngineReady(protocol_version=99)
                        connection.send(engine_pb2.EngineResponse(ready=wrong))
                    case "hello" if what != "silent":
                        connection.send(READY)
                    case "start":
                        await self.obey(connection, request.start)
                    case "abort":
                        self.emit(connection, request.abort.slot, 1)
                    case "ack":
                        for slot in request.ack.slots:
                            self.emit(connection, slot, 1)
                    case _:
                        pass

    def emit(self, connection: Inbound, slot: int, count: int) -> None:
        frames = [response(self.num_frames + i + 1, slot, i) for i in range(count)]
        self.num_frames += count
        connection.send_all(frames)

    async def obey(self, connection: Inbound, start: attempt_pb2.StartAttempt) -> None:
        match start.stream.request_id.split():
            case ["emit", count]:
                self.emit(connection, start.slot, int(count))
            case ["emit", count, "die"]:
                self.emit(connection, start.slot, int(count))
                os.kill(os.getpid(), signal.SIGKILL)
            case ["exit", status]:
                os._exit(int(status))
            case ["garbage"]:
                raw(connection, b"\xff" * 4096)
            case ["undecodable"]:
                raw(connection, b"\x02\x00\x00\x00\xff\xff")
            case ["truncate"]:
                self.emit(connection, start.slot, 1)
                raw(connection, b"\x40\x00\x00\x00only this")
                os._exit(0)
            case ["gap"]:
                self.num_frames += 1
                self.emit(connection, start.slot, 1)
            case ["close"]:
                connection.close()
            case ["batches"]:  # How many wake-ups there were.
                self.num_frames += 1
                connection.send(response(self.num_frames, start.slot, self.num_batches))
            case ["children"]:
                spawn_children()
                self.emit(connection, start.slot, 1)
            case other:
                raise AssertionError(other)


def raw(connection: Inbound, data: bytes) -> None:
    transport = connection._transport  # pyright: ignore[reportPrivateUsage] # To break the rules.
    assert transport is not None
    transport.write(data)


def spawn_children() -> None:
    """One child in our group, and one with a session of its own whose parent has ended."""
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["setsid", "--fork", "sleep", "1000"]).wait()


async def serve(socket: str) -> NoReturn:
    await framing.serve_unix(socket, engine_pb2.EngineRequest, FakeEngine().connected)
    await asyncio.Event().wait()
    raise AssertionError


if __name__ == "__main__":
    what = sys.argv[2]
    match what:
        case "exit":
            sys.exit(3)
        case "never-listen":
            signal.pause()
        case "ignore-sigterm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case _:
            pass
    asyncio.run(serve(sys.argv[1]))
