"""How busy an engine is: what it tells, with what the sidecar knows by itself. No I/O.

An engine that tells nothing is accounted for by what was asked of it. One that tells is believed in
what only it can know (its KV cache, other clients' requests), and not in whether it has work: an
engine whose core hangs goes on saying that it has none.

What it told ages, most of all while it is busy: vLLM's answer may take seconds then. What its
streams produced and gave back since is known from the streams, so that is added:

    blocks in use = what it told + the account now - the account when it told

A stream that it was given since counts with its prompt at once: it is computed in the next step, or
the engine is full. Where an engine tells of each change as it happens, nothing has to be added.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.engines.adapter import Discovered, LoadOfRank
from sidecar.kv_account import num_blocks
from unbroken.v1 import worker_pb2

_COUNT_MAX: Final = 2**32 - 1
"""Of a number in a report."""
_GROWN: Final = 1.5
"""Blocks; a share is not exact."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One attempt that is not over, by the sidecar's own account."""

    num_tokens: int
    """Of prompt and output."""
    has_begun: bool
    """It has had a token, so its prompt is computed."""
    is_paced: bool = False
    """Its window is full: it needs no step."""


def load_report(
    asked: Iterable[Asked],
    told: Mapping[int, LoadOfRank],
    found: Discovered,
    *,
    num_steps: int,
    prefill_tokens_total: int,
    blocks_when_told: int | None = None,
) -> worker_pb2.LoadReport:
    """The load of all ranks. `told` has what ranks said, by number, as far as that is fresh.

    `blocks_when_told` is what `accounted` said then; None: it does not matter.
    """
    attempts = list(asked)
    waiting_tokens = sum(one.num_tokens for one in attempts if not one.has_begun)
    report = worker_pb2.LoadReport(
        engine_steps_total=num_steps,
        prefill_tokens_total=prefill_tokens_total,
        is_computing=any(not one.is_paced for one in attempts),
    )
    kv_blocks = _count(found.kv_blocks)
    for rank in range(found.num_ranks):
        said = told.get(rank)
        entry = report.ranks.add(rank=rank, kv_blocks_total=kv_blocks)
        if said is not None:
            entry.requests_running = _count(said.running)
            entry.requests_waiting = _count(said.waiting)
            since = 0
            if blocks_when_told is not None and found.num_ranks == 1:
                since = accounted(attempts, found) - blocks_when_told
            used = round(min(1.0, max(0.0, said.kv_share)) * kv_blocks) + since
            entry.kv_blocks_used = min(kv_blocks, max(0, used))
            entry.prefill_tokens_queued = _count(said.waiting_tokens or 0)
        elif rank == 0:  # Which rank has what is not known, so all is counted at one.
            num_running = len(attempts)
            if found.batch_size_max:
                num_running = min(num_running, found.batch_size_max)
            entry.requests_running = num_running
            entry.requests_waiting = len(attempts) - num_running
            held = accounted((one for one in attempts if one.has_begun), found)
            entry.kv_blocks_used = min(held, kv_blocks) if kv_blocks else held
        if found.num_ranks == 1:  # Engines count a prompt no more once they began to compute it.
            entry.prefill_tokens_queued = max(entry.prefill_tokens_queued, waiting_tokens)
    return report


def is_news(reported: LoadOfRank | None, load: LoadOfRank, found: Discovered) -> bool:
    """Whether a change is told at once, and not with the next report that is due: more than a block
    came or went, which streams do by growing, or more than that waits, or waits no more."""
    if reported is None:
        return True
    waiting = (load.waiting_tokens or 0) - (reported.waiting_tokens or 0)
    blocks = (load.kv_share - reported.kv_share) * found.kv_blocks
    return max(abs(blocks), abs(waiting) / (found.block_size or 1)) > _GROWN


def accounted(asked: Iterable[Asked], found: Discovered) -> int:
    """KV blocks that streams fill by the sidecar's own account, if none shares any."""
    return num_blocks((one.num_tokens for one in asked), found.block_size or 1)


def _count(told: int) -> int:
    """What an engine counts is its own: nonsense in it is no reason to end its life."""
    return min(max(0, told), _COUNT_MAX)
