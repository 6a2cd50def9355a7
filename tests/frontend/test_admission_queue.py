"""Who waits while all workers are busy, in which order, and who is sent away until when."""

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.admission_queue import (
    PROMISE_GRACE_S,
    PROMISE_S_MAX,
    RETRY_AFTER_S_MIN,
    RETRY_SPREAD,
    RETRY_SPREAD_EARLY,
    TENANTS_MAX,
    AdmissionQueue,
    Arrival,
    Limit,
    QueueLimits,
    Refusal,
)

RATE = 1000.0
MODEL = "m"


class Line:
    """A queue before one model, whose workers get rid of so many tokens in a second."""

    def __init__(self, rate: float = RATE, **limits: float) -> None:
        self.limits = QueueLimits(**({"wait_s_max": 10.0} | limits))  # type: ignore[arg-type]
        self.queue = AdmissionQueue[str](self.limits, Random(1))
        self.now = 100.0
        self.rate = rate
        self.displaced: dict[str, Refusal] = {}

    def arrival(
        self,
        name: str,
        num_tokens: int = 100,
        *,
        tenant: str = "t",
        priority: int = 0,
        patience_s: float = 60.0,
        is_named: bool = True,
    ) -> Arrival:
        request_id = name if is_named else ""
        return Arrival(MODEL, tenant, request_id, priority, num_tokens, self.now + patience_s)

    def offer(self, name: str, num_tokens: int = 100, **more: object) -> Refusal | None:
        arrival = self.arrival(name, num_tokens, **more)  # type: ignore[arg-type]
        refusal, displaced = self.queue.offer(name, arrival, self.now, rate_hint=self.rate)
        self.displaced |= dict(displaced)
        self.queue.check_all()
        return refusal

    def next(self) -> str | None:
        """Whoever is called, and goes to a worker."""
        name = self.queue.next(MODEL, self.now)
        if name is not None:
            self.queue.settled(name, self.now)
        self.queue.check_all()
        return name

    def order(self) -> list[str]:
        """Of all that wait."""
        names: list[str] = []
        while (name := self.next()) is not None:
            names.append(name)
        return names


# Order.


def test_the_highest_priority_goes_first() -> None:
    line = Line()
    for name, priority in (("low", -1), ("normal", 0), ("high", 5)):
        line.offer(name, priority=priority)
    assert line.order() == ["high", "normal", "low"]


def test_within_a_tenant_the_earliest_deadline_goes_first_and_then_who_came_first() -> None:
    line = Line()
    for name, patience_s in (("a", 60.0), ("b", 20.0), ("c", 60.0), ("d", 30.0)):
        line.offer(name, patience_s=patience_s)
    assert line.order() == ["b", "d", "a", "c"]


def test_tenants_take_turns_by_tokens_whatever_their_deadlines() -> None:
    line = Line()
    for index in range(4):
        line.offer(f"many{index}", 100, tenant="many", patience_s=20.0)
    line.offer("long0", 200, tenant="long")
    line.offer("long1", 200, tenant="long")
    order = line.order()
    assert order[0] == "many0"
    assert order.index("long1") > order.index("many2"), "for 200 tokens of one, 200 of the other"
    assert set(order[:3]) == {"many0", "long0", "many1"}


def test_a_tenant_that_comes_late_is_not_behind_all_of_another() -> None:
    line = Line(requests_max=100)
    for index in range(50):
        line.offer(f"many{index}", tenant="many")
    for _ in range(10):
        line.next()
    line.offer("one", tenant="one")
    assert "one" in (line.next(), line.next())


def test_who_cannot_have_a_turn_keeps_it_and_keeps_nobody_of_his_priority() -> None:
    line = Line()
    for name, tenant, priority in (
        ("flood0", "flood", 0),
        ("flood1", "flood", 0),
        ("one", "one", 0),
        ("less", "less", -1),
    ):
        line.offer(name, tenant=tenant, priority=priority)

    def is_able(_: str, tenant: str) -> bool:
        return tenant != "flood"

    queue = line.queue
    assert queue.first(MODEL) == ("flood0", "flood")
    assert queue.first(MODEL, is_able) == ("one", "one")
    assert queue.next(MODEL, line.now, is_able) == "one"
    queue.settled("one", line.now)
    assert queue.next(MODEL, line.now, is_able) is None, "the flood goes before lower priorities"
    assert line.order() == ["flood0", "flood1", "less"]


