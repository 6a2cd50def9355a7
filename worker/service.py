"""Serves an engine to its sidecar over a Unix socket, and turns the crank.

One task reads what the sidecar wants, one runs step after step. Whatever a step produced leaves in
one frame. Between steps, refusals and ends leave at once; when nothing runs, or a step takes long,
a frame with the load leaves every `FRAME_INTERVAL_S`, so that silence means something.

A new connection replaces the old one, with all of its attempts.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

from unbroken import framing, holdings, log
from unbroken.errors import UnbrokenError
from unbroken.framing import Connection, FramingError
from unbroken.generation import logprobs_to_proto
from unbroken.holdings import Holding
from unbroken.tokenizer import asset_to_proto
from unbroken.v1 import attempt_pb2, engine_pb2, worker_pb2
from worker.constraints import ConstraintCompiler
from worker.engine import KvHolder, ModelRunner, Sequence, admit, describe
from worker.fencing import EpochFence, StreamKey
from worker.scheduler import Scheduler

PROTOCOL_VERSION = 1
FRAME_INTERVAL_S = 0.2
"""Time between two frames when nothing runs, or while a step is computed."""
LOAD_INTERVAL_S = 0.1
"""Time between two load reports when something runs,"""
PROMPT_LOAD_INTERVAL_S = 0.01
"""and after steps that computed prompts: others wait for the room that these have left."""
RETRY_AFTER_S = 1.0
"""What a sidecar is told that finds the line full."""

_REQUEST_ID_CHARS_MAX = 128

_log = log.get_logger(__name__)

Inbound: TypeAlias = Connection[engine_pb2.EngineRequest]


class ContractBroken(FramingError):  # noqa: N818 - it names what is wrong, as `InvalidField` does.
    """The sidecar sent a message that has no meaning here."""


class EngineService:
    """An engine and the socket it is reached at.

    service = EngineService(runner)
    await service.serve(path)       # until cancelled, or until the engine fails
    """

    def __init__(self, runner: ModelRunner, *, waiting_max: int = 16_384) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner.spec, waiting_max=waiting_max)
        self._compiler = ConstraintCompiler(runner.spec.tokenizer)
        self._fence = EpochFence()
        self._session: _Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._crash: asyncio.Future[None] | None = None
        self._has_work = asyncio.Event()
        self._is_computing = False
        self._steps_s = 0.0
        """Time in which steps were computed."""

    @property
    def is_idle(self) -> bool:
        """Nothing runs or waits."""
        return self._scheduler.is_empty

    async def serve(self, path: Path, *, on_listening: Callable[[], None] | None = None) -> None:
        """Listen at `path`, whatever socket stood there, and run until cancelled.

        Raises:
            OSError: The socket can't be made.
            Exception: Whatever the engine, or a bug of ours, failed with.
        """
        server = await framing.serve_unix(str(path), engine_pb2.EngineRequest, self._connected)
        self._crash = asyncio.get_running_loop().create_future()
        self._spawn(self._step_forever())
        self._spawn(self._show_life())
        try:
            if on_listening is not None:
                on_listening()
            await self._crash
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._session is not None:
                self._session.connection.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - microseconds, and nothing runs any more.
            await self._runner.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task of which no failure is survived."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or self._crash is None or self._crash.done():
            return
        error = task.exception()
        if error is not None:
            self._crash.set_exception(error)

    # What the sidecar wants.

    def _connected(self, connection: Inbound) -> None:
        self._spawn(self._read(_Session(connection)))

    async def _read(self, session: "_Session") -> None:
        """Handle everything that one connection says."""
        connection = session.connection
        try:
            while batch := await connection.receive():
                for request in batch:
                    await self._handle(session, request)
        except FramingError as error:
            _log.warning(
                "sidecar broke the contract", error=type(error).__name__, detail=str(error)
            )
        finally:
            connection.close()
            if session is self._session:
                self._end_session()

    async def _handle(self, session: "_Session", request: engine_pb2.EngineRequest) -> None:
        kind = request.WhichOneof("request")
        if kind is None:
            raise ContractBroken("expected a request of a known kind, got none")
        if (kind == "hello") == session.has_greeted:
            raise ContractBroken(f"expected hello first and only once, got {kind}")
        if session.has_greeted and session is not self._session:
            return  # It was replaced, and what it still says counts for nothing.
        match kind:
            case "hello":
                self._greet(session, request.hello)
            case "start":
                await self._start(session, request.start)
            case "abort":
                self._scheduler.abort(request.abort.slot)
            case "ack":
                slots, offsets = request.ack.slots, request.ack.offsets
                if len(slots) != len(offsets):
                    raise ContractBroken(
                        f"expected an offset for each of {len(slots)} slots, got {len(offsets)}"
                    )
                for slot, offset in zip(slots, offsets, strict=True):
                    self._scheduler.acknowledge(slot, offset)
            case "list_holdings":
                self._tell_holdings(session, request.list_holdings.number)
        self._has_work.set()

    def _tell_holdings(self, session: "_Session", number: int) -> None:
        """What everybody holds now, whatever is being computed."""
        now = asyncio.get_running_loop().time()
        held = [
            Holding(
                one.kind,
                None if one.slot is None else session.key_of.get(one.slot),
                None if one.slot is None else session.since.get(one.slot),
                one.amount,
                detail=one.detail,
            )
            for one in self._scheduler.held()
        ]
        answer = engine_pb2.EngineHoldings(
            number=number, holdings=[holdings.to_proto(one, now) for one in held]
        )
        session.connection.send(engine_pb2.EngineResponse(holdings=answer))

    def _greet(self, session: "_Session", hello: engine_pb2.EngineHello) -> None:
        if hello.protocol_version < 1:
            raise ContractBroken(
                f"expected a protocol_version of at least 1, got {hello.protocol_version}"
            )
        if self._session is not None:
            _log.warning("sidecar replaced", num_steps=self._scheduler.num_steps)
            # At once: the old one may have stopped reading, and steps wait until it has read.
            self._session.connection.abort()
            self._end_session()
        session.has_greeted = True
        self._session = session
        description = describe(self._runner.spec)
        session.holder = self._runner.kv_holder()
        if session.holder is not None:
            session.holder.write(description.kv_holder)
        ready = engine_pb2.EngineReady(
            protocol_version=min(hello.protocol_version, PROTOCOL_VERSION),
            description=description,
            tokenizer=asset_to_proto(self._runner.spec.tokenizer),
            tells_holdings=True,
        )
        ready.frame_interval.FromMilliseconds(round(FRAME_INTERVAL_S * 1000))
        session.connection.send(engine_pb2.EngineResponse(ready=ready))

    def _end_session(self) -> None:
        self._session = None
        self._scheduler.drop_all()

    async def _start(self, session: "_Session", start: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or leave a refusal for the next frame."""
        slot = start.slot
        try:
            await self._start_in_order(session, start)
        finally:
            # What is refused is dealt with too: no load will ever count it.
            session.slot_seen = max(session.slot_seen, slot)

    async def _start_in_order(self, session: "_Session", start: attempt_pb2.StartAttempt) -> None:
        slot = start.slot
        stream = start.stream
        key = (stream.tenant, stream.request_id, stream.choice_index)
        if slot <= session.slot_highest:
            # The refusal says that the slot is over, so it has to be.
            self._scheduler.abort(slot)
            session.refuse(
                slot,
                worker_pb2.FAILURE_KIND_REJECTED,
                f"slot: expected above {session.slot_highest}, got {slot}",
            )
            return
        session.slot_highest = slot
        if not 1 <= len(stream.request_id) <= _REQUEST_ID_CHARS_MAX or start.epoch < 1:
            session.refuse(
                slot,
                worker_pb2.FAILURE_KIND_REJECTED,
                f"stream: expected a request_id of 1 to {_REQUEST_ID_CHARS_MAX} characters and an "
                f"epoch of at least 1, got {len(stream.request_id)} and {start.epoch}",
            )
            return
        known = self._fence.admit(key, start.epoch)
        if known is not None:
            session.refuse(
                slot,
                worker_pb2.FAILURE_KIND_FENCED,
                f"epoch: expected above {known}, got {start.epoch}",
                epoch_known=known,
            )
            return
        older = session.slot_of.get(key)
        if older is not None:
            self._scheduler.abort(older, failure=worker_pb2.FAILURE_KIND_FENCED)
        try:
            sequence = await self._admit(start)
        except UnbrokenError as error:
            session.refuse(slot, worker_pb2.FAILURE_KIND_REJECTED, error.detail)
            return
        if session is not self._session:
            return  # Replaced while the constraint compiled.
        if not self._scheduler.submit(sequence):
            session.refuse(slot, worker_pb2.FAILURE_KIND_OVERLOAD, "too many attempts are waiting")
            return
        session.slot_of[key] = slot
        session.key_of[slot] = key
        session.since[slot] = asyncio.get_running_loop().time()

    async def _admit(self, start: attempt_pb2.StartAttempt) -> Sequence:
        now = asyncio.get_running_loop().time()
        if not start.checkpoint.params.HasField("constraint"):
            return admit(start, self._runner.spec, self._compiler, now=now)
        # A hostile grammar takes long to compile, but only this connection waits for it.
        return await asyncio.to_thread(admit, start, self._runner.spec, self._compiler, now=now)

    # What the engine does.

    async def _step_forever(self) -> None:
        loop = asyncio.get_running_loop()
        load_at = float("-inf")
        while True:
            self._has_work.clear()
            plan = self._scheduler.plan(loop.time())
            if plan is not None:
                self._is_computing = True
                begun = loop.time()
                result = await self._runner.execute(plan)
                self._steps_s += loop.time() - begun
                self._is_computing = False
                self._scheduler.commit(plan, result)
            session = self._session
            if session is not None:
                has_prompts = plan is not None and bool(plan.prefills)
                interval_s = PROMPT_LOAD_INTERVAL_S if has_prompts else LOAD_INTERVAL_S
                is_load_due = loop.time() >= load_at + interval_s
                if is_load_due:
                    load_at = loop.time()
                frame = self._frame(session, with_load=is_load_due)
                if frame is not None:
                    session.connection.send(engine_pb2.EngineResponse(frame=frame))
                    # A sidecar that does not read stops the engine, not its memory.
                    await session.connection.drain()
            if plan is None:
                wake_at = loop.time() + FRAME_INTERVAL_S
                deadline = self._scheduler.deadline()
                await self._wait_for_work(wake_at if deadline is None else min(wake_at, deadline))

    async def _show_life(self) -> None:
        """Frames beside the steps that take long, with what became of attempts meanwhile."""
        loop = asyncio.get_running_loop()
        while True:
            session = self._session
            framed_at = session.framed_at if session is not None else loop.time()
            if session is not None and loop.time() - framed_at >= FRAME_INTERVAL_S:
                if self._is_computing:
                    frame = self._frame(session, with_load=True)
                    assert frame is not None, "it has the load"
                    session.connection.send(engine_pb2.EngineResponse(frame=frame))
                    await session.connection.drain()
                framed_at = loop.time()  # Without a step, the next frame is on its way.
            await asyncio.sleep(framed_at + FRAME_INTERVAL_S - loop.time())

    async def _wait_for_work(self, wake_at: float) -> None:
        try:
            async with asyncio.timeout_at(wake_at):
                await self._has_work.wait()
        except TimeoutError:
            pass  # Time for a sign of life, or somebody's time is up.

    def _frame(self, session: "_Session", *, with_load: bool) -> attempt_pb2.StepFrame | None:
        """Everything that happened since the last frame; None if nothing did."""
        scheduler = self._scheduler
        outcome = scheduler.take_outcome()
        is_first = session.num_frames == 0
        kv_events = scheduler.reset_kv_events() if is_first else scheduler.take_kv_events()
        has_news = outcome.slots or outcome.ended or session.refused or kv_events
        if not (has_news or with_load):
            return None
        session.num_frames += 1
        session.framed_at = asyncio.get_running_loop().time()
        frame = attempt_pb2.StepFrame(
            sequence=session.num_frames,
            slots=outcome.slots,
            offsets=outcome.offsets,
            token_ids=outcome.token_ids,
            ended=outcome.ended,
            refused=session.refused,
            kv_events=kv_events,
        )
        session.refused.clear()
        for ended in outcome.ended:
            session.forget(ended.slot)
        for slot, logprobs in outcome.logprobs:
            frame.logprobs.add(slot=slot, tokens=[logprobs_to_proto(logprobs)])
        # Else who is idle now would be taken for busy until the next report is due.
        if with_load or is_first or (outcome.ended and scheduler.is_empty):
            frame.load.CopyFrom(scheduler.load())
            frame.slot_seen = session.slot_seen
            frame.load.is_computing = self._is_computing
            frame.load.steps_us_total = int(self._steps_s * 1e6)
            if (use := self._runner.kv_store_use) is not None:
                frame.load.kv_store.CopyFrom(use)
            holder = self._runner.kv_holder()
            if holder is not None and holder != session.holder:
                holder.write(frame.load.kv_holder)
        return frame


