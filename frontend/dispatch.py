"""Obeys what streams ask: finds workers, starts and ends attempts, moves windows, keeps time.

    Place ──▶ waiting room, if new and all are busy ──▶
              resume queue ──its turn──▶ placement ──▶ a worker ──▶ Start on its link
                  └── nobody has room ──▶ wait until something changes, or the stream's deadline
    Relink ──▶ the link's fate ──▶ up: Adopt; gone: lost; neither: wait for one, or the deadline

Everything happens in the call that brought the news, so that a stream which lost its worker and has
its turn is on its way to another before anything else runs.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final, assert_never

from frontend import stored_kv
from frontend import stream as machine
from frontend.admission import Admitted, Envelope, Model
from frontend.admission_queue import Arrival, QueueLimits
from frontend.afterwards import Afterwards
from frontend.busy import Shedder
from frontend.continuation import Abilities
from frontend.feasibility import first_token_s
from frontend.links import Fate, Links
from frontend.mesh_view import MeshView, Worker
from frontend.metrics import FrontendMetrics
from frontend.pausing import Pausing
from frontend.placement import Need, WorkerView, choose, num_known_tokens
from frontend.preemption import PreemptionLimits
from frontend.quarantine import Quarantine
from frontend.query_of_death import Fingerprint
from frontend.relay_call import RelayCall
from frontend.resume_queue import ResumeLimits, ResumeQueue, Ticket, Work
from frontend.stream import Life
from frontend.waiting_room import Standing, WaitingRoom
from unbroken import blocks, log
from unbroken.checkpoint import write_progress
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import params_to_proto
from unbroken.holdings import StreamName
from unbroken.outcome import ContinuationClass, FailureKind
from unbroken.thresholds import Thresholds
from unbroken.v1 import attempt_pb2, relay_service_pb2, worker_pb2

MOVE_TOLD_S: Final = 0.05
"""A client is told where its stream has gone with the next token, or so much later: when an engine
dies, all its streams move, and telling everybody would hold up the moves themselves."""
TURNS_AT_ONCE: Final = 256
"""Placements tried before other work gets a turn; each takes about 50 µs."""

_log = log.get_logger(__name__)


class Dispatcher:
    """What all streams share: the workers, the links, and the line of those that want a worker."""

    def __init__(
        self,
        mesh: MeshView,
        links: Links,
        metrics: FrontendMetrics,
        quarantine: Quarantine,
        *,
        limits: ResumeLimits | None = None,
        thresholds: Thresholds | None = None,
        waiting: QueueLimits | None = None,
        preemption: PreemptionLimits | None = None,
        deadline_share: float = 0.5,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`thresholds` are those of models that have none of their own; none, unless given.
        `waiting` is how much new work may wait while all workers are busy; none, unless given.
        Nobody is paused for another unless `preemption` says so. Of the estimated time to a first
        token, `deadline_share` is sure to be needed.
        """
        limits = limits or ResumeLimits()
        random = random or Random()
        self.mesh = mesh
        self.links = links
        self.metrics = metrics
        self.quarantine = quarantine
        self.afterwards = quarantine.afterwards
        """For what a move leaves to be done."""
        self.queue = ResumeQueue[Choice](
            limits,
            random,
            lambda choice, view: choice.could_take(view),
        )
        self.shedder = Shedder(
            thresholds or Thresholds(), random, prefill_tokens_per_s=limits.prefill_tokens_per_s
        )
        self.room = WaitingRoom(
            waiting or QueueLimits(requests_max=0),
            random,
            self.shedder,
            metrics,
            views_of=self._views_of,
            highest_paused=self._highest_paused,
            on_expiry=self._expire,
            on_turn=self._give_turns_soon,
            clock=clock,
        )
        self.pausing = Pausing(
            preemption or PreemptionLimits(),
            self.room,
            self.shedder,
            metrics,
            views_of=self._views_of,
            is_held=self.queue.holds_new_work,
            on_due=self._give_turns_soon,
            clock=clock,
        )
        self.clock = clock
        self._deadline_share = deadline_share
        self._is_giving_turns = False
        self._is_room_news = False
        self._soon: asyncio.Handle | None = None
        self._due: asyncio.TimerHandle | None = None
        self.on_attempt_ended: list[Callable[[Choice, machine.Life, machine.Attempt], None]] = []
        """Called with what became of an attempt; it may not start another."""
        self._unlinked: dict[str, dict[Choice, None]] = {}
        """Those that wait for a link, by worker."""
        links.on_fate.append(self._fate_changed)
        mesh.on_change.append(self._mesh_changed)
        quarantine.on_room.append(self._room_changed)
        self.on_attempt_ended.append(quarantine.attempt_ended)
        mesh.on_load.append(self._load_reported)
        mesh.on_queues.append(self.room.heard)
        mesh.queue_of = self.room.report

    def thresholds_changed(self) -> None:
        """Other thresholds hold."""
        self._push_thresholds()
        self.room.changed()
        self._give_turns_soon()

    @property
    def num_waiting(self) -> int:
        """Choices that wait for a worker."""
        return self.queue.num_waiting + self.room.queue.num_waiting

    @property
    def num_busy(self) -> int:
        """Workers that have too much; safe in any thread."""
        workers = list(self.mesh.workers.values())
        return sum(
            view.is_ready and self.shedder.is_busy(view)
            for worker in workers
            if (view := worker.view) is not None
        )

    def close(self) -> None:
        """Look at nothing any more."""
        self._cancel_timers()
        self.afterwards.finish()
        self.room.close()
        self.pausing.close()

    def reason_to_refuse(self, arrival: Arrival) -> UnbrokenError | None:
        """Why a request is refused before anything is done for it, if it is; counts it."""
        if self.room.is_for(arrival.model):
            return self.room.reason_to_refuse(arrival)
        return self.reason_to_shed(arrival.model)

    def is_overloaded(self, model: str, could_take: Callable[[WorkerView], bool]) -> bool:
        """Whether all workers are busy that new work could go to."""
        views = (view for view in self._views_of(model) if could_take(view))
        return bool(self.shedder.busy(model, views))

    def reason_to_shed(
        self, model: str, could_take: Callable[[WorkerView], bool] = lambda _: True
    ) -> UnbrokenError | None:
        """Why new work for a model is refused now, if it is; counts it.

        `could_take` tells which workers it could go to at all.
        """
        if self.shedder.thresholds_of(model).is_off:
            return None
        eligible = (view for view in self._views_of(model) if could_take(view))
        error = self.shedder.refusal(model, eligible, self.clock())
        if error is not None:
            for threshold in error.metadata["thresholds"].split(","):
                self.metrics.requests_shed.labels(threshold).inc()
        return error

    def reason_to_give_up(
        self, admitted: Admitted, deadline_at: float | None
    ) -> UnbrokenError | None:
        """Why a new request is not even begun, if it cannot have a token before its deadline."""
        if deadline_at is None or not self._deadline_share:
            return None
        model = admitted.model.name
        views = [view for view in self.mesh.views() if view.is_ready and view.model == model]
        prompt, tenant = admitted.checkpoints[0].prompt_token_ids, admitted.envelope.tenant

        def block_hashes(view: WorkerView) -> Sequence[int]:
            root = blocks.root(view.abilities.numerics_id, tenant)
            return blocks.chain(prompt, view.block_size, root=root)

        left_s = deadline_at - self.clock()
        # Without what is cached first: most have time enough, and hashes cost some.
        takes_s = self._first_token_s(views, len(prompt), lambda _: ())
        if takes_s * self._deadline_share > left_s:
            takes_s = self._first_token_s(views, len(prompt), block_hashes)
        if takes_s * self._deadline_share <= left_s:
            return None
        return UnbrokenError(
            Reason.DEADLINE_EXCEEDED,
            f"its first token would take about {takes_s:.3g} s, and it has {max(0, left_s):.3g} s",
            metadata={"first_token_s": f"{takes_s:.6f}", "left_s": f"{max(0, left_s):.6f}"},
        )

    def _first_token_s(
        self,
        views: Sequence[WorkerView],
        num_tokens: int,
        block_hashes: Callable[[WorkerView], Sequence[int]],
    ) -> float:
        cost_of = self.queue.cost_at
        return first_token_s(views, num_tokens, cost_of=cost_of, block_hashes=block_hashes)

    def line_up(self, choice: "Choice", ticket: Ticket) -> UnbrokenError | None:
        """Place the choice as soon as it has its turn, perhaps now; an error if it gets none."""
        standing = choice.standing(ticket)
        if standing is not None:
            error, may_go = self.room.line_up(choice, standing)
            if not may_go:
                self._give_turns_soon()  # Its tenant may have nothing with any worker.
                return error
        error = self.queue.offer(choice, ticket, self.clock())
        if error is None:
            self._give_turns()
        return error

    def computed(self, choice: "Choice") -> None:
        """The prompt of the choice is computed, or its attempt is over."""
        self.queue.computed(choice)
        self._give_turns_soon()

    def wait_for_link(self, choice: "Choice", worker_id: str) -> None:
        """Tell the choice when the fate of the link to the worker may have changed."""
        self._unlinked.setdefault(worker_id, {})[choice] = None

    def wait_for_link_no_more(self, choice: "Choice", worker_id: str) -> None:
        """The opposite of `wait_for_link`. Idempotent."""
        waiting = self._unlinked.get(worker_id)
        if waiting is not None:
            waiting.pop(choice, None)
            if not waiting:
                del self._unlinked[worker_id]

    def unlinked(self) -> Iterator[tuple[str, "Choice"]]:
        """Who waits for a link, and to which worker."""
        for worker_id, choices in self._unlinked.items():
            for choice in choices:
                yield worker_id, choice

    def _fate_changed(self, worker_id: str) -> None:
        for choice in list(self._unlinked.get(worker_id, ())):
            choice.link_changed()

    def _views_of(self, model: str) -> Iterator[WorkerView]:
        """Workers that take requests for a model."""
        return (view for view in self.mesh.views() if view.is_ready and view.model == model)

    def _highest_paused(self, model: str) -> int | None:
        return self.pausing.highest_paused(model)

    def _push_thresholds(self) -> None:
        """Have all sidecars know what their workers may have, before anything is begun there."""
        version = self.shedder.version
        for view in self.mesh.views():
            call = self.links.call_to(view.life) if view.is_ready else None
            if call is not None:
                call.push_thresholds(self.shedder.thresholds_of(view.model), version)

    def _mesh_changed(self) -> None:
        self._push_thresholds()
        self.queue.workers(self.mesh.views(), self.clock())
        self.shedder.workers(self.mesh.views())
        self.pausing.workers(view.life for view in self.mesh.views())
        self.room.queue.models_known(self.mesh.model_names())
        self.room.changed()
        self._give_turns_soon()

    def _room_changed(self) -> None:
        """Once for all whom an engine's death concerns, after they are on their way."""
        if not self._is_room_news:
            self._is_room_news = True
            asyncio.get_running_loop().call_soon(self._tell_room)

    def _tell_room(self) -> None:
        self._is_room_news = False
        self._mesh_changed()

    def _load_reported(self, worker: Worker) -> None:
        if worker.view is not None and worker.load is not None:
            self.queue.reported(worker.view.life, worker.load, worker.load_at)
            if not self.shedder.thresholds_of(worker.view.model).is_off:
                self.shedder.reported(worker.view.life, worker.load, worker.load_at)
                self.pausing.reported(worker.view.life, worker.load)
                self.room.reported(worker.view)
            self._give_turns_soon()

    def _give_turns_soon(self) -> None:
        if self._soon is None and (self.num_waiting or not self.pausing.is_idle):
            self._soon = asyncio.get_running_loop().call_soon(self._give_turns)

    def _give_turns(self) -> None:
        if self._is_giving_turns:
            return  # A placement that failed at once stands in line again; its turn comes below.
        self._cancel_timers()
        self._is_giving_turns = True
        try:
            for _ in range(TURNS_AT_ONCE):
                turn = self.queue.next(self.clock())
                if turn is not None:
                    turn.key.take_turn(turn.lives)
                elif not self._call_next():
                    break
                if not self.num_waiting:
                    break
            else:
                self._give_turns_soon()
        finally:
            self._is_giving_turns = False
        self.room.looked()
        self.pausing.look()
        due = self.queue.deadline()
        if due is not None:
            wait_s = max(0.0, due - self.clock())
            self._due = asyncio.get_running_loop().call_later(wait_s, self._give_turns)

    def _call_next(self) -> bool:
        """Whether somebody came out of the waiting room, now that a worker has room for him."""
        choice = self.room.next(self.queue.holds_new_work)
        if choice is None:
            return False
        error = self.queue.offer(choice, choice.ticket(), self.clock())
        if error is not None:
            choice.refuse(error)
        return True

    def _expire(self) -> None:
        """Some have waited for too long."""
        self.room.expire()
        self._give_turns_soon()

    def _cancel_timers(self) -> None:
        for handle in (self._soon, self._due):
            if handle is not None:
                handle.cancel()
        self._soon = self._due = None


