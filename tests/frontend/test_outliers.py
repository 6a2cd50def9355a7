"""Which workers are kept out of placement, for how long, and how they come back."""

import itertools
from collections.abc import Iterable
from random import Random

import pytest

from frontend.outliers import Command, Eject, OutlierLimits, Outliers, Probe, Readmit
from unbroken.outcome import FailureKind

ENGINE_ERROR = FailureKind.ENGINE_ERROR
LIMITS = OutlierLimits()


class Fleet:
    """So many workers of one model, all ready."""

    def __init__(self, num_workers: int, limits: OutlierLimits = LIMITS, seed: int = 0) -> None:
        self.workers = [f"w{number}" for number in range(1, num_workers + 1)]
        self.outliers = Outliers(limits, Random(seed))
        self.now = 100.0
        self.ready(*self.workers)

    def ready(self, *workers: str) -> None:
        self.outliers.members(dict.fromkeys(workers, "m"), self.workers)

    def fail(self, worker: str, times: int = 3, kind: FailureKind = ENGINE_ERROR) -> list[Command]:
        """Failed attempts, well apart."""
        commands: list[Command] = []
        for _ in range(times):
            self.now += 2.0
            commands += self.outliers.failed(worker, kind, self.now)
        return commands

    def serve(
        self, slow: Iterable[str] = (), *, itl_s: float = 0.05, seconds: int = 10
    ) -> list[Command]:
        """Every worker serves at 10 ms a token, the slow ones at `itl_s`."""
        commands: list[Command] = []
        for _ in range(seconds):
            for half in (0.0, 0.5):
                for index, worker in enumerate(self.workers):
                    latency_s = itl_s if worker in slow else 0.010 + 0.0002 * index
                    self.outliers.inter_token(worker, latency_s, self.now + half)
            commands += self.pass_time(1.0)
        return commands

    def pass_time(self, seconds: float) -> list[Command]:
        commands: list[Command] = []
        for _ in range(int(seconds)):
            self.now += 1.0
            commands += self.outliers.handle_timeout(self.now)
            self.outliers.check()
        return commands

    def until_probe(self, worker: str) -> Probe:
        begin = self.now
        while self.now < begin + 1000:
            for command in self.pass_time(1.0):
                if isinstance(command, Probe) and command.worker_id == worker:
                    return command
        raise AssertionError("no probe")

    def answer(self, probe: Probe, *, is_good: bool) -> list[Command]:
        return self.outliers.probed(
            probe.worker_id, probe.number, is_good=is_good, detail="as asked", now=self.now
        )


# Failures.


def test_a_worker_that_fails_three_attempts_in_a_row_is_ejected() -> None:
    fleet = Fleet(4)
    assert fleet.fail("w1", 2) == []
    (eject,) = fleet.fail("w1", 1)
    assert isinstance(eject, Eject)
    assert eject.worker_id == "w1"
    assert "3 of its latest 3 attempts failed; the last: ENGINE_ERROR" in eject.detail
    assert fleet.outliers.ejected == {"w1"}


def test_an_attempt_that_goes_well_breaks_the_row() -> None:
    fleet = Fleet(4)
    for _ in range(4):
        assert fleet.fail("w1", 2) == []
        for _ in range(4):
            fleet.outliers.went_well("w1")
    assert not fleet.outliers.ejected


def test_a_worker_that_fails_every_other_attempt_is_ejected_too() -> None:
    fleet = Fleet(4)
    commands: list[Command] = []
    for _ in range(12):
        fleet.outliers.went_well("w1")
        commands += fleet.fail("w1", 1)
    assert [type(command) for command in commands] == [Eject]


def test_a_crash_under_forty_streams_is_one_failure() -> None:
    fleet = Fleet(4)
    for kind in (FailureKind.CRASH, FailureKind.STALL):
        for _ in range(40):
            assert fleet.outliers.failed("w1", kind, fleet.now) == []
        fleet.now += 10
    assert not fleet.outliers.ejected


@pytest.mark.parametrize(
    "kind",
    [
        FailureKind.HANG,
        FailureKind.PARTITION,
        FailureKind.DRAIN,
        FailureKind.OVERLOAD,
        FailureKind.PREEMPTED,
        FailureKind.FENCED,
        FailureKind.REJECTED,
    ],
)
def test_what_is_not_the_workers_fault_does_not_count(kind: FailureKind) -> None:
    fleet = Fleet(4)
    assert fleet.fail("w1", 20, kind) == []


