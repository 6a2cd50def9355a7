"""Which requests are cancelled with which, and what was cancelled just now: no I/O.

    enter ──▶ here ──leave──▶ gone, or kept where it is as long as it has children
      │
      └── its parent was cancelled just now: it is born killed

A request names its parent by an id, which may be that of a request that is elsewhere, has ended, or
has yet to come. So a context is kept for each name that is used, and whoever comes under that name
takes it. What is cancelled is remembered for a while: the child of a cancelled request may still be
on its way.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from unbroken.context import Context
from unbroken.errors import Reason, UnbrokenError

Key: TypeAlias = tuple[str, str]
"""Tenant and request id."""

REMEMBERED_S: Final = 60.0
"""For so long a cancelled request gets no new children."""
REMEMBERED_MAX: Final = 10_000
"""Of so many that is known."""
DEPTH_MAX: Final = 100
"""Of so many above it, a request that has ended still hands on what it is cancelled with."""


class Member:
    """One name: a request that is here, or one that others name as their parent."""

    __slots__ = ("children", "context", "key", "num_here", "parent")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.context = Context(key[1])
        self.num_here = 0
        """Calls and requests of that name; equal calls that wait to be admitted share it."""
        self.parent: Member | None = None
        self.children: dict[Member, None] = {}


class _Cancelled(NamedTuple):
    """A cancel that is remembered."""

    at: float
    number: int
    """Of all that is remembered, ascending."""
    is_by_name: bool
    over: int = 0
    """For this tenant no cancel of all tenants counts, up to this number."""
    is_over: bool = False
    """No cancel itself."""


class Lineage:
    """The requests of one process of a frontend. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._members: dict[Key, Member] = {}
        self._by_id: dict[str, dict[Key, None]] = {}
        self._cancelled: OrderedDict[tuple[str | None, str], _Cancelled] = OrderedDict()
        """By tenant (None: whichever) and request id."""
        self._num_remembered = 0

    def enter(self, key: Key, parent_id: str, now: float, *, is_resumed: bool = False) -> Member:
        """A request came, with an empty `parent_id` if it has no parent; it MUST `leave`.

        Its context is killed already if its parent was cancelled just now. `is_resumed`: it began
        elsewhere, or before. Raises CANCELLED if it was cancelled by name meanwhile.
        """
        if is_resumed and any(one.is_by_name for one in self._cancels_of(key, now)):
            raise UnbrokenError(Reason.CANCELLED, "cancelled by request")
        self._cancelled.pop(key, None)  # It lives, or this is another request of that name,
        if (None, key[1]) in self._cancelled:  # and of this tenant only.
            self._keep(key, now, is_over=True)
        known = self._members.get(key)
        if known is not None and not known.num_here and known.context.is_stopped:
            known = None
        member = known or self._add(key)
        member.num_here += 1
        if parent_id and member.parent is None:
            parent_key = (key[0], parent_id)
            parent = self._members.get(parent_key) or self._add(parent_key)
            member.parent = parent
            parent.children[member] = None
            if not parent.num_here and self._cancels_of(parent_key, now):
                parent.context.kill(UnbrokenError(Reason.CANCELLED, "its parent was cancelled"))
            parent.context.link(member.context)
        return member

    def leave(self, member: Member, now: float) -> None:
        """It has ended, or was not admitted."""
        member.num_here -= 1
        if member.num_here:
            return
        if member.context.is_stopped and not self._cancels_of(member.key, now):
            self.remember(member.key, now)
        if _is_in_ring(member):  # Else its members would keep each other for ever.
            parent = member.parent
            _detach(member)
            self._drop_if_unused(parent)
        self._drop_if_unused(member)

    def named(self, request_id: str, tenant: str) -> Sequence[Key]:
        """The keys of that name, of all tenants if none is given."""
        return [key for key in self._by_id.get(request_id, ()) if tenant in ("", key[0])]

    def cancel(self, keys: Iterable[Key], error: UnbrokenError, *, is_soft: bool) -> list[Key]:
        """Cancel what has these names and everything below.

        Returns the keys of what is here and was not cancelled so before, parents first.
        """
        members = [member for key in keys if (member := self._members.get(key)) is not None]
        fresh = [
            member
            for member in _below(members)
            if member.num_here
            and not (member.context.is_killed or (is_soft and member.context.is_stopped))
        ]
        for member in members:
            if is_soft:
                member.context.stop(error)
            else:
                member.context.kill(error)
        return [member.key for member in fresh]

    def remember(
        self, name: tuple[str | None, str], now: float, *, is_by_name: bool = False
    ) -> None:
        """What has this name was cancelled, whether it is here or not.

        `name` is a tenant (None: whichever) and a request id; `is_by_name`: it was not its client
        that left, which may come back.
        """
        self._keep(name, now, is_by_name=is_by_name)

    def _keep(
        self,
        name: tuple[str | None, str],
        now: float,
        *,
        is_by_name: bool = False,
        is_over: bool = False,
    ) -> None:
        self._num_remembered += 1
        number, known = self._num_remembered, self._cancelled.get(name)
        over = number if is_over else known.over if known is not None else 0
        self._cancelled[name] = _Cancelled(now, number, is_by_name, over, is_over)
        self._cancelled.move_to_end(name)
        if len(self._cancelled) > REMEMBERED_MAX:
            self._cancelled.popitem(last=False)

    def check(self) -> None:
        """Assert what is always true."""
        for key, member in self._members.items():
            assert member.key == key
            assert member.num_here or member.children, "who is not here is somebody's parent"
            assert key in self._by_id[key[1]]
            for child in member.children:
                assert child.parent is member
                assert child.context in member.context.children, "contexts follow names"
        assert sum(map(len, self._by_id.values())) == len(self._members)
        assert len(self._cancelled) <= REMEMBERED_MAX

    @property
    def num_known(self) -> int:
        """Names that are kept."""
        return len(self._members)

    def _add(self, key: Key) -> Member:
        member = self._members[key] = Member(key)
        self._by_id.setdefault(key[1], {})[key] = None
        return member

    def _drop_if_unused(self, member: Member | None) -> None:
        """Forget a name that is neither here nor anybody's parent, and so on upwards."""
        while member is not None and not member.num_here and not member.children:
            parent = member.parent
            _detach(member)
            member.context.close()
            if self._members.get(member.key) is member:
                del self._members[member.key]
                same_id = self._by_id[member.key[1]]
                del same_id[member.key]
                if not same_id:
                    del self._by_id[member.key[1]]
            member = parent

    def _cancels_of(self, key: Key, now: float) -> list["_Cancelled"]:
        """What is remembered of cancels of a request."""
        own, of_all = self._cancelled.get(key), self._cancelled.get((None, key[1]))
        if own is not None and of_all is not None and of_all.number < own.over:
            of_all = None
        if own is not None and own.is_over:
            own = None
        return [one for one in (own, of_all) if one is not None and now - one.at <= REMEMBERED_S]


def _detach(member: Member) -> None:
    """It is below nobody any more."""
    parent, member.parent = member.parent, None
    if parent is not None:
        parent.children.pop(member, None)
        parent.context.unlink(member.context)


def _is_in_ring(member: Member) -> bool:
    """Whether it is above itself; or so deep in a tree that nobody looks any further."""
    above = member.parent
    for _ in range(DEPTH_MAX):
        if above is None:
            return False
        if above is member:
            return True
        above = above.parent
    return True


def _below(members: Iterable[Member]) -> list[Member]:
    """These and all below them, each once, parents first."""
    found: dict[Member, None] = {}
    due = deque(members)
    while due:
        member = due.popleft()
        if member not in found:
            found[member] = None
            due.extend(member.children)
    return list(found)
