"""Sockets, and whose bytes go where.

    methods of its own ──▶ whatever call their owner makes of them
    all else           ──▶ ForwardedCall ──▶ the gRPC server behind

What happened in one engine step is written in one pass: calls that have news are collected, pumped
once, and each connection that they touched is written to once.
"""

import asyncio
import math
import socket
import ssl
import struct
import time
from collections.abc import Callable, Collection, Mapping
from random import random
from typing import Final, Protocol, TypeAlias, cast

import grpc.aio
from typing_extensions import override

from unbroken import log
from unbroken.config import split_address
from unbroken.edge.answering import ANSWER_FIELDS, refuse
from unbroken.edge.forwarding import ForwardedCall
from unbroken.http2.connection import (
    Connection,
    DataReceived,
    Event,
    LimitHit,
    Over,
    RequestReceived,
    StreamLost,
    Writable,
)
from unbroken.http2.frames import ErrorCode
from unbroken.http2.headers import Request
from unbroken.http2.limits import EdgeLimits
from unbroken.http2.messages import Code, Refused, http_status, trailers
from unbroken.recurring import TIMER_S_MIN, naps
from unbroken.status import Trailers

BACKLOG: Final = 1024
ACCEPT_RETRY_S: Final = 1.0
"""After which it is tried again to take connections, when there were no descriptors left."""
WRITE_BUFFER_HIGH: Final = 256 * 1024
"""Bytes that wait in a socket before nothing more is taken from calls."""
UNWRITTEN_BYTES_MAX: Final = 64 * 1024
"""Who has so much outbound is behind, and better merges."""
PINGS_SPREAD: Final = 0.5
"""Of many connections each is asked for a sign of life so much later at most, another time each
time: those that were once late together would be due together for ever."""
LOOK_GRAIN_S: Final = 0.025
"""Connections are looked at a little later than they want it, many in one turn of the loop: the
first of them finds its caches cold, and costs twice what the others do."""
CLOSE_S: Final = 1.0
"""How long a client may take to read the last that it was told, and to close."""
IGNORED_BYTES_MAX: Final = 16 << 20
"""What it may send meanwhile."""
_ACKNOWLEDGED: Final = struct.Struct("=120xQ")
"""The field tcpi_bytes_acked in the struct tcp_info of Linux, since 4.1."""

_log = log.get_logger(__name__)


class EdgeObserver(Protocol):
    """Who counts what happens at the edge."""

    def edge_connected(self, num_more: int) -> None:
        """A connection came (1) or went (-1)."""
        ...

    def edge_limit_hit(self, limit: str) -> None:
        """A client went beyond a limit."""
        ...

    def edge_connection_failed(self, code: str) -> None:
        """A connection was ended with an error."""
        ...


