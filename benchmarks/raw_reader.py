"""A client process that costs little: reads streams over its own bare HTTP/2, for some seconds.

    python -m benchmarks.raw_reader ADDRESS --streams 256 --connections 16 --seconds 3

Prints "begin" when every stream flows (it ends if they do not soon), then, after so many seconds,
one line of JSON with what came in between. It takes whatever is sent: its windows are as large as
they can be.
"""

import argparse
import asyncio
import json
import struct
import sys
from dataclasses import dataclass, field
from typing import Final, cast

import uvloop
from hpack import Encoder
from typing_extensions import override

from benchmarks.stamps import age_s
from unbroken.config import split_address
from unbroken.v1 import inference_service_pb2 as pb

_HEADER: Final = struct.Struct(">IBI")
_PREFIX: Final = struct.Struct(">BI")
_WARM_UP_TOKENS: Final = 25
_WARM_UP_S_MAX: Final = 8.0
_WINDOW_MAX: Final = 2**31 - 1
_GREETING: Final = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + b"\0\0\x06\x04\0\0\0\0\0"
    + struct.pack(">HI", 4, _WINDOW_MAX)
    + b"\0\0\x04\x08\0\0\0\0\0"
    + struct.pack(">I", _WINDOW_MAX - 65_535)
)


@dataclass(slots=True)
class Seen:
    """What all streams saw together."""

    tokens: int = 0
    messages: int = 0
    ended: int = 0
    gaps: int = 0
    """Messages that did not begin where the one before had ended."""
    num_warm: int = 0
    is_counting: bool = False
    ages_s: list[float] = field(default_factory=list[float])


class Connection(asyncio.Protocol):
    """One connection with some streams."""

    def __init__(self, seen: Seen, indexes: range) -> None:
        self._seen = seen
        self._indexes = indexes
        self._buffer = b""
        self._bodies: dict[int, bytes] = {}
        self._offsets: dict[int, int] = {}
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        encoder = Encoder()
        out = [_GREETING]
        for number, index in enumerate(self._indexes):
            stream_id = 2 * number + 1
            block = encoder.encode(
                [
                    (b":method", b"POST"),
                    (b":scheme", b"http"),
                    (b":path", b"/unbroken.v1.InferenceService/Generate"),
                    (b":authority", b"bench"),
                    (b"content-type", b"application/grpc"),
                    (b"te", b"trailers"),
                ]
            )
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[index % 250, 1, 2]))
            request.params.sampling.temperature = 0.0
            request.params.stopping.ignore_eos = True
            message = request.SerializeToString()
            body = _PREFIX.pack(0, len(message)) + message
            out.append(_HEADER.pack(len(block) << 8 | 1, 4, stream_id) + block)
            out.append(_HEADER.pack(len(body) << 8, 1, stream_id) + body)
            self._bodies[stream_id] = b""
            self._offsets[stream_id] = 0
        self._write(b"".join(out))

    @override
    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at, end = 0, len(buffer)
        while end - at >= 9:
            length_and_kind, flags, stream_id = _HEADER.unpack_from(buffer, at)
            length, kind = length_and_kind >> 8, length_and_kind & 0xFF
            if end - at - 9 < length:
                break
            payload = buffer[at + 9 : at + 9 + length]
            at += 9 + length
            if kind == 0:
                self._body(stream_id, payload)
            elif kind == 1 and flags & 1:
                self._seen.ended += 1
            elif kind == 4 and not flags & 1:
                self._write(b"\0\0\0\x04\x01\0\0\0\0")
            elif kind == 6 and not flags & 1:
                self._write(b"\0\0\x08\x06\x01\0\0\0\0" + payload)
        self._buffer = buffer[at:]

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _body(self, stream_id: int, payload: bytes) -> None:
        body = self._bodies[stream_id] + payload
        at = 0
        seen = self._seen
        while len(body) - at >= 5:
            _, size = _PREFIX.unpack_from(body, at)
            if len(body) - at - 5 < size:
                break
            message = pb.GenerateResponse.FromString(body[at + 5 : at + 5 + size])
            at += 5 + size
            ids = message.token_ids
            if not ids:
                continue
            before = self._offsets[stream_id]
            seen.gaps += message.offset != before
            after = self._offsets[stream_id] = message.offset + len(ids)
            seen.num_warm += before < _WARM_UP_TOKENS <= after
            if seen.is_counting:
                seen.messages += 1
                seen.tokens += len(ids)
                seen.ages_s.append(age_s(ids[0]))
        self._bodies[stream_id] = body[at:]


async def read(address: str, streams: int, connections: int, seconds: float) -> Seen:
    """Read so many streams over so many connections, for so long."""
    seen = Seen()
    loop = asyncio.get_running_loop()
    host, port = split_address(address)
    share = streams // connections
    for number in range(connections):
        indexes = range(number * share, (number + 1) * share)
        await loop.create_connection(lambda indexes=indexes: Connection(seen, indexes), host, port)
    try:
        async with asyncio.timeout(_WARM_UP_S_MAX):
            while seen.num_warm < share * connections:  # noqa: ASYNC110 - Counted in the hot path.
                await asyncio.sleep(0.01)
    except TimeoutError:
        sys.exit(f"only {seen.num_warm} streams flow")
    print("begin", flush=True)  # noqa: T201
    seen.is_counting = True
    await asyncio.sleep(seconds)
    seen.is_counting = False
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    seen = uvloop.run(read(given.address, given.streams, given.connections, given.seconds))
    ages = sorted(seen.ages_s) or [0.0]
    figures = {
        "tokens": seen.tokens,
        "messages": seen.messages,
        "ended": seen.ended,
        "gaps": seen.gaps,
        "age_ms_p50": round(ages[len(ages) // 2] * 1e3, 2),
        "age_ms_p99": round(ages[int(len(ages) * 0.99)] * 1e3, 2),
    }
    print(json.dumps(figures), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
