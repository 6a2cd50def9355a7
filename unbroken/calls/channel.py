"""Many calls to one server, each with one request: unary, or answered by a stream of messages.

    call ──▶ a connection that takes it ──▶ messages, one by one ──▶ the server's status
                     │ none is open: one is opened
                     │ all are full, or told to go: so is another

Errors are grpc.aio's, with the statuses that its own channels give. Nothing is tried twice.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError, Message
from typing_extensions import override

from unbroken.calls.transport import CallerTransport, check_address, error_of
from unbroken.http2.caller import CallerLimits, Ended, Event, MessageReceived, Status
from unbroken.http2.headers import Fields
from unbroken.http2.messages import Code

CONNECTIONS_MAX: Final = 64
"""That are open at once, to a server that takes few calls on each; more calls are refused."""
GREET_S_MAX: Final = 10.0
"""For the first word of a server whose kernel has taken the connection."""
PENDING_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of requests that a server does not read, on a connection; more calls are refused."""
UNREAD_MAX: Final = 64
"""Messages of a call that wait for their reader, before its server may send a window at most."""
LARGE_BYTES: Final = 64 * 1024
"""One message of such a size is as good as so many."""
LIMITS: Final = CallerLimits(window=256 * 1024)

M = TypeVar("M", bound=Message)


