"""Does what the drain of a frontend decides (`drain`), and tells who asks how far that is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Protocol, assert_never, cast

import grpc.aio

from frontend import drain
from frontend.drain import Drain, Phase
from frontend.requests import Request, Requests
from unbroken.errors import InvalidField, Reason
from unbroken.v1 import admin_service_pb2 as pb

BUDGET_S_MAX: Final = 86_400.0

_Context = grpc.aio.ServicerContext[Any, Any]


class Leaving(Protocol):
    """What a drain does with a frontend."""

    def leave(self) -> None:
        """Take nothing new, and say so to everybody."""
        ...

    def go_away(self, within_s: float) -> None:
        """Let connections carry nothing new; those that remain end within so long."""
        ...

    def cut_short(self) -> None:
        """End all that runs."""
        ...

    def num_elsewhere(self) -> int:
        """What is waited for besides the requests of this process."""
        ...


class Draining:
    """One drain, from before it begins."""

    def __init__(
        self,
        drain: Drain,
        frontend_id: str,
        requests: Requests,
        frontend: Leaving,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.drain = drain
        self.frontend_id = frontend_id
        self.stop_wanted = asyncio.Event()
        """Nobody is waited for any more."""
        self.over = asyncio.Event()
        """As `stop_wanted`, or no deadline would be seen any more, which only a bug does."""
        self._requests = requests
        self._frontend = frontend
        self._clock = clock
        self._num_finished = self._num_moved = self._num_left_by_client = self._num_cut = 0
        self._calls: set[asyncio.Event] = set()  # Each is told when something changed.
        self._changed = asyncio.Event()
        requests.on_end.append(self._ended)

    @property
    def is_told(self) -> bool:
        """Whoever asked for the drain knows how it ended."""
        return not self._calls

    def tell(self, event: drain.Event) -> None:
        """Something happened that may begin a drain, or make it more urgent."""
        self._obey(self.drain.handle(event, self._clock()))
        self.look()

    def look(self) -> None:
        """Something that was waited for may be over."""
        left = self._num_left
        seen = drain.Seen(left, self._requests.num_untold)
        self._obey(self.drain.handle(seen, self._clock()))
        self._changed.set()
        for changed in self._calls:
            changed.set()

    async def follow(self) -> None:
        """See deadlines come, for ever."""
        try:
            await self._follow()
        finally:
            self.over.set()

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            now = self._clock()
            if commands := self.drain.handle_timeout(now):
                self._obey(commands)
                self.look()
                continue
            due_at = self.drain.deadline()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due_at is None else max(0.0, due_at - now)):
                    await self._changed.wait()

    async def progress(self, context: _Context) -> AsyncIterator[pb.DrainFrontendResponse]:
        """How far it is, whenever that changes, until nobody is waited for.

        The process waits for the end of the call with that context.
        """
        changed = asyncio.Event()
        self._calls.add(changed)

        def forget(_: object) -> None:
            self._calls.discard(changed)

        context.add_done_callback(cast("Any", forget))  # Its stub is no protocol.
        told: object = None
        while True:
            changed.clear()
            response = self.response()
            news = (response.phase, response.num_requests)
            if news != told:
                told = news
                yield response
            if response.phase == pb.FRONTEND_DRAIN_PHASE_STOPPING:
                return
            await changed.wait()

    def response(self) -> pb.DrainFrontendResponse:
        """How far it is."""
        is_stopping = self.drain.phase is Phase.STOPPING
        response = pb.DrainFrontendResponse(
            phase=pb.FRONTEND_DRAIN_PHASE_STOPPING
            if is_stopping
            else pb.FRONTEND_DRAIN_PHASE_LEAVING,
            num_requests=self._requests.num_running,
            num_finished=self._num_finished,
            num_moved=self._num_moved,
            num_left=self._num_left_by_client,
            num_cut=self._num_cut,
        )
        if self.drain.phase is Phase.LEAVING:
            left_s = max(0.0, self.drain.cut_at - self._clock())
            response.budget_left.FromNanoseconds(round(left_s * 1e9))
        return response

    @property
    def _num_left(self) -> int:
        return self._requests.num_running + self._frontend.num_elsewhere()

    def _obey(self, commands: Sequence[drain.Command]) -> None:
        for command in commands:
            match command:
                case drain.Announce():
                    self._frontend.leave()
                    self._requests.begin_to_move()
                case drain.Tell(num_requests=num_requests):
                    self._requests.ask_to_move(num_requests, self.drain.cut_at)
                case drain.GoAway():
                    left_s = self.drain.cut_at - self._clock()
                    self._frontend.go_away(max(0.0, left_s) + drain.CUT_S)
                case drain.Cut():
                    self._frontend.cut_short()
                case drain.Stop():
                    self.stop_wanted.set()
                    self.over.set()
                case _:
                    assert_never(command)

    def _ended(self, request: Request) -> None:
        if not self.drain.is_draining:
            return
        error = request.error
        if request.is_handed_over:
            self._num_cut += 1
        elif error is None:
            self._num_finished += 1
        elif error.reason is Reason.FENCED:
            self._num_moved += 1  # Adopted by another frontend.
        elif error.reason is Reason.CANCELLED and request.cut_at is not None:
            self._num_left_by_client += 1
        self.look()


def budget_of(request: pb.DrainFrontendRequest, frontend_id: str) -> float | None:
    """How long the request says that streams may go on. Raises `InvalidField`."""
    if request.frontend_id not in ("", frontend_id):
        raise InvalidField("frontend_id", f"{frontend_id}, which this is", request.frontend_id)
    if not request.HasField("budget"):
        return None
    budget_s = request.budget.ToNanoseconds() / 1e9
    if not 0 <= budget_s <= BUDGET_S_MAX:
        raise InvalidField("budget", f"0 to {BUDGET_S_MAX:g} seconds", budget_s)
    return budget_s
