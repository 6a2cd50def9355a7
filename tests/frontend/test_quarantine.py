"""A query of death over real gRPC: it is stopped and named, and the others go on."""

import asyncio
import logging

import pytest

from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, read, run, world
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import attempt_pb2, worker_pb2

PROMPT = list(b"once upon a time")
BAD_PROMPT = list(b"the last words")


class Fragile(FakeSidecar):
    """Its engine dies of the bad prompt, and is started again."""

    num_deaths = 0

    def step(self) -> attempt_pb2.StepFrame | None:
        """As a fake sidecar does, unless there is something that it dies of."""
        prompts = [list(one.start.checkpoint.prompt_token_ids) for one in self.running.values()]
        if BAD_PROMPT in prompts:
            self.num_deaths += 1
            self.running.clear()
            self.say_state(worker_pb2.ENGINE_STATE_DEAD)
            self.engine_incarnation += 1
            self.say_state(worker_pb2.ENGINE_STATE_SERVING)
            return None
        return super().step()


def num_deaths(it: World) -> int:
    return sum(sidecar.num_deaths for sidecar in it.sidecars if isinstance(sidecar, Fragile))


async def ask_the_bad_one(it: World, request_id: str) -> UnbrokenError:
    stream = it.client.generate(
        token_ids=BAD_PROMPT, max_tokens=20, temperature=0, request_id=request_id
    )
    with pytest.raises(UnbrokenError) as caught:
        await read(stream)
    return caught.value


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_query_of_death_kills_three_engines_and_harms_nobody(num_workers: int) -> None:
    async def scenario() -> None:
        async with world(
            *(Fragile(f"w{number}", step_s=0.005) for number in range(num_workers))
        ) as it:
            others = [
                it.client.generate(
                    token_ids=[*PROMPT, index], max_tokens=100, temperature=0, migrations_max=3
                )
                for index in range(12)
            ]
            reading = [asyncio.create_task(read(other)) for other in others]
            await it.until(lambda: it.num_tokens() > 60)
            error = await ask_the_bad_one(it, "bad")
            assert error.reason is Reason.QUERY_OF_DEATH
            assert error.metadata["workers_lost"] == "3"
            assert num_deaths(it) == 3
            for index, one in enumerate(reading):
                assert (await one)[0] == reference([*PROMPT, index], 100)

    run(scenario())


def test_it_is_refused_when_it_comes_again_and_the_log_names_it_without_its_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with world(Fragile("w1"), Fragile("w2")) as it:
            first = await ask_the_bad_one(it, "bad")
            again = await ask_the_bad_one(it, "again")
            assert again.reason is Reason.QUERY_OF_DEATH
            assert again.metadata["digest"] == first.metadata["digest"]
            assert num_deaths(it) == 3
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 5)

    with caplog.at_level(logging.ERROR):
        run(scenario())
    (named,) = [str(one.msg) for one in caplog.records if "query of death" in str(one.msg)]
    assert "'request_id': 'bad'" in named
    assert str(BAD_PROMPT[0]) + ", " + str(BAD_PROMPT[1]) not in named


def test_a_retry_goes_on_where_the_count_was() -> None:
    async def scenario() -> None:
        async with world(Fragile("w1"), Fragile("w2")) as it:
            for index in range(2):
                stream = it.client.generate(
                    token_ids=BAD_PROMPT, max_tokens=20, temperature=0, migrations_max=0
                )
                with pytest.raises(UnbrokenError) as caught:
                    await read(stream)
                assert caught.value.reason is Reason.MIGRATIONS_EXHAUSTED, index
            for _ in range(3):
                await ask_the_bad_one(it, "again")
            assert num_deaths(it) == 3

    run(scenario())
