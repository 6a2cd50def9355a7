"""What a drain decides, on a clock that a test moves."""

import pytest

from sidecar.drain import (
    STEP_S_MAX,
    Announce,
    Asked,
    Command,
    Drain,
    Event,
    ExitStatus,
    Failed,
    HandOver,
    Hurry,
    Phase,
    Plan,
    Policy,
    Seen,
    Signalled,
    Stepped,
    Stop,
)

FINISH = Plan(Policy.FINISH, 0)
HAND_OVER = Plan(Policy.HAND_OVER, 0)
ENDING = [HandOver(), Stop()]
LAST_STEP = Announce(STEP_S_MAX)
BUSY = Seen(3, is_engine_up=True)
IDLE = Seen(0, is_engine_up=True)


def budget(budget_s: float) -> Plan:
    return Plan(Policy.BUDGET, budget_s)


def after(plan: Plan, *events: Event, now: float = 100.0) -> tuple[Drain, list[Command]]:
    """A drain to which these events came at `now`, and all that it said."""
    drain = Drain(plan)
    return drain, [command for event in events for command in drain.handle(event, now)]


def test_a_worker_that_is_not_asked_goes_on() -> None:
    drain, said = after(FINISH, BUSY, IDLE, Seen(0, is_engine_up=False), BUSY)
    assert said == []
    assert drain.phase is Phase.SERVING
    assert drain.deadline() is None


def test_streams_finish_however_long_they_take() -> None:
    drain, said = after(FINISH, Signalled(), BUSY)
    assert said == [Announce(None)]
    assert drain.deadline() is None
    assert drain.handle_timeout(1e9) == []
    assert drain.handle(IDLE, 1e9) == ENDING
    assert drain.exit_status is ExitStatus.DRAINED


def test_streams_are_handed_over_when_the_step_of_the_engine_ends() -> None:
    drain, said = after(HAND_OVER, Signalled(), BUSY)
    assert said == [LAST_STEP]
    assert drain.phase is Phase.LAST_STEP
    assert drain.handle(Stepped(), 100.1) == ENDING
    assert drain.phase is Phase.STOPPING
    assert drain.exit_status is ExitStatus.DRAINED
    assert drain.handle(Stepped(), 100.2) == []


def test_a_long_step_is_not_waited_for() -> None:
    drain, _ = after(HAND_OVER, Signalled(), BUSY)
    assert drain.deadline() == 100 + STEP_S_MAX
    assert drain.handle_timeout(100 + STEP_S_MAX - 0.01) == []
    assert drain.handle_timeout(100 + STEP_S_MAX) == ENDING
    assert drain.deadline() is None
    assert drain.exit_status is ExitStatus.DRAINED


@pytest.mark.parametrize(
    "seen", [Seen(3, is_engine_up=True, is_stalled=True), Seen(3, is_engine_up=False), IDLE]
)
def test_no_step_is_waited_for_that_will_not_end(seen: Seen) -> None:
    _, said = after(HAND_OVER, Signalled(), seen)
    assert said == [LAST_STEP, *ENDING]


def test_a_step_ends_nothing_that_may_go_on() -> None:
    drain, said = after(budget(5), Stepped(), Signalled(), BUSY, Stepped(), BUSY)
    assert said == [Announce(5)]
    assert drain.phase is Phase.FINISHING


def test_what_is_left_at_the_end_of_the_budget_is_handed_over() -> None:
    drain, said = after(budget(5), Signalled(), BUSY)
    assert said == [Announce(5)]
    assert drain.deadline() == 105
    assert drain.handle_timeout(104.9) == []
    assert drain.handle(Stepped(), 104.9) == []
    assert drain.handle_timeout(105) == [], "it was announced"
    assert drain.deadline() == 105 + STEP_S_MAX
    assert drain.handle(Stepped(), 105.1) == ENDING
    assert drain.deadline() is None
    assert drain.exit_status is ExitStatus.DRAINED


def test_after_the_budget_a_long_step_is_not_waited_for_either() -> None:
    drain, _ = after(budget(5), Signalled(), BUSY)
    drain.handle_timeout(105)
    assert drain.handle_timeout(105 + STEP_S_MAX) == ENDING


def test_a_budget_that_is_nearly_over_is_not_made_longer() -> None:
    drain, _ = after(budget(0.125), Signalled(), BUSY)
    assert drain.handle(Asked(HAND_OVER), 100.0625) == [Announce(0.0625)]
    assert drain.deadline() == 100.125


