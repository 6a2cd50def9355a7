"""The shell around `query_of_death`: tells it of attempts, keeps suspects apart, refuses who kills.

While no engine has died, all this costs is a fingerprint of each request, made when it begins: when
an engine dies, those of all its requests are needed at one moment. They are looked up only while
somebody is on file.

The first engine that dies puts all who ran there on file, and makes nobody a suspect. So it is
entered after they are on their way, with what they began meanwhile, in the order of both; until
then all is as quiet as it was. Whatever else happens has it entered before.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from frontend.afterwards import Afterwards
from frontend.metrics import FrontendMetrics
from frontend.outliers import Outliers
from frontend.query_of_death import DEADLY, FRESH_S, Fingerprint, Queries, fingerprint
from frontend.stream import Attempt, Life
from unbroken import log
from unbroken.checkpoint import Checkpoint
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import FailureKind

if TYPE_CHECKING:
    from frontend.dispatch import Choice

LOOK_INTERVAL_S: Final = 0.02
"""Between two looks at whether those on file have got further."""

_OF_ENGINES: Final = DEADLY - {FailureKind.ENGINE_ERROR}
"""Failures of all that ran there."""

_log = log.get_logger(__name__)


class Quarantine:
    """One frontend's."""

    def __init__(
        self,
        queries: Queries,
        outliers: Outliers,
        metrics: FrontendMetrics,
        *,
        key: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key` is secret, and of this life of the frontend."""
        self._queries = queries
        self._outliers = outliers
        self._metrics = metrics
        self._key = key
        self._clock = clock
        self.afterwards = Afterwards()
        self._unentered: list[Callable[[], None]] = []
        """Deaths in one life, the first of all, and what began since."""
        self._unentered_life: Life | None = None
        self._watched: dict[Choice, Fingerprint] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._retrying: asyncio.TimerHandle | None = None
        self.on_room: list[Callable[[], None]] = []
        """Called when a suspect that had to wait may have a worker."""

    def identify(self, tenant: str, original: Checkpoint) -> Fingerprint:
        """What tells the request from others."""
        return fingerprint(self._key, tenant, original)

    def refuse(self, tenant: str, original: Checkpoint) -> None:
        """Raises QUERY_OF_DEATH if such a request is known to kill its workers."""
        if self._queries.is_quiet:
            return
        error = self._error(self.identify(tenant, original))
        if error is not None:
            self._metrics.queries_of_death.labels("refused").inc()
            raise error

    def verdict(self, choice: "Choice") -> UnbrokenError | None:
        """Why the choice may not go on, if it may not."""
        return None if self._queries.is_quiet else self._error(choice.fingerprint)

    def may_start(self, choice: "Choice", life: Life) -> bool:
        """Whether it may run there now."""
        queries = self._queries
        if queries.is_quiet or queries.may_start(choice.fingerprint, life, self._clock()):
            return True
        if self._retrying is None:
            loop = asyncio.get_running_loop()
            self._retrying = loop.call_later(FRESH_S, self._retry)
        return False

    def is_on_file(self, choice: "Choice") -> bool:
        """Whether an engine died under it and it got no further: its failures prove little."""
        self._enter()
        return not self._queries.is_quiet and self._queries.is_on_file(choice.fingerprint)

    def started(self, choice: "Choice", life: Life) -> None:
        """An attempt began."""
        if self._unentered:
            self._unentered.append(partial(self._started, choice, life, self._clock()))
        elif not self._queries.is_quiet:
            self._started(choice, life, self._clock())

    def _started(self, choice: "Choice", life: Life, now: float) -> None:
        queries, query = self._queries, choice.fingerprint
        queries.started(query, life, now)
        if queries.is_on_file(query):
            self._watched[choice] = query
            self._look_soon()
        if queries.is_suspect(query):
            _log.warning(
                "suspected query of death is tried", worker_id=life.worker_id, **choice.names()
            )

    def attempt_ended(self, choice: "Choice", life: Life, attempt: Attempt) -> None:
        """An attempt is over, well or not."""
        failure, offset, now = attempt.failure, len(choice.stream.ledger), self._clock()
        if self._can_wait(life, attempt):
            if not self._unentered:
                self.afterwards.do(self._enter)
            self._unentered_life = life
            self._unentered.append(partial(self._died, choice, life, failure, offset, now))
            return
        self._enter()
        self._watched.pop(choice, None)
        is_deadly = not attempt.is_refused and failure in DEADLY
        if failure is FailureKind.ENGINE_ERROR and self._outliers.fails_others(life.worker_id):
            is_deadly = False
        if is_deadly:
            self._died(choice, life, failure, offset, now)
        elif not self._queries.is_quiet:
            outcome = choice.stream.outcome
            ended_trial = self._queries.left(choice.fingerprint, life)
            ended_trial |= self._queries.got_to(choice.fingerprint, offset)
            if outcome is not None and outcome.error is None:
                ended_trial |= self._queries.went_well(choice.fingerprint)
            if ended_trial:
                self._tell_room()

    def _can_wait(self, life: Life, attempt: Attempt) -> bool:
        """Whether it is a death that makes nobody a suspect, if nothing else happens before."""
        return (
            self._queries.is_quiet
            and self._queries.bears_a_death
            and attempt.failure in _OF_ENGINES
            and not attempt.is_refused
            and self._unentered_life in (None, life)
        )

    def _enter(self) -> None:
        """Do what waits."""
        unentered, self._unentered, self._unentered_life = self._unentered, [], None
        for event in unentered:
            event()

    def _died(
        self, choice: "Choice", life: Life, failure: FailureKind, offset: int, now: float
    ) -> None:
        query = choice.fingerprint
        was_stopped = self._queries.stopped(query, now) is not None
        stopped = self._queries.died(query, life, failure, offset, now)
        if stopped is not None and not was_stopped:
            self._metrics.queries_of_death.labels("stopped").inc()
            _log.error(
                "query of death",
                num_deaths=stopped.num_deaths,
                digest=stopped.digest,
                last_worker_id=life.worker_id,
                **choice.names(),
            )
        self._tell_room()

    def close(self) -> None:
        """Look no more."""
        self._enter()
        for timer in (self._looking, self._retrying):
            if timer is not None:
                timer.cancel()

    def _error(self, query: Fingerprint) -> UnbrokenError | None:
        stopped = self._queries.stopped(query, self._clock())
        if stopped is None:
            return None
        return UnbrokenError(
            Reason.QUERY_OF_DEATH,
            f"{stopped.num_deaths} engines failed under this request, which never got any further",
            metadata={"workers_lost": str(stopped.num_deaths), "digest": stopped.digest},
        )

    def _look_soon(self) -> None:
        if self._looking is None and self._watched:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        """Let those go who have got further."""
        self._looking = None
        has_room = False
        for choice, query in list(self._watched.items()):
            if self._queries.got_to(query, len(choice.stream.ledger)):
                has_room = True
            if not self._queries.is_on_file(query):
                del self._watched[choice]
        if has_room:
            self._tell_room()
        self._look_soon()

    def _retry(self) -> None:
        """Who may not begin yet may now."""
        self._retrying = None
        self._tell_room()

    def _tell_room(self) -> None:
        for callback in self.on_room:
            callback()
