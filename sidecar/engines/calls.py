"""Engines that are asked by one call per attempt, whatever the protocol: what all have in common.

    discover ─▶ probe: one token ─▶ on_up ─▶ calls, health, load, taps ─▶ dead, or hung: on_down

An engine that is asked so has no socket whose end is its death. It is dead when it says so, when it
refuses calls, or when its process ends; a call that fails is asked about before its request is
blamed for it. Its word about its health is a flag, and not believed when it is good: a call that
says nothing is the watchdog's business (`sidecar.watchdog`), an engine that has nothing to do the
canary's (`sidecar.canary`), and no life begins before a token has come.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, assert_never

from typing_extensions import override

from sidecar.engines.adapter import (
    Adapter,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Call,
    CallFailed,
    Delta,
    Discovered,
    LoadOfRank,
    NotReady,
    Part,
    Unhealthy,
    Unusable,
)
from sidecar.engines.asking import Vouched, call_of, completed, describe
from sidecar.engines.base import EngineListener, EngineUp
from sidecar.engines.columns import Columns, Progress
from sidecar.engines.kv_blocks import KvBlocks
from sidecar.engines.lives import Launch, Life, LifeOver, Lives
from sidecar.engines.occupancy import Asked, accounted, is_news, load_report
from sidecar.supervisor import Exit
from unbroken import log
from unbroken.errors import InvalidField
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import FailureKind, FinishReason
from unbroken.tokenizer import asset_to_proto
from unbroken.v1 import attempt_pb2, generation_pb2

ATTEMPTS_MAX: Final = 4096
"""More at once are refused: each is a call with buffers of its own."""
RETRY_AFTER_S: Final = 1.0

_DISCOVER_POLL_S: Final = 0.1
_CONFIRM_AFTER_S: Final = (0.0, 0.05, 0.1)
"""When an engine is asked how it is after a call failed: it may take a moment to know."""
_ABORT_TIMEOUT_S: Final = 2.0
_EXIT_TIMEOUT_S: Final = 0.05
_STOPPING_S: Final = 0.15
"""An engine that refuses calls and still gives tokens after so long is one that stops."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often an engine is asked. Times in seconds."""

    gather_s: float = 0.004
    """A frame waits so long for the streams that said nothing yet: the messages of a step do not
    come at once."""
    health_s: float = 0.5
    load_s: float = 0.2
    """Between two questions for its load, if it pushes none, and between two reports of it."""
    report_s: float = 0.02
    """The same, of reports while frames go out anyway and few streams run; with 100, double."""
    load_fresh_s: float = 2.0
    """So long counts what an engine told about its load."""
    tap_retry_s: float = 1.0


class CallEngine(Lives["_Life"]):
    """One engine, through all its lives; `run` once at most."""

    def __init__(
        self,
        launch: Launch,
        adapter: Callable[[str], Adapter],
        *,
        vouched: Vouched | None = None,
        pace: Pace | None = None,
        part: Part = Part.WHOLE,
    ) -> None:
        """`adapter` opens a connection to the address of `launch`, whose engine does `part`."""
        super().__init__(launch)
        self._adapter = adapter
        self._vouched = vouched or Vouched()
        self._pace = pace or Pace()
        self._part = part

    @override
    def _begin(self, incarnation: int, listener: EngineListener) -> "_Life":
        adapter = self._adapter(self._launch.address)
        return _Life(
            incarnation, self._launch, listener, adapter, self._vouched, self._pace, self._part
        )

    @override
    def start(self, message: attempt_pb2.StartAttempt) -> None:
        if (life := self._serving) is not None:
            life.start(message)

    @override
    def abort(self, slot: int) -> None:
        if (life := self._serving) is not None:
            life.abort(slot)

    @override
    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        if (life := self._serving) is not None:
            for slot, offset in zip(slots, offsets, strict=True):
                life.ack(slot, offset)


