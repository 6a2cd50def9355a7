"""What frontends hear of each other through a sidecar."""

from sidecar.queue_reports import REPORTS_MAX, QueueReports
from unbroken.v1 import relay_service_pb2 as pb


def tell(reports: QueueReports[str], link: str, sequence: int = 1, waiting: int = 0) -> None:
    report = pb.QueueReport(frontend_id="forged", sequence=sequence, tokens_waiting=waiting)
    reports.told(link, report, frontend_id=f"frontend {link}", incarnation=3)


def test_a_frontend_hears_of_others_under_their_own_names() -> None:
    reports = QueueReports[str]()
    tell(reports, "a", waiting=1)
    tell(reports, "b", waiting=2)
    assert [(one.frontend_id, one.incarnation) for one in reports.of_others("a")] == [
        ("frontend b", 3)
    ]
    assert len(reports.of_others("c")) == 2


def test_late_reports_are_dropped_and_those_of_calls_that_ended_too() -> None:
    reports = QueueReports[str]()
    tell(reports, "a", sequence=2, waiting=1)
    tell(reports, "a", sequence=1, waiting=9)
    assert [one.tokens_waiting for one in reports.of_others("b")] == [1]
    reports.left("a")
    reports.left("a")
    assert reports.of_others("b") == []


def test_of_many_those_that_have_most_are_told() -> None:
    reports = QueueReports[str]()
    for number in range(2 * REPORTS_MAX):
        tell(reports, f"{number}", waiting=number)
    told = reports.of_others("nobody")
    assert len(told) == REPORTS_MAX
    assert min(one.tokens_waiting for one in told) == REPORTS_MAX
