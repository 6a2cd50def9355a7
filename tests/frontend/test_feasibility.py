"""Claims of `frontend.feasibility`."""

from collections.abc import Callable

import pytest

from frontend.continuation import Abilities
from frontend.feasibility import first_token_s
from frontend.placement import RankState, WorkerView
from frontend.step_cost import StepCost
from frontend.stream import Life
from unbroken.v1 import worker_pb2

STEP_S, RATE = 0.01, 10_000.0


def measured() -> StepCost:
    """What four steps of an engine teach, two of which compute 1,000 prompt tokens each."""
    cost = StepCost()
    load = worker_pb2.LoadReport()
    cost.reported(load)
    for num_tokens in (0, 0, 1000, 1000):
        load.steps_us_total += int(1e6 * (STEP_S + num_tokens / RATE))
        load.engine_steps_total += 1
        load.prefill_tokens_total += num_tokens
        cost.reported(load)
    return cost


def view(name: str = "w", *ranks: RankState, cached: set[int] | None = None) -> WorkerView:
    it = WorkerView(Life(name, 1, 1), "m", Abilities("n"), block_size=100, context_length=100_000)
    it.reported(ranks)
    it.cached_blocks = cached or set()
    return it


def takes_s(
    *views: WorkerView, cost_of: Callable[[Life], StepCost | None] = lambda _: measured()
) -> float:
    return first_token_s(views, 1000, cost_of=cost_of, block_hashes=lambda _: [1, 2, 3])


def test_a_prompt_takes_its_prefill_and_a_step() -> None:
    assert takes_s(view()) == pytest.approx(1000 / RATE + STEP_S, rel=0.05)


def test_a_prompt_that_fills_several_steps_takes_all_of_them() -> None:
    it = view()
    it.prefill_tokens_max, it.num_ranks = 600, 2
    assert takes_s(it) == pytest.approx(1000 / RATE + 4 * STEP_S, rel=0.05)


def test_prompts_that_newcomers_may_pass_take_no_time() -> None:
    queued = RankState(prefill_tokens_queued=4000)
    assert takes_s(view("w", queued)) == takes_s(view())


def test_what_is_cached_there_takes_no_time() -> None:
    assert takes_s(view(cached={1, 2})) == pytest.approx(800 / RATE + STEP_S, rel=0.05)


def test_the_fastest_worker_counts() -> None:
    assert takes_s(view(), view("warm", cached={1, 2, 3})) == takes_s(view(cached={1, 2, 3}))


def test_what_is_not_known_takes_no_time() -> None:
    assert takes_s(view(), cost_of=lambda _: StepCost()) == 0.0
    assert takes_s(view(), cost_of=lambda _: None) == 0.0
    one_is_known = {"known": measured()}
    two = view("known"), view("new")
    assert takes_s(*two, cost_of=lambda life: one_is_known.get(life.worker_id)) == 0.0
    assert takes_s() == 0.0
