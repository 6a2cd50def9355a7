"""SIGTERM and SIGINT to a sidecar process: what becomes of its streams, and its exit status."""

import asyncio
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from sidecar.drain import ExitStatus
from tests.sidecar import fake_engine
from tests.sidecar.worlds import Client, connected, run, running
from unbroken.discovery import WORKERS
from unbroken.v1 import generation_pb2, worker_pb2

FAST = "--engine-options=--step-base-ms 2"
NUM_STREAMS = 8


async def streaming(client: Client, *, max_tokens: int | None = None) -> list[int]:
    """Streams that have begun; returns their slots."""
    slots = await client.start(NUM_STREAMS, max_tokens=max_tokens)
    await client.until(lambda: all(len(client.tokens.get(slot, [])) > 5 for slot in slots))
    return slots


def failures(client: Client) -> set[int]:
    return {ended.failure for ended in client.ended.values()}


async def drain_of_an_idle_worker_s(directory: Path, number: signal.Signals) -> float:
    """How long it took from the signal to the end of the process."""
    async with running(directory, "--drain-policy=finish") as world:
        await world.member(lambda record: record.engine_pgid)
        async with connected(world) as client:
            loop = asyncio.get_running_loop()
            began_at = loop.time()
            world.process.send_signal(number)
            await client.until(lambda: client.verdicts and client.verdicts[-1].is_draining)
            assert await world.exit_status() == ExitStatus.DRAINED
            took_s = loop.time() - began_at
        assert await world.discovery.snapshot(WORKERS) == {}
        return took_s


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_is_gone_within_a_second(tmp_path: Path, number: signal.Signals) -> None:
    async def scenario() -> None:
        times_s: list[float] = []
        while not times_s or times_s[-1] >= 1.0:
            assert len(times_s) < 5, times_s  # The machine may be busy, but not so often.
            times_s.append(await drain_of_an_idle_worker_s(tmp_path, number))

    run(scenario)


def test_streams_finish_if_they_may(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, FAST, "--drain-policy=finish") as world:
            await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                await streaming(client, max_tokens=300)
                world.process.terminate()
                await client.until(lambda: client.verdicts and client.verdicts[-1].is_draining)
                assert not client.verdicts[-1].HasField("drain_budget")
                assert not client.ended, "they run when the drain begins"
                (late,) = await client.start(1)
                await client.until(lambda: late in client.refused)
                await client.until(lambda: len(client.ended) == NUM_STREAMS)
                length = generation_pb2.FINISH_REASON_LENGTH
                assert {ended.finish_reason for ended in client.ended.values()} == {length}
                assert {len(tokens) for tokens in client.tokens.values()} == {300}
            assert await world.exit_status() == ExitStatus.DRAINED

    run(scenario)


def test_streams_that_are_not_done_within_the_budget_are_handed_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        flags = ["--drain-policy=budget", "--drain-budget-s=0.3"]
        async with running(tmp_path, FAST, *flags) as world:
            await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                await streaming(client)
                loop = asyncio.get_running_loop()
                began_at = loop.time()
                world.process.terminate()
                await client.until(lambda: client.verdicts and client.verdicts[-1].is_draining)
                assert 0 < client.verdicts[-1].drain_budget.ToMilliseconds() <= 300
                await client.until(lambda: len(client.ended) == NUM_STREAMS)
                assert loop.time() - began_at >= 0.3
                assert failures(client) == {worker_pb2.FAILURE_KIND_DRAIN}
            assert await world.exit_status() == ExitStatus.DRAINED

    run(scenario)


def test_a_second_signal_hands_over_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, FAST, "--drain-policy=finish") as world:
            await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                await streaming(client)
                world.process.terminate()
                await client.until(lambda: client.verdicts and client.verdicts[-1].is_draining)
                assert not client.ended
                world.process.terminate()
                await client.until(lambda: len(client.ended) == NUM_STREAMS)
                assert failures(client) == {worker_pb2.FAILURE_KIND_DRAIN}
            assert await world.exit_status() == ExitStatus.CUT_SHORT

    run(scenario)


def test_a_second_signal_does_not_wait_for_an_engine_that_does_not_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        command = [sys.executable, fake_engine.__file__, str(tmp_path / "s"), "ignore-sigterm"]
        flags = [f"--engine-command={shlex.join(command)}", "--engine-stop-grace-s=60"]
        async with running(tmp_path, *flags, engine=f"--engine-socket={tmp_path}/s") as world:
            await world.member(lambda record: record.engine_pgid)
            world.process.terminate()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await world.process.wait()
            world.process.terminate()
            assert await world.exit_status() == ExitStatus.CUT_SHORT

    run(scenario)


def test_a_sidecar_stops_while_its_engine_starts(tmp_path: Path) -> None:
    async def scenario() -> None:
        flags = ["--engine-command=sleep 1000", "--drain-policy=finish"]
        async with running(tmp_path, *flags, engine=f"--engine-socket={tmp_path}/s") as world:
            world.process.terminate()
            assert await world.exit_status() == ExitStatus.DRAINED
            assert await world.discovery.snapshot(WORKERS) == {}

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_dies_in_a_drain_is_told_by_the_exit_status(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, FAST, "--drain-policy=finish") as world:
            record = await world.member(lambda record: record.engine_pgid)
            async with connected(world) as client:
                await streaming(client)
                world.process.terminate()
                await client.until(lambda: client.verdicts and client.verdicts[-1].is_draining)
                os.kill(record.engine_pgid, number)
                await client.until(lambda: len(client.ended) == NUM_STREAMS)
                assert failures(client) == {worker_pb2.FAILURE_KIND_CRASH}
            assert await world.exit_status() == ExitStatus.FAILED

    run(scenario)
