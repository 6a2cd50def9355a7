"""When a silent sidecar is suspected, and when it is given up."""

import itertools
import math
from random import Random

import pytest

from frontend.failure_detector import (
    Death,
    DetectorLimits,
    FailureDetector,
    Liveness,
    Reach,
    Rhythm,
)
from unbroken.outcome import FailureKind
from unbroken.v1 import admin_service_pb2

LIMITS = DetectorLimits()
INTERVAL_S = LIMITS.heartbeat_interval_s


class Link:
    """A detector, and an owner that looks at it as a relay call does."""

    def __init__(self, rhythm: Rhythm | None = None, limits: DetectorLimits = LIMITS) -> None:
        self.now = 1000.0
        self._looks_at = math.inf
        self.rhythm = rhythm or Rhythm(limits.heartbeat_interval_s)
        self.detector = FailureDetector(limits, self.rhythm, self.now)
        self.sequence_seen = 0
        self.death: Death | None = None
        self.num_sent = 0
        self._beats_at = self.now + INTERVAL_S
        self._expect()

    def hear_heartbeat(self, sequence_seen: int | None = None) -> None:
        """From the sidecar; as if it heard everything, unless said otherwise."""
        seen = self.num_sent if sequence_seen is None else sequence_seen
        self.detector.heard(self.now)
        self.detector.heartbeat(seen, INTERVAL_S, self.now)

    def hear_frame(self) -> None:
        self.detector.heard(self.now)

    def pass_time(self, duration_s: float) -> None:
        """Time passes in which nothing comes and this process runs."""
        end = self.now + duration_s
        while self.death is None and self._looks_at <= end:
            self.now = self._looks_at
            self.look()
        self.now = max(self.now, end)

    def look(self) -> None:
        self.death = self.death or self.detector.judge(self.now)
        if self.now >= self._beats_at:
            self.num_sent += 1
            self._beats_at = self.now + INTERVAL_S
            self.detector.sent(self.num_sent, self.now)
        self._expect()

    def stand_still(self, duration_s: float) -> None:
        """Time passes in which this process does nothing at all."""
        self.now += duration_s

    def live(self, *intervals_s: float) -> None:
        """A heartbeat after each of these intervals."""
        for interval_s in intervals_s:
            self.pass_time(interval_s)
            self.hear_heartbeat()

    def silence_until(self, liveness: Liveness) -> float:
        """How long a silence makes it that."""
        begin = self.now
        while self.detector.liveness is not liveness:
            self.now = self._looks_at
            self.look()
            assert self.now < begin + 100
        return self.now - begin

    def _expect(self) -> None:
        looks_at = min(self._beats_at, self.detector.deadline())
        self._looks_at = max(self.now + 0.001, looks_at)
        self.detector.expects_to_look(self._looks_at)


def steady(num: int = 100) -> Link:
    link = Link()
    link.live(*[INTERVAL_S] * num)
    return link


def test_the_opinions_are_those_of_the_contract() -> None:
    names = {f"LIVENESS_{one.name}": one.value for one in Liveness}
    assert names == dict(admin_service_pb2.Liveness.items())


def test_a_quiet_link_that_falls_silent_is_suspected_and_given_up_within_a_second() -> None:
    link = steady()
    assert link.detector.liveness is Liveness.ALIVE
    assert link.silence_until(Liveness.SUSPECT) == pytest.approx(0.48, abs=0.01)
    assert link.death is None
    assert 0.8 < 0.48 + link.silence_until(Liveness.DEAD) < 0.95
    assert link.death is not None


def test_a_silence_that_ends_is_forgiven() -> None:
    link = steady()
    link.pass_time(0.8)
    assert link.detector.liveness is Liveness.SUSPECT
    link.hear_frame()
    assert link.detector.liveness is Liveness.ALIVE
    assert link.silence_until(Liveness.SUSPECT) == pytest.approx(0.48, abs=0.01)


def test_frames_are_signs_of_life_too() -> None:
    link = steady()
    for _ in range(100):
        link.pass_time(0.2)
        link.hear_frame()
    assert link.detector.liveness is Liveness.ALIVE


