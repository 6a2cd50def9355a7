"""Clients of other people: grpc-js, nghttp and h2load, where they are installed.

grpcio's are in test_server and in all other suites, grpcurl in tests/integration/test_grpcurl.py.
For grpc-js, `npm install @grpc/grpc-js @grpc/proto-loader` somewhere and name its node_modules in
NODE_PATH; nghttp and h2load are in Debian's package nghttp2-client.
"""

import asyncio
import json
import os
import re
import shutil
from asyncio.subprocess import PIPE
from functools import cache
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import pytest

from tests.frontend.edge.certificates import tls_settings
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import run, world
from unbroken.http2.messages import PREFIX
from unbroken.v1 import inference_service_pb2 as pb

PROTOS = Path(__file__).parents[3] / "protos"
PROMPT = list(b"once upon a time")
GENERATE = "/unbroken.v1.InferenceService/Generate"
FIELDS = ("-H", "content-type: application/grpc", "-H", "te: trailers")

pytestmark = pytest.mark.usefixtures("each_edge")


@cache
def has_grpc_js() -> bool:
    """Whether node finds the client of grpc-js."""
    if shutil.which("node") is None:
        return False
    needed = "require('@grpc/grpc-js'); require('@grpc/proto-loader')"
    return run_process(["node", "-e", needed], capture_output=True).returncode == 0


needs_grpc_js = pytest.mark.skipif(
    not has_grpc_js(), reason="node with @grpc/grpc-js and @grpc/proto-loader in NODE_PATH"
)
needs_nghttp2 = pytest.mark.skipif(
    not (shutil.which("nghttp") and shutil.which("h2load")), reason="Debian's nghttp2-client"
)


async def output_of(*command: str) -> str:
    """What a client printed; it has to end well."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=PIPE, env=os.environ.copy()
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


def body(tmp_path: Path, max_tokens: int) -> str:
    """A file with the body of a Generate request."""
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
    request.params.stopping.max_tokens = max_tokens
    request.params.sampling.temperature = 0
    message = request.SerializeToString()
    path = tmp_path / "body"
    path.write_bytes(PREFIX.pack(0, len(message)) + message)
    return str(path)


def assert_grpc_js_saw_it_all(seen: Any) -> None:
    """Unary and streaming calls, many at once, cancel, deadline, errors."""
    assert seen["models"] == [MODEL]
    for stream in [seen["stream"], *seen["many"]]:
        assert stream["ids"] == reference(PROMPT, 10)
        assert (stream["finished"], stream["code"]) == (True, 0)
    expected = reference(PROMPT, 3000)
    assert seen["cancelled"]["code"] == 1
    assert seen["late"]["code"] == 4
    for partial in (seen["cancelled"], seen["late"]):
        assert len(partial["ids"]) >= 5
        assert len(expected) >= len(partial["ids"])
    assert seen["invalid"]["code"] == 3
    assert "grpc-status-details-bin" in seen["invalid"]["metadata"]


@needs_grpc_js
@pytest.mark.parametrize("is_tls", [False, True])
def test_grpc_js_is_served(certificates: Path, is_tls: bool) -> None:
    script = str(Path(__file__).parent / "client.js")

    async def scenario() -> None:
        tls = tls_settings(certificates) if is_tls else {}
        async with world(FakeSidecar("w1"), **tls) as it:
            ca = [str(certificates / "ca.pem")] if is_tls else []
            out = await output_of("node", script, it.frontend.address, str(PROTOS), *ca)
            assert_grpc_js_saw_it_all(json.loads(out))
            await it.until(lambda: it.num_running() == 0)

    run(scenario())


@needs_nghttp2
def test_nghttp_sees_a_call_as_http_2(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            url = f"http://{it.frontend.address}{GENERATE}"
            out = await output_of("nghttp", "-nv", *FIELDS, "-d", body(tmp_path, 10), url)
            plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
            assert ":status: 200" in plain
            assert "grpc-status: 0" in plain
            assert "GOAWAY" in plain  # Its own, with NO_ERROR.
            assert "PROTOCOL_ERROR" not in plain

    run(scenario())


@needs_nghttp2
@pytest.mark.parametrize("connections", [1, 8])
def test_h2load_loses_no_call(tmp_path: Path, connections: int) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", tokens_per_step=4)) as it:
            url = f"http://{it.frontend.address}{GENERATE}"
            load = ("-n", "400", "-c", str(connections), "-m", "20", "-d", body(tmp_path, 20))
            out = await output_of("h2load", *load, *FIELDS, url)
            assert "400 succeeded, 0 failed, 0 errored, 0 timeout" in out
            assert "status codes: 400 2xx" in out
            await it.until(lambda: it.num_running() == 0)

    run(scenario())
