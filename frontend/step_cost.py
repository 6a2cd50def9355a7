"""What the steps of an engine cost, learnt from its load reports: no I/O.

A step takes a time of its own, and more for every prompt token that is computed in it:

    time = steps * step_s + prefill tokens / prefill_tokens_per_s

Reports between which nothing was prefilled teach the first number, the others the second. All three
totals are the engine's own: by a clock here, reports that arrive late and together would make it
look infinitely fast, just when a worker's death keeps everybody busy.
"""

from typing import Final

from unbroken.v1 import worker_pb2

PREFILL_TOKENS_MIN: Final = 256
"""Fewer prompt tokens between two reports say nothing: their time drowns in that of the steps."""
PREFILL_TOKENS_PER_S_MAX: Final = 1e7
"""An engine that prefills faster than can be measured is taken to be so fast."""

_STEP_WEIGHT = 0.1
_PREFILL_MEMORY = 0.9  # How much of what was known weighs as much as one more report.


class StepCost:
    """The cost model of one life of one engine."""

    def __init__(self) -> None:
        self.step_s: float | None = None
        """Of a step without prefill; None while unknown."""
        self._tokens = 0.0
        self._excess_s = 0.0
        self._last: tuple[int, int, int] | None = None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast prompt tokens are computed, beside everything else; None while unknown."""
        if not self._tokens:
            return None
        return self._tokens / max(self._excess_s, self._tokens / PREFILL_TOKENS_PER_S_MAX)

    def reported(self, load: worker_pb2.LoadReport) -> None:
        """The engine's load, later than the last one."""
        last = self._last
        here = (load.steps_us_total, load.engine_steps_total, load.prefill_tokens_total)
        self._last = here
        if last is None:
            return
        num_us, num_steps, num_tokens = (b - a for a, b in zip(last, here, strict=True))
        if num_steps <= 0 or num_tokens < 0 or num_us <= 0:
            return
        elapsed_s = num_us / 1e6
        if num_tokens == 0:
            sample_s = elapsed_s / num_steps
            if self.step_s is None:
                self.step_s = sample_s
            self.step_s += _STEP_WEIGHT * (sample_s - self.step_s)
        elif num_tokens >= PREFILL_TOKENS_MIN and self.step_s is not None:
            excess_s = elapsed_s - num_steps * self.step_s
            self._tokens = _PREFILL_MEMORY * self._tokens + num_tokens
            self._excess_s = _PREFILL_MEMORY * self._excess_s + excess_s
