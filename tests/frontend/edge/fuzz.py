"""Bytes, frames, and sequences of frames that no client in its right mind would send.

    python -m tests.frontend.edge.fuzz --frames 1000000 [--seed 1]

Hypothesis writes the scripts of `make test` (it shrinks them when one fails); the long run draws
its own, which is fifty times as fast. Whatever is said, after each step the connection's invariants
hold, and at the end:

- it took a bounded time for each frame;
- what waits in it is bounded;
- a connection that is over says nothing more;
- every frame that it sent is whole, and no answer went to a stream that was closed.
"""

import argparse
import json
import random
import resource
import sys
import time
from typing import Final, TypeAlias

from hypothesis import strategies as st

from tests.frontend.edge.peer import REQUEST, Peer, parse
from unbroken.http2 import frames
from unbroken.http2.connection import DataReceived, RequestReceived
from unbroken.http2.frames import ErrorCode, FrameType
from unbroken.http2.limits import EdgeLimits

Step: TypeAlias = tuple[str, int, int, int, bytes]
"""What (frame, bytes, request, answer, wait), kind or size, flags, stream, payload."""

LIMITS: Final = EdgeLimits(
    streams_max=16, stream_window=40_000, connection_window=100_000, control_burst=500
)
FRAME_S_MAX: Final = 0.5
"""Longer for one frame is a hang."""
SCRIPT_STEPS_MAX: Final = 40

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
    (0, True, (b"", b"x", b"x" * 1000, b"x" * 16_384)),
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
        st.sampled_from(["frame", "frame", "frame", "request", "answer", "wait", "bytes"]),
        st.integers(0, 11),
        st.integers(0, 255),
        stream,
        payload,
    )
    return st.lists(step, max_size=SCRIPT_STEPS_MAX)


def draw_steps(source: random.Random) -> list[Step]:
    """A script, without Hypothesis. Most of it is plausible, else no connection lives for long."""
    script: list[Step] = []
    is_wild = source.random() < 0.3
    if not is_wild:
        script += [("request", 0, 0, 0, b"")] * 4
    for _ in range(source.randrange(1, SCRIPT_STEPS_MAX)):
        what = source.choice(("frame",) * 10 + ("request",) * 6 + ("answer",) * 4 + ("wait",))
        if source.random() < (0.5 if is_wild else 0.02):
            payload = source.choice(_PAYLOADS)
            if source.random() < 0.3:
                payload = source.randbytes(source.randrange(40))
                what = source.choice((what, "bytes"))
            flags = source.choice((0, 0, 1, 4, 5, 8, 0x2D, source.randrange(256)))
            stream_id = source.choice(_STREAMS)
            if source.random() < 0.1:
                stream_id = source.getrandbits(32)
            script.append((what, source.randrange(12), flags, stream_id, payload))
            continue
        kind, is_streams, payloads = source.choice(_PLAUSIBLE)
        stream_id = source.choice((1, 3, 5, 7)) if is_streams else 0
        flags = source.choice((0, 1)) if kind in (0, 6) else source.choice((0, 0, 4, 8, 0x10))
        if what != "frame":
            kind = source.randrange(4)
        script.append((what, kind, flags, stream_id, source.choice(payloads)))
    return script


def play(script: list[Step]) -> int:
    """Say it all; the number of frames said. Raises what goes wrong."""
    peer = Peer(LIMITS)
    connection = peer.connection
    open_streams: set[int] = set()
    num_frames, next_id = 0, 1
    for what, kind, flags, stream_id, payload in script:
        if what == "wait":
            peer.wait(kind * 1.0)
            said = b""
        elif what == "answer":
            _answer(peer, open_streams, flags, payload)
            said = b""
        elif what == "request":
            said = peer.headers(next_id, REQUEST, ends=bool(flags & 1))
            next_id += 2
        elif what == "bytes":
            said = payload
        else:
            said = frames.frame(FrameType.DATA, flags, stream_id, payload)
            said = said[:3] + bytes((kind,)) + said[4:]
        begin = time.process_time()
        events = peer.say(said)
        took = time.process_time() - begin
        assert took < FRAME_S_MAX, f"{what} took {took:.2f} s"
        num_frames += 1
        for event in events:
            if isinstance(event, RequestReceived):
                open_streams.add(event.stream_id)
            elif isinstance(event, DataReceived) and kind % 2:
                connection.consumed(event.stream_id, len(event.data))
        assert connection.num_pending_bytes <= 64 * SCRIPT_STEPS_MAX * 16_384
        parse(bytes(connection.outbound))
        if connection.is_over:
            connection.take_outbound()
            assert not peer.say(frames.ping(payload[:8].ljust(8), is_ack=False))
            assert not connection.outbound, "who is over says nothing more"
            break
    return num_frames


def _answer(peer: Peer, open_streams: set[int], flags: int, payload: bytes) -> None:
    connection = peer.connection
    for stream_id in sorted(open_streams):
        if flags & 1:
            connection.want_room(stream_id, peer.now)
        elif flags & 2:
            connection.reset(stream_id, ErrorCode.CANCEL)
        elif flags & 4:
            connection.expect_end(stream_id, peer.now)
        else:
            connection.send_headers(stream_id, [(b":status", b"200")])
            connection.send_data(stream_id, payload, peer.now)
        if flags & 8:
            connection.end(stream_id, [(b"grpc-status", b"0")])
    if flags & 128:
        connection.drain(peer.now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.monotonic()
    num_frames = num_scripts = 0
    failure = ""
    seed = arguments.seed
    rss_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while num_frames < arguments.frames:
        try:
            num_frames += play(draw_steps(random.Random(seed)))
        except Exception as error:
            failure = f"seed {seed}: {type(error).__name__}: {error}"
            break
        num_scripts += 1
        seed += 1
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_kb
    is_ok = not failure and grown_kb < 100_000
    figures = {
        "ok": is_ok,
        "frames": num_frames,
        "scripts": num_scripts,
        "seconds": round(time.monotonic() - begin, 1),
        "rss_grown_mb": round(grown_kb / 1024, 1),
        "failure": failure,
    }
    print(json.dumps(figures))  # noqa: T201 - The line that ends every proof.
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
