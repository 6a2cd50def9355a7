"""Claims of `worker.scheduler`, on the simulated engine without time."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.engines import CANCELLED, LENGTH, Engine, starting
from unbroken.holdings import Kind
from unbroken.v1 import worker_pb2
from worker.engine import StepResult, admit
from worker.scheduler import Scheduler
from worker.simulated import CostModel, SimulatedModel, SimulatedRunner, simulated_runner


def small(**options: Any) -> Engine:
    """An engine with little of everything."""
    defaults: dict[str, Any] = {
        "context_length": 64,
        "batch_size_max": 4,
        "prefill_tokens_max": 8,
        "block_size": 4,
        "kv_blocks": 16,
    }
    return Engine(simulated_runner(**(defaults | options)))


def with_slots(**changes: Any) -> Engine:
    """An engine that has slots, and rounds differently in prefill and decode."""
    spec = replace(
        small().spec, **{"kv_slots": 6, "split_invariant": False, "prefill_alignment": 4, **changes}
    )
    return Engine(SimulatedRunner(spec, SimulatedModel(spec.model), CostModel()))


def chunks(engine: Engine) -> list[list[tuple[int, int, int, bool]]]:
    """Of each step: (slot, start, length, is output) of its prefill chunks."""
    return [
        [(c.sequence.slot, c.start, len(c.token_ids), c.is_output) for c in plan]
        for plan in engine.plans
    ]


# Batches.


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    engine = small()
    short = engine.start(starting([1, 2], max_tokens=20))
    engine.step()
    engine.start(starting(range(20), max_tokens=2))
    for _ in range(3):
        engine.step()
    assert chunks(engine)[1:] == [[(2, 0, 8, False)], [(2, 8, 8, False)], [(2, 16, 4, False)]]
    assert len(engine.attempts[short].token_ids) == 4, "a token in every step"


def test_prompts_share_one_steps_budget() -> None:
    engine = small()
    for _ in range(3):
        engine.start(starting(range(5), max_tokens=2, request_id=str(_)))
    engine.step()
    assert chunks(engine) == [[(1, 0, 5, False), (2, 0, 3, False)]]


def test_a_batch_takes_so_many_and_the_others_wait() -> None:
    engine = small()
    for index in range(6):
        engine.start(starting([index], max_tokens=3))
    engine.step()
    load = engine.scheduler.load().ranks[0]
    assert (load.requests_running, load.requests_waiting) == (4, 2)
    engine.run()
    assert all(len(a.token_ids) == 3 for a in engine.attempts.values())


def test_what_a_sequence_produces_does_not_depend_on_its_neighbours() -> None:
    alone = Engine().generate(starting(range(9), max_tokens=30)).token_ids
    engine = small()
    slots = [engine.start(starting(range(n), max_tokens=30)) for n in (3, 9, 14, 9)]
    engine.run()
    assert engine.attempts[slots[1]].token_ids == alone
    assert engine.attempts[slots[3]].token_ids == alone
    assert engine.scheduler.load().ranks[0].preemptions_total > 0, "there was not enough memory"


def test_past_output_is_a_chunk_of_its_own_after_the_prompt() -> None:
    engine = small()
    engine.start(starting(range(5), range(10), max_tokens=12))
    engine.run()
    assert chunks(engine)[:2] == [[(1, 0, 5, False), (1, 5, 3, True)], [(1, 8, 7, True)]]


def test_chunks_of_a_prompt_are_aligned_whatever_else_is_computed() -> None:
    engine = with_slots()
    engine.start(starting(range(3), max_tokens=2))
    engine.start(starting(range(11), max_tokens=2))
    engine.run()
    assert [c for plan in chunks(engine) for c in plan] == [
        (1, 0, 3, False),
        (2, 0, 4, False),
        (2, 4, 7, False),
    ]


def test_recomputing_past_output_is_bounded_for_each_step() -> None:
    engine = with_slots(replay_tokens_max=3)
    engine.start(starting(range(4), range(8), max_tokens=10))
    engine.run()
    assert [c for plan in chunks(engine) for c in plan if c[3]] == [
        (1, 4, 3, True),
        (1, 7, 3, True),
        (1, 10, 2, True),
    ]


# Prefixes.


def test_an_equal_prompt_is_not_computed_twice() -> None:
    engine = small()
    first = engine.generate(starting(range(10), max_tokens=3))
    second = engine.generate(starting(range(10), max_tokens=3))
    assert first.token_ids == second.token_ids
    assert first.ended is not None
    assert second.ended is not None
    assert (first.ended.cached_tokens, first.ended.prefill_tokens) == (0, 10)
    assert (second.ended.cached_tokens, second.ended.prefill_tokens) == (8, 2)


def test_the_last_token_of_an_output_has_no_kv_to_reuse() -> None:
    engine = small()
    first = engine.generate(starting(range(5), max_tokens=3))  # Two full blocks of tokens.
    ended = engine.generate(starting([*range(5), *first.token_ids, 1], max_tokens=1)).ended
    assert ended is not None
    assert ended.cached_tokens == 4


def test_tenants_do_not_share_prefixes() -> None:
    engine = small()
    engine.generate(starting(range(10), max_tokens=3, tenant="a"))
    ended = engine.generate(starting(range(10), max_tokens=3, tenant="b")).ended
    assert ended is not None
    assert ended.cached_tokens == 0


@pytest.mark.parametrize(("given_as", "cached"), [("prompt", 8), ("output", 16)])
def test_only_kv_of_the_same_phase_is_reused_where_rounding_depends_on_it(
    given_as: str, cached: int
) -> None:
    engine = with_slots()
    first = engine.generate(starting(range(10), max_tokens=8)).token_ids
    if given_as == "prompt":
        again = starting([*range(10), *first], max_tokens=2)
    else:
        again = starting(range(10), first, max_tokens=10)
    ended = engine.generate(again).ended
    assert ended is not None
    assert ended.cached_tokens == cached


# Room.


def test_the_youngest_loses_its_blocks_and_goes_on_exactly() -> None:
    expected = [Engine().generate(starting([n] * 10, max_tokens=40)).token_ids for n in range(3)]
    engine = small()
    for n in range(3):
        engine.start(starting([n] * 10, max_tokens=40))
    engine.run()
    assert [a.token_ids for a in engine.attempts.values()] == expected
    ends = [a.ended.slot for a in engine.attempts.values() if a.ended is not None]
    assert len(ends) == 3
    assert engine.scheduler.load().ranks[0].preemptions_total > 0


def test_usage_counts_what_was_given_once_whatever_was_preempted() -> None:
    engine = small()
    for n in range(3):
        engine.start(starting([n] * 10, max_tokens=40))
    engine.run()
    for attempt in engine.attempts.values():
        assert attempt.ended is not None
        assert attempt.ended.prefill_tokens + attempt.ended.cached_tokens == 10


def test_the_load_counts_what_was_prefilled_also_again_after_a_preemption() -> None:
    undisturbed = Engine()
    undisturbed.generate(starting(range(10), max_tokens=3))
    assert undisturbed.scheduler.load().prefill_tokens_total == 10
    engine = small()
    for n in range(3):
        engine.start(starting([n] * 10, max_tokens=40))
    engine.run()
    assert engine.scheduler.load().ranks[0].preemptions_total > 0
    assert engine.scheduler.load().prefill_tokens_total > 30


def test_prompt_tokens_lengthen_the_step_that_they_share_with_those_who_decode() -> None:
    cost = CostModel(step_base_s=0.04, step_per_sequence_s=0.0001, prefill_tokens_per_s=50_000)
    assert cost.step_s(100, 0) == pytest.approx(0.05)
    assert cost.step_s(100, 500) == pytest.approx(0.06)
    assert cost.step_s(100, 16_384) == pytest.approx(0.05 + 16_384 / 50_000)


def test_the_first_in_line_is_never_preempted() -> None:
    engine = small()
    first = engine.start(starting([1] * 10, max_tokens=50))
    for n in range(5):
        engine.start(starting([n] * 10, max_tokens=50))
    steps = 0
    while engine.attempts[first].ended is None:
        assert engine.step()
        steps += 1
    assert steps == 51, "two steps of prefill, the second of which gives the first token"


def test_more_waiting_than_allowed_are_refused() -> None:
    engine = small()
    scheduler = Scheduler(engine.spec, waiting_max=2)
    taken = [
        scheduler.submit(admit(starting(slot=n), engine.spec, engine.compiler, now=0))
        for n in range(1, 4)
    ]
    assert taken == [True, True, False]
    scheduler.check()


# Order.


def test_higher_priority_goes_first() -> None:
    engine = small(batch_size_max=1)
    low = engine.start(starting(max_tokens=2))
    high = engine.start(starting(max_tokens=2, priority=5))
    engine.step()
    assert len(engine.attempts[high].token_ids) == 1
    assert not engine.attempts[low].token_ids


def test_higher_priority_takes_the_place_of_lower_which_goes_on_exactly_later() -> None:
    expected = Engine().generate(starting(max_tokens=9)).token_ids
    engine = small(batch_size_max=1)
    low = engine.start(starting(max_tokens=9))
    for _ in range(4):
        engine.step()
    high = engine.start(starting([9], max_tokens=2, priority=5))
    engine.step()
    engine.step()
    assert engine.attempts[high].ended is not None
    assert engine.attempts[low].token_ids == expected[:4]
    engine.run()
    assert engine.attempts[low].token_ids == expected


def test_equal_priority_never_takes_a_place() -> None:
    engine = small(batch_size_max=1)
    first = engine.start(starting(max_tokens=9))
    engine.step()
    engine.start(starting(max_tokens=2))
    for _ in range(8):
        engine.step()
    assert engine.attempts[first].ended is not None
    assert engine.scheduler.load().ranks[0].preemptions_total == 0


def test_a_tenant_with_many_requests_does_not_hold_up_the_others() -> None:
    engine = small(batch_size_max=1)
    crowd = [engine.start(starting(max_tokens=1, tenant="crowd")) for _ in range(10)]
    lone = engine.start(starting(max_tokens=1, tenant="lone"))
    order: list[int] = []
    while engine.step():
        order += [s for s, a in engine.attempts.items() if a.ended is not None and s not in order]
    assert order.index(lone) <= 2
    assert [slot for slot in order if slot != lone] == crowd, "in order of arrival"


def test_prompts_in_the_batch_are_computed_in_turns_of_the_tenants_too() -> None:
    engine = small(batch_size_max=16, kv_blocks=64)
    crowd = [
        engine.start(starting([n] * 8, max_tokens=1, tenant="crowd", request_id=f"c{n}"))
        for n in range(10)
    ]
    engine.step()
    lone = engine.start(starting([99] * 8, max_tokens=1, tenant="lone"))
    order: list[int] = []
    while engine.step():
        order += [s for s, a in engine.attempts.items() if a.ended is not None and s not in order]
    assert order.index(lone) <= 2
    assert [slot for slot in order if slot != lone] == crowd, "in order of arrival"


def test_nobody_overtakes_who_needs_much_room() -> None:
    engine = small()
    engine.start(starting([1] * 30, max_tokens=20))
    large = engine.start(starting([2] * 40, max_tokens=2))
    small_ = engine.start(starting([3], max_tokens=2))
    while engine.attempts[small_].ended is None:
        assert engine.step()
    assert engine.attempts[large].token_ids


def test_streams_spread_over_the_ranks() -> None:
    engine = small(num_ranks=3)
    for index in range(9):
        engine.start(starting([index] * 9, max_tokens=3))
    engine.step()
    assert [r.requests_running for r in engine.scheduler.load().ranks] == [3, 3, 3]
    engine.run()
    assert all(len(a.token_ids) == 3 for a in engine.attempts.values())


def test_a_stream_goes_to_the_rank_that_has_its_prefix() -> None:
    engine = small(num_ranks=3)
    for index in range(3):
        engine.generate(starting([index] * 9, max_tokens=1))
    for index in range(3):
        ended = engine.generate(starting([index] * 9, max_tokens=1)).ended
        assert ended is not None
        assert ended.cached_tokens == 8


# Windows.


def test_a_stream_pauses_at_its_window_and_goes_on_when_it_moves() -> None:
    engine = small()
    slot = engine.start(starting(max_tokens=20, window_tokens=5, first_offset=100))
    engine.run()
    assert engine.attempts[slot].offsets == [100, 101, 102, 103, 104]
    engine.scheduler.acknowledge(slot, 102)
    engine.run()
    assert engine.attempts[slot].offsets[-1] == 106
    engine.scheduler.acknowledge(slot, 101)  # Never moves back.
    engine.scheduler.acknowledge(slot, 107)
    engine.run()
    assert engine.attempts[slot].offsets[-1] == 111


def test_an_acknowledgement_in_time_lets_a_stream_run_without_pause() -> None:
    engine = small()
    slot = engine.start(starting(max_tokens=20, window_tokens=2))
    for _ in range(20):
        engine.step()
        engine.scheduler.acknowledge(slot, len(engine.attempts[slot].token_ids))
    assert engine.attempts[slot].finish_reason == LENGTH


def test_paused_streams_hold_their_blocks_but_no_place_in_the_batch() -> None:
    engine = small(batch_size_max=1)
    paused = engine.start(starting(max_tokens=10, window_tokens=3))
    engine.run()
    engine.generate(starting([7], max_tokens=3))
    assert engine.scheduler.load().ranks[0].kv_blocks_used == 2
    engine.scheduler.acknowledge(paused, 3)
    engine.scheduler.acknowledge(paused, 9)
    engine.run()
    assert engine.attempts[paused].finish_reason == LENGTH
    assert engine.scheduler.load().ranks[0].preemptions_total == 0


def test_paused_streams_give_their_blocks_to_those_who_run_and_go_on_exactly() -> None:
    expected = Engine().generate(starting([1] * 30, max_tokens=20)).token_ids
    engine = small()
    paused = engine.start(starting([1] * 30, max_tokens=20, window_tokens=3))
    engine.run()
    assert engine.generate(starting([2] * 50, max_tokens=5)).finish_reason == LENGTH
    engine.scheduler.acknowledge(paused, 100)
    engine.run()
    assert engine.attempts[paused].token_ids == expected


# Ends.


def test_an_aborted_stream_frees_everything_at_once() -> None:
    engine = small()
    slot = engine.start(starting(range(10), max_tokens=20))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.abort(slot)
    assert not engine.scheduler.abort(slot)
    engine.collect()
    ended = engine.attempts[slot].ended
    assert ended is not None
    assert (ended.finish_reason, ended.end_offset) == (CANCELLED, 3)
    assert engine.scheduler.load().ranks[0].kv_blocks_used == 0
    assert not engine.step()


def test_a_token_computed_while_its_stream_was_aborted_is_dropped() -> None:
    engine = small()
    slot = engine.start(starting(max_tokens=20))
    other = engine.start(starting([5], max_tokens=20))
    engine.step()
    plan = engine.plan()
    assert plan is not None
    engine.scheduler.abort(slot)
    outcome = engine.commit(plan)
    assert outcome.slots == [other]
    assert [e.end_offset for e in outcome.ended] == [1]


def test_a_stream_stops_at_its_deadline() -> None:
    engine = small()
    message = starting(max_tokens=20)
    message.deadline.FromMilliseconds(1500)
    slot = engine.start(message)
    engine.step()
    engine.now = 1.49
    engine.step()
    engine.now = 1.5
    assert not engine.step()
    ended = engine.attempts[slot].ended
    assert ended is not None
    assert (ended.finish_reason, ended.end_offset) == (CANCELLED, 2)
    assert ended.is_expired


def test_nobody_is_computed_after_its_deadline_wherever_it_stands() -> None:
    engine = small()
    waiting = [starting([n], max_tokens=50, slot=0) for n in range(12)]
    for message in waiting:
        message.deadline.FromMilliseconds(1000)
        engine.start(message)
    engine.step()
    engine.now = 0.999
    plan = engine.plan()  # The step that runs when the time is up is the last one.
    assert plan is not None
    engine.now = 1.0
    engine.commit(plan)
    assert not engine.step()
    assert all(a.ended is not None and a.ended.is_expired for a in engine.attempts.values())
    assert engine.scheduler.held() == []


def test_what_sequences_hold_is_told_and_goes_with_them() -> None:
    engine = small()
    slots = [engine.start(starting([n] * 20, max_tokens=50)) for n in range(12)]
    assert {one.kind for one in engine.scheduler.held()} == {Kind.QUEUE_ENTRY}
    assert sum(one.amount for one in engine.scheduler.held()) == 12 * 20
    engine.step()
    held = engine.scheduler.held()
    assert {one.kind for one in held} == {Kind.QUEUE_ENTRY, Kind.ATTEMPT, Kind.KV_BLOCKS}
    blocks = sum(one.amount for one in held if one.kind is Kind.KV_BLOCKS)
    assert blocks == engine.scheduler.load().ranks[0].kv_blocks_used
    for slot in slots:
        engine.scheduler.abort(slot)
        assert not any(one.slot == slot for one in engine.scheduler.held())
    assert engine.scheduler.held() == []


def test_a_probe_is_nobodys_request_and_its_blocks_are_no_leak() -> None:
    engine = small()
    probe = starting([1] * 20, max_tokens=50)
    probe.is_probe = True
    engine.start(probe)
    engine.step()
    assert engine.scheduler.load().ranks[0].kv_blocks_used
    assert engine.scheduler.held() == []


def test_blocks_that_no_sequence_holds_are_told_as_a_leak() -> None:
    engine = small()
    slot = engine.start(starting([1] * 20, max_tokens=50))
    engine.step()
    rank = engine.scheduler._ranks[0]  # pyright: ignore[reportPrivateUsage]
    lost = rank.cache.acquire((), 10)
    assert lost is not None
    engine.scheduler.abort(slot)
    (leak,) = engine.scheduler.held()
    assert (leak.kind, leak.slot) == (Kind.KV_BLOCKS, None)
    assert leak.amount == lost.capacity // engine.spec.block_size
    rank.cache.release(lost)
    assert engine.scheduler.held() == []


def test_a_failure_of_one_row_ends_one_stream() -> None:
    engine = small()
    slots = [engine.start(starting([n], max_tokens=3)) for n in range(3)]
    plan = engine.plan()
    assert plan is not None
    result = StepResult()
    result.append(11)
    result.fail("no token is left")
    result.append(12)
    engine.scheduler.commit(plan, result)
    engine.scheduler.check()
    engine.collect()
    ended = engine.attempts[slots[1]].ended
    assert ended is not None
    assert (ended.failure, ended.detail) == (
        worker_pb2.FAILURE_KIND_ENGINE_ERROR,
        "no token is left",
    )
    assert engine.attempts[slots[0]].token_ids == [11]
    assert engine.attempts[slots[2]].token_ids == [12]


def test_a_context_that_is_full_ends_the_output() -> None:
    engine = small()
    attempt = engine.generate(starting(range(10)))
    assert (attempt.finish_reason, len(attempt.token_ids)) == (LENGTH, 54)
    attempt = engine.generate(starting(range(10), max_tokens=1000))
    assert (attempt.finish_reason, len(attempt.token_ids)) == (LENGTH, 54)


def test_dropping_everything_leaves_nothing() -> None:
    engine = small()
    for n in range(8):
        engine.start(starting([n] * 10, max_tokens=40))
    for _ in range(5):
        engine.step()
    plan = engine.plan()
    assert plan is not None
    engine.scheduler.drop_all()
    engine.scheduler.commit(plan, engine.runner.compute(plan))
    engine.scheduler.check()
    outcome = engine.scheduler.take_outcome()
    assert not outcome.slots
    assert not outcome.ended
    assert engine.scheduler.is_empty
    assert engine.scheduler.load().ranks[0].kv_blocks_used == 0


# Everything at once.


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["paged", "ranks", "slots"]))
def test_whatever_happens_no_block_is_lost_and_every_output_is_exact(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    engine = with_slots() if kind == "slots" else small(num_ranks=1 + (kind == "ranks"))
    reference = small(kv_blocks=64)
    prompts: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    for _ in range(rng.randrange(20, 120)):
        move = rng.random()
        if move < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
            max_tokens = rng.randrange(1, 60)
            slot = engine.start(
                starting(
                    prompt,
                    max_tokens=max_tokens,
                    window_tokens=rng.choice([0, 3, 10]),
                    priority=rng.randrange(2),
                    tenant=rng.choice(["", "t"]),
                )
            )
            prompts[slot] = prompt
            lengths[slot] = min(max_tokens, 64 - len(prompt))
        elif move < 0.35 and prompts:
            engine.scheduler.abort(rng.choice(list(prompts)))
        elif move < 0.5 and prompts:
            slot = rng.choice(list(prompts))
            engine.scheduler.acknowledge(slot, len(engine.attempts[slot].token_ids))
        else:
            engine.step()
        engine.scheduler.check()
    for _ in range(10_000):
        for slot, attempt in engine.attempts.items():
            engine.scheduler.acknowledge(slot, len(attempt.token_ids))
        if not engine.step() and engine.scheduler.is_empty:
            break
    assert engine.scheduler.is_empty, "everything ends"
    load = engine.scheduler.load()
    assert all(rank.kv_blocks_used == 0 for rank in load.ranks)
    for slot, attempt in engine.attempts.items():
        expected = reference.generate(starting(prompts[slot], max_tokens=lengths[slot]))
        num = len(attempt.token_ids)
        assert attempt.token_ids == expected.token_ids[:num]
        assert attempt.offsets == list(range(num))
        assert attempt.finish_reason == CANCELLED or num == lengths[slot]
