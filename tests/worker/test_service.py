"""Claims of `worker.service`, over a real Unix socket."""

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from tests.worker.engines import CANCELLED, LENGTH, STOP, starting
from tests.worker.stores import Shelf, ShelfStore
from unbroken import framing
from unbroken.v1 import attempt_pb2, engine_pb2, worker_pb2
from worker.engine import KvHolder, StepPlan, StepResult
from worker.service import FRAME_INTERVAL_S, EngineService
from worker.simulated import CostModel, SimulatedModel, SimulatedRunner, simulated_runner

TIMEOUT_S = 30


class Sidecar:
    """The other end: speaks the contract and checks what it hears."""

    def __init__(self, connection: framing.Connection[engine_pb2.EngineResponse]) -> None:
        self.connection = connection
        self.ready: engine_pb2.EngineReady | None = None
        self.frames: list[attempt_pb2.StepFrame] = []
        self.token_ids: dict[int, list[int]] = {}
        self.ended: dict[int, attempt_pb2.AttemptEnded] = {}
        self.refused: dict[int, attempt_pb2.AttemptRefused] = {}

    def send(self, **request: object) -> None:
        self.connection.send(engine_pb2.EngineRequest(**request))  # pyright: ignore[reportArgumentType]

    def start(self, slot: int, **options: object) -> None:
        options.setdefault("request_id", f"r{slot}")
        self.send(start=starting(slot=slot, **options))  # pyright: ignore[reportArgumentType]

    async def greet(self) -> worker_pb2.EngineDescription:
        self.send(hello=engine_pb2.EngineHello(protocol_version=1))
        await self.until(lambda: self.ready is not None)
        assert self.ready is not None
        return self.ready.description

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Listen until something is so."""
        while not is_so():
            batch = await self.connection.receive()
            assert batch, "the engine closed the connection"
            for response in batch:
                self._heard(response)

    async def until_ended(self, *slots: int) -> None:
        await self.until(lambda: all(slot in self.ended for slot in slots))

    async def until_closed(self) -> None:
        while batch := await self.connection.receive():
            for response in batch:
                self._heard(response)

    def _heard(self, response: engine_pb2.EngineResponse) -> None:
        if response.WhichOneof("response") == "ready":
            assert self.ready is None
            assert not self.frames
            self.ready = response.ready
            return
        frame = response.frame
        self.frames.append(frame)
        assert frame.sequence == len(self.frames), "no gaps"
        assert not frame.token_counts
        for slot, offset, token_id in zip(frame.slots, frame.offsets, frame.token_ids, strict=True):
            assert slot not in self.ended
            tokens = self.token_ids.setdefault(slot, [])
            assert offset == len(tokens)
            tokens.append(token_id)
        for ended in frame.ended:
            assert ended.slot not in self.ended
            self.ended[ended.slot] = ended
        for refused in frame.refused:
            self.refused[refused.slot] = refused


class Stage:
    """An engine that serves, and everybody who connects to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sidecars: list[Sidecar] = []

    async def connect(self) -> Sidecar:
        connection = await framing.connect_unix(str(self.path), engine_pb2.EngineResponse)
        self.sidecars.append(Sidecar(connection))
        return self.sidecars[-1]

    async def greeted(self) -> Sidecar:
        sidecar = await self.connect()
        await sidecar.greet()
        return sidecar


def fast(**options: object) -> SimulatedRunner:
    """An engine that takes no time."""
    cost = CostModel(step_base_s=0.0, prefill_tokens_per_s=1e12)
    return simulated_runner(cost=cost, **options)  # pyright: ignore[reportArgumentType]


