"""The edge as a whole: one port for all, with the gRPC server behind it.

"Native" as opposed to grpcio's own, which can serve in its place at a frontend.
"""

import socket
from collections.abc import Callable, Collection, Mapping

import grpc.aio

from unbroken.edge.server import Answer, ClientConnection, EdgeObserver, EdgeServer
from unbroken.edge.tls import server_context
from unbroken.http2.limits import EdgeLimits
from unbroken.scratch import Scratch
from unbroken.status import Trailers
from unbroken.transport import TlsFiles, listen_locally, open_channel


class NativeEdge:
    """Answers some methods itself, and all others through a gRPC server."""

    def __init__(self, server: EdgeServer, channel: grpc.aio.Channel, scratch: Scratch) -> None:
        self._server = server
        self._channel = channel
        self._scratch = scratch

    @classmethod
    def before(
        cls,
        server: grpc.aio.Server,
        answers: Mapping[bytes, Answer],
        limits: EdgeLimits,
        observer: EdgeObserver,
        *,
        services: Collection[str],
        tls: TlsFiles | None,
        trailers: Callable[[], Trailers] = tuple,
        clock: Callable[[], float],
    ) -> "NativeEdge":
        """An edge before a server of `services` that listens nowhere yet and adds those `trailers`.

        Raises OSError.
        """
        context = None if tls is None else server_context(tls.certificate, tls.key, tls.client_ca)
        # Nobody else may come in by this door: the directory is this user's alone.
        scratch = Scratch("unbroken-edge-")
        channel = open_channel(listen_locally(server, scratch.path / "grpc.sock"))
        edge = EdgeServer(
            answers,
            channel,
            limits,
            observer,
            services=services,
            tls=context,
            trailers=trailers,
            clock=clock,
        )
        return cls(edge, channel, scratch)

    @property
    def clients(self) -> Collection[ClientConnection]:
        """Connections that are open."""
        return self._server.clients

    @property
    def leaving(self) -> Collection[ClientConnection]:
        """Connections that are told no more, until their clients have closed them."""
        return self._server.leaving

    @property
    def num_held(self) -> int:
        """Bytes of requests that have come in part."""
        return self._server.num_held

    async def start(self, address: str) -> str:
        """Listen; returns the address with the port that was bound. Raises OSError."""
        try:
            return await self._server.start(address)
        except OSError:
            await self.stop()
            raise

    async def take(self, connection: socket.socket) -> ClientConnection:
        """Serve a connection that was accepted elsewhere. Raises OSError."""
        return await self._server.take(connection)

    def is_called(self, path: str) -> bool:
        """Whether a call of another method than the edge's own still runs."""
        return self._server.is_called(path)

    def drain(self) -> None:
        """Ask clients to open no more streams on the connections that they have."""
        self._server.drain()

    async def stop(self) -> None:
        """Close all connections. Idempotent."""
        await self._server.stop()
        await self._channel.close()
        self._scratch.close()
