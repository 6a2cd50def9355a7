"""A frontend in virtual time: the real streams and placement, with links that can fail.

The shell is lenient on purpose. It keeps no guard of its own against news of attempts that are
over, so that the core has to.
"""

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from random import Random
from typing import Any, assert_never, cast

from frontend import resume_token
from frontend import stream as machine
from frontend.convoy import Convoy
from frontend.placement import Need, WorkerView, choose
from frontend.resume_queue import ResumeLimits, ResumeQueue, Ticket, Work
from frontend.stream import Life, Limits, Stream
from frontend.waiting_room import Standing
from sidecar.link import Link
from tests.simulation.clocks import Clock
from tests.simulation.door import MODEL, Door, Event, Rules, is_back
from tests.simulation.faults import Fault, Trouble
from tests.simulation.queue_watch import QueueWatch
from tests.simulation.rides import Clients
from tests.simulation.witness import Held, Violation, Witness
from tests.simulation.worker import (
    BATCH,
    BLOCK_SIZE,
    CONTEXT_LENGTH,
    FOREVER,
    KV_BLOCKS,
    Holding,
    Process,
)
from tests.support.frames import frame_of
from tests.support.vocabulary import VOCAB_SIZE, tokenizer
from tests.support.world import World
from unbroken.checkpoint import Checkpoint, checkpoint_to_proto
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import TokenLogprobs, logprobs_from_proto
from unbroken.outcome import ContinuationClass, ContinuationPolicy, FailureKind, FinishReason
from unbroken.thresholds import Thresholds, to_proto
from unbroken.v1 import (
    attempt_pb2,
    generation_pb2,
    inference_service_pb2,
    relay_service_pb2,
    worker_pb2,
)

ORPHAN_GRACE_S = 2.0
TOKEN_LIFETIME_S = 3600.0
OUTBIDS_ENOUGH = 3
"""After so many bids an owner may give way to any other."""
_EXPIRED_EARLY_S = 0.1
"""So long before the deadline a goodbye may say that it has passed."""

_KEYRING = resume_token.Keyring({"k": b"k" * 32})
_FOREIGN_KEYRING = resume_token.Keyring({"k": b"f" * 32})
LOOK_INTERVAL_S = 0.5


@dataclass(slots=True)
class Seat:
    """The attempt behind a slot of a call; it stays known after its end."""

    choice: "Choice"
    epoch: int
    has_left: bool = False
    lie: Fault | None = None
    """What the worker will say wrongly,"""
    lie_offset: int = 0
    """and where."""
    num_known: int = 0
    """Tokens delivered when it began."""
    told_until: int = 0
    """An adopted attempt repeats what comes before this offset."""


