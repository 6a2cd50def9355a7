"""An engine that stands still, comes back or does not: what frontends are told, what is done."""

import asyncio
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sidecar.engines.native import Launch, NativeEngine
from sidecar.hub import Hub
from sidecar.link import Link
from sidecar.watchdog import LOOK_INTERVAL_S, WatchdogPolicy
from tests.sidecar.fakes import Desk, engine_up
from tests.sidecar.processes import until
from tests.sidecar.worlds import Client, World, connected, run, running
from unbroken.outcome import FailureKind
from unbroken.restart import RestartPolicy
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

SERVING = worker_pb2.ENGINE_STATE_SERVING
STALLED = worker_pb2.ENGINE_STATE_STALLED
DEAD = worker_pb2.ENGINE_STATE_DEAD
HANG = worker_pb2.FAILURE_KIND_HANG
CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
LENGTH = generation_pb2.FINISH_REASON_LENGTH
STALL = worker_pb2.FAILURE_KIND_STALL
BOUND_S = 4.0
"""For everything that takes less than one second on a machine that is not busy."""


def desk_that_promises_frames() -> Desk:
    desk = Desk(is_up=False)
    desk.hub.on_up(engine_up(frame_interval_s=0.2))
    return desk


# On a clock that the test moves.


def test_a_silent_engine_is_reported_at_once_and_ends_no_attempt() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    slot = frontend.start()
    desk.step({1: 5})
    desk.watch(0.6)
    assert desk.hub.takes_work
    desk.watch(0.2)
    frontend.read()
    (stalled,) = frontend.verdicts
    assert (stalled.state, stalled.failure, stalled.engine_incarnation) == (STALLED, HANG, 1)
    assert "says nothing" in stalled.detail
    assert not frontend.ended
    assert list(desk.hub.ledger.running) == [slot]
    assert not desk.hub.takes_work
    desk.check()


def test_who_looks_in_the_middle_of_something_judges_nothing_and_wants_to_look_again() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    frontend.start()
    desk.step({1: 5})
    assert desk.hub.watch(judges=False), "there is nothing to judge"
    is_all = True
    for _ in range(40):
        desk.now += LOOK_INTERVAL_S
        is_all = desk.hub.watch(judges=False)
    assert not is_all
    assert desk.hub.takes_work
    assert desk.hub.watch()
    assert desk.hub.watch()
    frontend.read()
    (stalled,) = frontend.verdicts
    assert (stalled.state, stalled.failure) == (STALLED, HANG)


def test_a_stalled_engine_begins_nothing() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    desk.watch(1)
    slot = frontend.start()
    frontend.read()
    assert frontend.refused[slot].kind == HANG
    assert desk.engine.started == []
    late = desk.frontend("late")
    assert late.welcome.state == STALLED


def test_an_engine_that_goes_on_serves_again_and_what_was_aborted_is_freed() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    kept, aborted = frontend.start("kept"), frontend.start("aborted")
    desk.step({1: 5, 2: 5})
    desk.watch(1)
    desk.hub.abort(frontend.link, aborted)
    assert desk.engine.aborted == [2], "it reads that when it goes on"
    desk.step({1: 6, 2: 6})
    frontend.read()
    assert [v.state for v in frontend.verdicts] == [STALLED, SERVING]
    assert frontend.verdicts[-1].description.model == "m"
    assert frontend.tokens[kept] == [5, 6]
    assert desk.hub.takes_work
    desk.end(attempt_pb2.AttemptEnded(slot=2, end_offset=2, finish_reason=CANCELLED))
    assert list(desk.hub.ledger.running) == [1]
    desk.check()


def test_an_engine_that_lost_all_its_attempts_serves_again_when_it_says_that_it_lives() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    slot = frontend.start()
    desk.step({1: 5})
    while desk.hub.takes_work:  # It lives, and makes no step.
        desk.watch(0.2)
        desk.say(running=1)
    desk.hub.abort(frontend.link, slot)
    desk.say(running=1)
    assert not desk.hub.takes_work, "it may still stand in that step"
    desk.end(attempt_pb2.AttemptEnded(slot=1, end_offset=1, finish_reason=CANCELLED))
    desk.say(running=0)
    assert desk.hub.takes_work


def test_an_engine_that_was_silent_serves_again_when_it_speaks_though_it_still_computes() -> None:
    desk = desk_that_promises_frames()
    desk.watch(1)
    assert not desk.hub.takes_work
    load = worker_pb2.LoadReport(ranks=[worker_pb2.RankLoad()], is_computing=True)
    desk.hub.on_frame(attempt_pb2.StepFrame(load=load))
    assert desk.hub.takes_work


