"""Decides when memory that was freed is really back: once nobody can have it mapped any more.

The service gives descriptors away and cannot take them back: the kernel, or the driver of a GPU,
keeps the bytes of a slab for as long as anybody has it open or mapped. So everybody to whom a
slab was given counts, until it says that it has unmapped it, or its process has exited.
"""

from collections.abc import Iterable


class Mappings:
    """Who may have which slab mapped.

    Attributes:
        back: Slabs that were freed and that nobody has mapped, since somebody cleared this.
    """

    def __init__(self) -> None:
        self._sessions: dict[int, set[int]] = {}  # By slab.
        self._slabs: dict[int, set[int]] = {}  # By session.
        self._freed: set[int] = set()
        self.back: list[int] = []

    def given(self, session: int, slab_ids: Iterable[int]) -> None:
        """A session gets the descriptors of slabs, or says that it has them mapped."""
        for slab_id in slab_ids:
            self._sessions.setdefault(slab_id, set()).add(session)
            self._slabs.setdefault(session, set()).add(slab_id)

    def unmapped(self, session: int, slab_ids: Iterable[int]) -> None:
        """A session says that it has nothing of these mapped, or open."""
        mine = self._slabs.get(session, set())
        for slab_id in mine.intersection(slab_ids):
            mine.remove(slab_id)
            self._gone(session, slab_id)
        if not mine:
            self._slabs.pop(session, None)

    def ended(self, session: int) -> None:
        """A session's process has exited, or has unmapped everything."""
        self.unmapped(session, list(self._slabs.get(session, ())))

    def freed(self, slab_id: int) -> None:
        """Nobody can find a slab any more."""
        if slab_id in self._sessions:
            self._freed.add(slab_id)
        else:
            self.back.append(slab_id)

    def is_mapped(self, slab_id: int) -> bool:
        """Whether somebody may have it mapped."""
        return slab_id in self._sessions

    def of(self, session: int) -> set[int]:
        """What a session may have mapped."""
        return self._slabs.get(session, set())

    def _gone(self, session: int, slab_id: int) -> None:
        sessions = self._sessions[slab_id]
        sessions.remove(session)
        if sessions:
            return
        del self._sessions[slab_id]
        if slab_id in self._freed:
            self._freed.remove(slab_id)
            self.back.append(slab_id)
