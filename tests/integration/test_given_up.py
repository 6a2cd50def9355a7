"""An engine that stays sick is given up by its sidecar, and one that is loaded never is."""

import asyncio
from pathlib import Path

from tests.integration.hospital import hospital
from tests.integration.worlds import real_mesh, scrape


def test_an_engine_that_stays_sick_is_given_up_with_status_1_and_its_streams_are_saved(
    tmp_path: Path,
) -> None:
    with hospital(tmp_path, "--canary-failures-max=2", "--engine-stall-restart-s=60") as it:

        async def scenario() -> None:
            (reader, *others) = await it.begun("w1")
            it.sickness.write_text("lying")
            assert await it.world.mesh.until_one_ends() == ("w1", 1)
            assert set(it.world.mesh.workers) == {"w2"}
            await reader.until(reader.history.num_tokens + 20)
            for one in (reader, *others):
                await one.stream.cancel()

        it.world.run(scenario(), limit_s=60)


def test_a_loaded_engine_is_never_failed_by_the_canary(tmp_path: Path) -> None:
    options = "--prefill-tokens-per-s 1000 --prefill-tokens-max 8192 --context-length 16384"
    with real_mesh(
        tmp_path,
        num_workers=1,
        engine_options=options,
        sidecar_flags=[
            *("--canary-period-s=1", "--canary-timeout-s=1"),
            "--metrics-listen=127.0.0.1:0",
        ],
    ) as world:

        async def scenario() -> None:
            prompts = [[300 + n] * 4000 for n in range(2)]  # Steps of 4 s and more.
            streams = [world.client.generate(token_ids=ids, max_tokens=5) for ids in prompts]
            await asyncio.gather(*(stream.text() for stream in streams))
            figures = scrape(world.mesh.workers["w1"].metrics_address)
            assert figures["unbroken_sidecar_canary_failures_total"] == 0

        world.run(scenario(), limit_s=60)
