"""A stream of a real model survives the death of its host."""

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import real_mesh
from unbroken.request import GenerateOptions


@pytest.mark.llama
def test_a_chat_on_a_real_model_survives_its_host(tmp_path_factory: pytest.TempPathFactory) -> None:
    options: GenerateOptions = {"temperature": 0.8, "seed": 7, "max_tokens": 24}
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    with real_mesh(tmp_path_factory.mktemp("mesh"), num_workers=2, engine="llama") as world:

        def begin() -> Reader:
            stream = world.client.generate(messages=messages, timeout_s=60, **options)
            return Reader(world, stream)

        async def scenario() -> None:
            expected = await begin().to_the_end()
            it = begin()
            await it.until(12)
            world.mesh.kill(await it.worker(), "host")
            assert_equal(await it.to_the_end(), expected)

        world.run(scenario(), limit_s=90)
