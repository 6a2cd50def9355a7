"""Between the engine and the frontends: who asked for what, and who is told what.

The hub owns the ledger. It hears the engine (`EngineListener`) and the links' messages, in the
order in which they come, and never waits; writing is the links' business. What the engine says is
checked against the contract before it is believed (`frames`): an engine that breaks it is ended,
and frontends see a failure instead of garbage.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from sidecar import frames, holdings, watchdog
from sidecar.admission import Admission, Busy, Told
from sidecar.engine_load import EngineLoad
from sidecar.engines.base import Engine, EngineDown, EngineListener, EngineUp
from sidecar.kv_account import num_blocks
from sidecar.ledger import Fenced, Ledger, Retention
from sidecar.link import Attempt, Link
from sidecar.queue_reports import QueueReports
from sidecar.rows import ROWS_MIN, Rows
from sidecar.watchdog import Watchdog, WatchdogPolicy
from unbroken import log
from unbroken.errors import InvalidField, Reason, UnbrokenError
from unbroken.holdings import Holding
from unbroken.outcome import FailureKind
from unbroken.rate import Rate
from unbroken.thresholds import from_proto, to_proto
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

if TYPE_CHECKING:
    from unbroken.v1.worker_pb2 import FailureKind as FailureKindProto

ID_CHARS_MAX: Final = 128
"""Of a request id and of a tenant: their epochs are remembered for long."""
FRONTENDS_KNOWN_MAX: Final = 1_000
"""Of so many the latest call is remembered, so that older ones stay refused."""

_LOAD_FRESH_S: Final = 0.5
"""So long an engine's own word about its load counts; then what the ledger knows does."""
_LOGPROBS_PIECE: Final = 512
"""So many tokens with log probabilities are told again at once: a frame has to hold them."""
_FAULTS: Final = frozenset(
    {
        FailureKind.CRASH,
        FailureKind.HANG,
        FailureKind.STALL,
        FailureKind.OVERLOAD,
        FailureKind.PROTOCOL,
        FailureKind.ENGINE_ERROR,
    }
)
"""Ends of attempts that speak against this worker."""
_KV_HASHES_MAX: Final = 100_000
"""In one message of a snapshot."""

_log = log.get_logger(__name__)


