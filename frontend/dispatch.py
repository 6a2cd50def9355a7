"""Obeys what streams ask: finds workers, starts and ends attempts, moves windows, keeps time.

    Place ──▶ placement ──▶ a worker ──▶ Start on its link
                  └── none ──▶ wait until a worker becomes ready, or the stream's deadline

Everything happens in the call that brought the news, so that a stream which lost its worker is on
its way to another before anything else runs.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from frontend import stream as machine
from frontend.admission import Envelope, Model
from frontend.links import Links
from frontend.mesh_view import MeshView
from frontend.metrics import FrontendMetrics
from frontend.placement import Need, WorkerView, choose, num_cached_tokens
from frontend.relay_call import RelayCall
from unbroken import blocks, log
from unbroken.checkpoint import checkpoint_to_proto
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, FailureKind
from unbroken.v1 import relay_service_pb2

RETRIES_AT_ONCE: Final = 64
"""Placements tried again before other work gets a turn; each takes about 50 µs."""

_log = log.get_logger(__name__)


class Dispatcher:
    """What all streams share: the workers, the links, and the line of those that wait."""

    def __init__(
        self,
        mesh: MeshView,
        links: Links,
        metrics: FrontendMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mesh = mesh
        self.links = links
        self.metrics = metrics
        self.clock = clock
        self._waiting: dict[Choice, None] = {}
        """First come, first served."""
        self._retrying: dict[Choice, None] = {}
        """Those that will be tried again next."""
        self._retry: asyncio.Handle | None = None
        self.on_attempt_ended: list[Callable[[Choice, machine.Life, machine.Attempt], None]] = []
        """Called with what became of an attempt; it may not start another."""
        mesh.on_ready.append(self._worker_ready)

    @property
    def num_waiting(self) -> int:
        """Choices that wait for a worker."""
        return len(self._waiting) + len(self._retrying)

    def wait(self, choice: "Choice") -> None:
        """Try again to place the choice when a worker becomes ready."""
        self._waiting[choice] = None

    def wait_no_more(self, choice: "Choice") -> None:
        """The opposite of `wait`. Idempotent."""
        self._waiting.pop(choice, None)
        self._retrying.pop(choice, None)

    def _worker_ready(self) -> None:
        self._retrying.update(self._waiting)
        self._waiting.clear()
        self._retry_soon()

    def _retry_soon(self) -> None:
        if self._retry is None and self._retrying:
            self._retry = asyncio.get_running_loop().call_soon(self._retry_some)

    def _retry_some(self) -> None:
        self._retry = None
        for choice in list(itertools.islice(self._retrying, RETRIES_AT_ONCE)):
            choice.place_again()
        self._retry_soon()


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where the current attempt runs."""

    call: RelayCall
    slot: int
    epoch: int
    view: WorkerView


