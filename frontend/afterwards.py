"""What a stream that moves leaves to be done, and can wait until it is on its way.

When an engine dies, all its streams stand still until the last of them has left for another one. So
counts, files and resume tokens have to wait; and then a little longer, because the other sidecar
and its engine are at work in the milliseconds after, perhaps on the core that we would take. Nor is
any garbage collected before.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from unbroken import garbage, log

AFTER_S: Final = 0.004
"""By then streams are with the other engine, and its step is seldom over."""

_log = log.get_logger(__name__)


class Afterwards:
    """Does things in their order, together, `AFTER_S` after the first came up."""

    def __init__(self) -> None:
        self._left: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def do(self, what: Callable[[], None]) -> None:
        """Do it then."""
        self._left.append(what)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(AFTER_S, self.finish)
            garbage.wait()

    def finish(self) -> None:
        """Do all of it now. Raises nothing: what others left is done whatever one's bug is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left, self._left = self._left, []
        for what in left:
            try:
                what()
            except Exception:
                _log.exception("bug in what was left for afterwards")
        if self._timer is None:  # Else more was left meanwhile.
            garbage.wait_no_more()
