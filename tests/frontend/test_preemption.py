"""Who is paused for whom, how many, how often, and when they go on."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from frontend.busy import Busy, has_room_for, judge, judge_known
from frontend.placement import WorkerView
from frontend.preemption import (
    LOOK_INTERVAL_S,
    NEARLY_DONE_TOKENS,
    PAUSED_AT_ONCE_MAX,
    SETTLE_S,
    Candidate,
    Looks,
    Preemption,
    PreemptionLimits,
    Shortage,
    shortage,
)
from frontend.stream import Life
from tests.support.streams import NATIVE, W1, W2
from unbroken.thresholds import RankState, Thresholds

LIMITS = PreemptionLimits(is_on=True, run_s_min=2.0, pauses_max=3, wait_s_max=30.0)
THRESHOLDS = Thresholds(kv_blocks_share=0.5, prefill_tokens=1000)
TOTAL = 1000
"""KV blocks of a worker, of which half may be held."""
MODEL = "m"
K = TypeVar("K", bound=Hashable)


def worker(life: Life = W1, *, used: int = 0, queued: int = 0) -> WorkerView:
    """As it reports itself."""
    view = WorkerView(life, MODEL, NATIVE, 16, 100_000)
    view.reported([RankState(TOTAL, used, queued)])
    return view


def busy(*views: WorkerView) -> list[Busy]:
    """They are."""
    found = [(view, judge(view, THRESHOLDS)) for view in views]
    assert all(verdict.is_busy for _, verdict in found)
    return found


def runs(
    key: str,
    blocks: int = 100,
    *,
    priority: int = 0,
    life: Life = W1,
    uncomputed: int = 0,
    left: int = 1000,
    again: int = 0,
) -> Candidate[str]:
    """A stream with so many KV blocks."""
    return Candidate(key, life, priority, 16 * blocks, blocks, uncomputed, left, again)


def whom(
    it: Preemption[str],
    views: Sequence[WorkerView],
    *candidates: Candidate[str],
    priority: int = 1,
    now: float = 0.0,
) -> list[str]:
    chosen = it.whom(MODEL, priority, busy(*views), candidates, now)
    return sorted(one.key for one in chosen)


def paused(it: Preemption[str], candidate: Candidate[str], now: float) -> None:
    """It was told to stop, and has."""
    it.halting(candidate, MODEL)
    it.stopped(candidate.key, now)
    it.check()


def next_of(
    it: Preemption[K], now: float, *, first: int | None = None, room: Sequence[K] = ()
) -> K | None:
    return it.next(lambda _: first, lambda key: key in room, now)


# Whom.


def test_the_lowest_priority_goes_first_whatever_it_costs() -> None:
    it = Preemption[str](LIMITS)
    low, high = runs("low", 400, priority=-1, again=500), runs("high", 60, priority=0)
    assert whom(it, [worker(used=550)], high, low) == ["low"]


def test_only_a_strictly_lower_priority_is_paused() -> None:
    it = Preemption[str](LIMITS)
    peers = [runs("same", 300, priority=1), runs("above", 300, priority=2)]
    assert whom(it, [worker(used=550)], *peers) == []


def test_who_has_least_to_compute_again_for_what_he_frees_is_paused() -> None:
    it = Preemption[str](LIMITS)
    exact, regenerated = runs("native", 80), runs("regenerated", 80, again=100)
    assert whom(it, [worker(used=550)], regenerated, exact) == ["native"]
    # Of two that suffice, the one that loses less.
    assert whom(it, [worker(used=550)], runs("large", 300), runs("small", 60)) == ["small"]


def test_no_more_are_paused_than_needed() -> None:
    it = Preemption[str](LIMITS)
    streams = [runs(f"s{index}", 30) for index in range(20)]
    assert len(whom(it, [worker(used=600)], *streams)) == 4
    # The small ones come first by price, and are spared when the large one does it alone.
    assert whom(it, [worker(used=560)], runs("a", 10), runs("b", 60)) == ["b"]


def test_nobody_is_paused_in_vain() -> None:
    it = Preemption[str](LIMITS)
    assert whom(it, [worker(used=600)], runs("a", 50), runs("b", 49)) == []
    many = [runs(f"s{index}", 1) for index in range(PAUSED_AT_ONCE_MAX + 1)]
    assert whom(it, [worker(used=500 + len(many))], *many) == []


class Looked(int):
    """A number that counts how often it is taken from another."""

    times = 0

    @override
    def __rsub__(self, other: int) -> int:
        Looked.times += 1
        return other - int(self)


def test_each_of_many_is_looked_at_a_few_times_and_not_once_for_each_other() -> None:
    it = Preemption[str](LIMITS)
    streams = [
        Candidate(f"s{index}", W1, 0, 16, Looked(1), Looked(0), 1000) for index in range(400)
    ]
    Looked.times = 0
    assert whom(it, [worker(used=500 + 399)], *streams) == [], "these are too many"
    assert 400 <= Looked.times <= 8 * 400


def test_the_worker_is_chosen_where_it_costs_least() -> None:
    it = Preemption[str](LIMITS)
    views = [worker(W1, used=700), worker(W2, used=520)]
    there, here = runs("w2", 30, life=W2), runs("w1", 210, life=W1)
    assert whom(it, views, here, there) == ["w2"]
    assert whom(it, views, runs("w1", 210, priority=-1), there) == ["w1"], "priority comes first"


def test_prompts_are_freed_only_by_who_has_not_computed_his() -> None:
    it = Preemption[str](LIMITS)
    view = worker(used=10, queued=1200)
    decodes, waits = runs("decodes", 100), runs("waits", 100, uncomputed=300)
    assert whom(it, [view], decodes, waits) == ["waits"]
    assert whom(it, [view], decodes) == []


def test_who_is_nearly_done_is_left_alone() -> None:
    it = Preemption[str](LIMITS)
    view = worker(used=510)
    assert whom(it, [view], runs("r", left=NEARLY_DONE_TOKENS)) == []
    assert whom(it, [view], runs("r", left=NEARLY_DONE_TOKENS + 1)) == ["r"]


def test_nobody_is_paused_where_a_worker_only_seems_to_be_busy() -> None:
    it = Preemption[str](LIMITS)
    view = worker(used=490)
    view.placed(16 * 8, 0)
    view.crowding = 4.0
    assert judge(view, THRESHOLDS).is_busy
    known = [(view, judge_known(view, THRESHOLDS)), *busy(worker(W2, used=550))]
    assert not it.whom(MODEL, 1, known, [runs("r", life=W2)], 0.0)
    view.placed(16 * 8, 0)
    known = [(view, judge_known(view, THRESHOLDS)), *busy(worker(W2, used=550))]
    assert it.whom(MODEL, 1, known, [runs("r", life=W2)], 0.0)


def test_nobody_is_paused_unless_it_is_switched_on() -> None:
    it = Preemption[str](PreemptionLimits())
    assert whom(it, [worker(used=510)], runs("r")) == []


def test_who_waits_in_vain_for_one_model_hides_nobody_who_waits_for_another() -> None:
    looks = Looks()
    assert looks.due("a") <= 0.0
    looks.looked("a", 1.0)
    assert looks.due("a") == 1.0 + LOOK_INTERVAL_S
    assert looks.due("b") <= 0.0


# What is free.


def test_until_a_report_can_show_what_was_freed_nobody_else_is_paused() -> None:
    it = Preemption[str](LIMITS)
    view = worker(used=550)
    it.reported(W1, 7, 0.0)
    it.halting(runs("a"), MODEL)
    assert whom(it, [view], runs("b")) == [], "its worker has not said so yet"
    it.stopped("a", 0.1)
    it.reported(W1, 7, 0.11)
    assert whom(it, [view], runs("b"), now=0.11) == [], "the report is of before"
    it.reported(W1, 8, 0.12)
    assert whom(it, [view], runs("b"), now=0.12) == ["b"]


def test_a_worker_that_counts_no_steps_is_believed_after_a_while() -> None:
    it = Preemption[str](LIMITS)
    paused(it, runs("a"), 0.1)
    view = worker(used=550)
    assert whom(it, [view], runs("b"), now=0.2) == []
    assert it.deadline() == 0.1 + SETTLE_S
    assert whom(it, [view], runs("b"), now=0.1 + SETTLE_S) == ["b"]


def test_who_is_lost_instead_of_paused_frees_nothing() -> None:
    it = Preemption[str](LIMITS)
    it.halting(runs("a"), MODEL)
    it.left("a", 1.0)
    assert not it.num_paused
    assert it.is_idle
    view = worker(used=550)
    assert whom(it, [view], runs("a"), now=1.0) == [], "he was disturbed as by a pause"
    assert whom(it, [view], runs("a"), now=1.0 + LIMITS.run_s_min) == ["a"]


def test_a_worker_that_never_stops_anybody_is_not_asked_for_ever() -> None:
    it, view = Preemption[str](LIMITS), worker(used=550)
    for number in range(LIMITS.pauses_max):
        assert whom(it, [view], runs("a"), now=10.0 * number) == ["a"]
        it.halting(runs("a"), MODEL)
        it.left("a", 10.0 * number + 3.0)
        it.check()
    assert whom(it, [view], runs("a"), now=1000.0) == []


# How often, and for how long.


def test_between_two_pauses_a_stream_runs_for_a_while_and_there_are_not_many() -> None:
    it = Preemption[str](LIMITS)
    stream, view, now = runs("r"), worker(used=550), 0.0
    for _ in range(LIMITS.pauses_max):
        assert whom(it, [view], stream, now=now) == ["r"]
        paused(it, stream, now)
        assert next_of(it, now + 1, room=["r"]) == "r"
        assert it.went_on("r", now + 1) == 1.0
        it.placed("r", now + 2)
        assert whom(it, [view], stream, now=now + 3.9) == []
        now += 2 + LIMITS.run_s_min
    assert whom(it, [view], stream, now=now + 1000) == []
    it.forget("r")
    it.check()
    assert it.is_idle or it.deadline() is not None


def test_who_is_paused_goes_on_when_there_is_room_and_nobody_above_him_waits() -> None:
    it = Preemption[str](LIMITS)
    paused(it, runs("r", priority=0), 0.0)
    assert next_of(it, 1.0, first=1, room=["r"]) is None
    assert next_of(it, 1.0, first=0, room=[]) is None
    assert next_of(it, 1.0, first=0, room=["r"]) == "r"


def test_new_work_of_no_higher_priority_waits_for_him() -> None:
    it = Preemption[str](LIMITS)
    paused(it, runs("a", priority=-1), 0.0)
    paused(it, runs("r", priority=0), 0.0)
    assert it.highest_paused(MODEL) == 0
    assert it.highest_paused("another") is None
    it.went_on("r", 1.0)
    assert it.highest_paused(MODEL) == -1


def test_the_higher_priority_goes_on_first_then_who_waits_longest_one_at_a_time() -> None:
    it = Preemption[str](LIMITS)
    for when, (key, priority) in enumerate([("a", 0), ("b", 0), ("c", 1)]):
        paused(it, runs(key, priority=priority), float(when))
    everybody = ["a", "b", "c"]
    assert next_of(it, 3.0, room=everybody) == "c"
    it.went_on("c", 3.0)
    assert next_of(it, 3.0, room=everybody) is None, "nobody knows what the first one takes"
    it.placed("c", 3.1)
    assert next_of(it, 3.2, room=["b"]) is None, "a small one does not pass a large one"
    assert next_of(it, 3.2, room=everybody) == "a"


def test_who_has_waited_enough_goes_on_whatever_there_is() -> None:
    it = Preemption[str](LIMITS)
    paused(it, runs("r"), 5.0)
    it.reported(W1, 1, 6.0)
    assert it.deadline() == 35.0
    assert next_of(it, 34.9, first=9) is None
    assert next_of(it, 35.0, first=9) == "r"


# Room.


@pytest.mark.parametrize(
    ("used", "queued", "num_tokens", "has_room"),
    [
        (0, 0, 800, True),
        (460, 0, 16 * 40, True),
        (460, 0, 16 * 41, False),
        (0, 900, 101, False),
        (0, 1000, 5000, True),  # It is more than a worker may have, and must go on some time.
        (0, 1001, 5000, False),
        (501, 0, 16, False),
    ],
)
def test_room_is_for_all_that_a_stream_holds(
    used: int, queued: int, num_tokens: int, has_room: bool
) -> None:
    view = worker(used=used, queued=queued)
    assert has_room_for(view, THRESHOLDS, num_tokens) is has_room


def test_without_thresholds_there_is_always_room() -> None:
    assert has_room_for(worker(used=999, queued=10**6), Thresholds(), 10**6)


# Whatever happens.


_streams = st.lists(
    st.builds(
        Candidate,
        key=st.integers(),
        life=st.sampled_from([W1, W2]),
        priority=st.integers(-2, 3),
        num_tokens=st.integers(1, 5000),
        kv_blocks=st.integers(0, 300),
        prefill_tokens=st.integers(0, 1),
        num_left_max=st.integers(0, 100),
        num_regenerated=st.integers(0, 50),
    ),
    unique_by=lambda one: one.key,
    max_size=30,
)


def is_covered(needed: Shortage, candidates: Sequence[Candidate[int]]) -> bool:
    return needed.kv_blocks <= sum(one.kv_blocks for one in candidates) and (
        needed.prefill_tokens <= sum(one.prefill_tokens for one in candidates)
    )


@settings(deadline=None)
@given(_streams, st.integers(-1, 3), st.integers(501, 1000), st.integers(501, 1000))
def test_those_paused_suffice_are_all_needed_and_all_below(
    candidates: list[Candidate[int]], priority: int, used: int, used_too: int
) -> None:
    it = Preemption[int](LIMITS)
    views = {W1: worker(W1, used=used), W2: worker(W2, used=used_too)}
    chosen = it.whom(MODEL, priority, busy(*views.values()), candidates, 0.0)
    if not chosen:
        return
    (life,) = {one.life for one in chosen}
    needed = shortage(judge(views[life], THRESHOLDS).nearest)
    assert all(one.priority < priority for one in chosen)
    assert all(one.num_left_max > NEARLY_DONE_TOKENS for one in chosen)
    assert is_covered(needed, chosen)
    for one in chosen:
        assert not is_covered(needed, [other for other in chosen if other is not one])


_events = st.tuples(
    st.sampled_from([0.0, 0.3, 2.5, 20.0]),  # Seconds that pass,
    st.integers(0, 2),  # priority of who comes,
    st.booleans(),  # whether workers stop what they are told to,
    st.sampled_from([None, 0, 1, 2]),  # priority of who waits,
    st.booleans(),  # whether there is room.
)


@settings(deadline=None)
@given(st.lists(_events, max_size=40))
def test_nobody_is_paused_too_often_or_for_too_long(
    events: list[tuple[float, int, bool, int | None, bool]],
) -> None:
    it, now = Preemption[int](LIMITS), 0.0
    since: dict[int, float] = {}
    num_pauses = Counter[int]()
    runs_here = set(range(4))
    for elapsed_s, priority, stops, first, has_room in events:
        now += elapsed_s
        it.reported(W1, int(now * 100), now)
        candidates = [Candidate(key, W1, key % 2, 800, 50, 0, 100) for key in sorted(runs_here)]
        for one in it.whom(MODEL, priority, busy(worker(used=540)), candidates, now):
            it.halting(one, MODEL)
            if stops:
                it.stopped(one.key, now)
                runs_here.discard(one.key)
                since[one.key] = now
                num_pauses[one.key] += 1
            else:
                it.left(one.key, now)
        room = range(4) if has_room else ()
        while (key := next_of(it, now, first=first, room=room)) is not None:
            it.went_on(key, now)
            it.placed(key, now)
            runs_here.add(key)
            del since[key]
        it.check()
        assert all(now - began < LIMITS.wait_s_max for began in since.values())
        assert it.num_paused == len(since)
    assert all(number <= LIMITS.pauses_max for number in num_pauses.values())
