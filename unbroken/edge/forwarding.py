"""Every other call goes to the gRPC server of this process, behind a Unix socket of its own.

Messages pass as bytes. Metadata, deadline, cancellation and status pass with them; user agent and
compression do not, as they are matters of one connection.
"""

import asyncio
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default

from unbroken import status
from unbroken.edge.answering import ANSWER_FIELDS, Deadline, OneMessage, messages_of
from unbroken.http2.headers import Fields, Request
from unbroken.http2.messages import (
    PREFIX,
    Code,
    MessageReader,
    Refused,
    fields_of,
    metadata,
    passing_fields_of,
    trailers,
)

if TYPE_CHECKING:
    from unbroken.edge.server import ClientConnection, EdgeServer

    _Upload: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]
    _Call: TypeAlias = _Upload | grpc.aio.UnaryStreamCall[bytes, bytes]


class ForwardedCall:
    """One call of any method, on its way to the server behind.

    If its method takes one message, it goes there when that has come whole, and with it: of a call
    that is answered while a message is written to it, grpc.aio says INTERNAL whatever the answer.
    """

    def __init__(
        self,
        server: "EdgeServer",
        client: "ClientConnection",
        stream_id: int,
        request: Request,
        channel: grpc.aio.Channel,
    ) -> None:
        """Raises `Refused`."""
        self.client = client
        self.stream_id = stream_id
        self._server = server
        self._channel = cast("Any", channel)
        self.path, method = _known(request.path, server.services)
        self._metadata = tuple(metadata(request.fields))
        self._deadline = Deadline(request, server.clock)
        self._has_room = asyncio.Event()
        self._has_headers = False
        """The answer has begun."""
        self._call: _Call | None = None
        self._task: asyncio.Task[None] | None = None
        self._upload: Upload | None = None
        self._message: OneMessage | None = None
        self._due: asyncio.TimerHandle | None = None
        """Of the message, which may never come."""
        wait_s = self._deadline.remaining_s()
        if method.client_streaming:
            call = self._channel.stream_stream(self.path)(timeout=wait_s, metadata=self._metadata)
            self._upload = Upload(server, client, stream_id, request, call)
            self._begin(call)
        else:
            self._message = OneMessage(server, client, stream_id, request)
            if wait_s is not None:
                self._due = asyncio.get_running_loop().call_later(wait_s, self._too_late)

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request. Raises `Refused`."""
        if self._upload is not None:
            self._upload.data(data, ends=ends)
        elif self._message is not None:
            message = self._message.feed(data, ends=ends)
            if message is not None:
                self._message = None
                self._wait_no_more()
                method, wait_s = self._channel.unary_stream(self.path), self._deadline.remaining_s()
                self._begin(method(message, timeout=wait_s, metadata=self._metadata))

    def _too_late(self) -> None:
        self.refuse(Refused(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        self._server.touch(self.client)

    def _begin(self, call: "_Call") -> None:
        self._call = call
        self._task = asyncio.create_task(self._run(call))

    def writable(self) -> None:
        """There is room for more."""
        self._has_room.set()

    def refuse(self, refused: Refused) -> None:
        """The protocol does not allow the request."""
        self._end(trailers(refused.code, refused.detail, refused.fields))
        self.lost()

    def lost(self) -> None:
        """The stream is gone, and so is the call."""
        if self._task is not None:
            self._task.cancel()
        self._close()  # A task that has not begun yet never does, and so cleans nothing up.

    def _end(self, fields: Fields) -> None:
        connection = self.client.connection
        if self._has_headers:
            connection.end(self.stream_id, fields)
        else:
            connection.send_headers(self.stream_id, [*ANSWER_FIELDS, *fields], ends=True)

    def _wait_no_more(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _close(self) -> None:
        self._wait_no_more()
        if self._message is not None:
            self._message.let_go()
        if self._upload is not None:
            self._upload.close()
        if self._call is not None:
            self._call.cancel()
        self.client.calls.pop(self.stream_id, None)
        self.client.waiting.pop(self, None)

    async def _run(self, call: "_Call") -> None:
        try:
            await self._answer(call)
        except Exception as error:
            code, detail, _ = status.trailing(status.translated(error, self.path))
            self._end(trailers(code, detail))
            self._server.touch(self.client)
        finally:
            self._close()

    async def _answer(self, call: "_Call") -> None:
        connection, stream_id = self.client.connection, self.stream_id
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if not self._has_headers:
                    initial = fields_of(tuple(await call.initial_metadata()))
                    self._has_headers = True
                    connection.send_headers(stream_id, [*ANSWER_FIELDS, *initial])
                    self._server.touch(self.client)  # Whether there is room for more or not.
                payload = cast("bytes", message)
                await self._until_room()
                connection.send_data(
                    stream_id, PREFIX.pack(0, len(payload)) + payload, self._server.clock()
                )
                self._server.touch(self.client)
        except grpc.aio.AioRpcError:
            pass  # Its status is what the client is told.
        code = cast("tuple[int, str]", (await call.code()).value)[0]
        more = fields_of(tuple(await call.trailing_metadata()))
        fields = trailers(code, await call.details() or "", more)
        # gRPC keeps the one that stands for the load to itself.
        fields += passing_fields_of(self._server.trailers())
        if not self._has_headers:
            fields = [*fields_of(tuple(await call.initial_metadata())), *fields]
        self._end(fields)
        self._server.touch(self.client)

    async def _until_room(self) -> None:
        connection, stream_id = self.client.connection, self.stream_id
        while self.client.is_paused or not connection.has_room(stream_id):
            self._has_room.clear()
            if self.client.is_paused:
                self.client.waiting[self] = None
            else:
                connection.want_room(stream_id, self._server.clock())
            await self._has_room.wait()


class Upload:
    """The messages of a call that takes many, on their way to the server behind.

    As long as some wait, their client gets no window back. Of a message that has not come whole
    nothing can be passed on, so that gives it back at once, and has to come to its end in time.
    Whatever is here counts as held.
    """

    def __init__(
        self,
        server: "EdgeServer",
        client: "ClientConnection",
        stream_id: int,
        request: Request,
        call: "_Upload",
    ) -> None:
        self._server = server
        self._client = client
        self._stream_id = stream_id
        self._call = call
        self._body = MessageReader(request.get(b"grpc-encoding"), server.limits.request_bytes_max)
        self._inbox: deque[bytes] = deque()
        self._has_ended = False
        self._num_owed = 0
        """Bytes that the client may send again once the inbox is empty."""
        self._num_held = 0
        """Bytes of messages that have not been passed on, whole or not."""
        self._has_input = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request. Raises `Refused`."""
        num_unfinished = self._body.num_held
        messages = messages_of(self._body, data, self._server)
        num_more = self._body.num_held - num_unfinished + sum(map(_num_bytes, messages))
        if not self._server.hold(num_more):
            raise Refused(Code.RESOURCE_EXHAUSTED, "too many requests are coming in at once")
        self._num_held += num_more
        self._num_owed += len(data)
        if messages:
            self._inbox += messages
            self._client.connection.expect_nothing(self._stream_id)
        if ends:
            self._body.finish()
            self._has_ended = True
        if self._inbox or ends:
            self._has_input.set()
        elif not self._has_input.is_set():
            self._repay()  # Of a message that has to come whole.

    def close(self) -> None:
        """Nothing more is passed on, nor held. Idempotent."""
        self._task.cancel()
        self._let_go(self._num_held)

    def _let_go(self, num_bytes: int) -> None:
        self._server.hold(-num_bytes)
        self._num_held -= num_bytes

    async def _run(self) -> None:
        try:
            while True:
                while self._inbox:
                    message = self._inbox.popleft()
                    await self._call.write(message)
                    self._let_go(_num_bytes(message))
                self._repay()
                if self._has_ended:
                    await self._call.done_writing()
                    return
                self._has_input.clear()
                await self._has_input.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The call is over; whoever reads it learns why.

    def _repay(self) -> None:
        """It is the client's turn: nothing waits but what it has begun."""
        connection = self._client.connection
        num_owed, self._num_owed = self._num_owed, 0
        connection.consumed(self._stream_id, num_owed)
        if self._body.num_held:
            connection.expect_end(self._stream_id, self._server.clock())
        self._server.touch(self._client)


def _num_bytes(message: bytes) -> int:
    """What it takes to hold it: no less than it took on its way, unless it was compressed."""
    return PREFIX.size + len(message)


def _known(path: bytes, services: Collection[str]) -> tuple[str, MethodDescriptor]:
    """The path of a method, and what that takes. Raises `Refused` if nobody serves it."""
    text = path.decode(errors="replace")
    start, service, name = [*text.split("/", 2), "", ""][:3]
    if not start and service in services:
        method = Default().FindServiceByName(service).methods_by_name.get(name)
        if method is not None:
            return text, method
    raise Refused(Code.UNIMPLEMENTED, "Method not found!")