# Slowness.


@pytest.mark.parametrize("itl_s", [0.05, 0.5])
def test_a_worker_far_slower_than_its_peers_is_ejected_within_ten_seconds(itl_s: float) -> None:
    fleet = Fleet(4)
    fleet.serve(seconds=5)
    begin = fleet.now
    (eject,) = fleet.serve(["w3"], itl_s=itl_s)
    assert isinstance(eject, Eject)
    assert eject.worker_id == "w3"
    assert "inter-token latency" in eject.detail
    assert fleet.now - begin <= 10


def test_a_worker_twice_as_slow_is_not() -> None:
    fleet = Fleet(4)
    assert fleet.serve(["w3"], itl_s=0.02, seconds=60) == []


def test_a_fleet_whose_workers_all_differ_has_no_outlier() -> None:
    fleet = Fleet(5)
    for second in range(30):
        for worker, itl_s in zip(fleet.workers, (0.005, 0.01, 0.02, 0.04, 0.07), strict=True):
            fleet.outliers.inter_token(worker, itl_s, fleet.now + second / 100)
        assert fleet.pass_time(1.0) == []


def test_with_too_few_peers_nobody_is_slow() -> None:
    fleet = Fleet(3)
    assert fleet.serve(["w3"], itl_s=0.5) == []


def test_old_samples_are_no_measure() -> None:
    fleet = Fleet(4)
    for _ in range(6):
        fleet.outliers.inter_token("w3", 0.5, fleet.now)
    fleet.pass_time(11)
    assert fleet.serve(seconds=5) == []


def test_time_to_first_token_is_judged_by_the_tokens_to_compute() -> None:
    fleet = Fleet(4)

    def first_tokens(slow: str | None, seconds: int) -> list[Command]:
        commands: list[Command] = []
        for _ in range(seconds):
            for index, worker in enumerate(fleet.workers):
                # Prompts of very different length, at 10,000 tokens a second.
                num_tokens = (200, 4000, 16000, 900)[(index + int(fleet.now)) % 4]
                ttft_s = max(num_tokens, 256) / 10_000
                fleet.outliers.first_token(
                    worker, ttft_s * (20 if worker == slow else 1), num_tokens, fleet.now
                )
            commands += fleet.pass_time(1.0)
        return commands

    assert first_tokens(None, 20) == []
    (eject,) = first_tokens("w2", 10)
    assert isinstance(eject, Eject)
    assert eject.worker_id == "w2"
    assert "time to first token" in eject.detail


# The way back.


def test_an_ejected_worker_is_probed_when_its_time_is_up_and_readmitted_if_that_goes_well() -> None:
    fleet = Fleet(4)
    (eject,) = fleet.fail("w1")
    assert isinstance(eject, Eject)
    begin = fleet.now
    probe = fleet.until_probe("w1")
    assert eject.duration_s <= fleet.now - begin <= eject.duration_s + 1
    ejection = fleet.outliers.ejection("w1")
    assert ejection is not None
    assert ejection.until is None
    assert fleet.outliers.ejected == {"w1"}  # Half-open is not open.
    assert fleet.answer(probe, is_good=True) == [Readmit("w1")]
    assert not fleet.outliers.ejected
    assert fleet.fail("w1", 2) == []  # It begins anew.


def test_each_ejection_in_a_row_is_twice_as_long_up_to_a_limit() -> None:
    fleet = Fleet(4)
    (eject,) = fleet.fail("w1")
    durations: list[float] = []
    for _ in range(9):
        assert isinstance(eject, Eject)
        durations.append(eject.duration_s)
        (eject,) = fleet.answer(fleet.until_probe("w1"), is_good=False)
    for number, duration_s in enumerate(durations):
        nominal_s = min(5.0 * 2**number, 300.0)
        assert 0.8 * nominal_s <= duration_s <= 1.2 * nominal_s


