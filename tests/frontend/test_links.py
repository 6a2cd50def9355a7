"""Links over real gRPC: who is believed, who is not, and what happens when a link is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from frontend.failure_detector import Liveness
from frontend.links import STEADY_S
from frontend.native_wire import FIRST_HURRY, NativeWire
from tests.frontend.fakes import MODEL, FakeSidecar, reference
from tests.frontend.worlds import World, read, read_some, run, world
from unbroken.chaos.proxy import Proxy
from unbroken.transport import listen, make_server
from unbroken.v1 import admin_service_pb2 as admin_pb
from unbroken.v1 import attempt_pb2, relay_service_pb2, worker_pb2
from unbroken.v1 import inference_service_pb2 as pb

PROMPT = list(b"once upon a time")


async def worker_info(it: World, worker_id: str) -> admin_pb.WorkerInfo:
    """The worker as the frontend sees it."""
    workers = {one.record.identity.worker_id: one for one in await it.client.list_workers()}
    return workers[worker_id]


def frame(**fields: Any) -> relay_service_pb2.RelayResponse:
    return relay_service_pb2.RelayResponse(frame=attempt_pb2.StepFrame(**fields))


# Who is believed.


def test_a_link_says_hello_and_shows_the_worker_when_it_is_welcomed() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", incarnation=5)) as it:
            hello = it.sidecars[0].hellos[0]
            assert (hello.protocol_version, hello.frontend_id, hello.incarnation) == (1, "f0", 1)
            assert (hello.expected_worker_incarnation, hello.call_number) == (5, 1)
            info = await worker_info(it, "w1")
            assert info.link == admin_pb.LINK_STATE_UP
            assert info.engine == worker_pb2.ENGINE_STATE_SERVING
            assert info.description.model == MODEL
            assert info.detail == ""

    run(scenario())


@pytest.mark.parametrize(
    ("oddity", "detail"),
    [
        (
            {"welcome_identity": worker_pb2.WorkerIdentity(worker_id="other")},
            "expected worker w2 of incarnation 1, got 'other'",
        ),
        (
            {"welcome_identity": worker_pb2.WorkerIdentity(worker_id="w2", incarnation=9)},
            "got 'w2' of 9",
        ),
        ({"protocol_version": 2}, "expected protocol version 1, got 2"),
        ({"context_length": 0}, "expected a description with context_length"),
        ({"model": ""}, "expected a description with model"),
    ],
    ids=["name", "incarnation", "version", "context", "model"],
)
def test_a_worker_that_is_not_what_it_should_be_gets_no_work(
    oddity: dict[str, Any], detail: str
) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            await it.add(FakeSidecar("w2", **oddity))
            await it.until(lambda: detail in it.detail_of("w2"))
            info = await worker_info(it, "w2")
            assert detail in info.detail
            assert it.frontend.mesh.num_ready(MODEL) == 1

    run(scenario())


@pytest.mark.parametrize(
    ("say", "detail"),
    [
        (
            lambda: relay_service_pb2.RelayResponse(
                welcome=relay_service_pb2.RelayWelcome(protocol_version=1)
            ),
            "expected one welcome",
        ),
        (
            lambda: relay_service_pb2.RelayResponse(
                adopted=relay_service_pb2.AttemptAdopted(slot=1)
            ),
            "expected no adoption",
        ),
        (
            lambda: relay_service_pb2.RelayResponse(
                adoptions=relay_service_pb2.AttemptsAdopted(
                    adopted=[relay_service_pb2.AttemptAdopted(slot=2)]
                )
            ),
            "expected no adoption for slot 2",
        ),
        (
            lambda: relay_service_pb2.RelayResponse(
                verdict=relay_service_pb2.EngineVerdict(state=worker_pb2.ENGINE_STATE_SERVING)
            ),
            "expected a description with SERVING",
        ),
        (lambda: frame(sequence=9), "expected frame 1, got 9"),
    ],
    ids=["welcome", "adopted", "adoptions", "verdict", "frame"],
)
def test_a_sidecar_that_breaks_the_contract_loses_its_link(
    say: Callable[[], relay_service_pb2.RelayResponse], detail: str
) -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            it.sidecars[0].say(say())
            await it.until_ready(0)
            assert detail in (await worker_info(it, "w1")).detail
            await it.until_ready(1)  # It is given another chance, on another call.
            assert [hello.call_number for hello in it.sidecars[0].hellos] == [1, 2]

    run(scenario())


def test_a_sidecar_that_speaks_garbage_harms_nobody() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            server = make_server()

            async def garble(_: AsyncIterator[bytes], __: Any) -> AsyncIterator[bytes]:
                yield b"\xff\xff\xff\xff"
                await asyncio.Event().wait()

            make_handler: Any = grpc.stream_stream_rpc_method_handler
            handler = make_handler(garble)
            server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        "unbroken.v1.RelayService", {"Relay": handler}
                    ),
                )
            )
            address = listen(server, "127.0.0.1:0")
            await server.start()
            try:
                record = worker_pb2.WorkerRecord(
                    identity=worker_pb2.WorkerIdentity(worker_id="w2", incarnation=1),
                    address=address,
                    model=MODEL,
                )
                it.discovery.announce(it.sidecars[0].record, record)
                await it.until(lambda: "got bytes that are none" in it.detail_of("w2"))
                stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
                assert (await read(stream))[0] == reference(PROMPT, 5)
            finally:
                await server.stop(None)

    run(scenario())


def test_a_tokenizer_is_fetched_once_for_all_workers_that_share_it() -> None:
    async def scenario() -> None:
        async with world(*(FakeSidecar(f"w{n}") for n in range(3))) as it:
            assert sum(sidecar.num_tokenizers_sent for sidecar in it.sidecars) == 1

    run(scenario())


def test_slots_ascend_and_are_never_used_again() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            for _ in range(4):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert [start.slot for start in it.sidecars[0].starts] == [1, 2, 3, 4]

    run(scenario())


def test_an_engine_can_begin_with_some_streams_while_others_are_still_being_moved() -> None:
    num_streams = 3 * FIRST_HURRY + 1

    async def scenario() -> None:
        # Slow enough that no stream ends before there is another sidecar.
        dying, surviving = FakeSidecar("w1", step_s=0.05), FakeSidecar("w2")
        async with world(dying, relay="native") as it:
            streams = [
                it.client.generate(token_ids=[*PROMPT, index], max_tokens=200, temperature=0)
                for index in range(num_streams)
            ]
            begun = await asyncio.gather(*(read_some(one, 5) for one in streams))
            await it.add(surviving)
            await it.until_ready(2)
            dying.say_state(worker_pb2.ENGINE_STATE_DEAD)
            rest = await asyncio.gather(*(read(one) for one in streams))
            for index, (pieces, (ids, _)) in enumerate(zip(begun, rest, strict=True)):
                first = [i for piece in pieces for i in piece.token_ids]
                assert [*first, *ids] == reference((*PROMPT, index), 200)
            assert surviving.batches == [FIRST_HURRY, 2 * FIRST_HURRY]
            assert len(surviving.starts) == num_streams

    run(scenario())


# Signs of life.


def test_heartbeats_go_out_without_gaps() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), heartbeat_interval_s=0.02) as it:
            sidecar = it.sidecars[0]
            await sidecar.until(lambda: len(sidecar.heartbeats) >= 4)
            assert [one.sequence for one in sidecar.heartbeats[:4]] == [1, 2, 3, 4]
            assert sidecar.heartbeats[3].sequence_seen > 0
            assert sidecar.heartbeats[0].interval.ToMilliseconds() == 20

    run(scenario())


def test_a_silent_sidecar_is_lost_as_hung_and_its_streams_go_on() -> None:
    async def scenario() -> None:
        async with world(
            FakeSidecar("w1"), FakeSidecar("w2"), link_silence_max_s=0.3, heartbeat_interval_s=0.05
        ) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=400, temperature=0, request_id="r"
            )
            ids = [i for piece in await read_some(stream, 5) for i in piece.token_ids]
            (await it.sidecar_of("r")).is_hung = True
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 400)
            assert stream.finished is not None
            first = stream.finished.attempts[0]
            assert first.failure == worker_pb2.FAILURE_KIND_HANG
            assert "nothing received" in first.detail

    run(scenario())


def test_a_sidecar_that_hears_nothing_is_lost_as_cut_off_and_its_streams_go_on() -> None:
    async def scenario() -> None:
        async with world(
            FakeSidecar("w1", step_s=0.01),
            FakeSidecar("w2", step_s=0.01),
            link_silence_max_s=0.3,
            heartbeat_interval_s=0.05,
        ) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=100, temperature=0, request_id="r"
            )
            ids = [i for piece in await read_some(stream, 5) for i in piece.token_ids]
            (await it.sidecar_of("r")).is_deaf = True
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 100)
            assert stream.finished is not None
            first = stream.finished.attempts[0]
            assert first.failure == worker_pb2.FAILURE_KIND_PARTITION
            assert "it has heard nothing" in first.detail
            assert first.end_offset > 10  # It was heard all the time.

    run(scenario())


def test_a_suspect_gets_new_work_only_if_there_is_no_other_worker() -> None:
    async def scenario() -> None:
        async with world(
            FakeSidecar("w1"), FakeSidecar("w2"), link_silence_max_s=60, link_dead_phi=50
        ) as it:
            silent, other = it.sidecars
            silent.is_mute = True
            await it.until(lambda: it.frontend.mesh.workers["w1"].liveness is Liveness.SUSPECT)
            info = await worker_info(it, "w1")
            assert info.liveness == admin_pb.LIVENESS_SUSPECT
            assert info.suspicion > 1
            for _ in range(4):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert (len(silent.starts), len(other.starts)) == (0, 4)
            await other.die()
            await it.until_ready(1)
            stream = it.client.generate(token_ids=PROMPT, max_tokens=2)
            reading = asyncio.create_task(read(stream))
            await silent.until(lambda: silent.starts)
            silent.is_mute = False
            await reading
            await it.until(lambda: it.frontend.mesh.workers["w1"].liveness is Liveness.ALIVE)
            assert (await worker_info(it, "w1")).suspicion < 1

    run(scenario())


def test_load_comes_with_heartbeats_and_frames() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            for number, say in enumerate((say_in_heartbeat, say_in_frame), start=1):
                load = worker_pb2.LoadReport(
                    engine_steps_total=number,
                    ranks=[
                        worker_pb2.RankLoad(kv_blocks_used=10 * number, prefill_tokens_queued=3),
                        worker_pb2.RankLoad(rank=1, kv_blocks_used=1),
                    ],
                )
                say(it.sidecars[0], load)
                (view,) = it.frontend.mesh.views()
                await it.until(lambda v=view, n=number: v.kv_blocks_used == 10 * n + 1)
                assert view.prefill_tokens_queued == 3
                assert (await worker_info(it, "w1")).load.engine_steps_total == number

    def say_in_heartbeat(sidecar: FakeSidecar, load: worker_pb2.LoadReport) -> None:
        heartbeat = relay_service_pb2.Heartbeat(sequence=1, load=load)
        sidecar.say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))

    def say_in_frame(sidecar: FakeSidecar, load: worker_pb2.LoadReport) -> None:
        sidecar.say_frame(attempt_pb2.StepFrame(load=load))

    run(scenario())


def test_what_a_worker_has_cached_is_known_by_rank() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            (view,) = it.frontend.mesh.views()
            events = [
                worker_pb2.KvEvents(reset=True, stored=[1, 2]),
                worker_pb2.KvEvents(rank=1, reset=True, stored=[2, 3]),
                worker_pb2.KvEvents(removed=[2]),
            ]
            it.sidecars[0].say_frame(attempt_pb2.StepFrame(kv_events=events))
            await it.until(lambda: view.cached_blocks == {1, 2, 3})  # Rank 1 still has 2.
            events = [worker_pb2.KvEvents(rank=1, reset=True, stored=[4])]
            it.sidecars[0].say_frame(attempt_pb2.StepFrame(kv_events=events))
            await it.until(lambda: view.cached_blocks == {1, 4})

    run(scenario())


# News of the engine.


def test_streams_leave_an_engine_that_is_dead_or_stalled() -> None:
    async def scenario() -> None:
        for state, failure in (
            (worker_pb2.ENGINE_STATE_DEAD, worker_pb2.FAILURE_KIND_CRASH),
            (worker_pb2.ENGINE_STATE_STALLED, worker_pb2.FAILURE_KIND_STALL),
        ):
            async with world(FakeSidecar("w1"), FakeSidecar("w2")) as it:
                stream = it.client.generate(
                    token_ids=PROMPT, max_tokens=400, temperature=0, request_id="r"
                )
                ids = [i for piece in await read_some(stream, 5) for i in piece.token_ids]
                sidecar = await it.sidecar_of("r")
                sidecar.say_state(state)
                ids += (await read(stream))[0]
                assert ids == reference(PROMPT, 400)
                assert stream.finished is not None
                assert stream.finished.attempts[0].failure == failure
                await sidecar.until(lambda s=sidecar: s.aborts)
                assert it.frontend.mesh.num_ready(MODEL) == 1
                sidecar.say_state(worker_pb2.ENGINE_STATE_SERVING)
                await it.until_ready(2)

    run(scenario())


def test_what_streams_of_a_dead_engine_ask_of_others_is_written_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hurried: list[NativeWire] = []

    def hurry_all(wire: NativeWire) -> None:
        hurried.append(wire)  # What waits is written at the end of the turn, too.

    monkeypatch.setattr(NativeWire, "hurry_all", hurry_all)

    async def scenario() -> None:
        sidecars = [FakeSidecar(f"w{number}") for number in (1, 2, 3)]
        async with world(*sidecars, relay="native") as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=100, temperature=0, request_id="r"
            )
            await read_some(stream, 5)
            assert hurried == []
            (await it.sidecar_of("r")).say_state(worker_pb2.ENGINE_STATE_DEAD)
            await read(stream)
            assert len(set(hurried)) == len(hurried) == 2, "an abort, and what it goes on with"

    run(scenario())


def test_a_draining_worker_finishes_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", step_s=0.005), FakeSidecar("w2")) as it:
            stream = it.client.generate(
                token_ids=PROMPT, max_tokens=60, temperature=0, request_id="r"
            )
            ids = [i for piece in await read_some(stream, 2) for i in piece.token_ids]
            sidecar = await it.sidecar_of("r")
            sidecar.is_draining = True
            sidecar.say_state(worker_pb2.ENGINE_STATE_SERVING)
            await it.until_ready(1)
            info = await worker_info(it, sidecar.worker_id)
            assert info.is_draining
            assert info.detail == "draining"
            for _ in range(4):
                await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            assert len(sidecar.starts) == 1
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 60)
            assert stream.finished is not None
            assert len(stream.finished.attempts) == 1

    run(scenario())


# Discovery.


def test_a_worker_that_discovery_forgets_goes_on_serving() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            it.discovery.announce()
            for _ in range(2):
                stream = it.client.generate(token_ids=PROMPT, max_tokens=5, temperature=0)
                assert (await read(stream))[0] == reference(PROMPT, 5)
            assert (await worker_info(it, "w1")).link == admin_pb.LINK_STATE_UP

    run(scenario())


def test_a_new_incarnation_takes_over_at_once_and_an_old_one_is_not_believed() -> None:
    async def scenario() -> None:
        old, new = FakeSidecar("w1", incarnation=5), FakeSidecar("w1", incarnation=6)
        async with world(old) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=200, temperature=0)
            ids = [i for piece in await read_some(stream, 5) for i in piece.token_ids]
            await new.begin()
            it.sidecars.append(new)
            it.discovery.announce(new.record)
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 200)
            assert stream.finished is not None
            lives = [one.worker.incarnation for one in stream.finished.attempts]
            assert lives == [5, 6]
            it.discovery.announce(old.record)
            await read(it.client.generate(token_ids=PROMPT, max_tokens=2))
            info = await worker_info(it, "w1")
            assert info.record.identity.incarnation == 6
            assert len(old.starts) == 1

    run(scenario())


def test_a_link_that_broke_is_opened_again_and_the_same_life_goes_on_serving() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            sidecar = it.sidecars[0]
            stream = it.client.generate(token_ids=PROMPT, max_tokens=100, temperature=0)
            ids = [i for piece in await read_some(stream, 5) for i in piece.token_ids]
            await sidecar.die()
            await it.until_ready(0)
            await sidecar.begin()
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 100)

    run(scenario())


def test_a_worker_that_is_gone_and_forgotten_is_dropped() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1"), link_forgotten_grace_s=0.1) as it:
            await it.sidecars[0].die()
            it.discovery.announce()
            await it.until(lambda: not it.frontend.mesh.workers)
            (model,) = await it.client.list_models()
            assert (model.model, model.num_workers) == (MODEL, 0)

    run(scenario())


# Links that break.


@pytest.mark.parametrize("is_alive", [True, False], ids=["sidecar lives", "sidecar is gone"])
def test_a_stream_whose_link_was_reset_adopts_its_attempt_if_the_sidecar_lives(
    is_alive: bool,
) -> None:
    async def scenario() -> None:
        near, far = FakeSidecar("w1", step_s=0.005), FakeSidecar("w2", step_s=0.005)
        await near.begin()
        async with Proxy(near.address) as proxy, world() as it:
            near.advertise = proxy.address
            it.sidecars.append(near)
            it.announce()
            await it.until_ready(1)
            await asyncio.sleep(STEADY_S)  # Else the link is opened again after a pause.
            stream = it.client.generate(token_ids=PROMPT, max_tokens=60, seed=7, timeout_s=20)
            ids = [i for piece in await read_some(stream, 10) for i in piece.token_ids]
            await it.add(far)
            await it.until_ready(2)
            if not is_alive:
                proxy.refuse()
            assert proxy.reset() == 1, "the fault took effect"
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 60, seed=7)
            end = stream.finished
            assert end is not None
            assert [one.adopted for one in end.attempts] == [False, is_alive]
            assert len(near.starts) == 1
            assert len(far.starts) == (not is_alive)
            assert (end.usage.recomputed_prefill_tokens == 0) is is_alive
            if is_alive:
                assert end.attempts[0].failure == worker_pb2.FAILURE_KIND_PARTITION
                assert end.choices[0].continued == pb.CONTINUED_NEVER
                await near.until(lambda: near.num_releases == 1)
            else:
                assert end.attempts[0].failure == worker_pb2.FAILURE_KIND_CRASH

    run(scenario())


def spread_over_rows(frame: attempt_pb2.StepFrame) -> None:
    """Tell the same one token a row, as a sidecar does that had to wait for some steps."""
    end, rows = 0, list[tuple[int, int, int, int]]()
    for slot, offset, count in zip(frame.slots, frame.offsets, frame.token_counts, strict=True):
        begin, end = end, end + count
        rows += [(i, slot, offset + i, frame.token_ids[begin + i]) for i in range(count)]
    rows.sort(key=lambda row: row[0])
    del frame.token_counts[:]
    frame.slots[:] = [slot for _, slot, _, _ in rows]
    frame.offsets[:] = [offset for _, _, offset, _ in rows]
    frame.token_ids[:] = [token_id for _, _, _, token_id in rows]


def test_several_steps_in_one_frame_are_told_apart() -> None:
    async def scenario() -> None:
        sidecar = FakeSidecar("w1", tokens_per_step=3, on_step=spread_over_rows)
        async with world(sidecar) as it:
            streams = [
                it.client.generate(token_ids=PROMPT, max_tokens=num, seed=7, timeout_s=20)
                for num in (20, 50, 80)
            ]
            told = await asyncio.gather(*(read(stream) for stream in streams))
            for (ids, text), num in zip(told, (20, 50, 80), strict=True):
                assert ids == reference(PROMPT, num, seed=7)
                assert text == bytes(ids).decode()

    run(scenario())


def test_a_stream_with_two_rows_in_each_of_several_steps_is_told_both() -> None:
    async def scenario() -> None:
        frames: list[list[int]] = []

        def in_turns(frame: attempt_pb2.StepFrame) -> None:
            spread_over_rows(frame)
            if not frames:
                slots, ids = list(frame.slots), list(frame.token_ids)
                once, twice = min(slots, key=slots.count), max(slots, key=slots.count)
                ids_of = {
                    slot: iter([i for s, i in zip(slots, ids, strict=True) if s == slot])
                    for slot in slots
                }
                offsets_of = {slot: iter(range(len(slots))) for slot in slots}
                frame.slots[:] = [once, twice, twice, once, twice, twice]
                frame.offsets[:] = [next(offsets_of[slot]) for slot in frame.slots]
                frame.token_ids[:] = [next(ids_of[slot]) for slot in frame.slots]
            frames.append(list(frame.slots))

        sidecar = FakeSidecar("w1", step_s=None, tokens_per_step=4, on_step=in_turns)
        async with world(sidecar) as it:
            short, long = (
                it.client.generate(token_ids=PROMPT, max_tokens=num, seed=7, timeout_s=20)
                for num in (2, 12)
            )
            reading = asyncio.gather(read(short), read(long))
            await sidecar.until(lambda: len(sidecar.starts) == 2)
            for _ in range(3):
                sidecar.step()
                await asyncio.sleep(0.02)
            (ids_short, _), (ids_long, _) = await reading
            assert len(frames[0]) == 6
            assert ids_short == reference(PROMPT, 2, seed=7)
            assert ids_long == reference(PROMPT, 12, seed=7)
            assert long.finished is not None
            assert len(long.finished.attempts) == 1, "nobody said anything wrong"

    run(scenario())


def test_steps_in_one_frame_that_leave_a_token_out_cost_the_attempt_and_nothing_else() -> None:
    async def scenario() -> None:
        frames: list[attempt_pb2.StepFrame] = []

        def leave_out(frame: attempt_pb2.StepFrame) -> None:
            spread_over_rows(frame)
            frames.append(frame)
            if len(frames) == 5:
                assert len(frame.slots) == 3, "there is a row between two"
                for column in (frame.slots, frame.offsets, frame.token_ids):
                    del column[1]

        near, far = FakeSidecar("w1", tokens_per_step=3, on_step=leave_out), FakeSidecar("w2")
        async with world(near) as it:
            stream = it.client.generate(token_ids=PROMPT, max_tokens=60, seed=7, timeout_s=20)
            ids = [i for piece in await read_some(stream, 1) for i in piece.token_ids]
            await it.add(far)
            ids += (await read(stream))[0]
            assert ids == reference(PROMPT, 60, seed=7)
            end = stream.finished
            assert end is not None
            assert end.attempts[0].failure == worker_pb2.FAILURE_KIND_PROTOCOL
            assert end.attempts[0].end_offset == 13, "what came before the gap counts"

    run(scenario())
