"""Claims of engines that keep their KV blocks in a memory service, on a shelf instead of one."""

import random
from dataclasses import replace

import pytest

from tests.worker.engines import LENGTH, Engine, starting
from tests.worker.stores import Shelf, ShelfStore
from worker.simulated import CostModel, SimulatedModel, SimulatedRunner, simulated_runner

PROMPT = tuple(range(100, 130))


def engine(
    shelf: Shelf, *, batch_size_max: int = 4, kv_blocks: int = 32, restore_tokens_max: int = 4096
) -> Engine:
    spec = replace(
        simulated_runner(
            context_length=128,
            batch_size_max=batch_size_max,
            prefill_tokens_max=8,
            block_size=4,
            kv_blocks=kv_blocks,
        ).spec,
        kv_restore=True,
        restore_tokens_max=restore_tokens_max,
    )
    return Engine(
        SimulatedRunner(
            spec,
            SimulatedModel(spec.model),
            CostModel(),
            store=ShelfStore(shelf, spec),
        )
    )


def undisturbed(max_tokens: int = 30) -> list[int]:
    return Engine().generate(starting(PROMPT, max_tokens=max_tokens)).token_ids


def test_what_one_engine_computed_another_restores_and_goes_on_exactly() -> None:
    shelf, truth = Shelf(), undisturbed()
    first = engine(shelf)
    slot = first.start(starting(PROMPT, max_tokens=30))
    while len(first.attempts[slot].token_ids) < 13:
        first.step()
    # The first one is dead from here on: nothing else of it is stored.
    second = engine(shelf)
    attempt = second.generate(starting(PROMPT, truth[:13], max_tokens=30))
    assert attempt.token_ids == truth[13:]
    assert attempt.ended is not None
    assert attempt.ended.restored_tokens == 40, "all whole blocks of 43 tokens"
    assert attempt.ended.prefill_tokens == 3
    assert attempt.ended.cached_tokens == 0


def test_a_block_of_other_tokens_would_give_other_tokens() -> None:
    shelf, truth = Shelf(), undisturbed()
    engine(shelf).generate(starting(PROMPT, max_tokens=30))
    for key in shelf.blocks:
        shelf.blocks[key] = bytes(len(shelf.blocks[key]))
    attempt = engine(shelf).generate(starting(PROMPT, truth[:13], max_tokens=30))
    assert attempt.token_ids != truth[13:], "so the others prove that blocks were right"


def test_what_is_missing_is_computed() -> None:
    shelf, truth = Shelf(), undisturbed()
    engine(shelf).generate(starting(PROMPT, max_tokens=30))
    keys = list(shelf.blocks)
    del shelf.blocks[keys[3]]
    second = engine(shelf)
    attempt = second.generate(starting(PROMPT, truth[:13], max_tokens=30))
    assert attempt.token_ids == truth[13:]
    assert attempt.ended is not None
    assert attempt.ended.restored_tokens == 12, "the longest prefix"
    assert keys[3] in shelf.blocks, "and is stored again"


def test_each_block_is_stored_once_and_those_that_end_an_output_too() -> None:
    shelf = Shelf()
    first = engine(shelf)
    first.generate(starting(PROMPT, max_tokens=15))
    assert len(shelf.blocks) == 44 // 4, "of 45 tokens the last one was never computed"
    assert first.plan() is None, "then there is nothing to do"


def test_tenants_do_not_restore_each_others_blocks() -> None:
    shelf = Shelf()
    engine(shelf).generate(starting(PROMPT, max_tokens=4, tenant="acme"))
    attempt = engine(shelf).generate(starting(PROMPT, max_tokens=4, tenant="other"))
    assert attempt.ended is not None
    assert attempt.ended.restored_tokens == 0


def test_a_probe_neither_stores_nor_restores() -> None:
    shelf = Shelf()
    start = starting(PROMPT, max_tokens=4)
    start.is_probe = True
    engine(shelf).generate(start)
    assert not shelf.blocks
    engine(shelf).generate(starting(PROMPT, max_tokens=4))
    probe = starting(PROMPT, max_tokens=4)
    probe.is_probe = True
    attempt = engine(shelf).generate(probe)
    assert attempt.ended is not None
    assert attempt.ended.restored_tokens == 0


def test_others_decode_on_while_one_is_restored() -> None:
    shelf, truth = Shelf(), undisturbed()
    engine(shelf).generate(starting(PROMPT, max_tokens=30))
    second = engine(shelf)
    other = second.start(starting([1, 2], max_tokens=60))
    for _ in range(3):
        second.step()
    num_before = len(second.attempts[other].token_ids)
    slot = second.start(starting(PROMPT, truth[:13], max_tokens=30))
    second.step()
    assert len(second.attempts[other].token_ids) == num_before + 1
    second.step()
    assert second.attempts[slot].token_ids == truth[13:14], "a step to restore, one to compute"
    second.run()


def test_a_step_asks_only_for_so_much_and_for_the_first_in_line() -> None:
    shelf, truth = Shelf(), undisturbed()
    engine(shelf).generate(starting(PROMPT, max_tokens=30))
    second = engine(shelf, kv_blocks=64, restore_tokens_max=60)
    slots = [
        second.start(starting(PROMPT, truth[:cut], max_tokens=30, request_id=f"r{cut}"))
        for cut in (13, 11, 3, 1)
    ]
    asked: list[list[int]] = []
    while (plan := second.plan()) is not None:
        asked.append([restore.sequence.slot for restore in plan.restores])
        waiting = {chunk.sequence.slot for chunk in plan.prefills}
        assert waiting.isdisjoint(slots[sum(map(len, asked)) :]), "they have not been asked for"
        second.commit(plan)
    assert [one for one in asked if one] == [[1], [2], [3, 4]]
    for slot, cut in zip(slots, (13, 11, 3, 1), strict=True):
        assert second.attempts[slot].token_ids == truth[cut:]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_stored_preempted_or_aborted_all_outputs_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    shelf = Shelf()
    prompts = [PROMPT, PROMPT[:9], tuple(range(40)), (*PROMPT[:16], 7, 8, 9)]
    truths = [Engine().generate(starting(p, max_tokens=24)).token_ids for p in prompts]
    for _ in range(3):
        one = engine(shelf, batch_size_max=3, kv_blocks=32)
        running: dict[int, tuple[int, int]] = {}
        for _ in range(8):
            number, cut = rng.randrange(len(prompts)), rng.randrange(24)
            given = truths[number][:cut]
            slot = one.start(
                starting(
                    prompts[number],
                    given,
                    max_tokens=24,
                    priority=rng.randrange(3),
                    request_id=f"r{len(running)}",
                )
            )
            running[slot] = (number, cut)
            for _ in range(rng.randrange(6)):
                one.step()
            if rng.random() < 0.2:
                one.scheduler.abort(slot)
            for key in rng.sample(list(shelf.blocks), min(len(shelf.blocks), rng.randrange(3))):
                del shelf.blocks[key]
        one.run()
        for slot, (number, cut) in running.items():
            attempt = one.attempts[slot]
            expected = truths[number][cut:]
            if attempt.ended is not None and attempt.finish_reason == LENGTH:
                assert attempt.token_ids == expected
            else:
                assert attempt.token_ids == expected[: len(attempt.token_ids)]
