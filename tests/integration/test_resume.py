"""A frontend dies under its streams, and they go on at another one: real processes, raw gRPC.

What a plain client recorded (`tests.integration.plain`) is all that it resumes from.
"""

import asyncio
from collections.abc import Generator
from typing import Any

import grpc.aio
import pytest

from tests.integration.plain import Caller, Recording, generate
from tests.integration.worlds import World, real_mesh
from unbroken.v1 import inference_service_pb2 as pb

pytestmark = pytest.mark.xdist_group("integration")

NUM_TOKENS = 40


@pytest.fixture(params=["grpcio", "native"])
def world(request: pytest.FixtureRequest, tmp_path: Any) -> Generator[World]:
    with real_mesh(
        tmp_path,
        num_workers=2,
        num_frontends=2,
        engine_options="--step-base-ms 10",
        frontend_flags=["--edge", request.param],
    ) as world:
        yield world


def test_a_stream_goes_on_at_another_frontend_and_nothing_is_computed_twice(world: World) -> None:
    async def scenario() -> None:
        first, second = world.mesh.frontend_addresses
        request = pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=range(300, 330)))
        request.params.sampling.temperature = 0.9
        request.params.sampling.seed = 7
        request.params.stopping.max_tokens = NUM_TOKENS
        expected = await generate(second, request)
        request.request_id = "s"
        seen = Recording(request)
        async with Caller(first) as caller:
            reading = asyncio.create_task(caller.generate(seen))
            while seen.num_tokens < 10:  # noqa: ASYNC110 - Nothing announces it.
                await asyncio.sleep(0.002)
            world.mesh.kill("f1")
            with pytest.raises(grpc.aio.AioRpcError):
                await reading
        async with Caller(second) as caller:
            assert await caller.resume(seen)
        assert seen.choices == expected.choices
        assert seen.finished is not None
        assert expected.finished is not None
        assert seen.finished.usage == expected.finished.usage
        assert seen.finished.usage.recomputed_prefill_tokens == 0

    world.run(scenario())
