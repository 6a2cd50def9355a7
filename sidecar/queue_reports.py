"""What waits at the frontends of one worker, told by each and passed on to the others. No I/O."""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from unbroken.v1 import relay_service_pb2 as pb

LinkT = TypeVar("LinkT", bound=Hashable)
"""What stands for one Relay call."""

REPORTS_MAX: Final = 32
"""In one heartbeat: those that have most."""


class QueueReports(Generic[LinkT]):
    """The latest of each frontend whose call is open."""

    def __init__(self) -> None:
        self._by_link: dict[LinkT, pb.QueueReport] = {}

    def of_others(self, link: LinkT) -> list[pb.QueueReport]:
        """What a frontend is told."""
        others = [report for other, report in self._by_link.items() if other != link]
        if len(others) > REPORTS_MAX:
            others.sort(key=lambda one: (-one.tokens_waiting - one.tokens_promised, one.sequence))
        return others[:REPORTS_MAX]

    def told(
        self, link: LinkT, report: pb.QueueReport, *, frontend_id: str, incarnation: int
    ) -> None:
        """A frontend said what stands in its line. Whose it is says the call, not the report."""
        known = self._by_link.get(link)
        if known is not None and report.sequence <= known.sequence:
            return
        named = pb.QueueReport()
        named.CopyFrom(report)
        named.frontend_id, named.incarnation = frontend_id, incarnation
        self._by_link[link] = named

    def left(self, link: LinkT) -> None:
        """Its call is over. Idempotent."""
        self._by_link.pop(link, None)
