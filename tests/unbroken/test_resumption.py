"""Claims of `unbroken.resumption`, in virtual time."""

import random

import pytest

from unbroken import resumption
from unbroken.errors import Reason
from unbroken.resumption import (
    FINAL,
    REPEATABLE,
    RESUMABLE,
    CallEnded,
    Decision,
    Finish,
    GiveUp,
    GoOn,
    Readiness,
    ResumeBudget,
    ResumePolicy,
    Resumption,
)

POLICY = ResumePolicy(resumes_max=3, calls_max=4, pause_initial_s=0.1, pause_max_s=0.3)
UP, IDLE, DOWN = Readiness.CONNECTED, Readiness.UNKNOWN, Readiness.FAILING
BROKEN = CallEnded(Reason.UNREACHABLE)


class Longest:
    """Randomness that never shortens a pause."""

    def random(self) -> float:
        return 0.999999


def a_stream(num_frontends: int = 2, *, budget: ResumeBudget | None = None) -> Resumption:
    return Resumption(
        num_frontends, policy=POLICY, budget=budget or ResumeBudget(), random=Longest()
    )


def begun(num_frontends: int = 2, *, budget: ResumeBudget | None = None) -> Resumption:
    """A stream that delivers."""
    stream = a_stream(num_frontends, budget=budget)
    stream.output_came()
    stream.has_started = stream.has_token = True
    return stream


def pause_s(decision: Decision) -> float:
    assert isinstance(decision, GoOn)
    return decision.pause_s


def test_every_reason_is_either_resumable_or_final() -> None:
    assert frozenset(Reason) == RESUMABLE | FINAL
    assert not RESUMABLE & FINAL
    assert REPEATABLE < RESUMABLE


@pytest.mark.parametrize("reason", sorted(FINAL, key=str))
def test_a_final_reason_ends_the_stream(reason: Reason) -> None:
    assert begun().call_ended(CallEnded(reason), 0, now=1.0) == GiveUp("")
    assert a_stream().call_ended(CallEnded(reason), 0, now=1.0) == GiveUp("")


@pytest.mark.parametrize("reason", sorted(RESUMABLE - {Reason.FENCED}, key=str))
def test_a_stream_that_has_begun_is_resumed_at_once(reason: Reason) -> None:
    assert begun().call_ended(CallEnded(reason), 0, now=1.0) == GoOn(0.0, is_resume=True)


@pytest.mark.parametrize("reason", sorted(RESUMABLE, key=str))
def test_before_it_has_begun_only_what_says_nothing_of_the_request_is_repeated(
    reason: Reason,
) -> None:
    decision = a_stream().call_ended(CallEnded(reason), 0, now=1.0)
    assert decision == (GoOn(0.0, is_resume=False) if reason in REPEATABLE else GiveUp(""))


def test_a_call_that_ends_without_a_word_is_broken_off() -> None:
    assert begun().call_ended(CallEnded(None), 0, now=1.0) == GoOn(0.0, is_resume=True)
    assert a_stream().call_ended(CallEnded(None), 0, now=1.0) == GoOn(0.0, is_resume=False)


@pytest.mark.parametrize("reason", [None, *sorted(REPEATABLE, key=str)])
def test_after_the_end_a_broken_call_is_no_failure(reason: Reason | None) -> None:
    stream = begun()
    stream.is_finished = True
    assert stream.call_ended(CallEnded(reason), 0, now=1.0) == Finish()


def test_after_the_end_an_error_of_the_stream_is_its_error() -> None:
    for reason in frozenset(Reason) - REPEATABLE:
        stream = begun()
        stream.is_finished = True
        assert stream.call_ended(CallEnded(reason), 0, now=1.0) == GiveUp("")


def test_a_request_that_exists_by_an_earlier_call_of_ours_is_asked_for_again() -> None:
    exists = CallEnded(Reason.REQUEST_EXISTS)
    stream = a_stream()
    stream.call_ended(BROKEN, 0, now=1.0)
    assert stream.call_ended(exists, 1, now=1.1) == GoOn(0.0, is_resume=False)
    assert isinstance(stream.call_ended(exists, 0, now=1.2), GiveUp)


