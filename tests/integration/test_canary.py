"""Engines that are sick although they seem to live: their workers get no work, and streams move."""

from collections.abc import Generator

import pytest

from tests.integration.hospital import (
    NOT_SERVING_NOW,
    PERIOD_S,
    SERVING,
    SERVING_NOW,
    SLACK_S,
    STALLED,
    Hospital,
    hospital,
)


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Generator[Hospital]:
    with hospital(tmp_path_factory.mktemp("hospital"), "--canary-failures-max=0") as found:
        yield found


@pytest.mark.parametrize("sickness", ["hung", "lying", "garbage"])
def test_an_idle_engine_that_is_sick_is_found_in_two_periods_and_serves_again_when_well(
    it: Hospital, sickness: str
) -> None:
    async def scenario() -> None:
        await it.until(SERVING, 10)
        await it.until_probed(2)
        assert await it.health("readiness") == SERVING_NOW
        it.sickness.write_text(sickness)
        try:
            await it.until(STALLED, 2 * PERIOD_S + SLACK_S)
            assert await it.health("readiness") == NOT_SERVING_NOW
            assert await it.health("model/simulated") == NOT_SERVING_NOW
            assert await it.health("liveness") == SERVING_NOW
            for index in range(4):
                reader = it.reader(index, max_tokens=3)
                history = await reader.to_the_end()
                assert history.finished is not None
                (attempt,) = history.finished.attempts
                assert attempt.worker.worker_id == "w2"
        finally:
            it.sickness.write_text("")
        await it.until(SERVING, 10)
        assert await it.health("readiness") == SERVING_NOW

    it.world.run(scenario(), limit_s=60)


def test_the_streams_of_an_engine_that_says_it_has_nothing_to_do_go_on_elsewhere(
    it: Hospital,
) -> None:
    async def scenario() -> None:
        await it.until(SERVING, 10)
        readers = await it.begun("w1")
        it.sickness.write_text("lying")
        try:
            await it.until(STALLED, 2 * PERIOD_S + SLACK_S)
            for reader in readers:
                await reader.until(reader.history.num_tokens + 20)
                assert await reader.worker() == "w2"
        finally:
            it.sickness.write_text("")
        lengths = [reader.history.num_tokens for reader in readers]
        for reader in readers:
            await reader.stream.cancel()
        await it.until(SERVING, 10)
        for index, (reader, length) in enumerate(zip(readers, lengths, strict=True)):
            undisturbed = it.reader(index, max_tokens=length)
            wanted = (await undisturbed.to_the_end()).choices[0]
            seen = reader.history.choices[0]
            assert seen.token_ids == wanted.token_ids
            assert seen.offsets == list(range(length))

    it.world.run(scenario(), limit_s=60)


def test_what_the_canary_asks_is_in_no_count(it: Hospital) -> None:
    async def scenario() -> None:
        await it.until(SERVING, 10)
        num_tokens = it.metric("tokens_total")
        await it.until_probed(2)
        assert it.metric("tokens_total") == num_tokens
        assert it.metric("attempts_running") == 0

    it.world.run(scenario(), limit_s=60)
