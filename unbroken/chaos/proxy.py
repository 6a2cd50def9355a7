"""A TCP proxy that hurts what passes it, in Toxiproxy's words.

    async with Proxy("127.0.0.1:7400") as proxy:
        ...                             # Connect to proxy.address instead.
        proxy.add(Timeout())            # A blackhole, both ways, connections stay open.
        proxy.add(Latency(0.1, 0.02), Direction.DOWNSTREAM)
        proxy.clear()

Upstream is from the client to the server, downstream is back. A toxic of one direction leaves the
other alone, so links can be cut one way. Toxics apply to connections that exist, and to new ones.

Toxiproxy's `timeout` throws away what comes; ours keeps it and delivers it when the toxic is
removed, because that is what a network does that heals: TCP sends again. What the proxy takes in
it acknowledges, so a peer's kernel never sees a loss; for that there are network namespaces.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Self, TypeAlias

from unbroken.config import split_address

HELD_BYTES_MAX: Final = 1024 * 1024
"""A direction takes in so much before it is delivered; then its sender feels it."""

_CHUNK: Final = 64 * 1024
_LINGER_NONE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 s: closing sends RST."""


class Direction(Enum):
    """Which way bytes go."""

    UPSTREAM = "upstream"
    """From the client to the server."""
    DOWNSTREAM = "downstream"
    """From the server to the client."""


BOTH: Final = (Direction.UPSTREAM, Direction.DOWNSTREAM)


@dataclass(frozen=True, slots=True)
class Latency:
    """Everything comes later, in order."""

    latency_s: float
    jitter_s: float = 0.0
    """Plus or minus so much, for each piece."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """So many bytes a second."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class SlowClose:
    """A connection that one side closes stays open for the other, for a while."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Timeout:
    """Nothing passes. After `timeout_s` the connection is closed; with 0 never (a blackhole)."""

    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ResetPeer:
    """Connections end with RST, after `timeout_s`; new ones too."""

    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Slicer:
    """Data come in small pieces."""

    size_average: int
    size_variation: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LimitData:
    """A connection is closed when so many bytes have passed."""

    num_bytes: int


Toxic: TypeAlias = Latency | Bandwidth | SlowClose | Timeout | ResetPeer | Slicer | LimitData


@dataclass(slots=True)
class Traffic:
    """What happened in one direction, over all connections."""

    bytes_received: int = 0
    bytes_delivered: int = 0

    @property
    def bytes_held(self) -> int:
        """Taken in and not delivered; what was lost with its connection counts too."""
        return self.bytes_received - self.bytes_delivered


class Proxy:
    """Stands before one server. Its toxics and counters belong to all its connections."""

    def __init__(self, upstream: str, *, listen: str = "127.0.0.1:0", seed: int = 0) -> None:
        """`upstream` is "host:port" of the server; nobody has to listen there yet."""
        self.upstream = upstream
        self._listen = listen
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._address = ""
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._toxics: dict[Direction, list[Toxic]] = {direction: [] for direction in BOTH}
        self._changed = asyncio.Event()
        self.traffic = {direction: Traffic() for direction in BOTH}
        self.num_opened = 0
        """Connections that reached the server."""
        self.num_reset = 0
        """Connections ended with RST, by us."""

    @property
    def address(self) -> str:
        """host:port to connect to."""
        assert self._address, "expected a proxy that has started"
        return self._address

    @property
    def num_open(self) -> int:
        """Connections now."""
        return len(self._connections)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen; after `refuse` at the same address again. Idempotent."""
        if self._server is None:
            host, port = split_address(self._address or self._listen)
            self._server = await asyncio.start_server(self._accept, host, port, limit=_CHUNK)
            port = self._server.sockets[0].getsockname()[1]
            self._address = f"{host}:{port}"

    def refuse(self) -> None:
        """Let new connections be refused, as those to a dead process are, until `start`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def close(self) -> None:
        """End all connections and stop listening. Idempotent."""
        self.refuse()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, toxic: Toxic, *directions: Direction) -> None:
        """From now on; both ways, unless directions are named."""
        for direction in directions or BOTH:
            self._toxics[direction].append(toxic)
        self._wake()

    def clear(self) -> None:
        """Remove all toxics; what was held is delivered."""
        for toxics in self._toxics.values():
            toxics.clear()
        self._wake()

    def reset(self, *sides: Direction) -> int:
        """End all connections with RST, now and once; how many there were.

        DOWNSTREAM resets the client's side, UPSTREAM the server's. The side that is not named is
        left with a connection that is open, and silent for ever.
        """
        connections = list(self._connections)
        for connection in connections:
            connection.reset(sides or BOTH)
        self.num_reset += len(connections)
        return len(connections)

    def toxics(self, direction: Direction) -> tuple[Toxic, ...]:
        """What applies now."""
        return tuple(self._toxics[direction])

    async def changed(self) -> None:
        """Wait until the toxics change."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="proxied connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = split_address(self.upstream)
        try:
            far = await asyncio.open_connection(host, port, limit=_CHUNK)
        except OSError:  # As if the proxy were not there: the client is refused.
            _reset(writer)
            return
        except asyncio.CancelledError:
            writer.close()
            raise
        self.num_opened += 1
        connection = _Connection(self, (reader, writer), far, self._random.random())
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