class Hub(EngineListener):
    """One engine, any number of frontends."""

    def __init__(
        self,
        engine: Engine,
        *,
        orphan_grace_s: float = 5.0,
        deadline_margin_s: float = 0.005,
        retention: Retention | None = None,
        watchdog_policy: WatchdogPolicy | None = None,
        rows_min: int = ROWS_MIN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`orphan_grace_s` is for attempts that do not say; `deadline_margin_s` is what the engine
        lacks of an attempt's time; frames with fewer rows than `rows_min` are no `Rows`.
        """
        self.ledger = Ledger[Link](retention)
        self.up: EngineUp | None = None
        """The engine's present life."""
        self.load: worker_pb2.LoadReport | None = None
        """Of that life, the latest."""
        self.is_draining = False
        self.hand_over_at: float | None = None
        """While it drains: when what still runs is handed over; None: it may finish."""
        self.num_drained = 0
        """Attempts that came to their own end while the worker drained."""
        self.num_handed_over = 0
        """Attempts that the drain ended."""
        self.num_tokens = 0
        """Tokens from the engine since the start, the canary's too."""
        self._num_probe_tokens = 0  # Of those, of probes that have ended.
        self.num_engine_failures = 0
        self.num_engine_restarts = 0
        self.attempts = Rate()
        """Asked for."""
        self.faults = Rate()
        """Attempts that ended, or did not begin, by this worker's fault."""
        self.num_shed = 0
        """Attempts at new work that were refused because the worker was busy."""
        self.admission = Admission[Link]()
        """What the engine has, and may have."""
        self.queues = QueueReports[Link]()
        """What waits at frontends."""
        self.watchdog = Watchdog(watchdog_policy)
        self.on_change: list[Callable[[], None]] = []
        """Called when the engine comes or goes."""
        self.on_over: list[Callable[[], None]] = []
        """Called while it drains, when an attempt may have been the last one left."""
        self.on_step: list[Callable[[], None]] = []
        """Called while it drains, when the engine has brought tokens."""
        self.on_woken: list[Callable[[], None]] = []
        """Called after each frame: what is nearly due can be done now."""
        self._engine = engine
        self._orphan_grace_s = orphan_grace_s
        self._deadline_margin_s = deadline_margin_s
        self._clock = clock
        self._links: dict[Link, None] = {}  # In the order of their opening.
        self._lives: OrderedDict[str, tuple[int, int]] = OrderedDict()  # Highest, by frontend.
        self._rows: Rows[Link] | None = None
        self._rows_min = rows_min
        self._slots_seen: list[int] = []  # Of the last frame with tokens that went the long way.
        self._replaying: dict[int, Attempt] = {}  # By engine slot; also such as have ended.
        self._prefilling: dict[int, tuple[int, float]] = {}  # By slot: tokens, and since when.
        self._prefill_tokens = 0  # Of all of them.
        self._load_at = 0.0
        self._prefilled = 0  # By the engine's own account,
        self._prefilled_at = 0.0  # and since when that grows: no step began before.
        self._verdict = pb.EngineVerdict(state=worker_pb2.ENGINE_STATE_STARTING)
        self._cached_blocks: dict[int, set[int]] = {}  # By rank.
        self._ticked_at = clock()
        self._has_handed_over = False
        self._unfit: tuple[FailureKind, str] | None = None  # What the canary found.
        self._probes: dict[int, Attempt] = {}  # The canary's, by engine slot, while they run.

    @property
    def takes_work(self) -> bool:
        """Whether attempts are begun here now."""
        return (
            self.up is not None
            and not self.is_draining
            and not self.watchdog.is_stalled
            and self._unfit is None
        )

    @property
    def has_requests(self) -> bool:
        """Whether anything runs that is not the canary's."""
        return len(self.ledger.running) > len(self._probes)

    @property
    def num_relayed(self) -> int:
        """Tokens relayed since the start. From any thread."""
        of_probes = sum(attempt.num_produced for attempt in list(self._probes.values()))
        return self.num_tokens - of_probes - self._num_probe_tokens

    @property
    def num_running(self) -> int:
        """Attempts on the engine, without the canary's."""
        return len(self.ledger.running) - len(self._probes)

    @property
    def num_left(self) -> int:
        """Attempts that somebody waits for: they run, or their reader has yet to be told more."""
        running = {attempt.slot for attempt in self.ledger if attempt.given_up is None}
        return len((running | self._replaying.keys()) - self._probes.keys())

    @property
    def engine_load(self) -> EngineLoad | None:
        """What the engine has to do; None if that is not known now."""
        up, load = self.up, self.load
        if up is None or load is None or self.watchdog.is_stalled:
            return None
        return EngineLoad.of(load, up.description)

    @property
    def verdict(self) -> pb.EngineVerdict:
        """What frontends were told of the engine last."""
        return self._verdict

    # Links.

    @property
    def links(self) -> Collection[Link]:
        """Open Relay calls."""
        return self._links.keys()

    def join(self, link: Link) -> pb.EngineVerdict:
        """A frontend opened a Relay call; returns what it is welcomed with.

        Closes older calls of the same frontend. Raises FENCED if this one is not the newest.
        """
        known = self._lives.get(link.frontend_id)
        if known is not None and link.life <= known:
            raise UnbrokenError(
                Reason.FENCED,
                f"expected a call after incarnation {known[0]}, call {known[1]}, of frontend "
                f"{link.frontend_id}, got {link.life[0]}, {link.life[1]}",
            )
        self._lives[link.frontend_id] = link.life
        self._lives.move_to_end(link.frontend_id)
        if len(self._lives) > FRONTENDS_KNOWN_MAX:
            self._lives.popitem(last=False)
        for other in list(self._links):
            if other.frontend_id == link.frontend_id:
                other.close(Reason.FENCED, "a newer call of this frontend replaced this one")
                self.leave(other)
        self._links[link] = None
        for rank, cached in self._cached_blocks.items():
            hashes = list(cached)
            for begin in range(0, max(1, len(hashes)), _KV_HASHES_MAX):
                stored = hashes[begin : begin + _KV_HASHES_MAX]
                link.kv_events(worker_pb2.KvEvents(reset=begin == 0, rank=rank, stored=stored))
        self._mark_drain(self._verdict)
        return self._verdict

    def leave(self, link: Link) -> None:
        """The call is over: its attempts are orphans now. Idempotent."""
        if link not in self._links:
            return
        del self._links[link]
        self.admission.left(link)
        self.queues.left(link)
        for attempt in link.by_slot.values():
            self._replaying.pop(attempt.slot, None)
        self.ledger.orphan(link.by_slot.values(), self._clock())
        link.by_slot.clear()
        self._over()

    def start(self, link: Link, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or refuse it."""
        if not self._take_slot(link, message.slot):
            return
        now = self._clock()
        self.attempts.count(now)
        if (reason := self._reason_to_refuse(message)) is not None:
            self._count_fault(reason[0], now)
            _refuse(link, message.slot, *reason)
            return
        if message.is_new_work:
            checkpoint = message.checkpoint
            num_tokens = len(checkpoint.prompt_token_ids) + len(checkpoint.output_token_ids)
            busy = self.admission.reason_to_refuse(link, message.stream.tenant, num_tokens, now)
            if busy is not None:
                self._shed(link, message.slot, busy)
                return
        grace_s = self._orphan_grace_s
        if message.HasField("orphan_grace"):
            grace_s = message.orphan_grace.ToNanoseconds() / 1e9
        try:
            attempt, revoked = self.ledger.begin(
                message,
                link,
                owner=link.owner,
                orphan_grace_s=grace_s,
                engine_incarnation=self.up.incarnation if self.up is not None else 0,
                now=now,
                deadline_margin_s=self._deadline_margin_s,
            )
        except Fenced as fenced:
            _refuse(link, message.slot, FailureKind.FENCED, f"{fenced}", fenced.epoch_known)
            return
        if revoked is not None:
            self._give_up(revoked, FailureKind.FENCED, "a newer epoch took the stream")
        link.by_slot[message.slot] = attempt
        message.slot = attempt.slot
        if attempt.engine_deadline_at is not None:
            message.deadline.FromNanoseconds(int((attempt.engine_deadline_at - now) * 1e9))
        if self.num_running == 1:
            self.watchdog.work_began(now)
        num_tokens = attempt.num_tokens
        self._prefilling[attempt.slot] = (num_tokens, now)
        self._prefill_tokens += num_tokens
        if not message.is_probe:
            self.admission.began(attempt.slot, num_tokens, message.stream.tenant, now)
        self._engine.start(message)

    def abort(self, link: Link, slot: int) -> None:
        """End an attempt."""
        attempt = link.by_slot.get(slot)
        if attempt is None:
            return
        if attempt.ended is None:
            self._engine.abort(attempt.slot)
        else:  # Its reader lacks tokens, and wants them no more.
            self._tell_end(attempt, _cancelled())

    def ack(self, link: Link, message: attempt_pb2.AckAttempts) -> None:
        """Move windows."""
        if len(message.slots) != len(message.offsets):
            link.close(
                Reason.PROTOCOL_VIOLATION,
                f"ack: expected as many offsets as slots ({len(message.slots)}), "
                f"got {len(message.offsets)}",
            )
            return
        slots: list[int] = []
        offsets: list[int] = []
        for slot, offset in zip(message.slots, message.offsets, strict=True):
            attempt = link.by_slot.get(slot)
            if attempt is None:
                continue  # It ended meanwhile.
            before = attempt.acknowledged
            attempt.acknowledge(offset)
            if attempt.ended is None and offset > before:  # Else it says nothing new.
                slots.append(attempt.slot)
                offsets.append(offset)
            if attempt.replay is not None:
                self._replay(attempt)
        if slots:
            self._engine.ack(slots, offsets)

    def learn_thresholds(self, link: Link, message: pb.PushThresholds) -> None:
        """A frontend says what the worker may have."""
        if link not in self._links:
            return
        try:
            self.admission.told(link, Told(from_proto(message.thresholds), message.version))
        except InvalidField as error:
            link.close(Reason.PROTOCOL_VIOLATION, f"{error}")

    def learn_queue(self, link: Link, report: pb.QueueReport) -> None:
        """A frontend says what stands in its line."""
        if link in self._links:
            incarnation = link.life[0]
            self.queues.told(link, report, frontend_id=link.frontend_id, incarnation=incarnation)

    def adopt(self, link: Link, message: pb.AdoptAttempt) -> None:
        """Give an attempt to another reader and tell it again what that one lacks."""
        if not self._take_slot(link, message.slot):
            return
        if self._has_handed_over:  # Before that, whoever adopts waits for what runs here anyway.
            _refuse(link, message.slot, FailureKind.DRAIN, "the worker drains")
            return
        before = self.ledger.peek(message.stream)
        reader = before.link if before is not None else None
        link_slot, sent = (before.link_slot, before.sent) if before is not None else (0, 0)
        try:
            attempt = self.ledger.adopt(message, link, owner=link.owner, now=self._clock())
        except KeyError:
            detail = "the stream is not known here"
            if before is not None:
                detail = (
                    f"expected an attempt of engine incarnation {message.engine_incarnation}, "
                    f"got one of {before.engine_incarnation}"
                )
            _refuse(link, message.slot, FailureKind.UNSPECIFIED, detail)
            return
        except ValueError as error:
            _refuse(link, message.slot, FailureKind.PROTOCOL, f"{error}")
            return
        except Fenced as fenced:
            _refuse(link, message.slot, FailureKind.FENCED, f"{fenced}", fenced.epoch_known)
            return
        if reader is not None:
            ended = _failed(attempt.slot, sent, FailureKind.FENCED, "the stream was adopted")
            reader.end(link_slot, ended, sent)
        adopted = pb.AttemptAdopted(
            slot=message.slot,
            end_offset=attempt.end_offset,
            checkpoint=attempt.checkpoint,
            started_epoch=attempt.started_epoch,
        )
        link.adopted(adopted)
        link.by_slot[message.slot] = attempt
        self._replaying[attempt.slot] = attempt
        if attempt.ended is None:
            attempt.acknowledge(message.offset)
            self._engine.ack([attempt.slot], [message.offset])
        self._replay(attempt)

    def release(self, link: Link) -> None:
        """End what this frontend left behind on its earlier calls and has not taken up again.

        What an earlier life of it left behind is for whoever resumes those streams, and keeps its
        grace time.
        """
        if link not in self._links:
            return
        for attempt in list(self.ledger):
            if attempt.owner == link.owner and attempt.link is None and attempt.given_up is None:
                self._give_up(attempt, FailureKind.PARTITION, "its frontend let go of it")

    def cancel(self, link: Link, message: pb.CancelAttempts) -> None:
        """A client wants no more of a request. What nobody reads ends; what a frontend reads does
        when that one says so, or is lost.
        """
        if link not in self._links:
            return
        for attempt in self.ledger.of_request(message.request_id, message.tenant):
            if attempt.is_probe:
                continue
            attempt.orphan_grace_s = 0.0
            is_fenced = attempt.given_up is not None and attempt.given_up[0] is FailureKind.FENCED
            if attempt.link is None and not is_fenced:  # Whatever else it was given up for.
                attempt.orphaned_until = None
                self._give_up(attempt, FailureKind.FENCED, "cancelled by request")

    # The canary.

    def probe(self, message: attempt_pb2.StartAttempt) -> Attempt:
        """Begin an attempt that nobody reads. What comes of it is found in it."""
        assert self.up is not None, "only who is up is asked"
        now = self._clock()
        attempt, _ = self.ledger.begin(
            message,
            None,
            owner=("", 0),
            orphan_grace_s=0.0,
            engine_incarnation=self.up.incarnation,
            now=now,
        )
        self._probes[attempt.slot] = attempt
        message.slot = attempt.slot
        if not self.has_requests:
            self.watchdog.work_began(now)
        self._engine.start(message)
        return attempt

    def abandon(self, attempt: Attempt) -> None:
        """Wait for a probe no longer."""
        if attempt.ended is None:
            self._engine.abort(attempt.slot)

    def call_unfit(self, failure: FailureKind, detail: str) -> None:
        """Send the engine no work, and tell the frontends what speaks against it."""
        self._unfit = failure, detail
        if self.up is not None and not self.watchdog.is_stalled:
            self._say_stalled(failure, detail)

    def call_fit(self) -> None:
        """Nothing speaks against it any more."""
        was_unfit, self._unfit = self._unfit is not None, None
        if was_unfit and self.up is not None and not self.watchdog.is_stalled:
            self._say_serving()

    # The engine.

    @override
    def on_up(self, up: EngineUp) -> None:
        self.num_engine_restarts += up.incarnation > 1
        self.up = up
        self.admission.up(up.description)
        self.watchdog.up(
            self._clock(),
            frame_interval_s=up.frame_interval_s,
            prefill_tokens_max=up.description.prefill_tokens_max,
        )
        self._say_serving()

    @override
    def on_down(self, down: EngineDown) -> None:
        self.up = self.load = self._unfit = None
        self.watchdog.down()
        self._prefilled = 0
        self._prefilling.clear()
        self._prefill_tokens = 0
        self._cached_blocks.clear()
        self.num_engine_failures += down.failure not in (
            FailureKind.UNSPECIFIED,
            FailureKind.DRAIN,
        )
        now = self._clock()
        failure = down.failure or FailureKind.CRASH
        for attempt in list(self.ledger):
            ended = _failed(attempt.slot, attempt.end_offset, failure, down.detail)
            self._end(attempt, ended, now)
        for attempt in list(self._replaying.values()):  # Ended before, but not for their readers.
            self._tell_end(attempt, _failed(attempt.slot, attempt.sent, failure, down.detail))
        self._say(
            pb.EngineVerdict(
                state=worker_pb2.ENGINE_STATE_DEAD,
                engine_incarnation=down.incarnation,
                failure=_to_proto(down.failure),
                detail=down.detail,
            )
        )
        if not down.is_final:
            self._say(pb.EngineVerdict(state=worker_pb2.ENGINE_STATE_STARTING))

    @override
    def on_frame(self, frame: attempt_pb2.StepFrame) -> None:
        try:
            if self.up is None:
                raise frames.BrokenContract("expected no frame before the engine is ready")
            attempts = frames.check(frame, self.ledger.running, self.up, self._rows)
        except frames.BrokenContract as error:
            self._engine.fail(f"{error}")
            return
        recovered = self._watch_frame(frame)
        if attempts:
            self._tokens(frame, attempts)
        if frame.ended or frame.refused:
            self._ends(frame)
        for attempt in list(self._replaying.values()):
            self._replay(attempt)
        if frame.HasField("load"):
            self.load = frame.load
            self.admission.reported(frame.load, frame.slot_seen, self._clock())
            for link in self._links:
                link.load(frame.load)
        for events in frame.kv_events:
            self._kv_events(events)
        if recovered is not None:
            _log.warning("engine goes on", stalled_s=round(recovered.stalled_s, 3))
            self._say_serving()
        if self.is_draining and attempts:
            for callback in self.on_step:
                callback()
        for callback in self.on_woken:
            callback()

    @override
    def on_refused(self, refused: attempt_pb2.AttemptRefused) -> None:
        self._not_prefilling(refused.slot, self._clock())
        self._ends(attempt_pb2.StepFrame(refused=[refused]))

    def _tokens(self, frame: attempt_pb2.StepFrame, attempts: Sequence[Attempt]) -> None:
        """The hot path: every token passes here once. `attempts` has one for each row."""
        self.num_tokens += len(frame.token_ids)
        rows = self._rows
        if rows is not None and attempts is rows.attempts:
            rows.step(frame)
            for link in rows.readers:
                link.flush()
            return
        if rows is not None:
            rows.part()
            self._rows = None
        links = {attempt.live_link for attempt in attempts}
        if frame.token_counts:
            _enter_long_rows(frame, attempts)
        else:
            for attempt, token_id in zip(attempts, frame.token_ids[:], strict=True):
                attempt.token_ids.append(token_id)
            _tell_by_link(frame, attempts, links)
        for logprobs in frame.logprobs:
            attempt = self.ledger.running[logprobs.slot]
            if attempt.logprobs is not None:
                kept = [token.SerializeToString() for token in logprobs.tokens]
                attempt.logprobs += kept
                attempt.logprobs_bytes += sum(map(len, kept))
            if attempt.live_link is not None:
                attempt.live_link.logprobs(attempt.link_slot, logprobs)
        for link in links:  # Only now: a frame that is full is closed by it.
            if link is not None:
                link.flush()
        self._look_for_rows(frame, attempts)

    def _look_for_rows(self, frame: attempt_pb2.StepFrame, attempts: Sequence[Attempt]) -> None:
        """Who came together twice will do so again."""
        slots = frame.slots[:] if not (frame.token_counts or frame.logprobs) else []
        is_same, self._slots_seen = slots == self._slots_seen, slots
        if is_same and len(slots) >= self._rows_min and len(set(slots)) == len(slots):
            self._rows = Rows(slots, attempts)

    def _ends(self, frame: attempt_pb2.StepFrame) -> None:
        now, running = self._clock(), self.ledger.running
        for ended in frame.ended:
            self._end(running[ended.slot], ended, now)
        for refused in frame.refused:
            attempt = running[refused.slot]
            if attempt.link is not None:
                message = attempt_pb2.AttemptRefused()
                message.CopyFrom(refused)
                message.slot = attempt.link_slot
                attempt.link.refuse(message)
            attempt.detach()
            ended = attempt_pb2.AttemptEnded(
                slot=attempt.slot,
                end_offset=attempt.end_offset,
                failure=refused.kind,
                detail=refused.detail,
            )
            self._end(attempt, ended, now)

    def _kv_events(self, events: worker_pb2.KvEvents) -> None:
        cached = self._cached_blocks.setdefault(events.rank, set())
        if events.reset:
            cached.clear()
        cached.difference_update(events.removed)
        cached.update(events.stored)
        for link in self._links:
            link.kv_events(events)

    # Time.

    def tick(self, *, silence_max_s: float) -> None:
        """Heartbeats, orphans whose grace is over, links that are closed or say nothing."""
        now = self._clock()
        # If this process itself stood still, what came meanwhile has not been read yet.
        stood_still = now - self._ticked_at > silence_max_s / 2
        self._ticked_at = now
        for attempt in self.ledger.expired(now):
            detail = f"nobody read it for {attempt.orphan_grace_s:g} s"
            self._give_up(attempt, FailureKind.PARTITION, detail)
        for attempt in self.ledger.overdue(now):
            # Whoever adopts it next may have more time.
            attempt.given_up = (FailureKind.DRAIN, "the deadline of its reader has passed")
            self._tell_end(attempt, _cancelled("the deadline has passed", is_expired=True))
            self._engine.abort(attempt.slot)
        for link in list(self._links):
            if now - link.heard_at > silence_max_s and not stood_still:
                link.close(Reason.UNREACHABLE, f"nothing heard for {silence_max_s:g} s")
            if link.error is not None:
                self.leave(link)  # Its writer may be stuck.
            else:
                link.heartbeat(self.queues.of_others(link))

    def watch(self, *, judges: bool = True) -> bool:
        """See whether the engine makes progress; every `watchdog.LOOK_INTERVAL_S`.

        Returns whether that is all; else it is to be called again, to judge what it saw. It
        `judges` only when all has been read that came since it did so last.
        """
        now = self._clock()
        if not self.watchdog.look(now):
            return True
        if not judges:
            return False
        match self.watchdog.judge(now, self.work(now)):
            case watchdog.Stalled(failure=failure, detail=detail):
                assert self.up is not None, "it is watched while it is up"
                _log.warning("engine stalled", failure=failure.name, detail=detail)
                self._say_stalled(failure, detail)
            case watchdog.Restart(failure=failure, detail=detail, stalled_s=stalled_s):
                self._engine.fail(detail, failure, after_s=stalled_s)
            case _:
                pass
        return True

    def work(self, now: float) -> watchdog.Work:
        """What the engine has to do: by its own word if that is fresh, else by the ledger."""
        queued = self.queued_tokens
        load = self.load
        is_told = self.up is not None and self.up.tells_steps
        if is_told and load is not None and now - self._load_at <= _LOAD_FRESH_S:
            return watchdog.Work(_is_busy(load), queued)
        has_steps = any(
            attempt.has_room for attempt in self.ledger if attempt.slot not in self._probes
        )
        return watchdog.Work(has_steps, queued)

    @property
    def queued_tokens(self) -> int:
        """Tokens that may have to be prefilled; those found in a cache count too."""
        load = self.load
        reported = sum(rank.prefill_tokens_queued for rank in load.ranks) if load is not None else 0
        return max(self._prefill_tokens, reported)

    def now(self) -> float:
        """On the hub's clock."""
        return self._clock()

    def drain(self, budget_s: float | None = 0.0) -> None:
        """Take nothing new, and tell the frontends when what runs will be handed over.

        None: it may finish. 0: every stream is handed over now, at its exact offset.
        """
        if self._has_handed_over:
            return
        self.is_draining = True
        self.hand_over_at = None if budget_s is None else self._clock() + budget_s
        self._has_handed_over = budget_s == 0
        verdict = pb.EngineVerdict()
        verdict.CopyFrom(self._verdict)
        self._say(verdict)
        if not self._has_handed_over:
            return
        left = {attempt.slot: attempt for attempt in self.ledger} | self._replaying
        for attempt in left.values():
            self.num_handed_over += attempt.given_up is None and attempt.slot not in self._probes
            self._give_up(attempt, FailureKind.DRAIN, "the worker drains")

    def accounted_blocks(self) -> int:
        """KV blocks of what runs, by the sidecar's own account."""
        if self.up is None:
            return 0
        lengths = [attempt.num_tokens for attempt in list(self.ledger.running.values())]
        return num_blocks(lengths, self.up.description.block_size or 1)

    def holdings(self) -> list[Holding]:
        """What is held here for streams; the engine's own holdings are not among them."""
        return holdings.held(
            self.ledger,
            replaying=self._replaying.values(),
            prefilling={slot: num_tokens for slot, (num_tokens, _) in self._prefilling.items()},
            given=self.admission.given_by_slot,
            slots_by_frontend=[(link.frontend_id, link.by_slot.values()) for link in self._links],
            block_size=self.up.description.block_size if self.up is not None else 0,
        )

    # Parts.

    def _take_slot(self, link: Link, slot: int) -> bool:
        """Whether a handle may be used; else the link is closed."""
        if link not in self._links:
            return False  # It was closed, and what it still says counts for nothing.
        if slot <= link.slot_used:
            link.close(
                Reason.PROTOCOL_VIOLATION, f"expected a slot above {link.slot_used}, got {slot}"
            )
            return False
        link.slot_used = slot
        return True

    def _reason_to_refuse(
        self, message: attempt_pb2.StartAttempt
    ) -> tuple[FailureKind, str] | None:
        key = message.stream
        if self.is_draining:
            return FailureKind.DRAIN, "the worker drains"
        if self.up is None:
            state = worker_pb2.EngineState.Name(self._verdict.state)
            return FailureKind.CRASH, f"expected an engine, its state is {state}"
        if self.watchdog.is_stalled:
            return FailureKind(self._verdict.failure), self._verdict.detail
        if self._unfit is not None:
            return self._unfit
        if message.engine_incarnation not in (0, self.up.incarnation):
            return (
                FailureKind.FENCED,
                f"expected engine incarnation {self.up.incarnation}, got "
                f"{message.engine_incarnation}",
            )
        if not (1 <= len(key.request_id) <= ID_CHARS_MAX and len(key.tenant) <= ID_CHARS_MAX):
            return (
                FailureKind.REJECTED,
                f"stream: expected a request_id of 1 to {ID_CHARS_MAX} characters and a tenant of "
                f"at most {ID_CHARS_MAX}, got {len(key.request_id)} and {len(key.tenant)}",
            )
        return None

    def _shed(self, link: Link, slot: int, busy: Busy) -> None:
        """Refuse new work, and tell whoever sent it what there is."""
        self.num_shed += 1
        verdict = attempt_pb2.BusyVerdict(
            thresholds=to_proto(busy.told.thresholds),
            version=busy.told.version,
            load=self.admission.load(self.load, busy),
        )
        overload = _to_proto(FailureKind.OVERLOAD)
        link.refuse(
            attempt_pb2.AttemptRefused(slot=slot, kind=overload, detail=f"{busy}", busy=verdict)
        )

    def _watch_frame(self, frame: attempt_pb2.StepFrame) -> watchdog.Recovered | None:
        """Tell the watchdog of a frame, before anything else is made of it."""
        now = self._clock()
        num_queued = self.queued_tokens
        is_step = bool(frame.slots)
        if self._prefilling:
            for slot in (*frame.slots, *(refused.slot for refused in frame.refused)):
                self._not_prefilling(slot, now)
            for ended in frame.ended:
                self._not_prefilling(ended.slot, now)
        if frame.ended and not self._prefilled:
            for ended in frame.ended:
                attempt = self.ledger.running[ended.slot]
                if attempt.prefilled_in_s is not None:
                    self.watchdog.prefilled(ended.prefill_tokens, attempt.prefilled_in_s)
        if frame.HasField("load") and self.up is not None and self.up.tells_steps:
            load, before = frame.load, self.load
            self._load_at = now
            num_steps = before.engine_steps_total if before is not None else 0
            has_work = _is_busy(load)
            if load.engine_steps_total > num_steps or not has_work:
                is_step = is_step or load.engine_steps_total > num_steps
                num_tokens = load.prefill_tokens_total - self._prefilled
                self.watchdog.prefilled(num_tokens, now - self._prefilled_at)
                self._prefilled, self._prefilled_at = load.prefill_tokens_total, now
        else:
            has_work = True
        return self.watchdog.heard(
            now, is_step=is_step, has_work=has_work, prefill_tokens=num_queued
        )

    def _not_prefilling(self, slot: int, now: float) -> None:
        num_tokens, since = self._prefilling.pop(slot, (0, now))
        self.admission.computed(slot)
        if num_tokens:
            self._prefill_tokens -= num_tokens
            self.ledger.running[slot].prefilled_in_s = now - since

    def _say_stalled(self, failure: FailureKind, detail: str) -> None:
        assert self.up is not None, "only who is up stalls"
        self._say(
            pb.EngineVerdict(
                state=worker_pb2.ENGINE_STATE_STALLED,
                engine_incarnation=self.up.incarnation,
                failure=_to_proto(failure),
                detail=detail,
            )
        )

    def _say_serving(self) -> None:
        assert self.up is not None, "only who is up serves"
        if self._unfit is not None:
            self._say_stalled(*self._unfit)
            return
        self._say(
            pb.EngineVerdict(
                state=worker_pb2.ENGINE_STATE_SERVING,
                engine_incarnation=self.up.incarnation,
                description=self.up.description,
            )
        )

    def _give_up(self, attempt: Attempt, failure: FailureKind, detail: str) -> None:
        """End an attempt by ourselves; what it still produces goes nowhere."""
        self._tell_end(attempt, _failed(attempt.slot, attempt.sent, failure, detail))
        if attempt.ended is None:
            attempt.given_up = (failure, detail)
            self._engine.abort(attempt.slot)

    def _end(self, attempt: Attempt, ended: attempt_pb2.AttemptEnded, now: float) -> None:
        """The engine has done with an attempt."""
        if self._probes.pop(attempt.slot, None) is not None:
            self._num_probe_tokens += attempt.num_produced
            self.ledger.end(attempt, ended, now)
            return
        self._count_fault(ended.failure, now)
        self.admission.over(attempt.slot)
        is_cancelled = ended.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
        if attempt.given_up is not None and is_cancelled:
            # Not its frontend's wish: who adopts it now has to go on elsewhere.
            ended = _failed(attempt.slot, attempt.end_offset, *attempt.given_up)
        elif is_cancelled and attempt.is_expired(now):
            if attempt.is_deadline_of_another:
                detail = "the engine keeps to the deadline of an earlier reader"
                ended = _failed(attempt.slot, attempt.end_offset, FailureKind.DRAIN, detail)
            else:
                ended.is_expired = True
        self.ledger.end(attempt, ended, now)
        self.num_drained += self.is_draining and not ended.failure
        if attempt.replay is None or is_cancelled or ended.failure:
            self._tell_end(attempt, ended)

    def _count_fault(self, failure: int, now: float) -> None:
        if failure in _FAULTS:
            self.faults.count(now)

    def _tell_end(self, attempt: Attempt, ended: attempt_pb2.AttemptEnded) -> None:
        """The last word to its reader, at the offset that it got to."""
        if attempt.link is not None:
            attempt.link.end(attempt.link_slot, ended, attempt.sent)
        attempt.detach()
        self._replaying.pop(attempt.slot, None)
        self._over()

    def _over(self) -> None:
        if self.is_draining:
            for callback in self.on_over:
                callback()

    def _replay(self, attempt: Attempt) -> None:
        """Send who adopted it what there is and what its window has room for."""
        replay, link = attempt.replay, attempt.link
        assert replay is not None, "only such are replayed"
        assert link is not None, "a replay has a reader"
        due = replay.due(attempt.end_offset)
        logprobs = attempt.logprobs
        piece = _LOGPROBS_PIECE if logprobs is not None else due
        while due > replay.sent:
            begin = replay.sent - attempt.first_offset
            end = min(begin + piece, due - attempt.first_offset)
            link.row(attempt.link_slot, replay.sent, attempt.token_ids[begin:end])
            if logprobs is not None:
                tokens = map(generation_pb2.TokenLogprobs.FromString, logprobs[begin:end])
                link.logprobs(attempt.link_slot, attempt_pb2.SlotLogprobs(tokens=tokens))
            link.flush()
            replay.sent += end - begin
        if due < attempt.end_offset:
            return
        if attempt.ended is not None:
            self._tell_end(attempt, attempt.ended)
        elif attempt.is_paced_by_engine:
            attempt.follow()
            del self._replaying[attempt.slot]

    def _say(self, verdict: pb.EngineVerdict) -> None:
        self._mark_drain(verdict)
        self._verdict = verdict
        for link in self._links:
            link.tell(pb.RelayResponse(verdict=verdict))
        for callback in self.on_change:
            callback()

    def _mark_drain(self, verdict: pb.EngineVerdict) -> None:
        verdict.is_draining = self.is_draining
        verdict.ClearField("drain_budget")
        if self.hand_over_at is not None:
            verdict.drain_budget.SetInParent()  # Present even if nothing is left of it.
            left_s = max(0.0, self.hand_over_at - self._clock())
            verdict.drain_budget.FromNanoseconds(round(left_s * 1e9))


def _tell_by_link(
    frame: attempt_pb2.StepFrame, attempts: Sequence[Attempt], links: Iterable[Link | None]
) -> None:
    """Tell each reader its rows, of one token each."""
    columns: dict[Link | None, tuple[list[int], list[int], list[int]]]
    columns = {link: ([], [], []) for link in links}
    rows = zip(attempts, frame.offsets[:], frame.token_ids[:], strict=True)
    for attempt, offset, token_id in rows:
        slots, offsets, token_ids = columns[attempt.live_link]
        slots.append(attempt.link_slot)
        offsets.append(offset)
        token_ids.append(token_id)
    for link, mine in columns.items():
        if link is not None:
            link.rows(*mine)


def _enter_long_rows(frame: attempt_pb2.StepFrame, attempts: Sequence[Attempt]) -> None:
    """Rows of any number of tokens."""
    begin = 0
    rows = zip(attempts, frame.offsets, frame.token_counts, strict=True)
    for attempt, offset, count in rows:
        token_ids = frame.token_ids[begin : begin + count]
        begin += count
        attempt.token_ids.extend(token_ids)
        if attempt.live_link is not None:
            attempt.live_link.row(attempt.link_slot, offset, token_ids)


def _is_busy(load: worker_pb2.LoadReport) -> bool:
    """Whether steps are to be expected; who only waits may wait for another's window."""
    return load.is_computing or any(rank.requests_running for rank in load.ranks)


def _refuse(link: Link, slot: int, kind: FailureKind, detail: str, epoch_known: int = 0) -> None:
    link.refuse(
        attempt_pb2.AttemptRefused(
            slot=slot, kind=_to_proto(kind), detail=detail, epoch_known=epoch_known
        )
    )


def _failed(
    slot: int, end_offset: int, failure: FailureKind, detail: str
) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(
        slot=slot, end_offset=end_offset, failure=_to_proto(failure), detail=detail
    )


def _cancelled(detail: str = "", *, is_expired: bool = False) -> attempt_pb2.AttemptEnded:
    return attempt_pb2.AttemptEnded(
        finish_reason=generation_pb2.FINISH_REASON_CANCELLED, detail=detail, is_expired=is_expired
    )


def _to_proto(kind: FailureKind) -> "FailureKindProto.ValueType":
    return cast("FailureKindProto.ValueType", int(kind))
