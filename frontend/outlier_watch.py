"""Feeds the outlier detection, shows its ejections to placement, and sends its probes.

    attempts end, samples come ──▶ Outliers ──▶ Eject, Readmit ──▶ views of workers
                                      ▲  └────▶ Probe ──▶ one token on the worker's link ──┐
                                      └────────────────────────────────────────────────────┘

A probe is a stream like any other, on the link that serves all: it tests what requests will use.
Nobody is billed for it, and it is in no account of requests.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, assert_never

from frontend import outliers
from frontend import stream as machine
from frontend.links import Links
from frontend.mesh_view import MeshView, Worker
from frontend.metrics import FrontendMetrics
from frontend.outliers import Outliers
from frontend.relay_call import RelayCall
from frontend.stream import Attempt, Life, Stream
from unbroken import log
from unbroken.checkpoint import Checkpoint, checkpoint_to_proto
from unbroken.errors import Reason, UnbrokenError
from unbroken.generation import GenerationParams, SamplingParams, StopConditions
from unbroken.outcome import ContinuationPolicy, FailureKind
from unbroken.recurring import nap
from unbroken.v1 import relay_service_pb2

COMPARE_INTERVAL_S: Final = 1.0
_PROBE_PARAMS: Final = GenerationParams(
    SamplingParams(temperature=0.0), StopConditions(max_tokens=1, ignore_eos=True)
)
_PROBE_LIMITS: Final = machine.Limits(migrations_max=0, window_tokens=2)

_log = log.get_logger(__name__)


class OutlierWatch:
    """The shell around `Outliers`; `run` is its clock."""

    def __init__(
        self,
        decisions: Outliers,
        mesh: MeshView,
        links: Links,
        metrics: FrontendMetrics,
        *,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is unique to this life of the frontend; probes are called after it."""
        self._decisions = decisions
        self._mesh = mesh
        self._links = links
        self._metrics = metrics
        self._name = name
        self._clock = clock
        self._probes: dict[str, _Probe] = {}
        """Those that run, by worker."""
        self._num_probes = 0
        self._shown: frozenset[str] = frozenset()
        mesh.on_change.append(self._mesh_changed)

    async def run(self) -> None:
        """Compare workers and probe ejected ones, for ever."""
        while True:
            await nap(COMPARE_INTERVAL_S)
            self._obey(self._decisions.handle_timeout(self._clock()))
            self._show()

    def attempt_ended(self, life: Life, attempt: Attempt) -> None:
        """An attempt is over, well or not."""
        if attempt.is_refused:
            return
        if attempt.failure is not FailureKind.UNSPECIFIED:
            now = self._clock()
            self._obey(self._decisions.failed(life.worker_id, attempt.failure, now))
        elif attempt.end_offset > attempt.first_offset:
            self._decisions.went_well(life.worker_id)
        else:
            return
        self._show()

    def close(self) -> None:
        """End the probes."""
        for probe in list(self._probes.values()):
            probe.give_up("the frontend stops")

    def _mesh_changed(self) -> None:
        workers = self._mesh.workers
        models = {view.life.worker_id: view.model for view in self._mesh.views() if view.is_ready}
        self._decisions.members(models, list(workers))
        self._show(anew=True)

    def _show(self, *, anew: bool = False) -> None:
        """Let placement see who is ejected. `anew`: there may be new views."""
        views = self._mesh.views()
        decisions = self._decisions
        ejected = decisions.ejected
        if ejected == self._shown and not anew:
            return
        self._shown = ejected
        for view in views:
            view.is_ejected = view.life.worker_id in ejected

    def _obey(self, commands: Sequence[outliers.Command]) -> None:
        for command in commands:
            match command:
                case outliers.Eject(worker_id, detail, duration_s):
                    self._metrics.ejections.inc()
                    _log.warning(
                        "worker ejected",
                        worker_id=worker_id,
                        detail=detail,
                        duration_s=round(duration_s, 1),
                    )
                    if worker_id in self._probes:
                        self._probes[worker_id].give_up("it took too long")
                case outliers.Readmit(worker_id):
                    _log.info("worker readmitted", worker_id=worker_id)
                case outliers.Probe(worker_id, number):
                    self._probe(worker_id, number)
                case _:
                    assert_never(command)

    def _probe(self, worker_id: str, number: int) -> None:
        worker = self._mesh.workers.get(worker_id)
        if worker_id in self._probes:
            self._probes[worker_id].give_up("another one begins")

        def done(problem: str | None) -> None:
            self._probes.pop(worker_id, None)
            self._metrics.probed(is_good=problem is None)
            commands = self._decisions.probed(
                worker_id, number, is_good=problem is None, detail=problem or "", now=self._clock()
            )
            self._obey(commands)
            self._show()

        self._num_probes += 1
        if worker is None:
            done("the worker is gone")
            return
        probe = _Probe(f"{self._name}-{self._num_probes}", self._clock, done)
        self._probes[worker_id] = probe
        probe.begin(worker, self._mesh, self._links)


