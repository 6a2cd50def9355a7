"""Bytes, frames, and sequences of frames that no client in its right mind would send.

    python -m tests.frontend.edge.fuzz --frames 1000000 [--seed 1]
    python -m tests.frontend.edge.fuzz --seed 17 --keep "A title"

Hypothesis writes the scripts of `make test` (it shrinks them when one fails), which plays those of
`corpus` too; the long run draws its own, which is fifty times as fast. The second command adds one
of these to the corpus, without the steps that its failure does not need.

Whatever is said, after each step the connection's invariants hold, and:

- it took a bounded time for each frame;
- the client heard nothing that it must not hear, and all that it must (`ClientView`);
- what waits in it is what it was given to send, and windows are not open for it;
- a connection that is over says nothing more, and one that lived long keeps no more than others.

A step is what is done, a kind (of a frame) or a number, flags, a stream, and a payload:

    frame        say a frame; DATA with flag 0x40 is not consumed
    bytes        say the payload
    request      open the next stream, with so many CONTINUATIONs; flags: 1 it ends, 0x10 a body of
                 1000 bytes is announced, 0x20 a large field, 0x40 a malformed one, 0x80 the header
                 block is not ended
    trailers     say trailers; flags: 1 they end the stream, 0x40 they are malformed
    hold, split  say the next so many frames in one piece; what comes next in one piece more
    consume      what was not consumed of the stream
    answer       on the stream, or 0 for all, send the payload; flags instead of it: 1 want room,
                 2 reset, 4 expect the end; flags beside it: 8 end, 0x80 drain the connection
    wait         so many seconds; flag 1: with a sign of life after each
    mute         as the first step: do not greet
"""

import argparse
import gc
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from enum import Enum
from types import FunctionType, ModuleType
from typing import Final

from hypothesis import strategies as st

from tests.frontend.edge import corpus, fuzz_socket
from tests.frontend.edge.client_view import ClientView
from tests.frontend.edge.corpus import Step
from tests.frontend.edge.peer import GREETING, REQUEST, Peer
from unbroken.http2 import frames
from unbroken.http2.connection import DataReceived, Event, RequestReceived
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.rules import LIVENESS_PING

LIMITS: Final = EdgeLimits(
    streams_max=16,
    header_list_bytes_max=1000,
    header_frames_max=4,
    stream_window=40_000,
    connection_window=100_000,
    settings_burst=20,
    resets_burst=20,
    control_burst=200,
    header_timeout_s=1.5,
    request_timeout_s=2.0,
    stall_timeout_s=2.0,
)
"""So low that a script can reach each of them."""
FRAME_S_MAX: Final = 0.5
"""Longer for one frame is a hang."""
SCRIPT_STEPS_MAX: Final = 40
SCRIPTS_PER_SOCKETS: Final = 1000
NUM_SOCKETS: Final = 50
"""So many connections with their sockets and calls are played for so many scripts."""
LONG_SHARE: Final = 0.002
LONG_SCRIPT_STEPS: Final = 3000
"""Of few scripts: what a connection keeps must not grow with what it has done."""
HELD_BYTES_MAX: Final = 200_000
"""What a connection keeps at most, beside what waits to be sent."""
_WHATS: Final = (
    ("frame",) * 20
    + ("request",) * 12
    + ("answer",) * 8
    + ("wait",) * 2
    + ("trailers", "hold", "split", "consume", "consume")
)
_FLAGS: Final = {0: (0, 0, 0x40, 1), 6: (0, 1)}
_ANSWERS: Final = (0,) * 40 + (1, 2, 4, 8) * 5 + (9, 0x80)
_ANSWERED: Final = (b"", b"\0" * 5, b"x" * 100, b"x" * 16_384, b"x" * 40_000)
_REQUESTS: Final = (0, 0, 0, 1, 1, 1, 1, 0x10, 0x11, 0x20, 0x40)
_LONG_WHATS: Final = tuple(what for what in _WHATS if what != "trailers")
_LONG_REQUESTS: Final = tuple(flags for flags in _REQUESTS if flags < 0x20)
_LONG_ANSWERS: Final = tuple(flags for flags in _ANSWERS if flags < 0x80)
"""What a connection outlives."""

