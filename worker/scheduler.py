"""Decides what shares each step of the engine, and what of its output goes where.

Continuous batching: every step computes one token of each sequence that decodes, and a bounded
number of prompt tokens of those that have just begun.

            submit            room in batch and memory           prompt computed
    (new) ─────────▶ WAITING ─────────────────────────▶ PREFILL ─────────────────▶ DECODE
                      ▲  ▲      no room left: the last in line loses its blocks     │  ▲
                      │  └──────────────────────────────┴───────────────────────────┤  │
                      │ window moved, batch full                        window full │  │ window
                      └────────────────────────────── PAUSED ◀──────────────────────┘  │ moved
                                                        └──────────────────────────────┘
    any ──▶ DONE by its own end, abort, deadline or failure

A sequence that lost its blocks keeps its tokens and sampler, and recomputes its KV later as one
that was given past output does, so it goes on exactly. PAUSED sequences hold their blocks until
somebody needs them.

The line is ordered by priority, then by fair turns of the tenants (start-time fair queueing, Goyal
et al., 1996, with prompt tokens as cost), then by arrival. A sequence keeps its place for life.
Prompts are computed in that order too, so that a tenant's many do not stand before another's one.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from unbroken.blocks import BlockChain
from unbroken.generation import TokenLogprobs
from unbroken.holdings import Kind
from unbroken.v1 import attempt_pb2, generation_pb2, worker_pb2
from worker import kv_cache
from worker.engine import EngineSpec, KvRestore, KvSave, PrefillChunk, StepPlan, StepResult
from worker.engine import Sequence as Stream
from worker.kv_cache import KvCache, Lease

# A rank may be so many sequences busier than the idlest and still be chosen for the prefix it has.
_RANK_SLACK = 4

_Place: TypeAlias = tuple[int, float, int]
"""In line: negated priority, the tenant's virtual start, number of arrival. Lower goes first."""


