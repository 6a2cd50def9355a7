"""Between the engine and the frontends: who asked for what, and who is told what.

The hub owns the ledger. It hears the engine (`EngineListener`) and the links' messages, in the
order in which they come, and never waits; writing is the links' business. What the engine says is
checked against the contract before it is believed: an engine that breaks it is ended, and
frontends see a failure instead of garbage.
"""

import time
from collections.abc import Callable, Iterator

from google.protobuf.duration_pb2 import Duration
from typing_extensions import override

from sidecar.engines.base import Engine, EngineDown, EngineListener, EngineUp
from sidecar.kv_account import num_blocks
from sidecar.ledger import Fenced, Ledger, Retention
from sidecar.link import Attempt, Link
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

_log = log.get_logger(__name__)


class _BrokenContractError(Exception):
    """The engine said something that the contract does not allow."""


class Hub(EngineListener):
    """One engine, any number of frontends."""

    def __init__(
        self,
        engine: Engine,
        *,
        orphan_grace_s: float = 5.0,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`orphan_grace_s` is for attempts that do not say."""
        self.ledger = Ledger[Link](retention)
        self.up: EngineUp | None = None
        """The engine's present life, while it takes work."""
        self.load: worker_pb2.LoadReport | None = None
        self.num_tokens = 0
        """Tokens relayed since the start."""
        self.num_engine_failures = 0
        self.on_change: list[Callable[[], None]] = []
        """Called when the engine comes or goes."""
        self._engine = engine
        self._orphan_grace_s = orphan_grace_s
        self._clock = clock
        self._links: set[Link] = set()
        self._verdict = pb.EngineVerdict(state=worker_pb2.ENGINE_STATE_STARTING)
        self._cached_blocks: dict[int, set[int]] = {}
        self._drain_budget: Duration | None = None

    # Links.

    @property
    def links(self) -> Iterator[Link]:
        """Open Relay calls."""
        return iter(self._links)

    def join(self, link: Link) -> pb.EngineVerdict:
        """A frontend opened a Relay call; returns what it is welcomed with.

        Closes older calls of the same frontend. Raises FENCED if this one is the older.
        """
        for other in list(self._links):
            if other.frontend_id != link.frontend_id:
                continue
            if other.life >= link.life:
                raise UnbrokenError(
                    Reason.FENCED,
                    f"expected a call above incarnation {other.life[0]}, call {other.life[1]}, of "
                    f"frontend {link.frontend_id}, got {link.life[0]}, {link.life[1]}",
                )
            other.close(Reason.FENCED, "a newer call of this frontend replaced this one")
            self.leave(other)
        self._links.add(link)
        for rank, hashes in self._cached_blocks.items():
            link.kv_events(worker_pb2.KvEvents(reset=True, rank=rank, stored=hashes))
        return self._verdict

    def leave(self, link: Link) -> None:
        """The call is over: its attempts are orphans now. Idempotent."""
        if link in self._links:
            self._links.discard(link)
            self.ledger.orphan(link.by_slot.values(), self._clock())
            link.by_slot.clear()

    def start(self, link: Link, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or refuse it."""
        if not self._take_slot(link, message.slot):
            return
        up = self.up
        if self._drain_budget is not None:
            self._refuse(link, message.slot, FailureKind.DRAIN, "the worker drains")
            return
        if up is None:
            detail = worker_pb2.EngineState.Name(self._verdict.state)
            self._refuse(link, message.slot, FailureKind.CRASH, f"the engine is away: {detail}")
            return
        if message.engine_incarnation not in (0, up.incarnation):
            detail = f"expected engine incarnation {up.incarnation}"
            self._refuse(
                link,
                message.slot,
                FailureKind.FENCED,
                f"{detail}, got {message.engine_incarnation}",
            )
            return
        grace = message.orphan_grace
        grace_s = (
            grace.ToNanoseconds() / 1e9
            if message.HasField("orphan_grace")
            else self._orphan_grace_s
        )
        try:
            attempt, revoked = self.ledger.begin(message, link, orphan_grace_s=grace_s)
        except Fenced as fenced:
            link.refuse(
                attempt_pb2.AttemptRefused(
                    slot=message.slot,
                    kind=worker_pb2.FAILURE_KIND_FENCED,
                    detail=str(fenced),
                    epoch_known=fenced.epoch_known,
                )
            )
            return
        if revoked is not None:
            self._revoke(revoked)
            self._engine.abort(revoked.slot)
        link.by_slot[message.slot] = attempt
        message.slot = attempt.slot
        self._engine.start(message)

    def abort(self, link: Link, slot: int) -> None:
        """End an attempt."""
        if (attempt := link.by_slot.get(slot)) is not None:
            self._engine.abort(attempt.slot)

    def ack(self, link: Link, message: attempt_pb2.AckAttempts) -> None:
        """Move windows."""
        if len(message.slots) != len(message.offsets):
            link.close(
                Reason.PROTOCOL_VIOLATION,
                f"ack: expected as many offsets as slots ({len(message.slots)}), "
                f"got {len(message.offsets)}",
            )
            return
        known = [
            (attempt.slot, offset)
            for slot, offset in zip(message.slots, message.offsets, strict=True)
            if (attempt := link.by_slot.get(slot)) is not None
        ]
        if known:
            self._engine.ack([slot for slot, _ in known], [offset for _, offset in known])

    def adopt(self, link: Link, message: pb.AdoptAttempt) -> None:
        """Give an attempt to another reader and tell it again what that one lacks."""
        if not self._take_slot(link, message.slot):
            return
        before = self.ledger.peek(message.stream)
        old = (before.link, before.link_slot) if before is not None else (None, 0)
        try:
            attempt = self.ledger.adopt(
                message.stream, message.epoch, message.offset, link, message.slot
            )
        except KeyError:
            detail = "the stream is not known here"
            self._refuse(link, message.slot, FailureKind.UNSPECIFIED, detail)
        except ValueError as error:
            self._refuse(link, message.slot, FailureKind.PROTOCOL, str(error))
        except Fenced as fenced:
            link.refuse(
                attempt_pb2.AttemptRefused(
                    slot=message.slot,
                    kind=worker_pb2.FAILURE_KIND_FENCED,
                    detail=str(fenced),
                    epoch_known=fenced.epoch_known,
                )
            )
        else:
            old_link, old_slot = old
            if old_link is not None and old_slot in old_link.by_slot:
                old_link.end(old_slot, _revoked(attempt.end_offset))
            self._tell_adopter(link, attempt, message)

    # The engine.

    @override
    def on_up(self, up: EngineUp) -> None:
        self.up = up
        self._cached_blocks.clear()
        self._say(
            pb.EngineVerdict(
                state=worker_pb2.ENGINE_STATE_SERVING,
                engine_incarnation=up.incarnation,
                description=up.description,
            )
        )
        _log.info(
            "engine serves",
            engine=up.description.kind,
            model=up.description.model,
            incarnation=up.incarnation,
        )

    @override
    def on_down(self, down: EngineDown) -> None:
        self.up = None
        self.num_engine_failures += down.failure is not FailureKind.UNSPECIFIED
        now = self._clock()
        for attempt in list(self.ledger):
            ended = attempt_pb2.AttemptEnded(
                slot=attempt.slot,
                end_offset=attempt.end_offset,
                failure=down.failure.value or FailureKind.CRASH.value,  # pyright: ignore[reportArgumentType]
                detail=down.detail,
            )
            self._end(attempt, ended, now)
        self._say(
            pb.EngineVerdict(
                state=worker_pb2.ENGINE_STATE_DEAD,
                engine_incarnation=down.incarnation,
                failure=down.failure.value,  # pyright: ignore[reportArgumentType]
                detail=down.detail,
            )
        )
        _log.warning(
            "engine gone", failure=down.failure.name, detail=down.detail, is_final=down.is_final
        )
        if not down.is_final:
            self._say(pb.EngineVerdict(state=worker_pb2.ENGINE_STATE_STARTING))

    @override
    def on_frame(self, frame: attempt_pb2.StepFrame) -> None:
        try:
            self._tokens(frame)
            if frame.logprobs:
                self._logprobs(frame)
            if frame.ended or frame.refused:
                self._ends(frame)
        except _BrokenContractError as error:
            self._engine.fail(str(error))
            return
        if frame.HasField("load"):
            self.load = frame.load
            for link in self._links:
                link.load(frame.load)
        for events in frame.kv_events:
            self._kv_events(events)

    def _tokens(self, frame: attempt_pb2.StepFrame) -> None:
        """The hot path: every token passes here once."""
        slots, token_ids = frame.slots, frame.token_ids
        if not slots:
            if token_ids:
                raise _BrokenContractError("expected rows for the tokens of a frame, got none")
            return
        if self.up is None:
            raise _BrokenContractError("expected no tokens before the engine is ready")
        if token_ids and max(token_ids) >= self.up.tokenizer.vocab_size:
            raise _BrokenContractError(
                f"expected token ids below {self.up.tokenizer.vocab_size}, got {max(token_ids)}"
            )
        self.num_tokens += len(token_ids)
        running, touched = self.ledger.running, set[Link]()
        try:
            if frame.token_counts:
                self._long_rows(frame, touched)
                return
            for slot, offset, token_id in zip(slots, frame.offsets, token_ids, strict=True):
                attempt = running[slot]
                produced = attempt.token_ids
                if offset != attempt.first_offset + len(produced):
                    raise _gap(attempt, offset)
                produced.append(token_id)
                link = attempt.link
                if link is not None:
                    link.slots.append(attempt.link_slot)
                    link.offsets.append(offset)
                    link.token_ids.append(token_id)
                    if link.counts:
                        link.counts.append(1)
                    touched.add(link)
        except KeyError as error:
            raise _BrokenContractError(f"expected a slot that runs, got {error}") from error
        except ValueError as error:  # zip: columns of different lengths.
            raise _BrokenContractError(f"expected columns of one length: {error}") from error
        finally:
            for link in touched:
                link.flush()

    def _long_rows(self, frame: attempt_pb2.StepFrame, touched: set[Link]) -> None:
        """Rows of any number of tokens each."""
        begin = 0
        for slot, offset, count in zip(frame.slots, frame.offsets, frame.token_counts, strict=True):
            attempt = self.ledger.running[slot]
            if offset != attempt.end_offset:
                raise _gap(attempt, offset)
            token_ids = frame.token_ids[begin : begin + count]
            begin += count
            attempt.token_ids.extend(token_ids)
            if attempt.link is not None:
                attempt.link.row(attempt.link_slot, offset, token_ids)
                touched.add(attempt.link)
        if begin != len(frame.token_ids):
            raise _BrokenContractError(
                f"expected {begin} tokens in {len(frame.slots)} rows, got {len(frame.token_ids)}"
            )

    def _logprobs(self, frame: attempt_pb2.StepFrame) -> None:
        for logprobs in frame.logprobs:
            attempt = self.ledger.running.get(logprobs.slot)
            if attempt is None:
                raise _BrokenContractError(f"expected a slot that runs, got {logprobs.slot}")
            if attempt.link is not None:
                attempt.link.logprobs(attempt.link_slot, logprobs)

    def _ends(self, frame: attempt_pb2.StepFrame) -> None:
        now = self._clock()
        for ended in frame.ended:
            attempt = self.ledger.running.get(ended.slot)
            if attempt is None:
                raise _BrokenContractError(f"expected a slot that runs, got {ended.slot}")
            if ended.end_offset != attempt.end_offset:
                raise _gap(attempt, ended.end_offset)
            self._end(attempt, ended, now)
        for refused in frame.refused:
            attempt = self.ledger.running.get(refused.slot)
            if attempt is None:
                raise _BrokenContractError(f"expected a slot that runs, got {refused.slot}")
            ended = attempt_pb2.AttemptEnded(
                slot=attempt.slot,
                end_offset=attempt.end_offset,
                failure=refused.kind,
                detail=refused.detail,
            )
            link, link_slot = attempt.link, attempt.link_slot
            attempt.link = None
            self._end(attempt, ended, now)
            if link is not None:
                message = attempt_pb2.AttemptRefused()
                message.CopyFrom(refused)
                message.slot = link_slot
                link.refuse(message)

    def _end(self, attempt: Attempt, ended: attempt_pb2.AttemptEnded, now: float) -> None:
        self.ledger.end(attempt, ended, now)
        if attempt.link is not None:
            attempt.link.end(attempt.link_slot, ended)

    def _kv_events(self, events: worker_pb2.KvEvents) -> None:
        cached = self._cached_blocks.setdefault(events.rank, set())
        if events.reset:
            cached.clear()
        cached.difference_update(events.removed)
        cached.update(events.stored)
        for link in self._links:
            link.kv_events(events)

    # Time.

    def tick(self, *, silence_max_s: float, write_max_s: float) -> None:
        """Heartbeats, orphans whose grace is over, links that hear or say nothing any more."""
        now = self._clock()
        for attempt in self.ledger.expired(now):
            self._engine.abort(attempt.slot)
        for link in list(self._links):
            if now - link.heard_at > silence_max_s:
                link.close(Reason.UNREACHABLE, f"nothing heard for {silence_max_s:g} s")
            elif not link.is_idle and now - link.written_at > write_max_s:
                link.close(Reason.OVERLOADED, f"nothing read for {write_max_s:g} s")
            link.heartbeat()

    def drain(self) -> None:
        """Take nothing new and hand every stream over, at exact offsets."""
        self._drain_budget = Duration()
        verdict = pb.EngineVerdict()
        verdict.CopyFrom(self._verdict)
        verdict.is_draining = True
        verdict.drain_budget.CopyFrom(self._drain_budget)
        self._say(verdict)
        for attempt in list(self.ledger):
            if attempt.link is not None:
                attempt.link.end(
                    attempt.link_slot,
                    attempt_pb2.AttemptEnded(
                        end_offset=attempt.end_offset,
                        failure=worker_pb2.FAILURE_KIND_DRAIN,
                        detail="the worker drains",
                    ),
                )
                attempt.link = None
            self._engine.abort(attempt.slot)

    def accounted_blocks(self) -> int:
        """KV blocks of what runs, by the sidecar's own account."""
        if self.up is None:
            return 0
        lengths = [attempt.num_tokens for attempt in self.ledger]
        return num_blocks(lengths, self.up.description.block_size or 1)

    # Parts.

    def _take_slot(self, link: Link, slot: int) -> bool:
        """Whether a handle may be used; else the link is closed."""
        if slot <= link.slot_used:
            link.close(
                Reason.PROTOCOL_VIOLATION, f"expected a slot above {link.slot_used}, got {slot}"
            )
            return False
        link.slot_used = slot
        return True

    def _refuse(self, link: Link, slot: int, kind: FailureKind, detail: str) -> None:
        link.refuse(
            attempt_pb2.AttemptRefused(slot=slot, kind=kind.value, detail=detail)  # pyright: ignore[reportArgumentType]
        )

    def _revoke(self, attempt: Attempt) -> None:
        """Its reader is told that it has no say any more; what it still produces goes nowhere."""
        if attempt.link is not None:
            attempt.link.end(attempt.link_slot, _revoked(attempt.end_offset))
            attempt.link = None

    def _tell_adopter(self, link: Link, attempt: Attempt, message: pb.AdoptAttempt) -> None:
        link.tell(
            pb.RelayResponse(
                adopted=pb.AttemptAdopted(
                    slot=message.slot,
                    end_offset=attempt.end_offset,
                    checkpoint=attempt.checkpoint,
                )
            )
        )
        missed = attempt.token_ids[message.offset - attempt.first_offset :]
        if missed:
            link.row(message.slot, message.offset, missed)
            link.flush()
        if attempt.ended is not None:
            link.end(message.slot, attempt.ended)
        else:
            link.by_slot[message.slot] = attempt
            self._engine.ack([attempt.slot], [message.offset])

    def _say(self, verdict: pb.EngineVerdict) -> None:
        if self._drain_budget is not None:
            verdict.is_draining = True
        self._verdict = verdict
        for link in self._links:
            link.tell(pb.RelayResponse(verdict=verdict))
        for callback in self.on_change:
            callback()


def _gap(attempt: Attempt, offset: int) -> _BrokenContractError:
    return _BrokenContractError(
        f"slot {attempt.slot}: expected offset {attempt.end_offset}, got {offset}"
    )


def _revoked(end_offset: int) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(
        end_offset=end_offset,
        failure=worker_pb2.FAILURE_KIND_FENCED,
        detail="a newer epoch took the stream",
    )
