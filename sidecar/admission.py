"""Whether new work gets to the engine: the thresholds of all frontends, on all that it has. No I/O.

    report of the engine ──────────────┐
    given to it since: by all frontends┴──▶ busy? ──▶ new work is refused, and told what there is

Each frontend places by what it sees, which is a little old and shows nothing of what others place
meanwhile. Here everything passes, so a threshold is passed by the one request that crosses it,
however many frontends there are; or, by tenants that have no prompt before the engine, or had less
computed lately than another has, up to one batch of the engine, so that one tenant's line is not
another's. Only new work is refused: what was admitted before counts, and gets in.
docs/decisions/thresholds.md says why.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from sidecar.recent_use import RecentUse
from unbroken.thresholds import (
    OFF,
    Engine,
    Given,
    RankState,
    Thresholds,
    Verdict,
    judge_ranks,
    rank_states,
    shared_out,
)
from unbroken.v1 import worker_pb2

LinkT = TypeVar("LinkT", bound=Hashable)
"""What stands for one Relay call."""

KEPT_S: Final = 0.05
"""After a report that shows room it is kept so long for tenants that were refused and had less
lately than others: frontends hear of it at that moment."""
KEPT_MAX: Final = 1024
OTHERS_S: Final = 1.0
"""So long after prompts of several tenants were before the engine they are expected again."""
REPORTS_BELIEVED: Final = 2
"""Of an engine that does not say how far it has read, so many reports of progress after an attempt
was given to it show it: the first may be of a step that began before."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one frontend says that the worker may have."""

    thresholds: Thresholds = OFF
    version: int = 0


@dataclass(frozen=True, slots=True)
class _Fresh:
    """An attempt that no report shows yet."""

    prefill_tokens: int
    kv_blocks: int
    num_reports: int
    """That had come when it was given to the engine."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Why new work is refused."""

    told: Told
    verdict: Verdict
    is_kept: bool = False
    """There is room, and it is for another tenant."""

    def __str__(self) -> str:
        if self.is_kept:
            return "room is kept for a tenant that had less lately"
        return ", ".join(map(str, self.verdict.nearest))


