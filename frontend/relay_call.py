"""One Relay call to one sidecar: its slots, what is written, what is read.

    frames ──▶ slot ──▶ (stream, epoch) ──▶ commands obeyed, owner woken
    commands, acknowledgements, heartbeats ──▶ one writer

The call ends once, for one reason, and every attempt that it still carries ends with it. A peer
that breaks the contract loses the call: what it says after the breach is worth nothing.
"""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, Protocol
from weakref import WeakValueDictionary

import grpc.aio
from typing_extensions import override

from frontend import stored_kv
from frontend.convoy import Convoy
from frontend.failure_detector import (
    DetectorLimits,
    FailureDetector,
    Liveness,
    Rhythm,
)
from frontend.mesh_view import EngineState, LinkState, MeshView, Worker, report_blocks
from frontend.outliers import Outliers
from frontend.reach import reach
from frontend.relay_wire import Connect, Talker
from frontend.stream import Command, Origin, Stream
from unbroken import log
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import TokenLogprobs, logprobs_from_proto
from unbroken.holdings import StreamName
from unbroken.outcome import FailureKind, FinishReason
from unbroken.recurring import EARLY, LATE, TIMER_S_MIN, Recurring
from unbroken.status import from_rpc_error
from unbroken.thresholds import OFF, Thresholds, to_proto
from unbroken.tokenizer import Tokenizer, asset_from_proto
from unbroken.transport import open_channel
from unbroken.v1 import attempt_pb2, relay_service_pb2, worker_pb2
from unbroken.v1.relay_service_pb2_grpc import RelayServiceStub

PROTOCOL_VERSION: Final = 1
SLOT_MAX: Final = 2**32 - 1
CANCELS_MAX: Final = 1024
"""Names of cancelled requests that wait to be told; what is not told ends after its grace time."""
COMMANDS_BYTES_MAX: Final = 1024 * 1024
"""A message of commands is not filled beyond this, so that it stays far below any limit."""
STEPS_APART_MAX: Final = 4
"""So many steps that came together are told one by one; more, and each stream gets one piece."""
ROWS_APART_MIN: Final = 16
"""Of so many streams: of few, a message less is worth more."""
SAMPLE_INTERVAL_S: Final = 0.5
"""Between two samples of a worker's inter-token latency."""
BACKLOG_TOKENS_MAX: Final = 64
"""A stream of which more has not been sent goes at the pace of its client."""
EXPIRED_EARLY_S_MAX: Final = 1.1
"""So long before the deadline that it was told a sidecar may say that it has passed: the largest
margin there is, and what clocks may differ over the time of a stream."""

_log = log.get_logger(__name__)


class Owner(Protocol):
    """Whoever runs a stream."""

    @property
    def stream(self) -> Stream:
        """The stream."""
        ...

    def obey(self, commands: Sequence[Command]) -> None:
        """Do what the stream asks, in order."""
        ...

    def wake(self) -> None:
        """There is output, or the stream is done. Cheap, and harmless when repeated."""
        ...

    def crashed(self) -> None:
        """The stream's machine raised what is being handled: a bug. The stream ends with it."""
        ...


@dataclass(frozen=True, slots=True)
class FrontendIdentity:
    """One life of this frontend."""

    frontend_id: str
    incarnation: int


class LinkObserver(Protocol):
    """Who counts what happens on links."""

    def count_tokens(self, num_tokens: int) -> None:
        """A frame brought tokens."""
        ...

    def count_delivered(self, num_tokens: int) -> None:
        """So many of them went straight to clients."""
        ...

    def suspected(self) -> None:
        """A worker is silent for longer than it was used to be."""
        ...

    def shed(self) -> None:
        """A worker refused an attempt because it is busy."""
        ...

    def link_lost(self, failure: FailureKind, silence_s: float) -> None:
        """A link that had been up was lost, so long after the last that came on it."""
        ...


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """How long a link may be silent, and how much may wait to be written."""

    detector: DetectorLimits = field(default_factory=DetectorLimits)
    commands_queued_max: int = 65_536
    """A sidecar that leaves so many unread is lost."""
    tokenizer_timeout_s: float = 10.0
    forgotten_grace_s: float = 5.0
    """How long a worker that discovery forgot is called again after its link was lost."""


@dataclass(frozen=True, slots=True)
class End:
    """Why a call ended."""

    failure: FailureKind
    detail: str
    was_welcomed: bool
    is_break: bool
    """Only the connection may be gone."""


@dataclass(slots=True)
class Seat:
    """The attempt behind a slot."""

    owner: Owner
    epoch: int
    stream: Stream
    """That of the owner, which does not change: the hot path asks for it with every token."""
    is_silent: bool
    """It was started and has said nothing yet."""
    wants_logprobs: bool
    started_at: float
    num_prefill_tokens: int
    engine_incarnation: int
    """Life of the engine in which the attempt was begun."""
    name: StreamName
    """Of the stream."""
    deadline_at: float | None
    """When the attempt has to be over."""
    is_adopting: bool = False
    """It waits to be told that it has the attempt."""
    is_probe: bool = False
    """It is nobody's request."""
    expected: stored_kv.Expected | None = None
    """What it might find in a memory service; None: nothing is known of that."""


class _BrokenContract(Exception):  # noqa: N818 - it names what happened.
    """The peer said what the contract forbids; the text says what was expected and seen."""


class TokenizerStore:
    """Fetches each tokenizer once, whichever worker it comes from."""

    def __init__(self, mesh: MeshView, timeout_s: float) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def fetch(self, fingerprint: str, address: str) -> None:
        """Have the tokenizer of a sidecar in the mesh view.

        Raises `UnbrokenError` if it cannot be had.
        """
        lock = self._locks.setdefault(fingerprint, asyncio.Lock())
        async with lock:
            if self._mesh.tokenizer(fingerprint) is not None:
                return
            try:
                async with open_channel(address) as channel:
                    response = await RelayServiceStub(channel).GetTokenizer(
                        relay_service_pb2.GetTokenizerRequest(), timeout=self._timeout_s
                    )
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            if response.fingerprint != fingerprint:
                raise UnbrokenError(
                    Reason.PROTOCOL_VIOLATION,
                    f"expected the tokenizer {fingerprint}, got {response.fingerprint}",
                )
            try:
                # It takes a second for a large vocabulary.
                tokenizer = await asyncio.to_thread(Tokenizer, asset_from_proto(response.tokenizer))
            except ValueError as error:
                raise UnbrokenError(Reason.PROTOCOL_VIOLATION, str(error)) from error
            self._mesh.add_tokenizer(fingerprint, tokenizer)


