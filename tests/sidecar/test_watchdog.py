"""What the watchdog makes of engines that step, compute long prompts, pause, hang and come back."""

from random import Random

import pytest

from sidecar.watchdog import (
    LOOK_INTERVAL_S,
    Gaps,
    Opinion,
    Recovered,
    Restart,
    Stalled,
    Watchdog,
    WatchdogPolicy,
    Work,
)
from unbroken.outcome import FailureKind

NOTHING = Work(has_steps=False, prefill_tokens=0)
DECODE = Work(has_steps=True, prefill_tokens=0)
FRAME_INTERVAL_S = 0.2


class Watch:
    """An engine and its watchdog on a clock that a test moves."""

    def __init__(
        self,
        *,
        promises_frames: bool = True,
        prefill_tokens_max: int = 2048,
        policy: WatchdogPolicy | None = None,
    ) -> None:
        self.now = 1000.0
        self.dog = Watchdog(policy)
        self.opinions: list[Opinion] = []
        self.dog.up(
            self.now,
            frame_interval_s=FRAME_INTERVAL_S if promises_frames else None,
            prefill_tokens_max=prefill_tokens_max,
        )
        self._look_at = self.now + LOOK_INTERVAL_S

    def wait(self, duration_s: float, work: Work) -> list[Opinion]:
        """Nothing comes for a while; what the watchdog says meanwhile."""
        before, end = len(self.opinions), self.now + duration_s
        while self._look_at <= end:
            self.now = self._look_at
            self._look_at += LOOK_INTERVAL_S
            if self.dog.look(self.now) and (opinion := self.dog.judge(self.now, work)):
                self.opinions.append(opinion)
        self.now = end
        return self.opinions[before:]

    def stand_still(self, duration_s: float) -> None:
        """The sidecar does not run; its look is due at once when it does."""
        self.now += duration_s
        self._look_at = self.now

    def step(self, after_s: float, *, prefill_tokens: int = 0) -> None:
        """The engine computes for so long and says what came of it, with signs of life."""
        work = Work(has_steps=True, prefill_tokens=prefill_tokens)
        left_s = after_s
        while left_s > FRAME_INTERVAL_S:
            self.wait(FRAME_INTERVAL_S, work)
            self.sign_of_life(has_work=True, prefill_tokens=prefill_tokens)
            left_s -= FRAME_INTERVAL_S
        self.wait(left_s, work)
        self._heard(is_step=True, has_work=True, prefill_tokens=prefill_tokens)

    def step_after_silence(self, silent_s: float) -> None:
        self.wait(silent_s, DECODE)
        self.step_at_once()
        self.decode(20)

    def step_at_once(self) -> None:
        """News of a step comes before anybody looks."""
        self._heard(is_step=True, has_work=True, prefill_tokens=0)

    def sign_of_life(self, *, has_work: bool, prefill_tokens: int = 0) -> None:
        self._heard(is_step=False, has_work=has_work, prefill_tokens=prefill_tokens)

    def decode(self, num_steps: int, step_s: float = 0.01) -> None:
        for _ in range(num_steps):
            self.step(step_s)

    def idle(self, duration_s: float) -> None:
        for _ in range(round(duration_s / FRAME_INTERVAL_S)):
            self.wait(FRAME_INTERVAL_S, NOTHING)
            self.sign_of_life(has_work=False)

    def _heard(self, *, is_step: bool, has_work: bool, prefill_tokens: int) -> None:
        opinion = self.dog.heard(
            self.now, is_step=is_step, has_work=has_work, prefill_tokens=prefill_tokens
        )
        if opinion is not None:
            self.opinions.append(opinion)


def after(watch: Watch, work: Work, *, within_s: float = 100.0) -> tuple[float, Stalled]:
    """How long it takes from now until the engine is called stalled."""
    began = watch.now
    while watch.now - began < within_s:
        for opinion in watch.wait(LOOK_INTERVAL_S, work):
            assert isinstance(opinion, Stalled)
            return watch.now - began, opinion
    raise AssertionError(f"not called stalled within {within_s} s")


# Stopped engines.


def test_an_engine_stopped_in_decode_is_called_hung_within_0_8_s() -> None:
    watch = Watch()
    watch.decode(500)
    took_s, stalled = after(watch, DECODE)
    assert 0.65 <= took_s <= 0.8
    assert stalled.failure is FailureKind.HANG
    assert watch.dog.num_stalls == 1


def test_a_stopped_engine_is_called_hung_whatever_it_has_to_prefill_and_before_its_first_step() -> (
    None
):
    took_s, stalled = after(Watch(), Work(has_steps=True, prefill_tokens=1_000_000))
    assert took_s <= 0.8
    assert stalled.failure is FailureKind.HANG


def test_an_idle_engine_that_stops_is_called_hung() -> None:
    watch = Watch()
    watch.idle(60)
    took_s, stalled = after(watch, NOTHING)
    assert took_s <= 0.8
    assert stalled.failure is FailureKind.HANG
    assert watch.dog.is_stalled


