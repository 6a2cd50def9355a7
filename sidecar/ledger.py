"""What a sidecar remembers of every attempt: ids, offset, owner, epoch. No I/O.

    begin ──▶ RUNNING ──end──▶ ENDED ──retention──▶ forgotten
                │  ▲
      link lost │  │ adopt
                ▼  │
             ORPHANED ──grace──▶ aborted, then ENDED

The ledger fences: of one stream it accepts only epochs above all it knows, and a new epoch revokes
the attempt of the old one. Epochs outlive attempts, in a bounded memory of their own.

Who adopts an attempt reads it from the ledger (`Replay`), under a window of its own, until the
engine's window is as tight as that; from then on tokens go to it as they come.
"""

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeAlias, TypeVar

from unbroken.deadlines import left_for_next_hop
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2 as pb
from unbroken.v1 import relay_service_pb2 as relay

LinkT = TypeVar("LinkT")
"""What stands for one Relay call; the ledger only compares it."""

StreamId: TypeAlias = tuple[str, str, int]
"""Tenant, request id and choice index."""

Owner: TypeAlias = tuple[str, int]
"""One life of a frontend: its id and incarnation."""


class Fenced(Exception):  # noqa: N818 - It names what happened, as the contract does.
    """The epoch is not above those known for its stream."""

    def __init__(self, epoch_known: int) -> None:
        super().__init__(f"expected an epoch above {epoch_known}")
        self.epoch_known = epoch_known


_CLOCK_SLACK_S = 0.01
"""An engine's deadline may seem a little earlier there than here."""


@dataclass(slots=True)
class Replay:
    """How far a reader is that took over an attempt."""

    sent: int
    """Offset after the last token it was sent."""
    acknowledged: int
    window_tokens: int
    """0: none."""

    def due(self, end_offset: int) -> int:
        """Up to where it may be sent what there is."""
        if self.window_tokens == 0:
            return end_offset
        return max(self.sent, min(end_offset, self.acknowledged + self.window_tokens))


class Together(Protocol):
    """Attempts whose tokens come together: `sidecar.rows`, which needs this module."""

    ends: Sequence[int]
    """Of each, the offset after its last token."""

    def settle(self) -> None:
        """Enter what came."""
        ...

    def part(self) -> None:
        """Be together no more. Idempotent."""
        ...


