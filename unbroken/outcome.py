"""How streams and attempts end: the contract's enums, as enums of Python.

Values are those of the .proto files (a test compares them), so converting costs nothing.
"""

from enum import IntEnum


class FinishReason(IntEnum):
    """Why an output is complete (generation.proto)."""

    UNSPECIFIED = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class FailureKind(IntEnum):
    """Why an attempt ended before its stream did (worker.proto)."""

    UNSPECIFIED = 0
    CRASH = 1
    HANG = 2
    PARTITION = 3
    STALL = 4
    DRAIN = 5
    OVERLOAD = 6
    FENCED = 7
    PROTOCOL = 8
    DIVERGED = 9
    REJECTED = 10
    DATA_LOSS = 11
    ENGINE_ERROR = 12
    PREEMPTED = 13


class ContinuationClass(IntEnum):
    """How a stream goes on elsewhere (inference_service.proto, docs/CONTINUATION.md)."""

    UNSPECIFIED = 0
    APPEND = 1
    REGENERATE = 2
    NATIVE = 3
    RESTORE = 4
    INEXACT = 5
    NONE = 6


class ContinuationPolicy(IntEnum):
    """What the caller wants to happen when a worker is lost (inference_service.proto)."""

    UNSPECIFIED = 0
    PREFER_EXACT = 1
    REQUIRE_EXACT = 2
    ALLOW_INEXACT = 3
    NEVER = 4


class Continued(IntEnum):
    """What became of an output's exactness (inference_service.proto)."""

    UNSPECIFIED = 0
    NEVER = 1
    EXACT = 2
    INEXACT = 3
