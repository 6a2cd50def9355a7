"""The time of day as each host has it: wrong by an offset of its own, and set at any moment.

Hosts disagree by milliseconds to seconds, as they do under NTP. Then somebody sets a clock, a
machine resumes from a suspension, or a leap second is smeared: by milliseconds, seconds, hours,
years, forwards or backwards. Virtual time itself (`World.now`), which stands for monotonic clocks,
does not notice.
"""

from random import Random
from typing import Final

from tests.support.world import World

START_S: Final = 1_800_000_000.0
"""The true time of day at the beginning, in seconds since 1970."""
_HOUR_S: Final = 3600.0
_YEAR_S: Final = 365.25 * 24 * _HOUR_S
_OFFSETS_S: Final = (0.0, 0.0, 0.002, 0.03, 0.5, 20.0)
"""How wrong clocks are that nobody has set."""
_STEPS_S: Final = (0.001, 0.02, 0.3, 1.0, 30.0, 200.0, 0.4 * _HOUR_S, _HOUR_S, 9 * _HOUR_S, _YEAR_S)
_FAR_YEARS: Final = 200
"""Before 1970, and beyond the year up to which epochs count the time."""


class Clock:
    """The time of day on one host."""

    def __init__(self, world: World, offset_s: float) -> None:
        self._world = world
        self.offset_s = offset_s
        """How much it is ahead of the true time."""

    def now(self) -> float:
        """Seconds since 1970, as this host believes."""
        return START_S + self._world.now + self.offset_s

    def now_ms(self) -> int:
        """The same in milliseconds."""
        return int(self.now() * 1000)

    def now_us(self) -> int:
        """The same in microseconds."""
        return int(self.now() * 1_000_000)


class Clocks:
    """The clocks of all hosts, and when they are set. By a randomness of their own."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._random = random = Random(seed ^ 0x0C10C)
        self.are_wrong = random.random() < 0.5
        num_steps = random.choice((0, 1, 2, 4, 8)) if self.are_wrong else 0
        self.steps = sorted(random.uniform(0.0, 1.2) for _ in range(num_steps))
        """When a clock is set."""
        self.num_moves = random.choice((0, 1, 2, 3)) if self.are_wrong else 0
        """So many more times frontends lose their clients: only then do clocks matter much."""

    def new(self) -> Clock:
        """The clock of another host."""
        random = self._random
        offset_s = 0.0
        if self.are_wrong:
            offset_s = random.choice(_OFFSETS_S) * random.uniform(-1.0, 1.0)
        return Clock(self._world, offset_s)

    def breaks_off_after_s(self) -> float | None:
        """How long a call to resume lives; None if nothing happens to it."""
        random = self._random
        if not self.num_moves or random.random() < 0.6:
            return None
        return random.choice((0.002, 0.01, 0.03, 0.3))

    def choose(self, num: int) -> int:
        """Whose clock is set."""
        return self._random.randrange(num)

    def set(self, clock: Clock) -> float:
        """Set it: right again, or wrong by more or less; returns by how much."""
        random, before_s = self._random, clock.offset_s
        if random.random() < 0.25:
            clock.offset_s = 0.0
        elif random.random() < 0.05:
            clock.offset_s = random.choice((-1, 1)) * _FAR_YEARS * _YEAR_S
        else:
            clock.offset_s += random.choice(_STEPS_S) * random.choice((-1.0, 1.0))
        return clock.offset_s - before_s