class Call(Protocol):
    """What happens on one stream."""

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request; raises `Refused`."""
        ...

    def writable(self) -> None:
        """There is room."""
        ...

    def refuse(self, refused: Refused) -> None:
        """Answer that the protocol does not allow it."""
        ...

    def lost(self) -> None:
        """The stream is gone."""
        ...


class OwnCall(Call, Protocol):
    """A call that is answered here. It enters itself in `EdgeServer.awake` when it has news."""

    @property
    def client(self) -> "ClientConnection":
        """Whose it is."""
        ...

    @property
    def stream_id(self) -> int:
        """Its number on that connection."""
        ...

    def pump(self, now: float) -> None:
        """Send what is new, as far as it can leave."""
        ...

    def crashed(self, error: Exception) -> None:
        """A bug of this call was met: end it. What this raises resets the stream."""
        ...


Answer: TypeAlias = Callable[["EdgeServer", "ClientConnection", int, Request], OwnCall]
"""Begins a call on the stream of that number; raises `Refused`."""


class EdgeServer:
    """All connections of clients."""

    def __init__(
        self,
        answers: Mapping[bytes, Answer],
        behind: grpc.aio.Channel,
        limits: EdgeLimits,
        observer: EdgeObserver,
        *,
        services: Collection[str],
        tls: ssl.SSLContext | None = None,
        trailers: Callable[[], Trailers] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`answers` has what answers each path here; all others go to the server of `services`,
        to which `behind` leads. Calls end with `trailers`. To be made in the loop that it runs in.
        """
        self.trailers = trailers
        self.limits = limits
        self.observer = observer
        self.clock = clock
        self.tls = tls
        self.services = services
        self.clients: set[ClientConnection] = set()
        self.leaving: set[ClientConnection] = set()
        """Those that are told no more, until they have closed."""
        self.is_stopping = False
        self._answers = answers
        self._behind = behind
        self.num_held = 0
        """Bytes of requests that have come in part."""
        self.awake: dict[OwnCall, None] = {}
        """Calls that have news."""
        self._touched: dict[ClientConnection, None] = {}
        self.is_scheduled = False
        """Something is to be written in the next turn of the loop."""
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        """Over TLS in place of that server."""
        self._loop = asyncio.get_running_loop()
        self._naps = naps()

    async def start(self, address: str) -> str:
        """Listen at "host:port"; returns it with the port that was bound. Raises OSError."""
        host, port = split_address(address)
        loop = self._loop
        # Of a name with several addresses the first, so that port 0 means one port.
        (family, _, _, _, where), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        place = str(where[0]), int(where[1])
        # As gRPC has it, "::" is all addresses of both families.
        is_dual = place[0] == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            place, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual
        )
        bound = cast("tuple[str, int]", listener.getsockname())[1]
        if self.tls is None:
            self._server = await loop.create_server(
                lambda: ClientConnection(self), sock=listener, backlog=BACKLOG
            )
        else:
            # A server of asyncio tells nobody of a handshake before it has gone well.
            listener.setblocking(False)
            self._listener = listener
            self._accepting = asyncio.create_task(self._accept(listener))
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except ConnectionError:
                continue  # It has left already.
            except OSError as error:
                _log.warning("connections cannot be accepted", detail=str(error))
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            try:
                await self.take(connection)
            except OSError as error:
                connection.close()
                _log.debug("connection failed before it began", detail=str(error))

    async def take(self, connection: socket.socket) -> "ClientConnection":
        """Serve a connection that was accepted elsewhere. Raises OSError."""
        # As for those that are accepted here.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = ClientConnection(self)
        if self.tls is None:
            await self._loop.connect_accepted_socket(lambda: client, connection)
        else:
            client.begin_tls(connection, self.tls)
        return client

    def is_called(self, path: str) -> bool:
        """Whether a call of that path to the server behind still runs."""
        return any(
            isinstance(call, ForwardedCall) and call.path == path
            for client in self.clients
            for call in client.calls.values()
        )

    def drain(self) -> None:
        """Let clients open no more streams on the connections that they have."""
        for client in list(self.clients):
            client.drain()

    async def stop(self) -> None:
        """Close everything, and whoever comes meanwhile. Idempotent."""
        self.is_stopping = True
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._accepting is not None and self._listener is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])  # It uses the socket until then.
            self._listener.close()
        for client in list(self.clients):
            client.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                while self.leaving:
                    await asyncio.wait([client.closed for client in self.leaving])
        except TimeoutError:
            for client in list(self.leaving):
                client.abort()

    @property
    def ping_interval_min_s(self) -> float:
        """How long a connection may be silent, whatever the limits say of one alone."""
        return len(self.clients) / self.limits.pings_per_s_max

    def call(self, client: "ClientConnection", event: RequestReceived) -> Call:
        """What is to happen on a new stream. Raises `Refused`."""
        request = event.request
        answer = self._answers.get(request.path)
        if answer is not None:
            return answer(self, client, event.stream_id, request)
        return ForwardedCall(self, client, event.stream_id, request, self._behind)

    def hold(self, num_bytes: int) -> bool:
        """Hold so much more of unfinished requests, or less; False if that is too much."""
        if num_bytes > 0 and self.num_held + num_bytes > self.limits.held_bytes_max:
            self.observer.edge_limit_hit("held_bytes")
            return False
        self.num_held += num_bytes
        return True

    # Writing.

    def wake(self, call: OwnCall) -> None:
        """The call has news: have it pumped."""
        self.awake[call] = None
        if not self.is_scheduled:
            self.schedule()

    def touch(self, client: "ClientConnection") -> None:
        """The connection has something to send."""
        self._touched[client] = None
        if not self.is_scheduled:
            self.schedule()

    def schedule(self) -> None:
        """Write in the next turn of the loop."""
        self.is_scheduled = True
        self._loop.call_soon(self._write)

    def _write(self) -> None:
        """One pass over all that has news, one write for each connection."""
        self.is_scheduled = False
        now = self.clock()
        awake, self.awake = self.awake, {}
        touched, self._touched = self._touched, {}
        client = None
        for call in awake:
            try:
                call.pump(now)
            except Exception as error:
                _end_crashed(call, error)  # One call's bug is not the others' loss.
            if call.client is not client:
                client = call.client
                touched[client] = None
        for client in touched:
            client.write()
        self._naps.end()