def test_a_turn_out_of_order_that_came_to_nothing_changes_nobodys_turn() -> None:
    def standing() -> Line:
        line = Line(requests_max=1000, tokens_max=10_000_000, wait_s_max=10_000.0)
        line.queue.let_in(line.arrival("before", 100_000, tenant="big"), line.now)
        for index in range(150):
            line.offer(f"small{index}", 1000, tenant="small", patience_s=10_000.0)
        for index in range(2):
            line.offer(f"big{index}", 100_000, tenant="big", patience_s=10_000.0)
        return line

    line = standing()
    expected = line.order()
    assert expected.index("big0") >= 100, "it had so much before"
    line = standing()
    for _ in range(3):
        name = line.queue.next(MODEL, line.now, lambda _, tenant: tenant == "big")
        assert name is not None
        line.queue.settled(name, line.now)
        again = line.arrival(name, 100_000, tenant="big", patience_s=10_000.0)
        line.queue.come_back(name, again, line.now, since=line.now)
    order = line.order()
    assert [name.startswith("big") for name in order] == [
        name.startswith("big") for name in expected
    ]


def test_who_was_idle_has_laid_up_no_credit() -> None:
    line = Line(requests_max=100)
    line.offer("early", tenant="idle")
    line.next()
    for index in range(20):
        line.offer(f"busy{index}", tenant="busy")
        line.next()
    for index in range(4):
        line.offer(f"idle{index}", tenant="idle")
        line.offer(f"busy{20 + index}", tenant="busy")
    first = Counter(name.rstrip("0123456789") for name in line.order()[:4])
    assert first == {"idle": 2, "busy": 2}


def test_who_is_let_in_without_waiting_pays_for_it_too() -> None:
    line = Line()
    line.queue.let_in(line.arrival("x", 1000, tenant="greedy"), line.now)
    for index in range(2):
        line.offer(f"greedy{index}", tenant="greedy")
        line.offer(f"other{index}", tenant="other")
    assert line.order()[:2] == ["other0", "other1"]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 500)), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_while_two_tenants_wait_neither_is_ahead_by_more_than_two_requests(
    requests: list[tuple[str, int]],
) -> None:
    line = Line(requests_max=1000, wait_s_max=1e6)
    for index, (tenant, num_tokens) in enumerate(requests):
        line.offer(f"{tenant}{index}", num_tokens, tenant=tenant, patience_s=1e7)
    left = Counter(tenant for tenant, _ in requests)
    served = Counter[str]()
    sizes = {f"{tenant}{index}": n for index, (tenant, n) in enumerate(requests)}
    while left["a"] and left["b"]:
        name = line.next()
        assert name is not None
        left[name[0]] -= 1
        served[name[0]] += sizes[name]
        assert abs(served["a"] - served["b"]) <= 1000


# Bounds.


def test_nobody_waits_where_nobody_may() -> None:
    line = Line(requests_max=0)
    assert not line.queue.is_on
    refusal = line.offer("a")
    assert refusal is not None
    assert refusal.limit is Limit.REQUESTS


def test_the_line_is_bounded_by_requests_and_by_tokens() -> None:
    line = Line(requests_max=3, tokens_max=1000)
    assert [line.offer(name) for name in "abc"] == [None] * 3
    refusal = line.offer("d")
    assert refusal is not None
    assert refusal.limit is Limit.REQUESTS
    line = Line(requests_max=100, tokens_max=1000)
    assert line.offer("huge", 5000) is None, "one is let in line whatever it has"
    line.next()
    assert line.offer("a", 900) is None
    refusal = line.offer("b", 101)
    assert refusal is not None
    assert refusal.limit is Limit.TOKENS
    assert line.offer("c", 100) is None


def test_who_would_wait_for_longer_than_he_may_is_sent_away_at_once() -> None:
    line = Line(wait_s_max=2.0)
    for index in range(21):
        assert line.offer(f"a{index}") is None
    refusal = line.offer("late")
    assert refusal is not None
    assert refusal.limit is Limit.WAIT
    hurried = Line(wait_s_max=10.0)
    hurried.offer("a", 3000)
    refusal = hurried.offer("b", patience_s=2.9)
    assert refusal is not None
    assert refusal.limit is Limit.WAIT
    assert hurried.offer("c", patience_s=3.1) is None


