"""Flow-control windows (RFC 9113, section 5.2): what may be sent, and what may be received."""

from collections.abc import Sequence

from unbroken.http2.frames import WINDOW_MAX


class SendWindow:
    """What the peer takes from us. A change of the initial size can make it negative."""

    __slots__ = ("left",)

    def __init__(self, size: int) -> None:
        self.left = size

    def grow(self, increment: int) -> bool:
        """The peer takes more, or less; False if it overflows."""
        self.left += increment
        return self.left <= WINDOW_MAX

    def resize(self, before: int, sizes: Sequence[int]) -> bool:
        """What the peer takes from the beginning changes to these, one after the other; False if it
        overflows on the way."""
        largest = max(sizes)
        return self.grow(largest - before) and self.grow(sizes[-1] - largest)


class ReceiveWindow:
    """What we take from the peer. Given back in strides: each costs a frame.

    A change of its size can make it negative.
    """

    __slots__ = ("_owed", "_size", "left")

    def __init__(self, size: int) -> None:
        self._size = size
        self._owed = 0
        self.left = size

    def take(self, num_bytes: int) -> bool:
        """The peer sent so much; False if that is more than it may. Nothing it may always send."""
        self.left -= num_bytes
        return self.left >= 0 or not num_bytes

    def give(self, num_bytes: int) -> int:
        """So much has been dealt with; returns by how much to open the window now, if at all."""
        self._owed += num_bytes
        if self._owed * 2 < self._size:
            return 0
        increment, self._owed = self._owed, 0
        self.left += increment
        return increment

    def resize(self, size: int) -> int:
        """The peer knows of another size from now on; returns as `give`."""
        self.left += size - self._size
        self._size = size
        return self.give(0)

    def take_and_give(self, num_bytes: int, around: "ReceiveWindow") -> bool:
        """`take` and `give` in one, also of the window around this one.

        False, and nothing has changed, if one of them is exceeded or is to be opened. In both MUST
        be `give`n all that was taken: then less than half of a window is owed, and the rest left.
        """
        owed, owed_around = self._owed + num_bytes, around._owed + num_bytes
        if owed * 2 >= self._size or owed_around * 2 >= around._size:
            return False
        self.left -= num_bytes
        around.left -= num_bytes
        self._owed, around._owed = owed, owed_around
        return True
