"""Which worker takes an attempt: a pure choice among views of workers.

The cost of a worker is what the newcomer would wait for and what it would crowd: prefill tokens
that are queued before it or are its own, less what a prefix cache saves, plus the KV blocks held by
others. It is counted in KV blocks, so both halves have one unit.

Reports are always a little old. So that many placements between two reports do not all pick the
same worker, each view also carries what this frontend has placed there since. Heartbeats repeat the
last report, which shows nothing of that.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from frontend.continuation import Abilities
from frontend.stream import Life
from unbroken.thresholds import RankState

REPEATS_BELIEVED: Final = 5
"""A report that is told so often after a placement does show it: the attempt was refused, or ended
before the engine saw it."""

CROWDING_GROWTH: Final = 1.25
CROWDING_DECAY: Final = 0.95
"""With four attempts that are taken for one that is refused, the estimate stays where it is."""
CROWDING_MAX: Final = 16.0


@dataclass(slots=True)
class WorkerView:
    """A worker as this frontend sees it; kept current by the links."""

    life: Life
    model: str
    abilities: Abilities
    block_size: int
    context_length: int
    is_ready: bool = True
    """Its link is up and its engine takes work."""
    is_suspect: bool = False
    """It is silent for longer than it was used to be: taken only if there is no other."""
    is_ejected: bool = False
    """It fails or is slow: taken only if there is no other but suspects."""
    num_ranks: int = 1
    prefill_tokens_max: int = 0
    """Prompt tokens that one step of all ranks computes; 0 if that is not known."""
    ranks: tuple[RankState, ...] = ()
    """Empty before the first report."""
    kv_blocks_used: int = 0
    """Of all ranks."""
    prefill_tokens_queued: int = 0
    blocks_placed: int = 0
    """KV blocks of attempts placed here since the last report."""
    prefill_tokens_placed: int = 0
    crowding: float = 1.0
    """So many times what this frontend places there all of them do, as its refusals show."""
    num_repeats: int = 0
    """Times that the last report was repeated since the last placement."""
    num_attempts: int = 0
    cached_blocks: set[int] = field(default_factory=set[int])
    """Hashes of the prefix blocks it can reuse."""
    memory_service: str = ""
    """Where it keeps KV blocks, and looks for them; empty if it does not."""

    def placed(self, num_tokens: int, num_tokens_cached: int) -> None:
        """Count an attempt that the next report will include."""
        self.num_attempts += 1
        self.crowding = max(1.0, self.crowding * CROWDING_DECAY)
        self.prefill_tokens_placed += num_tokens - num_tokens_cached
        self.blocks_placed += -(-num_tokens // self.block_size)
        self.num_repeats = 0

    def crowded(self) -> None:
        """It refused an attempt: others had been there before."""
        self.crowding = min(CROWDING_MAX, self.crowding * CROWDING_GROWTH)

    def repeated(self) -> None:
        """The last report was told again. What was placed is not in there, unless it has gone."""
        self.num_repeats += 1
        if self.num_repeats == REPEATS_BELIEVED:
            self.blocks_placed = 0
            self.prefill_tokens_placed = 0

    def reported(self, ranks: Sequence[RankState]) -> None:
        """Replace the guesses by the truth."""
        self.ranks = tuple(ranks)
        self.kv_blocks_used = sum(rank.kv_blocks_used for rank in ranks)
        self.prefill_tokens_queued = sum(rank.prefill_tokens_queued for rank in ranks)
        self.blocks_placed = 0
        self.prefill_tokens_placed = 0


@dataclass(frozen=True, slots=True)
class Need:
    """What an attempt needs of a worker."""

    model: str
    num_tokens: int
    """Tokens to compute before the next one: prompt and delivered output."""
    avoid: frozenset[Life] = frozenset()
    """Lives to be taken only if there is no other."""
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    """By memory service: how many of these tokens it is likely to have the KV of."""


def choose(
    workers: Iterable[WorkerView],
    need: Need,
    *,
    is_able: Callable[[WorkerView], bool],
    block_hashes: Callable[[WorkerView], Sequence[int]],
    is_busy: Callable[[WorkerView], bool] = lambda _: False,
) -> WorkerView | None:
    """The cheapest worker that is ready and able; None if there is none now.

    `is_able` tells whether the stream could go on there at all. `block_hashes` are the chained
    hashes of the tokens to compute, in the worker's block size. A worker that failed this stream
    is a last resort rather than taboo: with one worker left, waiting helps nobody. One that is
    ejected is a resort after that, and one that may be dead the very last. Among those of one kind,
    one that is busy is taken only if all are.
    """
    candidates = [
        worker
        for worker in workers
        if worker.is_ready
        and worker.model == need.model
        and worker.context_length > need.num_tokens
        and is_able(worker)
    ]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    ranks = [(standing(worker, need.avoid), is_busy(worker)) for worker in candidates]
    best = min(ranks)
    return min(
        [worker for worker, rank in zip(candidates, ranks, strict=True) if rank == best],
        key=lambda worker: (cost(worker, need, block_hashes(worker)), worker.life),
    )


def standing(worker: WorkerView, avoid: Collection[Life]) -> tuple[bool, bool, bool]:
    """How gladly an attempt is placed there, whatever it costs: the lowest first."""
    return worker.is_suspect, worker.is_ejected, worker.life in avoid


def cost(worker: WorkerView, need: Need, block_hashes: Sequence[int]) -> float:
    """What placing it there costs, in KV blocks."""
    cached = num_known_tokens(worker, need.stored, block_hashes)
    prefill_tokens = (
        worker.prefill_tokens_queued + worker.prefill_tokens_placed + need.num_tokens - cached
    )
    return prefill_tokens / worker.block_size + worker.kv_blocks_used + worker.blocks_placed


def num_known_tokens(
    worker: WorkerView, stored: Mapping[str, int], block_hashes: Sequence[int]
) -> int:
    """Tokens whose KV it need not compute: it has them, or finds them in its memory service."""
    cached = num_cached_tokens(worker.cached_blocks, block_hashes, worker.block_size)
    return max(cached, stored.get(worker.memory_service, 0))


def num_cached_tokens(cached: Collection[int], block_hashes: Sequence[int], block_size: int) -> int:
    """Tokens of the longest prefix whose blocks are all cached."""
    num_blocks = 0
    for block_hash in block_hashes:
        if block_hash not in cached:
            break
        num_blocks += 1
    return num_blocks * block_size
