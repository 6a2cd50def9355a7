"""Engines that speak our own contract (engine.proto) on a Unix socket, as `python -m worker`.

    connect ─▶ hello ─▶ ready: on_up ─▶ frames: on_frame … ─▶ end of the socket: on_down

The end of the socket is the end of a life, whatever ended it: so everything an engine had written
before it died is heard. Whoever wants a life to end sees to it that its socket does.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from typing_extensions import override

from sidecar.engines.base import EngineListener, EngineUp
from sidecar.engines.lives import Launch, Life, LifeOver, Lives
from sidecar.supervisor import Exit
from unbroken import framing, log
from unbroken.framing import (
    Connection,
    FramingError,
    MessageTooLarge,
    MessageUndecodable,
)
from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, engine_pb2, holding_pb2, worker_pb2

__all__ = ["Launch", "NativeEngine"]

PROTOCOL_VERSION: Final = 1

UNSENT_BYTES_SOFT: Final = 8 * 1024 * 1024
"""An engine that has left so much unread is begun no more attempts: they are refused."""
UNSENT_BYTES_HARD: Final = 32 * 1024 * 1024
"""An engine that has left so much unread hangs, and its life is over: nothing is dropped."""
_RETRY_AFTER_S: Final = 1
HOLDINGS_TIMEOUT_S: Final = 1.0
"""How long an engine may take to tell what it holds."""

_CONNECT_POLL_S: Final = 0.02
_DRAIN_TIMEOUT_S: Final = 1.0
"""How long what a dead process had written may take to be read."""
_EXIT_TIMEOUT_S: Final = 0.05
"""How long the news of a death may wait to say what the process died of."""

_log = log.get_logger(__name__)


class NativeEngine(Lives["_Life"]):
    """One engine, through all its lives; `run` once at most.

    What lies at the address of a `Launch` with a command is ours, and removed.
    """

    @override
    def _begin(self, incarnation: int, listener: EngineListener) -> "_Life":
        return _Life(incarnation, self._launch, listener)

    @override
    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt; one for which there is no room is refused here."""
        self._send(engine_pb2.EngineRequest(start=message))

    @override
    def abort(self, slot: int) -> None:
        self._send(engine_pb2.EngineRequest(abort=attempt_pb2.AbortAttempt(slot=slot)))

    @override
    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        self._send(
            engine_pb2.EngineRequest(ack=attempt_pb2.AckAttempts(slots=slots, offsets=offsets))
        )

    @override
    async def holdings(self) -> Sequence[holding_pb2.Holding] | None:
        if self._life is None or not self._life.is_serving:
            return None
        return await self._life.holdings()

    def _send(self, request: engine_pb2.EngineRequest) -> None:
        if self._life is not None and self._life.is_serving:
            self._life.send(request)


