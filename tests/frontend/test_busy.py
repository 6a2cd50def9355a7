"""Which workers are busy, and what refused clients are told."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend import busy
from frontend.busy import Shedder, judge
from frontend.placement import Need, WorkerView, choose
from frontend.stream import Life
from tests.support.streams import NATIVE, W1, W2
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.thresholds import (
    OFF,
    PREFILL_SHARE_MAX,
    PREFILL_TOKENS_MAX,
    RankState,
    Threshold,
    Thresholds,
    shared_out,
)
from unbroken.v1 import worker_pb2

EACH = Thresholds(kv_blocks_share=0.5, prefill_tokens=100, prefill_share=0.5)
NOTHING = RankState(kv_blocks_total=100)


def worker(*ranks: RankState, life: Life = W1, batch: int = 512, **settings: object) -> WorkerView:
    """A worker that has reported this."""
    view = WorkerView(
        life,
        "m",
        NATIVE,
        block_size=16,
        context_length=100_000,
        num_ranks=max(1, len(ranks)),
        prefill_tokens_max=batch,
    )
    view.reported(ranks)
    for name, value in settings.items():
        setattr(view, name, value)
    return view


def exceeded(view: WorkerView, thresholds: Thresholds) -> list[set[str]]:
    """The names of what each rank exceeds."""
    return [{one.threshold.value for one in rank} for rank in judge(view, thresholds).ranks]


class Refusals:
    """A shedder, its workers, and a clock."""

    def __init__(self, thresholds: Thresholds, *views: WorkerView) -> None:
        self.shedder = Shedder(thresholds, Random(1))
        self.views = list(views)
        self.now = 100.0
        self.computed = 0

    def report(
        self, view: WorkerView, *, used: int = 0, queued: int = 0, computed: int = 0
    ) -> None:
        """A worker of one rank tells its load."""
        self.computed += computed
        rank = worker_pb2.RankLoad(
            kv_blocks_total=100, kv_blocks_used=used, prefill_tokens_queued=queued
        )
        load = worker_pb2.LoadReport(ranks=[rank], prefill_tokens_total=self.computed)
        self.shedder.reported(view.life, load, self.now)
        view.reported([RankState(100, used, queued)])

    def refusal(self) -> UnbrokenError | None:
        """What new work gets now."""
        return self.shedder.refusal("m", self.views, self.now)

    def wait_s(self) -> float:
        """When it is told to come back."""
        error = self.refusal()
        assert error is not None
        assert error.retry_after_s is not None
        return error.retry_after_s


# Thresholds.


@pytest.mark.parametrize(
    ("name", "most", "more"),
    [
        ("kv_blocks_share", RankState(100, kv_blocks_used=50), RankState(100, kv_blocks_used=51)),
        (
            "prefill_tokens",
            RankState(100, prefill_tokens_queued=100),
            RankState(100, prefill_tokens_queued=101),
        ),
        (
            "prefill_share",
            RankState(100, prefill_tokens_queued=256),
            RankState(100, prefill_tokens_queued=257),
        ),
    ],
)
def test_a_rank_is_over_a_threshold_when_it_has_more(
    name: str, most: RankState, more: RankState
) -> None:
    thresholds = Thresholds(**{name: getattr(EACH, name)})
    assert exceeded(worker(most), thresholds) == [set()]
    assert exceeded(worker(more), thresholds) == [{name}]


def test_any_threshold_that_is_exceeded_makes_a_rank_busy() -> None:
    view = worker(RankState(100, 60, 300))
    assert exceeded(view, EACH) == [{"kv_blocks_share", "prefill_tokens", "prefill_share"}]
    assert judge(view, EACH).is_busy


def test_a_worker_is_busy_when_all_its_ranks_are() -> None:
    full = RankState(100, 60)
    assert not judge(worker(full, NOTHING), EACH).is_busy
    assert judge(worker(full, full), EACH).is_busy


def test_ranks_share_the_batch_of_their_engine() -> None:
    half = RankState(100, prefill_tokens_queued=129)
    assert exceeded(worker(half, half, batch=512), Thresholds(prefill_share=0.5)) == [
        {"prefill_share"},
        {"prefill_share"},
    ]
    assert exceeded(worker(half, batch=512), Thresholds(prefill_share=0.5)) == [set()]


def test_what_an_engine_does_not_tell_exceeds_nothing() -> None:
    assert exceeded(worker(RankState(0, 60)), Thresholds(kv_blocks_share=0.0)) == [set()]
    queued = RankState(100, prefill_tokens_queued=9)
    assert exceeded(worker(queued, batch=0), Thresholds(prefill_share=0.0)) == [set()]
    assert not judge(worker(), EACH).is_busy, "nothing was reported yet"


def test_streams_that_wait_count_the_blocks_that_they_will_fill() -> None:
    thresholds = Thresholds(kv_blocks_share=0.5)
    assert not judge(worker(RankState(100, 45, 160, requests_waiting=0)), thresholds).is_busy
    assert judge(worker(RankState(100, 45, 160, requests_waiting=1)), thresholds).is_busy


def test_what_was_placed_since_the_last_report_counts() -> None:
    view = worker(NOTHING)
    view.placed(100, 0)
    assert not judge(view, EACH).is_busy
    view.placed(1, 0)
    assert exceeded(view, EACH) == [{"prefill_tokens"}]
    view.reported([NOTHING])
    assert not judge(view, EACH).is_busy


def test_what_was_placed_goes_to_the_ranks_that_have_least() -> None:
    view = worker(RankState(100, prefill_tokens_queued=500), NOTHING, prefill_tokens_placed=100)
    assert exceeded(view, Thresholds(prefill_tokens=100)) == [{"prefill_tokens"}, set()]
    view.prefill_tokens_placed = 101
    assert judge(view, Thresholds(prefill_tokens=100)).is_busy


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 200))
def test_nothing_is_lost_and_nobody_is_raised_above_another(held: list[int], more: int) -> None:
    after = shared_out(held, more)
    assert sum(after) == pytest.approx(sum(held) + more)
    raised = [new for new, old in zip(after, held, strict=True) if new > old]
    assert all(new >= old for new, old in zip(after, held, strict=True))
    assert not raised or max(raised) <= min(after) + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        Thresholds(kv_blocks_share=1.01),
        Thresholds(kv_blocks_share=float("nan")),
        Thresholds(prefill_tokens=-1),
        Thresholds(prefill_share=PREFILL_SHARE_MAX * 2),
    ],
)
def test_a_threshold_outside_its_range_is_named(wrong: Thresholds) -> None:
    with pytest.raises(InvalidField) as caught:
        wrong.check()
    (name,) = [name for name in Threshold if getattr(wrong, name.value) is not None]
    assert caught.value.metadata["field"] == f"thresholds.{name.value}"


def test_the_range_of_each_threshold_includes_its_ends() -> None:
    Thresholds(0.0, 0, 0.0).check()
    Thresholds(1.0, PREFILL_TOKENS_MAX, PREFILL_SHARE_MAX).check()
    OFF.check()


# Placement.


def test_a_busy_worker_is_chosen_only_if_all_are() -> None:
    shedder = Shedder(Thresholds(prefill_tokens=100), Random(1))
    near = worker(RankState(100, 0, 101), life=W1, cached_blocks={1, 2, 3, 4, 5, 6, 7, 8})
    far = worker(RankState(100, 90, 100), life=W2)
    need = Need("m", 128)

    def chosen(*views: WorkerView) -> Life:
        hashes: Sequence[int] = [1, 2, 3, 4, 5, 6, 7, 8]
        view = choose(
            views,
            need,
            is_able=lambda _: True,
            block_hashes=lambda _: hashes,
            is_busy=shedder.is_busy,
        )
        assert view is not None
        return view.life

    assert chosen(near, far) == W2
    assert chosen(near) == W1


# Refusals.


def test_nothing_is_refused_without_thresholds() -> None:
    assert Refusals(OFF, worker(RankState(100, 100, 10**9))).refusal() is None


def test_new_work_is_refused_when_every_worker_is_busy() -> None:
    full = RankState(100, 60)
    assert Refusals(EACH, worker(full), worker(NOTHING, life=W2)).refusal() is None
    error = Refusals(EACH, worker(full), worker(full, life=W2)).refusal()
    assert error is not None
    assert error.reason is Reason.OVERLOADED
    assert error.metadata["thresholds"] == "kv_blocks_share"
    assert error.metadata["model"] == "m"
    assert "0.6, above 0.5" in error.metadata["kv_blocks_share"]


def test_without_workers_nothing_is_refused() -> None:
    assert Refusals(EACH).refusal() is None, "it waits for one"


def test_workers_that_may_be_dead_or_fail_are_no_way_out() -> None:
    full, free = worker(RankState(100, 60)), worker(NOTHING, life=W2)
    refusals = Refusals(EACH, full, free)
    for doubt in ("is_suspect", "is_ejected"):
        setattr(free, doubt, True)
        assert refusals.refusal() is not None
        setattr(full, doubt, True)
        assert refusals.refusal() is None, "all are alike again"
        setattr(free, doubt, False)
        setattr(full, doubt, False)


def test_models_have_thresholds_of_their_own() -> None:
    refusals = Refusals(OFF, worker(RankState(100, 60)))
    assert refusals.refusal() is None
    refusals.shedder.changed({"m": EACH})
    assert refusals.refusal() is not None
    refusals.shedder.changed({"other": EACH})
    assert refusals.refusal() is None


def test_a_burst_passes_the_threshold_by_one_request() -> None:
    view = worker(NOTHING)
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    while refusals.refusal() is None:
        view.placed(300, 0)
    assert view.prefill_tokens_placed == 1200


# When to come back.


def test_the_delay_is_what_the_excess_takes_at_the_measured_rate() -> None:
    view = worker()
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    for _ in range(20):
        refusals.report(view, queued=5000, computed=100)
        refusals.now += 0.1
    wait_s = refusals.wait_s()
    assert 4.0 <= wait_s <= 4.0 * (1 + busy.RETRY_SPREAD) * 1.1, "4000 tokens at 1000 a second"


def test_blocks_go_as_fast_as_they_were_seen_to() -> None:
    view = worker()
    refusals = Refusals(Thresholds(kv_blocks_share=0.5), view)
    for used in (90, 88, 92, 90, 92, 90):
        refusals.report(view, used=used)
        refusals.now += 0.5
    # 2 + 2 + 2 in the 2.5 s between the first and the last report, older ones counting less.
    wait_s = refusals.wait_s()
    assert 40 / 2.9 <= wait_s <= 40 / 2.0 * (1 + busy.RETRY_SPREAD)


def test_where_nothing_was_measured_it_is_a_second() -> None:
    wait_s = Refusals(EACH, worker(RankState(100, 60))).wait_s()
    unknown_s = busy.RETRY_AFTER_S_UNKNOWN
    assert unknown_s <= wait_s <= unknown_s * (1 + busy.RETRY_SPREAD)


def test_a_crowd_is_spread_also_before_anything_was_measured() -> None:
    view = worker(RankState(100, 0, 2000))
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    refusals.shedder.placed("m", 2000)
    waits = [refusals.wait_s() for _ in range(50)]
    # At 20,000 tokens a second: 0.05 s for the excess, 0.1 s for each request.
    assert 5.0 <= waits[-1] <= 5.1 * (1 + busy.RETRY_SPREAD)


def test_the_worker_that_is_free_first_counts() -> None:
    slow, fast = worker(life=W1), worker(life=W2)
    refusals = Refusals(Thresholds(prefill_tokens=1000), slow, fast)
    for _ in range(20):
        for view, queued in ((slow, 9000), (fast, 1500)):
            refusals.report(view, queued=queued, computed=100)
        refusals.now += 0.1
    assert refusals.wait_s() < 1.0
    error = refusals.refusal()
    assert error is not None
    assert error.metadata["prefill_tokens"].endswith("is 1500, above 1000")


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    view = worker()
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    refusals.shedder.placed("m", 500)
    for _ in range(20):
        refusals.report(view, queued=2000, computed=100)
        refusals.now += 0.1
    waits = [refusals.wait_s() for _ in range(10)]
    # 1 s for the excess, and half a second for each request of 500 tokens, of those before too.
    for place, wait_s in enumerate(waits, start=1):
        least_s = 1.0 + 0.5 * place
        assert least_s * 0.9 <= wait_s <= least_s * (1 + busy.RETRY_SPREAD) * 1.1


def test_time_serves_those_who_stand_in_line() -> None:
    view = worker()
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    refusals.shedder.placed("m", 500)
    for _ in range(20):
        refusals.report(view, queued=2000, computed=100)
        refusals.now += 0.1
    for _ in range(10):
        refusals.refusal()
    refusals.now += 60.0
    assert refusals.wait_s() <= 1.5 * (1 + busy.RETRY_SPREAD) * 1.1


def test_nobody_is_sent_away_for_long_or_for_nothing() -> None:
    view = worker()
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    for queued, computed in ((10**9, 1), (10**9, 1), (1001, 10**9)):
        refusals.report(view, queued=queued, computed=computed)
        refusals.now += 1.0
        wait_s = refusals.wait_s()
        longest_s = busy.RETRY_AFTER_S_MAX * (1 + busy.RETRY_SPREAD)
        assert busy.RETRY_AFTER_S_MIN <= wait_s <= longest_s
        refusals.now += 60.0


def test_workers_that_are_gone_are_forgotten() -> None:
    view = worker()
    refusals = Refusals(Thresholds(prefill_tokens=1000), view)
    for _ in range(20):
        refusals.report(view, queued=5000, computed=100)
        refusals.now += 0.1
    refusals.shedder.workers([])
    refusals.shedder.workers([view])
    wait_s = refusals.wait_s()
    assert wait_s <= busy.RETRY_AFTER_S_UNKNOWN * (1 + busy.RETRY_SPREAD)