def _end_crashed(call: OwnCall, error: Exception) -> None:
    try:
        call.crashed(error)
    except Exception:
        _log.exception("bug in a call that had one")
        call.client.connection.reset(call.stream_id, ErrorCode.INTERNAL_ERROR)
        call.lost()


class ClientConnection(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: EdgeServer) -> None:
        self.calls: dict[int, Call] = {}
        self.waiting: dict[Call, None] = {}
        """Calls that wait for the socket to take more."""
        self.is_paused = False
        """The socket takes nothing more for now."""
        self._is_closing = False
        """Nothing more is sent."""
        self._num_ignored = 0
        """Bytes that came all the same."""
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._server = server
        self.connection = Connection(server.limits, server.clock())
        self._transport: asyncio.Transport | None = None
        """Not before TLS is agreed on."""
        self._handshake: asyncio.Task[None] | None = None
        self._farewell: asyncio.TimerHandle | None = None
        """Ends what the client does not end."""
        self._stands_since = 0.0
        """While paused: nothing had left since, when it was last looked."""
        self._num_taken: int = 0
        """What the client had taken then."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._spread = 1 + PINGS_SPREAD * random()

    # How it comes.

    def begin_tls(self, connection: socket.socket, tls: ssl.SSLContext) -> None:
        """Take a place, if there is one, and agree on TLS."""
        if not self._take_place():
            connection.close()
            self.connection_lost(None)
            return
        self._handshake = asyncio.create_task(self._shake_hands(connection, tls))
        self._handshake.add_done_callback(lambda _: self._shaken(connection))

    async def _shake_hands(self, connection: socket.socket, tls: ssl.SSLContext) -> None:
        observer = self._server.observer
        try:
            await self._loop.connect_accepted_socket(
                lambda: self,
                connection,
                ssl=tls,
                ssl_handshake_timeout=self._server.limits.handshake_timeout_s,
            )
        except ConnectionAbortedError:  # So both loops say that it took too long.
            observer.edge_limit_hit("handshake")
        except ssl.SSLError as error:
            observer.edge_connection_failed("TLS")
            _log.info("connection ended", code="TLS", detail=str(error))
        except OSError as error:
            _log.debug("connection failed before it began", detail=str(error))

    def _shaken(self, connection: socket.socket) -> None:
        if self._transport is None:  # Protocols are not told of a handshake that fails.
            connection.close()
            self.connection_lost(None)

    def _take_place(self) -> bool:
        """From now on it counts. False if there are too many."""
        server = self._server
        if len(server.clients) + len(server.leaving) >= server.limits.connections_max:
            server.observer.edge_limit_hit("connections")
            return False
        server.clients.add(self)
        server.observer.edge_connected(1)
        return True

    # What the transport says.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Over TLS: that is agreed on."""
        server = self._server
        own = self._transport = cast("asyncio.Transport", transport)
        # Whoever is above the limit is paused then, so only the paused are asked (`_limit_unsent`).
        own.set_write_buffer_limits(high=min(WRITE_BUFFER_HIGH, server.limits.unsent_bytes_max))
        if server.tls is None and not self._take_place():
            own.abort()
            return
        if server.tls is not None:
            spoken = transport.get_extra_info("ssl_object").selected_alpn_protocol()
            if spoken != "h2":
                server.observer.edge_connection_failed("NO_ALPN")
                own.abort()
                return
        if server.is_stopping:
            self.drain()
            self.close()
            return
        self.write()
        self._keep_time()

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            self._num_ignored += len(data)
            if self._num_ignored > IGNORED_BYTES_MAX:
                self._overstayed()
            return
        try:
            self._handle(self.connection.receive(data, self._server.clock()))
        except Exception:
            self._crashed()
            return
        self.write()
        self._keep_time()

    @override
    def eof_received(self) -> None:
        """Closes the transport: who sends no more reads no more than is on its way."""
        for call in list(self.calls.values()):
            call.lost()
        self.connection.is_over = True
        self._leave_soon()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Idempotent."""
        for timer in (self._timer, self._farewell):
            if timer is not None:
                timer.cancel()
        for call in list(self.calls.values()):
            call.lost()
        self.connection.is_over = True
        self._server.leaving.discard(self)
        if self in self._server.clients:
            self._server.clients.remove(self)
            self._server.observer.edge_connected(-1)
        if not self.closed.done():
            self.closed.set_result(None)

    @override
    def pause_writing(self) -> None:
        self.is_paused = True
        if self.connection.ride is not None:
            self.connection.ride.step_out()
        self._stands_since, self._num_taken = self._server.clock(), self._acknowledged()
        self._keep_time()

    @override
    def resume_writing(self) -> None:
        self.is_paused = False
        waiting, self.waiting = self.waiting, {}
        try:
            for call in waiting:
                call.writable()
        except Exception:
            self._crashed()

    # What is done with it.

    def send_frames(
        self, data: bytes, num_frames: int, num_body_bytes: int, *, is_all: bool
    ) -> bool:
        """Send what `Connection.count_frames` says; at once, if that `is_all` of this turn of the
        loop. False if the client is behind, and nothing is done then. Raises nothing.

        Here every connection passes with each step, and finds its caches cold: few functions.
        """
        connection, transport = self.connection, self._transport
        outbound = connection.outbound
        if (
            self.is_paused
            or len(outbound) > UNWRITTEN_BYTES_MAX
            or num_body_bytes > connection.send_window.left
        ):
            return False
        connection.count_frames(num_frames, num_body_bytes)
        if outbound or not is_all:
            connection.outbound += data
            self._server.touch(self)
        elif not (transport is None or self._is_closing or transport.is_closing()):
            transport.write(data)  # Which nobody has to copy.
            if self.is_paused:
                self._limit_unsent(transport)
        return True

    @property
    def edge(self) -> EdgeServer:
        """Where it belongs."""
        return self._server

    @property
    def send_now(self) -> Callable[[bytes], None]:
        """Writes to the socket, whatever is outbound. If it is closing, nothing is done."""
        assert self._transport is not None, "it was connected"
        return self._transport.write

    def send_later(self, data: bytes) -> None:
        """Write it in the next turn of the loop, after what is outbound."""
        self.connection.outbound += data
        self._server.touch(self)

    def drain(self) -> None:
        """Let the client open no more streams."""
        self.connection.drain(self._server.clock())
        if self._transport is not None:  # Else it is told when TLS is agreed on.
            self.write()
            self._keep_time()

    def close(self) -> None:
        """Send what is outbound and no more, and wait a moment for the client to read it and close.

        A socket that is closed with something unread in it takes back what was sent last, and so
        does gRPC's own client that meets a closed one while it writes. Idempotent.
        """
        transport = self._transport
        if transport is None:
            self.abort()  # It was told nothing yet.
            return
        if transport.is_closing() or self._is_closing:
            return
        self._is_closing = True
        if self in self._server.clients:
            self._server.clients.remove(self)
            self._server.leaving.add(self)
            self._server.observer.edge_connected(-1)
        for call in list(self.calls.values()):
            call.lost()
        self.connection.is_over = True  # What still comes is not looked at.
        transport.write(self.connection.take_outbound())
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()  # TLS has its own farewell.
        self._leave_soon()

    def _leave_soon(self) -> None:
        """Close in a moment, if the client does not."""
        if self._farewell is None:
            self._farewell = self._loop.call_later(CLOSE_S, self._overstayed)

    def _overstayed(self) -> None:
        self._server.observer.edge_limit_hit("farewell")
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
        elif self._handshake is not None:
            self._handshake.cancel()

    def write(self) -> None:
        """Write what is outbound, in one piece. Raises nothing."""
        connection, transport = self.connection, self._transport
        if transport is None or self._is_closing or transport.is_closing():
            return
        if connection.outbound:
            transport.write(connection.take_outbound())
            if self.is_paused:
                self._limit_unsent(transport)
        if connection.is_over:
            self.close()
        elif connection.has_dues:
            self._keep_time()

    def _limit_unsent(self, transport: asyncio.Transport) -> None:
        """The socket takes no more: cut who leaves too much in it. (Below it is not paused.)"""
        if transport.get_write_buffer_size() > self._server.limits.unsent_bytes_max:
            self._server.observer.edge_limit_hit("unsent_bytes")
            transport.abort()

    def _keep_time(self) -> None:
        """Have the timer fire when the connection wants it, or before."""
        self.connection.ping_interval_min_s = self._spread * self._server.ping_interval_min_s
        due = self.connection.deadline()
        if due is not None and self.is_paused:
            due = min(due, self._stands_since + self._server.limits.stall_timeout_s)
        if due is None or (self._timer is not None and due >= self._timer_at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        together_at = math.ceil(due / LOOK_GRAIN_S) * LOOK_GRAIN_S
        wait_s = max(TIMER_S_MIN, together_at - self._server.clock())
        self._timer = self._loop.call_later(wait_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._server.clock()
        try:
            if self.is_paused and self._stands_still(now):
                self._server.observer.edge_limit_hit("stall")
                self.abort()  # Nobody reads a farewell.
                return
            self._handle(self.connection.handle_timeout(now))
        except Exception:
            self._crashed()
        self.write()
        self._spread = 1 + PINGS_SPREAD * random()
        self._keep_time()

    def _stands_still(self, now: float) -> bool:
        """Whether the client of a full socket has taken nothing for too long."""
        if now < self._stands_since + self._server.limits.stall_timeout_s:
            return False
        num_taken = self._acknowledged()
        if num_taken == self._num_taken:
            return True
        self._stands_since, self._num_taken = now, num_taken
        return False

    def _acknowledged(self) -> int:
        """Bytes of which the client's kernel has said that they came.

        What waits in the transport says less: the kernel takes more of it only when a third of its
        own buffer, which may be of megabytes, is free; and others go on writing.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return -1
        connection = cast("socket.socket", transport.get_extra_info("socket"))
        if connection.fileno() < 0:
            return -1  # Below TLS it is closed already.
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
        if len(info) < _ACKNOWLEDGED.size:
            return -transport.get_write_buffer_size()  # A kernel that does not tell.
        return cast("tuple[int]", _ACKNOWLEDGED.unpack(info))[0]

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case DataReceived(stream_id=stream_id, data=data, ends=ends):
                    call = self.calls.get(stream_id)
                    if call is None:
                        self.connection.consumed(stream_id, len(data))
                    else:
                        self._give(call, data, ends=ends)
                case Writable(stream_id=stream_id):
                    if (call := self.calls.get(stream_id)) is not None:
                        call.writable()
                case RequestReceived():
                    self._begin(event)
                case StreamLost(stream_id=stream_id):
                    if (call := self.calls.get(stream_id)) is not None:
                        call.lost()
                case LimitHit(limit=limit):
                    self._server.observer.edge_limit_hit(limit)
                    if limit == "silence":
                        self.abort()  # Nobody reads a farewell.
                case Over(code=code, detail=detail):
                    if code is not ErrorCode.NO_ERROR:
                        self._server.observer.edge_connection_failed(code.name)
                        _log.info("connection ended", code=code.name, detail=detail)

    def _begin(self, event: RequestReceived) -> None:
        stream_id = event.stream_id
        http = http_status(event.request)
        if http == 200 and event.is_too_large:
            fields = trailers(Code.RESOURCE_EXHAUSTED, "too much metadata")
            self.connection.send_headers(stream_id, [*ANSWER_FIELDS, *fields], ends=True)
            return
        if http != 200 or event.is_too_large:
            http = 431 if event.is_too_large else http
            fields = [(b":status", b"%d" % http)]
            self.connection.send_headers(stream_id, fields, ends=True)
            return
        try:
            call = self._server.call(self, event)
        except Refused as refused:
            refuse(self, stream_id, refused)
            return
        self.calls[stream_id] = call
        if event.ends:
            self._give(call, b"", ends=True)

    def _give(self, call: Call, data: bytes, *, ends: bool) -> None:
        try:
            call.data(data, ends=ends)
        except Refused as refused:
            call.refuse(refused)

    def _crashed(self) -> None:
        """What is being handled is a bug of this connection, and of no other."""
        _log.exception("bug in a connection")
        self._server.observer.edge_connection_failed(ErrorCode.INTERNAL_ERROR.name)
        self.abort()
