"""RelayService on a real port: what frontends may do to it, and what they may not."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
import pytest
import uvloop

from sidecar.engines.base import EngineDown
from sidecar.hub import Hub
from sidecar.relay import Relay
from sidecar.service import EDGE_LIMITS, RELAY_SERVICE
from tests.sidecar.fakes import TOKENIZER, Reader, ScriptedEngine, engine_up, failed, start_of
from tests.sidecar.processes import until
from unbroken.edge.metrics import EdgeMetrics
from unbroken.edge.native import NativeEdge
from unbroken.errors import Reason, UnbrokenError
from unbroken.metrics import new_registry
from unbroken.outcome import FailureKind
from unbroken.status import from_rpc_error
from unbroken.transport import make_server, open_channel
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1.relay_service_pb2_grpc import (
    RelayServiceStub,
    add_RelayServiceServicer_to_server,
)

IDENTITY = worker_pb2.WorkerIdentity(worker_id="w", incarnation=1000)
INTERVAL_S = 0.02
LIMIT_S = 10.0

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.RelayRequest, pb.RelayResponse]"


class Client(Reader):
    """A frontend on a real wire."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.welcome = pb.RelayWelcome()

    async def say(self, **request: Any) -> None:
        await self.call.write(pb.RelayRequest(**request))

    async def read(self) -> pb.RelayResponse | None:
        """The next message; None: the call has ended well. Raises `UnbrokenError`."""
        try:
            async with asyncio.timeout(LIMIT_S):
                response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if response is grpc.aio.EOF:
            return None
        assert isinstance(response, pb.RelayResponse)
        self.hear(response)
        return response

    async def read_until(self, claim: Callable[[], object]) -> None:
        while not claim():
            assert await self.read() is not None

    async def error(self) -> UnbrokenError:
        """How the call ends."""
        with pytest.raises(UnbrokenError) as caught:
            await self.read_until(lambda: False)
        return caught.value


@dataclass
class World:
    hub: Hub
    engine: ScriptedEngine
    address: str
    channel: grpc.aio.Channel

    @property
    def stub(self) -> RelayServiceStub:
        return RelayServiceStub(self.channel)

    async def connect(
        self, frontend_id: str = "f", call_number: int = 1, channel: grpc.aio.Channel | None = None
    ) -> Client:
        client = Client(RelayServiceStub(channel or self.channel).Relay())
        hello = pb.RelayHello(
            protocol_version=1, frontend_id=frontend_id, incarnation=5, call_number=call_number
        )
        await client.say(hello=hello)
        response = await client.read()
        assert response is not None
        assert response.HasField("welcome"), "first of all"
        client.welcome = response.welcome
        return client

    async def start(self, client: Client, slot: int, request_id: str = "r") -> int:
        """Begin an attempt; returns the engine's handle."""
        number = len(self.engine.started)
        await client.say(start=start_of(slot, request_id))
        await until(lambda: len(self.engine.started) > number)
        return self.engine.started[-1].slot

    def step(self, slot: int, *token_ids: int) -> None:
        offset = self.hub.ledger.running[slot].end_offset
        count = [len(token_ids)]
        self.hub.on_frame(
            attempt_pb2.StepFrame(
                slots=[slot], offsets=[offset], token_counts=count, token_ids=token_ids
            )
        )


@asynccontextmanager
async def serving_relay(relay: Relay) -> AsyncGenerator[str, None]:
    """As a sidecar serves it."""
    server = make_server()
    add_RelayServiceServicer_to_server(relay, server)
    metrics = EdgeMetrics(new_registry(), "test")
    edge = NativeEdge.before(
        server,
        relay.by_path,
        EDGE_LIMITS,
        metrics,
        services=(RELAY_SERVICE,),
        tls=None,
        clock=time.monotonic,
    )
    await server.start()
    try:
        yield await edge.start("127.0.0.1:0")
    finally:
        await edge.stop()
        await server.stop(0)


