"""The processes that hold memory, and what may be done about those that are lost."""

import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field

from memory_service.fencing import Fence, FencePolicy, SessionFence, Verdict, judge_cohort
from unbroken.errors import Reason, UnbrokenError


@dataclass(frozen=True, slots=True)
class Peer:
    """Who a process is: what it says, and what the kernel says of it."""

    client: str
    tenant: str
    pid: int
    uid: int
    cohort: str = ""
    rank: int = 0
    num_ranks: int = 1


@dataclass(slots=True, eq=False)
class Session:
    """One process, through all its connections."""

    session_id: int
    peer: Peer
    secret: bytes
    fence: SessionFence
    is_connected: bool = True
    shown: set[int] = field(default_factory=set[int])
    """Slabs of the block store whose descriptors were sent on this connection."""
    freed: list[int] = field(default_factory=list[int])
    """Those that are gone since, which it has yet to be told."""
    has_lost_pool: bool = False
    """A pool of it is gone without being adopted, so its cohort cannot agree any more."""


class Sessions:
    """All of them, the dead included for as long as something of theirs is left."""

    def __init__(self, policy: FencePolicy, *, sessions_max: int = 1024) -> None:
        self._policy = policy
        self._sessions_max = sessions_max
        self._sessions: dict[int, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        for session_id in sorted(self._sessions):
            yield self._sessions[session_id]

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: int) -> Session | None:
        return self._sessions.get(session_id)

    def add(self, session_id: int, peer: Peer, secret: bytes) -> Session:
        """A process that binds for the first time, or is known from an earlier life."""
        assert session_id not in self._sessions, "ids are never used twice"
        if len(self._sessions) >= self._sessions_max:
            raise UnbrokenError(
                Reason.MEMORY_EXHAUSTED,
                f"expected at most {self._sessions_max} sessions",
                retry_after_s=1.0,
            )
        session = Session(session_id, peer, secret, SessionFence(self._policy))
        self._sessions[session_id] = session
        return session

    def rebind(self, session_id: int, peer: Peer, secret: bytes) -> Session | None:
        """The session that this process goes on with; None if it is over.

        Raises NOT_PERMITTED if it is another's.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return None
        if not _is_same(session, peer, secret):
            raise UnbrokenError(
                Reason.NOT_PERMITTED, f"expected the process of session {session_id}"
            )
        if session.fence.fence > Fence.HINT or session.fence.is_given_up:
            return None
        return session

    def given_up(self, session_id: int, peer: Peer, secret: bytes) -> Session | None:
        """The session that this process had, if it lives and it was given up."""
        session = self._sessions.get(session_id)
        if session is None or not _is_same(session, peer, secret):
            return None
        return session if session.fence.is_given_up else None

    def remove(self, session: Session) -> None:
        """Nothing is left of it."""
        del self._sessions[session.session_id]

    def cohort(self, session: Session) -> list[Session]:
        """The sessions that are adopted together with this one, itself included."""
        peer = session.peer
        if not peer.cohort:
            return [session]
        return [
            one for one in self if (one.peer.tenant, one.peer.cohort) == (peer.tenant, peer.cohort)
        ]

    def judge(self, session: Session) -> Verdict:
        """Whether what this session had may be adopted."""
        cohort = self.cohort(session)
        ranks = {
            one.peer.rank: (one.fence.fence, one.fence.is_given_up or one.has_lost_pool)
            for one in cohort
        }
        return judge_cohort(ranks.values(), num_ranks=session.peer.num_ranks)


def _is_same(session: Session, peer: Peer, secret: bytes) -> bool:
    is_peer = (session.peer.pid, session.peer.uid) == (peer.pid, peer.uid)
    return hmac.compare_digest(session.secret, secret) and is_peer
