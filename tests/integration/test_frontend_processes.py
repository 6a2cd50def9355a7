"""A frontend of two processes behind one port: what one has the other answers for."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.integration.worlds import World, real_mesh, scrape
from tests.sidecar.processes import until
from unbroken.chaos import processes
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream
from unbroken.history import History, record
from unbroken.resumption import ResumePolicy
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2

FLAGS = ("--edge", "native", "--processes", "2", "--metrics-listen", "127.0.0.1:0")
NUM_TOKENS = 60
OPTIONS: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": NUM_TOKENS, "prompt": "Sea"}
LONG: dict[str, Any] = {**OPTIONS, "max_tokens": 2000, "ignore_eos": True}
OTHER: dict[str, Any] = {**LONG, "seed": 8}
NO_RESUME = ResumePolicy(resumes_max=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=2,
        is_emptied=True,
        engine_options="--step-base-ms 10",
        frontend_flags=FLAGS,
    ) as world:
        yield world


async def begun(stream: GenerationStream) -> str:
    """Which process has the stream, once it has a token."""
    await anext(stream)
    assert stream.started is not None
    return stream.started.frontend_id


@asynccontextmanager
async def client_of_each(world: World) -> AsyncGenerator[dict[str, Client]]:
    """By the name of the process to which it is connected, when all processes serve."""
    found: dict[str, Client] = {}
    clients: list[Client] = []
    try:
        async with asyncio.timeout(45):
            while len(found) < 2:
                client = Client(world.mesh.frontend_address, resume_policy=NO_RESUME)
                clients.append(client)
                async with client.generate(**OPTIONS) as stream:
                    found.setdefault(await begun(stream), client)
        yield found
    finally:
        for client in clients:
            await client.close()


async def life_of(world: World, name: str, *, but: int = 0) -> int:
    """The process id of a process, or of the one after that of the id `but`."""
    async with asyncio.timeout(45):
        while (record := world.mesh.frontends.get(name)) is None or record.pid == but:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return record.pid


def test_each_process_gets_every_other_connection(world: World) -> None:
    async def scenario() -> None:
        clients = [Client(world.mesh.frontend_address) for _ in range(6)]
        try:
            streams = [client.generate(**LONG) for client in clients]
            names = [await begun(stream) for stream in streams]
            for stream in streams:
                await stream.cancel()
        finally:
            for client in clients:
                await client.close()
        assert sorted(names).count("f1.1") in (2, 3, 4), names
        assert set(names) == {"f1.1", "f1.2"}

    world.run(scenario(), limit_s=80)


def test_thresholds_that_one_process_is_given_hold_in_all(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            one, other = clients["f1.1"], clients["f1.2"]
            wanted = worker_pb2.BusyThresholds(kv_blocks_share=0.9)
            version = (await one.set_thresholds(wanted)).version
            async with asyncio.timeout(5):
                while (found := await other.get_thresholds()).version != version:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert found.models[0].thresholds == wanted
            await other.set_thresholds(None, version=version)

    world.run(scenario(), limit_s=80)


def test_streams_of_a_killed_process_go_on_at_its_sibling_exactly(world: World) -> None:
    async def scenario() -> None:
        clients = [Client(world.mesh.frontend_address) for _ in range(4)]
        try:
            expected = await record(clients[0].generate(**OPTIONS))
            histories = [History() for _ in clients]
            streams = [client.generate(timeout_s=40, **OPTIONS) for client in clients]
            reading = [
                asyncio.create_task(record(stream, history))
                for stream, history in zip(streams, histories, strict=True)
            ]
            await until(lambda: all(one.num_tokens > NUM_TOKENS // 3 for one in histories))
            names = [stream.started.frontend_id for stream in streams if stream.started]
            pid = await life_of(world, "f1.1")
            await processes.kill([pid])
            seen = await asyncio.gather(*reading)
        finally:
            for client in clients:
                await client.close()
        assert "f1.1" in names
        for name, stream, history in zip(names, streams, seen, strict=True):
            assert history.difference(expected).is_none
            assert len(stream.resumes) == (name == "f1.1")
            assert history.finished is not None
            assert history.finished.usage.recomputed_decode_tokens == 0, "it was adopted"
        assert await life_of(world, "f1.1", but=pid) != pid

    world.run(scenario(), limit_s=80)


def test_the_equal_request_at_a_sibling_joins_and_the_call_before_it_ends(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            expected = await record(clients["f1.1"].generate(**OPTIONS))
            first = clients["f1.1"].generate(request_id="twice", **OPTIONS)
            assert await begun(first) == "f1.1"
            joined = clients["f1.2"].generate(request_id="twice", **OPTIONS)
            history = await record(joined)
            assert history.difference(expected).is_none
            assert joined.started is not None
            assert joined.started.frontend_id == "f1.1", "there is one stream"
            with pytest.raises(UnbrokenError) as caught:
                await first.text()
            assert caught.value.reason is Reason.FENCED
            again = await record(clients["f1.2"].generate(request_id="twice", **OPTIONS))
            assert again.difference(expected).is_none, "it is told again for a while"

    world.run(scenario(), limit_s=80)


def test_one_of_two_equal_requests_at_the_same_moment_is_joined(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            for number in range(10):
                streams = [
                    client.generate(request_id=f"race-{number}", **OPTIONS)
                    for client in clients.values()
                ]
                ends = await asyncio.gather(
                    *(stream.text() for stream in streams), return_exceptions=True
                )
                names = {stream.started.frontend_id for stream in streams if stream.started}
                assert len(names) == 1
                failures = [end for end in ends if isinstance(end, UnbrokenError)]
                assert [failure.reason for failure in failures] == [Reason.FENCED]

    world.run(scenario(), limit_s=80)


def test_another_request_under_a_siblings_id_is_refused(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            first = clients["f1.1"].generate(request_id="mine", **LONG)
            await begun(first)
            other = clients["f1.2"].generate(request_id="mine", **OTHER)
            with pytest.raises(UnbrokenError) as caught:
                await other.text()
            assert caught.value.reason is Reason.REQUEST_EXISTS
            await first.cancel()

    world.run(scenario(), limit_s=80)


def test_resume_at_a_sibling_goes_on_where_the_stream_runs(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            expected = await clients["f1.1"].generate(**OPTIONS).text()
            first = clients["f1.1"].generate(request_id="resumed", **OPTIONS)
            pieces = [await anext(first) for _ in range(5)]
            rest = clients["f1.2"].resume(first.checkpoint())
            text = "".join(piece.text for piece in pieces) + await rest.text()
            assert text == expected
            assert rest.started is not None
            assert rest.started.frontend_id == "f1.1"

    world.run(scenario(), limit_s=80)


def test_cancel_reaches_a_sibling_and_what_is_below_in_any_process(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            where = ["f1.1", "f1.2", "f1.1", "f1.2"]
            streams: list[GenerationStream] = []
            for number, name in enumerate(where):
                below = f"tree-{number - 1}" if number else ""
                stream = clients[name].generate(
                    request_id=f"tree-{number}", parent_request_id=below, **LONG
                )
                assert await begun(stream) == name
                streams.append(stream)
            bystander = clients["f1.1"].generate(request_id="bystander", **LONG)
            await begun(bystander)
            assert await clients["f1.2"].cancel("tree-0")
            for stream in streams:
                with pytest.raises(UnbrokenError) as caught:
                    await stream.text()
                assert caught.value.reason is Reason.CANCELLED
            await anext(bystander)
            assert not await clients["f1.2"].cancel("tree-0"), "it has ended"
            await bystander.cancel()

    world.run(scenario(), limit_s=80)


def test_streams_are_found_and_listed_whichever_process_is_asked(world: World) -> None:
    async def scenario() -> None:
        async with client_of_each(world) as clients:
            order = ["f1.1", "f1.2", "f1.2", "f1.1", "f1.2"]
            streams = [
                clients[name].generate(request_id=f"listed-{number}", **LONG)
                for number, name in enumerate(order)
            ]
            for stream in streams:
                await begun(stream)
            expected = [f"listed-{number}" for number in range(len(order))]
            listed: list[str] = []
            for client in clients.values():
                for request_id in expected:
                    info = await client.get_stream(request_id)
                    assert info.choices[0].state == pb.STREAM_STATE_RUNNING
                listed = [one.request_id async for one in client.list_streams()]
                assert [name for name in listed if name.startswith("listed-")] == expected
                with pytest.raises(UnbrokenError) as caught:
                    await client.get_stream("nobody's")
                assert caught.value.reason is Reason.STREAM_NOT_FOUND
            # Page by page, each from the other process.
            token, paged = "", list[str]()
            for number in range(1000):
                client = clients[("f1.1", "f1.2")[number % 2]]
                stub = client.frontends.stub(0)
                page = await stub.ListStreams(
                    pb.ListStreamsRequest(page_size=2, page_token=token), timeout=5
                )
                assert len(page.streams) <= 2
                paged += [one.request_id for one in page.streams]
                token = page.next_page_token
                if not token:
                    break
            assert paged == listed
            workers = await clients["f1.2"].list_workers()
            assert sum(worker.num_attempts for worker in workers) == len(order)
            for stream in streams:
                await stream.cancel()

    world.run(scenario(), limit_s=80)


def test_metrics_are_those_of_the_whole_and_never_fall(world: World) -> None:
    async def scenario() -> None:
        address = world.mesh.frontends["f1"].metrics_address

        async def page() -> dict[str, float]:
            return await asyncio.to_thread(scrape, address)

        async with client_of_each(world) as clients:
            before = await page()
            for client in clients.values():
                await client.generate(**OPTIONS).text()
            after = await page()
            name = "unbroken_frontend_tokens_delivered_total"
            assert after[name] - before[name] == 2 * NUM_TOKENS
            count = "unbroken_frontend_ttft_seconds_count"
            assert after[count] - before[count] == 2
            assert after["unbroken_frontend_processes"] == 2
            assert after["unbroken_frontend_edge_connections"] >= 2
            await until(lambda: len(world.mesh.frontends) == 3)
            pid = await life_of(world, "f1.2")
            await processes.kill([pid])
            await life_of(world, "f1.2", but=pid)
            last = await page()
            restarts = "unbroken_frontend_process_restarts_total"
            assert last[restarts] == after[restarts] + 1
            counted = [one for one in after if one.endswith(("_total", "_count", "_bucket"))]
            fallen = [one for one in counted if last[one] < after[one]]
            assert fallen == []

    world.run(scenario(), limit_s=80)


def test_a_stopped_process_is_replaced_and_its_streams_go_on(world: World) -> None:
    async def scenario() -> None:
        async with Client(world.mesh.frontend_address) as client:
            expected = await record(client.generate(**OPTIONS))
            stream, history = client.generate(timeout_s=40, **OPTIONS), History()
            reading = asyncio.create_task(record(stream, history))
            await until(lambda: history.num_tokens > NUM_TOKENS // 3)
            assert stream.started is not None
            name = stream.started.frontend_id
            pid = await life_of(world, name)
            os.kill(pid, signal.SIGSTOP)
            seen = await reading
            assert seen.difference(expected).is_none
            assert await life_of(world, name, but=pid) != pid
            assert stream.resumes[0].gap_s < 20, "5 to 7 s where there is room"

    world.run(scenario(), limit_s=80)