def on_stage(
    scenario: Callable[[Stage], Awaitable[None]],
    path: Path,
    runner: SimulatedRunner | None = None,
    *,
    waiting_max: int = 16_384,
) -> None:
    """Run a scenario against an engine; neither survives it."""

    @asynccontextmanager
    async def stage() -> AsyncGenerator[Stage]:
        listening = asyncio.Event()
        service = EngineService(runner or fast(), waiting_max=waiting_max)
        at = Stage(path / "engine")
        serving = asyncio.create_task(service.serve(at.path, on_listening=listening.set))
        await listening.wait()
        try:
            yield at
            assert not serving.done(), "the engine lives"
        finally:
            serving.cancel()
            await asyncio.wait((serving,))
            for sidecar in at.sidecars:
                sidecar.connection.abort()
                await sidecar.connection.wait_closed()

    async def run() -> None:
        async with stage() as at:
            await scenario(at)

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_a_ticket_that_was_renewed_is_told_with_the_load(tmp_path: Path) -> None:
    plain = fast()
    store = ShelfStore(Shelf(), plain.spec)
    store.kept_by = KvHolder("10.0.0.1:1", b"old")
    model = SimulatedModel(plain.spec.model)
    runner = SimulatedRunner(plain.spec, model, CostModel(), store=store)

    async def scenario(stage: Stage) -> None:
        sidecar = await stage.connect()
        description = await sidecar.greet()
        assert description.kv_holder.ticket == b"old"
        await sidecar.until(lambda: any(one.HasField("load") for one in sidecar.frames))
        assert not any(one.load.HasField("kv_holder") for one in sidecar.frames), "it is known"
        store.kept_by = KvHolder("10.0.0.1:1", b"new")
        await sidecar.until(lambda: sidecar.frames[-1].load.kv_holder.ticket == b"new")

    on_stage(scenario, tmp_path, runner)


