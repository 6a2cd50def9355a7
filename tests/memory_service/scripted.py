"""A service that says what a test wants, over the real socket: for what a real one rarely does."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from unbroken.memory import channel
from unbroken.memory.channel import ChannelClosed
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

WAIT_S = 20.0


class Scripted:
    """Binds whoever comes, and answers the calls it was given answers to; others are done.

    Attributes:
        num_bound: How often somebody bound.
        bind_slabs: Slabs that a client owns that binds again.
        on_bind: Called before a client that binds is answered.
        before_answer: Called once, before the next answer to `reclaim`.
        end_after_answer: End the connection after that.
    """

    def __init__(self, path: Path) -> None:
        self.num_bound = 0
        self.bind_slabs: list[pb.Slab] = []
        self.on_bind: Callable[[], None] = lambda: None
        self.before_answer: Callable[[], None] | None = None
        self.end_after_answer = False
        self._answers: dict[str, tuple[wire.SessionResponse, list[int]]] = {}
        self._ends: dict[str, int] = {}
        self._fds: list[int] = []
        self._lifeline = self._memory(bytes(4096))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._listener.settimeout(0.05)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def answers(
        self,
        kind: str,
        response: wire.SessionResponse,
        memory: Sequence[bytes] = (),
        *,
        given: Sequence[int] = (),
    ) -> list[int]:
        """Answer these calls so, with descriptors of memory that holds this; returns them.

        And with those that are `given`, which are closed at the end.
        """
        fds = [*(self._memory(data) for data in memory), *given]
        self._fds.extend(given)
        self._answers[kind] = (response, fds)
        return fds

    def ends_connection(self, kind: str, *, times: int = 1) -> None:
        """End the connection instead of answering, so often."""
        self._ends[kind] = times

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join(WAIT_S)
            self._listener.close()
            channel.close_all(self._fds)
            assert not self._thread.is_alive()

    def _memory(self, data: bytes) -> int:
        fd = os.memfd_create("scripted", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(4096, len(data)))
        os.pwrite(fd, data, 0)
        self._fds.append(fd)
        return fd

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            with sock:
                sock.settimeout(0.05)
                self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        while not self._is_over.is_set():
            try:
                request, fds = channel.receive(sock, wire.SessionRequest)
            except ChannelClosed as error:
                if isinstance(error.__cause__, TimeoutError):
                    continue
                return
            channel.close_all(fds)
            kind = request.WhichOneof("kind") or ""
            if self._ends.get(kind, 0):
                self._ends[kind] -= 1
                return
            if kind == "reclaim" and self.before_answer is not None:
                self.before_answer()
                self.before_answer = None
            response, sent = self._answer(kind)
            channel.send(sock, response, sent)
            if kind == "reclaim" and self.end_after_answer:
                self.end_after_answer = False
                return

    def _answer(self, kind: str) -> tuple[wire.SessionResponse, list[int]]:
        if kind != "bind":
            return self._answers.get(kind, (wire.SessionResponse(done=wire.Done()), []))
        self.num_bound += 1
        self.on_bind()
        bound = wire.Bound(
            boot_token=self.num_bound,
            session_id=1,
            secret=b"secret",
            is_resumed=self.num_bound > 1,
            slabs=self.bind_slabs,
        )
        return wire.SessionResponse(bound=bound), [self._lifeline]
