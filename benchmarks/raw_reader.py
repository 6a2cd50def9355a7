"""A client process that costs little: reads streams over its own bare HTTP/2, for some seconds.

    python -m benchmarks.raw_reader ADDRESS --streams 256 --connections 16 --seconds 3

Prints "begin" when every stream flows (if they do not soon, it says so and ends), then, after so
many seconds, "end", and one line of JSON with what came in between. It takes whatever is sent: its
windows are as large as they can be. `--asks openai` reads server-sent events of /v1/completions
instead of InferenceService, whose words are "t" and the stamp (benchmarks/peers.py).
"""

import argparse
import asyncio
import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol, cast

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
_OPENAI_TOKENS_MAX: Final = 500_000
_TEXT: Final = b'"text":"'
_SETTING: Final = struct.Struct(">HI")
_STREAMS_MAX: Final = 3
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
    refused: str = ""
    """Why not all streams can flow."""
    is_counting: bool = False
    ages_s: list[float] = field(default_factory=list[float])


class Stream(Protocol):
    """What is read from one stream."""

    def feed(self, payload: bytes, seen: Seen) -> None:
        """The next bytes of its body."""
        ...


class GrpcStream:
    """Messages of InferenceService.Generate."""

    FIELDS: Final = (
        (b":path", b"/unbroken.v1.InferenceService/Generate"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )

    def __init__(self) -> None:
        self._body = b""
        self._offset = 0

    @staticmethod
    def request(index: int) -> bytes:
        """The body that asks for it."""
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[index % 250, 1, 2]))
        request.params.sampling.temperature = 0.0
        request.params.stopping.ignore_eos = True
        message = request.SerializeToString()
        return _PREFIX.pack(0, len(message)) + message

    def feed(self, payload: bytes, seen: Seen) -> None:
        body = self._body + payload
        at = 0
        while len(body) - at >= 5:
            _, size = _PREFIX.unpack_from(body, at)
            if len(body) - at - 5 < size:
                break
            message = pb.GenerateResponse.FromString(body[at + 5 : at + 5 + size])
            at += 5 + size
            ids = message.token_ids
            if not ids:
                continue
            before = self._offset
            seen.gaps += message.offset != before
            after = self._offset = message.offset + len(ids)
            seen.num_warm += before < _WARM_UP_TOKENS <= after
            if seen.is_counting:
                seen.messages += 1
                seen.tokens += len(ids)
                seen.ages_s.append(age_s(ids[0]))
        self._body = body[at:]


class OpenAiStream:
    """Server-sent events of /v1/completions."""

    FIELDS: Final = ((b":path", b"/v1/completions"), (b"content-type", b"application/json"))

    def __init__(self) -> None:
        self._body = b""
        self._num_tokens = 0

    @staticmethod
    def request(index: int) -> bytes:
        """The body that asks for it."""
        asked = {
            "model": "m",
            "prompt": f"t{index} t1 t2",
            "max_tokens": _OPENAI_TOKENS_MAX,
            "stream": True,
            "ignore_eos": True,
        }
        return json.dumps(asked).encode()

    def feed(self, payload: bytes, seen: Seen) -> None:
        *events, self._body = (self._body + payload).split(b"\n\n")
        for event in events:
            at = event.find(_TEXT)
            if at < 0:
                seen.gaps += event.startswith(b"data: {") and b"error" in event
                continue
            at += len(_TEXT)
            words = event[at : event.index(b'"', at)].split()
            if not words:
                continue
            before = self._num_tokens
            after = self._num_tokens = before + len(words)
            seen.num_warm += before < _WARM_UP_TOKENS <= after
            if seen.is_counting:
                seen.messages += 1
                seen.tokens += len(words)
                seen.ages_s.append(age_s(int(words[0][1:])))


ASKS: Final[Mapping[str, type[GrpcStream | OpenAiStream]]] = {
    "unbroken": GrpcStream,
    "openai": OpenAiStream,
}
"""Which API is spoken."""


class Connection(asyncio.Protocol):
    """One connection with some streams."""

    def __init__(self, seen: Seen, indexes: range, asks: type[GrpcStream | OpenAiStream]) -> None:
        self._seen = seen
        self._indexes = indexes
        self._asks = asks
        self._buffer = b""
        self._streams: dict[int, Stream] = {}
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
                    (b":authority", b"bench"),
                    *self._asks.FIELDS,
                ]
            )
            body = self._asks.request(index)
            out.append(_HEADER.pack(len(block) << 8 | 1, 4, stream_id) + block)
            out.append(_HEADER.pack(len(body) << 8, 1, stream_id) + body)
            self._streams[stream_id] = self._asks()
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
                self._streams[stream_id].feed(payload, self._seen)
            elif kind == 3 or (kind == 1 and flags & 1):
                self._seen.ended += 1
            elif kind == 4 and not flags & 1:
                self._settings(payload)
                self._write(b"\0\0\0\x04\x01\0\0\0\0")
            elif kind == 6 and not flags & 1:
                self._write(b"\0\0\x08\x06\x01\0\0\0\0" + payload)
        self._buffer = buffer[at:]

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _settings(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            number, value = _SETTING.unpack_from(payload, at)
            if number == _STREAMS_MAX and value < len(self._indexes):
                self._seen.refused = f"it takes {value} streams on a connection"


async def read(
    address: str, streams: int, connections: int, seconds: float, asks: str = "unbroken"
) -> Seen:
    """Read so many streams over so many connections, for so long."""
    seen = Seen()
    loop = asyncio.get_running_loop()
    host, port = split_address(address)
    share = streams // connections
    for number in range(connections):
        indexes = range(number * share, (number + 1) * share)
        await loop.create_connection(
            lambda indexes=indexes: Connection(seen, indexes, ASKS[asks]), host, port
        )
    try:
        async with asyncio.timeout(_WARM_UP_S_MAX):
            while seen.num_warm < share * connections:
                await asyncio.sleep(0.01)
                if seen.refused or seen.ended:
                    _give_up(seen.refused or f"{seen.ended} streams ended at once")
    except TimeoutError:
        _give_up(f"only {seen.num_warm} streams flow")
    print("begin", flush=True)  # noqa: T201
    seen.is_counting = True
    await asyncio.sleep(seconds)
    seen.is_counting = False
    print("end", flush=True)  # noqa: T201
    return seen


def _give_up(reason: str) -> NoReturn:
    print(reason, flush=True)  # noqa: T201
    sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--asks", choices=ASKS, default="unbroken")
    given = parser.parse_args()
    seen = uvloop.run(
        read(given.address, given.streams, given.connections, given.seconds, given.asks)
    )
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
