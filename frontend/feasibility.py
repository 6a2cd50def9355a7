"""Whether a new request can have its first token before its deadline: no I/O.

What it takes is estimated for each worker that could have it, and the fastest counts:

    its prompt tokens, less what is cached there, at the measured rate, and the steps they fill

Nothing feasible may be refused, so what is not known takes no time: the rate of a worker that was
not measured yet, and the prompts before it, which newcomers may pass by priority or by fairness,
and which may be cancelled. (Who has to wait for a worker is told so by `admission_queue`.) Of the
sum only a share counts, because rates vary.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from frontend.placement import WorkerView, num_cached_tokens
from frontend.step_cost import StepCost
from frontend.stream import Life


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
    num_tokens = max(1, num_tokens)
    num_steps = 1
    if view.prefill_tokens_max:
        num_steps = math.ceil(num_tokens * max(1, view.num_ranks) / view.prefill_tokens_max)
    return num_tokens / rate + num_steps * (cost.step_s or 0.0)
