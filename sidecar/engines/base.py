"""What every engine looks like to the sidecar, whatever it speaks.

Two families implement it: engines that send frames for all attempts together (`native`), and
engines that are asked by a call for each (`calls`, with an `adapter.Adapter` for each protocol).
Both translate and decide nothing.

Everything an engine does comes as an event, in the order
in which it happened, on the event loop: `on_up`, then any number of `on_frame`, then `on_down` with
the cause, and perhaps `on_up` again after a restart. After `on_down` nothing of that life arrives.
Nothing is told from within a command: whoever gives one is in the middle of something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from unbroken.outcome import FailureKind
from unbroken.v1 import attempt_pb2, holding_pb2, worker_pb2


@dataclass(frozen=True, slots=True)
class EngineUp:
    """An engine took up work."""

    incarnation: int
    """Number of this life of the engine; grows with every restart under one sidecar."""
    description: worker_pb2.EngineDescription
    tokenizer: worker_pb2.Tokenizer
    process_group: int = 0
    """0 if it is not a child of this sidecar."""
    frame_interval_s: float | None = None
    """It sends a frame at least so often, whatever it computes; None: only when nothing runs."""
    tells_steps: bool = True
    """Its load says truly whether it has work and makes steps; else only its tokens do."""


@dataclass(frozen=True, slots=True)
class EngineDown:
    """A life of the engine is over, or the engine could not be started."""

    incarnation: int
    failure: FailureKind
    detail: str
    """Exit status, signal or what broke, for people."""
    is_final: bool = False
    """It will not be restarted: a crash loop, or it was stopped on purpose."""


class EngineListener(Protocol):
    """Who hears what the engine does."""

    def on_up(self, up: EngineUp) -> None:
        """The engine takes work."""
        ...

    def on_frame(self, frame: attempt_pb2.StepFrame) -> None:
        """One step, with the slots that `start` was given."""
        ...

    def on_refused(self, refused: attempt_pb2.AttemptRefused) -> None:
        """An attempt did not get to the engine; that is no sign of its life."""
        ...

    def on_down(self, down: EngineDown) -> None:
        """The engine is gone; all it had produced was heard before."""
        ...


class Engine(Protocol):
    """One engine and its lives. Commands while it is down are dropped: `on_down` ended them all."""

    async def run(self, listener: EngineListener) -> None:
        """Keep the engine alive until `stop`, or until it is given up (`EngineDown.is_final`)."""
        ...

    def start(self, message: attempt_pb2.StartAttempt) -> None:
        """Begin an attempt; `slot` is the caller's and is never used twice."""
        ...

    def abort(self, slot: int) -> None:
        """End an attempt; its `AttemptEnded` follows unless it had ended before."""
        ...

    def ack(self, slots: Sequence[int], offsets: Sequence[int]) -> None:
        """Move windows."""
        ...

    async def holdings(self) -> Sequence[holding_pb2.Holding] | None:
        """What it holds for attempts now; None if it does not say."""
        return None

    def fail(
        self,
        detail: str,
        failure: FailureKind = FailureKind.PROTOCOL,
        *,
        after_s: float = 0.0,
    ) -> None:
        """End this life with this cause; `after_s` ago it was last of use."""
        ...

    async def stop(self) -> None:
        """End the engine and everything it started. Idempotent."""
        ...

    def kill(self) -> None:
        """Let `stop` wait no longer for the engine to end by itself."""
        ...