class Admission(Generic[LinkT]):
    """What the engine of one worker has and may have."""

    def __init__(self) -> None:
        self._told: dict[LinkT, Told] = {}
        self._engine = Engine(block_size=1)
        self._ranks: tuple[RankState, ...] = ()
        self._steps_total = 0
        self._num_reports = 0
        self._fresh: dict[int, _Fresh] = {}  # By slot, which ascend.
        self._prefill_tokens = 0  # Of all of them,
        self._kv_blocks = 0  # and what they will fill.
        self._tenants: dict[int, tuple[str, int]] = {}  # By slot, of prompts not computed yet,
        self._prefilling = Counter[str]()  # and how many tokens of them each tenant has.
        self._recent = RecentUse()
        self._kept: dict[str, float | None] = {}
        """Tenants for which room is kept, until when; None: until the next report and a while."""
        self._others_until = float("-inf")
        """Until when the engine counts as one that several tenants want."""

    # Questions.

    @property
    def given(self) -> Given:
        """What the engine was given and has not shown."""
        return Given(self._prefill_tokens, self._kv_blocks)

    @property
    def given_by_slot(self) -> Mapping[int, int]:
        """The KV blocks of that, by attempt."""
        return {slot: fresh.kv_blocks for slot, fresh in self._fresh.items()}

    @property
    def num_ranks(self) -> int:
        """Of the engine."""
        return max(1, self._engine.num_ranks)

    def thresholds_for(self, link: LinkT) -> Told:
        """What counts for the new work of a frontend."""
        own = self._told.get(link, Told())
        newest = max(self._told.values(), key=lambda told: told.version, default=own)
        return newest if newest.version > own.version else own

    def reason_to_refuse(
        self, link: LinkT, tenant: str, num_tokens: int, now: float
    ) -> Busy | None:
        """Why new work of a frontend with so many prompt tokens is refused now, if it is."""
        if not self._told:
            return None
        told = self.thresholds_for(link)
        if told.thresholds.is_off:
            return None
        verdict = judge_ranks(self._ranks, self.given, told.thresholds, self._engine)
        mine, batch = self._prefilling[tenant], self._engine.batch
        if not verdict.is_busy:
            if mine and self._is_kept(tenant, now):
                return Busy(told, verdict, is_kept=True)
            if len(self._prefilling) > 1:
                self._others_until = now + OTHERS_S
            if now < self._others_until and not self._is_modest(tenant, num_tokens, now):
                # As long as there are others, one that has more than they crosses no threshold.
                lowered = told.thresholds.raised(-num_tokens, batch)
                if judge_ranks(self._ranks, self.given, lowered, self._engine).is_busy:
                    return Busy(told, verdict, is_kept=True)
            return None
        is_kept = mine > 0 and self._is_kept(tenant, now)
        if num_tokens < batch and not is_kept and self._is_modest(tenant, num_tokens, now):
            # The last batch is for those who have less than others.
            raised = told.thresholds.raised(batch - num_tokens, batch)
            if not judge_ranks(self._ranks, self.given, raised, self._engine).is_busy:
                return None
        recent = self._recent
        if (
            len(self._kept) < KEPT_MAX
            and tenant not in self._kept
            and recent.of(tenant, now) < recent.most_of_others(tenant, now)
        ):
            self._kept[tenant] = None
        return Busy(told, verdict)

    def _is_modest(self, tenant: str, num_tokens: int, now: float) -> bool:
        """Whether a tenant has nothing before the engine, or with so many tokens more would have
        had no more lately than another.
        """
        if not self._prefilling[tenant]:
            return True
        recent = self._recent
        return recent.of(tenant, now) + num_tokens <= recent.most_of_others(tenant, now)

    def _is_kept(self, tenant: str, now: float) -> bool:
        """Whether room is kept for a tenant that was refused, and had less lately."""
        mine = self._recent.of(tenant, now)
        for name, until in list(self._kept.items()):
            if until is not None and until <= now:
                del self._kept[name]
            elif name != tenant and self._recent.of(name, now) < mine:
                return True
        return False

    def load(
        self, reported: worker_pb2.LoadReport | None, busy: Busy | None = None
    ) -> worker_pb2.LoadReport:
        """The latest report, with what the engine was given since; and if room is kept for others,
        as if it were used.
        """
        load = worker_pb2.LoadReport()
        if reported is not None:
            load.CopyFrom(reported)
        while len(load.ranks) < self.num_ranks:
            load.ranks.add(rank=len(load.ranks))
        tokens = shared_out([r.prefill_tokens_queued for r in load.ranks], self._prefill_tokens)
        blocks = shared_out([r.kv_blocks_used for r in load.ranks], self._kv_blocks)
        for rank, num_tokens, num_blocks in zip(load.ranks, tokens, blocks, strict=True):
            rank.prefill_tokens_queued = round(num_tokens)
            rank.kv_blocks_used = round(num_blocks)
            if busy is not None and busy.is_kept:
                self._fill(rank, busy.told.thresholds)
        return load

    def _fill(self, rank: worker_pb2.RankLoad, thresholds: Thresholds) -> None:
        """Have it look over the thresholds."""
        tokens, share = thresholds.prefill_tokens, thresholds.prefill_share
        limits = [tokens] if tokens is not None else []
        if share is not None and self._engine.batch:
            limits.append(int(share * self._engine.batch))
        if limits:
            rank.prefill_tokens_queued = max(rank.prefill_tokens_queued, min(limits) + 1)
        elif thresholds.kv_blocks_share is not None:
            limit = int(thresholds.kv_blocks_share * rank.kv_blocks_total)
            rank.kv_blocks_used = max(rank.kv_blocks_used, limit + 1)

    # Events.

    def told(self, link: LinkT, told: Told) -> None:
        """A frontend said what the worker may have. Raises `InvalidField`."""
        told.thresholds.check()
        self._told[link] = told

    def left(self, link: LinkT) -> None:
        """Its call is over. Idempotent."""
        self._told.pop(link, None)

    def up(self, description: worker_pb2.EngineDescription) -> None:
        """The engine begins, with nothing."""
        self._engine = Engine(
            block_size=max(1, description.block_size),
            num_ranks=max(1, description.num_ranks),
            prefill_tokens_max=description.prefill_tokens_max,
        )
        self._ranks = ()
        self._fresh.clear()
        self._tenants.clear()
        self._kept.clear()
        self._prefilling.clear()
        self._prefill_tokens = self._kv_blocks = self._steps_total = 0

    def began(self, slot: int, num_tokens: int, tenant: str, now: float) -> None:
        """The engine was given an attempt."""
        self._kept.pop(tenant, None)
        self._recent.began(tenant, num_tokens, now)
        if num_tokens:
            self._tenants[slot] = tenant, num_tokens
            self._prefilling[tenant] += num_tokens
        num_blocks = -(-num_tokens // self._engine.block_size)
        self._fresh[slot] = _Fresh(num_tokens, num_blocks, self._num_reports)
        self._prefill_tokens += num_tokens
        self._kv_blocks += num_blocks

    def computed(self, slot: int) -> None:
        """The prompt of an attempt is computed. What it holds is told by the next report."""
        self._left_prefill(slot)
        fresh = self._fresh.get(slot)
        if fresh is not None:
            self._prefill_tokens -= fresh.prefill_tokens
            self._fresh[slot] = replace(fresh, prefill_tokens=0)

    def over(self, slot: int) -> None:
        """An attempt has ended, or did not begin. Idempotent."""
        self._left_prefill(slot)
        self._shown(slot)

    def _left_prefill(self, slot: int) -> None:
        tenant, num_tokens = self._tenants.pop(slot, ("", 0))
        if num_tokens:
            self._prefilling[tenant] -= num_tokens
            if not self._prefilling[tenant]:
                del self._prefilling[tenant]

    def _shown(self, slot: int) -> None:
        """A report counts it, or nothing does any more."""
        fresh = self._fresh.pop(slot, None)
        if fresh is not None:
            self._prefill_tokens -= fresh.prefill_tokens
            self._kv_blocks -= fresh.kv_blocks

    def reported(self, load: worker_pb2.LoadReport, slot_seen: int, now: float) -> None:
        """The engine told its load; it had dealt with slots up to `slot_seen`, if that is not 0."""
        for name, until in self._kept.items():
            if until is None:
                self._kept[name] = now + KEPT_S
        self._ranks = tuple(rank_states(load))
        if load.engine_steps_total > self._steps_total:
            self._steps_total = load.engine_steps_total
            self._num_reports += 1
        shown_before = self._num_reports - REPORTS_BELIEVED
        while self._fresh:
            slot, fresh = next(iter(self._fresh.items()))
            is_shown = slot <= slot_seen if slot_seen else fresh.num_reports <= shown_before
            if not is_shown:
                break
            self._shown(slot)

    def check(self) -> None:
        """Assert what is always true."""
        fresh = self._fresh.values()
        assert self._prefill_tokens == sum(one.prefill_tokens for one in fresh)
        assert self._kv_blocks == sum(one.kv_blocks for one in fresh)
        tokens = Counter[str]()
        for tenant, num_tokens in self._tenants.values():
            tokens[tenant] += num_tokens
        assert self._prefilling == tokens, "tenants are counted"
        assert list(self._fresh) == sorted(self._fresh), "slots ascend"
