"""What a worker may have before it is busy, and whether it has more: no I/O.

    load of each rank ─────────────┐
    given to the worker since then ┴──▶ over a threshold? ──▶ busy, when all ranks of a worker are

Frontends place by it, and a sidecar refuses by it: docs/decisions/thresholds.md says what each
threshold counts, and why.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite
from types import MappingProxyType
from typing import Final, NamedTuple

from unbroken.errors import InvalidField
from unbroken.v1 import worker_pb2

PREFILL_TOKENS_MAX: Final = 2**53
"""More cannot be told exactly in JSON."""
PREFILL_SHARE_MAX: Final = 1000.0


class Threshold(StrEnum):
    """What may be limited. The names are those of the fields of `Thresholds`."""

    KV_BLOCKS_SHARE = "kv_blocks_share"
    PREFILL_TOKENS = "prefill_tokens"
    PREFILL_SHARE = "prefill_share"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a data-parallel rank may have before it is busy: more than any of them. None is off."""

    kv_blocks_share: float | None = None
    """Of its KV blocks that running streams hold, or waiting ones are about to; 0 to 1."""
    prefill_tokens: int | None = None
    """Prompt tokens that it has not computed yet."""
    prefill_share: float | None = None
    """The same, in prompt tokens that it can compute in one step."""

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever busy."""
        return (
            self.kv_blocks_share is None
            and self.prefill_tokens is None
            and self.prefill_share is None
        )

    def raised(self, num_tokens: float, batch: float) -> "Thresholds":
        """With room for so many prompt tokens more; `batch` is what a rank computes in one step."""
        tokens, share = self.prefill_tokens, self.prefill_share
        return Thresholds(
            self.kv_blocks_share,
            None if tokens is None else tokens + int(num_tokens),
            None if share is None or not batch else share + num_tokens / batch,
        )

    def check(self) -> None:
        """Raises `InvalidField`, which names the field."""
        for field in fields(self):
            highest = _HIGHEST[field.name]
            value: float | None = getattr(self, field.name)
            if value is not None and not (isfinite(value) and 0 <= value <= highest):
                raise InvalidField(f"thresholds.{field.name}", f"0 to {highest:.16g}", value)


_HIGHEST: Final[Mapping[str, float]] = MappingProxyType(
    {
        "kv_blocks_share": 1.0,
        "prefill_tokens": PREFILL_TOKENS_MAX,
        "prefill_share": PREFILL_SHARE_MAX,
    }
)

OFF: Final = Thresholds()


class RankState(NamedTuple):
    """What a data-parallel rank reported last; a tuple, because reports come with every step."""

    kv_blocks_total: int = 0
    """0 if it does not say."""
    kv_blocks_used: int = 0
    prefill_tokens_queued: int = 0
    requests_waiting: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """What thresholds need to know of an engine."""

    block_size: int
    num_ranks: int = 1
    prefill_tokens_max: int = 0
    """Prompt tokens that one step of all ranks computes; 0 if that is not known."""

    @property
    def batch(self) -> float:
        """The same, of one rank."""
        return self.prefill_tokens_max / max(1, self.num_ranks)


@dataclass(frozen=True, slots=True)
class Given:
    """What a worker was given that its report does not show yet."""

    prefill_tokens: int = 0
    kv_blocks: int = 0


NOTHING: Final = Given()


@dataclass(frozen=True, slots=True)
class Excess:
    """One rank has more of something than it may."""

    threshold: Threshold
    rank: int
    seen: float
    """In the unit of the threshold: a share, or tokens."""
    limit: float
    amount: float
    """What has to go until the rank is not busy by it: KV blocks, or tokens."""

    @property
    def ratio(self) -> float:
        """How many times the limit it is."""
        return self.seen / self.limit if self.limit else float("inf")

    def __str__(self) -> str:
        return f"{self.threshold} of rank {self.rank} is {self.seen:.4g}, above {self.limit:.4g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a worker has too much of: a tuple for each rank, empty if it takes work."""

    ranks: tuple[tuple[Excess, ...], ...]

    @property
    def is_busy(self) -> bool:
        """Whether every rank has too much of something."""
        return all(self.ranks)

    @property
    def nearest(self) -> tuple[Excess, ...]:
        """The excesses of the rank that is least beyond its limits; empty unless busy."""
        return min(self.ranks, key=_farthest) if self.is_busy else ()