def test_an_engine_that_lives_and_makes_no_step_in_decode_is_called_stalled_within_1_2_s() -> None:
    watch = Watch()
    watch.decode(500)
    began = watch.now
    while not watch.opinions:
        watch.wait(FRAME_INTERVAL_S, DECODE)
        watch.sign_of_life(has_work=True)
        assert watch.now - began < 1.3
    (stalled,) = watch.opinions
    assert isinstance(stalled, Stalled)
    assert stalled.failure is FailureKind.STALL


def test_an_engine_that_promises_no_signs_of_life_is_watched_by_its_steps() -> None:
    watch = Watch(promises_frames=False)
    assert watch.wait(1000, NOTHING) == []
    watch.dog.work_began(watch.now)
    watch.decode(500)
    took_s, stalled = after(watch, DECODE)
    assert 0.9 <= took_s <= 1.2
    assert stalled.failure is FailureKind.STALL


# Engines that are well.


@pytest.mark.parametrize("step_s", [0.2, 1.0, 5.0])
def test_slow_steps_are_learnt(step_s: float) -> None:
    watch = Watch()
    watch.decode(100, step_s)
    assert watch.opinions == []
    while not watch.opinions:
        watch.wait(FRAME_INTERVAL_S, DECODE)
        watch.sign_of_life(has_work=True)
    assert isinstance(watch.opinions[0], Stalled)


def test_a_prefill_of_20_s_condemns_nobody() -> None:
    watch = Watch()
    for _ in range(5):
        watch.idle(1)
        watch.step(20, prefill_tokens=2048)
        watch.dog.prefilled(2048, 20)
        watch.decode(100)
    watch.step(40, prefill_tokens=2048)
    assert watch.opinions == []


def test_a_measured_rate_bounds_a_prefill_by_its_largest_chunk() -> None:
    watch = Watch(prefill_tokens_max=1000)
    small = Work(has_steps=True, prefill_tokens=100)
    large = Work(has_steps=True, prefill_tokens=1_000_000)
    assert watch.dog.bound_s(watch.now, small) == 60, "nothing is known"
    for _ in range(3):
        watch.dog.prefilled(500, 1.0)
    assert watch.dog.bound_s(watch.now, small) == pytest.approx(3 + 4 * 0.2)
    assert watch.dog.bound_s(watch.now, large) == pytest.approx(3 + 4 * 2.0)


def test_a_prompt_that_was_found_in_a_cache_says_nothing_about_the_rate() -> None:
    watch = Watch()
    for _ in range(10):
        watch.dog.prefilled(0, 0.01)
        watch.dog.prefilled(16, 0.01)
    assert watch.dog.bound_s(watch.now, Work(has_steps=True, prefill_tokens=2048)) == 60


def test_an_engine_that_stands_still_in_a_prefill_is_called_stalled_by_its_rate() -> None:
    watch = Watch()
    for _ in range(3):
        watch.step(1, prefill_tokens=2048)
        watch.dog.prefilled(2048, 1.0)
    began = watch.now
    while not watch.opinions:
        watch.wait(FRAME_INTERVAL_S, Work(has_steps=True, prefill_tokens=4096))
        watch.sign_of_life(has_work=True, prefill_tokens=4096)
    assert 7.0 <= watch.now - began <= 7.5


def test_full_windows_are_no_stall_and_teach_nothing() -> None:
    watch = Watch()
    watch.decode(100)
    for _ in range(50):
        watch.idle(2)  # The clients read slowly.
        watch.decode(5)
    assert watch.opinions == []
    took_s, _ = after(watch, DECODE)
    assert took_s <= 0.9, "a pause is no gap between two steps"


def test_rare_pauses_below_the_bound_raise_it_and_are_forgotten() -> None:
    watch = Watch(promises_frames=False)
    watch.decode(200)
    watch.step(0.9)
    took_s, _ = after(watch, DECODE)
    assert 1.3 <= took_s <= 1.5
    watch.step(0.01)
    watch.decode(60_000)
    took_s, _ = after(watch, DECODE)
    assert took_s <= 1.2


def test_bursts_under_starvation_condemn_nobody() -> None:
    random = Random(7)
    for _ in range(20):
        watch = Watch()
        for _ in range(2000):
            watch.step(0.01 * random.lognormvariate(0, 1) + 0.3 * (random.random() < 0.02))
            if random.random() < 0.01:
                watch.idle(random.choice((0.2, 1.0)))
                watch.step(random.uniform(0, 20), prefill_tokens=2048)
        assert watch.opinions == []


def test_an_engine_that_was_silent_for_less_than_its_bound_has_time_for_its_next_step() -> None:
    watch = Watch()
    watch.idle(10)
    watch.decode(100)
    for _ in range(5):  # Pauses that it is known for.
        watch.step_after_silence(0.64)
    assert watch.wait(0.9, DECODE) == []
    watch.sign_of_life(has_work=True)
    assert watch.wait(0.3, DECODE) == []


# Those who come back, and those who don't.


