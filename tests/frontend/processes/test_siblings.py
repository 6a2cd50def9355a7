"""How the processes of a frontend call each other: here within one process."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import uvloop
from prometheus_client import Counter
from typing_extensions import override

from frontend.drain import Drain
from frontend.draining import Draining, Leaving
from frontend.processes.siblings import Siblings, add_siblings, ask_metrics, socket_of
from frontend.processes.whole import PassedOn
from frontend.requests import Requests
from tests.unbroken.fake_frontend import FakeFrontend
from unbroken import metrics
from unbroken.errors import Reason, UnbrokenError
from unbroken.transport import listen_locally, make_server
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)


class Hanging(FakeFrontend):
    """What a process says that is about to die: nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_called = asyncio.Event()

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.is_called.set()
        await asyncio.Event().wait()
        yield pb.GenerateResponse()

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        self.is_called.set()
        await asyncio.Event().wait()
        return pb.ListModelsResponse()


class _Staying(Leaving):
    """A frontend that nobody asks to drain."""

    @override
    def leave(self) -> None: ...

    @override
    def go_away(self, within_s: float) -> None: ...

    @override
    def cut_short(self) -> None: ...

    @override
    def num_elsewhere(self) -> int:
        return 0


@asynccontextmanager
async def sibling(directory: Path, pid: int) -> AsyncGenerator[Hanging]:
    """One that serves as the process of that id, and has counted to 3."""
    registry = metrics.new_registry()
    Counter("counted", "What it has counted.", registry=registry).inc(3)
    server, hanging = make_server(), Hanging()
    requests = Requests(running_max=1)
    draining = Draining(Drain(1.0), "f", requests, _Staying())
    add_siblings(server, requests, registry, draining)
    add_InferenceServiceServicer_to_server(hanging, server)
    listen_locally(server, socket_of(directory, pid))
    await server.start()
    try:
        yield hanging
    finally:
        await server.stop(None)


@asynccontextmanager
async def calling(directory: Path) -> AsyncGenerator[Siblings]:
    """One that calls others."""
    siblings = Siblings(directory)
    try:
        yield siblings
    finally:
        await siblings.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario

    uvloop.run(limited())


def test_a_process_whose_threads_are_all_busy_still_answers_its_parent(tmp_path: Path) -> None:
    async def scenario() -> None:
        is_over = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, is_over.wait)
        try:
            async with sibling(tmp_path, 1), calling(tmp_path) as siblings:
                families = await ask_metrics(siblings.channel(1))
        finally:
            is_over.set()
            await busy
        samples = {one.name: one.samples for one in families}
        assert samples["counted"] == {("counted_total", ()): 3.0}

    run(scenario())


def test_who_waits_for_a_process_that_somebody_else_finds_gone_has_no_answer(
    tmp_path: Path,
) -> None:
    async def ask(channel: grpc.aio.Channel) -> pb.ListModelsResponse:
        return await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())

    async def scenario() -> None:
        async with sibling(tmp_path, 1) as hanging, calling(tmp_path) as siblings:
            asking = asyncio.create_task(siblings.ask_all(ask))
            await hanging.is_called.wait()
            socket_of(tmp_path, 1).unlink()
            assert await siblings.others() == {}
            assert await asking == []

    run(scenario())


def test_a_call_passed_on_to_a_process_that_somebody_else_finds_gone_is_tried_again(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with sibling(tmp_path, 1) as hanging, calling(tmp_path) as siblings:
            call = InferenceServiceStub(siblings.channel(1)).Generate(pb.GenerateRequest())
            passed_on = PassedOn(call, lambda: None, lambda _: None)
            beginning = asyncio.create_task(passed_on.begin())
            await hanging.is_called.wait()
            socket_of(tmp_path, 1).unlink()
            await siblings.others()
            with pytest.raises(UnbrokenError) as caught:
                await beginning
            assert caught.value.reason is Reason.UNREACHABLE
            assert "is gone" in caught.value.detail
            passed_on.close()

    run(scenario())


def test_who_is_cancelled_while_it_asks_all_is_cancelled(tmp_path: Path) -> None:
    async def ask(channel: grpc.aio.Channel) -> pb.ListModelsResponse:
        return await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())

    async def scenario() -> None:
        async with sibling(tmp_path, 1) as hanging, calling(tmp_path) as siblings:
            asking = asyncio.create_task(siblings.ask_all(ask))
            await hanging.is_called.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    run(scenario())
