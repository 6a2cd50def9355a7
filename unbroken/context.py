"""Whether work for a request is to go on: one object for all code of a process that works for it.

    live ──stop──▶ stopped ──kill──▶ killed
      └───────────── kill ─────────────▲

    context = Context("r1")
    child = context.child("r1: a tool it calls")
    child.on_change.append(wake)      # or: await child.stopped()
    ...
    child.check()                     # raises what it was stopped with

*Stopped* asks for an end soon, with what there is; *killed* for an end now. Both reach everything
below, parents before children and children in the order in which they were linked, and whoever is
linked later. Neither is ever taken back. Links may form a ring: each context changes once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection

from unbroken import log
from unbroken.errors import UnbrokenError

_log = log.get_logger(__name__)


class Context:
    """One request, or a part of one; for one event loop. Whoever made it closes it."""

    def __init__(self, id: str) -> None:
        self.id = id
        """For people; not unique."""
        self.is_stopped = False
        """It is to end: soon, or now."""
        self.is_killed = False
        """It is to end now."""
        self.error: UnbrokenError | None = None
        """Why it is to end, once it is."""
        self.on_change: list[Callable[[], None]] = []
        """Called when it is stopped, and when it is killed."""
        self._parents: dict[Context, None] = {}
        self._children: dict[Context, None] = {}  # In the order of linking.
        self._stopped: asyncio.Event | None = None
        self._killed: asyncio.Event | None = None

    @property
    def children(self) -> Collection["Context"]:
        """Those directly below that have not been closed."""
        return self._children.keys()

    def child(self, id: str) -> "Context":
        """A new context below this one."""
        child = Context(id)
        self.link(child)
        return child

    def link(self, child: "Context") -> None:
        """Have the other end with this one, at once if this one is to end. Idempotent."""
        self._children[child] = None
        child._parents[self] = None
        if self.error is not None:
            child._change(self.error, is_kill=self.is_killed)

    def unlink(self, child: "Context") -> None:
        """Have it end by itself again. Idempotent."""
        self._children.pop(child, None)
        child._parents.pop(self, None)

    def close(self) -> None:
        """The work is over: leave those above and below. Idempotent."""
        for parent in self._parents:
            parent._children.pop(self, None)
        for child in self._children:
            child._parents.pop(self, None)
        self._parents.clear()
        self._children.clear()
        self.on_change.clear()

    def stop(self, error: UnbrokenError) -> None:
        """Ask for an end soon, here and below."""
        self._change(error, is_kill=False)

    def kill(self, error: UnbrokenError) -> None:
        """Ask for an end now, here and below."""
        self._change(error, is_kill=True)

    def check(self) -> None:
        """Raises what it was stopped or killed with, if it was."""
        if self.error is not None:
            raise self.error

    async def stopped(self) -> None:
        """Until it is stopped or killed."""
        if not self.is_stopped:
            self._stopped = self._stopped or asyncio.Event()
            await self._stopped.wait()

    async def killed(self) -> None:
        """Until it is killed."""
        if not self.is_killed:
            self._killed = self._killed or asyncio.Event()
            await self._killed.wait()

    def _change(self, error: UnbrokenError, *, is_kill: bool) -> None:
        """Change this and everything below; a deep tree must not be a deep stack."""
        due: deque[Context] = deque([self])
        while due:
            context = due.popleft()
            if context._turn(error, is_kill=is_kill):
                due.extend(context._children)

    def _turn(self, error: UnbrokenError, *, is_kill: bool) -> bool:
        """Change this one alone; False if it was so already."""
        if self.is_killed or (self.is_stopped and not is_kill):
            return False
        self.is_stopped, self.is_killed = True, is_kill
        self.error = error if is_kill or self.error is None else self.error
        if self._stopped is not None:
            self._stopped.set()
        if is_kill and self._killed is not None:
            self._killed.set()
        for callback in list(self.on_change):
            try:
                callback()
            except Exception:  # Others below must still hear of it.
                _log.exception("bug: a callback of a context failed", context=self.id)
        return True
