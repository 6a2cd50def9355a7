"""The lives of one engine, whatever it speaks: started, served, ended, started again.

    start ─▶ reach it ─▶ it is ready: on_up ─▶ what it does … ─▶ its end: on_down
      ▲                                                              │
      └──── RestartPolicy ◀── everything of that life is gone ◀──────┘

Who adds a way to speak to engines writes a `Life`; how lives follow each other is the same for all.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final, Generic, NoReturn, TypeVar

from typing_extensions import override

from sidecar.engines.base import Engine, EngineDown, EngineListener, EngineUp
from sidecar.supervisor import EngineProcess, Exit
from unbroken import log
from unbroken.outcome import FailureKind
from unbroken.restart import RestartPolicy, Restarts
from unbroken.v1 import attempt_pb2

_NEWS_S: Final = 0.005
"""So long the news of an engine's death is given before its remains are cleared away."""

_log = log.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine is started and reached."""

    command: tuple[str, ...] | None
    """None: attach to an engine that somebody else runs."""
    address: str
    """Where it listens: the path of a Unix socket, host:port or a URL, as the adapter wants it."""
    start_timeout_s: float = 300.0
    """Until it is ready, with its model loaded."""
    stop_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


class LifeOver(Exception):  # noqa: N818 - it names what happened.
    """A life has come to its end, and why."""

    def __init__(self, failure: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


class Life(ABC):
    """One process and what connects us to it: `launch`, then `live` until it raises."""

    def __init__(self, incarnation: int, launch: Launch, listener: EngineListener) -> None:
        self.incarnation = incarnation
        self.process: EngineProcess | None = None
        self.is_serving = False
        self.served_since: float | None = None
        """Monotonic seconds."""
        self.wasted_s = 0.0
        """Of its time, at its end, in which it made no progress."""
        self._launch = launch
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._interrupted: asyncio.Future[None] = self._loop.create_future()
        self._broken: LifeOver | None = None  # Why we end it.

    @abstractmethod
    async def live(self) -> NoReturn:
        """Reach the engine, tell that it is up, and hand on what it does. Raises `LifeOver`."""
        raise NotImplementedError

    @abstractmethod
    def disconnect(self) -> None:
        """Nothing more is said or heard; `live` ends soon. Idempotent."""

    async def close(self) -> None:  # noqa: B027 - Most have nothing to do.
        """After `live` has ended: nothing of the connection is left."""

    def launch(self) -> None:
        """Start the process, if it is ours. Raises `LifeOver`."""
        command = self._launch.command
        if command is None:
            return
        try:
            self.process = EngineProcess.start(command)
        except OSError as error:
            raise LifeOver(FailureKind.CRASH, f"the engine cannot be started: {error}") from error
        self.process.exited.add_done_callback(self._process_exited)
        self.process.group_killed.add_done_callback(self._group_killed)
        _log.info("engine starting", incarnation=self.incarnation, command=command)

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """It broke the contract, or hangs: hear no more of it. The first detail counts."""
        if self._broken is None:
            self._broken = LifeOver(failure, detail)
            self.wasted_s = after_s
        self.disconnect()

    def interrupt(self) -> None:
        """Wait no longer for it to be ready."""
        if not self._interrupted.done():
            self._interrupted.set_result(None)

    # For those who speak to engines.

    def _up(self, up: EngineUp) -> None:
        """It takes work. Raises `LifeOver` if that is no good news."""
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

    @property
    def _process_group(self) -> int:
        return self.process.pid if self.process is not None else 0

    def _not_ready(self, seen: str | None) -> LifeOver:
        """It did not come up in time; `seen` is what came of reaching it, None: an open line."""
        launch = self._launch
        if self.process is not None and self.process.exited.done():
            return LifeOver(FailureKind.CRASH, f"the engine {self.process.exited.result()}")
        is_there = self.process is not None or seen is None
        return LifeOver(
            FailureKind.HANG if is_there else FailureKind.CRASH,
            f"expected an engine at {launch.address}, ready within "
            f"{launch.start_timeout_s:g} s, got {seen or 'no answer'}",
        )

    def _hear(self, frame: attempt_pb2.StepFrame) -> None:
        """Hand on what it did."""
        try:
            self._listener.on_frame(frame)
        except Exception as error:
            self._our_bug("on_frame", error)

    def _hear_refused(self, refused: attempt_pb2.AttemptRefused) -> None:
        """Hand on that an attempt did not get to it."""
        try:
            self._listener.on_refused(refused)
        except Exception as error:
            self._our_bug("on_refused", error)

    def _our_bug(self, where: str, error: Exception) -> None:
        """What we know of its streams may be wrong now, so they had better go on elsewhere."""
        _log.exception("bug: listener failed", where=where, incarnation=self.incarnation)
        self.fail(f"a bug of the sidecar in {where}: {error!r}")

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _process_exited(self, _exited: "asyncio.Future[Exit]") -> None:
        """The engine itself has ended; something it started may live."""
        self.interrupt()

    def _group_killed(self, _killed: "asyncio.Future[None]") -> None:  # noqa: B027 - As above.
        """All of its process group was killed, and may still be freeing memory."""


LifeT = TypeVar("LifeT", bound=Life)


class Lives(Engine, ABC, Generic[LifeT]):
    """One engine, through all its lives; `run` once at most."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._restarts = Restarts(launch.restart)
        self._incarnation = 0
        self._life: LifeT | None = None  # From its start until nothing of it is left.
        self._stop_wanted = asyncio.Event()
        self._has_run = False
        self._finished = asyncio.Event()

    @abstractmethod
    def _begin(self, incarnation: int, listener: EngineListener) -> LifeT:
        """A new life, not launched yet."""

    @override
    async def run(self, listener: EngineListener) -> None:
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

    @override
    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """End this life; no more frames, `on_down` follows soon. `after_s` were no service."""
        if (life := self._serving) is not None:
            life.fail(detail, failure, after_s=after_s)

    @override
    async def stop(self) -> None:
        self._stop_wanted.set()
        life = self._life
        if life is not None:
            life.interrupt()
            if life.process is not None:
                await life.process.stop(self._launch.stop_grace_s)
            else:
                life.disconnect()
        if self._has_run:
            await self._finished.wait()

    @override
    def kill(self) -> None:
        if self._life is not None and self._life.process is not None:
            self._life.process.kill()

    @property
    def _serving(self) -> LifeT | None:
        """The life that takes commands, if there is one."""
        return self._life if self._life is not None and self._life.is_serving else None

    async def _live(self, listener: EngineListener) -> float | None:
        """One life; returns seconds until the next, None if there is none."""
        self._incarnation += 1
        life = self._life = self._begin(self._incarnation, listener)
        try:
            try:
                life.launch()
                await life.live()
            except LifeOver as over:
                return await self._life_over(life, over, listener)
        finally:
            life.is_serving = False
            life.disconnect()
            if life.process is not None:
                if self._stop_wanted.is_set():
                    await life.process.stop(self._launch.stop_grace_s)
                else:
                    life.process.kill()
                    await life.process.wait_gone()
            await life.close()
            self._life = None

    async def _life_over(
        self, life: LifeT, over: LifeOver, listener: EngineListener
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
        # The news leaves, in a turn of the loop, before anything else is done: streams stand still.
        await asyncio.sleep(_NEWS_S)
        say = _log.info if failure is FailureKind.DRAIN else _log.warning
        say(
            "engine down",
            incarnation=life.incarnation,
            failure=failure.name,
            detail=detail,
            restart_in_s=restart_in_s,
        )
        return restart_in_s
