"""TLS, mutual TLS and ALPN, at every edge."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.frontend.edge.raw import RawClient
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import run, world
from unbroken.config import split_address
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1.inference_service_pb2_grpc import InferenceServiceStub

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl makes the certificates"
)
PROMPT = list(b"once upon a time")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of a server and a client."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "3650")
    openssl("req", "-x509", *new_key, *ca)
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("req", *new_key, *request)
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3650")
        where = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "names")
        openssl("x509", "-req", *signing, *where)
    return directory


def settings(files: Path, *, mutual: bool = False) -> dict[str, Path]:
    """Of a frontend that speaks TLS."""
    found = {"tls_certificate": files / "server.pem", "tls_key": files / "server.key"}
    return found | ({"tls_client_ca": files / "ca.pem"} if mutual else {})


async def generate(address: str, files: Path, *, shows_certificate: bool) -> list[int]:
    """Token ids of a call over TLS, after another call on the same connection."""
    credentials = grpc.ssl_channel_credentials(
        (files / "ca.pem").read_bytes(),
        private_key=(files / "client.key").read_bytes() if shows_certificate else None,
        certificate_chain=(files / "client.pem").read_bytes() if shows_certificate else None,
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
def test_streams_come_over_tls(files: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **settings(files)) as it:
            ids = await generate(it.frontend.address, files, shows_certificate=False)
            assert ids == reference(PROMPT, 10)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_who_shows_a_certificate_of_the_authority_is_let_in_and_nobody_else(files: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **settings(files, mutual=True)) as it:
            address = it.frontend.address
            ids = await generate(address, files, shows_certificate=True)
            assert ids == reference(PROMPT, 10)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await generate(address, files, shows_certificate=False)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_who_does_not_speak_tls_gets_nothing(files: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), **settings(files)) as it:
            async with grpc.aio.insecure_channel(it.frontend.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            ids = await generate(it.frontend.address, files, shows_certificate=False)
            assert ids == reference(PROMPT, 10)

    run(scenario())


def test_a_client_that_negotiates_no_http_2_is_closed_and_counted(files: Path) -> None:
    async def scenario() -> None:
        async with world(edge="native", **settings(files)) as it:
            context = ssl.create_default_context(cafile=str(files / "ca.pem"))
            host, port = split_address(it.frontend.address)
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            assert await RawClient(reader, writer).until_closed() == []
            writer.close()
            count = it.frontend.registry.get_sample_value(
                "unbroken_frontend_edge_connections_failed_total", {"code": "NO_ALPN"}
            )
            assert count == 1

    run(scenario())


def test_what_tls_1_1_and_old_ciphers_offer_is_not_taken(files: Path) -> None:
    async def scenario() -> None:
        async with world(edge="native", **settings(files)) as it:
            context = ssl.create_default_context(cafile=str(files / "ca.pem"))
            context.set_alpn_protocols(["h2"])
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("ECDHE-ECDSA-AES128-SHA256")  # RFC 9113, appendix A.
            host, port = split_address(it.frontend.address)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(host, port, ssl=context)

    run(scenario())