def test_a_token_has_expired_when_as_many_calls_say_so_as_there_are_frontends() -> None:
    expired = CallEnded(Reason.RESUME_TOKEN_EXPIRED)
    stream = begun(num_frontends=3)
    for frontend in (0, 1):
        assert isinstance(stream.call_ended(expired, frontend, now=1.0), GoOn)
    assert stream.call_ended(expired, 2, now=2.0) == GiveUp("")
    assert begun(num_frontends=1).call_ended(expired, 0, now=1.0) == GiveUp("")


def test_without_a_token_nothing_is_resumed() -> None:
    stream = begun()
    stream.has_token = False
    assert stream.call_ended(BROKEN, 0, now=1.0) == GiveUp("")


def test_whoever_is_fenced_stops_unless_an_earlier_call_of_its_own_may_have_done_it() -> None:
    fenced = CallEnded(Reason.FENCED)
    assert begun().call_ended(fenced, 0, now=1.0) == GiveUp("")
    stream = begun()
    stream.call_ended(BROKEN, 0, now=1.0)
    assert isinstance(stream.call_ended(fenced, 1, now=1.1), GoOn)


def test_pauses_grow_to_a_limit_while_calls_bring_nothing() -> None:
    stream = begun()
    pauses = [pause_s(stream.call_ended(BROKEN, 0, now=float(i))) for i in range(4)]
    assert pauses == pytest.approx([0.0, 0.1, 0.2, 0.3], rel=1e-4)
    assert stream.call_ended(BROKEN, 0, now=9.0) == GiveUp("4 calls in a row brought nothing")


def test_pauses_vary_so_that_streams_do_not_come_together() -> None:
    def second_pause(seed: int) -> float:
        stream = begun()
        stream._random = random.Random(seed)  # pyright: ignore[reportPrivateUsage]
        stream.call_ended(BROKEN, 0, now=0.0)
        return pause_s(stream.call_ended(BROKEN, 1, now=0.0))

    pauses = [second_pause(seed) for seed in range(100)]
    assert min(pauses) < 0.06
    assert max(pauses) > 0.09
    assert all(0.05 <= pause <= 0.1 for pause in pauses)


def test_output_begins_the_count_of_vain_calls_anew() -> None:
    stream = begun()
    for _ in range(2):
        for index in range(3):
            assert isinstance(stream.call_ended(BROKEN, index % 2, now=1.0), GoOn)
        stream.output_came()
    assert stream.num_resumes == 2


def test_the_number_of_resumes_is_limited() -> None:
    stream = begun()
    for _ in range(POLICY.resumes_max):
        assert isinstance(stream.call_ended(BROKEN, 0, now=1.0), GoOn)
        stream.output_came()
    assert stream.call_ended(BROKEN, 0, now=1.0) == GiveUp("the stream was resumed 3 times")


def test_a_request_that_nobody_takes_is_asked_of_every_frontend_and_once_more() -> None:
    for num_frontends in (1, 2, 3):
        stream = a_stream(num_frontends)
        for index in range(num_frontends):
            expected = GoOn(0.0, is_resume=False)
            assert stream.call_ended(BROKEN, index, now=1.0) == expected
        assert isinstance(stream.call_ended(BROKEN, 0, now=1.0), GiveUp)


def test_a_stream_that_begins_at_its_second_call_was_not_resumed() -> None:
    stream = a_stream()
    stream.call_ended(BROKEN, 0, now=1.0)
    stream.output_came()
    assert stream.num_resumes == 0


def test_a_frontend_is_not_asked_before_it_said() -> None:
    stream = begun()
    overloaded = CallEnded(Reason.OVERLOADED, retry_after_s=2.5)
    assert stream.call_ended(overloaded, 0, now=1.0) == GoOn(2.5, is_resume=True)