class _Life(Life):
    """One process and one connection."""

    def __init__(self, incarnation: int, launch: Launch, listener: EngineListener) -> None:
        super().__init__(incarnation, launch, listener)
        self._connection: Connection[engine_pb2.EngineResponse] | None = None
        self._outbox: list[engine_pb2.EngineRequest] = []
        self._connect_error: OSError | None = None
        self._tells_holdings = False
        self._num_questions = 0
        self._questions: dict[int, asyncio.Future[Sequence[holding_pb2.Holding] | None]] = {}

    @override
    def launch(self) -> None:
        if self._launch.command is not None:
            try:
                # Else we might reach an older engine before the new one listens.
                Path(self._launch.address).unlink(missing_ok=True)
            except OSError as error:
                detail = f"the engine cannot be started: {error}"
                raise LifeOver(FailureKind.CRASH, detail) from error
        super().launch()

    @override
    async def live(self) -> NoReturn:
        try:
            ready, first_frames = await self.greet()
            await self.serve(ready, first_frames)
        finally:
            for answer in self._questions.values():
                if not answer.done():
                    answer.set_result(None)

    async def greet(self) -> tuple[engine_pb2.EngineReady, Sequence[engine_pb2.EngineResponse]]:
        """Shake hands when it listens; also returns what came right after. Raises `LifeOver`."""
        handshake = asyncio.create_task(self._shake_hands(), name="engine handshake")
        try:
            await asyncio.wait(
                (handshake, self._interrupted),
                timeout=self._launch.start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not handshake.done():
                is_open = self._connection is not None
                raise self._not_ready(None if is_open else f"{self._connect_error}")
            return handshake.result()
        finally:
            handshake.cancel()
            await asyncio.gather(handshake, return_exceptions=True)

    async def serve(
        self, ready: engine_pb2.EngineReady, first: Sequence[engine_pb2.EngineResponse]
    ) -> NoReturn:
        """Hand on frames until the end of the socket. Raises `LifeOver`."""
        connection = self._connection
        assert connection is not None, "greeted before"
        self._tells_holdings = ready.tells_holdings
        self._up(self._up_of(ready))
        num_frames = 0
        batch = first
        while True:
            for response in batch:
                frame = response.frame
                if not frame.sequence and response.HasField("holdings"):
                    self._answered(response.holdings)
                    continue
                num_frames += 1
                if frame.sequence != num_frames:  # 0 if it is no frame.
                    raise LifeOver(
                        FailureKind.PROTOCOL,
                        f"expected frame {num_frames}, got {response.WhichOneof('response')} "
                        f"{frame.sequence}",
                    )
                self._hear(frame)
                self._raise_if_broken()
            try:
                batch = await connection.receive()
            except FramingError as error:
                self._raise_if_broken()
                raise await self._lost(error) from error
            self._raise_if_broken()
            if not batch:
                raise await self._lost()

    def send(self, request: engine_pb2.EngineRequest) -> None:
        """Send with everything else that is sent in this turn of the loop."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(request)

    async def holdings(self) -> Sequence[holding_pb2.Holding] | None:
        """What it holds; None if it does not say."""
        if not self._tells_holdings:
            return None
        self._num_questions += 1
        number = self._num_questions
        answer = self._questions[number] = self._loop.create_future()
        try:
            question = engine_pb2.ListHoldings(number=number)
            self.send(engine_pb2.EngineRequest(list_holdings=question))
            async with asyncio.timeout(HOLDINGS_TIMEOUT_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._questions[number]

    def _answered(self, told: engine_pb2.EngineHoldings) -> None:
        answer = self._questions.get(told.number)
        if answer is not None and not answer.done():
            answer.set_result(told.holdings)

    @override
    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    # Its beginning.

    async def _shake_hands(
        self,
    ) -> tuple[engine_pb2.EngineReady, Sequence[engine_pb2.EngineResponse]]:
        connection = self._connection = await self._connect()
        hello = engine_pb2.EngineHello(protocol_version=PROTOCOL_VERSION)
        connection.send(engine_pb2.EngineRequest(hello=hello))
        try:
            batch = await connection.receive()
        except FramingError as error:
            raise await self._lost(error) from error
        if not batch:
            raise await self._lost()
        ready = batch[0].ready
        if ready.protocol_version != PROTOCOL_VERSION:  # 0 if it is something else.
            raise LifeOver(
                FailureKind.PROTOCOL,
                f"expected ready with protocol_version {PROTOCOL_VERSION}, got "
                f"{batch[0].WhichOneof('response')} with {ready.protocol_version}",
            )
        return ready, batch[1:]

    async def _connect(self) -> Connection[engine_pb2.EngineResponse]:
        while True:
            try:
                return await framing.connect_unix(self._launch.address, engine_pb2.EngineResponse)
            except OSError as error:  # Most often, nobody listens yet.
                self._connect_error = error
                await asyncio.sleep(_CONNECT_POLL_S)

    def _up_of(self, ready: engine_pb2.EngineReady) -> EngineUp:
        return EngineUp(
            incarnation=self.incarnation,
            description=ready.description,
            tokenizer=ready.tokenizer,
            process_group=self._process_group,
            frame_interval_s=(
                ready.frame_interval.ToNanoseconds() / 1e9
                if ready.HasField("frame_interval")
                else None
            ),
        )

    # Its course.

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if not self.is_serving or self._connection is None:
            return
        unsent = self._connection.bytes_unsent
        if unsent > UNSENT_BYTES_SOFT:
            refused = [request for request in outbox if request.HasField("start")]
            outbox = [request for request in outbox if not request.HasField("start")]
            for request in refused:
                self._refuse_for_now(request, unsent)
        try:
            self._connection.send_all(outbox)
        except MessageTooLarge:  # Nothing was sent.
            for request in outbox:
                try:
                    self._connection.send(request)
                except MessageTooLarge as error:
                    self._refuse(request, worker_pb2.FAILURE_KIND_REJECTED, error.detail)
        if self._connection.bytes_unsent > UNSENT_BYTES_HARD:
            detail = f"the engine leaves more than {UNSENT_BYTES_HARD} bytes unread"
            self.fail(detail, FailureKind.HANG)

    def _refuse_for_now(self, request: engine_pb2.EngineRequest, unsent: int) -> None:
        detail = f"the engine is behind: it has left {unsent} bytes unread"
        self._refuse(
            request, worker_pb2.FAILURE_KIND_OVERLOAD, detail, retry_after_s=_RETRY_AFTER_S
        )

    def _refuse(
        self,
        request: engine_pb2.EngineRequest,
        kind: "worker_pb2.FailureKind.ValueType",
        detail: str,
        *,
        retry_after_s: int = 0,
    ) -> None:
        assert request.HasField("start"), "only a checkpoint has no bound"
        refused = attempt_pb2.AttemptRefused(slot=request.start.slot, kind=kind, detail=detail)
        if retry_after_s:
            refused.retry_after.FromSeconds(retry_after_s)
        self._hear_refused(refused)

    # Its end.

    @override
    def _process_exited(self, _exited: "asyncio.Future[Exit]") -> None:
        super()._process_exited(_exited)
        # What it had written is read first, and by then its socket has ended; or somebody else
        # holds that open.
        self._loop.call_later(_DRAIN_TIMEOUT_S, self.disconnect)

    @override
    def _group_killed(self, _killed: "asyncio.Future[None]") -> None:
        # Its socket ends only when its memory is freed; that may take long, and its streams wait.
        # What it had written before is read in between.
        self._loop.call_soon(self._loop.call_soon, self.disconnect)

    async def _lost(self, error: FramingError | None = None) -> LifeOver:
        """The socket ended. Of what?"""
        if isinstance(error, (MessageTooLarge, MessageUndecodable)):
            return LifeOver(FailureKind.PROTOCOL, error.detail)
        detail = "the engine closed its socket"
        if self.process is not None and self.process.group_killed.done():
            await asyncio.sleep(0)  # What came in the same moment tells why, if it was an exit.
            detail = "the engine's process group was killed"
            if self.process.exited.done():
                detail = f"the engine {self.process.exited.result()}"
        elif self.process is not None:
            await asyncio.wait((self.process.exited,), timeout=_EXIT_TIMEOUT_S)
            if self.process.exited.done():
                detail = f"the engine {self.process.exited.result()}"
        if error is not None:
            detail += f"; {error.detail}"
        return LifeOver(FailureKind.CRASH, detail)