@dataclass(slots=True, eq=False)
class Attempt(Generic[LinkT]):
    """One attempt on this worker."""

    stream: StreamId
    epoch: int
    started_epoch: int
    """Under which it began; `epoch` grows when it is adopted."""
    slot: int
    """Its handle between sidecar and engine; never used twice."""
    checkpoint: pb.Checkpoint
    first_offset: int
    orphan_grace_s: float
    owner: Owner
    """Who asked for it last."""
    link: LinkT | None
    """Who reads it; None: nobody."""
    live_link: LinkT | None
    """Who is sent tokens as they come: `link`, unless that is replayed to."""
    link_slot: int
    """Its handle on that link."""
    window_tokens: int
    """What the engine keeps to; 0: no window."""
    acknowledged: int
    """Where the engine's window begins."""
    engine_incarnation: int
    """In which life of the engine it runs."""
    engine_deadline_at: float | None
    """When the engine ends it by itself; it cannot be told another time."""
    first_deadline_at: float | None
    """When it had to end for whoever began it: a margin later."""
    deadline_at: float | None
    """When it has to end for whoever reads it."""
    logprobs: list[bytes] | None
    """Encoded log probabilities, one for each token, if they were asked for."""
    logprobs_bytes: int = 0
    replay: Replay | None = None
    entered: "array[int]" = field(default_factory=lambda: array("I"))
    """Its tokens, but for those that are not entered yet: see `token_ids`."""
    place: tuple[Together, int] | None = None
    """With whom its tokens come, or came as long as they are not entered, and which of them it is.
    Other threads read it."""
    orphaned_until: float | None = None
    given_up: tuple[FailureKind, str] | None = None
    """Why the sidecar itself had it aborted."""
    began_at: float = 0.0
    """Monotonic seconds."""
    is_probe: bool = False
    """It is nobody's request."""
    prefilled_in_s: float | None = None
    """From its start to its first token; None: there was none yet."""
    ended: pb.AttemptEnded | None = None
    ended_at: float = 0.0

    @property
    def has_room(self) -> bool:
        """Whether its window lets the engine produce."""
        return not self.window_tokens or self.end_offset < self.acknowledged + self.window_tokens

    def is_expired(self, now: float) -> bool:
        """Whether an engine that ends it now does so by the deadline that it was given."""
        engine_at = self.engine_deadline_at
        return engine_at is not None and now >= engine_at - _CLOCK_SLACK_S

    @property
    def is_deadline_of_another(self) -> bool:
        """Whether its reader has more time than the engine was given."""
        first_at, reader_at = self.first_deadline_at, self.deadline_at
        if self.link is None or reader_at is None:
            return True
        return first_at is not None and reader_at > first_at + _CLOCK_SLACK_S

    @property
    def token_ids(self) -> "array[int]":
        """What it has produced. Only for the thread of the event loop."""
        if self.place is not None:
            self.place[0].settle()
        return self.entered

    @property
    def end_offset(self) -> int:
        """Offset after the last token produced."""
        place = self.place
        if place is not None:
            together, row = place
            return together.ends[row]
        return self.first_offset + len(self.entered)

    @property
    def num_produced(self) -> int:
        """How many tokens it has produced."""
        return self.end_offset - self.first_offset

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values the engine holds: prompt, given and produced output."""
        checkpoint = self.checkpoint
        given = len(checkpoint.prompt_token_ids) + len(checkpoint.output_token_ids)
        return given + self.num_produced

    @property
    def weight(self) -> int:
        """Memory that it takes, in tokens of 4 bytes."""
        return self.num_tokens + (self.logprobs_bytes + 3) // 4

    @property
    def sent(self) -> int:
        """Offset after the last token that its reader was sent."""
        return self.end_offset if self.replay is None else self.replay.sent

    @property
    def is_paced_by_engine(self) -> bool:
        """Whether the engine never runs ahead of what its reader allows."""
        replay = self.replay
        return (
            replay is None
            or replay.window_tokens == 0
            or (
                0 < self.window_tokens <= replay.window_tokens
                and self.acknowledged <= replay.acknowledged
            )
        )

    def acknowledge(self, offset: int) -> None:
        """Its reader has passed on everything before the offset; never moves back."""
        self.acknowledged = max(self.acknowledged, offset)
        if self.replay is not None:
            self.replay.acknowledged = max(self.replay.acknowledged, offset)

    def follow(self) -> None:
        """Its reader has everything: tokens go to it as they come."""
        self.part()
        self.replay, self.live_link = None, self.link

    def part(self) -> None:
        """Its next token does not come with those of others, or not for the same reader."""
        if self.place is not None:
            self.place[0].part()

    def detach(self) -> None:
        """Nobody reads it."""
        self.part()
        self.link = self.live_link = self.replay = None


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is remembered, and how long."""

    ended_s: float = 300.0
    attempts_max: int = 10_000
    tokens_max: int = 20_000_000
    """Of prompts and outputs, 4 bytes each; log probabilities count by their bytes."""
    epochs_max: int = 100_000
    """At least 1."""


_ALARMS_SPARE = 1024
"""So many that mean nothing any more may be kept beyond one for each attempt that runs."""


class _Alarms(Generic[LinkT]):
    """When running attempts are to be looked at: those whose time has not come cost nothing.

    An attempt that has another time by now, or runs no more, is passed over when its alarm rings.
    """

    def __init__(
        self,
        running: Mapping[int, Attempt[LinkT]],
        time_of: Callable[[Attempt[LinkT]], float | None],
    ) -> None:
        self._running = running
        self._time_of = time_of
        self._heap: list[tuple[float, int]] = []
        """Times and slots."""

    def set(self, attempt: Attempt[LinkT]) -> None:
        """It has a new time, or none."""
        at = self._time_of(attempt)
        if at is None:
            return
        heapq.heappush(self._heap, (at, attempt.slot))
        if len(self._heap) > len(self._running) + _ALARMS_SPARE:
            self._heap = sorted({alarm for alarm in self._heap if self._means(*alarm)})

    def ring(self, now: float) -> Sequence[Attempt[LinkT]]:
        """Those whose time has come, each once."""
        heap = self._heap
        due: dict[int, Attempt[LinkT]] = {}
        while heap and heap[0][0] <= now:
            at, slot = heapq.heappop(heap)
            if self._means(at, slot):
                due[slot] = self._running[slot]
        return list(due.values())

    def has(self, attempt: Attempt[LinkT]) -> bool:
        """Whether its time is known, if it has one. For `Ledger.check`; it takes long."""
        at = self._time_of(attempt)
        return at is None or (at, attempt.slot) in self._heap

    def _means(self, at: float, slot: int) -> bool:
        attempt = self._running.get(slot)
        return attempt is not None and self._time_of(attempt) == at


