"""When workers have enough, so that new work is refused instead of placed: no I/O.

    load report of each rank ──┐
    placed here since then ────┴──▶ over a threshold? ──▶ a worker is busy when all its ranks are
                                                              │
    new work ──▶ to a worker that is not busy, while there is one; else refused, and told when to
                 come back

Only new work is refused. What resumes was admitted before, and the resume queue has a budget for
it. docs/decisions/thresholds.md says what each threshold counts, and why.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from frontend.placement import WorkerView, standing
from frontend.stream import Life
from unbroken.errors import Reason, UnbrokenError
from unbroken.thresholds import (
    NOTHING,
    Engine,
    Excess,
    Given,
    RankState,
    Threshold,
    Thresholds,
    Verdict,
    judge_ranks,
)
from unbroken.v1 import worker_pb2

if TYPE_CHECKING:
    from random import Random

RETRY_AFTER_S_MIN: Final = 0.1
RETRY_AFTER_S_MAX: Final = 30.0
RETRY_AFTER_S_UNKNOWN: Final = 1.0
"""Told when nothing is known of how fast a worker gets rid of what it has."""
RETRY_SPREAD: Final = 0.5
"""Those who are refused are told to come back over so much longer a time, not all at one moment."""
QUEUE: Final = "queue"
"""Named as the threshold where a line is long though no worker is busy any more."""
QUEUE_LIMIT: Final = "queue_limit"
"""Metadata of who was sent away by the line: why."""
MEMORY_S: Final = 10.0
"""What was measured so long ago counts a third."""


def judge(view: WorkerView, thresholds: Thresholds, more: Given = NOTHING) -> Verdict:
    """Which of a worker's ranks are beyond which thresholds, with what was placed there since: by
    this frontend, and as it seems by others; and with `more`.
    """
    crowding = view.crowding
    given = Given(
        round(view.prefill_tokens_placed * crowding) + more.prefill_tokens,
        round(view.blocks_placed * crowding) + more.kv_blocks,
    )
    return judge_ranks(view.ranks, given, thresholds, _engine(view))


def judge_known(view: WorkerView, thresholds: Thresholds) -> Verdict:
    """The same without what others seem to place there."""
    given = Given(view.prefill_tokens_placed, view.blocks_placed)
    return judge_ranks(view.ranks, given, thresholds, _engine(view))


def has_room_for(view: WorkerView, thresholds: Thresholds, num_tokens: int) -> bool:
    """Whether a worker would not be busy with so many tokens more.

    With what would make a worker busy that has nothing, it may be.
    """
    more = Given(num_tokens, -(-num_tokens // view.block_size))
    if thresholds.is_off or not judge(view, thresholds, more).is_busy:
        return True
    empty = [RankState(kv_blocks_total=rank.kv_blocks_total) for rank in view.ranks]
    is_large = judge_ranks(empty, more, thresholds, _engine(view)).is_busy
    return is_large and not judge(view, thresholds).is_busy


def _engine(view: WorkerView) -> Engine:
    return Engine(view.block_size, view.num_ranks, view.prefill_tokens_max)


Busy: TypeAlias = tuple[WorkerView, Verdict]
"""A worker, and what it has too much of."""


class _Outflow:
    """How fast something goes, over the time in which there was some."""

    def __init__(self) -> None:
        self._gone = 0.0
        self._elapsed_s = 0.0
        self._last_at: float | None = None

    @property
    def per_s(self) -> float | None:
        """None while unknown."""
        return self._gone / self._elapsed_s if self._gone and self._elapsed_s else None

    def reported(self, gone: float, *, was_some: bool, now: float) -> None:
        """So much went since the last report, if there was something then."""
        last_at, self._last_at = self._last_at, now
        if last_at is None or not was_some:
            return
        elapsed_s = max(0.0, now - last_at)
        kept = exp(-elapsed_s / MEMORY_S)
        self._gone = self._gone * kept + max(0.0, gone)
        self._elapsed_s = self._elapsed_s * kept + elapsed_s


@dataclass(slots=True)
class _Known:
    """How fast one life of a worker gets rid of what it has."""

    blocks: _Outflow
    tokens: _Outflow
    num_blocks: int = 0
    num_tokens: int = 0
    tokens_total: int = 0

    def reported(self, load: worker_pb2.LoadReport, now: float) -> None:
        blocks = sum(rank.kv_blocks_used for rank in load.ranks)
        tokens = sum(rank.prefill_tokens_queued for rank in load.ranks)
        # What comes hides what goes, unless the engine counts what it computes.
        gone = self.num_tokens - tokens
        if load.prefill_tokens_total and self.tokens_total:
            gone = load.prefill_tokens_total - self.tokens_total
        self.tokens.reported(gone, was_some=self.num_tokens > 0, now=now)
        self.blocks.reported(self.num_blocks - blocks, was_some=self.num_blocks > 0, now=now)
        self.num_blocks, self.num_tokens = blocks, tokens
        self.tokens_total = load.prefill_tokens_total

    def per_s(self, threshold: Threshold) -> float | None:
        flow = self.blocks if threshold is Threshold.KV_BLOCKS_SHARE else self.tokens
        return flow.per_s


@dataclass(slots=True)
class _Fleet:
    """The new work of one model."""

    tokens_mean: float = 0.0
    """Prompt tokens of one attempt that was placed; 0 while unknown."""
    due: float = 0.0
    """When there is room for whoever was refused last."""


class Shedder:
    """Says which workers are busy, and refuses new work when all are. Times are monotonic seconds.

    Those who are refused stand in a line that nobody keeps: each is told to come back when the
    workers will have got rid of the excess and of what those before him bring.
    """

    def __init__(
        self, default: Thresholds, random: "Random", *, prefill_tokens_per_s: float = 20_000.0
    ) -> None:
        """`default` is for models that have no thresholds of their own; a worker that was not
        measured yet is taken to compute so many prompt tokens.
        """
        self._default = default
        self._random = random
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._by_model: Mapping[str, Thresholds] = MappingProxyType({})
        self.version = 0
        """Of the record that says which models have their own."""
        self._known: dict[Life, _Known] = {}
        self._fleets: dict[str, _Fleet] = {}

    # Questions.

    @property
    def default(self) -> Thresholds:
        """Of models that have none of their own."""
        return self._default

    def thresholds_of(self, model: str) -> Thresholds:
        """Those that count for a model."""
        return self._by_model.get(model, self._default)

    def has_own(self, model: str) -> bool:
        """Whether they are not the default."""
        return model in self._by_model

    def detail(self, view: WorkerView) -> str:
        """What the worker has too much of, for people; empty unless it is busy."""
        if not self.is_busy(view):
            return ""
        verdict = judge(view, self.thresholds_of(view.model))
        return ", ".join(map(str, verdict.nearest))

    def is_busy(self, view: WorkerView) -> bool:
        """Whether new work goes there only for want of another worker."""
        thresholds = self.thresholds_of(view.model)
        return not thresholds.is_off and judge(view, thresholds).is_busy

    def refusal(self, model: str, views: Iterable[WorkerView], now: float) -> UnbrokenError | None:
        """Why new work is refused that these workers could take; None if one of them is to take it.

        Workers that may be dead, or fail, are no place for what the others cannot bear: they count
        only where there are no others.
        """
        busy = self.busy(model, views)
        return self.overloaded(model, busy, self._retry_after_s(model, busy, now)) if busy else None

    def busy(self, model: str, views: Iterable[WorkerView]) -> Sequence[Busy]:
        """The workers that new work could go to, if all are busy; else none."""
        thresholds = self.thresholds_of(model)
        if thresholds.is_off:
            return ()
        eligible = list(views)
        best = min((standing(view, ()) for view in eligible), default=None)
        busy: list[Busy] = []
        for view in eligible:
            if standing(view, ()) == best:
                verdict = judge(view, thresholds)
                if not verdict.is_busy:
                    return ()
                busy.append((view, verdict))
        return busy

    def overloaded(
        self,
        model: str,
        busy: Sequence[Busy],
        retry_after_s: float,
        *,
        queue_limit: str = "",
        detail: str = "",
    ) -> UnbrokenError:
        """What whoever is refused is told; `queue_limit` and `detail` are about the line before
        these workers, of which perhaps none is busy any more.
        """
        more = {QUEUE_LIMIT: queue_limit} if queue_limit else {}
        if not busy:
            metadata = {"model": model, "thresholds": QUEUE, QUEUE: detail, **more}
            return UnbrokenError(
                Reason.OVERLOADED, detail, metadata=metadata, retry_after_s=retry_after_s
            )
        waits = [self._wait_s(view, verdict.nearest) for view, verdict in busy]
        view, verdict = min(
            zip(waits, busy, strict=True), key=lambda item: (item[0], item[1][0].life)
        )[1]
        workers = "1 worker is" if len(busy) == 1 else f"all {len(busy)} workers are"
        told = {excess.threshold.value: str(excess) for excess in verdict.nearest}
        shown = f"{workers} busy; {view.life.worker_id}: {', '.join(told.values())}"
        return UnbrokenError(
            Reason.OVERLOADED,
            f"{shown}; {detail}" if detail else shown,
            metadata={"model": model, "thresholds": ",".join(told), **told, **more},
            retry_after_s=retry_after_s,
        )

    def prefill_rate(self, views: Iterable[WorkerView]) -> float:
        """Prompt tokens that these workers get rid of in a second, for all frontends together."""
        tokens = Threshold.PREFILL_TOKENS
        return sum(self._gone_per_s(view.life, tokens) or 0.0 for view in views)

    # Events.

    def changed(self, by_model: Mapping[str, Thresholds], version: int = 0) -> None:
        """Models have these thresholds from now on, by a record of this version; others have the
        default.
        """
        self._by_model = MappingProxyType(dict(by_model))
        self.version = version

    def placed(self, model: str, num_tokens: int) -> None:
        """New work with so many prompt tokens went to a worker."""
        fleet = self._fleets.setdefault(model, _Fleet())
        fleet.tokens_mean += (num_tokens - fleet.tokens_mean) / (10 if fleet.tokens_mean else 1)

    def reported(self, life: Life, load: worker_pb2.LoadReport, now: float) -> None:
        """A worker told its load."""
        known = self._known.get(life)
        if known is None:
            known = self._known[life] = _Known(_Outflow(), _Outflow())
        known.reported(load, now)

    def workers(self, views: Iterable[WorkerView]) -> None:
        """All workers that are known now."""
        lives: set[Life] = set()
        models: set[str] = set()
        for view in views:
            lives.add(view.life)
            models.add(view.model)
        for life in self._known.keys() - lives:
            del self._known[life]
        for model in self._fleets.keys() - models:
            del self._fleets[model]

    # Inside.

    def _retry_after_s(self, model: str, busy: Sequence[Busy], now: float) -> float:
        waits = [self._wait_s(view, verdict.nearest) for view, verdict in busy]
        fleet = self._fleets.setdefault(model, _Fleet())
        fleet.due = max(fleet.due, now + min(waits)) + self._turn_s(fleet, busy)
        fleet.due = min(fleet.due, now + RETRY_AFTER_S_MAX)
        spread = 1 + RETRY_SPREAD * self._random.random()
        return max(RETRY_AFTER_S_MIN, (fleet.due - now) * spread)

    def _wait_s(self, view: WorkerView, excesses: Sequence[Excess]) -> float:
        """How long until the worker is not busy."""
        return max(self._gone_in_s(view.life, one.threshold, one.amount) for one in excesses)

    def _gone_in_s(self, life: Life, threshold: Threshold, amount: float) -> float:
        per_s = self._gone_per_s(life, threshold)
        return amount / per_s if per_s else RETRY_AFTER_S_UNKNOWN

    def _gone_per_s(self, life: Life, threshold: Threshold) -> float | None:
        """KV blocks or prompt tokens that a worker gets rid of in a second; None if unknown."""
        known = self._known.get(life)
        per_s = known.per_s(threshold) if known is not None else None
        if per_s is None and threshold is not Threshold.KV_BLOCKS_SHARE:
            return self._prefill_tokens_per_s
        return per_s

    def _turn_s(self, fleet: _Fleet, busy: Sequence[Busy]) -> float:
        """How long the workers together take to get rid of what one request brings."""
        per_s = 0.0  # Requests.
        for view, verdict in busy:
            paces: list[float] = []
            for excess in verdict.nearest:
                gone_per_s = self._gone_per_s(view.life, excess.threshold)
                if gone_per_s is None or not fleet.tokens_mean:
                    return 0.0
                is_blocks = excess.threshold is Threshold.KV_BLOCKS_SHARE
                need = fleet.tokens_mean / (view.block_size if is_blocks else 1)
                paces.append(gone_per_s / need)
            per_s += min(paces)
        return 1 / per_s
