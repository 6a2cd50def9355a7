"""Thresholds at run time: told, changed, and the same at all frontends."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from frontend.busy import Shedder
from frontend.mesh_view import MeshView
from frontend.thresholds import MeshThresholds
from tests.frontend.fakes import MODEL, FakeSidecar
from tests.frontend.worlds import failure_of, read, run, world
from unbroken.discovery import THRESHOLDS
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.thresholds import OFF, Thresholds, from_proto, to_proto
from unbroken.v1 import admin_service_pb2 as pb
from unbroken.v1 import relay_service_pb2, worker_pb2

DEFAULT = Thresholds(prefill_tokens=5)
SOME = worker_pb2.BusyThresholds(kv_blocks_share=0.9)


class Side:
    """What one frontend has of thresholds."""

    def __init__(self, directory: Path, *models: str) -> None:
        self.mesh = MeshView()
        for number, model in enumerate(models):
            record = worker_pb2.WorkerRecord(model=model)
            record.identity.worker_id = f"w{number}"
            self.mesh.discovered(record)
        self.shedder = Shedder(DEFAULT, Random(1))
        self.discovery = FileDiscovery(directory, poll_interval_s=0.005)
        self.thresholds = MeshThresholds(self.discovery, self.mesh, self.shedder)

    async def set(
        self, thresholds: worker_pb2.BusyThresholds | None, version: int | None = None
    ) -> int:
        """Change those of the model "m"; returns the version."""
        request = pb.SetThresholdsRequest(model="m", thresholds=thresholds, version=version)
        return (await self.thresholds.set(request)).version

    def get(self, model: str = "") -> list[tuple[str, Thresholds, bool]]:
        """Name, thresholds, and whether they are the default."""
        answer = self.thresholds.get(pb.GetThresholdsRequest(model=model))
        return [(one.model, from_proto(one.thresholds), one.is_default) for one in answer.models]

    async def until(self, thresholds: Thresholds) -> None:
        """Until these hold for "m"."""
        async with asyncio.timeout(5):
            while self.shedder.thresholds_of("m") != thresholds:  # noqa: ASYNC110 - polled anyway.
                await asyncio.sleep(0.002)


@asynccontextmanager
async def following(*sides: Side) -> AsyncGenerator[None]:
    """They follow what others change."""
    tasks = [asyncio.create_task(side.thresholds.run()) for side in sides]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_the_contract_tells_off_from_nothing_allowed() -> None:
    for thresholds in (OFF, Thresholds(0.0, 0, 0.0), Thresholds(0.5, 2**53, 1000.0)):
        assert from_proto(to_proto(thresholds)) == thresholds


def test_a_change_holds_here_at_once_and_everywhere_soon(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, other = Side(tmp_path, "m", "n"), Side(tmp_path, "m")
        async with following(one, other):
            assert one.get() == [("m", DEFAULT, True), ("n", DEFAULT, True)]
            assert await one.set(SOME) == 1
            assert one.get("m") == [("m", Thresholds(0.9), False)]
            assert one.get("n") == [("n", DEFAULT, True)]
            await other.until(Thresholds(0.9))
            assert await other.set(None) == 2
            assert other.get() == [("m", DEFAULT, True)]
            await one.until(DEFAULT)
        late = Side(tmp_path, "m")
        await one.set(SOME)
        async with following(late):
            await late.until(Thresholds(0.9))

    run(scenario())


def test_a_change_of_an_old_version_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, other = Side(tmp_path, "m"), Side(tmp_path, "m")
        assert await one.set(SOME, version=0) == 1
        with pytest.raises(UnbrokenError) as caught:
            await other.set(None, version=0)
        assert caught.value.reason is Reason.VERSION_MISMATCH
        assert caught.value.metadata == {"version": "1"}
        assert await other.set(None, version=1) == 2

    run(scenario())


def test_changes_at_one_moment_all_take_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        models = "abcd"
        sides = [Side(tmp_path, *models) for _ in models]
        requests = [pb.SetThresholdsRequest(model=model, thresholds=SOME) for model in models]
        answers = await asyncio.gather(
            *(side.thresholds.set(one) for side, one in zip(sides, requests, strict=True))
        )
        assert sorted(answer.version for answer in answers) == [1, 2, 3, 4]
        record = await sides[0].discovery.setting(THRESHOLDS)
        assert [(entry.model, entry.thresholds) for entry in record.models] == [
            (model, SOME) for model in models
        ]

    run(scenario())


def test_what_is_wrong_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        side = Side(tmp_path, "m")
        with pytest.raises(InvalidField) as caught:
            await side.set(worker_pb2.BusyThresholds(kv_blocks_share=1.5))
        assert caught.value.metadata["field"] == "thresholds.kv_blocks_share"
        with pytest.raises(UnbrokenError) as unknown:
            await side.thresholds.set(pb.SetThresholdsRequest(model="x", thresholds=SOME))
        assert unknown.value.reason is Reason.MODEL_NOT_FOUND
        with pytest.raises(UnbrokenError):
            side.get("x")
        assert (await side.discovery.setting(THRESHOLDS)).version == 0

    run(scenario())


def test_a_model_that_is_gone_can_still_lose_its_thresholds(tmp_path: Path) -> None:
    async def scenario() -> None:
        await Side(tmp_path, "m").set(SOME)
        side = Side(tmp_path)
        async with following(side):
            await side.until(Thresholds(0.9))
            assert await side.set(None) == 2
            assert side.get() == []

    run(scenario())


def test_entries_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        record = worker_pb2.ThresholdsRecord(version=3)
        record.models.add(model="m", thresholds=SOME)
        record.models.add(
            model="n", thresholds=worker_pb2.BusyThresholds(kv_blocks_share=float("nan"))
        )
        side = Side(tmp_path, "m", "n")
        await side.discovery.change(THRESHOLDS, record)
        async with following(side):
            await side.until(Thresholds(0.9))
            assert side.get("n") == [("n", DEFAULT, True)]

    run(scenario())


def test_a_record_that_was_lost_is_kept_and_written_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        side = Side(tmp_path, "m")
        async with following(side):
            await side.set(SOME)
            (tmp_path / "settings" / "thresholds.json").unlink()
            await asyncio.sleep(0.05)
            assert side.get("m") == [("m", Thresholds(0.9), False)]
            assert await side.set(worker_pb2.BusyThresholds(prefill_tokens=1)) == 2
            assert (await side.discovery.setting(THRESHOLDS)).version == 2

    run(scenario())


def test_thresholds_are_set_over_the_wire_and_hold_for_the_next_request() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1")
        async with world(sidecar, queue_requests_max=0) as it:
            ranks = [
                worker_pb2.RankLoad(rank=rank, kv_blocks_total=100, kv_blocks_used=60)
                for rank in range(2)
            ]
            heartbeat = relay_service_pb2.Heartbeat(
                sequence=1, load=worker_pb2.LoadReport(ranks=ranks)
            )
            sidecar.say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
            view = it.frontend.mesh.workers["w1"].view
            assert view is not None
            await it.until(lambda: view.kv_blocks_used == 120)
            await read(it.client.generate(token_ids=[1], max_tokens=1))
            answer = await it.client.set_thresholds(worker_pb2.BusyThresholds(kv_blocks_share=0.5))
            assert (answer.thresholds.model, answer.version) == (MODEL, 1)
            error = await failure_of(it.client.generate(token_ids=[1], max_tokens=1))
            assert error.reason is Reason.OVERLOADED
            (info,) = await it.client.list_workers()
            assert info.busy.startswith("kv_blocks_share of rank 0 is 0.6")
            found = await it.client.get_thresholds()
            assert found.models[0].thresholds.kv_blocks_share == 0.5
            await it.client.set_thresholds(None, version=found.version)
            await read(it.client.generate(token_ids=[1], max_tokens=1))
            (info,) = await it.client.list_workers()
            assert info.busy == ""
            with pytest.raises(UnbrokenError) as caught:
                await it.client.set_thresholds(worker_pb2.BusyThresholds(prefill_share=-1.0))
            assert caught.value.metadata["field"] == "thresholds.prefill_share"

    run(scenario())
