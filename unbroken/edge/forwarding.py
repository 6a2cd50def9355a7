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
from unbroken.edge.answering import ANSWER_FIELDS, Deadline, OneMessage, refuse
from unbroken.http2.headers import Request
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
        refuse(self.client, self.stream_id, refused)
        self.lost()

    def lost(self) -> None:
        """The stream is gone, and so is the call."""
        if self._task is not None:
            self._task.cancel()
        self._close()  # A task that has not begun yet never does, and so cleans nothing up.

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

    async def _run(self, call: "_Call") -> None:
        try:
            await self._answer(call)
        except Exception as error:
            code, detail, _ = status.trailing(status.translated(error, self.path))
            self.client.connection.end(self.stream_id, trailers(code, detail))
            self._server.touch(self.client)
        finally:
            self._close()

    async def _answer(self, call: "_Call") -> None:
        connection, stream_id = self.client.connection, self.stream_id
        has_headers = False
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if not has_headers:
                    has_headers = True
                    initial = fields_of(tuple(await call.initial_metadata()))
                    connection.send_headers(stream_id, [*ANSWER_FIELDS, *initial])
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
        if has_headers:
            connection.end(stream_id, fields)
        else:
            initial = fields_of(tuple(await call.initial_metadata()))
            connection.send_headers(stream_id, [*ANSWER_FIELDS, *initial, *fields], ends=True)
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
    """The messages of a call that takes many, on their way to the server behind."""

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
        self._has_input = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request. Raises `Refused`."""
        self._inbox += self._body.feed(data)
        self._num_owed += len(data)
        if ends:
            self._body.finish()
            self._has_ended = True
        if self._inbox or ends:
            self._has_input.set()
        else:
            self._repay()  # Of a message that has to come whole.

    def close(self) -> None:
        """Nothing more is passed on. Idempotent."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                while self._inbox:
                    await self._call.write(self._inbox.popleft())
                self._repay()
                if self._has_ended:
                    await self._call.done_writing()
                    return
                self._has_input.clear()
                await self._has_input.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The call is over; whoever reads it learns why.

    def _repay(self) -> None:
        num_owed, self._num_owed = self._num_owed, 0
        self._client.connection.consumed(self._stream_id, num_owed)
        self._server.touch(self._client)


def _known(path: bytes, services: Collection[str]) -> tuple[str, MethodDescriptor]:
    """The path of a method, and what that takes. Raises `Refused` if nobody serves it."""
    text = path.decode(errors="replace")
    start, service, name = [*text.split("/", 2), "", ""][:3]
    if not start and service in services:
        method = Default().FindServiceByName(service).methods_by_name.get(name)
        if method is not None:
            return text, method
    raise Refused(Code.UNIMPLEMENTED, "Method not found!")
