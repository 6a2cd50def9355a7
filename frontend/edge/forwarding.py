"""Every other call goes to the gRPC server of this process, behind a Unix socket of its own.

Messages pass as bytes. Metadata, deadline, cancellation and status pass with them; user agent and
compression do not, as they are matters of one connection.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.descriptor_pool import Default

from frontend.edge.calls import ANSWER_FIELDS
from unbroken import status
from unbroken.http2.headers import Request
from unbroken.http2.messages import (
    PREFIX,
    Code,
    MessageReader,
    Refused,
    fields_of,
    metadata,
    passing_fields_of,
    timeout_s,
    trailers,
)

if TYPE_CHECKING:
    from frontend.edge.server import ClientConnection, EdgeServer

    _Call: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


class ForwardedCall:
    """One call of any method, on its way to the server behind."""

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
        self._body = MessageReader(request.get(b"grpc-encoding"), server.limits.request_bytes_max)
        self._inbox: deque[bytes] = deque()
        self._has_ended = False
        self._has_message = False
        self._num_owed = 0
        """Bytes that the client may send again once the inbox is empty."""
        self._has_input = asyncio.Event()
        self._has_room = asyncio.Event()
        if not request.path.startswith(b"/") or not request.path.isascii():
            raise Refused(Code.UNIMPLEMENTED, "expected a path of a service and a method")
        self.path = request.path.decode()
        method = cast("Any", channel).stream_stream(self.path)
        call = method(timeout=timeout_s(request), metadata=tuple(metadata(request.fields)))
        self._call = cast("_Call", call)
        self._task = asyncio.create_task(self._run())

    def data(self, data: bytes, *, ends: bool) -> None:
        """A piece of the request. Raises `Refused`."""
        self._inbox += self._body.feed(data)
        self._num_owed += len(data)
        self._has_message = self._has_message or bool(self._inbox)
        if ends:
            self._body.finish()
            if not self._has_message and self._takes_one_message():
                # The server behind would wait for it for ever.
                raise Refused(Code.INTERNAL, "expected one message, got none")
            self._has_ended = True
        if self._inbox or ends:
            self._has_input.set()
        else:
            self._repay()  # Of a message that has to come whole.

    def writable(self) -> None:
        """There is room for more."""
        self._has_room.set()

    def refuse(self, refused: Refused) -> None:
        """The protocol does not allow the request."""
        fields = trailers(refused.code, refused.detail, refused.fields)
        self.client.connection.send_headers(self.stream_id, [*ANSWER_FIELDS, *fields], ends=True)
        self.lost()

    def lost(self) -> None:
        """The stream is gone, and so is the call."""
        self._task.cancel()
        self._call.cancel()  # A task that has not begun yet never does, and so cleans nothing up.
        self.client.calls.pop(self.stream_id, None)

    async def _run(self) -> None:
        upload = asyncio.create_task(self._upload())
        try:
            await self._answer()
        except Exception as error:
            code, detail, _ = status.trailing(status.translated(error, self.path))
            self.client.connection.end(self.stream_id, trailers(code, detail))
            self._server.touch(self.client)
        finally:
            upload.cancel()
            self._call.cancel()
            self.client.calls.pop(self.stream_id, None)

    async def _answer(self) -> None:
        call, connection, stream_id = self._call, self.client.connection, self.stream_id
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

    async def _upload(self) -> None:
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

    def _takes_one_message(self) -> bool:
        """Whether the method is known, and is called with one message and not with many."""
        service, _, name = self.path[1:].partition("/")
        try:
            methods = Default().FindServiceByName(service).methods_by_name
        except KeyError:
            return False
        return name in methods and not methods[name].client_streaming

    def _repay(self) -> None:
        num_owed, self._num_owed = self._num_owed, 0
        self.client.connection.consumed(self.stream_id, num_owed)
        self._server.touch(self.client)