class Choice:
    """One choice of one running request: its stream, and the attempt that serves it now."""

    __slots__ = (
        "_avoid",
        "_deadline_at",
        "_dispatcher",
        "_envelope",
        "_hashes",
        "_model",
        "_seat",
        "_timer",
        "_wake",
        "index",
        "stream",
    )

    def __init__(
        self,
        stream: machine.Stream,
        index: int,
        *,
        dispatcher: Dispatcher,
        envelope: Envelope,
        model: Model,
        wake: asyncio.Event,
        deadline_at: float | None,
    ) -> None:
        """`deadline_at` is the client's, monotonic seconds; `wake` is set when there is news."""
        self.stream = stream
        self.index = index
        self._dispatcher = dispatcher
        self._envelope = envelope
        self._model = model
        self._wake = wake
        self._deadline_at = deadline_at
        self._avoid: frozenset[machine.Life] = frozenset()
        self._hashes: dict[tuple[str, int], list[int]] = {}
        self._seat: _Seat | None = None
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Let the client's side look at the stream."""
        if not self._wake.is_set():
            self._wake.set()

    def begin(self) -> None:
        """The request was admitted."""
        self.obey(self.stream.start(self._dispatcher.clock()))

    def crashed(self) -> None:
        """The stream's machine raised what is being handled: a bug. The stream ends with it."""
        _log.exception("bug in a stream", request_id=self._envelope.request_id, index=self.index)
        error = UnbrokenError(Reason.INTERNAL, "an internal error; the frontend's log has it")
        self._leave()
        self._stop_waiting()
        self.stream.cancelled(error)  # The commands it gives have just been obeyed.
        self.wake()

    def obey(self, commands: Sequence[machine.Command]) -> None:
        """Do what the stream asks, in order, and what it asks in consequence."""
        try:
            self._obey(commands)
        except Exception:
            self.crashed()
        self.wake()

    def _obey(self, commands: Sequence[machine.Command]) -> None:
        queue = deque(commands)
        while queue:
            command = queue.popleft()
            match command:
                case machine.Place(avoid=avoid, pause_s=pause_s):
                    self._avoid = avoid
                    queue.extend(self._place(pause_s))
                case machine.Start() as order:
                    queue.extend(self._start(order))
                case machine.Abort(epoch=epoch):
                    if self._seat is not None and self._seat.epoch == epoch:
                        self._leave()
                case machine.Ack(epoch=epoch, offset=offset):
                    if self._seat is not None and self._seat.epoch == epoch:
                        self._seat.call.ack(self._seat.slot, offset)
                case machine.Finish():
                    # An engine that saw the end itself has left its slot already; one that goes on
                    # is told.
                    self._leave()
                    self._stop_waiting()
                case _:
                    assert_never(command)

    def place_again(self) -> None:
        """Time passed, or a worker became ready. Raises nothing: others are tried after it."""
        self._stop_waiting()
        stream = self.stream
        try:
            self._obey(stream.handle_timeout(self._dispatcher.clock()))
            if stream.state is machine.State.PLACING:
                self._obey(self._place(0.0))
        except Exception:
            self.crashed()
        self.wake()

    def _place(self, pause_s: float) -> Sequence[machine.Command]:
        stream, dispatcher = self.stream, self._dispatcher
        self._leave()  # A refused attempt has left its slot, but not its worker's books.
        view = None if pause_s > 0 else self._choose()
        if view is not None:
            return stream.placed(stream.epoch, view.life, view.abilities)
        deadline = stream.deadline()
        assert deadline is not None, "a stream that is placed has a deadline"
        wait_s = max(0.0, deadline - dispatcher.clock())
        if pause_s > 0:
            wait_s = min(wait_s, pause_s)
        else:
            dispatcher.wait(self)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.place_again)
        return ()

    def _choose(self) -> WorkerView | None:
        stream, mesh, model = self.stream, self._dispatcher.mesh, self._model
        original = stream.original
        ways: dict[object, ContinuationClass] = {}

        def is_able(view: WorkerView) -> bool:
            if not mesh.can_serve(view, model, original):
                return False
            if view.abilities not in ways:  # Most workers are alike, and asking costs something.
                ways[view.abilities] = stream.way_at(view.abilities)
            return ways[view.abilities] is not ContinuationClass.NONE

        need = Need(
            model=model.name,
            num_tokens=len(original.prompt_token_ids) + len(stream.ledger),
            avoid=self._avoid,
        )
        return choose(mesh.views(), need, is_able=is_able, block_hashes=self._block_hashes)

    def _block_hashes(self, view: WorkerView) -> Sequence[int]:
        """Of the prompt: what was delivered since is seldom cached elsewhere."""
        if not view.cached_blocks:
            return ()
        key = (view.abilities.numerics_id, view.block_size)
        if key not in self._hashes:
            root = blocks.root(view.abilities.numerics_id, self._envelope.tenant)
            prompt = self.stream.original.prompt_token_ids
            self._hashes[key] = blocks.chain(prompt, view.block_size, root=root)
        return self._hashes[key]

    def _start(self, order: machine.Start) -> Sequence[machine.Command]:
        dispatcher, envelope, stream = self._dispatcher, self._envelope, self.stream
        now = dispatcher.clock()
        worker = dispatcher.mesh.workers.get(order.life.worker_id)
        call = dispatcher.links.call_to(order.life)
        if worker is None or worker.view is None or call is None:
            detail = f"no link to {order.life.worker_id}"
            return stream.lost(order.epoch, FailureKind.PARTITION, detail, now)
        if len(stream.attempts) > 1:
            dispatcher.metrics.migrated(stream.attempts[-2].failure, stream.attempts[-1].way)
        request = relay_service_pb2.RelayRequest()
        start = request.start
        start.stream.request_id = envelope.request_id
        start.stream.choice_index = self.index
        start.epoch = order.epoch
        start.engine_incarnation = order.life.engine_incarnation
        start.checkpoint.CopyFrom(checkpoint_to_proto(order.checkpoint))
        start.window_tokens = order.window_tokens
        if self._deadline_at is not None:
            start.deadline.FromNanoseconds(max(0, int((self._deadline_at - now) * 1e9)))
        start.orphan_grace.FromNanoseconds(int(envelope.orphan_grace_s * 1e9))
        start.priority = envelope.priority
        start.stream.tenant = envelope.tenant
        view = worker.view
        num_tokens = len(stream.original.prompt_token_ids) + len(stream.ledger)
        hashes = self._block_hashes(view)
        num_cached = num_cached_tokens(view.cached_blocks, hashes, view.block_size)
        slot = call.start(
            self,
            request,
            vocab_size=self._model.tokenizer.asset.vocab_size,
            wants_logprobs=stream.original.params.num_top_logprobs is not None,
            num_prefill_tokens=num_tokens - num_cached,
        )
        self._seat = _Seat(call, slot, order.epoch, view)
        view.placed(num_tokens, num_cached)
        return ()

    def _leave(self) -> None:
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.call.abort(seat.slot)
            seat.view.num_attempts -= 1
            attempt = self.stream.attempts[-1]
            if attempt.epoch == seat.epoch:
                for callback in self._dispatcher.on_attempt_ended:
                    callback(self, seat.view.life, attempt)

    def _stop_waiting(self) -> None:
        self._dispatcher.wait_no_more(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
