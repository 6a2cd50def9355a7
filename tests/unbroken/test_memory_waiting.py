"""Claims of `unbroken.memory.waiting`: it ends up with the faster way, whatever the machine is."""

from collections.abc import Callable
from random import Random

import pytest

from unbroken.memory.waiting import TRIED_EVERY, TRIED_EVERY_MAX, Waiting

AWAKE_S = 100e-6
NUM_CALLS = 2000


def num_awake(waiting: Waiting, took_s: Callable[[bool], float], num_calls: int) -> int:
    """Of so many calls, which take what the machine says."""
    awake = 0
    for _ in range(num_calls):
        is_awake = waiting.begin() > 0
        awake += is_awake
        waiting.ended(took_s(is_awake))
    return awake


def noisy(random: Random, awake_us: float, asleep_us: float) -> Callable[[bool], float]:
    """One call in a hundred takes a millisecond."""

    def took_s(is_awake: bool) -> float:
        usual_us = awake_us if is_awake else asleep_us
        return (1000.0 if random.random() < 0.01 else usual_us * random.uniform(0.8, 1.3)) * 1e-6

    return took_s


@pytest.mark.parametrize("seed", range(20))
def test_the_faster_way_is_the_usual_one_and_the_other_is_tried_now_and_then(seed: int) -> None:
    random = Random(seed)
    near, far = noisy(random, 26, 55), noisy(random, 100, 50)
    waiting = Waiting(AWAKE_S)
    num_awake(waiting, near, 100)
    assert 0.97 * NUM_CALLS < num_awake(waiting, near, NUM_CALLS) < NUM_CALLS
    num_awake(waiting, far, NUM_CALLS)  # The kernel has moved somebody.
    assert 0 < num_awake(waiting, far, NUM_CALLS) < 0.03 * NUM_CALLS


def test_what_the_first_calls_took_says_little_of_the_others() -> None:
    for is_near in (True, False):
        waiting = Waiting(AWAKE_S)
        for took_s in (0.3, 0.5):
            waiting.begin()
            waiting.ended(took_s)
        took = noisy(Random(1), 26, 55) if is_near else noisy(Random(1), 170, 100)
        num_awake(waiting, took, 100)
        awake = num_awake(waiting, took, 100)
        assert awake > 90 if is_near else awake < 10


def test_what_is_slower_for_long_is_tried_ever_more_rarely() -> None:
    waiting = Waiting(AWAKE_S)

    def took_s(is_awake: bool) -> float:
        return 30e-6 if is_awake else 50e-6

    num_awake(waiting, took_s, 20)
    assert num_awake(waiting, took_s, 2 * TRIED_EVERY) < 2 * TRIED_EVERY
    num_awake(waiting, took_s, 4 * TRIED_EVERY_MAX)
    num_calls = 10 * TRIED_EVERY_MAX
    assert num_awake(waiting, took_s, num_calls) == num_calls - 10


def test_who_never_stays_awake_does_not() -> None:
    assert num_awake(Waiting(0.0), lambda _: 1.0, 100) == 0


def test_a_call_that_takes_long_says_little_of_the_others() -> None:
    waiting = Waiting(AWAKE_S)
    num_awake(waiting, lambda is_awake: 30e-6 if is_awake else 50e-6, 50)
    assert waiting.begin()
    waiting.ended(10.0)
    assert waiting.begin()


def test_what_raises_counts_nothing() -> None:
    waiting = Waiting(AWAKE_S)
    for _ in range(10):
        assert waiting.begin(), "no answer has come yet"
    waiting.ended(30e-6)
    assert not waiting.begin()
