"""What the drain of a frontend decides, on a clock that a test moves."""

import pytest

from frontend.drain import (
    CUT_S,
    LINGER_S,
    TELL_INTERVAL_S,
    TELL_MIN,
    TELL_S,
    Announce,
    Asked,
    Command,
    Cut,
    Drain,
    ExitStatus,
    GoAway,
    Phase,
    Seen,
    Signalled,
    Stop,
    Tell,
)

FIRST, SECOND = Signalled(is_again=False), Signalled(is_again=True)


def told_until(drain: Drain, end: float, num_untold: int) -> list[tuple[float, Command]]:
    """What follows by itself until `end`, when whoever is told stays."""
    said: list[tuple[float, Command]] = []
    now = 0.0
    drain.handle(Seen(num_untold, num_untold), now)
    while (due := drain.deadline()) is not None and due <= end:
        now = max(now, due)
        for command in drain.handle_timeout(now):
            said.append((now, command))
            if isinstance(command, Tell):
                num_untold -= command.num_requests
                drain.handle(Seen(1, num_untold), now)
    return said


def test_a_frontend_that_is_not_asked_goes_on() -> None:
    drain = Drain(30)
    assert drain.handle(Seen(0, 0), 0.0) == []
    assert drain.deadline() is None
    assert drain.handle_timeout(1e9) == []
    assert drain.phase is Phase.SERVING


def test_one_without_requests_stops_at_once() -> None:
    drain = Drain(30)
    assert drain.handle(FIRST, 0.0) == [Announce()]
    assert drain.handle(Seen(0, 0), 0.0) == [Stop()]
    assert drain.handle(Seen(0, 0), 0.0) == []
    assert drain.deadline() is None
    assert drain.exit_status is ExitStatus.DRAINED


@pytest.mark.parametrize(
    ("num_requests", "within_s"), [(1, TELL_S), (50, TELL_S), (500, 5.0), (10_000, 15.0)]
)
def test_all_clients_are_told_in_half_the_budget_and_never_in_a_rush(
    num_requests: int, within_s: float
) -> None:
    drain = Drain(30)
    drain.handle(FIRST, 0.0)
    said = told_until(drain, 29.0, num_requests)
    tells = [(at, one.num_requests) for at, one in said if isinstance(one, Tell)]
    assert sum(number for _, number in tells) == num_requests
    assert tells[-1][0] <= within_s + TELL_INTERVAL_S
    share = num_requests * TELL_INTERVAL_S / within_s
    assert max(number for _, number in tells) <= max(TELL_MIN, share + 1)
    (away,) = [at for at, one in said if isinstance(one, GoAway)]
    assert away >= tells[-1][0] - TELL_INTERVAL_S


def test_what_does_not_leave_is_cut_when_the_budget_is_over_and_waited_for_a_while() -> None:
    drain = Drain(10)
    drain.handle(Asked(), 0.0)
    said = told_until(drain, 10.0 + CUT_S, 3)
    tells, rest = said[:2], said[2:]
    assert tells == [(0.0, Tell(2)), (TELL_INTERVAL_S, Tell(1))]
    assert rest == [(LINGER_S, GoAway()), (10.0, Cut()), (10.0 + CUT_S, Stop())]
    assert drain.exit_status is ExitStatus.DRAINED


def test_once_all_cuts_were_read_nobody_is_waited_for() -> None:
    drain = Drain(10)
    assert drain.handle(Asked(0), 5.0) == [Announce(), Cut()]
    assert drain.handle(Seen(0, 3), 5.1) == [Stop()]


def test_whoever_asks_again_can_only_make_it_more_urgent() -> None:
    drain = Drain(10)
    drain.handle(Asked(60), 0.0)
    drain.handle(Asked(100), 1.0)
    assert drain.cut_at == 60
    drain.handle(FIRST, 2.0)
    assert drain.cut_at == 12
    assert drain.handle(Asked(0), 3.0) == [Cut()]
    assert drain.handle(Asked(0), 3.0) == []
    assert drain.exit_status is ExitStatus.DRAINED


def test_a_second_signal_means_at_once_and_shows_in_the_status() -> None:
    drain = Drain(10)
    assert drain.handle(FIRST, 0.0) == [Announce()]
    assert drain.handle(SECOND, 1.0) == [Cut()]
    assert drain.handle(SECOND, 1.1) == []
    assert drain.deadline() == 1.0 + CUT_S
    assert drain.exit_status is ExitStatus.CUT_SHORT


def test_a_second_signal_after_all_is_over_changes_nothing() -> None:
    drain = Drain(10)
    drain.handle(FIRST, 0.0)
    assert drain.handle(Seen(0, 0), 0.5) == [Stop()]
    assert drain.handle(SECOND, 1.0) == []
    assert drain.exit_status is ExitStatus.DRAINED
