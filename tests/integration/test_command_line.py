"""The command line against a live mesh: what it prints as JSON can be read, and is right."""

import asyncio
import json
import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.worlds import World, real_mesh
from unbroken.chaos.processes import is_alive
from unbroken.history import record


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with real_mesh(
        tmp_path_factory.mktemp("mesh"),
        num_workers=2,
        is_emptied=True,
        engine_options="--step-base-ms 5",
    ) as world:
        yield world


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and the JSON it printed, one value a line."""

    status: int
    values: Sequence[Any]
    stderr: str


async def unbroken(world: World, *arguments: str) -> Result:
    """Run `unbroken … -o json`, which finds the mesh by discovery."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unbroken.cli", *arguments, "-o", "json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "UNBROKEN_DISCOVERY": str(world.mesh.directory)},
    )
    try:
        stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    values = [json.loads(line) for line in stdout.splitlines()]
    return Result(process.returncode, values, stderr.decode())


def test_workers_are_listed(world: World) -> None:
    result = world.run(unbroken(world, "workers"))
    assert result.status == 0
    (workers,) = result.values
    assert [worker["record"]["identity"]["worker_id"] for worker in workers] == ["w1", "w2"]
    for worker in workers:
        known = world.mesh.workers[worker["record"]["identity"]["worker_id"]]
        assert worker["record"]["address"] == known.address
        assert worker["record"]["sidecar_pid"] == known.sidecar_pid
        assert worker["record"]["engine_pgid"] == known.engine_pgid
        assert worker["link"] == "LINK_STATE_UP"
        assert worker["engine"] == "ENGINE_STATE_SERVING"
        assert worker["description"]["kind"] == "simulated"


def test_models_are_listed(world: World) -> None:
    result = world.run(unbroken(world, "models"))
    assert result.status == 0
    ((model,),) = result.values
    assert model["model"] == "simulated"
    assert (model["num_workers_ready"], model["num_workers"]) == (2, 2)
    assert model["context_length"] == 32768


def test_an_output_comes_as_events(world: World) -> None:
    async def scenario() -> None:
        options = {"max_tokens": 5, "temperature": 0.0}
        expected = await record(world.client.generate(prompt="The tide", **options))  # pyright: ignore[reportArgumentType]
        result = await unbroken(
            world,
            *("generate", "--raw", "The tide", "--max-tokens", "5", "--temperature", "0"),
            *("--request-id", "cli-1"),
        )
        assert result.status == 0
        started, *pieces, finished = result.values
        assert started["event"] == "started"
        assert started["request_id"] == "cli-1"
        assert "resume_token" not in started
        token_ids = [token_id for piece in pieces for token_id in piece["token_ids"]]
        assert token_ids == expected.choices[0].token_ids
        assert "".join(piece["text"] for piece in pieces) == expected.choices[0].text
        assert finished["event"] == "finished"
        assert finished["usage"]["completion_tokens"] == "5"
        assert finished["choices"][0]["finish_reason"] == "FINISH_REASON_LENGTH"

    world.run(scenario())


def test_a_refusal_is_the_last_event(world: World) -> None:
    result = world.run(unbroken(world, "generate", "hello", "--temperature", "-1"))
    assert result.status == 1
    (error,) = result.values
    assert (error["event"], error["reason"]) == ("error", "INVALID_FIELD")
    assert error["metadata"] == {"field": "params.sampling.temperature"}


def test_a_running_stream_is_listed_and_cancelled(world: World) -> None:
    async def scenario() -> None:
        stream = world.client.generate(prompt="hello", request_id="cli-2", temperature=0.0)
        async with stream:
            await anext(stream)
            listed = await unbroken(world, "streams")
            assert listed.status == 0
            (streams,) = listed.values
            (mine,) = [one for one in streams if one["request_id"] == "cli-2"]
            assert mine["continuation_class"] == "CONTINUATION_CLASS_NATIVE"
            (choice,) = mine["choices"]
            assert choice["state"] == "STREAM_STATE_RUNNING"
            assert choice["num_tokens"] >= choice["num_tokens_sent"] >= 1
            first = await unbroken(world, "cancel", "cli-2")
            again = await unbroken(world, "cancel", "cli-2")
        assert first.values == [{"request_id": "cli-2", "was_running": True}]
        assert again.values == [{"request_id": "cli-2", "was_running": False}]
        assert (first.status, again.status) == (0, 0)

    world.run(scenario())


def test_a_killed_host_is_dead(world: World) -> None:
    async def scenario() -> None:
        record = world.mesh.workers["w2"]
        result = await unbroken(world, "kill", "w2")
        assert result.status == 0
        assert result.values == [{"worker": "w2", "killed": "host"}]
        while is_alive(record.sidecar_pid) or is_alive(record.engine_pgid):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        while True:
            (workers,) = (await unbroken(world, "workers")).values
            if [worker["link"] for worker in workers][1:] != ["LINK_STATE_UP"]:
                break
        await world.mesh.restart("w2")

    world.run(scenario())


def test_a_worker_that_is_not_there_cannot_be_killed(world: World) -> None:
    result = world.run(unbroken(world, "kill", "w9"))
    assert result.status == 1
    (error,) = result.values
    assert (error["event"], error["reason"]) == ("error", "NO_WORKER")


def test_thresholds_are_set_shown_and_taken_back(world: World) -> None:
    change = unbroken(world, "thresholds", "simulated", "--set", "kv_blocks_share=0")
    result = world.run(change)
    assert result.status == 0, result.stderr
    (changed,) = result.values
    assert changed["models"] == [
        {"model": "simulated", "thresholds": {"kv_blocks_share": 0.0}, "is_default": False}
    ]
    (shown,) = world.run(unbroken(world, "thresholds")).values
    assert shown == changed
    stale = unbroken(world, "thresholds", "--set", "prefill_tokens=1", "--version", "0")
    (refused,) = world.run(stale).values
    assert refused["reason"] == "VERSION_MISMATCH"
    wrong = unbroken(world, "thresholds", "--set", "kv_blocks_share=2")
    (refused,) = world.run(wrong).values
    assert refused["metadata"] == {"field": "thresholds.kv_blocks_share"}
    (back,) = world.run(unbroken(world, "thresholds", "--default")).values
    assert back["version"] == changed["version"] + 1
    assert back["models"][0]["is_default"]