class _Attempt:
    """One call that is not over, or whose tokens are not told yet."""

    __slots__ = (
        "cached_tokens",
        "call",
        "deadline",
        "has_begun",
        "last",
        "progress",
        "room",
        "task",
    )

    def __init__(self, call: Call, progress: Progress) -> None:
        self.call = call
        self.progress = progress
        self.has_begun = False
        self.cached_tokens = 0
        self.last: int | None = None
        """Its latest token."""
        self.room = asyncio.Event()
        """Set when nothing is held any more."""
        self.task: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None

    @property
    def num_prefilled(self) -> int:
        num_given = len(self.call.prompt) + len(self.call.output)
        return max(0, num_given - self.cached_tokens) if self.has_begun else 0


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank said of its load."""

    at: float
    load: LoadOfRank
    blocks: int
    """What the sidecar accounted for at that moment."""


class _Life(Life):
    """One process, if it is ours, and one connection."""

    def __init__(
        self,
        incarnation: int,
        launch: Launch,
        listener: EngineListener,
        adapter: Adapter,
        vouched: Vouched,
        pace: Pace,
        part: Part,
    ) -> None:
        super().__init__(incarnation, launch, listener)
        self._adapter = adapter
        self._vouched = vouched
        self._pace = pace
        self._part = part
        self._name = secrets.token_hex(4)  # Engines outlive us, and know the calls we made before.
        self._columns = Columns()
        self._attempts: dict[int, _Attempt] = {}  # By slot.
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._confirming: asyncio.Task[None] | None = None
        self._flush_due: asyncio.TimerHandle | None = None
        self._heard_at = self._began
        self._num_failed = 0
        """Calls that failed by no fault of their request, perhaps."""
        self._told: dict[int, _Told] = {}  # By rank.
        self._live: LoadOfRank | None = None  # What is so at this moment, if somebody tells.
        self._live_reported: LoadOfRank | None = None
        self._leaving = asyncio.Event()  # Set when a stream has left since load was asked for.
        self._report_at = 0.0  # When frames are to tell of load again.
        self._found: Discovered | None = None
        self._seen: str | None = None  # What came of reaching it.

    # From its beginning to its end.

    @override
    async def live(self) -> NoReturn:
        found, up = await self._reach()
        self._found = found
        self._up(up)
        self._spawn(self._watch_health(), "engine health")
        self._spawn(self._ask_load(found), "engine load")
        self._spawn(self._tell_load(), "engine load reports")
        self._spawn(self._hear_live(found), "engine load as it changes")
        kv_blocks = KvBlocks(up.description.numerics.id, found.block_size)
        self._spawn(self._tap(kv_blocks), "engine taps")
        await self._over
        if self._broken is None or self._broken.failure is not FailureKind.PROTOCOL:
            self._tell()  # What it had said before.
        self._raise_if_broken()
        raise LifeOver(FailureKind.DRAIN, "disconnected")

    @override
    def disconnect(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    @override
    async def close(self) -> None:
        for slot in list(self._attempts):
            self._drop(slot)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._adapter.close()

    async def _reach(self) -> tuple[Discovered, EngineUp]:
        """Wait until it takes work. Raises `LifeOver`."""
        reaching = asyncio.create_task(self._discover(), name="engine discovery")
        try:
            await asyncio.wait(
                (reaching, self._interrupted),
                timeout=self._launch.start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not reaching.done():
                raise self._not_ready(self._seen)
            return reaching.result()
        finally:
            reaching.cancel()
            await asyncio.gather(reaching, return_exceptions=True)

    async def _discover(self) -> tuple[Discovered, EngineUp]:
        while True:
            try:
                found = completed(await self._adapter.discover(), self._vouched)
                up = EngineUp(
                    incarnation=self.incarnation,
                    description=describe(found, self._vouched),
                    tokenizer=asset_to_proto(found.tokenizer),
                    process_group=self._process_group,
                    tells_steps=False,
                )
                await self._probe(found)
            except (NotReady, Unhealthy) as error:
                self._seen = str(error)
            except CallFailed as failed:
                self._seen = f"no token: {failed.detail}"
            except Unusable as error:
                raise LifeOver(FailureKind.PROTOCOL, f"{error}") from error
            except Exception as error:  # Nonsense, or a file that may not be read: it may pass.
                seen = f"{type(error).__name__}: {error}"
                if seen != self._seen:
                    _log.exception("engine discovery failed", incarnation=self.incarnation)
                self._seen = seen
            else:
                self._heard_at = self._loop.time()
                return found, up
            await asyncio.sleep(_DISCOVER_POLL_S)

    async def _probe(self, found: Discovered) -> None:
        """Ask for one token on the way that all requests take. Raises `CallFailed`."""
        asset = found.tokenizer
        bos = asset.bos_token_id if asset.bos_token_id is not None else min(1, asset.vocab_size - 1)
        params = GenerationParams(
            SamplingParams(temperature=0.0), StopConditions(max_tokens=1, ignore_eos=True)
        )
        name = f"probe.{self._name}.{secrets.token_hex(4)}"
        call = Call(name, (bos,), params, 1, alone=self._part)
        async with aclosing(self._adapter.generate(call)) as deltas:
            async for delta in deltas:
                if delta.token_ids or delta.end is not None:
                    return
        raise CallFailed(FailureKind.ENGINE_ERROR, "a call ended without an end")

    # What is asked of it.

    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt, or refuse it."""
        found, slot, stream = self._found, message.slot, message.stream
        assert found is not None, "it serves"
        if len(self._attempts) >= ATTEMPTS_MAX:
            detail = f"expected at most {ATTEMPTS_MAX} attempts at once"
            self._refuse(slot, FailureKind.OVERLOAD, detail, RETRY_AFTER_S)
            return
        # For people who read the engine's log; the end makes it unique.
        name = f"{stream.request_id}.{stream.choice_index}.{message.epoch}.{self._name}-{slot}"
        try:
            call = call_of(message, found, name)
            if message.is_probe:
                call = replace(call, alone=self._part)
        except InvalidField as error:
            self._refuse(slot, FailureKind.REJECTED, error.detail)
            return
        progress = self._columns.begin(
            slot,
            first_offset=message.checkpoint.first_offset,
            window_tokens=message.window_tokens,
            wants_logprobs=call.params.num_top_logprobs is not None,
        )
        attempt = self._attempts[slot] = _Attempt(call, progress)
        if message.HasField("deadline"):
            due_in_s = max(0.0, message.deadline.ToNanoseconds() / 1e9)
            attempt.deadline = self._loop.call_later(
                due_in_s, self._cancel, slot, "the deadline has passed"
            )
        attempt.task = self._spawn(self._follow(attempt), f"call {name}")
        self._report_soon()

    def abort(self, slot: int) -> None:
        """End an attempt."""
        self._cancel(slot, "")

    def ack(self, slot: int, offset: int) -> None:
        """Move a window."""
        if self._columns.acknowledged(slot, offset) is not None and slot in self._attempts:
            self._attempts[slot].room.set()
        self._flush_soon()
        self._forget_told(slot)

    def _cancel(self, slot: int, detail: str) -> None:
        attempt = self._drop(slot)
        if attempt is None:
            return
        cancelled = generation_pb2.FINISH_REASON_CANCELLED
        ended = self._ended(attempt, attempt_pb2.AttemptEnded(finish_reason=cancelled))
        ended.detail = detail
        self._columns.cut(attempt.progress, ended)
        self._flush_soon()
        if attempt.task is not None and not attempt.task.done():
            attempt.task.cancel()
            self._spawn(self._abort(attempt.call.request_id), "abort")

    async def _abort(self, request_id: str) -> None:
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await self._adapter.abort(request_id)
        except TimeoutError:
            _log.warning("engine does not answer an abort", request_id=request_id)

    # What comes of it.

    async def _follow(self, attempt: _Attempt) -> None:
        """One call, from its beginning to its end."""
        progress = attempt.progress
        try:
            async with aclosing(self._adapter.generate(attempt.call)) as deltas:
                async for delta in deltas:
                    self._heard_at = self._loop.time()
                    self._produced(attempt, delta)
                    if delta.end is not None:
                        return
                    while progress.held:
                        attempt.room.clear()
                        await attempt.room.wait()
            raise CallFailed(FailureKind.PARTITION, "the engine's stream ended without an end")
        except CallFailed as failed:
            await self._failed(attempt, failed)
        except Exception as error:
            _log.exception("bug: adapter failed", request_id=attempt.call.request_id)
            self._end(attempt, FailureKind.PROTOCOL, f"a bug of the sidecar: {error!r}")
        finally:
            self._forget_told(progress.slot)

    def _produced(self, attempt: _Attempt, delta: Delta) -> None:
        token_ids, end, progress = delta.token_ids, delta.end, attempt.progress
        if token_ids:
            if progress.wants_logprobs and len(delta.logprobs) != len(token_ids):
                detail = f"{len(delta.logprobs)} log probabilities for {len(token_ids)} tokens"
                raise CallFailed(FailureKind.PROTOCOL, f"the engine gave {detail}")
            attempt.has_begun = True
            attempt.cached_tokens = delta.cached_tokens
            attempt.last = token_ids[-1]
            self._columns.produced(progress, token_ids, delta.logprobs)
        if end is not None:
            self._finished(attempt, end.reason, end.stop_token_id, end.detail)
        if self._columns.is_step_whole:  # All have spoken.
            self._flush()
        else:
            self._flush_soon()

    def _finished(
        self, attempt: _Attempt, reason: FinishReason, stop_token_id: int | None, detail: str
    ) -> None:
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            # We did not ask for it: whoever did, or a shutdown, let go of the stream.
            raise CallFailed(FailureKind.PARTITION, detail or "the engine aborted the request")
        assert self._found is not None, "it serves"
        ended = self._ended(attempt, attempt_pb2.AttemptEnded())
        if reason is FinishReason.LENGTH:
            ended.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        else:
            ended.finish_reason = generation_pb2.FINISH_REASON_STOP
            stopping = attempt.call.params.stopping
            ends = stopping.stop_token_ids
            if not stopping.ignore_eos:
                ends = ends | self._found.tokenizer.eos_token_ids
            if stop_token_id is None and attempt.last in ends:
                stop_token_id = attempt.last
            if stop_token_id not in (None, attempt.last) and not attempt.progress.wants_logprobs:
                # Some engines leave it out; in the contract it is the last token.
                self._columns.produced(attempt.progress, [stop_token_id])
                attempt.last = stop_token_id
            if stop_token_id is not None and stop_token_id == attempt.last:
                ended.stop_token_id = stop_token_id
        self._columns.ended(attempt.progress, ended)

    async def _failed(self, attempt: _Attempt, failed: CallFailed) -> None:
        """Whose fault was it? If the engine's, `on_down` ends the attempt with all others."""
        failure, detail = failed.failure, failed.detail
        about_request = failure in (FailureKind.REJECTED, FailureKind.OVERLOAD)
        if not about_request:
            self._num_failed += 1
            await self._confirm_alive()
            if self._over.done():
                return
            if failure is FailureKind.CRASH:  # It lives.
                failure = FailureKind.PARTITION
        if about_request and not attempt.has_begun:
            self._drop(attempt.progress.slot)
            self._refuse(attempt.progress.slot, failure, detail, failed.retry_after_s)
        else:
            self._end(attempt, failure, detail)

    def _end(self, attempt: _Attempt, failure: FailureKind, detail: str) -> None:
        """It came to no end of its own; what it had said counts."""
        ended = self._ended(attempt, attempt_pb2.AttemptEnded(detail=detail))
        ended.failure = attempt_pb2.AttemptEnded(failure=int(failure)).failure  # pyright: ignore[reportArgumentType]
        self._columns.ended(attempt.progress, ended)
        self._flush_soon()

    def _refuse(
        self, slot: int, failure: FailureKind, detail: str, retry_after_s: float | None = None
    ) -> None:
        refused = attempt_pb2.AttemptRefused(slot=slot, kind=int(failure), detail=detail)  # pyright: ignore[reportArgumentType]
        if retry_after_s is not None:
            refused.retry_after.FromNanoseconds(round(retry_after_s * 1e9))
        self._columns.refused(refused)
        self._flush_soon()

    def _ended(
        self, attempt: _Attempt, ended: attempt_pb2.AttemptEnded
    ) -> attempt_pb2.AttemptEnded:
        ended.prefill_tokens = attempt.num_prefilled
        ended.cached_tokens = attempt.cached_tokens
        return ended

    def _forget_told(self, slot: int) -> None:
        """An attempt whose call is over and whose last word is said needs nothing more."""
        attempt = self._attempts.get(slot)
        if attempt is not None and attempt.progress.end is not None and not attempt.progress.held:
            self._drop(slot)

    def _drop(self, slot: int) -> _Attempt | None:
        attempt = self._attempts.pop(slot, None)
        if attempt is not None:
            # What was told a moment ago, or is on its way, may count its blocks or not.
            self._leaving.set()
            self._report_soon()
        if attempt is not None and attempt.deadline is not None:
            attempt.deadline.cancel()
        return attempt

    def _flush_soon(self) -> None:
        """With everything else that is said in this moment, and never from within a command."""
        if self._flush_due is None:
            self._flush_due = self._loop.call_later(self._pace.gather_s, self._flush)

    def _flush(self) -> None:
        if self._flush_due is not None:
            self._flush_due.cancel()
            self._flush_due = None
        if self.is_serving and not self._over.done():
            self._tell()

    def _tell(self) -> None:
        if self._loop.time() >= self._report_at:
            self._report_load()
        frame = self._columns.take()
        if frame is not None:
            self._hear(frame)

    # How it is.

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._pace.health_s)
            await self._ask_health()
            if self._over.done():
                return

    async def _ask_health(self, *, is_suspect: bool = False) -> None:
        """`is_suspect`: a call of it failed."""
        asked_at = self._loop.time()
        num_failed = -1 if is_suspect else self._num_failed
        try:
            async with asyncio.timeout(self._adapter.health_timeout_s):
                await self._adapter.check_health()
        except TimeoutError:
            if self._heard_at < asked_at:  # A token is an answer, too.
                detail = f"the engine says nothing for {self._adapter.health_timeout_s:g} s"
                self.fail(f"{detail}, not even how it is", FailureKind.HANG)
        except Unhealthy as error:
            await self._dead(f"{error}", num_failed)

    async def _confirm_alive(self) -> None:
        """Ask until it had time to notice its own death; one who asks is enough."""
        if self._confirming is None or self._confirming.done():
            self._confirming = self._spawn(self._confirm(), "engine confirmation")
        await asyncio.wait((self._confirming,))

    async def _confirm(self) -> None:
        for delay_s in _CONFIRM_AFTER_S:
            await asyncio.sleep(delay_s)
            await self._ask_health(is_suspect=True)
            if self._over.done():
                return

    async def _dead(self, detail: str, num_failed: int) -> None:
        """It says so, or cannot be reached. Of what did it die, if it was ours, or does it stop?"""
        answered_at = self._loop.time()
        is_suspect = num_failed != self._num_failed  # Its calls fail, too.
        timeout_s = _EXIT_TIMEOUT_S if is_suspect else _STOPPING_S
        await asyncio.wait((self._exited or self._over,), timeout=timeout_s)
        if self._exited is not None and self._exited.done():
            self.fail(f"the engine {self._exited.result()}", FailureKind.CRASH)
        elif num_failed == self._num_failed and self._heard_at > answered_at:
            # As one does that was told to stop, and cuts its streams in a few seconds.
            self.fail(f"{detail}, while its streams go on", FailureKind.DRAIN)
        else:
            self.fail(detail, FailureKind.CRASH)

    @property
    def _exited(self) -> "asyncio.Future[Exit] | None":
        return None if self.process is None else self.process.exited

    @override
    def _process_exited(self, _exited: "asyncio.Future[Exit]") -> None:
        super()._process_exited(_exited)
        if self.is_serving:
            detail = f"the engine {_exited.result()}"
            # What it had said before is read first.
            self._loop.call_soon(self._loop.call_soon, self.fail, detail, FailureKind.CRASH)

    # What it has to do.

    async def _ask_load(self, found: Discovered) -> None:
        """Poll, unless it was told lately. An answer may take long, so nobody waits for it."""
        pace = self._pace
        while True:
            now = self._loop.time()
            is_told = any(now - told.at <= pace.load_s for told in self._told.values())
            wants_it = self._leaving.is_set() or self._is_crowded or not is_told
            self._leaving.clear()
            if wants_it and self._live is None:
                try:
                    async with asyncio.timeout(pace.load_fresh_s):
                        loads = await self._adapter.load()
                except (CallFailed, TimeoutError):
                    loads = ()  # Whether it lives is asked elsewhere.
                for load in loads:
                    self._hear_load(load, found)
            with suppress(TimeoutError):
                async with asyncio.timeout(pace.load_s / (4 if self._is_crowded else 1)):
                    await self._leaving.wait()
                    await asyncio.sleep(pace.load_s / 4)  # The engine has to know of it, too.

    @property
    def _is_crowded(self) -> bool:
        """Requests wait inside, and take blocks at moments that are known there only."""
        return any(told.load.waiting > 0 for told in self._told.values())

    def _hear_load(self, load: LoadOfRank, found: Discovered) -> None:
        now = self._loop.time()
        self._told[load.rank] = _Told(now, load, accounted(self._asked(), found))

    async def _hear_live(self, found: Discovered) -> None:
        """From the engine's own scheduler, if it tells: then nothing is asked for or added."""
        while True:
            try:
                async for load in self._adapter.live_load():
                    self._live = load
                    if is_news(self._live_reported, load, found):
                        self._report_at = 0.0
                        self._flush()
            finally:
                self._live = self._live_reported = None
            await asyncio.sleep(self._pace.tap_retry_s)

    def _asked(self) -> Sequence[Asked]:
        return [
            Asked(
                num_tokens=(
                    len(one.call.prompt) + len(one.call.output) + one.progress.num_produced
                ),
                has_begun=one.has_begun,
                is_paced=bool(one.progress.held),
            )
            for one in self._attempts.values()
            if one.progress.end is None  # What ended holds nothing, read or not.
        ]

    async def _tell_load(self) -> None:
        """Also while no tokens come."""
        while True:
            self._report_load()
            self._flush_soon()
            await asyncio.sleep(self._pace.load_s)

    def _report_soon(self) -> None:
        """A stream came or went, and with it more than a block."""
        self._report_at = 0.0
        self._flush_soon()

    def _report_load(self) -> None:
        """What the next frame says of it."""
        found, now = self._found, self._loop.time()
        assert found is not None, "it serves"
        told = {
            rank: one for rank, one in self._told.items() if now - one.at <= self._pace.load_fresh_s
        }
        loads = {rank: one.load for rank, one in told.items()}
        blocks_when_told = told[0].blocks if 0 in told else None
        if self._live is not None:
            loads, blocks_when_told = {0: self._live}, None
            self._live_reported = self._live
        asked = self._asked()
        report = load_report(
            asked,
            loads,
            found,
            num_steps=self._columns.num_steps,
            prefill_tokens_total=0,
            blocks_when_told=blocks_when_told,
        )
        self._columns.load(report)
        # With many streams it takes longer, and a share of so much time is what it may take.
        self._report_at = now + self._pace.report_s * (1 + len(asked) / 100)

    async def _tap(self, kv_blocks: KvBlocks) -> None:
        """Hear what it pushes, again and again."""
        assert self._found is not None, "it serves"
        while True:
            try:
                async for tapped in self._adapter.taps():
                    match tapped:
                        case LoadOfRank():
                            self._hear_load(tapped, self._found)
                        case BlocksStored() | BlocksRemoved() | BlocksCleared():
                            self._columns.kv_events(kv_blocks.apply(tapped))
                            self._flush_soon()
                        case _:
                            assert_never(tapped)
            except CallFailed as failed:
                _log.debug("tap ended", detail=failed.detail)
            await asyncio.sleep(self._pace.tap_retry_s)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("bug: a task failed", task=task.get_name(), exc_info=error)
            self.fail(f"a bug of the sidecar in {task.get_name()}: {error!r}")