def test_an_attempt_runs_to_its_end(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.connect()
        description = await sidecar.greet()
        assert (description.kind, description.num_ranks) == ("simulated", 1)
        assert sidecar.ready is not None
        assert sidecar.ready.tokenizer.vocab_size == 4096
        sidecar.start(1, max_tokens=20)
        await sidecar.until_ended(1)
        assert len(sidecar.token_ids[1]) == 20
        assert (sidecar.ended[1].finish_reason, sidecar.ended[1].end_offset) == (LENGTH, 20)

    on_stage(scenario, tmp_path)


def test_the_first_frame_has_the_load_and_all_prefixes(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = await stage.greeted()
        first.start(1, prompt=range(40), max_tokens=20)
        await first.until_ended(1)
        second = await stage.greeted()
        await second.until(lambda: bool(second.frames))
        frame = second.frames[0]
        assert [events.reset for events in frame.kv_events] == [True, True]
        assert sum(len(events.stored) for events in frame.kv_events) == 3  # 59 tokens.
        assert len(frame.load.ranks) == 2
        await second.until(lambda: len(second.frames) > 2)
        assert not any(events.reset for f in second.frames[1:] for events in f.kv_events)

    on_stage(scenario, tmp_path, fast(num_ranks=2))


def test_a_load_says_which_attempts_it_counts(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        await sidecar.until(lambda: bool(sidecar.frames))
        assert (sidecar.frames[0].HasField("load"), sidecar.frames[0].slot_seen) == (True, 0)
        sidecar.start(1, prompt=range(40), max_tokens=2)
        sidecar.start(2, prompt=range(40), request_id="")  # Refused, and dealt with.
        await sidecar.until(lambda: sidecar.frames[-1].slot_seen == 2)
        assert all(frame.HasField("load") for frame in sidecar.frames if frame.slot_seen)
        assert 2 in sidecar.refused

    on_stage(scenario, tmp_path)


def test_an_idle_engine_gives_signs_of_life(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        begun = asyncio.get_running_loop().time()
        await sidecar.until(lambda: len(sidecar.frames) >= 4)
        assert 0.3 < asyncio.get_running_loop().time() - begun < 3
        assert all(frame.HasField("load") for frame in sidecar.frames)

    on_stage(scenario, tmp_path)


def test_an_engine_says_at_once_that_it_has_nothing_left_to_do(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        for slot in range(3):
            sidecar.start(slot, max_tokens=40)
        await sidecar.until_ended(0, 1, 2)
        last = [frame for frame in sidecar.frames if frame.ended][-1]
        assert last.HasField("load")
        assert [rank.kv_blocks_used for rank in last.load.ranks] == [0]

    on_stage(scenario, tmp_path)


def test_a_long_step_gives_signs_of_life_and_says_what_it_computes(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        assert sidecar.ready is not None
        assert sidecar.ready.frame_interval.ToNanoseconds() == FRAME_INTERVAL_S * 1e9
        sidecar.start(1, prompt=range(100), max_tokens=1)
        await sidecar.until_ended(1)
        busy = [frame.load for frame in sidecar.frames if frame.load.is_computing]
        assert len(busy) >= 3
        assert {load.engine_steps_total for load in busy} == {0}
        assert {load.ranks[0].prefill_tokens_queued for load in busy} == {100}
        assert {load.ranks[0].requests_running for load in busy} == {1}

    slow = CostModel(step_base_s=0.01, prefill_tokens_per_s=100)
    on_stage(scenario, tmp_path, simulated_runner(cost=slow))


def test_the_room_that_a_prompt_has_left_is_told_with_its_token(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        for slot in range(1, 5):
            sidecar.start(slot, prompt=range(slot, slot + 100), max_tokens=10)
        await sidecar.until_ended(1, 2, 3, 4)
        first = [frame for frame in sidecar.frames if 0 in frame.offsets]
        assert len(first) == 4, "a prompt a step"
        queued = [frame.load.ranks[0].prefill_tokens_queued for frame in first]
        assert queued == [300, 200, 100, 0]
        assert not all(frame.HasField("load") for frame in sidecar.frames)

    cost = CostModel(step_base_s=0.02, prefill_tokens_per_s=1e12)
    on_stage(scenario, tmp_path, simulated_runner(cost=cost, prefill_tokens_max=100))


def test_the_load_tells_what_steps_took_but_not_the_time_between_them(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        for slot in (1, 2):
            sidecar.start(slot, prompt=range(100), max_tokens=5)
            await sidecar.until_ended(slot)
            await asyncio.sleep(0.5)
        seen = len(sidecar.frames)
        await sidecar.until(lambda: len(sidecar.frames) > seen)
        load = sidecar.frames[-1].load
        assert load.engine_steps_total == 10
        # 8 steps of 10 ms, and 2 of 60 ms with a prefill; the prefix cache saves 96 tokens of one.
        assert 0.9 * 152_000 < load.steps_us_total < 152_000 + 300_000

    cost = CostModel(step_base_s=0.01, prefill_tokens_per_s=2000)
    on_stage(scenario, tmp_path, simulated_runner(cost=cost))


def test_what_is_aborted_during_a_long_step_ends_before_it(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1, prompt=range(100), max_tokens=1)
        await sidecar.until(lambda: any(frame.load.is_computing for frame in sidecar.frames))
        sidecar.send(abort=attempt_pb2.AbortAttempt(slot=1))
        await sidecar.until_ended(1)
        assert sidecar.ended[1].finish_reason == CANCELLED
        last = sidecar.frames[-1].load
        assert (last.engine_steps_total, last.is_computing) == (0, True)
        sidecar.start(2, prompt=[7], max_tokens=3)
        await sidecar.until_ended(2)
        assert len(sidecar.token_ids[2]) == 3

    slow = CostModel(step_base_s=0.01, prefill_tokens_per_s=100)
    on_stage(scenario, tmp_path, simulated_runner(cost=slow))


def test_steps_take_the_time_that_the_cost_model_says_and_lateness_does_not_add_up(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        begun = asyncio.get_running_loop().time()
        for slot in range(1, 9):
            sidecar.start(slot, max_tokens=101)
        await sidecar.until_ended(*range(1, 9))
        assert 1.0 <= asyncio.get_running_loop().time() - begun < 1.5

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.01)))


def test_log_probabilities_come_with_their_tokens(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        message = starting(slot=1, max_tokens=5)
        message.checkpoint.params.logprobs.num_top = 2
        sidecar.send(start=message)
        sidecar.start(2, max_tokens=5)
        await sidecar.until_ended(1, 2)
        reported = [logprobs for frame in sidecar.frames for logprobs in frame.logprobs]
        assert [logprobs.slot for logprobs in reported] == [1] * 5
        tops = [logprobs.tokens[0].top_token_ids[0] for logprobs in reported]
        assert tops == sidecar.token_ids[1] == sidecar.token_ids[2]

    on_stage(scenario, tmp_path)


def test_a_constraint_is_followed_to_its_end(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        message = starting(slot=1)
        message.checkpoint.params.constraint.regex = "[ab]{5}"
        sidecar.send(start=message)
        await sidecar.until_ended(1)
        assert sidecar.ended[1].finish_reason == STOP
        assert not sidecar.ended[1].HasField("stop_token_id")

    on_stage(scenario, tmp_path)


# Control.


def test_an_abort_ends_an_attempt_within_a_step_and_frees_its_blocks(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1)
        await sidecar.until(lambda: len(sidecar.token_ids.get(1, ())) >= 3)
        sidecar.send(abort=attempt_pb2.AbortAttempt(slot=1))
        sidecar.send(abort=attempt_pb2.AbortAttempt(slot=1))
        sidecar.send(abort=attempt_pb2.AbortAttempt(slot=77))
        await sidecar.until_ended(1)
        assert sidecar.ended[1].finish_reason == CANCELLED
        assert sidecar.ended[1].end_offset == len(sidecar.token_ids[1])
        num_frames = len(sidecar.frames)
        await sidecar.until(
            lambda: any(
                f.HasField("load") and not f.load.ranks[0].kv_blocks_used
                for f in sidecar.frames[num_frames:]
            )
        )

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.005)))


def test_a_window_stops_an_attempt_until_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1, max_tokens=12, window_tokens=4)
        sidecar.start(2, max_tokens=30)
        await sidecar.until_ended(2)
        assert len(sidecar.token_ids[1]) == 4
        sidecar.send(ack=attempt_pb2.AckAttempts(slots=[1, 99], offsets=[4, 4]))
        await sidecar.until(lambda: len(sidecar.token_ids[1]) == 8)
        sidecar.send(ack=attempt_pb2.AckAttempts(slots=[1], offsets=[12]))
        await sidecar.until_ended(1)

    on_stage(scenario, tmp_path)


def test_a_deadline_ends_even_an_attempt_that_waits(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        message = starting(slot=1, max_tokens=12, window_tokens=4)
        message.deadline.FromMilliseconds(230)
        begun = asyncio.get_running_loop().time()
        sidecar.send(start=message)
        await sidecar.until_ended(1)
        assert 0.2 < asyncio.get_running_loop().time() - begun < 0.35
        assert sidecar.ended[1].finish_reason == CANCELLED
        assert "deadline" in sidecar.ended[1].detail

    on_stage(scenario, tmp_path)


# Refusals.


def test_an_epoch_that_is_over_is_fenced(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1, request_id="r", epoch=5, max_tokens=2)
        await sidecar.until_ended(1)
        for slot, epoch in ((2, 5), (3, 4)):
            sidecar.start(slot, request_id="r", epoch=epoch, max_tokens=2)
        sidecar.start(4, request_id="r", epoch=6, max_tokens=2)
        await sidecar.until_ended(4)
        assert set(sidecar.refused) == {2, 3}
        for refused in sidecar.refused.values():
            assert refused.kind == worker_pb2.FAILURE_KIND_FENCED
            assert refused.epoch_known == 5

    on_stage(scenario, tmp_path)


def test_a_newer_epoch_ends_the_older_attempt(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1, request_id="r", epoch=1)
        await sidecar.until(lambda: 1 in sidecar.token_ids)
        sidecar.start(2, request_id="r", epoch=2, max_tokens=2)
        await sidecar.until_ended(1, 2)
        assert sidecar.ended[1].failure == worker_pb2.FAILURE_KIND_FENCED

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.002)))


def test_epochs_are_remembered_across_connections(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = await stage.greeted()
        first.start(1, request_id="r", epoch=5)
        await first.until(lambda: 1 in first.token_ids)
        second = await stage.greeted()
        second.start(1, request_id="r", epoch=5)
        await second.until(lambda: 1 in second.refused)
        assert second.refused[1].kind == worker_pb2.FAILURE_KIND_FENCED

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.002)))


