"""A frontend that says what a test tells it to say, rightly or wrongly."""

import asyncio
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


class Hang:
    """In a script: nothing more is said until the call is left."""


Script = Sequence[pb.GenerateResponse | UnbrokenError | Hang]


class FakeFrontend(inference_grpc.InferenceServiceServicer, admin_grpc.AdminServiceServicer):
    """`script` is what Generate says: its messages, perhaps an error, and the end of the call.

    `resume_scripts` are for calls of Resume, one after the other; the last is for all that follow.
    """

    def __init__(self, script: Script = (), *resume_scripts: Script) -> None:
        self.script = script
        self.resume_scripts = list(resume_scripts)
        self.requests: list[pb.GenerateRequest] = []
        self.resumes: list[pb.ResumeRequest] = []
        self.time_remaining_s: list[float | None] = []
        """Of every call of Generate and Resume."""
        self.left = asyncio.Event()
        """A call was left by its client before its end."""
        self.cancels: list[pb.CancelRequest] = []
        self.streams = [pb.StreamInfo(request_id=f"r{i}") for i in range(3)]
        self.thresholds = admin_pb.ThresholdsInfo(model="smol")
        self.thresholds.thresholds.prefill_tokens = 1000
        self.thresholds.thresholds.prefill_share = 2.0
        self.version = 4
        self.set_thresholds: list[admin_pb.SetThresholdsRequest] = []

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        async for message in self._play(self.script, request.request_id, context):
            yield message

    @override
    async def Resume(
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncIterator[pb.ResumeResponse]:
        self.resumes.append(request)
        if not self.resume_scripts:
            raise UnbrokenError(Reason.NOT_IMPLEMENTED, "no")
        script = self.resume_scripts[min(len(self.resumes), len(self.resume_scripts)) - 1]
        async for message in self._play(script, request.request.request_id, context):
            yield pb.ResumeResponse(response=message)

    async def _play(
        self, script: Script, request_id: str, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.time_remaining_s.append(context.time_remaining())
        try:
            for message in script:
                match message:
                    case UnbrokenError():
                        raise message
                    case Hang():
                        await asyncio.Event().wait()
                    case _ if message.HasField("started") and not message.started.request_id:
                        named = pb.GenerateResponse()
                        named.CopyFrom(message)
                        named.started.request_id = request_id
                        yield named
                    case _:
                        yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()  # Perhaps with a message on its way, before it hung.
            raise

    @override
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self.cancels.append(request)
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

    @override
    async def GetThresholds(
        self, request: admin_pb.GetThresholdsRequest, context: Context
    ) -> admin_pb.GetThresholdsResponse:
        return admin_pb.GetThresholdsResponse(models=[self.thresholds], version=self.version)

    @override
    async def SetThresholds(
        self, request: admin_pb.SetThresholdsRequest, context: Context
    ) -> admin_pb.SetThresholdsResponse:
        self.set_thresholds.append(request)
        self.thresholds.thresholds.CopyFrom(request.thresholds)
        self.version += 1
        return admin_pb.SetThresholdsResponse(thresholds=self.thresholds, version=self.version)

    @override
    async def GetLedger(
        self, request: admin_pb.GetLedgerRequest, context: Context
    ) -> admin_pb.GetLedgerResponse:
        return admin_pb.GetLedgerResponse()

    @override
    async def DrainFrontend(
        self, request: admin_pb.DrainFrontendRequest, context: Context
    ) -> AsyncIterator[admin_pb.DrainFrontendResponse]:
        yield admin_pb.DrainFrontendResponse(phase=admin_pb.FRONTEND_DRAIN_PHASE_STOPPING)


def started(**fields: Any) -> pb.GenerateResponse:
    """The first message of a stream; its id is that of the request."""
    return pb.GenerateResponse(started=pb.StreamStarted(**fields))


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