def test_a_tenant_with_nothing_in_line_does_not_wait_for_all_of_another() -> None:
    line = Line(requests_max=1000, wait_s_max=2.0)
    for index in range(21):
        line.offer(f"many{index}", tenant="many")
    assert line.offer("more", tenant="many") is not None
    assert line.offer("one", tenant="one") is None
    assert (
        line.queue.detail("one") == "all workers are busy: at most 100 prompt tokens go before it"
    )


def test_in_a_full_line_who_has_most_in_it_gives_way() -> None:
    line = Line(requests_max=4)
    for index in range(4):
        line.offer(f"many{index}", tenant="many", patience_s=20.0 + index)
    assert line.offer("one", tenant="one") is None
    assert list(line.displaced) == ["many3"], "the last of them"
    assert line.displaced["many3"].limit is Limit.REQUESTS
    assert line.offer("many9", tenant="many") is not None, "who has most does not displace others"
    assert set(line.order()) == {"one", "many0", "many1", "many2"}


def test_a_full_line_of_less_urgent_ones_makes_room() -> None:
    line = Line(requests_max=2)
    line.offer("low", priority=-1)
    line.offer("normal")
    assert line.offer("high", priority=1) is None
    assert list(line.displaced) == ["low"]
    assert line.offer("lower", priority=-2) is not None
    assert line.order() == ["high", "normal"]


def test_nobody_gives_way_to_one_that_has_no_place_even_so() -> None:
    line = Line(tokens_max=1000)
    line.offer("high", 500, priority=2)
    for index in range(4):
        line.offer(f"low{index}", 100, patience_s=10.0 + index)
    refusal = line.offer("large", 900, priority=1)
    assert refusal is not None
    assert refusal.limit is Limit.TOKENS
    assert line.displaced == {}
    assert line.order() == ["high", "low0", "low1", "low2", "low3"]


def test_those_who_left_lie_nowhere_while_others_always_go_before_them() -> None:
    line = Line(wait_s_max=1.0)
    for _ in range(100):
        for index in range(10):
            assert line.offer(f"low{index}", 1, priority=-1) is None
            line.queue.remove(f"low{index}")
        line.offer("high", 1)
        assert line.next() == "high"
    (tenant,) = line.queue._lines[MODEL].tenants.values()  # pyright: ignore[reportPrivateUsage]
    assert all(len(heap) < 100 for heap in tenant.lines.values())


def test_nobody_waits_for_longer_than_he_may() -> None:
    line = Line(wait_s_max=2.0)
    line.offer("a")
    line.now += 1.0
    line.offer("b")
    assert line.queue.deadline() == 102.0
    assert line.queue.expired(line.now, lambda _: RATE) == []
    line.now += 1.0
    ((name, model, refusal),) = line.queue.expired(line.now, lambda _: RATE)
    assert (name, model, refusal.limit) == ("a", MODEL, Limit.EXPIRED)
    assert line.order() == ["b"]
    assert line.queue.deadline() is None


def test_who_is_removed_is_forgotten() -> None:
    line = Line()
    for name in "abc":
        line.offer(name)
    line.queue.remove("b")
    line.queue.remove("b")
    called = line.queue.next(MODEL, line.now)
    assert called == "a"
    line.queue.remove("a")
    assert not line.queue.is_waiting("a")
    line.queue.check_all()
    assert line.order() == ["c"]
    assert (line.queue.num_waiting, line.queue.tokens_waiting) == (0, 0)


# Those whom no worker takes.


def test_whom_no_worker_can_take_lets_others_go_before_him_until_something_changes() -> None:
    line = Line()
    for name in "abc":
        line.offer(name)
    assert line.queue.next(MODEL, line.now) == "a"
    line.queue.passed_over("a", line.now)
    line.queue.check_all()
    assert line.queue.is_waiting("a")
    assert line.order() == ["b", "c"]
    assert not line.queue.has_line(MODEL), "nobody has to stand behind him"
    line.queue.changed()
    assert line.order() == ["a"]


