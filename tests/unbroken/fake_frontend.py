"""A frontend that says what a test tells it to say, rightly or wrongly."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from typing_extensions import override

from tests.unbroken.servers import serving
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import admin_service_pb2_grpc as admin_grpc
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as inference_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Script = Sequence[pb.GenerateResponse | UnbrokenError]


class FakeFrontend(inference_grpc.InferenceServiceServicer, admin_grpc.AdminServiceServicer):
    """`script` is what Generate says: its messages, perhaps an error, and the end of the call."""

    def __init__(self, script: Script = ()) -> None:
        self.script = script
        self.requests: list[pb.GenerateRequest] = []
        self.streams = [pb.StreamInfo(request_id=f"r{i}") for i in range(3)]

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        for message in self.script:
            if isinstance(message, UnbrokenError):
                raise message
            yield message

    @override
    async def Resume(
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncIterator[pb.ResumeResponse]:
        raise UnbrokenError(Reason.NOT_IMPLEMENTED, "no")
        yield pb.ResumeResponse()

    @override
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(was_running=request.request_id == "r0" and not request.soft)

    @override
    async def GetStream(
        self, request: pb.GetStreamRequest, context: Context
    ) -> pb.GetStreamResponse:
        for stream in self.streams:
            if stream.request_id == request.request_id:
                return pb.GetStreamResponse(stream=stream)
        raise UnbrokenError(Reason.STREAM_NOT_FOUND, f"no {request.request_id}")

    @override
    async def ListStreams(
        self, request: pb.ListStreamsRequest, context: Context
    ) -> pb.ListStreamsResponse:
        """One a page, whatever the page size."""
        index = int(request.page_token or "0")
        token = str(index + 1) if index + 1 < len(self.streams) else ""
        return pb.ListStreamsResponse(streams=[self.streams[index]], next_page_token=token)

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.ModelInfo(model="smol")])

    @override
    async def ListWorkers(
        self, request: admin_pb.ListWorkersRequest, context: Context
    ) -> admin_pb.ListWorkersResponse:
        worker = admin_pb.WorkerInfo()
        worker.record.identity.worker_id = "w1"
        return admin_pb.ListWorkersResponse(workers=[worker])


def started(**fields: Any) -> pb.GenerateResponse:
    """The first message of a stream."""
    return pb.GenerateResponse(started=pb.StreamStarted(request_id="r1", **fields))


def tokens(
    offset: int, *token_ids: int, text: str = "", choice_index: int = 0
) -> pb.GenerateResponse:
    """A piece of output."""
    return pb.GenerateResponse(
        choice_index=choice_index, offset=offset, token_ids=token_ids, text=text
    )


def finished(*num_tokens: int) -> pb.GenerateResponse:
    """The last message of a stream whose choices have that many tokens."""
    message = pb.GenerateResponse()
    message.finished.usage.completion_tokens = sum(num_tokens)
    for index, number in enumerate(num_tokens):
        message.finished.choices.add(choice_index=index, num_tokens=number)
    return message


@asynccontextmanager
async def serving_frontend(frontend: FakeFrontend) -> AsyncGenerator[str, None]:
    """Serves `frontend`; yields its address."""
    add: list[Callable[[grpc.aio.Server], object]] = [
        lambda server: inference_grpc.add_InferenceServiceServicer_to_server(frontend, server),
        lambda server: admin_grpc.add_AdminServiceServicer_to_server(frontend, server),
    ]
    async with serving(*add) as address:
        yield address