def test_an_engine_that_does_not_go_on_is_ended_after_the_time_it_was_of_use() -> None:
    desk = desk_that_promises_frames()
    desk.watch(60)
    (cause,) = desk.engine.causes
    assert cause[0] is FailureKind.HANG
    assert 5.0 <= cause[1] <= 5.2
    assert "did not go on" in desk.engine.failures[0]
    desk.down(FailureKind.HANG)
    desk.hub.on_up(engine_up(incarnation=2, frame_interval_s=0.2))
    assert desk.hub.takes_work
    assert (desk.hub.watchdog.num_stalls, desk.hub.num_engine_restarts) == (1, 1)


def test_attempts_whose_windows_are_full_are_no_reason_to_expect_a_step() -> None:
    desk = Desk()
    frontend = desk.frontend()
    slot = frontend.start(window_tokens=2)
    for token in range(2):
        desk.step({1: token})
    desk.watch(1000)
    frontend.read()
    assert not frontend.verdicts
    frontend.ack(slot, 1)
    desk.watch(20)
    frontend.read()
    assert [v.failure for v in frontend.verdicts] == [STALL]


def test_a_prompt_that_nobody_has_reported_yet_is_known_from_the_ledger() -> None:
    desk = Desk()
    frontend = desk.frontend()
    first = frontend.start("first", prompt=range(10))
    desk.watch(1)
    for token in range(100):
        desk.watch(0.05)
        desk.step({first: token})
    frontend.start("long", prompt=range(900))
    desk.watch(59)
    assert desk.hub.takes_work
    desk.watch(2)
    assert not desk.hub.takes_work


def test_the_rate_of_prefill_is_measured_from_what_was_computed() -> None:
    desk = Desk()
    frontend = desk.frontend()
    for index in range(3):
        frontend.start(f"r{index}", prompt=range(100))
        desk.watch(1)
        desk.step({index + 1: 5})
        desk.end(
            attempt_pb2.AttemptEnded(
                slot=index + 1, end_offset=1, finish_reason=LENGTH, prefill_tokens=100
            )
        )
    frontend.start("r", prompt=range(200))
    bound_s = desk.hub.watchdog.bound_s(desk.now, desk.hub.work(desk.now))
    assert 3 + 4 * 200 * 0.01 * 0.9 <= bound_s <= 3 + 4 * 200 * 0.01 * 1.1


def test_an_engine_that_counts_what_it_prefills_is_measured_while_it_does() -> None:
    desk = desk_that_promises_frames()
    frontend = desk.frontend()
    frontend.start(prompt=range(900))
    desk.say()
    for num_steps in range(1, 6):
        for _ in range(4):  # A second for each step of 100 tokens.
            desk.watch(0.2)
            desk.say(running=1, num_steps=num_steps - 1, prefilled=100 * (num_steps - 1))
        desk.watch(0.2)
        desk.say(running=1, num_steps=num_steps, prefilled=100 * num_steps)
    bound_s = desk.hub.watchdog.bound_s(desk.now, desk.hub.work(desk.now))
    assert bound_s == pytest.approx(3 + 4 * 900 * 0.01)


# A real engine, really stopped.


async def stop_engine(world: World) -> int:
    """SIGSTOP to the engine, and proof of it."""
    record = await world.member(lambda record: record.engine_pgid)
    os.kill(record.engine_pgid, signal.SIGSTOP)
    stat = Path(f"/proc/{record.engine_pgid}/stat")
    await until(lambda: ") T " in stat.read_text())
    return record.engine_pgid


async def until_state(client: Client, state: int, number: int = 1) -> pb.EngineVerdict:
    """The verdict of this state with this number."""
    found: list[pb.EngineVerdict] = []

    def is_there() -> bool:
        found[:] = [verdict for verdict in client.verdicts if verdict.state == state]
        return len(found) >= number

    await client.until(is_there)
    return found[number - 1]


def test_a_stopped_engine_is_reported_and_a_continued_one_serves_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running(tmp_path, "--engine-stall-restart-s=60") as world,
            connected(world) as client,
        ):
            slots = await client.start(5)
            await client.until(lambda: all(len(client.tokens.get(s, [])) > 50 for s in slots))
            pid = await stop_engine(world)
            began = time.monotonic()
            stalled = await until_state(client, STALLED)
            assert stalled.failure == HANG
            assert time.monotonic() - began < BOUND_S
            assert not client.ended
            for slot in slots:
                await client.call.write(pb.RelayRequest(abort=attempt_pb2.AbortAttempt(slot=slot)))
            os.kill(pid, signal.SIGCONT)
            began = time.monotonic()
            served = sum(verdict.state == SERVING for verdict in client.verdicts)
            await until_state(client, SERVING, served + 1)
            assert time.monotonic() - began < BOUND_S
            await client.until(lambda: len(client.ended) == len(slots))
            await client.until(
                lambda: (
                    client.heartbeats
                    and client.heartbeats[-1].load.ranks
                    and client.heartbeats[-1].load.ranks[0].kv_blocks_used == 0
                )
            )
            (slot,) = await client.start(1)
            await client.until(lambda: slot in client.tokens)

    run(scenario)


