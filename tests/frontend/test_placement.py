"""Which worker takes an attempt."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from frontend.placement import (
    REPEATS_BELIEVED,
    Need,
    WorkerView,
    choose,
    cost,
    num_cached_tokens,
)
from frontend.stream import Life
from tests.support.streams import NATIVE, W1, W2, W3
from unbroken.thresholds import RankState


def worker(life: Life = W1, **settings: object) -> WorkerView:
    """An idle worker."""
    view = WorkerView(life, "m", NATIVE, block_size=16, context_length=1000)
    for name, value in settings.items():
        setattr(view, name, value)
    return view


def chosen(
    *workers: WorkerView,
    num_tokens: int = 64,
    avoid: frozenset[Life] = frozenset(),
    able: Sequence[Life] | None = None,
    block_hashes: Sequence[int] = (),
) -> Life | None:
    """The life that takes an attempt."""
    view = choose(
        workers,
        Need("m", num_tokens, avoid),
        is_able=lambda view: able is None or view.life in able,
        block_hashes=lambda _: block_hashes,
    )
    return None if view is None else view.life


def test_without_workers_there_is_no_choice() -> None:
    assert chosen() is None


def test_the_worker_with_the_fewest_blocks_in_use_is_chosen() -> None:
    assert chosen(worker(W1, kv_blocks_used=5), worker(W2, kv_blocks_used=4)) == W2


def test_queued_prefill_weighs_as_the_blocks_that_it_fills() -> None:
    busy = worker(W1, prefill_tokens_queued=32)
    assert chosen(busy, worker(W2, kv_blocks_used=1)) == W2
    assert chosen(busy, worker(W2, kv_blocks_used=3)) == W1


def test_a_cached_prefix_is_worth_the_prefill_that_it_saves() -> None:
    hashes = [11, 12, 13, 14]
    knowing = worker(W2, cached_blocks={11, 12, 13}, kv_blocks_used=2)
    assert chosen(worker(W1), knowing, block_hashes=hashes) == W2
    knowing.kv_blocks_used = 4
    assert chosen(worker(W1), knowing, block_hashes=hashes) == W1


def test_who_shares_the_memory_service_that_has_the_blocks_is_worth_the_prefill() -> None:
    need = Need("m", 64, stored={"here": 48})
    sharing = worker(W2, memory_service="here", kv_blocks_used=2)
    assert [cost(one, need, ()) for one in (worker(W1), sharing)] == [4.0, 3.0]
    assert cost(worker(W3, memory_service="there"), need, ()) == 4.0
    sharing.cached_blocks = {11, 12, 13, 14}
    assert cost(sharing, need, [11, 12, 13, 14]) == 2.0, "what it has itself counts as well"


def test_a_prefix_ends_at_the_first_block_that_is_not_cached() -> None:
    assert num_cached_tokens({1, 3}, [1, 2, 3], 16) == 16
    assert num_cached_tokens({2, 3}, [1, 2, 3], 16) == 0


def test_a_worker_that_failed_the_stream_is_a_last_resort() -> None:
    idle, busy = worker(W1), worker(W2, kv_blocks_used=900)
    assert chosen(idle, busy, avoid=frozenset({W1})) == W2
    assert chosen(idle, avoid=frozenset({W1})) == W1
    busy.is_ready = False
    assert chosen(idle, busy, avoid=frozenset({W1})) == W1


def test_a_worker_that_came_back_is_somebody_else() -> None:
    again = Life("w1", 2)
    assert chosen(worker(again), worker(W2, kv_blocks_used=1), avoid=frozenset({W1})) == again


def test_who_is_not_ready_or_able_or_serves_another_model_is_left_out() -> None:
    assert chosen(worker(W1, is_ready=False), worker(W2, kv_blocks_used=9)) == W2
    assert chosen(worker(W1, model="other"), worker(W2, kv_blocks_used=9)) == W2
    assert chosen(worker(W1), worker(W2, kv_blocks_used=9), able=[W2]) == W2
    assert chosen(worker(W1), able=[]) is None


def test_the_tokens_must_fit_the_context_with_room_for_one_more() -> None:
    assert chosen(worker(W1, context_length=65)) == W1
    assert chosen(worker(W1, context_length=64)) is None


def test_placements_since_the_last_report_count_until_the_next() -> None:
    first, second = worker(W1), worker(W2)
    first.placed(64, 16)
    assert (first.num_attempts, first.prefill_tokens_placed, first.blocks_placed) == (1, 48, 4)
    assert chosen(first, second) == W2
    first.reported([RankState()])
    assert chosen(first, second) == W1
    assert first.num_attempts == 1


def test_a_report_that_is_repeated_shows_nothing_of_what_was_placed_since() -> None:
    view = worker(W1)
    view.reported([RankState()])
    for _ in range(REPEATS_BELIEVED):
        view.repeated()
    view.placed(64, 16)
    for _ in range(REPEATS_BELIEVED - 1):
        view.repeated()
        assert (view.prefill_tokens_placed, view.blocks_placed) == (48, 4)
    view.repeated()
    assert (view.prefill_tokens_placed, view.blocks_placed) == (0, 0), "it came to nothing"


def test_prefill_that_was_placed_weighs_beside_its_blocks() -> None:
    first = worker(W1)
    first.placed(64, 0)
    assert cost(first, Need("m", 16), ()) == 1 + 4 + 4
    cached = worker(W2)
    cached.placed(64, 64)
    assert cost(cached, Need("m", 16), ()) == 1 + 0 + 4


def test_a_crowd_that_comes_between_two_reports_is_spread() -> None:
    workers = [worker(life) for life in (W1, W2, W3)]
    for _ in range(30):
        view = choose(workers, Need("m", 50), is_able=lambda _: True, block_hashes=lambda _: ())
        assert view is not None
        view.placed(50, 0)
    assert [view.num_attempts for view in workers] == [10, 10, 10]


@given(st.permutations([3, 1, 2]), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_the_choice_depends_on_no_order(order: Sequence[int], used: Sequence[int]) -> None:
    workers = {
        number: worker(Life(f"w{number}", 1), kv_blocks_used=used[number - 1])
        for number in (1, 2, 3)
    }
    expected = chosen(*(workers[number] for number in (1, 2, 3)))
    assert chosen(*(workers[number] for number in order)) == expected
    cheapest = min(cost(view, Need("m", 64), ()) for view in workers.values())
    assert any(
        view.life == expected and cost(view, Need("m", 64), ()) == cheapest
        for view in workers.values()
    )
