"""TLS, mutual TLS and ALPN, at every edge."""

import asyncio
import ssl
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import grpc
import grpc.aio
import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.edge.raw import RawClient
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import run, world
from unbroken.config import split_address
from unbroken.edge import tls
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

PROMPT = list(b"once upon a time")


async def generate(address: str, certificates: Path, *, shows_certificate: bool) -> list[int]:
    """Token ids of a call over TLS, after another call on the same connection."""
    credentials = grpc.ssl_channel_credentials(
        (certificates / "ca.pem").read_bytes(),
        private_key=(certificates / "client.key").read_bytes() if shows_certificate else None,
        certificate_chain=(certificates / "client.pem").read_bytes() if shows_certificate else None,
    )
    async with grpc.aio.secure_channel(address, credentials) as channel:
        stub = InferenceServiceStub(channel)
        models = await stub.ListModels(pb.ListModelsRequest(), timeout=5)
        assert [model.model for model in models.models] == [MODEL]
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
        request.params.stopping.max_tokens = 10
        request.params.sampling.temperature = 0
        ids: list[int] = []
        async for message in stub.Generate(request):
            ids += message.token_ids
        return ids


@pytest.mark.usefixtures("each_edge")
def test_streams_come_over_tls(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **tls_settings(certificates)) as it:
            ids = await generate(it.frontend.address, certificates, shows_certificate=False)
            assert ids == reference(PROMPT, 10)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_who_shows_a_certificate_of_the_authority_is_let_in_and_nobody_else(
    certificates: Path,
) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **tls_settings(certificates, mutual=True)) as it:
            address = it.frontend.address
            ids = await generate(address, certificates, shows_certificate=True)
            assert ids == reference(PROMPT, 10)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await generate(address, certificates, shows_certificate=False)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_who_does_not_speak_tls_gets_nothing(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **tls_settings(certificates)) as it:
            async with grpc.aio.insecure_channel(it.frontend.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            ids = await generate(it.frontend.address, certificates, shows_certificate=False)
            assert ids == reference(PROMPT, 10)

    run(scenario())


def test_a_client_that_negotiates_no_http_2_is_closed_and_counted(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(edge="native", **tls_settings(certificates)) as it:
            context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
            host, port = split_address(it.frontend.address)
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            assert await RawClient(reader, writer).until_closed() == []
            writer.close()
            count = it.frontend.registry.get_sample_value(
                "unbroken_frontend_edge_connections_failed_total", {"code": "NO_ALPN"}
            )
            assert count == 1

    run(scenario())


def offer_tls_1_1(context: ssl.SSLContext) -> None:
    """Nothing newer, with whatever ciphers it had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")


def offer_an_old_cipher(context: ssl.SSLContext) -> None:
    """Of TLS 1.2, in appendix A of RFC 9113."""
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-ECDSA-AES128-SHA256")


def offer_tls_1_2(context: ssl.SSLContext) -> None:
    """As old as is taken."""
    context.maximum_version = ssl.TLSVersion.TLSv1_2


def client_context(certificates: Path, offer: Callable[[ssl.SSLContext], None]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    offer(context)
    return context


@pytest.mark.parametrize("offer", [offer_tls_1_1, offer_an_old_cipher])
def test_9_2_what_tls_1_1_and_old_ciphers_offer_is_not_taken(
    certificates: Path, offer: Callable[[ssl.SSLContext], None]
) -> None:
    async def scenario() -> None:
        async with world(edge="native", **tls_settings(certificates)) as it:
            host, port = split_address(it.frontend.address)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(host, port, ssl=client_context(certificates, offer))

    run(scenario())


def shake_hands(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> ssl.SSLObject:
    """The server's end. Raises what it finds wrong."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(up, down, server_side=True)
    client = client_side.wrap_bio(down, up, server_hostname="localhost")
    for _ in range(3):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return server


@pytest.mark.parametrize(
    ("offer", "reason"),
    [(offer_tls_1_1, "UNSUPPORTED_PROTOCOL"), (offer_an_old_cipher, "NO_SHARED_CIPHER")],
)
def test_9_2_a_server_knows_why_it_does_not_take_it(
    certificates: Path, offer: Callable[[ssl.SSLContext], None], reason: str
) -> None:
    context = tls.server_context(certificates / "server.pem", certificates / "server.key", None)
    taken = shake_hands(context, client_context(certificates, offer_tls_1_2))
    assert (taken.version(), taken.selected_alpn_protocol()) == ("TLSv1.2", "h2")
    with pytest.raises(ssl.SSLError) as error:
        shake_hands(context, client_context(certificates, offer))
    assert error.value.reason == reason


class LaxContext(ssl.SSLContext):
    """As where Python or OpenSSL were built, or configured, to allow everything."""

    def __new__(cls, protocol: int) -> "LaxContext":
        context = super().__new__(cls, protocol)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.options = ssl.Options(0)
        return context


def test_9_2_1_no_compression_no_renegotiation_and_no_tls_1_1_whatever_the_defaults_are(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lax = ModuleType("ssl")
    lax.__dict__.update(vars(ssl), SSLContext=LaxContext)
    monkeypatch.setattr(tls, "ssl", lax)
    context = tls.server_context(certificates / "server.pem", certificates / "server.key", None)
    assert isinstance(context, LaxContext)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.options & ssl.OP_NO_RENEGOTIATION