class Ledger(Generic[LinkT]):
    """All attempts of this worker. Times are monotonic seconds."""

    def __init__(self, retention: Retention | None = None) -> None:
        self.running: dict[int, Attempt[LinkT]] = {}
        """By engine slot. Read by the hot path; changed here only."""
        self._retention = retention or Retention()
        self._running_by_request: dict[str, dict[int, Attempt[LinkT]]] = {}
        """The same by request id, of whichever tenant, and slot."""
        self._by_stream: dict[StreamId, Attempt[LinkT]] = {}
        self._graces = _Alarms(self.running, lambda attempt: attempt.orphaned_until)
        self._deadlines = _Alarms(self.running, lambda attempt: attempt.deadline_at)
        self._ended: OrderedDict[int, Attempt[LinkT]] = OrderedDict()
        self._ended_tokens = 0
        self._epochs: OrderedDict[StreamId, int] = OrderedDict()
        self._next_slot = 1

    def begin(
        self,
        start: pb.StartAttempt,
        link: LinkT | None,
        *,
        owner: Owner,
        orphan_grace_s: float,
        engine_incarnation: int,
        now: float,
        deadline_margin_s: float = 0.0,
    ) -> tuple[Attempt[LinkT], Attempt[LinkT] | None]:
        """Enter a new attempt; also returns the one it revokes, if that still runs.

        Of its time, the engine gets all but the margin. Without a `link` nobody reads it, and it is
        no orphan either. Raises `Fenced`.
        """
        stream = stream_id(start.stream)
        self._claim(stream, start.epoch)
        before = self._by_stream.get(stream)
        deadline_at = engine_deadline_at = _deadline_at(start, now)
        if deadline_at is not None:
            engine_deadline_at = now + left_for_next_hop(deadline_at - now, deadline_margin_s)
        attempt: Attempt[LinkT] = Attempt(  # Named with its parameter, it takes twice the time.
            stream=stream,
            epoch=start.epoch,
            started_epoch=start.epoch,
            slot=self._next_slot,
            checkpoint=start.checkpoint,
            first_offset=start.checkpoint.first_offset,
            orphan_grace_s=orphan_grace_s,
            owner=owner,
            link=link,
            live_link=link,
            link_slot=start.slot,
            window_tokens=start.window_tokens,
            acknowledged=start.checkpoint.first_offset,
            engine_incarnation=engine_incarnation,
            engine_deadline_at=engine_deadline_at,
            first_deadline_at=deadline_at,
            deadline_at=deadline_at,
            logprobs=[] if start.checkpoint.params.HasField("logprobs") else None,
            began_at=now,
            is_probe=start.is_probe,
        )
        self._next_slot += 1
        self.running[attempt.slot] = self._by_stream[stream] = attempt
        self._running_by_request.setdefault(stream[1], {})[attempt.slot] = attempt
        self._deadlines.set(attempt)
        return attempt, before if before is not None and before.ended is None else None

    def adopt(
        self, message: relay.AdoptAttempt, link: LinkT, *, owner: Owner, now: float
    ) -> Attempt[LinkT]:
        """Give an attempt that runs, or ended not long ago, to another reader.

        The caller tells the old one first. Raises KeyError if the stream is unknown, or known from
        another life of the engine only, ValueError if the offset is not one the attempt can send
        from, `Fenced`.
        """
        stream, offset = stream_id(message.stream), message.offset
        attempt = self._by_stream[stream]
        if message.engine_incarnation not in (0, attempt.engine_incarnation):
            raise KeyError(stream)
        if message.epoch > self._epochs.get(stream, 0) and not (
            attempt.first_offset <= offset <= attempt.end_offset
        ):
            raise ValueError(
                f"expected an offset from {attempt.first_offset} to {attempt.end_offset}, "
                f"got {offset}"
            )
        self._claim(stream, message.epoch)
        attempt.part()
        attempt.epoch = message.epoch
        attempt.owner = owner
        if message.HasField("orphan_grace"):
            attempt.orphan_grace_s = message.orphan_grace.ToNanoseconds() / 1e9
        attempt.deadline_at = _deadline_at(message, now)
        self._deadlines.set(attempt)
        attempt.link, attempt.live_link, attempt.link_slot = link, None, message.slot
        attempt.replay = Replay(offset, offset, message.window_tokens)
        attempt.orphaned_until = None
        return attempt

    def peek(self, key: pb.StreamKey) -> Attempt[LinkT] | None:
        """The latest attempt at this stream, if it is known."""
        return self._by_stream.get(stream_id(key))

    def of_request(self, request_id: str, tenant: str = "") -> Sequence[Attempt[LinkT]]:
        """Running attempts at streams of a request, of whichever tenant if none is named."""
        found = self._running_by_request.get(request_id)
        if found is None:
            return ()
        return [one for one in found.values() if tenant in ("", one.stream[0])]

    def end(self, attempt: Attempt[LinkT], ended: pb.AttemptEnded, now: float) -> None:
        """The attempt is over. `ended` speaks of the engine's slot."""
        attempt.part()
        del self.running[attempt.slot]
        peers = self._running_by_request[attempt.stream[1]]
        del peers[attempt.slot]
        if not peers:
            del self._running_by_request[attempt.stream[1]]
        attempt.ended, attempt.ended_at = ended, now
        attempt.orphaned_until = None
        self._ended[attempt.slot] = attempt
        self._ended_tokens += attempt.weight
        self._forget(now)
        self._forget_epochs()

    def orphan(self, attempts: Iterable[Attempt[LinkT]], now: float) -> None:
        """Nobody reads these attempts any more; each goes on for its grace time."""
        for attempt in attempts:
            attempt.detach()
            if attempt.ended is None:
                attempt.orphaned_until = now + attempt.orphan_grace_s
                self._graces.set(attempt)

    def expired(self, now: float) -> Sequence[Attempt[LinkT]]:
        """Orphans whose grace is over, each reported once; the caller aborts them."""
        self._forget(now)
        due = self._graces.ring(now)
        for attempt in due:
            attempt.orphaned_until = None
        return due

    def overdue(self, now: float) -> Sequence[Attempt[LinkT]]:
        """Attempts whose reader's time is up, and which the engine lets run on; each is reported
        once, and the caller gives it up.
        """
        return [attempt for attempt in self._deadlines.ring(now) if attempt.given_up is None]

    def __iter__(self) -> Iterator[Attempt[LinkT]]:
        """Running attempts."""
        return iter(self.running.values())

    def check(self) -> None:
        """Assert what is always true."""
        assert not self.running.keys() & self._ended.keys(), "an attempt runs or has ended"
        for attempt in self.running.values():
            assert attempt.ended is None, "what runs has not ended"
            if self._by_stream.get(attempt.stream) is attempt:
                assert self._epochs[attempt.stream] == attempt.epoch, "what runs stays fenced"
            assert attempt.link is None or attempt.orphaned_until is None, "orphans have no reader"
            live_link = None if attempt.replay is not None else attempt.link
            assert attempt.live_link is live_link, "who reads is sent tokens, or replayed to"
            assert self._graces.has(attempt), "grace ends"
            assert attempt.given_up or self._deadlines.has(attempt), "deadlines are met"
        by_request = [one for found in self._running_by_request.values() for one in found.values()]
        assert sorted(one.slot for one in by_request) == sorted(self.running), "requests are known"
        assert all(self._running_by_request.values()), "of requests that are over nothing is left"
        assert all(attempt.ended is not None for attempt in self._ended.values())
        assert self._ended_tokens == sum(a.weight for a in self._ended.values())
        for attempt in (*self.running.values(), *self._ended.values()):
            assert attempt.logprobs_bytes == sum(map(len, attempt.logprobs or ()))
        assert len(self._epochs) <= self._retention.epochs_max + len(self.running)

    def _claim(self, stream: StreamId, epoch: int) -> None:
        """Make `epoch` the highest known for the stream."""
        known = self._epochs.get(stream, 0)
        if epoch <= known:
            raise Fenced(known)
        self._epochs[stream] = epoch
        self._epochs.move_to_end(stream)
        self._forget_epochs()

    def _forget_epochs(self) -> None:
        while len(self._epochs) > self._retention.epochs_max + len(self.running):
            oldest = next(iter(self._epochs))
            current = self._by_stream.get(oldest)
            if current is not None and current.ended is None:
                self._epochs.move_to_end(oldest)  # What runs must stay fenced.
            else:
                del self._epochs[oldest]

    def _forget(self, now: float) -> None:
        retention = self._retention
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if (
                now - oldest.ended_at < retention.ended_s
                and len(self._ended) <= retention.attempts_max
                and self._ended_tokens <= retention.tokens_max
            ):
                return
            del self._ended[oldest.slot]
            self._ended_tokens -= oldest.weight
            if self._by_stream.get(oldest.stream) is oldest:
                del self._by_stream[oldest.stream]


def _deadline_at(message: pb.StartAttempt | relay.AdoptAttempt, now: float) -> float | None:
    if not message.HasField("deadline"):
        return None
    return now + message.deadline.ToNanoseconds() / 1e9


def stream_id(key: pb.StreamKey) -> StreamId:
    """What identifies a stream."""
    return key.tenant, key.request_id, key.choice_index
