"""Streams go on from the KV blocks of the engine that died, and without if there are none."""

from collections.abc import Generator

import pytest

from tests.integration.readers import Reader, assert_equal
from tests.integration.worlds import World, real_mesh
from unbroken.history import History
from unbroken.mesh import MEMORY
from unbroken.v1 import inference_service_pb2 as pb

PROMPT = tuple(range(200, 1700))
PREFILL_S = 1.5
OPTIONS = f"--step-base-ms 5 --prefill-tokens-per-s {len(PROMPT) / PREFILL_S}"
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("mesh"), num_workers=2, engine_options=OPTIONS, has_memory=True
    ) as world:
        yield world


def begin(world: World, *, salt: int) -> Reader:
    """A greedy stream over a prompt of its own."""
    prompt = (salt, *PROMPT)
    stream = world.client.generate(
        token_ids=prompt, temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, timeout_s=20
    )
    return Reader(world, stream)


async def killed_in_the_middle(world: World, salt: int) -> tuple[History, float]:
    """A stream whose engine died; how long it stood still then."""
    it = begin(world, salt=salt)
    await it.until(20)
    world.mesh.kill(await it.worker(), "engine")
    seen = await it.to_the_end()
    assert seen.finished is not None
    gap_s = seen.choices[0].gap_s(seen.finished.attempts[-1].first_offset)
    assert gap_s is not None
    return seen, gap_s


def ways(seen: History) -> list[int]:
    assert seen.finished is not None
    return [attempt.continuation_class for attempt in seen.finished.attempts[1:]]


def test_a_stream_goes_on_from_the_blocks_of_the_engine_that_died(world: World) -> None:
    async def scenario() -> None:
        seen, gap_s = await killed_in_the_middle(world, 1)
        assert ways(seen) == [pb.CONTINUATION_CLASS_RESTORE]
        assert gap_s < PREFILL_S, "nothing was computed again"
        assert seen.finished is not None
        assert seen.finished.usage.completion_tokens == MAX_TOKENS
        assert_equal(seen, await begin(world, salt=1).to_the_end())

    world.run(scenario())


def test_without_the_memory_service_it_is_computed_again_and_is_the_same(world: World) -> None:
    async def scenario() -> None:
        expected = await begin(world, salt=2).to_the_end()
        world.mesh.kill(MEMORY)
        it = begin(world, salt=3)
        await it.until(20)
        world.mesh.kill(await it.worker(), "engine")
        seen = await it.to_the_end()
        assert ways(seen) == [pb.CONTINUATION_CLASS_NATIVE]
        assert_equal(seen, await begin(world, salt=3).to_the_end())
        await world.mesh.restart(MEMORY)
        seen, _ = await killed_in_the_middle(world, 2)
        assert_equal(seen, expected)

    world.run(scenario())
