"""What an engine's steps cost, from its load reports."""

import pytest

from frontend.step_cost import PREFILL_TOKENS_PER_S_MAX, StepCost
from unbroken.v1 import worker_pb2


class Engine:
    """Tells its load after every few steps, as a real one does."""

    def __init__(self, *, step_s: float, prefill_tokens_per_s: float) -> None:
        self.cost = StepCost()
        self.seconds = 0.0
        self._step_s = step_s
        self.rate = prefill_tokens_per_s
        self._num_steps = 0
        self._num_tokens = 0

    def run(self, num_steps: int, prefill_tokens: int = 0) -> None:
        """Some steps, with so much prefill in them together; then a report."""
        self._num_steps += num_steps
        self._num_tokens += prefill_tokens
        self.seconds += num_steps * self._step_s + prefill_tokens / self.rate
        self.report()

    def report(self) -> None:
        self.cost.reported(
            worker_pb2.LoadReport(
                engine_steps_total=self._num_steps,
                prefill_tokens_total=self._num_tokens,
                steps_us_total=int(self.seconds * 1e6),
            )
        )


def test_an_engine_is_measured_in_both_parts() -> None:
    engine = Engine(step_s=0.04, prefill_tokens_per_s=40_000)
    engine.report()
    for _ in range(5):
        engine.run(3)
        engine.run(2, prefill_tokens=4096)
    assert engine.cost.step_s == pytest.approx(0.04)
    assert engine.cost.prefill_tokens_per_s == pytest.approx(40_000)


def test_nothing_is_known_before_there_was_something_to_measure() -> None:
    engine = Engine(step_s=0.04, prefill_tokens_per_s=40_000)
    engine.report()
    assert engine.cost.step_s is None
    assert engine.cost.prefill_tokens_per_s is None


def test_an_engine_that_does_not_say_what_its_steps_took_stays_unknown() -> None:
    cost = StepCost()
    for num in (10, 20, 30):
        load = worker_pb2.LoadReport(engine_steps_total=num, prefill_tokens_total=1000 * num)
        cost.reported(load)
    assert cost.step_s is None
    assert cost.prefill_tokens_per_s is None


def test_a_few_prompt_tokens_say_nothing_about_the_rate() -> None:
    engine = Engine(step_s=0.04, prefill_tokens_per_s=40_000)
    engine.report()
    engine.run(3)
    engine.run(3, prefill_tokens=20)
    assert engine.cost.prefill_tokens_per_s is None


def test_an_engine_too_fast_to_be_measured_has_a_finite_rate() -> None:
    engine = Engine(step_s=0.04, prefill_tokens_per_s=1e12)
    engine.report()
    engine.run(3)
    engine.seconds -= 0.001  # The clock's error is larger than what is measured.
    engine.run(3, prefill_tokens=4096)
    assert engine.cost.prefill_tokens_per_s == PREFILL_TOKENS_PER_S_MAX


def test_a_rate_that_changes_is_learnt_anew() -> None:
    engine = Engine(step_s=0.04, prefill_tokens_per_s=40_000)
    engine.report()
    engine.run(3)
    for _ in range(20):
        engine.run(2, prefill_tokens=4096)
    engine.rate = 10_000
    for _ in range(40):
        engine.run(2, prefill_tokens=4096)
    assert engine.cost.prefill_tokens_per_s == pytest.approx(10_000, rel=0.05)