def _farthest(excesses: Sequence[Excess]) -> float:
    return max(excess.ratio for excess in excesses)


def judge_ranks(
    ranks: Sequence[RankState], given: Given, thresholds: Thresholds, engine: Engine
) -> Verdict:
    """Which of a worker's ranks are beyond which thresholds. `ranks` is empty before it reported.

    What it was given counts for the ranks that have least, since engines balance them. A threshold
    whose measure the engine does not tell is not exceeded.
    """
    num_ranks = max(1, engine.num_ranks)
    states = ranks or (RankState(),) * num_ranks
    tokens = shared_out([rank.prefill_tokens_queued for rank in states], given.prefill_tokens)
    blocks = shared_out([_blocks(rank, engine.block_size) for rank in states], given.kv_blocks)
    batch = engine.batch
    return Verdict(
        tuple(
            tuple(_excesses(index, thresholds, state, tokens[index], blocks[index], batch))
            for index, state in enumerate(states)
        )
    )


def _excesses(
    index: int,
    thresholds: Thresholds,
    state: RankState,
    tokens: float,
    blocks: float,
    batch: float,
) -> Iterable[Excess]:
    limit: float | None = thresholds.kv_blocks_share
    total = state.kv_blocks_total
    if limit is not None and total and blocks > limit * total:
        amount = blocks - limit * total
        yield Excess(Threshold.KV_BLOCKS_SHARE, index, blocks / total, limit, amount)
    limit = thresholds.prefill_tokens
    if limit is not None and tokens > limit:
        yield Excess(Threshold.PREFILL_TOKENS, index, tokens, limit, tokens - limit)
    limit = thresholds.prefill_share
    if limit is not None and batch and tokens > limit * batch:
        amount = tokens - limit * batch
        yield Excess(Threshold.PREFILL_SHARE, index, tokens / batch, limit, amount)


def _blocks(rank: RankState, block_size: int) -> float:
    """KV blocks that are held, or are about to be.

    Streams that wait for a place in the batch hold none yet. Without them, a pool that is nearly
    full would look the same however many stand before it.
    """
    if not rank.requests_waiting:
        return rank.kv_blocks_used
    return rank.kv_blocks_used + rank.prefill_tokens_queued / block_size


def shared_out(held: Sequence[float], more: float) -> Sequence[float]:
    """What each has after `more` went to those who held least, up to one level."""
    if not more:
        return held
    if len(held) == 1:
        return [held[0] + more]
    rising = sorted(held)
    level = rising[0]
    for num, following in enumerate([*rising[1:], float("inf")], start=1):
        room = num * (following - level)
        if more <= room:
            level += more / num
            break
        more -= room
        level = following
    return [max(amount, level) for amount in held]


def rank_states(load: worker_pb2.LoadReport) -> list[RankState]:
    """What a report says of each rank."""
    return [
        RankState(
            kv_blocks_total=rank.kv_blocks_total,
            kv_blocks_used=rank.kv_blocks_used,
            prefill_tokens_queued=rank.prefill_tokens_queued,
            requests_waiting=rank.requests_waiting,
        )
        for rank in load.ranks
    ]


def from_proto(message: worker_pb2.BusyThresholds) -> Thresholds:
    """Unchecked."""
    return Thresholds(
        message.kv_blocks_share if message.HasField("kv_blocks_share") else None,
        message.prefill_tokens if message.HasField("prefill_tokens") else None,
        message.prefill_share if message.HasField("prefill_share") else None,
    )


def to_proto(thresholds: Thresholds) -> worker_pb2.BusyThresholds:
    """The same in the contract."""
    return worker_pb2.BusyThresholds(
        kv_blocks_share=thresholds.kv_blocks_share,
        prefill_tokens=thresholds.prefill_tokens,
        prefill_share=thresholds.prefill_share,
    )