class RelayCall(Talker):
    """One call, from hello to its end. Everything but `run` returns at once.

    `connect` makes the wire of the call.
    `call_number` counts the calls of this life of the frontend to the worker, from 1. `rhythm` is
    what earlier calls to it have learnt. `on_moved` is called when the streams of a dead engine, or
    of the call, have all looked for another worker.
    """

    def __init__(
        self,
        connect: Connect,
        worker: Worker,
        mesh: MeshView,
        tokenizers: TokenizerStore,
        identity: FrontendIdentity,
        limits: LinkLimits,
        *,
        call_number: int,
        rhythm: Rhythm,
        observer: LinkObserver,
        outliers: Outliers,
        on_welcome: Callable[[], None] = lambda: None,
        on_moved: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wire = connect(self)
        self._worker = worker
        self._mesh = mesh
        self._tokenizers = tokenizers
        self._identity = identity
        self._limits = limits
        self._heartbeat_interval_s = limits.detector.heartbeat_interval_s
        self._call_number = call_number
        self._observer = observer
        self._outliers = outliers
        self._sampled: tuple[int, int, float] | None = None
        """A slot, an offset, and when it came: where the next sample of latency begins."""
        self._samples_at = clock()
        self._on_welcome = on_welcome
        self._on_moved = on_moved
        self._clock = clock
        self._seats: dict[int, Seat] = {}
        self._slots_seen: list[int] = []
        self._seats_seen: list[Seat | None] = []
        """Behind those slots, as long as nobody comes or goes."""
        self._streams_seen: list[Stream | None] = []
        """Columns of what rows need of those seats, which are in no near cache (see
        `frontend.convoy`): their streams, epochs and owners."""
        self._epochs_seen: list[int] = []
        self._owners_seen: list[Owner | None] = []
        self._convoy = Convoy()
        self._next_slot = 1
        self._num_with_logprobs = 0
        self._vocab_size = 0
        self._is_welcomed = False
        self._is_last = False
        """Nothing came after what is dealt with now: clients need not wait to be told more."""
        self._frame_seen = 0
        self._slots_before: list[int] = []
        """Of the last StepFrame, if each row had one token,"""
        self._offsets_before: list[int] = []
        """the offsets of those rows in it,"""
        self._num_after = 0
        """and how many tokens each had after it."""
        self._heartbeat_seen = 0
        self._heartbeats_sent = 0
        self._beat = relay_service_pb2.RelayRequest()
        """Each heartbeat in its turn: to make one takes longer than to send it."""
        self._beat.heartbeat.interval.FromMilliseconds(round(self._heartbeat_interval_s * 1000))
        self._commands: deque[relay_service_pb2.RelayRequest] = deque()
        self._acks: dict[int, int] = {}
        self._cancels: dict[tuple[str, str], None] = {}
        """Tenants and request ids; told when there is nothing else to say."""
        self._pushed: tuple[Thresholds, int] = OFF, 0
        self._is_heartbeat_due = False
        self._is_greeting_due = True
        self._ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._fetching: asyncio.Task[None] | None = None
        self._reaching: asyncio.Task[None] | None = None
        self.detector = FailureDetector(limits.detector, rhythm, clock())
        """Whether the sidecar lives."""
        self._beats_at = clock() + self._heartbeat_interval_s
        self._pulses = Recurring(self._pulse, self._heartbeat_interval_s, clock)

    @property
    def is_over(self) -> bool:
        """Whether it has ended; then nothing can be started on it."""
        return self._ended.done()

    @property
    def outcome(self) -> End | None:
        """How it ended, if it has."""
        return self._ended.result() if self._ended.done() else None

    @property
    def is_up(self) -> bool:
        """Whether the sidecar has answered, and the call goes on."""
        return self._is_welcomed and not self._ended.done()

    @property
    def num_attempts(self) -> int:
        """Attempts that this call carries."""
        return len(self._seats)

    @property
    def seats(self) -> Collection[Seat]:
        """Those."""
        return self._seats.values()

    # What owners of streams ask.

    def start(
        self,
        owner: Owner,
        request: relay_service_pb2.RelayRequest,
        *,
        vocab_size: int,
        wants_logprobs: bool,
        num_prefill_tokens: int,
        expected: stored_kv.Expected | None = None,
    ) -> int:
        """Begin the attempt `request.start`, whose slot is filled in and returned.

        About `num_prefill_tokens` have to be computed before its first token, since `expected` may
        not be there at all.
        """
        start, now = request.start, self._clock()
        slot = start.slot = self._next_slot
        seat = Seat(
            owner,
            start.epoch,
            owner.stream,
            True,
            wants_logprobs,
            now,
            num_prefill_tokens,
            start.engine_incarnation,
            _name(start.stream),
            _deadline_at(start, now),
            is_probe=start.is_probe,
            expected=expected,
        )
        self._sit(seat, vocab_size)
        self._enqueue(request)
        self._wire.hurry(len(self._commands))
        return slot

    def adopt(
        self,
        owner: Owner,
        request: relay_service_pb2.RelayRequest,
        *,
        vocab_size: int,
        wants_logprobs: bool,
    ) -> int:
        """Take over the attempt `request.adopt`, whose slot is filled in and returned."""
        slot = request.adopt.slot = self._next_slot
        epoch, now = request.adopt.epoch, self._clock()
        engine = request.adopt.engine_incarnation
        # How fast it begins says nothing about the worker: it is not heard as one that was silent.
        name = _name(request.adopt.stream)
        seat = Seat(
            owner,
            epoch,
            owner.stream,
            False,
            wants_logprobs,
            now,
            0,
            engine,
            name,
            _deadline_at(request.adopt, now),
            is_adopting=True,
        )
        self._sit(seat, vocab_size)
        self._enqueue(request)
        return slot

    def abort(self, slot: int) -> None:
        """End an attempt; nothing more of it is heard. Idempotent."""
        if self._leave(slot) is not None:
            self._enqueue(relay_service_pb2.RelayRequest(abort=attempt_pb2.AbortAttempt(slot=slot)))

    def halt(self, slot: int) -> None:
        """Have an attempt ended; it is heard until the sidecar says that it has."""
        if slot in self._seats:
            self._enqueue(relay_service_pb2.RelayRequest(abort=attempt_pb2.AbortAttempt(slot=slot)))

    def let_go(self, slot: int) -> None:
        """Hear no more of an attempt. It goes on within its window, and for its grace time after
        the end of the call. Idempotent.
        """
        self._leave(slot)

    def ack(self, slot: int, offset: int) -> None:
        """Move the window of an attempt."""
        if slot in self._seats:
            self._acks[slot] = offset
            self._wire.wake()

    def cancel(self, request_id: str, tenant: str) -> None:
        """Have what nobody reads of a request ended; of whichever tenant, if none is given."""
        if not self._ended.done() and len(self._cancels) < CANCELS_MAX:
            self._cancels[tenant, request_id] = None
            self._wire.wake()

    def push_thresholds(self, thresholds: Thresholds, version: int) -> None:
        """Say what the worker may have; once, until that changes. Attempts begun later obey."""
        if not self._is_welcomed or self._pushed == (thresholds, version):
            return
        self._pushed = thresholds, version
        push = relay_service_pb2.PushThresholds(thresholds=to_proto(thresholds), version=version)
        self._enqueue(relay_service_pb2.RelayRequest(thresholds=push))

    def hurry(self) -> None:
        """Write what waits, as streams have moved here and no more are about to. Raises nothing."""
        if self._commands and not self._ended.done():
            try:
                self._wire.hurry_all()
            except Exception:
                self._crashed()

    def end(self, failure: FailureKind, detail: str, *, is_break: bool = False) -> None:
        """End the call and with it all its attempts. Idempotent.

        `is_break`: perhaps it is only the connection that is gone, and the next call tells.
        """
        if self._ended.done():
            return
        is_break = is_break and self._is_welcomed
        self._ended.set_result(End(failure, detail, self._is_welcomed, is_break))
        worker = self._worker
        worker.link_state = LinkState.LINK_STATE_DOWN
        worker.liveness = Liveness.DEAD
        worker.detail = f"link lost: {failure.name}: {detail}"
        self._mesh.refresh(worker)  # Before streams look for another worker.
        self._lose_all(failure, detail, is_break=is_break)
        if self._is_welcomed:
            self._observer.link_lost(failure, self.detector.silence_s(self._clock()))

    # The conversation.

    async def run(self) -> End:
        """Converse until the call ends."""
        parts = (self._wire.converse(), self._pulses.run())
        tasks = [asyncio.create_task(self._guard(part)) for part in parts]
        try:
            return await self._ended
        finally:
            tasks += [one for one in (self._fetching, self._reaching) if one is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _guard(self, part: Coroutine[None, None, None]) -> None:
        """Whatever goes wrong in a part, the call does not live on without it."""
        try:
            await part
        except Exception:
            self._crashed()

    def _crashed(self) -> None:
        _log.exception("bug in a link", **self._names())
        self.end(FailureKind.PROTOCOL, "an internal error of the frontend")

    def _pulse(self) -> float:
        """Beat, and judge when there may be something to see: a silence is noticed when it is due.

        The detector is told when this will look again, so that it knows when all here was late.
        """
        interval_s, detector, now = self._heartbeat_interval_s, self.detector, self._clock()
        before = detector.liveness
        death = detector.judge(now)
        if death is not None:
            self.end(death.failure, death.detail)
            return math.inf
        if detector.liveness is not before:
            self._show_liveness()
        if now >= self._beats_at - EARLY * interval_s:
            self._beats_at = now + interval_s
            self._is_heartbeat_due = True
            self._wire.wake()
        looks_at = max(now + TIMER_S_MIN, min(self._beats_at, detector.deadline()))
        detector.expects_to_look(looks_at + LATE * interval_s)
        return looks_at

    def _show_liveness(self) -> None:
        """The opinion of the failure detector changed."""
        worker, liveness = self._worker, self.detector.liveness
        worker.liveness = liveness
        if liveness is Liveness.SUSPECT:
            self._observer.suspected()
            if self._reaching is None or self._reaching.done():
                self._reaching = asyncio.create_task(self._reach())
        _log.debug("liveness", liveness=liveness.name, **self._names())
        self._mesh.refresh(worker)

    async def _reach(self) -> None:
        silence_max_s = self._limits.detector.silence_max_s
        self.detector.reached(await reach(self._worker.record.address, silence_max_s))

    # What the wire asks.

    @override
    def next_request(self) -> relay_service_pb2.RelayRequest | None:
        """What to write next, if anything."""
        if self._is_greeting_due:
            self._is_greeting_due = False
            return self._hello()
        if self._is_heartbeat_due:
            self._is_heartbeat_due = False
            return self._heartbeat()
        if self._commands:
            return self._next_commands()
        if self._acks:
            acks, self._acks = self._acks, {}
            message = attempt_pb2.AckAttempts(slots=acks.keys(), offsets=acks.values())
            return relay_service_pb2.RelayRequest(ack=message)
        if self._cancels:
            tenant, request_id = next(iter(self._cancels))
            del self._cancels[tenant, request_id]
            cancel = relay_service_pb2.CancelAttempts(request_id=request_id, tenant=tenant)
            return relay_service_pb2.RelayRequest(cancel=cancel)
        return None

    @override
    def written(self, request: relay_service_pb2.RelayRequest) -> None:
        """It has left, or is about to."""
        if request.HasField("heartbeat"):
            self.detector.sent(request.heartbeat.sequence, self._clock())

    @override
    def receive(
        self, response: relay_service_pb2.RelayResponse | None, *, is_last: bool = False
    ) -> None:
        """A message came, or bytes that are none; if it `is_last`, nothing after it. Raises
        nothing."""
        self._is_last = is_last
        try:
            self._receive(response)
        except _BrokenContract as error:
            _log.warning("sidecar broke the contract", detail=str(error), **self._names())
            self.end(FailureKind.PROTOCOL, str(error))
        except Exception:
            self._crashed()

    @override
    def closed(self, error: grpc.aio.AioRpcError | None) -> None:
        """The sidecar ended the call, well or with that; or it cannot be reached."""
        if error is None:
            self.end(FailureKind.CRASH, "the sidecar ended the call")
        else:
            failure, detail, is_break = _diagnosis(error)
            self.end(failure, detail, is_break=is_break)

    def _hello(self) -> relay_service_pb2.RelayRequest:
        hello = relay_service_pb2.RelayHello(
            protocol_version=PROTOCOL_VERSION,
            frontend_id=self._identity.frontend_id,
            incarnation=self._identity.incarnation,
            expected_worker_incarnation=self._worker.record.identity.incarnation,
            call_number=self._call_number,
            takes_next_tokens=True,
        )
        return relay_service_pb2.RelayRequest(hello=hello)

    def _next_commands(self) -> relay_service_pb2.RelayRequest:
        """All commands that wait, as far as they fit into one message and keep their order."""
        first = self._commands.popleft()
        if not self._commands or first.WhichOneof("request") not in _BATCH_ORDER:
            return first
        message = relay_service_pb2.RelayRequest()
        batch = message.commands
        request, size = first, 0
        while True:
            size += request.ByteSize()
            match request.WhichOneof("request"):
                case "abort":
                    batch.aborts.append(request.abort)
                case "start":
                    batch.starts.append(request.start)
                case _:
                    batch.adopts.append(request.adopt)
            if size > COMMANDS_BYTES_MAX or not self._commands:
                break
            rank = _BATCH_ORDER.get(self._commands[0].WhichOneof("request") or "")
            if rank is None or rank < _BATCH_ORDER[request.WhichOneof("request") or ""]:
                break  # They take effect in this order, so a batch must have it.
            request = self._commands.popleft()
        return message

    def _heartbeat(self) -> relay_service_pb2.RelayRequest:
        self._heartbeats_sent += 1
        heartbeat = self._beat.heartbeat
        heartbeat.sequence = self._heartbeats_sent
        heartbeat.sequence_seen = self._heartbeat_seen
        heartbeat.frame_seen = self._frame_seen
        heartbeat.ClearField("queue")
        queue = self._mesh.queue_of(self._worker.model)
        if queue is not None:
            heartbeat.queue.CopyFrom(queue)
        return self._beat

    def _enqueue(self, request: relay_service_pb2.RelayRequest) -> None:
        if self._ended.done():
            return
        self._commands.append(request)
        self._wire.wake()
        if len(self._commands) > self._limits.commands_queued_max:
            self.end(FailureKind.HANG, f"{len(self._commands)} commands wait to be read")

    # What the sidecar says.

    def _receive(self, response: relay_service_pb2.RelayResponse | None) -> None:
        if self._ended.done():
            return
        if response is None:  # gRPC's way to say so.
            raise _BrokenContract("expected a RelayResponse, got bytes that are none")
        now = self._clock()
        kind = response.WhichOneof("response")
        if not self._is_welcomed and kind != "welcome":
            raise _BrokenContract(f"expected a welcome first, got {kind}")
        if self.detector.heard(now):
            self._show_liveness()
        match kind:
            case "next_tokens":
                self._receive_next_tokens(response.next_tokens, now)
            case "frame":
                self._receive_frame(response.frame, now)
            case "heartbeat":
                self._receive_heartbeat(response.heartbeat, now)
            case "verdict":
                self._receive_verdict(response.verdict)
            case "welcome":
                self._receive_welcome(response.welcome)
            case "adopted":
                self._receive_adopted(response.adopted, now)
            case "adoptions":
                for adopted in response.adoptions.adopted:
                    self._receive_adopted(adopted, now)
            case None:
                pass  # Of a newer contract: MAY be ignored, as its sender knows our version.
        self._pulses.join()

    def _receive_welcome(self, welcome: relay_service_pb2.RelayWelcome) -> None:
        mine, seen = self._worker.record.identity, welcome.identity
        if self._is_welcomed:
            raise _BrokenContract("expected one welcome, got another")
        if welcome.protocol_version != PROTOCOL_VERSION:
            raise _BrokenContract(
                f"expected protocol version {PROTOCOL_VERSION}, got {welcome.protocol_version}"
            )
        if (seen.worker_id, seen.incarnation) != (mine.worker_id, mine.incarnation):
            raise _BrokenContract(
                f"expected worker {mine.worker_id} of incarnation {mine.incarnation}, "
                f"got {seen.worker_id!r} of {seen.incarnation}"
            )
        self._is_welcomed = True
        self._worker.link_state = LinkState.LINK_STATE_UP
        _log.info("link up", **self._names())
        self._receive_verdict(welcome.verdict)
        self._on_welcome()  # Streams whose link broke adopt their attempts,
        if self._call_number > 1:  # and what is left then is nobody's.
            release = relay_service_pb2.ReleaseAttempts()
            self._enqueue(relay_service_pb2.RelayRequest(release=release))

    def _receive_adopted(self, adopted: relay_service_pb2.AttemptAdopted, now: float) -> None:
        seat = self._seats.get(adopted.slot)
        if not 0 < adopted.slot < self._next_slot or not (seat is None or seat.is_adopting):
            raise _BrokenContract(f"expected no adoption for slot {adopted.slot}, got one")
        if seat is None:
            return  # Late news of an attempt that is over.
        seat.is_adopting = False
        checkpoint = adopted.checkpoint
        sampling = checkpoint.params.sampling
        origin = Origin(
            checkpoint.prompt_token_ids,
            checkpoint.output_token_ids,
            checkpoint.first_offset,
            sampling.seed if sampling.HasField("seed") else None,
            adopted.started_epoch,
        )
        try:
            commands = seat.owner.stream.adopted(seat.epoch, adopted.end_offset, origin, now)
        except Exception:
            seat.owner.crashed()
            return
        seat.owner.obey(commands)

    def _receive_heartbeat(self, heartbeat: relay_service_pb2.Heartbeat, now: float) -> None:
        self._heartbeat_seen = heartbeat.sequence
        interval_s = heartbeat.interval.seconds + heartbeat.interval.nanos / 1e9
        self.detector.heartbeat(heartbeat.sequence_seen, interval_s, now)
        if heartbeat.HasField("load"):
            self._take_holder(heartbeat.load)
            self._mesh.report_load(self._worker, heartbeat.load, now)
        if heartbeat.queues:
            self._mesh.report_queues(self._worker, heartbeat.queues)

    def _receive_verdict(self, verdict: relay_service_pb2.EngineVerdict) -> None:
        worker = self._worker
        worker.engine_state = verdict.state
        worker.engine_incarnation = verdict.engine_incarnation
        worker.is_draining = verdict.is_draining
        worker.detail = _engine_detail(verdict)
        if verdict.HasField("description"):
            problem = _problem_of(verdict.description)
            if problem is not None:
                raise _BrokenContract(problem)
            worker.description = verdict.description
            worker.kv_holder = None
            self._take_holder(verdict.description)
            self._want_tokenizer(verdict.description.tokenizer_fingerprint)
        elif verdict.state == EngineState.ENGINE_STATE_SERVING:
            raise _BrokenContract("expected a description with SERVING")
        self._mesh.refresh(worker)
        if verdict.state in _STATES_WITHOUT_PROGRESS:
            # Attempts that the sidecar knew have ended already; these crossed the verdict.
            default = _STATES_WITHOUT_PROGRESS[verdict.state]
            failure = _failure_kind(verdict.failure) or default
            self._lose_all(failure, verdict.detail or worker.detail)

    def _take_holder(self, told: worker_pb2.EngineDescription | worker_pb2.LoadReport) -> None:
        """Keep it apart from what is shown. Streams that were there have its new ticket too."""
        if not told.HasField("kv_holder"):
            return
        holder = told.kv_holder
        problem = stored_kv.problem_of_holder(holder.address, holder.ticket)
        if problem is not None:
            raise _BrokenContract(problem)
        if self._worker.kv_holder is None:
            self._worker.kv_holder = worker_pb2.KvHolder()
        self._worker.kv_holder.CopyFrom(holder)
        told.ClearField("kv_holder")

    def _receive_frame(self, frame: attempt_pb2.StepFrame, now: float) -> None:
        self._check_sequence(frame.sequence)
        # Slices are lists, which take half the time to go through.
        slots, offsets, token_ids = frame.slots[:], frame.offsets[:], frame.token_ids[:]
        counts = frame.token_counts
        num_rows = len(slots)
        if len(offsets) != num_rows or (counts and len(counts) != num_rows):
            raise _BrokenContract(
                f"expected columns of equal length, got {num_rows} slots, {len(offsets)} offsets, "
                f"{len(counts)} counts"
            )
        if len(token_ids) != (sum(counts) if counts else num_rows) or 0 in counts:
            raise _BrokenContract(
                f"expected as many ids as the rows say, got {len(token_ids)} ids, "
                f"{num_rows} rows, counts {list(counts)[:8]}"
            )
        if num_rows:
            self._check_ids(token_ids)
        is_once = len(set(slots)) == num_rows  # Else it has rows of several steps.
        can_come_again = is_once and not (counts or frame.logprobs)
        self._slots_before = slots if can_come_again else []
        self._offsets_before = offsets
        self._num_after = 0
        # Most often there are tokens and nothing else. All else is code that is in no near cache.
        has_more = bool(frame.ended or frame.refused or frame.kv_events or frame.HasField("load"))
        if has_more:
            for load in _loads_of(frame):
                self._take_holder(load)
        orders: list[tuple[Owner, Sequence[Command]]] = []
        if counts or self._num_with_logprobs:
            self._rows_of_many(frame, slots, offsets, token_ids, now, orders)
        elif num_rows > len(self._seats):
            self._rows_of_steps(slots, offsets, token_ids, now, orders)
        elif num_rows:
            self._rows_of_one(slots, offsets, token_ids, now, orders)
        if num_rows:
            self._count_tokens(len(token_ids), slots[0], offsets[0], now)
        if has_more:
            self._receive_rest(frame, now, orders)
        else:
            for owner, commands in orders:
                owner.obey(commands)

    def _receive_next_tokens(self, tokens: attempt_pb2.NextTokens, now: float) -> None:
        """The hottest path: an id for each row of the frame before."""
        self._check_sequence(tokens.sequence)
        self._num_after += 1
        slots, token_ids = self._slots_before, tokens.token_ids[:]
        if not slots or len(token_ids) != len(slots):
            raise _BrokenContract(
                f"expected an id for each of the {len(slots)} rows before, got {len(token_ids)}"
            )
        self._check_ids(token_ids)
        orders: list[tuple[Owner, Sequence[Command]]] = []
        if self._num_with_logprobs:  # Who wants them, and is not told them, fails in there.
            offsets = [offset + self._num_after for offset in self._offsets_before]
            frame = attempt_pb2.StepFrame()
            self._rows_of_many(frame, slots, offsets, token_ids, now, orders)
        else:
            self._rows_of_one(
                slots, self._offsets_before, token_ids, now, orders, num_after=self._num_after
            )
        self._count_tokens(len(token_ids), slots[0], self._offsets_before[0] + self._num_after, now)
        for owner, commands in orders:
            owner.obey(commands)

    def _check_sequence(self, sequence: int) -> None:
        """Frames of both kinds are numbered together, without gaps."""
        if sequence != self._frame_seen + 1:
            raise _BrokenContract(f"expected frame {self._frame_seen + 1}, got {sequence}")
        self._frame_seen = sequence

    def _check_ids(self, token_ids: list[int]) -> None:
        highest = max(token_ids)
        if highest >= self._vocab_size:
            raise _BrokenContract(f"expected token ids below {self._vocab_size}, got {highest}")

    def _count_tokens(self, num_tokens: int, slot: int, offset: int, now: float) -> None:
        """They came, the first of them of that slot."""
        self._observer.count_tokens(num_tokens)
        if now >= self._samples_at:
            self._sample(slot, offset, now)

    def _receive_rest(
        self,
        frame: attempt_pb2.StepFrame,
        now: float,
        orders: list[tuple[Owner, Sequence[Command]]],
    ) -> None:
        """What a frame says beside its rows, for which there are `orders`, and obey it all."""
        ends = [
            (seat, ended) for ended in frame.ended if (seat := self._leave(ended.slot)) is not None
        ]
        is_death = self._note_death(ends)
        for seat, ended in ends:
            # Who has said nothing may not have looked, or not have been told yet.
            if seat.expected is not None and not seat.is_silent and _tells_prefill(ended):
                self._mesh.stored.seen(
                    seat.expected,
                    cached_tokens=ended.cached_tokens,
                    restored_tokens=ended.restored_tokens,
                )
        # Each is on its way before the next is told. But if tokens asked for something, ends that
        # came with the last of them count in what clients are told of those.
        told = ((seat.owner, _ended(seat, ended, now)) for seat, ended in ends)
        if orders:
            orders += told
        for refused in frame.refused:  # Before anybody looks for another worker.
            if refused.HasField("busy"):
                self._mesh.report_busy(self._worker, refused.busy, now)
                self._observer.shed()
        orders += [
            (seat.owner, _refused(seat, refused, now))
            for refused in frame.refused
            if (seat := self._leave(refused.slot)) is not None
        ]
        if frame.HasField("load"):
            self._mesh.report_load(self._worker, frame.load, now)
        for events in frame.kv_events:
            report_blocks(self._worker, events)
        for owner, commands in chain(told, orders):
            owner.obey(commands)
        if is_death:
            self._on_moved()

    def _rows_of_one(
        self,
        slots: list[int],
        offsets: list[int],
        token_ids: list[int],
        now: float,
        orders: list[tuple[Owner, Sequence[Command]]],
        *,
        num_after: int = 0,
    ) -> None:
        """The hot path: one token a row, `num_after` after its offset; no log probabilities."""
        seats = self._seats_of(slots, now)
        # As they are now: whoever is found to be broken below leaves, and they are made anew.
        streams, epochs, owners = self._streams_seen, self._epochs_seen, self._owners_seen
        try:
            rows = self._convoy.go(
                offsets, token_ids, now, is_last=self._is_last, num_after=num_after
            )
        except Exception:
            rows = self._end_convoy(seats)
        self._observer.count_delivered(len(seats) - len(rows))
        for row in rows:
            stream, owner = streams[row], owners[row]
            if stream is None or owner is None:
                continue  # Late news of an attempt that is over.
            try:
                offset = offsets[row] + num_after
                commands = stream.token(epochs[row], offset, token_ids[row], now)
            except Exception:
                owner.crashed()  # One stream's bug is not the others' loss.
                continue
            if commands:
                orders.append((owner, commands))
            else:
                owner.wake()

    def _rows_of_steps(
        self,
        slots: list[int],
        offsets: list[int],
        token_ids: list[int],
        now: float,
        orders: list[tuple[Owner, Sequence[Command]]],
    ) -> None:
        """One token a row, but more rows than attempts: what several steps brought at once.

        Of many steps each stream gets what it was brought in one piece.
        """
        num_slots = slots.index(slots[0], 1) if slots[0] in slots[1:] else len(slots)
        num_steps = len(slots) // num_slots
        once = slots[:num_slots]
        is_even = slots == once * num_steps and len(set(once)) == num_slots
        self._is_last = False
        if is_even and num_steps <= STEPS_APART_MAX and num_slots >= ROWS_APART_MIN:
            for begin in range(0, len(slots), num_slots):
                step = slice(begin, begin + num_slots)
                self._rows_of_one(slots[step], offsets[step], token_ids[step], now, orders)
            return
        self._convoy.pause()
        if is_even:
            rows_of = {
                slots[row]: (offsets[row::num_slots], token_ids[row::num_slots])
                for row in range(num_slots)
            }
        else:
            rows_of = _by_slot(slots, offsets, token_ids)
        for slot, (offsets_of, ids_of) in rows_of.items():
            seat = self._seats.get(slot)
            if seat is None:
                continue
            if seat.is_silent:
                self._hear_first(seat, now)
            first = offsets_of[0]
            pieces = [(first, ids_of)]
            if offsets_of != list(range(first, first + len(offsets_of))):
                # The stream says at which of them it is wrong.
                pieces = [(o, [i]) for o, i in zip(offsets_of, ids_of, strict=True)]
            try:
                for offset, piece in pieces:
                    commands = seat.stream.tokens(seat.epoch, offset, piece, now)
                    if commands:
                        orders.append((seat.owner, commands))
            except Exception:
                seat.owner.crashed()
                continue
            seat.owner.wake()

    def _seats_of(self, slots: list[int], now: float) -> list[Seat | None]:
        """Who is meant by a column of slots; most often it is that of the frame before.

        Each of them has a token in this frame.
        """
        if slots is not self._slots_seen and slots != self._slots_seen:
            self._slots_seen = slots
            seats = self._seats_seen = [self._seats.get(slot) for slot in slots]
            for seat in seats:
                if seat is not None and seat.is_silent:
                    self._hear_first(seat, now)
            self._streams_seen = [None if seat is None else seat.stream for seat in seats]
            self._epochs_seen = [0 if seat is None else seat.epoch for seat in seats]
            self._owners_seen = [None if seat is None else seat.owner for seat in seats]
            self._convoy.align(slots, self._streams_seen, self._epochs_seen)
        return self._seats_seen

    def _end_convoy(self, seats: Sequence[Seat | None]) -> Sequence[int]:
        """A bug was met in it: all go the long way. Returns their rows."""
        _log.exception("bug in a convoy", **self._names())
        for seat in seats:
            if seat is not None and seat.stream.ride is not None:
                try:
                    seat.stream.ride.step_out()
                except Exception:
                    seat.owner.crashed()
        return range(len(seats))

    def _forget_rows(self) -> None:
        """Somebody came or went."""
        self._convoy.forget()
        self._slots_seen, self._seats_seen = [], []
        self._streams_seen, self._epochs_seen, self._owners_seen = [], [], []

    def _rows_of_many(
        self,
        frame: attempt_pb2.StepFrame,
        slots: list[int],
        offsets: list[int],
        token_ids: list[int],
        now: float,
        orders: list[tuple[Owner, Sequence[Command]]],
    ) -> None:
        counts = frame.token_counts or [1] * len(slots)
        logprobs = {
            entry.slot: [logprobs_from_proto(token) for token in entry.tokens]
            for entry in frame.logprobs
        }
        no_logprobs: Sequence[TokenLogprobs] = ()
        end = 0
        for slot, offset, count in zip(slots, offsets, counts, strict=True):
            begin, end = end, end + count
            seat = self._seats.get(slot)
            if seat is None:
                continue
            if seat.is_silent:
                self._hear_first(seat, now)
            beside = no_logprobs
            if seat.wants_logprobs:
                # A slot with several rows has its log probabilities one after the other.
                given = logprobs.get(slot, [])
                beside, logprobs[slot] = given[:count], given[count:]
            if seat.wants_logprobs and len(beside) != count:
                commands = seat.owner.stream.lost(
                    seat.epoch,
                    FailureKind.PROTOCOL,
                    f"expected {count} log probabilities, got {len(beside)}",
                    now,
                )
            else:
                tokens = seat.owner.stream.tokens
                try:
                    commands = tokens(seat.epoch, offset, token_ids[begin:end], now, beside)
                except Exception:
                    seat.owner.crashed()
                    continue
            if commands:
                orders.append((seat.owner, commands))
            else:
                seat.owner.wake()

    # How fast the worker is.

    def _hear_first(self, seat: Seat, now: float) -> None:
        seat.is_silent = False
        self._outliers.first_token(
            self._worker.worker_id, now - seat.started_at, seat.num_prefill_tokens, now
        )

    def _sample(self, slot: int, offset: int, now: float) -> None:
        """Every now and then: how fast one stream went since the last time."""
        before, self._sampled = self._sampled, (slot, offset, now)
        self._samples_at = now + SAMPLE_INTERVAL_S
        seat = self._seats.get(slot)
        if before is None or before[0] != slot or offset <= before[1] or seat is None:
            return
        stream = seat.owner.stream
        if len(stream.ledger) - stream.num_sent <= BACKLOG_TOKENS_MAX:  # Else its client is slow.
            latency_s = (now - before[2]) / (offset - before[1])
            self._outliers.inter_token(self._worker.worker_id, latency_s, now)

    def _note_death(self, ends: Sequence[tuple[Seat, attempt_pb2.AttemptEnded]]) -> bool:
        """Whether the engine is gone: then nobody is placed there. The verdict comes later."""
        worker = self._worker
        is_death = any(
            ended.failure == worker_pb2.FAILURE_KIND_CRASH
            and seat.engine_incarnation == worker.engine_incarnation
            for seat, ended in ends
        )
        if is_death:
            worker.engine_state = EngineState.ENGINE_STATE_DEAD
            worker.detail = "engine dead"
            self._mesh.refresh(worker)
        return is_death

    # Bookkeeping.

    def _sit(self, seat: Seat, vocab_size: int) -> None:
        """Give the seat the next slot."""
        slot = self._next_slot
        self._next_slot += 1
        self._vocab_size = vocab_size
        self._seats[slot] = seat
        self._forget_rows()
        self._num_with_logprobs += seat.wants_logprobs
        if slot == SLOT_MAX:
            self.end(FailureKind.PARTITION, "all slots of the call have been used", is_break=True)

    def _leave(self, slot: int) -> Seat | None:
        seat = self._seats.pop(slot, None)
        if seat is not None:
            self._acks.pop(slot, None)
            self._forget_rows()
            self._num_with_logprobs -= seat.wants_logprobs
            try:
                if seat.stream.ride is not None:
                    seat.stream.ride.step_out()
            except Exception:
                seat.owner.crashed()  # One stream's bug is not the others' loss.
        return seat

    def _lose_all(self, failure: FailureKind, detail: str, *, is_break: bool = False) -> None:
        """`is_break`: nothing is known of the worker behind the link."""
        now, slots = self._clock(), list(self._seats)
        for slot in slots:
            seat = self._seats.get(slot)
            if seat is None:
                continue
            stream = seat.owner.stream
            try:
                if is_break:
                    commands = stream.unlinked(seat.epoch, detail, now)
                else:
                    commands = stream.lost(seat.epoch, failure, detail, now)
                seat.owner.obey(commands)
            except Exception:
                seat.owner.crashed()
            self._leave(slot)
        if slots:
            self._on_moved()

    def _want_tokenizer(self, fingerprint: str) -> None:
        if self._mesh.tokenizer(fingerprint) is None:
            if self._fetching is not None:
                self._fetching.cancel()  # Of an engine before.
            self._fetching = asyncio.create_task(self._fetch_tokenizer(fingerprint))

    async def _fetch_tokenizer(self, fingerprint: str) -> None:
        pause_s = 0.1
        while True:
            try:
                await self._tokenizers.fetch(fingerprint, self._worker.record.address)
            except UnbrokenError as error:
                self._worker.detail = f"no tokenizer: {error.detail}"
                _log.warning("no tokenizer", detail=error.detail, **self._names())
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)
            else:
                return

    def _names(self) -> dict[str, object]:
        identity = self._worker.record.identity
        return {"worker_id": identity.worker_id, "incarnation": identity.incarnation}


def _by_slot(
    slots: list[int], offsets: list[int], token_ids: list[int]
) -> Mapping[int, tuple[list[int], list[int]]]:
    """Offsets and ids of each slot, in their order."""
    rows_of: defaultdict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for slot, offset, token_id in zip(slots, offsets, token_ids, strict=True):
        offsets_of, ids_of = rows_of[slot]
        offsets_of.append(offset)
        ids_of.append(token_id)
    return rows_of


def _name(key: attempt_pb2.StreamKey) -> StreamName:
    return key.tenant, key.request_id, key.choice_index


def _deadline_at(
    message: attempt_pb2.StartAttempt | relay_service_pb2.AdoptAttempt, now: float
) -> float | None:
    if not message.HasField("deadline"):
        return None
    return now + message.deadline.ToNanoseconds() / 1e9


def _tells_prefill(ended: attempt_pb2.AttemptEnded) -> bool:
    """Whether it says what was done about the prompt: no sidecar knows that for its dead engine."""
    return bool(ended.prefill_tokens or ended.cached_tokens or ended.restored_tokens)


def _loads_of(frame: attempt_pb2.StepFrame) -> Iterator[worker_pb2.LoadReport]:
    """All that it says of its worker's load."""
    for refused in frame.refused:
        if refused.HasField("busy"):
            yield refused.busy.load
    if frame.HasField("load"):
        yield frame.load


def _ended(seat: Seat, ended: attempt_pb2.AttemptEnded, now: float) -> Sequence[Command]:
    """What the stream asks for. Raises nothing: a bug of it ends it, and others are told."""
    try:
        return _stream_ended(seat, ended, now)
    except Exception:
        seat.owner.crashed()
        return ()


def _stream_ended(seat: Seat, ended: attempt_pb2.AttemptEnded, now: float) -> Sequence[Command]:
    reason = ended.finish_reason
    return seat.owner.stream.ended(
        seat.epoch,
        ended.end_offset,
        FinishReason(reason) if reason in _FINISH_REASONS else FinishReason.UNSPECIFIED,
        now=now,
        stop_token_id=ended.stop_token_id if ended.HasField("stop_token_id") else None,
        failure=_failure_kind(ended.failure),
        detail=ended.detail,
        cached_tokens=ended.cached_tokens,
        restored_tokens=ended.restored_tokens,
        is_expired=(
            ended.is_expired
            and seat.deadline_at is not None
            and now >= seat.deadline_at - EXPIRED_EARLY_S_MAX
        ),
    )


def _refused(seat: Seat, refused: attempt_pb2.AttemptRefused, now: float) -> Sequence[Command]:
    return seat.owner.stream.refused(
        seat.epoch,
        _failure_kind(refused.kind) or FailureKind.ENGINE_ERROR,
        refused.detail,
        now=now,
        epoch_known=refused.epoch_known,
        is_busy=refused.HasField("busy"),
    )


_BATCH_ORDER: Final = {"abort": 0, "start": 1, "adopt": 2}
"""In which the commands of a batch take effect."""

_STATES_WITHOUT_PROGRESS: Final = {
    EngineState.ENGINE_STATE_STARTING: FailureKind.CRASH,
    EngineState.ENGINE_STATE_DEAD: FailureKind.CRASH,
    EngineState.ENGINE_STATE_STALLED: FailureKind.STALL,
}
"""What to call it when a sidecar reports this and does not say more."""

_FINISH_REASONS = frozenset(map(int, FinishReason))
_FAILURE_KINDS = frozenset(map(int, FailureKind))

_FAILURES_OF_REASONS: Final = {
    Reason.FENCED: FailureKind.FENCED,
    Reason.DRAINING: FailureKind.DRAIN,
    Reason.UNREACHABLE: FailureKind.CRASH,
}


def _diagnosis(error: grpc.aio.AioRpcError) -> tuple[FailureKind, str, bool]:
    """What the status of a Relay call says about the sidecar, and whether that may be wrong.

    A dead peer and a broken connection look the same; the next call tells them apart.
    """
    meaning = from_rpc_error(error)
    if meaning.reason is Reason.CANCELLED:  # How a server that stops ends its calls.
        return FailureKind.CRASH, f"{meaning.reason.name}: {meaning.detail}", False
    kind = _FAILURES_OF_REASONS.get(meaning.reason, FailureKind.PROTOCOL)
    if error.code() is grpc.StatusCode.INTERNAL and "grpc_code" in meaning.metadata:
        kind = FailureKind.CRASH  # gRPC's own, when a write is the first to meet a dead peer.
    return kind, f"{meaning.reason.name}: {meaning.detail}", kind is FailureKind.CRASH


def _failure_kind(value: int) -> FailureKind:
    """A kind that is not known here, of a newer contract, is an error of the engine."""
    return FailureKind(value) if value in _FAILURE_KINDS else FailureKind.ENGINE_ERROR


def _problem_of(description: worker_pb2.EngineDescription) -> str | None:
    """Why an engine cannot be used as described, if it cannot."""
    if not (description.model and description.tokenizer_fingerprint):
        return "expected a description with model and tokenizer, got one without"
    if not (description.context_length and description.block_size):
        return "expected a description with context_length and block_size, got one without"
    return stored_kv.problem_of_service(description.memory_service)


def _engine_detail(verdict: relay_service_pb2.EngineVerdict) -> str:
    if verdict.state == EngineState.ENGINE_STATE_SERVING:
        return "draining" if verdict.is_draining else ""
    known = verdict.state in EngineState.values()
    name = EngineState.Name(verdict.state) if known else str(verdict.state)
    state = name.removeprefix("ENGINE_STATE_").lower()
    return f"engine {state}: {verdict.detail}" if verdict.detail else f"engine {state}"