def test_frames_do_not_make_a_rhythm_seem_faster() -> None:
    link = steady()
    for _ in range(1000):
        link.pass_time(0.01)
        link.hear_frame()
        if link.now % 0.1 < 0.01:
            link.hear_heartbeat()
    assert 0.8 < link.silence_until(Liveness.DEAD) < 0.95


def test_jitter_that_was_learnt_raises_the_bound_and_a_quiet_time_lowers_it_again() -> None:
    random = Random(1)
    link = Link()
    link.live(*[random.uniform(0.0, 0.5) for _ in range(200)])
    jittery_s = link.detector.dead_after_s
    assert jittery_s > 1.0
    link.live(*[INTERVAL_S] * 200)
    assert link.detector.dead_after_s < 0.95 < jittery_s


def test_a_link_that_came_back_is_not_given_up_before_twice_that_silence() -> None:
    link = steady()
    link.live(0.7, *[INTERVAL_S] * 50)
    assert link.silence_until(Liveness.DEAD) == pytest.approx(1.4, abs=0.02)


def test_no_jitter_raises_the_bound_above_the_ceiling() -> None:
    rhythm = Rhythm(INTERVAL_S)
    for interval_s in (0.1, 1.9) * 100:
        rhythm.learn(interval_s)
    link = Link(rhythm)
    link.live(INTERVAL_S)
    assert link.silence_until(Liveness.DEAD) == pytest.approx(LIMITS.silence_max_s, abs=0.01)


def test_suspicion_comes_before_death_whatever_the_limits_are() -> None:
    link = Link(limits=DetectorLimits(silence_max_s=0.3))
    link.live(INTERVAL_S)
    assert link.silence_until(Liveness.SUSPECT) == pytest.approx(0.18, abs=0.01)
    assert link.silence_until(Liveness.DEAD) == pytest.approx(0.12, abs=0.01)


def test_what_was_learnt_survives_the_link() -> None:
    random = Random(1)
    link = Link()
    link.live(*[random.uniform(0.0, 0.5) for _ in range(200)])
    again = Link(link.rhythm)
    again.live(INTERVAL_S)
    assert again.detector.dead_after_s > 1.0


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_link_with_bounded_jitter_is_never_given_up(seed: int) -> None:
    # Heartbeats late by up to 0.6 s at any moment, for ten minutes.
    random = Random(seed)
    link = Link()
    due = link.now
    for _ in range(6000):
        due = max(due + INTERVAL_S, link.now)
        late_s = random.uniform(0.0, 0.6) if random.random() < 0.2 else 0.0
        link.pass_time(max(0.0, due + late_s - link.now))
        link.hear_heartbeat()
        assert link.death is None


def test_a_link_on_which_nothing_ever_came_has_until_the_ceiling() -> None:
    link = Link()
    assert link.detector.liveness is Liveness.UNSPECIFIED
    assert link.silence_until(Liveness.DEAD) == pytest.approx(LIMITS.silence_max_s, abs=0.01)


# What it died of.


@pytest.mark.parametrize(
    ("reach", "failure"),
    [
        (Reach.ANSWERS, FailureKind.HANG),
        (Reach.REFUSES, FailureKind.CRASH),
        (Reach.UNKNOWN, FailureKind.PARTITION),
    ],
)
def test_how_its_host_answers_tells_what_a_silence_is(reach: Reach, failure: FailureKind) -> None:
    link = steady()
    link.silence_until(Liveness.SUSPECT)
    link.detector.reached(reach)
    link.silence_until(Liveness.DEAD)
    assert link.death is not None
    assert link.death.failure is failure
    assert link.death.silence_s == pytest.approx(0.87, abs=0.02)


def test_an_answer_of_an_earlier_suspicion_does_not_count() -> None:
    link = steady()
    link.silence_until(Liveness.SUSPECT)
    link.detector.reached(Reach.ANSWERS)
    link.hear_frame()
    link.silence_until(Liveness.DEAD)
    assert link.death is not None
    assert link.death.failure is FailureKind.PARTITION


