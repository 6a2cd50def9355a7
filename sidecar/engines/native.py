"""Engines that speak our own contract (engine.proto) on a Unix socket, as `python -m worker`.

    start ─▶ connect ─▶ hello ─▶ ready: on_up ─▶ frames: on_frame … ─▶ end of the socket: on_down
      ▲                                                                          │
      └── RestartPolicy ◀── everything of that life is gone ◀── kill what is left ┘

The end of the socket is the end of a life, whatever ended it: so everything an engine had written
before it died is heard. Whoever wants a life to end sees to it that its socket does.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from sidecar.engines.base import Engine, EngineDown, EngineListener, EngineUp
from sidecar.supervisor import EngineProcess, Exit
from unbroken import framing, log
from unbroken.framing import (
    Connection,
    FramingError,
    MessageTooLarge,
    MessageUndecodable,
)
from unbroken.outcome import FailureKind
from unbroken.restart import RestartPolicy, Restarts
from unbroken.v1 import attempt_pb2, engine_pb2, worker_pb2

PROTOCOL_VERSION: Final = 1

UNSENT_BYTES_SOFT: Final = 8 * 1024 * 1024
"""An engine that has left so much unread is begun no more attempts: they are refused."""
UNSENT_BYTES_HARD: Final = 32 * 1024 * 1024
"""An engine that has left so much unread hangs, and its life is over: nothing is dropped."""
_RETRY_AFTER_S: Final = 1

_CONNECT_POLL_S: Final = 0.02
_DRAIN_TIMEOUT_S: Final = 1.0
"""How long what a dead process had written may take to be read."""
_EXIT_TIMEOUT_S: Final = 0.05
"""How long the news of a death may wait to say what the process died of."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine is started and reached."""

    command: tuple[str, ...] | None
    """None: attach to an engine that somebody else runs."""
    socket_path: str
    """Where it listens. With a command it is ours: whatever lies there is removed."""
    start_timeout_s: float = 300.0
    """Until it is ready, with its model loaded."""
    stop_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


class NativeEngine(Engine):
    """One engine, through all its lives; `run` once at most."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._restarts = Restarts(launch.restart)
        self._incarnation = 0
        self._life: _Life | None = None  # From its start until nothing of it is left.
        self._stop_wanted = asyncio.Event()
        self._has_run = False
        self._finished = asyncio.Event()

    async def run(self, listener: EngineListener) -> None:
        """Keep the engine alive until `stop`, or until it is given up (`EngineDown.is_final`)."""
        assert not self._has_run, "an engine runs once"
        self._has_run = True
        try:
            while not self._stop_wanted.is_set():
                restart_in_s = await self._live(listener)
                if restart_in_s is None:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(restart_in_s):
                        await self._stop_wanted.wait()
        finally:
            self._finished.set()

    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt; one for which there is no room is refused here."""
        self._send(engine_pb2.EngineRequest(start=message))

    def abort(self, slot: int) -> None:
        """End an attempt."""
        self._send(engine_pb2.EngineRequest(abort=attempt_pb2.AbortAttempt(slot=slot)))

    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        """Move windows."""
        self._send(
            engine_pb2.EngineRequest(ack=attempt_pb2.AckAttempts(slots=slots, offsets=offsets))
        )

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """End this life; no more frames, `on_down` follows soon. `after_s` were no service."""
        if self._life is not None and self._life.is_serving:
            self._life.fail(detail, failure, after_s=after_s)

    async def stop(self) -> None:
        """End the engine and everything it started. Idempotent."""
        self._stop_wanted.set()
        life = self._life
        if life is not None:
            life.interrupt()
            if life.process is not None:
                await life.process.stop(self._launch.stop_grace_s)
            else:
                life.end_socket()
        if self._has_run:
            await self._finished.wait()

    def kill(self) -> None:
        """Let `stop` wait no longer for the engine to end by itself."""
        if self._life is not None and self._life.process is not None:
            self._life.process.kill()

    def _send(self, request: engine_pb2.EngineRequest) -> None:
        if self._life is not None and self._life.is_serving:
            self._life.send(request)

    async def _live(self, listener: EngineListener) -> float | None:
        """One life; returns seconds until the next, None if there is none."""
        self._incarnation += 1
        life = self._life = _Life(self._incarnation, self._launch, listener)
        try:
            try:
                life.launch()
                ready, first_frames = await life.greet()
                await life.serve(ready, first_frames)
            except _LifeOver as over:
                return await self._life_over(life, over, listener)
        finally:
            life.is_serving = False
            life.end_socket()
            if life.process is not None:
                if self._stop_wanted.is_set():
                    await life.process.stop(self._launch.stop_grace_s)
                else:
                    life.process.kill()
                    await life.process.wait_gone()
            self._life = None

    async def _life_over(
        self, life: "_Life", over: "_LifeOver", listener: EngineListener
    ) -> float | None:
        life.is_serving = False
        failure, detail = over.failure, over.detail
        if self._stop_wanted.is_set():
            failure, detail, restart_in_s = FailureKind.DRAIN, "stopped", None
        else:
            # A life counts by how long it was of use, else one that always stalls is no crash loop.
            now = asyncio.get_running_loop().time()
            served_s = None
            if life.served_since is not None:
                served_s = now - life.served_since - life.wasted_s
            restart_in_s = self._restarts.life_ended(
                served_since=None if served_s is None else now - served_s, now=now
            )
        down = EngineDown(life.incarnation, failure, detail, is_final=restart_in_s is None)
        try:
            listener.on_down(down)
        except Exception:
            _log.exception("bug: on_down failed", incarnation=life.incarnation)
        await asyncio.sleep(0)  # The news leaves before anything else is done: streams stand still.
        say = _log.info if failure is FailureKind.DRAIN else _log.warning
        say(
            "engine down",
            incarnation=life.incarnation,
            failure=failure.name,
            detail=detail,
            restart_in_s=restart_in_s,
        )
        return restart_in_s