def test_who_was_let_in_and_refused_by_a_worker_has_his_place_again() -> None:
    line = Line(requests_max=3)
    first = line.arrival("first", patience_s=10.0)
    line.queue.let_in(first, line.now)
    for name in "abc":
        line.offer(name, patience_s=20.0)
    line.now += 1.0
    line.queue.come_back("first", first, line.now, since=line.now - 1.0)
    line.queue.check_all()
    assert line.queue.num_waiting == 4, "he is not sent away for want of room"
    assert line.order() == ["first", "a", "b", "c"]


def test_who_lost_his_worker_goes_first_of_his_kind_and_is_sent_away_for_nothing() -> None:
    line = Line(requests_max=2, wait_s_max=1.0)
    lost = line.arrival("lost", patience_s=60.0)
    line.queue.let_in(lost, line.now)
    for name in "ab":
        line.offer(name, patience_s=20.0)
    line.queue.come_back("lost", lost, line.now, since=line.now, is_first=True)
    line.queue.check_all()
    line.offer("urgent", priority=1)
    assert set(line.displaced) == {"a", "b"}, "he gives way to nobody, and has what he had"
    line.now += 2.0
    gone = {key for key, _, _ in line.queue.expired(line.now, lambda _: line.rate)}
    assert gone == {"urgent"}
    line.queue.check_all()
    line.offer("c", patience_s=5.0)
    line.offer("more urgent", priority=1)
    assert line.next() == "more urgent"
    assert line.queue.next(MODEL, line.now) == "lost"
    line.queue.passed_over("lost", line.now)
    line.queue.changed()
    assert line.order() == ["lost"]


# When to come back.


def fill(line: Line, number: int = 100, **more: object) -> list[Refusal]:
    """Let many come at once; returns those who were sent away."""
    found = [line.offer(f"r{index}", **more) for index in range(number)]  # type: ignore[arg-type]
    return [refusal for refusal in found if refusal is not None]


def test_those_who_are_sent_away_are_told_one_after_the_other() -> None:
    line = Line(wait_s_max=2.0)
    refusals = fill(line)
    assert len(refusals) == 79
    told = [refusal.retry_after_s for refusal in refusals]
    turns = [2.1 + 0.1 * index for index in range(79)]
    lead_s = 1.0  # Half of what may wait.
    for wait_s, turn_s in zip(told, turns, strict=True):
        middle = turn_s - lead_s
        least = middle * (1 - RETRY_SPREAD * RETRY_SPREAD_EARLY)
        assert max(RETRY_AFTER_S_MIN, least) - 1e-9 <= wait_s
        assert wait_s <= max(RETRY_AFTER_S_MIN, least + RETRY_SPREAD * middle) + 1e-9


def test_who_comes_back_when_he_was_told_is_not_sent_away_and_newcomers_wait_for_him() -> None:
    line = Line(wait_s_max=2.0)
    refusals = fill(line)
    line.now += refusals[0].retry_after_s
    for _ in range(int(refusals[0].retry_after_s * RATE / 100)):
        line.next()
    assert line.offer("new") is not None
    assert line.offer("r21") is None, "the first of those who were sent away"
    assert line.queue.num_promised == 79


def test_who_comes_back_early_is_told_what_is_left() -> None:
    line = Line(wait_s_max=2.0)
    refusals = fill(line)
    told_s = refusals[-1].retry_after_s
    line.now += 0.1
    refusal = line.offer("r99")
    assert refusal is not None
    assert refusal.limit is Limit.EARLY
    assert abs(refusal.retry_after_s - (told_s - 0.1)) < 1e-6
    assert line.queue.num_promised == 79, "there is no second promise"


def test_a_promise_to_who_does_not_come_ends() -> None:
    line = Line(wait_s_max=2.0)
    refusals = fill(line, is_named=False)
    line.next()
    line.now += max(refusal.retry_after_s for refusal in refusals) + 0.001
    line.offer("x")
    assert line.queue.num_promised == 0, "who cannot be known again is gone when his time comes"
    line = Line(wait_s_max=2.0)
    refusals = fill(line)
    line.next()
    line.next()
    latest = max(refusal.retry_after_s for refusal in refusals)
    line.now += latest + PROMISE_GRACE_S - 0.001
    line.offer("x")
    assert line.queue.num_promised >= 1
    line.now += 0.002
    line.offer("y")
    assert line.queue.num_promised == 0