class State(Enum):
    """Where a sequence stands; see the drawing above."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    PAUSED = auto()
    DONE = auto()


@dataclass(eq=False, slots=True)
class _Standing:
    """What the scheduler knows of a sequence."""

    rank: "_Rank"
    place: _Place
    chain: BlockChain
    """Hashes of its full blocks; it may lag behind its tokens."""
    window_end: int
    """It pauses when its output has so many tokens."""
    state: State = State.WAITING
    lease: Lease | None = None
    num_computed: int = 0
    """In PREFILL: tokens whose KV is there."""
    num_known: int = 0
    """In PREFILL: tokens that have to be computed before the next is sampled."""
    is_first_prefill: bool = True
    """No tokens were produced yet, so what is prefilled is what was given."""
    prefill_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    may_restore: bool = False
    """In PREFILL: the memory service is to be asked before anything is computed."""
    num_saved: int = 0
    """Blocks at its beginning that the memory service was given, or that came from there."""


@dataclass(slots=True)
class Outcome:
    """What became of the sequences, in columns, since the last outcome was taken."""

    slots: list[int] = field(default_factory=list[int])
    offsets: list[int] = field(default_factory=list[int])
    token_ids: list[int] = field(default_factory=list[int])
    """Row i: the sequence `slots[i]` produced `token_ids[i]`, at `offsets[i]` of its stream."""
    logprobs: list[tuple[int, TokenLogprobs]] = field(
        default_factory=list[tuple[int, TokenLogprobs]]
    )
    """By slot."""
    ended: list[attempt_pb2.AttemptEnded] = field(default_factory=list[attempt_pb2.AttemptEnded])
    """After the tokens above."""


@dataclass(frozen=True, slots=True)
class Held:
    """One thing that a sequence holds."""

    kind: Kind
    slot: int | None
    """Of the sequence; None: nobody holds it, and it could not be reused either."""
    amount: int = 1
    detail: str = ""


class Scheduler:
    """Schedules one engine. One step at a time: `plan`, execute, `commit`.

    Between `plan` and `commit`, sequences may be submitted, aborted and acknowledged.
    """

    def __init__(self, spec: EngineSpec, *, waiting_max: int = 16_384) -> None:
        """Begin without sequences; `waiting_max` bounds how many may be in line."""
        self._spec = spec
        self._waiting_max = waiting_max
        self._ranks = [_Rank(spec, kv_cache.for_spec(spec)) for _ in range(spec.num_ranks)]
        self._streams: dict[int, Stream] = {}  # By slot.
        self._deadlines: list[tuple[float, int]] = []  # Heap, with slots that may be over.
        self._num_arrived = 0
        self._virtual_now = 0.0
        self._tenant_end: dict[str, float] = {}  # Virtual time at which its turns so far end.
        self._outcome = Outcome()
        self.num_steps = 0
        self.num_prefill_tokens = 0
        """Computed so far, those computed again included."""

    # What comes in.

    def submit(self, stream: Stream) -> bool:
        """Take a sequence; False if too many are waiting."""
        assert stream.slot not in self._streams, "a slot is used once"
        if sum(rank.num_waiting for rank in self._ranks) >= self._waiting_max:
            return False
        chain = BlockChain(self._spec.block_size, root=stream.kv_root)
        rank = self._choose_rank(stream, chain)
        stream.standing = _Standing(
            rank=rank,
            place=self._place(stream),
            chain=chain,
            window_end=_window_end(stream, stream.first_offset),
        )
        self._streams[stream.slot] = stream
        if stream.deadline is not None:
            heapq.heappush(self._deadlines, (stream.deadline, stream.slot))
        rank.wait(stream)
        self._end_if_complete(stream)
        return True

    def abort(
        self,
        slot: int,
        failure: "worker_pb2.FailureKind.ValueType" = worker_pb2.FAILURE_KIND_UNSPECIFIED,
    ) -> bool:
        """End a sequence, as cancelled unless it is for a failure; False if there is none."""
        stream = self._streams.get(slot)
        if stream is None:
            return False
        if failure == worker_pb2.FAILURE_KIND_UNSPECIFIED:
            self._end(stream, finish=generation_pb2.FINISH_REASON_CANCELLED)
        else:
            self._end(stream, failure=failure)
        return True

    def drop_all(self) -> None:
        """Forget all sequences and what became of them; nobody is there to be told."""
        for stream in list(self._streams.values()):
            self._end(stream, finish=generation_pb2.FINISH_REASON_CANCELLED)
        self._deadlines.clear()
        self._outcome = Outcome()

    def acknowledge(self, slot: int, offset: int) -> None:
        """Move the window of a sequence: tokens before `offset` have left. Never moves back."""
        stream = self._streams.get(slot)
        if stream is None:
            return
        standing = _standing(stream)
        window_end = _window_end(stream, offset)
        if window_end <= standing.window_end:
            return
        standing.window_end = window_end
        if standing.state is State.PAUSED and len(stream.output) < window_end:
            standing.rank.unpause(stream)
        elif standing.state is State.DECODE:
            _set_next_check(stream)

    # One step.

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. Ends what is past its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, slot = heapq.heappop(self._deadlines)
            stream = self._streams.get(slot)
            if stream is not None:
                self._end(
                    stream,
                    finish=generation_pb2.FINISH_REASON_CANCELLED,
                    detail="the deadline has passed",
                    is_expired=True,
                )
        plan = StepPlan()
        for rank in self._ranks:
            rank.plan(plan)
        for chunk in plan.prefills:
            place = _standing(chunk.sequence).place
            self._virtual_now = max(self._virtual_now, place[1])
        plan.sampled = [c.sequence for c in plan.prefills if c.samples] + plan.decodes
        # Trims alone can wait for the next step.
        if not (plan.prefills or plan.decodes or plan.saves or plan.restores):
            return None
        for rank in self._ranks:
            plan.trims += rank.cache.take_trims()
        return plan

    def deadline(self) -> float | None:
        """When `plan` has somebody to end, at the latest, though there is nothing to compute."""
        return self._deadlines[0][0] if self._deadlines else None

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Apply what the step produced."""
        assert len(result.token_ids) == len(plan.sampled), "a row for every sampled sequence"
        self.num_steps += 1
        for row, detail in result.failures.items():
            if _standing(plan.sampled[row]).state is not State.DONE:
                self._end(
                    plan.sampled[row],
                    failure=worker_pb2.FAILURE_KIND_ENGINE_ERROR,
                    detail=detail,
                )
        assert len(result.restored) == len(plan.restores), "an answer for every restore"
        for restore, num_tokens in zip(plan.restores, result.restored, strict=True):
            standing = _standing(restore.sequence)
            if standing.state is State.PREFILL:
                standing.rank.restored(restore, num_tokens)
        for chunk in plan.prefills:
            self.num_prefill_tokens += len(chunk.token_ids)
            standing = _standing(chunk.sequence)
            if standing.state is State.PREFILL:
                standing.rank.computed(chunk)
        outcome = self._outcome
        for row, logprobs in result.logprobs.items():
            if _standing(plan.sampled[row]).state is not State.DONE:
                outcome.logprobs.append((plan.sampled[row].slot, logprobs))
        add_slot = outcome.slots.append
        add_offset = outcome.offsets.append
        add_token_id = outcome.token_ids.append
        for stream, token_id in zip(plan.sampled, result.token_ids, strict=True):
            output = stream.output
            num_output = len(output)
            is_plain = num_output + 1 < stream.next_check
            if not is_plain and _standing(stream).state is State.DONE:
                continue  # Ended while the step ran.
            output.append(token_id)
            add_slot(stream.slot)
            add_offset(stream.first_offset + num_output - stream.num_given)
            add_token_id(token_id)
            if not is_plain or token_id in stream.stop_token_ids:
                self._produced(stream, token_id)

    def take_outcome(self) -> Outcome:
        """Everything that became of the sequences since the last call."""
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    # What is known.

    @property
    def is_empty(self) -> bool:
        return not self._streams

    def load(self) -> worker_pb2.LoadReport:
        """The load at this moment."""
        return worker_pb2.LoadReport(
            engine_steps_total=self.num_steps,
            prefill_tokens_total=self.num_prefill_tokens,
            ranks=[rank.load(index) for index, rank in enumerate(self._ranks)],
        )

    def held(self) -> list[Held]:
        """Everything that sequences of requests hold now."""
        held: list[Held] = []
        for stream in self._streams.values():
            if stream.is_probe:
                continue  # It is nobody's request.
            standing = _standing(stream)
            detail = standing.state.name.lower()
            if standing.state is State.WAITING:
                held.append(Held(Kind.QUEUE_ENTRY, stream.slot, stream.num_tokens, detail))
            else:
                held.append(Held(Kind.ATTEMPT, stream.slot, 1, detail))
            if standing.lease is not None:
                num_blocks = standing.lease.capacity // self._spec.block_size
                held.append(Held(Kind.KV_BLOCKS, stream.slot, num_blocks, detail))
        for index, rank in enumerate(self._ranks):
            num_lost = rank.num_blocks_lost(
                [s for s in self._streams.values() if _standing(s).rank is rank]
            )
            if num_lost:
                held.append(Held(Kind.KV_BLOCKS, None, num_lost, f"rank {index}: of no sequence"))
        return held

    def take_kv_events(self) -> list[worker_pb2.KvEvents]:
        """Which prefixes became reusable and which were evicted since the last call, by rank."""
        events: list[worker_pb2.KvEvents] = []
        for index, rank in enumerate(self._ranks):
            stored, removed = rank.cache.take_events()
            if stored or removed:
                events.append(worker_pb2.KvEvents(rank=index, stored=stored, removed=removed))
        return events

    def reset_kv_events(self) -> list[worker_pb2.KvEvents]:
        """All prefixes that are reusable now, by rank; later events go on from here."""
        self.take_kv_events()
        return [
            worker_pb2.KvEvents(reset=True, rank=index, stored=rank.cache.reusable())
            for index, rank in enumerate(self._ranks)
        ]

    def check(self) -> None:
        """Assert what is always true between steps."""
        for rank in self._ranks:
            streams = [s for s in self._streams.values() if _standing(s).rank is rank]
            rank.check(streams)
        assert len(self._deadlines) <= 2 * len(self._streams) + _DEADLINES_SLACK

    # Inside.

    def _produced(self, stream: Stream, token_id: int) -> None:
        """A token was added that may have ended or stalled the sequence."""
        if stream.sampler.follows_output:
            stream.sampler.accept(token_id)
        if self._end_if_complete(stream):
            return
        standing = _standing(stream)
        if len(stream.output) >= standing.window_end:
            standing.rank.pause(stream)
        else:
            standing.rank.decode_on(stream)

    def _end_if_complete(self, stream: Stream) -> bool:
        """End the sequence if its output is complete, be it given or produced."""
        output = stream.output
        if output and output[-1] in stream.stop_token_ids and len(output) > stream.min_tokens:
            self._end(stream, finish=generation_pb2.FINISH_REASON_STOP, stop_token_id=output[-1])
        elif stream.sampler.is_fulfilled:
            self._end(stream, finish=generation_pb2.FINISH_REASON_STOP)
        elif len(output) >= stream.output_max:
            self._end(stream, finish=generation_pb2.FINISH_REASON_LENGTH)
        else:
            return False
        return True

    def _end(
        self,
        stream: Stream,
        *,
        finish: "generation_pb2.FinishReason.ValueType" = generation_pb2.FINISH_REASON_UNSPECIFIED,
        stop_token_id: int | None = None,
        failure: "worker_pb2.FailureKind.ValueType" = worker_pb2.FAILURE_KIND_UNSPECIFIED,
        detail: str = "",
        is_expired: bool = False,
    ) -> None:
        standing = _standing(stream)
        standing.rank.remove(stream)
        standing.state = State.DONE
        stream.next_check = 0
        del self._streams[stream.slot]
        self._prune_deadlines()
        self._outcome.ended.append(
            attempt_pb2.AttemptEnded(
                slot=stream.slot,
                end_offset=stream.next_offset,
                finish_reason=finish,
                stop_token_id=stop_token_id,
                failure=failure,
                detail=detail,
                prefill_tokens=standing.prefill_tokens,
                cached_tokens=standing.cached_tokens,
                restored_tokens=standing.restored_tokens,
                is_expired=is_expired,
            )
        )

    def _prune_deadlines(self) -> None:
        """Deadlines outlive their sequences by hours; their number must not."""
        if len(self._deadlines) > 2 * len(self._streams) + _DEADLINES_SLACK:
            self._deadlines = [d for d in self._deadlines if d[1] in self._streams]
            heapq.heapify(self._deadlines)

    def _place(self, stream: Stream) -> _Place:
        if not any(rank.num_waiting or rank.prefilling for rank in self._ranks):
            # Nobody waits for a prefill, so nobody has had more turns than others.
            self._virtual_now = max(self._virtual_now, *self._tenant_end.values(), 0.0)
            self._tenant_end.clear()
        elif len(self._tenant_end) > _TENANTS_SLACK:
            now = self._virtual_now
            self._tenant_end = {t: end for t, end in self._tenant_end.items() if end > now}
        start = max(self._virtual_now, self._tenant_end.get(stream.tenant, 0.0))
        self._tenant_end[stream.tenant] = start + stream.num_tokens
        self._num_arrived += 1
        return (-stream.priority, start, self._num_arrived)

    def _choose_rank(self, stream: Stream, chain: BlockChain) -> "_Rank":
        if len(self._ranks) == 1:
            return self._ranks[0]
        if stream.rank is not None and stream.rank < len(self._ranks):
            return self._ranks[stream.rank]
        _bring_up_to_date(chain, stream, self._spec)
        idlest = min(rank.num_streams for rank in self._ranks)
        return max(
            (rank for rank in self._ranks if rank.num_streams <= idlest + _RANK_SLACK),
            key=lambda rank: (rank.cache.match(chain.hashes), -rank.num_streams),
        )