class _Connection:
    """One connection through the proxy: a pipe each way."""

    def __init__(
        self,
        proxy: Proxy,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        seed: float,
    ) -> None:
        self._proxy = proxy
        self._writers = {Direction.UPSTREAM: far[1], Direction.DOWNSTREAM: near[1]}
        self._pipes = [
            _Pipe(proxy, Direction.UPSTREAM, near[0], far[1], self, random.Random(seed)),
            _Pipe(proxy, Direction.DOWNSTREAM, far[0], near[1], self, random.Random(seed)),
        ]
        self._over = asyncio.Event()
        self._is_half_open = False
        for writer in self._writers.values():
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        """Pass data until both sides have closed, or somebody ends it."""
        deliveries = [asyncio.create_task(pipe.deliver()) for pipe in self._pipes]
        others = [
            *(asyncio.create_task(pipe.take_in()) for pipe in self._pipes),
            *(asyncio.create_task(pipe.watch()) for pipe in self._pipes),
        ]
        try:
            try:
                await self._until_over(deliveries)
            finally:
                for task in (*deliveries, *others):
                    task.cancel()
                await asyncio.gather(*deliveries, *others, return_exceptions=True)
            if self._is_half_open:
                await asyncio.Event().wait()
        finally:
            for writer in self._writers.values():
                writer.close()

    async def _until_over(self, deliveries: Sequence[asyncio.Task[None]]) -> None:
        """Wait until all is delivered, or somebody ended it."""
        over = asyncio.create_task(self._over.wait())
        delivered = asyncio.create_task(asyncio.wait(deliveries))
        try:
            await asyncio.wait([over, delivered], return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            delivered.cancel()
            await asyncio.gather(over, delivered, return_exceptions=True)

    @property
    def is_over(self) -> bool:
        """Nothing is passed any more."""
        return self._over.is_set()

    def close(self) -> None:
        """End both sides."""
        self._over.set()

    def reset(self, sides: tuple[Direction, ...] = BOTH) -> None:
        """RST to these sides; the other, if any, hears nothing more."""
        if self.is_over:
            return
        self._is_half_open = len(sides) < len(BOTH)
        for side in sides:
            _reset(self._writers[side])
        self._over.set()


@dataclass(slots=True)
class _Pipe:
    """One direction of one connection: what reads, what writes, and what waits between."""

    proxy: Proxy
    direction: Direction
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: _Connection
    random: random.Random
    queue: deque[tuple[float, bytes]] = field(default_factory=deque[tuple[float, bytes]])
    """When to deliver, and what; empty bytes are the end."""
    num_queued: int = 0
    num_passed: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)

    async def take_in(self) -> None:
        """Read, and say when each piece is to be delivered."""
        loop = asyncio.get_running_loop()
        traffic = self.proxy.traffic[self.direction]
        due = 0.0
        data = b"-"
        while data:
            try:
                data = await self.reader.read(_CHUNK)
            except OSError:  # RST from one side; the other gets one as well.
                self.connection.reset()
                return
            traffic.bytes_received += len(data)
            delay_s = sum(
                toxic.latency_s + self.random.uniform(-toxic.jitter_s, toxic.jitter_s)
                for toxic in self.proxy.toxics(self.direction)
                if isinstance(toxic, Latency)
            )
            due = max(due, loop.time() + delay_s)  # In order, whatever the jitter.
            self.queue.append((due, data))
            self.num_queued += len(data)
            self.news.set()
            while self.num_queued > HELD_BYTES_MAX:
                self.room.clear()
                await self.room.wait()

    async def deliver(self) -> None:
        """Write what is due, as the toxics allow."""
        loop = asyncio.get_running_loop()
        while True:
            while not self.queue:
                self.news.clear()
                await self.news.wait()
            due, data = self.queue[0]
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            while any(isinstance(t, Timeout) for t in self.proxy.toxics(self.direction)):
                await self.proxy.changed()
            if not data:
                await self._close()
                return
            if self.connection.is_over:
                return
            try:
                await self._deliver(data)
            except OSError:
                self.connection.reset()
                return
            self.queue.popleft()
            self.num_queued -= len(data)
            self.room.set()

    async def _deliver(self, data: bytes) -> None:
        for piece, delay_s in self._sliced(data):
            toxics = self.proxy.toxics(self.direction)
            for toxic in toxics:
                if isinstance(toxic, Bandwidth):
                    await asyncio.sleep(len(piece) / toxic.bytes_per_s)
            left = min(
                (t.num_bytes - self.num_passed for t in toxics if isinstance(t, LimitData)),
                default=len(piece),
            )
            now = piece[: max(0, left)]
            self.writer.write(now)
            await self.writer.drain()
            self.num_passed += len(now)
            self.proxy.traffic[self.direction].bytes_delivered += len(now)
            if len(now) < len(piece):
                self.connection.close()
                return
            if delay_s:
                await asyncio.sleep(delay_s)

    def _sliced(self, data: bytes) -> list[tuple[bytes, float]]:
        for toxic in self.proxy.toxics(self.direction):
            if isinstance(toxic, Slicer):
                pieces: list[tuple[bytes, float]] = []
                while data:
                    spread = self.random.randint(-toxic.size_variation, toxic.size_variation)
                    size = max(1, toxic.size_average + spread)
                    pieces.append((data[:size], toxic.delay_s))
                    data = data[size:]
                return pieces
        return [(data, 0.0)]

    async def _close(self) -> None:
        for toxic in self.proxy.toxics(self.direction):
            if isinstance(toxic, SlowClose):
                await asyncio.sleep(toxic.delay_s)
        if not self.connection.is_over:
            with suppress(OSError):
                self.writer.write_eof()

    async def watch(self) -> None:
        """What ends connections that nothing passes."""
        while True:
            changed = asyncio.create_task(self.proxy.changed())
            try:
                for toxic in self.proxy.toxics(self.direction):
                    if isinstance(toxic, ResetPeer):
                        await asyncio.wait([changed], timeout=toxic.timeout_s)
                        if not changed.done() and not self.connection.is_over:
                            self.proxy.num_reset += 1
                            self.connection.reset()
                            return
                    elif isinstance(toxic, Timeout) and toxic.timeout_s:
                        await asyncio.wait([changed], timeout=toxic.timeout_s)
                        if not changed.done():
                            self.connection.close()
                            return
                await changed
            finally:
                changed.cancel()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, unless it is closed."""
    if writer.is_closing():
        return
    connection: socket.socket = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    writer.transport.abort()
