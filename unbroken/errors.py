"""The exceptions that cross our boundaries: each knows its gRPC code and its documented reason.

`unbroken.status` turns them into gRPC statuses and back; docs/ERRORS.md is the callers' list.
Failures that are part of the protocol (a worker dies) are events of a decision, not exceptions.
"""

from collections.abc import Mapping
from enum import Enum


class Reason(Enum):
    """What went wrong, as `google.rpc.ErrorInfo.reason`. Names are part of the contract."""

    INVALID_FIELD = "INVALID_FIELD"
    """A field of the request is outside its range; metadata `field` names it."""
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    """No worker serves or ever served the model."""
    STREAM_NOT_FOUND = "STREAM_NOT_FOUND"
    """The request is not known here."""
    REQUEST_EXISTS = "REQUEST_EXISTS"
    """A request with this request_id is running."""
    RESUME_TOKEN_INVALID = "RESUME_TOKEN_INVALID"
    """It is not a resume token of this mesh for this request of this tenant."""
    RESUME_TOKEN_EXPIRED = "RESUME_TOKEN_EXPIRED"
    """The resume token is genuine, but too old."""
    RESUME_MISMATCH = "RESUME_MISMATCH"
    """What the caller says to have received is not what it was sent."""
    NOT_CONTINUABLE = "NOT_CONTINUABLE"
    """The request could not be continued exactly, which it demanded."""
    NO_WORKER = "NO_WORKER"
    """The model is known, but no worker can take the request now."""
    WORKER_LOST = "WORKER_LOST"
    """The worker was lost, and the stream could not go on elsewhere."""
    UNREACHABLE = "UNREACHABLE"
    """No connection to the peer, or it broke during the call."""
    MIGRATIONS_EXHAUSTED = "MIGRATIONS_EXHAUSTED"
    """The stream lost more workers than it may."""
    QUERY_OF_DEATH = "QUERY_OF_DEATH"
    """The request kills its workers; metadata `workers_lost` says how many it has."""
    OVERLOADED = "OVERLOADED"
    """No room; come back after the given delay."""
    DRAINING = "DRAINING"
    """This process takes no new work."""
    VERSION_MISMATCH = "VERSION_MISMATCH"
    """What the caller wants to change has changed meanwhile; metadata `version` says to which."""
    FENCED = "FENCED"
    """A newer epoch or incarnation exists; whoever receives this has lost ownership."""
    CANCELLED = "CANCELLED"
    """Somebody entitled to cancelled the request."""
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    """The caller's time is up."""
    REJECTED_BY_ENGINE = "REJECTED_BY_ENGINE"
    """The engine refused the request itself."""
    SEGMENT_NOT_FOUND = "SEGMENT_NOT_FOUND"
    """The memory service has no such segment, or none that the caller may have."""
    SEGMENT_BUSY = "SEGMENT_BUSY"
    """The segment is in a state that does not allow it: another writes to it, or it is sealed."""
    STALE_HANDLE = "STALE_HANDLE"
    """Of an earlier life of the memory service, or of memory that is no longer the caller's."""
    NOT_FENCED = "NOT_FENCED"
    """The owner of the memory is not proved dead yet."""
    QUARANTINED = "QUARANTINED"
    """It could not be proved that nobody writes to the memory any more, so nobody may have it."""
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    """Bytes in memory are not those that were meant."""
    MEMORY_EXHAUSTED = "MEMORY_EXHAUSTED"
    """No room for so much memory; metadata `limit` says of what."""
    GPU_FAILED = "GPU_FAILED"
    """A GPU's memory is not to be relied on; metadata `health` says how it is."""
    NOT_PERMITTED = "NOT_PERMITTED"
    """The caller may not use this tenant's memory, is not who it says, or is no operator."""
    DIVERGED = "DIVERGED"
    """A continuation did not reproduce what had been delivered."""
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
    """A peer broke the contract."""
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    """Part of the contract that this version does not serve."""
    INTERNAL = "INTERNAL"
    """A bug of ours."""


class UnbrokenError(Exception):
    """Something the caller must act on.

    `detail` says what was expected and what was seen; `metadata` goes into `ErrorInfo.metadata`;
    `retry_after_s` becomes `RetryInfo`.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidField(UnbrokenError):  # noqa: N818 - it names what is wrong, as the reason does.
    """A field of a request is not what the contract allows."""

    def __init__(self, field: str, expected: str, seen: object) -> None:
        shown = repr(seen)
        if len(shown) > 80:
            shown = f"{shown[:77]}..."
        super().__init__(
            Reason.INVALID_FIELD,
            f"{field}: expected {expected}, got {shown}",
            metadata={"field": field},
        )
        self.field = field
