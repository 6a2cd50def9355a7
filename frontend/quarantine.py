"""The shell around `query_of_death`: tells it of attempts, keeps suspects apart, refuses who kills.

While no engine has died, all this costs is a fingerprint of each request, made when it begins: when
an engine dies, those of all its requests are needed at one moment. They are looked up only while
somebody is on file.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

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
        return not self._queries.is_quiet and self._queries.is_on_file(choice.fingerprint)

    def started(self, choice: "Choice", life: Life) -> None:
        """An attempt began."""
        queries = self._queries
        if queries.is_quiet:
            return
        query = choice.fingerprint
        queries.started(query, life, self._clock())
        if queries.is_on_file(query):
            self._watched[choice] = query
            self._look_soon()
        if queries.is_suspect(query):
            _log.warning(
                "suspected query of death is tried", worker_id=life.worker_id, **choice.names()
            )

    def attempt_ended(self, choice: "Choice", life: Life, attempt: Attempt) -> None:
        """An attempt is over, well or not."""
        self._watched.pop(choice, None)
        failure = attempt.failure
        is_deadly = not attempt.is_refused and failure in DEADLY
        if failure is FailureKind.ENGINE_ERROR and self._outliers.fails_others(life.worker_id):
            is_deadly = False
        if is_deadly:
            offset = len(choice.stream.ledger)
            query, now = choice.fingerprint, self._clock()
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
        elif not self._queries.is_quiet:
            outcome = choice.stream.outcome
            ended_trial = self._queries.left(choice.fingerprint, life)
            ended_trial |= self._queries.got_to(choice.fingerprint, len(choice.stream.ledger))
            if outcome is not None and outcome.error is None:
                ended_trial |= self._queries.went_well(choice.fingerprint)
            if ended_trial:
                self._tell_room()

    def close(self) -> None:
        """Look no more."""
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
