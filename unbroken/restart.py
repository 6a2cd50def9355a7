"""Decides after each life of a process whether and when the next one begins. No I/O."""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process is started again, and when it is given up. Times in seconds."""

    backoff_initial_s: float = 0.1
    """Wait after the first short life; after a healthy one there is none."""
    backoff_factor: float = 2.0
    """How much longer the wait is after each further short life."""
    backoff_max_s: float = 10.0
    healthy_after_s: float = 10.0
    """A life that served for less is short. Loading a model is not serving."""
    crash_loop_limit: int = 5
    """So many short lives in a row, ending within the window, and the process is given up."""
    crash_loop_window_s: float = 60.0
    """A process that takes longer for them is tried for ever, since it burns little."""


class Restarts:
    """The lives of one process. `now` and `served_since` are monotonic seconds."""

    def __init__(self, policy: RestartPolicy) -> None:
        assert policy.crash_loop_limit >= 1, "no life is no process"
        self._policy = policy
        self._backoff_s = policy.backoff_initial_s
        self._short_ends: deque[float] = deque(maxlen=policy.crash_loop_limit)

    def life_ended(self, *, served_since: float | None, now: float) -> float | None:
        """Seconds until the next life begins; None: it crashes in a loop, give it up.

        `served_since` is None if the life never came to serving.
        """
        policy = self._policy
        if served_since is not None and now - served_since >= policy.healthy_after_s:
            self._short_ends.clear()
            self._backoff_s = policy.backoff_initial_s
            return 0.0
        self._short_ends.append(now)
        is_full = len(self._short_ends) == policy.crash_loop_limit
        if is_full and now - self._short_ends[0] <= policy.crash_loop_window_s:
            return None
        backoff_s = min(self._backoff_s, policy.backoff_max_s)
        self._backoff_s = min(self._backoff_s * policy.backoff_factor, policy.backoff_max_s)
        return backoff_s
