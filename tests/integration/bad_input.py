"""What a kind of bad input is, and what is answered to it; docs/BAD_INPUT.md lists all of them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc.aio

from unbroken.status import from_rpc_error

TargetT = TypeVar("TargetT")
"""What the input is said to."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a process answers: with a status, by ending the connection, or by going on."""

    code: str
    """gRPC code; or what happens where no call could carry one."""
    reason: str = ""
    """`ErrorInfo.reason`; empty if the gRPC library itself answers."""
    about: str = ""
    """Which field is wrong, or the FailureKind."""


@dataclass(frozen=True, slots=True)
class BadInput(Generic[TargetT]):
    """One kind of bad input: what it is, what it deserves, and how to say it."""

    kind: str
    expected: Answer
    say: Callable[[TargetT], Awaitable[Answer]]


def answer_of(error: grpc.aio.AioRpcError) -> Answer:
    """What a failed call says."""
    meaning = from_rpc_error(error)
    is_bare = "grpc_code" in meaning.metadata  # Not made by a process of ours.
    return Answer(
        code=error.code().name,
        reason="" if is_bare else meaning.reason.name,
        about=meaning.metadata.get("field") or meaning.metadata.get("failure", ""),
    )