class _LifeOver(Exception):  # noqa: N818 - it names what happened.
    """A life has come to its end, and why."""

    def __init__(self, failure: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


class _Life:
    """One process and one connection: `launch`, `greet`, `serve`, each until it raises."""

    def __init__(self, incarnation: int, launch: Launch, listener: EngineListener) -> None:
        self.incarnation = incarnation
        self.process: EngineProcess | None = None
        self.is_serving = False
        self.served_since: float | None = None
        """Monotonic seconds."""
        self._launch = launch
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._connection: Connection[engine_pb2.EngineResponse] | None = None
        self._interrupted: asyncio.Future[None] = self._loop.create_future()
        self.wasted_s = 0.0
        """Of its time, at its end, in which it made no progress."""
        self._broken: _LifeOver | None = None  # Why we end it.
        self._outbox: list[engine_pb2.EngineRequest] = []
        self._connect_error: OSError | None = None

    def launch(self) -> None:
        """Start the process, if it is ours. Raises `_LifeOver`."""
        launch = self._launch
        if launch.command is None:
            return
        try:
            # Else we might reach an older engine before the new one listens.
            Path(launch.socket_path).unlink(missing_ok=True)
            self.process = EngineProcess.start(launch.command)
        except OSError as error:
            raise _LifeOver(FailureKind.CRASH, f"the engine cannot be started: {error}") from error
        self.process.exited.add_done_callback(self._process_exited)
        self.process.group_killed.add_done_callback(self._group_killed)
        _log.info("engine starting", incarnation=self.incarnation, command=launch.command)

    async def greet(self) -> tuple[engine_pb2.EngineReady, Sequence[engine_pb2.EngineResponse]]:
        """Shake hands when it listens; also returns what came right after. Raises `_LifeOver`."""
        handshake = asyncio.create_task(self._shake_hands(), name="engine handshake")
        try:
            await asyncio.wait(
                (handshake, self._interrupted),
                timeout=self._launch.start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not handshake.done():
                raise self._not_ready()
            return handshake.result()
        finally:
            handshake.cancel()
            await asyncio.gather(handshake, return_exceptions=True)

    async def serve(
        self, ready: engine_pb2.EngineReady, first: Sequence[engine_pb2.EngineResponse]
    ) -> NoReturn:
        """Hand on frames until the end of the socket. Raises `_LifeOver`."""
        connection = self._connection
        assert connection is not None, "greeted before"
        self._up(ready)
        num_frames = 0
        batch = first
        while True:
            for response in batch:
                num_frames += 1
                frame = response.frame
                if frame.sequence != num_frames:  # 0 if it is no frame.
                    raise _LifeOver(
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

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """It broke the contract, or hangs: hear no more of it. The first detail counts."""
        if self._broken is None:
            self._broken = _LifeOver(failure, detail)
            self.wasted_s = after_s
        self.end_socket()

    def interrupt(self) -> None:
        """Wait no longer for it to be ready."""
        if not self._interrupted.done():
            self._interrupted.set_result(None)

    def end_socket(self) -> None:
        """Idempotent."""
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
            raise _LifeOver(
                FailureKind.PROTOCOL,
                f"expected ready with protocol_version {PROTOCOL_VERSION}, got "
                f"{batch[0].WhichOneof('response')} with {ready.protocol_version}",
            )
        return ready, batch[1:]

    async def _connect(self) -> Connection[engine_pb2.EngineResponse]:
        while True:
            try:
                return await framing.connect_unix(
                    self._launch.socket_path, engine_pb2.EngineResponse
                )
            except OSError as error:  # Most often, nobody listens yet.
                self._connect_error = error
                await asyncio.sleep(_CONNECT_POLL_S)

    def _not_ready(self) -> _LifeOver:
        launch = self._launch
        if self.process is not None and self.process.exited.done():
            return _LifeOver(FailureKind.CRASH, f"the engine {self.process.exited.result()}")
        is_there = self.process is not None or self._connection is not None
        seen = "no answer" if self._connection is not None else f"{self._connect_error}"
        return _LifeOver(
            FailureKind.HANG if is_there else FailureKind.CRASH,
            f"expected an engine at {launch.socket_path}, ready within "
            f"{launch.start_timeout_s:g} s, got {seen}",
        )

    def _up(self, ready: engine_pb2.EngineReady) -> None:
        up = EngineUp(
            incarnation=self.incarnation,
            description=ready.description,
            tokenizer=ready.tokenizer,
            process_group=self.process.pid if self.process is not None else 0,
            frame_interval_s=(
                ready.frame_interval.ToNanoseconds() / 1e9
                if ready.HasField("frame_interval")
                else None
            ),
        )
        self.served_since = self._loop.time()
        self.is_serving = True
        _log.info(
            "engine up",
            incarnation=up.incarnation,
            engine_pgid=up.process_group,
            engine=up.description.kind,
            model=up.description.model,
            started_in_s=round(self.served_since - self._began, 3),
        )
        try:
            self._listener.on_up(up)
        except Exception as error:
            self._our_bug("on_up", error)
        self._raise_if_broken()

    # Its course.

    def _hear(self, frame: attempt_pb2.StepFrame) -> None:
        try:
            self._listener.on_frame(frame)
        except Exception as error:
            self._our_bug("on_frame", error)

    def _our_bug(self, where: str, error: Exception) -> None:
        """What we know of its streams may be wrong now, so they had better go on elsewhere."""
        _log.exception("bug: listener failed", where=where, incarnation=self.incarnation)
        self.fail(f"a bug of the sidecar in {where}: {error!r}")

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

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
        try:
            self._listener.on_refused(refused)
        except Exception as bug:
            self._our_bug("on_refused", bug)

    # Its end.

    def _process_exited(self, _exited: "asyncio.Future[Exit]") -> None:
        self.interrupt()
        # What it had written is read first, and by then its socket has ended; or somebody else
        # holds that open.
        self._loop.call_later(_DRAIN_TIMEOUT_S, self.end_socket)

    def _group_killed(self, _killed: "asyncio.Future[None]") -> None:
        # Its socket ends only when its memory is freed; that may take long, and its streams wait.
        # What it had written before is read in between.
        self._loop.call_soon(self._loop.call_soon, self.end_socket)

    async def _lost(self, error: FramingError | None = None) -> _LifeOver:
        """The socket ended. Of what?"""
        if isinstance(error, (MessageTooLarge, MessageUndecodable)):
            return _LifeOver(FailureKind.PROTOCOL, error.detail)
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
        return _LifeOver(FailureKind.CRASH, detail)
