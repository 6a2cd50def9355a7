"""Where clients of a simulated frontend read what rides in a convoy: one connection for all."""

from collections.abc import Callable
from typing import Final, Self

from frontend.convoy import Call, Ride
from frontend.edge.encoding import TokenBodies, TokenFields
from frontend.stream import Piece, Stream
from tests.frontend.edge.peer import Peer
from tests.support.vocabulary import tokenizer
from unbroken.http2 import frames
from unbroken.http2.connection import Connection
from unbroken.http2.frames import FrameType
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2

_BODIES: Final = TokenBodies(TokenFields(tokenizer().texts), answers_resume=False)


class Clients:
    """Those of one frontend. They read at once."""

    is_paused = False
    is_scheduled = False

    def __init__(self) -> None:
        self._peer = Peer()
        self._hear: dict[int, Callable[[Piece], None]] = {}

    @property
    def connection(self) -> Connection:
        """The frontend's end."""
        return self._peer.connection

    def send_frames(
        self,
        data: bytes,
        num_frames: int,
        num_body_bytes: int,
        *,
        is_all: bool,  # noqa: ARG002 - it is delivered later anyway.
    ) -> bool:
        """Until `deliver`, as far as the connection's window takes them."""
        if num_body_bytes > self.connection.send_window.left:
            return False
        self.connection.count_frames(num_frames, num_body_bytes)
        self.connection.outbound += data
        return True

    @property
    def edge(self) -> Self:
        """There is no other connection."""
        return self

    def send_now(self, data: bytes) -> None:
        """Until `deliver`."""
        self.connection.outbound += data

    send_later = send_now

    def ride(self, stream: Stream, call: Call, hear: Callable[[Piece], None]) -> Ride:
        """By which a stream's tokens go to its client, who hears them so."""
        stream_id = 2 * len(self._hear) + 1
        self._peer.open(stream_id)
        http_stream = self.connection.stream(stream_id)
        assert http_stream is not None, "it was opened"
        self._hear[stream_id] = hear
        return Ride(stream, self, http_stream, _BODIES, call)

    def deliver(self) -> None:
        """What was sent arrives."""
        num_bytes = 0
        for frame in self._peer.heard():
            if frame.kind == FrameType.DATA:
                num_bytes += len(frame.payload)
                said = inference_service_pb2.GenerateResponse()
                said.ParseFromString(frame.payload[PREFIX.size :])
                piece = Piece(said.offset, list(said.token_ids), said.text, ())
                self._hear[frame.stream_id](piece)
        if num_bytes:
            self._peer.say(frames.window_update(0, num_bytes))
