"""The client library, the command line and grpcurl over TLS, and what they say if it fails."""

import asyncio
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import failure_of, read, read_some, run, world
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.resumption import ResumePolicy
from unbroken.tls import ClientTls

PROMPT = list(b"once upon a time")
WANTED = "seems to want a certificate of its clients"
REFUSED = "seems not to take the certificate"


def shown(certificates: Path, name: str = "client") -> ClientTls:
    """Of a client that shows the certificate of that name."""
    return ClientTls(
        ca=certificates / "ca.pem",
        certificate=certificates / f"{name}.pem",
        key=certificates / f"{name}.key",
    )


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("mutual", [False, True])
def test_every_call_of_the_client_library_passes_over_tls(certificates: Path, mutual: bool) -> None:
    async def scenario() -> None:
        tls = shown(certificates) if mutual else ClientTls(ca=certificates / "ca.pem")
        settings = tls_settings(certificates, mutual=mutual)
        async with (
            world(FakeSidecar("w1"), **settings) as it,
            Client(it.frontend.address, tls=tls) as client,
        ):
            stream = client.generate(token_ids=PROMPT, max_tokens=10, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 10)
            assert [model.model for model in await client.list_models()] == [MODEL]
            assert len(await client.list_workers()) == 1
            assert not await client.cancel(stream.request_id)
            assert (await client.get_stream(stream.request_id)).request_id == stream.request_id

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_a_stream_over_tls_goes_on_where_its_connection_broke(certificates: Path) -> None:
    async def scenario() -> None:
        tls = ClientTls(ca=certificates / "ca.pem")
        settings = tls_settings(certificates)
        async with world(FakeSidecar("w1", step_s=0.005), **settings) as it:
            async with Client(it.frontend.address, tls=tls) as first:
                stream = first.generate(token_ids=PROMPT, max_tokens=40, temperature=0)
                ids = [i for piece in await read_some(stream, 3) for i in piece.token_ids]
                checkpoint = stream.checkpoint()
            async with Client(it.frontend.address, tls=tls) as second:
                ids += (await read(second.resume(checkpoint)))[0]
            assert ids == reference(PROMPT, 40)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_the_name_that_the_certificate_has_can_be_told(certificates: Path) -> None:
    async def scenario() -> None:
        settings = tls_settings(certificates, name="elsewhere")
        tls = ClientTls(ca=certificates / "ca.pem", server_name="elsewhere.test")
        async with (
            world(FakeSidecar("w1"), **settings) as it,
            Client(it.frontend.address, tls=tls) as client,
        ):
            stream = client.generate(token_ids=PROMPT, max_tokens=10, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 10)

    run(scenario())


@pytest.mark.usefixtures("each_edge")
def test_unless_told_a_client_trusts_whom_its_machine_trusts(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))  # Of OpenSSL.

    async def scenario() -> None:
        async with (
            world(FakeSidecar("w1"), **tls_settings(certificates)) as it,
            Client(it.frontend.address, tls=ClientTls()) as client,
        ):
            assert [model.model for model in await client.list_models()] == [MODEL]

    run(scenario())


REFUSALS = {
    "an authority that is not trusted": ("server", "stranger", None, "local issuer certificate"),
    "another name": ("elsewhere", "ca", None, "mismatch"),
    "expired": ("expired", "ca", None, "certificate has expired"),
    "no certificate of the client": ("mutual", "ca", None, WANTED),
    "a strange certificate of the client": ("mutual", "ca", "stranger", REFUSED),
    "an expired certificate of the client": ("mutual", "ca", "expired", REFUSED),
    "no tls there": (None, "ca", None, "does not speak TLS"),
}
"""What the server shows or is, whom the client trusts, what it shows, and what it is told."""


@pytest.mark.usefixtures("each_edge")
@pytest.mark.parametrize("what", REFUSALS)
def test_who_is_refused_is_told_why(certificates: Path, what: str) -> None:
    server, trusted, client_name, words = REFUSALS[what]

    async def scenario() -> None:
        settings: dict[str, Path] = {}
        if server is not None:
            is_mutual = server == "mutual"
            name = "server" if is_mutual else server
            settings = tls_settings(certificates, mutual=is_mutual, name=name)
        ca = certificates / f"{trusted}.pem"
        tls = ClientTls(ca=ca)
        if client_name is not None:
            key = certificates / f"{client_name}.key"
            tls = ClientTls(ca=ca, certificate=certificates / f"{client_name}.pem", key=key)
        # Without the client that every world has, which would be refused itself.
        async with (
            world(**settings) as it,
            Client(
                it.frontend.address, tls=tls, resume_policy=ResumePolicy(resumes_max=0)
            ) as client,
            Client(it.frontend.address, it.frontend.address, tls=tls) as of_two,
        ):
            errors = [
                await failure_of(client.generate(token_ids=PROMPT)),
                await refusal(client),
                await refusal(of_two),
            ]
            for error in errors:
                assert error.reason is Reason.UNREACHABLE
                assert f"no TLS with {it.frontend.address}: " in error.detail
                assert words in error.detail

    run(scenario())