class _Session:
    """What one connection has said and has yet to be told."""

    def __init__(self, connection: Inbound) -> None:
        self.connection = connection
        self.has_greeted = False
        self.holder: KvHolder | None = None
        """As it was told when it greeted."""
        self.slot_highest = -1
        self.slot_seen = 0
        """Highest whose start was dealt with: the load counts it."""
        self.num_frames = 0
        self.framed_at = asyncio.get_running_loop().time()
        self.refused: deque[attempt_pb2.AttemptRefused] = deque()
        self.slot_of: dict[StreamKey, int] = {}  # Of attempts that run.
        self.key_of: dict[int, StreamKey] = {}
        self.since: dict[int, float] = {}

    def refuse(
        self,
        slot: int,
        kind: "worker_pb2.FailureKind.ValueType",
        detail: str,
        *,
        epoch_known: int = 0,
    ) -> None:
        refused = attempt_pb2.AttemptRefused(
            slot=slot, kind=kind, detail=detail, epoch_known=epoch_known
        )
        if kind == worker_pb2.FAILURE_KIND_OVERLOAD:
            refused.retry_after.FromMilliseconds(int(RETRY_AFTER_S * 1000))
        self.refused.append(refused)

    def forget(self, slot: int) -> None:
        """The attempt is over."""
        key = self.key_of.pop(slot, None)
        self.since.pop(slot, None)
        if key is not None and self.slot_of.get(key) == slot:
            del self.slot_of[key]
