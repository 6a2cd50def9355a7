"""When streams that lost their worker may go to others."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.placement import WorkerView
from frontend.resume_queue import (
    FLEET_WINDOW_S,
    TURN_S,
    ResumeLimits,
    ResumeQueue,
    Ticket,
    Turn,
    Work,
)
from frontend.stream import Life
from tests.support.streams import NATIVE, W1, W2, W3
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import worker_pb2

RATE = 10_000.0
BURST = 1000
W4 = Life("w4", 1, 1)


class Frontend:
    """A queue, its workers, and placement that takes the first worker with room."""

    def __init__(self, *lives: Life, **limits: object) -> None:
        settings: dict[str, object] = {
            "burst_tokens": BURST,
            "prefill_tokens_per_s": RATE,
            "share": 0.5,
        }
        self.limits = ResumeLimits(**(settings | limits))  # type: ignore[arg-type]
        self.queue = ResumeQueue[str](
            self.limits, Random(1), lambda key, view: view.life not in self.unable.get(key, ())
        )
        self.now = 100.0
        self.views = {life: WorkerView(life, "m", NATIVE, 16, 100_000) for life in lives}
        self.placed: list[tuple[str, Life]] = []
        self.able: dict[str, set[Life]] = {}
        """Of streams that not every worker takes, as turns out with their turns."""
        self.unable: dict[str, set[Life]] = {}
        """The same, known before."""
        self.is_busy = True
        self.show()
        for life in lives:
            self.report(life)

    def show(self) -> None:
        self.queue.workers(self.views.values(), self.now)

    def lose(self, *lives: Life) -> None:
        for life in lives:
            self.views[life].is_ready = False
        self.show()

    def bring_back(self, *lives: Life) -> None:
        for life in lives:
            self.views[life].is_ready = True
        self.show()

    def report(
        self,
        life: Life,
        *,
        prefilled: int = 0,
        queued: int = 0,
        steps: int = 0,
        seconds: float = 0.0,
    ) -> None:
        rank = worker_pb2.RankLoad(requests_running=int(self.is_busy), prefill_tokens_queued=queued)
        load = worker_pb2.LoadReport(
            engine_steps_total=steps,
            prefill_tokens_total=prefilled,
            steps_us_total=int(seconds * 1e6),
            ranks=[rank],
        )
        self.queue.reported(life, load, self.now)

    def offer(
        self,
        key: str,
        num_tokens: int,
        work: Work = Work.RESUME,
        *,
        priority: int = 0,
        give_up_s: float = 30.0,
        avoid: frozenset[Life] = frozenset(),
        cached: dict[Life, int] | None = None,
        is_let_in: bool = False,
    ) -> UnbrokenError | None:
        ticket = Ticket(
            "m",
            work,
            priority,
            num_tokens,
            self.now + give_up_s,
            avoid=avoid,
            cached=cached or {},
            is_let_in=is_let_in,
        )
        return self.queue.offer(key, ticket, self.now)

    def turn(self) -> Turn[str] | None:
        return self.queue.next(self.now)

    def pump(self) -> list[tuple[str, Life]]:
        """Give turns until nobody has one; who was placed, and where."""
        placed: list[tuple[str, Life]] = []
        while (turn := self.turn()) is not None:
            able = self.able.get(turn.key, set(turn.lives))
            lives = sorted(turn.lives & able)
            if not lives:
                self.queue.passed_over(turn.key, turn.lives)
                continue
            life = min(lives, key=self.queue.outstanding_at)
            self.queue.admitted(turn.key, life, self.now)
            placed.append((turn.key, life))
        self.queue.check()
        self.placed += placed
        return placed

    def placed_now(self) -> list[str]:
        return [key for key, _ in self.pump()]

    def compute_all(self) -> None:
        for key, _ in self.placed:
            self.queue.computed(key)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def wait_until_due(self) -> None:
        """Until somebody has a turn."""
        if self.turn() is not None:
            return
        due = self.queue.deadline()
        assert due is not None
        assert due > self.now, "else it would have had its turn"
        self.now = due


# Small deaths.


def test_few_streams_pass_without_delay() -> None:
    frontend = Frontend(W1, W2)
    for index in range(20):
        assert frontend.offer(f"s{index}", 100) is None
    assert len(frontend.pump()) == 20


def test_a_single_stream_passes_however_large_it_is() -> None:
    frontend = Frontend(W1)
    frontend.offer("large", 90_000)
    assert frontend.placed_now() == ["large"]


def test_a_survivor_with_nothing_to_do_takes_a_second_of_prefill_at_once() -> None:
    frontend = Frontend(W1)
    frontend.is_busy = False
    frontend.report(W1, steps=1)
    for index in range(10):
        frontend.offer(f"s{index}", 1000)
    assert len(frontend.pump()) == RATE / 1000


def test_new_work_is_not_held_back_while_nobody_waits_to_resume() -> None:
    frontend = Frontend(W1)
    for index in range(100):
        frontend.offer(f"n{index}", 5000, Work.NEW)
    assert len(frontend.pump()) == 100
    frontend.offer("resume", 500)
    assert frontend.placed_now() == ["resume"], "new work fills no window"


# Storms.


def test_what_is_not_computed_yet_is_bounded_on_every_worker() -> None:
    frontend = Frontend(W1, W2)
    for index in range(20):
        frontend.offer(f"s{index}", 300)
    assert len(frontend.pump()) == 6
    assert frontend.queue.outstanding_at(W1) == frontend.queue.outstanding_at(W2) == 900
    frontend.wait(60)
    assert frontend.placed_now() == [], "time alone computes nothing"


def test_streams_larger_than_a_burst_go_one_by_one() -> None:
    frontend = Frontend(W1)
    for key in "ab":
        frontend.offer(key, 5000)
    assert frontend.placed_now() == ["a"]
    frontend.wait(60)
    assert frontend.placed_now() == []
    frontend.queue.computed("a")
    assert frontend.placed_now() == ["b"]


def test_a_worker_takes_a_share_of_its_rate() -> None:
    frontend = Frontend(W1)
    num_streams = 200
    for index in range(num_streams):
        frontend.offer(f"s{index}", 4000)
    began_at = frontend.now
    while frontend.queue.num_waiting:
        frontend.pump()
        frontend.compute_all()  # As if the engine were infinitely fast.
        if frontend.queue.num_waiting:
            frontend.wait_until_due()
    seconds = frontend.now - began_at
    assert seconds == pytest.approx((num_streams - 1) * 4000 / (0.5 * RATE), rel=0.01)


def test_the_measured_rate_replaces_the_configured_one() -> None:
    frontend = Frontend(W1)
    frontend.report(W1, steps=10, seconds=0.1)  # 10 ms a step.
    frontend.report(W1, steps=20, seconds=0.25, prefilled=5000)  # 50 ms for 5,000 tokens.
    for key in "ab":
        frontend.offer(key, 5000)
    frontend.pump()
    frontend.queue.computed("a")
    frontend.pump()
    began_at = frontend.now
    frontend.wait_until_due()
    assert frontend.now - began_at == pytest.approx(5000 / (0.5 * 100_000), rel=0.01)


def test_a_burst_is_what_doubles_a_step() -> None:
    frontend = Frontend(W1)
    frontend.report(W1, steps=2, seconds=0.1)  # 50 ms a step.
    frontend.report(W1, steps=4, seconds=0.25, prefilled=5000)
    assert frontend.queue.burst_of(W1) == pytest.approx(0.05 * 100_000, rel=0.01)


def test_the_least_work_goes_first() -> None:
    frontend = Frontend(W1)
    for key, num_tokens in (("c", 900), ("a", 500), ("d", 950), ("b", 800)):
        frontend.offer(key, num_tokens)
    order: list[str] = []
    while frontend.queue.num_waiting:
        order += frontend.placed_now()
        frontend.compute_all()
        frontend.wait(1)
    assert order == ["a", "b", "c", "d"]


def test_what_is_cached_is_no_work() -> None:
    frontend = Frontend(W1)
    frontend.offer("short", 600)
    frontend.offer("cached", 5000, cached={W1: 4900})
    frontend.pump()
    assert [key for key, _ in frontend.placed] == ["cached", "short"]
    assert frontend.queue.outstanding_at(W1) == 700


def test_priority_goes_before_work() -> None:
    frontend = Frontend(W1)
    frontend.offer("small", 600)
    frontend.offer("important", 900, priority=1)
    assert frontend.placed_now() == ["important"]


def test_a_large_stream_is_not_overtaken_for_ever() -> None:
    frontend = Frontend(W1)
    frontend.offer("large", 4000)
    frontend.offer("first", 600)
    order = frontend.placed_now()
    for index in range(100):
        frontend.offer(f"small{index}", 500)
        frontend.compute_all()
        frontend.wait(0.1)
        order += frontend.placed_now()
    assert "large" in order
    assert order.index("large") <= 10


def test_the_first_in_line_keeps_the_worker_it_waits_for() -> None:
    frontend = Frontend(W1)
    frontend.offer("a", 600, priority=1)
    frontend.pump()
    frontend.offer("b", 900, priority=1)
    frontend.offer("c", 100)
    assert frontend.placed_now() == [], "c has room, but b would wait the longer"


def test_who_waits_for_one_worker_does_not_keep_others_from_another() -> None:
    frontend = Frontend(W1, W2)
    frontend.able["picky"] = {W1}
    frontend.offer("x", 900, cached={W1: 1}, avoid=frozenset({W2}))
    frontend.pump()
    frontend.offer("picky", 500, priority=1)
    frontend.offer("other", 900)
    assert frontend.pump() == [("other", W2)]
    frontend.compute_all()
    frontend.wait(1)
    assert frontend.pump() == [("picky", W1)]


def test_a_worker_that_failed_the_stream_is_no_way_around_the_queue() -> None:
    frontend = Frontend(W1, W2)
    frontend.offer("a", 900, avoid=frozenset({W2}))
    frontend.offer("b", 900, avoid=frozenset({W2}))
    assert frontend.pump() == [("a", W1)], "b waits for the worker that has not failed it"
    frontend.lose(W1)
    assert frontend.pump() == [("b", W2)], "unless there is no other"


def test_what_could_not_be_placed_may_be_once_something_changed() -> None:
    frontend = Frontend(W1)
    frontend.able["picky"] = set()
    frontend.offer("picky", 500)
    assert frontend.placed_now() == []
    frontend.able.clear()
    assert frontend.placed_now() == [], "nothing has changed that anybody was told"
    frontend.show()
    assert frontend.placed_now() == ["picky"]


def test_a_worker_that_is_forgotten_and_found_again_begins_with_an_empty_window() -> None:
    frontend = Frontend(W1)
    for key in "ab":
        frontend.offer(key, 900)
    assert frontend.placed_now() == ["a"]
    view = frontend.views.pop(W1)
    frontend.show()
    frontend.views[W1] = view
    frontend.show()
    assert frontend.placed_now() == ["b"]
    frontend.queue.computed("a")
    assert frontend.queue.outstanding_at(W1) == 900, "a was of an account that is closed"


def test_a_stream_does_not_wait_for_a_worker_that_can_never_take_it() -> None:
    frontend = Frontend(W1, W2)
    frontend.offer("a", 900, avoid=frozenset({W2}))
    assert frontend.pump() == [("a", W1)]
    frontend.unable["b"] = {W1}
    frontend.offer("b", 900, avoid=frozenset({W2}))
    assert frontend.pump() == [("b", W2)]


def test_a_stream_does_not_wait_for_a_new_worker_that_can_never_take_it() -> None:
    frontend = Frontend(W1, W2)
    frontend.lose(W2)
    frontend.unable["a"] = {W2}
    for key in ("x", "a"):
        frontend.offer(key, 900, avoid=frozenset({W1}))
    assert frontend.pump() == [("x", W1)]
    frontend.bring_back(W2)
    frontend.offer("y", 900)
    frontend.wait(1)
    frontend.queue.computed("x")
    assert frontend.pump() == [("a", W1), ("y", W2)]


def test_a_suspect_is_taken_only_if_there_is_no_other() -> None:
    frontend = Frontend(W1, W2)
    frontend.views[W2].is_suspect = True
    for key in "ab":
        frontend.offer(key, 900)
    assert frontend.pump() == [("a", W1)]


def test_a_refused_attempt_has_drawn_from_the_budget() -> None:
    frontend = Frontend(W1)
    frontend.offer("a", 900)
    frontend.pump()
    frontend.queue.computed("a")  # Refused at once.
    frontend.offer("a", 900)
    assert frontend.placed_now() == []
    frontend.wait_until_due()
    assert frontend.placed_now() == ["a"]


def test_a_cancelled_stream_leaves_the_line() -> None:
    frontend = Frontend(W1)
    for key in "abc":
        frontend.offer(key, 900)
    frontend.pump()
    frontend.queue.cancel("b")
    frontend.queue.cancel("b")
    frontend.compute_all()
    frontend.wait(1)
    assert frontend.placed_now() == ["c"]
    assert frontend.queue.tokens_waiting == 0


def test_the_line_is_bounded() -> None:
    frontend = Frontend(W1, waiting_max=3)
    frontend.offer("running", 900)
    frontend.pump()
    for index in range(3):
        assert frontend.offer(f"s{index}", 900) is None
    error = frontend.offer("one too many", 900)
    assert error is not None
    assert error.reason is Reason.OVERLOADED


# New work in a storm.


def test_new_work_gets_its_share_and_no_more() -> None:
    frontend = Frontend(W1, new_work_share=0.2)
    for index in range(400):
        frontend.offer(f"r{index}", 500)
        frontend.offer(f"n{index}", 500, Work.NEW, give_up_s=1e6)
    order: list[str] = []
    for _ in range(100):
        order += frontend.placed_now()
        frontend.compute_all()
        frontend.wait_until_due()
    new = sum(key.startswith("n") for key in order)
    assert len(order) >= 100
    assert new / len(order) == pytest.approx(0.2, abs=0.02)


def test_new_work_that_is_larger_than_any_resume_gets_its_share_too() -> None:
    frontend = Frontend(W1, new_work_share=0.2)
    for index in range(1000):
        frontend.offer(f"r{index}", 100)
    for index in range(10):
        frontend.offer(f"n{index}", 5000, Work.NEW, give_up_s=1e6)
    order: list[str] = []
    for _ in range(800):
        order += frontend.placed_now()
        frontend.compute_all()
        frontend.wait_until_due()
    tokens = sum(5000 if key.startswith("n") else 100 for key in order)
    new = sum(5000 for key in order if key.startswith("n"))
    assert new / tokens == pytest.approx(0.2, abs=0.05)


def test_new_work_that_was_held_back_does_not_go_all_at_once() -> None:
    frontend = Frontend(W1)
    for key in "ab":
        frontend.offer(key, 900)
    assert frontend.placed_now() == ["a"]
    for index in range(10):
        frontend.offer(f"n{index}", 900, Work.NEW, give_up_s=1e6)
    frontend.queue.cancel("b")
    while frontend.queue.num_waiting:
        frontend.compute_all()
        frontend.wait_until_due()
        assert len(frontend.placed_now()) == 1
    for index in range(10):
        frontend.offer(f"late{index}", 900, Work.NEW)
    assert len(frontend.placed_now()) == 10, "nobody is held back any more"


def test_new_work_that_would_wait_too_long_is_refused_with_the_time() -> None:
    frontend = Frontend(W1)
    for index in range(10):
        frontend.offer(f"r{index}", 900)
    frontend.pump()
    assert frontend.offer("n0", 5000, Work.NEW, give_up_s=1.0) is None, "nobody is before it"
    error = frontend.offer("n1", 5000, Work.NEW, give_up_s=1.0)
    assert error is not None
    assert error.reason is Reason.OVERLOADED
    wait_s = 5000 / (0.2 * 0.5 * RATE)
    assert error.retry_after_s is not None
    assert wait_s <= error.retry_after_s <= 1.5 * wait_s
    in_part = frontend.offer("n2", 5000, Work.NEW, give_up_s=1.0, is_let_in=True)
    assert in_part is None, "its request got in"


def test_new_work_behind_nobody_but_new_work_is_not_refused_at_the_pace_that_resumes_leave() -> (
    None
):
    frontend = Frontend(W1)
    for key in "ab":
        frontend.offer(key, 900)
    assert frontend.placed_now() == ["a"]
    assert frontend.offer("n0", 5000, Work.NEW) is None, "held back"
    frontend.queue.cancel("b")
    between_s = 2 * 5000 / (0.5 * RATE)
    assert between_s < 5000 / (0.2 * 0.5 * RATE)
    assert frontend.offer("n1", 5000, Work.NEW, give_up_s=between_s) is None


def test_new_work_does_not_wait_for_resumes_that_wait_for_a_worker_of_another_kind() -> None:
    frontend = Frontend(W1)
    frontend.able["picky"] = set()
    frontend.offer("picky", 500)
    assert frontend.placed_now() == []
    for index in range(10):
        frontend.offer(f"n{index}", 5000, Work.NEW)
    assert len(frontend.pump()) == 10


# Fleet loss.


def storm_of_a_fleet_loss() -> Frontend:
    frontend = Frontend(W1, W2, W3, W4)
    frontend.lose(W1, W2, W3)
    for index in range(5):
        frontend.offer(f"r{index}", 900)
    frontend.pump()
    return frontend


def test_in_a_fleet_loss_new_work_is_refused_with_the_time_that_the_resumes_take() -> None:
    frontend = storm_of_a_fleet_loss()
    assert frontend.queue.num_waiting == 4
    error = frontend.offer("n", 10, Work.NEW)
    assert error is not None
    assert error.reason is Reason.OVERLOADED
    drain_s = 5 * 900 / (0.5 * RATE)
    assert error.retry_after_s is not None
    assert drain_s <= error.retry_after_s <= 1.5 * drain_s
    assert frontend.queue.num_fleet_losses == 1


def test_new_work_that_waited_already_is_held_in_a_fleet_loss() -> None:
    frontend = Frontend(W1, W2, W3, W4)
    for index in range(5):
        frontend.offer(f"r{index}", 3900)
    frontend.pump()
    frontend.offer("n", 10, Work.NEW)
    frontend.lose(W1, W2, W3)
    order: list[str] = []
    while frontend.queue.num_waiting:
        order += frontend.placed_now()
        frontend.compute_all()
        frontend.wait(1)
    assert order == ["r4", "n"]


def test_a_fleet_loss_ends_by_itself_when_its_streams_have_found_a_place() -> None:
    frontend = storm_of_a_fleet_loss()
    while frontend.queue.num_waiting:
        frontend.compute_all()
        frontend.wait(1)
        frontend.pump()
    assert frontend.offer("n", 10, Work.NEW) is None
    assert frontend.queue.num_fleet_losses == 0


def test_a_fleet_loss_ends_with_its_last_stream_though_no_new_work_is_offered() -> None:
    frontend = storm_of_a_fleet_loss()
    assert frontend.offer("n", 10, Work.NEW) is not None, "it has been noticed"
    assert frontend.queue.holds_new_work("m")
    for key, _, _ in list(frontend.queue.waiting()):
        frontend.queue.cancel(key)
    assert frontend.queue.next(frontend.now) is None
    assert not frontend.queue.holds_new_work("m"), "else who waits elsewhere would never be offered"
    assert frontend.queue.num_fleet_losses == 0


def test_a_fleet_loss_ends_when_the_fleet_is_back() -> None:
    frontend = storm_of_a_fleet_loss()
    frontend.bring_back(W1, W2)
    frontend.pump()
    assert frontend.queue.num_waiting > 0
    assert frontend.offer("n", 10, Work.NEW) is None


def test_half_of_a_fleet_is_no_fleet_loss() -> None:
    frontend = Frontend(W1, W2)
    frontend.lose(W1)
    for index in range(5):
        frontend.offer(f"r{index}", 900)
    frontend.pump()
    assert frontend.offer("n", 10, Work.NEW) is None


def test_workers_that_leave_one_by_one_are_no_fleet_loss() -> None:
    frontend = Frontend(W1, W2, W3, W4)
    for life in (W1, W2, W3):
        frontend.lose(life)
        frontend.wait(FLEET_WINDOW_S)
    frontend.show()
    for index in range(5):
        frontend.offer(f"r{index}", 900)
    frontend.pump()
    assert frontend.offer("n", 10, Work.NEW) is None


def test_without_a_survivor_everybody_waits() -> None:
    frontend = Frontend(W1)
    frontend.lose(W1)
    frontend.offer("r", 900)
    assert frontend.offer("n", 10, Work.NEW) is None
    assert frontend.pump() == []
    frontend.bring_back(W1)
    assert frontend.placed_now() == ["r", "n"]


# Several frontends.


def test_what_others_resume_is_paid_from_the_same_purse() -> None:
    frontend = Frontend(W1)
    frontend.offer("a", 900)
    frontend.offer("b", 900)
    frontend.report(W1, prefilled=1)
    assert frontend.placed_now() == ["a"]
    frontend.compute_all()
    assert frontend.placed_now() == []
    alone_due = frontend.queue.deadline()
    frontend.report(W1, prefilled=901, queued=500)  # 900 of that are ours.
    assert frontend.placed_now() == []
    due = frontend.queue.deadline()
    assert alone_due is not None
    assert due == pytest.approx(alone_due + 500 / (0.5 * RATE))


def test_our_turn_comes_whatever_others_send() -> None:
    frontend = Frontend(W1)
    prefilled = 1
    frontend.report(W1, prefilled=prefilled)
    for key in "ab":
        frontend.offer(key, 900)
    frontend.pump()
    frontend.compute_all()
    began_at = frontend.now
    while frontend.queue.num_waiting:
        frontend.wait(0.1)
        prefilled += 5000
        frontend.report(W1, prefilled=prefilled)
        frontend.pump()
        assert frontend.now < began_at + TURN_S + 0.2


@pytest.mark.parametrize("num_frontends", [1, 2, 4])
def test_frontends_together_overshoot_by_a_burst_each_and_keep_the_pace(num_frontends: int) -> None:
    """Each sees what the others did in reports that come every 100 ms."""
    frontends = [Frontend(W1) for _ in range(num_frontends)]
    for index, frontend in enumerate(frontends):
        for number in range(200):
            frontend.offer(f"{index}.{number}", 500)
    queue: list[tuple[Frontend, str]] = []
    prefilled, progress, outstanding_max = 1, 0.0, 0
    seconds, tick_s = 20.0, 0.01
    for tick in range(int(seconds / tick_s)):
        for frontend in frontends:
            frontend.wait(tick_s)
            queue += [(frontend, key) for key in frontend.placed_now()]
        outstanding_max = max(outstanding_max, 500 * len(queue))
        progress = min(progress + RATE * tick_s, 500.0 * len(queue))
        while progress >= 500:
            progress -= 500
            prefilled += 500
            frontend, key = queue.pop(0)
            frontend.queue.computed(key)
        if tick % 10 == 0:
            for frontend in frontends:
                frontend.report(W1, prefilled=prefilled, queued=500 * len(queue))
    assert outstanding_max <= num_frontends * BURST
    pace = prefilled / seconds
    assert pace <= 1.25 * 0.5 * RATE, "together as fast as one"
    assert pace >= 0.8 * 0.5 * RATE


# Switched off.


def test_switched_off_everybody_goes_at_once_in_the_order_of_arrival() -> None:
    frontend = Frontend(W1, is_on=False)
    for index in range(50):
        frontend.offer(f"s{index}", 5000 - index, priority=index)
    frontend.offer("n", 5000, Work.NEW)
    assert frontend.placed_now() == [*(f"s{index}" for index in range(50)), "n"]


# Always.


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["resume", "new", "computed", "wait", "cancel", "lose", "back"]),
            st.integers(1, 5000),
        ),
        max_size=80,
    )
)
def test_every_stream_is_placed_in_the_end_and_the_account_is_empty(
    events: list[tuple[str, int]],
) -> None:
    frontend = Frontend(W1, W2)
    running: list[str] = []
    offered: set[str] = set()
    cancelled: set[str] = set()
    refused: set[str] = set()
    for index, (event, amount) in enumerate(events):
        match event:
            case "resume" | "new":
                work = Work.RESUME if event == "resume" else Work.NEW
                key = f"{event}{index}"
                if frontend.offer(key, amount, work, priority=amount % 3):
                    refused.add(key)
                offered.add(key)
            case "computed" if running:
                frontend.queue.computed(running.pop(amount % len(running)))
            case "cancel" if offered:
                key = sorted(offered)[amount % len(offered)]
                frontend.queue.cancel(key)
                cancelled.add(key)
            case "lose":
                frontend.lose(W1 if amount % 2 else W2)
            case "back":
                frontend.bring_back(W1, W2)
            case _:
                frontend.wait(amount / 5000)
        for key, life in frontend.pump():
            running.append(key)
            window = frontend.queue.outstanding_at(life)
            alone = frontend.queue.price_of(key)
            if key.startswith("resume"):
                assert window <= max(BURST, alone), "a burst, or one stream"
    frontend.bring_back(W1, W2)
    for _ in range(10 * len(events) + 10):
        for key in running:
            frontend.queue.computed(key)
        running = [key for key, _ in frontend.pump()]
        frontend.wait(1.0)
    assert frontend.queue.num_waiting == 0
    assert frontend.queue.tokens_waiting == frontend.queue.tokens_outstanding == 0
    placed = {key for key, _ in frontend.placed}
    assert placed | cancelled | refused == offered
