"""One of the processes of a frontend: serves the connections that its parent hands to it.

    python -m frontend.processes.child <place as JSON> <what its parent was told> ...

It says "ready" on stdout when it serves. It exits as `python -m frontend` does.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import uvloop
from prometheus_client import CollectorRegistry

from frontend.admin import Admin
from frontend.config import FrontendConfig
from frontend.gateway import Gateway
from frontend.grpcio_edge import GrpcioEdge
from frontend.processes.claims import Claims
from frontend.processes.siblings import Siblings, add_siblings, socket_of
from frontend.processes.whole import Whole, WholeAdmin
from frontend.requests import Requests
from unbroken import log
from unbroken.config import load
from unbroken.errors import UnbrokenError
from unbroken.transport import listen_locally, make_server
from unbroken.v1 import admin_service_pb2_grpc, inference_service_pb2_grpc

READY: Final = b"ready\n"
CLOSED: Final = b"closed"
"""What a process tells its parent of a connection."""
DRAINS: Final = b"drains "
"""What it tells it when all are to drain; seconds follow, or nothing for what is configured."""
TAKEN_AT_ONCE: Final = 64
LAST_WORDS_S: Final = 1.0
"""How long siblings may take to read the ends of what they pass on, when this process stops."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the processes one is."""

    number: int
    """From 1; the same for those that come after it in its place."""
    directory: str
    """Where processes call each other, and claim requests."""
    address: str
    """host:port at which the parent listens."""
    connections: int
    """Descriptor of the socket on which connections come."""

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> "Place":
        return cls(**json.loads(text))


class Family:
    """What a process has to do with the others: it is called by them, calls them, and claims."""

    def __init__(self, place: Place) -> None:
        """Raises OSError."""
        self.place = place
        self._directory = Path(place.directory)
        self.claims = Claims(self._directory)
        self._siblings = Siblings(self._directory)
        self._server = make_server()
        self._inbound = Inbound(place.connections)
        self._whole: Whole | None = None
        self._admin: WholeAdmin | None = None

    def whole(self, gateway: Gateway) -> Whole:
        """What clients are served."""
        self._whole = Whole(gateway, self._siblings)
        return self._whole

    def whole_admin(self, own: Admin) -> Admin:
        """What operators are served."""
        self._admin = WholeAdmin(own, self._siblings, tell_parent=self._inbound.tell_drain)
        return self._admin

    @property
    def num_waited_for(self) -> int:
        """What this process has to do for its siblings: pass on their words, and tell of them."""
        assert self._whole is not None, "it is served"
        assert self._admin is not None, "it is served"
        return self._whole.num_passed_on + self._admin.num_watching

    def on_less_passed_on(self, callback: Callable[[], None]) -> None:
        """Have it called when a call is passed on no more."""
        assert self._whole is not None, "it is served"
        self._whole.on_less.append(callback)

    async def start(
        self, gateway: Gateway, admin: Admin, requests: Requests, registry: CollectorRegistry
    ) -> None:
        """Serve siblings, which are answered for this process alone. Raises OSError."""
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
            GrpcioEdge(gateway), self._server
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._server)
        add_siblings(self._server, requests, registry, admin.draining)
        listen_locally(self._server, socket_of(self._directory, os.getpid()))
        await self._server.start()

    def receive(self, take: Callable[[socket.socket], Awaitable[asyncio.Future[None]]]) -> None:
        """Serve the connections that come from now on."""
        self._inbound.start(take)

    def end_passed_on(self) -> None:
        """Pass nothing on any more. Idempotent."""
        if self._whole is not None:
            self._whole.close()

    async def stop(self) -> None:
        """Be one of them no more."""
        await self._inbound.stop()
        await self._siblings.close()
        await self._server.stop(LAST_WORDS_S)
        self.claims.close()


class Inbound:
    """Connections of clients, from the parent."""

    def __init__(self, descriptor: int) -> None:
        self._channel = socket.socket(fileno=descriptor)
        self._channel.setblocking(False)
        self._num_untold = 0
        """Closed connections of which the parent does not know yet."""
        self._untold_drains: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._take: Callable[[socket.socket], Awaitable[asyncio.Future[None]]] | None = None

    def start(self, take: Callable[[socket.socket], Awaitable[asyncio.Future[None]]]) -> None:
        """`take` serves a connection, and returns what is done when it is closed."""
        self._take = take
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._read)

    async def stop(self) -> None:
        """Take no more. Idempotent."""
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            asyncio.get_running_loop().remove_writer(self._channel.fileno())
            self._channel.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def tell_drain(self, budget_s: float | None) -> None:
        """All processes are about to drain; None: as they are configured."""
        self._untold_drains.append(DRAINS + (b"" if budget_s is None else b"%f" % budget_s))
        if self._channel.fileno() >= 0:
            self._tell()

    def _read(self) -> None:
        for _ in range(TAKEN_AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self._channel, 16, 1)
            except BlockingIOError:
                return
            if not data:  # The parent is gone, and so is this process in a moment.
                asyncio.get_running_loop().remove_reader(self._channel.fileno())
                return
            if not descriptors:  # The kernel has closed it.
                _log.warning("a connection was lost: too many open files")
                self._tell_closed()
            for descriptor in descriptors:
                task = asyncio.create_task(self._serve(socket.socket(fileno=descriptor)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        assert self._take is not None, "it is started"
        connection.setblocking(False)
        try:
            closed = await self._take(connection)
        except OSError as error:
            connection.close()
            _log.debug("connection failed before it began", detail=str(error))
            self._tell_closed()
        else:
            closed.add_done_callback(lambda _: self._tell_closed())

    def _tell_closed(self) -> None:
        self._num_untold += 1
        if self._channel.fileno() >= 0:
            self._tell()

    def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._untold_drains:
                self._channel.send(self._untold_drains[0])
                self._untold_drains.pop(0)
            while self._num_untold:
                self._channel.send(CLOSED)
                self._num_untold -= 1
        except BlockingIOError:  # Many at once: the rest as the parent takes them.
            loop.add_writer(self._channel.fileno(), self._tell)
            return
        except OSError as error:  # The parent is gone, and so is this process in a moment.
            _log.debug("parent not told of closed connections", detail=str(error))
        loop.remove_writer(self._channel.fileno())


def main() -> None:
    """Run one of the processes."""
    from frontend.service import serve

    place = Place.from_argument(sys.argv[1])
    config = load(FrontendConfig, sys.argv[2:], prog="frontend")
    config = config.model_copy(update={"frontend_id": f"{config.frontend_id}.{place.number}"})
    log.configure("frontend", config.log_level, config.log_format)
    logger = log.get_logger(__name__)

    def tell_ready() -> None:
        with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as stdout:
            stdout.write(READY)

    try:
        sys.exit(uvloop.run(serve(config, place=place, on_ready=tell_ready)))
    except (OSError, UnbrokenError) as error:
        logger.error("frontend cannot start", detail=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
