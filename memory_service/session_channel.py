"""The Unix socket at which processes of the host get memory: who they are, descriptors, hot calls.

One packet, one call; a connection has one call at a time. Calls are answered on the event loop, but
for those that read many records or bytes, which have a thread. A process that reads no answers is
cut off.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.duration_pb2 import Duration

from memory_service import accounts, fencing, labels, memfd
from memory_service.accounts import Device
from memory_service.backend import NeverSealed
from memory_service.fencing import Fence
from memory_service.holdings import PIN_S_MAX, Holdings
from memory_service.keeper import Ends, Keeper, make_lifeline
from memory_service.segments import SegmentClass, State, Version
from memory_service.sessions import Peer, Session
from memory_service.store import StoreSlab
from memory_service.tickets import Tickets
from unbroken import log
from unbroken.discovery import incarnation_now
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.memory import channel, checksums, keys
from unbroken.memory.channel import ChannelClosed
from unbroken.memory.checksums import Algorithm
from unbroken.memory.rows import Rows
from unbroken.v1 import memory_pb2 as pb
from unbroken.v1 import memory_session_pb2 as wire

PROTOCOL_VERSION: Final = 1
KEYS_MAX: Final = 1000
"""In one call: the answer has to fit into a packet."""
SLOTS_MAX: Final = 4096
FREED_MAX: Final = 500
ATTACHED_MAX: Final = 1000
MAPPED_MAX: Final = 2000
CONNECTIONS_MAX: Final = 2048
"""More than there can be sessions; others are cut off."""
NAME: Final = "[A-Za-z0-9._/-]{1,200}"
ACCEPT_RETRY_S: Final = 0.1
CALLS_A_TURN: Final = 16
"""Of one connection, before others have theirs."""
PROBE_INTERVALS_S: Final = ((0.01, 0.0002), (1.0, 0.001), (10.0, 0.01), (float("inf"), 0.1))
"""Between two looks at a lifeline: until so long after the connection was lost."""

SLOW: Final = frozenset({"bind", "seal", "close_slab", "report_corrupt"})
"""Calls that may read more than fits into a turn of the loop."""
HOT: Final = frozenset({"find", "get", "commit", "reclaim", "release_pin"})
"""Calls that change no deadline but that of their own pin."""

_ALL_XXH3: Final = {int(Algorithm.XXH3)}
_SO_PEERPIDFD: Final = 77
_CREDENTIALS: Final = struct.Struct("3i")

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end, as the kernel says."""

    pid: int
    uid: int
    pidfd: int


Answer = tuple[wire.SessionResponse, Sequence[int], Sequence[int]]
"""The response, its descriptors, and those of them that are closed after sending."""


