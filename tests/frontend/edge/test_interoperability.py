"""Clients of other people: each does all of gRPC, at both edges, in the clear and over TLS.

Those that are not there are skipped, unless all have to be there: `make interop` installs grpc-js,
nghttp and h2load. A client of grpcio is also in all other suites, grpcurl in tests/integration.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.edge.clients import (
    Aio,
    GrpcClient,
    GrpcJs,
    Grpcurl,
    H2load,
    Nghttp,
    Order,
    Place,
    Seen,
    Sync,
)
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import World, run, world
from unbroken.v1 import inference_service_pb2 as pb

PROMPT = 20 * list(b"once upon a time")
"""Long enough to be worth compressing: grpcio sends the rest as it is."""
CLIENTS: dict[str, GrpcClient] = {
    "grpcio (sync)": Sync(),
    "grpcio (aio)": Aio(),
    "grpc-js": GrpcJs(),
    "grpcurl": Grpcurl(),
    "nghttp": Nghttp(),
    "h2load": H2load(),
}
FEATURES = {
    "unary": "test_a_unary_call_is_answered",
    "streaming": "test_a_stream_is_read_to_its_end",
    "deadline": "test_a_deadline_ends_a_call",
    "cancel": "test_a_call_that_is_taken_back_ends",
    "large messages": "test_a_large_request_is_taken_whole_and_too_large_a_one_refused",
    "compression": "test_a_compressed_request_is_taken",
    "many streams": "test_many_streams_at_once_come_whole",
    "GOAWAY during load": "test_a_drain_lets_all_streams_come_to_their_end",
}
CANNOT = {("grpcurl", "compression"), ("grpcurl", "many streams")}
"""grpcurl has no flag for the one, and makes a connection for each call."""

pytestmark = [
    pytest.mark.usefixtures("each_edge"),
    pytest.mark.parametrize("security", ["plain", "TLS"]),
]


def each_client_with(feature: str) -> pytest.MarkDecorator:
    """Every client that can do it."""
    able = [name for name in CLIENTS if (name, feature) not in CANNOT]
    return pytest.mark.parametrize("client", able, indirect=True)


@pytest.fixture
def client(request: pytest.FixtureRequest) -> GrpcClient:
    """It, if it is there."""
    found = CLIENTS[request.param]
    found.find()
    return found


@pytest.fixture
def certificates_if_any(request: pytest.FixtureRequest, security: str) -> Path | None:
    """Where they are, if it is to be TLS."""
    return request.getfixturevalue("certificates") if security == "TLS" else None


@asynccontextmanager
async def served(
    certificates: Path | None, sidecar: FakeSidecar
) -> AsyncGenerator[tuple[World, Place]]:
    """A frontend with one worker, and where it is; all its requests have to end."""
    tls = {} if certificates is None else tls_settings(certificates)
    async with world(sidecar, **tls) as it:
        yield it, Place(it.frontend.address, certificates and certificates / "ca.pem")
        await it.until(lambda: it.num_running() == 0)


def request(max_tokens: int | None = None) -> pb.GenerateRequest:
    """A request whose output is known."""
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
    asked.params.sampling.temperature = 0
    if max_tokens is not None:
        asked.params.stopping.max_tokens = max_tokens
    return asked


def num_ended(it: World, reason: str) -> float:
    """Requests that ended so."""
    name = "unbroken_frontend_requests_finished_total"
    return it.frontend.registry.get_sample_value(name, {"reason": reason}) or 0


def num_delivered(it: World) -> float:
    """Tokens that were sent to clients."""
    name = "unbroken_frontend_tokens_delivered_total"
    return it.frontend.registry.get_sample_value(name) or 0


def assert_complete(
    it: World, client: GrpcClient, seen: Sequence[Seen], num_streams: int, num_tokens: int
) -> None:
    """So many streams came whole, to the client as far as it shows that, and from the frontend."""
    expected = Seen(code=0, ids=reference(PROMPT, num_tokens), is_finished=True)
    assert seen == [expected if client.shows_messages else Seen()] * num_streams
    assert num_ended(it, "OK") == num_streams
    assert num_delivered(it) == num_streams * num_tokens


@each_client_with("unary")
def test_a_unary_call_is_answered(certificates_if_any: Path | None, client: GrpcClient) -> None:
    async def scenario() -> None:
        async with served(certificates_if_any, FakeSidecar("w1")) as (_, place):
            (seen,) = await client.call(place, Order())
            expected = Seen(code=0, models=[MODEL])
            assert seen == (expected if client.shows_messages else Seen())

    run(scenario())


@each_client_with("streaming")
def test_a_stream_is_read_to_its_end(certificates_if_any: Path | None, client: GrpcClient) -> None:
    async def scenario() -> None:
        async with served(certificates_if_any, FakeSidecar("w1")) as (it, place):
            seen = await client.call(place, Order(request(10)))
            assert_complete(it, client, seen, 1, 10)

    run(scenario())


@each_client_with("deadline")
def test_a_deadline_ends_a_call(certificates_if_any: Path | None, client: GrpcClient) -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with served(certificates_if_any, sidecar) as (it, place):
            order = Order(request(), timeout_s=2)
            calling = asyncio.create_task(client.call(place, order))
            await it.until(lambda: sidecar.running)
            for _ in range(5):
                sidecar.step()
            (seen,) = await calling
            if client.shows_messages:
                assert (seen.code, seen.ids) == (4, reference(PROMPT, 5))
            await it.until(lambda: it.num_running() == 0)
            if not client.keeps_deadlines:  # Who does may leave before he is told.
                assert num_ended(it, "DEADLINE_EXCEEDED") == 1

    run(scenario())


@each_client_with("cancel")
def test_a_call_that_is_taken_back_ends(
    certificates_if_any: Path | None, client: GrpcClient
) -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", step_s=None)
        async with served(certificates_if_any, sidecar) as (it, place):
            order = Order(request())
            calling = asyncio.create_task(client.call(place, order))
            await it.until(lambda: sidecar.running)
            for _ in range(5):
                sidecar.step()
            await it.until(lambda: num_delivered(it) == 5)
            order.cancelled.set()
            await it.until(lambda: it.num_running() == 0)
            await sidecar.until(lambda: len(sidecar.aborts) == 1)
            told = await calling
            assert len(told) == client.shows_cancels
            for seen in told:
                assert seen.code == 1
                ids = seen.ids or []
                assert ids == reference(PROMPT, len(ids))

    run(scenario())


@each_client_with("large messages")
@pytest.mark.parametrize(("size", "code"), [(6_000_000, 3), (17_000_000, 8)])
def test_a_large_request_is_taken_whole_and_too_large_a_one_refused(
    certificates_if_any: Path | None, client: GrpcClient, size: int, code: int
) -> None:
    async def scenario() -> None:
        async with served(certificates_if_any, FakeSidecar("w1")) as (_, place):
            order = Order(pb.GenerateRequest(text="x" * size))
            (seen,) = await client.call(place, order)
            assert seen.code == code, "beyond the context, or beyond what a message may have"
            assert seen.has_details in (code == 3, None), (
                "with what is ours, not with the protocol's"
            )

    run(scenario())


@each_client_with("compression")
def test_a_compressed_request_is_taken(
    certificates_if_any: Path | None, client: GrpcClient
) -> None:
    async def scenario() -> None:
        async with served(certificates_if_any, FakeSidecar("w1")) as (it, place):
            seen = await client.call(place, Order(request(10), is_gzip=True))
            assert_complete(it, client, seen, 1, 10)

    run(scenario())


@each_client_with("many streams")
def test_many_streams_at_once_come_whole(
    certificates_if_any: Path | None, client: GrpcClient
) -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", tokens_per_step=4)
        async with served(certificates_if_any, sidecar) as (it, place):
            seen = await client.call(place, Order(request(20), count=100))
            assert_complete(it, client, seen, 100, 20)

    run(scenario())


@each_client_with("GOAWAY during load")
def test_a_drain_lets_all_streams_come_to_their_end(
    certificates_if_any: Path | None, client: GrpcClient
) -> None:
    async def scenario() -> None:
        count, num_tokens = client.num_streams, 300
        sidecar = FakeSidecar("w1", step_s=None)
        async with served(certificates_if_any, sidecar) as (it, place):
            order = Order(request(num_tokens), count=count)
            calling = asyncio.create_task(client.call(place, order))
            await it.until(lambda: len(sidecar.running) == count)
            sidecar.step()
            stopping = asyncio.create_task(it.frontend.stop(grace_s=10))
            await it.until(lambda: it.frontend.is_draining)
            for num_tokens_each in itertools.count(2):
                await it.until(lambda n=num_tokens_each: num_delivered(it) >= count * (n - 1))
                if sidecar.step() is None:
                    break
            assert_complete(it, client, await calling, count, num_tokens)
            await stopping

    run(scenario())