def test_a_sidecar_that_is_heard_and_hears_nothing_is_cut_off() -> None:
    link = steady()
    deaf_since = link.now
    seen = 99
    suspected_at = math.inf
    while link.death is None:
        link.pass_time(INTERVAL_S)
        link.hear_heartbeat(seen)
        link.hear_frame()
        if link.detector.liveness is Liveness.SUSPECT:
            suspected_at = min(suspected_at, link.now)
        assert link.now < deaf_since + 10
    assert link.death.failure is FailureKind.PARTITION
    assert "has heard nothing" in link.death.detail
    assert link.now - deaf_since < 1.3
    assert suspected_at < link.now - 0.2


def test_a_sidecar_that_hears_again_is_trusted_again() -> None:
    link = steady()
    seen = 99
    for _ in range(8):
        link.pass_time(INTERVAL_S)
        link.hear_heartbeat(seen)
    assert link.detector.liveness is Liveness.SUSPECT
    link.live(*[INTERVAL_S] * 3)
    assert link.detector.liveness is Liveness.ALIVE
    assert link.death is None


def test_a_heartbeat_that_waited_behind_much_else_is_no_sign_of_deafness() -> None:
    link = steady()
    sent_at = link.now
    seen: list[int] = []
    while not seen or link.now - sent_at > 0.05:  # Until all that waited has been read.
        seen.append(link.num_sent)  # What it had heard when it sent this one.
        sent_at += INTERVAL_S
        # While many streams come, reading falls behind, to 1.4 s; then it catches up.
        link.pass_time(2 * INTERVAL_S if len(seen) <= 14 else INTERVAL_S / 10)
        behind = round(max(0.0, link.now - sent_at) / INTERVAL_S)
        link.hear_heartbeat(max(99, link.num_sent - behind - 1))
        assert link.death is None
        assert link.detector.liveness is not Liveness.DEAD
    assert max(seen) > 120
    link.live(*[INTERVAL_S] * 40)
    assert link.detector.deaf_s == 0.0


def test_reading_late_hides_no_deafness_for_long() -> None:
    link = steady()
    for _ in range(10):
        link.pass_time(2 * INTERVAL_S)
        link.hear_heartbeat(link.num_sent - 10)
    deaf_since, seen = link.now, link.num_sent
    while link.death is None:
        link.pass_time(INTERVAL_S)
        link.hear_heartbeat(seen)
        assert link.now < deaf_since + 10
    assert link.death.failure is FailureKind.PARTITION
    assert link.now - deaf_since < LIMITS.silence_max_s + 3 * INTERVAL_S


# This process stands still.


@pytest.mark.parametrize("first", ["look", "hear"])
def test_whoever_stood_still_itself_judges_nobody_by_it(first: str) -> None:
    link = steady()
    link.pass_time(0.05)
    link.stand_still(30.0)
    if first == "hear":
        link.hear_heartbeat(sequence_seen=98)  # It had been sent before; more are to be read.
    link.look()
    assert link.death is None
    assert link.detector.liveness is Liveness.ALIVE
    link.hear_heartbeat()
    assert link.detector.dead_after_s < 0.95  # Nor is it learnt.
    link.pass_time(0.3)
    assert link.detector.liveness is Liveness.ALIVE


def test_after_a_standstill_there_is_time_to_read_what_came() -> None:
    link = steady()
    link.pass_time(0.8)
    assert link.detector.liveness is Liveness.SUSPECT
    link.stand_still(5.0)
    link.look()
    link.pass_time(INTERVAL_S * 0.9)
    assert link.death is None
    link.hear_frame()
    assert link.detector.liveness is Liveness.ALIVE


def test_a_standstill_does_not_hide_a_death() -> None:
    link = steady()
    link.pass_time(0.4)
    link.stand_still(5.0)
    link.look()
    assert link.silence_until(Liveness.DEAD) < 0.6


def test_being_slow_all_the_time_hides_no_death_either() -> None:
    link = steady()
    begin = link.now
    for _ in itertools.count():
        link.pass_time(0.0)
        link.stand_still(0.2)  # Twice as late as it should be, for ever.
        link.look()
        if link.death is not None:
            break
    assert link.now - begin < 2 * LIMITS.silence_max_s
