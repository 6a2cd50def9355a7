"""Engines of another make, started by their sidecars and killed for real: streams go on exactly."""

import shlex
import socket
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import World, real_mesh
from unbroken.v1 import inference_service_pb2 as pb

NUM_TOKENS = 60
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("APPEND", {"temperature": 0.0}),
    "frequency penalty": ("APPEND", {"temperature": 0.0, "frequency_penalty": 1.5}),
    "seeded": ("REGENERATE", {"temperature": 0.9, "seed": 7}),
    "presence penalty": ("REGENERATE", {"temperature": 0.0, "presence_penalty": 1.5}),
}


def engine_flags() -> tuple[str, ...]:
    """A server of vLLM's protocol, at a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.engines", "--protocol=vllm", f"--port={port}"]
    return f"--engine-address=127.0.0.1:{port}", f"--engine-command={shlex.join(command)}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("engines"),
        num_workers=2,
        engine=None,
        sidecar_flags=["--engine-protocol=vllm", "--engine-is-invariant"],
        flags_of={name: engine_flags() for name in ("w1", "w2")},
        frontend_flags=["--query-deaths-max", "1000"],
    ) as world:
        yield world


@pytest.mark.parametrize("feature", FEATURES)
def test_a_stream_goes_on_exactly_when_its_engine_is_killed(world: World, feature: str) -> None:
    way, options = FEATURES[feature]

    def reader() -> Reader:
        stream = world.client.generate(
            token_ids=[5, 6, 7], max_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=25, **options
        )
        return Reader(world, stream)

    async def scenario() -> None:
        expected = await reader().to_the_end()
        it = reader()
        await it.until(NUM_TOKENS // 3)
        world.mesh.kill(await it.worker(), "engine")
        history = await it.to_the_end()
        assert_equal(history, expected)
        assert it.stream.started is not None
        announced = pb.ContinuationClass.Name(it.stream.started.continuation_class)
        assert announced == f"CONTINUATION_CLASS_{way}"
        await world.mesh.until_serving(["w1", "w2"], ["f1"])

    world.run(scenario())
