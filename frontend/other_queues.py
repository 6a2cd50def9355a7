"""What waits at other frontends for the same workers, and whose turn is before whose. No I/O.

    line of each frontend ──heartbeat──▶ sidecars ──heartbeat──▶ all other frontends

Frontends share workers, and none knows what another promised. So each tells what stands in its
line, and what it promised to those whom it sent away, and reckons with all of it as if it were one
line, kept in pieces: who is sent away is told when all that is before him will have been let in,
wherever it stands. That is 0.1 s old or a little more; what it misses is what came since.

No frontend gives another's turns. Whose request has waited longer takes room sooner: the others
wait for some milliseconds, the longer the shorter their own first one has waited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from unbroken.v1 import relay_service_pb2 as pb

BELIEVED_S: Final = 1.0
"""A frontend of which nothing was heard for so long has no line."""
FRONTENDS_MAX: Final = 64
"""Of which it is remembered what they said."""
DEFERENCE_S: Final = 0.02
"""So long waits for room to be left whose first request has only just come."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Prompt tokens at all other frontends together."""

    tokens_waiting: int = 0
    tokens_promised: int = 0

    @property
    def num_tokens(self) -> int:
        return self.tokens_waiting + self.tokens_promised


@dataclass(slots=True)
class _Known:
    """What one life of a frontend said last."""

    report: pb.QueueReport
    heard_at: float


class OtherQueues:
    """Those before the workers of one model. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._next_look = 0.0
        self.elsewhere = Elsewhere()

    def heard(self, reports: Sequence[pb.QueueReport], now: float) -> int:
        """A sidecar passed these on; returns how many tokens were let in there since the last."""
        num_let_in = 0
        for report in reports:
            known = self._known.get(report.frontend_id)
            if known is None:
                if len(self._known) >= FRONTENDS_MAX:
                    continue
            else:
                said, life = known.report, (report.incarnation, report.sequence)
                if life <= (said.incarnation, said.sequence):
                    continue
                if report.incarnation == said.incarnation:
                    num_let_in += report.tokens_let_in_total - said.tokens_let_in_total
            self._known[report.frontend_id] = _Known(report, now)
        self._add_up(now)
        return num_let_in

    def forget(self, now: float) -> None:
        """Those of which nothing was heard for long. Cheap when there is nothing to forget."""
        if self._known and now >= self._next_look:
            self._add_up(now)

    def _add_up(self, now: float) -> None:
        for name, known in list(self._known.items()):
            if known.heard_at + BELIEVED_S <= now:
                del self._known[name]
        known = self._known.values()
        self._next_look = min((one.heard_at for one in known), default=now) + BELIEVED_S
        self.elsewhere = Elsewhere(
            sum(one.report.tokens_waiting for one in known),
            sum(one.report.tokens_promised for one in known),
        )


class Deference:
    """When the first in a line takes the room that there is, if others wait elsewhere."""

    def __init__(self) -> None:
        self._room_since: float | None = None

    def due(self, now: float, *, waited_s: float, wait_s_max: float) -> float:
        """There is room; the first has waited for so long."""
        if self._room_since is None:
            self._room_since = now
        share_left = max(0.0, 1 - waited_s / wait_s_max) if wait_s_max > 0 else 0.0
        return self._room_since + DEFERENCE_S * share_left

    def no_room(self) -> None:
        """There is none, or nobody here who could take it."""
        self._room_since = None
