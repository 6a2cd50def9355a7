"""Finds the request that kills its workers, and stops it before it walks through the fleet: pure.

When an engine dies, whoever ran there may have done it, and nearly all of them have not. So each is
entered in a file of its own: how many engines died under it, and how far it had come. A request
that gets further than where an engine died under it has shown that it was not to blame, and its
file is closed. One that is under every death and never gets any further is a suspect.

    death ──▶ on file ──▶ one short of the limit: suspect ──▶ on trial ──▶ death: stopped
                                                                 │
                   file closed ◀── got further, or ended well ───┘

A suspect is tried, not stopped: under a second death it is still one of many. But it is tried in
quarantine: on a worker where nothing else has just begun, and nothing else may begin until it gets
further. What runs there already has shown that it does no harm. So one more death names the
request, and the others have lost nothing but a little time: a query of death kills as many engines
as the limit says, and nobody else is stopped for it.

An engine error, where the engine lives on and says which attempt it failed at, is a death that
needs no trial: there is no doubt about whose it was. (Unless the engine fails others as well; such
errors are not told here.)

Requests are told apart by a fingerprint of tenant, prompt and parameters, without the seed: the
same query under another request_id goes on where it was, and is refused once it was stopped.
"""

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final, NewType

from frontend.stream import Life
from unbroken.checkpoint import Checkpoint
from unbroken.outcome import FailureKind

Fingerprint = NewType("Fingerprint", bytes)

DEADLY: Final = frozenset({FailureKind.CRASH, FailureKind.STALL, FailureKind.ENGINE_ERROR})
"""What a request can do to an engine. What happens to links is not its doing."""
_CERTAIN: Final = frozenset({FailureKind.ENGINE_ERROR})
"""Failures of this attempt and no other."""
_FINGERPRINT_BYTES: Final = 16
SETTLE_S: Final = 1.0
"""The attempts of an engine that died are reported one by one; so long after the last report, what
dies there dies anew."""
_DEAD_MAX: Final = 1000
FRESH_S: Final = 0.25
"""What began so long ago, and no engine died under it, does no harm so soon."""
_HOLD_S: Final = 4 * FRESH_S
"""A suspect that waits for a worker to be quiet keeps others from beginning there, for so long."""


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """When a request is stopped, and for how long that is remembered."""

    deaths_max: int = 3
    """Engines that may die under a request which never gets any further; with the last it is
    stopped."""
    progress_tokens: int = 2
    """So much beyond where an engine died is no further: a death loses what had just come."""
    memory_s: float = 600.0
    files_max: int = 10_000


@dataclass(frozen=True, slots=True)
class Stopped:
    """A request that kills its workers."""

    num_deaths: int
    digest: str
    """Of the request: for people, to tell requests apart; it says nothing of the prompt."""


@dataclass(slots=True)
class _File:
    """What is held against a request."""

    num_deaths: int = 0
    furthest: int = 0
    """The largest offset it had reached when an engine died under it."""
    lives: deque[Life] = field(default_factory=lambda: deque[Life](maxlen=8))
    """The engines that died."""
    has_killed: bool = False
    """Engines died, rather than failed; the two are not counted together."""
    touched_at: float = 0.0
    is_stopped: bool = False


def fingerprint(key: bytes, tenant: str, original: Checkpoint) -> Fingerprint:
    """What tells requests apart. `key` is secret, so that nobody can look for a prompt by it."""
    digest = blake2b(tenant.encode(), digest_size=_FINGERPRINT_BYTES, key=key)
    params = original.params
    digest.update(b"\0" + array("I", original.prompt_token_ids).tobytes())
    digest.update(repr(replace(params, sampling=replace(params.sampling, seed=None))).encode())
    return Fingerprint(digest.digest())


