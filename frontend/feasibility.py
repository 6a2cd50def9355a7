"""Whether a new request can have its first token before its deadline: no I/O.

What it takes is estimated for each worker that could have it, and the fastest counts:

    its prompt tokens, less what is cached there, and half of those before it: at the measured rate,
    and a step for each that is filled by them

Nothing feasible may be refused, so what is not known takes no time: the rate of a worker that was
not measured yet, and the line of one where streams wait for the batch, since newcomers may pass
them by priority or by fairness. Those in the batch count half, since they may leave. Of the sum
only a share counts, because rates vary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from frontend.placement import WorkerView, num_cached_tokens
from frontend.step_cost import StepCost
from frontend.stream import Life

QUEUED_SHARE: Final = 0.5


def first_token_s(
    workers: Iterable[WorkerView],
    num_tokens: int,
    *,
    cost_of: Callable[[Life], StepCost | None],
    block_hashes: Callable[[WorkerView], Sequence[int]],
) -> float:
    """The estimate for a prompt of so many tokens; 0 where it is not known, or without workers.

    `block_hashes` are the chained hashes of the prompt in a worker's block size; they are asked for
    only where something is cached.
    """
    return min(
        (_at(view, num_tokens, cost_of(view.life), block_hashes) for view in workers), default=0.0
    )


def _at(
    view: WorkerView,
    num_tokens: int,
    cost: StepCost | None,
    block_hashes: Callable[[WorkerView], Sequence[int]],
) -> float:
    rate = cost.prefill_tokens_per_s if cost is not None else None
    if cost is None or rate is None:
        return 0.0
    if view.cached_blocks:
        hashes = block_hashes(view)
        num_tokens -= num_cached_tokens(view.cached_blocks, hashes, view.block_size)
    if not any(rank.requests_waiting for rank in view.ranks):
        # All of it is in the batch, where prompts are computed in the order of their coming. Other
        # ranks compute theirs at the same time.
        queued = min((rank.prefill_tokens_queued for rank in view.ranks), default=0)
        num_tokens += int(QUEUED_SHARE * queued)
    num_tokens = max(1, num_tokens)
    num_steps = 1
    if view.prefill_tokens_max:
        num_steps = math.ceil(num_tokens * max(1, view.num_ranks) / view.prefill_tokens_max)
    return num_tokens / rate + num_steps * (cost.step_s or 0.0)