# Entries of the past that may lie about before they are cleared away.
_DEADLINES_SLACK = 64
_LINE_SLACK = 64
_TENANTS_SLACK = 1024


class _Rank:
    """One data-parallel rank: its line, its batch and its memory."""

    def __init__(self, spec: EngineSpec, cache: KvCache) -> None:
        self.spec = spec
        self.cache = cache
        self._line: list[tuple[_Place, Stream]] = []  # Heap, with streams that are over.
        self.num_waiting = 0
        # Ordered sets; a list would make leaving the batch slow.
        self.prefilling: dict[Stream, None] = {}
        self.decoding: dict[Stream, None] = {}
        self.starved: dict[Stream, None] = {}  # In DECODE, but without room for the next token.
        self.paused: dict[Stream, None] = {}
        self.saves: list[KvSave] = []  # Of blocks that were filled since the last plan.
        self.num_preemptions = 0
        self._num_spare = max(1, spec.kv_blocks // 100)

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding) + len(self.starved)

    @property
    def num_streams(self) -> int:
        return self.num_running + self.num_waiting

    # Moves between states.

    def wait(self, stream: Stream) -> None:
        standing = _standing(stream)
        standing.state = State.WAITING
        heapq.heappush(self._line, (standing.place, stream))
        self.num_waiting += 1

    def pause(self, stream: Stream) -> None:
        self.decoding.pop(stream, None)
        self.paused[stream] = None
        _standing(stream).state = State.PAUSED
        stream.next_check = 0

    def unpause(self, stream: Stream) -> None:
        del self.paused[stream]
        if _standing(stream).lease is not None and self.num_running < self.spec.batch_size_max:
            self.decode_on(stream)
        else:
            self.wait(stream)

    def decode_on(self, stream: Stream) -> None:
        """The sequence decodes, as soon as there is room for its next token."""
        standing = _standing(stream)
        lease = standing.lease
        assert lease is not None, "who decodes has memory"
        standing.state = State.DECODE
        if stream.num_tokens > lease.capacity:
            # All blocks are full: the last token's KV comes next, all others are there.
            self._seal(stream, lease, stream.num_tokens - 1)
            if not self.cache.grow(lease):
                self.decoding.pop(stream, None)
                self.starved[stream] = None
                return
        self.decoding[stream] = None
        _set_next_check(stream)

    def computed(self, chunk: PrefillChunk) -> None:
        """The KV of a chunk is there."""
        stream = chunk.sequence
        standing = _standing(stream)
        assert standing.lease is not None
        standing.num_computed += len(chunk.token_ids)
        if standing.is_first_prefill:
            standing.prefill_tokens += len(chunk.token_ids)
        self._seal(stream, standing.lease, standing.num_computed)
        if chunk.samples:
            standing.is_first_prefill = False
            del self.prefilling[stream]
            standing.state = State.DECODE
            self.decoding[stream] = None
            stream.next_check = 0  # Its first token is looked at closely.

    def restored(self, restore: KvRestore, num_tokens: int) -> None:
        """The KV of so many tokens is there, those after `restore.start` from the memory service.

        The first answer of a sequence is for what it was given.
        """
        stream = restore.sequence
        standing = _standing(stream)
        assert standing.lease is not None, "who prefills has memory"
        assert restore.start <= num_tokens <= restore.end, "no more than was wanted"
        standing.num_computed = num_tokens
        standing.num_saved = max(standing.num_saved, num_tokens // self.spec.block_size)
        if standing.is_first_prefill:
            standing.restored_tokens = num_tokens - restore.start
        self._seal(stream, standing.lease, num_tokens)

    def remove(self, stream: Stream) -> None:
        """Take the sequence out of everything and free what it holds."""
        standing = _standing(stream)
        if standing.state is State.WAITING:
            self.num_waiting -= 1
            standing.state = State.DONE
            if len(self._line) > 2 * self.num_waiting + _LINE_SLACK:
                self._line = [(_place_of(s), s) for s in self._waiting()]
                heapq.heapify(self._line)
        self.prefilling.pop(stream, None)
        self.decoding.pop(stream, None)
        self.starved.pop(stream, None)
        self.paused.pop(stream, None)
        self._release(stream)

    # One step.

    def plan(self, plan: StepPlan) -> None:
        """Add this rank's rows to `plan`."""
        self._feed_starved()
        self._admit()
        self._plan_prefills(plan, self._plan_restores(plan))
        plan.decodes += self.decoding
        plan.saves += self.saves  # Those of who has just lost its blocks, too.
        self.saves.clear()

    def _feed_starved(self) -> None:
        """Give who decodes its next block, first in line first, at the cost of the last."""
        for stream in sorted(self.starved, key=_place_of):
            if stream not in self.starved:
                continue  # Lost everything to one before it.
            lease = _standing(stream).lease
            assert lease is not None
            while not self.cache.grow(lease):
                victim = max(self._holders(), key=_expendable)
                self._preempt(victim)
                if victim is stream:
                    break
            else:
                del self.starved[stream]
                self.decoding[stream] = None
                _set_next_check(stream)

    def _admit(self) -> None:
        while self._line:
            place, stream = self._line[0]
            if _standing(stream).state is not State.WAITING:  # Ended while in line.
                heapq.heappop(self._line)
                continue
            if self.num_running >= self.spec.batch_size_max:
                victim = max(self._running(), key=_place_of)
                if victim.priority >= stream.priority:
                    break
                self._preempt(victim)
                assert self._line[0][0] == place, "who is preempted stands behind"
            if not self._enter(stream):
                # Nobody overtakes: a large sequence would wait forever.
                break
            heapq.heappop(self._line)
            self.num_waiting -= 1

    def _enter(self, stream: Stream) -> bool:
        """Bring the first in line into the batch, if there is memory for it."""
        standing = _standing(stream)
        if standing.lease is not None:  # It was paused and has kept its KV.
            self.decode_on(stream)
            return True
        _bring_up_to_date(standing.chain, stream, self.spec)
        while (lease := self._acquire(stream, standing.chain.hashes)) is None:
            victims = [
                s
                for s in self._holders()
                if s.priority < stream.priority
                or (s in self.paused and s.priority == stream.priority)
            ]
            if not victims:
                return False
            self._preempt(max(victims, key=_expendable))
        standing.lease = lease
        standing.state = State.PREFILL
        standing.num_computed = lease.cached_tokens
        standing.num_known = stream.num_tokens
        if standing.is_first_prefill:
            standing.prefill_tokens = standing.restored_tokens = 0
            standing.cached_tokens = lease.cached_tokens
        standing.num_saved = max(standing.num_saved, lease.num_sealed)
        num_usable = (stream.num_tokens - 1) // self.spec.block_size
        standing.may_restore = (
            self.spec.kv_restore and not stream.is_probe and lease.num_sealed < num_usable
        )
        stream.kv_slot = lease.kv_slot
        self.prefilling[stream] = None
        return True

    def _acquire(self, stream: Stream, hashes: Sequence[int]) -> Lease | None:
        cache = self.cache
        if self.num_running:
            # Some room is left to those who run; else they would throw out at once who comes in.
            num_needed = stream.num_tokens // cache.block_size + 1 - cache.match(hashes)
            if num_needed + self._num_spare > cache.num_blocks - cache.num_used:
                return None
        return cache.acquire(hashes, stream.num_tokens)

    def _plan_restores(self, plan: StepPlan) -> set[Stream]:
        """Ask once for who has entered, first in line first; returns who does not compute yet."""
        size = self.spec.block_size
        waiting = [stream for stream in self.prefilling if _standing(stream).may_restore]
        num_asked = 0
        for stream in sorted(waiting, key=_place_of):
            standing = _standing(stream)
            start, end = standing.num_computed, (stream.num_tokens - 1) // size * size
            if num_asked and num_asked + end - start > self.spec.restore_tokens_max:
                break
            num_asked += end - start
            standing.may_restore = False
            plan.restores.append(KvRestore(stream, start, end))
        return set(waiting)

    def _plan_prefills(self, plan: StepPlan, restoring: set[Stream]) -> None:
        spec = self.spec
        prompt_budget = spec.prefill_tokens_max
        replay_budget = (
            spec.prefill_tokens_max if spec.replay_tokens_max is None else spec.replay_tokens_max
        )
        for stream in sorted(self.prefilling, key=_place_of):
            if stream in restoring:
                continue
            standing = _standing(stream)
            start, num_prompt = standing.num_computed, len(stream.prompt)
            if start < num_prompt:
                end = min(num_prompt, start + prompt_budget)
                if end < num_prompt:
                    end -= end % spec.prefill_alignment
                if end <= start:
                    break
                plan.prefills.append(
                    PrefillChunk(
                        sequence=stream,
                        start=start,
                        token_ids=stream.prompt[start:end],
                        is_output=False,
                        samples=end == standing.num_known,
                    )
                )
                prompt_budget -= end - start
                start = end
            if num_prompt <= start < standing.num_known and replay_budget and prompt_budget:
                end = min(standing.num_known, start + min(replay_budget, prompt_budget))
                plan.prefills.append(
                    PrefillChunk(
                        sequence=stream,
                        start=start,
                        token_ids=stream.output[start - num_prompt : end - num_prompt],
                        is_output=True,
                        samples=end == standing.num_known,
                    )
                )
                replay_budget -= end - start
                prompt_budget -= end - start
            if not prompt_budget:
                break

    # Memory.

    def _seal(self, stream: Stream, lease: Lease, num_computed: int) -> None:
        num_full = num_computed // self.spec.block_size
        if num_full <= lease.num_sealed:
            return
        standing = _standing(stream)
        chain = standing.chain
        if len(chain.hashes) < num_full:
            _bring_up_to_date(chain, stream, self.spec)
        self.cache.seal(lease, chain.hashes[:num_full])
        if self.spec.kv_restore and not stream.is_probe and num_full > standing.num_saved:
            self.saves.append(KvSave(stream, lease.kv_slot, standing.num_saved, num_full))
            standing.num_saved = num_full

    def _release(self, stream: Stream) -> None:
        standing = _standing(stream)
        if standing.lease is not None:
            if standing.state is not State.PREFILL:
                self._seal(stream, standing.lease, max(0, stream.num_tokens - 1))
            self.cache.release(standing.lease)
            standing.lease = None

    def _preempt(self, stream: Stream) -> None:
        """Take a sequence's memory; it computes its KV again later."""
        standing = _standing(stream)
        self._release(stream)
        self.num_preemptions += 1
        if stream in self.paused:
            return  # It waits for its window first.
        self.prefilling.pop(stream, None)
        self.decoding.pop(stream, None)
        self.starved.pop(stream, None)
        if standing.state is not State.WAITING:
            self.wait(stream)

    def _running(self) -> Iterator[Stream]:
        yield from self.prefilling
        yield from self.decoding
        yield from self.starved

    def _holders(self) -> Iterator[Stream]:
        yield from self._running()
        yield from (s for s in self.paused if _standing(s).lease is not None)
        # Unpaused, but without a place in the batch yet.
        yield from (s for s in self._waiting() if _standing(s).lease is not None)

    def _waiting(self) -> Iterator[Stream]:
        return (s for _, s in self._line if _standing(s).state is State.WAITING)

    # What is known.

    def load(self, index: int) -> worker_pb2.RankLoad:
        queued = sum(_standing(s).num_known - _standing(s).num_computed for s in self.prefilling)
        queued += sum(s.num_tokens for s in self._waiting() if _standing(s).lease is None)
        return worker_pb2.RankLoad(
            rank=index,
            kv_blocks_total=self.cache.num_blocks,
            kv_blocks_used=self.cache.num_used,
            kv_blocks_cached=self.cache.num_cached,
            requests_running=sum(not stream.is_probe for stream in self._running()),
            requests_waiting=sum(not stream.is_probe for stream in self._waiting()),
            prefill_tokens_queued=queued,
            preemptions_total=self.num_preemptions,
        )

    def num_blocks_lost(self, streams: Sequence[Stream]) -> int:
        """KV blocks in use that none of these, all sequences of this rank, holds."""
        leases = [lease for s in streams if (lease := _standing(s).lease) is not None]
        return self.cache.num_used - self.cache.num_held(leases)

    def check(self, streams: Sequence[Stream]) -> None:
        """Assert what is always true, given all sequences of this rank."""
        waiting = set(self._waiting())
        assert len(waiting) == self.num_waiting
        decoding = {**self.decoding, **self.starved}
        places = (
            (State.WAITING, waiting),
            (State.PREFILL, set(self.prefilling)),
            (State.DECODE, set(decoding)),
            (State.PAUSED, set(self.paused)),
        )
        for state, members in places:
            expected = {stream for stream in streams if _standing(stream).state is state}
            assert members == expected, f"{state}: who stands there says otherwise"
        assert len(self.decoding) + len(self.starved) == len(decoding)
        assert self.num_running <= self.spec.batch_size_max
        leases = [lease for s in streams if (lease := _standing(s).lease) is not None]
        self.cache.check(leases)
        for stream in self._running():
            assert _standing(stream).lease is not None, "who runs has memory"
        for stream in self.decoding:
            lease = _standing(stream).lease
            assert lease is not None
            assert stream.num_tokens <= lease.capacity, "who decodes has room for its next token"
            assert len(stream.output) < _standing(stream).window_end, "its window is full"
            assert len(stream.output) < stream.output_max


def _standing(stream: Stream) -> _Standing:
    standing = stream.standing
    assert isinstance(standing, _Standing), "the sequence was submitted"
    return standing


def _window_end(stream: Stream, acknowledged: int) -> int:
    """How many tokens the output may have when those before this offset were acknowledged."""
    if not stream.window_tokens:
        return stream.output_max
    return acknowledged - stream.first_offset + stream.num_given + stream.window_tokens


def _place_of(stream: Stream) -> _Place:
    return _standing(stream).place


def _expendable(stream: Stream) -> tuple[int, bool, _Place]:
    """Whoever has most of it loses its memory first: low priority, then idleness, then youth."""
    standing = _standing(stream)
    return (-stream.priority, standing.state is State.PAUSED, standing.place)


def _set_next_check(stream: Stream) -> None:
    """For a sequence in DECODE: when it may end, pause or need a block."""
    if stream.sampler.follows_output:
        stream.next_check = 0
        return
    standing = _standing(stream)
    assert standing.lease is not None, "who decodes has memory"
    stream.next_check = min(
        stream.output_max,
        standing.window_end,
        standing.lease.capacity - len(stream.prompt) + 1,
    )


def _bring_up_to_date(chain: BlockChain, stream: Stream, spec: EngineSpec) -> None:
    """Add to the chain the tokens of the sequence that it does not have."""
    marks_output = not spec.split_invariant
    chain.extend(
        stream.tokens_to_chain(chain.num_tokens, stream.num_tokens, marks_output=marks_output)
    )
