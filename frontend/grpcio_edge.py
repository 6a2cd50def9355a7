"""The edge that grpcio serves: the reference, and what stands behind the native edge."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, cast

import grpc.aio
from typing_extensions import override

from frontend import summaries
from frontend.gateway import Inference
from frontend.reading import Reading
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import inference_service_pb2_grpc as pb_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class GrpcioEdge(pb_grpc.InferenceServiceServicer):
    """The service."""

    def __init__(self, gateway: Inference) -> None:
        self._gateway = gateway

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        has_news = asyncio.Event()
        opening = self._gateway.generate(request, _remaining_s(context), has_news.set)
        async with aclosing(_messages(opening, has_news, context)) as messages:
            async for message in messages:
                yield message

    @override
    async def Resume(
        self, request: pb.ResumeRequest, context: _Context
    ) -> AsyncIterator[pb.ResumeResponse]:
        has_news = asyncio.Event()
        opening = self._gateway.resume(request, _remaining_s(context), has_news.set)
        async with aclosing(_messages(opening, has_news, context)) as messages:
            async for message in messages:
                yield pb.ResumeResponse(response=message)

    @override
    async def Cancel(self, request: pb.CancelRequest, context: _Context) -> pb.CancelResponse:
        return await self._gateway.cancel(request)

    @override
    async def GetStream(
        self, request: pb.GetStreamRequest, context: _Context
    ) -> pb.GetStreamResponse:
        return await self._gateway.get_stream(request)

    @override
    async def ListStreams(
        self, request: pb.ListStreamsRequest, context: _Context
    ) -> pb.ListStreamsResponse:
        return await self._gateway.list_streams(request)

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: _Context
    ) -> pb.ListModelsResponse:
        return self._gateway.list_models()


async def _messages(
    opening: Awaitable[Reading], has_news: asyncio.Event, context: _Context
) -> AsyncGenerator[pb.GenerateResponse]:
    """What a call is told, from `started` to `finished`; raises what it failed of."""
    reader = await opening
    try:
        await context.send_initial_metadata(tuple(reader.initial_metadata))
        while True:
            has_news.clear()
            for output in reader.poll():
                messages = (
                    [output]
                    if isinstance(output, pb.GenerateResponse)
                    else summaries.messages(
                        output.choice_index, output.piece, resume_token=output.resume_token
                    )
                )
                for message in messages:
                    yield message
            reader.sent()
            if reader.is_over:
                break
            await has_news.wait()
    finally:
        reader.close()
    if reader.error is not None:
        raise reader.error


def _remaining_s(context: _Context) -> float | None:
    return cast("float | None", context.time_remaining())  # The stubs forget None.
