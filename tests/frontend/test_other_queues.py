"""What frontends make of each other's lines."""

import timeit
from random import Random

from frontend.admission_queue import AdmissionQueue, Arrival, Limit, QueueLimits, Refusal
from frontend.other_queues import (
    BELIEVED_S,
    DEFERENCE_S,
    FRONTENDS_MAX,
    Deference,
    Elsewhere,
    OtherQueues,
)
from unbroken.v1 import relay_service_pb2 as pb

RATE = 1000.0


def said(
    frontend_id: str = "f2",
    sequence: int = 1,
    waiting: int = 0,
    promised: int = 0,
    let_in: int = 0,
    incarnation: int = 7,
) -> pb.QueueReport:
    return pb.QueueReport(
        frontend_id=frontend_id,
        incarnation=incarnation,
        sequence=sequence,
        tokens_waiting=waiting,
        tokens_promised=promised,
        tokens_let_in_total=let_in,
    )


def test_lines_of_others_are_added_up() -> None:
    others = OtherQueues()
    others.heard([said("f2", waiting=10, promised=5), said("f3", waiting=1)], 0.0)
    assert others.elsewhere == Elsewhere(11, 5)


def test_the_latest_report_counts_whichever_sidecar_passes_it_on() -> None:
    others = OtherQueues()
    others.heard([said(sequence=4, waiting=10)], 0.0)
    assert others.heard([said(sequence=3, waiting=99, let_in=50)], 0.1) == 0
    assert others.heard([said(sequence=4, waiting=99, let_in=50)], 0.1) == 0
    assert others.elsewhere == Elsewhere(10, 0)


def test_what_was_let_in_since_the_last_report_is_told_once() -> None:
    others = OtherQueues()
    assert others.heard([said(sequence=1, let_in=500)], 0.0) == 0, "since when is not known"
    assert others.heard([said(sequence=2, let_in=700)], 0.1) == 200
    assert others.heard([said(sequence=2, let_in=700)], 0.2) == 0
    assert others.heard([said(sequence=3, let_in=650)], 0.3) == -50, "some wait again"


def test_a_frontend_that_began_anew_has_let_in_nothing_since() -> None:
    others = OtherQueues()
    others.heard([said(sequence=9, let_in=500)], 0.0)
    assert others.heard([said(sequence=1, incarnation=8, waiting=3, let_in=40)], 0.1) == 0
    assert others.elsewhere == Elsewhere(3, 0)
    others.heard([said(sequence=10, incarnation=7, waiting=77)], 0.2)
    assert others.elsewhere == Elsewhere(3, 0), "news of an earlier life are late"


def test_who_is_not_heard_of_has_no_line() -> None:
    others = OtherQueues()
    others.heard([said("f2", waiting=10), said("f3", waiting=20)], 0.0)
    others.heard([said("f3", sequence=2, waiting=20)], BELIEVED_S / 2)
    others.forget(BELIEVED_S)
    assert others.elsewhere == Elsewhere(20, 0)
    others.forget(2 * BELIEVED_S)
    assert others.elsewhere == Elsewhere()


def test_only_so_many_are_remembered() -> None:
    others = OtherQueues()
    others.heard([said(f"f{n}", waiting=1) for n in range(2 * FRONTENDS_MAX)], 0.0)
    assert others.elsewhere.tokens_waiting == FRONTENDS_MAX


def test_who_has_waited_longest_takes_room_at_once_and_others_a_little_later() -> None:
    assert Deference().due(5.0, waited_s=2.0, wait_s_max=2.0) == 5.0
    assert Deference().due(5.0, waited_s=0.0, wait_s_max=2.0) == 5.0 + DEFERENCE_S
    deference = Deference()
    deference.due(5.0, waited_s=0.0, wait_s_max=2.0)
    assert deference.due(5.01, waited_s=0.0, wait_s_max=2.0) == 5.0 + DEFERENCE_S
    deference.no_room()
    assert deference.due(5.01, waited_s=0.0, wait_s_max=2.0) == 5.01 + DEFERENCE_S


def line() -> AdmissionQueue[str]:
    return AdmissionQueue(QueueLimits(wait_s_max=2.0), Random(1))


def come(queue: AdmissionQueue[str], key: str, tokens: int = 100) -> Refusal | None:
    arrival = Arrival("m", "", key, 0, tokens, 1000.0)
    return queue.offer(key, arrival, 100.0, rate_hint=RATE)[0]


def test_a_promise_reckons_with_all_lines() -> None:
    queue = line()
    assert come(queue, "a") is None
    queue.heard("m", [said(waiting=2000, promised=10_000)], 100.0)
    refusal = come(queue, "b")
    assert refusal is not None
    assert refusal.limit is Limit.WAIT
    assert "its turn would be in 12.1 s" in refusal.detail
    assert 0.9 * 11.05 <= refusal.retry_after_s <= 1.15 * 11.05, "less half of what waits"


def test_others_lines_delay_nobody_for_whom_there_is_room_before_them() -> None:
    queue = line()
    queue.heard("m", [said(promised=10_000)], 100.0)
    assert come(queue, "a") is not None
    queue.heard("m", [said(sequence=2)], 100.0)
    assert come(queue, "b") is None


def test_what_leaves_other_lines_counts_as_drain() -> None:
    queue = line()
    assert come(queue, "a", 3000) is None
    for tenth in range(1, 11):
        queue.heard("m", [said(sequence=tenth, waiting=1000, let_in=500 * tenth)], 100 + tenth / 10)
    arrival = Arrival("m", "", "b", 0, 100, 1000.0)
    refusal = queue.check(arrival, 101.0, rate_hint=RATE)
    assert refusal is None, "5,000 tokens leave in a second, and 4,100 are before it"


def test_a_report_says_what_waits_what_is_promised_and_what_was_let_in() -> None:
    queue = line()
    assert come(queue, "a", 2500) is None
    assert come(queue, "b", 300) is not None
    queue.let_in(Arrival("m", "", "c", 0, 50, 1000.0), 100.0)
    report = queue.report("m", 100.0)
    assert (report.tokens_waiting, report.tokens_promised) == (2500, 300)
    assert (report.tokens_let_in_total, report.sequence) == (50, 1)
    assert queue.next("m", 100.0) == "a"
    report = queue.report("m", 100.0)
    assert (report.tokens_waiting, report.tokens_let_in_total, report.sequence) == (0, 2550, 2)
    queue.passed_over("a", 100.0)
    assert queue.report("m", 100.0).tokens_let_in_total == 50


def test_a_report_takes_no_longer_with_many_tenants() -> None:
    """One goes to each worker ten times a second."""

    def report_s(num_tenants: int) -> float:
        queue = line()
        for number in range(num_tenants):
            queue.let_in(Arrival("m", f"t{number}", f"{number}", 0, 50, 1000.0), 100.0)
        return min(timeit.repeat(lambda: queue.report("m", 100.0), number=10, repeat=20))

    assert report_s(1000) < 20 * report_s(1)


def test_without_others_nobody_defers() -> None:
    queue = line()
    assert come(queue, "a") is None
    assert queue.may_go_at("m", 100.0) == 100.0
    queue.heard("m", [said(waiting=100)], 100.0)
    assert queue.may_go_at("m", 100.0) == 100.0 + DEFERENCE_S