def test_a_stopped_engine_that_is_idle_is_reported_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as world, connected(world) as client:
            await stop_engine(world)
            assert (await until_state(client, STALLED)).failure == HANG

    run(scenario)


def test_an_engine_that_stays_stopped_is_killed_and_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            running(tmp_path, "--engine-stall-restart-s=0.3") as world,
            connected(world) as client,
        ):
            (slot,) = await client.start(1)
            await client.until(lambda: len(client.tokens.get(slot, [])) > 20)
            pid = await stop_engine(world)
            dead = await until_state(client, DEAD)
            assert dead.failure == HANG
            assert client.ended[slot].failure == HANG
            served = sum(verdict.state == SERVING for verdict in client.verdicts)
            serving = await until_state(client, SERVING, served + 1)
            assert serving.engine_incarnation == 2
            await until(lambda: not Path(f"/proc/{pid}").exists())
            (slot,) = await client.start(1)
            await client.until(lambda: slot in client.tokens)

    run(scenario)


def test_an_engine_that_stops_again_and_again_is_given_up(tmp_path: Path) -> None:
    socket = str(tmp_path / "engine.sock")
    command = (sys.executable, "-m", "worker", "--engine=simulated", f"--socket={socket}")
    launch = Launch(command, socket, restart=RestartPolicy(crash_loop_limit=2))

    async def scenario() -> None:
        engine = NativeEngine(launch)
        hub = Hub(engine, watchdog_policy=WatchdogPolicy(silence_min_s=0.4, restart_after_s=0.1))
        running_engine = asyncio.create_task(engine.run(hub))
        while not running_engine.done():
            if hub.up is not None and not hub.watchdog.is_stalled:
                os.kill(hub.up.process_group, signal.SIGSTOP)
            hub.watch()
            await asyncio.sleep(LOOK_INTERVAL_S)
        await running_engine
        assert (hub.watchdog.num_stalls, hub.num_engine_failures) == (2, 2)
        hello = pb.RelayHello(frontend_id="f", incarnation=1)
        assert hub.join(Link(hello, 0, on_news=lambda: None)).state == DEAD

    run(scenario)


def test_a_life_counts_by_how_long_it_was_of_use(tmp_path: Path) -> None:
    socket = str(tmp_path / "engine.sock")
    command = (sys.executable, "-m", "worker", "--engine=simulated", f"--socket={socket}")
    policy = RestartPolicy(crash_loop_limit=1, healthy_after_s=0.5)

    async def scenario() -> None:
        engine = NativeEngine(Launch(command, socket, restart=policy))
        hub = Hub(engine)
        running_engine = asyncio.create_task(engine.run(hub))
        await until(lambda: hub.up is not None)
        await asyncio.sleep(0.6)  # It has served for long enough, but for what comes now.
        engine.fail("it stood still", FailureKind.STALL, after_s=0.5)
        await running_engine

    run(scenario)


def test_a_sidecar_that_was_stopped_itself_blames_no_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, "--metrics-listen=127.0.0.1:0") as world:
            for call_number, stopped_s in enumerate((0.5, 2.0, 3.0), 1):
                async with connected(world, call_number) as client:
                    slot = (await client.start(call_number))[-1]  # Earlier names are taken.
                    await client.until(lambda s=slot, c=client: len(c.tokens.get(s, [])) > 20)
                    os.kill(world.process.pid, signal.SIGSTOP)
                    await asyncio.sleep(stopped_s)  # It is stopped for so long: that is the fault.
                    os.kill(world.process.pid, signal.SIGCONT)
            metrics = await asyncio.to_thread(scraped, world.record.metrics_address)
            assert metrics["unbroken_sidecar_stalls_total"] == 0
            assert metrics["unbroken_sidecar_tokens_total"] > 500, "its engine went on meanwhile"
            assert 0 < metrics["unbroken_sidecar_engine_silence_bound_seconds"] < 1

    run(scenario)


def scraped(address: str) -> dict[str, float]:
    """Metrics without labels."""
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(value)
        for line in lines
        if not line.startswith("#") and "{" not in line
        for name, value in [line.split()]
    }


def test_a_step_of_many_seconds_is_no_stall(tmp_path: Path) -> None:
    options = "--engine-options=--prefill-tokens-per-s 1 --step-base-ms 10"

    async def scenario() -> None:
        async with running(tmp_path, options) as world, connected(world) as client:
            (slot,) = await client.start(1)  # Two tokens of a prompt: two seconds.
            await client.until(lambda: slot in client.tokens)
            assert all(verdict.state == SERVING for verdict in client.verdicts)

    run(scenario)
