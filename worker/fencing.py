"""Decides which attempt at a stream may run here: only the newest, ever."""

from collections import OrderedDict
from typing import TypeAlias

StreamKey: TypeAlias = tuple[str, str, int]
"""Tenant, request id and index of the choice."""


class EpochFence:
    """The highest epoch seen of each stream.

    It remembers a bounded number of streams, those last started. A stream that was forgotten is
    still protected by every other fence on its way.
    """

    def __init__(self, streams_max: int = 65_536) -> None:
        self._streams_max = streams_max
        self._highest: OrderedDict[StreamKey, int] = OrderedDict()

    def admit(self, stream: StreamKey, epoch: int) -> int | None:
        """None if the epoch is above every one known, which it is from now on; else the highest."""
        known = self._highest.get(stream)
        if known is not None and epoch <= known:
            return known
        self._highest[stream] = epoch
        self._highest.move_to_end(stream)
        if len(self._highest) > self._streams_max:
            self._highest.popitem(last=False)
        return None
