"""One Relay call, seen from the sidecar: what waits to be written to a frontend.

Tokens gather in columns until the writer takes them, so a frontend that reads slowly gets fewer and
larger frames. What can gather is bounded by the windows of its attempts; a link that holds more
than any sensible windows add up to is given up.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from sidecar import ledger
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

WAITING_BYTES_MAX: Final = 64 * 1024 * 1024
FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
"""Where a frame is closed and the next one begun: frontends take messages of 16 MiB."""

_TOKEN_BYTES: Final = 16
"""Of a row with one token, about; on the wire it has 4 to 15, in NextTokens 1 to 5."""
_MESSAGE_BYTES: Final = 128
"""Of a small message in memory, about."""

Attempt: TypeAlias = "ledger.Attempt[Link]"


class _Step(NamedTuple):
    """Columns of rows with one token each."""

    slots: Sequence[int]
    offsets: Iterable[int]
    token_ids: Iterable[int]


class Link:
    """What one frontend is to be told. Only `take` and `written` are for the writer."""

    def __init__(self, hello: pb.RelayHello, now: float, *, on_news: Callable[[], None]) -> None:
        """`on_news` is called when there is something to write, or the call is to end."""
        self.frontend_id = hello.frontend_id
        self.life = (hello.incarnation, hello.call_number)
        self.owner = (hello.frontend_id, hello.incarnation)
        """Whose attempts they are, from call to call."""
        self.by_slot: dict[int, Attempt] = {}
        """Attempts that it reads, by its own handles."""
        self.slot_used = 0
        """Highest handle yet; they ascend."""
        self.heard_at = now
        self.heartbeat_seen = 0
        self.error: UnbrokenError | None = None
        """Why the call ends, if the sidecar ends it."""
        # What goes out next. A lone step is kept as it came, all else is built in place: copying
        # columns is what costs time here.
        self._response = pb.RelayResponse()
        self._frame = self._response.frame
        self._step: _Step | None = None  # Rows of that frame, its only ones so far.
        self._slots_before: Sequence[int] | None = None  # Those that may come again without slots.
        self._takes_next_tokens = hello.takes_next_tokens
        self._logprobs: dict[int, attempt_pb2.SlotLogprobs] = {}  # By slot, in that frame.
        self._adopted: list[pb.AttemptAdopted] = []  # Goes out before that frame.
        self._other_bytes = 0  # Of what is in that frame beside tokens, or goes before it.
        self._queue: list[pb.RelayResponse] = []
        self._queue_bytes = 0
        self._num_frames = 0
        self._num_heartbeats = 0
        self._is_heartbeat_due = False
        self._queues: Sequence[pb.QueueReport] = ()  # For that heartbeat.
        self._has_news = False
        self._is_writing = False
        self._on_news = on_news

    # What it is to be told.

    def rows(self, slots: Sequence[int], offsets: Iterable[int], token_ids: Iterable[int]) -> None:
        """A token for each of these attempts; `flush` follows.

        The same object as `slots` as the last time says that each offset is the one after the last.
        Columns MUST NOT change afterwards: they are copied when the frame is closed. Those of
        another message are copied much faster than lists.
        """
        if self._step is None and not self._frame.slots:
            self._step = _Step(slots, offsets, token_ids)
        else:
            self._enter_step()
            self._enter(slots, offsets, token_ids)

    def _enter(
        self, slots: Sequence[int], offsets: Iterable[int], token_ids: Iterable[int]
    ) -> None:
        frame = self._frame
        if frame.token_counts:
            frame.token_counts.extend([1] * len(slots))
        frame.slots.extend(slots)
        frame.offsets.extend(offsets)
        frame.token_ids.extend(token_ids)

    def row(self, slot: int, offset: int, token_ids: Sequence[int]) -> None:
        """Tokens of one attempt, at least one; `flush` follows."""
        self._enter_step()
        frame = self._frame
        if not frame.token_counts and len(token_ids) != 1:
            frame.token_counts.extend([1] * len(frame.slots))
        if frame.token_counts or len(token_ids) != 1:
            frame.token_counts.append(len(token_ids))
        frame.slots.append(slot)
        frame.offsets.append(offset)
        frame.token_ids.extend(token_ids)

    def flush(self) -> None:
        """Have the columns written."""
        if self._frame_bytes() > FRAME_BYTES_MAX:
            self._seal()
        if self._queue_bytes + self._frame_bytes() > WAITING_BYTES_MAX:
            self.close(Reason.OVERLOADED, "the frontend does not read")
        self._tell_news()

    def end(self, slot: int, ended: attempt_pb2.AttemptEnded, end_offset: int) -> None:
        """An attempt that it reads is over; `ended` is copied."""
        message = self._frame.ended.add()
        message.CopyFrom(ended)
        message.slot, message.end_offset = slot, end_offset
        self.by_slot.pop(slot, None)
        self._grow(message)

    def refuse(self, refused: attempt_pb2.AttemptRefused) -> None:
        """An attempt did not begin."""
        self._frame.refused.append(refused)
        self.by_slot.pop(refused.slot, None)
        self._grow(refused)

    def logprobs(self, slot: int, logprobs: attempt_pb2.SlotLogprobs) -> None:
        """Log probabilities of tokens that were just entered in the columns."""
        gathered = self._logprobs.get(slot)
        if gathered is None:
            gathered = self._logprobs[slot] = self._frame.logprobs.add(slot=slot)
        gathered.tokens.extend(logprobs.tokens)
        # Not sealed here: they belong in the frame of their tokens.
        self._other_bytes += _MESSAGE_BYTES * len(logprobs.tokens) + logprobs.ByteSize()

    def adopted(self, adopted: pb.AttemptAdopted) -> None:
        """It has an attempt now: comes before all else that is said of that slot."""
        self._adopted.append(adopted)
        self._grow(adopted)

    def load(self, load: worker_pb2.LoadReport) -> None:
        """The newest load: it goes out with the next frame, heartbeats have it anyway."""
        self._frame.load.CopyFrom(load)

    def kv_events(self, events: worker_pb2.KvEvents) -> None:
        """A change of the reusable prefixes."""
        if self._frame_bytes() + events.ByteSize() > FRAME_BYTES_MAX:
            self._seal()
        self._frame.kv_events.append(events)
        self._grow(events)

    def tell(self, response: pb.RelayResponse) -> None:
        """Anything that must keep its place among the frames."""
        self._seal()
        self._queue.append(response)
        self._queue_bytes += _MESSAGE_BYTES + response.ByteSize()
        self.flush()

    def heartbeat(self, queues: Sequence[pb.QueueReport] = ()) -> None:
        """A sign of life, with what waits at other frontends; one that still waits is enough."""
        self._is_heartbeat_due = True
        self._queues = queues
        self._tell_news()

    def close(self, reason: Reason, detail: str) -> None:
        """End the call, after what waits, if there is room for it. The first reason counts."""
        self.error = self.error or UnbrokenError(reason, detail)
        self._tell_news()

    def _tell_news(self) -> None:
        self._has_news = True
        self._on_news()

    @property
    def has_news(self) -> bool:
        """There is something to be taken."""
        return self._has_news

    @property
    def is_idle(self) -> bool:
        """Everything has been written."""
        return not (self._is_writing or self._has_news)

    # For the writer.

    def written(self) -> None:
        """What was taken has left."""
        self._is_writing = False

    def take(
        self, heartbeat_interval_s: float, load: worker_pb2.LoadReport | None
    ) -> Sequence[pb.RelayResponse]:
        """All that waits, in order."""
        self._has_news = False
        self._is_writing = True
        self._seal()
        responses, self._queue, self._queue_bytes = self._queue, [], 0
        if self._is_heartbeat_due:
            self._is_heartbeat_due = False
            self._num_heartbeats += 1
            interval = Duration()
            interval.FromNanoseconds(round(heartbeat_interval_s * 1e9))
            heartbeat = pb.Heartbeat(
                sequence=self._num_heartbeats,
                sequence_seen=self.heartbeat_seen,
                interval=interval,
                load=load,
                queues=self._queues,
            )
            responses.append(pb.RelayResponse(heartbeat=heartbeat))
        return responses

    @property
    def _num_tokens(self) -> int:
        """Of the frame."""
        return len(self._frame.token_ids) if self._step is None else len(self._step.slots)

    def _frame_bytes(self) -> int:
        return _TOKEN_BYTES * self._num_tokens + self._other_bytes

    def _grow(self, message: Message) -> None:
        self._other_bytes += _MESSAGE_BYTES + message.ByteSize()
        self.flush()

    def _seal(self) -> None:
        """Close the frame, if it says anything but the load, and what goes before it."""
        if self._adopted:
            # One message takes its reader a turn of its loop, however little it says.
            adopted, self._adopted = self._adopted, []
            self._queue.append(
                pb.RelayResponse(adopted=adopted[0])
                if len(adopted) == 1
                else pb.RelayResponse(adoptions=pb.AttemptsAdopted(adopted=adopted))
            )
        self._seal_frame()
        self._queue_bytes += self._other_bytes
        self._other_bytes = 0

    def _enter_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._enter(*step)

    def _seal_frame(self) -> None:
        frame, step, slots_before = self._frame, self._step, self._slots_before
        has_rest = bool(frame.ended or frame.refused or frame.kv_events)
        if not (step or frame.slots or has_rest):
            return
        self._num_frames += 1
        self._queue_bytes += self._num_tokens * _TOKEN_BYTES
        # Whether the frame after this one may be NextTokens.
        goes_on = step is not None and not (frame.ended or frame.refused or frame.logprobs)
        self._slots_before = step.slots if step is not None and goes_on else None
        says_more = frame.kv_events or frame.HasField("load")
        if (
            step is not None
            and goes_on
            and not says_more
            and self._takes_next_tokens
            and step.slots is slots_before
        ):
            self._step = None
            response = pb.RelayResponse()
            response.next_tokens.sequence = self._num_frames
            response.next_tokens.token_ids.extend(step.token_ids)
            self._queue.append(response)
            return
        self._enter_step()
        frame.sequence = self._num_frames
        self._queue.append(self._response)
        self._response = pb.RelayResponse()
        self._frame = self._response.frame
        self._logprobs = {}
