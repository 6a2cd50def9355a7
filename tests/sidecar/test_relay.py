"""RelayService on a real port: what frontends may do to it, and what they may not."""

import asyncio
import gc
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
from sidecar.relay import Relay, RelayCall
from sidecar.service import RELAY_SERVICE, edge_limits
from tests.frontend.edge.peer import GREETING, REQUEST, data
from tests.frontend.edge.raw import RawClient, connect
from tests.sidecar.fakes import TOKENIZER, Reader, ScriptedEngine, engine_up, failed, start_of
from tests.sidecar.processes import until
from unbroken.config import split_address
from unbroken.edge.metrics import EdgeMetrics
from unbroken.edge.native import NativeEdge
from unbroken.errors import Reason, UnbrokenError
from unbroken.http2 import frames
from unbroken.http2.headers import Fields
from unbroken.http2.messages import PREFIX
from unbroken.metrics import new_registry
from unbroken.outcome import FailureKind
from unbroken.status import Trailers, from_rpc_error
from unbroken.transport import make_server, open_channel
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb
from unbroken.v1.relay_service_pb2_grpc import (
    RelayServiceStub,
    add_RelayServiceServicer_to_server,
)

RELAY: Fields = [
    (name, b"/unbroken.v1.RelayService/Relay" if name == b":path" else value)
    for name, value in REQUEST
]
IDENTITY = worker_pb2.WorkerIdentity(worker_id="w", incarnation=1000)
INTERVAL_S = 0.02
LIMIT_S = 10.0


def said(**request: Any) -> bytes:
    """A message as it lies in a body."""
    message = pb.RelayRequest(**request).SerializeToString()
    return PREFIX.pack(0, len(message)) + message


HELLO = said(hello=pb.RelayHello(protocol_version=1, frontend_id="f", incarnation=5))

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
async def serving_relay(relay: Relay, trailers: Callable[[], Trailers]) -> AsyncGenerator[str]:
    """As a sidecar serves it."""
    server = make_server()
    add_RelayServiceServicer_to_server(relay, server)
    metrics = EdgeMetrics(new_registry(), "test")
    edge = NativeEdge.before(
        server,
        relay.answers,
        edge_limits(relay.write_max_s),
        metrics,
        services=(RELAY_SERVICE,),
        tls=None,
        trailers=trailers,
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
    *,
    write_max_s: float = LIMIT_S,
    silence_max_s: float = LIMIT_S,
    grace_s: float = LIMIT_S,
    hello_max_s: float = 0.2,
    trailers: Callable[[], Trailers] = tuple,
) -> AsyncGenerator[World, None]:
    engine = ScriptedEngine()
    hub = Hub(engine, orphan_grace_s=grace_s)
    hub.on_up(engine_up())
    relay = Relay(
        hub,
        IDENTITY,
        heartbeat_interval_s=INTERVAL_S,
        write_max_s=write_max_s,
        hello_max_s=hello_max_s,
    )

    async def tick() -> None:
        while True:
            hub.tick(silence_max_s=silence_max_s)
            await asyncio.sleep(INTERVAL_S)

    ticking = asyncio.create_task(tick())
    try:
        async with serving_relay(relay, trailers) as address:
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


# One call's bug, or its client's, is not the others' loss.


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("where", ["heard", "told", "told twice"])
def test_a_bug_ends_the_call_that_met_it_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        is_broken = False
        async with relaying(trailers=lambda: breaks() if is_broken else ()) as world:
            client, other = await world.connect(), await world.connect("other")
            slot = await world.start(other, 1)
            (link,) = (link for link in world.hub.links if link.frontend_id == "f")
            match where:
                case "heard":
                    monkeypatch.setattr(world.hub, "ack", breaks)
                    await client.say(ack=attempt_pb2.AckAttempts(slots=[1], offsets=[1]))
                case _:
                    is_broken = where == "told twice"
                    monkeypatch.setattr(link, "take", breaks)
                    link.heartbeat()
            world.step(slot, 7)
            await other.read_until(lambda: other.tokens.get(1) == [7])
            error = await client.error()
            assert error.reason is Reason.INTERNAL
            assert ("internal error" in error.detail) is (where != "told twice"), error.detail
            await until(lambda: link not in world.hub.links)
            is_broken = False
            await other.read_until(lambda: other.heartbeats)

    run(scenario)


