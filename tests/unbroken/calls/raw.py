"""A server on a real socket that says bytes of the test's choosing."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from google.protobuf.wrappers_pb2 import BytesValue

from tests.frontend.edge.peer import Frame, data
from tests.frontend.edge.raw import RawClient
from unbroken.http2 import frames
from unbroken.http2.frames import FrameType
from unbroken.http2.messages import PREFIX

GREETING = frames.settings({})
ANSWER = ((b":status", b"200"), (b"content-type", b"application/grpc"))


class Accepted(RawClient):
    """The server's end of one connection."""

    async def skip_preface(self) -> None:
        """What comes before the first frame."""
        await self._reader.readexactly(len(frames.PREFACE))

    async def until(self, kind: FrameType) -> Frame:
        """The next frame of that kind, which has to come."""
        found = await self.frames_until(kind)
        assert found, f"expected {kind.name}, the connection ended"
        assert found[-1].kind == kind, f"expected {kind.name}, the connection ended"
        return found[-1]

    async def call(self) -> tuple[int, dict[bytes, bytes]]:
        """The next call, and its header fields."""
        frame = await self.until(FrameType.HEADERS)
        return frame.stream_id, dict(self._decoder.decode(frame.payload, raw=True))

    def headers(self, call: int, *fields: tuple[bytes, bytes], ends: bool = False) -> None:
        """Say a header section."""
        self.request(call, fields, ends=ends)

    def message(self, call: int, value: bytes) -> None:
        """Say a message, in frames of any size that is allowed."""
        payload = BytesValue(value=value).SerializeToString()
        whole = PREFIX.pack(0, len(payload)) + payload
        for begin in range(0, len(whole), frames.FRAME_BYTES_MAX):
            self.say(data(call, whole[begin : begin + frames.FRAME_BYTES_MAX]))

    def end(self, call: int) -> None:
        """Say that all is well."""
        self.headers(call, (b"grpc-status", b"0"), ends=True)

    async def before_ping(self) -> list[Frame]:
        """All that was said before what has been sent until now was known."""
        self.say(frames.ping(b"12345678", is_ack=False))
        return (await self.frames_until(FrameType.PING))[:-1]

    def kill(self) -> None:
        """The connection is gone."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Say no more."""
        self._writer.close()


class RawServer:
    """Takes connections, and greets; the rest is the test's."""

    def __init__(self, greeting: bytes) -> None:
        self.address = ""
        self.greeting = greeting
        self.num_accepted = 0
        self.closes_at_once = False
        self._accepted: asyncio.Queue[Accepted] = asyncio.Queue()
        self._all: list[Accepted] = []

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A client has connected."""
        self.num_accepted += 1
        one = Accepted(reader, writer)
        one.say(self.greeting)
        if self.closes_at_once:
            one.close()
        self._accepted.put_nowait(one)
        self._all.append(one)

    async def accept(self) -> Accepted:
        """The next connection."""
        one = await self._accepted.get()
        await one.skip_preface()
        return one

    def close(self) -> None:
        """Close all."""
        for one in self._all:
            one.kill()


@asynccontextmanager
async def raw_server(greeting: bytes = GREETING) -> AsyncGenerator[RawServer]:
    """One on a port that the kernel chose."""
    raw = RawServer(greeting)
    server = await asyncio.start_server(raw.take, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    raw.address = f"{host}:{port}"
    try:
        yield raw
    finally:
        raw.close()
        server.close()
        await server.wait_closed()
