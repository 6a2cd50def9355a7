"""A client on a real socket that says bytes of the test's choosing."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from hpack import Decoder, Encoder

from tests.frontend.edge.peer import GREETING, REQUEST, Frame, data
from unbroken.config import split_address
from unbroken.http2 import frames
from unbroken.http2.frames import FrameType
from unbroken.http2.headers import Fields
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = Encoder()
        self._decoder = Decoder()

    def say(self, *parts: bytes) -> None:
        """Bytes."""
        self._writer.write(b"".join(parts))

    def request(self, stream_id: int, fields: Fields = REQUEST, *, ends: bool = False) -> None:
        """A header section."""
        self.say(frames.headers(stream_id, self._encoder.encode(list(fields)), ends=ends))

    def generate(self, stream_id: int, request: pb.GenerateRequest) -> None:
        """A whole call of Generate."""
        self.request(stream_id)
        message = request.SerializeToString()
        self.say(data(stream_id, PREFIX.pack(0, len(message)) + message, ends=True))

    async def frame(self) -> Frame | None:
        """The next frame; None at the end of the connection."""
        try:
            header = await self._reader.readexactly(frames.HEADER_BYTES)
            length, kind, flags, stream_id = frames.parse_header(header, 0)
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Frame(kind, flags, stream_id, payload)

    async def frames_until(self, kind: FrameType) -> list[Frame]:
        """Frames up to the first of that kind, or the end of the connection."""
        found: list[Frame] = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
            if frame.kind == kind:
                break
        return found

    def fields(self, frame: Frame) -> list[tuple[bytes, bytes]]:
        """The header section in a frame; all have to be decoded, in their order."""
        return [(name, value) for name, value in self._decoder.decode(frame.payload, raw=True)]

    async def answer(self, stream_id: int) -> dict[bytes, bytes]:
        """All header fields of the answer on that stream, which has to come to its end."""
        fields: dict[bytes, bytes] = {}
        while (frame := await self.frame()) is not None:
            if frame.kind == FrameType.HEADERS:
                decoded = self._decoder.decode(frame.payload, raw=True)
                if frame.stream_id == stream_id:
                    fields.update(decoded)
                    if frame.flags & frames.END_STREAM:
                        return fields
        raise AssertionError("expected an answer, the connection ended")

    async def until_data(self, stream_id: int) -> None:
        """Read on that stream what is before its first message, and that."""
        while (frame := await self.frame()) is not None:
            if frame.kind == FrameType.HEADERS:
                self._decoder.decode(frame.payload, raw=True)
            elif frame.kind == FrameType.DATA and frame.stream_id == stream_id:
                return
        raise AssertionError("expected a message, the connection ended")

    async def until_closed(self) -> Sequence[Frame]:
        """Everything up to the end of the connection."""
        found: list[Frame] = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
        return found


@asynccontextmanager
async def connect(address: str, *, greets: bool = True) -> AsyncGenerator[RawClient]:
    """A connection in the clear."""
    reader, writer = await asyncio.open_connection(*split_address(address))
    client = RawClient(reader, writer)
    try:
        if greets:
            client.say(GREETING)
        yield client
    finally:
        writer.close()
