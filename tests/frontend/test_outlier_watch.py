"""Ejection and readmission over real gRPC: what placement does with them, and what a probe is."""

import asyncio

from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import World, read, run, world
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

PROMPT = list(b"once upon a time")


def break_engine(sidecar: FakeSidecar) -> None:
    """From now on its engine fails on whatever it is asked."""

    def fail(frame: attempt_pb2.StepFrame) -> None:
        slots = list(frame.slots)
        for column in ("slots", "offsets", "token_ids", "token_counts", "ended"):
            frame.ClearField(column)
        for slot in slots:
            frame.ended.add(
                slot=slot, failure=worker_pb2.FAILURE_KIND_ENGINE_ERROR, detail="broken"
            )
            sidecar.running.pop(slot, None)

    sidecar.on_step = fail


async def is_ejected(it: World, worker_id: str) -> bool:
    workers = {one.record.identity.worker_id: one for one in await it.client.list_workers()}
    return workers[worker_id].HasField("ejection")


async def eject(it: World, bad: FakeSidecar) -> None:
    """Let its engine fail until it is ejected; the requests are not harmed."""
    break_engine(bad)
    while not await is_ejected(it, bad.worker_id):
        stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
        assert (await read(stream))[0] == reference(PROMPT, 5)
    assert len(bad.starts) == 3


def test_a_worker_that_fails_is_ejected_probed_and_readmitted() -> None:
    async def scenario() -> None:
        bad, good = FakeSidecar("w1"), FakeSidecar("w2")
        async with world(bad, good, ejection_s=0.2) as it:
            await eject(it, bad)
            assert (await it.client.list_workers())[0].ejection.num_in_a_row == 1
            num_starts = len(good.starts)
            for _ in range(4):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert (len(bad.starts), len(good.starts)) == (3, num_starts + 4)
            # Its first probe fails, and the next one does not.
            await bad.until(lambda: len(bad.starts) == 4)
            probe = bad.starts[-1]
            assert probe.is_probe
            assert probe.checkpoint.params.stopping.max_tokens == 1
            assert await is_ejected(it, "w1")
            bad.on_step = None
            await bad.until(lambda: len(bad.starts) == 5)
            while await is_ejected(it, "w1"):  # noqa: ASYNC110 - nothing announces it.
                await asyncio.sleep(0.01)
            for _ in range(4):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert len(bad.starts) > 5
            assert all(bad.starts[index].is_probe == (index in (3, 4)) for index in range(5))

    run(scenario())


def test_a_probe_is_no_request_of_anybody() -> None:
    async def scenario() -> None:
        bad, good = FakeSidecar("w1"), FakeSidecar("w2")
        async with world(bad, good, ejection_s=0.2) as it:
            await eject(it, bad)
            await bad.until(lambda: bad.starts[-1].is_probe)
            probe_id = bad.starts[-1].stream.request_id
            streams: list[pb.StreamInfo] = [one async for one in it.client.list_streams()]
            assert probe_id not in {one.request_id for one in streams}
            assert probe_id.startswith("probe-f0-1-")

    run(scenario())


def test_an_ejected_worker_serves_if_there_is_no_other() -> None:
    async def scenario() -> None:
        bad, good = FakeSidecar("w1"), FakeSidecar("w2")
        async with world(bad, good, ejection_s=60) as it:
            await eject(it, bad)
            bad.on_step = None
            await good.die()
            await it.until_ready(1)
            stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
            assert (await read(stream))[0] == reference(PROMPT, 5)
            assert len(bad.starts) == 4

    run(scenario())