class SessionChannel:
    """Listens, and serves every connection."""

    def __init__(
        self,
        holdings: Holdings,
        keeper: Keeper,
        *,
        may_use: Callable[[int, str], bool],
        tickets: Tickets,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`may_use` says whether a user may use a tenant's memory."""
        self.tickets = tickets
        self.holdings = holdings
        self.keeper = keeper
        self.may_use = may_use
        self.clock = clock
        self.num_calls = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called after whatever may have changed a deadline."""
        self.on_due: Callable[[float], None] = lambda _: None
        """Called with a new deadline."""
        self.loop = asyncio.get_running_loop()
        self.connections: dict[int, Connection] = {}
        """By session."""
        self._open: set[Connection] = set()
        self._listener: socket.socket | None = None
        self._accept_again: asyncio.TimerHandle | None = None
        self._probes: dict[int, asyncio.TimerHandle] = {}
        self._watched: set[int] = set()
        self._reading: dict[int, asyncio.Task[None]] = {}
        """By slab: its records are read in a thread."""
        keeper.on_sealed = self._sealed

    def listen(self, path: Path, *, mode: int) -> None:
        """Serve at `path`. Whoever held it before is gone: there is a lock. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(
            socket.AF_UNIX,
            socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        )
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(128)
        self._listener = listener
        self.loop.add_reader(listener.fileno(), self._accept)

    def watch_restored(self) -> None:
        """Look after the sessions of an earlier life of the service."""
        for session in list(self.holdings.sessions):
            self.watch(session.session_id)
            self.probe(session.session_id)

    def close(self) -> None:
        """Stop serving."""
        if self._accept_again is not None:
            self._accept_again.cancel()
        if self._listener is not None:
            self.loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for connection in list(self._open):
            connection.close()
        for task in list(self._reading.values()):
            task.cancel()  # The next service reads them again.
        for handle in self._probes.values():
            handle.cancel()
        for session_id in list(self._watched):
            self.unwatch(session_id)

    def _listen_again(self) -> None:
        assert self._listener is not None
        self.loop.add_reader(self._listener.fileno(), self._accept)

    # What is read in threads.

    def _sealed(self, slab: StoreSlab) -> None:
        if slab.slab_id not in self._reading:
            task = self.loop.create_task(self._read_sealed(slab))
            self._reading[slab.slab_id] = task

    async def _read_sealed(self, slab: StoreSlab) -> None:
        try:
            found = await asyncio.to_thread(self.keeper.read_sealed, slab, set(slab.blocks))
            self.holdings.slab_sealed(slab.slab_id, found)
            self.keeper.obey()
            self.on_change()
        finally:
            self._reading.pop(slab.slab_id, None)

    async def until_read(self, slab_id: int) -> None:
        """Until the records of a sealed slab are told."""
        if (task := self._reading.get(slab_id)) is not None:
            await asyncio.wait([task])

    # What happens to processes.

    def watch(self, session_id: int) -> None:
        """Notice when the process exits."""
        ends = self.keeper.ends.get(session_id)
        if ends is not None and session_id not in self._watched:
            self._watched.add(session_id)
            self.loop.add_reader(ends.pidfd, self._exited, session_id)

    def unwatch(self, session_id: int) -> None:
        """Before its descriptors are closed."""
        ends = self.keeper.ends.get(session_id)
        if session_id in self._watched and ends is not None:
            self.loop.remove_reader(ends.pidfd)
        self._watched.discard(session_id)
        if (handle := self._probes.pop(session_id, None)) is not None:
            handle.cancel()

    def probe(self, session_id: int) -> None:
        """Look from time to time whether the lifeline can be sealed."""
        self._probe(session_id, self.loop.time())

    def _probe(self, session_id: int, begun: float) -> None:
        self._probes.pop(session_id, None)
        session, ends = self.holdings.sessions.get(session_id), self.keeper.ends.get(session_id)
        if session is None or ends is None or session.is_connected:
            return
        if session.fence.fence >= Fence.QUIET or not self.holdings.needs_proof(session):
            return
        try:
            is_sealed = memfd.seal(ends.lifeline)
        except NeverSealed as error:
            _log.error("lifeline proves nothing", session=session_id, detail=str(error))
            return  # Its exit does.
        if is_sealed:
            self.seen(session_id, fencing.LifelineSealed())
            return
        passed = self.loop.time() - begun
        interval = next(interval for until, interval in PROBE_INTERVALS_S if passed < until)
        self._probes[session_id] = self.loop.call_later(interval, self._probe, session_id, begun)

    def _exited(self, session_id: int) -> None:
        ends = self.keeper.ends.get(session_id)
        if ends is not None:
            self.loop.remove_reader(ends.pidfd)
        self._watched.discard(session_id)
        connection = self.connections.get(session_id)
        try:
            if connection is not None:
                connection.on_readable()  # What it had sent before counts.
        finally:  # Nobody would say again that it is gone.
            if connection is not None:
                connection.close()
            self.seen(session_id, fencing.Exited())

    def seen(self, session_id: int, event: fencing.Event) -> None:
        """Tell the decisions, and do what they say."""
        self.holdings.seen(session_id, event, self.clock())
        self.keeper.obey()
        self.on_change()

    def lost(self, connection: "Connection") -> None:
        """A connection ended."""
        self._open.discard(connection)
        session = connection.session
        if session is None or self.connections.get(session.session_id) is not connection:
            return
        del self.connections[session.session_id]
        self.seen(session.session_id, fencing.ConnectionLost())
        self.probe(session.session_id)

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(CALLS_A_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # Such as for want of a descriptor.
                _log.error("connections wait", detail=str(error))
                self.loop.remove_reader(self._listener.fileno())
                self._accept_again = self.loop.call_later(ACCEPT_RETRY_S, self._listen_again)
                return
            if len(self._open) >= CONNECTIONS_MAX:
                sock.close()
                continue
            sock.setblocking(False)
            try:
                caller = _caller(sock)
            except OSError as error:
                _log.warning("caller unknown", detail=str(error))
                sock.close()
                continue
            self._open.add(Connection(self, sock, caller))


class Connection:
    """One process that calls."""

    def __init__(self, owner: SessionChannel, sock: socket.socket, caller: Caller) -> None:
        self._owner = owner
        self._sock = sock
        self._caller = caller
        self._has_pidfd = True
        self._task: asyncio.Task[None] | None = None
        self.session: Session | None = None
        owner.loop.add_reader(sock.fileno(), self.on_readable)

    def close(self) -> None:
        """End it. Idempotent."""
        if self._sock.fileno() == -1:
            return
        self._owner.loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._has_pidfd:
            os.close(self._caller.pidfd)
            self._has_pidfd = False
        self._owner.lost(self)

    def on_readable(self) -> None:
        """Answer what has come."""
        for _ in range(CALLS_A_TURN):
            if self._task is not None or self._sock.fileno() == -1:
                return
            try:
                request, fds = channel.receive(self._sock, wire.SessionRequest)
            except BlockingIOError:
                return
            except ChannelClosed:
                self.close()
                return
            channel.close_all(fds)
            self._owner.num_calls += 1
            kind = request.WhichOneof("kind")
            if kind is not None and (kind in SLOW or _wants_gpu(request, kind)):
                self._owner.loop.remove_reader(self._sock.fileno())
                self._task = self._owner.loop.create_task(self._slowly(request, kind))
                return
            try:
                answer = self._answer(request)
            except UnbrokenError as error:
                answer = _failed(error)
            except Exception:
                _log.exception("call failed", call=kind)
                answer = _failed(UnbrokenError(Reason.INTERNAL, f"{kind} failed"))
            if self._owner.holdings.commands:
                self._owner.keeper.obey()
            if kind not in HOT:
                self._owner.on_change()
            if kind != "release_pin" or not request.release_pin.is_silent:
                self._send(answer)

    def _send(self, answer: Answer) -> None:
        response, fds, ours = answer
        try:
            channel.send(self._sock, response, fds)
        except (ChannelClosed, UnbrokenError) as error:
            _log.warning("client cut off", pid=self._caller.pid, detail=str(error))
            self.close()
        finally:
            channel.close_all(ours)

    async def _slowly(self, request: wire.SessionRequest, kind: str) -> None:
        try:
            answer = await self._slow_answer(request, kind)
        except UnbrokenError as error:
            answer = _failed(error)
        except Exception:
            _log.exception("call failed", call=kind)
            answer = _failed(UnbrokenError(Reason.INTERNAL, f"{kind} failed"))
        self._task = None
        self._owner.keeper.obey()
        self._owner.on_change()
        if self._sock.fileno() != -1:
            self._owner.loop.add_reader(self._sock.fileno(), self.on_readable)
            self._send(answer)

    async def _slow_answer(self, request: wire.SessionRequest, kind: str) -> Answer:
        if kind == "bind":
            return await self._bind(request.bind)
        session = self._bound(request)
        match kind:
            case "seal":
                return await self._seal_segment(session, request.seal)
            case "create":
                version = self._planned(session, request.create)
                try:
                    await self._allocated(
                        version.slab_ids, request.create.slab_bytes, version.device
                    )
                except UnbrokenError:
                    self._owner.holdings.abandon_segment(version)
                    raise
                return self._begun(version)
            case "open_slab":
                slab = self._planned_slab(session, request.open_slab)
                try:
                    await self._allocated([slab.slab_id], [slab.data_bytes], slab.device)
                except UnbrokenError:
                    self._owner.holdings.abandon_slab(slab)
                    raise
                return self._begun_slab(session, slab)
            case "close_slab":
                return await self._close_slab(session, request.close_slab.slab_id)
            case _:
                assert kind == "report_corrupt", "no other is slow"
                return await self._report(session, request.report_corrupt)

    def _bound(self, request: wire.SessionRequest) -> Session:
        self._owner.holdings.check_boot(request.boot_token)
        if self.session is None:
            raise UnbrokenError(Reason.PROTOCOL_VIOLATION, "expected bind first")
        return self.session

    def _answer(self, request: wire.SessionRequest) -> Answer:
        kind = request.WhichOneof("kind")
        session, holdings = self._bound(request), self._owner.holdings
        now = self._owner.clock()
        match kind:
            case "find":
                find = request.find
                device = accounts.asked_for(find.memory_kind, find.device)
                found = holdings.store.find(session.peer.tenant, _keys(find.keys), device)
                return _reply(found=wire.Found(num_blocks=len(found)))
            case "get":
                return self._get(session, request.get, now)
            case "commit":
                return self._commit(session, request.commit)
            case "release_pin":
                holdings.store.unpin(session.session_id, request.release_pin.pin_id)
                return _DONE
            case "reclaim":
                slab = holdings.store.owned(session.session_id, request.reclaim.slab_id)
                slots = holdings.store.reclaim(slab, min(request.reclaim.num_slots, SLOTS_MAX))
                return _reply(reclaimed=wire.Reclaimed(slots=slots))
            case "create":
                version = self._planned(session, request.create)
                try:
                    self._owner.keeper.allocate(version.slab_ids, request.create.slab_bytes)
                except UnbrokenError:
                    holdings.abandon_segment(version)
                    raise
                return self._begun(version)
            case "open_slab":
                slab = self._planned_slab(session, request.open_slab)
                try:
                    self._owner.keeper.allocate([slab.slab_id], [slab.data_bytes])
                except UnbrokenError:
                    holdings.abandon_slab(slab)
                    raise
                return self._begun_slab(session, slab)
            case "freeze":
                freeze = request.freeze
                holdings.freeze_pool(session, freeze.name, freeze.epoch, freeze.layout)
                return _DONE
            case "attach":
                name, number = request.attach.name, request.attach.version
                version = holdings.check_attach(session, name, number)
                fds = self._owner.keeper.read_only(version.slab_ids)  # May fail: nothing is noted.
                holdings.attach_segment(session, name, number)
                return self._granted(version, fds, fds)
            case "adopt":
                adopt = request.adopt
                version = holdings.adopt_pool(
                    session, adopt.name, adopt.expected_epoch, incarnation_now()
                )
                return self._granted(version, self._owner.keeper.writable(version.slab_ids), ())
            case "release":
                holdings.release_segment(session, request.release.name, request.release.version)
                return _DONE
            case "grant_reads":
                ttl_s = _seconds(request.grant_reads.ttl)
                ticket = self._owner.tickets.grant(session.peer.tenant, ttl_s, time.time())
                return _reply(read_ticket=wire.ReadTicket(ticket=ticket))
            case "unmapped":
                holdings.unmapped(session, request.unmapped.slab_ids)
                return _DONE
            case "unbind":
                holdings.unbind(session)
                return _DONE
            case _:
                raise UnbrokenError(Reason.NOT_IMPLEMENTED, f"expected a known call, got {kind}")

    async def _bind(self, bind: wire.Bind) -> Answer:
        owner, caller = self._owner, self._caller
        if self.session is not None:
            raise UnbrokenError(Reason.PROTOCOL_VIOLATION, "expected to be bound once")
        if bind.protocol_version != PROTOCOL_VERSION:
            raise InvalidField("protocol_version", f"{PROTOCOL_VERSION}", bind.protocol_version)
        for name, text in (("client", bind.client), ("cohort", bind.cohort)):
            if len(text) > 128:
                raise InvalidField(name, "at most 128 characters", text)
        if len(bind.tenant) > 128:
            raise InvalidField("tenant", "at most 128 characters", bind.tenant)
        for name, numbers, most in (
            ("attached_versions", bind.attached_versions, ATTACHED_MAX),
            ("mapped_slab_ids", bind.mapped_slab_ids, MAPPED_MAX),
        ):
            if len(numbers) > most:
                raise InvalidField(name, f"at most {most}", len(numbers))
        if not owner.may_use(caller.uid, bind.tenant):
            raise UnbrokenError(
                Reason.NOT_PERMITTED, f"expected a user of tenant {bind.tenant!r}, got {caller.uid}"
            )
        peer = Peer(
            bind.client,
            bind.tenant,
            caller.pid,
            caller.uid,
            bind.cohort,
            bind.rank,
            max(1, bind.num_ranks),
        )
        session = None
        if bind.session_id:
            # Refused here if it is another's, before anything of that session is touched.
            session = owner.holdings.rebind(
                bind.session_id,
                peer,
                bind.secret,
                owner.clock(),
                attached=set(bind.attached_versions),
                mapped=set(bind.mapped_slab_ids),
            )
            if (old := owner.connections.pop(bind.session_id, None)) is not None:
                old.close()
        is_resumed = session is not None
        if session is None:
            lifeline = make_lifeline(caller.pid)
            try:
                session = owner.holdings.bind(peer, secrets.token_bytes(16), incarnation_now())
            except UnbrokenError:
                os.close(lifeline)
                raise
            owner.keeper.ends[session.session_id] = Ends(lifeline, caller.pidfd)
            self._has_pidfd = False
            if bind.session_id:
                owner.holdings.succeed(
                    session,
                    bind.session_id,
                    bind.secret,
                    attached=set(bind.attached_versions),
                    mapped=set(bind.mapped_slab_ids),
                )
        self.session = session
        owner.connections[session.session_id] = self
        owner.watch(session.session_id)
        slabs = owner.holdings.store.owned_by(session.session_id)
        for slab in slabs:
            # Its owner cannot get leave to overwrite a block before it has this answer, unless it
            # has bound over another connection meanwhile, for which its records are read anew.
            found = await asyncio.to_thread(owner.keeper.read, slab)
            if owner.connections.get(session.session_id) is not self:
                raise UnbrokenError(Reason.STALE_HANDLE, "expected a connection that is open")
            owner.holdings.records_read(slab, found)
        freed, session.freed = session.freed, []
        owned = owner.holdings.segments.owned_by(session.session_id)
        bound = wire.Bound(
            boot_token=owner.holdings.boot_token,
            session_id=session.session_id,
            secret=session.secret,
            is_resumed=is_resumed,
            slabs=[labels.slab_to_proto(slab) for slab in slabs],
            owned_versions=[version.version for version in owned],
            owned_epochs=[version.epoch for version in owned],
            attached_versions=[
                version.version for version in owner.holdings.segments.attached(session.session_id)
            ],
            freed_slab_ids=freed,
            releases_silently=True,
        )
        return _reply((owner.keeper.ends[session.session_id].lifeline,), bound=bound)

    def _planned(self, session: Session, create: wire.CreateSegment) -> Version:
        """What is to be allocated for a segment."""
        _check_name(create.name)
        try:
            kind = SegmentClass(create.segment_class)
        except ValueError:
            raise InvalidField("segment_class", "a known class", create.segment_class) from None
        holdings = self._owner.holdings
        device = holdings.ledger.device(create.memory_kind, create.device)
        return holdings.plan_segment(
            session, create.name, kind, create.slab_bytes, incarnation_now(), device
        )

    def _begun(self, version: Version) -> Answer:
        """It is allocated."""
        owner = self._owner
        try:
            owner.holdings.begin_segment(version)
        except UnbrokenError:
            owner.holdings.abandon_segment(version)
            raise
        return self._granted(version, owner.keeper.writable(version.slab_ids), ())

    def _planned_slab(self, session: Session, wanted: wire.OpenSlab) -> StoreSlab:
        """What is to be allocated for blocks."""
        holdings = self._owner.holdings
        return holdings.plan_slab(
            session,
            wanted.block_bytes,
            wanted.num_slots,
            incarnation_now(),
            holdings.ledger.device(wanted.memory_kind, wanted.device),
        )

    def _begun_slab(self, session: Session, slab: StoreSlab) -> Answer:
        """It is allocated, but for its records."""
        owner = self._owner
        try:
            owner.keeper.allocate_table(slab)
            owner.holdings.begin_slab(session, slab)
        except UnbrokenError:
            owner.holdings.abandon_slab(slab)
            raise
        fds = (*owner.keeper.writable([slab.slab_id]), owner.keeper.table(slab.slab_id))
        return _reply(fds, granted=wire.Granted(segment=labels.store_to_proto(slab)))

    async def _allocated(
        self, slab_ids: Sequence[int], sizes: Sequence[int], device: Device
    ) -> None:
        """Memory of a GPU, for a caller that is still there when it is."""
        owner, session = self._owner, self.session
        assert session is not None, "bound"
        await owner.keeper.allocate_in_order(slab_ids, sizes, device)
        if owner.connections.get(session.session_id) is not self:
            raise UnbrokenError(Reason.STALE_HANDLE, "expected a connection that is open")

    async def _seal_segment(self, session: Session, seal: wire.SealSegment) -> Answer:
        owner = self._owner
        try:
            algorithm = checksums.of_contract(seal.checksum_algorithm)
        except ValueError:
            known = "a known algorithm"
            raise InvalidField("checksum_algorithm", known, seal.checksum_algorithm) from None
        version = owner.holdings.check_seal(
            session, seal.name, seal.epoch, seal.checksums, seal.layout, algorithm
        )
        if version.state is not State.SEALED:
            self._seal_slabs(version.slab_ids, str(version))
            if owner.keeper.is_readable(version.device):
                await self._compare(version, seal.checksums, algorithm)
            owner.holdings.seal_segment(
                session, seal.name, seal.epoch, seal.checksums, seal.layout, algorithm
            )
        return _reply(
            granted=wire.Granted(segment=labels.version_to_proto(owner.holdings, version))
        )

    def _seal_slabs(self, slab_ids: Sequence[int], what: str) -> None:
        """Raise unless nobody can write to them any more."""
        try:
            is_sealed = self._owner.keeper.seal(slab_ids)
        except NeverSealed as error:
            raise UnbrokenError(Reason.SEGMENT_BUSY, f"{what}: {error}") from error
        if not is_sealed:
            raise UnbrokenError(
                Reason.SEGMENT_BUSY, f"expected nobody to have {what} mapped for writing"
            )

    async def _compare(
        self, version: Version, expected: Sequence[int], algorithm: Algorithm
    ) -> None:
        """Raise unless the bytes are what their writer meant."""
        owner = self._owner
        views = [owner.keeper.slab_view(slab_id) for slab_id in version.slab_ids]
        for view, wanted in zip(views, expected, strict=True):
            seen = await asyncio.to_thread(checksums.compute, view, algorithm)
            if seen != wanted:
                owner.holdings.num_corrupt += 1
                raise UnbrokenError(
                    Reason.CHECKSUM_MISMATCH,
                    f"expected {wanted:016x} in a slab of {version.name}, got {seen:016x}",
                )

    def _commit(self, session: Session, commit: wire.CommitBlocks) -> Answer:
        owner = self._owner
        if len(commit.slots) > SLOTS_MAX:
            raise InvalidField("slots", f"at most {SLOTS_MAX}", len(commit.slots))
        free = owner.holdings.commit(
            session,
            commit.slab_id,
            commit.slots,
            lambda slot: owner.keeper.record(commit.slab_id, slot),
        )
        return _reply(committed=wire.Committed(free_slots=free))

    def _get(self, session: Session, get: wire.GetBlocks, now: float) -> Answer:
        owner = self._owner
        ttl_s = _seconds(get.ttl) if get.HasField("ttl") else PIN_S_MAX
        pin, new = owner.holdings.get(
            session, _keys(get.keys), ttl_s, now, accounts.asked_for(get.memory_kind, get.device)
        )
        try:
            fds = owner.keeper.read_only([slab.slab_id for slab in new]) if new else []
        except UnbrokenError:
            assert pin is not None, "a slab is new for a block of it"
            owner.holdings.store.unpin(session.session_id, pin.pin_id)
            owner.holdings.unmapped(session, [slab.slab_id for slab in new])
            raise
        freed, session.freed = session.freed[:FREED_MAX], session.freed[FREED_MAX:]
        if pin is None:
            return _reply(pinned=wire.Pinned(freed_slab_ids=freed))
        owner.on_due(pin.expires_at)
        # At once, from what each block has ready: this is the hottest path there is.
        rows = b"".join([block.row for block in pin.blocks])
        response = wire.SessionResponse()
        pinned = response.pinned  # Filled in place: a message that is passed on is copied.
        pinned.pin_id = pin.pin_id
        if get.in_rows:
            pinned.rows = rows
        else:
            _write_columns(pinned, Rows(rows))
        if new:
            pinned.new_slabs.extend(map(labels.slab_to_proto, new))
        if freed:
            pinned.freed_slab_ids.extend(freed)
        return response, fds, fds

    async def _close_slab(self, session: Session, slab_id: int) -> Answer:
        owner = self._owner
        owner.holdings.store.owned(session.session_id, slab_id)
        self._seal_slabs([slab_id], f"slab {slab_id}")
        owner.holdings.close_slab(session, slab_id)
        owner.keeper.obey()
        await owner.until_read(slab_id)
        return _DONE

    async def _report(self, session: Session, report: wire.ReportCorrupt) -> Answer:
        owner = self._owner
        slab = owner.holdings.store.get_slab(report.slab_id)
        block = None if slab is None else slab.blocks.get(report.slot)
        if slab is None or block is None or slab.tenant != session.peer.tenant:
            return _DONE
        if block.generation != report.generation:
            return _DONE
        if not owner.keeper.is_readable(slab.device):
            # Nothing of it can be looked at here. The report is its tenant's own, and costs a miss.
            owner.holdings.block_corrupt(report.slab_id, report.slot, report.generation)
            return _DONE
        view = owner.keeper.block_view(block)
        seen = await asyncio.to_thread(checksums.compute, view, block.algorithm)
        if seen != block.checksum:  # If it is still that block: the generation says so.
            _log.error("block corrupt", slab=report.slab_id, slot=report.slot, where="get")
            owner.holdings.block_corrupt(report.slab_id, report.slot, report.generation)
        return _DONE

    def _granted(self, version: Version, fds: Sequence[int], ours: Sequence[int]) -> Answer:
        segment = labels.version_to_proto(self._owner.holdings, version)
        return _reply(fds, ours, granted=wire.Granted(segment=segment))


def _reply(
    fds: Sequence[int] = (),
    ours: Sequence[int] = (),
    *,
    bound: wire.Bound | None = None,
    granted: wire.Granted | None = None,
    committed: wire.Committed | None = None,
    found: wire.Found | None = None,
    pinned: wire.Pinned | None = None,
    reclaimed: wire.Reclaimed | None = None,
    read_ticket: wire.ReadTicket | None = None,
) -> Answer:
    response = wire.SessionResponse(
        bound=bound,
        granted=granted,
        committed=committed,
        found=found,
        pinned=pinned,
        reclaimed=reclaimed,
        read_ticket=read_ticket,
    )
    return response, fds, ours


_DONE: Final[Answer] = (wire.SessionResponse(done=wire.Done()), (), ())


def _failed(error: UnbrokenError) -> Answer:
    told = wire.SessionError(
        reason=error.reason.value, detail=error.detail[:1000], metadata=error.metadata
    )
    if error.retry_after_s is not None:
        told.retry_after.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
    return wire.SessionResponse(error=told), (), ()


def _write_columns(pinned: wire.Pinned, rows: Rows) -> None:
    pinned.slab_ids.extend(rows.slab_ids)
    pinned.slots.extend(rows.slots)
    pinned.generations.extend(rows.generations)
    pinned.checksums.extend(rows.checksums)
    pinned.num_tokens.extend(rows.num_tokens)
    algorithms = rows.algorithms
    if set(algorithms) != _ALL_XXH3:
        pinned.checksum_algorithms.extend(map(pb.ChecksumAlgorithm.ValueType, algorithms))


def _seconds(duration: Duration) -> float:
    """Of any duration; `ToTimedelta` raises OverflowError for the longest."""
    return duration.seconds + duration.nanos / 1e9


def _keys(data: bytes) -> list[bytes]:
    try:
        split = keys.split(data)
    except ValueError as error:
        raise InvalidField("keys", f"{error}", len(data)) from error
    if len(split) > KEYS_MAX:
        raise InvalidField("keys", f"at most {KEYS_MAX}", len(split))
    return split


def _wants_gpu(request: wire.SessionRequest, kind: str) -> bool:
    """Whether it is answered by a driver, which may take its time."""
    if kind == "create":
        return request.create.memory_kind == pb.MEMORY_KIND_CUDA
    return kind == "open_slab" and request.open_slab.memory_kind == pb.MEMORY_KIND_CUDA


def _check_name(name: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/-")
    if not 1 <= len(name) <= 200 or not set(name) <= allowed:
        raise InvalidField("name", f"a text matching {NAME}", name)


def _caller(sock: socket.socket) -> Caller:
    """Who connected. Raises OSError, such as when it is gone already."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pidfd = os.pidfd_open(pid)  # Before Linux 6.5.
    return Caller(pid, uid, pidfd)
