"""An engine that does what a test says, and frontends that check what they read."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from typing_extensions import override

from sidecar.engines.base import Engine, EngineDown, EngineListener, EngineUp
from sidecar.hub import Hub
from sidecar.ledger import Retention
from sidecar.link import Link
from sidecar.watchdog import LOOK_INTERVAL_S
from tests.support.frames import frame_of
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, worker_pb2
from unbroken.v1 import relay_service_pb2 as pb

VOCAB_SIZE = 1000
DESCRIPTION = worker_pb2.EngineDescription(
    kind="scripted", model="m", block_size=4, num_ranks=2, tokenizer_fingerprint="t"
)
TOKENIZER = worker_pb2.Tokenizer(vocab_size=VOCAB_SIZE)


def engine_up(incarnation: int = 1, frame_interval_s: float | None = None) -> EngineUp:
    return EngineUp(
        incarnation, DESCRIPTION, TOKENIZER, process_group=77, frame_interval_s=frame_interval_s
    )


def start_of(
    slot: int,
    request_id: str = "r",
    epoch: int = 1,
    *,
    tenant: str = "",
    first_offset: int = 0,
    prompt: Iterable[int] = (),
    window_tokens: int = 0,
    deadline: Duration | None = None,
) -> attempt_pb2.StartAttempt:
    return attempt_pb2.StartAttempt(
        slot=slot,
        stream=attempt_pb2.StreamKey(request_id=request_id, tenant=tenant),
        epoch=epoch,
        checkpoint=attempt_pb2.Checkpoint(prompt_token_ids=prompt, first_offset=first_offset),
        window_tokens=window_tokens,
        deadline=deadline,
    )


def failed(slot: int, end_offset: int, failure: FailureKind) -> attempt_pb2.AttemptEnded:
    message = attempt_pb2.AttemptEnded(slot=slot, end_offset=end_offset)
    message.failure = int(failure)  # pyright: ignore[reportAttributeAccessIssue]
    return message


class ScriptedEngine(Engine):
    """Writes down what it is asked; a test says what it does."""

    def __init__(self) -> None:
        self.started: list[attempt_pb2.StartAttempt] = []
        self.aborted: list[int] = []
        self.acked: list[tuple[int, int]] = []
        self.failures: list[str] = []
        self.causes: list[tuple[FailureKind, float]] = []
        """Of those failures, and for how long the engine had been of no use."""
        self.listener: EngineListener | None = None
        self.is_killed = False
        self._stopped = asyncio.Event()

    @override
    async def run(self, listener: EngineListener) -> None:
        self.listener = listener
        await self._stopped.wait()

    @override
    def start(self, message: attempt_pb2.StartAttempt) -> None:
        copy = attempt_pb2.StartAttempt()
        copy.CopyFrom(message)
        self.started.append(copy)

    @override
    def abort(self, slot: int) -> None:
        self.aborted.append(slot)

    @override
    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        self.acked += zip(slots, offsets, strict=True)

    @override
    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        self.failures.append(detail)
        self.causes.append((failure, after_s))

    @override
    async def stop(self) -> None:
        self._stopped.set()

    @override
    def kill(self) -> None:
        self.is_killed = True


class Reader:
    """What a frontend makes of what it reads; checks that each link keeps the contract."""

    def __init__(self) -> None:
        self.offsets: dict[int, int] = {}
        """Where each slot begins, by its start or adoption."""
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.ended: dict[int, attempt_pb2.AttemptEnded] = {}
        self.refused: dict[int, attempt_pb2.AttemptRefused] = {}
        self.adopted: dict[int, pb.AttemptAdopted] = {}
        self.verdicts: list[pb.EngineVerdict] = []
        self.heartbeats: list[pb.Heartbeat] = []
        self.kv_events: list[worker_pb2.KvEvents] = []
        self.num_frames = 0
        self._frame_before = attempt_pb2.StepFrame()
        self.order: list[str] = []
        """Kinds of what came, in order."""

    def hear(self, response: pb.RelayResponse) -> None:
        kind = response.WhichOneof("response")
        self.order.append(kind or "")
        match kind:
            case "frame":
                self._frame_before = response.frame
                self._frame(response.frame)
            case "next_tokens":
                self._frame_before = frame_of(response.next_tokens, self._frame_before)
                self._frame(self._frame_before)
            case "heartbeat":
                self.heartbeats.append(response.heartbeat)
                assert response.heartbeat.sequence == len(self.heartbeats)
            case "verdict":
                self.verdicts.append(response.verdict)
            case "adopted":
                self.adopted[response.adopted.slot] = response.adopted
            case "adoptions":
                self.adopted |= {one.slot: one for one in response.adoptions.adopted}
            case _:
                pass

    def _frame(self, frame: attempt_pb2.StepFrame) -> None:
        self.num_frames += 1
        assert frame.sequence == self.num_frames
        counts = frame.token_counts or [1] * len(frame.slots)
        begin = 0
        for slot, offset, count in zip(frame.slots, frame.offsets, counts, strict=True):
            assert slot not in self.ended, "a slot that is over says no more"
            assert count, "no row is empty"
            tokens = self.tokens.setdefault(slot, [])
            assert offset == self.offsets.get(slot, 0) + len(tokens), "no gap, no overlap"
            tokens += frame.token_ids[begin : begin + count]
            begin += count
        assert begin == len(frame.token_ids)
        slots_with_logprobs = [logprobs.slot for logprobs in frame.logprobs]
        assert len(set(slots_with_logprobs)) == len(slots_with_logprobs)
        for logprobs in frame.logprobs:
            self.logprobs.setdefault(logprobs.slot, []).extend(t.logprob for t in logprobs.tokens)
        for ended in frame.ended:
            assert ended.slot not in self.ended, "an attempt ends once"
            end_offset = self.offsets.get(ended.slot, 0) + len(self.tokens.get(ended.slot, []))
            assert ended.end_offset == end_offset, "exact"
            self.ended[ended.slot] = ended
        for refused in frame.refused:
            self.refused[refused.slot] = refused
        self.kv_events += frame.kv_events


class Frontend(Reader):
    """A frontend at one link of a hub, without a wire."""

    def __init__(
        self, hub: Hub, now: float, frontend_id: str = "f", life: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.hub = hub
        self.link = Link(
            pb.RelayHello(
                frontend_id=frontend_id,
                incarnation=life[0],
                call_number=life[1],
                takes_next_tokens=True,
            ),
            now,
            on_news=lambda: None,
        )
        self.welcome = hub.join(self.link)
        self._next_slot = 1

    def start(self, request_id: str = "r", epoch: int = 1, **more: object) -> int:
        message = start_of(self.new_slot(), request_id, epoch, **more)  # pyright: ignore[reportArgumentType]
        slot = message.slot
        self.offsets[slot] = message.checkpoint.first_offset
        self.hub.start(self.link, message)
        return slot

    def adopt(
        self,
        request_id: str = "r",
        epoch: int = 2,
        offset: int = 0,
        window_tokens: int = 0,
        **more: object,
    ) -> int:
        slot = self.new_slot()
        self.offsets[slot] = offset
        message = pb.AdoptAttempt(
            slot=slot,
            stream=attempt_pb2.StreamKey(request_id=request_id),
            epoch=epoch,
            offset=offset,
            window_tokens=window_tokens,
            **more,  # pyright: ignore[reportArgumentType]
        )
        self.hub.adopt(self.link, message)
        return slot

    def release(self) -> None:
        self.hub.release(self.link)

    def cancel(self, request_id: str = "r", tenant: str = "") -> None:
        message = pb.CancelAttempts(request_id=request_id, tenant=tenant)
        self.hub.cancel(self.link, message)

    def ack(self, slot: int, offset: int) -> None:
        self.hub.ack(self.link, attempt_pb2.AckAttempts(slots=[slot], offsets=[offset]))

    def read(self) -> list[pb.RelayResponse]:
        """All that waits."""
        responses = list(self.link.take(0.1, self.hub.load))
        for response in responses:
            self.hear(response)
        return responses

    def new_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


class Desk:
    """A hub with its engine, on a clock that a test moves."""

    def __init__(
        self, *, is_up: bool = True, retention: Retention | None = None, rows_min: int = 1
    ) -> None:
        """Tests have few streams, and theirs come in `Rows` too."""
        self.now = 100.0
        self.engine = ScriptedEngine()
        self.hub = Hub(
            self.engine,
            orphan_grace_s=5.0,
            retention=retention,
            rows_min=rows_min,
            clock=lambda: self.now,
        )
        if is_up:
            self.hub.on_up(engine_up())

    def frontend(self, frontend_id: str = "f", life: tuple[int, int] = (1, 1)) -> Frontend:
        return Frontend(self.hub, self.now, frontend_id, life)

    def step(self, tokens: Mapping[int, int | Sequence[int]]) -> None:
        """One step of the engine: for each of its slots, the next token or tokens."""
        frame = attempt_pb2.StepFrame()
        running = self.hub.ledger.running
        is_long = not all(isinstance(ids, int) for ids in tokens.values())
        for slot, given in tokens.items():
            ids = [given] if isinstance(given, int) else given
            frame.slots.append(slot)
            frame.offsets.append(running[slot].end_offset)
            frame.token_ids.extend(ids)
            if is_long:
                frame.token_counts.append(len(ids))
        self.hub.on_frame(frame)

    def say(
        self, *, running: int = 0, queued: int = 0, num_steps: int = 0, prefilled: int = 0
    ) -> None:
        """A sign of life of the engine."""
        rank = worker_pb2.RankLoad(requests_running=running, prefill_tokens_queued=queued)
        load = worker_pb2.LoadReport(
            engine_steps_total=num_steps, ranks=[rank], prefill_tokens_total=prefilled
        )
        self.hub.on_frame(attempt_pb2.StepFrame(load=load))

    def watch(self, duration_s: float) -> None:
        """Time passes in which nothing comes from the engine."""
        for _ in range(round(duration_s / LOOK_INTERVAL_S)):
            self.now += LOOK_INTERVAL_S
            self.hub.watch()

    def end(self, *ended: attempt_pb2.AttemptEnded) -> None:
        self.hub.on_frame(attempt_pb2.StepFrame(ended=ended))

    def down(self, failure: FailureKind = FailureKind.CRASH, *, is_final: bool = False) -> None:
        self.hub.on_down(EngineDown(1, failure, "killed by SIGKILL", is_final=is_final))

    def tick(self, after_s: float = 0.1, *, silence_max_s: float = 1000.0) -> None:
        self.now += after_s
        self.hub.tick(silence_max_s=silence_max_s)

    def check(self) -> None:
        self.hub.ledger.check()
        self.hub.admission.check()
        for link in self.hub.links:
            for slot, attempt in link.by_slot.items():
                assert attempt.link is link, "a link knows what it reads"
                assert attempt.link_slot == slot