def test_an_engine_that_was_silent_is_well_when_it_says_something() -> None:
    watch = Watch()
    watch.decode(100)
    assert [type(opinion) for opinion in watch.wait(3, DECODE)] == [Stalled]
    watch.sign_of_life(has_work=True)
    recovered = watch.opinions[-1]
    assert isinstance(recovered, Recovered)
    assert 2.1 <= recovered.stalled_s <= 2.4
    assert not watch.dog.is_stalled
    watch.decode(100)
    took_s, _ = after(watch, DECODE)
    assert took_s <= 0.8, "what was called a stall is not what this engine's gaps are like"


def test_an_engine_that_only_says_that_it_lives_stays_stalled_until_its_next_step() -> None:
    watch = Watch()
    watch.decode(100)
    while not watch.dog.is_stalled:
        watch.wait(0.1, DECODE)
        watch.sign_of_life(has_work=True)
    watch.sign_of_life(has_work=True)
    assert watch.dog.is_stalled
    watch.step(0.001)
    assert isinstance(watch.opinions[-1], Recovered)


def test_a_slow_step_that_was_called_a_stall_teaches_its_length() -> None:
    watch = Watch()
    watch.decode(100)
    watch.step(3)
    watch.step(3)
    watch.step(3)
    assert [type(opinion) for opinion in watch.opinions] == [Stalled, Recovered]


def test_an_engine_that_has_nothing_to_do_any_more_is_well_when_it_says_so() -> None:
    watch = Watch()
    watch.decode(100)
    watch.wait(1, DECODE)
    watch.sign_of_life(has_work=False)
    assert isinstance(watch.opinions[-1], Recovered)


def test_an_engine_that_does_not_come_back_is_to_be_restarted_once() -> None:
    watch = Watch()
    watch.decode(100)
    opinions = watch.wait(60, DECODE)
    assert [type(opinion) for opinion in opinions] == [Stalled, Restart]
    restart = opinions[1]
    assert isinstance(restart, Restart)
    assert restart.failure is FailureKind.HANG
    assert 5.0 <= restart.stalled_s <= 5.1
    watch.dog.down()
    assert watch.wait(60, DECODE) == [], "who is down is not watched"
    watch.dog.up(watch.now, frame_interval_s=FRAME_INTERVAL_S, prefill_tokens_max=2048)
    assert watch.wait(0.6, DECODE) == [], "a new life has its own time"
    assert [type(opinion) for opinion in watch.wait(60, DECODE)] == [Stalled, Restart]


# Our own standstill.


@pytest.mark.parametrize("stood_still_s", [0.5, 5.0, 600.0])
@pytest.mark.parametrize("is_look_first", [True, False])
def test_a_sidecar_that_stood_still_itself_blames_nobody(
    stood_still_s: float, is_look_first: bool
) -> None:
    watch = Watch()
    watch.decode(500)
    watch.wait(0.6, DECODE)  # A moment later it would have been called hung.
    watch.stand_still(stood_still_s)
    if is_look_first:
        assert watch.wait(0, DECODE) == []
    watch.step_at_once()
    watch.decode(500)
    assert watch.opinions == []
    took_s, _ = after(watch, DECODE)
    assert took_s <= 0.9, "and its own standstill teaches it nothing"


def test_an_engine_that_stopped_with_its_sidecar_gets_its_time_again() -> None:
    watch = Watch()
    watch.decode(500)
    watch.stand_still(60)
    took_s, _ = after(watch, DECODE)
    assert 0.65 <= took_s <= 0.9


def test_late_looks_count_for_little() -> None:
    watch = Watch()
    watch.decode(500)
    for _ in range(4):  # One second, in which a starved process looked four times.
        watch.now += 0.25
        assert not watch.dog.look(watch.now)


def test_time_in_which_the_sidecar_stood_still_restarts_no_engine() -> None:
    watch = Watch()
    watch.decode(100)
    watch.wait(1, DECODE)
    watch.stand_still(60)
    assert watch.wait(1, DECODE) == []
    watch.step(0)
    assert isinstance(watch.opinions[-1], Recovered)


# What is usual.


def test_the_longest_but_one_in_a_thousand_counts() -> None:
    gaps = Gaps()
    for index in range(5000):
        gaps.add(1.0 if index % 500 == 0 else 0.01, 0.0)
    assert 1.0 <= gaps.bound(0.0, factor=1, peak_factor=0) <= 1.25
    rarely = Gaps()
    for index in range(5000):
        rarely.add(1.0 if index % 2000 == 0 else 0.01, 0.0)
    assert 0.01 <= rarely.bound(0.0, factor=1, peak_factor=0) <= 0.0125


@pytest.mark.parametrize("gap_s", [0.0, 1e-9, 0.001, 0.0012, 0.5, 1e4, 1e9])
def test_a_gap_is_never_longer_than_its_bound_says(gap_s: float) -> None:
    gaps = Gaps()
    gaps.add(gap_s, 0.0)
    gaps.add(gap_s, 0.0)
    bound_s = gaps.bound(0.0, factor=1.0, peak_factor=1.0)
    assert bound_s >= gap_s
    assert bound_s <= max(1.2 * gap_s, 0.0012)
