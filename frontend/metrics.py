"""The frontend's metrics."""

from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from frontend.failure_detector import Liveness
from frontend.outliers import Outliers
from unbroken.edge.metrics import EdgeMetrics
from unbroken.errors import Reason
from unbroken.metrics import SECONDS_BUCKETS, PlainCounter
from unbroken.outcome import ContinuationClass, FailureKind
from unbroken.rate import Rate
from unbroken.status import MIGRATABLE

_PREFIX = "unbroken_frontend"


class QueueFigures(Protocol):
    """What the resume queue tells of itself."""

    @property
    def num_resumes_waiting(self) -> int: ...

    @property
    def tokens_waiting(self) -> int: ...

    @property
    def tokens_outstanding(self) -> int: ...

    @property
    def num_fleet_losses(self) -> int: ...


class LineFigures(Protocol):
    """What the admission queue tells of itself."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def tokens_waiting(self) -> int: ...

    @property
    def num_promised(self) -> int: ...

    @property
    def tokens_elsewhere(self) -> int: ...


class FrontendMetrics:
    """Everything that this process counts; one per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests_started = Counter(
            f"{_PREFIX}_requests_started_total", "Requests admitted.", registry=registry
        )
        self.ended = Rate()
        """Requests that were refused or ended, for load reports."""
        self.ended_by_fault = Rate()
        """Those of them that another frontend might have served."""
        self._requests_refused = Counter(
            f"{_PREFIX}_requests_refused_total",
            "Requests refused at admission, by reason (docs/ERRORS.md).",
            ["reason"],
            registry=registry,
        )
        self.requests_shed = Counter(
            f"{_PREFIX}_requests_shed_total",
            "New requests refused because all workers were busy, by threshold; some by several.",
            ["threshold"],
            registry=registry,
        )
        self.queue_refused = Counter(
            f"{_PREFIX}_queue_refused_total",
            "New requests sent away by the admission queue, by the limit that they met.",
            ["limit"],
            registry=registry,
        )
        self.queue_wait_s = Histogram(
            f"{_PREFIX}_queue_wait_seconds",
            "Time that a new request waited because all were busy, until it was sent to a worker.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._queue_waiting = Gauge(
            f"{_PREFIX}_queue_requests",
            "New requests that wait because all workers are busy.",
            registry=registry,
        )
        self._queue_tokens = Gauge(
            f"{_PREFIX}_queue_prefill_tokens", "Prompt tokens of those.", registry=registry
        )
        self._queue_promised = Gauge(
            f"{_PREFIX}_queue_promises",
            "Requests that were told when to come back, and may yet.",
            registry=registry,
        )
        self._queue_elsewhere = Gauge(
            f"{_PREFIX}_queue_elsewhere_tokens",
            "Prompt tokens that wait at other frontends, or were promised a time there.",
            registry=registry,
        )
        self.pauses = Counter(
            f"{_PREFIX}_pauses_total",
            "Times that a choice was paused for a request of a higher priority.",
            registry=registry,
        )
        self.pause_s = Histogram(
            f"{_PREFIX}_pause_seconds",
            "Time for which a choice was paused, until it looked for a worker again.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._paused = Gauge(
            f"{_PREFIX}_choices_paused",
            "Choices that are paused, and hold nothing at any worker.",
            registry=registry,
        )
        self._placements_refused = Counter(
            f"{_PREFIX}_placements_refused_total",
            "Attempts that a worker refused because it was busy; they looked for another one.",
            registry=registry,
        )
        self._requests_finished = Counter(
            f"{_PREFIX}_requests_finished_total",
            "Requests that ended, by reason: OK or one of docs/ERRORS.md.",
            ["reason"],
            registry=registry,
        )
        self.tokens = PlainCounter(
            f"{_PREFIX}_tokens_received_total",
            "Tokens that workers sent, late and repeated ones included.",
            registry,
        )
        self.tokens_delivered = PlainCounter(
            f"{_PREFIX}_tokens_delivered_total", "Tokens sent to clients.", registry
        )
        self.recomputed_tokens = Counter(
            f"{_PREFIX}_recomputed_tokens_total",
            "Tokens computed again after a failure or a pause, by phase: prefill or decode.",
            ["phase"],
            registry=registry,
        )
        self.migrations = Counter(
            f"{_PREFIX}_migrations_total",
            "Attempts begun after another ended, by the failure of that one and the way chosen.",
            ["failure", "way"],
            registry=registry,
        )
        self.requests_resumed = Counter(
            f"{_PREFIX}_requests_resumed_total",
            "Calls that went on with a request: joined here, or taken from elsewhere.",
            ["how"],
            registry=registry,
        )
        self.adoptions = Counter(
            f"{_PREFIX}_adoptions_total",
            "Attempts taken over where they ran, by outcome: adopted or refused.",
            ["outcome"],
            registry=registry,
        )
        self.ttft_s = Histogram(
            f"{_PREFIX}_ttft_seconds",
            "From the arrival of a request to its first output.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.gap_s = Histogram(
            f"{_PREFIX}_migration_gap_seconds",
            "From the last token before a migration to the first one after it.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.resume_wait_s = Histogram(
            f"{_PREFIX}_resume_wait_seconds",
            "Time that a stream which lost its worker stood in the resume queue.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._resumes_waiting = Gauge(
            f"{_PREFIX}_resumes_waiting", "Choices in the resume queue.", registry=registry
        )
        self._resume_tokens_waiting = Gauge(
            f"{_PREFIX}_resume_prefill_tokens_waiting",
            "Prompt tokens that the choices in the resume queue have to compute.",
            registry=registry,
        )
        self._resume_tokens_outstanding = Gauge(
            f"{_PREFIX}_resume_prefill_tokens_outstanding",
            "Prompt tokens that left the resume queue and are not computed yet.",
            registry=registry,
        )
        self._fleet_losses = Gauge(
            f"{_PREFIX}_fleet_losses",
            "Models that lost so many workers at once that new requests are refused.",
            registry=registry,
        )
        self.suspects = Counter(
            f"{_PREFIX}_suspects_total",
            "Times that a worker was silent for longer than it was used to be.",
            registry=registry,
        )
        self.links_lost = Counter(
            f"{_PREFIX}_links_lost_total",
            "Links that had been up and were lost, by failure.",
            ["failure"],
            registry=registry,
        )
        self.detection_s = Histogram(
            f"{_PREFIX}_detection_seconds",
            "From the last that came on a link to its being given up.",
            ["failure"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.ejections = Counter(
            f"{_PREFIX}_ejections_total",
            "Times that a worker which failed or was slow was kept out of placement.",
            registry=registry,
        )
        self.probes = Counter(
            f"{_PREFIX}_probes_total",
            "Probes of ejected workers, by result: good or bad.",
            ["result"],
            registry=registry,
        )
        self.queries_of_death = Counter(
            f"{_PREFIX}_queries_of_death_total",
            "Requests that kill their workers: stopped, or refused when they came again.",
            ["action"],
            registry=registry,
        )
        self._busy = Gauge(
            f"{_PREFIX}_workers_busy",
            "Workers that take requests and have more than a threshold allows.",
            registry=registry,
        )
        self._ejected = Gauge(
            f"{_PREFIX}_workers_ejected", "Workers kept out of placement.", registry=registry
        )
        self._panicking = Gauge(
            f"{_PREFIX}_models_panicking",
            "Models of whose workers so many look bad that ejections are ignored.",
            registry=registry,
        )
        self.edge = EdgeMetrics(registry, _PREFIX)
        self._workers = Gauge(
            f"{_PREFIX}_workers",
            "Workers, by the failure detector's opinion.",
            ["liveness"],
            registry=registry,
        )
        self._running = Gauge(
            f"{_PREFIX}_requests_running", "Requests that run.", registry=registry
        )
        self._waiting = Gauge(
            f"{_PREFIX}_choices_waiting", "Choices that wait for a worker.", registry=registry
        )
        self._links_up = Gauge(
            f"{_PREFIX}_links_up", "Links to sidecars that are up.", registry=registry
        )

    def observe(
        self,
        *,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        queue: QueueFigures,
        waiting_room: LineFigures,
        num_paused: Callable[[], int],
        num_links_up: Callable[[], int],
        num_busy: Callable[[], int],
        outliers: Outliers,
        workers_by_liveness: Callable[[], Mapping[Liveness, int]],
    ) -> None:
        """Ask for these whenever the metrics are read, from the thread that serves them."""
        self._running.set_function(num_running)
        self._waiting.set_function(num_waiting)
        self._resumes_waiting.set_function(lambda: queue.num_resumes_waiting)
        self._resume_tokens_waiting.set_function(lambda: queue.tokens_waiting)
        self._resume_tokens_outstanding.set_function(lambda: queue.tokens_outstanding)
        self._fleet_losses.set_function(lambda: queue.num_fleet_losses)
        self._queue_waiting.set_function(lambda: waiting_room.num_waiting)
        self._queue_tokens.set_function(lambda: waiting_room.tokens_waiting)
        self._queue_promised.set_function(lambda: waiting_room.num_promised)
        self._queue_elsewhere.set_function(lambda: waiting_room.tokens_elsewhere)
        self._paused.set_function(num_paused)
        self._links_up.set_function(num_links_up)
        self._busy.set_function(num_busy)
        self._ejected.set_function(lambda: outliers.num_ejected)
        self._panicking.set_function(lambda: outliers.num_panicking)
        for liveness in Liveness:
            if liveness is not Liveness.UNSPECIFIED:
                self._workers.labels(liveness.name.lower()).set_function(
                    lambda one=liveness: workers_by_liveness().get(one, 0)
                )

    def request_refused(self, reason: Reason, now: float) -> None:
        """A request was not admitted."""
        self._requests_refused.labels(reason.value).inc()
        self._count_end(reason, now)

    def request_finished(self, reason: Reason | None, now: float) -> None:
        """A request ended: well, or for a reason."""
        self._requests_finished.labels("OK" if reason is None else reason.value).inc()
        self._count_end(reason, now)

    def _count_end(self, reason: Reason | None, now: float) -> None:
        self.ended.count(now)
        if reason in MIGRATABLE:
            self.ended_by_fault.count(now)

    def count_delivered(self, num_tokens: int) -> None:
        """Tokens went from a frame to clients."""
        self.tokens_delivered.value += num_tokens

    def count_tokens(self, num_tokens: int) -> None:
        """A frame came."""
        self.tokens.value += num_tokens

    def suspected(self) -> None:
        """A worker is silent for longer than it was used to be."""
        self.suspects.inc()

    def shed(self) -> None:
        """A worker refused an attempt because it is busy."""
        self._placements_refused.inc()

    def link_lost(self, failure: FailureKind, silence_s: float) -> None:
        """A link was lost, so long after the last that came on it."""
        self.links_lost.labels(failure.name).inc()
        self.detection_s.labels(failure.name).observe(silence_s)

    def probed(self, *, is_good: bool) -> None:
        """A probe ended."""
        self.probes.labels("good" if is_good else "bad").inc()

    def migrated(self, failure: FailureKind, way: ContinuationClass) -> None:
        """A stream goes on elsewhere."""
        self.migrations.labels(failure.name, way.name).inc()

    def adopted(self, *, is_refused: bool) -> None:
        """An attempt was, or was not, to be had where it ran."""
        self.adoptions.labels("refused" if is_refused else "adopted").inc()

    def recomputed(self, phase: str, num_tokens: int) -> None:
        """Tokens were computed again."""
        if num_tokens:
            self.recomputed_tokens.labels(phase).inc(num_tokens)


class ParentMetrics:
    """What the parent of a frontend of several processes adds to what those count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.restarts = Counter(
            f"{_PREFIX}_process_restarts_total",
            "Times that a process of this frontend was started again.",
            registry=registry,
        )
        self.processes = Gauge(
            f"{_PREFIX}_processes", "Processes of this frontend that serve.", registry=registry
        )