class Channel:
    """One direction of a connection: in order, late, and perhaps never."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._latency_s = world.random.choice((0.0002, 0.001, 0.003))
        self._last_due = 0.0
        self.held_until = -FOREVER
        """What is sent before comes then."""
        self._is_cut = False
        self._is_lost = False

    def send(self, deliver: Callable[..., None], *args: Any) -> None:
        """Have `deliver(*args)` called later, unless the connection breaks."""
        if self._is_cut:
            return
        world = self._world
        latency_s = self._latency_s * (0.5 + world.random.random())
        if world.random.random() < 0.02:
            latency_s += 0.04
        self._last_due = max(self._last_due, self.held_until, world.now + latency_s)
        world.at(self._last_due, self._arrive, deliver, args)

    def hold(self, until: float) -> None:
        """Deliver nothing that is sent from now on before that time."""
        self.held_until = until

    def cut(self, *, drops_in_flight: bool) -> None:
        """Send nothing more."""
        self._is_cut = True
        self._is_lost = self._is_lost or drops_in_flight

    def flushed_at(self) -> float:
        """When all that was sent has arrived."""
        return max(self._last_due, self._world.now)

    def _arrive(self, deliver: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self._is_lost:
            deliver(*args)


class Call:
    """One Relay call to one life of one worker, both ends."""

    def __init__(self, frontend: "Frontend", process: Process, number: int) -> None:
        world = frontend.world
        self.process = process
        self.up = Channel(world)
        self.down = Channel(world)
        self.link: Link | None = None
        """The sidecar's end, while it has one."""
        self.is_over = False
        """At the frontend's end."""
        self._frame_before = attempt_pb2.StepFrame()
        self.is_welcomed = False
        self.is_break = False
        """Perhaps only the connection is gone: the next call tells."""
        self.seats: dict[int, Seat] = {}
        self._frontend = frontend
        self._world = world
        self._trouble = frontend.trouble
        self._number = number
        self._next_slot = 1
        self._convoy = Convoy(rows_min=1)
        self._slots_seen: list[int] = []

    # At the frontend.

    def start(self, seat: Seat, request: attempt_pb2.StartAttempt) -> int:
        """Begin an attempt."""
        slot = self._next_slot
        self._next_slot += 1
        self._slots_seen = []
        request.slot = slot
        self.seats[slot] = seat
        self.up.send(self._sidecar_starts, request)
        return slot

    def adopt(self, seat: Seat, request: relay_service_pb2.AdoptAttempt) -> int:
        """Take over an attempt."""
        slot = self._next_slot
        self._next_slot += 1
        self._slots_seen = []
        request.slot = slot
        self.seats[slot] = seat
        self.up.send(self._sidecar_adopts, request)
        return slot

    def push_thresholds(self, thresholds: Thresholds) -> None:
        """Say what the worker may have."""
        if not self.is_over:
            push = relay_service_pb2.PushThresholds(thresholds=to_proto(thresholds))
            self.up.send(self._sidecar_learns, push)

    def release(self) -> None:
        """Let go of what earlier calls left behind."""
        self.up.send(self._sidecar_releases)

    def abort(self, slot: int) -> None:
        """End an attempt."""
        if not self.seats[slot].has_left:
            self.seats[slot].has_left = True
            if not self.is_over:
                self.up.send(self._sidecar_aborts, slot)

    def halt(self, slot: int) -> None:
        """Have an attempt ended, and listen on."""
        if not self.is_over and not self.seats[slot].has_left:
            self.up.send(self._sidecar_aborts, slot)

    def ack(self, slot: int, offset: int) -> None:
        """Move a window."""
        if not self.is_over and not self.seats[slot].has_left:
            self.up.send(
                self._sidecar_acks, attempt_pb2.AckAttempts(slots=[slot], offsets=[offset])
            )

    def end(self, failure: FailureKind, is_break: bool = False) -> None:
        """The frontend gives the call up."""
        if self.is_over:
            return
        self.is_over = True
        self.is_break = is_break and self.is_welcomed
        self._world.tell("call to %s over: %s", self.process.worker_id, failure.name)
        self._frontend.lose_view(self.process)
        self.lose_all(failure, is_break=self.is_break)
        self._frontend.reconnect_soon(self.process.worker_id)

    def lose_all(self, failure: FailureKind, *, is_break: bool = False) -> None:
        """Every attempt of the call is lost, or cut off."""
        for seat in list(self.seats.values()):
            if seat.has_left:
                continue
            if is_break:
                seat.choice.unlinked(seat.epoch)
            else:
                seat.choice.lost(seat.epoch, failure)
            seat.has_left = True
            if self._trouble.happens(Fault.DUPLICATE_LOSS):
                self._trouble.took_effect(Fault.DUPLICATE_LOSS)
                again = FailureKind.HANG
                delay_s = self._world.random.choice((0.0, 0.0, 0.01, 0.1))
                if delay_s == 0.0:
                    seat.choice.lost(seat.epoch, again)
                else:
                    self._world.after(delay_s, seat.choice.lost, seat.epoch, again)

    def _receive(self, response: relay_service_pb2.RelayResponse) -> None:
        kind = response.WhichOneof("response")
        if kind == "frame":
            self._frame_before = response.frame
            self._receive_frame(response.frame)
        elif kind == "next_tokens":
            self._trouble.took_effect(Fault.NEXT_TOKENS)
            self._frame_before = frame_of(response.next_tokens, self._frame_before)
            self._receive_frame(self._frame_before)
        elif self.is_over:
            return
        elif kind == "welcome":
            self.is_welcomed = True
            self._receive_verdict(response.welcome.verdict)
            self._frontend.tell_fate(self.process.worker_id)
            if self._number > 1:
                self.release()
        elif kind == "adopted":
            self._receive_adopted(response.adopted)
        elif kind == "adoptions":
            for adopted in response.adoptions.adopted:
                self._receive_adopted(adopted)
        elif kind == "verdict":
            self._receive_verdict(response.verdict)
        elif kind == "heartbeat" and response.heartbeat.HasField("load"):
            self._frontend.report(self, response.heartbeat.load)

    def _receive_adopted(self, adopted: relay_service_pb2.AttemptAdopted) -> None:
        seat = self.seats[adopted.slot]
        seat.told_until = adopted.end_offset
        sampling, checkpoint = adopted.checkpoint.params.sampling, adopted.checkpoint
        origin = machine.Origin(
            checkpoint.prompt_token_ids,
            checkpoint.output_token_ids,
            checkpoint.first_offset,
            sampling.seed if sampling.HasField("seed") else None,
            adopted.started_epoch,
        )
        seat.choice.adopted(seat.epoch, adopted.end_offset, origin)

    def _receive_verdict(self, verdict: relay_service_pb2.EngineVerdict) -> None:
        is_serving = verdict.state == worker_pb2.ENGINE_STATE_SERVING
        if is_serving and not verdict.is_draining:
            self._frontend.add_view(self, verdict.engine_incarnation)
            return
        self._frontend.lose_view(self.process)
        if not is_serving:
            self.lose_all(FailureKind(verdict.failure) or FailureKind.CRASH)

    def _receive_frame(self, frame: attempt_pb2.StepFrame) -> None:
        logprobs = {
            entry.slot: [logprobs_from_proto(token) for token in entry.tokens]
            for entry in frame.logprobs
        }
        counts = frame.token_counts or [1] * len(frame.slots)
        seats = [self.seats[slot] for slot in frame.slots]
        offsets = [self._offset(*row) for row in zip(seats, frame.offsets, strict=True)]
        ridden = self._ride(frame, seats, offsets)
        end = 0
        for row, (seat, offset, count) in enumerate(zip(seats, offsets, counts, strict=True)):
            begin, end = end, end + count
            slot, token_ids = frame.slots[row], frame.token_ids[begin:end]
            given = logprobs.get(slot, [])
            beside, logprobs[slot] = given[:count], given[count:]
            if row in ridden:
                self._repeat(seat, offset, token_ids, beside)
            else:
                self._receive_row(seat, offset, token_ids, beside)
        if frame.HasField("load") and not self.is_over:
            self._frontend.report(self, frame.load)
        for ended in frame.ended:
            seat = self.seats[ended.slot]
            self._receive_ended(seat, ended)
            seat.has_left = True
            if self._trouble.happens(Fault.DUPLICATE_END):
                self._trouble.took_effect(Fault.DUPLICATE_END)
                self._receive_ended(seat, ended)
        for refused in frame.refused:
            seat = self.seats[refused.slot]
            seat.has_left = True
            is_busy = refused.HasField("busy")
            if is_busy and not self.is_over:
                self._frontend.report_busy(self, refused.busy)
            kind = FailureKind(refused.kind)
            seat.choice.refused(seat.epoch, kind, refused.epoch_known, is_busy=is_busy)

    def _offset(self, seat: Seat, offset: int) -> int:
        """What a row says of it."""
        if self._trouble.happens(Fault.GAP) and seat.choice.listens_to(seat.epoch):
            self._trouble.took_effect(Fault.GAP)
            return offset + 1
        return offset

    def _ride(
        self, frame: attempt_pb2.StepFrame, seats: Sequence[Seat], offsets: list[int]
    ) -> Set[int]:
        """Have the convoy tell what it can of a step; returns the rows of which it did."""
        if not seats or frame.token_counts or frame.logprobs or self._frontend.is_dead:
            return frozenset()
        world, now = self._world, self._world.now
        slots = list(frame.slots)
        if slots != self._slots_seen:
            self._slots_seen = slots
            streams = [seat.choice.stream if seat.lie is None else None for seat in seats]
            self._convoy.align(slots, streams, [seat.epoch for seat in seats])
        others = self._convoy.go(offsets, list(frame.token_ids), now)
        ridden = frozenset(range(len(seats))) - frozenset(others)
        for row in sorted(ridden):
            seat = seats[row]
            if not seat.choice.listens_to(seat.epoch):
                raise Violation(f"epoch {seat.epoch} rode on after its end")
            world.tell("%s.%d rode %d", seat.choice.name, seat.epoch, offsets[row])
            self._trouble.took_effect(Fault.RIDE)
        self._frontend.clients.deliver()
        return ridden

    def _receive_row(
        self,
        seat: Seat,
        offset: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        if seat.lie is not None:
            honest = (offset, token_ids)
            offset, token_ids = self._lie(seat, offset, list(token_ids))
            if not token_ids:
                return
            logprobs = logprobs[offset - honest[0] :]
        seat.choice.tokens(seat.epoch, offset, token_ids, logprobs, seat.told_until)
        self._repeat(seat, offset, token_ids, logprobs)

    def _repeat(
        self,
        seat: Seat,
        offset: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """A row may come twice."""
        trouble, told_until = self._trouble, seat.told_until
        if trouble.happens(Fault.DUPLICATE_TOKENS):
            trouble.took_effect(Fault.DUPLICATE_TOKENS)
            delay_s = self._world.random.choice((0.0, 0.02))
            again = (seat.epoch, offset, token_ids, logprobs, told_until)
            if delay_s == 0.0:
                seat.choice.tokens(*again)
            else:
                self._world.after(delay_s, seat.choice.tokens, *again)

    def _lie(self, seat: Seat, offset: int, token_ids: list[int]) -> tuple[int, list[int]]:
        """What a worker says that does not generate what was delivered."""
        if not seat.choice.listens_to(seat.epoch):
            return offset, token_ids
        match seat.lie:
            case Fault.DIVERGENCE:
                if offset <= seat.lie_offset < offset + len(token_ids):
                    self._trouble.took_effect(Fault.DIVERGENCE)
                for index in range(max(0, seat.lie_offset - offset), len(token_ids)):
                    token_ids[index] = (token_ids[index] + 1) % VOCAB_SIZE
            case Fault.JUMP:
                num_left_out = min(max(0, seat.num_known - offset), len(token_ids))
                if num_left_out:
                    self._trouble.took_effect(Fault.JUMP)
                offset, token_ids = offset + num_left_out, token_ids[num_left_out:]
                if token_ids and offset == seat.num_known:
                    token_ids[0] = (token_ids[0] + 1) % VOCAB_SIZE
            case Fault.SHORT:
                num_said = max(0, seat.lie_offset - offset)
                if num_said < len(token_ids):
                    self._trouble.took_effect(Fault.SHORT)
                    if num_said:
                        seat.choice.tokens(seat.epoch, offset, token_ids[:num_said], ())
                    end_offset = self._world.random.choice((seat.lie_offset, seat.num_known))
                    length = generation_pb2.FINISH_REASON_LENGTH
                    ended = attempt_pb2.AttemptEnded(end_offset=end_offset, finish_reason=length)
                    seat.choice.ended(seat.epoch, ended)
                    return offset, []
            case _:
                raise AssertionError(seat.lie)
        return offset, token_ids

    def _receive_ended(self, seat: Seat, ended: attempt_pb2.AttemptEnded) -> None:
        seat.choice.ended(seat.epoch, ended)

    # At the sidecar.

    def hello(self) -> None:
        """The call is opened."""
        self.up.send(self._sidecar_opens)

    def sidecar_loses(self) -> None:
        """The sidecar notices that the connection is gone."""
        link, self.link = self.link, None
        if link is None or not self.process.is_alive:
            return
        self.process.hub.leave(link)
        self._world.after(ORPHAN_GRACE_S + 0.01, self._frontend.tick, self.process)

    def pump(self) -> None:
        """Write what the sidecar has to say."""
        link = self.link
        if link is None or link.is_idle:
            return
        for response in link.take(0.1, self.process.hub.load):
            self.down.send(self._receive, response)
        link.written()
        if link.error is not None:
            self.sidecar_loses()
            self.down.send(self.end, FailureKind.FENCED)

    def _sidecar_opens(self) -> None:
        process = self.process
        if not process.is_alive:
            return
        hello = relay_service_pb2.RelayHello(
            frontend_id=self._frontend.name,
            incarnation=1,
            call_number=self._number,
            takes_next_tokens=True,
        )
        link = Link(hello, self._world.now, on_news=lambda: None)
        try:
            verdict = process.hub.join(link)
        except UnbrokenError:
            self.down.send(self.end, FailureKind.FENCED)
            return
        self.link = link
        link.tell(
            relay_service_pb2.RelayResponse(welcome=relay_service_pb2.RelayWelcome(verdict=verdict))
        )
        self._frontend.pump(process)

    def _sidecar_releases(self) -> None:
        """What this frontend left behind and did not adopt is ended, and nothing else."""
        if self.link is None or not self.process.is_alive:
            return
        hub = self.process.hub
        mine = [attempt for attempt in hub.ledger if attempt.owner == self.link.owner]
        left = [attempt for attempt in mine if attempt.link is None and not attempt.given_up]
        others = [attempt for attempt in hub.ledger if attempt.owner != self.link.owner]
        were_given_up = [attempt for attempt in others if attempt.given_up]
        hub.release(self.link)
        if left:
            self._trouble.took_effect(Fault.RELEASED)
        if not all(attempt.given_up or attempt.ended for attempt in left):
            raise Violation("what was released runs on")
        if any(a.given_up for a in others if a not in were_given_up):
            raise Violation("what another frontend reads was released")
        self._frontend.pump(self.process)

    def _sidecar_learns(self, push: relay_service_pb2.PushThresholds) -> None:
        if self.link is not None and self.process.is_alive:
            self.process.hub.learn_thresholds(self.link, push)

    def _sidecar_starts(self, request: attempt_pb2.StartAttempt) -> None:
        if self.link is not None and self.process.is_alive:
            had = self.process.engine.held() if request.is_new_work else None
            num_running = len(self.process.hub.ledger.running)
            self.process.hub.start(self.link, request)
            if had is not None and len(self.process.hub.ledger.running) > num_running:
                self._check_let_in(had, request)
            self._frontend.pump(self.process)
            self.process.watch_soon()

    def _check_let_in(self, had: Holding, request: attempt_pb2.StartAttempt) -> None:
        """New work brings no worker beyond its thresholds by more than a batch."""
        thresholds = self._frontend.door.rules.thresholds
        if thresholds.prefill_tokens is not None:
            num_tokens = had.prefill_tokens + len(request.checkpoint.prompt_token_ids)
            if num_tokens > thresholds.prefill_tokens + BATCH:
                raise Violation(f"{self.process.worker_id} has {num_tokens} prompt tokens")
        if thresholds.kv_blocks_share is not None and self.process.hub.load is not None:
            # Before its first report nobody knows how large the pool is. What runs grows by a few
            # tokens a step, which the last report does not show.
            limit = int(thresholds.kv_blocks_share * KV_BLOCKS) + had.num_running
            if had.kv_blocks > limit:
                raise Violation(f"new work to {self.process.worker_id}, of {had.kv_blocks} blocks")

    def _sidecar_adopts(self, request: relay_service_pb2.AdoptAttempt) -> None:
        if self.link is not None and self.process.is_alive:
            self.process.hub.adopt(self.link, request)
            self._frontend.pump(self.process)

    def _sidecar_aborts(self, slot: int) -> None:
        if self.link is not None and self.process.is_alive:
            self.process.hub.abort(self.link, slot)
            self._frontend.pump(self.process)

    def _sidecar_acks(self, message: attempt_pb2.AckAttempts) -> None:
        if self.link is not None and self.process.is_alive:
            self.process.hub.ack(self.link, message)
            self._frontend.pump(self.process)


class Frontend:
    """Calls to workers, views of them, and the choices that wait for one."""

    def __init__(
        self,
        world: World,
        trouble: Trouble,
        name: str,
        pump: Callable[[Process], None],
        limits: ResumeLimits,
        queue_type: "type[ResumeQueue[Choice]]",
        clock: Clock,
        rules: Rules,
        note: Callable[[Event], None],
    ) -> None:
        """`pump` has a sidecar write what it has to say, to all frontends; `note` is told what
        happens before the workers.
        """
        self.world = world
        self.trouble = trouble
        self.name = name
        self.is_dead = False
        self.clock = clock
        self.pump = pump
        self.on_overtaken: Callable[[Choice], None] = lambda _: None
        """A choice was taken over by another owner, as far as its worker can tell."""
        self.clients = Clients()
        self.queue = queue_type(limits, Random(1), lambda choice, view: choice.is_able(view))
        self.watch = QueueWatch(self.queue, limits)
        self._is_giving_turns = False
        self.door = Door(self, rules, note)
        self.processes: dict[str, Process] = {}
        """The latest life of each worker, as discovery tells."""
        self.calls: dict[str, list[Call]] = {}
        """By worker; the latest is the last."""
        self._views: dict[str, tuple[WorkerView, Call]] = {}
        self.unlinked: dict[str, dict[Choice, None]] = {}
        """Those that wait for a link, by worker."""
        self._num_dues = 0
        self._num_calls = 0

    def die(self) -> None:
        """The process is gone: whatever it would have heard or said is not."""
        self.is_dead = True
        random = self.world.random
        for calls in self.calls.values():
            for call in calls:
                call.is_over = True
                call.up.cut(drops_in_flight=self.world.chance(0.5))
                call.down.cut(drops_in_flight=True)
                self.world.after(0.001 + random.choice((0.0, 0.01, 0.3)), call.sidecar_loses)

    # The mesh.

    def discover(self, process: Process) -> None:
        """A worker is there, perhaps again."""
        before = self.processes.get(process.worker_id)
        if self.is_dead:
            return
        if before is not None and before.incarnation >= process.incarnation:
            return
        self.processes[process.worker_id] = process
        for call in self.calls.get(process.worker_id, ()):
            call.end(FailureKind.CRASH)
        self.tell_fate(process.worker_id)
        self.connect(process.worker_id)

    def connect(self, worker_id: str) -> None:
        """Open a call to a worker, unless there is one."""
        process = self.processes[worker_id]
        calls = self.calls.setdefault(worker_id, [])
        if self.is_dead or (calls and not calls[-1].is_over):
            return
        if not process.is_alive:
            if calls:
                calls[-1].is_break = False  # Refused: nobody is there.
            self.tell_fate(worker_id)
            return
        self._num_calls += 1
        call = Call(self, process, self._num_calls)
        calls.append(call)
        call.hello()

    def reconnect_soon(self, worker_id: str) -> None:
        """After a pause."""
        self.world.after(self.world.random.uniform(0.005, 0.1), self.connect, worker_id)

    def tell_fate(self, worker_id: str) -> None:
        """The link to a worker came up, or will not."""
        for choice in list(self.unlinked.pop(worker_id, ())):
            choice.link_changed()

    def call_to(self, life: Life) -> Call | None:
        """The call to this life of a worker; None if that life is over or cannot be reached."""
        process = self.processes.get(life.worker_id)
        calls = self.calls.get(life.worker_id)
        if process is None or process.incarnation != life.incarnation or not calls:
            return None
        return None if calls[-1].is_over and not calls[-1].is_break else calls[-1]

    def call_is_mine(self, call: Call) -> bool:
        """Whether it is one of this frontend's."""
        return call in self.calls.get(call.process.worker_id, ())

    def tick(self, process: Process) -> None:
        """Time passes at a sidecar."""
        if process.is_alive:
            process.hub.tick(silence_max_s=FOREVER)
            self.pump(process)

    def add_view(self, call: Call, engine_incarnation: int) -> None:
        """A worker takes work."""
        process = call.process
        view = WorkerView(
            life=Life(process.worker_id, process.incarnation, engine_incarnation),
            model="m",
            abilities=process.engine.personality.abilities,
            block_size=BLOCK_SIZE,
            context_length=CONTEXT_LENGTH,
            prefill_tokens_max=BATCH,
        )
        self._views[process.worker_id] = (view, call)
        if self.door.is_on:
            call.push_thresholds(self.door.rules.thresholds)
        self._workers_changed()

    def lose_view(self, process: Process) -> None:
        """A worker takes no work."""
        view = self._views.get(process.worker_id)
        if view is not None and view[1].process is process and view[0].is_ready:
            view[0].is_ready = False
            self._workers_changed()

    def report(self, call: Call, load: worker_pb2.LoadReport) -> None:
        """A worker told its load."""
        view = self._views.get(call.process.worker_id)
        if view is not None and view[1] is call:
            self.queue.reported(view[0].life, load, self.world.now)
            self.door.reported(view[0], load)
            self.give_turns()

    def report_busy(self, call: Call, busy: attempt_pb2.BusyVerdict) -> None:
        """A worker refused new work."""
        view = self._views.get(call.process.worker_id)
        if view is not None and view[1] is call:
            self.door.refused(view[0], busy)

    def _workers_changed(self) -> None:
        self.queue.workers([view for view, _ in self._views.values()], self.world.now)
        self.watch.workers(self.views(), self.world.now)
        self.door.workers(view for view, _ in self._views.values())
        # As the shell: news of the links does not place anybody by itself.
        self.world.after(0.0, self.give_turns)

    def give_turns(self) -> None:
        """Place whoever has a turn."""
        if self._is_giving_turns or self.is_dead:
            return
        self._is_giving_turns = True
        world = self.world
        while True:
            turn = self.queue.next(world.now)
            if turn is not None:
                turn.key.take_turn(turn.lives)
            elif not self.door.call_next():
                break
        self._is_giving_turns = False
        self.door.looked()
        self.queue.check()
        self.watch.check(world.now)
        self._num_dues += 1
        due = self.queue.deadline()
        if due is not None:
            world.at(due, self._due, self._num_dues)

    def look(self) -> None:
        """Nobody may have been forgotten."""
        if not self.is_dead and self.watch.is_waited_for:
            self.watch.check(self.world.now)
            self.world.after(LOOK_INTERVAL_S, self.look)

    def _due(self, number: int) -> None:
        if number == self._num_dues:
            self.give_turns()

    def views(self) -> list[WorkerView]:
        """Workers that take work."""
        return [view for view, _ in self._views.values() if view.is_ready]

    def seat_at(self, life: Life) -> tuple[WorkerView, Call] | None:
        """Where an attempt for a life of a worker is started."""
        found = self._views.get(life.worker_id)
        return found if found is not None and found[0].life == life else None


class Choice:
    """One choice of one request: its stream, obeyed as a frontend does, and its client."""

    def __init__(
        self,
        frontend: Frontend,
        request_id: str,
        index: int,
        original: Checkpoint,
        *,
        stream_type: type[Stream],
        policy: ContinuationPolicy,
        limits: Limits,
        deadline_s: float | None,
        client_pause_s: float,
        priority: int,
        taken_ms: int,
        above: int = 0,
        past: machine.Past | None = None,
        before: "Choice | None" = None,
        tenant: str = "",
        told_at: float | None = None,
    ) -> None:
        """`before` is the choice of another frontend which this one goes on with; `taken_ms` is
        when this one takes it, by its clock; `told_at` is when it was told to come back, if it was.

        Raises `Mismatch`.
        """
        self.stream = stream_type(
            original,
            tokenizer(),
            policy=policy,
            limits=limits,
            epoch=machine.first_epoch(taken_ms, above=above),
            taken_ms=taken_ms,
            past=past,
        )
        self._taken_ms = taken_ms
        self._began_at = 0.0
        self._num_outbids = 0
        self.is_resumed = before is not None
        self.is_stolen = False
        """By a frontend that no client of ours went to."""
        self.name = f"{request_id}/{index}" if before is None else f"{before.name}'"
        self.witness = Witness(
            self.name,
            self.stream,
            frontend.trouble,
            policy=policy,
            limits=limits,
            past=past,
            before=None if before is None else before.witness,
        )
        self.frontend = frontend
        self.original = original
        self.policy = policy
        self.limits = limits
        self.is_abandoned = False
        """Its frontend is dead, or its client has gone to another one."""
        self.held: list[Held] = [] if before is None else list(before.held)
        """What the client has after each message."""
        self._num_moves = -1
        self._minting = resume_token.Minting(0.0, 0.0)
        self._world = frontend.world
        self._trouble = frontend.trouble
        self.request_id = request_id
        self._index = index
        self._deadline_s = deadline_s
        self._deadline_at: float | None = None
        self._client_pause_s = client_pause_s
        self._avoid: frozenset[Life] = frozenset()
        self._seat: tuple[Call, int, int] | None = None
        self._view: WorkerView | None = None
        self._num_timers = 0
        self.priority = priority
        self.tenant = tenant
        self.told_at = told_at
        self.is_back = False
        """It came when it was told."""
        self.waits_as: Standing | None = None
        """Its place in the waiting room."""
        self.num_pauses = 0
        self.ended_at = 0.0
        self.placing_at = 0.0
        """Until then it makes a pause, and looks for no worker."""
        self._is_new = past is None or not (past.num_begun or past.token_ids)
        self._is_new_work = False
        self._is_pausing_over = False
        self._paused_at = 0.0
        self._goes_on = False
        self.started_at = 0.0
        """When its last attempt was begun."""
        self.went_on_at = 0.0
        """When it was at a worker again after a pause,"""
        self.halted_at = 0.0
        """and when it was told to make one."""
        self._is_computing = False
        self._is_take_planned = False
        self._pause_s = 0.0
        self._unlinked: machine.Relink | None = None
        frontend.clients.ride(self.stream, self, self._rode)

    def begin(self) -> None:
        """The request was admitted."""
        now = self._world.now
        if self.is_abandoned:
            return
        if self._deadline_s is not None and self._deadline_at is None:
            self._deadline_at = now + self._deadline_s
        if self._deadline_at is not None:
            self._world.at(self._deadline_at, self.end, Reason.DEADLINE_EXCEEDED)
        self.witness.began_looking(now)
        self._began_at = now
        self.is_back = is_back(self.told_at, now)
        if self.is_back:
            self.frontend.door.note(Event.CAME_BACK)
        error = None
        if self._is_new and not self.is_resumed:
            error = self.frontend.door.reason_to_refuse(self, self._deadline_at or now + FOREVER)
        if error is not None:
            self._send_away(error)
            return
        self.obey(self.stream.start(now))
        self._hold()

    def resumed(self, frontend: Frontend, held: "Held") -> "Choice":
        """The same choice at another frontend, which its client comes to with what it holds.

        Raises `Mismatch`, or `UnbrokenError` if the frontend refuses to resume.
        """
        position = inference_service_pb2.ResumePosition(
            token_ids=held.token_ids,
            num_text_bytes=len(held.text.encode()),
            cumulative_logprob=sum(held.logprobs) if held.logprobs else None,
        )
        clock = frontend.clock
        _check_foreign(self._token(held, _FOREIGN_KEYRING), clock)
        claims = resume_token.unseal(self._token(held, _KEYRING), _KEYRING, now=clock.now())
        (claim,) = claims.choices
        past = resume_token.past(claim, position)
        if clock.now_ms() <= claims.epoch >> machine.GENERATION_BITS:
            self._trouble.took_effect(Fault.CLOCK_BEHIND)
        successor = Choice(
            frontend,
            self.request_id,
            self._index,
            self.original,
            stream_type=type(self.stream),
            policy=self.policy,
            limits=self.limits,
            deadline_s=None,
            client_pause_s=self._client_pause_s,
            priority=self.priority,
            taken_ms=clock.now_ms(),
            above=claims.epoch,
            past=past,
            before=self,
            tenant=self.tenant,
        )
        successor._deadline_at = self._deadline_at
        successor.witness.begin_from(held)
        successor.held = [held]
        return successor

    def _token(self, held: Held, keyring: resume_token.Keyring) -> bytes:
        """The resume token that the client holds."""
        resolved = resume_token.Resolved(
            tenant="",
            request_id=self.request_id,
            request_digest=b"",
            model="m",
            tokenizer_fingerprint="t",
            prompt_digest=b"",
            seed=self.original.params.sampling.seed,
            max_tokens=0,
            policy=self.policy,
            migrations_max=self.limits.migrations_max,
        )
        return resume_token.seal(
            resolved,
            [held.claim],
            keyring,
            now=held.minting.time_of_day,
            lifetime_s=TOKEN_LIFETIME_S,
        )

    def _hold(self) -> None:
        """What the client holds now, if it is told where the stream is."""
        stream, now, clock = self.stream, self._world.now, self.frontend.clock
        claim = self.held[-1].claim if self.held else None
        time_of_day = clock.now()
        if (
            claim is None
            or stream.num_moves != self._num_moves
            or self._minting.is_due(now, time_of_day, TOKEN_LIFETIME_S)
        ):
            self._num_moves = stream.num_moves
            self._minting = resume_token.Minting(now, time_of_day)
            standing = stream.standing
            base = stream.ledger[: standing.base]
            claim = resume_token.ChoiceClaim(standing, resume_token.ids_digest(base))
        self.held.append(self.witness.held(claim, self._minting, clock.offset_s))

    def end(self, reason: Reason) -> None:
        """The client left, or its time is up."""
        if self.is_abandoned and self.frontend.is_dead:
            return
        if self.stream.outcome is None:
            self.frontend.door.note(self._event_of(reason))
            fault = Fault.CANCEL if reason is Reason.CANCELLED else Fault.DEADLINE
            self._trouble.took_effect(fault)
        self.witness.orders.add(reason)
        commands = self.stream.cancelled(UnbrokenError(reason, "as asked"))
        self.witness.asked_to_end(self._world.now)
        self.obey(commands)

    def _event_of(self, reason: Reason) -> Event:
        if self.stream.state is machine.State.RUNNING:
            is_cancel = reason is Reason.CANCELLED
            return Event.CANCELLED_AT_WORK if is_cancel else Event.TIME_UP
        is_paused = self.stream.state is machine.State.PAUSED
        return Event.CANCELLED_PAUSED if is_paused else Event.CANCELLED_IN_LINE

    def pause(self, pause_s: float) -> None:
        """It is to make room for so long."""
        stream, now = self.stream, self._world.now
        commands = stream.pause("for another", now)
        if commands:
            self._world.tell("%s.%d is to pause", self.name, stream.epoch)
            self._pause_s = pause_s
            self.obey(commands)

    def _proceed(self) -> None:
        stream = self.stream
        if not self.frontend.is_dead and stream.state is machine.State.PAUSED:
            self.obey(stream.proceed(self._world.now))

    def refuse(self, error: UnbrokenError) -> None:
        """It waits in vain."""
        self._stop_waiting()
        self._send_away(error)

    def _send_away(self, error: UnbrokenError) -> None:
        self.witness.orders.add(Reason.OVERLOADED)
        commands = self.stream.unplaceable(self.stream.epoch, error)
        self.witness.asked_to_end(self._world.now)
        self.obey(commands)
        self.frontend.door.sent_away(self, error)

    @property
    def is_to_be_refused(self) -> bool:
        """Whether thresholds can refuse it: as long as nothing of its request was at a worker."""
        return self._is_new and not self._index and not self._is_resume

    @property
    def is_unheard(self) -> bool:
        """Whether it was let in as new work, and lost its worker before that said anything."""
        stream = self.stream
        return (
            self._is_new
            and self._is_resume
            and self.waits_as is not None
            and not stream.ledger
            and not stream.was_paused
        )

    @property
    def _is_resume(self) -> bool:
        return self.stream.has_begun or bool(self.stream.attempts)

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        return MODEL

    @property
    def num_tokens(self) -> int:
        """To compute before the next one."""
        return len(self.stream.original.prompt_token_ids) + len(self.stream.ledger)

    def names(self) -> dict[str, object]:
        """What to call it in the log."""
        return {"request_id": self.request_id, "index": self._index}

    def could_take(self, view: WorkerView) -> bool:
        """Whether it could go on there."""
        return self.is_able(view)

    @property
    def is_running(self) -> bool:
        """Whether a worker works on it."""
        return self.stream.state is machine.State.RUNNING

    def steal(self, process: Process) -> None:
        """Another frontend takes the stream over on this worker, and then leaves it."""
        self.is_stolen = True
        self.witness.orders |= {Reason.FENCED, Reason.REQUEST_EXISTS}
        hello = relay_service_pb2.RelayHello(
            frontend_id="thief", incarnation=1, call_number=self._world.num_events
        )
        thief = Link(hello, self._world.now, on_news=lambda: None)
        process.hub.join(thief)
        epoch = self.stream.epoch + 100
        running = [a for a in process.hub.ledger if self._is_mine(a.stream)]
        if running and self._world.chance(0.5):
            self._trouble.took_effect(Fault.ADOPTED)
            key = attempt_pb2.StreamKey(
                tenant=self.tenant, request_id=self.request_id, choice_index=self._index
            )
            (attempt,) = [a for a in running if process.hub.ledger.peek(key) is a] or running[:1]
            adopt = relay_service_pb2.AdoptAttempt(
                slot=1, stream=key, epoch=epoch, offset=attempt.end_offset
            )
            process.hub.adopt(thief, adopt)
            adopted = thief.by_slot.get(1)  # None if it was refused, as at a second theft.
            was_given_up = adopted is not None and adopted.given_up is not None
            process.hub.release(thief)
            if adopted is not None and adopted.given_up is not None and not was_given_up:
                raise Violation("what was adopted was released")
        else:
            start = self._start_message(epoch, self.stream.original)
            start.slot = 1
            process.hub.start(thief, start)
        process.hub.leave(thief)
        self.frontend.pump(process)
        self._world.after(ORPHAN_GRACE_S + 0.01, self.frontend.tick, process)

    def _is_mine(self, stream: tuple[str, str, int]) -> bool:
        return stream == (self.tenant, self.request_id, self._index)

    @property
    def process(self) -> Process | None:
        """Where it runs."""
        return None if self._seat is None else self._seat[0].process

    @property
    def is_nowhere(self) -> bool:
        """Whether it looks for a worker, and stands in no line."""
        frontend = self.frontend
        return (
            self.stream.state is machine.State.PLACING
            and self._world.now > self.placing_at
            and not frontend.watch.is_waiting(self)
            and not frontend.door.room.queue.is_waiting(cast("Any", self))
        )

    def runs_as(self, stream: tuple[str, str, int], call: Call) -> bool:
        """Whether that is it, and is read on a call of its frontend."""
        return self._is_mine(stream) and self.frontend.call_is_mine(call)

    def runs_on(self, process: Process) -> bool:
        """Whether this life of a worker works on it."""
        return self._seat is not None and self._seat[0].process is process

    # News of attempts.

    def listens_to(self, epoch: int) -> bool:
        """Whether that attempt is the current one."""
        stream = self.stream
        return stream.state is machine.State.RUNNING and stream.epoch == epoch

    def _can_lose(self, epoch: int) -> bool:
        stream = self.stream
        return stream.state is machine.State.UNLINKED and stream.epoch == epoch

    def tokens(
        self,
        epoch: int,
        offset: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        told_until: int = 0,
    ) -> None:
        """Tokens came; those before `told_until` were not computed for us."""
        stream, now = self.stream, self._world.now
        self._world.tell("%s.%d tokens %d %s", self.name, epoch, offset, token_ids)
        again = stream.accounts.recomputed_decode_tokens
        num_again = min(len(stream.ledger), offset + len(token_ids)) - max(offset, told_until)
        if len(token_ids) == 1 and not logprobs:
            self._hear(epoch, lambda: stream.token(epoch, offset, token_ids[0], now))
        else:
            self._hear(epoch, lambda: stream.tokens(epoch, offset, token_ids, now, logprobs))
        if self._is_computing and stream.is_prefilled:
            self._computed()
        if stream.accounts.recomputed_decode_tokens != again:
            self.witness.repeated(num_again)

    def ended(self, epoch: int, ended: attempt_pb2.AttemptEnded) -> None:
        """A goodbye came."""
        stream, now = self.stream, self._world.now
        is_adopted = bool(stream.attempts) and stream.attempts[-1].is_adopted
        is_cancelled = ended.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
        due_at = self._deadline_at
        is_expired = ended.is_expired and due_at is not None and now >= due_at - _EXPIRED_EARLY_S
        if is_expired and self.listens_to(epoch):
            self._trouble.took_effect(Fault.DEADLINE)
            self.witness.orders.add(Reason.DEADLINE_EXCEEDED)
        self._world.tell(
            "%s.%d ended at %d: %d %d",
            self.name,
            epoch,
            ended.end_offset,
            ended.finish_reason,
            ended.failure,
        )
        self._hear(
            epoch,
            lambda: stream.ended(
                epoch,
                ended.end_offset,
                FinishReason(ended.finish_reason),
                now=now,
                stop_token_id=ended.stop_token_id if ended.HasField("stop_token_id") else None,
                failure=FailureKind(ended.failure),
                detail=ended.detail,
                cached_tokens=ended.cached_tokens,
                is_expired=is_expired,
            ),
            # What nobody read was ended by its sidecar, or by who left it.
            is_counted=not (stream.is_halting and is_cancelled)
            and not (
                is_adopted and (is_cancelled or ended.failure == worker_pb2.FAILURE_KIND_PARTITION)
            ),
        )

    def unlinked(self, epoch: int) -> None:
        """The link is gone."""
        stream, now = self.stream, self._world.now
        self._world.tell("%s.%d unlinked", self.name, epoch)
        self._hear(epoch, lambda: stream.unlinked(epoch, "reset", now))

    def adopted(self, epoch: int, end_offset: int, origin: machine.Origin) -> None:
        """The sidecar gave us the attempt."""
        stream, now = self.stream, self._world.now
        self._world.tell("%s.%d adopted, at %d", self.name, epoch, end_offset)
        if self.listens_to(epoch):
            self.witness.adopted(epoch)
            fault = Fault.RELINK if stream.num_moves else Fault.ADOPTION
            self._trouble.took_effect(fault)
        self._hear(epoch, lambda: stream.adopted(epoch, end_offset, origin, now), is_counted=False)

    def lost(self, epoch: int, failure: FailureKind) -> None:
        """The attempt is lost, says somebody."""
        stream, now = self.stream, self._world.now
        self._world.tell("%s.%d lost: %s", self.name, epoch, failure.name)
        self._hear(epoch, lambda: stream.lost(epoch, failure, "lost", now), is_loss=True)

    def refused(
        self, epoch: int, kind: FailureKind, epoch_known: int, *, is_busy: bool = False
    ) -> None:
        """The attempt did not begin."""
        stream = self.stream
        self._world.tell("%s.%d refused: %s", self.name, epoch, kind.name)
        is_fenced = kind is FailureKind.FENCED
        is_overtaken = is_fenced and epoch_known >= epoch
        if is_fenced and not is_overtaken:
            self._trouble.took_effect(Fault.FENCED)
        self._hear(
            epoch,
            lambda: stream.refused(
                epoch,
                kind,
                "refused",
                now=self._world.now,
                epoch_known=epoch_known,
                is_busy=is_busy,
            ),
            is_refusal=True,
            is_counted=not is_overtaken,
            is_shed=is_busy,
        )
        if is_overtaken and stream.epoch > epoch_known:
            self._trouble.took_effect(Fault.OUTBID)
            self._num_outbids += 1
        elif is_overtaken and stream.outcome is not None and self._num_outbids < OUTBIDS_ENOUGH:
            by_ms = (epoch_known >> machine.GENERATION_BITS) - self._now_ms()
            is_first = all(attempt.is_refused for attempt in stream.attempts)
            if is_first and by_ms > 1:
                raise Violation(f"{self.name} gave way to an owner from {by_ms} ms in the future")

    def _now_ms(self) -> int:
        """The time of day, had nobody set the clock since this frontend took the stream."""
        return self._taken_ms + int((self._world.now - self._began_at) * 1000)

    def _hear(
        self,
        epoch: int,
        handle: Callable[[], Sequence[machine.Command]],
        *,
        is_refusal: bool = False,
        is_loss: bool = False,
        is_counted: bool = True,
        is_shed: bool = False,
    ) -> None:
        if self.frontend.is_dead:
            return
        stream = self.stream
        was_current = self.listens_to(epoch) or (is_loss and self._can_lose(epoch))
        size_before, outcome_before = len(stream.ledger), stream.outcome
        was_halting = stream.is_halting
        commands = handle()
        if was_halting and not stream.is_halting and stream.outcome is None:
            is_paused = stream.state is machine.State.PAUSED
            self._trouble.took_effect(Fault.PAUSE if is_paused else Fault.PAUSE_LOST)
        self.witness.heard(
            epoch,
            was_current=was_current,
            size_before=size_before,
            outcome_before=outcome_before,
            commands=commands,
            now=self._world.now,
            is_refusal=is_refusal,
            is_counted=is_counted,
            is_shed=is_shed,
        )
        self.obey(commands)
        error = None if stream.outcome is None else stream.outcome.error
        if outcome_before is None and error is not None and error.reason is Reason.FENCED:
            self.frontend.on_overtaken(self)

    # Commands.

    def obey(self, commands: Sequence[machine.Command]) -> None:
        """Do what the stream asks, in order, and what it asks in consequence."""
        queue = deque(commands)
        while queue:
            command = queue.popleft()
            match command:
                case machine.Relink():
                    queue.extend(self._relink(command))
                case machine.Adopt():
                    self._adopt(command)
                case machine.Place(avoid=avoid, pause_s=pause_s):
                    self._avoid = avoid
                    queue.extend(self._place(pause_s))
                case machine.Start():
                    queue.extend(self._start(command))
                case machine.Abort(epoch=epoch):
                    if self._seat is not None and self._seat[2] == epoch:
                        self._leave()
                case machine.Halt(epoch=epoch):
                    if self.frontend.door.is_on:
                        self.frontend.door.on_halt(self)
                    if self._seat is not None and self._seat[2] == epoch:
                        self._seat[0].halt(self._seat[1])
                        self._time_is_up_at(self.stream.deadline())
                case machine.Paused():
                    self.num_pauses += 1
                    self._is_pausing_over = True
                    if self.frontend.door.is_on:
                        self._note_pause()
                        self.frontend.door.pausing.stopped(cast("Any", self))
                    else:
                        self._world.after(self._pause_s, self._proceed)
                    self._leave()
                    self._stop_waiting()
                case machine.Ack(epoch=epoch, offset=offset):
                    self.witness.acknowledged(offset)
                    if self._seat is not None and self._seat[2] == epoch:
                        self._seat[0].ack(self._seat[1], offset)
                case machine.Finish():
                    self.ended_at = self._world.now
                    self._leave()
                    self._stop_waiting()
                    self._relink_no_more()
                    self.frontend.door.pausing.forget(cast("Any", self))
                    self._after_the_end()
                case _:
                    assert_never(command)
        self._wake()

    def link_changed(self) -> None:
        """The link that the stream waits for came up, or is gone."""
        order, self._unlinked = self._unlinked, None
        if order is not None and not self.frontend.is_dead:
            self.obey([order])

    def _relink(self, order: machine.Relink) -> Sequence[machine.Command]:
        stream, now, frontend = self.stream, self._world.now, self.frontend
        self._leave()
        process = frontend.processes.get(order.life.worker_id)
        call = frontend.call_to(order.life)
        if call is not None and call.is_welcomed and not call.is_over:
            return stream.relinked(order.epoch, now)
        if call is None and process is not None and order.life.incarnation <= process.incarnation:
            self.lost(order.epoch, FailureKind.CRASH)
            return ()
        self._unlinked = order
        frontend.unlinked.setdefault(order.life.worker_id, {})[self] = None
        self._time_is_up_at(stream.deadline())
        return ()

    def _adopt(self, order: machine.Adopt) -> None:
        self._leave()
        call = self.frontend.call_to(order.life)
        assert call is not None, "its link is up"
        self.witness.adopts(order.epoch, call.process.engine.personality)
        self._world.tell("%s.%d adopts at %d", self.name, order.epoch, order.offset)
        request = relay_service_pb2.AdoptAttempt(
            stream=attempt_pb2.StreamKey(
                tenant=self.tenant, request_id=self.request_id, choice_index=self._index
            ),
            epoch=order.epoch,
            offset=order.offset,
            window_tokens=order.window_tokens,
        )
        request.orphan_grace.FromMilliseconds(int(ORPHAN_GRACE_S * 1000))
        if self._deadline_at is not None:
            left_s = max(0.0, self._deadline_at - self._world.now)
            request.deadline.FromNanoseconds(int(left_s * 1e9))
        seat = Seat(self, order.epoch, num_known=len(self.stream.ledger))
        self._view = None
        self._seat = (call, call.adopt(seat, request), order.epoch)
        found = self.frontend.seat_at(order.life)
        if found is not None:
            self.frontend.door.pausing.started(cast("Any", self), found[0])
        self._time_is_up_at(self.stream.deadline())

    def _time_is_up_at(self, when: float | None) -> None:
        assert when is not None
        self._num_timers += 1
        self._world.at(when, self._time_is_up, self._num_timers)

    def _time_is_up(self, number: int) -> None:
        if number != self._num_timers or self.frontend.is_dead:
            return
        self._relink_no_more()
        stream, now = self.stream, self._world.now
        self._hear(
            stream.epoch,
            lambda: stream.handle_timeout(now),
            is_loss=True,
            is_counted=not stream.is_halting,
        )

    def _relink_no_more(self) -> None:
        order, self._unlinked = self._unlinked, None
        if order is not None:
            self.frontend.unlinked.get(order.life.worker_id, {}).pop(self, None)

    def place_again(self) -> None:
        """Time passed, or a worker became ready."""
        if self.frontend.is_dead:
            return
        self._stop_waiting()
        stream = self.stream
        commands = stream.handle_timeout(self._world.now)
        self.witness.asked_to_end(self._world.now)
        if stream.state is machine.State.PLACING:
            commands = [*commands, *self._place(0.0)]
        self.obey(commands)

    def _place(self, pause_s: float) -> Sequence[machine.Command]:
        stream, world, frontend = self.stream, self._world, self.frontend
        self._relink_no_more()
        self._stop_waiting()
        self._leave()
        deadline = stream.deadline()
        assert deadline is not None
        wait_s = max(0.0, deadline - world.now)
        if pause_s > 0:
            wait_s = min(wait_s, pause_s)
        world.after(wait_s, self._timer, self._num_timers)
        self.placing_at = world.now + pause_s
        if pause_s > 0:
            return ()
        if self._is_pausing_over:
            self._is_pausing_over, self._goes_on = False, True
            self._trouble.took_effect(Fault.PROCEED)
            self.witness.began_looking(world.now)
            is_enough = world.now - self._paused_at >= frontend.door.rules.preemption.wait_s_max
            frontend.door.note(Event.WAITED_ENOUGH if is_enough else Event.WENT_ON)
        ticket = self._ticket(deadline)
        self.waits_as = frontend.door.standing(self, ticket)
        if self.waits_as is not None:
            error, may_go = frontend.door.line_up(self, self.waits_as)
            if error is not None:
                self._send_away(error)
            if not may_go:
                return ()
        able = {view.life for view in frontend.views() if self.is_able(view)}
        if not self._offer(ticket):
            return ()
        epoch = stream.epoch
        frontend.give_turns()
        if stream.epoch == epoch and stream.state is machine.State.PLACING:
            fault = Fault.NO_WORKER
            if able:
                fault = Fault.QUEUED if ticket.work is Work.RESUME else Fault.HELD_BACK
            self._trouble.took_effect(fault)
            world.after(LOOK_INTERVAL_S, frontend.look)
        return ()

    def called(self) -> None:
        """It comes out of the waiting room."""
        deadline = self.stream.deadline()
        assert deadline is not None
        self._offer(self._ticket(deadline))

    def _offer(self, ticket: Ticket) -> bool:
        """Whether it waits for a turn; else it was refused."""
        frontend, now = self.frontend, self._world.now
        error = frontend.queue.offer(self, ticket, now)
        if error is not None:
            frontend.watch.refused(ticket, error, now)
            self._trouble.took_effect(Fault.FLEET_LOSS)
            self._stop_waiting()
            self._send_away(error)
            return False
        frontend.watch.offered(self, self.name, ticket, self.is_able, now)
        return True

    def _ticket(self, deadline: float) -> Ticket:
        if self._deadline_at is not None:
            deadline = min(deadline, self._deadline_at)
        return Ticket(
            model="m",
            work=Work.RESUME if self._is_resume else Work.NEW,
            priority=self.priority,
            num_tokens=self.num_tokens,
            give_up_at=deadline,
            avoid=self._avoid,
        )

    def take_turn(self, lives: Set[Life]) -> None:
        """One of these workers may be taken."""
        frontend, now = self.frontend, self._world.now
        view = self._choose(lives)
        if view is None:
            frontend.queue.passed_over(self, lives)
            return
        if frontend.door.is_refused_at(self, view):
            self._wait_for_room()
            return
        frontend.watch.admitted(self, view.life, now)
        frontend.queue.admitted(self, view.life, now)
        if frontend.door.is_on:
            frontend.door.room.settled(cast("Any", self), self.waits_as)
        self._is_computing = True
        self._is_new_work = frontend.door.is_on and (self.is_to_be_refused or self.is_unheard)
        self._stop_waiting()
        self.obey(self.stream.placed(self.stream.epoch, view.life, view.abilities))

    def _wait_for_room(self) -> None:
        """It had its turn, and all workers are busy that could take it."""
        frontend, standing = self.frontend, self.waits_as
        assert standing is not None, "with thresholds there is a waiting room"
        frontend.queue.cancel(self)
        frontend.watch.left(self)
        frontend.door.room.come_back(cast("Any", self), standing)

    def _computed(self) -> None:
        self._is_computing = False
        self.frontend.door.room.computed(self.waits_as)
        self.frontend.watch.computed(self, self._world.now)
        self.frontend.queue.computed(self)
        self._world.after(0.0, self.frontend.give_turns)

    def _timer(self, number: int) -> None:
        if number == self._num_timers:
            self.place_again()

    def is_able(self, view: WorkerView) -> bool:
        """Whether it could go on there."""
        return self.stream.way_at(view.abilities) is not ContinuationClass.NONE

    def _choose(self, lives: Set[Life]) -> WorkerView | None:
        need = Need(model=MODEL, num_tokens=self.num_tokens, avoid=self._avoid)
        views = self.frontend.views()
        has_begun = self._is_resume and not self.is_unheard and not self.stream.was_paused
        view = choose(
            views,
            need,
            is_able=lambda view: view.life in lives and self.is_able(view),
            block_hashes=lambda _: (),
            is_busy=(lambda _: False) if has_begun else self.frontend.door.shedder.is_busy,
        )
        if view is not None:
            able = [other.life for other in views if self.is_able(other)]
            self.witness.chosen(view.life, able)
        return view

    def _start(self, order: machine.Start) -> Sequence[machine.Command]:
        found = self.frontend.seat_at(order.life)
        assert found is not None, "nothing has happened since it was chosen"
        view, call = found
        personality = call.process.engine.personality
        self.witness.started(order.checkpoint, personality)
        seat = Seat(self, order.epoch, num_known=len(self.stream.ledger))
        way = self.stream.attempts[-1].way
        self.started_at = self._world.now
        self._world.tell(
            "%s.%d starts on %s: %s", self.name, order.epoch, order.life.worker_id, way.name
        )
        if way is ContinuationClass.REGENERATE and seat.num_known:
            for fault in (Fault.DIVERGENCE, Fault.JUMP, Fault.SHORT):
                if self._trouble.happens(fault):
                    seat.lie = fault
                    seat.lie_offset = self._world.random.randrange(seat.num_known)
        request = self._start_message(order.epoch, order.checkpoint)
        request.window_tokens = order.window_tokens
        request.engine_incarnation = order.life.engine_incarnation
        if self._deadline_at is not None:
            request.deadline.FromNanoseconds(
                max(0, int((self._deadline_at - self._world.now) * 1e9))
            )
        request.is_new_work = self._is_new_work
        self._view = view
        view.placed(self.num_tokens if self.frontend.door.is_on else seat.num_known, 0)
        self._seat = (call, call.start(seat, request), order.epoch)
        door = self.frontend.door
        door.pausing.started(cast("Any", self), view)
        if self._goes_on:
            self._goes_on, self.went_on_at = False, self._world.now
        if len(self.stream.attempts) == 1:
            door.shedder.placed(MODEL, self.num_tokens)
        return ()

    def _start_message(self, epoch: int, checkpoint: Checkpoint) -> attempt_pb2.StartAttempt:
        message = attempt_pb2.StartAttempt(
            stream=attempt_pb2.StreamKey(
                tenant=self.tenant, request_id=self.request_id, choice_index=self._index
            ),
            epoch=epoch,
            checkpoint=checkpoint_to_proto(checkpoint),
        )
        message.orphan_grace.FromMilliseconds(int(ORPHAN_GRACE_S * 1000))
        return message

    def _leave(self) -> None:
        if self._is_computing:
            self._computed()
        seat, self._seat = self._seat, None
        if seat is not None:
            seat[0].abort(seat[1])
            if self._view is not None:
                self._view.num_attempts -= 1
            self.frontend.door.pausing.left(cast("Any", self))
            if self.stream.state is not machine.State.PAUSED:
                seat[0].process.freed_at = self._world.now

    def _stop_waiting(self) -> None:
        self._num_timers += 1
        self.frontend.queue.cancel(self)
        self.frontend.watch.left(self)
        self.frontend.door.room.remove(cast("Any", self))

    def _note_pause(self) -> None:
        door = self.frontend.door
        door.note(Event.PAUSED if self.num_pauses == 1 else Event.PAUSED_AGAIN)
        self._paused_at = self._world.now
        if self._seat is None:
            raise Violation(f"{self.name} is paused, and its worker has not said that it ended")
        process = self._seat[0].process
        running = process.hub.ledger.running.values() if process.is_alive else ()
        if any(self._is_mine(one.stream) and one.epoch <= self.stream.epoch for one in running):
            raise Violation(f"{self.name} is paused, and at a worker")

    def _after_the_end(self) -> None:
        """A settled stream is told more; it must not mind."""
        stream = self.stream
        if self._trouble.happens(Fault.AFTER_THE_END):
            epoch = stream.epoch
            self.lost(epoch, FailureKind.CRASH)
            self.tokens(epoch, len(stream.ledger), (1,), ())
            self._world.after(0.05, self.lost, epoch, FailureKind.HANG)
            self._world.after(0.05, self.end, Reason.CANCELLED)

    # The client.

    def _wake(self) -> None:
        if self.is_abandoned or self._is_take_planned:
            return
        if self.stream.has_output or self.stream.num_moves != self._num_moves:
            self._is_take_planned = True
            self._world.after(self._client_pause_s, self._take)

    @property
    def look_interval_s(self) -> float:
        """Seconds after which `is_plain` is to be asked again."""
        return LOOK_INTERVAL_S

    def is_plain(self, now: float) -> bool:
        """Whether its client is to be told nothing but tokens."""
        del now
        return not (
            self.is_abandoned or self._is_take_planned or self.stream.num_moves != self._num_moves
        )

    def crashed(self, error: Exception) -> None:
        """There are no bugs."""
        raise error

    def acknowledge_early(self) -> None:
        """Have the worker told what the client was sent, if that is nearly due."""
        self.obey(self.stream.acknowledge_early())

    def _rode(self, piece: machine.Piece) -> None:
        self.witness.received(piece)
        self._hold()

    def _take(self) -> None:
        self._is_take_planned = False
        if self.is_abandoned:
            return
        if self.stream.has_output:
            piece, commands = self.stream.take()
            self.witness.received(piece)
            self._hold()
            self.obey(commands)
        elif self.stream.num_moves != self._num_moves:
            self._hold()


def _check_foreign(token: bytes, clock: Clock) -> None:
    """A token of another mesh is refused as one, whatever the time."""
    try:
        resume_token.unseal(token, _KEYRING, now=clock.now())
    except UnbrokenError as error:
        if error.reason is Reason.RESUME_TOKEN_INVALID:
            return
    raise Violation("a token of another mesh was taken for one of ours")
