"""Claims of `frontend.stored_kv`: what memory services have is learnt from what was found there."""

import pytest

from frontend.stored_kv import (
    ADDRESS_CHARS_MAX,
    SERVICES_MAX,
    TICKET_BYTES_MAX,
    UNSTORED_TOKENS,
    Expected,
    StoredKv,
    at_most,
    problem_of_holder,
    problem_of_service,
)
from tests.frontend.fakes import FakeSidecar, reference
from tests.frontend.worlds import read, read_some, run, world
from unbroken.v1 import attempt_pb2, relay_service_pb2, worker_pb2


def test_a_service_is_believed_to_have_all_that_is_full_until_something_is_known_of_it() -> None:
    stored = StoredKv()
    assert stored.expected("m", 1000) == 1000 - UNSTORED_TOKENS
    assert stored.expected("m", 5) == 0


def test_one_that_has_nothing_any_more_is_expected_to_have_less_with_each_attempt() -> None:
    stored = StoredKv()
    seen: list[int] = []
    for _ in range(4):
        stored.seen(Expected("m", 1000), cached_tokens=0, restored_tokens=0)
        seen.append(stored.expected("m", 1000 + UNSTORED_TOKENS))
    assert seen == [500, 250, 125, 62]
    assert stored.expected("other", 1000) == 1000 - UNSTORED_TOKENS
    for _ in range(4):
        stored.seen(Expected("m", 1000), cached_tokens=0, restored_tokens=1000)
    assert stored.expected("m", 1000 + UNSTORED_TOKENS) > 900, "it heals as it was lost"


def test_what_the_worker_had_itself_says_nothing_of_the_service() -> None:
    stored = StoredKv()
    stored.seen(Expected("m", 1000), cached_tokens=1000, restored_tokens=0)
    assert stored.expected("m", 1000) == at_most(1000)
    stored.seen(Expected("m", 1000), cached_tokens=600, restored_tokens=400)
    assert stored.expected("m", 1000) == at_most(1000)
    stored.seen(Expected("m", 1000), cached_tokens=600, restored_tokens=0)
    assert stored.expected("m", 1000) == at_most(1000) // 2


def test_only_so_many_services_are_remembered() -> None:
    stored = StoredKv()
    for number in range(SERVICES_MAX + 1):
        stored.seen(Expected(f"m{number}", 100), cached_tokens=0, restored_tokens=0)
    assert stored.expected("m0", 1000) == at_most(1000), "the oldest is forgotten"
    assert stored.expected("m1", 1000) == at_most(1000) // 2


def test_longer_words_than_the_contract_has_are_refused() -> None:
    assert problem_of_service("m" * 64) is None
    assert "got 65" in (problem_of_service("m" * 65) or "")
    assert problem_of_holder("a" * ADDRESS_CHARS_MAX, bytes(TICKET_BYTES_MAX)) is None
    assert problem_of_holder("a" * (ADDRESS_CHARS_MAX + 1), b"") is not None
    assert problem_of_holder("", bytes(TICKET_BYTES_MAX + 1)) is not None


@pytest.mark.parametrize(
    ("prefilled", "restored", "expected"),
    [
        pytest.param(205, 0, 500, id="nothing"),
        pytest.param(5, 200, 1000, id="all"),
        pytest.param(0, 0, 1000, id="not told, such as of an engine that has died"),
    ],
)
def test_what_an_attempt_found_is_told_when_it_ends(
    prefilled: int, restored: int, expected: int
) -> None:
    prompt = [97] * 200

    async def scenario() -> None:
        victim, survivor = (FakeSidecar(name, memory_service="m") for name in ("w1", "w2"))

        def say_what_it_found(frame: attempt_pb2.StepFrame) -> None:
            for ended in frame.ended:
                ended.prefill_tokens, ended.restored_tokens = prefilled, restored

        survivor.on_step = say_what_it_found
        async with world(victim) as it:
            stream = it.client.generate(token_ids=prompt, max_tokens=400, temperature=0)
            pieces = await read_some(stream, 5)
            await it.add(survivor)
            await it.until_ready(2)
            await victim.die()
            ids = [i for piece in pieces for i in piece.token_ids] + (await read(stream))[0]
            assert ids == reference(prompt, 400)
            assert it.frontend.mesh.stored.expected("m", 1032) == expected

    run(scenario())


def test_a_worker_that_has_switched_its_store_off_is_expected_to_find_nothing() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", memory_service="m")) as it:
            (view,) = it.frontend.mesh.views()
            assert view.memory_service == "m"
            load = worker_pb2.LoadReport(kv_store=worker_pb2.KvStoreUse(is_off=True))
            heartbeat = relay_service_pb2.Heartbeat(sequence=1, load=load)
            it.sidecars[0].say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
            await it.until(lambda: not view.memory_service)

    run(scenario())


def test_a_renewed_ticket_reaches_streams_that_were_there_and_no_people() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1", memory_service="m")) as it:
            (worker,) = it.frontend.mesh.workers.values()
            kept: list[worker_pb2.KvHolder | None] = []
            for number, ticket in enumerate((b"old", b"new"), start=1):
                load = worker_pb2.LoadReport(
                    engine_steps_total=number,
                    kv_holder=worker_pb2.KvHolder(address="10.0.0.1:1", ticket=ticket),
                )
                heartbeat = relay_service_pb2.Heartbeat(sequence=number, load=load)
                it.sidecars[0].say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
                await it.until(
                    lambda ticket=ticket: (
                        worker.kv_holder is not None and worker.kv_holder.ticket == ticket
                    )
                )
                kept.append(worker.kv_holder)  # As a stream keeps it.
            assert kept[0] is kept[1]
            assert worker.load is not None
            assert not worker.load.HasField("kv_holder")
            (info,) = await it.client.list_workers()
            assert not info.load.HasField("kv_holder"), "it has a secret"

    run(scenario())


def test_a_sidecar_whose_words_are_longer_than_the_contract_has_loses_its_link() -> None:
    async def scenario() -> None:
        async with world(FakeSidecar("w1")) as it:
            await it.add(FakeSidecar("w2", memory_service="m" * 65))
            await it.until(lambda: "expected a memory_service" in it.detail_of("w2"))
            holder = worker_pb2.KvHolder(address="10.0.0.1:1", ticket=bytes(TICKET_BYTES_MAX + 1))
            load = worker_pb2.LoadReport(kv_holder=holder)
            heartbeat = relay_service_pb2.Heartbeat(sequence=1, load=load)
            it.sidecars[0].say(relay_service_pb2.RelayResponse(heartbeat=heartbeat))
            await it.until(lambda: "expected a kv_holder" in it.detail_of("w1"))

    run(scenario())