_STREAMS: Final = (0, 1, 2, 3, 5, 7, 9, 101, 2**31 - 1)
_PAYLOADS: Final = (
    b"",
    b"\0" * 4,
    b"\0\0\0\1",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\0" * 5,
    b"12345678",
    b"\0\4\xff\xff\xff\xff",
    b"\0\4\0\0\0\0",
    b"\0\1\0\0\0\0",
    b"\x82\x86\x84",
    b"\x82\x87\x44\x01/\x41\x01a\x40\x01b\x01c",
    b"\x00\x00\x00\x00\x05hello",
    b"x" * 1000,
    b"x" * 16_384,
)


_PLAUSIBLE: Final = (
    (0, True, (b"", b"x", b"x" * 1000, b"x" * 16_384, b"x" * 16_384)),
    (0, True, (b"x" * 100,)),
    (2, True, (b"\0" * 5,)),
    (3, True, (b"\0\0\0\x08",)),
    (4, False, (b"", b"\0\4\0\0\0\0", b"\0\4\0\0\0\x64", b"\0\4\0\2\0\0", b"\0\1\0\0\0\0")),
    (6, False, (b"12345678", b"draining")),
    (8, False, (b"\0\0\0\1", b"\0\0\xff\xff")),
    (8, True, (b"\0\0\0\1", b"\0\0\xff\xff")),
    (11, True, (b"", b"unknown")),
)
"""Kinds of frames, whether they belong to a stream, and payloads."""


def steps() -> st.SearchStrategy[list[Step]]:
    """Scripts."""
    stream = st.sampled_from(_STREAMS) | st.integers(0, 2**32 - 1)
    payload = st.sampled_from(_PAYLOADS) | st.binary(max_size=64)
    step = st.tuples(
        st.sampled_from(["frame", "frame", *sorted({*_WHATS, "bytes"})]),
        st.integers(0, 11),
        st.integers(0, 255),
        stream,
        payload,
    )
    return st.lists(step, max_size=SCRIPT_STEPS_MAX)


def draw_steps(source: random.Random) -> list[Step]:
    """A script, without Hypothesis. Most of it is plausible, else no connection lives for long."""
    if source.random() < LONG_SHARE:
        return draw_long(source)
    is_wild = source.random() < 0.3
    num_steps = source.randrange(1, SCRIPT_STEPS_MAX)
    return _draw(source, num_steps, wild_share=0.5 if is_wild else 0.02, is_long=False)


def draw_long(source: random.Random) -> list[Step]:
    """A script without what ends a connection soon."""
    return _draw(source, LONG_SCRIPT_STEPS, wild_share=0.0, is_long=True)


def _draw(source: random.Random, num_steps: int, *, wild_share: float, is_long: bool) -> list[Step]:
    script: list[Step] = []
    whats = _LONG_WHATS if is_long else _WHATS
    requests = _LONG_REQUESTS if is_long else _REQUESTS
    answers = _LONG_ANSWERS if is_long else _ANSWERS
    num_requests = 0 if wild_share > 0.1 else 4
    script += [("request", 0, 0, 0, b"")] * num_requests
    for _ in range(num_steps):
        what = source.choice(whats)
        if source.random() < wild_share:
            script.append(_draw_wild(source, what))
            continue
        newest = max(7, 2 * num_requests - 1)
        stream_id = newest - 2 * source.randrange(4)
        kind, is_streams, payloads = source.choice(_PLAUSIBLE)
        flags = source.choice(_FLAGS.get(kind, (0, 0, 4, 8, 0x10)))
        if what == "request":
            num_requests += 1
            kind = source.choice((0, 0, 0, 0, 1, 2))
            flags = source.choice(requests)
        elif what == "answer":
            stream_id, flags = source.choice((0, stream_id)), source.choice(answers)
            payloads = _ANSWERED
        elif what == "wait":
            kind, flags = source.randrange(4), source.random() < 0.8 or is_long
        elif what in ("hold", "split"):
            kind = source.randrange(4)
        elif what == "frame" and not is_streams:
            stream_id = 0
        script.append((what, kind, flags, stream_id, source.choice(payloads)))
    return script


def _draw_wild(source: random.Random, what: str) -> Step:
    payload = source.choice(_PAYLOADS)
    if source.random() < 0.3:
        payload = source.randbytes(source.randrange(40))
        what = source.choice((what, "bytes"))
    flags = source.choice((0, 0, 1, 4, 5, 8, 0x2D, source.randrange(256)))
    stream_id = source.choice(_STREAMS)
    if source.random() < 0.1:
        stream_id = source.getrandbits(32)
    return what, source.randrange(12), flags, stream_id, payload


