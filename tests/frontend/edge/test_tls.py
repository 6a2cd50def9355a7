"""TLS, mutual TLS and ALPN, at every edge."""

import asyncio
import ssl
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.edge.raw import RawClient
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import run, world
from unbroken.config import split_address
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


def test_what_tls_1_1_and_old_ciphers_offer_is_not_taken(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(edge="native", **tls_settings(certificates)) as it:
            context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
            context.set_alpn_protocols(["h2"])
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("ECDHE-ECDSA-AES128-SHA256")  # RFC 9113, appendix A.
            host, port = split_address(it.frontend.address)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(host, port, ssl=context)

    run(scenario())