class Queries:
    """What is known of the requests of one frontend. Times are monotonic seconds."""

    def __init__(self, limits: QueryLimits) -> None:
        self._limits = limits
        self._files: OrderedDict[Fingerprint, _File] = OrderedDict()
        """The one that was touched last is the last."""
        self._trials: dict[str, tuple[Life, Fingerprint]] = {}
        """Who is on trial, by worker."""
        self._begun: dict[str, tuple[Fingerprint, float]] = {}
        """What began last on each worker, and when, while anybody is on file."""
        self._present: dict[str, set[Fingerprint]] = {}
        """Who is on file and runs there, by worker."""
        self._held: dict[str, tuple[Fingerprint, float]] = {}
        """Which suspect waits for a worker, and until when it may."""
        self._dead: OrderedDict[Life, float] = OrderedDict()
        """Engines that died, and when that was last reported."""

    # Questions.

    @property
    def is_quiet(self) -> bool:
        """Nobody is on file: there is nothing to ask."""
        return not self._files

    @property
    def bears_a_death(self) -> bool:
        """Whether the first engine that dies under a request makes nobody a suspect."""
        return self._limits.deaths_max > 2

    @property
    def trials(self) -> list[Fingerprint]:
        """Who is on trial now."""
        return [one for _, one in self._trials.values()]

    def stopped(self, query: Fingerprint, now: float) -> Stopped | None:
        """Whether it is refused, and why."""
        self._forget(now)
        file = self._files.get(query)
        if file is None or not file.is_stopped:
            return None
        return Stopped(file.num_deaths, query.hex()[:16])

    def is_on_file(self, query: Fingerprint) -> bool:
        """Whether an engine died under it, and it has not got any further since."""
        return query in self._files

    def is_suspect(self, query: Fingerprint) -> bool:
        """Whether it must be tried apart from other suspects."""
        file = self._files.get(query)
        return file is not None and file.num_deaths >= self._limits.deaths_max - 1

    # Events.

    def may_start(self, query: Fingerprint, life: Life, now: float) -> bool:
        """It could be placed there; whether it may be, now.

        Nobody begins where a suspect is on trial, or waits to be. A suspect has one trial at a
        time, where nobody else is on file, where nothing has just begun, and where no engine has
        just died: its other attempts are still being told of. To be asked again after `FRESH_S`.
        """
        worker_id = life.worker_id
        if worker_id in self._trials and self._trials[worker_id][1] != query:
            return False
        holder, until = self._held.get(worker_id, (query, now))
        if holder != query and now < until:
            return False
        if not self.is_suspect(query):
            return True
        if any(one == query and where != worker_id for where, (_, one) in self._trials.items()):
            return False
        if now - self._dead.get(life, -SETTLE_S) < SETTLE_S:
            return False
        begun, at = self._begun.get(worker_id, (query, 0.0))
        is_quiet = begun == query or now - at >= FRESH_S
        if is_quiet and not self._present.get(worker_id, set()) - {query}:
            return True
        if not any(one == query and now < due for one, due in self._held.values()):
            self._held[worker_id] = (query, now + _HOLD_S)
        return False

    def started(self, query: Fingerprint, life: Life, now: float) -> None:
        """An attempt began; `may_start` was asked."""
        self._begun[life.worker_id] = (query, now)
        if self._held.get(life.worker_id, (None, 0.0))[0] == query:
            del self._held[life.worker_id]
        if query in self._files:
            self._present.setdefault(life.worker_id, set()).add(query)
        if self.is_suspect(query):
            self._trials[life.worker_id] = (life, query)

    def got_to(self, query: Fingerprint, offset: int) -> bool:
        """How far it is now; whether that closed its file, and with it its trial."""
        file = self._files.get(query)
        if file is None or file.is_stopped or not self._is_further(file, offset):
            return False
        self._close(query)
        return True

    def went_well(self, query: Fingerprint) -> bool:
        """Its output is complete. Whether that closed a file."""
        file = self._files.get(query)
        if file is None or file.is_stopped:
            return False
        self._close(query)
        return True

    def left(self, query: Fingerprint, life: Life) -> bool:
        """Its attempt ended there without harm. Whether that ended a trial."""
        self._present.get(life.worker_id, set()).discard(query)
        if query in self._begun.get(life.worker_id, ()):
            del self._begun[life.worker_id]
        if self._trials.get(life.worker_id) != (life, query):
            return False
        del self._trials[life.worker_id]
        return True

    def died(
        self, query: Fingerprint, life: Life, failure: FailureKind, offset: int, now: float
    ) -> Stopped | None:
        """An engine died under it, or failed at it, when its output had come to `offset`."""
        if failure not in DEADLY:
            return None
        self._forget(now)
        was_on_trial = self.left(query, life)
        file = self._files.setdefault(query, _File())
        self._files.move_to_end(query)
        file.touched_at = now
        is_certain = failure in _CERTAIN
        if not is_certain:
            self._dead[life] = now
            self._dead.move_to_end(life)
            if len(self._dead) > _DEAD_MAX:
                self._dead.popitem(last=False)
        if not is_certain and not file.has_killed:
            file.has_killed = True
            file.num_deaths = 0
            file.lives.clear()
        is_news = is_certain != file.has_killed
        if life in file.lives:  # Another attempt that was there, and had perhaps come further.
            file.furthest = max(file.furthest, offset)
        elif is_news and not file.is_stopped:
            if self._is_further(file, offset):
                file.num_deaths = 0
                self._end_trials(query)
            file.num_deaths += 1
            file.furthest = max(file.furthest, offset)
            file.lives.append(life)
            is_enough = file.num_deaths >= self._limits.deaths_max
            file.is_stopped = is_enough and (was_on_trial or is_certain)
        while len(self._files) > self._limits.files_max:
            self._files.popitem(last=False)
        return self.stopped(query, now)

    def check(self) -> None:
        """Assert what is always true."""
        assert len(self._files) <= self._limits.files_max, "what is remembered is bounded"
        for _, query in self._trials.values():
            assert self.is_suspect(query) or query not in self._files, "only suspects are tried"

    # What happens inside.

    def _is_further(self, file: _File, offset: int) -> bool:
        return offset > file.furthest + self._limits.progress_tokens

    def _close(self, query: Fingerprint) -> None:
        del self._files[query]
        self._end_trials(query)

    def _end_trials(self, query: Fingerprint) -> None:
        for present in self._present.values():
            present.discard(query)
        for kept in (self._trials, self._begun, self._held):
            for worker_id, entry in list(kept.items()):
                if query in entry:
                    del kept[worker_id]

    def _forget(self, now: float) -> None:
        while self._files:
            file = next(iter(self._files.values()))
            if now - file.touched_at < self._limits.memory_s:
                return
            self._files.popitem(last=False)
