"""What this frontend knows about workers, models and tokenizers: kept by the links, no I/O.

A worker takes work if its link is up, its engine serves, and its model's tokenizer is here. What
was known about a model outlives its workers, so that a request can wait for one to come back.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

from frontend.admission import Model
from frontend.continuation import Abilities
from frontend.failure_detector import Liveness
from frontend.placement import WorkerView
from frontend.stored_kv import StoredKv
from frontend.stream import Life
from unbroken.checkpoint import Checkpoint
from unbroken.generation import ConstraintKind, GenerationParams
from unbroken.thresholds import rank_states
from unbroken.tokenizer import Tokenizer
from unbroken.v1 import admin_service_pb2, attempt_pb2, relay_service_pb2, worker_pb2

TOKENIZERS_MAX = 16
"""Tokenizers kept while no worker uses them; one of a large vocabulary has about 30 MB."""
MODELS_MAX = 256
"""Models remembered after their last worker has gone."""
CACHED_BLOCKS_MAX = 1_000_000
"""Prefix blocks remembered per worker; beyond it, new ones do not count for placement."""

LinkState = admin_service_pb2.LinkState
EngineState = worker_pb2.EngineState


@dataclass(slots=True)
class Worker:
    """One worker as its link sees it."""

    record: worker_pb2.WorkerRecord
    link_state: LinkState.ValueType = LinkState.LINK_STATE_CONNECTING
    engine_state: EngineState.ValueType = EngineState.ENGINE_STATE_UNSPECIFIED
    engine_incarnation: int = 0
    is_draining: bool = False
    liveness: Liveness = Liveness.UNSPECIFIED
    description: worker_pb2.EngineDescription | None = None
    """Without its kv_holder."""
    kv_holder: worker_pb2.KvHolder | None = None
    """Where other hosts read its KV blocks, with a secret ticket that is renewed in place."""
    view: WorkerView | None = None
    cached_blocks: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    """Hashes of the prefix blocks that each rank can reuse."""
    load: worker_pb2.LoadReport | None = None
    load_at: float = 0.0
    """When the report came, monotonic seconds."""
    detail: str = ""
    """What was last seen of a worker that takes no work, for people."""

    @property
    def worker_id(self) -> str:
        return self.record.identity.worker_id

    @property
    def model(self) -> str:
        """What it serves, or will serve as far as is known."""
        return self.description.model if self.description else self.record.model


def _no_queue(_: str) -> None:
    """Nobody waits here."""


@dataclass(slots=True)
class MeshView:
    """All workers, and what follows from them.

    `on_ready` is called when a worker began to take work; `on_change` whenever the readiness of a
    worker, or which models there are, may have changed; `on_load` when a worker told its load;
    `on_queues` when it passed on what other frontends have in line for its model.
    """

    workers: dict[str, Worker] = field(default_factory=dict[str, Worker])
    on_ready: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    on_change: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    on_load: list[Callable[[Worker], None]] = field(default_factory=list[Callable[[Worker], None]])
    stored: StoredKv = field(default_factory=StoredKv)
    """What memory services have of streams."""
    on_queues: list[Callable[[str, Sequence[relay_service_pb2.QueueReport]], None]] = field(
        default_factory=list[Callable[[str, Sequence[relay_service_pb2.QueueReport]], None]]
    )
    queue_of: Callable[[str], relay_service_pb2.QueueReport | None] = _no_queue
    """What sidecars are told of the line before the workers of a model."""
    _tokenizers: OrderedDict[str, Tokenizer] = field(default_factory=OrderedDict[str, Tokenizer])
    _models: OrderedDict[str, Model] = field(default_factory=OrderedDict[str, Model])
    """What each model was when a worker last served it."""

    # Questions.

    def views(self) -> Iterator[WorkerView]:
        """The workers whose engines are known."""
        return (worker.view for worker in self.workers.values() if worker.view is not None)

    def model_names(self) -> list[str]:
        """Models that are served, were served, or are about to be, by name."""
        announced = {worker.model for worker in self.workers.values() if worker.model}
        return sorted(announced | self._models.keys())

    def model(self, name: str) -> Model | None:
        """What requests for a model are checked against; None before a worker served it."""
        return self._models.get(name)

    def num_workers(self, model: str) -> int:
        """Workers known to serve the model."""
        return sum(worker.model == model for worker in self.workers.values())

    def num_ready(self, model: str) -> int:
        """Workers that take requests for the model."""
        return sum(view.is_ready and view.model == model for view in self.views())

    def tokenizer(self, fingerprint: str) -> Tokenizer | None:
        """The tokenizer with this fingerprint, if it is here."""
        tokenizer = self._tokenizers.get(fingerprint)
        if tokenizer is not None:
            self._tokenizers.move_to_end(fingerprint)
        return tokenizer

    def can_serve(self, view: WorkerView, model: Model, request: Checkpoint) -> bool:
        """Whether a worker understands a resolved request of `model` and does all it asks.

        Admission asks whether any worker of the model does; here it is about this one.
        """
        worker = self.workers.get(view.life.worker_id)
        if worker is None or worker.description is None:
            return False
        params = request.params
        assert params.stopping.max_tokens is not None, "admission resolves max_tokens"
        return (
            worker.description.tokenizer_fingerprint == model.tokenizer_fingerprint
            and view.context_length >= len(request.prompt_token_ids) + params.stopping.max_tokens
            and _honours(worker.description.capabilities, params)
        )

    # News.

    def add_tokenizer(self, fingerprint: str, tokenizer: Tokenizer) -> None:
        """Keep a tokenizer; workers that waited for it become ready."""
        self._tokenizers[fingerprint] = tokenizer
        used = {one.tokenizer_fingerprint for w in self.workers.values() if (one := w.description)}
        unused = [known for known in self._tokenizers if known not in used]
        for known in unused[: max(0, len(self._tokenizers) - TOKENIZERS_MAX)]:
            del self._tokenizers[known]
        for worker in self.workers.values():
            self.refresh(worker)

    def discovered(self, record: worker_pb2.WorkerRecord) -> Worker:
        """A worker, or a new life of one, was announced."""
        worker = Worker(record)
        self.workers[worker.worker_id] = worker
        self._notify()
        return worker

    def forgotten(self, worker_id: str) -> None:
        """A worker is gone for good."""
        if self.workers.pop(worker_id, None) is not None:
            self._notify()

    def report_load(self, worker: Worker, load: worker_pb2.LoadReport, now: float) -> None:
        """Count what a worker says about its load."""
        view = worker.view
        is_repeated = view is not None and bool(view.ranks) and load == worker.load
        worker.load, worker.load_at = load, now
        if view is None:
            return
        if load.kv_store.is_off:
            view.memory_service = ""  # What it needs it computes.
        if is_repeated:
            view.repeated()
        else:
            view.reported(rank_states(load))
        for callback in self.on_load:
            callback(worker)

    def report_queues(
        self, worker: Worker, reports: Sequence[relay_service_pb2.QueueReport]
    ) -> None:
        """Count what waits at other frontends."""
        if worker.description is not None:
            for callback in self.on_queues:
                callback(worker.model, reports)

    def report_busy(self, worker: Worker, verdict: attempt_pb2.BusyVerdict, now: float) -> None:
        """Count what a worker that refused new work has, what others sent there included.

        It is no report of the engine: who measures engines is not told.
        """
        if worker.view is not None and verdict.HasField("load"):
            worker.load, worker.load_at = verdict.load, now
            worker.view.reported(rank_states(verdict.load))
            worker.view.crowded()

    def refresh(self, worker: Worker) -> None:
        """Derive anew whether the worker takes work, after its link or engine changed."""
        if self.workers.get(worker.worker_id) is not worker:
            return  # News of an earlier life.
        was_ready = worker.view is not None and worker.view.is_ready
        description = worker.description
        life = Life(worker.worker_id, worker.record.identity.incarnation, worker.engine_incarnation)
        if description is not None and (worker.view is None or worker.view.life != life):
            worker.view = WorkerView(
                life=life,
                model=description.model,
                abilities=abilities_of(description),
                block_size=description.block_size,
                context_length=description.context_length,
                num_ranks=max(1, description.num_ranks),
                prefill_tokens_max=description.prefill_tokens_max,
                is_ready=False,
                memory_service=(
                    description.memory_service if description.capabilities.kv_restore else ""
                ),
            )
            worker.cached_blocks.clear()
        is_ready = (
            worker.link_state == LinkState.LINK_STATE_UP
            and worker.engine_state == EngineState.ENGINE_STATE_SERVING
            and not worker.is_draining
            and description is not None
            and description.tokenizer_fingerprint in self._tokenizers
        )
        if worker.view is not None:
            worker.view.is_ready = is_ready
            worker.view.is_suspect = worker.liveness is Liveness.SUSPECT
        if is_ready and description is not None:
            self._remember(description)
        self._notify()
        if is_ready and not was_ready:
            for callback in self.on_ready:
                callback()

    def _remember(self, served: worker_pb2.EngineDescription) -> None:
        tokenizer = self._tokenizers[served.tokenizer_fingerprint]
        peers = [
            one
            for worker in self.workers.values()
            if (one := worker.description) is not None
            and one.model == served.model
            and one.tokenizer_fingerprint == served.tokenizer_fingerprint
        ]
        able = [peer.capabilities for peer in peers]
        self._models[served.model] = Model(
            name=served.model,
            tokenizer=tokenizer,
            tokenizer_fingerprint=served.tokenizer_fingerprint,
            context_length=max(peer.context_length for peer in peers),
            abilities=tuple(dict.fromkeys(abilities_of(peer) for peer in peers)),
            has_logit_bias=any(one.logit_bias for one in able),
            constraints=frozenset(
                kind
                for one in able
                for kind in get_args(ConstraintKind)
                if getattr(one.constraints, kind)
            ),
            has_logprobs=any(one.logprobs for one in able),
            seed_bits=min((one.seed_bits for one in able if one.seed_bits), default=64),
        )
        self._models.move_to_end(served.model)
        while len(self._models) > MODELS_MAX:
            self._models.popitem(last=False)

    def _notify(self) -> None:
        for callback in self.on_change:
            callback()


def _honours(able: worker_pb2.EngineCapabilities, params: GenerationParams) -> bool:
    """Whether an engine does what these parameters ask."""
    sampling, constraint = params.sampling, params.constraint
    if sampling.logit_bias and not able.logit_bias:
        return False
    if params.num_top_logprobs is not None and not able.logprobs:
        return False
    if constraint is not None and not getattr(able.constraints, constraint.kind):
        return False
    # Engines that take no seeds sample by their own; others refuse larger ones.
    seed = None if sampling.is_greedy else sampling.seed
    return seed is None or not able.seed_bits or seed.bit_length() <= able.seed_bits


def abilities_of(description: worker_pb2.EngineDescription) -> Abilities:
    """What an engine can do for a continuation."""
    able = description.capabilities
    return Abilities(
        numerics_id=description.numerics.id,
        is_invariant=description.numerics.batch_invariant and description.numerics.split_invariant,
        has_native_resume=able.native_resume,
        has_seeds=able.seed_bits > 0,
        has_positional_random=able.random_source
        == worker_pb2.RandomSource.RANDOM_SOURCE_POSITIONAL,
        repetition_penalty_counts_prompt=able.repetition_penalty_counts_prompt,
        has_logit_bias=able.logit_bias,
    )


def report_blocks(worker: Worker, events: worker_pb2.KvEvents) -> None:
    """Count which prefixes a rank can reuse; the view has those that any rank can."""
    if worker.view is None or worker.description is None:
        return
    if events.rank >= max(1, worker.description.num_ranks):
        return  # A rank that does not exist helps nobody.
    ranks = worker.cached_blocks
    blocks = ranks.setdefault(events.rank, set())
    removed: set[int] = set(events.removed)
    if events.reset:
        removed |= blocks
    blocks -= removed
    removed.difference_update(*ranks.values())
    stored = events.stored[: CACHED_BLOCKS_MAX - len(worker.view.cached_blocks)]
    blocks.update(stored)
    worker.view.cached_blocks -= removed
    worker.view.cached_blocks.update(stored)
