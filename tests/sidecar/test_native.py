"""Claims of `sidecar.engines.native`, with real processes behind real sockets."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import uvloop

from sidecar.engines import native
from sidecar.engines.base import EngineDown, EngineUp
from sidecar.engines.native import Launch, NativeEngine
from tests.sidecar import fake_engine
from tests.sidecar.processes import no_process_left, until
from unbroken.outcome import FailureKind
from unbroken.restart import RestartPolicy
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2

TIMEOUT_S = 30
FAST = RestartPolicy(backoff_initial_s=0.01, backoff_max_s=0.01, crash_loop_limit=100)
ONCE = RestartPolicy(crash_loop_limit=1)

Event = EngineUp | EngineDown | attempt_pb2.StepFrame | attempt_pb2.AttemptRefused


class Heard:
    """A listener that keeps what it hears, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.on_frame_too: Callable[[attempt_pb2.StepFrame], None] = lambda _: None
        self._changed = asyncio.Event()

    def on_up(self, up: EngineUp) -> None:
        self._add(up)

    def on_frame(self, frame: attempt_pb2.StepFrame) -> None:
        self._add(frame)
        self.on_frame_too(frame)

    def on_down(self, down: EngineDown) -> None:
        self._add(down)

    def on_refused(self, refused: attempt_pb2.AttemptRefused) -> None:
        self._add(refused)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    @property
    def ups(self) -> list[EngineUp]:
        return [event for event in self.events if isinstance(event, EngineUp)]

    @property
    def downs(self) -> list[EngineDown]:
        return [event for event in self.events if isinstance(event, EngineDown)]

    @property
    def frames(self) -> list[attempt_pb2.StepFrame]:
        return [event for event in self.events if isinstance(event, attempt_pb2.StepFrame)]

    @property
    def refused(self) -> list[attempt_pb2.AttemptRefused]:
        return [event for event in self.events if isinstance(event, attempt_pb2.AttemptRefused)]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Slot and offset of each token."""
        return [(frame.slots[0], frame.offsets[0]) for frame in self.frames if frame.slots]

    async def until(self, claim: Callable[[], bool]) -> None:
        while not claim():
            self._changed.clear()
            await self._changed.wait()

    async def up(self, number: int = 1) -> EngineUp:
        await self.until(lambda: len(self.ups) >= number)
        return self.ups[number - 1]

    async def down(self, number: int = 1) -> EngineDown:
        await self.until(lambda: len(self.downs) >= number)
        return self.downs[number - 1]

    async def ended(self, slot: int) -> None:
        await self.until(
            lambda: any(end.slot == slot for frame in self.frames for end in frame.ended)
        )


class World:
    """A directory for sockets, and all processes of a test."""

    def __init__(self, directory: Path, alive: Callable[[], list[str]]) -> None:
        self.socket = str(directory / "engine.sock")
        self.alive = alive

    def fake(self, what: str = "listen") -> tuple[str, ...]:
        return (sys.executable, fake_engine.__file__, self.socket, what)

    @asynccontextmanager
    async def engine(
        self,
        what: str = "listen",
        *,
        restart: RestartPolicy = FAST,
        start_timeout_s: float = TIMEOUT_S,
        stop_grace_s: float = TIMEOUT_S,
        is_attached: bool = False,
    ) -> AsyncGenerator[tuple[NativeEngine, Heard], None]:
        launch = Launch(
            command=None if is_attached else self.fake(what),
            address=self.socket,
            start_timeout_s=start_timeout_s,
            stop_grace_s=stop_grace_s,
            restart=restart,
        )
        engine, heard = NativeEngine(launch), Heard()
        running = asyncio.create_task(engine.run(heard))
        try:
            yield engine, heard
        finally:
            await engine.stop()
            await running


Scenario = Callable[[World], Awaitable[None]]
Play = Callable[[Scenario], None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a scenario, with a limit, and sees to it that it leaves no process behind."""

    async def with_limit(scenario: Scenario, world: World) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(world)

    def play(scenario: Scenario) -> None:
        with no_process_left() as alive:
            uvloop.run(with_limit(scenario, World(tmp_path, alive)))

    return play


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The news of a death waits for the exit status, even if this machine is very busy."""
    monkeypatch.setattr(native, "_EXIT_TIMEOUT_S", TIMEOUT_S)


def order(what: str, slot: int = 1) -> attempt_pb2.StartAttempt:
    """To a fake engine."""
    return attempt_pb2.StartAttempt(slot=slot, stream=attempt_pb2.StreamKey(request_id=what))


# Up and working.


def test_an_engine_comes_up_with_its_description(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (_, heard):
            up = await heard.up()
            assert (up.incarnation, up.description.kind, up.tokenizer.vocab_size) == (1, "fake", 7)
            assert os.getpgid(up.process_group) == up.process_group

    play(scenario)


def test_a_command_that_follows_on_up_is_answered(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.start(order("emit 2", slot=5))
            engine.abort(6)
            engine.ack([7, 8], [1, 1])
            await heard.until(lambda: len(heard.frames) == 5)
            assert heard.tokens == [(5, 0), (5, 1), (6, 0), (7, 0), (8, 0)]

    play(scenario)


def test_commands_of_one_turn_of_the_loop_leave_together(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            for slot in range(1, 101):
                engine.start(order("batches", slot))
            await heard.until(lambda: len(heard.frames) == 100)
            assert [slot for slot, _ in heard.tokens] == list(range(1, 101))
            assert {batch for _, batch in heard.tokens} == {2}  # The first one was hello.

    play(scenario)


def test_commands_while_it_is_down_are_dropped(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            engine.start(order("emit 1", slot=1))
            engine.fail("nothing can have failed yet")
            await heard.up()
            engine.start(order("emit 1", slot=2))
            await heard.until(lambda: bool(heard.frames))
            assert heard.tokens == [(2, 0)]

    play(scenario)


def test_an_attempt_too_large_for_the_socket_is_refused_and_others_are_not(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            huge = order("emit 1", slot=1)
            huge.checkpoint.prompt_token_ids.extend([2**32 - 1] * 3_500_000)
            engine.start(huge)
            engine.start(order("emit 1", slot=2))
            await heard.until(lambda: bool(heard.frames))
            (refused,) = heard.refused
            assert (refused.slot, refused.kind) == (1, worker_pb2.FAILURE_KIND_REJECTED)
            assert heard.tokens == [(2, 0)]

    play(scenario)


def test_what_lay_at_the_path_of_the_socket_does_not_matter(play: Play) -> None:
    async def scenario(world: World) -> None:
        Path(world.socket).write_text("left by somebody")  # noqa: ASYNC240
        async with world.engine() as (_, heard):
            await heard.up()

    play(scenario)


# Death.


@pytest.mark.usefixtures("patient")
def test_all_that_was_written_before_a_death_is_heard_before_it(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.start(order("emit 3000 die"))
            down = await heard.down()
            assert heard.tokens == [(1, offset) for offset in range(3000)]
            assert heard.events[-1] == down
            # Which of the two is seen first is chance: the death of the engine, or of its group.
            details = {"the engine was killed by SIGKILL", "the engine's process group was killed"}
            assert down == EngineDown(1, FailureKind.CRASH, down.detail)
            assert down.detail in details

    play(scenario)


@pytest.mark.usefixtures("patient")
def test_the_exit_status_is_told(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.start(order("exit 7"))
            assert (await heard.down()).detail == "the engine exited with status 7"

    play(scenario)


def test_a_death_is_noticed_at_once_and_a_new_life_begins(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            first = await heard.up()
            began = time.monotonic()
            os.killpg(first.process_group, signal.SIGKILL)
            await heard.down()
            assert time.monotonic() - began < 0.25  # Most often 3 ms; this machine is shared.
            second = await heard.up(2)
            assert second.incarnation == 2
            assert second.process_group != first.process_group
            engine.start(order("emit 1"))  # Its frames are counted from 1 again.
            await heard.until(lambda: bool(heard.frames))

    play(scenario)


def test_what_it_had_started_is_dead_before_the_next_life(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            first = await heard.up()
            engine.start(order("children"))
            await heard.until(lambda: bool(heard.frames))
            await until(lambda: world.alive().count("sleep 1000") == 2)
            os.kill(first.process_group, signal.SIGKILL)
            await heard.up(2)
            assert world.alive().count("sleep 1000") == 0

    play(scenario)


def test_an_engine_that_closes_its_socket_is_ended_and_started_anew(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.start(order("close"))
            down = await heard.down()
            assert (down.failure, down.detail) == (
                FailureKind.CRASH,
                "the engine closed its socket",
            )
            await heard.up(2)
            assert len(world.alive()) == 3  # One engine, its companion and its reaper.

    play(scenario)


def test_a_crash_loop_is_given_up(play: Play) -> None:
    async def scenario(world: World) -> None:
        loop = RestartPolicy(backoff_initial_s=0.01, crash_loop_limit=3)
        async with world.engine("exit", restart=loop) as (_, heard):
            await heard.down(3)
        assert heard.ups == []
        assert [(d.incarnation, d.failure, d.is_final) for d in heard.downs] == [
            (1, FailureKind.CRASH, False),
            (2, FailureKind.CRASH, False),
            (3, FailureKind.CRASH, True),
        ]

    play(scenario)


def test_a_command_that_cannot_be_run_is_given_up(tmp_path: Path) -> None:
    launch = Launch(("no-such-command",), str(tmp_path / "s"), restart=ONCE)

    async def scenario() -> None:
        heard = Heard()
        await asyncio.wait_for(NativeEngine(launch).run(heard), TIMEOUT_S)
        (down,) = heard.downs
        assert (down.detail, down.is_final) == ("the engine exited with status 127", True)

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("what", "failure", "detail"),
    [
        ("silent", FailureKind.HANG, "no answer"),
        ("never-listen", FailureKind.HANG, "No such file"),
        ("wrong-version", FailureKind.PROTOCOL, "expected ready with protocol_version 1, got"),
    ],
)
def test_an_engine_that_never_gets_ready_is_ended(
    play: Play, what: str, failure: FailureKind, detail: str
) -> None:
    async def scenario(world: World) -> None:
        async with world.engine(what, start_timeout_s=1.5, restart=ONCE) as (_, heard):
            down = await heard.down()
            assert (down.failure, down.is_final) == (failure, True)
            assert detail in down.detail
        assert world.alive() == []

    play(scenario)


# Broken contracts.


@pytest.mark.parametrize(
    ("what", "failure", "detail", "num_frames"),
    [
        ("garbage", FailureKind.PROTOCOL, "expected a message of at most", 0),
        ("undecodable", FailureKind.PROTOCOL, "expected a message, got 2 other bytes", 0),
        ("gap", FailureKind.PROTOCOL, "expected frame 1, got frame 2", 0),
        ("truncate", FailureKind.CRASH, "exited with status 0; the stream ended 13 bytes", 1),
    ],
)
@pytest.mark.usefixtures("patient")
def test_an_engine_that_breaks_the_contract_is_replaced(
    play: Play, what: str, failure: FailureKind, detail: str, num_frames: int
) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.start(order(what))
            down = await heard.down()
            assert down.failure is failure
            assert detail in down.detail
            assert len(heard.frames) == num_frames
            await heard.up(2)
            assert len(heard.downs) == 1

    play(scenario)


def test_nothing_is_heard_of_a_life_that_failed(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):

            def fail_at_third(frame: attempt_pb2.StepFrame) -> None:
                if frame.sequence == 3:
                    engine.fail("gap")
                    engine.fail("another")

            heard.on_frame_too = fail_at_third
            await heard.up()
            engine.start(order("emit 500"))
            assert await heard.down() == EngineDown(1, FailureKind.PROTOCOL, "gap")
            await heard.up(2)
            assert len(heard.frames) == 3
            assert len(heard.downs) == 1

    play(scenario)


def test_a_failure_that_is_found_between_frames_ends_the_life(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            engine.fail("silence")
            assert await heard.down() == EngineDown(1, FailureKind.PROTOCOL, "silence")
            await heard.up(2)

    play(scenario)


def test_a_bug_of_the_listener_ends_the_life_and_not_the_engine(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):

            def broken(_frame: attempt_pb2.StepFrame) -> None:
                raise KeyError("slot")

            heard.on_frame_too = broken
            await heard.up()
            engine.start(order("emit 2"))
            down = await heard.down()
            assert down.failure is FailureKind.PROTOCOL
            assert "a bug of the sidecar in on_frame: KeyError('slot')" in down.detail
            assert len(heard.frames) == 1
            await heard.up(2)

    play(scenario)


# The end.


def test_stop_ends_the_engine_for_good(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            await heard.up()
            await asyncio.gather(engine.stop(), engine.stop())
            assert world.alive() == []
            assert heard.events[1:] == [EngineDown(1, FailureKind.DRAIN, "stopped", is_final=True)]

    play(scenario)


@pytest.mark.parametrize("what", ["silent", "never-listen"])
def test_stop_need_not_wait_for_a_start(play: Play, what: str) -> None:
    async def scenario(world: World) -> None:
        async with world.engine(what) as (engine, heard):
            await until(lambda: any("fake_engine" in line for line in world.alive()))
            await engine.stop()
            assert world.alive() == []
            assert [down.is_final for down in heard.downs] == [True]

    play(scenario)


def test_stop_need_not_wait_for_a_restart(play: Play) -> None:
    async def scenario(world: World) -> None:
        slow = RestartPolicy(backoff_initial_s=1000, backoff_max_s=1000)
        async with world.engine("exit", restart=slow) as (engine, heard):
            await heard.down()
            await engine.stop()
            assert len(heard.events) == 1

    play(scenario)


def test_an_engine_that_ignores_sigterm_is_killed(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine("ignore-sigterm", stop_grace_s=0.1) as (engine, heard):
            await heard.up()
            await engine.stop()
            assert world.alive() == []

    play(scenario)


def test_an_engine_stopped_before_it_ran_never_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        heard = Heard()
        engine = NativeEngine(Launch(("true",), str(tmp_path / "s")))
        await engine.stop()
        await engine.run(heard)
        assert heard.events == []

    uvloop.run(scenario())


def test_cancelling_run_leaves_nothing(play: Play) -> None:
    async def scenario(world: World) -> None:
        heard = Heard()
        running = asyncio.create_task(NativeEngine(Launch(world.fake(), world.socket)).run(heard))
        await heard.up()
        running.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        assert world.alive() == []

    play(scenario)


# Somebody else's engine.


@contextmanager
def somebody_elses(world: World) -> Generator[subprocess.Popen[bytes], None, None]:
    with subprocess.Popen(world.fake()) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_attached_engine_is_served_and_left_alone_at_the_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        with somebody_elses(world) as theirs:
            async with world.engine(is_attached=True) as (engine, heard):
                up = await heard.up()
                assert up.process_group == 0
                engine.start(order("emit 1"))
                await heard.until(lambda: bool(heard.frames))
            assert heard.downs[-1].is_final
            assert theirs.poll() is None

    play(scenario)


def test_an_attached_engine_that_somebody_restarts_is_another_life(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine(is_attached=True) as (_, heard):
            with somebody_elses(world):
                await heard.up()
            down = await heard.down()
            assert (down.failure, down.is_final) == (FailureKind.CRASH, False)
            with somebody_elses(world):
                assert (await heard.up(2)).incarnation == 2

    play(scenario)


def test_stop_need_not_wait_for_an_engine_that_is_not_there(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine(is_attached=True, start_timeout_s=1000) as (_, heard):
            await asyncio.sleep(0)
        assert [down.is_final for down in heard.downs] == [True]

    play(scenario)


def test_an_attached_engine_that_is_not_there_is_told(play: Play) -> None:
    async def scenario(world: World) -> None:
        attached = world.engine(is_attached=True, start_timeout_s=0.1, restart=ONCE)
        async with attached as (_, heard):
            down = await heard.down()
            assert (down.failure, down.is_final) == (FailureKind.CRASH, True)

    play(scenario)


# An engine that does not read.


def large(slot: int) -> attempt_pb2.StartAttempt:
    start = order("emit 1", slot)
    start.checkpoint.prompt_token_ids.extend([2**32 - 1] * 200_000)  # 5 bytes each.
    return start


def stop(up: EngineUp) -> None:
    os.kill(up.process_group, signal.SIGSTOP)
    while ") T " not in Path(f"/proc/{up.process_group}/stat").read_text():
        time.sleep(0.001)


def test_an_engine_that_does_not_read_is_begun_no_more_than_it_may_leave_unread(play: Play) -> None:
    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            up = await heard.up()
            stop(up)
            for slot in range(1, 31):
                engine.start(large(slot))
                await asyncio.sleep(0)  # Each in a turn of its own.
            refused = {message.slot for message in heard.refused}
            assert refused == set(range(min(refused), 31))
            assert native.UNSENT_BYTES_SOFT / 1e6 < len(refused) < 25
            (first, *_) = heard.refused
            assert first.kind == worker_pb2.FAILURE_KIND_OVERLOAD
            assert first.retry_after.seconds > 0
            assert "bytes unread" in first.detail
            engine.abort(31)
            os.kill(up.process_group, signal.SIGCONT)
            await heard.until(lambda: bool(heard.tokens) and heard.tokens[-1][0] == 31)
            assert [slot for slot, _ in heard.tokens] == [*range(1, min(refused)), 31]
            engine.start(large(32))
            await heard.until(lambda: heard.tokens[-1][0] == 32)
            assert not heard.downs

    play(scenario)


def test_an_engine_that_leaves_too_much_unread_hangs(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "UNSENT_BYTES_HARD", 1_000_000)

    async def scenario(world: World) -> None:
        async with world.engine() as (engine, heard):
            stop(await heard.up())
            for slot in range(1, 4):
                engine.start(large(slot))
            assert (await heard.down()).failure is FailureKind.HANG
            assert "unread" in heard.downs[0].detail
            assert (await heard.up(2)).incarnation == 2

    play(scenario)


# An engine of our own.


def five_tokens(slot: int) -> attempt_pb2.StartAttempt:
    return attempt_pb2.StartAttempt(
        slot=slot,
        stream=attempt_pb2.StreamKey(request_id="r"),
        epoch=slot,
        checkpoint=attempt_pb2.Checkpoint(
            prompt_token_ids=[1, 2, 3],
            params=generation_pb2.GenerationParams(
                sampling=generation_pb2.SamplingParams(temperature=1, seed=1),
                stopping=generation_pb2.StopConditions(max_tokens=5),
            ),
        ),
    )


def test_our_simulated_engine_generates_dies_and_comes_back(play: Play) -> None:
    async def scenario(world: World) -> None:
        command = (sys.executable, "-m", "worker", "--engine", "simulated")
        launch = Launch((*command, "--socket", world.socket), world.socket, restart=FAST)
        engine, heard = NativeEngine(launch), Heard()
        running = asyncio.create_task(engine.run(heard))
        try:
            for life in (1, 2):
                up = await heard.up(life)
                engine.start(five_tokens(slot=life))
                await heard.ended(slot=life)
                os.killpg(up.process_group, signal.SIGKILL)
                await heard.down(life)
        finally:
            await engine.stop()
            await running
        tokens = [token for frame in heard.frames for token in frame.token_ids]
        assert len(tokens) == 10
        assert tokens[:5] == tokens[5:]

    play(scenario)