@pytest.mark.parametrize(
    ("ending", "detail"),
    [
        (said(hello=pb.RelayHello(protocol_version=1, frontend_id="f")), b"a second"),
        (PREFIX.pack(0, 3) + b"\xff\xff\xff", b"expected a message"),
    ],
)
def test_nothing_is_obeyed_that_came_with_what_ended_the_call(ending: bytes, detail: bytes) -> None:
    async def scenario() -> None:
        async with relaying() as world, connect(world.address) as raw:
            raw.request(1, RELAY)
            raw.say(data(1, HELLO + ending + said(start=start_of(1))))
            fields = await raw.answer(1)
            assert fields[b"grpc-status"] == b"3", fields
            assert detail in fields[b"grpc-message"]
            assert not world.engine.started

    run(scenario)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_messages_come_out_however_they_are_cut(size: int) -> None:
    async def scenario() -> None:
        async with relaying() as world, connect(world.address) as raw:
            raw.request(1, RELAY)
            body = HELLO + said(start=start_of(1))
            for begin in range(0, len(body), size):
                raw.say(data(1, body[begin : begin + size]))
            await until(lambda: bool(world.engine.started))

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "body", "code", "detail"),
    [
        ((), b"", b"3", b"hello"),
        ((), HELLO_CUT := b"\0\0\0\0\x20half", b"13", b"into a message"),
        ((), b"\0\0\0\0\0" + HELLO_CUT, b"3", b"hello"),
        (((b"grpc-timeout", b"soon"),), b"", b"13", b"grpc-timeout"),
        (((b"grpc-encoding", b"br"),), b"\1\0\0\0\0", b"12", b"gzip"),
    ],
)
def test_what_the_protocol_forbids_is_refused(
    fields: Fields, body: bytes, code: bytes, detail: bytes
) -> None:
    async def scenario() -> None:
        async with relaying() as world, connect(world.address) as raw:
            raw.request(1, [*RELAY, *fields])
            raw.say(data(1, body, ends=True))
            answer = await raw.answer(1)
            assert answer[b"grpc-status"] == code, answer
            assert detail in answer[b"grpc-message"], answer

    run(scenario)


def test_half_a_message_after_the_hello_ends_the_call_in_its_trailers() -> None:
    async def scenario() -> None:
        async with relaying() as world, connect(world.address) as raw:
            raw.request(1, RELAY)
            raw.say(data(1, HELLO + b"\0\0\0\0\x20half", ends=True))
            answer = await raw.answer(1)
            assert answer[b"grpc-status"] == b"13", answer
            assert b"into a message" in answer[b"grpc-message"]

    run(scenario)


@pytest.mark.parametrize("after_hello", [True, False])
def test_the_deadline_of_a_call_ends_it(after_hello: bool) -> None:
    async def scenario() -> None:
        async with relaying(hello_max_s=LIMIT_S) as world, connect(world.address) as raw:
            raw.request(1, [*RELAY, (b"grpc-timeout", b"100m")])
            raw.say(data(1, HELLO if after_hello else b""))
            answer = await raw.answer(1)
            assert answer[b"grpc-status"] == b"4", answer

    run(scenario)


def test_calls_that_are_refused_at_once_leave_no_timer() -> None:
    async def scenario() -> None:
        async with relaying(hello_max_s=LIMIT_S) as world, connect(world.address) as raw:
            raw.request(1, [*RELAY, (b"grpc-timeout", b"soon")])
            await raw.answer(1)
        gc.collect()
        assert not [it for it in gc.get_objects() if isinstance(it, RelayCall)]

    run(scenario)


def test_every_call_ends_with_the_load() -> None:
    async def scenario() -> None:
        async with (
            relaying(trailers=lambda: (("load", "1"),)) as world,
            connect(world.address) as raw,
        ):
            raw.request(1, RELAY)
            raw.say(data(1, HELLO, ends=True))
            answer = await raw.answer(1)
            assert (answer[b"grpc-status"], answer[b"load"]) == (b"0", b"1")

    run(scenario)


def test_what_gathered_in_a_turn_of_the_loop_leaves_in_one_write() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            client = await world.connect()
            slot = await world.start(client, 1)
            for token_id in range(5):
                world.step(slot, token_id)
            (link,) = world.hub.links
            link.heartbeat()
            frame = await client.read()
            assert frame is not None
            assert list(frame.frame.token_ids) == [0, 1, 2, 3, 4]
            await client.read_until(lambda: client.heartbeats)

    run(scenario)


def test_a_frontend_that_stops_reading_for_a_while_now_and_then_is_kept() -> None:
    async def scenario() -> None:
        async with relaying(write_max_s=1.5) as world, open_channel(world.address) as channel:
            slow = await world.connect("slow", channel=channel)
            slot = await world.start(slow, 1)
            (link,) = world.hub.links
            num = 0
            for _ in range(3):
                while link.is_idle:  # What gRPC reads ahead it reads all the same.
                    for _ in range(50):
                        world.step(slot, *[999] * 10_000)
                        num += 10_000
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.8)
                assert not link.is_idle, "there is something that it has not read"
                await slow.read_until(lambda num=num: len(slow.tokens.get(1, [])) == num)

    run(scenario)


def test_who_ends_his_side_with_something_unread_is_gone_at_once() -> None:
    async def scenario() -> None:
        async with relaying() as world:
            reader, writer = await asyncio.open_connection(*split_address(world.address))
            raw = RawClient(reader, writer)
            raw.say(GREETING, frames.window_update(0, 2**30))
            raw.request(1, RELAY)
            raw.say(frames.window_update(1, 2**30), data(1, HELLO + said(start=start_of(1))))
            await until(lambda: bool(world.engine.started))
            (link,) = world.hub.links
            for _ in range(40):
                world.step(world.engine.started[-1].slot, *[999] * 100_000)
                await asyncio.sleep(0)
            await until(lambda: not link.is_idle)
            writer.write_eof()  # And nothing is ever read.
            await until(lambda: not world.hub.links)
            writer.transport.abort()

    run(scenario)