def play(script: Sequence[Step]) -> int:
    """Say it all; the number of frames said. Raises what goes wrong."""
    conversation = _Conversation()
    if not (script and script[0][0] == "mute"):
        conversation.say(GREETING + frames.frame(FrameType.SETTINGS, frames.ACK, 0))
    for step in script:
        conversation.take(*step)
        if conversation.is_over:
            break
    else:
        conversation.say_held()
    conversation.finish()
    return conversation.num_frames


_SIGN_OF_LIFE: Final = frames.ping(LIVENESS_PING, is_ack=True)


class _Conversation:
    """One connection, and the client that says what a script wants."""

    def __init__(self) -> None:
        self._peer = Peer(LIMITS, greets=False)
        self._connection = self._peer.connection
        self._view = ClientView(LIMITS)
        self._view.hears(self._connection.take_outbound())
        self._requests: dict[int, bool] = {}
        """Streams of which the server was told, and whether their answer was begun."""
        self._next_id = 1
        self._num_held = 0
        """Frames that are yet to be held."""
        self._held = b""
        self._num_pieces = 1
        """In so many is said what comes next."""
        self._consumes = True
        self.num_frames = 0

    @property
    def is_over(self) -> bool:
        """Nothing more is heard."""
        return self._connection.is_over

    def take(self, what: str, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One step."""
        self._consumes = not flags & 0x40
        said = b""
        match what:
            case "wait":
                for _ in range(kind):
                    self._peer.wait(1.0)
                    if flags & 1 and not self.is_over:
                        self.say(_SIGN_OF_LIFE)
            case "answer":
                for each in [stream_id] if stream_id else list(self._requests):
                    self._answer(each, flags, payload)
                if flags & 128:
                    self._connection.drain(self._peer.now)
            case "consume":
                if (stream := self._view.open.get(stream_id)) is not None:
                    self._consume(stream_id, stream.kept)
            case "hold":
                self.say_held()
                self._num_held = kind
            case "split":
                self._num_pieces = kind + 1
            case "request":
                said = self._request(kind, flags)
            case "trailers":
                fields = [(b":path" if flags & 0x40 else b"x-sum", b"1")]
                said = self._peer.headers(stream_id, fields, ends=bool(flags & 1))
            case "bytes":
                said = payload
            case "mute":
                pass
            case _:
                said = frames.frame(FrameType.DATA, flags, stream_id, payload)
                said = said[:3] + bytes((kind,)) + said[4:]
        self.num_frames += 1
        if said and self._num_held:
            self._num_held -= 1
            self._held += said
            if self._num_held:
                return
            said, self._held = self._held, b""
        if self._num_pieces == 1 or not said:
            self.say(said)
            return
        size = len(said) // self._num_pieces + 1
        self._num_pieces = 1
        for begin in range(0, len(said), size):
            if not self.is_over:
                self.say(said[begin : begin + size])

    def say_held(self) -> None:
        """What was held, and nothing comes after it."""
        said, self._held = self._held, b""
        self.say(said)

    def say(self, said: bytes) -> None:
        """Bytes, in one piece; what comes of them is compared with what the client knows."""
        connection, view = self._connection, self._view
        events: list[Event] = []
        if said:
            view.says(said)
            begin = time.process_time()
            events = self._peer.say(said)
            took = time.process_time() - begin
            assert took < FRAME_S_MAX, f"{len(said)} bytes took {took:.2f} s"
        for event in events:
            if isinstance(event, RequestReceived):
                self._requests[event.stream_id] = False
            elif isinstance(event, DataReceived):
                if (stream := view.open.get(event.stream_id)) is not None:
                    stream.kept += len(event.data)
                if self._consumes:
                    self._consume(event.stream_id, len(event.data))
        if connection.outbound:
            view.hears(connection.take_outbound())
        if not connection.is_over:
            view.settle(connection)

    def finish(self) -> None:
        """All has been said."""
        if self.is_over:
            assert not self._peer.say(frames.ping(b"too late", is_ack=False))
            assert not self._connection.outbound, "who is over says nothing more"
        elif self.num_frames > SCRIPT_STEPS_MAX:
            self._peer.events.clear()  # Of the test.
            # A bytearray takes an eighth more than is in it.
            waiting = self._connection.num_pending_bytes * 9 // 8
            held = held_bytes(self._connection) - waiting
            assert held < HELD_BYTES_MAX, f"{held} bytes are held after {self.num_frames} frames"

    def _consume(self, stream_id: int, num_bytes: int) -> None:
        self._connection.consumed(stream_id, num_bytes)
        if (stream := self._view.open.get(stream_id)) is not None:
            stream.kept -= num_bytes

    def _request(self, num_more: int, flags: int) -> bytes:
        fields = list(REQUEST)
        if flags & 0x10:
            fields.append((b"content-length", b"1000"))
        if flags & 0x20:
            fields.append((b"x-large", b"x" * LIMITS.header_list_bytes_max))
        if flags & 0x40:
            fields.append((b"Upper", b"x"))
        stream_id, self._next_id = self._next_id, self._next_id + 2
        if flags & 0x80:  # It has no end.
            block = self._peer.encoder.encode(fields)
            return frames.frame(FrameType.HEADERS, flags & frames.END_STREAM, stream_id, block)
        if not num_more:
            return self._peer.headers(stream_id, fields, ends=bool(flags & 1))
        block = self._peer.encoder.encode(fields)
        size = len(block) // (num_more + 1) + 1
        said = frames.frame(FrameType.HEADERS, flags & frames.END_STREAM, stream_id, block[:size])
        for begin in range(size, size * num_more + 1, size):
            last = frames.END_HEADERS if begin == size * num_more else 0
            part = block[begin : begin + size]
            said += frames.frame(FrameType.CONTINUATION, last, stream_id, part)
        return said

    def _answer(self, stream_id: int, flags: int, payload: bytes) -> None:
        connection, now = self._connection, self._peer.now
        stream = connection.stream(stream_id)
        if stream is not None and stream.trailers is not None:
            return  # All has been given.
        is_begun = self._requests.get(stream_id, True)
        if flags & 1:
            connection.want_room(stream_id, now)
        elif flags & 2:
            connection.reset(stream_id, ErrorCode.CANCEL)
        elif flags & 4:
            connection.expect_end(stream_id, now)
        else:
            if not is_begun:
                connection.send_headers(stream_id, [(b":status", b"200")])
                self._requests[stream_id] = is_begun = True
            if (known := self._view.open.get(stream_id)) is not None:
                known.given += len(payload)
            connection.send_data(stream_id, payload, now)
        if flags & 8:
            fields = [(b"grpc-status", b"0")]
            connection.end(stream_id, fields if is_begun else [(b":status", b"200"), *fields])
            self._requests[stream_id] = True


def held_bytes(root: object) -> int:
    """What an object keeps alive, but for what belongs to the program."""
    seen: set[int] = set()
    waiting, total = [root], 0
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | FunctionType | Enum):
            continue
        seen.add(id(each))
        total += sys.getsizeof(each)
        waiting += gc.get_referents(each)
    return total


def shrunk(script: Sequence[Step]) -> list[Step]:
    """Without the steps that a failure does not need."""
    left = list(script)
    failure = _failure(left)
    index = 0
    while failure and index < len(left):
        without = left[:index] + left[index + 1 :]
        if _failure(without) == failure:
            left = without
        else:
            index += 1
    return left


def _failure(script: Sequence[Step]) -> str:
    try:
        play(script)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="TITLE", help="add the script of the seed to the corpus")
    arguments = parser.parse_args()
    seed = arguments.seed
    if arguments.keep:
        corpus.add(arguments.keep, shrunk(draw_steps(random.Random(seed))))
        return
    begin = time.monotonic()
    num_frames = num_scripts = num_sockets = 0
    failure = ""
    rss_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while num_frames < arguments.frames:
        try:
            num_frames += play(draw_steps(random.Random(seed)))
        except Exception as error:
            failure = f"seed {seed}: {type(error).__name__}: {error}"
            break
        num_scripts += 1
        seed += 1
        if num_scripts % SCRIPTS_PER_SOCKETS == 0:
            try:
                fuzz_socket.play(range(seed, seed + NUM_SOCKETS))
            except AssertionError as error:
                failure = str(error)
                break
            num_sockets += NUM_SOCKETS
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_kb
    is_ok = not failure and grown_kb < 100_000
    figures = {
        "ok": is_ok,
        "frames": num_frames,
        "scripts": num_scripts,
        "sockets": num_sockets,
        "seconds": round(time.monotonic() - begin, 1),
        "rss_grown_mb": round(grown_kb / 1024, 1),
        "failure": failure,
    }
    print(json.dumps(figures))  # noqa: T201 - The line that ends every proof.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
