"""Thresholds with several frontends, in real processes: the sidecar holds them against all."""

import asyncio
from pathlib import Path

from tests.integration.worlds import real_mesh, scrape
from unbroken.client import Client
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation_stream import GenerationStream

THRESHOLD = 2048
PROMPT = 512
BURST = 10
"""Requests that come to each frontend at one moment."""
ENGINE_OPTIONS = "--step-base-ms 10 --prefill-tokens-per-s 2000 --prefill-tokens-max 512"


async def read(stream: GenerationStream) -> UnbrokenError | None:
    """To its end; returns the error that was its end."""
    try:
        async for _ in stream:
            pass
    except UnbrokenError as error:
        return error
    return None


def test_a_burst_at_three_frontends_passes_a_threshold_by_no_more_than_at_one(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        clients = [Client(address) for address in world.mesh.frontend_addresses]
        try:
            readings: list[asyncio.Task[UnbrokenError | None]] = []
            for index in range(BURST):
                for number, client in enumerate(clients):
                    prompt = [100 + number, 100 + index] * (PROMPT // 2)
                    stream = client.generate(token_ids=prompt, max_tokens=1, temperature=0.0)
                    readings.append(asyncio.create_task(read(stream)))
            most = 0
            while not all(reading.done() for reading in readings):
                for client in clients:
                    (worker,) = await client.list_workers()
                    most = max(most, *(r.prefill_tokens_queued for r in worker.load.ranks))
                await asyncio.sleep(0.01)
            assert most <= THRESHOLD + PROMPT
            errors = [error for one in readings if (error := one.result()) is not None]
            assert len(readings) - len(errors) >= THRESHOLD // PROMPT
            assert {error.reason for error in errors} == {Reason.OVERLOADED}
            assert {error.metadata["thresholds"] for error in errors} == {"prefill_tokens"}
        finally:
            for client in clients:
                await client.close()

    with real_mesh(
        tmp_path,
        num_workers=1,
        num_frontends=3,
        engine_options=ENGINE_OPTIONS,
        sidecar_flags=["--metrics-listen", "127.0.0.1:0"],
        frontend_flags=["--busy-prefill-tokens", str(THRESHOLD), "--queue-requests-max", "0"],
    ) as world:
        world.run(scenario())
        sidecar = scrape(world.mesh.workers["w1"].metrics_address)
        assert sidecar["unbroken_sidecar_attempts_shed_total"] > 0, "only it could know"