async def refusal(client: Client) -> UnbrokenError:
    """How a call that is no stream fails."""
    with pytest.raises(UnbrokenError) as caught:
        await client.list_models()
    return caught.value


def test_a_frontend_that_is_not_there_is_no_matter_of_tls(certificates: Path) -> None:
    async def scenario() -> None:
        async with Client("127.0.0.1:1", tls=ClientTls(ca=certificates / "ca.pem")) as client:
            assert "TLS" not in (await refusal(client)).detail

    run(scenario())


def test_files_that_are_wrong_are_named_at_once(certificates: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no certificate")
    pem, key = certificates / "client.pem", certificates / "client.key"
    with pytest.raises(ValueError, match=f"ca: expected PEM certificates in {text}"):
        Client("here:1", tls=ClientTls(ca=text))
    with pytest.raises(ValueError, match=f"ca: expected PEM certificates in {tmp_path}/missing"):
        Client("here:1", tls=ClientTls(ca=tmp_path / "missing"))
    with pytest.raises(ValueError, match=f"certificate, key: expected a PEM .* in {pem}"):
        Client("here:1", tls=ClientTls(certificate=pem, key=certificates / "server.key"))
    with pytest.raises(ValueError, match="expected certificate and key together"):
        ClientTls(key=key)


async def output_of(*command: str, **environment: str) -> tuple[int | None, str, str]:
    """Status and outputs of a command."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 15)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), err.decode()


def test_the_command_line_speaks_tls_and_says_what_is_wrong(certificates: Path) -> None:
    async def scenario() -> None:
        async with world(
            FakeSidecar("w1"), edge="native", **tls_settings(certificates, mutual=True)
        ) as it:
            base = (sys.executable, "-m", "unbroken.cli")
            asked = ("models", "--frontend", it.frontend.address, "-o", "json")
            ca = ("--ca", str(certificates / "ca.pem"))
            own = (
                *("--certificate", str(certificates / "client.pem")),
                *("--key", str(certificates / "client.key")),
            )
            status, out, _ = await output_of(*base, *ca, *own, *asked)
            assert (status, json.loads(out)[0]["model"]) == (0, MODEL)
            status, out, _ = await output_of(*base, *asked, UNBROKEN_CA=ca[1])
            assert status == 1
            assert WANTED in out
            status, _, err = await output_of(*base, *ca, *own[:2], *asked)
            assert status == 2
            assert "certificate and key together" in err
            status, _, err = await output_of(*base, "--ca", "/nowhere", *asked)
            assert status == 2
            assert "/nowhere" in err

    run(scenario())


def test_grpcurl_is_served_over_tls(certificates: Path) -> None:
    directory = sysconfig.get_path("scripts")
    grpcurl = shutil.which("grpcurl", path=f"{directory}:{os.environ['PATH']}")
    if grpcurl is None:
        pytest.skip("grpcurl is not installed")

    async def scenario() -> None:
        async with world(
            FakeSidecar("w1"), edge="native", **tls_settings(certificates, mutual=True)
        ) as it:
            ca = ("-cacert", str(certificates / "ca.pem"))
            own = (
                *("-cert", str(certificates / "client.pem")),
                *("-key", str(certificates / "client.key")),
            )
            address = it.frontend.address
            status, out, err = await output_of(grpcurl, *ca, *own, address, "list")
            assert status == 0, err
            assert "unbroken.v1.InferenceService" in out
            request = json.dumps(
                {"token_ids": {"ids": PROMPT}, "params": {"stopping": {"max_tokens": 5}}}
            )
            call = ("-d", request, address, "unbroken.v1.InferenceService/Generate")
            status, out, err = await output_of(grpcurl, *ca, *own, *call)
            assert status == 0, err
            assert '"finished"' in out
            status, out, _ = await output_of(grpcurl, "-connect-timeout", "1", *ca, *call)
            assert (status, out) == (1, ""), "it shows no certificate"

    run(scenario())
