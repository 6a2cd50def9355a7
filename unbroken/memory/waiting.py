"""Decides whether an answer is waited for awake or asleep: as was faster lately.

Where the service runs on another core, who stays awake has its answer some 30 µs before who has to
be woken up. Where the kernel has put both on one core, who stays awake is in its way, and waits
twice as long as who makes room. Nobody can tell before, and it changes with whatever else runs: so
the slower way is tried now and then, and the less often the longer it has been the slower one.
"""

TRIED_EVERY = 31
"""Calls, one of which is made in the slower way, after the faster one has changed,"""
TRIED_EVERY_MAX = 16 * TRIED_EVERY
"""and when it has not for long."""
FIRST_TRIED = 8
"""Calls of a client that are made in turns."""
_WEIGHT, _WEIGHT_TRIED = 1 / 8, 1 / 2
"""Of the last call, in what is remembered of all; and of one that is made to try."""
_OUTLIER = 2.0
"""Times what is usual: what takes longer counts as that."""


class Waiting:
    """One client's, for its calls of one kind.

    What raises is begun and not ended, and counts nothing.
    """

    __slots__ = (
        "_awake_s_max",
        "_calls_left",
        "_is_awake",
        "_is_trial",
        "_num_ended",
        "_tried_every",
        "_usual",
    )

    def __init__(self, awake_s_max: float) -> None:
        """`awake_s_max` is how long it stays awake at most; 0: never."""
        self._awake_s_max = awake_s_max
        self._is_awake = False
        self._is_trial = False
        self._num_ended = 0
        self._tried_every = self._calls_left = TRIED_EVERY
        self._usual = {True: awake_s_max, False: awake_s_max}
        """Seconds that a call takes, by whether it was waited for awake."""

    def begin(self) -> float:
        """For so many seconds the answer of the next call is waited for awake."""
        if not self._awake_s_max:
            return 0.0
        if self._num_ended < FIRST_TRIED:
            self._is_trial, self._is_awake = True, self._num_ended % 2 == 0
        else:
            self._calls_left -= 1
            self._is_trial = self._calls_left <= 0
            self._is_awake = self._is_faster_awake ^ self._is_trial
        return self._awake_s_max if self._is_awake else 0.0

    def ended(self, took_s: float) -> None:
        """So long that call took."""
        if not self._awake_s_max:
            return
        self._num_ended += 1
        was_faster_awake = self._is_faster_awake
        before = self._usual[self._is_awake]
        weight = _WEIGHT_TRIED if self._is_trial else _WEIGHT
        self._usual[self._is_awake] += weight * (min(took_s, _OUTLIER * before) - before)
        if self._is_faster_awake != was_faster_awake or self._num_ended <= FIRST_TRIED:
            self._tried_every = self._calls_left = TRIED_EVERY
        elif self._is_trial:
            self._tried_every = min(2 * self._tried_every, TRIED_EVERY_MAX)
            self._calls_left = self._tried_every

    @property
    def _is_faster_awake(self) -> bool:
        # Who stays awake in vain, since answers come later, has nothing of it.
        return self._usual[True] < min(self._usual[False], self._awake_s_max)