def test_an_engine_that_is_lost_at_its_last_step_was_to_stop_anyway() -> None:
    drain, _ = after(HAND_OVER, Signalled(), BUSY)
    assert drain.handle(Seen(0, is_engine_up=False), 100.1) == ENDING
    assert drain.exit_status is ExitStatus.DRAINED


def test_nobody_waits_for_the_budget_when_nothing_is_left() -> None:
    drain, _ = after(budget(5), Signalled(), BUSY)
    assert drain.handle(IDLE, 101) == ENDING


@pytest.mark.parametrize("plan", [FINISH, HAND_OVER, budget(5), budget(0)])
def test_an_idle_worker_stops_at_once_whatever_the_policy(plan: Plan) -> None:
    drain, said = after(plan, Signalled(), IDLE)
    assert said[-2:] == ENDING
    assert drain.exit_status is ExitStatus.DRAINED


def test_an_engine_that_has_yet_to_start_is_not_waited_for_and_no_failure() -> None:
    drain, said = after(FINISH, Signalled(), Seen(0, is_engine_up=False))
    assert said == [Announce(None), *ENDING]
    assert drain.exit_status is ExitStatus.DRAINED


@pytest.mark.parametrize("plan", [FINISH, budget(5), HAND_OVER])
def test_a_second_signal_means_at_once(plan: Plan) -> None:
    drain, _ = after(plan, Signalled(), BUSY)
    assert drain.handle(Signalled(), 101) == [*ENDING, Hurry()]
    assert drain.exit_status is ExitStatus.CUT_SHORT
    assert drain.handle(Signalled(), 102) == [], "there is no faster than at once"


def test_a_second_signal_while_the_engine_stops_kills_it() -> None:
    drain, _ = after(HAND_OVER, Signalled(), IDLE)
    assert drain.handle(Signalled(), 101) == [Hurry()]
    assert drain.exit_status is ExitStatus.CUT_SHORT


def test_the_first_signal_after_an_operator_asked_is_not_the_second() -> None:
    drain, said = after(budget(7), Asked(FINISH), BUSY, Signalled(), BUSY)
    assert said == [Announce(None), Announce(7)]
    assert drain.deadline() == 107
    assert drain.handle(Signalled(), 101) == [*ENDING, Hurry()]


def test_a_drain_becomes_more_urgent_and_never_less() -> None:
    drain, said = after(FINISH, Asked(budget(9)), BUSY)
    assert said == [Announce(9)]
    assert drain.handle(Asked(budget(9)), 101) == []
    assert drain.handle(Asked(FINISH), 101) == []
    assert drain.deadline() == 109
    assert drain.handle(Asked(budget(2)), 102) == [Announce(2)]
    assert drain.deadline() == 104
    assert drain.handle(Asked(HAND_OVER), 103) == [LAST_STEP]
    assert drain.handle(Asked(HAND_OVER), 103.1) == []
    assert drain.handle(Asked(budget(2)), 103.1) == []
    assert drain.deadline() == 103 + STEP_S_MAX


@pytest.mark.parametrize("plan", [FINISH, budget(5)])
def test_an_engine_that_is_lost_in_a_drain_is_not_waited_for_and_told_by_the_exit_status(
    plan: Plan,
) -> None:
    drain, _ = after(plan, Signalled(), BUSY)
    assert drain.handle(Seen(0, is_engine_up=False), 101) == ENDING
    assert drain.exit_status is ExitStatus.FAILED
    assert drain.handle(Signalled(), 102) == [Hurry()]
    assert drain.exit_status is ExitStatus.FAILED, "the first cause counts"


def test_a_sidecar_that_cannot_go_on_hands_over_what_can_be_saved_and_fails() -> None:
    drain, said = after(FINISH, Failed())
    assert said == ENDING
    assert drain.exit_status is ExitStatus.FAILED


def test_an_engine_that_ends_because_it_is_stopped_has_not_failed() -> None:
    drain, _ = after(HAND_OVER, Signalled(), BUSY, Stepped())
    assert drain.handle(Seen(0, is_engine_up=False), 101) == []
    assert drain.handle(Failed(), 101) == []
    assert drain.exit_status is ExitStatus.DRAINED