def test_a_relapse_after_a_readmission_goes_on_where_it_was_unless_it_is_long_ago() -> None:
    fleet = Fleet(4)
    fleet.fail("w1")
    fleet.answer(fleet.until_probe("w1"), is_good=True)
    (eject,) = fleet.fail("w1")
    assert isinstance(eject, Eject)
    assert eject.duration_s >= 8.0
    fleet.answer(fleet.until_probe("w1"), is_good=True)
    fleet.pass_time(LIMITS.forgiven_after_s + 1)
    (eject,) = fleet.fail("w1")
    assert isinstance(eject, Eject)
    assert eject.duration_s <= 6.0


def test_a_probe_without_an_answer_is_a_bad_one() -> None:
    fleet = Fleet(4)
    fleet.fail("w1")
    probe = fleet.until_probe("w1")
    (eject,) = fleet.pass_time(5)
    assert isinstance(eject, Eject)
    assert "no answer for 5 s" in eject.detail
    assert fleet.answer(probe, is_good=True) == []  # Late news.
    assert fleet.outliers.ejected == {"w1"}


def test_a_worker_that_is_not_ready_is_not_probed_before_it_is() -> None:
    fleet = Fleet(4)
    fleet.fail("w1")
    fleet.ready("w2", "w3", "w4")
    assert fleet.pass_time(60) == []
    fleet.ready(*fleet.workers)
    assert [type(command) for command in fleet.pass_time(1)] == [Probe]


def test_a_worker_that_is_gone_is_forgotten() -> None:
    fleet = Fleet(4)
    fleet.fail("w1")
    fleet.workers.remove("w1")
    fleet.ready(*fleet.workers)
    assert fleet.outliers.ejection("w1") is None
    assert fleet.outliers.num_ejected == 0


# The ceiling, and panic.


@pytest.mark.parametrize("num_workers", range(1, 9))
def test_never_more_than_half_is_ejected_and_never_the_last(num_workers: int) -> None:
    fleet = Fleet(num_workers)
    most = 0
    for worker in fleet.workers:
        fleet.fail(worker)
        most = max(most, fleet.outliers.num_ejected)
    assert most == num_workers // 2


def test_when_most_look_bad_ejections_are_ignored_until_fewer_do() -> None:
    fleet = Fleet(4)
    for worker in ("w1", "w2"):
        fleet.fail(worker)
    assert fleet.outliers.ejected == {"w1", "w2"}
    fleet.fail("w3")
    assert fleet.outliers.ejected == frozenset()  # It is not the workers.
    assert fleet.outliers.num_panicking == 1
    assert fleet.outliers.ejection("w1") is not None
    fleet.outliers.went_well("w3")
    assert fleet.outliers.ejected == {"w1", "w2"}


def test_when_all_others_are_gone_an_ejected_worker_is_used() -> None:
    fleet = Fleet(2)
    fleet.fail("w1")
    assert fleet.outliers.ejected == {"w1"}
    fleet.ready("w1")
    assert fleet.outliers.ejected == frozenset()


def test_models_do_not_share_a_ceiling() -> None:
    fleet = Fleet(4)
    fleet.outliers.members({"w1": "a", "w2": "a", "w3": "b", "w4": "b"}, fleet.workers)
    for worker in fleet.workers:
        fleet.fail(worker)
    assert fleet.outliers.num_ejected == 2
    assert fleet.outliers.num_panicking == 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_somebody_is_left(seed: int) -> None:
    random = Random(seed)
    fleet = Fleet(5, seed=seed)
    probes: list[Probe] = []
    for _ in itertools.repeat(None, 2000):
        fleet.now += random.random()
        worker = random.choice(fleet.workers)
        match random.randrange(6):
            case 0 | 1:
                commands = fleet.outliers.failed(
                    worker, random.choice(list(FailureKind)), fleet.now
                )
            case 2:
                fleet.outliers.went_well(worker)
                commands = []
            case 3:
                fleet.outliers.inter_token(worker, random.random(), fleet.now)
                commands = []
            case 4:
                fleet.ready(*random.sample(fleet.workers, random.randint(1, 5)))
                commands = []
            case _:
                commands = fleet.outliers.handle_timeout(fleet.now)
        probes += [command for command in commands if isinstance(command, Probe)]
        if probes and random.random() < 0.2:
            fleet.answer(probes.pop(0), is_good=random.random() < 0.5)
        fleet.outliers.check()
        fleet.ready(*fleet.workers)
        assert len(fleet.outliers.ejected) <= 2
