"""What the canary decides, and what it makes of an engine, on a clock that a test moves."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sidecar.canary import (
    LEFT_MIN,
    PATIENCE,
    Abandon,
    Canary,
    CanaryPolicy,
    Command,
    Failing,
    Probe,
    Unfit,
    Well,
)
from sidecar.canary_watch import CanaryWatch
from sidecar.watchdog import LOOK_INTERVAL_S
from tests.sidecar.fakes import Desk, engine_up, failed
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer, asset_to_proto
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from worker import simulated_tokenizer

PERIOD_S = 1.0
TIMEOUT_S = 0.5
LOOK_S = 1 / 16
"""Between two looks; times that add up exactly."""
POLICY = CanaryPolicy(period_s=PERIOD_S, timeout_s=TIMEOUT_S, failures_max=3)
STALLED = worker_pb2.ENGINE_STATE_STALLED
SERVING = worker_pb2.ENGINE_STATE_SERVING


class Clock:
    """A canary and the time in which it looks."""

    def __init__(self, policy: CanaryPolicy = POLICY, *, num_ranks: int = 1) -> None:
        self.now = 50.0
        self.canary = Canary(policy)
        assert self.canary.up(self.now, num_ranks=num_ranks, is_repeatable=True) == []

    def after(self, duration_s: float, *, is_guarded: bool = False) -> list[Command]:
        """What it says in so long."""
        said: list[Command] = []
        for _ in range(round(duration_s / LOOK_S)):
            self.now += LOOK_S
            said += self.canary.look(self.now, is_guarded=is_guarded)
            self.canary.check()
        return said

    def asked(self) -> int:
        """The number of the probe, once there is one."""
        (probe,) = self.after(PERIOD_S)
        assert isinstance(probe, Probe)
        return probe.number


def kinds(commands: Sequence[Command]) -> list[type[Command]]:
    return [type(command) for command in commands]


def test_an_engine_that_is_used_is_never_asked() -> None:
    it = Clock()
    for _ in range(100):
        assert it.after(PERIOD_S * 0.9) == []
        assert it.canary.progressed() == []
    assert it.after(1000, is_guarded=True) == [], "the watchdog waits for its step"


def test_an_idle_one_is_asked_every_period_and_an_answer_is_all_that_it_takes() -> None:
    it = Clock()
    for number in range(1, 6):
        assert it.after(PERIOD_S) == [Probe(number, 0)]
        assert it.after(TIMEOUT_S * 0.8) == []
        assert it.canary.answered(number, 7) == []
    assert it.canary.num_failures == 0


def test_one_that_gives_no_token_fails_within_two_periods_and_is_given_up_after_three() -> None:
    it = Clock()
    said = it.after(2 * PERIOD_S)
    assert kinds(said[:3]) == [Probe, Abandon, Failing]
    assert it.canary.is_failing
    said += it.after(10 * PERIOD_S)
    assert [one for one in kinds(said) if one in (Failing, Unfit)] == [Failing, Unfit]
    assert kinds(said).count(Probe) == 3, "who is given up is asked no more"


def test_any_token_of_any_stream_is_an_answer() -> None:
    it = Clock()
    it.asked()
    it.after(TIMEOUT_S * 0.8)
    assert it.canary.progressed() == []
    assert it.after(TIMEOUT_S * 0.8) == []


def test_one_that_goes_on_serves_again_and_old_failures_are_forgotten() -> None:
    it = Clock()
    it.after(2 * PERIOD_S)
    assert it.canary.progressed() == [Well()]
    assert Unfit not in kinds(it.after(2 * PERIOD_S)), "they would be three in a row"


def test_one_that_has_no_room_for_a_probe_has_work() -> None:
    it = Clock()
    assert it.canary.deferred(it.asked()) == []
    assert it.after(PERIOD_S * 0.9) == []
    assert not it.canary.is_failing


def test_an_end_without_a_token_is_no_answer() -> None:
    it = Clock()
    (failing,) = it.canary.ended(it.asked(), "an out of memory")
    assert failing == Failing(FailureKind.ENGINE_ERROR, "expected a token, got an out of memory")


def test_another_token_than_always_is_garbage_and_only_the_right_one_makes_up_for_it() -> None:
    it = Clock()
    assert it.canary.answered(it.asked(), 7) == []
    (failing,) = it.canary.answered(it.asked(), 8)
    assert failing == Failing(FailureKind.DIVERGED, "expected token 7, as always, got 8")
    assert it.canary.progressed() == []
    (probe,) = it.after(PERIOD_S / 2)
    assert isinstance(probe, Probe)
    assert it.canary.answered(probe.number, 7) == [Well()]


def test_an_engine_whose_answers_depend_on_chance_may_give_any() -> None:
    canary = Canary(POLICY)
    canary.up(0.0, num_ranks=1, is_repeatable=False)
    for number, token_id in ((1, 7), (2, 8)):
        for look in range(20):
            canary.look(number * 100 + look * LOOK_S, is_guarded=False)
        assert canary.answered(number, token_id) == []


def test_each_rank_is_asked_for_itself() -> None:
    it = Clock(num_ranks=2)
    one, two = it.after(PERIOD_S)
    assert (one, two) == (Probe(1, 0), Probe(2, 1))
    it.canary.answered(1, 7)
    said = it.after(TIMEOUT_S)
    assert kinds(said) == [Abandon, Failing]
    assert isinstance(said[1], Failing)
    assert said[1].detail.startswith("rank 1 ")


def test_a_rank_that_stands_still_while_others_go_on_is_found_later() -> None:
    clock = Clock(num_ranks=2)
    said: list[Command] = []
    for _ in range(round(PATIENCE * (PERIOD_S + TIMEOUT_S) / LOOK_S) + 1):
        clock.canary.progressed({0})
        said += clock.after(LOOK_S)
    assert kinds(said) == [Probe, Abandon, Failing]
    assert [one.rank for one in said if isinstance(one, Probe)] == [1]
    assert clock.canary.progressed({0}) == [], "the others speak for themselves"
    assert kinds(clock.canary.progressed({1})) == [Well]


def test_an_engine_that_does_not_tell_its_ranks_apart_is_believed_of_all() -> None:
    clock = Clock(num_ranks=2)
    for _ in range(100):
        clock.canary.progressed()
        assert clock.after(LOOK_S) == []


def test_one_that_is_never_given_up_is_not_asked_without_end() -> None:
    clock = Clock(CanaryPolicy(period_s=PERIOD_S, timeout_s=TIMEOUT_S, failures_max=0))
    num_left = 0
    for _ in range(round(60 / LOOK_S)):
        clock.now += LOOK_S
        said = clock.canary.look(clock.now, is_guarded=False, num_left=num_left)
        num_left += sum(isinstance(one, Abandon) for one in said)
    assert num_left == LEFT_MIN
    assert clock.canary.is_failing
    (probe,) = clock.after(LOOK_S)  # It has let go of them.
    assert isinstance(probe, Probe)


def test_a_new_life_begins_anew_and_may_answer_otherwise() -> None:
    it = Clock()
    it.canary.answered(it.asked(), 7)
    it.after(2 * PERIOD_S)
    assert it.canary.down() == [Well()]
    assert it.canary.up(it.now, num_ranks=1, is_repeatable=True) == []
    assert it.canary.answered(it.asked(), 8) == []


def test_a_period_of_zero_asks_nobody() -> None:
    it = Clock(CanaryPolicy(period_s=0))
    assert it.after(100) == []


def test_our_own_standstill_is_not_the_engines() -> None:
    it = Clock()
    it.asked()
    it.now += 1000
    assert it.canary.look(it.now, is_guarded=False) == []


# With a hub and an engine.


class Watched:
    """A desk whose engine is watched."""

    def __init__(self, text: str = "", tokenizer: worker_pb2.Tokenizer | None = None) -> None:
        self.desk = Desk(is_up=tokenizer is None)
        if tokenizer is not None:
            self.desk.hub.on_up(replace(engine_up(), tokenizer=tokenizer))
        self.frontend = self.desk.frontend()
        self.is_unfit = False
        self.watch = CanaryWatch(
            self.desk.hub, Canary(POLICY), name="1", text=text, on_unfit=self._unfit
        )
        self.num_steps = 0

    def _unfit(self) -> None:
        self.is_unfit = True

    def after(self, duration_s: float, *, running: int = 0, steps: bool = False) -> None:
        """Time passes in which the engine says that it lives, and what it has to do."""
        for look in range(round(duration_s / LOOK_INTERVAL_S)):
            self.desk.now += LOOK_INTERVAL_S
            if look % 4 == 0:
                self.num_steps += steps
                self.desk.say(running=running, num_steps=self.num_steps, prefilled=1)
            self.desk.hub.watch()
            self.watch.look()

    def state(self) -> int:
        """What the frontend was told last; it is welcomed with SERVING."""
        self.frontend.read()
        verdicts = self.frontend.verdicts
        return verdicts[-1].state if verdicts else self.frontend.welcome.state

    def probes(self) -> list[attempt_pb2.StartAttempt]:
        return [start for start in self.desk.engine.started if start.is_probe]


def test_an_idle_engine_is_asked_for_one_token_that_nobody_counts() -> None:
    it = Watched()
    it.after(PERIOD_S + 0.1)
    probe, other = it.probes()
    assert (probe.rank, other.rank) == (0, 1)
    params = probe.checkpoint.params
    assert list(probe.checkpoint.prompt_token_ids) == [1]
    assert (params.stopping.max_tokens, params.sampling.temperature) == (1, 0.0)
    assert not it.desk.hub.has_requests
    assert it.desk.hub.num_left == 0
    it.desk.step({probe.slot: 5, other.slot: 5})
    length = generation_pb2.FINISH_REASON_LENGTH
    for one in (probe, other):
        it.desk.end(attempt_pb2.AttemptEnded(slot=one.slot, end_offset=1, finish_reason=length))
    it.after(0.1)
    hub = it.desk.hub
    assert (hub.num_tokens, hub.num_relayed) == (2, 0)
    assert hub.num_drained == hub.num_handed_over == 0
    assert it.state() == SERVING
    it.desk.check()


@pytest.mark.parametrize("steps", [False, True], ids=["idle", "at work"])
def test_one_that_lies_is_found_whatever_it_says_to_do(steps: bool) -> None:
    it = Watched()
    slot = it.frontend.start(prompt=[1, 2, 3])
    it.after(2 * PERIOD_S + 0.1, running=int(steps), steps=steps)
    assert it.state() == STALLED
    assert it.frontend.verdicts[-1].failure == worker_pb2.FAILURE_KIND_STALL
    assert "canary" in it.frontend.verdicts[-1].detail
    assert not it.desk.hub.takes_work
    late = it.frontend.start("late")
    it.frontend.read()
    assert late in it.frontend.refused
    assert slot not in it.frontend.ended, "its frontend decides what becomes of its streams"


def test_a_step_that_takes_longer_than_the_canarys_time_is_no_failure() -> None:
    it = Watched()
    it.frontend.start(prompt=[1, 2, 3])
    it.after(20 * PERIOD_S, running=1)
    assert it.state() == SERVING
    assert it.probes() == []


def test_work_that_comes_while_it_is_asked_takes_its_time() -> None:
    it = Watched()
    it.after(PERIOD_S + 0.1)
    it.frontend.start(prompt=[1, 2, 3])
    it.after(20 * PERIOD_S, running=1)
    assert it.state() == SERVING


def test_one_that_answers_again_serves_again() -> None:
    it = Watched()
    it.after(2 * PERIOD_S)
    assert it.state() == STALLED
    it.after(PERIOD_S / 2)
    it.desk.step({probe.slot: 5 for probe in it.probes()[-2:]})
    it.after(0.1)
    assert it.state() == SERVING
    assert it.desk.hub.takes_work
    assert not it.is_unfit


def test_one_that_never_answers_is_given_up_but_not_while_it_drains() -> None:
    it = Watched()
    it.after(5 * PERIOD_S)
    assert it.is_unfit
    it = Watched()
    it.desk.hub.drain(None)
    it.after(5 * PERIOD_S)
    assert not it.is_unfit


def test_a_probe_that_finds_no_room_is_no_failure() -> None:
    it = Watched()
    it.after(PERIOD_S + 0.1)
    refused = [
        attempt_pb2.AttemptRefused(slot=probe.slot, kind=worker_pb2.FAILURE_KIND_OVERLOAD)
        for probe in it.probes()
    ]
    it.desk.hub.on_frame(attempt_pb2.StepFrame(refused=refused))
    it.after(0.5)
    assert it.state() == SERVING


def test_a_probe_that_fails_is_not_the_fault_of_a_request() -> None:
    it = Watched()
    it.after(PERIOD_S + 0.1)
    probe, _ = it.probes()
    it.desk.end(failed(probe.slot, 0, FailureKind.ENGINE_ERROR))
    it.after(0.1)
    assert it.state() == STALLED
    assert it.desk.hub.faults.per_second(it.desk.now) == 0
    it.desk.check()


def test_the_death_of_an_engine_that_is_asked_is_a_death() -> None:
    it = Watched()
    it.after(2 * PERIOD_S)
    it.desk.down()
    it.after(0.1)
    assert it.state() == worker_pb2.ENGINE_STATE_STARTING
    it.desk.check()


def test_ranks_of_which_nothing_is_told_are_not_taken_for_dead() -> None:
    it = Watched()
    it.frontend.start(prompt=[1, 2, 3])
    for look in range(round(20 * PERIOD_S / LOOK_INTERVAL_S)):
        it.desk.now += LOOK_INTERVAL_S
        load = worker_pb2.LoadReport(
            engine_steps_total=look,
            ranks=[
                worker_pb2.RankLoad(rank=0, requests_running=1, kv_blocks_used=look % 2),
                worker_pb2.RankLoad(rank=1),
            ],
        )
        it.desk.hub.on_frame(attempt_pb2.StepFrame(load=load))
        it.desk.step({1: 5})
        it.desk.hub.watch()
        it.watch.look()
    assert it.probes() == []


def test_a_text_is_asked_once_it_is_encoded_and_what_cannot_be_is_not_asked() -> None:
    asset = simulated_tokenizer.asset()
    sound, broken = asset_to_proto(asset), worker_pb2.Tokenizer(vocab_size=100, bos_token_id=42)
    expected = Tokenizer(asset).encode("batoki remu", add_special=True)

    async def scenario() -> None:
        for tokenizer, ids in ((sound, expected), (broken, [42])):
            it = Watched("batoki remu", tokenizer)
            it.watch.look()
            async with asyncio.timeout(10):
                while not it.probes():
                    it.after(0.1)
                    await asyncio.sleep(0.001)
            assert list(it.probes()[0].checkpoint.prompt_token_ids) == ids

    asyncio.run(scenario())