class Channel:
    """Calls to one server."""

    def __init__(
        self,
        address: str,
        limits: CallerLimits = LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address` is "host:port" or "unix:path". Raises ValueError."""
        check_address(address)
        self._address = address
        self._limits = limits
        self._clock = clock
        self._connections: list[_Connection] = []
        self._opening: asyncio.Task[_Connection | Status] | None = None
        self._is_closed = False

    async def unary(
        self, path: str, request: Message, response: type[M], *, timeout_s: float | None = None
    ) -> M:
        """A call that is answered by one message. Raises `grpc.aio.AioRpcError`."""
        answers = await self.stream(path, request, response, timeout_s=timeout_s)
        try:
            first = await answers.read()
            if first is None or await answers.read() is not None:
                number = "none" if first is None else "more"
                raise error_of(Status(Code.UNIMPLEMENTED, f"expected one message, got {number}"))
            return first
        finally:
            answers.cancel()

    async def stream(
        self, path: str, request: Message, response: type[M], *, timeout_s: float | None = None
    ) -> "Answers[M]":
        """A call that is answered by any number. Raises `grpc.aio.AioRpcError`.

        `timeout_s` is for all of it. Whoever does not read it to its end has to `cancel` it.
        """
        ends_at = None if timeout_s is None else self._clock() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected()
        except TimeoutError as error:
            raise error_of(_expired(timeout_s)) from error
        left_s = None if ends_at is None else ends_at - self._clock()
        return connection.ask(path, request, response, left_s)

    async def close(self) -> None:
        """End all calls and connections. Idempotent."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        for connection in self._connections:
            connection.close()

    async def _connected(self) -> "_Connection":
        """A connection that takes a call."""
        while not self._is_closed:
            self._connections = [one for one in self._connections if one.is_open]
            for connection in self._connections:
                if connection.takes_calls:
                    return connection
            if len(self._connections) >= CONNECTIONS_MAX:
                detail = f"the server takes no more calls on {CONNECTIONS_MAX} connections"
                raise error_of(Status(Code.RESOURCE_EXHAUSTED, detail))
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open(), name="open a connection")
            opening = self._opening
            await asyncio.wait([opening])  # Whoever is cancelled leaves it to the others.
            if opening.cancelled():
                continue  # By `close`.
            opened = opening.result()
            if isinstance(opened, Status):
                raise error_of(opened)
            if not opened.is_open:
                detail = f"{self._address} takes connections, and closes them at once"
                raise error_of(Status(Code.UNAVAILABLE, detail))
        raise error_of(Status(Code.CANCELLED, "the channel was closed"))

    async def _open(self) -> "_Connection | Status":
        """One more, or why there is none."""
        connection = _Connection(self._address, self._limits, self._clock)
        try:
            await connection.open()
        except OSError as error:
            return Status(Code.UNAVAILABLE, str(error))
        self._connections.append(connection)
        return connection


class Answers(Generic[M]):
    """What comes of one call, for one reader."""

    def __init__(self, connection: "_Connection", call: int, response: type[M]) -> None:
        self._connection = connection
        self._call = call
        self._parse: Callable[[bytes], M] = response.FromString
        self._unread: deque[bytes] = deque()
        self._is_held = False
        self._status: Status | None = None
        self._news: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    async def read(self) -> M | None:
        """The next message; None: the call ended well. Raises `grpc.aio.AioRpcError`."""
        while not self._unread:
            if self._status is not None:
                if self._status.code:
                    raise error_of(self._status)
                return None
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        message = self._unread.popleft()
        if self._is_held and not self._unread:
            self._is_held = False
            self._connection.release(self._call)
        try:
            return self._parse(message)
        except DecodeError as error:
            status = Status(Code.INTERNAL, f"expected another message: {error}")
            self._connection.end(self._call, status)
            raise error_of(status) from error

    async def __aiter__(self) -> AsyncIterator[M]:
        while (message := await self.read()) is not None:
            yield message

    def cancel(self) -> None:
        """No more of it is of use. Idempotent."""
        self._unread.clear()
        self._connection.end(self._call, Status(Code.CANCELLED, "cancelled here"))

    # For its connection.

    def expire_in(self, timeout_s: float) -> None:
        """End it unless it ends before."""
        self._deadline = asyncio.get_running_loop().call_later(
            timeout_s, self._connection.end, self._call, _expired(timeout_s)
        )

    def came(self, message: bytes) -> None:
        """One more; the hot path."""
        unread = self._unread
        unread.append(message)
        if (len(unread) >= UNREAD_MAX or len(message) >= LARGE_BYTES) and not self._is_held:
            self._is_held = True
            self._connection.hold(self._call)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def ended(self, status: Status) -> None:
        """The call is over; said once."""
        self._status = status
        if self._deadline is not None:
            self._deadline.cancel()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class _Connection(CallerTransport):
    """A connection of a channel: which reader each of its calls has."""

    def __init__(self, address: str, limits: CallerLimits, clock: Callable[[], float]) -> None:
        super().__init__(address, limits, clock)
        self._answers: dict[int, Answers[Message]] = {}  # By call.
        self._greeted: asyncio.Future[None] = self._loop.create_future()

    async def open(self) -> None:
        """Connect and wait until the server says how much it takes. Raises OSError, ValueError."""
        try:
            await self.connect()
            try:
                async with asyncio.timeout(GREET_S_MAX):
                    await self._greeted
            except TimeoutError as error:
                raise TimeoutError(f"{self._address} says nothing for {GREET_S_MAX:g} s") from error
        except BaseException:
            self.hang_up()
            raise
        if self._caller.is_over:
            raise ConnectionError(f"{self._address} speaks no HTTP/2, or closed the connection")

    @property
    def is_open(self) -> bool:
        """Calls run on it, or may."""
        return not (self._caller.is_over or self._caller.is_spent)

    @property
    def takes_calls(self) -> bool:
        """Whether it is the place for one more."""
        return self._caller.takes_calls

    def ask(
        self, path: str, request: Message, response: type[M], timeout_s: float | None
    ) -> Answers[M]:
        """Begin a call."""
        num_pending = self._caller.num_pending_bytes
        if num_pending > PENDING_BYTES_MAX:
            detail = f"the server has left {num_pending} bytes unread"
            raise error_of(Status(Code.RESOURCE_EXHAUSTED, detail))
        message = request.SerializeToString()
        call = self._call(path, _timeout(timeout_s))
        answers = Answers(self, call, response)
        self._answers[call] = answers  # pyright: ignore[reportArgumentType]
        if timeout_s is not None:
            answers.expire_in(timeout_s)
        self._caller.send(call, message, ends=True)
        self.wake()
        return answers

    def hold(self, call: int) -> None:
        """Its reader is behind."""
        self._caller.hold(call)

    def release(self, call: int) -> None:
        """It has caught up."""
        self._caller.release(call)
        self._wake_if_due()

    def end(self, call: int, status: Status) -> None:
        """End a call from here. Ignored if it is over."""
        answers = self._answers.pop(call, None)
        if answers is None:
            return
        self._caller.cancel(call)
        answers.ended(status)
        if self._caller.is_spent:
            self.hang_up()
        else:
            self._wake_if_due()

    def close(self) -> None:
        """End all."""
        for call in list(self._answers):
            self.end(call, Status(Code.CANCELLED, "the channel was closed"))
        self.hang_up()
        self._caller.closed("the channel was closed")

    @override
    def _tell(self, events: Iterable[Event]) -> None:
        answers = self._answers
        for event in events:
            match event:
                case MessageReceived(call, message):
                    answers[call].came(message)
                case Ended(call, status):
                    answers.pop(call).ended(status)
        if self._caller.is_spent:
            self.hang_up()
        if not self._greeted.done() and (self._caller.is_greeted or self._caller.is_over):
            self._greeted.set_result(None)

    @override
    def _tell_message(self, call: int, message: bytes) -> None:
        self._answers[call].came(message)

    def _wake_if_due(self) -> None:
        if self._caller.outbound:
            self.wake()


def _timeout(timeout_s: float | None) -> Fields:
    """What a server is told of the end in time."""
    if timeout_s is None:
        return ()
    timeout_ms = max(0, math.ceil(timeout_s * 1000))
    if timeout_ms < 10**8:  # gRPC allows eight digits.
        return ((b"grpc-timeout", b"%dm" % timeout_ms),)
    return ((b"grpc-timeout", b"%dS" % min(timeout_ms // 1000, 10**8 - 1)),)


def _expired(timeout_s: float | None) -> Status:
    return Status(Code.DEADLINE_EXCEEDED, f"no end within {timeout_s:g} s")