def test_nothing_is_called_that_the_deadline_would_cut() -> None:
    stream = begun()
    stream.deadline_at = 3.0
    assert isinstance(stream.call_ended(CallEnded(Reason.OVERLOADED, 1.5), 0, now=1.0), GoOn)
    decision = stream.call_ended(CallEnded(Reason.OVERLOADED, 2.5), 0, now=1.0)
    assert isinstance(decision, GiveUp)
    assert "deadline" in decision.detail


@pytest.mark.parametrize(
    ("failed", "readiness", "chosen"),
    [
        ([], [DOWN, IDLE, UP], 2),
        ([], [DOWN, IDLE, DOWN], 1),
        ([0], [UP, IDLE, DOWN], 1),  # One that just failed is worse than an unknown one,
        ([0], [UP, DOWN, DOWN], 0),  # but better than those that cannot be reached.
        ([0, 1], [UP, UP, DOWN], 0),
        ([0, 0, 1], [UP, UP, DOWN], 1),
    ],
)
def test_the_frontend_with_least_against_it_is_called(
    failed: list[int], readiness: list[Readiness], chosen: int
) -> None:
    stream = Resumption(3, policy=POLICY, budget=ResumeBudget(), random=Shortest())
    stream.has_started = stream.has_token = True
    for index in failed:
        stream.call_ended(BROKEN, index, now=1.0)
    assert stream.choose(readiness) == chosen


class Shortest:
    """Of equals, the first."""

    def random(self) -> float:
        return 0.0


def test_streams_of_one_frontend_spread_over_the_others() -> None:
    chosen: list[int] = []
    for seed in range(100):
        stream = Resumption(3, policy=POLICY, budget=ResumeBudget(), random=random.Random(seed))
        stream.call_ended(BROKEN, 0, now=1.0)
        chosen.append(stream.choose([IDLE, UP, UP]))
    assert chosen.count(0) == 0
    assert min(chosen.count(1), chosen.count(2)) > 30


def test_the_streams_of_one_dead_frontend_all_go_on_at_once() -> None:
    budget = ResumeBudget(burst=10, per_s=1.0)
    for _ in range(100):
        stream = begun(budget=budget)
        assert pause_s(stream.call_ended(BROKEN, 0, now=1.0)) == 0.0
        stream.output_came()


def test_calls_in_vain_become_a_trickle_whatever_the_number_of_streams() -> None:
    budget = ResumeBudget(burst=10, per_s=5.0)
    due = sorted(pause_s(begun(budget=budget).call_ended(BROKEN, 0, now=0.0)) for _ in range(30))
    assert due[:10] == [0.0] * 10
    assert due[10:] == pytest.approx([(i + 1) / 5.0 for i in range(20)])
    assert budget.take(now=100.0) == 0.0, "it fills up again"
    assert [budget.take(now=100.0) for _ in range(10)][-1] > 0.0, "but not above its burst"


@pytest.mark.parametrize(
    "wrong",
    [
        {"resumes_max": -1},
        {"calls_max": 0},
        {"pause_initial_s": 0.0},
        {"pause_initial_s": 3.0},
        {"pause_factor": 0.5},
    ],
)
def test_nonsense_is_no_policy(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ResumePolicy(**wrong)  # pyright: ignore[reportArgumentType]


def test_nonsense_is_no_budget() -> None:
    for burst, per_s in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="expected"):
            ResumeBudget(burst, per_s)


def test_a_stream_may_be_told_not_to_resume() -> None:
    stream = Resumption(
        2, policy=ResumePolicy(resumes_max=0), budget=ResumeBudget(), random=Longest()
    )
    assert isinstance(stream.call_ended(BROKEN, 0, now=1.0), GoOn), "nothing has begun"
    stream.output_came()
    stream.has_started = stream.has_token = True
    assert isinstance(stream.call_ended(BROKEN, 0, now=1.0), resumption.GiveUp)