class _Probe:
    """One token from one worker: the owner of a stream that serves nobody."""

    def __init__(
        self, request_id: str, clock: Callable[[], float], done: Callable[[str | None], None]
    ) -> None:
        """`done` is called once, with what went wrong."""
        self._request_id = request_id
        self._clock = clock
        self._done: Callable[[str | None], None] | None = done
        self._seat: tuple[RelayCall, int] | None = None
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        """The stream, once begun."""
        assert self._stream is not None, "only a probe that began has a seat"
        return self._stream

    def begin(self, worker: Worker, mesh: MeshView, links: Links) -> None:
        """Ask for the token."""
        view = worker.view
        model = mesh.model(worker.model)
        call = links.call_to(view.life) if view is not None else None
        if view is None or model is None or call is None:
            self._settle("there is no link to the worker")
            return
        asset = model.tokenizer.asset
        prompt = (asset.bos_token_id or 0,)
        stream = self._stream = Stream(
            Checkpoint(prompt, _PROBE_PARAMS),
            model.tokenizer,
            policy=ContinuationPolicy.NEVER,
            limits=_PROBE_LIMITS,
        )
        now = self._clock()
        stream.start(now)
        request = relay_service_pb2.RelayRequest()
        start = request.start
        for order in stream.placed(stream.epoch, view.life, view.abilities):
            if isinstance(order, machine.Start):
                start.epoch = order.epoch
                start.checkpoint.CopyFrom(checkpoint_to_proto(order.checkpoint))
                start.window_tokens = order.window_tokens
        start.stream.request_id = self._request_id
        start.engine_incarnation = view.life.engine_incarnation
        start.orphan_grace.FromNanoseconds(0)
        start.is_probe = True
        slot = call.start(
            self, request, vocab_size=asset.vocab_size, wants_logprobs=False, num_prefill_tokens=1
        )
        self._seat = (call, slot)

    def give_up(self, why: str) -> None:
        """Nobody waits for it any more."""
        if self._stream is not None:
            self._stream.cancelled(UnbrokenError(Reason.CANCELLED, why))
        self._settle(why)

    # As the owner of a stream.

    def obey(self, commands: Sequence[machine.Command]) -> None:
        """It has one try: whatever the stream asks for, the probe is over."""
        if commands:
            self.wake()
            self._settle("its attempt was lost or refused")

    def wake(self) -> None:
        """There may be an end."""
        outcome = self.stream.outcome
        if outcome is not None:
            self._settle(None if outcome.error is None else outcome.error.detail)

    def crashed(self) -> None:
        """A bug of ours."""
        _log.exception("bug in a probe", request_id=self._request_id)
        self._settle("an internal error of the frontend")

    def _settle(self, problem: str | None) -> None:
        seat, self._seat = self._seat, None
        if seat is not None:
            seat[0].abort(seat[1])
        done, self._done = self._done, None
        if done is not None:
            done(problem)