def _never(_: WorkerView) -> bool:
    """Placement of what was admitted before looks at no thresholds."""
    return False


def nobody() -> None:
    """Who is told when nobody reads."""


class News:
    """Whether there is something new for whoever reads a request; he is told once."""

    __slots__ = ("_is_waiting", "_timer", "is_set", "is_to_be_polled", "prepare", "tell")

    def __init__(self) -> None:
        self.is_set = False
        self.is_to_be_polled = False
        """With the next output something else is to be done."""
        self.tell: Callable[[], None] = nobody
        self.prepare: Callable[[], None] = nobody
        """Called when all that is more urgent has been done, if something can wait."""
        self._is_waiting = False
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """There is something new."""
        if not self.is_set:
            self.is_set = True
            self.tell()

    def set_soon(self, afterwards: Afterwards) -> None:
        """There is something that can wait for `MOVE_TOLD_S`, and for something more urgent."""
        if not self._is_waiting:
            self._is_waiting = True
            afterwards.do(self._wait_on)

    def clear(self) -> None:
        """Whoever reads has seen it."""
        self.is_set = False

    def _time(self) -> None:
        self._timer = None
        self.set()

    def _wait_on(self) -> None:
        self._is_waiting = False
        if self._timer is None and not self.is_set:
            self._timer = asyncio.get_running_loop().call_later(MOVE_TOLD_S, self._time)
        self.prepare()


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
        "_fingerprint",
        "_hashes",
        "_is_computing",
        "_is_new",
        "_is_new_work",
        "_life",
        "_memories",
        "_model",
        "_news",
        "_seat",
        "_standing",
        "_template",
        "_timer",
        "_tried",
        "_unlinked_from",
        "_ways",
        "index",
        "on_turn",
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
        news: News,
        deadline_at: float | None,
        is_new: bool = True,
    ) -> None:
        """`deadline_at` is the client's, monotonic seconds; `news` is set when there is some;
        `is_new`: no choice of the request has ever been at a worker.
        """
        self.stream = stream
        self.index = index
        self._dispatcher = dispatcher
        self._envelope = envelope
        self._model = model
        self._news = news
        self._deadline_at = deadline_at
        self._avoid: frozenset[machine.Life] = frozenset()
        self._hashes: dict[tuple[str, int], list[int]] = {}
        self._memories: dict[str, worker_pb2.KvHolder | None] = {}
        """Memory services of the workers that it ran at, the last one last, and how other hosts
        read there."""
        self._fingerprint: Fingerprint | None = None
        self._is_computing = False  # The resume queue has it on a worker's account.
        self._is_new = is_new
        self._is_new_work = False  # The attempt that is begun may be refused by a busy worker.
        self._life: Life | None = None  # Where the last attempt was begun, until it is over.
        self.on_turn: Callable[[], None] = nobody
        """Called once, when it got to a worker."""
        self._seat: _Seat | None = None
        self._standing: Standing | None = None  # In the waiting room.
        self._template: relay_service_pb2.RelayRequest | None = None
        """What all its attempts begin with: converted once, for a move has no time."""
        self._timer: asyncio.TimerHandle | None = None
        self._tried: machine.Attempt | None = None  # What became of that attempt.
        self._unlinked_from: machine.Relink | None = None
        self._ways: dict[Abilities, ContinuationClass] = {}  # How it would go on; while placed.

    @property
    def deadline_at(self) -> float | None:
        """The client's, monotonic seconds; attempts that begin from now on are told."""
        return self._deadline_at

    @deadline_at.setter
    def deadline_at(self, deadline_at: float | None) -> None:
        self._deadline_at = deadline_at

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells the request from others; the same for all its choices."""
        return self._fingerprint or self._identify()

    def _identify(self) -> Fingerprint:
        quarantine, tenant = self._dispatcher.quarantine, self._envelope.tenant
        self._fingerprint = quarantine.identify(tenant, self.stream.original)
        return self._fingerprint

    @property
    def name(self) -> StreamName:
        """What it is called on links."""
        return self._envelope.tenant, self._envelope.request_id, self.index

    def names(self) -> dict[str, object]:
        """What to call it in the log."""
        return {"request_id": self._envelope.request_id, "index": self.index}

    @property
    def waiting_detail(self) -> str:
        """What it waits for, for people; empty if it waits for no worker."""
        dispatcher = self._dispatcher
        return (
            dispatcher.queue.detail(self)
            or dispatcher.room.queue.detail(self)
            or dispatcher.pausing.detail(self)
        )

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        return self._model.name

    @property
    def priority(self) -> int:
        """That of its request."""
        return self._envelope.priority

    @property
    def has_to_wait(self) -> bool:
        """Whether it has no worker yet, and may be refused one, wherever it stands in line."""
        return self.stream.state is machine.State.PLACING and self._is_to_be_refused

    def others_begin(self) -> None:
        """The other choices of its request look for workers: nobody refuses a request in part."""
        self._is_new = False

    def wake(self) -> None:
        """Let the client's side look at the stream."""
        if self._is_computing and self.stream.is_prefilled:
            self._computed()
        news = self._news
        if not news.is_set:  # As `News.set`, which is called for every token.
            news.is_set = True
            news.tell()

    def _wake_after(self) -> None:
        """As `wake`, after commands that may only have moved the stream."""
        if self.stream.has_output or self.stream.outcome is not None:
            self.wake()
        else:
            self._news.set_soon(self._dispatcher.afterwards)

    def begin(self) -> None:
        """The request was admitted."""
        self.obey(self.stream.start(self._dispatcher.clock()))
        # Now, because many may be needed at one moment: when an engine dies.
        self._identify()

    def crashed(self) -> None:
        """The stream's machine raised what is being handled: a bug. The stream ends with it."""
        _log.exception("bug in a stream", **self.names())
        error = UnbrokenError(Reason.INTERNAL, "an internal error; the frontend's log has it")
        self._leave()
        self._stop_waiting()
        self._relink_no_more()
        self.stream.cancelled(error)  # The commands it gives have just been obeyed.
        self._ended()
        self._dispatcher.pausing.forget(self)
        self.wake()

    def obey(self, commands: Sequence[machine.Command]) -> None:
        """Do what the stream asks, in order, and what it asks in consequence."""
        try:
            self._obey(commands)
        except Exception:
            self.crashed()
        self._wake_after()

    def acknowledge_early(self) -> None:
        """Move the window if that is due soon; it is no news to whoever reads the stream."""
        try:
            self._obey(self.stream.acknowledge_early())
        except Exception:
            self.crashed()

    def _obey(self, commands: Sequence[machine.Command]) -> None:
        obeyed = list(commands)
        for command in obeyed:  # What follows from one is obeyed after those that are there.
            match command:
                case machine.Place(avoid=avoid, pause_s=pause_s):
                    self._avoid = avoid
                    obeyed += self._place(pause_s)
                case machine.Start() as order:
                    obeyed += self._start(order)
                case machine.Relink() as order:
                    obeyed += self._relink(order)
                case machine.Adopt() as order:
                    obeyed += self._adopt(order)
                case machine.Abort(epoch=epoch):
                    if self._seat is not None and self._seat.epoch == epoch:
                        self._leave()
                case machine.Halt(epoch=epoch):
                    if self._seat is not None and self._seat.epoch == epoch:
                        self._seat.call.halt(self._seat.slot)
                        if self.stream.is_halting:  # The call may just have ended.
                            self._at_deadline()
                case machine.Paused():
                    self._dispatcher.pausing.stopped(self)
                    self._ways.clear()  # The output has grown.
                    self._leave()
                    self._ended()
                    self._stop_waiting()
                case machine.Ack(epoch=epoch, offset=offset):
                    if self._seat is not None and self._seat.epoch == epoch:
                        self._seat.call.ack(self._seat.slot, offset)
                case machine.Finish():
                    # An engine that saw the end itself has left its slot already; one that goes on
                    # is told.
                    self._leave()
                    self._ended()
                    self._stop_waiting()
                    self._relink_no_more()
                    self._dispatcher.pausing.forget(self)
                case _:
                    assert_never(command)

    def let_go(self) -> None:
        """Hear no more of the attempt, and let it go on; the stream is about to be ended."""
        self._leave(is_aborted=False)

    def take_turn(self, lives: Set[Life]) -> None:
        """One of these workers may be taken. Raises nothing: others have their turn after it."""
        stream, dispatcher = self.stream, self._dispatcher
        try:
            refusal = dispatcher.quarantine.verdict(self)
            if refusal is not None:
                self._refuse(refusal)
                return
            view = self._choose(lives)
            if view is None:
                dispatcher.queue.passed_over(self, lives)
                return
            if self._is_refused_at(view):
                self._wait_for_room()
                return
            waited_s = dispatcher.queue.admitted(self, view.life, dispatcher.clock())
            dispatcher.room.settled(self, self._standing)
            self._is_computing = True
            self._is_new_work = self._is_to_be_refused or self._is_unheard
            self._stop_waiting()
            if stream.attempts:
                observe = dispatcher.metrics.resume_wait_s.observe
                dispatcher.afterwards.do(partial(observe, waited_s))
            way = self._ways.get(view.abilities)
            self._obey(stream.placed(stream.epoch, view.life, view.abilities, way=way))
            on_turn, self.on_turn = self.on_turn, nobody
            on_turn()
        except Exception:
            self.crashed()
        self._wake_after()

    def refuse(self, error: UnbrokenError) -> None:
        """It waits in vain. Raises nothing."""
        try:
            self._refuse(error)
        except Exception:
            self.crashed()

    def _refuse(self, error: UnbrokenError) -> None:
        """It had its turn in vain."""
        self._stop_waiting()
        self._obey(self.stream.unplaceable(self.stream.epoch, error))
        self.wake()

    def link_changed(self) -> None:
        """The link that the stream waits for may have come up, or be gone. Raises nothing."""
        order = self._unlinked_from
        if order is not None:
            self._relink_no_more()
            self.obey([order])

    def time_is_up(self) -> None:
        """The stream has waited long enough for a link, an adoption or a halt. Raises nothing."""
        self._timer = None
        due, now = self.stream.deadline(), self._dispatcher.clock()
        if due is not None and now < due:
            self._at_deadline()  # A loop's timer may be early by a fraction of what it waits.
            return
        self._relink_no_more()
        self.obey(self.stream.handle_timeout(now))

    def place_again(self) -> None:
        """The pause after a refusal is over, or nobody had room for too long. Raises nothing."""
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
        self._relink_no_more()
        self._stop_waiting()
        self._leave()  # A refused attempt has left its slot, but not its worker's books.
        self._ended()
        epoch, deadline = stream.epoch, stream.deadline()
        refusal = dispatcher.quarantine.verdict(self)
        if refusal is not None:
            return stream.unplaceable(epoch, refusal)
        assert deadline is not None, "a stream that is placed has a deadline"
        if pause_s <= 0:
            self._ways.clear()
            error = dispatcher.line_up(self, self._ticket(deadline))
            if error is not None:
                return stream.unplaceable(epoch, error)
            if stream.epoch != epoch or stream.state is not machine.State.PLACING:
                return ()  # It had its turn at once.
        wait_s = max(0.0, deadline - dispatcher.clock())
        if pause_s > 0:
            wait_s = min(wait_s, pause_s)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.place_again)
        return ()

    @property
    def _is_to_be_refused(self) -> bool:
        """Whether thresholds can refuse it: as long as nothing of its request was at a worker."""
        return self._is_new and not self.index and not self.stream.was_attempted

    @property
    def _is_unheard(self) -> bool:
        """Whether it was let in as new work, and lost its worker before that said anything of it.

        Thresholds hold for it as for new work, and it waits again instead of being refused.
        """
        return (
            self._is_new
            and self.stream.was_attempted
            and self._standing is not None
            and self._envelope.num_choices == 1
            and not self.stream.ledger
            and not self.stream.was_paused
        )

    def _is_refused_at(self, chosen: WorkerView) -> bool:
        """Whether it is not placed where was chosen, because all are busy that could take it.

        New work only, and a request as a whole, which its first choice speaks for. Most wait in the
        waiting room; others waited for a turn, or only some workers could take them.
        """
        dispatcher = self._dispatcher
        standing = self._standing
        return (
            (self._is_to_be_refused or self._is_unheard)
            and not (standing is not None and standing.may_pass)
            and dispatcher.shedder.is_busy(chosen)
            and dispatcher.is_overloaded(self._model.name, self._may_start_at)
        )

    def _may_start_at(self, view: WorkerView) -> bool:
        return self._dispatcher.quarantine.may_start(self, view.life) and self._could_go_on(view)

    def _wait_for_room(self) -> None:
        """It had its turn, and all workers are busy that could take it."""
        dispatcher, standing = self._dispatcher, self._standing
        if standing is not None:
            dispatcher.queue.cancel(self)
            dispatcher.room.come_back(self, standing)
            return
        error = dispatcher.reason_to_shed(self._model.name, self._may_start_at)
        assert error is not None, "all are busy that could take it"
        self._refuse(error)

    @property
    def waits_as(self) -> Standing | None:
        """Its place in the waiting room, if it has one."""
        return self._standing

    def standing(self, ticket: Ticket) -> Standing | None:
        """Its place in the waiting room; None if it need not wait there."""
        is_for_room = self._dispatcher.room.is_for(ticket.model)
        if is_for_room and self._standing is not None and self._is_unheard:
            self._standing.has_lost, self._standing.came_at = True, self._dispatcher.clock()
        elif not is_for_room or not self._is_to_be_refused:
            self._standing = None
        elif self._standing is None:
            envelope = self._envelope
            arrival = Arrival(
                model=ticket.model,
                tenant=envelope.tenant,
                request_id=envelope.request_id,
                priority=envelope.priority,
                num_tokens=max(1, ticket.num_tokens * envelope.num_choices),
                deadline=ticket.give_up_at,
            )
            self._standing = Standing(arrival, self._dispatcher.clock(), envelope.num_choices)
        return self._standing

    def ticket(self) -> Ticket:
        """What it needs, now that it is called."""
        deadline = self.stream.deadline()
        assert deadline is not None, "a stream that is placed has a deadline"
        return self._ticket(deadline)

    def _ticket(self, deadline: float) -> Ticket:
        give_up_at = deadline if self._deadline_at is None else min(deadline, self._deadline_at)
        is_resume = self.stream.was_attempted
        return Ticket(
            model=self._model.name,
            work=Work.RESUME if is_resume else Work.NEW,
            priority=self._envelope.priority,
            num_tokens=self.num_tokens,
            give_up_at=give_up_at,
            avoid=self._avoid,
            cached=self._cached() if is_resume else {},
            is_let_in=self.index > 0,
        )

    @property
    def num_tokens(self) -> int:
        """To compute before the next one: prompt and delivered output."""
        return len(self.stream.original.prompt_token_ids) + len(self.stream.ledger)

    def _cached(self) -> dict[Life, int]:
        """How many of them each worker that has some need not compute."""
        cached: dict[Life, int] = {}
        stored = self._stored()
        for view in self._dispatcher.mesh.views():
            if view.model == self._model.name and (view.cached_blocks or stored):
                num_tokens = num_known_tokens(view, stored, self._block_hashes(view))
                if num_tokens:
                    cached[view.life] = num_tokens
        return cached

    def could_take(self, view: WorkerView) -> bool:
        """Whether the stream could go on at a worker. Raises nothing."""
        try:
            return self._could_go_on(view)
        except Exception:
            return True  # Its turn will show the bug, and end this stream alone.

    def _could_go_on(self, view: WorkerView) -> bool:
        """As `could_take`. Most workers are alike, and asking a stream costs something."""
        stream = self.stream
        if not self._dispatcher.mesh.can_serve(view, self._model, stream.original):
            return False
        way = self._ways.get(view.abilities)
        if way is None:
            way = self._ways[view.abilities] = stream.way_at(view.abilities)
        return way is not ContinuationClass.NONE

    def _choose(self, lives: Set[Life]) -> WorkerView | None:
        mesh, model, quarantine = self._dispatcher.mesh, self._model, self._dispatcher.quarantine

        def is_able(view: WorkerView) -> bool:
            return (
                view.life in lives
                and quarantine.may_start(self, view.life)
                and self._could_go_on(view)
            )

        need = Need(
            model=model.name,
            num_tokens=self.num_tokens,
            avoid=self._avoid,
            stored=self._stored(),
        )
        has_begun = (
            self.stream.was_attempted and not self._is_unheard and not self.stream.was_paused
        )
        is_busy = _never if has_begun else self._dispatcher.shedder.is_busy
        return choose(
            mesh.views(), need, is_able=is_able, block_hashes=self._block_hashes, is_busy=is_busy
        )

    def _stored(self) -> Mapping[str, int]:
        """Tokens whose KV memory services are expected to have: those whose workers computed them.
        A guess: blocks may have been evicted, and are looked for by the worker."""
        if not self.stream.ledger:
            return {}  # Nobody has computed all of the prompt.
        stored, num_tokens = self._dispatcher.mesh.stored, self.num_tokens
        return {name: stored.expected(name, num_tokens) for name in self._memories}

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
        dispatcher, stream = self._dispatcher, self.stream
        now = dispatcher.clock()
        worker = dispatcher.mesh.workers.get(order.life.worker_id)
        call = dispatcher.links.call_to(order.life)
        if worker is None or worker.view is None or call is None:
            detail = f"no link to {order.life.worker_id}"
            return stream.lost(order.epoch, FailureKind.PARTITION, detail, now)
        attempts = stream.attempts
        if len(attempts) > 1:
            failure, way = attempts[-2].failure, attempts[-1].way
            dispatcher.afterwards.do(partial(dispatcher.metrics.migrated, failure, way))
        request = relay_service_pb2.RelayRequest()
        request.CopyFrom(self._template or self._new_template())
        start, checkpoint = request.start, order.checkpoint
        start.epoch = order.epoch
        start.engine_incarnation = order.life.engine_incarnation
        write_progress(start.checkpoint, checkpoint)
        if checkpoint.params is not stream.original.params:
            start.checkpoint.params.CopyFrom(params_to_proto(checkpoint.params))
        start.window_tokens = order.window_tokens
        if self._deadline_at is not None:
            start.deadline.FromNanoseconds(max(0, int((self._deadline_at - now) * 1e9)))
        start.is_new_work = self._is_new_work
        view = worker.view
        stored, expected = self._stored(), None
        if view.memory_service in stored:
            expected = stored_kv.Expected(view.memory_service, stored_kv.at_most(self.num_tokens))
        if view.memory_service:
            self._write_hint(start.checkpoint.kv, view)
            self._memories.pop(view.memory_service, None)
            self._memories[view.memory_service] = worker.kv_holder
        num_tokens = self.num_tokens
        hashes = self._block_hashes(view)
        num_cached = num_known_tokens(view, stored, hashes)
        slot = call.start(
            self,
            request,
            vocab_size=self._model.tokenizer.asset.vocab_size,
            wants_logprobs=stream.original.params.num_top_logprobs is not None,
            num_prefill_tokens=num_tokens - num_cached,
            expected=expected,
        )
        self._seat = _Seat(call, slot, order.epoch, view)
        self._life, self._tried = order.life, attempts[-1]
        view.placed(num_tokens, num_cached)
        dispatcher.pausing.started(self, view)
        if len(attempts) == 1:
            dispatcher.shedder.placed(view.model, num_tokens)
        dispatcher.quarantine.started(self, order.life)
        return ()

    def _new_template(self) -> relay_service_pb2.RelayRequest:
        self._template = relay_service_pb2.RelayRequest()
        start = self._template.start
        self._name(start.stream)
        start.orphan_grace.FromNanoseconds(int(self._envelope.orphan_grace_s * 1e9))
        start.priority = self._envelope.priority
        start.checkpoint.params.CopyFrom(params_to_proto(self.stream.original.params))
        return self._template

    def _write_hint(self, hint: attempt_pb2.KvHint, view: WorkerView) -> None:
        """Where else KV blocks may be; what they are called the worker knows by their tokens."""
        for name, holder in reversed(self._memories.items()):
            if name != view.memory_service and holder is not None:
                hint.holders.append(holder.address)
                hint.tickets.append(holder.ticket)

    def _computed(self) -> None:
        self._is_computing = False
        self._dispatcher.room.computed(self._standing)
        self._dispatcher.computed(self)

    def _relink(self, order: machine.Relink) -> Sequence[machine.Command]:
        dispatcher, life = self._dispatcher, order.life
        self._leave()  # Its call is over, but not its worker's books.
        match dispatcher.links.fate_of(life):
            case Fate.UP:
                return self.stream.relinked(order.epoch, dispatcher.clock())
            case Fate.GONE:
                detail = f"{life.worker_id} of incarnation {life.incarnation} is gone"
                now = dispatcher.clock()
                return self.stream.lost(order.epoch, FailureKind.CRASH, detail, now)
            case Fate.PENDING:
                self._unlinked_from = order
                dispatcher.wait_for_link(self, life.worker_id)
                self._at_deadline()
                return ()

    def _adopt(self, order: machine.Adopt) -> Sequence[machine.Command]:
        dispatcher, envelope, stream = self._dispatcher, self._envelope, self.stream
        now = dispatcher.clock()
        self._leave()
        worker = dispatcher.mesh.workers.get(order.life.worker_id)
        call = dispatcher.links.call_to(order.life)
        if worker is None or worker.view is None or call is None or not call.is_up:
            detail = f"no link to {order.life.worker_id}"
            return stream.lost(order.epoch, FailureKind.PARTITION, detail, now)
        request = relay_service_pb2.RelayRequest()
        adopt = request.adopt
        self._name(adopt.stream)
        adopt.epoch = order.epoch
        adopt.offset = order.offset
        adopt.window_tokens = order.window_tokens
        if self._deadline_at is not None:
            adopt.deadline.FromNanoseconds(max(0, int((self._deadline_at - now) * 1e9)))
        adopt.orphan_grace.FromNanoseconds(int(envelope.orphan_grace_s * 1e9))
        slot = call.adopt(
            self,
            request,
            vocab_size=self._model.tokenizer.asset.vocab_size,
            wants_logprobs=stream.original.params.num_top_logprobs is not None,
        )
        self._seat = _Seat(call, slot, order.epoch, worker.view)
        self._life, self._tried = order.life, stream.attempts[-1]
        worker.view.num_attempts += 1
        dispatcher.pausing.started(self, worker.view)
        self._at_deadline()
        return ()

    def _name(self, key: attempt_pb2.StreamKey) -> None:
        key.request_id = self._envelope.request_id
        key.tenant = self._envelope.tenant
        key.choice_index = self.index

    def _at_deadline(self) -> None:
        """Come back at the stream's deadline."""
        deadline = self.stream.deadline()
        assert deadline is not None, "who waits has a deadline"
        if self._timer is not None:
            self._timer.cancel()
        wait_s = max(0.0, deadline - self._dispatcher.clock())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.time_is_up)

    def _relink_no_more(self) -> None:
        order, self._unlinked_from = self._unlinked_from, None
        if order is not None:
            self._dispatcher.wait_for_link_no_more(self, order.life.worker_id)
            self._stop_waiting()

    def _leave(self, *, is_aborted: bool = True) -> None:
        if self._is_computing:
            self._computed()
        seat, self._seat = self._seat, None
        if seat is not None:
            leave = seat.call.abort if is_aborted else seat.call.let_go
            leave(seat.slot)
            seat.view.num_attempts -= 1
            self._dispatcher.pausing.left(self)

    def _ended(self) -> None:
        """The last attempt is over: not merely unlinked, or about to be adopted."""
        life, self._life = self._life, None
        tried, self._tried = self._tried, None
        if life is not None and tried is not None:
            for callback in self._dispatcher.on_attempt_ended:
                callback(self, life, tried)

    def _stop_waiting(self) -> None:
        self._dispatcher.queue.cancel(self)
        self._dispatcher.room.remove(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
