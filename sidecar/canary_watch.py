"""Does what the canary decides (`canary`): asks the engine, and tells the hub what to think of it.

Everything is seen from the hub's counters, at every look, so the hot path knows nothing of it.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import assert_never

from sidecar import canary
from sidecar.canary import Canary
from sidecar.canary_payload import MARK, checkpoint_of
from sidecar.engines.base import EngineUp
from sidecar.hub import Hub
from sidecar.link import Attempt
from unbroken import log
from unbroken.outcome import FailureKind
from unbroken.tokenizer import Tokenizer, asset_from_proto
from unbroken.v1 import attempt_pb2, worker_pb2

_log = log.get_logger(__name__)


class CanaryWatch:
    """The canary of one hub."""

    def __init__(
        self,
        hub: Hub,
        decisions: Canary,
        *,
        name: str,
        prompt: tuple[int, ...] = (),
        text: str = "",
        on_unfit: Callable[[], None],
    ) -> None:
        """Probes are called after `name`, unique to this life of the sidecar. `prompt` is what to
        ask with instead of the tokenizer's beginning, or `text`, as the tokenizer encodes it;
        `on_unfit` is called when the engine is to be given up.
        """
        self.decisions = decisions
        self._hub = hub
        self._name = name
        self._prompt = prompt
        self._text = text
        self._encoding: asyncio.Future[tuple[int, ...]] | None = None
        self._on_unfit = on_unfit
        self._up: EngineUp | None = None
        self._asked: dict[int, Attempt] = {}
        self._left: dict[int, Attempt] = {}
        """Probes that are not waited for any more, and have not ended."""
        self._loads: dict[int, worker_pb2.RankLoad] = {}
        """As last told, by rank."""
        self._moved: set[int] = set()
        """Ranks of which that changed since there was progress."""
        self._tokens = 0
        self._prefilled = 0
        self._steps = 0
        self._stepped_at = 0.0
        self._is_busy_since_asked = False

    def look(self) -> None:
        """See what has happened; every `watchdog.LOOK_INTERVAL_S`."""
        hub, decisions, now = self._hub, self.decisions, self._hub.now()
        if hub.up is not self._up:
            self._up = hub.up
            for of_this_life in (self._asked, self._left, self._loads, self._moved):
                of_this_life.clear()
            self._encode()
            self._obey(self._began(now))
        if self._up is None:
            return
        for number, attempt in list(self._asked.items()):
            if attempt.token_ids:
                del self._asked[number]
                self._obey(decisions.answered(number, attempt.token_ids[0]))
            elif (ended := attempt.ended) is not None:
                del self._asked[number]
                if ended.failure == FailureKind.OVERLOAD:
                    self._obey(decisions.deferred(number))
                else:
                    self._obey(decisions.ended(number, ended.detail or "an end without one"))
        for number in [n for n, attempt in self._left.items() if attempt.ended is not None]:
            del self._left[number]
        moved = self._ranks_moved()
        if self._has_progressed(now):
            self._obey(decisions.progressed(moved))
            self._moved.clear()
        is_guarded = self._is_guarded(now) or not self._has_prompt()
        self._obey(decisions.look(now, is_guarded=is_guarded, num_left=len(self._left)))

    def _encode(self) -> None:
        """Find out what to ask this life with; its tokenizer may take a second to parse."""
        if self._text and self._up is not None:
            loop = asyncio.get_running_loop()
            tokenizer = self._up.tokenizer
            self._encoding = loop.run_in_executor(None, ids_of, self._text, tokenizer)

    def _has_prompt(self) -> bool:
        """Whether that is known: within one life nothing else is asked, as answers are compared."""
        if self._encoding is None:
            return True
        if not self._encoding.done():
            return False
        if (error := self._encoding.exception()) is not None:
            _log.error("canary text cannot be encoded", detail=f"{type(error).__name__}: {error}")
            self._prompt = ()  # As if it were not configured.
        else:
            self._prompt = self._encoding.result()
        self._encoding = None
        return True

    def _ranks_moved(self) -> set[int] | None:
        """Ranks whose load is another than when there was progress last; None if that is not told.

        More in its line is none of a rank's doing.
        """
        up, load = self._up, self._hub.load
        if up is None or load is None or not 1 < up.description.num_ranks == len(load.ranks):
            return None
        if not any(_has_work(rank) for rank in load.ranks if rank.rank):
            return None  # Or all is counted at the first, as the engine does not tell.
        for rank in load.ranks:
            before = self._loads.get(rank.rank, rank)
            self._loads[rank.rank] = rank
            if (
                rank.kv_blocks_used != before.kv_blocks_used
                or rank.requests_running != before.requests_running
                or rank.requests_waiting < before.requests_waiting
                or rank.prefill_tokens_queued < before.prefill_tokens_queued
            ):
                self._moved.add(rank.rank)
        return set(self._moved)

    def _is_guarded(self, now: float) -> bool:
        """Whether the watchdog waits for a step that may well be longer than the canary's time."""
        hub = self._hub
        if hub.is_draining or hub.watchdog.is_stalled:
            return True
        self._is_busy_since_asked &= bool(self._asked)
        self._is_busy_since_asked |= hub.has_requests
        if self._asked and not self._is_busy_since_asked:
            return False  # It had nothing to do but this.
        # One that says that it steps, and makes no progress, is not the watchdog's business.
        return hub.work(now).has_steps and not self._is_stepping(now)

    def _is_stepping(self, now: float) -> bool:
        """Whether it said not long ago that it made a step; it tells every 0.2 s or so."""
        return now - self._stepped_at <= self.decisions.policy.timeout_s / 2

    def _began(self, now: float) -> Sequence[canary.Command]:
        up = self._up
        self._prefilled = self._steps = 0
        if up is None:
            return self.decisions.down()
        description = up.description
        numerics = description.numerics
        return self.decisions.up(
            now,
            num_ranks=description.num_ranks,
            is_repeatable=numerics.batch_invariant and numerics.split_invariant,
        )

    def _has_progressed(self, now: float) -> bool:
        """Whether it has computed anything for a request since the last look."""
        hub, load = self._hub, self._hub.load
        tokens, self._tokens = self._tokens, hub.num_relayed
        is_progress = self._tokens > tokens
        if load is None:
            return is_progress
        steps, self._steps = self._steps, load.engine_steps_total
        prefilled, self._prefilled = self._prefilled, load.prefill_tokens_total
        has_stepped = load.engine_steps_total > steps
        if has_stepped:
            self._stepped_at = now
        # An engine that does not tell what it has prefilled is believed that its steps are some.
        has_prefilled = (
            load.prefill_tokens_total > prefilled if load.prefill_tokens_total else has_stepped
        )
        return is_progress or (has_prefilled and hub.has_requests)

    def _obey(self, commands: Sequence[canary.Command]) -> None:
        for command in commands:
            match command:
                case canary.Probe(number=number, rank=rank):
                    self._asked[number] = self._hub.probe(self._start(number, rank))
                case canary.Abandon(number=number):
                    attempt = self._asked.pop(number, None)
                    if attempt is not None:
                        self._hub.abandon(attempt)
                        self._left[number] = attempt
                case canary.Failing(failure=failure, detail=detail):
                    _log.warning("canary fails", failure=failure.name, detail=detail)
                    self._hub.call_unfit(failure, f"canary: {detail}")
                case canary.Well():
                    _log.info("canary is well")
                    self._hub.call_fit()
                case canary.Unfit(detail=detail):
                    _log.error("engine is given up", detail=detail)
                    self._on_unfit()
                case _:
                    assert_never(command)

    def _start(self, number: int, rank: int) -> attempt_pb2.StartAttempt:
        up = self._up
        assert up is not None, "only who is up is asked"
        start = attempt_pb2.StartAttempt(
            stream=attempt_pb2.StreamKey(request_id=f"{MARK}-{self._name}-{number}", tenant=MARK),
            epoch=1,
            checkpoint=checkpoint_of(up.tokenizer, self._prompt),
            is_probe=True,
        )
        if up.description.num_ranks > 1:
            start.rank = rank
        return start


def _has_work(rank: worker_pb2.RankLoad) -> bool:
    return bool(rank.kv_blocks_used or rank.requests_running or rank.requests_waiting)


def ids_of(text: str, tokenizer: worker_pb2.Tokenizer) -> tuple[int, ...]:
    """A text as its tokenizer encodes it. Raises ValueError if nothing is left of it."""
    ids = Tokenizer(asset_from_proto(tokenizer)).encode(text, add_special=True)
    if not ids:
        raise ValueError(f"expected a text with tokens, got {text!r}")
    return tuple(ids)
