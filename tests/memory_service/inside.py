"""The session channel of a memory service in a thread of the test's own process.

For claims about one side of the socket that need no process to die: it is there in milliseconds.
Everything is the service's own but for its vault, its gRPC and its timer.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from memory_service.accounts import HOST, Device, Limits
from memory_service.backend import Backend
from memory_service.holdings import Holdings, Policy
from memory_service.keeper import Keeper
from memory_service.memfd import MemfdBackend
from memory_service.session_channel import SessionChannel
from memory_service.store import StoreSlab
from memory_service.tickets import Tickets
from unbroken.memory.client import MemoryClient
from unbroken.memory.records import Record

ResultT = TypeVar("ResultT")
POLICY = Policy(Limits(1 << 30, 1 << 30))
WAIT_S = 20.0


class WatchedKeeper(Keeper):
    """Notes who reads tables, can hold up one of them after it has read, and can have a bug."""

    def __init__(
        self,
        holdings: Holdings,
        on_forget: Callable[[int], None],
        gpus: Mapping[Device, Backend],
    ) -> None:
        super().__init__(holdings, {HOST: MemfdBackend(), **gpus}, on_forget=on_forget)
        self.readers: list[int | None] = []
        self.held: threading.Event | None = None
        self.num_read = 0
        self.bug: Exception | None = None
        """Raised once, when a single record is read."""

    @override
    def record(self, slab_id: int, slot: int) -> Record | None:
        if (bug := self.bug) is not None:
            self.bug = None
            raise bug
        return super().record(slab_id, slot)

    @override
    def read(self, slab: StoreSlab) -> list[tuple[int, Record | None]]:
        self.readers.append(threading.current_thread().ident)
        found = super().read(slab)
        held, self.held = self.held, None
        if held is not None:
            held.wait(WAIT_S)
        self.num_read += 1
        return found


class Inside:
    """One life of the service after the other, at one socket.

    Attributes:
        holdings: Of the present life; to be looked at through `run`.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy = POLICY,
        gpus: Mapping[Device, Backend] | None = None,
    ) -> None:
        self.socket = directory / "session.sock"
        self.holdings: Holdings
        self.keeper: WatchedKeeper
        self._policy = policy
        self._gpus = gpus or {}
        self._channel: SessionChannel
        self._lives = 0
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self._begin)

    def run(self, work: Callable[[], ResultT]) -> ResultT:
        """On the service's loop."""
        future: Future[ResultT] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # Raised where it was asked for.
                future.set_exception(error)

        self._loop.call_soon_threadsafe(do)
        return future.result(WAIT_S)

    def client(self, **settings: Any) -> MemoryClient:
        return MemoryClient(self.socket, **settings)

    def end(self) -> None:
        """This life, and all connections with it."""
        self.run(lambda: self._channel.close())
        self.keeper.close()

    def begin(self) -> None:
        """Another life, which knows nothing of the one before."""
        self.run(self._begin)

    def cut_off(self, client: MemoryClient) -> None:
        """End its connection, and nothing else."""
        session_id = client.session_id
        self.run(lambda: self._channel.connections[session_id].close())

    def close(self) -> None:
        self.end()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(WAIT_S)
        self._loop.close()

    def _begin(self) -> None:
        self._lives += 1
        self.holdings = Holdings(self._policy, self._lives)
        self.keeper = WatchedKeeper(
            self.holdings, lambda session_id: self._channel.unwatch(session_id), self._gpus
        )
        # The channel asks for the running loop, which is the thread's.
        self._channel = SessionChannel(
            self.holdings, self.keeper, may_use=_anybody, tickets=Tickets(bytes(32))
        )
        self._channel.listen(self.socket, mode=0o600)


def _anybody(_uid: int, _tenant: str) -> bool:
    return True


@contextlib.contextmanager
def inside(
    directory: Path, policy: Policy = POLICY, gpus: Mapping[Device, Backend] | None = None
) -> Generator[Inside]:
    service = Inside(directory, policy, gpus)
    try:
        yield service
    finally:
        service.close()