def test_promises_to_made_up_tenants_end_where_they_would_cost_others() -> None:
    line = Line(rate=1e6, requests_max=1)
    line.offer("a")
    for index in range(TENANTS_MAX + 100):
        assert line.offer(f"r{index}", tenant=f"made up {index}") is not None
    assert line.queue.num_promised < TENANTS_MAX
    known = line.queue.num_promised
    assert line.offer("again", tenant="t") is not None
    assert line.queue.num_promised == known + 1


def test_what_is_kept_of_promises_made_anew_is_as_much_as_there_are() -> None:
    line = Line(rate=1e6, requests_max=1)
    line.offer("a")
    for _ in range(15):
        told = [line.offer(f"b{index}") for index in range(100)]
        line.now += max(one.retry_after_s for one in told if one is not None)  # In vain.
    assert line.queue.num_promised == 100
    ends = line.queue._lines[MODEL]._promises_end  # pyright: ignore[reportPrivateUsage]
    assert len(ends) < 300


def test_nothing_is_promised_for_a_time_that_is_too_far() -> None:
    line = Line(rate=1.0, wait_s_max=2.0)
    line.offer("a", 1000)
    refusal = line.offer("b")
    assert refusal is not None
    least_s = PROMISE_S_MAX * (1 - RETRY_SPREAD * RETRY_SPREAD_EARLY)
    assert least_s <= refusal.retry_after_s <= PROMISE_S_MAX * (1 + RETRY_SPREAD)
    assert line.queue.num_promised == 0


def test_the_time_is_computed_from_what_has_left_the_line() -> None:
    line = Line(rate=100 * RATE, requests_max=11, wait_s_max=100.0)
    fill(line, 11)
    for index in range(100):
        line.now += 0.1
        line.next()
        line.offer(f"s{index}")
    refusal = line.offer("x")
    assert refusal is not None
    assert 0.9 * 0.55 <= refusal.retry_after_s <= 1.1 * 0.55 * (1 + RETRY_SPREAD)


def simulate(seed: int, overload: float, pulse_s: float) -> tuple[int, int, int, float]:
    """Open loop, and clients that do as they are told: requests, refusals, those refused at least
    once, and the share of its rate at which the server worked until all were served.
    """
    random = Random(seed)
    line = Line(wait_s_max=1.0, requests_max=1000)
    mean, step_s = 100, 0.05
    begun = line.now
    coming = [
        (begun + random.random() * pulse_s, f"q{index}")
        for index in range(int(overload * RATE / mean * pulse_s))
    ]
    number, refusals, refused, served, credit = len(coming), 0, set[str](), 0, 0.0
    patience = {name: 1e6 for _, name in coming}
    while served < number:
        line.now += step_s
        due = sorted(one for one in coming if one[0] <= line.now)
        coming = [one for one in coming if one[0] > line.now]
        for name, _, refusal in line.queue.expired(line.now, lambda _: RATE):
            due_at = line.now + refusal.retry_after_s
            coming.append((due_at, name))
            refusals += 1
            refused.add(name)
        for _, name in due:
            refusal = line.offer(name, mean, patience_s=patience[name])
            if refusal is not None:
                refusals += 1
                refused.add(name)
                coming.append((line.now + refusal.retry_after_s, name))
        credit = min(credit + RATE * step_s, RATE * 0.2)
        while credit >= mean and line.next() is not None:
            credit -= mean
            served += 1
        assert line.now - begun < 50 * overload * pulse_s, "everybody is served some time"
    return number, refusals, len(refused), number * mean / (line.now - begun) / RATE


def test_clients_that_do_as_they_are_told_are_all_served_and_come_back_about_once() -> None:
    for overload in (2.0, 5.0, 10.0):
        number, refusals, refused, share = simulate(3, overload, 5.0)
        assert refused > number * (1 - 1 / overload) * 0.7, "it was an overload"
        assert refusals <= 1.2 * refused
        assert share >= 0.9