@asynccontextmanager
async def relaying(
    *, write_max_s: float = LIMIT_S, silence_max_s: float = LIMIT_S, grace_s: float = LIMIT_S
) -> AsyncGenerator[World, None]:
    engine = ScriptedEngine()
    hub = Hub(engine, orphan_grace_s=grace_s)
    hub.on_up(engine_up())
    relay = Relay(  # pyright: ignore[reportAbstractUsage] - Calls of Relay end at the edge.
        hub,
        IDENTITY,
        heartbeat_interval_s=INTERVAL_S,
        write_max_s=write_max_s,
        hello_max_s=0.2,
    )

    async def tick() -> None:
        while True:
            hub.tick(silence_max_s=silence_max_s)
            await asyncio.sleep(INTERVAL_S)

    ticking = asyncio.create_task(tick())
    try:
        async with serving_relay(relay) as address:
            async with open_channel(address) as channel:
                yield World(hub, engine, address, channel)
            await until(lambda: not hub.links)
            hub.ledger.check()
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a loop of its own, in which no task is left at the end."""

    async def checked() -> None:
        async with asyncio.timeout(30):
            await scenario()
        me = asyncio.current_task()
        await until(lambda: asyncio.all_tasks() <= {me})

    uvloop.run(checked())


def test_a_welcome_tells_who_answers_and_what_the_engine_is() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            assert client.welcome.protocol_version == 1
            assert client.welcome.identity == IDENTITY
            assert client.welcome.verdict.state == worker_pb2.ENGINE_STATE_SERVING
            assert client.welcome.verdict.description.model == "m"

    run(scenario)


@pytest.mark.parametrize(
    ("request_", "reason", "detail"),
    [
        (pb.RelayRequest(heartbeat=pb.Heartbeat()), Reason.PROTOCOL_VIOLATION, "got heartbeat"),
        (pb.RelayRequest(), Reason.PROTOCOL_VIOLATION, "got None"),
        (
            pb.RelayRequest(hello=pb.RelayHello(frontend_id="f")),
            Reason.PROTOCOL_VIOLATION,
            "protocol version 1 or later, got 0",
        ),
        (
            pb.RelayRequest(hello=pb.RelayHello(protocol_version=1, frontend_id="no spaces")),
            Reason.PROTOCOL_VIOLATION,
            "got 'no spaces'",
        ),
        (
            pb.RelayRequest(hello=pb.RelayHello(protocol_version=1)),
            Reason.PROTOCOL_VIOLATION,
            "frontend_id",
        ),
        (
            pb.RelayRequest(
                hello=pb.RelayHello(
                    protocol_version=1, frontend_id="f", expected_worker_incarnation=999
                )
            ),
            Reason.FENCED,
            "999, this is 1000",
        ),
    ],
)
def test_a_call_begins_with_a_hello_that_is_right(
    request_: pb.RelayRequest, reason: Reason, detail: str
) -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = Client(world.stub.Relay())
            await client.call.write(request_)
            error = await client.error()
            assert (error.reason, detail in error.detail) == (reason, True), error.detail
            assert not world.hub.links

    run(scenario)


@pytest.mark.parametrize("ends", [True, False])
def test_a_call_without_a_hello_is_closed(ends: bool) -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = Client(world.stub.Relay())
            if ends:
                await client.call.done_writing()
            error = await client.error()
            assert error.reason is Reason.PROTOCOL_VIOLATION
            assert "got nothing" in error.detail

    run(scenario)


def test_a_second_hello_closes_the_call() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            await client.say(hello=pb.RelayHello(protocol_version=1, frontend_id="f"))
            error = await client.error()
            assert error.reason is Reason.PROTOCOL_VIOLATION
            assert "second" in error.detail

    run(scenario)


def test_a_newer_call_replaces_an_older_one_and_not_the_other_way_round() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            old = await world.connect(call_number=1)
            new = await world.connect(call_number=2)
            assert (await old.error()).reason is Reason.FENCED
            late = Client(world.stub.Relay())
            hello = pb.RelayHello(protocol_version=1, frontend_id="f", incarnation=5, call_number=1)
            await late.say(hello=hello)
            assert (await late.error()).reason is Reason.FENCED
            await new.read_until(lambda: new.heartbeats)

    run(scenario)


async def raw_write(client: Client, data: bytes) -> None:
    await client.call.write(cast("pb.RelayRequest", data))


@pytest.mark.parametrize("after_hello", [True, False])
def test_garbage_on_the_wire_ends_that_call_alone(after_hello: bool) -> None:
    async def scenario() -> None:
        async with relaying() as world:
            other = await world.connect("other")
            raw = world.channel.stream_stream(
                "/unbroken.v1.RelayService/Relay",
                request_serializer=bytes,
                response_deserializer=pb.RelayResponse.FromString,
            )
            client = Client(cast("Call", raw()))
            if after_hello:
                hello = pb.RelayHello(protocol_version=1, frontend_id="f")
                await raw_write(client, pb.RelayRequest(hello=hello).SerializeToString())
                await until(lambda: len(world.hub.links) == 2)
            await raw_write(client, b"\xff\xff\xff")
            error = await client.error()
            assert error.reason is Reason.PROTOCOL_VIOLATION
            assert "expected a message" in error.detail
            slot = await world.start(other, 1)
            world.step(slot, 7)
            await other.read_until(lambda: other.tokens.get(1) == [7])

    run(scenario)


def test_a_message_that_is_too_large_ends_that_call_alone() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            other = await world.connect("other")
            client = await world.connect()
            await world.start(client, 1)
            huge = start_of(2, prompt=[2**31] * 4_000_000)
            await client.call.write(pb.RelayRequest(start=huge))
            await client.error()
            assert await client.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await until(lambda: len(world.hub.links) == 1)
            assert world.hub.ledger.running[1].orphaned_until is not None
            await other.read_until(lambda: other.heartbeats)

    run(scenario)


def test_tokens_and_the_end_reach_the_frontend_between_heartbeats() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            slot = await world.start(client, 1)
            ids = list[int]()
            while len(client.heartbeats) < 5:
                ids.append(len(ids) % 1000)
                world.step(slot, ids[-1])
                await client.read()
            ended = failed(slot, len(ids), FailureKind.ENGINE_ERROR)
            world.hub.on_frame(attempt_pb2.StepFrame(ended=[ended]))
            await client.read_until(lambda: client.ended)
            assert client.tokens[1] == ids
            assert client.ended[1].failure == worker_pb2.FAILURE_KIND_ENGINE_ERROR
            assert client.heartbeats[0].interval.ToMilliseconds() == 20

    run(scenario)


def test_heartbeats_say_what_was_heard() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            await client.say(heartbeat=pb.Heartbeat(sequence=41))
            await client.say()  # Of a later version of the contract.
            await client.read_until(
                lambda: client.heartbeats and client.heartbeats[-1].sequence_seen == 41
            )

    run(scenario)


def test_commands_reach_the_engine() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            slot = await world.start(client, 1)
            world.step(slot, 7, 8)
            await client.say(ack=attempt_pb2.AckAttempts(slots=[1], offsets=[2]))
            await client.say(abort=attempt_pb2.AbortAttempt(slot=1))
            await until(lambda: world.engine.aborted == [slot])
            assert world.engine.acked == [(slot, 2)]
            key = attempt_pb2.StreamKey(request_id="r")
            await client.say(adopt=pb.AdoptAttempt(slot=2, stream=key, epoch=2, offset=1))
            client.offsets[2] = 1
            await client.read_until(lambda: client.tokens.get(2) == [8])
            assert client.adopted[2].end_offset == 2
            assert client.ended[1].failure == worker_pb2.FAILURE_KIND_FENCED

    run(scenario)


def test_a_new_call_takes_up_what_it_wants_in_bulk_and_releases_the_rest() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            old = await world.connect()
            slots = [await world.start(old, slot, f"r{slot}") for slot in (1, 2, 3)]
            for slot in slots:
                world.step(slot, 5, 6)
            client = await world.connect(call_number=2)
            adopts = [
                pb.AdoptAttempt(
                    slot=slot,
                    stream=attempt_pb2.StreamKey(request_id=f"r{slot}"),
                    epoch=(1 << 32) + 1,
                    offset=1,
                )
                for slot in (1, 2)
            ]
            client.offsets = {1: 1, 2: 1}
            await client.say(commands=pb.AttemptCommands(adopts=adopts))
            await client.say(release=pb.ReleaseAttempts())
            await client.read_until(lambda: len(client.tokens) == 2)
            assert client.tokens == {1: [6], 2: [6]}
            await until(lambda: bool(world.engine.aborted))
            assert world.engine.aborted == [slots[2]]
            client.call.cancel()

    run(scenario)


def test_a_frontend_that_does_not_read_is_lost_and_nobody_else() -> None:
    async def scenario() -> None:
        async with relaying(write_max_s=0.5) as world, open_channel(world.address) as channel:
            stuck = await world.connect("stuck", channel=channel)
            other = await world.connect("other")
            stuck_slot = await world.start(stuck, 1, "stuck")
            slot = await world.start(other, 1, "other")
            chunk = [999] * 2_000
            ids = list[int]()
            while len(world.hub.links) == 2:
                world.step(stuck_slot, *chunk)
                world.step(slot, len(ids) % 1000)
                ids.append(len(ids) % 1000)
                await other.read_until(lambda: len(other.tokens.get(1, [])) == len(ids))
            (link,) = world.hub.links
            assert link.frontend_id == "other"
            assert world.hub.ledger.running[stuck_slot].orphaned_until is not None
            error = await stuck.error()
            assert error.reason is Reason.OVERLOADED
            assert "nothing read for 0.5 s" in error.detail
            await other.read_until(lambda: other.heartbeats)

    run(scenario)


@pytest.mark.parametrize("how", ["cancel", "close", "half-close", "deadline"])
def test_attempts_of_a_frontend_that_vanishes_are_aborted_after_their_grace(how: str) -> None:
    async def scenario() -> None:
        async with relaying(grace_s=0.1) as world, open_channel(world.address) as channel:
            client = await world.connect(channel=channel)
            slot = await world.start(client, 1)
            world.step(slot, 7)
            match how:
                case "cancel":
                    client.call.cancel()
                case "close":
                    await channel.close()
                case "half-close":
                    await client.call.done_writing()
                    while await client.read() is not None:
                        pass
                    assert await client.call.code() is grpc.StatusCode.OK
                case _:
                    call = RelayServiceStub(channel).Relay(timeout=0.2)
                    hello = pb.RelayHello(
                        protocol_version=1, frontend_id="f", incarnation=5, call_number=2
                    )
                    await call.write(pb.RelayRequest(hello=hello))
            await until(lambda: not world.hub.links)
            world.step(slot, 8)  # It goes on.
            await until(lambda: world.engine.aborted == [slot])

    run(scenario)


@pytest.mark.parametrize("how", ["cancel", "close", "half-close"])
def test_a_call_that_ends_within_a_write_leaves_nothing(how: str) -> None:
    async def scenario() -> None:
        async with relaying() as world, open_channel(world.address) as channel:
            client = await world.connect(channel=channel)
            slot = await world.start(client, 1)
            (link,) = world.hub.links
            for _ in range(40):
                world.step(slot, *[999] * 10_000)
                await asyncio.sleep(0)
            await until(lambda: not link.is_idle)
            match how:
                case "cancel":
                    client.call.cancel()
                case "close":
                    await channel.close()
                case _:
                    await client.call.done_writing()
                    while await client.read() is not None:
                        pass
                    assert len(client.tokens[1]) == 400_000, "what waited was written"
            await until(lambda: not world.hub.links)

    run(scenario)


def test_a_frontend_that_says_nothing_is_lost() -> None:
    async def scenario() -> None:
        async with relaying(silence_max_s=0.2) as world:
            client = await world.connect()
            await world.start(client, 1)
            error = await client.error()
            assert error.reason is Reason.UNREACHABLE
            assert world.hub.ledger.running[1].orphaned_until is not None

    run(scenario)


def test_the_end_of_the_engine_and_its_return_reach_the_frontend() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            slot = await world.start(client, 1)
            world.step(slot, 7, 8, 9)
            world.hub.on_down(EngineDown(1, FailureKind.CRASH, "it died"))
            world.hub.on_up(engine_up(2))
            await client.read_until(lambda: len(client.verdicts) == 3)
            assert client.ended[1].end_offset == 3
            serving_again = client.verdicts[-1]
            assert serving_again.engine_incarnation == 2

    run(scenario)


def test_the_tokenizer_is_there_once_the_engine_is() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            world.hub.on_down(EngineDown(1, FailureKind.CRASH, "it died"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await world.stub.GetTokenizer(pb.GetTokenizerRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert from_rpc_error(caught.value).reason is Reason.NO_WORKER
            world.hub.on_up(engine_up(2))
            response = await world.stub.GetTokenizer(pb.GetTokenizerRequest())
            assert response == pb.GetTokenizerResponse(tokenizer=TOKENIZER, fingerprint="t")

    run(scenario)


def test_what_waits_at_a_frontend_is_told_to_the_others_while_its_call_is_open() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            one, other = await world.connect("one"), await world.connect("other")
            queue = pb.QueueReport(sequence=1, tokens_waiting=30, tokens_promised=4)
            await one.say(heartbeat=pb.Heartbeat(sequence=1, queue=queue))
            await other.read_until(lambda: other.heartbeats and other.heartbeats[-1].queues)
            (told,) = other.heartbeats[-1].queues
            assert (told.frontend_id, told.tokens_waiting, told.tokens_promised) == ("one", 30, 4)
            await one.read_until(lambda: len(one.heartbeats) >= 3)
            assert not one.heartbeats[-1].queues, "its own it knows"
            one.call.cancel()
            await until(lambda: len(world.hub.links) == 1)
            seen = len(other.heartbeats)
            await other.read_until(
                lambda: len(other.heartbeats) > seen + 1 and not other.heartbeats[-1].queues
            )

    run(scenario)
