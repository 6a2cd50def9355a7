"""One Relay call, seen from the sidecar: what waits to be written to a frontend.

Tokens gather in columns until the writer takes them, so a frontend that reads slowly gets fewer and
larger frames. What can gather is bounded by the windows of its attempts; a link that holds more, or
whose write does not return, is given up.
"""

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from sidecar import ledger
from unbroken.errors import Reason, UnbrokenError
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

TOKENS_WAITING_MAX = 2_000_000
"""More than any sensible windows add up to; about 20 MB."""

KV_EVENTS_WAITING_MAX = 1_000

Attempt: TypeAlias = "ledger.Attempt[Link]"


class Link:
    """What one frontend is to be told. Only `take` and `wait` are for the writer."""

    def __init__(self, hello: pb.RelayHello, now: float) -> None:
        self.frontend_id = hello.frontend_id
        self.life = (hello.incarnation, hello.call_number)
        self.by_slot: dict[int, Attempt] = {}
        """Attempts that it reads, by its own handles."""
        self.slot_used = 0
        """Highest handle yet; they ascend."""
        self.heard_at = now
        self.heartbeat_seen = 0
        self.frame_seen = 0
        self.written_at = now
        self.error: UnbrokenError | None = None
        """Why the call ends, if the sidecar ends it."""
        # Columns of the frame that goes out next.
        self.slots: list[int] = []
        self.offsets: list[int] = []
        self.counts: list[int] = []
        """Empty while every row has one token."""
        self.token_ids: list[int] = []
        self._ended: list[attempt_pb2.AttemptEnded] = []
        self._refused: list[attempt_pb2.AttemptRefused] = []
        self._logprobs: list[attempt_pb2.SlotLogprobs] = []
        self._kv_events: list[worker_pb2.KvEvents] = []
        self._load: worker_pb2.LoadReport | None = None
        self._queue: list[pb.RelayResponse] = []
        self._num_frames = 0
        self._num_heartbeats = 0
        self._is_heartbeat_due = False
        self._changed = asyncio.Event()

    # What it is to be told.

    def row(self, slot: int, offset: int, token_ids: Sequence[int]) -> None:
        """Tokens of one attempt."""
        if len(token_ids) != 1 and not self.counts:
            self.counts = [1] * len(self.slots)
        self.slots.append(slot)
        self.offsets.append(offset)
        if self.counts or len(token_ids) != 1:
            self.counts.append(len(token_ids))
        self.token_ids.extend(token_ids)

    def end(self, slot: int, ended: attempt_pb2.AttemptEnded) -> None:
        """An attempt that it reads is over; `ended` is copied."""
        message = attempt_pb2.AttemptEnded()
        message.CopyFrom(ended)
        message.slot = slot
        self._ended.append(message)
        self.by_slot.pop(slot, None)
        self._changed.set()

    def refuse(self, refused: attempt_pb2.AttemptRefused) -> None:
        """An attempt did not begin."""
        self._refused.append(refused)
        self.by_slot.pop(refused.slot, None)
        self._changed.set()

    def logprobs(self, slot: int, logprobs: attempt_pb2.SlotLogprobs) -> None:
        """Log probabilities of tokens in the same frame."""
        self._logprobs.append(attempt_pb2.SlotLogprobs(slot=slot, tokens=logprobs.tokens))

    def load(self, load: worker_pb2.LoadReport) -> None:
        """The newest load; earlier ones that still wait are dropped."""
        self._load = load
        self._changed.set()

    def kv_events(self, events: worker_pb2.KvEvents) -> None:
        """A change of the reusable prefixes."""
        self._kv_events.append(events)
        if len(self._kv_events) > KV_EVENTS_WAITING_MAX:
            self.close(Reason.OVERLOADED, "the frontend does not read")
        self._changed.set()

    def tell(self, response: pb.RelayResponse) -> None:
        """Anything that must keep its place among the frames."""
        self._seal()
        self._queue.append(response)
        self._changed.set()

    def heartbeat(self) -> None:
        """A sign of life; one that still waits is enough."""
        self._is_heartbeat_due = True
        self._changed.set()

    def flush(self) -> None:
        """Columns were changed: have them written."""
        if len(self.token_ids) > TOKENS_WAITING_MAX:
            self.close(Reason.OVERLOADED, "the frontend does not read")
        self._changed.set()

    def close(self, reason: Reason, detail: str) -> None:
        """End the call, after what waits has been written."""
        self.error = self.error or UnbrokenError(reason, detail)
        self._changed.set()

    @property
    def is_idle(self) -> bool:
        """Everything has been handed to the writer."""
        return not self._changed.is_set()

    # For the writer.

    async def wait(self) -> None:
        """Until there is something to write, or the link is closed."""
        await self._changed.wait()

    def take(
        self, heartbeat_interval_s: float, load: worker_pb2.LoadReport | None
    ) -> Sequence[pb.RelayResponse]:
        """All that waits, in order."""
        self._changed.clear()
        self._seal()
        responses, self._queue = self._queue, []
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
            )
            responses.append(pb.RelayResponse(heartbeat=heartbeat))
        return responses

    def _seal(self) -> None:
        """Close the frame that was being filled."""
        if not (
            self.slots or self._ended or self._refused or self._kv_events or self._load is not None
        ):
            return
        self._num_frames += 1
        frame = attempt_pb2.StepFrame(
            sequence=self._num_frames,
            slots=self.slots,
            offsets=self.offsets,
            token_counts=self.counts,
            token_ids=self.token_ids,
            ended=self._ended,
            refused=self._refused,
            logprobs=self._logprobs,
            load=self._load,
            kv_events=self._kv_events,
        )
        self._queue.append(pb.RelayResponse(frame=frame))
        self.slots, self.offsets, self.counts, self.token_ids = [], [], [], []
        self._ended, self._refused, self._logprobs, self._kv_events = [], [], [], []
        self._load = None