def test_a_slot_is_used_once(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(5, max_tokens=2)
        await sidecar.until_ended(5)
        sidecar.start(5, request_id="other")
        sidecar.start(4, request_id="another")
        await sidecar.until(lambda: {4, 5} <= set(sidecar.refused))
        assert sidecar.refused[4].detail == "slot: expected above 5, got 4"
        assert sidecar.refused[4].kind == worker_pb2.FAILURE_KIND_REJECTED

    on_stage(scenario, tmp_path)


def test_nonsense_is_refused_and_the_engine_goes_on(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        sidecar.start(1, prompt=[])
        sidecar.start(2, prompt=[5000])
        sidecar.start(3, request_id="")
        sidecar.start(4, epoch=0)
        broken = starting(slot=5, request_id="r5")
        broken.checkpoint.params.constraint.regex = "("
        sidecar.send(start=broken)
        sidecar.start(6, max_tokens=3)
        await sidecar.until_ended(6)
        assert set(sidecar.refused) == {1, 2, 3, 4, 5}
        for refused in sidecar.refused.values():
            assert refused.kind == worker_pb2.FAILURE_KIND_REJECTED
            assert "expected" in refused.detail

    on_stage(scenario, tmp_path)


def test_a_full_line_is_overload_with_a_time_to_come_back(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        for slot in range(1, 10):
            sidecar.start(slot, max_tokens=3)
        await sidecar.until(lambda: len(sidecar.ended) + len(sidecar.refused) == 9)
        assert sidecar.refused
        for refused in sidecar.refused.values():
            assert refused.kind == worker_pb2.FAILURE_KIND_OVERLOAD
            assert refused.retry_after.seconds == 1

    on_stage(scenario, tmp_path, fast(batch_size_max=2), waiting_max=3)


# Connections.


def test_a_new_connection_replaces_the_old_one_and_its_attempts(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = await stage.greeted()
        first.start(1)
        await first.until(lambda: 1 in first.token_ids)
        second = await stage.greeted()
        await first.until_closed()
        second.start(1, request_id="new", max_tokens=3)
        await second.until_ended(1)
        assert set(second.token_ids) == {1}
        await second.until(
            lambda: (
                second.frames[-1].HasField("load")
                and not second.frames[-1].load.ranks[0].kv_blocks_used
            )
        )

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.002)))


def test_attempts_end_with_their_connection(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = await stage.greeted()
        first.start(1)
        await first.until(lambda: 1 in first.token_ids)
        first.connection.close()
        await first.connection.wait_closed()
        second = await stage.greeted()
        await second.until(lambda: len(second.frames) >= 2)
        assert not second.token_ids
        assert not second.frames[-1].load.ranks[0].kv_blocks_used

    on_stage(scenario, tmp_path, simulated_runner(cost=CostModel(step_base_s=0.002)))


def encoded(**request: object) -> bytes:
    data = engine_pb2.EngineRequest(**request).SerializeToString()  # pyright: ignore[reportArgumentType]
    return struct.pack("<I", len(data)) + data


HELLO = encoded(hello=engine_pb2.EngineHello(protocol_version=1))
GARBAGE = {
    "text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a size of 4 GiB": b"\xff\xff\xff\xff",
    "no message": struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    "no request": HELLO + encoded(),
    "no hello": encoded(start=starting(slot=1)),
    "hello twice": HELLO + HELLO,
    "hello without version": encoded(hello=engine_pb2.EngineHello()),
    "an ack with a slot too many": HELLO
    + encoded(ack=attempt_pb2.AckAttempts(slots=[1, 2], offsets=[3])),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_closes_the_connection_and_the_engine_lives(tmp_path: Path, kind: str) -> None:
    async def scenario(stage: Stage) -> None:
        reader, writer = await asyncio.open_unix_connection(str(stage.path))
        writer.write(GARBAGE[kind])
        await writer.drain()
        await reader.read()  # To the end: the engine closes it.
        writer.close()
        sidecar = await stage.greeted()
        sidecar.start(1, max_tokens=3)
        await sidecar.until_ended(1)

    on_stage(scenario, tmp_path)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_truncated_message_is_no_request(tmp_path: Path, cut: int) -> None:
    async def scenario(stage: Stage) -> None:
        _, writer = await asyncio.open_unix_connection(str(stage.path))
        writer.write((HELLO + encoded(start=starting(slot=1)))[: len(HELLO) + cut])
        writer.close()
        await writer.wait_closed()
        sidecar = await stage.greeted()
        sidecar.start(1, max_tokens=3)
        await sidecar.until_ended(1)

    on_stage(scenario, tmp_path)


async def fill_every_buffer(sidecar: Sidecar, runner: "CountingRunner") -> range:
    """Start many endless attempts and read nothing until the engine has come to rest."""
    slots = range(1, 1001)
    for slot in slots:
        sidecar.start(slot)
    num_steps = -1
    while num_steps != runner.num_steps or not num_steps:
        num_steps = runner.num_steps
        await asyncio.sleep(0.2)
    assert 0 < num_steps < 5000
    return slots


def test_a_sidecar_that_does_not_read_stops_the_engine_and_loses_nothing(tmp_path: Path) -> None:
    runner = CountingRunner(fast().spec, SimulatedModel("simulated"), CostModel(step_base_s=0.0))

    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        slots = await fill_every_buffer(sidecar, runner)
        for slot in slots:
            sidecar.send(abort=attempt_pb2.AbortAttempt(slot=slot))
        await sidecar.until_ended(*slots)
        assert all(e.end_offset == len(sidecar.token_ids[s]) for s, e in sidecar.ended.items())

    on_stage(scenario, tmp_path, runner)


def test_a_sidecar_that_does_not_read_can_be_replaced(tmp_path: Path) -> None:
    runner = CountingRunner(fast().spec, SimulatedModel("simulated"), CostModel(step_base_s=0.0))

    async def scenario(stage: Stage) -> None:
        await fill_every_buffer(await stage.greeted(), runner)
        other = await stage.greeted()
        other.start(1, request_id="new", max_tokens=3)
        await other.until_ended(1)

    on_stage(scenario, tmp_path, runner)


class CountingRunner(SimulatedRunner):
    """Counts its steps."""

    num_steps = 0

    async def execute(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        return await super().execute(plan)


# Scale.


@pytest.mark.parametrize("num_streams", [1_500])
def test_many_streams_share_one_process(tmp_path: Path, num_streams: int) -> None:
    async def scenario(stage: Stage) -> None:
        sidecar = await stage.greeted()
        slots = range(1, num_streams + 1)
        for slot in slots:
            sidecar.start(slot, prompt=[slot % 4096, slot // 4096], max_tokens=20)
        await sidecar.until_ended(*slots)
        assert not sidecar.refused
        assert all(len(sidecar.token_ids[slot]) == 20 for slot in slots)
        assert len({tuple(tokens) for tokens in sidecar.token_ids.values()}) == num_streams

    on_stage(scenario, tmp_path, fast(batch_size_max=num_streams))


def test_an_engine_that_fails_ends_its_service(tmp_path: Path) -> None:
    class Failing(SimulatedRunner):
        async def execute(self, plan: StepPlan) -> StepResult:
            raise RuntimeError(f"the device is gone, and {len(plan.sampled)} rows with it")

    async def run() -> None:
        service = EngineService(Failing(fast().spec, SimulatedModel("simulated"), CostModel()))
        listening = asyncio.Event()
        path = tmp_path / "engine"
        serving = asyncio.create_task(service.serve(path, on_listening=listening.set))
        await listening.wait()
        sidecar = Sidecar(await framing.connect_unix(str(path), engine_pb2.EngineResponse))
        await sidecar.greet()
        sidecar.start(1)
        with pytest.raises(RuntimeError, match="the device is gone"):
            await serving
        await sidecar.until_closed()

    uvloop.run(asyncio.wait_for(run(), TIMEOUT_S))
